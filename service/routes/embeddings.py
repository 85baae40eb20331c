"""Pictures to vectors, without a collection."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from dml.errors import NotAvailable
from service.problems import invalid
from service.routes.parts import (
    FILE,
    Limits,
    Ready,
    answer,
    content_type,
    from_base64,
    in_thread,
    model_missing,
    read_form,
    read_json,
    refuse_type,
    takes,
)
from service.schemas import EmbeddingsAnswer, EmbeddingsRequest

router = APIRouter(prefix="/v1", tags=["embeddings"])


@router.post(
    "/embeddings",
    response_model=EmbeddingsAnswer,
    openapi_extra=takes(
        json=EmbeddingsRequest, form={"file": {"type": "array", "items": FILE}}, needed=("file",)
    ),
)
async def embeddings(
    request: Request,
    engine: Ready,
    settings: Limits,
    model: Annotated[
        str | None, Query(description="Fingerprint, or its beginning; needed among several")
    ] = None,
) -> Response:
    """The vectors of pictures, in the order sent."""
    kind = content_type(request)
    if kind == "multipart/form-data":
        form = await read_form(request, files={"file": settings.max_images}, needed=("file",))
        images = form.files["file"]
    elif kind == "application/json":
        asked = await read_json(request, EmbeddingsRequest)
        if len(asked.images) > settings.max_images:
            raise invalid(
                "/images", f"has {len(asked.images)} pictures; at most {settings.max_images} are allowed"
            )
        images = [from_base64(image.b64, f"/images/{i}/b64") for i, image in enumerate(asked.images)]
    else:
        raise refuse_type(request, "multipart/form-data", "application/json")
    try:
        fingerprint, vectors = await in_thread(request, lambda: engine.embed(images, model=model))
    except NotAvailable as error:
        raise model_missing(error) from error
    return answer({"model": fingerprint, "dim": vectors.shape[1], "embeddings": vectors.tolist()})
