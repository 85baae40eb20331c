"""Which collections and models there are."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from dml.collection.base import CollectionInfo
from dml.errors import DmlError
from service.engine import Engine, Model
from service.folders import check_index
from service.memory import Conflict
from service.problems import Problem, body_of, problem_of
from service.repeats import ONCE, OnceRoute
from service.routes.jobs import promise_of
from service.routes.parts import (
    Limits,
    Name,
    Ready,
    after_of,
    answer,
    cursor_of,
    in_thread,
    read_json,
    takes,
)
from service.schemas import (
    CollectionAnswer,
    CollectionRequest,
    CollectionsAnswer,
    CountAnswer,
    CountRequest,
    ModelsAnswer,
    ReloadAnswer,
)

router = APIRouter(prefix="/v1", tags=["collections"], route_class=OnceRoute)


@router.get("/models", response_model=ModelsAnswer)
async def models(engine: Ready) -> Response:
    """The encoders that answer here."""
    return answer({"items": [model_answer(model) for model in engine.models()]})


def model_answer(model: Model) -> dict[str, Any]:
    """An encoder as the API shows it; how it was trained, as far as its manifest says."""
    provenance = model.manifest.get("provenance") or {}
    loss = ((provenance.get("recipe") or {}).get("loss") or {}).get("name")
    trained_on = provenance.get("trained_on")
    return {
        "id": model.fingerprint[:12],
        "fingerprint": model.fingerprint,
        "dim": model.dim,
        "input_size": model.input_size,
        "loss": None if loss is None else str(loss),
        "trained_on": trained_on if isinstance(trained_on, str) else None,
        "collections": list(model.collections),
    }


@router.get("/collections", response_model=CollectionsAnswer)
async def collections(
    request: Request,
    engine: Ready,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """The collections, by name."""
    after = after_of(cursor)
    names = [name for name in engine.names() if after is None or name > after]
    shown = names[:limit]
    items = await in_thread(
        request, lambda: [summary(engine, name) for name in shown if name in engine.names()]
    )
    return answer({"items": items, "next_cursor": cursor_of(shown[-1]) if len(names) > limit else None})


def summary(engine: Engine, name: str) -> dict[str, Any]:
    with engine.using(name) as collection:
        count = len(collection)
    has_encoder = any(collection.fingerprint == model.fingerprint for model in engine.models())
    return {
        "name": engine.resolve(name),
        "count": count,
        "dim": collection.dim,
        "metric": "cosine",
        "model_fingerprint": collection.fingerprint,
        "accepts": ["image", "id", "vector"] if has_encoder else ["id", "vector"],
    }


@router.post(
    "/collections/{collection}/count", response_model=CountAnswer, openapi_extra=takes(json=CountRequest)
)
async def count(request: Request, engine: Ready, name: Name) -> Response:
    """How many items there are, or pass a filter."""
    asked = await read_json(request, CountRequest)
    engine.collection(name)
    found = await in_thread(request, lambda: engine.count(name, asked.filter))
    return answer({"count": found, "exact": True})


@router.get("/collections/{collection}", response_model=CollectionAnswer)
async def collection(request: Request, engine: Ready, settings: Limits, name: Name) -> Response:
    """One collection: its size, index, encoder and measured recall."""

    def look() -> dict[str, Any]:
        meant = engine.resolve(name)  # once: an alias may be switched meanwhile
        info, short = engine.info(meant), summary(engine, meant)
        return collection_answer(info, short, engine, read_only=settings.read_only)

    return answer(await in_thread(request, look))


def collection_answer(
    info: CollectionInfo, short: dict[str, Any], engine: Engine, *, read_only: bool
) -> dict[str, Any]:
    return short | {
        "count": info.count,
        "index": dict(info.index),
        "threshold": None,
        "measured_recall": info.measured_recall,
        "promised_recall": ((info.manifest.get("index") or {}).get("promise") or {}).get("recall"),
        "generation": info.generation,
        "pending": info.pending,
        "bytes_on_disk": info.bytes_on_disk,
        "capabilities": sorted(engine.collection(short["name"]).capabilities()),
        "read_only": read_only,
    }


@router.put(
    "/collections/{collection}",
    response_model=CollectionAnswer,
    responses={201: {"model": CollectionAnswer, "description": "It was new"}},
    openapi_extra=takes(json=CollectionRequest),
    dependencies=ONCE,
)
async def create(request: Request, engine: Ready, settings: Limits, name: Name) -> Response:
    """Have an empty collection of this name; 200: one with the same settings is there, and stays. One that
    was put into the folder of the service after its start (by `dml index build`) is opened."""
    asked = await read_json(request, CollectionRequest)
    index = {"kind": asked.index.kind or "auto", "options": asked.index.options or {}}
    index |= {"promise": promise_of(asked.index)}
    check_index(index["kind"], index["options"])

    def make() -> tuple[bool, CollectionInfo, dict[str, Any]]:
        there = engine.adopt(name) or name in engine.names()
        wishes = (asked.model, asked.dim, index["promise"], index["kind"], index["options"])
        as_it_is = there and wishes == (None, None, None, "auto", {})  # none: any settings will do
        new = not as_it_is and engine.create(name, model=asked.model, dim=asked.dim, index=index)
        return new, engine.info(name), summary(engine, name)

    new, info, short = await in_thread(request, make)
    content = collection_answer(info, short, engine, read_only=settings.read_only)
    return answer(content, 201 if new else 200)


@router.post("/admin/reload", status_code=202, response_model=ReloadAnswer)
async def reload(request: Request, engine: Ready) -> Response:
    """Serve the collections that were put into the folder of the service since its start; those that are
    served go on. What a writer elsewhere changes is followed without asking."""
    opened, failed = await in_thread(request, engine.reload)
    place, request_id = request.url.path, request.state.request_id
    shown = [
        {"name": name, "problem": body_of(why_closed(error), instance=place, request_id=request_id)}
        for name, error in failed.items()
    ]
    return answer({"opened": opened, "failed": shown}, 202)


def why_closed(error: DmlError) -> Problem:
    """Of a collection that cannot be opened: operators are told what is wrong with its files as well."""
    known = problem_of(error)
    return Problem(known.slug, str(error)) if known.slug == "internal-error" else known


@router.delete("/collections/{collection}", status_code=204, response_class=Response, dependencies=ONCE)
async def delete(request: Request, engine: Ready, name: Name) -> Response:
    """Delete a collection with all that is in it."""
    memory = request.app.state.memory

    def remove() -> None:
        unfinished = memory.jobs.unfinished(engine.place(name))
        if unfinished:
            raise Conflict(
                f"The collection has a {unfinished[0].kind} job that has not ended: "
                f"/v1/jobs/{unfinished[0].id}. Wait for it, or cancel it."
            )
        memory.feedback.forget(engine.remove(name))

    await in_thread(request, remove)
    return Response(status_code=204)
