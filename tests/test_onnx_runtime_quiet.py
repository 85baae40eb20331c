"""ONNX Runtime keeps no diary of what it is used for."""

import os
import subprocess
import sys
from pathlib import Path


def test_an_encoder_leaves_nothing_in_the_home_folder(tmp_path: Path, tiny_encoder: Path) -> None:
    code = (
        "import sys, numpy; from dml.encoder import Encoder; "
        "Encoder.load(sys.argv[1], runtime='onnx').embed_arrays(numpy.zeros((1, 3, 32, 32), 'f4'))"
    )
    home = tmp_path / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_encoder)],
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()] == []
