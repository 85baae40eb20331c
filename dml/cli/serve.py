"""`dml serve`: collections behind a REST API and a page."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    collections: Annotated[list[Path], typer.Argument(metavar="COLLECTION...", help="Collection folders.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8000,
    runtime: Annotated[str, typer.Option(help="What runs the encoder: auto, onnx or torch.")] = "auto",
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse every write.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an address that other machines reach, without keys.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name to be called by (Host), besides 127.0.0.1 and localhost; may be repeated.",
        ),
    ] = None,
    log_format: Annotated[str, typer.Option(help="auto, plain or json.")] = "auto",
) -> None:
    """Serve collections: a search page, a REST API (/openapi.json), metrics, until Ctrl-C.

    dml serve shoes.collection bags.collection --port 8000
    """
    from dml.errors import MissingExtra, UsageError

    for name, given, known in (
        ("--runtime", runtime, ("auto", "onnx", "torch")),
        ("--log-format", log_format, ("auto", "plain", "json")),
    ):
        if given not in known:
            raise UsageError(f"{name} is one of {', '.join(known)}, got {given}")
    try:
        import fastapi  # noqa: F401  (only to say early what is missing)
        import prometheus_client  # noqa: F401
        import structlog  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(f"The service needs {error.name}, which", "serve") from None
    from service.run import serve as run
    from service.settings import Settings

    run(
        collections,
        host=host,
        port=port,
        runtime=runtime,
        insecure=insecure,
        settings=Settings(
            allow_hosts=tuple(allow_host or ()),
            read_only=read_only,
            log_format=log_format,  # type: ignore[arg-type]
        ),
        announce=typer.echo,
    )
