"""What requests of the same moment share: calls of an encoder, and searches of a collection."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dml.collection.base import Collection, SearchResult
from dml.stages import Clock, within
from service.batching import Batcher
from service.settings import Settings, usable_cores

Vector = NDArray[np.float32]
Function = Callable[[Vector], Vector]


class Embeds(Protocol):
    """What is asked of an encoder here."""

    def embed_arrays(self, arrays: Vector) -> Vector:
        """(N, 3, S, S) -> (N, D) of unit length."""
        ...


def encoder_batcher(
    encoder: Embeds, settings: Settings, observe: Callable[[int], None]
) -> Batcher[Vector, Vector]:
    """Prepared pictures (3, S, S) -> vectors (D,).

    On a CPU there is a lane for each core. Alone, a call has all cores; as soon as others are at work or on
    their way, each call has one: so no core waits for another at the end of a layer, or for one that decodes.
    Where calls are best made one after another (a GPU) there is one lane, and a call waits for pictures that
    are being decoded, for `settings.max_wait_seconds` at most.
    """
    cores = max(1, usable_cores() // settings.processes)
    spread = getattr(encoder, "spread", None)
    alone: Function = encoder.embed_arrays
    beside: Function | None = spread(cores) if spread is not None and cores > 1 else None

    def embed(arrays: list[Vector]) -> Sequence[Vector]:
        crowded = beside is not None and batcher.busy + batcher.announced > max(1, cores // 2)
        return list((beside if beside is not None and crowded else alone)(np.stack(arrays)))

    batcher: Batcher[Vector, Vector] = Batcher(
        embed,
        max_batch=settings.max_batch,
        lanes=1 if beside is None else cores,
        max_wait=settings.max_wait_seconds if beside is None else 0.0,
        observe=observe,
    )
    return batcher


class PlainSearch(NamedTuple):
    """What searches must have in common to be made in one call: everything but the vector."""

    limit: int
    offset: int
    exact: bool
    effort: int | None
    score_threshold: float | None
    with_vector: bool


class Asked(NamedTuple):
    """One search of many."""

    vector: Vector  # (D,)
    search: PlainSearch


class Found(NamedTuple):
    """Its result, or why there is none; and where the time of its call went."""

    result: SearchResult | None
    problem: Exception | None
    clock: Clock


class SharedSearches:
    """Plain searches of one collection, made together when several are asked at the same moment: an exact
    index reads every vector once for all of them.

    Args:
        collection: where.
        most: searches of one call.
    """

    def __init__(self, collection: Collection, *, most: int = 64) -> None:
        self._collection = collection
        self._batcher: Batcher[Asked, Found] = Batcher(self._search, max_batch=most, stage="search")

    def __call__(self, vector: Vector, search: PlainSearch) -> SearchResult:
        """Raises whatever the collection raises for this search."""
        [found] = self._batcher([Asked(vector, search)])
        for name, seconds in found.clock.seconds.items():
            if name != "search":
                within("search", name, seconds)
        if found.result is None:
            raise found.problem or RuntimeError("a search without a result")
        return found.result

    def _search(self, asked: list[Asked]) -> Sequence[Found]:
        groups: dict[PlainSearch, list[int]] = {}
        for place, one in enumerate(asked):
            groups.setdefault(one.search, []).append(place)
        found: dict[int, Found] = {}
        for search, places in groups.items():
            clock, options = Clock(), search._asdict()
            with clock.running():
                try:
                    vectors = np.stack([asked[place].vector for place in places])
                    results: Sequence[Any] = self._collection.search(vectors, **options)
                except Exception as error:
                    results = [error] * len(places)
                else:
                    # Together an exact search reads the vectors once; an approximate one gains nothing.
                    self._batcher.lanes = usable_cores() if results[0].approximate else 1
            for place, result in zip(places, results, strict=True):
                bad = isinstance(result, Exception)
                found[place] = Found(None if bad else result, result if bad else None, clock)
        return [found[place] for place in range(len(asked))]
