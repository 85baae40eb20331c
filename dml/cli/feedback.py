"""`dml feedback`: what users said of search results, as JSON lines for evaluation and training."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def feedback(
    collection: Annotated[str, typer.Argument(help="Name of a collection of the service, or of an alias.")],
    url: Annotated[
        str, typer.Option(metavar="URL", help="Where the service is, as `dml serve` prints it.")
    ] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None,
        typer.Option(help="API key of the scope admin; left out: the environment variable DML_KEY."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; left out: to the terminal.")
    ] = None,
) -> None:
    """Export what users said of the hits of a collection: one JSON object a line, oldest first.

    query_id, id, relevant (true or false), key (whose), at (when).

    dml feedback shoes --out feedback.jsonl
    """
    from dml.client import Client
    from dml.errors import UsageError

    with Client(url, key or os.environ.get("DML_KEY")) as client:
        judgements = client.feedback(collection)
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in judgements)
    if out is None:
        typer.echo(lines, nl=False)
        return
    try:
        out.write_text(lines, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror or error}") from None
    count = f"{len(judgements):,} judgement{'' if len(judgements) == 1 else 's'}"
    typer.echo(f"{count} of {collection}, in {out}", err=True)
