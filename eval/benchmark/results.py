"""Result files: one JSON per finished run, and what they say about a row.

    RESULTS/SUITE/ROW/trial-07-fold-2.json    a setting tried on one fold
    RESULTS/SUITE/ROW/seed-3.json             a full run with the best setting
    RESULTS/SUITE/ROW/final-3.json            that run's encoder on the test classes
    RESULTS/SUITE/looks.jsonl                 one line for every look at them

A file is written aside and renamed, so that it is there completely or not at all; one that is cut all the
same (a full disk, a copy) counts as missing and is written again.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dml.errors import ConfigError
from dml.storage import write_aside
from eval.benchmark.suite import Suite, digest_of

ROOT = Path(__file__).parent.parent.parent
FORMAT = 1
NAME = re.compile(r"trial-(?P<trial>\d+)-fold-(?P<fold>\d+)|seed-(?P<seed>\d+)|final-(?P<final>\d+)")

Result = dict[str, Any]


@dataclass(frozen=True, order=True)
class Item:
    """One run of the queue."""

    row: str
    phase: Literal["trial", "seed"]
    number: int  # of the trial, or the seed
    fold: int

    @property
    def name(self) -> str:
        if self.phase == "trial":
            return f"trial-{self.number:02d}-fold-{self.fold}"
        return f"seed-{self.number}"


@dataclass(frozen=True)
class Place:
    """Where the results of a suite are."""

    results: Path  # RESULTS/SUITE

    def file(self, row: str, name: str) -> Path:
        return self.results / row / f"{name}.json"

    @property
    def frozen(self) -> Path:
        """Where frozen recipes are: a folder `frozen` beside the folder of results."""
        return self.results.parent.parent / "frozen" / self.results.name

    @property
    def looks(self) -> Path:
        return self.results / "looks.jsonl"


@dataclass(frozen=True)
class RowResults:
    """The result files of one row."""

    trials: dict[tuple[int, int], Result]  # (trial, fold)
    seeds: dict[int, Result]
    finals: dict[int, Result]

    def all(self) -> list[Result]:
        return [*self.trials.values(), *self.seeds.values(), *self.finals.values()]


def default_place(suite: Suite, results: Path | None = None) -> Place:
    """RESULTS/SUITE: eval/results for a bundled suite in a checkout of the repository, else ./results."""
    if results is None:
        bundled = suite.path.parent == ROOT / "eval" / "suites"
        results = results_folder() if bundled else Path("results")
    return Place(results / suite.name)


def results_folder() -> Path:
    """eval/results in a checkout of the repository, else ./results."""
    return ROOT / "eval" / "results" if (ROOT / ".git").exists() else Path("results")


_CACHE: dict[Path, tuple[tuple[int, int, int], Result | None]] = {}


def read_result(path: Path) -> Result | None:
    """A result file, or None for one that is not there or not whole.

    Raises:
        ConfigError: it was written by a newer version.
    """
    try:
        now = path.stat()
    except OSError:
        return None
    mark = (now.st_mtime_ns, now.st_size, now.st_ino)
    if path in _CACHE and _CACHE[path][0] == mark:
        return _CACHE[path][1]
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tree = None
    result: Result | None = tree if isinstance(tree, dict) and "format" in tree else None
    if result is not None and result["format"] > FORMAT:
        raise ConfigError(f"{path} has format {result['format']}; this version reads {FORMAT}. Update dml.")
    _CACHE[path] = (mark, result)
    return result


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file, completely or not at all. One key a line: small, and still to be read."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {"format": FORMAT, **result}.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_row(place: Place, row: str) -> RowResults:
    """Every whole result file of a row."""
    found = RowResults({}, {}, {})
    folder = place.results / row
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        match = NAME.fullmatch(path.stem)
        result = read_result(path) if match else None
        if match is None or result is None:
            continue
        if match["trial"] is not None:
            found.trials[int(match["trial"]), int(match["fold"])] = result
        elif match["seed"] is not None:
            found.seeds[int(match["seed"])] = result
        else:
            found.finals[int(match["final"])] = result
    return found


def check_row_results(suite: Suite, row: str, results: RowResults, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with results of another suite, other pictures or another row of the same name.

    Raises:
        ConfigError: names what differs.
    """
    for result in results.all():
        if result["settings_digest"] != digest_of(settings):
            raise ConfigError(
                f"The results of the row {row} were made with other settings than {suite.path.name} states: "
                f"{'; '.join(differences(result['settings'], settings))}. Put the settings back, or move the "
                f"row's folder of results away to measure it again."
            )
        if result["row_digest"] != suite.row_digest(row):
            raise ConfigError(
                f"The row {row} was changed in {suite.path.name} after results of it were made. Put it back, "
                f"give the changed row another name, or move its folder of results away."
            )


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """ "a.b: 1 → 2" for every value that differs in two trees."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        keys = [*left, *(key for key in right if key not in left)]
        return [
            line
            for key in keys
            for line in differences(left.get(key), right.get(key), f"{where}.{key}" if where else str(key))
        ]
    same = json.dumps(left, default=list) == json.dumps(right, default=list)
    return [] if same else [f"{where}: {json.dumps(left, default=list)} → {json.dumps(right, default=list)}"]


@contextmanager
def locked(place: Place, name: str) -> Iterator[bool]:
    """Whether this process got the lock of that name, which it then holds for the block.

    Locks of killed processes vanish with them. They lie in a folder that git ignores.
    """
    folder = place.results / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n")
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)
