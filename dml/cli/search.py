"""`dml search`: the pictures that look like one, in the terminal, as a page or as JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dml.collection.local import LocalCollection

THUMBNAIL = 256  # pixels


@dataclass(frozen=True)
class Found:
    """One result, wherever it came from."""

    rank: int
    id: str
    score: float
    label: str | None
    payload: dict[str, Any]
    thumbnail: bytes | None = None  # JPEG


@dataclass(frozen=True)
class Answer:
    """What a search found."""

    collection: str
    generation: int
    approximate: bool
    took_ms: float
    hits: list[Found]


def search(
    collection: Annotated[
        str, typer.Argument(metavar="COLLECTION", help="Its folder; with --url its name at the service.")
    ],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture to look for.")],
    k: Annotated[int, typer.Option("-k", "--k", min=1, max=1000, help="How many results.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a page with the pictures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    url: Annotated[str | None, typer.Option(help="Ask a running service instead of a folder.")] = None,
    key: Annotated[str | None, typer.Option(help="API key of the service.", envvar="DML_KEY")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every item.")] = False,
    effort: Annotated[
        int | None,
        typer.Option(min=1, help="How hard an approximate index looks (hnsw: efSearch, ivf: cells)."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Leave out results below this similarity.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="What runs the encoder: auto, onnx or torch.")] = "auto",
) -> None:
    """Find the pictures that look like one.

    dml search shoes.collection photo.jpg -k 20 --html found.html --open
    """
    from dml.imaging import decode

    decode(image)  # a file that is no picture is refused before anything is loaded
    page = html or (page_in_temporary_folder(image) if open_page else None)
    limits = {"limit": k, "exact": exact, "effort": effort, "score_threshold": threshold}
    if url is None:
        answer = search_folder(Path(collection), image, limits, runtime=runtime, pictures=page is not None)
    else:
        answer = search_service(url, key, collection, image, limits, pictures=page is not None)
    if page is not None:
        write_page(page, answer, image)
        typer.echo(f"page: {page}", err=True)
        if open_page:
            typer.launch(str(page))
    if as_json:
        print_answer(answer)
    elif html is None or not open_page:
        print_table(answer)


def search_folder(path: Path, image: Path, limits: dict[str, Any], *, runtime: str, pictures: bool) -> Answer:
    """Embed the picture with the collection's own encoder, and search."""
    import time

    from dml.collection import open_collection
    from dml.encoder import Encoder
    from dml.errors import EncoderError

    with open_collection(path, read_only=True) as there:
        if there.encoder_path is None:
            raise EncoderError(
                f"{path} came without its encoder, so pictures cannot be searched in it. "
                f"Build it with `dml index build … --encoder RUN`."
            )
        encoder = Encoder.load(there.encoder_path, runtime=runtime)
        there.check_fingerprint(encoder.fingerprint)
        started = time.perf_counter()
        [result] = there.search(encoder.embed([image]), **limits)
        took = 1000 * (time.perf_counter() - started)
        hits = [
            Found(
                hit.rank,
                hit.id,
                hit.score,
                hit.item.label,
                dict(hit.item.payload),
                thumbnail_of(there, hit.id) if pictures else None,
            )
            for hit in result.hits
        ]
        return Answer(there.name, result.generation, result.approximate, took, hits)


def thumbnail_of(there: "LocalCollection", id: str) -> bytes | None:
    """The small picture of an item; None where there is none any more."""
    from dml.errors import ImageNotKept, InvalidImage

    try:
        return there.thumbnail(id, THUMBNAIL)
    except (ImageNotKept, InvalidImage):
        return None


def search_service(
    url: str, key: str | None, collection: str, image: Path, limits: dict[str, Any], *, pictures: bool
) -> Answer:
    """Send the picture to a service."""
    from dml.client import Client
    from dml.errors import ServiceError

    def small(client: Client, id: str) -> bytes | None:
        try:
            return client.image(collection, id, size="thumb")
        except ServiceError:
            return None  # an item without a picture is shown without one

    with Client(url, key) as client:
        answer = client.search(collection, image=image, **limits)
        hits = [
            Found(
                rank,
                hit.id,
                hit.score,
                hit.label,
                dict(hit.payload or {}),
                small(client, hit.id) if pictures else None,
            )
            for rank, hit in enumerate(answer.hits, start=1)
        ]
        return Answer(answer.collection, answer.generation, answer.approximate, answer.took_ms, hits)


def print_answer(answer: Answer) -> None:
    """JSON on stdout."""
    import json

    hits = [
        {"rank": h.rank, "id": h.id, "score": h.score, "label": h.label, "payload": h.payload}
        for h in answer.hits
    ]
    tree = {
        "collection": answer.collection,
        "generation": answer.generation,
        "approximate": answer.approximate,
        "took_ms": round(answer.took_ms, 3),
        "hits": hits,
    }
    typer.echo(json.dumps(tree, indent=2, ensure_ascii=False))


def print_table(answer: Answer) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not answer.hits:
        console.print(f"Nothing was found in {escape(answer.collection)}.")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    table.add_column("label")
    table.add_column("id", overflow="fold")
    for hit in answer.hits:
        table.add_row(str(hit.rank), f"{hit.score:.4f}", escape(hit.label or ""), escape(hit.id))
    console.print(table)


def page_in_temporary_folder(image: Path) -> Path:
    """Where a page goes that is only to be looked at."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix="dml-search-")) / f"{image.stem}.html"


def write_page(path: Path, answer: Answer, image: Path) -> None:
    """One file with everything in it. Raises StorageError."""
    from dml.cli.search_page import render
    from dml.collection.pictures import shrink
    from dml.storage import write_aside

    text = render(answer, name=image.name, query=shrink(image.read_bytes(), 2 * THUMBNAIL))
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
