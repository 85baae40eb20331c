"""Who trains, who selects, who tests: two protocols, never mixed, always named.

open-set: the three splits share no class, so that a figure says how well *new* classes are told apart.
closed-set: held-out pictures of the same classes; exact duplicates stay on one side.
"""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dml.config import DataConfig
from dml.data.table import ImageTable, Record, count_text, counted
from dml.errors import DataError

Protocol = Literal["open-set", "closed-set"]
Records = tuple[Record, ...]

OPEN_SET_FROM = 20
"""Classes from which on "auto" means open-set, when the data has no splits of its own."""

_PARTS = ("train", "validation", "test", "query", "gallery")


@dataclass(frozen=True)
class Splits:
    """A table divided. Either `test` is set (every picture is query and gallery), or `query` and `gallery`
    are."""

    protocol: Protocol
    train: Records
    validation: Records
    test: Records
    query: Records
    gallery: Records
    digest: str
    """sha256 over protocol, splits, relative paths, labels and boxes: equal digests, equal splits, on any
    machine."""
    root: Path = Path()
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Training classes, sorted: the label map of the model."""
        return tuple(sorted(counted(self.train)))

    def describe(self) -> str:
        """Protocol, class and image counts per split, and the digest, in a few lines for a terminal."""
        lines = [f"protocol {self.protocol}, split {self.digest[:12]}"]
        for name in _PARTS:
            rows: Records = getattr(self, name)
            if rows:
                lines.append(f"  {name}: {count_text(len(rows), len(counted(rows)))}")
        tested = set(counted(self.test + self.query))
        shared = {"train & test": set(self.classes) & tested}
        shared["train & validation"] = set(self.classes) & set(counted(self.validation))
        shared["validation & test"] = set(counted(self.validation)) & tested
        lines.append("  shared classes: " + ", ".join(f"{pair} {len(both)}" for pair, both in shared.items()))
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything needed to divide the same data in the same way again (paths relative to the root)."""
        parts = {name: [_as_json(r, self.root) for r in getattr(self, name)] for name in _PARTS}
        head = {
            "format": 1,
            "protocol": self.protocol,
            "digest": self.digest,
            "root": str(self.root.resolve()),
        }
        return json.dumps({**head, "notes": self.notes, **parts}, indent=1)

    @classmethod
    def from_json(cls, text: str, *, root: Path | None = None) -> "Splits":
        """Read what `to_json` wrote.

        Args:
            root: where the pictures are now, when they have moved.

        Raises:
            DataError: not such a file, a newer format, or content that does not fit its digest.
        """
        try:
            tree = json.loads(text)
            if tree["format"] > 1:
                raise DataError(
                    f"the splits were written by a newer version (format {tree['format']}); update dml"
                )
            base = Path(tree["root"]) if root is None else root
            parts = {name: tuple(_from_json(row, base) for row in tree[name]) for name in _PARTS}
            splits = cls(
                tree["protocol"], **parts, digest=tree["digest"], root=base, notes=tuple(tree["notes"])
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"this is no file of splits, or it is damaged: {error!r}") from error
        if _digest(splits) != splits.digest:
            raise DataError("the splits do not fit their digest: the file was changed by hand or is damaged")
        return splits


def divide(table: ImageTable, config: DataConfig) -> Splits:
    """Divide a table; splits that it has are respected, missing ones are taken from its training part.

    Validation is always held out of the training classes (open-set) or pictures (closed-set), never out of
    test. A query folder without a gallery is searched in the training pictures when it shows their classes (a
    catalogue and photos taken later); otherwise the queries are searched among themselves.

    Raises:
        DataError: no labels, one class, no class with two pictures, too few classes to hold any out, or a
            class on both sides (open-set).
    """
    labelled = tuple(r for r in table.records if r.label is not None)
    pool = tuple(r for r in labelled if r.split in (None, "train"))
    _check_classes(table, labelled, pool)
    given = _given(labelled)
    protocol = _protocol(table, pool, given, config)
    notes: list[str] = []
    if len(labelled) < len(table):
        notes.append(f"{len(table) - len(labelled):,} images without a label take no part")
    hold_out = _hold_out_classes if protocol == "open-set" else _hold_out_images
    if not given["test"] and not given["query"] and config.test_share:
        pool, given["test"] = hold_out(pool, config.test_share, config, "test", notes)
    if not given["validation"]:
        # A share of what was there before the test split was taken, so that both shares mean the same thing.
        rest = 1.0 if any(r.split for r in labelled) else 1 - config.test_share
        pool, given["validation"] = hold_out(
            pool, config.validation_share / rest, config, "validation", notes
        )
    if given["query"] and not given["gallery"]:
        _find_gallery(given, pool, notes)
    splits = Splits(protocol, pool, **given, digest="", root=table.root, notes=tuple(notes))
    if protocol == "open-set":
        _check_disjoint(splits)
    return replace(splits, digest=_digest(splits))


def _check_classes(table: ImageTable, labelled: Records, pool: Records) -> None:
    if not labelled:
        raise DataError(
            f"{table.root} ({table.layout}) has no classes, so nothing can be learned from it. Put the "
            f"pictures of each class in a folder of their own (CLASS/picture.jpg) or give a manifest with a "
            f"label column. To search it without training, make an encoder with `dml encoder create`."
        )
    sizes = counted(pool)
    if not sizes:
        raise DataError(f"{table.root} has no training images: every labelled image is in another split")
    if len(sizes) == 1:
        raise DataError(
            f'{table.root} has one training class only ("{next(iter(sizes))}"); telling apart needs two'
            " or more"
        )
    if max(sizes.values()) < 2:
        raise DataError(
            f"None of the {len(sizes):,} training classes of {table.root} has two images, so nothing shows "
            "what belongs together. Are the folders classes? Add images to them."
        )


def _given(labelled: Records) -> dict[str, Records]:
    def part(split: str, role: str | None = None) -> Records:
        return tuple(r for r in labelled if r.split == split and r.role == role)

    both, query, gallery = part("test"), part("test", "query"), part("test", "gallery")
    if both and (query or gallery):  # pictures in both roles beside pictures in one: two lists say it all
        query, gallery, both = query + both, gallery + both, ()
    if gallery and not query:
        both, gallery = gallery, ()
    return {"validation": part("validation"), "test": both, "query": query, "gallery": gallery}


def _protocol(table: ImageTable, pool: Records, given: Mapping[str, Records], config: DataConfig) -> Protocol:
    """What the data's own splits are, what was asked for, and whether the two agree."""
    trained = set(counted(pool))
    held = [set(counted(given[name])) for name in ("validation", "test", "query", "gallery") if given[name]]
    if not held:
        if config.protocol != "auto":
            return config.protocol
        return "open-set" if len(trained) >= OPEN_SET_FROM else "closed-set"
    shared = trained & set().union(*held)
    own: Protocol = "closed-set" if shared else "open-set"
    if config.protocol in ("auto", own):
        return own
    if own == "closed-set":
        raise DataError(
            f"open-set was asked for, but the splits of {table.root} share {len(shared):,} classes "
            f"({_some(shared)}). Ask for closed-set, or take the splits away and let them be made."
        )
    raise DataError(
        f"closed-set was asked for, but no held-out class of {table.root} occurs in its training images. "
        f"Ask for open-set."
    )


def _hold_out_classes(
    pool: Records, share: float, config: DataConfig, split: str, notes: list[str]
) -> tuple[Records, Records]:
    """Whole classes, chosen by the seed among those with two images or more (others would have nothing to
    find)."""
    sizes = counted(pool)
    fit = sorted(label for label, size in sizes.items() if size > 1)
    wanted = max(2, round(share * len(sizes)))
    if len(sizes) - wanted < 2 or len(fit) - wanted < 1:
        raise DataError(
            f"open-set needs classes to hold out for {split}: {wanted} of {len(sizes)} cannot be spared (at "
            "least two must remain for training). Add classes, or ask for closed-set."
        )
    random.Random(f"{config.split_seed}:{split}").shuffle(fit)
    held = set(fit[:wanted])
    return tuple(r for r in pool if r.label not in held), tuple(r for r in pool if r.label in held)


def _hold_out_images(
    pool: Records, share: float, config: DataConfig, split: str, notes: list[str]
) -> tuple[Records, Records]:
    """A share of every class that can spare two images; exact duplicates move together or stay."""
    groups = _duplicate_groups(pool)
    chance = random.Random(f"{config.split_seed}:{split}")
    by_class: dict[str, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    mixed = {g for g, labels in _labels_of(groups, pool).items() if len(labels) > 1}
    for row, record in enumerate(pool):
        if record.label is not None:
            by_class[record.label][groups[row]].append(row)
    held: set[int] = set()
    spared = []
    for label in sorted(by_class):
        total = sum(len(rows) for rows in by_class[label].values())
        wanted = max(2, round(share * total))
        movable = sorted((g for g in by_class[label] if g not in mixed), key=lambda g: by_class[label][g][0])
        chance.shuffle(movable)
        taken: list[int] = []
        for group in movable:
            if len(taken) >= wanted or total - len(taken) - len(by_class[label][group]) < 2:
                continue
            taken += by_class[label][group]
        if len(taken) < 2:  # a single held-out image has nothing to find
            spared.append(label)
            continue
        held.update(taken)
    if not held:
        raise DataError(
            f"no class has enough images to hold some out for {split}: the largest of {len(by_class)} has "
            f"{max(counted(pool).values())}. At least 4 different images in a class are needed."
        )
    if spared:
        notes.append(f"{len(spared):,} classes are too small to give images to {split} ({_some(spared)})")
    return tuple(r for i, r in enumerate(pool) if i not in held), tuple(
        r for i, r in enumerate(pool) if i in held
    )


def _labels_of(groups: Sequence[Any], pool: Records) -> Mapping[Any, set[str | None]]:
    found: dict[Any, set[str | None]] = defaultdict(set)
    for group, record in zip(groups, pool, strict=True):
        found[group].add(record.label)
    return found


def _duplicate_groups(records: Sequence[Record]) -> list[str]:
    """For every record the name of its group: records of equal files (or of the same file) share one."""
    content = file_hashes(r.path for r in records)
    return [content.get(r.path) or str(r.path) for r in records]


def file_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """sha256 of those files that have another one of their size: only they can be duplicates. Unreadable:
    left out."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        try:
            by_size[path.stat().st_size].append(path)
        except OSError:
            continue
    hashes = {}
    for alike in by_size.values():
        if len(alike) == 1:
            continue
        for path in alike:
            try:
                with path.open("rb") as stream:
                    hashes[path] = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError:
                continue
    return hashes


def _find_gallery(given: dict[str, Records], pool: Records, notes: list[str]) -> None:
    asked = set(counted(given["query"]))
    if asked <= set(counted(pool)):
        given["gallery"] = pool
        notes.append("there is no gallery split: the queries are searched in the training images")
    else:
        given["test"], given["query"] = given["query"], ()
        notes.append("there is no gallery split: the queries are searched among themselves")


def _check_disjoint(splits: Splits) -> None:
    parts = {name: set(counted(getattr(splits, name))) for name in ("train", "validation")}
    parts["test"] = set(counted(splits.test + splits.query + splits.gallery))
    names = list(parts)
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            shared = parts[left] & parts[right]
            if shared:
                raise DataError(
                    f"{left} and {right} share {len(shared):,} classes ({_some(shared)}), which open-set "
                    "forbids. Correct the splits of the data, or ask for closed-set."
                )


def _digest(splits: Splits) -> str:
    rows = []
    for name in _PARTS:
        for record in getattr(splits, name):
            box = " ".join(map(str, record.box)) if record.box else ""
            rows.append("\x1f".join((name, relative(record.path, splits.root), record.label or "", box)))
    text = "\x1e".join([splits.protocol, *sorted(rows)])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def relative(path: Path, root: Path) -> str:
    """POSIX path below the root, or the absolute one where it lies elsewhere."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.absolute().as_posix()


def _as_json(record: Record, root: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"path": relative(record.path, root), "label": record.label}
    if record.box is not None:
        row["box"] = record.box
    if record.role is not None:
        row["role"] = record.role
    if record.split is not None:
        row["split"] = record.split
    if record.payload:
        row["payload"] = record.payload
    return row


def _from_json(row: Mapping[str, Any], root: Path) -> Record:
    box = tuple(row["box"]) if row.get("box") else None
    return Record(
        root / row["path"], row["label"], row.get("split"), box, row.get("role"), dict(row.get("payload", {}))
    )


def _some(names: Iterable[str], most: int = 5) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most:,} more" if len(ordered) > most else "")
