"""The table of searches: all contenders reach the recall that they are raced at, or are said not to."""

import json

import numpy as np
import pytest

pytest.importorskip("faiss")

from eval.speed import search
from eval.speed.__main__ import main


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(search, "TUNING", 60)
    monkeypatch.setattr(search, "SCORING", 60)
    monkeypatch.setattr(search, "TIMED", 4)


def run(tmp_path, capsys, *arguments):
    out = tmp_path / "search.json"
    assert main(["search", "--repeats", "1", "--out", str(out), *arguments]) == 0
    return json.loads(out.read_text()), capsys.readouterr().out


def test_everyone_is_raced_at_equal_recall(few, tmp_path, capsys):
    only = ["--only", "faiss", "hnswlib", "usearch f32", "dml HNSW16, float32", "dml HNSW16, int8"]
    found, printed = run(tmp_path, capsys, "--rows", "1500", "--dim", "16", "--targets", "0.9", "1.0", *only)
    low, high = found["targets"]
    rows = {row["name"]: row for row in low["rows"]}
    assert {"faiss Flat", "faiss HNSW32", "hnswlib M16", "usearch f32"} <= set(rows)
    for row in rows.values():
        if not row.get("problem"):
            assert row["recall"] >= 0.8
            assert min(row["single"], row["batch 64"], row["MB"]) > 0
    assert rows["faiss Flat"]["recall"] == 1.0
    assert rows["dml HNSW16, int8"]["MB"] < rows["dml HNSW16, float32"]["MB"]
    assert {row["name"]: row for row in high["rows"]}["dml HNSW16, int8"]["problem"] == "stays below recall 1"
    assert "x as many single queries as" in printed
    assert "left out: stays below recall 1" in printed


def test_vectors_come_from_a_file_and_the_collection_s_overhead_is_told(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "contenders", lambda *_, **__: {"faiss Flat": search.faiss_flat})
    np.save(tmp_path / "rows.npy", search.drawn(1300, 8))
    arguments = ["--rows", "1000", "--targets", "0.9", "--vectors", str(tmp_path / "rows.npy")]
    found, printed = run(tmp_path, capsys, *arguments)
    assert (found["rows"], found["dim"], found["vectors"]) == (1000, 8, "rows.npy")
    assert found["overhead"]["collection ms"] > 0
    assert "ms as a collection" in printed
    np.save(tmp_path / "few.npy", search.drawn(100, 8))
    assert main(["search", "--vectors", str(tmp_path / "few.npy"), "--repeats", "1"]) == 3
    assert "wanted are at least" in capsys.readouterr().err


def test_the_least_effort_is_the_least():
    class Stepwise:
        """Right from effort 37 on."""

        nbytes = 1
        efforts = (1, 1000)

        def search(self, queries, effort):
            return true_ids if effort >= 37 else np.full_like(true_ids, -1)

    rows = search.drawn(300, 8)
    asked = search.asked_of(rows[:5], [(np.arange(290), rows[10:])])
    true_ids = asked.true_ids[:, :10]
    found = search.least_effort(Stepwise(), asked, 0.99)
    assert found is not None
    assert 37 <= found <= 39
