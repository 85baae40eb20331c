"""For machines and operators: probes, metrics, what this service is, and what its problems mean."""

import asyncio
from html import escape

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from dml import __version__
from service.engine import Engine
from service.metrics import CONTENT_TYPE
from service.middleware import NOTHING
from service.problems import CATALOGUE, Problem
from service.routes.parts import Limits, Ready, answer
from service.schemas import ReadyAnswer, RootAnswer

router = APIRouter()


@router.head("/livez", include_in_schema=False)
@router.get("/livez", tags=["operations"], response_class=PlainTextResponse)
async def livez() -> Response:
    """The process answers."""
    return PlainTextResponse("ok\n", headers={"Cache-Control": "no-store"})


@router.head("/healthz", include_in_schema=False)
@router.head("/readyz", include_in_schema=False)
@router.get("/healthz", include_in_schema=False)
@router.get("/readyz", tags=["operations"], response_model=ReadyAnswer)
async def readyz(engine: Ready) -> Response:
    """Collections and encoders are loaded; 503 until then."""
    models = [model.fingerprint for model in engine.models()]
    return answer({"status": "ready", "collections": engine.names(), "model": models})


@router.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters and latencies in the Prometheus text format."""
    # Not in the bounded pool: when that is full is when an operator needs to see it.
    body = await asyncio.to_thread(request.app.state.metrics.render)
    return Response(body, media_type=CONTENT_TYPE, headers={"Cache-Control": "no-store"})


@router.get("/v1", tags=["operations"], response_model=RootAnswer)
async def root(request: Request, settings: Limits) -> Response:
    """What answers here, how much it takes, and what the sender may do."""
    names = (
        "max_body_bytes",
        "max_pixels",
        "max_limit",
        "max_window",
        "max_searches",
        "max_images",
        "max_items",
        "max_ids",
        "max_payload_bytes",
    )
    limits = {name: getattr(settings, name) for name in names}
    engine: Engine | None = request.app.state.engine
    more = {
        "key": request.state.key,
        "scope": str(request.state.scope),
        "read_only": settings.read_only,
        "default_collection": engine.first() if engine is not None else None,
    }
    return answer({"name": "dml", "version": __version__, "limits": limits, **more})


@router.get("/problems", include_in_schema=False)
async def problem_list() -> Response:
    """All types of problems, for people."""
    rows = "".join(
        f'<li><a href="problems/{kind.slug}">{escape(kind.title)}</a> <span class="document-kind">'
        f"{kind.status} <code>{kind.slug}</code></span></li>"
        for kind in sorted(CATALOGUE.values(), key=lambda kind: kind.status)
    )
    lead = "Every error is a JSON document (RFC 9457) whose <code>type</code> is one of these addresses."
    return document("Problems", f'<h1>Problems</h1><p>{lead}</p><ul class="document-list">{rows}</ul>', up="")


@router.get("/problems/{slug}", include_in_schema=False)
async def problem_page(slug: str) -> Response:
    """What a type of problem means and what to do about it, for people."""
    if slug not in CATALOGUE:
        raise Problem(
            "not-found", f"There is no problem type of this name. There is: {', '.join(CATALOGUE)}."
        )
    kind = CATALOGUE[slug]
    content = f"""<p class="document-kind">Problem <code>{kind.slug}</code> · HTTP {kind.status}</p>
<h1>{escape(kind.title)}</h1>
<p>{escape(kind.meaning)}</p>
<h2>What to do</h2>
<p>{escape(kind.remedy)}</p>
<p class="document-kind"><a href="../problems">All problems</a></p>"""
    return document(kind.title, content, up="../")


def document(title: str, content: str, *, up: str) -> Response:
    """A page of text.

    Args:
        content: markup.
        up: the way from the page to the root of the service, which may lie below a prefix of a proxy.
    """
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="{up}favicon.svg" type="image/svg+xml">
<link rel="stylesheet" href="{up}web/page.css">
<main class="document">
{content}
</main>
</html>
"""
    policy = f"{NOTHING}; style-src 'self'; img-src 'self'"
    headers = {"Content-Security-Policy": policy, "Cache-Control": "max-age=3600"}
    return Response(page, media_type="text/html", headers=headers)
