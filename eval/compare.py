"""Several recipes on one data set under the same settings, in one table.

    python -m eval.compare DATA --rows pixels untrained multi_similarity cbml_scratch iaa --out runs/compare

Every trained row sees the same splits, trunk, augmentation, batch and schedule; what differs is what its
recipe says about the loss and its stages. The model is chosen by MAP@R on validation classes; the test split
is measured once, at the end. Rows that are done are read back, so an interrupted comparison goes on. With one
or two seeds this gives an impression, not a claim: claims need equal tuning budgets and more seeds.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dml.config import Recipe, load_recipe, recipe_tree
from dml.data.split import divide
from dml.data.table import Record, open_table
from dml.encoder import Encoder
from dml.errors import DmlError
from dml.metrics import retrieval_metrics
from dml.startup import prepare_process

UNTRAINED = {"pixels": "the pictures' own values", "untrained": "the network with random weights"}


def figures_of(vectors: np.ndarray, records: Sequence[Record]) -> dict[str, float]:
    """Recall@1 and MAP@R of records searched in themselves."""
    names = sorted({r.label for r in records if r.label is not None})
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[r.label] for r in records if r.label is not None])
    found = retrieval_metrics(vectors, labels)
    return {"recall_at_1": found.recall[1], "map_at_r": found.map_at_r}


def pixel_vectors(records: Sequence[Record], size: int) -> np.ndarray:
    """Grey values of the shrunken pictures, centred per picture, as unit vectors."""
    from dml.imaging import decode

    rows = np.stack(
        [np.asarray(decode(r.path).convert("L").resize((size, size)), np.float32).ravel() for r in records]
    )
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def row_recipe(row: str, base: str, overrides: dict[str, str], seed: int) -> Recipe:
    """The settings of the base recipe with the loss and the stages of the row's."""
    common = load_recipe(base, overrides)
    own = load_recipe(common_row(row), {})
    return replace(
        common,
        loss=own.loss,
        clean=own.clean,
        augment=own.augment,
        memory=own.memory,
        regularizers=own.regularizers,
        model=replace(common.model, attention=own.model.attention),
        train=replace(common.train, seed=seed, loss_learning_rate=own.train.loss_learning_rate),
    )


def common_row(row: str) -> str:
    return "multi_similarity" if row in UNTRAINED else row


def measure(row: str, recipe: Recipe, out: Path) -> dict[str, Any]:
    """One row for one seed: train where there is something to train, then look at validation and test."""
    splits = divide(open_table(recipe.data.source), recipe.data)
    began = time.monotonic()
    result: dict[str, Any] = {"row": row, "seed": recipe.train.seed, "protocol": splits.protocol}
    if row == "pixels":
        size = min(recipe.data.image_size, 32)
        parts = {name: pixel_vectors(getattr(splits, name), size) for name in ("validation", "test")}
    else:
        encoder = untrained(recipe, out) if row == "untrained" else trained(recipe, out)
        parts = {
            name: encoder.embed_files([r.path for r in getattr(splits, name)])[1]
            for name in ("validation", "test")
        }
    result["seconds"] = round(time.monotonic() - began, 1)
    for name, vectors in parts.items():
        result[name] = figures_of(vectors, getattr(splits, name))
    result["recipe"] = recipe_tree(recipe)
    return result


def untrained(recipe: Recipe, out: Path) -> Encoder:
    import torch

    from dml.encoder.artifact import save_encoder
    from dml.encoder.preprocess import Preprocess
    from dml.models import build_model

    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe.model, image_size=recipe.data.image_size).eval()
    mean, std = model.input_stats
    preprocess = Preprocess(size=recipe.data.image_size, fit=recipe.data.fit, mean=mean, std=std)
    return save_encoder(
        model,
        preprocess,
        out / "encoder",
        provenance={"trained_on": "nothing"},
        model_config=recipe.model,
        image_size=recipe.data.image_size,
    )


def trained(recipe: Recipe, out: Path) -> Encoder:
    from dml.training.run import train

    for _ in train(recipe, out, resume=True):
        pass
    return Encoder.load(out)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean over the seeds, and the range where there are several."""
    lines = [f"{'row':<20}{'seeds':>6}{'validation R@1':>22}{'test R@1':>22}{'test MAP@R':>22}{'seconds':>9}"]
    for row in dict.fromkeys(r["row"] for r in results):
        own = [r for r in results if r["row"] == row]
        cells = [
            spread([r[part][figure] for r in own])
            for part, figure in (("validation", "recall_at_1"), ("test", "recall_at_1"), ("test", "map_at_r"))
        ]
        seconds = np.mean([r["seconds"] for r in own])
        lines.append(
            f"{row:<20}{len(own):>6}" + "".join(f"{cell:>22}" for cell in cells) + f"{seconds:>9.0f}"
        )
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder, manifest or data set")
    parser.add_argument(
        "--rows", nargs="+", default=["pixels", "untrained", "multi_similarity"], metavar="RECIPE"
    )
    parser.add_argument(
        "--base", default="multi_similarity", help="recipe that gives everything but loss and stages"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    given = parser.parse_args(arguments)
    prepare_process()
    overrides = dict(pair.partition("=")[::2] for pair in given.overrides)
    overrides["data.source"] = json.dumps(given.data)
    results = []
    try:
        for row in given.rows:
            for seed in range(1 if row == "pixels" else given.seeds):
                folder = given.out / f"{row}-{seed}"
                path = folder / "result.json"
                if path.exists():
                    results.append(json.loads(path.read_text()))
                    continue
                results.append(measure(row, row_recipe(row, given.base, overrides, seed), folder))
                folder.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results[-1], indent=1))
                print(f"done: {row}, seed {seed}", file=sys.stderr)
    except DmlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
