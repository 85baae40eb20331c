"""Vectors without training: what the pictures, a random net or a pretrained trunk give by themselves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dml.config import Recipe
from dml.data.reading import batches_of
from dml.data.table import Record
from dml.encoder.preprocess import Preprocess
from dml.imaging import BadImage
from eval.benchmark.suite import Kind

if TYPE_CHECKING:
    from dml.models.embedder import Embedder

Vectors = NDArray[np.float32]
SIDE = 32
"""Pictures are shrunk to this side for their grey values."""


def baseline_vectors(
    kind: Kind, recipe: Recipe, records: Sequence[Record], fitted_on: Sequence[Record]
) -> tuple[NDArray[np.int64], Vectors]:
    """Positions of the readable records, and their vectors (N, D).

    Args:
        kind: "pixels": grey values, centred per picture; "untrained": the recipe's whole net with the weights
            that its seed gives; "features": its pooled trunk without the head; "whitened": those, centred and
            PCA-whitened to the recipe's dimension.
        fitted_on: training records that the whitening is estimated from.
    """
    if kind == "pixels":
        return pixel_vectors(records, min(recipe.data.image_size, SIDE))
    import torch

    from dml.models import build_model

    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe.model, image_size=recipe.data.image_size).eval()
    rows, vectors = net_vectors(model, recipe, records, head=kind == "untrained")
    if kind == "whitened":
        vectors = whitened(vectors, net_vectors(model, recipe, fitted_on, head=False)[1], recipe.model.dim)
    return rows, vectors


def pixel_vectors(records: Sequence[Record], side: int) -> tuple[NDArray[np.int64], Vectors]:
    """Grey values of the shrunken pictures, centred per picture."""
    rows, parts = [], []
    plain = Preprocess(size=side, fit="squash", mean=(0.0,) * 3, std=(1.0,) * 3)
    for positions, pixels in batches_of(records, plain, batch_size=256, workers=1, bad=list[BadImage]()):
        rows.append(positions)
        grey = np.tensordot(pixels, np.array([0.299, 0.587, 0.114], np.float32), axes=([1], [0]))
        parts.append(grey.reshape(len(grey), -1))
    vectors = np.concatenate(parts)
    return np.concatenate(rows), vectors - vectors.mean(axis=1, keepdims=True)


def net_vectors(
    model: "Embedder", recipe: Recipe, records: Sequence[Record], *, head: bool
) -> tuple[NDArray[np.int64], Vectors]:
    """What the net, or its pooled trunk, makes of pictures."""
    import torch

    wanted = recipe.train.accelerator
    device = "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
    model.to(device)
    mean, std = model.input_stats
    preprocess = Preprocess(size=recipe.data.image_size, fit=recipe.data.fit, mean=mean, std=std)
    rows, parts = [], []
    with torch.no_grad():
        for positions, pixels in batches_of(
            records, preprocess, batch_size=256, workers=recipe.data.workers, bad=list[BadImage]()
        ):
            inputs = torch.from_numpy(pixels).to(device)
            out = model(inputs).unit if head else model.pooling(model.trunk(inputs))
            rows.append(positions)
            parts.append(out.float().cpu().numpy())
    return np.concatenate(rows), np.concatenate(parts)


def whitened(vectors: Vectors, fitted_on: Vectors, dim: int) -> Vectors:
    """(x - mean) U / sqrt(variance) on the `dim` directions of the largest variance of `fitted_on`."""
    middle = fitted_on.mean(axis=0, dtype=np.float64)
    variance, directions = np.linalg.eigh(np.cov(fitted_on.T.astype(np.float64)))
    order = np.argsort(variance)[::-1][:dim]
    scale = 1 / np.sqrt(np.maximum(variance[order], 1e-9 * variance.max()))
    return ((vectors - middle) @ (directions[:, order] * scale)).astype(np.float32)
