"""A collection that Milvus keeps: ids, payloads and vectors are there, a folder says where that is.

::

    manifest.json    address and name in Milvus, roots of the pictures, what the index was asked to be
    encoder/         the encoder that made the vectors, when it came along
    thumbnails/      a cache

The folder is small, and any number of machines may have one for the same collection. Pictures are referred to
below its roots, which may lie elsewhere on every machine; bytes are not stored.

- A write is acknowledged when Milvus has it in its log; with the consistency "Strong" every search that
  begins afterwards, in whatever process, sees it. Any number of processes may write; of two that write the
  same item, the later one counts. A batch larger than a message of Milvus is written in parts.
- `sequence` and `generation` are moments, in microseconds since 1970, by the clock of who wrote or asked.
- What a filter says is decided exactly; see `filters_milvus`.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dml.collection.base import (
    CollectionInfo,
    Figures,
    FilterLike,
    Item,
    NewItem,
    Payload,
    PayloadTooLarge,
    Picture,
    SearchResult,
)
from dml.collection.catalog import KnownPicture
from dml.collection.filters import Filter, parse_filter
from dml.collection.filters_milvus import EVERY, Bounds, all_of, bounds_of, facts_of, listed
from dml.collection.items import check_item, check_rows, check_unicode, encode_payload
from dml.collection.manifest import FILE as MANIFEST
from dml.collection.manifest import Manifest, promise_of, read_manifest, write_manifest
from dml.collection.milvus_rows import check_size, item_of, page, passes, possible
from dml.collection.milvus_table import (
    FIELDS,
    MOST_RESULTS,
    MOST_ROWS,
    MilvusTable,
    Row,
    batches,
    check_kind,
)
from dml.collection.pictures import Pictures
from dml.collection.query import Query, read_query
from dml.data.ids import absolute
from dml.errors import (
    CollectionError,
    DamagedFile,
    FilterInvalid,
    ImageNotKept,
    ModelMismatch,
    NotAvailable,
    ReadOnly,
    UnknownCollection,
    UnknownItem,
    UsageError,
)
from dml.index.base import Vectors, check_vectors
from dml.index.tune import Promise

FORMAT = 1
"""Of what is written about a collection in Milvus, and of its fields."""

HNSW_FROM = 50_000
"""From this many items on, "auto" means hnsw; below, Milvus compares them all."""

MEASURED = 200
"""Items whose neighbours are compared before and after an approximate index is made."""


@dataclass(frozen=True)
class Place:
    """Where a collection is in Milvus."""

    uri: str
    collection: str
    consistency: str = "Strong"

    @classmethod
    def of(cls, manifest: Manifest, folder: Path) -> "Place":
        """As the manifest in a folder says. Raises DamagedFile."""
        found = manifest.backend
        try:
            uri, name = str(found["uri"]), str(found["collection"])
        except KeyError as error:
            raise DamagedFile(
                f"{folder / MANIFEST} does not say where the collection is: no {error}"
            ) from None
        if "://" not in uri:
            uri = str((folder / uri).resolve())  # a file of Milvus Lite moves with the folder that it lies in
        return cls(uri, name, str(found.get("consistency", "Strong")))

    def written(self, folder: Path) -> dict[str, str]:
        """For the manifest."""
        uri = self.uri
        if "://" not in uri and Path(uri).is_relative_to(folder.resolve()):
            uri = Path(uri).relative_to(folder.resolve()).as_posix()
        return {
            "kind": "milvus",
            "uri": uri,
            "collection": self.collection,
            "consistency": self.consistency,
        }


class MilvusCollection:
    """See `dml.collection.base.Collection`, and `dml.collection.open_collection` for the arguments.

    Raises:
        UnknownCollection: the folder describes none, or Milvus does not have it (any more).
        ModelMismatch: `fingerprint`, or what Milvus says, is not the manifest's.
        Unreachable: Milvus does not answer.
        MissingExtra: pymilvus is not installed.
    """

    def __init__(self, path: Path, *, read_only: bool = False, fingerprint: str | None = None) -> None:
        self.path, self.read_only = Path(path), read_only
        self.manifest = read_manifest(self.path)
        self.check_fingerprint(fingerprint)
        self.place = Place.of(self.manifest, self.path)
        self._lock = threading.Lock()  # one change of a payload at a time
        self._sequence, self._closed = 0, False
        self._pictures = self._open_pictures()
        self._table = MilvusTable(self.place.uri, self.place.collection, consistency=self.place.consistency)
        try:
            self._check_table()
            self._table.load()
        except BaseException:
            self._table.close()
            raise

    def _check_table(self) -> None:
        """Whether Milvus keeps what the manifest says."""
        where = f'the collection "{self.place.collection}" of Milvus at {self.place.uri}'
        if not self._table.exists():
            raise UnknownCollection(f"{self.path} describes {where}, and it is not there (any more).")
        check_about(self._table.about(), where, dim=self.dim, fingerprint=self.fingerprint)

    # What it is

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def dim(self) -> int:
        return self.manifest.dim

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def generation(self) -> int:
        """Now: the next search sees every write that has been acknowledged."""
        return time.time_ns() // 1000

    @property
    def wants_merge(self) -> bool:
        """Never: Milvus searches what is new at once, and merges by itself."""
        return False

    @property
    def encoder_path(self) -> Path | None:
        """The encoder's folder beside the manifest, when it came along."""
        folder = self.path / "encoder"
        return folder if (folder / "manifest.json").is_file() else None

    def capabilities(self) -> frozenset[str]:
        exact = {"exact"} if self._table.index()["exact"] else set()
        return frozenset({"filter", "count", "pictures", *exact})

    def check_fingerprint(self, fingerprint: str | None) -> None:
        """Refuse vectors of another encoder. None: the caller does not say. Raises ModelMismatch."""
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ModelMismatch(
                f"The collection in {self.path} was made by the encoder {self.fingerprint[:12]}, and this "
                f"encoder is {fingerprint[:12]}: their vectors cannot be compared. Use the collection's own "
                f"encoder ({self.path / 'encoder'}), or build a collection with this one."
            )

    def __len__(self) -> int:
        return self._table.count(EVERY)

    def info(self) -> CollectionInfo:
        index = self._table.index()
        pending = index.pop("pending")
        about = {
            **index,
            "backend": "milvus",
            "uri": self.place.uri,
            "collection": self.place.collection,
            "consistency": self.place.consistency,
            "version": self._table.version(),
        }
        return CollectionInfo(
            name=self.name,
            count=len(self),
            dim=self.dim,
            metric=self.manifest.metric,
            fingerprint=self.fingerprint,
            index=about,
            measured_recall=(self.manifest.built.get("measured") or {}).get("recall_at_10"),
            generation=self.generation,
            pending=pending,
            bytes_on_disk=sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file()),
            manifest=json.loads((self.path / MANIFEST).read_text(encoding="utf-8")),
        )

    def figures(self) -> Figures:
        index = self._table.index()
        recall, holds = promise_of(self.manifest)
        return Figures(
            count=len(self),
            pending=index["pending"],
            tombstones=0,  # Milvus does not tell
            generation=self.generation,
            index=index["kind"],
            measured_recall=(self.manifest.built.get("measured") or {}).get("recall_at_10"),
            promised_recall=recall,
            promise_holds=holds,
            index_written=None,
        )

    def close(self) -> None:
        """Let go of the connection."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._table.close()

    def __enter__(self) -> "MilvusCollection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Writing

    def add(self, items: Iterable[NewItem], *, fingerprint: str | None = None) -> list[bool]:
        """Add or replace; acknowledged on return. True where the id was new.

        Args:
            fingerprint: of the encoder that made the vectors; refused when it is not the collection's.

        Raises:
            VectorError, DimensionMismatch, UsageError, ModelMismatch: before anything is written.
            NotAvailable: pictures to be stored; Milvus keeps none.
            ImageNotKept, CollectionError: a `file` that cannot be read, or lies outside the roots.
            CollectionError, Unreachable: of a batch larger than one message a part may be written then.
            ReadOnly: opened for reading.
        """
        self.check_fingerprint(fingerprint)
        self._check_writable()
        batch = list(items)
        for item in batch:
            check_item(item)
            check_size(item.payload, item.id)
        vectors = check_rows([item.vector for item in batch], self.dim)
        rows: dict[str, Row] = {}
        for item, vector in zip(batch, vectors, strict=True):
            rows.pop(item.id, None)  # of two of one id the last counts
            rows[item.id] = self._row(item.id, vector, item.payload, self._picture_for(item))
        seen = set(self._table.rows(rows, fields=["id"]))
        created = []
        for item in batch:
            created.append(item.id not in seen)
            seen.add(item.id)
        self._table.upsert(list(rows.values()))
        return created

    def _row(self, id: str, vector: Vectors, payload: Payload, picture: Picture | None) -> Row:
        known = facts_of(payload, id)
        return {
            "id": id,
            "vector": vector,
            "payload": dict(payload),
            "picture": {} if picture is None else asdict(picture),
            "sequence": self._next(),
            "facts": known.facts,
            "numbers": known.numbers,
        }

    def _next(self) -> int:
        """The number of a change: now, and more than the one before."""
        self._sequence = max(self._sequence + 1, time.time_ns() // 1000)
        return self._sequence

    def _picture_for(self, item: NewItem) -> Picture | None:
        if item.image is not None:
            raise NotAvailable(
                f'The picture of item "{item.id}" cannot be stored: Milvus keeps no pictures. Put the file '
                f"below a root of the collection and add it by its path, or add the vector alone."
            )
        return None if item.file is None else self._pictures.refer(item.file, item.sha256)

    def delete(self, ids: Sequence[str]) -> int:
        """Forget these ids; acknowledged on return. How many were there.

        Raises:
            UsageError: text that no id can be, for it is not Unicode; before anything is forgotten.
            ReadOnly, Unreachable
        """
        self._check_writable()
        for id in ids:
            check_unicode(id)
        there = list(self._table.rows(possible(ids), fields=["id"]))
        self._table.delete(there)
        return len(there)

    def delete_matching(self, filter: FilterLike) -> int:
        """Forget the items that pass a filter. How many there were.

        Raises:
            FilterInvalid: also for a filter that lets everything pass.
            ReadOnly, Unreachable
        """
        self._check_writable()
        asked = parse_filter(filter)
        if not asked:
            raise FilterInvalid("an empty filter would delete every item; give at least one condition")
        ids = [row["id"] for row in self._passing(asked, fields=["id"])]
        self._table.delete(ids)
        return len(ids)

    def update_payload(self, id: str, changes: Payload, *, max_bytes: int | None = None) -> Item:
        """Merge into the payload; None removes a key. Another process that does so at once may undo it.

        Raises:
            UnknownItem, UsageError, ReadOnly, Unreachable
            PayloadTooLarge: the merged payload would have more than `max_bytes` as JSON.
        """
        encode_payload(changes, id)
        self._check_writable()
        with self._lock:
            [item] = self.get([id], with_vector=True)
            payload = {key: value for key, value in {**item.payload, **changes}.items() if value is not None}
            check_size(payload, id)
            size, before = (len(encode_payload(tree, id).encode()) for tree in (payload, item.payload))
            if max_bytes is not None and size > max_bytes and size > before:
                raise PayloadTooLarge(size, max_bytes)
            assert item.vector is not None
            row = self._row(id, item.vector, payload, item.picture)
            self._table.upsert([row])
        return item_of({**row, "vector": None})

    def rename(self, name: str) -> None:
        """Call it by another name here; in Milvus it keeps its own. Raises as `set_root`, and UsageError."""
        if not name.strip():
            raise UsageError("a collection needs a name")
        self._check_writable()
        self._save_manifest(self.manifest.with_(name=name))

    def set_root(self, name: str, folder: str | Path) -> None:
        """Say where the pictures of the root `name` are on this machine. Raises ReadOnly, StorageError."""
        self._check_writable()
        self._save_manifest(
            self.manifest.with_(roots={**self.manifest.roots, name: str(absolute(Path(folder)))})
        )
        self._pictures = self._open_pictures()

    def set_encoder_info(self, info: Mapping[str, Any]) -> None:
        """Say anew what is known about the encoder. Raises ReadOnly, StorageError."""
        self._check_writable()
        self._save_manifest(self.manifest.with_(encoder=dict(info)))

    def _save_manifest(self, manifest: Manifest) -> None:
        write_manifest(self.path, manifest)
        self.manifest = manifest

    def _check_writable(self) -> None:
        if self.read_only:
            raise ReadOnly(f'The collection "{self.name}" was opened read-only.')
        if self._closed:
            raise CollectionError(f'The collection "{self.name}" has been closed.')

    # Reading

    def get(self, ids: Sequence[str], *, with_vector: bool = False) -> list[Item]:
        found = self._rows(ids, with_vector=with_vector)
        missing = [id for id in ids if id not in found]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UnknownItem(f'There is no item "{missing[0]}"{more} in the collection "{self.name}".')
        return [item_of(found[id]) for id in ids]

    def find(self, ids: Sequence[str]) -> dict[str, Item]:
        """id -> item, for those of these ids that are there."""
        return {id: item_of(row) for id, row in self._rows(ids, with_vector=False).items()}

    def _rows(self, ids: Sequence[str], *, with_vector: bool) -> dict[str, Row]:
        return self._table.rows(possible(ids), fields=[*FIELDS, "vector"] if with_vector else FIELDS)

    def count(self, filter: FilterLike | None = None) -> int:
        asked = parse_filter(filter)
        bounds = bounds_of(asked)
        sure = self._table.count(bounds.under)
        return sure if bounds.exact else sure + sum(1 for _ in self._undecided(asked, bounds))

    def known_pictures(self) -> Iterator[KnownPicture]:
        """Every item with a picture: which bytes have a vector."""
        for row in self._table.scan(EVERY):
            if row["picture"]:
                box = row["payload"].get("box")
                text = json.dumps(box, separators=(",", ":")) if isinstance(box, list) else None
                yield KnownPicture(row["id"], row["picture"]["sha256"], text)

    def scroll(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        with_vector: bool = False,
        filter: FilterLike | None = None,
    ) -> tuple[list[Item], str | None]:
        if limit < 1:
            raise UsageError(f"limit must be at least 1, got {limit}")
        if after is not None:
            check_unicode(after)
        asked = parse_filter(filter)
        bounds = bounds_of(asked)
        fields = [*FIELDS, "vector"] if with_vector else FIELDS
        found: list[Row] = []
        while len(found) <= limit:
            size = min(limit + 1, MOST_ROWS)
            page = self._table.page(bounds.over, after=after, limit=size, fields=fields)
            found += page if bounds.exact else [row for row in page if passes(asked, row)]
            if len(page) < size:
                break
            after = page[-1]["id"]
        items = [item_of(row) for row in found[:limit]]
        return items, items[-1].id if len(found) > limit else None

    def _passing(self, asked: Filter, *, fields: Sequence[str]) -> Iterator[Row]:
        """The rows that pass, those in doubt last."""
        bounds = bounds_of(asked)
        yield from self._table.scan(bounds.under, fields=fields)
        if not bounds.exact:
            yield from self._undecided(asked, bounds)

    def _undecided(self, asked: Filter, bounds: Bounds) -> Iterator[Row]:
        """Those who pass of the rows that only the payload tells about."""
        return (row for row in self._table.scan(bounds.between) if passes(asked, row))

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
        queries = check_vectors(vectors, self.dim, "the query")
        query = read_query(
            limit=limit,
            offset=offset,
            exact=exact,
            effort=effort,
            score_threshold=score_threshold,
            exclude=exclude,
            with_vector=with_vector,
            filter=filter,
            group_by=group_by,
            group_size=group_size,
        )
        if cursor is not None:
            not_here("cursors", "page with offset, or use `scroll` for all items")
        if query.group_by is not None:
            not_here("group_by", "ask for more results and group them")
        if limit + offset > MOST_RESULTS:
            raise UsageError(
                f"Milvus returns {MOST_RESULTS:,} results at most, got limit={limit:,}, offset={offset:,}"
            )
        return self._answers(queries, query) if len(queries) else []

    def _answers(self, queries: Vectors, query: Query) -> list[SearchResult]:
        index, generation = self._table.index(), self.generation
        if query.exact and not index["exact"]:
            raise NotAvailable(
                f'The index of "{self.name}" is {index["kind"]}, and Milvus cannot compare with every item '
                f"beside it. `dml index rebuild {self.path} --index flat` makes one that does."
            )
        bounds, wanted = bounds_of(query.filter), query.offset + query.limit
        hidden = possible(query.exclude)
        parts = [bounds.over, *(f"id not in {listed(part)}" for part in batches(hidden))]
        k = wanted
        while True:
            found = self._table.search(
                queries,
                k,
                expression=all_of(parts) if parts != [EVERY] else EVERY,
                kind=index["kind"],
                effort=query.effort,
                with_vector=query.with_vector,
            )
            kept = [[hit for hit in hits if bounds.exact or passes(query.filter, hit[1])] for hits in found]
            short = any(len(good) < wanted and len(hits) >= k for good, hits in zip(kept, found, strict=True))
            if not short or k >= MOST_RESULTS:
                break
            k = min(4 * k, MOST_RESULTS)
        return [
            page(good, query, generation, all_seen=len(hits) < k, exact=index["exact"] and not short)
            for good, hits in zip(kept, found, strict=True)
        ]

    def picture(self, id: str) -> bytes:
        return self._pictures.read(self._picture_of(id), id)

    def thumbnail(self, id: str, size: int = 256) -> bytes:
        return self._pictures.thumbnail(self._picture_of(id), id, size)

    def _picture_of(self, id: str) -> Picture:
        picture = self.get([id])[0].picture
        if picture is None:
            raise ImageNotKept(f'Item "{id}" of the collection "{self.name}" has a vector only, no picture.')
        return picture

    def _open_pictures(self) -> Pictures:
        roots = {name: Path(root) for name, root in self.manifest.roots.items()}
        return Pictures(self.path, roots, read_only=self.read_only)

    # The index

    def build_index(
        self,
        kind: str | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        measure: bool = True,
        seed: int = 0,
        promise: Promise | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """Have Milvus make its index anew, and wait for it. Nothing can be searched meanwhile.

        Args:
            kind: "auto", or flat, hnsw, hnsw_sq8, ivf, ivf_sq8, ivf_pq, diskann; None: as the manifest says.
            options: of that kind: links, build_effort, cells, parts.
            measure: measure recall@10, when all items were compared before: the neighbours that some items
                had then are looked for again.
            seed: chooses these items.
            promise, say: for local collections; a promise is refused.

        Returns:
            What is kept in the manifest as "built".

        Raises:
            ConfigError, NotAvailable: an index that this Milvus does not have; the one before stays.
            ReadOnly, Unreachable
        """
        self._check_writable()
        if promise is not None:
            not_here("choice of an index by target recall", "name its kind, and read the recall it measures")
        asked = self.manifest.index
        same: Mapping[str, Any] = asked["options"] if kind in (None, asked["kind"]) else {}
        wanted = {"kind": kind or asked["kind"], "options": dict(same if options is None else options)}
        started, count = time.monotonic(), len(self)
        chosen = chosen_kind(wanted["kind"], count)
        check_kind(chosen, wanted["options"], lite=self._table.lite)
        before = self._table.index()
        truth = self._neighbours(seed) if measure and before["exact"] and chosen != "flat" else None
        if before["kind"] != chosen or wanted["options"] != asked["options"]:
            self._table.set_index(chosen, wanted["options"])
        built = {
            "kind": chosen,
            "exact": chosen == "flat",
            "count": count,
            "sequence": self.generation,
            "seconds": round(time.monotonic() - started, 3),
            "measured": None if truth is None else self._recall(truth),
        }
        self._save_manifest(self.manifest.with_(index=wanted, built=built))
        return built

    def merge(self) -> dict[str, Any]:
        """Nothing to do: Milvus merges by itself. What is kept in the manifest as "built"."""
        return dict(self.manifest.built)

    def settle(self) -> None:
        """Nothing to wait for."""

    def verify(self) -> list[str]:
        """Not here: Milvus checks its own storage. Raises NotAvailable."""
        not_here("verify", "Milvus looks after its own files; see docs/scale.md for backups")

    def _neighbours(self, seed: int) -> dict[str, list[str]]:
        """id -> ids of its ten neighbours, of some items."""
        rng = np.random.default_rng(seed)
        first = self._table.page(EVERY, after=None, limit=MOST_RESULTS, fields=["id"])
        if len(first) < 2:
            return {}
        chosen = rng.choice(len(first), size=min(MEASURED, len(first)), replace=False)
        return self._ten([first[place]["id"] for place in sorted(chosen)])

    def _ten(self, ids: Sequence[str]) -> dict[str, list[str]]:
        rows = self._table.rows(ids, fields=["id", "vector"])
        there = [id for id in ids if id in rows]
        vectors = np.array([rows[id]["vector"] for id in there], np.float32)
        results = self.search(vectors, limit=11)
        return {
            id: [hit.id for hit in result.hits if hit.id != id][:10]
            for id, result in zip(there, results, strict=True)
        }

    def _recall(self, truth: Mapping[str, list[str]]) -> dict[str, Any] | None:
        found = self._ten(list(truth))
        shares = [
            len(set(found[id]) & set(ten)) / len(ten) for id, ten in truth.items() if ten and id in found
        ]
        if not shares:
            return None
        return {
            "recall_at_10": float(np.mean(shares)),
            "queries": len(shares),
            "of": "items",
        }


# Parts


def chosen_kind(kind: str, count: int) -> str:
    """What "auto" means for so many items; any other kind is itself."""
    if kind != "auto":
        return kind
    return "hnsw" if count >= HNSW_FROM else "flat"


def check_about(about: Mapping[str, Any], where: str, *, dim: int, fingerprint: str) -> None:
    """Compare what Milvus says of a collection with what it is taken for.

    Raises:
        CollectionError: not made by dml, or of vectors of another length. DamagedFile: by a newer version.
        ModelMismatch: of another encoder.
    """
    if not about:
        raise CollectionError(
            f"{where} was not made by dml, so it does not say which encoder made its vectors."
        )
    if about["format"] > FORMAT:
        raise DamagedFile(
            f"{where} has format {about['format']}, and this version of dml reads up to {FORMAT}; "
            f"update dml to open it"
        )
    if about.get("dim") != dim:
        raise CollectionError(f"{where} holds vectors of {about.get('dim')} numbers, not of {dim}.")
    if about.get("fingerprint") != fingerprint:
        raise ModelMismatch(
            f"{where} was made by the encoder {str(about.get('fingerprint'))[:12]}, not by "
            f"{fingerprint[:12]}: their vectors cannot be compared."
        )


def not_here(what: str, instead: str) -> NoReturn:
    raise NotAvailable(f"A collection in Milvus has no {what}: {instead}.")
