"""What looks like this?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from dml.collection.base import Hit
from dml.stages import stage
from service import engine as core
from service.engine import Answer
from service.problems import Problem, body_of, invalid, problem_of
from service.routes.parts import (
    FILE,
    Id,
    Limits,
    Name,
    Ready,
    answer,
    filter_in_query,
    from_base64,
    image_address,
    in_thread,
    not_available,
    parse,
    read_form,
    read_json,
    takes,
)
from service.schemas import (
    BatchAnswer,
    BatchRequest,
    ImageQuery,
    ImageSearchParams,
    QuerySpec,
    SearchAnswer,
    SearchOptions,
    SearchRequest,
)
from service.settings import Settings

if TYPE_CHECKING:
    from service.fetching import Fetcher

router = APIRouter(prefix="/v1/collections/{collection}", tags=["search"])


@router.post("/search", response_model=SearchAnswer, openapi_extra=takes(json=SearchRequest))
async def search(request: Request, engine: Ready, settings: Limits, name: Name) -> Response:
    """The items nearest to a picture (base64, or its address), an item or a vector."""
    engine.collection(name)
    asked = await read_json(request, SearchRequest)
    [image] = await fetched(request, [asked], settings)
    if isinstance(image, Problem):
        raise image
    found = await in_thread(
        request, lambda: engine.search(name, to_search(asked, asked.query, settings, image=image))
    )
    return reply(found, asked)


@router.post(
    "/search/image",
    response_model=SearchAnswer,
    openapi_extra=takes(
        form={"file": FILE, "params": {"type": "string", "description": "ImageSearchParams as JSON"}},
        needed=("file",),
    ),
)
async def search_image(request: Request, engine: Ready, settings: Limits, name: Name) -> Response:
    """The items nearest to an uploaded picture."""
    engine.collection(name)
    form = await read_form(request, files={"file": 1}, texts=("params",), needed=("file",))
    asked = parse(form.texts.get("params", "{}"), ImageSearchParams, prefix="/params")
    [image] = form.files["file"]
    found = await in_thread(
        request, lambda: engine.search(name, to_search(asked, asked.query, settings, image=image))
    )
    return reply(found, asked)


@router.post("/search/batch", response_model=BatchAnswer, openapi_extra=takes(json=BatchRequest))
async def search_batch(request: Request, engine: Ready, settings: Limits, name: Name) -> Response:
    """Several searches in one request; what fails answers with its problem in its place."""
    engine.collection(name)
    asked = await read_json(request, BatchRequest)
    if len(asked.searches) > settings.max_searches:
        raise invalid(
            "/searches", f"has {len(asked.searches)} entries; at most {settings.max_searches} are allowed"
        )

    images = await fetched(request, asked.searches, settings)

    def one(position: int, entry: SearchRequest) -> dict[str, Any]:
        try:
            image = images[position]
            if isinstance(image, Problem):
                raise image
            wanted = to_search(entry, entry.query, settings, image=image)
            return search_answer(engine.search(name, wanted), entry)
        except Exception as error:
            problem = problem_of(error)
            if problem.status_code >= 500:
                raise
            instance = f"{request.url.path}#/searches/{position}"
            return body_of(problem, instance=instance, request_id=request.state.request_id)

    results = await in_thread(request, lambda: [one(i, entry) for i, entry in enumerate(asked.searches)])
    return answer({"results": results})


@router.get("/items/{id:path}/similar", response_model=SearchAnswer)
async def similar(
    request: Request,
    engine: Ready,
    settings: Limits,
    name: Name,
    id: Id,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
    offset: Annotated[int, Query(ge=0, le=10_000)] = 0,
    score_threshold: Annotated[float | None, Query(ge=-1, le=1)] = None,
    with_payload: bool = True,
    filter: Annotated[str | None, Query(description="A filter as JSON")] = None,
) -> Response:
    """More like this item, without the item itself."""
    engine.collection(name)
    asked = SearchOptions(
        limit=limit, offset=offset, score_threshold=score_threshold, with_payload=with_payload
    )
    wanted = replace(
        to_search(asked, QuerySpec.model_construct(id=id), settings), filter=filter_in_query(filter)
    )
    return reply(await in_thread(request, lambda: engine.search(name, wanted)), asked)


async def fetched(
    request: Request, searches: Sequence[SearchRequest], settings: Settings
) -> list[bytes | Problem | None]:
    """The pictures of the queries that name an address, or why there is none; None where there is no address.

    Nothing is opened for a query that would be refused anyway.

    Raises:
        QueueFull: too many addresses are asked for already.
    """
    found: list[bytes | Problem | None] = [None] * len(searches)
    wanted: dict[int, str] = {}
    for place, entry in enumerate(searches):
        url = entry.query.image_url
        if url is not None:
            try:
                to_search(entry, entry.query, settings)
                wanted[place] = url
            except Problem as problem:
                found[place] = problem
    if not wanted:
        return found
    fetcher: Fetcher | None = request.app.state.fetcher
    if fetcher is None:
        disabled = "query.image_url: this service opens no addresses; send the picture itself."
        pictures: Sequence[bytes | Problem] = [Problem("url-fetch-disabled", disabled)] * len(wanted)
    else:
        with stage("fetch"):
            pictures = await fetcher.fetch(list(wanted.values()))
    for place, picture in zip(wanted, pictures, strict=True):
        found[place] = picture
    return found


def to_search(
    asked: SearchOptions, query: ImageQuery, settings: Settings, *, image: bytes | None = None
) -> core.Search:
    """A request in the engine's words.

    Raises:
        Problem: for what this version does not have, and for limits that the settings hold.
    """
    refuse_unavailable(asked)
    if asked.limit > settings.max_limit:
        raise invalid("/limit", f"must be at most {settings.max_limit}, got {asked.limit}")
    if asked.limit + asked.offset > settings.max_window:
        given = f"{asked.limit} + {asked.offset}"
        raise invalid("/offset", f"limit + offset must be at most {settings.max_window}, got {given}")
    if asked.group_by is not None and asked.limit * asked.group_size > settings.max_window:
        given = f"{asked.limit} x {asked.group_size}"
        raise invalid("/group_size", f"limit x group_size must be at most {settings.max_window}, got {given}")
    spec = query if isinstance(query, QuerySpec) else QuerySpec.model_construct(**query.model_dump())
    if spec.text is not None:
        raise not_available(
            "query/text", "searching by text needs a model with a text tower, and none is here."
        )
    if spec.image is not None:
        image = from_base64(spec.image, "/query/image")
    return core.Search(
        core.Query(
            image=image,
            id=spec.id,
            vector=spec.vector,
            positive=tuple(spec.positive),
            negative=tuple(spec.negative),
        ),
        limit=asked.limit,
        offset=asked.offset,
        score_threshold=asked.score_threshold,
        exact=asked.params.exact,
        effort=asked.params.effort,
        with_vector=asked.with_vector,
        filter=asked.filter,
        group_by=asked.group_by,
        group_size=asked.group_size,
        cursor=asked.cursor,
    )


def refuse_unavailable(asked: SearchOptions) -> None:
    """Fields of the API that this version answers 422 "not-available" to. Raises Problem."""
    if asked.match_rate is not None:
        raise not_available(
            "match_rate", "a rate of false matches needs a calibrated collection; use score_threshold."
        )


def reply(found: Answer, asked: SearchOptions) -> Response:
    return answer(search_answer(found, asked))


def search_answer(found: Answer, asked: SearchOptions) -> dict[str, Any]:
    """The answer as the API shows it."""
    return {
        "query_id": found.query_id,
        "collection": found.collection,
        "generation": found.generation,
        "model": found.model,
        "metric": "cosine",
        "higher_is_better": True,
        "hits": [hit_answer(found.collection, hit, asked) for hit in found.hits],
        "total": found.total,
        "total_is_exact": found.total_is_exact,
        "next_cursor": found.next_cursor,
        "approximate": found.approximate,
        "took_ms": round(found.took_ms, 3),
    }


def hit_answer(collection: str, hit: Hit, asked: SearchOptions) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": hit.id, "score": float(hit.score), "rank": hit.rank}
    if hit.item.label is not None:
        shown["label"] = hit.item.label
    if asked.with_payload:
        shown["payload"] = dict(hit.item.payload)
    if asked.with_vector and hit.item.vector is not None:
        shown["vector"] = hit.item.vector.tolist()
    if hit.group is not None:
        shown["group"] = hit.group
    shown["image"] = image_address(collection, hit.item)
    return shown
