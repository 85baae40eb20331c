"""What routes share: reaching the engine, reading bodies, writing answers."""

import base64
import binascii
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, unquote

from fastapi import Depends, Path, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import Response

from dml.collection.base import Item, PayloadTooLarge
from dml.collection.filters import Filter, parse_filter
from dml.errors import FilterInvalid, NotAvailable
from service.engine import Engine
from service.problems import Problem, field_error, from_validation, invalid
from service.settings import Settings

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)
LARGE_BODY = 256 * 1024
"""Bodies above this many bytes are parsed in a thread: below, the hop costs more than the parsing."""


# Reaching things. Coroutines, all of them: what is no coroutine would be sent through a thread each time.


async def settings_of(request: Request) -> Settings:
    return request.app.state.settings


async def engine_of(request: Request) -> Engine:
    """The engine, or 503 while it is loading."""
    engine = request.app.state.engine
    if engine is None:
        raise Problem("not-ready", "Collections and encoders are still being read.")
    return engine


def decoded(value: str) -> str:
    """A path parameter as the client meant it; see `service.middleware.single_segments`."""
    return unquote(value)


async def collection_name(collection: Annotated[str, Path(description="Name of a collection")]) -> str:
    return decoded(collection)


async def item_id(id: Annotated[str, Path(description="Id of an item; a slash in it is written %2F")]) -> str:
    return decoded(id)


Ready = Annotated[Engine, Depends(engine_of)]
Limits = Annotated[Settings, Depends(settings_of)]
Name = Annotated[str, Depends(collection_name)]
Id = Annotated[str, Depends(item_id)]


async def in_thread(request: Request, task: Callable[[], T]) -> T:
    """Run blocking work in the bounded pool. Raises QueueFull (503) and DeadlineExceeded (504)."""
    return await request.app.state.pool.run(task)


# Reading bodies


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def refuse_type(request: Request, *accepted: str) -> Problem:
    given = content_type(request) or "none"
    return Problem(
        "unsupported-media",
        f"The Content-Type is {given}; this address takes {' or '.join(accepted)}.",
        headers={"Accept": ", ".join(accepted)},
        allowed=list(accepted),
    )


async def read_json(request: Request, model: type[Model]) -> Model:
    """The JSON body, checked.

    Raises:
        Problem: "unsupported-media" for another Content-Type, "malformed" for what is not JSON,
            "invalid-request".
    """
    kind = content_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        raise refuse_type(request, "application/json")
    body = await request.body()
    if len(body) > LARGE_BODY:
        return await in_thread(request, lambda: parse(body, model))
    return parse(body, model)


def parse(text: bytes | str, model: type[Model], *, prefix: str = "") -> Model:
    """JSON text, checked against a model; errors point below `prefix`."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise from_validation(found, where="body", prefix=prefix) from None


@dataclass(frozen=True)
class Form:
    """A multipart body: the bytes of the files by field, and the texts by field."""

    files: Mapping[str, list[bytes]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


async def read_form(
    request: Request, *, files: Mapping[str, int], texts: Collection[str] = (), needed: Collection[str] = ()
) -> Form:
    """The multipart body, with known fields only.

    Args:
        files: field name -> most files of that name.
        texts: names of text fields, each at most once.
        needed: names that must be there.

    Raises:
        Problem: "unsupported-media", "malformed", or "invalid-request" naming the field.
    """
    if content_type(request) != "multipart/form-data":
        raise refuse_type(request, "multipart/form-data")
    most = request.app.state.settings.max_body_bytes
    got_files: dict[str, list[bytes]] = {}
    got_texts: dict[str, str] = {}
    async with request.form(max_files=sum(files.values()) + 1, max_fields=20, max_part_size=most) as form:
        for name, value in form.multi_items():
            if name not in files and name not in texts:
                known = ", ".join([*files, *texts])
                raise invalid(f"/{name}", f"unknown field; known here: {known}")
            if isinstance(value, UploadFile) != (name in files):
                raise invalid(f"/{name}", f"must be a {'file' if name in files else 'text'} field")
            if isinstance(value, UploadFile):
                got_files.setdefault(name, []).append(await value.read())
                if len(got_files[name]) > files[name]:
                    raise invalid(f"/{name}", f"at most {files[name]} here")
            elif name in got_texts:
                raise invalid(f"/{name}", "given twice")
            else:
                got_texts[name] = value
    for name in needed:
        if name not in got_files and name not in got_texts:
            raise invalid(f"/{name}", "missing, and needed")
    return Form(got_files, got_texts)


def from_base64(text: str, pointer: str) -> bytes:
    """The bytes behind base64 text. Raises Problem pointing at the field."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(pointer, f"not base64 ({error}); send the bytes of the file in plain base64") from None


def check_payload(payload: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """The payload, when it is JSON that can be stored and given back. Raises Problem, PayloadTooLarge."""
    try:
        size = len(json.dumps(payload, allow_nan=False, ensure_ascii=False).encode())
    except ValueError:
        raise invalid(
            "/payload", "holds NaN, infinity or half a surrogate pair, which JSON cannot carry"
        ) from None
    if size > limit:
        raise PayloadTooLarge(size, limit)
    return dict(payload)


def check_id(id: str, pointer: str = "/id", *, where: str = "path") -> str:
    """An id that may be given to a new item. Raises Problem."""
    if len(id) > 512:
        raise invalid(pointer, f"has {len(id)} characters; at most 512 are allowed", where=where)
    if not id.strip() or not id.isprintable():
        raise invalid(pointer, "must have visible characters only, and at least one", where=where)
    return id


def not_available(name: str, need: str) -> Problem:
    """The answer to a field that this version knows but does not have."""
    return Problem("not-available", f"{name}: {need}", missing=name, errors=[field_error(f"/{name}", need)])


def filter_in_query(text: str | None) -> Filter:
    """The filter in the query string of an address: JSON. Raises Problem."""
    try:
        return parse_filter(None if text is None else json.loads(text))
    except (ValueError, RecursionError) as error:
        raise invalid("/filter", f"not valid JSON: {error}", where="query") from None
    except FilterInvalid as error:
        place = field_error(f"/filter{error.pointer}", error.detail, where="query")
        raise Problem("filter-invalid", str(error), errors=[place]) from None


def model_missing(error: NotAvailable) -> Problem:
    return Problem("not-available", str(error), missing="model")


# Cursors of lists


def cursor_of(after: str | None) -> str | None:
    """Where the next page starts, as an opaque text."""
    if after is None:
        return None
    return base64.urlsafe_b64encode(f"1:{after}".encode()).decode().rstrip("=")


def after_of(cursor: str | None) -> str | None:
    """What `cursor_of` was given. Raises Problem for anything else."""
    if cursor is None:
        return None
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        text = ""
    if not text.startswith("1:"):
        raise Problem("cursor-invalid", "The cursor was not given out by this service.")
    return text[2:]


# Writing answers


def answer(
    content: Mapping[str, Any], status: int = 200, *, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON answer. NaN in it would be our mistake, and raises."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return Response(
        body, status, {"Cache-Control": "no-store", **(headers or {})}, media_type="application/json"
    )


def image_address(collection: str, item: Item) -> str | None:
    """Where the picture of an item is. It changes with the picture, so that browsers may keep it for good."""
    if item.picture is None:
        return None
    place = f"{quote(collection, safe='')}/items/{quote(item.id, safe='')}"
    return f"/v1/collections/{place}/image?v={item.picture.sha256[:16]}"


def item_answer(collection: str, item: Item) -> dict[str, Any]:
    """An item as the API shows it."""
    shown: dict[str, Any] = {"id": item.id}
    if item.label is not None:
        shown["label"] = item.label
    shown |= {
        "payload": dict(item.payload),
        "sequence": item.sequence,
        "image": image_address(collection, item),
    }
    if item.vector is not None:
        shown["vector"] = item.vector.tolist()
    return shown


# OpenAPI


def takes(
    *,
    json: type[BaseModel] | None = None,
    form: Mapping[str, Any] | None = None,
    needed: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads its own body."""
    content: dict[str, Any] = {}
    if json is not None:
        content["application/json"] = {"schema": {"$ref": f"#/components/schemas/{json.__name__}"}}
    if form is not None:
        schema = {"type": "object", "additionalProperties": False, "properties": dict(form)}
        content["multipart/form-data"] = {"schema": {**schema, "required": list(needed)}}
    return {"requestBody": {"required": True, "content": content}}


FILE = {
    "type": "string",
    "format": "binary",
    "description": "A picture file: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF",
}
