"""Every error of the service, as one catalogue (RFC 9457, application/problem+json).

Each type has a stable address, /problems/{slug}, that says what it means and what to do. Exceptions become
problems here and nowhere else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dml import errors
from dml.collection.base import PayloadTooLarge
from service import memory
from service.batching import DeadlineExceeded, QueueFull

MEDIA_TYPE = "application/problem+json"
MOST_ERRORS = 20
"""Field errors listed in one problem; a vector of a thousand texts need not be told a thousand times."""


@dataclass(frozen=True)
class Kind:
    """One type of problem."""

    slug: str
    status: int
    title: str
    meaning: str
    remedy: str
    retry_after: int | None = None  # seconds


CATALOGUE: dict[str, Kind] = {
    kind.slug: kind
    for kind in (
        Kind(
            "malformed", 400, "The request cannot be read",
            "The body is not valid JSON or multipart, or the address holds bytes that are not UTF-8.",
            "Check the syntax of the body, its encoding (UTF-8) and its Content-Type.",
        ),
        Kind(
            "unauthorized", 401, "A key is needed",
            "This service asks for an API key, and the request brought none that is known.",
            "Send the key as 'Authorization: Bearer KEY' or as 'api-key: KEY'. One that was right before has"
            " expired or been revoked; the operator makes keys with `dml keys add`.",
        ),
        Kind(
            "forbidden", 403, "The key does not allow this",
            "The key is known, but its scope (search, write, admin) does not reach this far.",
            "Ask the operator for a key of the scope named in the answer.",
        ),
        Kind(
            "cross-origin", 403, "Sent by another website's page",
            "A browser says that a page of another origin sent this. Such a page could have the visitor's"
            " browser change collections, so it may not, unless the operator allows its origin.",
            "Ask from a program, from the page of the service, or have the origin added with --cors-origin.",
        ),
        Kind(
            "read-only", 403, "The collection is read-only",
            "The service was started to read only, so nothing can be added, changed or deleted.",
            "Write to the instance that owns the collection, or start this one without --read-only.",
        ),
        Kind(
            "url-fetch-disabled", 403, "Pictures are not fetched from addresses",
            "The service opens an address for a client only if the operator allows its host, and this one is"
            " not on the list, or there is no list.",
            "Send the picture itself: as a multipart upload, or in base64 as query.image. The operator allows"
            " hosts with `dml serve --fetch-host`.",
        ),
        Kind(
            "not-found", 404, "There is nothing at this address",
            "The path leads to no resource of this service.",
            "Compare it with /openapi.json. Ids with a slash are written with %2F.",
        ),
        Kind(
            "unknown-collection", 404, "No such collection",
            "The service holds no collection of this name.",
            "GET /v1/collections lists those there are.",
        ),
        Kind(
            "unknown-item", 404, "No such item",
            "The collection holds no item of this id; it may have been deleted.",
            "GET /v1/collections/{collection}/items lists the ids. Ids with a slash are written with %2F.",
        ),
        Kind(
            "image-not-kept", 404, "The item has no picture",
            "The item was added as a vector, or the picture it refers to is no longer where it was.",
            "Put the item again with its picture, or bring the referenced file back.",
        ),
        Kind(
            "method-not-allowed", 405, "This method is not offered here",
            "The address exists, but not for this method.",
            "Use one of the methods listed as 'allowed'.",
        ),
        Kind(
            "too-slow", 408, "The request did not arrive in time",
            "The head or the body of the request came so slowly that the service stopped waiting.",
            "Send it again over a better line, or a smaller picture.",
        ),
        Kind(
            "model-mismatch", 409, "Another encoder made these vectors",
            "Vectors of two encoders cannot be compared, and this collection was made by another one.",
            "Use the encoder whose fingerprint the collection names, or build the collection again.",
        ),
        Kind(
            "unknown-job", 404, "No such job",
            "There is no job of this id; jobs are forgotten 30 days after they ended.",
            "GET /v1/jobs lists the newest. To know how a write ended, look at the collection itself.",
        ),
        Kind(
            "unknown-alias", 404, "No such alias",
            "The service knows no alias of this name for any of its collections.",
            "GET /v1/aliases lists those there are.",
        ),
        Kind(
            "conflict", 409, "The request does not fit the present state",
            "What was asked contradicts what is there.",
            "Read the present state again, then decide.",
        ),
        Kind(
            "cursor-expired", 410, "The cursor is no longer valid",
            "The state of the collection that its pages come from is not kept any more: it is for minutes.",
            'Start again: with the cursor "*", or without one.',
        ),
        Kind(
            "precondition-failed", 412, "The item is not as the request says",
            "The request said by If-Match or If-None-Match what the item has to be, and it is something else:"
            " it was changed, deleted or added meanwhile. Nothing was written.",
            "Read the item again (its ETag is its state), decide anew, and send that.",
        ),
        Kind(
            "body-too-large", 413, "The body is too large",
            "The request has more bytes than this service takes; the rest was not read.",
            "Send less at once. The limit stands in the answer, and in GET /v1.",
        ),
        Kind(
            "image-too-large", 413, "The upload is too large",
            "The upload has more bytes than this service takes; the rest was not read.",
            "Send a smaller file. The encoder sees a small square: a picture of 1000 pixels loses nothing.",
        ),
        Kind(
            "decompression-bomb", 413, "The picture has too many pixels",
            "Unpacking the picture would take more memory or time than this service allows, so it was not"
            " unpacked.",
            "Scale it down. The encoder sees a small square: a picture of 1000 pixels loses nothing.",
        ),
        Kind(
            "unsupported-media", 415, "This kind of content is not read here",
            "The bytes sent as a picture are of no format that is read here, or the Content-Type is not"
            " one that the address takes.",
            "Send JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF; for bodies, the Content-Type named in the answer.",
        ),
        Kind(
            "misdirected-request", 421, "Not a name of this service",
            "The request was sent to a name (Host) that this service does not go by. A web page that gives"
            " its own name the address of this machine looks like this, so only known names are answered.",
            "Use the address that dml serve printed, or have the name added with --allow-host NAME.",
        ),
        Kind(
            "invalid-request", 422, "A field is wrong",
            "The request can be read, but a field is missing, unknown, of another type or out of range.",
            "'errors' names each field by its JSON Pointer.",
        ),
        Kind(
            "invalid-image", 422, "The picture cannot be decoded",
            "The file is empty, cut off or damaged.",
            "Open it in a viewer, save it again, and send that.",
        ),
        Kind(
            "fetch-failed", 422, "No picture came from the address",
            "The host is one that pictures are fetched from, but it could not be reached, was too slow, or"
            " answered with something else than success.",
            "Open the address yourself. Redirections are not followed: give the address that they end at. Or"
            " send the picture itself.",
        ),
        Kind(
            "vector-invalid", 422, "The vector cannot be used",
            "It holds NaN or infinity, or is all zeros.",
            "Send finite numbers, at least one of them not zero. The length of the vector does not matter.",
        ),
        Kind(
            "dimension-mismatch", 422, "The vector has another dimension",
            "The collection holds vectors of another length.",
            "GET /v1/collections/{collection} names its dimension and the encoder to use.",
        ),
        Kind(
            "filter-invalid", 422, "The filter cannot be used",
            "The filter has a condition that is unknown, or not written as it should be.",
            "'errors' names the condition.",
        ),
        Kind(
            "cursor-invalid", 422, "This is not a cursor",
            "The cursor was not given out by this service, was changed on the way, or is of another search.",
            "Send next_cursor exactly as it came, with the same search; or start again.",
        ),
        Kind(
            "idempotency-conflict", 422, "The Idempotency-Key belongs to another request",
            "A write with this key was answered within the last 24 hours, and it was another one: another"
            " address, body or condition.",
            "Use a new key for each write; the same one only to send the same write again.",
        ),
        Kind(
            "not-available", 422, "Known, but not available here",
            "The request is understood; this version, or this collection, does not have what it asks for.",
            "'missing' names it. Leave it out, or use a collection that has it.",
        ),
        Kind(
            "rate-limited", 429, "Too many requests",
            "The key, or the address without a key, has used up its requests for now; or too many wrong keys"
            " came from the address.",
            "Wait as long as Retry-After says. RateLimit tells what is left before that happens.",
            retry_after=1,
        ),
        Kind(
            "headers-too-large", 431, "The head of the request is too large",
            "The address and the header lines have more bytes than this service reads.",
            "Send fewer or shorter headers; long filters and vectors belong in the body.",
        ),
        Kind(
            "internal-error", 500, "The service failed",
            "A mistake of the service, not of the request.",
            "Give the operator the request id; the cause stands beside it in the log.",
        ),
        Kind(
            "not-ready", 503, "The service is loading",
            "Collections and encoders are still being read.",
            "Wait as long as Retry-After says; /readyz tells when it is done.", retry_after=1,
        ),
        Kind(
            "queue-full", 503, "The service is busy",
            "As many requests wait as may wait.",
            "Wait as long as Retry-After says, then try again, more slowly.", retry_after=1,
        ),
        Kind(
            "too-many-connections", 503, "Too many connections are open",
            "As many connections are open as may be open.",
            "Wait as long as Retry-After says, and close connections that are not used.", retry_after=5,
        ),
        Kind(
            "collection-locked", 503, "Another process is writing",
            "The collection is being written by another process, such as a build.",
            "Try again when it has ended.", retry_after=5,
        ),
        Kind(
            "backend-unreachable", 503, "What keeps the collection does not answer",
            "The collection is kept by a database server, and that does not answer now.",
            "Try again as Retry-After says; if it stays so, the operator has to look after the server.",
            retry_after=5,
        ),
        Kind(
            "interrupted", 503, "The service ended before the job did",
            "The job ran when its service was stopped or died. Nothing that was acknowledged is lost; what"
            " the job was to bring about is not done, or not all of it.",
            "Ask for it again; the detail says what is there already.", retry_after=1,
        ),
        Kind(
            "deadline", 504, "No answer in time",
            "The request took longer than a request may take here.",
            "Try again; if it stays so, ask for less at once.", retry_after=1,
        ),
        Kind(
            "storage", 507, "The disk is full or refuses",
            "The write could not be stored, and nothing of it was.",
            "The operator has to make room; the log names the place under the request id.",
        ),
    )
}  # fmt: skip

KIND_OF: dict[type[errors.DmlError], str] = {
    errors.UsageError: "invalid-request",
    PayloadTooLarge: "body-too-large",
    errors.MissingExtra: "not-available",
    errors.InvalidImage: "invalid-image",
    errors.UnsupportedImage: "unsupported-media",
    errors.ImageTooLarge: "decompression-bomb",
    errors.VectorError: "vector-invalid",
    errors.DimensionMismatch: "dimension-mismatch",
    errors.UnknownCollection: "unknown-collection",
    errors.UnknownItem: "unknown-item",
    errors.ImageNotKept: "image-not-kept",
    errors.ModelMismatch: "model-mismatch",
    errors.FilterInvalid: "filter-invalid",
    errors.CursorInvalid: "cursor-invalid",
    errors.CursorExpired: "cursor-expired",
    errors.CollectionLocked: "collection-locked",
    errors.Unreachable: "backend-unreachable",
    errors.ReadOnly: "read-only",
    errors.NotAvailable: "not-available",
    errors.StorageError: "storage",
    memory.Conflict: "conflict",
    memory.IdempotencyConflict: "idempotency-conflict",
    memory.UnknownJob: "unknown-job",
    memory.UnknownAlias: "unknown-alias",
    memory.ConditionFailed: "precondition-failed",
    QueueFull: "queue-full",
    DeadlineExceeded: "deadline",
}
"""DmlError -> slug; the nearest class counts. What is missing here is a failure of the service (500)."""

STATUS_KIND = {
    400: "malformed",
    404: "not-found",
    405: "method-not-allowed",
    413: "body-too-large",
    415: "unsupported-media",
}


class Problem(HTTPException):
    """A problem of the catalogue, raised by a route.

    Args:
        slug: its type, a key of CATALOGUE.
        detail: what is wrong this time, what was given, what to do.
        headers: further headers of the answer.
        extras: further members of the answer: errors, limit, allowed, missing.
    """

    def __init__(
        self, slug: str, detail: str, *, headers: Mapping[str, str] | None = None, **extras: Any
    ) -> None:
        super().__init__(CATALOGUE[slug].status, detail, dict(headers or {}))
        self.slug, self.extras = slug, extras


def field_error(pointer: str, detail: str, *, where: str = "body") -> dict[str, str]:
    """One entry of `errors`: where in the request (JSON Pointer), and what is wrong there."""
    return {"in": where, "pointer": pointer, "detail": detail}


def invalid(pointer: str, detail: str, *, where: str = "body") -> Problem:
    """The problem for one wrong field."""
    name = pointer.rpartition("/")[2] or where
    return Problem("invalid-request", f"{name}: {detail}", errors=[field_error(pointer, detail, where=where)])


def from_validation(
    found: Sequence[Mapping[str, Any]], *, where: str | None = None, prefix: str = ""
) -> Problem:
    """The problem for what pydantic found.

    Args:
        where: "body" when the locations start inside the body; None when their first step says where.
        prefix: JSON Pointer of the place that was checked.
    """
    listed = []
    for error in found:
        steps = [str(step) for step in error["loc"]]
        place = where or (steps.pop(0) if steps else "body")
        if error["type"] == "json_invalid":
            reason = error.get("ctx", {}).get("error", error["msg"])
            return Problem("malformed", f"The {place} is not valid JSON: {reason}.")
        pointer = prefix + "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in steps)
        listed.append(field_error(pointer, plain_message(error), where=place))
    first = listed[0]
    more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
    name = first["pointer"].lstrip("/") or f"the {first['in']}"
    return Problem("invalid-request", f"{name}: {first['detail']}{more}", errors=listed[:MOST_ERRORS])


def plain_message(error: Mapping[str, Any]) -> str:
    """What pydantic says, in words of the request."""
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return "unknown field; remove it or correct its name"
    if error["type"] == "missing":
        return "missing, and needed"
    return message[:1].lower() + message[1:]


def problem_of(error: Exception) -> Problem:
    """The problem that stands for an exception; "internal-error" for one that nobody foresaw."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return from_validation(error.errors())
    if isinstance(error, ValidationError):
        return from_validation(error.errors(include_url=False, include_input=False), where="body")
    if isinstance(error, HTTPException):
        return from_status(error)
    for cls in type(error).__mro__:
        if cls in KIND_OF:
            slug = KIND_OF[cls]
            if CATALOGUE[slug].status == 507:  # its message names files of the server
                return Problem(slug, "The write was not stored, and nothing of it remains.")
            if isinstance(error, errors.Unreachable):  # its message names an inner address
                return Problem(slug, CATALOGUE[slug].meaning)
            return Problem(slug, str(error), **extras_of(error))
    return Problem("internal-error", "The service failed; its log has the cause under the request id.")


def extras_of(error: Exception) -> dict[str, Any]:
    if isinstance(error, errors.DimensionMismatch):
        return {"expected": error.expected, "given": error.given}
    if isinstance(error, PayloadTooLarge):
        return {"limit": error.limit, "errors": [field_error("/payload", str(error))]}
    if isinstance(error, errors.FilterInvalid):
        return {"errors": [field_error(f"/filter{error.pointer}", error.detail)]}
    return {}


def from_status(error: HTTPException) -> Problem:
    """The problem for what the framework raised itself."""
    slug = STATUS_KIND.get(error.status_code, "malformed" if error.status_code < 500 else "internal-error")
    headers = dict(error.headers or {})
    if slug == "method-not-allowed":
        return method_problem(headers.get("Allow", "").replace(",", " ").split())
    if slug == "not-found":
        return Problem(
            slug, "There is nothing at this address; /openapi.json lists those there are.", headers=headers
        )
    return Problem(slug, str(error.detail), headers=headers)


def method_problem(methods: Sequence[str]) -> Problem:
    allowed = sorted(methods)
    listed = ", ".join(allowed)
    return Problem(
        "method-not-allowed", f"Offered here: {listed}.", headers={"Allow": listed}, allowed=allowed
    )


def body_of(problem: Problem, *, instance: str, request_id: str) -> dict[str, Any]:
    """The members of the answer."""
    kind = CATALOGUE[problem.slug]
    return {
        "type": f"/problems/{kind.slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": problem.detail,
        "instance": instance,
        "request_id": request_id,
        **problem.extras,
    }


def respond(problem: Problem, *, instance: str, request_id: str) -> Response:
    """The HTTP answer to a problem."""
    kind = CATALOGUE[problem.slug]
    headers = {"Cache-Control": "no-store", **(problem.headers or {})}
    if kind.retry_after is not None:
        headers.setdefault("Retry-After", str(kind.retry_after))
    body = json.dumps(body_of(problem, instance=instance, request_id=request_id), ensure_ascii=True)
    return Response(body, kind.status, headers, media_type=MEDIA_TYPE)


async def handle(request: Request, error: Exception) -> Response:
    """Exception handler of the app: any exception to a problem, and its type counted."""
    problem = problem_of(error)
    if problem.slug == "internal-error":
        raise error  # nobody foresaw it: the envelope writes its cause to the log
    if problem.slug == "method-not-allowed":
        problem = method_problem(request.app.state.methods(request.scope["path"]))
    state = request.scope["state"]
    state["problem"] = problem.slug
    return respond(problem, instance=request.url.path, request_id=state["request_id"])
