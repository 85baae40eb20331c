"""Filters, groups, cursors and counts over a real server."""

import json
from collections.abc import Iterator

import httpx
import pytest
from serving import ColourEncoder, colour_collection, jpeg, running

from dml.client import Client, Problem
from service import schemas
from service.app import create_app
from service.engine import Engine

PLACE = "/v1/collections/colours"
CHEAP_RED = {"must": [{"key": "label", "match": {"value": "red"}}, {"key": "price", "range": {"lt": 3}}]}


@pytest.fixture
def address(tmp_path) -> Iterator[str]:
    """A service with "red/0" to "gold/4", labelled by colour, priced by number."""
    engine = Engine({"colours": colour_collection(tmp_path / "colours")}, [ColourEncoder()])
    with running(create_app(engine)) as found:
        yield found
    engine.close()


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def search(http: httpx.Client, **body) -> dict:
    response = http.post(f"{PLACE}/search", json={"query": {"id": "red/1"}, **body})
    assert response.status_code == 200, response.text
    schemas.SearchAnswer.model_validate(response.json())
    return response.json()


def problem(response: httpx.Response, status: int, kind: str) -> dict:
    assert (response.status_code, response.json()["type"]) == (status, f"/problems/{kind}"), response.text
    schemas.ProblemAnswer.model_validate(response.json())
    return response.json()


def test_every_way_to_search_takes_a_filter(http):
    expected = {"red/0", "red/2"}  # the item itself, red/1, is left out
    found = search(http, filter=CHEAP_RED)
    assert {hit["id"] for hit in found["hits"]} == expected
    assert (found["total"], found["total_is_exact"], found["next_cursor"]) == (2, True, None)
    params = {"filter": json.dumps(CHEAP_RED)}
    similar = http.get(f"{PLACE}/items/red%2F1/similar", params=params).json()
    assert {hit["id"] for hit in similar["hits"]} == expected
    files = {"file": ("x.jpg", jpeg("red", 7), "image/jpeg")}
    upload = http.post(
        f"{PLACE}/search/image", files=files, data={"params": json.dumps({"filter": CHEAP_RED})}
    )
    assert {hit["id"] for hit in upload.json()["hits"]} == expected | {"red/1"}
    searches = [{"query": {"id": "red/1"}, "filter": f} for f in (CHEAP_RED, {"must": [1]}, {})]
    one, wrong, everything = http.post(f"{PLACE}/search/batch", json={"searches": searches}).json()["results"]
    assert {hit["id"] for hit in one["hits"]} == expected
    assert (wrong["type"], wrong["errors"][0]["pointer"]) == ("/problems/filter-invalid", "/filter/must/0")
    assert everything["total"] == 19


def test_items_are_counted_listed_and_deleted_by_filter(http):
    assert http.post(f"{PLACE}/count", json={"filter": CHEAP_RED}).json() == {"count": 3, "exact": True}
    assert http.post(f"{PLACE}/count", json={"filter": {}}).json()["count"] == 20
    params: dict = {"filter": json.dumps(CHEAP_RED), "limit": 2}
    first = http.get(f"{PLACE}/items", params=params).json()
    second = http.get(f"{PLACE}/items", params={**params, "cursor": first["next_cursor"]}).json()
    assert [item["id"] for item in first["items"] + second["items"]] == ["red/0", "red/1", "red/2"]
    assert second["next_cursor"] is None
    assert http.post(f"{PLACE}/items/delete", json={"filter": CHEAP_RED}).json() == {"deleted": 3}
    assert http.post(f"{PLACE}/count", json={}).json()["count"] == 17


def test_a_wrong_filter_is_answered_with_its_place(http):
    wrong = {"must": [{"key": "price", "range": {"lt": "cheap"}}]}
    body = problem(
        http.post(f"{PLACE}/search", json={"query": {"id": "red/1"}, "filter": wrong}), 422, "filter-invalid"
    )
    assert body["errors"][0]["pointer"] == "/filter/must/0/range/lt"
    assert "cheap" in body["errors"][0]["detail"]
    for path in (f"{PLACE}/count", f"{PLACE}/items/delete"):
        problem(http.post(path, json={"filter": wrong}), 422, "filter-invalid")
    for path in (f"{PLACE}/items", f"{PLACE}/items/red%2F1/similar"):
        body = problem(http.get(path, params={"filter": json.dumps(wrong)}), 422, "filter-invalid")
        assert body["errors"][0]["in"] == "query"
        for text in ("{", "[" * 20_000):
            problem(http.get(path, params={"filter": text}), 422, "invalid-request")
    assert http.post(f"{PLACE}/count", json={}).json()["count"] == 20


def test_hits_are_grouped(http):
    found = search(http, group_by="label", group_size=2, limit=3)
    groups = [hit["group"] for hit in found["hits"]]
    assert len(groups) == 6
    assert groups[:2] == ["red", "red"]
    assert len(set(groups)) == 3
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3, 4, 5, 6]
    by_price = search(http, group_by="price", limit=2)
    assert all(isinstance(hit["group"], int) for hit in by_price["hits"])
    assert "group" not in search(http)["hits"][0]
    for wrong in ({"group_by": "a..b"}, {"group_by": "label", "limit": 1000, "group_size": 11}):
        body = {"query": {"id": "red/1"}} | wrong
        problem(http.post(f"{PLACE}/search", json=body), 422, "invalid-request")


def test_a_walk_goes_through_all_hits_while_they_are_deleted(http):
    expected = [hit["id"] for hit in search(http, limit=100)["hits"]]
    cursor, ids = "*", []
    while cursor is not None:
        page = search(http, limit=6, cursor=cursor)
        ids += [hit["id"] for hit in page["hits"]]
        cursor = page["next_cursor"]
        http.post(f"{PLACE}/items/delete", json={"ids": ids[-2:]})
    assert ids == expected
    assert http.post(f"{PLACE}/count", json={}).json()["count"] < 20


def test_a_walk_from_a_picture_goes_on_though_it_is_embedded_again(http):
    files = {"file": ("x.jpg", jpeg("red", 7), "image/jpeg")}
    cursor, ids = "*", []
    while cursor is not None:
        params = {"params": json.dumps({"cursor": cursor, "limit": 7})}
        page = http.post(f"{PLACE}/search/image", files=files, data=params).json()
        ids += [hit["id"] for hit in page["hits"]]
        cursor = page["next_cursor"]
    assert len(ids) == len(set(ids)) == 20


def test_cursors_that_cannot_be_used_are_told_apart(http):
    cursor = search(http, limit=3, cursor="*")["next_cursor"]
    other = {"query": {"id": "red/2"}, "cursor": cursor}
    problem(http.post(f"{PLACE}/search", json=other), 422, "cursor-invalid")
    problem(
        http.post(f"{PLACE}/search", json={"query": {"id": "red/1"}, "cursor": "abc"}), 422, "cursor-invalid"
    )
    for n in range(20):
        http.patch(f"{PLACE}/items/red%2F1", json={"payload": {"n": n}})
        search(http, limit=3, cursor="*")
    problem(
        http.post(f"{PLACE}/search", json={"query": {"id": "red/1"}, "cursor": cursor}), 410, "cursor-expired"
    )
    both = {"query": {"id": "red/1"}, "cursor": "*", "offset": 5}
    problem(http.post(f"{PLACE}/search", json=both), 422, "invalid-request")


def test_the_client_has_it_all(client):
    assert client.count("colours", CHEAP_RED) == 3
    assert [item.id for item in client.items("colours", filter=CHEAP_RED, page=2)] == [
        "red/0",
        "red/1",
        "red/2",
    ]
    found = client.search("colours", id="red/1", group_by="label", group_size=2, limit=2)
    assert [hit.group for hit in found.hits][:2] == ["red", "red"]
    first = client.search("colours", image=jpeg("red", 7), filter=CHEAP_RED, limit=2, cursor="*")
    second = client.search("colours", image=jpeg("red", 7), filter=CHEAP_RED, cursor=first.next_cursor)
    assert {hit.id for hit in first.hits + second.hits} == {"red/0", "red/1", "red/2"}
    assert second.next_cursor is None
    assert client.delete_matching("colours", CHEAP_RED) == 3
    with pytest.raises(Problem) as caught:
        client.count("colours", {"must": [{"key": "a"}]})
    assert caught.value.type == "filter-invalid"
