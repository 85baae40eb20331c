"""Measure whether vectors of two profiles may be compared, on real pictures, and keep what was found.

For every picture i of N, with vectors a_i of one profile and b_i of the other::

    own(i)    the ten pictures j ≠ i with the largest a_i · a_j      what a query of the same profile finds
    found(i)  the ten pictures j ≠ i with the largest b_i · a_j      what a query of the other one finds

    top1_equal     share of i whose first ones are equally near
    overlap_at_10  mean of |own ∩ found| / 10

and the same with a and b exchanged; the lower figures count. An answer that the own query finds equally near
is the same answer. That is what a search feels: the collection was embedded with one profile, the query with
another.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dml.checksums import seal
from dml.data.table import ImageTable, Record, open_table
from dml.encoder.encoder import Encoder
from dml.encoder.manifest import MANIFEST, find_encoder, read_manifest
from dml.encoder.profiles import Profile, ProfileAgreement, stored_agreements
from dml.errors import DataError
from dml.imaging import BadImage
from dml.storage import write_aside

NEIGHBOURS = 10
BLOCK = 512  # queries compared at once
TIE = 1e-6
"""Cosines that differ by less than rounding are equally near: which copy comes first says nothing."""

MOST_PICTURES = 5000
"""Of a larger folder so many are drawn: the figures are settled long before."""

Vectors = NDArray[np.float32]


def measure_profiles(
    path: str | Path,
    profiles: Sequence[Profile],
    data: str | Path,
    *,
    threads: int | None = None,
    on_progress: Callable[[str, int, int], object] = lambda profile, done, total: None,
) -> list[ProfileAgreement]:
    """Embed pictures with every profile, compare each pair, and store the figures in the encoder's manifest.

    The fingerprint does not change. Figures of the same pair that were stored before are replaced.

    Args:
        path: ENCODER, RUN or COLLECTION.
        profiles: at least two.
        data: a folder or a manifest of pictures like those that will be searched.
        on_progress: called with (profile, done, all).

    Raises:
        DataError: fewer than 20 pictures that can be read.
        EncoderError, MissingExtra: a profile that cannot run here.
        StorageError: the manifest cannot be written.
    """
    folder = find_encoder(path)
    table = open_table(data)
    records = drawn(table)
    vectors: dict[Profile, Vectors] = {}
    kept: NDArray[np.int64] | None = None
    for profile in dict.fromkeys(profiles):
        encoder = Encoder.load(folder, profile=profile, threads=threads)
        rows, parts, bad = [], [], list[BadImage]()
        for batch in encoder.embed_stream(records, bad=bad):
            rows.append(batch.indices)
            parts.append(batch.vectors)
            on_progress(str(profile), int(batch.indices[-1]) + 1, len(records))
        found = np.concatenate(rows) if rows else np.empty(0, np.int64)
        if len(found) < 2 * NEIGHBOURS:
            raise DataError(
                f"{data} has {len(found)} pictures that can be read; at least {2 * NEIGHBOURS} are needed to "
                f"compare neighbours, and 1,000 to rely on the figures."
            )
        if kept is None:
            kept = found
        elif not np.array_equal(kept, found):
            raise DataError(f"{data} changes while it is being read; measure on pictures that stay.")
        vectors[profile] = np.concatenate(parts)
    measured = [
        compared(one, other, vectors[one], vectors[other], data=table.name)
        for one, other in combinations(vectors, 2)
    ]
    store(folder, measured)
    return measured


def drawn(table: ImageTable) -> list[Record]:
    """At most `MOST_PICTURES` records, spread evenly over the table."""
    records = table.records
    if len(records) <= MOST_PICTURES:
        return list(records)
    return [records[i] for i in np.linspace(0, len(records) - 1, MOST_PICTURES).astype(int)]


def compared(
    one: Profile, other: Profile, left: Vectors, right: Vectors, *, data: str = ""
) -> ProfileAgreement:
    """The figures of two sets of vectors (N, D) of the same pictures."""
    cosines = np.einsum("nd,nd->n", left.astype(np.float64), right)
    forth, back = same_neighbours(left, right), same_neighbours(right, left)
    return ProfileAgreement(
        profiles=(str(one), str(other)),
        queries=len(left),
        top1_equal=min(forth[0], back[0]),
        overlap_at_10=min(forth[1], back[1]),
        cosine_p1=float(np.percentile(cosines, 1)),
        cosine_min=float(cosines.min()),
        data=data,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def same_neighbours(stored: Vectors, queries: Vectors) -> tuple[float, float]:
    """(top-1 equal, overlap@10) of foreign queries against stored vectors, as the module's head says."""
    k = min(NEIGHBOURS, len(stored) - 1)
    first, shared = 0, 0.0
    for start in range(0, len(stored), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(stored)))
        own, found = (side[rows] @ stored.T for side in (stored, queries))
        for scores in (own, found):
            scores[np.arange(len(rows)), rows] = -np.inf  # not itself
        nearest, answers = nearest_columns(own, k), nearest_columns(found, k)
        best = np.take_along_axis(own, nearest, axis=1)
        answered = np.take_along_axis(own, answers, axis=1)  # the foreign answers, as the own query sees them
        first += int((answered[:, 0] >= best[:, 0] - TIE).sum())
        shared += float((answered >= best[:, -1:] - TIE).mean(axis=1).sum())
    return first / len(stored), shared / len(stored)


def nearest_columns(scores: Vectors, k: int) -> NDArray[np.int64]:
    """(B, k) columns of the largest scores, best first."""
    top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
    return np.take_along_axis(top, order, axis=1)


def store(folder: Path, measured: Iterable[ProfileAgreement]) -> None:
    """Put figures into an encoder's manifest, in one step. Raises StorageError."""
    tree = dict(read_manifest(folder).tree)
    pairs = {frozenset(agreement.profiles): agreement for agreement in stored_agreements(tree)}
    pairs |= {frozenset(agreement.profiles): agreement for agreement in measured}
    tree["profiles"] = [agreement.as_json() for agreement in pairs.values()]
    write_aside(folder / MANIFEST, lambda aside: aside.write_bytes(seal(tree)))
