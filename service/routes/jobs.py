"""Work that takes longer than a request: begin, look, cancel."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from dml.collection.base import Collection
from dml.collection.local import LocalCollection
from dml.errors import NotAvailable
from dml.index.tune import Promise
from service.engine import Engine
from service.folders import check_index
from service.jobs import Control, Job, Jobs
from service.repeats import ONCE, OnceRoute
from service.routes.parts import Name, Ready, answer, in_thread, not_available, read_json, takes
from service.schemas import DuplicatesRequest, JobAnswer, JobsAnswer, PromiseRequest, RebuildRequest

router = APIRouter(prefix="/v1", tags=["jobs"], route_class=OnceRoute)

ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {
        "model": JobAnswer,
        "description": "The job; Location says where to look how far it is",
        "headers": {"Location": {"schema": {"type": "string"}}},
    }
}
ROWS = 256
"""Vectors that are compared with the collection at a time."""
NEAREST = 20
"""Neighbours of each item that may be its duplicates."""

JobId = Annotated[str, Path(max_length=64, description="Id of a job")]


def jobs_of(request: Request) -> Jobs:
    return request.app.state.memory.jobs


@router.get("/jobs", response_model=JobsAnswer)
async def jobs(
    request: Request, engine: Ready, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> Response:
    """The newest jobs of the collections, newest first."""
    found = await in_thread(request, lambda: jobs_of(request).newest(engine.places(), limit=limit))
    return answer({"items": [job_answer(job) for job in found]})


@router.get("/jobs/{job}", response_model=JobAnswer)
async def job(request: Request, engine: Ready, job: JobId) -> Response:
    """How far a job is, and what it came to."""
    return answer(job_answer(await in_thread(request, lambda: jobs_of(request).get(job))))


@router.delete("/jobs/{job}", status_code=202, response_model=JobAnswer)
async def cancel(request: Request, engine: Ready, job: JobId) -> Response:
    """Ask a job to stop, as soon as it can; one that has ended stays as it is."""
    return answer(job_answer(await in_thread(request, lambda: jobs_of(request).cancel(job))), 202)


@router.post(
    "/collections/{collection}/rebuild",
    status_code=202,
    response_model=JobAnswer,
    responses=ACCEPTED,
    openapi_extra=takes(json=RebuildRequest),
    dependencies=ONCE,
)
async def rebuild(request: Request, engine: Ready, name: Name) -> Response:
    """Build the index anew: of a kind, or of one that keeps a promised recall. Searches and writes go on."""
    engine.check_writable(name)
    name = engine.resolve(name)  # an alias may be switched before the job runs
    asked = await read_json(request, RebuildRequest)
    check_index(asked.kind, asked.options or {})
    return await begin(
        request, engine, "rebuild", name, lambda control: rebuilt(engine, name, asked, control)
    )


def promise_of(asked: PromiseRequest) -> Promise | None:
    """What an index is to keep; None: nothing was asked for."""
    if asked.target_recall is None:
        return None
    return Promise(asked.target_recall, memory=asked.memory_budget, latency=asked.latency_budget)


def rebuilt(engine: Engine, name: str, asked: RebuildRequest, control: Control) -> dict[str, Any]:
    """The work of a rebuild."""
    promise = promise_of(asked)
    with engine.using(name) as collection:
        if not isinstance(collection, LocalCollection):  # a database server builds by itself, as a whole
            return build_elsewhere(collection, asked)
        built = collection.build_index(
            asked.kind if promise is None else None,
            options=asked.options if promise is None else None,
            promise=promise,
            say=lambda line: control.tell(None, line),
            stop=control.stops,
        )
    control.outcome = outcome_of(built)
    return built


def outcome_of(built: Mapping[str, Any]) -> str:
    """What a rebuild came to, in words."""
    recall = (built.get("measured") or {}).get("recall_at_10")
    parts = [f"{built['kind']} over {counted(built['count'], 'item')}"]
    if isinstance(recall, float) and math.isfinite(recall):
        parts.append(f"recall@10 {recall:.3f}")
    promise = built.get("promise")
    if promise is not None:
        parts.append(
            "the promise holds" if promise["holds"] else f"the promise does not hold: {promise['problem']}"
        )
    return ", ".join(parts)


def counted(count: int, one: str) -> str:
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def build_elsewhere(collection: Any, asked: RebuildRequest) -> dict[str, Any]:
    if asked.target_recall is not None:
        raise NotAvailable("target_recall is for collections in a folder; name the kind of index instead.")
    return collection.build_index(asked.kind, options=asked.options)


@router.post(
    "/collections/{collection}/duplicates",
    status_code=202,
    response_model=JobAnswer,
    responses=ACCEPTED,
    openapi_extra=takes(json=DuplicatesRequest),
    dependencies=ONCE,
)
async def duplicates(request: Request, engine: Ready, name: Name) -> Response:
    """Find items with the same picture file, or with vectors that are nearly the same."""
    engine.check_writable(name)
    name = engine.resolve(name)
    asked = await read_json(request, DuplicatesRequest)
    if asked.level == "edited":
        raise not_available("level", "edited copies need fingerprints of pictures; ask for similar.")
    find = same_files if asked.level == "file" else near_vectors
    return await begin(
        request, engine, "duplicates", name, lambda control: found(engine, name, asked, find, control)
    )


def found(engine: Engine, name: str, asked: DuplicatesRequest, find: Any, control: Control) -> dict[str, Any]:
    """The work of a search for duplicates."""
    with engine.using(name) as collection:
        listed = find(collection, asked, control)
    found = counted(len(listed), "group" if asked.level == "file" else "pair")
    control.outcome = f"{found} found" if listed else "none found"
    return {
        "level": asked.level,
        "duplicates": listed[: asked.limit],
        "listed_all": len(listed) <= asked.limit,
    }


def same_files(collection: Any, asked: DuplicatesRequest, control: Control) -> list[dict[str, Any]]:
    """Ids of items whose pictures have the same bytes (and the same box in them), largest groups first."""
    by_bytes: dict[tuple, list[str]] = {}
    for known in collection.known_pictures():
        by_bytes.setdefault(tuple(known[1:]), []).append(known[0])
        control.tell(None, "reading checksums")
    groups = sorted(
        (sorted(ids) for ids in by_bytes.values() if len(ids) > 1), key=lambda ids: (-len(ids), ids)
    )
    return [{"ids": ids, "score": None} for ids in groups]


def near_vectors(collection: Collection, asked: DuplicatesRequest, control: Control) -> list[dict[str, Any]]:
    """Pairs at least as similar as the threshold, nearest first; of each item its `NEAREST` are looked at."""
    pairs: dict[tuple[str, str], float] = {}
    after, seen, count = None, 0, max(1, len(collection))
    while True:
        items, after = collection.scroll(after=after, limit=ROWS, with_vector=True)
        if items:
            rows = np.stack([item.vector for item in items if item.vector is not None])
            answers = collection.search(
                rows, limit=NEAREST + 1, exact=True, score_threshold=asked.score_threshold
            )
            for item, result in zip(items, answers, strict=True):
                for hit in result.hits:
                    if hit.id != item.id:
                        pairs[min(item.id, hit.id), max(item.id, hit.id)] = float(hit.score)
        seen += len(items)
        control.tell(min(1.0, seen / count), f"{seen:,} of {count:,} items")
        if after is None:
            ranked = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
            return [{"ids": list(ids), "score": score} for ids, score in ranked]


async def begin(request: Request, engine: Engine, kind: str, name: str, work: Any) -> Response:
    """Have the work done as a job, one of its kind at a time for a collection, and answer 202."""
    begun = await in_thread(
        request,
        lambda: jobs_of(request).begin(
            kind,
            work,
            collection=engine.resolve(name),
            place=engine.place(name),
            alone=kind != "upsert",
            request_id=request.state.request_id,
        ),
    )
    return answer(job_answer(begun), 202, headers={"Location": f"/v1/jobs/{begun.id}"})


def job_answer(job: Job) -> dict[str, Any]:
    """A job as the API shows it."""
    times = {name: moment(getattr(job, name)) for name in ("created", "started", "ended")}
    return {**vars(job), **times}


def moment(seconds: float | None) -> str | None:
    return (
        None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    )
