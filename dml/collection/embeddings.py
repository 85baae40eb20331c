"""Read what `dml embed` left: vectors with their ids, and which encoder made them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dml.errors import DataError
from dml.index.base import Vectors, check_vectors

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Embeddings:
    """Vectors (N, D) of one encoder."""

    ids: Sequence[str]
    vectors: Vectors
    payloads: Sequence[Mapping[str, Any]]
    fingerprint: str
    root: Path | None  # the folder that ids are relative to


def is_embeddings(path: Path) -> bool:
    """Whether the folder was made by `dml embed`."""
    return False


def read_embeddings(path: Path) -> Embeddings:
    """Read and check a folder of embeddings. Raises DataError, VectorError."""
    raise NotImplementedError
