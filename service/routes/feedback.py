"""What users say of search results."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from dml.errors import UnknownItem
from service.feedback import Feedback, Judgement
from service.problems import invalid
from service.repeats import ONCE, OnceRoute
from service.routes.parts import Name, Ready, answer, in_thread, read_json, takes
from service.schemas import FeedbackAnswer, FeedbackRequest

router = APIRouter(prefix="/v1/collections/{collection}/feedback", tags=["feedback"], route_class=OnceRoute)


def feedback_of(request: Request) -> Feedback:
    return request.app.state.memory.feedback


@router.post(
    "",
    status_code=202,
    response_model=FeedbackAnswer,
    openapi_extra=takes(json=FeedbackRequest),
    dependencies=ONCE,
)
async def send(request: Request, engine: Ready, name: Name) -> Response:
    """Say whether a hit was what was looked for. Stored durably; it changes no search."""
    engine.collection(name)
    asked = await read_json(request, FeedbackRequest)
    key = request.state.key

    def store() -> None:
        meant = engine.resolve(name)  # once: an alias may be switched meanwhile
        place = engine.place(meant)
        try:
            engine.get(meant, asked.id)
        except UnknownItem as error:
            raise invalid("/id", str(error)) from None
        feedback_of(request).add(place, asked.query_id, asked.id, relevant=asked.relevant, key=key)

    await in_thread(request, store)
    return answer({"stored": True}, 202)


@router.get(
    "",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-ndjson": {}}, "description": "JSON lines, oldest first"}},
)
async def export(request: Request, engine: Ready, name: Name) -> Response:
    """All feedback on a collection as JSON lines: query_id, id, relevant, key, at."""
    place, feedback = engine.place(name), feedback_of(request)

    def lines() -> Iterator[bytes]:
        for judgement in feedback.all(place):
            yield line(judgement)

    return StreamingResponse(
        lines(), media_type="application/x-ndjson", headers={"Cache-Control": "no-store"}
    )


def line(judgement: Judgement) -> bytes:
    at = datetime.fromtimestamp(judgement.at, UTC).isoformat(timespec="milliseconds")
    told = {
        "query_id": judgement.query_id,
        "id": judgement.id,
        "relevant": judgement.relevant,
        "key": judgement.key,
        "at": at,
    }
    return json.dumps(told, ensure_ascii=False).encode() + b"\n"
