"""The table of searches: all contenders reach the recall that they are raced at, or are said not to."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("faiss")

from dml.data.table import open_table
from eval.speed import embeddings, search, search_rivals
from eval.speed.__main__ import command_of, main
from eval.speed.page import speed_section


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(search, "QUERIES", 120)
    monkeypatch.setattr(search, "TIMED", 4)


def run(tmp_path, capsys, *arguments):
    out = tmp_path / "search.json"
    assert main(["search", "--repeats", "1", "--out", str(out), *arguments]) == 0
    return json.loads(out.read_text()), capsys.readouterr().out


def page_of(tmp_path, found):
    """A folder of results with this one."""
    folder = tmp_path / "results" / "speed"
    folder.mkdir(parents=True)
    (folder / "search-small.json").write_text(json.dumps(found))
    return tmp_path / "results"


def test_everyone_is_raced_at_equal_recall(few, tmp_path, capsys):
    only = ["--only", "faiss", "hnswlib", "usearch f32", "dml HNSW16, float32", "dml HNSW16, int8"]
    found, printed = run(tmp_path, capsys, "--rows", "1500", "--dim", "16", "--targets", "0.9", "1.0", *only)
    low, high = found["targets"]
    rows = {row["name"]: row for row in low["rows"]}
    assert {"faiss Flat", "faiss HNSW32", "hnswlib M16", "usearch f32"} <= set(rows)
    for row in rows.values():
        if not row.get("problem"):
            assert row["recall"] >= 0.9
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
    assert {(row["kind"], row["queries"], row["payload"]) for row in found["overhead"]} == {
        (kind, queries, payload)
        for kind in ("hnsw", "faiss_flat")
        for queries in ("single", "batch")
        for payload in (False, True)
    }
    assert all(row["collection ms"] > 0 for row in found["overhead"])
    assert "hnsw, single, with payloads" in printed
    assert printed.strip() in speed_section(page_of(tmp_path, found))
    np.save(tmp_path / "few.npy", search.drawn(100, 8))
    assert main(["search", "--vectors", str(tmp_path / "few.npy"), "--repeats", "1"]) == 3
    assert "wanted are at least" in capsys.readouterr().err


def test_queries_beside_the_vectors_are_used_and_what_was_built_is_kept(few, tmp_path, capsys):
    rows = search.drawn(820, 8)
    np.save(tmp_path / "rows.npy", rows[:700])
    np.save(tmp_path / "rows.queries.npy", rows[700:])
    arguments = ["--rows", "600", "--targets", "0.9", "--vectors", str(tmp_path / "rows.npy")]
    arguments += ["--keep", str(tmp_path / "kept"), "--only", "faiss Flat", "hnswlib", "dml HNSW16, int12"]
    first, _ = run(tmp_path, capsys, *arguments)
    again, printed = run(tmp_path, capsys, *arguments)
    assert (first["rows"], first["overhead"]) == (600, [])
    told = ("name", "MB", "build s", "effort", "recall")
    tables = [[{t: row.get(t) for t in told} for row in ran["targets"][0]["rows"]] for ran in (first, again)]
    assert tables[0] == tables[1]
    assert sum(row["MB"] is not None for row in tables[0]) >= 2  # hnswlib is not installed everywhere
    assert "ours within half the memory" in printed
    np.save(tmp_path / "rows.queries.npy", rows[700:, :4])
    assert main(["search", *arguments, "--repeats", "1"]) == 3
    assert "wanted are 120 queries" in capsys.readouterr().err


def test_who_cannot_take_part_is_named_with_the_reason(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search_rivals, "MILVUS_ROWS", 100)
    arguments = [
        "--rows",
        "300",
        "--dim",
        "8",
        "--targets",
        "0.9",
        "--only",
        "autofaiss",
        "Milvus",
        "faiss Flat",
    ]
    _, printed = run(tmp_path, capsys, *arguments)
    assert "no environment with autofaiss was named" in printed
    assert "filling it with more than 100 rows takes too long" in printed
    _, printed = run(tmp_path, capsys, *arguments, "--autofaiss", str(tmp_path / "nowhere"))
    assert "nowhere cannot be run: No such file" in printed


def test_embeddings_are_cuts_of_pictures_and_queries_are_cuts_of_others(tmp_path, capsys, tiny_encoder):
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    for number in range(120):
        pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:03}.png")
    arguments = ["embeddings", "--data", str(tmp_path), "--encoder", str(tiny_encoder), "--rows", "250"]
    assert main([*arguments, "--vectors", str(tmp_path / "v.npy")]) == 0
    rows, queries = np.load(tmp_path / "v.npy"), np.load(tmp_path / "v.queries.npy")
    assert (len(rows), len(queries)) == (250, 12)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert len(np.unique(rows, axis=0)) > 240  # two cuts of a picture are two vectors
    indexed, asked = embeddings.apart(open_table(tmp_path).records, seed=0)
    assert not {record.path for record in indexed} & {record.path for record in asked}
    assert main(["embeddings", "--data", str(tmp_path)]) != 0
    assert "embeddings needs" in capsys.readouterr().err


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


def test_a_result_tells_the_command_that_made_it_without_anybody_s_folders(tmp_path):
    given = [
        "search",
        "--vectors",
        "/home/me/photos.npy",
        "--keep",
        "/tmp/b",
        "--only",
        "dml PQ",
        "--out",
        "x.json",
    ]
    assert command_of(given) == "python -m eval.speed search --vectors photos.npy --only 'dml PQ'"
    given = ["service", "--profiles", "fused/openvino-bf16", "--data=/home/me/photos", "--out=x.json"]
    assert command_of(given) == "python -m eval.speed service --profiles fused/openvino-bf16 --data photos"
    assert speed_section(tmp_path) == ""
