"""What every collection does: images with ids and payloads, and search among them by vector.

Two implementations are planned for one protocol: local (SQLite catalogue + index) and Milvus. What an
implementation does not have, `capabilities()` does not name, and asking for it raises NotAvailable; it never
answers approximately instead.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dml.collection.filters import Filter
from dml.errors import UsageError

Payload = Mapping[str, Any]
"""JSON: what the user wants to know about an item. The key "label" is its class, when it has one."""

FilterLike = Filter | Mapping[str, Any]
"""A filter, or the JSON that it is written as; see `dml.collection.filters`."""


@dataclass(frozen=True)
class Picture:
    """Where the picture of an item is.

    stored: the collection keeps the bytes, under their sha256.
    referenced: the bytes stay where they are, at `path` below the root named `root` in the manifest.
    """

    kind: Literal["stored", "referenced"]
    sha256: str
    path: str | None = None  # referenced: POSIX path relative to the root
    root: str | None = None  # referenced: a name in manifest["roots"]


@dataclass(frozen=True)
class NewItem:
    """Something to add, or to replace under the same id.

    At most one of `image` (bytes to be stored) and `file` (a path to refer to) may be given; neither makes an
    item with a vector only.
    """

    id: str
    vector: NDArray[np.float32]  # (D,) unit length
    payload: Payload = field(default_factory=dict)
    image: bytes | None = None
    file: Path | None = None
    sha256: str | None = None  # of `file`, from who has just read it; None: it is read for it


class Item(NamedTuple):
    """One row of a collection. Its payload is the caller's own: changing it changes nothing else."""

    id: str
    payload: Payload
    sequence: int  # the change that last wrote it; grows with every write to the collection
    picture: Picture | None = None
    vector: NDArray[np.float32] | None = None  # only when asked for

    @property
    def label(self) -> str | None:
        value = self.payload.get("label")
        return None if value is None else str(value)


class Hit(NamedTuple):
    """One search result."""

    id: str
    score: float  # cosine similarity, higher is nearer
    rank: int  # 1 is the best
    item: Item
    group: str | int | float | bool | None = None  # the value that it was grouped by


@dataclass(frozen=True)
class SearchResult:
    """The answer to one query."""

    hits: list[Hit]
    generation: int  # the state of the collection that answered
    approximate: bool  # whether a true neighbour may be missing
    total: int = 0  # items (or groups) that qualify, on this page or not; a lower bound, unless …
    total_is_exact: bool = False
    next_cursor: str | None = None  # of a walk with cursors: where the next page starts; None at the end


@dataclass(frozen=True)
class CollectionInfo:
    """What a collection is, for people and for GET /v1/collections/{c}."""

    name: str
    count: int
    dim: int
    metric: str  # "cosine"
    fingerprint: str  # of the encoder that made its vectors
    index: Mapping[str, Any]  # {"kind": ..., "exact": ..., "effort": ..., ...}
    measured_recall: float | None  # recall@10 of the index against exact search, when measured
    generation: int
    pending: int  # changes not yet in the main index (they are searched all the same)
    bytes_on_disk: int
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Figures:
    """What changes about a collection while it is in use, cheap enough to be asked for every few seconds."""

    count: int
    pending: int  # items that were added or changed since the main index was built; searched all the same
    tombstones: int  # rows that the main index still holds, and that were removed since
    generation: int
    index: str  # its kind
    measured_recall: float | None  # recall@10, when measured
    promised_recall: float | None  # when there is a promise
    promise_holds: bool | None  # as last measured; None: no promise, or nothing built yet
    index_written: float | None  # when the main index was built or merged last, seconds since 1970


class PayloadTooLarge(UsageError):
    """A payload with more bytes, as JSON in UTF-8, than the caller allows."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"payload: has {size:,} bytes as JSON; at most {limit:,} are allowed.")
        self.size, self.limit = size, limit


class Collection(Protocol):
    """A live set of images that can be searched by vector. Safe to use from several threads."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Of the encoder that made its vectors."""
        ...

    def capabilities(self) -> frozenset[str]:
        """Names among: "exact", "filter", "group_by", "generation_cursor", "payload_index", "verify",
        "pictures", "count" (how many items pass a filter can be asked).
        """
        ...

    def __len__(self) -> int: ...

    def add(self, items: Iterable[NewItem]) -> list[bool]:
        """Add or replace; acknowledged (on return) means durable. True where the id was new.

        Raises:
            VectorError, DimensionMismatch: before anything of the batch is written.
        """
        ...

    def get(self, ids: Sequence[str], *, with_vector: bool = False) -> list[Item]:
        """These items, in this order. Raises UnknownItem naming the ones that are not there."""
        ...

    def update_payload(self, id: str, changes: Payload, *, max_bytes: int | None = None) -> Item:
        """Merge into the payload (a None value removes the key).

        Args:
            max_bytes: of the merged payload as JSON; checked where it is written, so that concurrent changes
                cannot add up to more. A change that makes a payload smaller is always taken.

        Raises:
            UnknownItem
            PayloadTooLarge: the merged payload has more than `max_bytes`; nothing was changed.
        """
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Forget these ids; return how many were there."""
        ...

    def delete_matching(self, filter: FilterLike) -> int:
        """Forget the items that pass a filter; return how many there were.

        Raises:
            FilterInvalid: also for a filter that lets everything pass.
        """
        ...

    def count(self, filter: FilterLike | None = None) -> int:
        """How many items pass a filter. Raises FilterInvalid."""
        ...

    def scroll(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        with_vector: bool = False,
        filter: FilterLike | None = None,
    ) -> tuple[list[Item], str | None]:
        """Items that pass, in the order of their ids, and where the next page starts (None at the end)."""
        ...

    def search(
        self,
        vectors: NDArray[np.float32],
        *,
        limit: int = 10,
        offset: int = 0,
        exact: bool = False,
        effort: int | None = None,
        score_threshold: float | None = None,
        exclude: Sequence[str] = (),
        with_vector: bool = False,
        filter: FilterLike | None = None,
        group_by: str | None = None,
        group_size: int = 1,
        cursor: str | None = None,
    ) -> list[SearchResult]:
        """The nearest items of each row of `vectors` (Q, D).

        Args:
            exact: compare with every item (that passes the filter), whatever the index.
            effort: how hard an approximate index looks; None: its own measure.
            score_threshold: leave out hits below this similarity. With a large `limit` this is a range
                search: everything at least so similar, or as many as `limit` says; see `total_is_exact`.
            exclude: ids that may not be returned (the query's own, for "more like this").
            filter: only items that pass, see `dml.collection.filters`.
            group_by: a path in the payload: the `limit` best groups of equal values there, and of each its
                `group_size` best items. `limit` and `offset` count groups, `hits` is flat: group after group.
            cursor: "*" starts a walk through all hits, page by page; `next_cursor` of the page before goes on
                with it, in the same state of the collection, whatever is written meanwhile. For one query;
                always exact.

        Raises:
            VectorError, DimensionMismatch, UsageError, FilterInvalid
            CursorInvalid: not given out here, changed, or of another search.
            CursorExpired: its state of the collection is not kept any more.
        """
        ...

    def picture(self, id: str) -> bytes:
        """The bytes of the picture as they were given. Raises UnknownItem, ImageNotKept."""
        ...

    def thumbnail(self, id: str, size: int = 256) -> bytes:
        """A JPEG whose longer side is `size` at most, upright, without metadata. Raises as `picture`."""
        ...

    def info(self) -> CollectionInfo: ...

    def figures(self) -> Figures:
        """Sizes, generation and recall, as they are now."""
        ...

    def close(self) -> None: ...
