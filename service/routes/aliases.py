"""Second names of collections, switched in one step."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import Response

from dml.errors import ReadOnly
from service.aliases import Aliases
from service.engine import Engine
from service.folders import check_name
from service.memory import Conflict, UnknownAlias
from service.repeats import ONCE, OnceRoute
from service.routes.parts import Ready, answer, decoded, in_thread, read_json, takes
from service.schemas import AliasAnswer, AliasesAnswer, AliasRequest

router = APIRouter(prefix="/v1/aliases", tags=["aliases"], route_class=OnceRoute)


def alias_name(alias: Annotated[str, Path(description="An alias")]) -> str:
    return decoded(alias)


Alias = Annotated[str, Depends(alias_name)]


def aliases_of(request: Request) -> Aliases:
    return request.app.state.memory.aliases


@router.get("", response_model=AliasesAnswer)
async def aliases(request: Request, engine: Ready) -> Response:
    """All aliases and what they stand for."""
    found = await in_thread(request, lambda: dict(engine.alias_of()))
    items = [{"alias": alias, "collection": found[alias]} for alias in sorted(found)]
    return answer({"items": items})


@router.get("/{alias}", response_model=AliasAnswer)
async def alias(request: Request, engine: Ready, alias: Alias) -> Response:
    """What an alias stands for."""
    found = await in_thread(request, lambda: engine.alias_of().get(alias))
    if found is None:
        raise unknown(alias)
    return answer({"alias": alias, "collection": found})


@router.put(
    "/{alias}",
    response_model=AliasAnswer,
    responses={201: {"model": AliasAnswer, "description": "It was new"}},
    openapi_extra=takes(json=AliasRequest),
    dependencies=ONCE,
)
async def switch(request: Request, engine: Ready, alias: Alias) -> Response:
    """Have an alias stand for a collection: every request from now on goes there, none in between fails."""
    asked = await read_json(request, AliasRequest)

    def switched() -> bool:
        check_writable(engine)
        check_name(alias)
        with engine.settled():  # else the collection could go meanwhile, or one of this name be made
            if alias in engine.names():
                raise Conflict(f'"{alias}" is the name of a collection, and those come first.')
            if asked.collection not in engine.names():
                engine.resolve(asked.collection)  # says which there are
                raise Conflict(f'"{asked.collection}" is an alias. An alias stands for a collection.')
            return aliases_of(request).switch(alias, engine.place(asked.collection), engine.places())

    new = await in_thread(request, switched)
    return answer({"alias": alias, "collection": asked.collection}, 201 if new else 200)


@router.delete("/{alias}", status_code=204, response_class=Response, dependencies=ONCE)
async def delete(request: Request, engine: Ready, alias: Alias) -> Response:
    """Forget an alias; its collection stays."""

    def dropped() -> bool:
        check_writable(engine)
        return aliases_of(request).drop(alias, engine.places())

    if not await in_thread(request, dropped):
        raise unknown(alias)
    return Response(status_code=204)


def check_writable(engine: Engine) -> None:
    if engine.settings.read_only:
        raise ReadOnly("The service is read-only, so it switches no aliases.")


def unknown(alias: str) -> UnknownAlias:
    return UnknownAlias(f'There is no alias "{alias}" here.')
