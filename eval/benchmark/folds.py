"""Which pictures a run may see: class-disjoint folds inside the training classes.

Folds, and the classes of a suite's pretrained trunk, depend on class names only. They are a file beside the
suite, or beside the results when the suite has none yet. A run gets a manifest of its training folds and its
validation fold: pictures of test classes are not even listed, so no run can select by them.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dml.config import DataConfig
from dml.data.split import divide
from dml.data.table import ImageTable, Record, counted, open_table
from dml.errors import ConfigError, DataError
from dml.storage import write_aside
from eval.benchmark.suite import Suite, digest_of


@dataclass(frozen=True)
class Folds:
    """The training classes in parts, and the test classes, by name."""

    parts: tuple[tuple[str, ...], ...]
    test: tuple[str, ...]
    pretrain: tuple[str, ...] = ()
    """Training classes that only the pretrained trunk sees."""

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        named = {f"fold {number}": part for number, part in enumerate(self.parts)}
        for where, part in {**named, "test": self.test, "pretrain": self.pretrain}.items():
            for name in part:
                if name in seen:
                    raise DataError(f'the class "{name}" is in {seen[name]} and in {where}; folds share none')
                seen[name] = where

    @property
    def digest(self) -> str:
        return digest_of([self.parts, self.test, *([self.pretrain] if self.pretrain else [])])

    def to_json(self) -> str:
        tree = {"format": 1, "folds": self.parts, "test": self.test}
        return json.dumps({**tree, **({"pretrain": self.pretrain} if self.pretrain else {})}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Folds":
        try:
            tree = json.loads(text)
            parts = tuple(tuple(part) for part in tree["folds"])
            return cls(parts, tuple(tree["test"]), tuple(tree.get("pretrain", ())))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where} is no file of folds: {error!r}") from None


@dataclass(frozen=True)
class Pictures:
    """The data of a suite: the records by their use, and the hash of what they are."""

    pool: tuple[Record, ...]  # of the training classes that are in folds
    test: tuple[Record, ...]  # searched in themselves; or the queries
    gallery: tuple[Record, ...]  # of the test classes, where the data has one
    folds: Folds
    digest: str
    pretrain: tuple[Record, ...] = ()  # of the classes of the pretrained trunk

    def fold(self, number: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
        """Training and validation records of a fold."""
        held = set(self.folds.parts[number])
        train = tuple(r for r in self.pool if r.label not in held)
        return train, tuple(r for r in self.pool if r.label in held)


def make_folds(
    train: Sequence[str], test: Sequence[str], *, folds: int, seed: int, pretrain: int = 0
) -> Folds:
    """Deal the training classes out in an order that only their names and the seed decide.

    Args:
        pretrain: so many classes go to the pretrained trunk first.

    Raises:
        DataError: fewer than two classes for a fold.
    """
    names = sorted(set(train))
    if len(names) - pretrain < 2 * folds:
        apart = f" besides the {pretrain} of the pretrained trunk" if pretrain else ""
        raise DataError(
            f"{folds} folds need at least {2 * folds} training classes{apart}, and there are {len(names)}"
        )
    names.sort(key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    parts = tuple(tuple(sorted(names[start::folds])) for start in range(pretrain, pretrain + folds))
    return Folds(parts, tuple(sorted(set(test))), tuple(sorted(names[:pretrain])))


def open_pictures(suite: Suite, data: str, results: Path) -> Pictures:
    """Find the suite's pictures, check that they are its pictures, and read or make its folds.

    Args:
        data: a folder, a manifest or "name:folder".
        results: the suite's folder of results, where folds are written that are not beside the suite.

    Raises:
        DataError: the pictures are not those that the suite names, or not those of the folds.
    """
    table = open_table(data)
    splits = divide(table, DataConfig(source=data, protocol="open-set"))
    pool, test, gallery = splits.train + splits.validation, splits.test or splits.query, splits.gallery
    digest = pictures_digest(table)
    if suite.data.digest and digest != suite.data.digest:
        raise DataError(
            f"{data} does not hold the pictures of the suite {suite.name}: it has {table.describe()}\n"
            f"with the digest {digest}, and the suite was made on {suite.data.digest}. "
            f"{suite.data.about} To measure on your own pictures, copy {suite.path.name}, "
            f"take its digest out, and give the path of the copy."
        )
    made = make_folds(
        list(counted(pool)),
        list(counted(test + gallery)),
        folds=suite.protocol.folds,
        seed=suite.protocol.fold_seed,
        pretrain=0 if suite.pretrain is None else suite.pretrain.classes,
    )
    folds = stored_folds(suite, made, results)
    apart = set(folds.pretrain)
    return Pictures(
        pool=tuple(r for r in pool if r.label not in apart),
        test=test,
        gallery=gallery,
        folds=folds,
        digest=digest,
        pretrain=tuple(r for r in pool if r.label in apart),
    )


def folds_file(suite: Suite, results: Path) -> Path:
    """Where the folds of a suite are: beside it, else beside its results."""
    beside = suite.path.with_suffix(".folds.json")
    return beside if beside.is_file() else results / "folds.json"


def stored_folds(suite: Suite, made: Folds, results: Path) -> Folds:
    """The folds of the file, written when there is none.

    Raises:
        DataError: the file is about other classes.
    """
    path = folds_file(suite, results)
    if not path.is_file():
        write_aside(path, lambda aside: aside.write_text(made.to_json(), encoding="utf-8"))
        return made
    stored = Folds.from_json(path.read_text(encoding="utf-8"), str(path))
    if len(stored.parts) != suite.protocol.folds:
        raise ConfigError(
            f"{path} has {len(stored.parts)} folds, and the suite states {suite.protocol.folds}"
        )
    for name, ours, theirs in (
        ("training", {c for part in stored.parts for c in part}, {c for part in made.parts for c in part}),
        ("test", set(stored.test), set(made.test)),
        ("pretraining", set(stored.pretrain), set(made.pretrain)),
    ):
        if ours != theirs:
            raise DataError(
                f"{path} is about other pictures: {len(ours ^ theirs)} {name} classes are in only one of the "
                f"two, for instance {min(ours ^ theirs)}"
            )
    return stored


def pictures_digest(table: ImageTable) -> str:
    """A hash of what the pictures are: split, class, file name and file size of each.

    Contents are not read: on a large set that would take minutes for each command. A missing file has size
    -1.
    """
    rows = []
    for record in table.records:
        try:
            size = record.path.stat().st_size
        except OSError:
            size = -1
        part = record.role or record.split or ""
        box = " ".join(map(str, record.box or ()))
        rows.append("\x1f".join((part, record.label or "", record.path.name, str(size), box)))
    return hashlib.sha256("\x1e".join(sorted(rows)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def fold_manifest(pictures: Pictures, fold: int, path: Path) -> Path:
    """A manifest of one fold: training and validation pictures, and no others."""
    train, validation = pictures.fold(fold)
    return write_manifest({"train": train, "validation": validation}, path)


def write_manifest(splits: Mapping[str, Sequence[Record]], path: Path) -> Path:
    """A manifest of these pictures; the split "" leaves it to the training run to divide them."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(("path", "label", "split", "box"))
    for split, records in splits.items():
        for record in records:
            box = " ".join(map(str, record.box or ()))
            rows.writerow((record.path.absolute(), record.label, split, box))
    write_aside(path, lambda aside: aside.write_text(text.getvalue(), encoding="utf-8"))
    return path
