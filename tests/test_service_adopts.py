"""Collections that are built beside a running service, and opened by it without a restart."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import ColourEncoder, colour_collection, running
from test_service import assert_problem
from test_service_run import serving

from dml.client import Client
from service.app import create_app
from service.engine import Engine
from service.folders import Folder
from service.settings import Settings


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def http(tmp_path: Path, data: Path) -> Iterator[httpx.Client]:
    engine = Engine({}, [ColourEncoder()], folder=Folder(data))
    app = create_app(engine, state=tmp_path / "state")
    with running(app) as address, httpx.Client(base_url=address, timeout=20) as http:
        yield http
    engine.close()


def test_a_collection_that_was_put_into_the_folder_is_opened_once(http, data):
    colour_collection(data / "colours", pictures=2).close()
    assert http.get("/v1/collections").json()["items"] == []
    first = http.put("/v1/collections/colours", json={})
    assert (first.status_code, first.json()["count"]) == (200, 8)
    vector = [1.0] * 48
    hits = http.post("/v1/collections/colours/search", json={"query": {"vector": vector}}).json()["hits"]
    assert len(hits) == 8
    written = http.put("/v1/collections/colours/items/new", json={"vector": vector})
    assert written.status_code == 201
    for again in ({}, {"index": {"kind": "flat"}}):
        assert http.put("/v1/collections/colours", json=again).json()["count"] == 9


def test_it_is_opened_with_the_settings_that_it_has_or_not_at_all(http, data):
    colour_collection(data / "colours", pictures=1).close()
    assert_problem(http.put("/v1/collections/colours", json={"dim": 3}), 409, "conflict")
    http.put("/v1/collections/shop-1", json={})
    http.put("/v1/aliases/shop", json={"collection": "shop-1"})
    colour_collection(data / "shop", pictures=1).close()
    assert_problem(http.put("/v1/collections/shop", json={}), 409, "conflict")
    colour_collection(data / "before", pictures=1).close()
    (data / "before").rename(data / "after")
    detail = http.put("/v1/collections/after", json={}).json()["detail"]
    assert "dml index rename" in detail
    # Refused, and let go: the advice can be followed while the service runs.
    subprocess.run(
        [sys.executable, "-m", "dml.cli.main", "index", "rename", str(data / "after"), "after"], check=True
    )
    assert http.put("/v1/collections/after", json={}).json()["count"] == 4


def test_a_service_that_only_reads_makes_none(tmp_path, data):
    colour_collection(data / "colours", pictures=1).close()
    engine = Engine({}, settings=Settings(read_only=True), folder=Folder(data))
    app = create_app(engine, state=tmp_path / "state")
    with running(app) as address:
        assert_problem(httpx.put(f"{address}/v1/collections/new", json={"dim": 3}), 403, "read-only")
        found = httpx.put(f"{address}/v1/collections/colours", json={}).json()
        assert (found["count"], found["read_only"]) == (4, True)
        item = httpx.put(f"{address}/v1/collections/colours/items/a", json={"vector": [1.0] * 48})
        assert_problem(item, 403, "read-only")
    engine.close()


def test_another_encoder_takes_over_without_a_restart(tmp_path, data, tiny_encoder, tiny_folder):
    """The second collection is built by the command, with an encoder that the service has never seen."""
    torch = pytest.importorskip("torch")
    from dml.config import ModelConfig
    from dml.encoder.artifact import save_encoder
    from dml.encoder.preprocess import Preprocess
    from dml.models import build_model

    torch.manual_seed(1)
    config = ModelConfig(dim=24)
    model = build_model(config, image_size=32).eval()
    mean, std = model.input_stats
    other = tmp_path / "other"
    preprocess = Preprocess(size=32, fit="squash", mean=mean, std=std)
    save_encoder(model, preprocess, other, provenance={}, model_config=config, image_size=32)

    def build(encoder: Path, name: str) -> None:
        command = ["index", "build", str(tiny_folder), "--encoder", str(encoder), "--out", str(data / name)]
        done = subprocess.run(
            [sys.executable, "-m", "dml.cli.main", *command],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr

    build(tiny_encoder, "shapes-1")
    picture = next(tiny_folder.rglob("*.jpg"))
    arguments = ("--data", str(data), "--state", str(tmp_path / "state"))
    with serving(*arguments) as (_, address), Client(address) as client:
        client.set_alias("shop", "shapes-1")
        before = client.search("shop", image=picture)
        build(other, "shapes-2")
        client.create_collection("shapes-2")
        client.set_alias("shop", "shapes-2")
        after = client.search("shop", image=picture)
        assert (before.collection, after.collection) == ("shapes-1", "shapes-2")
        assert after.hits[0].score == pytest.approx(1, abs=1e-4)
        assert before.model != after.model
        assert {model.dim for model in client.models()} == {16, 24}
        assert np.isfinite(client.embed([picture], model=after.model).vectors).all()
