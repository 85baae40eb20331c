"""The command line as a user meets it: quick, clear, with the right exit code and never a traceback."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def dml(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dml.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def test_help_is_instant_and_names_every_verb() -> None:
    best = min(processor_time_of_help() for _ in range(3))
    assert best < 0.5, f"dml --help took {best:.2f} s of processor time"
    told = dml("--help").stdout
    for verb in (
        "train",
        "eval",
        "encoder",
        "embed",
        "index",
        "search",
        "serve",
        "data",
        "list",
        "demo",
        "doctor",
    ):
        assert verb in told


def processor_time_of_help() -> float:
    """In seconds. What a wait costs on a busy machine is not in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert dml("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "verb",
    [
        ("train",),
        ("eval",),
        ("embed",),
        ("search",),
        ("serve",),
        ("demo",),
        ("doctor",),
        ("encoder", "create"),
        ("encoder", "export"),
        ("encoder", "check"),
        ("index", "build"),
        ("index", "add"),
        ("index", "remove"),
        ("index", "info"),
        ("index", "verify"),
        ("data", "check"),
        ("data", "split"),
        ("data", "demo"),
        ("data", "download"),
        ("list", "losses"),
        ("list", "methods"),
        ("list", "datasets"),
        ("list", "trunks"),
        ("list", "recipes"),
    ],
    ids=" ".join,
)
def test_every_verb_explains_itself_without_loading_torch(verb: tuple[str, ...]) -> None:
    code = (
        "import sys; sys.argv = ['dml', *sys.argv[1:]]\n"
        "from dml.cli.main import app\n"
        "try: app()\n"
        "except SystemExit as end: code = end.code\n"
        "print('TORCH' if 'torch' in sys.modules else 'LIGHT', code)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, *verb, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert "Usage" in out.stdout
    assert out.stdout.rstrip().endswith("LIGHT 0")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("trian",), 2, "trian"),
        (("train", "x", "--recipe", "cmbl"), 2, 'Did you mean "cbml"'),
        (("train", "x", "--set", "train.epoch=3"), 2, 'Did you mean "epochs"'),
        (("train", "x", "--set", "epochs"), 2, "--set takes KEY=VALUE"),
        (("train", "x", "--resume", "perhaps"), 2, "--resume"),
        (("train", "no-such-folder"), 3, "no-such-folder"),
        (("train",), 3, "No data"),
        (("demo", "no-such-folder"), 3, "no-such-folder"),
        (("eval", "no-such-run"), 1, "no-such-run"),
        (("search", "no-such-collection", "x.jpg"), 3, "x.jpg"),
        (("serve", "no-such-collection"), 1, "no-such-collection"),
        (("keys", "add", "shop"), 2, "--scope search (read), write (also change items) or admin"),
        (("index", "info", "no-such-collection"), 1, "no-such-collection"),
        (("encoder", "create", "--trunk", "resnet5000", "--weights", "none", "--out", "x"), 2, "resnet5000"),
        (("data", "check", "no-such-folder"), 3, "no-such-folder"),
        (("data", "download", "cubs"), 2, 'Did you mean "cub"? Known: cars, cub, inshop, sop.\n'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_mistake_gets_one_clear_message_and_its_exit_code(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    outcome = dml(*(a if a != "x.jpg" else str(tmp_path / a) for a in arguments))
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.returncode == code


WRITES = """
import io, json, sys
from dml.cli.main import main
class Writes(io.RawIOBase):
    seen = []

    def writable(self):
        return True

    def write(self, data):
        self.seen.append(bytes(data).decode())
        return len(data)

sys.stderr = io.TextIOWrapper(io.BufferedWriter(Writes()), line_buffering=True)
try:
    main()
finally:
    print(json.dumps(Writes.seen))
"""


def test_a_message_is_one_write_so_that_another_process_cannot_write_into_it() -> None:
    """Under torchrun several processes and torchrun itself share one stderr."""
    done = subprocess.run(
        [sys.executable, "-c", WRITES, "train", "no-such-folder"], capture_output=True, text=True, timeout=120
    )
    (only,) = (text for text in json.loads(done.stdout) if text.strip())
    assert only.startswith("error: ")
    assert "no-such-folder" in only
    assert only.endswith("\n")


def test_the_effective_recipe_can_be_printed_and_read_back(tmp_path: Path) -> None:
    printed = dml("train", "photos", "--recipe", "cbml", "--set", "train.epochs=5", "--print-config")
    assert printed.returncode == 0
    path = tmp_path / "again.toml"
    path.write_text(printed.stdout)
    again = dml("train", "--recipe", str(path), "--print-config")
    assert again.stdout == printed.stdout
    assert "epochs = 5" in again.stdout


@pytest.mark.parametrize("what", ["losses", "methods", "datasets", "recipes"])
def test_lists_name_things_with_one_line_each(what: str) -> None:
    rows = json.loads(dml("list", what, "--json").stdout)
    assert len(rows) >= 3
    assert all(summary.strip() for summary in rows.values())


def test_doctor_says_what_is_installed() -> None:
    report = json.loads(dml("doctor", "--json").stdout)
    assert report["packages"]["torch"]
    assert report["machine"]["cores"] >= 1


def test_a_folder_without_classes_and_one_with_a_single_class_are_refused(tmp_path: Path, draw) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    outcome = dml("train", str(empty), "--out", str(tmp_path / "a"))
    assert outcome.returncode == 3
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "a").exists()
    single = tmp_path / "single" / "only"
    single.mkdir(parents=True)
    for number in range(6):
        draw(number).save(single / f"{number}.jpg")
    outcome = dml("train", str(tmp_path / "single"), "--out", str(tmp_path / "b" / "c"))
    assert not (tmp_path / "b").exists()
    assert outcome.returncode == 3
    assert "one class" in outcome.stderr or "class" in outcome.stderr
    assert "Traceback" not in outcome.stderr
