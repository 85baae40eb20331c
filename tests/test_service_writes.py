"""Writes that clients may rely on: conditional, repeatable, in batches; collections, aliases, feedback."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import ColourEncoder, colour_collection, jpeg, running
from test_service import assert_problem, b64
from test_service_run import serving

from dml.client import BatchItem, Client, Problem
from dml.collection.base import NewItem
from dml.errors import UsageError
from service import repeats, schemas
from service.aliases import Aliases
from service.app import create_app
from service.engine import Engine, Query, Search
from service.folders import Folder
from service.keys import Keys, Scope
from service.memory import Conflict
from service.settings import Settings

PLACE = "/v1/collections/colours"
VECTOR = [1.0] * 48


@contextmanager
def served(
    folder: Path, *, keys: Keys | None = None, settings: Settings | None = None
) -> Iterator[httpx.Client]:
    """A service of "colours", which lies in its folder for collections."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    collection = colour_collection(data / "colours", pictures=2)
    engine = Engine({"colours": collection}, [ColourEncoder()], settings=settings, folder=Folder(data))
    app = create_app(engine, keys=keys, state=folder / "state")
    with running(app) as address, httpx.Client(base_url=address, timeout=20) as http:
        yield http
    engine.close()


@pytest.fixture
def http(tmp_path: Path) -> Iterator[httpx.Client]:
    with served(tmp_path) as found:
        yield found


@pytest.fixture
def client(http: httpx.Client) -> Iterator[Client]:
    with Client(str(http.base_url)) as found:
        yield found


# If-Match


def test_an_etag_is_the_item_s_sequence_and_changes_with_it(http):
    got = http.get(f"{PLACE}/items/red%2F0")
    assert got.headers["etag"] == f'"{got.json()["sequence"]}"'
    changed = http.patch(f"{PLACE}/items/red%2F0", json={"payload": {"price": 5}})
    assert changed.headers["etag"] == f'"{changed.json()["sequence"]}"' != got.headers["etag"]
    replaced = http.put(f"{PLACE}/items/red%2F0", json={"vector": VECTOR})
    assert replaced.headers["etag"] == http.get(f"{PLACE}/items/red%2F0").headers["etag"]


def test_a_write_to_an_item_that_was_changed_meanwhile_is_refused(http):
    place = f"{PLACE}/items/red%2F0"
    old = {"If-Match": http.get(place).headers["etag"]}
    assert http.patch(place, json={"payload": {"price": 5}}, headers=old).status_code == 200
    for response in (
        http.patch(place, json={"payload": {"price": 6}}, headers=old),
        http.put(place, json={"vector": VECTOR}, headers=old),
        http.delete(place, headers=old),
    ):
        assert "changed meanwhile" in assert_problem(response, 412, "precondition-failed")["detail"]
    assert http.get(place).json()["payload"]["price"] == 5
    current = {"If-Match": f'"1", {http.get(place).headers["etag"]}'}
    assert http.delete(place, headers=current).status_code == 204
    assert_problem(http.patch(place, json={"payload": {}}, headers=current), 412, "precondition-failed")
    any_item = {"If-Match": "*"}
    assert_problem(http.put(place, json={"vector": VECTOR}, headers=any_item), 412, "precondition-failed")


def test_an_item_may_be_added_only_when_it_is_new(http):
    absent = {"If-None-Match": "*"}
    assert http.put(f"{PLACE}/items/new", json={"vector": VECTOR}, headers=absent).status_code == 201
    again = http.put(f"{PLACE}/items/new", json={"vector": VECTOR}, headers=absent)
    assert_problem(again, 412, "precondition-failed")


@pytest.mark.parametrize("tag", ["5", 'W/"5"', '"five"', '"1" "2"', "", '"99999999999999999999"'])
def test_what_is_no_etag_is_refused(http, tag):
    response = http.patch(f"{PLACE}/items/red%2F0", json={"payload": {}}, headers={"If-Match": tag})
    [error] = assert_problem(response, 422, "invalid-request")["errors"]
    assert error["in"] == "header"


def test_of_writers_that_read_the_same_state_one_wins(http, scale):
    place = f"{PLACE}/items/red%2F0"
    http.patch(place, json={"payload": {"count": 0}})
    wins: list[int] = []

    def add_one() -> None:
        with httpx.Client(base_url=http.base_url, timeout=20) as own:
            for _ in range(5 * scale):
                item = own.get(place)
                change = {"payload": {"count": item.json()["payload"]["count"] + 1}}
                response = own.patch(place, json=change, headers={"If-Match": item.headers["etag"]})
                assert response.status_code in (200, 412), response.text
                wins.append(response.status_code == 200)

    writers = [threading.Thread(target=add_one) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert http.get(place).json()["payload"]["count"] == sum(wins), "no change was lost"


# Idempotency-Key


def test_a_write_that_is_sent_twice_is_done_once(http):
    key = {"Idempotency-Key": "a-1"}
    first = http.put(f"{PLACE}/items/new", json={"vector": VECTOR}, headers=key)
    again = http.put(f"{PLACE}/items/new", json={"vector": VECTOR}, headers=key)
    assert (first.status_code, again.status_code) == (201, 201), "the answer of the first"
    assert again.json() == first.json()
    assert again.headers["etag"] == first.headers["etag"]
    assert (first.headers.get("idempotency-replayed"), again.headers["idempotency-replayed"]) == (
        None,
        "true",
    )
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    other = http.put(f"{PLACE}/items/new", json={"vector": [2.0] * 48}, headers=key)
    assert_problem(other, 422, "idempotency-conflict")
    elsewhere = http.put(f"{PLACE}/items/newer", json={"vector": VECTOR}, headers=key)
    assert_problem(elsewhere, 422, "idempotency-conflict")


def test_the_boundary_of_an_upload_does_not_make_it_another_one(http):
    answers = [
        http.put(
            f"{PLACE}/items/new",
            content=(
                f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'.encode()
                + jpeg("red")
                + f"\r\n--{boundary}--\r\n".encode()
            ),
            headers={
                "Content-Type": f"multipart/form-data; boundary={boundary}",
                "Idempotency-Key": "upload",
            },
        )
        for boundary in ("one-boundary-0001", "two-boundary-0002")
    ]
    assert [a.status_code for a in answers] == [201, 201], answers[1].text
    assert answers[1].headers["idempotency-replayed"] == "true"


def test_a_deletion_is_repeated_too(http):
    key = {"Idempotency-Key": "gone"}
    for _ in range(2):
        assert http.delete(f"{PLACE}/items/red%2F0", headers=key).status_code == 204
    assert_problem(http.delete(f"{PLACE}/items/red%2F0"), 404, "unknown-item")


def test_what_failed_may_be_sent_again(http):
    key = {"Idempotency-Key": "b-1"}
    change = {"payload": {"price": 3}}
    assert_problem(http.patch(f"{PLACE}/items/new", json=change, headers=key), 404, "unknown-item")
    http.put(f"{PLACE}/items/new", json={"vector": VECTOR})
    assert http.patch(f"{PLACE}/items/new", json=change, headers=key).status_code == 200


def test_keys_of_different_callers_are_different_and_a_stranger_gets_nothing(tmp_path):
    with Keys(tmp_path / "state") as keys:
        texts = [keys.add(name, scope=Scope.WRITE)[0] for name in ("one", "two")]
        reader, _ = keys.add("reader", scope=Scope.SEARCH)
        with served(tmp_path, keys=keys) as http:
            for text in texts:
                headers = {"api-key": text, "Idempotency-Key": "same"}
                body = {"vector": VECTOR, "payload": {"by": text[:16]}}
                response = http.put(f"{PLACE}/items/{text[4:16]}", json=body, headers=headers)
                assert response.status_code == 201, response.text
            place, repeated = f"{PLACE}/items/{texts[0][4:16]}", {"Idempotency-Key": "same"}
            body = {"vector": VECTOR, "payload": {"by": texts[0][:16]}}
            assert_problem(http.put(place, json=body, headers=repeated), 401, "unauthorized")
            as_reader = {**repeated, "api-key": reader}
            assert_problem(http.put(place, json=body, headers=as_reader), 403, "forbidden")


@pytest.mark.parametrize("key", ["", "x" * 256, "a b"])
def test_a_key_that_cannot_be_one_is_refused(http, key):
    response = http.put(f"{PLACE}/items/new", json={"vector": VECTOR}, headers={"Idempotency-Key": key})
    [error] = assert_problem(response, 422, "invalid-request")["errors"]
    assert error["pointer"].lower() == "/idempotency-key"


def test_answers_are_kept_for_a_day(tmp_path, monkeypatch):
    with served(tmp_path) as http:
        key = {"Idempotency-Key": "a"}
        assert http.put(f"{PLACE}/items/new", json={"vector": VECTOR}, headers=key).status_code == 201
        monkeypatch.setattr(repeats, "KEPT_SECONDS", 0)
        assert http.put(f"{PLACE}/items/new", json={"vector": VECTOR}, headers=key).status_code == 200


def test_a_write_with_the_same_key_waits_for_the_first(tmp_path):
    kept = repeats.Repeats(tmp_path / "state")
    claim = repeats.Claim("", "k", b"digest")
    assert kept.claim(claim) is None
    with pytest.raises(repeats.UnderWay):
        kept.claim(claim)
    kept.release(claim)
    assert kept.claim(claim) is None
    kept.close()


# Batches


def test_many_items_are_written_and_what_is_wrong_stands_in_its_place(http):
    items = [
        {"id": "a", "image": b64(jpeg("gold", 3)), "payload": {"label": "gold"}},
        {"id": "broken", "image": b64(jpeg("gold")[:300])},
        {"id": "b", "vector": VECTOR},
        {"id": "short", "vector": [1.0, 2.0]},
        {"id": "red/0", "vector": VECTOR},
    ]
    response = http.post(f"{PLACE}/items", json={"items": items})
    assert response.status_code == 200, response.text
    told = schemas.UpsertAnswer.model_validate(response.json())
    assert (told.written, told.failed) == (3, 2)
    assert [r.get("created") for r in response.json()["results"]] == [True, None, True, None, False]
    problems = {r["id"]: r["problem"] for r in response.json()["results"] if "problem" in r}
    assert problems["broken"]["type"] == "/problems/invalid-image"
    assert problems["short"]["type"] == "/problems/dimension-mismatch"
    assert problems["short"]["instance"].endswith("#/items/3")
    found = http.post(f"{PLACE}/search", json={"query": {"image": b64(jpeg("gold", 3))}, "limit": 1}).json()
    assert found["hits"][0]["id"] == "a"


def test_many_pictures_come_as_files(http):
    items = {"items": [{"id": "x/1"}, {"id": "x/2", "payload": {"label": "blue"}}]}
    files = [("file", ("1.jpg", jpeg("red", 5))), ("file", ("2.jpg", jpeg("blue", 5)))]
    response = http.post(f"{PLACE}/items", files=files, data={"items": json.dumps(items)})
    assert response.json()["written"] == 2, response.text
    assert http.get(f"{PLACE}/items/x%2F2").json()["label"] == "blue"
    one = http.post(f"{PLACE}/items", files=files[:1], data={"items": json.dumps(items)})
    assert "1 files came with 2 items" in assert_problem(one, 422, "invalid-request")["detail"]


@pytest.mark.parametrize(
    ("items", "pointer"),
    [
        ([], "/items"),
        ([{"id": "a", "vector": VECTOR}, {"id": "a", "vector": VECTOR}], "/items/1/id"),
        ([{"id": "a"}], "/items/0"),
        ([{"id": "a", "vector": VECTOR, "image": "aaaa"}], "/items/0"),
        ([{"id": "a\n", "vector": VECTOR}], "/items/0/id"),
        ([{"id": "a", "image": "not base64!"}], "/items/0/image"),
        ([{"id": f"{n}", "vector": VECTOR} for n in range(6)], "/items"),
    ],
)
def test_a_batch_that_is_wrong_writes_nothing(tmp_path, items, pointer):
    with served(tmp_path, settings=Settings(max_items=5)) as http:
        response = http.post(f"{PLACE}/items", json={"items": items})
        assert assert_problem(response, 422, "invalid-request")["errors"][0]["pointer"] == pointer
        assert http.get(PLACE).json()["count"] == 8


def test_the_client_writes_batches_of_pictures_and_vectors(client):
    mixed = [BatchItem("a", image=jpeg("red", 4)), BatchItem("b", vector=VECTOR), BatchItem("c", image=b"no")]
    batch = client.put_items("colours", mixed)
    assert [w.id for w in batch.written] == ["a", "b"]
    assert batch.failed["c"].type == "unsupported-media"
    pictures = [BatchItem(f"p{n}", image=jpeg("blue", n)) for n in range(3)]
    job = client.wait_for(client.put_items_later("colours", pictures, once="later"))
    assert job.result is not None
    assert job.result["written"] == 3
    assert client.put_items_later("colours", pictures, once="later").id == job.id
    with pytest.raises(UsageError, match="either an image or a vector"):
        client.put_items("colours", [BatchItem("a")])


def test_the_client_writes_under_conditions(client):
    item = client.get_item("colours", "red/0")
    client.update_payload("colours", "red/0", {"price": 9}, if_sequence=item.sequence)
    with pytest.raises(Problem) as refused:
        client.delete_item("colours", "red/0", if_sequence=item.sequence)
    assert (refused.value.status, refused.value.type) == (412, "precondition-failed")
    with pytest.raises(Problem):
        client.put_item("colours", "red/0", vector=VECTOR, only_new=True)


# Collections and aliases


def test_collections_are_made_filled_and_deleted(client, tmp_path):
    made = client.create_collection("shoes", kind="hnsw")
    assert (made.count, made.dim, made.model_fingerprint) == (0, 48, ColourEncoder.fingerprint)
    client.put_item("shoes", "a", image=jpeg("red", 1))
    assert client.search("shoes", image=jpeg("red", 1)).hits[0].id == "a"
    assert client.create_collection("shoes", kind="hnsw").count == 1, "it stays as it is"
    with pytest.raises(Problem, match="kind hnsw, and not flat") as differs:
        client.create_collection("shoes", kind="flat")
    assert differs.value.status == 409
    vectors = client.create_collection("vectors", dim=3, model="made elsewhere")
    assert vectors.accepts == ("id", "vector")
    assert [c.name for c in client.collections()] == ["colours", "shoes", "vectors"]
    client.delete_collection("shoes")
    assert not (tmp_path / "data" / "shoes").exists()
    with pytest.raises(Problem) as gone:
        client.collection("shoes")
    assert gone.value.type == "unknown-collection"
    assert client.create_collection("shoes", kind="flat").count == 0


@pytest.mark.parametrize("name", ["..", ".hidden", "a%2Fb", "..%2Fout", "a b", "x" * 129, "-rf", "%00"])
def test_a_name_that_could_lead_elsewhere_is_refused(http, tmp_path, name):
    response = http.put(f"/v1/collections/{name}", json={})
    assert response.status_code in (404, 405, 422), response.text
    assert [child.name for child in (tmp_path / "data").iterdir()] == ["colours"]
    assert sorted(child.name for child in tmp_path.iterdir()) in (["data"], ["data", "state"])


def test_what_a_collection_cannot_be_made_of_is_told(http):
    for body, kind in (
        ({"model": "ffff"}, "not-available"),
        ({"index": {"kind": "os:system"}}, "invalid-request"),
        ({"index": {"kind": "hnsw", "options": {"spin": 1}}}, "invalid-request"),
        ({"metric": "euclidean"}, "invalid-request"),
        ({"dim": 0}, "invalid-request"),
    ):
        assert_problem(http.put("/v1/collections/new", json=body), 422, kind)
    assert http.get("/v1/collections/new").status_code == 404


def test_a_promise_may_be_made_with_the_collection_and_is_kept_by_a_rebuild(client, http):
    body = {"dim": 8, "index": {"target_recall": 0.9, "latency_budget": 0.5}}
    assert http.put("/v1/collections/vectors", json=body).status_code == 201
    assert client.collection("vectors").promised_recall == 0.9
    assert http.put("/v1/collections/vectors", json=body).status_code == 200
    vectors = np.random.default_rng(0).normal(size=(60, 8))
    client.put_items("vectors", [BatchItem(f"v{n}", vector=row) for n, row in enumerate(vectors)])
    job = client.wait_for(client.rebuild("vectors"))
    assert job.result is not None
    assert job.result["promise"]["recall"] == 0.9
    assert "the promise holds" in job.message
    again = client.create_collection("vectors", dim=8, target_recall=0.9, latency_budget=0.5)
    assert (again.count, again.promised_recall) == (60, 0.9)
    other = http.put("/v1/collections/vectors", json={"dim": 8, "index": {"target_recall": 0.99}})
    assert "with promise {'recall': 0.9" in assert_problem(other, 409, "conflict")["detail"]
    for wrong in ({"target_recall": 0.9, "kind": "hnsw"}, {"memory_budget": 1000}, {"target_recall": 2}):
        refused = http.put("/v1/collections/new", json={"dim": 8, "index": wrong})
        assert_problem(refused, 422, "invalid-request")


def test_a_collection_for_pictures_needs_an_encoder_and_is_told_so(tmp_path):
    engine = Engine({"colours": colour_collection(tmp_path / "colours")}, folder=Folder(tmp_path))
    with running(create_app(engine)) as address, httpx.Client(base_url=address) as http:
        told = assert_problem(http.put("/v1/collections/new", json={}), 422, "not-available")["detail"]
        assert "no encoder" in told
        assert "--encoder FOLDER" in told
        assert http.put("/v1/collections/new", json={"dim": 4}).status_code == 201
    engine.close()


def test_a_service_without_a_folder_makes_and_deletes_none(tmp_path):
    engine = Engine({"colours": colour_collection(tmp_path / "colours", pictures=1)}, [ColourEncoder()])
    with running(create_app(engine)) as address, httpx.Client(base_url=address) as http:
        assert_problem(http.put("/v1/collections/new", json={}), 422, "not-available")
        assert_problem(http.delete("/v1/collections/colours"), 422, "not-available")
        assert http.get(PLACE).json()["count"] == 4
    engine.close()


def test_what_is_put_into_the_folder_is_served_after_a_reload(tmp_path):
    with served(tmp_path) as http, Client(str(http.base_url)) as client:
        assert client.reload() == []
        for name in ("late", "later"):
            colour_collection(tmp_path / "data" / name, pictures=1).close()
        (tmp_path / "data" / "later" / "manifest.json").write_text("{}")
        told = schemas.ReloadAnswer.model_validate(http.post("/v1/admin/reload").json())
        assert told.opened == ["late"]
        [broken] = told.failed
        assert (broken.name, "manifest" in broken.problem.detail) == ("later", True)
        assert client.collection("late").count == 4
        assert [one.name for one in client.collections()] == ["colours", "late"]
        with pytest.raises(Problem):
            client.reload()
    assert_reload_needs_a_folder(tmp_path / "without")


def assert_reload_needs_a_folder(path: Path) -> None:
    engine = Engine({"colours": colour_collection(path, pictures=1)})
    with running(create_app(engine)) as address:
        told = assert_problem(httpx.post(f"{address}/v1/admin/reload"), 422, "not-available")
        assert "--data FOLDER" in told["detail"]
    engine.close()


def test_a_collection_from_elsewhere_is_not_deleted(tmp_path):
    engine = Engine({"colours": colour_collection(tmp_path / "colours")}, folder=Folder(tmp_path / "data"))
    with pytest.raises(Conflict, match="outside"):
        engine.remove("colours")
    assert engine.count("colours") == 20
    engine.close()


def test_a_collection_is_deleted_when_its_requests_have_ended(tmp_path):
    engine = Engine(
        {"colours": colour_collection(tmp_path / "colours")}, [ColourEncoder()], folder=Folder(tmp_path)
    )
    with engine.using("colours") as collection:
        with pytest.raises(Conflict, match="still use"):
            engine.remove("colours", seconds=0.01)
        assert collection.count() == 20
        removing = threading.Thread(target=engine.remove, args=("colours",))
        removing.start()
        while "colours" in engine.names():
            pass
        assert collection.count() == 20, "whoever was before may finish"
    removing.join()
    assert not (tmp_path / "colours").exists()
    engine.close()


def test_an_alias_leads_to_its_collection_everywhere(client, http):
    client.set_alias("shop", "colours")
    assert client.aliases() == {"shop": "colours"}
    answer = client.search("shop", id="red/0", limit=3)
    assert answer.collection == "colours", "the answer names what was searched"
    assert answer.hits[0].image is not None
    assert http.get(answer.hits[0].image).status_code == 200
    assert client.collection("shop").name == "colours"
    assert client.count("shop") == 8
    client.put_item("shop", "new", vector=VECTOR)
    assert client.get_item("colours", "new").id == "new"
    assert http.get("/v1/aliases/shop").json() == {"alias": "shop", "collection": "colours"}


def test_an_alias_is_switched_back_and_deleted(client, http):
    client.create_collection("next", kind="flat")
    assert http.put("/v1/aliases/shop", json={"collection": "colours"}).status_code == 201
    assert http.put("/v1/aliases/shop", json={"collection": "next"}).status_code == 200
    assert (client.count("shop"), client.aliases()) == (0, {"shop": "next"})
    refused = http.delete("/v1/collections/next")
    assert 'alias "shop"' in assert_problem(refused, 409, "conflict")["detail"]
    assert_problem(http.delete("/v1/collections/shop"), 404, "unknown-collection")
    client.delete_alias("shop")
    assert_problem(http.get("/v1/aliases/shop"), 404, "unknown-alias")
    assert_problem(http.delete("/v1/aliases/shop"), 404, "unknown-alias")
    client.delete_collection("next")


def test_an_alias_that_cannot_be_is_refused(http):
    http.put("/v1/aliases/shop", json={"collection": "colours"})
    for alias, collection, status, kind in (
        ("colours", "colours", 409, "conflict"),
        ("other", "shop", 409, "conflict"),
        ("other", "nobody", 404, "unknown-collection"),
        ("a b", "colours", 422, "invalid-request"),
    ):
        response = http.put(f"/v1/aliases/{alias}", json={"collection": collection})
        assert_problem(response, status, kind)
    assert_problem(http.put("/v1/collections/shop", json={}), 409, "conflict")


def test_while_an_alias_is_switched_no_request_fails_and_the_old_collection_can_go(tmp_path, scale):
    with served(tmp_path) as http, Client(str(http.base_url)) as client:
        client.set_alias("shop", "colours")
        stop, answered, failures = threading.Event(), [0], []

        def ask() -> None:
            with httpx.Client(base_url=http.base_url, timeout=20) as own:
                while not stop.is_set():
                    response = own.post("/v1/collections/shop/search", json={"query": {"vector": VECTOR}})
                    answered[0] += 1
                    if response.status_code != 200:
                        failures.append(response.text)

        askers = [threading.Thread(target=ask) for _ in range(3)]
        for asker in askers:
            asker.start()
        previous = "colours"
        for number in range(3 * scale):
            following = f"v{number}"
            client.create_collection(following, kind="flat")
            client.put_item(following, "a", vector=VECTOR)
            client.set_alias("shop", following)
            client.delete_collection(previous)
            previous = following
        stop.set()
        for asker in askers:
            asker.join()
        assert answered[0] > 0
        assert failures == []


def test_a_collection_is_not_deleted_while_an_alias_is_switched_to_it(tmp_path, monkeypatch):
    with served(tmp_path) as http, Client(str(http.base_url)) as client:
        client.create_collection("next", kind="flat")
        deleted: list[httpx.Response] = []
        switch = Aliases.switch

        def slow(self: Aliases, *arguments) -> bool:
            address = f"{http.base_url}/v1/collections/next"
            deleting.append(
                threading.Thread(target=lambda: deleted.append(httpx.delete(address, timeout=20)))
            )
            deleting[0].start()
            deleting[0].join(0.5)
            return switch(self, *arguments)

        deleting: list[threading.Thread] = []
        monkeypatch.setattr(Aliases, "switch", slow)
        client.set_alias("shop", "next")
        deleting[0].join()
        assert 'alias "shop"' in assert_problem(deleted[0], 409, "conflict")["detail"]
        assert (client.aliases(), client.count("shop")) == ({"shop": "next"}, 0)


@contextmanager
def turning(folder: Path) -> Iterator[tuple[httpx.Client, Engine]]:
    """A service whose alias "shop" stands for another collection each time that anybody asks."""
    small, large = colour_collection(folder / "small", pictures=1), colour_collection(folder / "large")
    small.add([NewItem("x", np.ones(48, np.float32) / 48**0.5, image=jpeg("red", 1))])
    large.add([NewItem("x", np.ones(48, np.float32) / 48**0.5, image=jpeg("blue", 5))])
    engine = Engine({"small": small, "large": large}, [ColourEncoder()])
    with running(create_app(engine, state=folder / "state")) as address:
        meant = itertools.cycle(["small", "large"])
        engine.alias_of = lambda: {"shop": next(meant)}
        with httpx.Client(base_url=address, timeout=20) as http:
            yield http, engine
    engine.close()


def test_a_request_means_one_collection_though_its_alias_is_switched_meanwhile(tmp_path):
    with turning(tmp_path) as (http, engine):
        counts = {name: engine.count(name) for name in ("small", "large")}
        generations = {name: engine.info(name).generation for name in counts}
        for _ in range(4):
            shown = http.get("/v1/collections/shop").json()
            assert shown["count"] == counts[shown["name"]]
            assert shown["generation"] == generations[shown["name"]]
            picture = http.get("/v1/collections/shop/items/x/image")
            assert hashlib.sha256(picture.content).hexdigest()[:32] in picture.headers["etag"]
            engine.resolve("shop")  # the other way round
        for _ in range(4):
            said = http.post(
                "/v1/collections/shop/feedback", json={"query_id": "q", "id": "red/4", "relevant": True}
            )
            assert said.status_code in (202, 422), "only the large one has it"
            engine.resolve("shop")
        assert http.get("/v1/collections/small/feedback").text == ""


@pytest.mark.parametrize("size", ["full", "thumb"])
def test_a_picture_that_is_replaced_as_it_is_read_comes_with_its_own_tag(tmp_path, monkeypatch, size):
    engine = Engine({"colours": colour_collection(tmp_path / "colours", pictures=1)}, [ColourEncoder()])
    method = "picture" if size == "full" else "thumbnail"
    read, replaced = getattr(engine, method), []

    def replaced_before(name: str, id: str) -> bytes:
        if not replaced:
            replaced.append(engine.put(name, id, image=jpeg("gold", 3)))
        return read(name, id)

    monkeypatch.setattr(engine, method, replaced_before)
    with running(create_app(engine, state=tmp_path / "state")) as address:
        answer = httpx.get(f"{address}{PLACE}/items/red%2F0/image", params={"size": size})
    assert answer.content == read("colours", "red/0")
    assert hashlib.sha256(jpeg("gold", 3)).hexdigest()[:32] in answer.headers["etag"]
    engine.close()


def test_the_engine_answers_through_an_alias_by_itself(tmp_path):
    engine = Engine({"colours": colour_collection(tmp_path / "colours")}, [ColourEncoder()])
    engine.alias_of = lambda: {"shop": "colours", "lost": "gone"}
    assert engine.search("shop", Search(Query(id="red/0"))).collection == "colours"
    assert engine.place("shop") == str(tmp_path / "colours")
    engine.close()


def test_a_collection_that_is_made_carries_its_encoder_over_a_restart(tmp_path, tiny_encoder, tiny_folder):
    picture = next(tiny_folder.rglob("*.jpg"))
    arguments = ("--data", str(tmp_path / "data"), "--state", str(tmp_path / "state"))
    with serving(*arguments, "--encoder", str(tiny_encoder)) as (process, address), Client(address) as client:
        client.create_collection("shapes")
        client.put_item("shapes", "a", image=picture)
        process.terminate()
        process.wait(timeout=20)
    with serving(*arguments) as (_, address), Client(address) as client:
        assert client.search("shapes", image=picture).hits[0].score == pytest.approx(1.0, abs=1e-4)
        client.create_collection("more")
        assert np.isfinite(client.embed([picture]).vectors).all()
        assert [c.accepts for c in client.collections()] == [("image", "id", "vector")] * 2


def test_the_documented_change_of_an_encoder_runs(client, http):
    page = (Path(__file__).parent.parent / "docs" / "service.md").read_text(encoding="utf-8")
    _, example = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    adapted = example.replace("http://127.0.0.1:8000", str(http.base_url)).replace("shoes", "colours")
    exec(compile(adapted, "example", "exec"))
    assert client.aliases() == {"shop": "colours-2"}
    assert (client.count("shop"), client.collection("shop").index["kind"]) == (8, "hnsw")


# Feedback


def test_feedback_is_kept_and_given_out_as_lines(client, http):
    answer = client.search("colours", id="red/0", limit=2)
    for hit, relevant in zip(answer.hits, (True, False), strict=True):
        client.send_feedback("colours", answer.query_id, hit.id, relevant=relevant)
    response = http.get(f"{PLACE}/feedback")
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [(line["query_id"], line["id"], line["relevant"]) for line in lines] == [
        (answer.query_id, answer.hits[0].id, True),
        (answer.query_id, answer.hits[1].id, False),
    ]
    assert [judgement.relevant for judgement in client.feedback("colours")] == [True, False]
    unknown = {"query_id": "q", "id": "nobody", "relevant": True}
    assert_problem(http.post(f"{PLACE}/feedback", json=unknown), 422, "invalid-request")


def test_feedback_may_have_any_character_in_it(client):
    query = "one\u2028two\x85three\x0bfour"
    client.send_feedback("colours", query, "red/0", relevant=True)
    assert [judgement.query_id for judgement in client.feedback("colours")] == [query]


def test_feedback_is_exported_on_the_command_line(client, http, tmp_path):
    client.send_feedback("colours", "q1", "red/0", relevant=True)
    client.send_feedback("colours", "q1", "blue/0", relevant=False)

    def run(*further: str) -> subprocess.CompletedProcess[str]:
        asked = ["feedback", "colours", "--url", str(http.base_url), *further]
        command = [sys.executable, "-m", "dml.cli.main", *asked]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    shown = run()
    assert shown.returncode == 0, shown.stderr
    assert [json.loads(line)["relevant"] for line in shown.stdout.splitlines()] == [True, False]
    kept = run("--out", str(tmp_path / "feedback.jsonl"))
    assert "2 judgements of colours" in kept.stderr
    assert (tmp_path / "feedback.jsonl").read_text(encoding="utf-8") == shown.stdout
    refused = run("--out", str(tmp_path))
    assert refused.returncode == 2
    assert "cannot be written" in refused.stderr


def test_feedback_goes_with_its_collection(client):
    client.create_collection("next", kind="flat")
    client.put_item("next", "a", vector=VECTOR)
    client.send_feedback("next", "q", "a", relevant=True)
    client.delete_collection("next")
    client.create_collection("next", kind="flat")
    assert client.feedback("next") == []
