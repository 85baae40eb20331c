"""The speed table of ingest runs from end to end, and refuses a contender that makes other vectors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision")

from eval.speed import ingest
from eval.speed.race import Disagreement

ROOT = Path(__file__).parent.parent


def test_the_table_has_ours_by_profile_and_both_loops(
    tiny_folder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ingest.json"
    command = [sys.executable, "-m", "eval.speed", "ingest", "--data", str(tiny_folder)]
    settings = ["--encoder", str(tiny_encoder), "--images", "24", "--repeats", "1", "--threads", "1"]
    done = subprocess.run(
        [*command, *settings, "--out", str(out)], capture_output=True, text=True, cwd=ROOT, timeout=250
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert {"dml pillow/onnx-f32", "dml fused/onnx-f32", "usual loop", "naive loop"} <= set(rows)
    usual = rows["usual loop"]
    for row in rows.values():
        assert row["images/s"] > 0
        assert row["x usual"] == pytest.approx(row["images/s"] / usual["images/s"])
        assert row["cosine p1"] is None or row["cosine p1"] >= ingest.LEAST_COSINE
    assert 0 < rows["dml pillow/onnx-f32"]["embed"] < 1
    assert (found["machine"]["threads"], found["pictures"], found["trained"]) == ("1", 24, True)
    assert "x usual" in done.stdout


def test_other_vectors_are_no_contender() -> None:
    rng = np.random.default_rng(0)
    right = rng.standard_normal((200, 8)).astype(np.float32)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    ingest.check_vectors({"same": right, ingest.USUAL: right})
    wrong = right.copy()
    wrong[:4] = -wrong[:4]
    for vectors in (wrong, right[:-1]):
        with pytest.raises(Disagreement, match='"wrong" ma'):
            ingest.check_vectors({"wrong": vectors, ingest.USUAL: right})
