"""From a folder, a manifest or finished embeddings to a collection: embed, add, index, put into place.

A new collection is made in a folder beside the place where it is to be, and renamed when it is complete. What
an interrupted build from pictures leaves there says what it was for (`begun.json`), and the next build of the
same goes on with it.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml.collection import create_collection, in_milvus, is_collection, open_collection
from dml.collection.derive import check_kind
from dml.collection.importing import Progress, Report, Settings
from dml.collection.local import LocalCollection
from dml.collection.lock import LOCK, WriterLock
from dml.collection.manifest import default_name, read_manifest
from dml.collection.place import building, clear, clear_beside, put_into_place, recover, turn
from dml.collection.promised import given_up
from dml.collection.supply import MAIN_ROOT, Supply, open_supply
from dml.data.ids import absolute
from dml.errors import CollectionError, DamagedFile, NotAvailable, UnknownCollection
from dml.index import check_options
from dml.storage import flush_to_disk, no_empty_folders, opened_aside, storage_errors

if TYPE_CHECKING:
    from dml.encoder import Encoder
    from dml.index.tune import Promise

__all__ = ["Progress", "Report", "Settings", "add_to_collection", "build_collection"]

log = logging.getLogger(__name__)

BEGUN = "begun.json"
"""In an unfinished collection: what it is made of."""


def build_collection(
    source: str | Path,
    out: str | Path,
    *,
    encoder: "Encoder | None" = None,
    name: str | None = None,
    kind: str = "auto",
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    measure: bool = True,
    settings: Settings | None = None,
    progress: Progress | None = None,
    resume: bool = True,
    uri: str | None = None,
    collection_name: str | None = None,
    announce: Callable[[str], None] = log.info,
    promise: "Promise | None" = None,
) -> Report:
    """Make a collection of a folder, a manifest, or a folder of embeddings made by `dml embed`.

    A new collection is made beside `out` and renamed when it is complete: until then, and after any failure
    or Ctrl-C, `out` is as it was. Pictures that were embedded by then are kept, and the next build of the
    same source with the same encoder, profile and settings goes on with them. If `out` already is a
    collection of the same encoder, the items are added to it (each batch is durable by itself) and its index
    is built anew.

    Args:
        encoder: for pictures; embeddings need none, but take along the one that is given.
        name: of a new collection; defaults to the name of `out`, without ".collection".
        kind, options, device: of the index, see `dml.index.make_index`; "auto" chooses by the count.
        overwrite: replace the collection that is there.
        measure: measure the recall of the index, see `LocalCollection.build_index`.
        resume: go on with what an interrupted build has left; else begin anew.
        uri, collection_name: of a new collection in Milvus, see `milvus_create.create_milvus`. It is filled
            where it is: after an interruption the same call goes on.
        announce: told what people may want to know meanwhile: that a build goes on, or can go on.
        promise: choose the cheapest index that keeps it, instead of a kind.

    Raises:
        DataError: nothing to import. TooManyBadImages: more than `settings.max_bad_share`.
        CollectionError: `out` holds something else, or another collection and `overwrite` is not set.
        ModelMismatch: the embeddings were made by another encoder.
        StorageError: the disk is full or refuses.
    """
    source, out, settings = Path(source), absolute(Path(out)), settings or Settings()
    if uri is None and not in_milvus(out):
        check_kind(kind)
        check_options(kind, options or {})
    recover(out)
    started = time.monotonic()
    supply = open_supply(source, encoder, settings)
    if uri is not None:
        create = {"name": name, "index": kind, "options": options, "collection": collection_name}
        begin_in_milvus(supply, out, uri=uri, create=create, store=settings.store, overwrite=overwrite)
    if goes_into(out, supply.fingerprint, overwrite=overwrite):
        report = build_inside(
            supply,
            out,
            index={"kind": None if kind == "auto" else kind, "options": options, "promise": promise},
            device=device,
            measure=measure,
            progress=progress,
            resume=resume,
            announce=announce,
        )
    else:
        report = build_aside(
            supply,
            out,
            create={"name": name or default_name(out), "index": kind, "options": options, "device": device},
            overwrite=overwrite,
            measure=measure,
            progress=progress,
            resume=resume,
            announce=announce,
            promise=promise,
        )
    report.path, report.seconds = out, time.monotonic() - started
    return report


def add_to_collection(
    collection: LocalCollection,
    source: str | Path,
    *,
    encoder: "Encoder | None" = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Report:
    """Add a folder, a manifest, one picture or embeddings to a collection. Raises as `build_collection`."""
    started = time.monotonic()
    supply = open_supply(Path(source), encoder, settings or Settings())
    report = supply.pour(collection, progress)
    report.path, report.seconds = collection.path, time.monotonic() - started
    return report


def indexed(
    collection: LocalCollection,
    *,
    kind: str | None,
    options: Mapping[str, Any] | None,
    promise: "Promise | None",
    measure: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Build the index of a kind, or the one that a promise chooses; see `LocalCollection.build_index`."""
    if promise is None:
        before = collection.manifest.index
        built = collection.build_index(kind, options=options, measure=measure)
        if lost := given_up(before, collection.manifest.index):
            say(lost)
        return built
    return collection.build_index(measure=measure, promise=promise, say=say)


def goes_into(out: Path, fingerprint: str, *, overwrite: bool) -> bool:
    """True: add to the collection at `out`. False: make a new one. Raises CollectionError for neither."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not is_collection(out):
        raise CollectionError(
            f"{out} exists and is not a collection; give another --out. Nothing was changed."
        )
    if overwrite:
        return False
    there = read_manifest(out).fingerprint
    if there == fingerprint:
        return True
    raise CollectionError(
        f"{out} holds a collection of another encoder ({there[:12]}, not {fingerprint[:12]}). "
        f"Give another --out, or --overwrite to replace it."
    )


def build_inside(
    supply: Supply,
    out: Path,
    *,
    index: Mapping[str, Any],
    device: str,
    measure: bool,
    progress: Progress | None,
    resume: bool,
    announce: Callable[[str], None],
) -> Report:
    """Add to the collection that is at `out`, and build its index anew: {"kind", "options", "promise"}."""
    with open_collection(out, fingerprint=supply.fingerprint, device=device, merge="manual") as collection:
        report = supply.pour(collection, progress, resume=resume and in_milvus(out))
        report.index = indexed(collection, **index, measure=measure, say=announce)
        return report


def build_aside(
    supply: Supply,
    out: Path,
    *,
    create: Mapping[str, Any],
    overwrite: bool,
    measure: bool,
    progress: Progress | None,
    resume: bool,
    announce: Callable[[str], None],
    promise: "Promise | None",
) -> Report:
    """Make a collection beside `out`, or go on making it, and rename it when it is complete.

    Raises:
        CollectionLocked: another build into `out` runs, or somebody writes to what is to be replaced.
    """
    with storage_errors(out), no_empty_folders(out.parent):
        collection = begin(supply, out, create=create, resume=resume)
        finished, kept = False, 0
        if len(collection):
            announce(f"going on with {len(collection):,} items that an interrupted build has left")
        try:
            if supply.encoder_folder is not None:
                copy_folder(supply.encoder_folder, collection.path / "encoder")
            report = supply.pour(collection, progress, resume=len(collection) > 0)
            index = {"kind": create["index"], "options": create["options"], "promise": promise}
            report.index = indexed(collection, **index, measure=measure, say=announce)
            (collection.path / BEGUN).unlink(missing_ok=True)
            finished = True
        finally:
            # Its lock is let go of in our turn only: nobody takes the folder for a leftover before it has its
            # name, and what is cleared here is ours.
            with turn(out.parent):
                kept = 0 if finished or supply.task is None else len(collection)
                collection.close()
                try:
                    if finished:
                        put_into_place(out, overwrite=overwrite)
                finally:
                    with suppress(OSError):
                        (clear_beside if kept else clear)(out)
            if kept:
                announce(
                    f"{kept:,} items are kept in {building(out)}; the same command goes on with them "
                    f"(or begins anew with --no-resume)"
                )
    return report


def begin_in_milvus(
    supply: Supply, out: Path, *, uri: str, create: Mapping[str, Any], store: bool, overwrite: bool
) -> None:
    """An empty collection in Milvus and its folder at `out`, or the one that is there already.

    Raises:
        NotAvailable: pictures are to be stored, or a collection to be replaced.
        CollectionError: `out` is something else.
    """
    from dml.collection.milvus_create import create_milvus
    from dml.collection.move import copy_folder as copy_whole

    if store:
        raise NotAvailable("Milvus keeps no pictures: leave out --store, and they are used where they lie.")
    if overwrite:
        raise NotAvailable("A collection in Milvus is not replaced; give another --out and --collection.")
    if is_collection(out) and not in_milvus(out):
        raise CollectionError(f"{out} is a local collection. `dml index move` copies it into Milvus.")
    if not is_collection(out):
        about = {"dim": supply.dim, "fingerprint": supply.fingerprint, "encoder_info": supply.encoder_info}
        create_milvus(out, uri=uri, **about, **create).close()
    ours = read_manifest(out).fingerprint == supply.fingerprint
    if ours and supply.encoder_folder is not None and not (out / "encoder").is_dir():
        copy_whole(supply.encoder_folder, out / "encoder")


def begin(supply: Supply, out: Path, *, create: Mapping[str, Any], resume: bool) -> LocalCollection:
    """A collection beside `out`: what an interrupted build of the same left, or an empty one.

    What other builds have left is cleared.
    """
    with turn(out.parent):
        if (out / LOCK).exists():
            WriterLock(out / LOCK).release()  # rather now than after everything has been embedded
        left = reopened(supply, out, device=create["device"]) if resume else None
        if left is not None:
            clear_beside(out)
            return left
        clear(out)
        collection = create_collection(
            building(out),
            dim=supply.dim,
            fingerprint=supply.fingerprint,
            roots={MAIN_ROOT: supply.root} if supply.root is not None else {},
            encoder_info=supply.encoder_info,
            merge="manual",
            **create,
        )
    if supply.task is not None:
        with opened_aside(collection.path / BEGUN) as file:
            file.write(json.dumps({**supply.task, "name": create["name"]}, indent=2).encode())
    return collection


def reopened(supply: Supply, out: Path, *, device: str) -> LocalCollection | None:
    """What an interrupted build of the same has left beside `out`; None: nothing that can be gone on with.

    Raises:
        CollectionLocked: it is not interrupted, it runs.
    """
    left = building(out)
    if supply.task is None or not is_collection(left):
        return None
    try:
        begun = json.loads((left / BEGUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(begun, dict) or {**begun, **supply.task} != begun:
        return None
    try:
        return open_collection(left, fingerprint=supply.fingerprint, device=device, merge="manual")
    except (DamagedFile, UnknownCollection) as error:
        log.warning("%s cannot be gone on with (%s); the build begins anew", left, error)
        return None


def copy_folder(source: Path, target: Path) -> None:
    """Copy an encoder's files, in place of what may be there, and flush them."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    for path in [*target.rglob("*"), target]:
        flush_to_disk(path)
