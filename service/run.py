"""Start the service: check what was asked, bind, load, serve, stop in good order."""

import ctypes
import ipaddress
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI

from dml import __version__
from dml.errors import ServiceError, UnknownCollection, UsageError
from service.app import create_app
from service.engine import Engine
from service.keys import Keys
from service.logs import configure_logs
from service.settings import Settings
from service.state import StateFile, default_folder
from service.tracing import Tracing
from service.workers import Workers, check_workers, share_of

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK = 1024 * 1024
"""Bytes; Pillow keeps pixels in blocks of up to 16 MB, and strips of a conversion have 1 to 4."""
GRACE_SECONDS = 20
"""After SIGTERM, requests in flight have this long to end."""


def serve(
    paths: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    runtime: str = "auto",
    insecure: bool = False,
    state: Path | None = None,
    proxies: Sequence[str] = (),
    data: Path | None = None,
    encoders: Sequence[Path] = (),
    settings: Settings | None = None,
    workers: int = 1,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve collection folders until SIGINT or SIGTERM; requests in flight are finished first.

    Args:
        paths: collection folders.
        host, port: where to listen; port 0 takes a free one.
        runtime: "auto", "onnx", "openvino", "torch", or a profile as "fused/openvino-bf16".
        insecure: allow an address that other machines reach, although there are no keys.
        state: folder with the API keys and what else is to outlive the service; left out, the user's.
        data: folder whose collections are served too, and where others may be made and deleted.
        encoders: encoder folders for collections that are to be made there.
        proxies: addresses of reverse proxies, whose word on where a request came from is taken. This
            machine's own addresses always are such.
        workers: processes that answer; more than one with `settings.read_only` only.
        announce: told one line when the service is ready.

    Raises:
        UsageError: no collections, a public address without keys and without `insecure`, or several workers
            that would write.
        StorageError, DamagedFile: there are keys, but they cannot be read.
        ServiceError: the address is taken.
        MissingExtra: traces are asked for, and OpenTelemetry is not installed.
        CollectionError, EncoderError: what is to be served cannot be opened.
    """
    settings = settings or Settings()
    settings = replace(settings, allow_hosts=hosts_of(host, settings.allow_hosts))
    check_workers(workers, settings)
    remembered = StateFile(state or default_folder())
    check_address(host, insecure=insecure, keys=Keys(remembered))
    remembered.close()
    check_paths(paths, data)
    configure_logs(settings)
    answer = partial(
        serve_on,
        paths=list(paths),
        runtime=runtime,
        state=remembered.folder,
        proxies=list(proxies),
        data=data,
        encoders=list(encoders),
        settings=replace(settings, **share_of(settings, workers)) if workers > 1 else settings,
    )
    with bind(host, port) as listening:
        if workers > 1:
            Workers(workers, answer, listening).run(announce)
        else:
            answer(listening, announce)


def serve_on(
    listening: socket.socket,
    announce: Callable[[str], None],
    *,
    paths: Sequence[Path],
    runtime: str,
    state: Path,
    proxies: Sequence[str],
    data: Path | None,
    encoders: Sequence[Path],
    settings: Settings,
) -> None:
    """Answer on a socket, in this process, until SIGINT or SIGTERM; see `serve`."""
    remembered = StateFile(state)
    keys = Keys(remembered)
    configure_logs(settings)
    quiet_decoders()
    give_back_large_blocks()
    tracing = Tracing.from_environment() if settings.tracing else None
    failures: list[BaseException] = []
    log, started = structlog.get_logger("service"), time.monotonic()

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    def be_ready(engine: Engine) -> None:
        items = {name: engine.count(name) for name in engine.names()}
        log.info("ready", collections=items, seconds=round(time.monotonic() - started, 2))
        announce(greeting(engine, address, keys_needed=keys.any()))

    address = address_of(listening)
    log.info("starting", version=__version__, address=address, process=os.getpid())

    def load() -> Engine:
        return Engine.open(paths, runtime=runtime, settings=settings, data=data, encoders=encoders)

    # Alone, the port answers at once, if only that it is not ready. Among others, one that is not ready would
    # take requests that they could answer.
    engine = load() if settings.processes > 1 else None
    app = create_app(
        engine or load,
        settings,
        keys=keys,
        state=remembered,
        on_ready=be_ready,
        on_failure=fail,
        tracing=tracing,
    )
    server = uvicorn.Server(server_config(app, settings, proxies=proxies))
    with signals_only_end_the_server():
        server.run(sockets=[listening])
    if engine is not None:
        engine.close()
    remembered.close()
    if tracing is not None:
        tracing.close()
    log.info("stopped", seconds=round(time.monotonic() - started, 2), failed=bool(failures))
    if failures:
        raise failures[0]


def server_config(app: FastAPI, settings: Settings, *, proxies: Sequence[str] = ()) -> uvicorn.Config:
    """The server of `serve`, with the limits of `service.connection` where its parser is installed."""
    try:
        from service.connection import limited

        problems = app.state.metrics.problems
        connection: Any = limited(settings, lambda slug: problems.labels(slug).inc())
    except ModuleNotFoundError:  # no httptools, as on Windows: uvicorn's other parser limits heads by itself
        connection = "h11"
    return uvicorn.Config(
        app,
        http=connection,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        forwarded_allow_ips=["127.0.0.1", "::1", *proxies],
        timeout_graceful_shutdown=GRACE_SECONDS,
        lifespan="on",
    )


def quiet_decoders() -> None:
    """Pillow warns of every odd tag of a picture, and Python remembers each text that it has warned of: one
    upload could write tens of thousands of lines to the log, and keep as many texts in memory."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def give_back_large_blocks() -> None:
    """Have the memory of decoded pictures returned to the system as soon as they are forgotten.

    Left alone, glibc raises the size from which blocks are mapped one by one to that of the pixels it has
    seen freed, and keeps later ones in a heap per thread: several times what `max_pixels_in_flight` allows
    for. A size that was set once stays. Other C libraries know no such size; an operator's choice is left.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


@contextmanager
def signals_only_end_the_server() -> Iterator[None]:
    """uvicorn finishes in order, and then sends itself the signal again: the process would die of it."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_address(host: str, *, insecure: bool, keys: Keys) -> None:
    """Refuse an address that other machines reach, unless there are keys. Raises UsageError."""
    if insecure or is_loopback(host) or keys.any():
        return
    raise UsageError(
        f"Refusing to listen on {host}: without API keys, every machine that reaches it could read and "
        f"change the collections. Make a key first: dml keys add NAME --scope search. Or use "
        f"--host 127.0.0.1 with an authenticating proxy in front, or say --insecure on a network that you "
        f"trust. "
        f"(No keys in {keys.folder}; --state names another folder.)"
    )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def hosts_of(host: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """The names to answer to when listening on `host`; none: every name.

    On a loopback address the operator's browser is what strangers could reach the service through, so names
    are always checked there. On a public address others give the service its names; `allowed` tells which.
    """
    if not allowed and not is_loopback(host):
        return ()
    bare = host.strip("[]")
    return (*allowed, *(() if bare in ("", "0.0.0.0", "::") else (bare,)))


def check_paths(paths: Sequence[Path], data: Path | None = None) -> None:
    """Fail before binding when a folder is not there. Raises UsageError, UnknownCollection."""
    if not paths and data is None:
        raise UsageError(
            "Name at least one collection folder to serve (`dml index build` makes one), or a folder for "
            "collections with --data."
        )
    named: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UnknownCollection(
                f"There is no collection folder {path}. `dml index build FOLDER --encoder RUN --out {path}` "
                f"makes one."
            )
        first = named.setdefault(path.resolve(), path)
        if first is not path:
            same = f"{path}" if path == first else f"{path} and {first} are one folder, which"
            raise UsageError(f"{same} is named twice; name every collection once.")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServiceError when the address is taken or not ours."""
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    try:
        return socket.create_server((bare, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ServiceError(
            f"Cannot listen on {host}:{port}: {reason}. Choose another with --port (0 takes a free one)."
        ) from None


def address_of(listening: socket.socket) -> str:
    """The address to open in a browser."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def greeting(engine: Engine, address: str, *, keys_needed: bool = False) -> str:
    """The one line that says where, and what."""
    shown = [f"{name} ({engine.count(name):,} items)" for name in engine.names()]
    asks = "asks for an API key; " if keys_needed else ""
    return f"Serving {', '.join(shown) or 'no collections yet'} at {address} ({asks}Ctrl-C stops)"
