"""The FastAPI application: the engine, wrapped in HTTP.

`create_app(engine)` takes what it needs. There are no global settings, so a test builds an app in one line.
"""

import asyncio
import hashlib
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.routing import Route

from dml import __version__
from dml.errors import DmlError
from service import problems, schemas
from service.auth import NEEDED, Gate, authorize
from service.batching import WorkerPool
from service.engine import Engine
from service.examples import add_examples
from service.keys import Keys, Scope
from service.metrics import Metrics
from service.middleware import Envelope
from service.remembered import Remembered
from service.routes import ROUTERS
from service.settings import Settings
from service.state import StateFile
from service.tracing import Tracing
from service.watching import Watch

if TYPE_CHECKING:
    from service.fetching import Fetcher

DESCRIPTION = (
    "What looks like this? Collections of pictures, searched by example. Errors are RFC 9457 problems."
)


def create_app(
    engine: Engine | Callable[[], Engine],
    settings: Settings | None = None,
    *,
    keys: Keys | None = None,
    state: StateFile | Path | None = None,
    on_ready: Callable[[Engine], None] = lambda engine: None,
    on_failure: Callable[[BaseException], None] | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        engine: the engine, or what makes it. It is then made in a thread after the start, while requests are
            answered 503 "not-ready".
        settings: limits and switches; left out, an engine's own, else the defaults.
        keys: the API keys. None: everybody who reaches the service may do everything.
        state: file, or its folder, for what is to outlive the service: jobs, answers to repeated writes,
            aliases, feedback. None: a folder for the time of this app.
        on_ready: called once the engine is there.
        on_failure: called when it cannot be made; without it, the service stays up and not ready.
        tracing: makes spans of requests; whoever gives it closes it. None: no traces.
    """
    ready = engine if isinstance(engine, Engine) else None
    make = None if isinstance(engine, Engine) else engine
    settings = settings or (ready.settings if ready else Settings())
    passing = Path(tempfile.gettempdir()) / f"dml-state-{uuid.uuid4().hex}" if state is None else None
    memory = Remembered(state or passing or Path())
    pool = WorkerPool(settings.workers, settings.queue, deadline_seconds=settings.deadline_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(app, make, on_ready, on_failure))
        yield
        await asyncio.shield(loading)  # a half-loaded engine cannot be closed; loading ends by itself
        if fetcher is not None:
            fetcher.close()
        pool.close()
        watch.close()
        memory.close()
        if passing is not None:
            shutil.rmtree(passing, ignore_errors=True)
        if app.state.engine is not None and make is not None:  # an engine that was given belongs to the giver
            app.state.engine.close()

    app = FastAPI(
        title="dml",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.engine, app.state.settings, app.state.pool = None, settings, pool
    app.state.memory = memory
    app.state.fetcher = fetcher = _fetcher(settings)
    watch = Watch(lambda: app.state.engine, memory.jobs.count)
    app.state.metrics = metrics = Metrics(threads=settings.workers, queue=settings.queue, view=watch.view)
    pool.observe = metrics.set_pending
    app.state.methods = methods
    app.state.gate = Gate(
        find=keys.find if keys else lambda text: None,
        keys_exist=keys.any if keys else lambda: False,
        settings=settings,
    )
    if ready is not None:
        _adopt(app, ready)
    for router in ROUTERS:
        app.include_router(router, responses=PROBLEM_RESPONSE, dependencies=[Depends(authorize)])
    for kind in (DmlError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, problems.handle)
    app.add_middleware(Envelope, settings=settings, metrics=metrics, tracing=tracing)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def methods(path: str) -> list[str]:
    """The methods that are offered at a path. The framework itself names those of one matching route only."""
    matching = (
        r for router in ROUTERS for r in router.routes if isinstance(r, Route) and r.path_regex.match(path)
    )
    return sorted({method for route in matching for method in route.methods or ()})


async def _load(
    app: FastAPI,
    make: Callable[[], Engine] | None,
    on_ready: Callable[[Engine], None],
    on_failure: Callable[[BaseException], None] | None,
) -> None:
    try:
        if make is not None:
            _adopt(app, await asyncio.to_thread(make))
        on_ready(app.state.engine)
    except Exception as error:
        if on_failure is None:
            structlog.get_logger("service").exception("the collections cannot be loaded")
        else:
            on_failure(error)


def _fetcher(settings: Settings) -> "Fetcher | None":
    if not settings.fetch_hosts:
        return None
    from service.fetching import Fetcher  # an HTTP client, for those alone who use it

    return Fetcher(settings)


def _adopt(app: FastAPI, engine: Engine) -> None:
    metrics: Metrics = app.state.metrics
    engine.observers.batch = metrics.batches.observe
    memory: Remembered = app.state.memory
    memory.repeats.service = service_of(engine)
    engine.alias_of = lambda: memory.aliases.current(engine.places())
    if not engine.settings.read_only:
        memory.jobs.mark_interrupted(engine.places())
    app.state.engine = engine


def service_of(engine: Engine) -> str:
    """What a service serves, as one text: the same after a restart with the same collections."""
    served = [str(engine.folder.path.resolve())] if engine.folder else sorted(engine.places())
    return hashlib.sha256("\n".join(served).encode()).hexdigest()[:32]


PROBLEM_RESPONSE: dict[int | str, dict[str, Any]] = {
    status: {
        "description": "A problem (RFC 9457)",
        "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemAnswer"}}},
    }
    for status in ("4XX", "5XX", 422)
}
"""Stands on every route. 422 by number too, or the framework would describe its own, which is never sent."""


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that routes read themselves."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        own = [m for m in vars(schemas).values() if isinstance(m, type) and issubclass(m, schemas.BaseModel)]
        models = [(m, "validation") for m in own if m not in (schemas.BaseModel, schemas.Request)]
        _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        components = document.setdefault("components", {}).setdefault("schemas", {})
        components.update(definitions["$defs"])
        _describe_keys(document)
        add_examples(document)
        app.openapi_schema = document
    return app.openapi_schema


def _describe_keys(document: dict[str, Any]) -> None:
    """Which operation needs a key, and of what scope."""
    schemes = document["components"]["securitySchemes"] = {
        "bearer": {
            "type": "http",
            "scheme": "bearer",
            "description": "An API key, where the service has keys",
        },
        "api-key": {"type": "apiKey", "in": "header", "name": "api-key", "description": "The same key"},
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            needed = NEEDED.get((method.upper(), path.replace("{id}", "{id:path}")), Scope.ADMIN)
            if needed is not None:
                operation["security"] = [{}, *({name: []} for name in schemes)]
                operation["x-scope"] = str(needed)
