"""The items of a collection: read, add, change, delete, and their pictures."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from dml.errors import DmlError
from service.engine import Condition, Engine, Upsert, Written
from service.jobs import Control
from service.pictures import SHOWN, media_type
from service.problems import body_of, invalid, problem_of
from service.repeats import ONCE, OnceRoute
from service.routes.jobs import ACCEPTED, begin
from service.routes.parts import (
    FILE,
    Id,
    Limits,
    Name,
    Ready,
    after_of,
    answer,
    check_id,
    check_payload,
    content_type,
    cursor_of,
    filter_in_query,
    from_base64,
    in_thread,
    item_answer,
    parse,
    read_form,
    read_json,
    refuse_type,
    takes,
)
from service.schemas import (
    BatchItem,
    DeletedAnswer,
    DeleteRequest,
    ItemAnswer,
    ItemRequest,
    ItemsAnswer,
    ItemsRequest,
    PayloadRequest,
    PayloadText,
    UpsertAnswer,
    WrittenAnswer,
)
from service.settings import Settings

router = APIRouter(prefix="/v1/collections/{collection}/items", tags=["items"], route_class=OnceRoute)

IfMatch = Annotated[
    str | None,
    Header(alias="If-Match", max_length=1024, description="ETag of the item as it has to be; * is any"),
]
IfNoneMatch = Annotated[
    str | None, Header(alias="If-None-Match", max_length=1024, description="*: the item must not be there")
]
TAG = re.compile(r'"(\d{1,18})"')
FOREVER = "private, max-age=31536000, immutable"
"""For an address that names the picture's content: it can never show another one."""


@router.get("", response_model=ItemsAnswer)
async def scroll(
    request: Request,
    engine: Ready,
    name: Name,
    cursor: Annotated[str | None, Query(description="next_cursor of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    with_vector: bool = False,
    filter: Annotated[str | None, Query(description="A filter as JSON")] = None,
) -> Response:
    """All items, or those that pass a filter, in the order of their ids, page by page."""
    after, asked = after_of(cursor), filter_in_query(filter)
    items, following = await in_thread(
        request, lambda: engine.scroll(name, after=after, limit=limit, with_vector=with_vector, filter=asked)
    )
    shown = [item_answer(name, item) for item in items]
    return answer({"items": shown, "next_cursor": cursor_of(following)})


@router.post(
    "",
    response_model=UpsertAnswer,
    responses=ACCEPTED,
    openapi_extra=takes(
        json=ItemsRequest,
        form={
            "file": {"type": "array", "items": FILE},
            "items": {
                "type": "string",
                "description": "ItemsRequest as JSON: an item for each file, in order",
            },
        },
        needed=("file", "items"),
    ),
    dependencies=ONCE,
)
async def put_many(request: Request, engine: Ready, settings: Limits, name: Name) -> Response:
    """Add or replace many items. What is wrong with one stands in its place, and the others are written."""
    engine.check_writable(name)
    name = engine.resolve(name)  # an alias may be switched before a job runs
    wait, items = await read_items(request, settings)
    request_id, place = request.state.request_id, request.url.path
    if wait:
        results = await in_thread(request, lambda: engine.put_many(name, items))
        return answer(upsert_answer(items, results, place=place, request_id=request_id))

    def work(control: Control) -> dict[str, Any]:
        return in_job(engine, name, items, control, place=place, request_id=request_id)

    return await begin(request, engine, "upsert", name, work)


def in_job(
    engine: Engine, name: str, items: Sequence[Upsert], control: Control, *, place: str, request_id: str
) -> dict[str, Any]:
    """The work of a batch that nobody waits for: what it came to, without what went well item by item."""

    def done(count: int) -> None:
        control.tell(count / len(items), f"{count:,} of {len(items):,} items")

    results = engine.put_many(name, items, done=done)
    told = upsert_answer(items, results, place=place, request_id=request_id)
    failed = f", {told['failed']:,} could not be" if told["failed"] else ""
    control.outcome = f"{told['written']:,} of {len(items):,} written{failed}"
    return {**told, "results": [entry for entry in told["results"] if "problem" in entry]}


def upsert_answer(
    items: Sequence[Upsert], results: Sequence[Written | DmlError], *, place: str, request_id: str
) -> dict[str, Any]:
    """What became of each item."""
    shown = []
    for position, (item, result) in enumerate(zip(items, results, strict=True)):
        if isinstance(result, DmlError):
            where = f"{place}#/items/{position}"
            problem = body_of(problem_of(result), instance=where, request_id=request_id)
            shown.append({"id": item.id, "problem": problem})
        else:
            shown.append({"id": result.id, "created": result.created, "generation": result.generation})
    failed = sum("problem" in entry for entry in shown)
    return {"results": shown, "written": len(shown) - failed, "failed": failed}


async def read_items(request: Request, settings: Settings) -> tuple[bool, list[Upsert]]:
    """Whether to wait, and the items of a batch, JSON or multipart. Raises Problem."""
    kind = content_type(request)
    files: list[bytes] | None = None
    if kind == "multipart/form-data":
        form = await read_form(
            request, files={"file": settings.max_items}, texts=("items",), needed=("file", "items")
        )
        asked, files = parse(form.texts["items"], ItemsRequest, prefix="/items"), form.files["file"]
        if len(files) != len(asked.items):
            raise invalid(
                "/file", f"{len(files)} files came with {len(asked.items)} items; send one for each"
            )
    elif kind == "application/json":
        asked = await read_json(request, ItemsRequest)
    else:
        raise refuse_type(request, "application/json", "multipart/form-data")
    if len(asked.items) > settings.max_items:
        raise invalid("/items", f"has {len(asked.items)} entries; at most {settings.max_items} are allowed")
    seen: set[str] = set()
    items = []
    for position, entry in enumerate(asked.items):
        file = None if files is None else files[position]
        items.append(upsert_of(entry, file, f"/items/{position}", settings))
        if entry.id in seen:
            raise invalid(f"/items/{position}/id", f'"{entry.id}" is given twice')
        seen.add(entry.id)
    return asked.wait, items


def upsert_of(entry: BatchItem, file: bytes | None, pointer: str, settings: Settings) -> Upsert:
    """One entry of a batch. Raises Problem, PayloadTooLarge."""
    check_id(entry.id, f"{pointer}/id", where="body")
    if (file is not None) + (entry.image is not None) + (entry.vector is not None) != 1:
        raise invalid(pointer, "give exactly one of image and vector (or a file for each item)")
    image = file if entry.image is None else from_base64(entry.image, f"{pointer}/image")
    payload = check_payload(entry.payload, settings.max_payload_bytes)
    return Upsert(entry.id, image=image, vector=entry.vector, payload=payload)


@router.post(
    "/delete", response_model=DeletedAnswer, openapi_extra=takes(json=DeleteRequest), dependencies=ONCE
)
async def delete_many(request: Request, engine: Ready, settings: Limits, name: Name) -> Response:
    """Forget several items, by their ids or by a filter; ids that are not there count for nothing."""
    asked = await read_json(request, DeleteRequest)
    ids, filter = asked.ids or [], asked.filter
    if len(ids) > settings.max_ids:
        raise invalid("/ids", f"has {len(ids)} ids; at most {settings.max_ids} are allowed")

    def delete() -> int:
        return engine.delete_many(name, ids) if filter is None else engine.delete_matching(name, filter)

    return answer({"deleted": await in_thread(request, delete)})


@router.get(
    "/{id:path}/image",
    response_class=Response,
    responses={
        200: {"content": {"image/*": {}}, "description": "The picture"},
        304: {"description": "Unchanged"},
    },
)
async def image(
    request: Request,
    engine: Ready,
    settings: Limits,
    name: Name,
    id: Id,
    size: Annotated[
        Literal["thumb", "full"], Query(description="full: the bytes as they were given")
    ] = "full",
    v: Annotated[
        str | None, Query(description="The beginning of its sha256: then it may be kept for good")
    ] = None,
) -> Response:
    """The picture of an item."""
    held = request.headers.get("if-none-match", "")
    variant = f"-{settings.thumbnail_pixels}" if size == "thumb" else ""

    def fetch() -> tuple[str, bytes | None]:
        meant = engine.resolve(name)  # once: an alias may be switched meanwhile
        digest = engine.picture_digest(meant, id)
        while True:
            if tag_of(digest, variant) in held:
                return digest, None
            data = engine.thumbnail(meant, id) if size == "thumb" else engine.picture(meant, id)
            before, digest = digest, engine.picture_digest(meant, id)
            if digest == before:  # else the item was replaced, and the tag would be that of another picture
                return digest, data

    digest, data = await in_thread(request, fetch)
    lasting = v is not None and len(v) >= 8 and digest.startswith(v)
    headers = {"ETag": tag_of(digest, variant), "Cache-Control": FOREVER if lasting else "private, no-cache"}
    if data is None:
        return Response(status_code=304, headers=headers)
    headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
    kind = media_type(data)
    if kind not in SHOWN:
        headers["Content-Disposition"] = "attachment"
    return Response(data, media_type=kind or "application/octet-stream", headers=headers)


def tag_of(digest: str, variant: str) -> str:
    return f'"{digest[:32]}{variant}"'


@router.put(
    "/{id:path}",
    response_model=WrittenAnswer,
    responses={201: {"model": WrittenAnswer, "description": "It was new"}},
    openapi_extra=takes(
        json=ItemRequest,
        form={"file": FILE, "payload": {"type": "string", "description": "A JSON object"}},
        needed=("file",),
    ),
    dependencies=ONCE,
)
async def put(
    request: Request,
    engine: Ready,
    settings: Limits,
    name: Name,
    id: Id,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Add an item, or replace the one of this id, by its picture or by a vector. 201: it was new."""
    check_id(id)
    engine.collection(name)
    condition = condition_of(if_match, if_none_match)
    asked, picture = await read_item(request, settings)
    payload = check_payload(asked.payload, settings.max_payload_bytes)
    written = await in_thread(
        request,
        lambda: engine.put(
            name, id, image=picture, vector=asked.vector, payload=payload, condition=condition
        ),
    )
    content = {"id": written.id, "created": written.created, "generation": written.generation}
    etag = {"ETag": f'"{written.generation}"'}
    return answer(content, 201 if written.created else 200, headers=etag)


def condition_of(if_match: str | None, if_none_match: str | None = None) -> Condition | None:
    """What the headers say the item has to be. Raises Problem."""
    if if_none_match is not None:
        if if_none_match.strip() != "*" or if_match is not None:
            raise invalid(
                "/If-None-Match", 'only "*", without If-Match: the item must not be there', where="header"
            )
        return Condition(there=False)
    if if_match is None:
        return None
    if if_match.strip() == "*":
        return Condition(there=True)
    tags = [TAG.fullmatch(part.strip()) for part in if_match.split(",")]
    if not all(tags):
        raise invalid("/If-Match", 'takes the ETag of an item, such as "1745", or *', where="header")
    return Condition(sequences=tuple(int(tag[1]) for tag in tags if tag))


async def read_item(request: Request, settings: Settings) -> tuple[ItemRequest, bytes | None]:
    """The item in the body, JSON or multipart, and its picture. Raises Problem."""
    kind = content_type(request)
    if kind == "multipart/form-data":
        form = await read_form(request, files={"file": 1}, texts=("payload",), needed=("file",))
        payload = parse(form.texts.get("payload", "{}"), PayloadText, prefix="/payload").root
        return ItemRequest.model_construct(payload=payload, vector=None), form.files["file"][0]
    if kind != "application/json":
        raise refuse_type(request, "multipart/form-data", "application/json")
    asked = await read_json(request, ItemRequest)
    if (asked.image is None) == (asked.vector is None):
        raise invalid("", "give exactly one of image and vector")
    return asked, None if asked.image is None else from_base64(asked.image, "/image")


@router.get("/{id:path}", response_model=ItemAnswer)
async def get(request: Request, engine: Ready, name: Name, id: Id, with_vector: bool = False) -> Response:
    """One item."""
    item = await in_thread(request, lambda: engine.get(name, id, with_vector=with_vector))
    return answer(item_answer(name, item), headers={"ETag": f'"{item.sequence}"'})


@router.patch(
    "/{id:path}", response_model=ItemAnswer, openapi_extra=takes(json=PayloadRequest), dependencies=ONCE
)
async def patch(
    request: Request, engine: Ready, settings: Limits, name: Name, id: Id, if_match: IfMatch = None
) -> Response:
    """Merge into the payload of an item; null removes a key."""
    condition = condition_of(if_match)
    asked = await read_json(request, PayloadRequest)
    changes = check_payload(asked.payload, settings.max_payload_bytes)
    item = await in_thread(request, lambda: engine.update_payload(name, id, changes, condition=condition))
    return answer(item_answer(name, item), headers={"ETag": f'"{item.sequence}"'})


@router.delete("/{id:path}", status_code=204, response_class=Response, dependencies=ONCE)
async def delete(request: Request, engine: Ready, name: Name, id: Id, if_match: IfMatch = None) -> Response:
    """Forget an item."""
    condition = condition_of(if_match)
    await in_thread(request, lambda: engine.delete(name, id, condition=condition))
    return Response(status_code=204)
