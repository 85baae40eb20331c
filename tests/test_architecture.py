"""Imports point down. This file is the drawing of the house; change it on purpose."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"dml.errors"},
    {
        "dml.registry",
        "dml.config",
        "dml.devices",
        "dml.imaging",
        "dml.stages",
        "dml.startup",
        "dml.storage",
        "dml.checksums",
    },
    {"dml.data", "dml.losses", "dml.models", "dml.index", "dml.metrics", "dml.client"},
    {"dml.encoder"},
    {"dml.collection"},
    {"dml.training"},
    {"service", "eval"},
    {"dml.cli"},
    {"dml.__main__"},
]
HEIGHT = {name: floor for floor, names in enumerate(FLOORS) for name in names}
NEVER = {"service": {"dml.training", "dml.losses", "dml.models"}}  # the serving image ships without them
SOURCES = [path for top in ("dml", "service", "eval") for path in sorted((ROOT / top).rglob("*.py"))]


def dotted(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def home(module: str) -> str | None:
    """dml.losses.triplet -> dml.losses; service.app -> service; dml itself -> dml; numpy -> None."""
    parts = module.split(".")
    if parts[0] not in ("dml", "service", "eval"):
        return None
    return next((n for n in (".".join(parts[:2]), parts[0]) if n in HEIGHT), module)


def imports(source: Path) -> set[str]:
    """Every module that a file imports: `import x`, `from x import y`, and relative forms."""
    package = dotted(source).split(".")
    if source.name != "__init__.py":
        package = package[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from dml import losses" names a package by its last word
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "dml" else {module}
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(source: Path) -> None:
    here = home(dotted(source))
    if here == "dml":
        assert not any(home(m) for m in imports(source)), "dml/__init__.py imports nothing of ours"
        return
    assert here in HEIGHT, f"{dotted(source)} has no floor: add it to FLOORS"
    for module in imports(source):
        there = home(module)
        if there is None or there == here or module == "dml.__version__":
            continue
        assert there in HEIGHT, f"{dotted(source)} imports {module}, which has no floor"
        assert HEIGHT[there] < HEIGHT[here], f"{dotted(source)} imports {module} from a floor not below"
        assert there not in NEVER.get(here, ()), f"{here} must not import {there}"


def loads(statement: str) -> set[str]:
    """The top-level packages in memory after a statement, in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(out.stdout.split())


HEAVY = {"torch", "faiss", "torchvision", "timm", "sklearn", "matplotlib", "onnxruntime"}
LIGHT = [
    "import dml",
    "import dml.errors, dml.registry",
    "import dml.cli.main",
    "import dml.config",
    "import dml.imaging",
    "import dml.storage",
]
TORCH_FREE = [
    "import dml.metrics",
    "import dml.index",
    "import dml.collection",
    "import dml.client",
    "import dml.data",
    "import dml.data.table",
    "import dml.encoder",
    "import dml.encoder.preprocess",
    "import service.app",
]


@pytest.mark.parametrize("statement", LIGHT)
def test_the_ground_floor_loads_nothing_heavy(statement: str) -> None:
    assert not loads(statement) & HEAVY


@pytest.mark.parametrize("statement", TORCH_FREE)
def test_serving_loads_no_torch(statement: str) -> None:
    assert "torch" not in loads(statement)


@pytest.mark.parametrize("order", ["torch, faiss", "faiss, torch"])
def test_torch_and_faiss_live_together_in_either_order(order: str) -> None:
    """Both bring an OpenMP runtime; the wrong pair of builds crashes on the first threaded call."""
    pytest.importorskip("torch")
    pytest.importorskip("faiss")
    code = f"""
import {order}
import numpy as np
x = np.random.default_rng(0).normal(size=(2000, 64)).astype("float32")
index = faiss.IndexFlatIP(64)
index.add(x)
scores, ids = index.search(x[:200], 1)
product = torch.from_numpy(x) @ torch.from_numpy(x).T
assert (ids[:, 0] == np.argmax(product[:200].numpy(), 1)).all()
print("fine")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "fine", out.stderr


def test_no_file_of_ours_is_called_utils() -> None:
    assert not [p for p in SOURCES if p.stem in ("utils", "util", "common", "misc", "helpers")]
