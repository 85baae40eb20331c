"""Recall@K and its companions, for an encoder and pictures, or for vectors that exist already.

    python -m eval.recall RUN --split test --k 1,2,4,8
    python -m eval.recall ENCODER photos/ --k 1,10,100
    python -m eval.recall EMBEDDINGS [--gallery EMBEDDINGS]

EMBEDDINGS is what `dml embed` writes, or any folder with vectors.npy, or a .npy or .parquet file of vectors;
their labels come from the column `label`, from `labels.npy` beside them, or from the first folder of each id.
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
    """Whether a path holds vectors (and no encoder)."""
    return path.suffix in (".npy", ".parquet") or (path.is_dir() and bool(vector_files(path)))


def vector_files(folder: Path) -> list[Path]:
    names = ("vectors.npy", "embeddings.npy", "vectors.parquet", "embeddings.parquet")
    return [folder / name for name in names if (folder / name).is_file()]


def read_embeddings(path: Path) -> Embeddings:
    """Read vectors with ids and labels.

    Raises:
        DataError: no such file, not vectors, or no labels to be found.
    """
    file = vector_files(path)[0] if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"There are no embeddings {file}; `dml embed` makes them.")
    try:
        found = read_table(file) if file.suffix == ".parquet" else read_arrays(file)
    except (ValueError, OSError, KeyError) as error:
        raise DataError(f"{file} cannot be read as embeddings: {error}") from None
    if found.vectors.ndim != 2 or not len(found.vectors):
        raise DataError(f"{file} holds no rows of vectors: its shape is {found.vectors.shape}")
    if not len(found.vectors) == len(found.labels) == len(found.ids):
        raise DataError(
            f"{file}: {len(found.vectors)} vectors, {len(found.labels)} labels and {len(found.ids)} ids; "
            f"there must be one of each per row"
        )
    return found


def read_table(file: Path) -> Embeddings:
    """A parquet table with the columns vector, id, and label (else labels from the ids)."""
    from pyarrow import parquet

    table = parquet.read_table(file)
    names = table.column_names
    vectors = np.stack([np.asarray(row, np.float32) for row in table.column("vector").to_pylist()])
    ids = table.column("id").to_pylist() if "id" in names else list(range(len(vectors)))
    labels = table.column("label").to_pylist() if "label" in names else labels_of(ids, file)
    return Embeddings(vectors, labels, ids)


def read_arrays(file: Path) -> Embeddings:
    """A .npy file of vectors with ids and labels in files beside it."""
    vectors = np.load(file, mmap_mode="r", allow_pickle=False)
    ids = read_list(file.parent, "ids")
    ids = list(range(len(vectors))) if ids is None else ids
    labels = read_list(file.parent, "labels")
    return Embeddings(vectors, labels_of(ids, file) if labels is None else labels, ids)


def read_list(folder: Path, name: str) -> list[Any] | None:
    """NAME.npy, NAME.txt (one per line) or NAME.json of a folder; None where there is none."""
    if (folder / f"{name}.npy").is_file():
        return np.load(folder / f"{name}.npy", allow_pickle=False).tolist()
    if (folder / f"{name}.txt").is_file():
        return (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    if (folder / f"{name}.json").is_file():
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return None


def labels_of(ids: Sequence[Any], file: Path) -> list[str]:
    """The folder of each id, where ids are paths CLASS/picture."""
    if not all(isinstance(id, str) and "/" in id for id in ids):
        raise DataError(
            f"{file} has no labels: give a column label, or labels.npy beside it, or ids like "
            f"CLASS/picture.jpg"
        )
    return [id.split("/")[-2] for id in ids]


if __name__ == "__main__":
    sys.exit(main())
