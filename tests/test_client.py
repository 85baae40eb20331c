"""The typed client against a real server."""

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import ColourEncoder, colour_collection, jpeg, running

from dml.client import Client, Problem
from dml.errors import ServiceError, UsageError
from service.app import create_app
from service.engine import Engine


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    collection = colour_collection(tmp_path_factory.mktemp("collections") / "colours")
    engine = Engine({"colours": collection}, [ColourEncoder()])
    with running(create_app(engine)) as address, Client(address + "/") as client:
        client.wait_until_ready(10)
        yield client
    engine.close()


def test_searches_by_bytes_file_id_vector_and_examples(client: Client, tmp_path: Path):
    picture = jpeg("blue", 2)
    file = tmp_path / "mine.jpg"
    file.write_bytes(picture)
    for answer in (
        client.search("colours", image=picture, limit=3),
        client.search("colours", image=file, limit=3),
        client.search("colours", vector=client.embed([picture]).vectors[0], limit=3, exact=True),
    ):
        assert answer.hits[0].id == "blue/2"
        assert answer.hits[0].label == "blue"
        assert answer.hits[0].payload["price"] == 2
        assert (answer.total, answer.approximate) == (20, False)
    by_id = client.search("colours", id="blue/2", limit=3, with_vector=True)
    assert "blue/2" not in [hit.id for hit in by_id.hits]
    assert by_id.hits[0].vector is not None
    assert by_id.hits[0].vector.shape == (48,)
    assert [h.id for h in client.similar("colours", "blue/2", limit=3).hits] == [h.id for h in by_id.hits]
    mixed = client.search("colours", image=picture, positive=["red/0"], negative=["gold/0"], limit=20)
    assert not {"red/0", "gold/0"} & {hit.id for hit in mixed.hits}


def test_the_documented_example_runs(client: Client, tmp_path: Path, capsys, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "service.md").read_text(encoding="utf-8")
    example, *_ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "mine.jpg").write_bytes(jpeg("green", 3))
    monkeypatch.chdir(tmp_path)
    exec(
        compile(
            example.replace("http://127.0.0.1:8000", client.url).replace("shoes", "colours"),
            "example",
            "exec",
        )
    )
    shown = capsys.readouterr().out
    assert "green/3" in shown
    assert "404 unknown-item" in shown


def test_many_vectors_are_asked_in_batches(client: Client):
    items = list(client.items("colours", with_vector=True, page=7))
    assert len(items) == 20
    vectors = np.stack([item.vector for item in items if item.vector is not None])
    answers = client.search_vectors("colours", vectors, limit=1, batch=6)
    assert [answer.hits[0].id for answer in answers] == [item.id for item in items]
    with pytest.raises(Problem) as caught:
        client.search_vectors("colours", vectors[:, :5])
    assert caught.value.type == "dimension-mismatch"


def test_items_live_their_whole_life(client: Client):
    for id in ("new/one", "..", "50% off?"):
        written = client.put_item("colours", id, image=jpeg("red", 6), payload={"label": "red", "size": 1})
        assert written.created
        assert client.get_item("colours", id).payload == {"label": "red", "size": 1}
        assert client.update_payload("colours", id, {"size": None}).payload == {"label": "red"}
        assert client.image("colours", id) == jpeg("red", 6)
        assert client.image("colours", id, size="thumb")[:2] == b"\xff\xd8"
        client.delete_item("colours", id)
        with pytest.raises(Problem) as caught:
            client.get_item("colours", id)
        assert (caught.value.status, caught.value.type) == (404, "unknown-item")
        assert id in caught.value.detail
        assert caught.value.request_id in str(caught.value)
    client.put_item("colours", "v", vector=np.ones(48))
    assert client.count("colours") == 21
    assert client.delete_items("colours", ["v", "w"]) == 1


def test_what_there_is(client: Client):
    [listed] = client.collections()
    full = client.collection("colours")
    assert (listed.name, listed.count, listed.generation) == ("colours", 20, None)
    assert full.index is not None
    assert full.capabilities is not None
    assert (full.name, full.generation is not None, full.read_only) == ("colours", True, False)
    [model] = client.models()
    assert (model.fingerprint, model.collections) == (ColourEncoder.fingerprint, ("colours",))
    assert client.ready()


def test_a_problem_is_a_service_error_with_the_services_words(client: Client):
    with pytest.raises(ServiceError, match=r"415 unsupported-media.*not a picture"):
        client.search("colours", image=b"text")
    with pytest.raises(Problem, match="There is: colours"):
        client.collection("shoes")


def test_what_cannot_be_sent_is_told_before(client: Client, tmp_path: Path):
    with pytest.raises(UsageError, match="cannot be read"):
        client.search("colours", image=tmp_path / "missing.jpg")
    with pytest.raises(UsageError, match="finite"):
        client.search("colours", vector=[np.nan] * 48)
    with pytest.raises(UsageError, match="either an image or a vector"):
        client.put_item("colours", "x")
    with pytest.raises(UsageError, match="starts with http"):
        Client("localhost:8000")


def test_nobody_there_is_a_service_error():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(ServiceError, match="cannot be reached.*dml serve"):
            client.collections()
        with pytest.raises(ServiceError, match=r"not ready after 0\.2 seconds"):
            client.wait_until_ready(0.2)


@pytest.mark.parametrize("status", [b"200 OK", b"502 Bad Gateway"])
def test_an_answer_of_somebody_else_is_told(status: bytes):
    """A server that speaks HTTP, but is no service of ours."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            wire, _ = listening.accept()
            with wire:
                wire.recv(65536)
                wire.sendall(b"HTTP/1.1 %s\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello" % status)

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with Client(address) as client, pytest.raises(ServiceError, match="dml service"):
            client.collections()
        thread.join(10)


def test_no_answer_in_time_is_told():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
        with client, pytest.raises(ServiceError, match="no answer in time"):
            client.collections()


def test_the_key_is_sent_as_a_bearer_token():
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            wire, _ = listening.accept()
            with wire:
                asked.append(wire.recv(65536))
                body = b'{"items": [], "next_cursor": null}'
                wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        thread = threading.Thread(target=answer)
        thread.start()
        with Client(f"http://127.0.0.1:{listening.getsockname()[1]}", key="secret") as client:
            assert client.collections() == []
        thread.join(10)
    assert b"authorization: bearer secret" in asked[0].lower()
