"""A collection that follows its folder: what is new, changed, moved or gone since the last time.

Files are compared by size and time of change first, and by their bytes where those differ. Only bytes that
have no vector yet are embedded: a picture that was renamed or moved keeps its vector and what is known about
it, under its new id. Every step is durable by itself and right by itself, so whoever is interrupted goes on
with the same call.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dml.collection.base import Item, NewItem, Picture
from dml.collection.encoding import admit
from dml.collection.importing import COMMIT_EVERY, Importer, Progress, Report, Settings, Wish, box_of
from dml.collection.local import LocalCollection
from dml.collection.notes import FileNote, FileNotes
from dml.collection.pictures import digest_of
from dml.collection.supply import (
    MAIN_ROOT,
    Place,
    all_items,
    file_of,
    is_finished,
    known_place,
    open_pictures,
    wishes_of,
)
from dml.data.ids import absolute, id_problem, table_root
from dml.data.reading import read_ahead
from dml.data.table import SPLIT_NAMES
from dml.errors import ImageNotKept, TooManyRemovals, UsageError

if TYPE_CHECKING:
    from dml.encoder import Encoder

MOST_REMOVED = 0.1
"""Share of the items that may be deleted without being told so: an unmounted disk is no reason to forget."""

READERS = 4  # threads that read files to compare them


@dataclass
class Plan:
    """What differs between a folder and a collection."""

    place: Place
    source: str  # what was recognised, for people
    notes: Mapping[str, FileNote]  # path below the root -> the file when it was read last
    held: int = 0  # items of the folder that the collection holds
    unchanged: int = 0
    new: list[Wish] = field(default_factory=list)
    changed: list[Wish] = field(default_factory=list)
    moved: list[tuple[Item, Wish]] = field(default_factory=list)
    """Items whose file is gone, and where the same bytes lie now."""
    relabelled: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """(id, changes of its payload): what the source says anew about pictures that stayed."""
    removed: list[Item] = field(default_factory=list)
    lost: int = 0  # of those: whose bytes no other item of the folder has
    stored: bool = False  # whether the collection keeps copies of the folder's pictures
    read: dict[str, FileNote] = field(default_factory=dict)
    """Files that were read to compare them."""

    @property
    def counts(self) -> dict[str, int]:
        return {
            "new": len(self.new),
            "changed": len(self.changed),
            "moved": len(self.moved),
            "relabelled": len(self.relabelled),
            "removed": len(self.removed),
            "unchanged": self.unchanged,
        }


@dataclass(frozen=True)
class SyncReport:
    """What a sync did, or (`dry_run`) would do."""

    plan: Plan
    imported: Report  # of the new and changed pictures: what could not be read among them, time, duplicates
    dry_run: bool


def sync_collection(
    collection: LocalCollection,
    source: str | Path | None = None,
    *,
    encoder: "Encoder | None" = None,
    settings: Settings | None = None,
    dry_run: bool = False,
    most_removed: float = MOST_REMOVED,
    progress: Progress | None = None,
) -> SyncReport:
    """Make a collection hold what a folder holds, and nothing of that folder that is gone.

    Items that came from elsewhere (uploads, vectors, other roots) are not touched, and neither is what people
    have written into payloads: only where a picture has moved, or a manifest's row says something else, the
    source's word goes over it. A picture that cannot be read stays as it was.

    Args:
        source: a root of the collection, a folder below one, or a manifest of pictures there; None: the
            folder that the collection was built from.
        encoder: of the collection; not needed for a dry run.
        settings: how new pictures are embedded and kept; copies are kept as well where the collection keeps
            copies of the folder's other pictures.
        dry_run: find out, and change nothing; the collection may be open read-only.
        most_removed: share of the folder's items that may be lost; 1: all of them.
        progress: told (done, all, bad) pictures.

    Raises:
        TooManyRemovals: more would be lost than `most_removed` allows; nothing was changed.
        DataError: there is no such folder, or not one picture in it. UsageError: no root of this collection.
        TooManyBadImages, StorageError: what was written so far stays; the same call goes on.
        ModelMismatch, ReadOnly
    """
    started = time.monotonic()
    plan = compare(collection, source)
    report = Report(collection.path, source=plan.source)
    if plan.lost > most_removed * plan.held:
        raise TooManyRemovals(
            f"{plan.lost:,} of {plan.held:,} items would be deleted, for their files are not below "
            f"{plan.place.source} any more (for instance {plan.removed[0].id}). More than {most_removed:.0%} "
            f"is only deleted when you say --yes. Nothing was changed."
        )
    if not dry_run:
        if encoder is None:
            raise UsageError("An encoder is needed to embed new pictures; give --encoder RUN.")
        admit(collection, encoder)
        settings = settings or Settings()
        carry_out(
            plan,
            Importer(
                collection,
                encoder,
                replace(settings, store=settings.store or plan.stored),
                report,
                root=(plan.place.name, plan.place.folder),
                progress=progress,
                done=plan.unchanged + len(plan.moved),
            ),
        )
    report.seconds = time.monotonic() - started
    return SyncReport(plan, report, dry_run)


def carry_out(plan: Plan, importer: Importer) -> None:
    """Write what differs. Every step leaves a collection that the next sync understands."""
    collection, notes, root = importer.collection, importer.notes, plan.place.name
    notes.save(root, plan.read)
    for start in range(0, len(plan.moved), COMMIT_EVERY):
        move(collection, plan.moved[start : start + COMMIT_EVERY])
    for id, changes in plan.relabelled:
        collection.update_payload(id, changes)
    importer.run([*plan.changed, *plan.new])
    gone = [item.id for item in plan.removed]
    for start in range(0, len(gone), COMMIT_EVERY):
        collection.delete(gone[start : start + COMMIT_EVERY])
    paths = [path_of(item, plan.place) for item in (*plan.removed, *(item for item, _ in plan.moved))]
    notes.forget(root, [path for path in paths if path not in plan.read])


def move(collection: LocalCollection, moves: Sequence[tuple[Item, Wish]]) -> None:
    """Give items the ids and pictures of their new places; vectors stay. First the new ones, then the old."""
    vectors = {
        item.id: item.vector for item in collection.get([item.id for item, _ in moves], with_vector=True)
    }
    items = []
    for item, wish in moves:
        vector = vectors[item.id]
        assert vector is not None
        assert item.picture is not None
        stored = item.picture.kind == "stored"
        items.append(
            NewItem(
                wish.id,
                vector,
                wish.payload,
                image=collection.picture(item.id) if stored else None,
                file=None if stored else wish.record.path,
                sha256=None if stored else item.picture.sha256,
            )
        )
    collection.add(items)
    collection.delete([item.id for item, wish in moves if item.id != wish.id])


def still_there(collection: LocalCollection, ids: Sequence[str]) -> list[Path]:
    """The files of these items that the next sync would find again."""
    roots = collection.manifest.roots
    main = roots.get(MAIN_ROOT)
    found = []
    for item in collection.find(ids).values():
        picture = item.picture
        if picture is not None and picture.root is not None and picture.root in roots:
            found.append(file_at(picture, roots))
        elif picture is not None and main is not None:
            found.append(Path(main) / item.id)  # a copy, if it is one of this folder's
    return [path for path in found if path.is_file()]


# Finding out


def compare(collection: LocalCollection, source: str | Path | None) -> Plan:
    """What differs. Nothing is written. Raises DataError, UsageError."""
    table = open_pictures(main_folder(collection) if source is None else Path(source))
    place = known_place(collection, table_root(table))
    if place is None:
        roots = ", ".join(f"{name} = {folder}" for name, folder in collection.manifest.roots.items())
        raise UsageError(
            f"{source} is not below a folder that this collection knows ({roots or 'none'}). Add it with "
            f"`dml index add`, or say with `dml index root` where a known one has moved."
        )
    plan = Plan(place, table.describe(), FileNotes(collection.path).load(place.name))
    items = [item for item in all_items(collection) if is_of(item, plan)]
    plan.held = len(items)
    plan.stored = any(item.picture is not None and item.picture.kind == "stored" for item in items)
    wishes = wishes_of(table, place)
    pairs, fresh, gone = matched(items, wishes, place, by_row=table.layout.endswith("manifest"))
    digests = read_where_needed(plan, pairs, fresh, gone)
    for item, wish in pairs:
        settle(plan, item, wish, digests)
    match_moves(plan, fresh, gone, digests)
    kept = {(item.picture.sha256, box_of(item.payload)) for item, _ in pairs if item.picture is not None}
    plan.lost = sum(
        item.picture is None or (item.picture.sha256, box_of(item.payload)) not in kept
        for item in plan.removed
    )
    return plan


def main_folder(collection: LocalCollection) -> Path:
    """The folder that a collection was built from. Raises UsageError where that is not clear."""
    roots = collection.manifest.roots
    if MAIN_ROOT in roots or len(roots) == 1:
        return Path(roots.get(MAIN_ROOT) or next(iter(roots.values())))
    known = ", ".join(roots.values()) or "none"
    raise UsageError(f"Say which folder to compare {collection.path} with; it knows: {known}.")


def path_of(item: Item, place: Place) -> str:
    """The path of an item's file below the root; of a stored picture, what its id says."""
    if item.picture is not None and item.picture.path is not None:
        return file_at(item.picture, place.roots).relative_to(place.folder).as_posix()
    return item.id.removeprefix("" if place.name == MAIN_ROOT else f"{place.name}/")


def file_at(picture: Picture, roots: Mapping[str, str]) -> Path:
    """Where a picture that is referred to lies. Roots may lie below each other, so any may hold it."""
    return Path(roots.get(picture.root or "", "/")) / (picture.path or "")


def is_of(item: Item, plan: Plan) -> bool:
    """Whether an item came from the folder: by its picture, or by the note on a file that was copied."""
    if item.picture is None:
        return False
    place = plan.place
    if item.picture.kind != "stored":
        return file_at(item.picture, place.roots).is_relative_to(place.source)
    path = path_of(item, place)
    return path in plan.notes and (place.folder / path).is_relative_to(place.source)


Pairs = list[tuple[Item, Wish]]


def matched(
    items: Sequence[Item], wishes: Sequence[Wish], place: Place, *, by_row: bool
) -> tuple[Pairs, list[Wish], list[Item]]:
    """(items with what the source says about them, what is not there yet, what the source does not have).

    Args:
        by_row: the source is a manifest: rows and items belong together by id, else by file and box. In a
            folder a file belongs to all items of it, whatever their ids and boxes.
    """
    ids = {item.id: item for item in items}
    at: dict[tuple[str, str | None], list[Item]] = defaultdict(list)
    for item in items:
        at[path_of(item, place), box_of(item.payload) if by_row else None].append(item)
    pairs: Pairs = []
    fresh, taken = [], set()
    for wish in wishes:
        if id_problem(wish.id) is not None:
            fresh.append(wish)  # listed as bad
            continue
        there = at[file_of(wish, place), wish.box if by_row else None]
        if by_row:
            there = [ids[wish.id]] if wish.id in ids else [one for one in there if one.id not in taken][:1]
        for item in there:
            taken.add(item.id)
            pairs.append((item, as_item(item, wish, by_row=by_row)))
        if not there:
            fresh.append(wish)
    return pairs, fresh, [item for item in items if item.id not in taken]


def as_item(item: Item, wish: Wish, *, by_row: bool) -> Wish:
    """A wish for an item that is there: its id and box, and of the payload what goes over the item's own.

    What a folder says about a file that stayed was said before; people may have said otherwise since.
    """
    box, record = item.payload.get("box"), wish.record
    if isinstance(box, list) and not by_row:
        record = replace(record, box=tuple(box))
    said = {
        key: value
        for key, value in wish.payload.items()
        if (item.payload.get(key) != value if by_row else key not in item.payload)
    }
    return Wish(item.id, record, said)


def read_where_needed(
    plan: Plan, pairs: Pairs, fresh: Sequence[Wish], gone: Sequence[Item]
) -> dict[Path, str | None]:
    """sha256 of the files whose size and time do not say enough; None for one that cannot be read.

    New files are read only where one may be a file that is gone from elsewhere.
    """
    doubtful = [
        wish.record.path
        for item, wish in pairs
        if not is_finished(item, wish.record.path, plan.notes.get(file_of(wish, plan.place)))
    ]
    noted = [plan.notes.get(path_of(item, plan.place)) for item in gone]
    sizes = {note.size for note in noted if note is not None}
    anything = len(sizes) < 1 or any(note is None for note in noted)
    doubtful += [
        wish.record.path
        for wish in (fresh if gone else ())
        if id_problem(wish.id) is None and (anything or size_of(wish.record.path) in sizes)
    ]
    paths = list(dict.fromkeys(doubtful))
    digests: dict[Path, str | None] = {}
    for path, note in zip(paths, read_ahead(look_at, paths, workers=READERS, ahead=64), strict=True):
        digests[path] = None if note is None else note.sha256
        if note is not None:
            plan.read[absolute(path).relative_to(plan.place.folder).as_posix()] = note
    return digests


def look_at(path: Path) -> FileNote | None:
    """Read a file; None when it cannot be read."""
    try:
        before = path.stat()
        return FileNote(before.st_size, before.st_mtime_ns, digest_of(path))
    except (OSError, ImageNotKept):
        return None


def size_of(path: Path) -> int | None:
    """Bytes; None for a file that has gone."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def settle(plan: Plan, item: Item, wish: Wish, digests: Mapping[Path, str | None]) -> None:
    """Put a picture that is there where it belongs."""
    assert item.picture is not None
    path = wish.record.path
    if path in digests and digests[path] != item.picture.sha256:
        plan.changed.append(wish)
        return
    if wish.payload:
        plan.relabelled.append((item.id, wish.payload))
    else:
        plan.unchanged += 1


def match_moves(
    plan: Plan, fresh: Sequence[Wish], gone: Sequence[Item], digests: Mapping[Path, str | None]
) -> None:
    """Find files that are gone among the new ones, by their bytes and boxes."""
    left: dict[tuple[str, str | None], list[Item]] = defaultdict(list)
    for item in gone:
        if item.picture is not None:
            left[item.picture.sha256, box_of(item.payload)].append(item)
    for wish in fresh:
        candidates = left.get((digests.get(wish.record.path) or "", wish.box))
        if candidates:
            item = candidates.pop(0)
            plan.moved.append((item, replace(wish, payload=payload_after(item, wish, plan.place))))
        else:
            plan.new.append(wish)
    plan.removed += [item for items in left.values() for item in items]


def payload_after(item: Item, wish: Wish, place: Place) -> dict[str, Any]:
    """What is known about a picture after it has moved: what was known, and what its new folder says.

    What only the old folder said (a label, a split) goes with it.
    """
    folders = PurePosixPath(path_of(item, place)).parts[:-1]
    said = {*folders, *(SPLIT_NAMES.get(folder.lower()) for folder in folders)}
    kept = {
        key: value
        for key, value in item.payload.items()
        if not (key in ("label", "split", "role") and value in said)
    }
    return {**kept, **wish.payload}
