"""The items of a collection: read, add, change, delete, and their pictures."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.pictures import SHOWN, media_type
from service.problems import Problem, invalid
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
    DeletedAnswer,
    DeleteRequest,
    ItemAnswer,
    ItemRequest,
    ItemsAnswer,
    PayloadRequest,
    PayloadText,
    WrittenAnswer,
)
from service.settings import Settings

router = APIRouter(prefix="/v1/collections/{collection}/items", tags=["items"])

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


@router.post("/delete", response_model=DeletedAnswer, openapi_extra=takes(json=DeleteRequest))
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
        digest = engine.picture_digest(name, id)
        if tag_of(digest, variant) in held:
            return digest, None
        return digest, engine.thumbnail(name, id) if size == "thumb" else engine.picture(name, id)

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
)
async def put(request: Request, engine: Ready, settings: Limits, name: Name, id: Id) -> Response:
    """Add an item, or replace the one of this id, by its picture or by a vector. 201: it was new."""
    check_id(id)
    engine.collection(name)
    asked, picture = await read_item(request, settings)
    payload = check_payload(asked.payload, settings.max_payload_bytes)
    written = await in_thread(
        request, lambda: engine.put(name, id, image=picture, vector=asked.vector, payload=payload)
    )
    content = {"id": written.id, "created": written.created, "generation": written.generation}
    return answer(content, 201 if written.created else 200)


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
    return answer(item_answer(name, item))


@router.patch("/{id:path}", response_model=ItemAnswer, openapi_extra=takes(json=PayloadRequest))
async def patch(request: Request, engine: Ready, settings: Limits, name: Name, id: Id) -> Response:
    """Merge into the payload of an item; null removes a key."""
    if "if-match" in request.headers:
        raise Problem(
            "not-available", "If-Match is not available in this version; leave it out.", missing="If-Match"
        )
    asked = await read_json(request, PayloadRequest)
    changes = check_payload(asked.payload, settings.max_payload_bytes)
    return answer(
        item_answer(name, await in_thread(request, lambda: engine.update_payload(name, id, changes)))
    )


@router.delete("/{id:path}", status_code=204, response_class=Response)
async def delete(request: Request, engine: Ready, name: Name, id: Id) -> Response:
    """Forget an item."""
    await in_thread(request, lambda: engine.delete(name, id))
    return Response(status_code=204)
