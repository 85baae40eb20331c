"""The measurement of filters measures: on a collection small enough for a test."""

import json

import numpy as np
import pytest

from eval.speed.__main__ import main
from eval.speed.filters import places, print_filters, speed_of_filters


def test_recall_and_speed_are_told_for_every_share_and_place():
    pytest.importorskip("faiss")
    said = []
    result = speed_of_filters(
        rows=600, dim=8, kinds=["flat", "ivf"], queries=8, shares=(0.05, 1.0), say=said.append
    )
    assert [table["kind"] for table in result["tables"]] == ["flat", "ivf"]
    for table in result["tables"]:
        assert len(table["rows"]) == 2 + 3 * 2
        few = [row for row in table["rows"] if row["name"].startswith("5.0%")]
        assert [(row["passing"], row["recall"], row["how"]) for row in few] == [(30, 1.0, "exact")] * 3
        assert all(0 < row["recall"] <= 1 and row["searches/s"] > 0 for row in table["rows"])
    text = print_filters(result)
    assert "ivf: 600 items of 8 numbers, recall@10" in text
    assert "5.0% far" in text
    assert json.loads(json.dumps(result))["rows"] == 600


def test_near_and_far_are_meant_from_the_point():
    vectors = np.eye(4, dtype=np.float32)
    payloads = places(vectors, np.array([0.1, 0.9, 0.3, 0.2], np.float32), np.random.default_rng(0))
    assert [payload["near"] for payload in payloads] == [3, 0, 1, 2]
    assert [payload["far"] for payload in payloads] == [0, 3, 2, 1]
    assert sorted(payload["anywhere"] for payload in payloads) == [0, 1, 2, 3]


def test_the_command_takes_vectors_from_a_file(tmp_path, capsys):
    rows = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    np.save(tmp_path / "v.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    out = tmp_path / "filters.json"
    arguments = ["filters", "--kinds", "flat", "--vectors", str(tmp_path / "v.npy"), "--repeats", "20"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == 280
    assert "more than 0.02 of recall lost: nowhere" in capsys.readouterr().out
