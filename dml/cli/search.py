"""`dml search`: the pictures that look like one, in the terminal, as a page or as JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dml.collection.base import Collection
    from dml.encoder import Encoder

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
    group: str | int | float | bool | None = None


@dataclass(frozen=True)
class Answer:
    """What a search found."""

    collection: str
    generation: int
    approximate: bool
    took_ms: float
    hits: list[Found]
    total: int = 0
    total_is_exact: bool = False


@dataclass(frozen=True)
class Asked:
    """What to look for: a picture, examples among the items, or both."""

    image: Path | None
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people."""
        return self.image.name if self.image is not None else ", ".join(self.positive)


def search(
    collection: Annotated[
        str, typer.Argument(metavar="COLLECTION", help="Its folder; with --url its name at the service.")
    ],
    image: Annotated[
        Path | None, typer.Argument(metavar="IMAGE", help="The picture to look for.", show_default=False)
    ] = None,
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
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only items of this payload; also != < <= > >=. Repeatable."),
    ] = None,
    filter_: Annotated[
        str | None, typer.Option("--filter", metavar="JSON", help='A filter: {"must": [...], ...}.')
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(metavar="KEY", help="The best groups of equal values; -k counts groups.")
    ] = None,
    group_size: Annotated[int, typer.Option(min=1, max=100, help="Results of each group.")] = 1,
    positive: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="An item that is like it. Repeatable.")
    ] = None,
    negative: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="An item that is not like it. Repeatable.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="What runs the encoder: auto, onnx or torch.")] = "auto",
) -> None:
    """Find the pictures that look like one, or like examples.

    \b
    dml search shoes.collection photo.jpg -k 20 --html found.html --open

    dml search shoes.collection photo.jpg --where label=boot --where "price<80"
    """
    from dml.errors import UsageError
    from dml.imaging import decode

    asked = Asked(image, tuple(positive or ()), tuple(negative or ()))
    if image is not None:
        if image.is_dir():
            raise UsageError(f"{image} is a folder, and no picture: dml search COLLECTION IMAGE")
        decode(image)  # a file that is no picture is refused before anything is loaded
    elif not positive:
        raise UsageError("There is nothing to look for: name a picture, or an item with --positive ID.")
    if group_size != 1 and group_by is None:
        raise UsageError(f"--group-size {group_size} says how large groups are; give --group-by KEY too.")
    page = html or (page_in_temporary_folder(asked.name) if open_page else None)
    limits = {
        "limit": k,
        "exact": exact,
        "effort": effort,
        "score_threshold": threshold,
        "filter": read_filter(filter_, where or []),
        "group_by": group_by,
        "group_size": group_size,
    }
    if url is None:
        answer = search_folder(Path(collection), asked, limits, runtime=runtime, pictures=page is not None)
    else:
        answer = search_service(url, key, collection, asked, limits, pictures=page is not None)
    if page is not None:
        write_page(page, answer, asked)
        typer.echo(f"page: {page}", err=True)
        if open_page:
            typer.launch(str(page))
    if as_json:
        print_answer(answer)
    elif html is None or not open_page:
        print_table(answer)


def read_filter(text: str | None, where: list[str]) -> dict[str, Any] | None:
    """What --filter and all --where ask for together, as JSON. Raises UsageError, FilterInvalid."""
    import json

    from dml.collection.filters import Filter, parse_filter, parse_where, to_json
    from dml.errors import UsageError

    if text is None and not where:
        return None
    try:
        given = parse_filter(None if text is None else json.loads(text))
    except ValueError as error:
        raise UsageError(f"--filter is not valid JSON: {error}. Given: {text:.80}") from None
    both = [part for part in (given, parse_where(where)) if part]
    return to_json(both[0] if len(both) == 1 else Filter(must=tuple(both)))


def search_folder(
    path: Path, asked: Asked, limits: dict[str, Any], *, runtime: str, pictures: bool
) -> Answer:
    """Embed the picture with the collection's own encoder, and search."""
    import time

    from dml.collection import open_collection
    from dml.collection.examples import query_vector

    with open_collection(path, read_only=True) as there:
        encoder = None
        if asked.image is not None:
            encoder = load_encoder(path, there.encoder_path, runtime=runtime)
            there.check_fingerprint(encoder.fingerprint)
        started = time.perf_counter()
        base = encoder.embed([asked.image])[0] if encoder and asked.image else None
        vector = query_vector(there, base=base, positive=asked.positive, negative=asked.negative)
        [result] = there.search(vector[None], exclude=[*asked.positive, *asked.negative], **limits)
        took = 1000 * (time.perf_counter() - started)
        hits = [
            Found(
                hit.rank,
                hit.id,
                hit.score,
                hit.item.label,
                dict(hit.item.payload),
                thumbnail_of(there, hit.id) if pictures else None,
                hit.group,
            )
            for hit in result.hits
        ]
        return Answer(
            there.name,
            result.generation,
            result.approximate,
            took,
            hits,
            result.total,
            result.total_is_exact,
        )


def load_encoder(path: Path, folder: Path | None, *, runtime: str) -> "Encoder":
    """The encoder that came with a collection. Raises EncoderError."""
    from dml.collection.encoding import load_encoder_of
    from dml.errors import EncoderError

    if folder is None:
        raise EncoderError(
            f"{path} came without its encoder, so pictures cannot be searched in it. "
            f"Build it with `dml index build … --encoder RUN`."
        )
    return load_encoder_of(path, path=folder, runtime=runtime)


def thumbnail_of(there: "Collection", id: str) -> bytes | None:
    """The small picture of an item; None where there is none any more."""
    from dml.errors import ImageNotKept, InvalidImage

    try:
        return there.thumbnail(id, THUMBNAIL)
    except (ImageNotKept, InvalidImage):
        return None


def search_service(
    url: str, key: str | None, collection: str, asked: Asked, limits: dict[str, Any], *, pictures: bool
) -> Answer:
    """Send the picture, or the ids of the examples, to a service."""
    from dml.client import Client
    from dml.errors import ServiceError

    def small(client: Client, id: str) -> bytes | None:
        try:
            return client.image(collection, id, size="thumb")
        except ServiceError:
            return None  # an item without a picture is shown without one

    with Client(url, key) as client:
        answer = client.search(
            collection, image=asked.image, positive=asked.positive, negative=asked.negative, **limits
        )
        hits = [
            Found(
                rank,
                hit.id,
                hit.score,
                hit.label,
                dict(hit.payload or {}),
                small(client, hit.id) if pictures else None,
                hit.group,
            )
            for rank, hit in enumerate(answer.hits, start=1)
        ]
        return Answer(
            answer.collection,
            answer.generation,
            answer.approximate,
            answer.took_ms,
            hits,
            answer.total,
            answer.total_is_exact,
        )


def print_answer(answer: Answer) -> None:
    """JSON on stdout."""
    import json

    hits = [
        {"rank": h.rank, "id": h.id, "score": h.score, "label": h.label, "payload": h.payload}
        | ({} if h.group is None else {"group": h.group})
        for h in answer.hits
    ]
    tree = {
        "collection": answer.collection,
        "generation": answer.generation,
        "approximate": answer.approximate,
        "took_ms": round(answer.took_ms, 3),
        "total": answer.total,
        "total_is_exact": answer.total_is_exact,
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
    grouped = any(hit.group is not None for hit in answer.hits)
    if grouped:
        table.add_column("group")
    table.add_column("label")
    table.add_column("id", overflow="fold")
    for hit in answer.hits:
        group = [escape(str(hit.group))] if grouped else []
        table.add_row(str(hit.rank), f"{hit.score:.4f}", *group, escape(hit.label or ""), escape(hit.id))
    console.print(table)


def page_in_temporary_folder(name: str) -> Path:
    """Where a page goes that is only to be looked at."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix="dml-search-")) / f"{Path(name).stem}.html"


def write_page(path: Path, answer: Answer, asked: Asked) -> None:
    """One file with everything in it. Raises StorageError."""
    from dml.cli.search_page import render
    from dml.collection.pictures import shrink
    from dml.storage import write_aside

    query = None if asked.image is None else shrink(asked.image.read_bytes(), 2 * THUMBNAIL)
    text = render(answer, name=asked.name, query=query)
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
