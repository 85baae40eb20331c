"""The table of the service runs from end to end: all servers answer, the same, and the goals are reckoned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("faiss")
pytest.importorskip("fastapi")

from eval.speed import service

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(900)
def test_the_table_has_ours_and_both_endpoints(tiny_folder: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """A profile that nobody has measured on enough pictures is refused by the service, and left out."""
    out = tmp_path / "service.json"
    command = [sys.executable, "-m", "eval.speed", "service", "--data", str(tiny_folder), "--rows", "200"]
    settings = ["--encoder", str(tiny_encoder), "--images", "32", "--repeats", "1", "--seconds", "0.5"]
    settings += ["--clients", "1", "32", "--profiles", "pillow/onnx-f32", "fused/onnx-f32"]
    done = subprocess.run(
        [*command, *settings, "--out", str(out)], capture_output=True, text=True, cwd=ROOT, timeout=850
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    ours = "dml pillow/onnx-f32"
    servers = {server["name"]: server for server in found["servers"]}
    assert set(servers) == {ours, service.COMPETENT, service.NAIVE}
    for server in servers.values():
        assert (server["top-1 equal"], server["overlap@10"]) == (1.0, 1.0), server
        assert server["first answer"] > 0
        assert not server["torch"]
    assert [row["name"] for row in found["refused"]] == ["dml fused/onnx-f32"]
    assert "at least 1,000 are needed" in found["refused"][0]["problem"]
    assert [group["clients"] for group in found["clients"]] == [1, 32]
    for group in found["clients"]:
        rows = {row["name"]: row for row in group["rows"]}
        assert set(rows) == set(servers)
        for row in rows.values():
            assert row["errors"] == 0
            assert row["answers"] > 0
            assert 0 < row["p50"] <= row["p99"]
        assert rows[service.NAIVE]["x naive"] in (1.0, None)
    assert len(found["goals"]) == 6
    assert found["goals"][0]["server"] == ours
    for printed in ("x competent", "first answer", "left out: ", "wanted >= 6"):
        assert printed in done.stdout


def test_answers_are_compared_as_sets_and_ties_are_the_same() -> None:
    truth = {0: [["a", 0.9], ["b", 0.9], ["c", 0.5]], 1: [["a", 0.9], ["b", 0.8], ["c", 0.5]]}
    same = {0: [["b", 0.9], ["a", 0.9], ["c", 0.5]], 1: truth[1]}
    assert service.compared(truth, same) == (1.0, 1.0)
    other = {0: truth[0], 1: [["b", 0.9], ["a", 0.8], ["x", 0.5]]}
    assert service.compared(truth, other) == (0.5, pytest.approx(5 / 6))
    assert service.compared(truth, {}) is None


def test_further_vectors_are_near_those_of_the_pictures(tiny_folder: Path) -> None:
    import numpy as np

    rows = np.eye(4, 32, dtype=np.float32)
    found = service.filled(rows, 100)
    assert found.shape == (100, 32)
    np.testing.assert_array_equal(found[:4], rows)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    nearest = (found[4:] @ rows.T).max(axis=1)
    assert 0.9 < nearest.min() < nearest.max() < 0.9999


@pytest.mark.timeout(600)
def test_memory_is_measured_of_a_service_with_so_many_vectors() -> None:
    pytest.importorskip("torch")
    found = service.memory_of_service(rows=300, dim=16, size=32, seconds=0.5, say=lambda line: None)
    assert (found["rows"], found["dim"], found["torch"]) == (300, 16, False)
    if sys.platform == "linux":
        assert 30e6 < found["start"] < found["peak"] < 2e9
        assert found["after uploads"] <= found["peak"]
