"""The REST API over a real server: every route, and the shape of every answer."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from serving import COLOURS, ColourEncoder, colour_collection, encoded, jpeg, paint, running

from service import schemas
from service.app import create_app
from service.engine import Engine
from service.problems import CATALOGUE
from service.settings import Settings

PLACE = "/v1/collections/colours"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service with the collection "colours" (20 pictures), and "empty"."""
    folder = tmp_path_factory.mktemp("collections")
    collections = {
        "colours": colour_collection(folder / "colours"),
        "empty": colour_collection(folder / "empty", pictures=0),
    }
    engine = Engine(collections, [ColourEncoder()])
    with running(create_app(engine, Settings(max_searches=4, max_images=3))) as found:
        yield found
    engine.close()


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def search(http: httpx.Client, body: dict, collection: str = "colours") -> dict:
    response = http.post(f"/v1/collections/{collection}/search", json=body)
    assert response.status_code == 200, response.text
    schemas.SearchAnswer.model_validate(response.json())
    return response.json()


def assert_problem(response: httpx.Response, status: int, kind: str) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    schemas.ProblemAnswer.model_validate(body)
    assert body["type"] == f"/problems/{kind}"
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["detail"]
    return body


# Probes and what there is


def test_the_probes_answer(http):
    assert http.get("/livez").text == "ok\n"
    for path in ("/readyz", "/healthz"):
        ready = schemas.ReadyAnswer.model_validate(http.get(path).json())
        assert ready.collections == ["colours", "empty"]
    assert http.head("/livez").status_code == 200


def test_the_root_tells_name_version_and_limits(http):
    root = schemas.RootAnswer.model_validate(http.get("/v1").json())
    assert root.limits["max_body_bytes"] == 16 * 1024 * 1024
    assert root.limits["max_pixels"] == 25_000_000
    assert (root.key, root.scope, root.read_only) == (None, "admin", False)
    assert root.default_collection == "colours"


def test_models_are_listed_with_the_collections_they_serve(http):
    [model] = schemas.ModelsAnswer.model_validate(http.get("/v1/models").json()).items
    assert (model.dim, model.collections) == (48, ["colours", "empty"])


def test_collections_are_listed_page_by_page(http):
    first = schemas.CollectionsAnswer.model_validate(http.get("/v1/collections", params={"limit": 1}).json())
    assert [c.name for c in first.items] == ["colours"]
    second = http.get("/v1/collections", params={"limit": 1, "cursor": first.next_cursor}).json()
    assert [c["name"] for c in second["items"]] == ["empty"]
    assert second["next_cursor"] is None


def test_a_collection_tells_its_size_index_and_encoder(http):
    info = schemas.CollectionAnswer.model_validate(http.get(PLACE).json())
    assert (info.name, info.count, info.dim) == ("colours", 20, 48)
    assert info.model_fingerprint == ColourEncoder.fingerprint
    assert "image" in info.accepts


# Search


def test_an_uploaded_picture_finds_pictures_of_its_colour(http):
    answer = http.post(
        f"{PLACE}/search/image",
        files={"file": ("any name.jpg", jpeg("green", 6))},
        data={"params": json.dumps({"limit": 5})},
    )
    found = schemas.SearchAnswer.model_validate(answer.json())
    assert [hit.label for hit in found.hits] == ["green"] * 5
    assert [hit.rank for hit in found.hits] == [1, 2, 3, 4, 5]
    scores = [hit.score for hit in found.hits]
    assert scores == sorted(scores, reverse=True)
    assert (found.total, found.total_is_exact, found.approximate) == (20, True, False)
    assert found.model == ColourEncoder.fingerprint


def test_the_same_picture_in_base64_gives_the_same_hits(http):
    picture = jpeg("blue", 3)
    upload = http.post(f"{PLACE}/search/image", files={"file": picture}).json()
    answer = search(http, {"query": {"image": b64(picture)}})
    assert [h["id"] for h in answer["hits"]] == [h["id"] for h in upload["hits"]]
    assert answer["hits"][0]["id"] == "blue/3"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_a_search_by_vector_takes_any_length_of_arrow(http):
    item = http.get(f"{PLACE}/items/red%2F2", params={"with_vector": True}).json()
    for factor in (1.0, 1e-30, 1e30):
        answer = search(http, {"query": {"vector": [factor * x for x in item["vector"]]}, "limit": 1})
        assert answer["hits"][0]["id"] == "red/2"
        assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_a_search_by_id_leaves_the_item_itself_out(http):
    by_id = search(http, {"query": {"id": "gold/0"}, "limit": 20})
    assert "gold/0" not in [h["id"] for h in by_id["hits"]]
    assert by_id["total"] == len(by_id["hits"]) == 19
    similar = http.get(f"{PLACE}/items/gold%2F0/similar", params={"limit": 20}).json()
    assert [h["id"] for h in similar["hits"]] == [h["id"] for h in by_id["hits"]]


def test_examples_pull_and_push(http):
    both = search(http, {"query": {"positive": ["red/0", "blue/0"]}, "limit": 2})
    assert {h["label"] for h in both["hits"]} == {"red", "blue"}
    away = search(http, {"query": {"id": "red/0", "negative": ["blue/0"]}, "limit": 20})
    assert away["hits"][0]["label"] == "red"
    assert {h["label"] for h in away["hits"][-4:]} == {"blue"}
    named = {"red/0", "blue/0"}
    assert not named & {h["id"] for h in both["hits"] + away["hits"]}


def test_examples_are_combined_as_documented(http):
    vectors = {
        id: np.array(http.get(f"{PLACE}/items/{quote(id, safe='')}?with_vector=true").json()["vector"])
        for id in ("red/0", "gold/1", "blue/2", "green/3")
    }
    body = {"query": {"positive": ["red/0", "gold/1"], "negative": ["blue/2"]}, "limit": 20}
    hits = {h["id"]: h["score"] for h in search(http, body)["hits"]}
    wanted = (vectors["red/0"] + vectors["gold/1"]) - vectors["blue/2"]
    assert hits["green/3"] == pytest.approx(vectors["green/3"] @ wanted / np.linalg.norm(wanted), abs=1e-5)


def test_pages_neither_repeat_nor_skip(http):
    whole = [h["id"] for h in search(http, {"query": {"id": "red/0"}, "limit": 19})["hits"]]
    pages = []
    for offset in range(0, 20, 4):
        page = search(http, {"query": {"id": "red/0"}, "limit": 4, "offset": offset})["hits"]
        pages += [(h["rank"], h["id"]) for h in page]
    assert pages == list(enumerate(whole, start=1))


def test_a_threshold_leaves_out_lower_scores_and_counts_the_rest(http):
    answer = search(http, {"query": {"id": "red/0"}, "score_threshold": 0.9, "limit": 20})
    assert answer["hits"]
    assert all(h["score"] >= 0.9 for h in answer["hits"])
    assert (answer["total"], answer["total_is_exact"]) == (len(answer["hits"]), True)
    full_page = search(http, {"query": {"id": "red/0"}, "score_threshold": -1, "limit": 3})
    assert (full_page["total"], full_page["total_is_exact"]) == (3, False)


def test_payload_and_vector_come_when_asked_for(http):
    bare = search(http, {"query": {"id": "red/0"}, "with_payload": False})["hits"][0]
    assert "payload" not in bare
    assert "vector" not in bare
    assert bare["label"] == "red"
    full = search(http, {"query": {"id": "red/0"}, "with_vector": True})["hits"][0]
    assert full["payload"]["label"] == "red"
    assert np.linalg.norm(full["vector"]) == pytest.approx(1, abs=1e-5)


def test_an_empty_collection_answers_with_no_hits(http):
    answer = search(http, {"query": {"image": b64(jpeg("red"))}}, collection="empty")
    assert (answer["hits"], answer["total"]) == ([], 0)


def test_a_batch_answers_in_order_and_a_failure_stays_in_its_place(http):
    searches = [
        {"query": {"id": "red/0"}},
        {"query": {"id": "nobody"}},
        {"query": {"image": b64(jpeg("blue"))}},
    ]
    response = http.post(f"{PLACE}/search/batch", json={"searches": searches})
    answer = schemas.BatchAnswer.model_validate(response.json())
    first, second, third = answer.results
    assert isinstance(first, schemas.SearchAnswer)
    assert isinstance(second, schemas.ProblemAnswer)
    assert second.type == "/problems/unknown-item"
    assert second.instance == f"{PLACE}/search/batch#/searches/1"
    assert isinstance(third, schemas.SearchAnswer)
    assert third.hits[0].label == "blue"


def test_a_batch_has_a_limit(http):
    body = {"searches": [{"query": {"id": "red/0"}}] * 5}
    problem = assert_problem(http.post(f"{PLACE}/search/batch", json=body), 422, "invalid-request")
    assert problem["errors"][0]["pointer"] == "/searches"


def test_server_timing_names_the_stages(http):
    response = http.post(f"{PLACE}/search/image", files={"file": jpeg("red")})
    named = re.findall(r"(\w+);dur=[\d.]+", response.headers["server-timing"])
    assert named == ["receive", "queue", "decode", "inference", "search", "payload"]
    assert response.json()["took_ms"] > 0


# Embeddings


def test_embeddings_of_uploads_and_of_base64_agree(http):
    pictures = [jpeg("red"), jpeg("blue", 2)]
    upload = http.post("/v1/embeddings", files=[("file", p) for p in pictures])
    text = http.post("/v1/embeddings", json={"images": [{"b64": b64(p)} for p in pictures]})
    assert upload.json() == text.json()
    found = schemas.EmbeddingsAnswer.model_validate(upload.json())
    assert (found.dim, found.model) == (48, ColourEncoder.fingerprint)
    assert np.linalg.norm(found.embeddings, axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_a_bad_picture_among_several_is_named(http):
    response = http.post("/v1/embeddings", files=[("file", jpeg("red")), ("file", b"nonsense")])
    assert "image 1" in assert_problem(response, 415, "unsupported-media")["detail"]


def test_an_unknown_model_is_not_available(http):
    response = http.post("/v1/embeddings", params={"model": "ffff"}, files={"file": jpeg("red")})
    assert assert_problem(response, 422, "not-available")["missing"] == "model"


def test_more_pictures_than_allowed_are_refused(http):
    response = http.post("/v1/embeddings", files=[("file", jpeg("red"))] * 5)
    assert response.status_code in (400, 422)
    response = http.post("/v1/embeddings", json={"images": [{"b64": b64(jpeg("red"))}] * 4})
    assert assert_problem(response, 422, "invalid-request")["errors"][0]["pointer"] == "/images"


# Items


def test_an_item_is_put_found_changed_and_deleted(http):
    place = f"{PLACE}/items/new%2Fone"
    picture = jpeg("green", 7)
    created = http.put(place, files={"file": picture}, data={"payload": '{"label": "fresh", "size": 3}'})
    assert created.status_code == 201
    written = schemas.WrittenAnswer.model_validate(created.json())
    assert written.created
    found = search(http, {"query": {"image": b64(picture)}, "limit": 1})
    assert found["hits"][0]["id"] == "new/one"
    assert found["generation"] >= written.generation

    changed = http.patch(place, json={"payload": {"size": None, "price": 5}})
    item = schemas.ItemAnswer.model_validate(changed.json())
    assert item.payload == {"label": "fresh", "price": 5}
    assert http.get(place).json() == changed.json()

    replaced = http.put(place, json={"image": b64(jpeg("red", 7)), "payload": {}})
    assert (replaced.status_code, replaced.json()["created"]) == (200, False)
    assert http.delete(place).status_code == 204
    assert_problem(http.get(place), 404, "unknown-item")
    assert_problem(http.delete(place), 404, "unknown-item")


def test_an_item_can_be_a_vector_without_a_picture(http):
    place = f"{PLACE}/items/only-a-vector"
    vector = np.linspace(-1, 2, 48).tolist()
    assert http.put(place, json={"vector": vector, "payload": {"label": "v"}}).status_code == 201
    item = http.get(place, params={"with_vector": True}).json()
    assert item["image"] is None
    assert np.allclose(item["vector"], np.array(vector) / np.linalg.norm(vector), atol=1e-6)
    assert_problem(http.get(f"{place}/image"), 404, "image-not-kept")
    assert http.delete(place).status_code == 204


ODD_IDS = [
    "a/b/c",
    "with space",
    "50%",
    "100%2F",
    "ü/été",
    "?x=1&y=2",
    "#hash",
    "..",
    ".",
    "a/../b",
    "delete",
]
ODD_IDS += ["x/image", "x/similar", "'; DROP TABLE items; --", "\\back", "+plus+", "日本語/商品.jpg", "a//b"]


@pytest.mark.parametrize("id", ODD_IDS)
def test_any_visible_id_is_one_segment_of_the_path(http, id):
    segment = quote(id, safe="").replace(".", "%2E")
    place = f"{PLACE}/items/{segment}"
    picture = jpeg("red", 5)
    assert http.put(place, files={"file": picture}).status_code == 201
    try:
        assert http.get(place).json()["id"] == id
        assert http.get(f"{place}/image").content == picture
        similar = http.get(f"{place}/similar", params={"limit": 1000}).json()
        assert id not in [h["id"] for h in similar["hits"]]
        assert id in [i["id"] for i in http.get(f"{PLACE}/items", params={"limit": 1000}).json()["items"]]
    finally:
        assert http.delete(place).status_code == 204


def test_slashes_of_an_id_may_also_stand_as_they_are(http):
    assert http.get(f"{PLACE}/items/red/0").json()["id"] == "red/0"
    assert http.get(f"{PLACE}/items/red/0/image").content == jpeg("red", 0)
    assert_problem(http.get(f"{PLACE}/items/red%2F0%2Fimage"), 404, "unknown-item")


@pytest.mark.parametrize("segment", ["%0A", "%00", "a%0D%0Ab", "%E2%80%AE", "%20", "x" * 513])
def test_ids_that_nobody_could_read_are_refused(http, segment):
    response = http.put(f"{PLACE}/items/{segment}", files={"file": jpeg("red")})
    assert_problem(response, 422, "invalid-request")


def test_scrolling_visits_every_item_once(http):
    ids, cursor = [], None
    while True:
        params = {"limit": 7} | ({"cursor": cursor} if cursor else {})
        page = schemas.ItemsAnswer.model_validate(http.get(f"{PLACE}/items", params=params).json())
        ids += [item.id for item in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert ids == sorted(f"{colour}/{n}" for colour in COLOURS for n in range(5))
    assert http.post(f"{PLACE}/count", json={}).json() == {"count": 20, "exact": True}


def test_several_items_are_deleted_at_once(http):
    for name in ("x1", "x2"):
        http.put(f"{PLACE}/items/{name}", files={"file": jpeg("red")})
    response = http.post(f"{PLACE}/items/delete", json={"ids": ["x1", "x2", "never there"]})
    assert schemas.DeletedAnswer.model_validate(response.json()).deleted == 2


def test_a_picture_comes_back_as_given_and_small_and_may_be_kept(http):
    image = http.get(f"{PLACE}/items/red%2F1").json()["image"]
    full = http.get(image)
    assert full.content == jpeg("red", 1)
    assert full.headers["content-type"] == "image/jpeg"
    assert full.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in full.headers["cache-control"]
    plain = http.get(f"{PLACE}/items/red%2F1/image")
    assert plain.headers["cache-control"] == "private, no-cache"
    thumb = http.get(f"{PLACE}/items/red%2F1/image", params={"size": "thumb"})
    assert thumb.headers["content-type"] == "image/jpeg"
    assert thumb.headers["etag"] != full.headers["etag"]
    again = http.get(f"{PLACE}/items/red%2F1/image", headers={"If-None-Match": plain.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = http.get(f"{PLACE}/items/red%2F1/image", headers={"If-None-Match": '"other"'})
    assert other.status_code == 200


def test_the_type_of_a_picture_is_read_from_its_bytes(http):
    place = f"{PLACE}/items/pretender.html"
    http.put(place, files={"file": ("x.html", encoded(paint("red"), "PNG"), "text/html")})
    assert http.get(f"{place}/image").headers["content-type"] == "image/png"
    http.put(place, files={"file": ("x.html", encoded(paint("red"), "TIFF"), "text/html")})
    tiff = http.get(f"{place}/image")
    assert tiff.headers["content-type"] == "image/tiff"
    assert tiff.headers["content-disposition"] == "attachment"
    http.delete(place)


# The whole


def test_request_ids_are_echoed_when_they_are_harmless(http):
    assert http.get("/livez", headers={"X-Request-Id": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    strange = http.get("/livez", headers={"X-Request-Id": "a b<script>"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", strange)


def test_a_collection_is_known_by_the_name_it_is_served_under(tmp_path):
    engine = Engine({"a/b & c": colour_collection(tmp_path / "folder", pictures=1)}, [ColourEncoder()])
    with running(create_app(engine)) as address, httpx.Client(base_url=address) as http:
        place = f"/v1/collections/{quote('a/b & c', safe='')}"
        assert http.get(place).json()["name"] == "a/b & c"
        hit = http.get(f"{place}/items/red%2F0/similar").json()["hits"][0]
        assert http.get(hit["image"]).status_code == 200
    engine.close()


def test_metrics_count_requests_stages_and_problems(http):
    search(http, {"query": {"image": b64(jpeg("red"))}})
    assert_problem(http.get("/v1/collections/nowhere"), 404, "unknown-collection")
    text = http.get("/metrics").text
    assert 'dml_collection_items{collection="colours"} 20.0' in text
    for stage in ("queue", "decode", "inference", "search", "payload"):
        assert f'route="/v1/collections/{{collection}}/search",stage="{stage}"}}' in text
    assert re.search(r'dml_problems_total\{type="unknown-collection"\} [1-9]', text)
    route = "/v1/collections/{collection}/search"
    assert f'dml_request_seconds_count{{method="POST",route="{route}",status="200"}}' in text
    assert "red/1" not in text, "ids must not become labels"


def test_two_apps_do_not_share_their_counters(address, tmp_path):
    engine = Engine({"other": colour_collection(tmp_path / "other", pictures=1)}, [ColourEncoder()])
    with running(create_app(engine)) as second:
        text = httpx.get(f"{second}/metrics").text
        assert 'collection="colours"' not in text
        assert 'collection="other"' in text
    engine.close()


def test_openapi_describes_every_route_with_bodies_and_problems(http):
    document = http.get("/openapi.json").json()
    text = json.dumps(document)
    for reference in set(re.findall(r'"#/components/schemas/([^"]+)"', text)):
        assert reference in document["components"]["schemas"], reference
    assert "HTTPValidationError" not in text
    for path in ("search", "search/image", "search/batch", "items/{id}/similar", "items/{id}", "items"):
        assert f"/v1/collections/{{collection}}/{path}" in document["paths"]
    operation = document["paths"]["/v1/collections/{collection}/search"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "/SearchRequest"
    )
    assert "application/problem+json" in operation["responses"]["422"]["content"]


def test_the_published_openapi_document_is_that_of_the_service(http):
    published = (Path(__file__).parent.parent / "docs" / "openapi.json").read_text(encoding="utf-8")
    renew = "renew it: python -m service.openapi > docs/openapi.json"
    assert json.loads(published) == http.get("/openapi.json").json(), renew
    command = [sys.executable, "-m", "service.openapi"]
    assert subprocess.run(command, capture_output=True, check=True).stdout.decode() == published, renew


def test_every_problem_type_has_a_page(http):
    for slug in CATALOGUE:
        page = http.get(f"/problems/{slug}")
        assert page.status_code == 200
        assert slug in page.text
    listed = http.get("/problems").text
    assert sorted(re.findall(r'href="problems/([a-z-]+)"', listed)) == sorted(CATALOGUE)
    assert_problem(http.get("/problems/no-such"), 404, "not-found")
