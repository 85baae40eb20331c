"""`dml keys`: who may use the service."""

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dml.cli.shown import group

if TYPE_CHECKING:
    from service.keys import Key, Keys

app = group("Make, list and revoke the API keys of the service.")

State = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="As for `dml serve`; left out: $DML_STATE or the user's own."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What to call it, in lists and in the log: who uses it.")],
    scope: Annotated[
        str | None,
        typer.Option(
            help="search: read; write: also change items; admin: also collections.", show_default=False
        ),
    ] = None,
    expires: Annotated[str | None, typer.Option(metavar="90d", help="Lifetime; left out: for good.")] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="100/min", help="What it may ask in s, min, h or d; none: no limit.")
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it. It is shown this once: only its hash is kept. Services know it at once.

    \b
    dml keys add shop --scope search --expires 90d --rate 600/min
    """
    from dml.errors import UsageError

    if scope is None:
        raise UsageError(
            "Say what the key allows: --scope search (read), write (also change items) or admin (also make "
            "and delete collections)."
        )
    keys = open_keys(state)
    from service.keys import Scope, parse_lifetime
    from service.limits import Rate

    with keys:
        text, key = keys.add(
            name,
            scope=Scope.parse(scope),
            lifetime=None if expires is None else parse_lifetime(expires),
            rate=None if rate is None else Rate.parse(rate),
        )
    if as_json:
        typer.echo(json.dumps({**shown(key), "key": text}))
        return
    until = f"until {moment(key.expires)} UTC" if key.expires else "until it is revoked"
    typer.echo(f'The key "{name}" ({scope}) works {until}. It is shown this once; keep it safe.', err=True)
    typer.echo(text)


@app.command("list")
def list_keys(state: State = None, as_json: Json = False) -> None:
    """All keys, revoked and expired ones too. The keys themselves are not kept, so they are not shown."""
    with open_keys(state) as keys:
        found = keys.list()
    if as_json:
        typer.echo(json.dumps([shown(key) for key in found]))
        return
    if not found:
        typer.echo(
            f"There are no keys in {keys.folder}. `dml keys add NAME --scope search` makes one.", err=True
        )
        return
    rows = [("name", "id", "scope", "state", "made (UTC)", "expires", "rate"), *map(row_of, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Name or id of the key.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Refuse a key from this moment on, in services that run too.

    \b
    dml keys revoke shop
    """
    with open_keys(state) as keys:
        key = keys.revoke(name)
    if as_json:
        typer.echo(json.dumps(shown(key)))
    else:
        typer.echo(f'The key "{key.name}" ({key.id}) is revoked.')


def open_keys(state: Path | None) -> "Keys":
    """The keys in a state folder. Raises MissingExtra, UsageError for what is no folder."""
    from dml.errors import MissingExtra, UsageError

    if state is not None and state.exists() and not state.is_dir():
        raise UsageError(f"--state names a folder, and {state} is a file. Name the folder that it lies in.")
    try:
        import fastapi  # noqa: F401  (only to say early what is missing)
        import limits  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(f"The service needs {error.name}, which", "serve") from None
    from service.keys import Keys
    from service.state import default_folder

    return Keys(state or default_folder())


def shown(key: "Key") -> dict[str, Any]:
    """A key as JSON; without its secret, which nobody has."""
    return {
        "name": key.name,
        "id": key.id,
        "scope": str(key.scope),
        "state": key.state(),
        "created": key.created.isoformat(timespec="seconds"),
        "expires": key.expires.isoformat(timespec="seconds") if key.expires else None,
        "revoked": key.revoked.isoformat(timespec="seconds") if key.revoked else None,
        "rate": str(key.rate) if key.rate else None,
    }


def row_of(key: "Key") -> tuple[str, ...]:
    """A key as a line of the list."""
    expires = moment(key.expires) if key.expires else "never"
    rate = str(key.rate) if key.rate else "no limit"
    return (key.name, key.id, str(key.scope), key.state(), moment(key.created), expires, rate)


def moment(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M}"
