"""The service against its OpenAPI document: requests that fit it and that do not, made by schemathesis."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from serving import ColourEncoder, colour_collection, running

from service.app import create_app
from service.engine import Engine
from service.problems import CATALOGUE
from service.settings import Settings

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

DOCUMENT = json.loads((Path(__file__).parent.parent / "docs" / "openapi.json").read_text(encoding="utf-8"))
OPERATIONS = [
    f"{method} {path}"
    for path, operations in sorted(DOCUMENT["paths"].items())
    for method in sorted(operations)
    if method in ("get", "put", "post", "patch", "delete")
]
EXAMPLES = 15
"""Requests per operation, kind and scale."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    collection = colour_collection(tmp_path_factory.mktemp("openapi") / "colours", pictures=2)
    engine = Engine({"colours": collection}, [ColourEncoder()])
    with running(create_app(engine, Settings(max_body_bytes=1024 * 1024))) as found:
        yield found
    engine.close()


@pytest.fixture(scope="module")
def schema():
    """The document, with names of what there is as examples, so that requests get beyond 404."""
    document = json.loads(json.dumps(DOCUMENT))
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path":
                    name = parameter["name"]
                    known = {
                        "collection": ["colours", "colours", "void"],
                        "id": ["red/0", "blue/1", "nobody"],
                        "alias": ["shop", "nobody", "colours"],
                        "job": ["nobody"],
                    }
                    parameter["schema"] = {"type": "string", "enum": known[name]}
    return schemathesis.openapi.from_dict(document)


# The server's threads live in this process: what they draw looks to hypothesis as if a strategy had drawn it.
@pytest.mark.filterwarnings(
    "ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning"
)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_is_one_that_the_document_describes(address, schema, operation, mode, scale):
    method, path = operation.split()
    described = DOCUMENT["paths"][path][method]
    if mode == "NEGATIVE" and not described.get("parameters") and "requestBody" not in described:
        pytest.skip("takes nothing that could be wrong")
    strategy = schema[path][method.upper()].as_strategy(generation_mode=GenerationMode[mode])

    @hypothesis_settings(
        max_examples=EXAMPLES * scale,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def holds(case) -> None:
        response = case.call(base_url=address)
        case.validate_response(
            response,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )
        if response.status_code >= 400:
            assert response.headers["content-type"] == ["application/problem+json"]
            assert response.json()["type"].removeprefix("/problems/") in CATALOGUE

    holds()
