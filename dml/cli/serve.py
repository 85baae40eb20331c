"""`dml serve`: collections behind a REST API and a page."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    collections: Annotated[
        list[Path] | None, typer.Argument(metavar="COLLECTION", help="Collection folders.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Serve the collections in it too; others can be made and deleted there."
        ),
    ] = None,
    encoder: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER", help="An encoder for collections that are made in --data; may be repeated."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8000,
    runtime: Annotated[
        str,
        typer.Option(
            help="What runs the encoder: auto, onnx, openvino, torch, or a profile as fused/openvino-bf16."
        ),
    ] = "auto",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that answer; above 1 with --read-only only.")
    ] = 1,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse every write.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an address that other machines reach, without keys.")
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where keys, jobs and aliases are kept; left out: $DML_STATE or the user's own.",
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(metavar="N/min", help="What an address may ask without a key; none: no limit."),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Largest picture that is taken; left out: 25 million."),
    ] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="Answer /metrics without a key also where there are keys.")
    ] = False,
    fetch_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="A host whose pictures are fetched for queries by address, such as photos.example.org, "
            "*.cdn.example.org or 10.0.0.7:9000; may be repeated. None: no address is opened.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="A web origin whose pages may ask from a browser; may be repeated."
        ),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="A reverse proxy whose X-Forwarded-For is believed, besides this machine; may be repeated.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name to be called by (Host), besides 127.0.0.1 and localhost; may be repeated.",
        ),
    ] = None,
    log_format: Annotated[
        str, typer.Option(help="auto (plain on a terminal, else json), plain or json.")
    ] = "auto",
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error: lines below it are not written.")
    ] = "info",
    tracing: Annotated[
        bool,
        typer.Option("--tracing", help="Send OpenTelemetry traces, as the OTEL_ variables say."),
    ] = False,
) -> None:
    """Serve collections: a search page, a REST API (/openapi.json), metrics, until Ctrl-C.

    \b
    dml serve shoes.collection bags.collection --port 8000
    """
    from dml.startup import prepare_service

    prepare_service()  # before anything loads numpy
    from dml.encoder.profiles import PRECISIONS, named
    from dml.errors import MissingExtra, UsageError

    if not named(runtime)["profile"] and runtime not in ("auto", *PRECISIONS):
        known = ", ".join(["auto", *PRECISIONS])
        raise UsageError(f"--runtime is one of {known}, or a profile as fused/openvino-bf16; got {runtime}")
    for name, given, known in (
        ("--log-format", log_format, ("auto", "plain", "json")),
        ("--log-level", log_level, ("debug", "info", "warning", "error")),
    ):
        if given not in known:
            raise UsageError(f"{name} is one of {', '.join(known)}, got {given}")
    try:
        import fastapi  # noqa: F401  (only to say early what is missing)
        import limits  # noqa: F401
        import prometheus_client  # noqa: F401
        import structlog  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(f"The service needs {error.name}, which", "serve") from None
    from service.limits import Rate
    from service.run import serve as run
    from service.settings import Settings

    run(
        collections or [],
        data=data,
        encoders=encoder or (),
        host=host,
        port=port,
        runtime=runtime,
        insecure=insecure,
        workers=workers,
        state=state,
        proxies=proxy or (),
        settings=Settings(
            max_pixels=max_pixels or Settings.max_pixels,
            allow_hosts=tuple(allow_host or ()),
            fetch_hosts=tuple(fetch_host or ()),
            cors_origins=tuple(cors_origin or ()),
            rate=None if rate is None else Rate.parse(rate),
            open_metrics=open_metrics,
            read_only=read_only,
            log_format=log_format,  # type: ignore[arg-type]
            log_level=log_level,  # type: ignore[arg-type]
            tracing=tracing,
        ),
        announce=typer.echo,
    )
