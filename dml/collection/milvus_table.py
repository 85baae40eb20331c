"""One collection of Milvus as a table of items: schema, batches, pages, indexes, and errors in our words.

Nothing of pymilvus is seen outside this file. It speaks to a server, of a cluster or of a single machine, and
to Milvus Lite, which is a file that this process itself reads and writes.
"""

import json
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from dml.collection.filters_milvus import EVERY, LONGEST_FACT, MOST_FACTS, all_of, listed, quoted
from dml.errors import CollectionError, ConfigError, MissingExtra, NotAvailable, Unreachable, UsageError
from dml.index.base import Vectors
from dml.registry import unknown

TOKEN = "DML_MILVUS_TOKEN"
"""Environment variable with "user:password" or an API key. It is never written anywhere."""

TIMEOUT_SECONDS = 30.0
BUILD_SECONDS = 24 * 3600.0
"""How long an index may take."""

MESSAGE_BYTES = 16 << 20
"""Of one write; Milvus refuses messages of 64 MB."""
MOST_ROWS = 4096
"""Of one write, and ids in one expression."""
PAGE_ROWS = 1000
MOST_RESULTS = 16_384
"""Results of one query, as Milvus limits them."""
ANSWER_ROWS = 16_384
"""Results of all queries of one call; more are asked for in several."""

LONGEST_ID_BYTES = 2048
"""The longest id, of four bytes a character."""
LARGEST_JSON = 65_536
"""Bytes of a payload, as Milvus limits them."""

ABOUT = "dml"
"""The property that says what a collection is."""

FIELDS = ("id", "payload", "picture", "sequence")

TIE = 2e-7
"""Scores that differ by no more count as equal: float32 knows about seven digits."""
OVERTAKEN = 5
"""How often a search is tried again that a write has overtaken."""

METRIC = "IP"
"""Of vectors of length 1 the inner product is the cosine."""

CONSISTENCIES = ("Strong", "Session", "Bounded", "Eventually")

Row = dict[str, Any]


class Kind(NamedTuple):
    """An index of Milvus under our name."""

    name: str  # Milvus's
    options: Mapping[str, str]  # ours -> Milvus's
    defaults: Mapping[str, Any]  # by Milvus's names
    effort: str | None = None  # what is turned up to look harder
    lite: bool = True  # whether Milvus Lite has it; it takes any name without a word, and searches otherwise


GRAPH = MappingProxyType({"links": "M", "build_effort": "efConstruction"})
GRAPH_DEFAULTS = MappingProxyType({"M": 32, "efConstruction": 200})
CELLS = MappingProxyType({"cells": "nlist"})
CELLS_DEFAULTS = MappingProxyType({"nlist": 1024})
NOTHING: Mapping[str, Any] = MappingProxyType({})

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "flat": Kind("FLAT", NOTHING, NOTHING),
        "hnsw": Kind("HNSW", GRAPH, GRAPH_DEFAULTS, "ef"),
        "hnsw_sq8": Kind("HNSW_SQ", GRAPH, MappingProxyType({**GRAPH_DEFAULTS, "sq_type": "SQ8"}), "ef"),
        "ivf": Kind("IVF_FLAT", CELLS, CELLS_DEFAULTS, "nprobe"),
        "ivf_sq8": Kind("IVF_SQ8", CELLS, CELLS_DEFAULTS, "nprobe"),
        "ivf_pq": Kind(
            "IVF_PQ", MappingProxyType({**CELLS, "parts": "m"}), CELLS_DEFAULTS, "nprobe", lite=False
        ),
        "diskann": Kind("DISKANN", NOTHING, NOTHING, "search_list", lite=False),
    }
)
"""Our name -> index of Milvus. A server of an old version may not have all of them, and says so."""

DEFAULT_EFFORT: Mapping[str, int] = MappingProxyType({"ef": 128, "nprobe": 32, "search_list": 128})


def check_uri(uri: str) -> str:
    """The address of a server as it may be written down, or the absolute path of a Milvus Lite file.

    Raises:
        UsageError: for anything else, and for an address with a password in it.
    """
    if "://" not in uri:
        if not uri.endswith(".db"):
            raise UsageError(
                f'"{uri}" is no address of Milvus: give http://HOST:19530, https://… or a file FILE.db '
                f"(Milvus Lite)."
            )
        return str(Path(uri).resolve())
    parts = urlsplit(uri)
    if parts.username or parts.password:
        raise UsageError(
            f"The address of Milvus is written down, so it may not hold a password. Leave it out, and set "
            f"{TOKEN}=user:password in the environment."
        )
    if parts.scheme not in ("http", "https", "tcp") or not parts.hostname:
        raise UsageError(f'"{uri}" is no address of Milvus: give http://HOST:19530 or https://HOST:19530.')
    return uri


def check_name(name: str) -> str:
    """A name that Milvus takes for a collection. Raises UsageError."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", name):
        raise UsageError(
            f'Milvus takes letters, digits and "_" in the name of a collection, and no digit at its '
            f'beginning; got "{name}".'
        )
    return name


class MilvusTable:
    """A collection of Milvus, there or not yet.

    Args:
        uri: as `check_uri` returns it.
        name: of the collection in Milvus.
        consistency: how much of other clients' writes a search must see; "Strong": all that were acknowledged
            before it began.
        timeout: seconds that a call may take.

    Raises:
        MissingExtra: pymilvus, or milvus-lite for a file, is not installed.
        Unreachable: nothing answers at the address.
    """

    def __init__(
        self, uri: str, name: str, *, consistency: str = "Strong", timeout: float = TIMEOUT_SECONDS
    ) -> None:
        if consistency not in CONSISTENCIES:
            raise ConfigError(
                unknown("consistency", consistency, dict.fromkeys(CONSISTENCIES), classes=False)
            )
        self.uri, self.name, self.consistency, self.timeout = uri, name, consistency, timeout
        self.lite = "://" not in uri
        self._client = connected(uri, timeout)

    def close(self) -> None:
        """Let go of the connection; of a Milvus Lite file with the last table of this process."""
        disconnected(self.uri, self._client)

    # What it is

    def exists(self) -> bool:
        with self._words():
            return bool(self._client.has_collection(self.name, timeout=self.timeout))

    def version(self) -> str:
        """Of the server."""
        with self._words():
            return str(self._client.get_server_version(timeout=self.timeout))

    def about(self) -> dict[str, Any]:
        """What was written down when it was made; {} for a collection that is not ours."""
        with self._words():
            found = self._client.describe_collection(self.name, timeout=self.timeout)
        for text in (dict(found.get("properties") or {}).get(ABOUT), found.get("description")):
            try:
                tree = json.loads(text or "")
            except ValueError:
                continue
            if isinstance(tree, dict) and isinstance(tree.get("format"), int):
                return tree
        return {}

    def create(self, dim: int, about: Mapping[str, Any], kind: str, options: Mapping[str, Any]) -> None:
        """Make it, empty. Raises ConfigError for an index that is not to be had."""
        from pymilvus import DataType, MilvusClient

        text = json.dumps(dict(about))
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=text)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=LONGEST_ID_BYTES)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        schema.add_field("payload", DataType.JSON)
        schema.add_field("picture", DataType.JSON)
        schema.add_field("sequence", DataType.INT64)
        schema.add_field(
            "facts",
            DataType.ARRAY,
            element_type=DataType.VARCHAR,
            max_capacity=MOST_FACTS,
            max_length=LONGEST_FACT,
        )
        schema.add_field("numbers", DataType.JSON)
        with self._words():
            self._client.create_collection(
                self.name,
                schema=schema,
                index_params=self._index_params(kind, options),
                consistency_level=self.consistency,
                properties={ABOUT: text},
                timeout=self.timeout,
            )

    def load(self) -> None:
        """See to it that it can be searched."""
        with self._words():
            state = self._client.get_load_state(self.name, timeout=self.timeout)
            if str(state.get("state")).rpartition(".")[2] != "Loaded":
                self._client.load_collection(self.name, timeout=self.timeout)

    def drop(self) -> None:
        """Delete it, with everything in it."""
        with self._words():
            self._client.drop_collection(self.name, timeout=self.timeout)

    # Indexes

    def index(self) -> dict[str, Any]:
        """{"kind": ours, "exact", "pending": rows that are not in it yet, and Milvus's settings}."""
        with self._words():
            found = dict(self._client.describe_index(self.name, "vector", timeout=self.timeout) or {})
        known = {kind.name: name for name, kind in KINDS.items()}
        name = str(found.get("index_type", "none"))
        settings = {
            key: value for key, value in found.items() if key in ("M", "efConstruction", "nlist", "m")
        }
        return {
            "kind": known.get(name, name.lower()),
            "exact": name == "FLAT",
            "pending": int(found.get("pending_index_rows") or 0),
            **settings,
        }

    def set_index(self, kind: str, options: Mapping[str, Any]) -> None:
        """Take another index, and wait for it. Until it is there nothing can be searched.

        Raises:
            ConfigError: an index that this Milvus does not have; the one before is back then.
        """
        wanted, before = self._index_params(kind, options), self.index()
        with self._words():
            self._client.release_collection(self.name, timeout=self.timeout)
            self._client.drop_index(self.name, "vector", timeout=self.timeout)
        try:
            with self._words():
                self._client.create_index(self.name, wanted, timeout=BUILD_SECONDS)
        except CollectionError as error:
            with self._words():
                former = self._index_params(before["kind"] if before["kind"] in KINDS else "flat", {})
                self._client.create_index(self.name, former, timeout=BUILD_SECONDS)
                self._client.load_collection(self.name, timeout=BUILD_SECONDS)
            raise ConfigError(f'The index "{kind}" could not be made: {error}') from error
        with self._words():
            self._client.load_collection(self.name, timeout=BUILD_SECONDS)

    def _index_params(self, kind: str, options: Mapping[str, Any]) -> Any:
        from pymilvus import MilvusClient

        found = check_kind(kind, options, lite=self.lite)
        settings = {**found.defaults, **{found.options[key]: value for key, value in options.items()}}
        params = MilvusClient.prepare_index_params()
        params.add_index("vector", index_type=found.name, metric_type=METRIC, params=settings)
        return params

    # Writing

    def upsert(self, rows: Sequence[Row]) -> None:
        """Add or replace rows; acknowledged on return. In several messages where one would be too large.

        Raises:
            CollectionError: says how many rows were written before the failure.
        """
        written = 0
        for part in messages(rows):
            try:
                with self._words():
                    self._client.upsert(self.name, part, timeout=self.timeout)
            except CollectionError as error:
                if len(rows) > len(part):
                    error.args = (f"{error} Of {len(rows):,} items {written:,} were written before.",)
                raise
            written += len(part)

    def delete(self, ids: Sequence[str]) -> None:
        for part in batches(ids):
            with self._words():
                self._client.delete(self.name, filter=f"id in {listed(part)}", timeout=self.timeout)

    # Reading

    def count(self, expression: str) -> int:
        """How many rows meet an expression."""
        with self._words():
            [row] = self._client.query(
                self.name,
                filter="" if expression == EVERY else expression,
                output_fields=["count(*)"],
                consistency_level=self.consistency,
                timeout=self.timeout,
            )
        return int(row["count(*)"])

    def rows(self, ids: Iterable[str], *, fields: Sequence[str] = FIELDS) -> dict[str, Row]:
        """id -> row, of those that are there."""
        return {
            row["id"]: row
            for part in batches(list(dict.fromkeys(ids)))
            for row in self._query(f"id in {listed(part)}", fields)
        }

    def page(
        self, expression: str, *, after: str | None, limit: int, fields: Sequence[str] = FIELDS
    ) -> list[Row]:
        """The first `limit` rows behind the id `after` that meet an expression, by id (in code points)."""
        if after is not None:
            expression = all_of([expression, f"id > {quoted(after)}"])
        if not self.lite:
            found = self._query(expression, fields, limit=min(limit, MOST_RESULTS))
            return sorted(found, key=lambda row: row["id"])
        # Milvus Lite returns any rows, not the first ones: which these are has to be asked before.
        ids = sorted(row["id"] for row in self._query(expression, ["id"]))[:limit]
        if list(fields) == ["id"]:
            return [{"id": id} for id in ids]
        found = self.rows(ids, fields=fields)
        return [found[id] for id in ids if id in found]

    def scan(self, expression: str, *, fields: Sequence[str] = FIELDS) -> Iterator[Row]:
        """All rows that meet an expression, by id, a page at a time."""
        after = None
        while page := self.page(expression, after=after, limit=PAGE_ROWS, fields=fields):
            yield from page
            after = page[-1]["id"]

    def search(
        self, vectors: Vectors, k: int, *, expression: str, kind: str, effort: int | None, with_vector: bool
    ) -> list[list[tuple[float, Row]]]:
        """(score, row) of the k nearest of each query, best first, ties by id.

        Args:
            kind: of the index there is, as `index` says.
            effort: how hard an approximate one looks.
        """
        found = KINDS.get(kind)
        params: dict[str, Any] = {}
        if found is not None and found.effort is not None:
            wanted = effort or DEFAULT_EFFORT[found.effort]
            params = {found.effort: wanted if found.effort == "nprobe" else max(k, wanted)}
        asked = {
            "anns_field": "vector",
            "filter": "" if expression == EVERY else expression,
            "limit": k,
            "output_fields": [*FIELDS, "vector"] if with_vector else list(FIELDS),
            "search_params": {"metric_type": METRIC, "params": params},
            "consistency_level": self.consistency,
            "timeout": self.timeout,
        }
        at_once = max(1, min(ANSWER_ROWS // k, MESSAGE_BYTES // (4 * vectors.shape[1])))
        results: list[list[tuple[float, Row]]] = []
        for start in range(0, len(vectors), at_once):
            answers = self._search(list(vectors[start : start + at_once]), asked)
            results += [in_order((float(hit["distance"]), row_of(hit)) for hit in one) for one in answers]
        return results

    def _search(self, queries: list[Vectors], asked: Mapping[str, Any]) -> list[Any]:
        for again in range(OVERTAKEN + 1):
            try:
                with self._words():
                    return list(self._client.search(self.name, data=queries, **asked))
            except CollectionError as error:
                # Milvus reads vectors after it has found the ids; a write may have come in between.
                if "incomplete query result" not in str(error) or again == OVERTAKEN:
                    raise
        raise AssertionError("unreachable")

    def _query(self, expression: str, fields: Sequence[str], **options: Any) -> list[Row]:
        with self._words():
            found = self._client.query(
                self.name,
                filter=expression,
                output_fields=list(fields),
                consistency_level=self.consistency,
                timeout=self.timeout,
                **options,
            )
            return [dict(row) for row in found]

    @contextmanager
    def _words(self) -> Iterator[None]:
        with in_our_words(self.uri):
            yield


def check_kind(kind: str, options: Mapping[str, Any], *, lite: bool) -> Kind:
    """An index of Milvus. Raises ConfigError, NotAvailable."""
    if kind not in KINDS:
        raise ConfigError(unknown("index kind of Milvus", kind, dict.fromkeys(KINDS), classes=False))
    found = KINDS[kind]
    if lite and not found.lite:
        known = ", ".join(name for name, one in KINDS.items() if one.lite)
        raise NotAvailable(f'Milvus Lite has no index "{kind}"; it has {known}. A server has more.')
    for name, value in options.items():
        if name not in found.options:
            takes = ", ".join(found.options) or "none"
            raise ConfigError(f'The index kind "{kind}" of Milvus has no option "{name}"; it takes: {takes}.')
        if type(value) is not int or value < 1:
            raise ConfigError(f'The option "{name}" takes a whole number of at least 1, got {value!r}.')
    return found


def row_of(hit: Any) -> Row:
    """The row of a hit, as pymilvus returns it."""
    return {**dict(hit["entity"]), "id": hit["id"]}


def in_order(hits: Iterable[tuple[float, Row]]) -> list[tuple[float, Row]]:
    """Best first, and of equals the first by id.

    Engines add up in different orders, so scores of equal vectors differ in their last digits: what follows
    at no more than `TIE` has the score of the one before it.
    """
    level: list[tuple[float, Row]] = []
    last = score = np.inf
    for true, row in sorted(hits, key=lambda hit: -hit[0]):
        score = score if last - true <= TIE else true
        level.append((score, row))
        last = true
    return sorted(level, key=lambda hit: (-hit[0], hit[1]["id"]))


def batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Ids in parts that one expression can name."""
    for start in range(0, len(ids), MOST_ROWS):
        yield ids[start : start + MOST_ROWS]


def messages(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows in parts that one message can carry."""
    part: list[Row] = []
    size = 0
    for row in rows:
        weight = weight_of(row)
        if part and (size + weight > MESSAGE_BYTES or len(part) >= MOST_ROWS):
            yield part
            part, size = [], 0
        part.append(row)
        size += weight
    if part:
        yield part


def weight_of(row: Row) -> int:
    """Bytes of a row in a message, about."""
    texts = sum(4 + len(fact.encode()) for fact in row["facts"])
    trees = len(json.dumps([row["payload"], row["numbers"], row["picture"]], ensure_ascii=False).encode())
    return 4 * len(row["vector"]) + texts + trees + len(row["id"].encode()) + 64


# Connections


_open_files: Counter[str] = Counter()
"""Milvus Lite files that this process has open: path -> tables."""
_lock = threading.Lock()


def connected(uri: str, timeout: float) -> Any:
    """A client of pymilvus. Raises MissingExtra, Unreachable, CollectionError."""
    try:
        from pymilvus import MilvusClient
    except ModuleNotFoundError:
        raise MissingExtra("pymilvus, which speaks to Milvus,", "milvus") from None
    # It logs a traceback for everything that it raises; what is raised is told in our words.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    if "://" not in uri:
        return opened(uri, timeout)
    with in_our_words(uri):
        return MilvusClient(uri, token=os.environ.get(TOKEN, ""), timeout=timeout)


def opened(path: str, timeout: float) -> Any:
    """A client of the Milvus Lite file at `path`, which is made where there is none."""
    from pymilvus import MilvusClient
    from pymilvus.exceptions import MilvusException

    try:
        import milvus_lite  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtra("milvus-lite, which reads and writes Milvus Lite files,", "milvus-lite") from None
    for name in ("milvus_lite", "grpc._server"):  # it is a server in this process, and logs as one
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not Path(path).parent.is_dir():
        raise UsageError(f"There is no folder {Path(path).parent} for the Milvus Lite file {path}.")
    with _lock:
        try:
            client = MilvusClient(path, timeout=timeout)
        except MilvusException as error:
            raise CollectionError(
                f"The Milvus Lite file {path} could not be opened: another process has it open, or it is "
                f"damaged. End the other process, or use a Milvus server. ({error.message})"
            ) from error
        _open_files[path] += 1
    return client


def disconnected(uri: str, client: Any) -> None:
    """Close a client, and a Milvus Lite file with its last one."""
    client.close()
    if "://" in uri:
        return
    from milvus_lite.server_manager import server_manager_instance

    with _lock:
        _open_files[uri] -= 1
        if not _open_files[uri]:
            del _open_files[uri]
            server_manager_instance.release_server(uri)


@contextmanager
def in_our_words(uri: str) -> Iterator[None]:
    """Turn what pymilvus raises into errors that say what to do.

    Raises:
        Unreachable: nothing answers, or not in time.
        CollectionError: Milvus refuses; with its reason.
    """
    from grpc import RpcError
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except (MilvusException, RpcError, ConnectionError, TimeoutError) as error:
        reason = " ".join(str(getattr(error, "message", None) or error).split())[:500]
        if is_silence(error, reason):
            raise Unreachable(
                f"Milvus at {uri} does not answer. Is it running, and is the address right? ({reason})"
            ) from error
        if re.search(r"(?i)auth check|unauthenticated|permission", reason):
            raise CollectionError(
                f"Milvus at {uri} does not let us in: {reason} Set {TOKEN}=user:password in the environment."
            ) from error
        if re.search(r"(?i)quota|deny to write|disk|memory", reason):
            raise CollectionError(
                f"Milvus at {uri} takes no more: {reason} Give it room, then try again."
            ) from error
        raise CollectionError(f"Milvus at {uri} refuses: {reason}") from error


def is_silence(error: BaseException, reason: str) -> bool:
    """Whether nobody answered, rather than somebody with a refusal."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if type(error).__name__ in ("ConnectError", "MilvusUnavailableException"):
        return True
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    if getattr(code, "name", "") in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        return True
    # After a restart, a server loads its collections for some seconds while it answers already.
    return bool(re.search(r"(?i)fail connecting|unavailable|deadline.exceeded|collection not loaded", reason))
