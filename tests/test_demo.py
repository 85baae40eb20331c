"""The whole way in one command, on a user's own folder: train, index, serve, evaluate, report."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

from dml.client import Client

ROOT = Path(__file__).parent.parent
SMALL = {
    "data.image_size": "32",
    "model.dim": "16",
    "train.epochs": "2",
    "train.steps_per_epoch": "3",
    "train.classes_per_batch": "4",
    "train.images_per_class": "3",
}


def demo(pictures: Path, out: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "dml.cli.main", "demo", str(pictures), "--out", str(out), *options]
    for key, value in SMALL.items():
        command += ["--set", f"{key}={value}"]
    return command


def test_a_folder_becomes_a_measured_search(tiny_folder: Path, tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(tiny_folder, tmp_path / "my pictures (2024)"))
    out = tmp_path / "out put"
    done = subprocess.run(demo(pictures, out, "--no-serve"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in ("Recall@1", "MAP@R", "exact", "index", "service"):
        assert stage in done.stdout
    assert "<html" in (out / "report.html").read_text()
    again = subprocess.run(demo(pictures, out, "--no-serve"), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr  # a finished run is used as it is


def test_the_page_stays_up_until_ctrl_c(tiny_folder: Path, tmp_path: Path) -> None:
    command = demo(tiny_folder, tmp_path / "out", "--port", "0")
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        address = ""
        for line in process.stderr:
            if "Search page: http" in line:
                address = line.split()[2]
            if "Ctrl-C ends it" in line:
                break
        with Client(address) as client:
            assert client.collection("out").count == 48
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
