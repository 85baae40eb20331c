"""The examples of the OpenAPI document: every body has one, each is what the service takes or gives."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ColourEncoder, encoded, jpeg, paint, running

from dml.collection.base import NewItem
from service import schemas
from service.app import create_app
from service.engine import Engine
from service.examples import EXAMPLES, PARAMETERS, PARTS
from service.folders import Folder
from service.settings import Settings

DOCUMENT = json.loads((Path(__file__).parent.parent / "docs" / "openapi.json").read_text(encoding="utf-8"))
OPERATIONS = {
    f"{method} {path}": operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}
FORMS = {"params": "ImageSearchParams", "payload": "PayloadText", "items": "ItemsRequest"}


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix("#/components/schemas/")
    return DOCUMENT["components"]["schemas"][name] if name else schema


def bodies(operation: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(media type, its description) of the request and of the answers of success."""
    yield from operation.get("requestBody", {}).get("content", {}).items()
    for status, response in operation["responses"].items():
        if status.startswith("2"):
            yield from response.get("content", {}).items()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_body_has_an_example_that_is_one(operation):
    for media, described in bodies(OPERATIONS[operation]):
        schema = resolved(described.get("schema", {}))
        if media == "multipart/form-data":
            for name in set(schema["properties"]) - {"file"}:
                [text] = schema["properties"][name]["examples"]
                getattr(schemas, FORMS[name]).model_validate_json(text)
        elif media == "application/json":
            assert schema["examples"], operation
            for example in schema["examples"]:
                getattr(schemas, schema["title"]).model_validate_json(json.dumps(example))
        elif media != "image/*":  # bytes
            assert described["example"], (operation, media)
    for parameter in OPERATIONS[operation].get("parameters", []):
        assert parameter["in"] != "path" or parameter["example"]


def test_no_example_is_of_something_else():
    used = {resolved(d.get("schema", {})).get("title") for o in OPERATIONS.values() for _, d in bodies(o)}
    assert set(EXAMPLES) - used == {"ImageSearchParams", "PayloadText", "ProblemAnswer"}
    assert set(PARTS) == set(FORMS)


# Each example that is a request, sent


@pytest.fixture
def shoes(tmp_path: Path) -> Iterator[httpx.Client]:
    """A service as the examples tell of it."""
    encoder, folder = ColourEncoder(), Folder(tmp_path / "data")
    index = {"kind": "flat", "options": {}, "promise": None}
    folder.path.mkdir()
    collection = folder.create(
        "shoes", dim=encoder.dim, fingerprint=encoder.fingerprint, index=index, encoder=None
    )
    for position, colour in ((12, "red"), (7, "gold"), (3, "blue")):
        pixels = encoder.preprocess(paint(colour))
        item = NewItem(
            f"boots/{position}.jpg",
            encoder.embed_arrays(pixels[None])[0],
            {"label": "boots", "price": 80},
            image=jpeg(colour),
        )
        collection.add([item])
    engine = Engine({"shoes": collection}, [encoder], settings=Settings(), folder=folder)
    with running(create_app(engine)) as address, httpx.Client(base_url=address, timeout=20) as http:
        yield http
    engine.close()


def without_jobs(http: httpx.Client) -> None:
    """Wait until no job runs: another one of its kind would be refused."""
    end = time.monotonic() + 20
    while any(job["ended"] is None for job in http.get("/v1/jobs").json()["items"]):
        assert time.monotonic() < end
        time.sleep(0.01)


TAKING = [operation for operation, described in OPERATIONS.items() if "requestBody" in described]


@pytest.mark.parametrize("operation", TAKING)
def test_a_request_as_in_the_examples_is_answered(shoes, operation):
    method, path = operation.split()
    values = {**PARAMETERS, "collection": "new" if path.endswith("{collection}") else "shoes"}
    place = path.format(**{name: value.replace("/", "%2F") for name, value in values.items()})
    content = OPERATIONS[operation]["requestBody"]["content"]
    for position, example in enumerate(
        resolved(content.get("application/json", {}).get("schema", {})).get("examples", ())
    ):
        new = f"{place}-{position}" if path.endswith("{collection}") else place
        response = shoes.request(method, new, json=example)
        assert response.is_success, (example, response.text)
        without_jobs(shoes)
    if "multipart/form-data" in content:
        fields = content["multipart/form-data"]["schema"]["properties"]
        texts = {name: field["examples"][0] for name, field in fields.items() if name != "file"}
        files = {"file": ("mine.png", encoded(paint("red"), "PNG"))}
        response = shoes.request(method, place, files=files, data=texts)
        assert response.is_success, response.text
