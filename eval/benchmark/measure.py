"""One run: train on a fold, choose the weights on its validation classes, and note figures and cost."""

import ctypes
import gc
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import dml.errors
from dml.config import Recipe, recipe_tree
from dml.data.table import Record
from dml.errors import TrainingDiverged
from dml.metrics import retrieval_metrics
from eval.benchmark.baselines import baseline_vectors
from eval.benchmark.folds import Pictures, fold_manifest
from eval.benchmark.results import Item, Result
from eval.benchmark.suite import Kind, Suite, digest_of

KS = (1, 2, 4, 8)
FIGURES = ("map_at_r", "r_precision", *(f"recall_at_{k}" for k in KS))
TRIAL_SEED = 1000
"""Seeds of tuning runs begin here, apart from those of the full runs."""

Report = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class Bench:
    """Everything that runs of a suite have in common."""

    suite: Suite
    pictures: Pictures
    work: Path  # WORK/SUITE: manifests, checkpoints, encoders
    weights: Path | None = None
    """Of the trunk that all rows begin with; see `eval.benchmark.trunk`."""
    trunk: str = ""
    """Its fingerprint."""

    @property
    def settings(self) -> dict[str, Any]:
        return self.suite.settings(self.pictures.digest, self.pictures.folds.digest)


def measure(bench: Bench, item: Item, parameters: Mapping[str, Any], report: Report) -> Result:
    """Do one run and say everything about it that a result file holds.

    A run whose loss or weights stop being numbers is a result too: its figures are 0 and it says why.

    Raises:
        DmlError: the run cannot be done at all.
    """
    suite, row = bench.suite, bench.suite.rows[item.row]
    recipe = run_recipe(bench, item, parameters)
    folder = run_folder(bench, item, recipe)
    reset_peak()
    began, began_cpu = time.monotonic(), time.process_time()
    failure = ""
    try:
        if row.kind == "trained":
            found = train_run(recipe, folder, report, keep=item.phase == "seed")
        else:
            found = untrained_run(bench, item, recipe, row.kind)
    except TrainingDiverged as error:
        failure = str(error)
        found = {"figures": dict.fromkeys(FIGURES, 0.0), "step": 0}
    seconds = found.pop("seconds", time.monotonic() - began)
    if item.phase == "trial":
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "suite": suite.name,
        "row": item.row,
        "phase": item.phase,
        "number": item.number,
        "fold": item.fold,
        "seed": recipe.train.seed,
        "parameters": dict(parameters),
        **found,
        **({"failure": failure} if failure else {}),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - began_cpu, 2),
        "peak_memory": peak_memory(),
        **identity(bench, item.row, recipe),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def run_recipe(bench: Bench, item: Item, parameters: Mapping[str, Any]) -> Recipe:
    """The recipe of a run, its manifest written."""
    protocol = bench.suite.protocol
    name = f"fold-{item.fold}-{bench.pictures.folds.digest[:8]}.csv"
    manifest = fold_manifest(bench.pictures, item.fold, bench.work / "folds" / name)
    trial = item.phase == "trial"
    return bench.suite.recipe(
        item.row,
        parameters,
        seed=TRIAL_SEED + item.fold if trial else item.number,
        share=protocol.trial_share if trial else 1.0,
        source=str(manifest),
        weights=str(bench.weights or ""),
    )


def identity(bench: Bench, row: str, recipe: Recipe) -> dict[str, Any]:
    """What the figures of a run belong to: recipe, settings, data, code, versions and machine."""
    tree = portable_tree(bench, recipe)
    return {
        "recipe": tree,
        "recipe_digest": digest_of(tree),
        "settings": bench.settings,
        "settings_digest": digest_of(bench.settings),
        "row_digest": bench.suite.row_digest(row),
        "data_digest": bench.pictures.digest,
        "folds_digest": bench.pictures.folds.digest,
        **({"trunk": bench.trunk} if bench.trunk else {}),
        "code": code_digests(),
        "environment": environment_of(recipe),
    }


def portable_tree(bench: Bench, recipe: Recipe) -> dict[str, Any]:
    """A recipe without the paths of this machine, which say nothing elsewhere."""
    tree = recipe_tree(recipe)
    tree["data"]["source"] = ""
    if bench.weights is not None:
        tree["model"]["weights"] = ""
    return tree


def run_folder(bench: Bench, item: Item, recipe: Recipe) -> Path:
    """Where a run keeps checkpoints and its encoder. Another recipe, other pictures or other code: another
    folder, so that an interrupted run never goes on with what it was not begun with."""
    tree = portable_tree(bench, recipe)
    origin = [bench.pictures.digest, bench.pictures.folds.digest, *([bench.trunk] if bench.trunk else [])]
    mark = digest_of([tree, *origin, code_digests()["all"]])
    return bench.work / item.row / f"{item.name}-{mark[:8]}"


def train_run(recipe: Recipe, folder: Path, report: Report, *, keep: bool) -> dict[str, Any]:
    """Train, going on from a checkpoint that a killed process left.

    Args:
        keep: also write the encoder; without it the run ends at its last evaluation.
    """
    from dml.training.loop import Step
    from dml.training.run import Evaluated, Event, Finished, Started, train

    began = time.monotonic()
    preparation, trained, total = 0.0, 0.0, 0
    encoder: dict[str, Any] = {}
    with closing(cast(Generator[Event], train(recipe, folder, resume=True))) as events:
        for event in events:
            if isinstance(event, Started):
                preparation, total = time.monotonic() - began, event.total_steps
            elif isinstance(event, Step) and event.number % 10 == 0:
                report(event.number, total)
            elif isinstance(event, Evaluated) and not keep and event.step == total:
                break
            elif isinstance(event, Finished):
                encoder = {"encoder": fingerprint_of(event.encoder)}
    step, figures, trained = best_of_log(folder / "metrics.jsonl")
    for leftover in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    return {
        "figures": figures,
        "step": step,
        "steps": total,
        **encoder,
        # Exporting the encoder is left out: it is no part of what a method costs.
        "seconds": preparation + trained,
    }


def best_of_log(path: Path) -> tuple[int, dict[str, float], float]:
    """Step and figures of the first best MAP@R in a run's log, and the seconds that the run trained."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    looks = [line for line in lines if "validation" in line]
    best = max(looks, key=lambda line: (line["validation"]["map_at_r"], -line["step"]))
    figures = {name: float(best["validation"][name]) for name in FIGURES}
    return best["step"], figures, float(looks[-1]["seconds"])


def fingerprint_of(encoder: Path) -> str:
    """The fingerprint in an encoder's manifest."""
    return json.loads((encoder / "manifest.json").read_text(encoding="utf-8"))["fingerprint"]


def untrained_run(bench: Bench, item: Item, recipe: Recipe, kind: Kind) -> dict[str, Any]:
    """Figures of the validation fold without training."""
    train, validation = bench.pictures.fold(item.fold)
    rows, vectors = baseline_vectors(kind, recipe, validation, train)
    return {"figures": figures_of(vectors, [validation[row] for row in rows]), "step": 0, "steps": 0}


def figures_of(
    vectors: NDArray[np.float32],
    records: Sequence[Record],
    gallery: NDArray[np.float32] | None = None,
    gallery_records: Sequence[Record] = (),
) -> dict[str, float]:
    """MAP@R, R-Precision and Recall@1, 2, 4, 8 of records searched in themselves, or in a gallery."""
    labels = [r.label for r in records]
    if gallery is None:
        found = retrieval_metrics(vectors, labels, ks=KS)
    else:
        found = retrieval_metrics(
            vectors, labels, gallery=gallery, gallery_labels=[r.label for r in gallery_records], ks=KS
        )
    recalls = {f"recall_at_{k}": float(found.recall[k]) for k in KS}
    return {"map_at_r": float(found.map_at_r), "r_precision": float(found.r_precision), **recalls}


@cache
def code_digests() -> dict[str, Any]:
    """Hashes of the sources of the dml package: of everything, and of each part (12 hexadecimal digits).

    Taken once per process, when its first run begins.
    """
    root = Path(dml.errors.__file__).parent
    parts: dict[str, Any] = {}
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        line = f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        whole.update(line)
        parts.setdefault(name.split("/")[0].removesuffix(".py"), hashlib.sha256()).update(line)
    return {
        "all": whole.hexdigest()[:12],
        "parts": {name: digest.hexdigest()[:12] for name, digest in parts.items()},
    }


def environment_of(recipe: Recipe) -> dict[str, Any]:
    """Versions and machine."""
    import torch

    from dml.training.run import environment

    wanted = recipe.train.accelerator
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    found = environment(device)
    for package in ("optuna", "scipy"):
        with suppress(metadata.PackageNotFoundError):
            found["versions"][package] = metadata.version(package)
    return {**found, "cpu": processor_name(), "cores": os.cpu_count()}


def processor_name() -> str:
    """The processor as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def reset_peak() -> None:
    """Begin to measure the peak memory of one run: give back what the last one left, forget its peak."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> dict[str, int | None]:
    """Peak of the process (all of it, libraries included) and of the GPU, in bytes, since `reset_peak`."""
    import torch

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process": 1024 * kilobytes, "gpu": gpu}
