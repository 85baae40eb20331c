"""`dml index`: build, change and check collections of pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dml.cli import keeping, move
from dml.cli.payload import payload_index
from dml.cli.promises import (
    LatencyLimit,
    MemoryLimit,
    TargetRecall,
    promise_line,
    read_promise,
    show_tried,
    tuning,
)
from dml.cli.shown import describe_index, group, print_json

if TYPE_CHECKING:
    from dml.collection.build import Progress, Report, Settings
    from dml.collection.local import LocalCollection
    from dml.collection.sync import SyncReport
    from dml.encoder import Encoder

app = group("Build, change and check collections of pictures.")

LISTED = 10
"""Lines of a kind that are shown; --json has all."""

CollectionFolder = Annotated[Path, typer.Argument(metavar="COLLECTION", help="Folder of a collection.")]
IndexKind = Annotated[
    str, typer.Option("--index", help="auto, flat, faiss_flat, hnsw, ivf, pq, rabitq or matrix.")
]
IndexOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="KEY=VALUE", help="Of the index kind: links=48, cells=1024, effort=200."
    ),
]
Device = Annotated[str, typer.Option(help="Where encoder and index run: auto, cpu or cuda:N.")]
Store = Annotated[
    bool, typer.Option("--store", help="Keep copies of the pictures; else they are used where they lie.")
]
BatchSize = Annotated[int, typer.Option("--batch", min=1, help="Pictures embedded at once.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Threads that decode, and on a CPU embed. Default: one per core."),
]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="Decoder, runtime and precision, as fused/openvino-bf16. Default: that of the collection, or "
        "pillow and float32.",
    ),
]
WhatOfDuplicates = Annotated[
    str,
    typer.Option("--duplicates", help="Files of equal bytes: keep every item, or skip all but the first."),
]
MaxBadShare = Annotated[
    float,
    typer.Option(
        "--max-bad-share", min=0, max=1, help="Share of unreadable pictures that is still accepted."
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="PIXELS", help="Largest picture that is read (width x height). Default: 64 million."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@app.command()
def build(
    source: Annotated[str, typer.Argument(metavar="FOLDER|MANIFEST|EMBEDDINGS", help="What to index.")],
    out: Annotated[Path, typer.Option(help="Folder of the collection.")],
    encoder: Annotated[
        Path | None, typer.Option(help="Run or encoder folder; embeddings can do without.")
    ] = None,
    index: IndexKind = "auto",
    option: IndexOptions = None,
    device: Device = "auto",
    store: Store = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the collection at --out.")] = False,
    if_missing: Annotated[
        bool, typer.Option("--if-missing", help="Do nothing when a collection is already at --out.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the collection. Default: that of its folder, without .collection."),
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure the recall of an approximate index.")] = True,
    target_recall: TargetRecall = None,
    memory: MemoryLimit = None,
    latency: LatencyLimit = None,
    profile: ProfileName = None,
    duplicates: WhatOfDuplicates = "keep",
    resume: Annotated[
        bool, typer.Option(help="Go on with what an interrupted build has left, or begin anew.")
    ] = True,
    batch: BatchSize = 64,
    workers: Workers = None,
    max_bad_share: MaxBadShare = 0.05,
    max_pixels: MaxPixels = None,
    backend: move.Backend = "local",
    uri: move.Uri = None,
    collection: move.Name = None,
    as_json: Json = False,
) -> None:
    """Embed pictures and make them searchable; the same command goes on after an interruption.

    \b
    dml index build photos/ --encoder runs/shoes --out shoes.collection

    A collection of the same encoder that is already at --out gets the items added.
    """
    from dml.collection import is_collection
    from dml.collection.build import build_collection
    from dml.collection.place import recover

    move.check_backend(backend, uri)
    recover(out)
    if if_missing and is_collection(out):
        typer.echo(f"{out} is there already; nothing to do", err=True)
        return
    with progress_bar("embedding") as progress:
        report = build_collection(
            source,
            out,
            encoder=load_encoder(encoder, device, profile=profile),
            name=name,
            kind=index,
            options=read_options(option),
            device=device,
            overwrite=overwrite,
            measure=measure,
            settings=read_settings(store, batch, workers, max_bad_share, duplicates, max_pixels),
            progress=progress,
            resume=resume,
            uri=uri,
            collection_name=collection,
            announce=show_tried,
            promise=read_promise(target_recall, memory, latency),
        )
    show_report(report, as_json=as_json)


@app.command()
def add(
    collection: CollectionFolder,
    source: Annotated[str, typer.Argument(metavar="FOLDER|MANIFEST|IMAGE|EMBEDDINGS", help="What to add.")],
    encoder: Annotated[
        Path | None, typer.Option(help="Run or encoder folder. Default: the one in the collection.")
    ] = None,
    device: Device = "auto",
    store: Store = False,
    rebuild: Annotated[
        bool | None,
        typer.Option(
            "--rebuild/--no-rebuild",
            help="Build the index anew, or leave it. Default: merge into it when enough has changed.",
        ),
    ] = None,
    profile: ProfileName = None,
    duplicates: WhatOfDuplicates = "keep",
    batch: BatchSize = 64,
    workers: Workers = None,
    max_bad_share: MaxBadShare = 0.05,
    max_pixels: MaxPixels = None,
    as_json: Json = False,
) -> None:
    """Add pictures, or replace those of the same id. They are found at once.

    \b
    dml index add shoes.collection photos/new
    """
    from dml.collection import open_collection
    from dml.collection.build import add_to_collection

    with open_collection(collection, device=device, merge="manual") as there:
        loaded = encoder_of(there, encoder, device=device, profile=profile)
        with progress_bar("embedding") as progress:
            report = add_to_collection(
                there,
                source,
                encoder=loaded,
                settings=read_settings(store, batch, workers, max_bad_share, duplicates, max_pixels),
                progress=progress,
            )
        if rebuild:
            report.index = there.build_index()
        elif rebuild is None and there.wants_merge:
            report.index = there.merge()
    show_report(report, as_json=as_json)


@app.command()
def sync(
    collection: CollectionFolder,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER|MANIFEST",
            help="What it is to follow. Default: the folder that it was built from.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what differs, and change nothing.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Also when more than a tenth of the items would be deleted.")
    ] = False,
    encoder: Annotated[
        Path | None, typer.Option(help="Run or encoder folder. Default: the one in the collection.")
    ] = None,
    profile: ProfileName = None,
    device: Device = "auto",
    store: Store = False,
    batch: BatchSize = 64,
    workers: Workers = None,
    max_bad_share: MaxBadShare = 0.05,
    max_pixels: MaxPixels = None,
    as_json: Json = False,
) -> None:
    """Follow a folder: add what is new, embed what changed, move what moved, forget what is gone.

    \b
    dml index sync shoes.collection --dry-run
    dml index sync shoes.collection

    Exit codes for cron: 0 done or nothing to do, 1 somebody else writes to the collection, 3 more than a
    tenth would be deleted, or too many pictures cannot be read.
    """
    from dml.collection import open_collection
    from dml.collection.sync import MOST_REMOVED, sync_collection

    with open_collection(collection, read_only=dry_run, device=device, merge="manual") as there:
        with progress_bar("embedding") as progress:
            report = sync_collection(
                there,
                source,
                encoder=None if dry_run else encoder_of(there, encoder, device=device, profile=profile),
                settings=read_settings(store, batch, workers, max_bad_share, "keep", max_pixels),
                dry_run=dry_run,
                most_removed=1.0 if yes else MOST_REMOVED,
                progress=progress,
            )
        if not dry_run and there.wants_merge:
            report.imported.index = there.merge()
    show_sync(report, as_json=as_json)


@app.command()
def remove(
    collection: CollectionFolder,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Items to forget.")] = None,
    ids_from: Annotated[
        Path | None, typer.Option("--from", help="A file with one id per line ('-': standard input).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Forget items. They are not found any more at once; pictures that lie elsewhere are not touched.

    \b
    dml index remove shoes.collection red/1.jpg red/2.jpg

    Files that are still there come back with the next `dml index sync`: delete them too.
    """
    from dml.collection import open_collection
    from dml.collection.sync import still_there
    from dml.errors import UnknownItem, UsageError

    wanted = [*(ids or []), *read_ids(ids_from)]
    if not wanted:
        raise UsageError("No ids were given: name them, or use --from FILE.")
    with open_collection(collection, merge="manual") as there:
        files = still_there(there, wanted)
        gone = there.delete(wanted)
        left = len(there)
    if not gone:
        raise UnknownItem(f'None of the {len(set(wanted))} ids is in {collection}, e.g. "{wanted[0]}".')
    if as_json:
        unknown = len(set(wanted)) - gone
        print_json({"removed": gone, "unknown": unknown, "count": left, "files_left": len(files)})
    else:
        typer.echo(f"removed {gone} of {len(set(wanted))} items, {left} are left")
    if files and not as_json:
        typer.echo(
            f"{len(files):,} of their files are still there ({files[0]}{', …' if len(files) > 1 else ''}): "
            f"`dml index sync` will add them again, unless they are deleted or moved away",
            err=True,
        )


@app.command()
def rebuild(
    collection: CollectionFolder,
    index: Annotated[
        str | None, typer.Option("--index", help="auto, or a kind as --index of build. Default: as before.")
    ] = None,
    option: IndexOptions = None,
    device: Device = "auto",
    measure: Annotated[bool, typer.Option(help="Measure the recall of an approximate index.")] = True,
    target_recall: TargetRecall = None,
    memory: MemoryLimit = None,
    latency: LatencyLimit = None,
    as_json: Json = False,
) -> None:
    """Build the index anew from the catalogue, of the same kind, of another, or of one that keeps a promise.

    \b
    dml index rebuild shoes.collection --target-recall 0.98 --memory 4G --latency 5ms
    """
    from dml.collection import open_collection
    from dml.collection.promised import given_up

    promise = read_promise(target_recall, memory, latency)
    options = read_options(option) if option else None
    with open_collection(collection, device=device, merge="manual") as there:
        before = there.manifest.index
        built = there.build_index(index, options=options, measure=measure, promise=promise, say=show_tried)
        if lost := given_up(before, there.manifest.index):
            typer.echo(lost, err=True)
    if as_json:
        print_json(built)
    else:
        typer.echo(describe_index(built))


@app.command()
def info(collection: CollectionFolder, as_json: Json = False) -> None:
    """Say what a collection is: items, encoder, index, measured recall, pending changes."""
    from dataclasses import asdict

    from dml.collection import open_collection

    with open_collection(collection, read_only=True) as there:
        about = there.info()
    if as_json:
        print_json(asdict(about))
        return
    from rich.console import Console
    from rich.table import Table

    built = about.manifest["built"]
    recall = "not measured" if about.measured_recall is None else f"{about.measured_recall:.4f}"
    settings = ", ".join(f"{k} {v}" for k, v in about.index.items() if k not in ("kind", "exact"))
    pending = f"{about.pending:,} changes since (searched exactly)" if about.pending else "none"
    rows = {
        "name": about.name,
        "items": f"{about.count:,}",
        "vectors": f"{about.dim} numbers, {about.metric}",
        "encoder": about.fingerprint,
        "index": f"{about.index['kind']} ({'exact' if about.index['exact'] else 'approximate'}; {settings})",
        "recall@10": recall,
        **({"promise": promise_line(built["promise"])} if built.get("promise") else {}),
        "pending": pending,
        "generation": f"{about.generation:,}",
        "on disk": f"{about.bytes_on_disk / 1e6:,.1f} MB",
        **{f"root {name}": path for name, path in about.manifest["roots"].items()},
        "created": about.manifest["created"],
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, str(value))
    Console().print(table)


@app.command()
def root(
    collection: CollectionFolder,
    name: Annotated[str, typer.Argument(help='Name of the root, as "dml index info" lists it.')],
    folder: Annotated[Path, typer.Argument(help="Where its pictures are now.")],
) -> None:
    """Say where pictures that the collection refers to have moved."""
    from dml.collection import open_collection
    from dml.data.ids import absolute
    from dml.errors import UsageError

    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}.")
    with open_collection(collection, merge="manual") as there:
        known = there.manifest.roots
        if name not in known and not refers_to(there, name):
            raise UsageError(
                f'{collection} has no root "{name}"; it has: {", ".join(known) or "none"}. A new folder '
                f"becomes a root when its pictures are added: dml index add {collection} {folder}"
            )
        there.set_root(name, folder)
    typer.echo(f"{name} = {absolute(folder)}")


for command in (*keeping.COMMANDS, *move.COMMANDS, payload_index, tuning):
    app.command()(command)


# Parts of the commands


def refers_to(there: "LocalCollection", root: str) -> bool:
    """Whether an item's picture lies below a root; a manifest that was repaired may not know it any more."""
    from dml.collection.supply import all_items

    return any(item.picture is not None and item.picture.root == root for item in all_items(there))


def load_encoder(path: Path | None, device: str, *, profile: str | None = None) -> "Encoder | None":
    """The encoder in a run or encoder folder; None for none."""
    if path is None:
        return None
    from dml.encoder import Encoder

    return Encoder.load(path, device=device, profile=profile)


def encoder_of(
    there: "LocalCollection", path: Path | None, *, device: str, profile: str | None
) -> "Encoder | None":
    """The encoder for a collection that is there: its own or that of a folder; None where it has none."""
    from dml.collection.encoding import load_encoder_of

    if path is None and there.encoder_path is None:
        return None
    encoder = load_encoder_of(there.path, path=path, profile=profile, device=device)
    there.check_fingerprint(encoder.fingerprint)
    return encoder


def read_settings(
    store: bool,
    batch: int,
    workers: int | None,
    max_bad_share: float,
    duplicates: str,
    max_pixels: int | None,
) -> "Settings":
    """Options of an import. Raises UsageError."""
    from typing import get_args

    from dml.collection.importing import Duplicates, Settings
    from dml.errors import UsageError
    from dml.imaging import DEFAULT_MAX_PIXELS

    for choice in get_args(Duplicates):
        if choice == duplicates:
            most = max_pixels or DEFAULT_MAX_PIXELS
            return Settings(store, batch, workers, max_bad_share, choice, max_pixels=most)
    raise UsageError(f'--duplicates is one of {", ".join(get_args(Duplicates))}; got "{duplicates}"')


def read_options(given: list[str] | None) -> dict[str, Any]:
    """["links=48"] -> {"links": 48}. Raises UsageError."""
    from dml.config import toml_value
    from dml.errors import UsageError

    options: dict[str, Any] = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f'--option wants KEY=VALUE, got "{text}"')
        options[key] = toml_value(value)
    return options


def read_ids(path: Path | None) -> list[str]:
    """One id per line. Raises UsageError for a file that cannot be read."""
    from dml.errors import UsageError

    if path is None:
        return []
    try:
        text = typer.get_text_stream("stdin").read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return [line for line in text.splitlines() if line.strip()]


@contextmanager
def progress_bar(what: str) -> Iterator["Progress"]:
    """A bar on stderr with pictures per second and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, speed="")

        def show(done: int, total: int, bad: int) -> None:
            seconds = bar.tasks[0].elapsed or 0.0
            speed = f"{done / seconds:,.0f}/s" if seconds else ""
            label = f"{what} ({bad} unreadable)" if bad else what
            bar.update(task, completed=done, total=total, description=label, speed=speed)

        yield show


def show_report(report: "Report", *, as_json: bool) -> None:
    """What an import did: unreadable pictures on stderr, the rest on stdout."""
    show_bad(report)
    if report.without_picture:
        typer.echo(
            f"{report.without_picture:,} items have a vector only: their pictures were not found", err=True
        )
    if as_json:
        from dataclasses import asdict

        print_json(
            {
                "collection": str(report.path),
                "added": report.added,
                "replaced": report.replaced,
                "resumed": report.resumed,
                "duplicates": [one._asdict() for one in report.duplicates],
                "skipped_duplicates": report.skipped,
                "without_picture": report.without_picture,
                "bad": [{"path": one.path, "reason": one.reason} for one in report.bad],
                "seconds": round(report.seconds, 3),
                "work_seconds": asdict(report.spent),
                "index": dict(report.index),
            }
        )
        return
    typer.echo(report.source)
    resumed = f", {report.resumed:,} were there from an interrupted build" if report.resumed else ""
    skipped = f", {len(report.bad)} unreadable skipped" if report.bad else ""
    typer.echo(
        f"{report.path}: {report.added:,} added, {report.replaced:,} replaced{resumed}{skipped}, "
        f"{report.images_per_second:,.0f}/s"
    )
    show_work(report)
    if report.index:
        typer.echo(describe_index(report.index))


def show_bad(report: "Report") -> None:
    """Unreadable pictures, on stderr."""
    for one in report.bad[:LISTED]:
        typer.echo(f"skipped {one.path}: {one.reason}", err=True)
    if len(report.bad) > LISTED:
        typer.echo(f"… and {len(report.bad) - LISTED} more", err=True)


def show_work(report: "Report") -> None:
    """Duplicates, and where the time went."""
    if report.duplicates:
        done = f"{report.skipped:,} of them left out" if report.skipped else "embedded once, all kept"
        first, count = report.duplicates[0], len(report.duplicates)
        typer.echo(f"{count:,} files have the bytes of another ({done}), e.g. {first.id} = {first.of}")
    shares = report.spent.shares()
    if shares:
        typer.echo("work: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


def show_sync(report: "SyncReport", *, as_json: bool) -> None:
    """What a sync did, or would do."""
    plan = report.plan
    if as_json:
        print_json(
            {
                "dry_run": report.dry_run,
                **{f"{name}_count": count for name, count in plan.counts.items()},
                "new": [wish.id for wish in plan.new],
                "changed": [wish.id for wish in plan.changed],
                "moved": [{"from": item.id, "to": wish.id} for item, wish in plan.moved],
                "relabelled": [{"id": id, **changes} for id, changes in plan.relabelled],
                "removed": [item.id for item in plan.removed],
                "bad": [{"path": one.path, "reason": one.reason} for one in report.imported.bad],
                "seconds": round(report.imported.seconds, 3),
            }
        )
        return
    show_bad(report.imported)
    lists = {
        "+": [wish.id for wish in plan.new],
        "*": [wish.id for wish in plan.changed],
        ">": [f"{item.id} > {wish.id}" for item, wish in plan.moved],
        "=": [f"{id}: {dict(changes)}" for id, changes in plan.relabelled],
        "-": [item.id for item in plan.removed],
    }
    for sign, lines in lists.items() if report.dry_run else ():
        for line in lines[:LISTED]:
            typer.echo(f"{sign} {line}")
        if len(lines) > LISTED:
            typer.echo(f"{sign} … and {len(lines) - LISTED:,} more")
    counts = ", ".join(f"{count:,} {name}" for name, count in plan.counts.items())
    typer.echo(f"{'would be' if report.dry_run else 'done'}: {counts} ({report.imported.seconds:.1f} s)")
    show_work(report.imported)
    if report.imported.index:
        typer.echo(describe_index(report.imported.index))
