"""Copying a collection to another folder or backend: local to Milvus, Milvus to local, or to its own kind.

The copy is made in a hidden folder beside the target, `.NAME.moving`, and takes its name when it is complete
and compared. A journal in it says how far the copy is, so a move that was killed goes on where it was. The
source is only read.
"""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dml.collection import create_collection, in_milvus, is_collection, open_collection
from dml.collection.base import Hit, Item, NewItem, SearchResult
from dml.collection.place import turn
from dml.data.ids import absolute
from dml.errors import CollectionError, DamagedFile, NotAvailable, UnknownCollection
from dml.index import KINDS as LOCAL_KINDS
from dml.storage import flush_to_disk, storage_errors, write_aside, written_aside_folder

if TYPE_CHECKING:
    from dml.collection.local import LocalCollection

JOURNAL = "move.json"
STORED = "stored"
"""Root of the pictures that a local collection had stored, in a target that stores none."""

BATCH = 1000
SAMPLE = 200
"""Items whose neighbours are compared, unless told otherwise."""
NEIGHBOURS = 10
SAME_SCORE = 1e-6

Progress = Callable[[int, int, int], None]
"""Told (done, all, 0) items after each batch."""


@dataclass
class Journal:
    """How far a move is."""

    source: str
    fingerprint: str
    last: str | None = None  # the id that was copied last; ids come in order
    copied: int = 0
    sample: list[str] = field(default_factory=list)  # every item is as likely to be in it as any other

    def save(self, folder: Path) -> None:
        """Raises StorageError."""
        write_aside(folder / JOURNAL, lambda aside: aside.write_text(json.dumps(asdict(self))))


@dataclass(frozen=True)
class Moved:
    """What a move did."""

    path: Path
    items: int
    resumed: int  # of them, copied by a call that was interrupted
    compared: int  # items whose neighbours were looked for in both
    exact: bool  # whether both compared all items, so that the neighbours had to be the same
    overlap: float  # share of the neighbours in the source that are neighbours in the target
    seconds: float
    index: Mapping[str, Any]


def move_collection(
    source: str | Path,
    target: str | Path,
    *,
    uri: str | None = None,
    collection: str | None = None,
    index: str | None = None,
    sample: int = SAMPLE,
    progress: Progress | None = None,
) -> Moved:
    """Copy a collection, compare the copy, and put it at `target`. Killed and called again, it goes on.

    Args:
        source: folder of a collection, local or in Milvus. Nobody should write to it meanwhile.
        target: a folder that does not exist yet, or is empty.
        uri: of a Milvus server, or a file FILE.db; None: the copy is local.
        collection: its name in Milvus; None: made of the target's name.
        index: kind; None: as in the source where the target has that kind, else "auto".
        sample: items whose ten neighbours are compared.
        progress: told after each batch.

    Raises:
        UnknownCollection: no source.
        CollectionError: the target holds something else, the copy is not the same as the source, or what an
            interrupted move left is of another one.
        UsageError, Unreachable, MissingExtra, StorageError
    """
    source, target, started = absolute(Path(source)), absolute(Path(target)), time.monotonic()
    if not is_collection(source):
        raise UnknownCollection(f"There is no collection at {source}.")
    check_free(target)
    aside = target.with_name(f".{target.name}.moving")
    with ExitStack() as stack:
        here = stack.enter_context(open_collection(source, read_only=True))
        there, journal = begin(here, aside, target, uri=uri, collection=collection)
        stack.enter_context(there)
        resumed = journal.copied
        copy(here, there, journal, sample=sample, progress=progress)
        compared = compare(here, there, journal.sample)
        built = there.build_index(chosen_kind(here, index, local=uri is None))
    with storage_errors(target), turn(target.parent):
        check_free(target)
        (aside / JOURNAL).unlink()
        if target.exists():
            target.rmdir()
        aside.rename(target)
        flush_to_disk(target.parent)
    seconds = time.monotonic() - started
    return Moved(target, journal.copied, resumed, *compared, seconds=seconds, index=built)


def check_free(target: Path) -> None:
    """Refuse a target that holds something. Raises CollectionError."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CollectionError(
            f"{target} exists and is not empty; a collection is moved to a new folder. Nothing was changed."
        )


# Copying


def begin(
    here: "LocalCollection", aside: Path, target: Path, *, uri: str | None, collection: str | None
) -> tuple["LocalCollection", Journal]:
    """The copy, empty or as far as it had come, and its journal. Raises as `move_collection`."""
    journal = Journal(source=str(here.path), fingerprint=here.fingerprint)
    if is_collection(aside):
        journal = resumed_journal(aside, journal)
        if in_milvus(aside) != (uri is not None):
            raise CollectionError(
                f"An interrupted move to {target} went to another backend. Call it as before, or delete "
                f"{aside}."
            )
        there = open_collection(aside, merge="manual")
    else:
        roots = {name: root for name, root in here.manifest.roots.items() if not is_below(root, here.path)}
        with storage_errors(aside):
            aside.parent.mkdir(parents=True, exist_ok=True)
        about = {"dim": here.dim, "fingerprint": here.fingerprint, "name": here.name}
        about["encoder_info"] = here.manifest.encoder
        if uri is None:
            there = create_collection(aside, roots=roots, merge="manual", **about)
        else:
            from dml.collection.milvus_create import create_milvus, milvus_name

            if "://" not in uri and is_below(uri, target):
                uri = str(aside / absolute(Path(uri)).relative_to(target))  # it is renamed with the folder
            roots = {**roots, STORED: str(target / "images")}
            name = collection or milvus_name(target.name)
            there = create_milvus(aside, uri=uri, collection=name, roots=roots, **about)
        journal.save(aside)
    if here.encoder_path is not None and not (aside / "encoder").is_dir():
        copy_folder(here.encoder_path, aside / "encoder")
    return there, journal  # type: ignore[return-value]


def resumed_journal(aside: Path, expected: Journal) -> Journal:
    """The journal of an interrupted move. Raises CollectionError when it is of another one."""
    path = aside / JOURNAL
    try:
        found = Journal(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return expected  # killed before the first item
    except (OSError, ValueError, TypeError) as error:
        raise DamagedFile(f"{path} cannot be read: {error}. Delete {aside} to begin anew.") from error
    if (found.source, found.fingerprint) != (expected.source, expected.fingerprint):
        raise CollectionError(
            f"{aside} is what an interrupted move of {found.source} left, and this is a move of "
            f"{expected.source}. Finish that one, or delete {aside} (and its collection in Milvus)."
        )
    return found


def copy(
    here: "LocalCollection",
    there: "LocalCollection",
    journal: Journal,
    *,
    sample: int,
    progress: Progress | None,
) -> None:
    """Copy the items behind the journal's last, a durable batch at a time."""
    total, chance = len(here), random.Random(journal.copied)
    after = journal.last
    while True:
        items, after = here.scroll(after=after, limit=BATCH, with_vector=True)
        if items:
            there.add(new_items(here, there, items))
            for item in items:
                journal.copied += 1
                if len(journal.sample) < sample:
                    journal.sample.append(item.id)
                elif (place := chance.randrange(journal.copied)) < sample:
                    journal.sample[place] = item.id
            journal.last = items[-1].id
            journal.save(there.path)
            if progress is not None:
                progress(journal.copied, max(total, journal.copied), 0)
        if after is None:
            return


def new_items(here: "LocalCollection", there: "LocalCollection", items: Sequence[Item]) -> list[NewItem]:
    """Items as they are added to the copy, with their pictures."""
    return [NewItem(item.id, item.vector, item.payload, **picture_of(here, there, item)) for item in items]  # type: ignore[arg-type]


def picture_of(here: "LocalCollection", there: "LocalCollection", item: Item) -> dict[str, Any]:
    """How the picture of an item goes along: by reference, or, where it lies in the source, as bytes."""
    picture = item.picture
    if picture is None:
        return {}
    if picture.kind == "referenced":
        root = here.manifest.roots.get(picture.root or "", "")
        if not is_below(root, here.path):
            below = Path(there.manifest.roots[picture.root or ""])
            return {"file": below / (picture.path or ""), "sha256": picture.sha256}
    data = here.picture(item.id)
    if not in_milvus(there.path):
        return {"image": data}
    # Milvus keeps no bytes: they go into the folder, where the root STORED will be when it has its name.
    name = f"{picture.sha256[:2]}/{picture.sha256}"
    kept = there.path / "images" / name
    if not kept.exists():
        write_aside(kept, lambda path: path.write_bytes(data))
    return {"file": Path(there.manifest.roots[STORED]) / name, "sha256": picture.sha256}


def is_below(root: str, folder: Path) -> bool:
    return bool(root) and absolute(Path(root)).is_relative_to(absolute(folder))


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of files, completely or not at all. Raises StorageError."""
    with written_aside_folder(target) as aside:
        for path in sorted(source.rglob("*")):
            copied = aside / path.relative_to(source)
            if path.is_dir():
                copied.mkdir(parents=True, exist_ok=True)
            else:
                copied.write_bytes(path.read_bytes())


def chosen_kind(here: "LocalCollection", index: str | None, *, local: bool) -> str:
    """The kind of index that the copy gets."""
    if index is not None:
        return index
    asked = str(here.manifest.index.get("kind", "auto"))
    if local:
        return asked if asked in LOCAL_KINDS else "auto"
    from dml.collection.milvus_table import KINDS

    return asked if asked in KINDS else "auto"


# Comparing


def compare(
    here: "LocalCollection", there: "LocalCollection", sample: Sequence[str]
) -> tuple[int, bool, float]:
    """(items compared, whether exactly, overlap of their neighbours).

    Raises:
        CollectionError: other items in the copy, or, where both compare exactly, other neighbours.
    """
    ours, theirs = len(here), len(there)
    if ours != theirs:
        raise CollectionError(
            f"{here.path} has {ours:,} items and the copy {theirs:,}: has somebody written to it meanwhile? "
            f"Stop who writes, delete {there.path} (and its collection in Milvus), and move again."
        )
    sample = list(here.find(sample))
    if not sample:
        return 0, True, 1.0
    vectors = np.stack([item.vector for item in here.get(sample, with_vector=True)])  # type: ignore[arg-type]
    answers = [neighbours(one, vectors) for one in (here, there)]
    exact = not any(result.approximate for results in answers for result in results)
    shares = []
    for id, mine, other in zip(sample, *answers, strict=True):
        if exact and not same(mine.hits, other.hits):
            raise CollectionError(
                f'The neighbours of item "{id}" are others in the copy than in {here.path}. The copy is left '
                f"in {there.path}; nothing was put into place."
            )
        wanted = {hit.id for hit in mine.hits}
        shares.append(len(wanted & {hit.id for hit in other.hits}) / len(wanted) if wanted else 1.0)
    return len(sample), exact, float(np.mean(shares))


def neighbours(collection: "LocalCollection", vectors: Any) -> list[SearchResult]:
    """The nearest of each vector: exactly, where the collection can."""
    with suppress(NotAvailable):
        return collection.search(vectors, limit=NEIGHBOURS, exact=True)
    return collection.search(vectors, limit=NEIGHBOURS)


def same(mine: Sequence[Hit], other: Sequence[Hit]) -> bool:
    """Equal scores, and equal ids but for ties with the last score, of which either may have taken any."""
    scores = [np.array([hit.score for hit in hits]) for hits in (mine, other)]
    if len(scores[0]) != len(scores[1]) or not np.allclose(*scores, rtol=0, atol=SAME_SCORE):
        return False
    clear = [{hit.id for hit in hits if hit.score > hits[-1].score + SAME_SCORE} for hits in (mine, other)]
    return clear[0] == clear[1]
