"""The web page: a few static files, served from memory."""

import hashlib
from functools import cache
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.problems import Problem

router = APIRouter(include_in_schema=False)

FILES = {
    "page.css": "text/css",
    **{
        f"{name}.js": "text/javascript"
        for name in ("ask", "crop", "draw", "filters", "key", "manage", "page", "status")
    },
    "favicon.svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Nothing from elsewhere, nothing inline, no text turned into markup. blob: is the picture that the user
chose, before it is sent, or one that was fetched with a key."""


@cache
def contents(name: str) -> tuple[bytes, str]:
    """A file of the page, and its ETag."""
    data = (resources.files("service") / "web" / name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:20]}"'


def respond(request: Request, name: str, media: str) -> Response:
    data, tag = contents(name)
    headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media, headers=headers)


@router.head("/")
@router.get("/")
async def index(request: Request) -> Response:
    return respond(request, "index.html", "text/html")


@router.get("/favicon.svg")
async def favicon(request: Request) -> Response:
    return respond(request, "favicon.svg", FILES["favicon.svg"])


@router.get("/web/{name}")
async def static(request: Request, name: str) -> Response:
    if name not in FILES:
        raise Problem("not-found", "The page has no file of this name.")
    return respond(request, name, FILES[name])
