"""Recall@K and its companions, for an encoder and pictures, or for vectors that exist already.

    python -m eval.recall RUN --split test --k 1,2,4,8
    python -m eval.recall ENCODER photos/ --k 1,10,100
    python -m eval.recall EMBEDDINGS [--gallery EMBEDDINGS]

EMBEDDINGS is a folder that `dml embed` has made, or your own vectors: a .npy file (or vectors.npy in a
folder) with labels.npy, and optionally ids.npy, beside it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.encoder.embeddings import is_embeddings as made_by_embed
from dml.encoder.embeddings import open_embeddings
from dml.errors import DataError, DmlError, UsageError
from dml.metrics import RetrievalMetrics, nmi, retrieval_metrics
from eval.gate import read_ks


@dataclass(frozen=True)
class Embeddings:
    """Vectors with who they are."""

    vectors: NDArray[np.float32]  # (N, D)
    labels: list[Any]
    ids: list[Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; return the exit code."""
    args = parser().parse_args(arguments)
    try:
        tree = measure_embeddings(args) if is_embeddings(args.source) else measure_pictures(args)
    except DmlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.json:
        print(json.dumps(tree, indent=1))
    else:
        print(tree["about"])
        for name, value in tree["metrics"].items():
            interval = tree["intervals"].get(name)
            shown = f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            print(f"{name:<14}{value:.4f}{shown}")
    return 0


def parser() -> argparse.ArgumentParser:
    usage = argparse.ArgumentParser(prog="python -m eval.recall", description=(__doc__ or "").split("\n")[0])
    usage.add_argument("source", type=Path, metavar="RUN|ENCODER|EMBEDDINGS")
    usage.add_argument("data", nargs="?", default="", metavar="DATA", help="folder, manifest or data set")
    usage.add_argument("--split", default="test", choices=("test", "validation", "all"))
    usage.add_argument("--k", default="1,2,4,8", help="K of Recall@K, with commas")
    usage.add_argument("--gallery", type=Path, help="embeddings to search in; else the queries themselves")
    usage.add_argument("--nmi", action="store_true", help="also cluster the queries")
    usage.add_argument("--workers", type=int, default=2, help="threads that read pictures")
    usage.add_argument("--json", action="store_true")
    return usage


def measure_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """Embed the chosen pictures and measure them."""
    from dml.encoder import Encoder, find_encoder
    from eval.evaluate import choose, evaluate

    if args.gallery is not None:
        raise UsageError("--gallery belongs to embeddings; for pictures, DATA says what is query and gallery")
    selection = choose(args.source, args.data, split=args.split)
    evaluation = evaluate(
        Encoder.load(find_encoder(args.source)),
        selection,
        ks=read_ks(args.k),
        with_nmi=args.nmi,
        workers=args.workers,
    )
    return {"about": selection.describe(), **evaluation.as_json()}


def measure_embeddings(args: argparse.Namespace) -> dict[str, Any]:
    """Measure vectors that exist already."""
    if args.data:
        raise UsageError(
            f"{args.source} holds vectors already, so DATA ({args.data}) has no use; leave it out"
        )
    queries = read_embeddings(args.source)
    gallery = None if args.gallery is None else read_embeddings(args.gallery)
    options: dict[str, Any] = {}
    if gallery is not None:
        options = {
            "gallery": gallery.vectors,
            "gallery_labels": gallery.labels,
            "gallery_ids": gallery.ids,
        }
    metrics = retrieval_metrics(
        queries.vectors, queries.labels, ids=queries.ids, ks=read_ks(args.k), **options
    )
    figures = metrics.figures()
    if args.nmi:
        figures["nmi"] = nmi(queries.vectors, queries.labels)
    return {"about": describe(args.source, queries, metrics), "metrics": figures, "intervals": {}}


def describe(path: Path, queries: Embeddings, metrics: RetrievalMetrics) -> str:
    counted = f"{metrics.queries:,} queries of {len(set(queries.labels)):,} classes"
    skipped = f", {metrics.skipped:,} without a counterpart left out" if metrics.skipped else ""
    return f"{path}: {counted} in a gallery of {metrics.gallery:,}{skipped}"


def is_embeddings(path: Path) -> bool:
    """Whether a path holds vectors, and not an encoder."""
    return path.suffix == ".npy" or embedded_by_dml(path) or (path / "vectors.npy").is_file()


def read_embeddings(path: Path) -> Embeddings:
    """Read vectors with ids and labels.

    Raises:
        DataError: no such file, not vectors, no labels, or numbers of rows that differ.
    """
    if embedded_by_dml(path):
        opened = open_embeddings(path)
        labels = [item.label for item in opened.items]
        if not any(label is not None for label in labels):
            raise DataError(
                f"{path} has no labels, so nothing tells right from wrong; embed labelled folders"
            )
        return Embeddings(opened.vectors, labels, [item.id for item in opened.items])
    file = path / "vectors.npy" if path.is_dir() else path
    vectors = read_array(file, "`dml embed` makes them")
    labels = read_array(file.with_name("labels.npy"), f"give the label of every row of {file.name}").tolist()
    ids = file.with_name("ids.npy")
    who = read_array(ids, "").tolist() if ids.is_file() else list(range(len(vectors)))
    if vectors.ndim != 2 or not len(vectors) == len(labels) == len(who):
        raise DataError(
            f"{file}: expected rows of vectors with one label and one id each, got an array of shape "
            f"{vectors.shape} with {len(labels)} labels and {len(who)} ids"
        )
    return Embeddings(vectors, labels, who)


def read_array(file: Path, advice: str) -> NDArray[Any]:
    """A .npy file without pickled objects."""
    if not file.is_file():
        raise DataError(f"There is no {file}: {advice}.")
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read as an array: {error}") from None


def embedded_by_dml(path: Path) -> bool:
    return path.is_dir() and made_by_embed(path)


if __name__ == "__main__":
    sys.exit(main())
