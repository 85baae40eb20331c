"""Files and folders that are there completely or not at all, on disks that are really full."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dml.errors import StorageError
from dml.storage import (
    opened_aside,
    storage_errors,
    storage_reason,
    write_aside,
    written_aside,
    written_aside_folder,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits on the size of files are POSIX")

FULL_DISK = """
import resource, signal, sys
def allow(size):
    # Beyond so many bytes writing to any file fails, as on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""
COMMAND = """
allow(int(sys.argv[1]))
from dml.cli.main import main
sys.argv = ["dml", *sys.argv[2:]]
main()
"""


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FULL_DISK + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def dml_with_room_for(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return python(COMMAND, size, *arguments)


def assert_refused(done: subprocess.CompletedProcess[str], path: Path) -> None:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"error: {path} could not be written: File too large" in done.stderr
    assert "What was there before is unchanged." in done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What every library raises on a full disk


WRITERS = {
    "torch, by name": "import torch; torch.save({'w': torch.zeros(50_000)}, path)",
    "torch, opened": "import torch\nwith open(path, 'wb') as file: torch.save([torch.zeros(50_000)], file)",
    "safetensors of torch": (
        "import torch; from safetensors.torch import save_file; save_file({'w': torch.zeros(50_000)}, path)"
    ),
    "safetensors of numpy": (
        "import numpy; from safetensors.numpy import save_file; save_file({'w': numpy.zeros(50_000)}, path)"
    ),
    "parquet": (
        "import numpy, pyarrow, pyarrow.parquet\n"
        "table = pyarrow.table({'v': numpy.random.default_rng(0).random(50_000)})\n"
        "pyarrow.parquet.write_table(table, path)"
    ),
    "numpy": "import numpy\nwith open(path, 'wb') as file: numpy.save(file, numpy.zeros(50_000))",
    "text": "path.write_text('x' * 200_000)",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_on_a_full_disk_is_one_error_and_the_old_file_stays(writer: str, tmp_path: Path) -> None:
    if "torch" in writer:
        pytest.importorskip("torch")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    script = f"""
from pathlib import Path
from dml.errors import StorageError
from dml.storage import write_aside

def write(path):
    exec({WRITERS[writer]!r}, {{"path": path}})

path = Path(sys.argv[1])
write(path.with_name("warm"))  # whatever it loads or caches at first use
path.with_name("warm").unlink()
for room in (0, 30_000):
    allow(room)
    try:
        write_aside(path, write)
    except StorageError as error:
        print(error)
"""
    done = python(script, path)
    errors = done.stdout.splitlines()
    assert len(errors) == 2, done.stderr
    for error in errors:
        assert error.startswith(f"{path} could not be written: ")
        assert "File too large" in error or "the disk is full or refuses (" in error
        assert "What was there before is unchanged." in error
    assert contents(tmp_path) == {"file": b"old"}


def test_a_checkpoint_on_a_full_disk_names_the_reason_and_keeps_the_last_one(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    script = """
from pathlib import Path
import torch
from dml.errors import StorageError
from dml.training.checkpoint import Standing, load_checkpoint, save_checkpoint

path = Path(sys.argv[1])
layer = torch.nn.Linear(300, 300)
optimizer = torch.optim.Adam(layer.parameters())
save_checkpoint(path, layer, optimizer, Standing(step=1), {})
for room in (0, 10_000, 300_000):
    allow(room)
    try:
        save_checkpoint(path, layer, optimizer, Standing(step=2), {})
    except StorageError as error:
        print(error)
print(load_checkpoint(path, layer, optimizer, {}).step)
"""
    done = python(script, tmp_path / "checkpoints" / "last.pt")
    assert done.returncode == 0, done.stderr
    *errors, step = done.stdout.splitlines()
    assert len(errors) == 3
    assert all("could not be written: File too large. What was there before" in error for error in errors)
    assert step == "1"
    assert list((tmp_path / "checkpoints").iterdir()) == [tmp_path / "checkpoints" / "last.pt"]


# Commands


@pytest.mark.parametrize("full_at", ["model.safetensors", "model.onnx"])
def test_encoder_export_on_a_full_disk_keeps_the_old_encoder(
    full_at: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, out)
    before = contents(tmp_path)
    weights, graph = ((out / f"model.{kind}").stat().st_size for kind in ("safetensors", "onnx"))
    assert weights < graph  # so that there can be room for the one and not for the other
    room = weights - 1 if full_at == "model.safetensors" else weights
    assert_refused(dml_with_room_for(room, "encoder", "export", out, "--out", out), out)
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]


@pytest.mark.parametrize("name", ["split.csv", "split.tsv", "split.parquet"])
def test_data_split_on_a_full_disk_keeps_the_old_manifest(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / name
    out.write_bytes(b"old")
    assert_refused(dml_with_room_for(100, "data", "split", tiny_folder, "--out", out, "--overwrite"), out)
    assert contents(tmp_path) == {name: b"old"}


def test_data_check_on_a_full_disk_keeps_the_old_page(tiny_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_bytes(b"old")
    assert_refused(dml_with_room_for(100, "data", "check", tiny_folder, "--html", page), page)
    assert contents(tmp_path) == {"page.html": b"old"}


def test_data_check_into_a_file_as_a_folder_is_refused_in_one_message(
    tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    page = tmp_path / "file" / "page.html"
    done = dml_with_room_for(10_000_000, "data", "check", tiny_folder, "--html", page)
    assert done.returncode == 1
    assert f"error: {page} could not be written: " in done.stderr
    assert "Traceback" not in done.stderr


def test_index_build_on_a_full_disk_gives_one_reason(
    tiny_folder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shop"
    command = ("index", "build", tiny_folder, "--encoder", tiny_encoder, "--out", out)
    done = dml_with_room_for(200_000, *command)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large, at " in done.stderr  # copying the encoder, which shutil reports as a list
    assert "[(" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# Where the error comes from


def test_a_full_disk_is_called_so() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        said = os.strerror(number)
        with pytest.raises(StorageError) as caught, storage_errors(Path("a/b"), intact="c is whole."):
            raise OSError(number, said)
        assert str(caught.value).startswith(
            f"a/b could not be written: the disk is full ({said}). c is whole. "
        )


class SafetensorError(Exception):
    """As the one of safetensors, which is not imported by whoever recognises it."""

    __module__ = "safetensors._safetensors_rust"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full (No space left on device)",
        ),
        (
            SafetensorError(
                'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
            ),
            "the disk is full (No space left on device)",
        ),
        (SafetensorError("Error while serializing: InvalidTensorView"), None),
        (
            RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 736448 vs 736344"),
            "the disk is full or refuses (torch: unexpected pos 736448 vs 736344)",
        ),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            "the disk is full or refuses (torch: PytorchStreamWriter failed writing file data/0: "
            "file write failed)",
        ),
        (
            RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"),
            None,
        ),
        (RuntimeError("CUDA out of memory. Tried to write 20 MiB"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
        (ValueError("No space left on device"), None),
        (
            shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'"), ("c", "d", "e")]),
            "the disk is full (No space left on device), at b (and 1 more)",
        ),
        (shutil.Error("`a` and `b` are the same file"), "`a` and `b` are the same file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refusing_disk_is_told_from_everything_else(error: Exception, reason: str | None) -> None:
    assert storage_reason(error) == reason
    kind = type(error) if reason is None else StorageError
    with pytest.raises(kind) as caught, storage_errors(Path("x")):
        raise error
    assert reason is not None or caught.value is error


def test_a_torch_error_in_the_wake_of_a_system_error_has_its_reason() -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 640 vs 598")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert storage_reason(error) == "the disk is full (No space left on device)"


# Kills, interrupts and odd places


def test_a_file_takes_its_place_whole_and_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    with written_aside(path) as aside:
        aside.write_text("new")
        assert not path.exists()
    write_aside(path, lambda aside: aside.write_text("newer"))
    with opened_aside(path) as file:
        file.write(b"newest")
        assert path.read_text() == "newer"
    assert contents(tmp_path) == {"a/b/file.txt": b"newest"}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_write_leaves_what_was_there(
    interruption: type[BaseException], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_bytes(b"old")
    before = contents(tmp_path)

    def half(aside: Path) -> None:
        aside.write_bytes(b"half")
        raise interruption

    def half_a_folder() -> None:
        with written_aside_folder(tmp_path / "folder") as aside:
            half(aside / "inside")

    with pytest.raises(interruption):
        write_aside(tmp_path / "file", half)
    with pytest.raises(interruption):
        half_a_folder()
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


KILLED = """
import os, signal
from pathlib import Path
import dml.storage
from dml.storage import written_aside, written_aside_folder
path = Path(sys.argv[1])
"""
IN_A_FILE = """
with written_aside(path) as aside:
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
IN_A_FOLDER = """
with written_aside_folder(path) as aside:
    (aside / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
BETWEEN_TWO_RENAMES = """
rename = Path.rename
def killed(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed
with written_aside_folder(path) as aside:
    (aside / "file").write_text("new")
"""


def killed(script: str, path: Path) -> None:
    assert python(KILLED + script, path).returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_cleared_by_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for _ in range(2):  # the second clears what the first has left, and leaves its own
        killed(IN_A_FILE, path)
        assert list(contents(tmp_path).values()) == [b"half"]
    write_aside(path, lambda aside: aside.write_text("whole"))
    assert contents(tmp_path) == {"file": b"whole"}


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    mine, theirs = written_aside(path), tmp_path / f".file.{os.getppid()}-0.aside"
    theirs.write_text("theirs")
    with mine as aside:
        aside.write_text("first")
        write_aside(path, lambda other: other.write_text("second"))
        assert aside.read_text() == "first"
    assert contents(tmp_path) == {"file": b"first", theirs.name: b"theirs"}


def test_a_killed_folder_is_cleared_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    killed(IN_A_FOLDER, path)
    assert not path.exists()
    with written_aside_folder(path) as aside:
        (aside / "file").write_text("whole")
    assert contents(tmp_path) == {"folder/file": b"whole"}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def replaced(path: Path) -> None:
    with written_aside_folder(path) as aside:
        (aside / "file").write_text("newer")


def refused(path: Path) -> None:
    with pytest.raises(ValueError, match="no"), written_aside_folder(path):
        raise ValueError("no")


@pytest.mark.parametrize(("then", "expected"), [(replaced, b"newer"), (refused, b"old")])
def test_a_folder_lost_between_two_renames_is_put_back(
    then: Callable[[Path], None], expected: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "file").write_text("old")
    killed(BETWEEN_TWO_RENAMES, path)
    assert not path.exists()
    then(path)
    assert contents(tmp_path) == {"folder/file": expected}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far" / "file")
    write_aside(link, lambda aside: aside.write_text("new"))
    assert link.is_symlink()
    assert (tmp_path / "far" / "file").read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_aside(path, lambda aside: aside.write_text("through"))
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert path.is_fifo()


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Is a directory"):
        write_aside(tmp_path, lambda aside: aside.write_text("x"))
    assert list(tmp_path.iterdir()) == []
