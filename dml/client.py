"""A typed client of the service.

>>> with Client("http://127.0.0.1:8000") as client:                                   # doctest: +SKIP
...     for hit in client.search("shoes", image=Path("mine.jpg"), limit=5).hits:
...         print(hit.rank, hit.score, hit.id)

An answer is a frozen dataclass with the fields of the API; a problem is a `Problem`, a ServiceError with
the service's own explanation.
"""

import base64
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dml.errors import ServiceError, UsageError

Picture = bytes | Path


class Problem(ServiceError):
    """The service said no, and why.

    Attributes:
        status: the HTTP status.
        type: the name in the catalogue ("unknown-item", "invalid-image", …); "" when the answer was no
            problem document, as a proxy's is.
        detail: what is wrong and what to do.
        request_id: under which the operator finds the request in the log.
        members: the whole document.
    """

    def __init__(self, status: int, members: Mapping[str, Any]) -> None:
        self.status, self.members = status, dict(members)
        self.type = str(members.get("type", "")).rpartition("/")[2]
        self.detail = str(members.get("detail", ""))
        self.request_id = str(members.get("request_id", ""))
        asked = f" (request {self.request_id})" if self.request_id else ""
        super().__init__(
            f"The service answered {status} {self.type or 'without a reason'}: {self.detail}{asked}"
        )


@dataclass(frozen=True)
class Hit:
    """One search result."""

    id: str
    score: float  # cosine similarity, -1 to 1; higher is nearer
    rank: int  # 1 is the best
    label: str | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)
    image: str | None = None  # path of the picture on the service
    vector: NDArray[np.float32] | None = None
    group: str | int | float | bool | None = None  # what it was grouped by


@dataclass(frozen=True)
class SearchAnswer:
    """The answer to one search; see the API for the fields."""

    hits: tuple[Hit, ...]
    query_id: str
    collection: str
    generation: int
    model: str
    total: int
    total_is_exact: bool
    next_cursor: str | None
    approximate: bool
    took_ms: float


@dataclass(frozen=True)
class Item:
    """One item of a collection."""

    id: str
    payload: Mapping[str, Any]
    sequence: int
    label: str | None = None
    image: str | None = None
    vector: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Written:
    """An acknowledged write."""

    id: str
    created: bool
    generation: int


@dataclass(frozen=True)
class Collection:
    """What a collection is. The last fields are None in a list, and known when one is asked for."""

    name: str
    count: int
    dim: int
    metric: str
    model_fingerprint: str
    accepts: tuple[str, ...]
    index: Mapping[str, Any] | None = None
    measured_recall: float | None = None
    promised_recall: float | None = None  # recall@10 that the index was chosen for
    generation: int | None = None
    pending: int | None = None
    bytes_on_disk: int | None = None
    capabilities: tuple[str, ...] | None = None
    read_only: bool | None = None


@dataclass(frozen=True)
class BatchItem:
    """One item of `put_items`: exactly one of image and vector."""

    id: str
    image: Picture | None = None
    vector: ArrayLike | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """What became of many items."""

    written: tuple[Written, ...]
    failed: Mapping[str, Problem]  # by id


@dataclass(frozen=True)
class Job:
    """Work that the service does by itself."""

    id: str
    kind: str  # "rebuild", "upsert", "duplicates"
    collection: str
    state: str  # "queued", "running", "succeeded", "failed", "cancelled"
    progress: float | None  # 0 to 1
    message: str
    created: str  # ISO 8601, UTC
    started: str | None = None
    ended: str | None = None
    result: Mapping[str, Any] | None = None
    problem: Mapping[str, Any] | None = None

    @property
    def over(self) -> bool:
        return self.state not in ("queued", "running")


@dataclass(frozen=True)
class Judgement:
    """What a user said of a hit."""

    query_id: str
    id: str
    relevant: bool
    key: str | None  # the name of the API key that it came with
    at: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Service:
    """What answers, and what this client may do there."""

    name: str
    version: str
    limits: Mapping[str, int]
    key: str | None  # the name of the key that is sent; None: none is needed
    scope: Literal["search", "write", "admin"]
    read_only: bool
    default_collection: str | None  # the first that was named at its start


@dataclass(frozen=True)
class Model:
    """An encoder that answers at the service."""

    id: str
    fingerprint: str
    dim: int
    input_size: int | None
    loss: str | None
    trained_on: str | None
    collections: tuple[str, ...]


@dataclass(frozen=True)
class Embeddings:
    """Vectors of pictures."""

    model: str
    vectors: NDArray[np.float32]  # (N, D) unit length


class Client:
    """Talks to one service; keeps its connections open, so make one and use it for all requests.

    Args:
        url: where the service is, as `dml serve` prints it.
        key: API key, when the service asks for one.
        timeout: seconds until a request counts as failed.

    Raises:
        UsageError: for an address that is none.
        ServiceError: by every method, when the service cannot be reached; `Problem` when it says no.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 30.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f'The address of a service starts with http:// or https://, got "{url}"')
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            raise UsageError(f'"{url}" is not an address: {error}') from None

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # Search

    def search(
        self,
        collection: str,
        *,
        image: Picture | None = None,
        image_url: str | None = None,
        id: str | None = None,
        vector: ArrayLike | None = None,
        positive: Sequence[str] = (),
        negative: Sequence[str] = (),
        limit: int = 10,
        offset: int = 0,
        score_threshold: float | None = None,
        with_payload: bool = True,
        with_vector: bool = False,
        exact: bool = False,
        effort: int | None = None,
        filter: Mapping[str, Any] | None = None,
        group_by: str | None = None,
        group_size: int = 1,
        cursor: str | None = None,
    ) -> SearchAnswer:
        """The items nearest to a picture, an item or a vector (one of them), or to examples; or to both.

        Args:
            image: the bytes of a picture file, or its path.
            image_url: the address of a picture, on a host that the service fetches from (`--fetch-host`).
            positive, negative: ids of items that are, or are not, like what is looked for.
            score_threshold: leave out hits of a lower cosine similarity.
            exact: compare with every item, whatever the index.
            effort: how hard an approximate index looks.
            filter: {"must": […], "should": […], "must_not": […]} of conditions on the payload.
            group_by: a path in the payload: the `limit` best groups, of each `group_size` hits.
            cursor: "*" starts a walk through all hits; `next_cursor` of an answer goes on with it.
        """
        examples = {"positive": list(positive), "negative": list(negative)}
        query: dict[str, Any] = {name: ids for name, ids in examples.items() if ids}
        options: dict[str, Any] = {
            "limit": limit,
            "offset": offset,
            "with_payload": with_payload,
            "with_vector": with_vector,
            "params": {"exact": exact} | ({} if effort is None else {"effort": effort}),
        }
        further = {"score_threshold": score_threshold, "filter": filter, "cursor": cursor}
        options |= {name: value for name, value in further.items() if value is not None}
        if group_by is not None:
            options |= {"group_by": group_by, "group_size": group_size}
        place = f"{self._place(collection)}/search"
        if image is not None and image_url is None and id is None and vector is None:
            params = json.dumps({**options, "query": query})
            files = {"file": ("image", read(image), "application/octet-stream")}
            return search_answer(self._json("POST", f"{place}/image", files=files, data={"params": params}))
        if image is not None:
            query["image"] = base64.b64encode(read(image)).decode()
        named = {"image_url": image_url, "id": id}
        query |= {name: text for name, text in named.items() if text is not None}
        if vector is not None:
            query["vector"] = numbers(vector)
        return search_answer(self._json("POST", place, json={**options, "query": query}))

    def search_vectors(
        self, collection: str, vectors: ArrayLike, *, limit: int = 10, exact: bool = False, batch: int = 32
    ) -> list[SearchAnswer]:
        """One answer per row of `vectors` (N, D), asked `batch` at a time; payloads are left out.

        Raises:
            Problem: the first problem among the answers.
        """
        rows = np.asarray(vectors, dtype=np.float32)
        searches = [
            {
                "query": {"vector": row.tolist()},
                "limit": limit,
                "with_payload": False,
                "params": {"exact": exact},
            }
            for row in rows
        ]
        answers = []
        for start in range(0, len(searches), batch):
            body = {"searches": searches[start : start + batch]}
            for result in self._json("POST", f"{self._place(collection)}/search/batch", json=body)["results"]:
                if "hits" not in result:
                    raise Problem(int(result.get("status", 0)), result)
                answers.append(search_answer(result))
        return answers

    def similar(self, collection: str, id: str, *, limit: int = 10, offset: int = 0) -> SearchAnswer:
        """More like this item, without the item itself."""
        params = {"limit": limit, "offset": offset}
        return search_answer(self._json("GET", f"{self._place(collection, id)}/similar", params=params))

    def embed(self, images: Sequence[Picture], *, model: str | None = None) -> Embeddings:
        """The vectors of pictures. `model`: a fingerprint, needed where several encoders answer."""
        files = [("file", ("image", read(image), "application/octet-stream")) for image in images]
        found = self._json(
            "POST", "/v1/embeddings", files=files, params={} if model is None else {"model": model}
        )
        return Embeddings(found["model"], np.asarray(found["embeddings"], dtype=np.float32))

    # Items

    def get_item(self, collection: str, id: str, *, with_vector: bool = False) -> Item:
        return item(self._json("GET", self._place(collection, id), params={"with_vector": with_vector}))

    def put_item(
        self,
        collection: str,
        id: str,
        *,
        image: Picture | None = None,
        vector: ArrayLike | None = None,
        payload: Mapping[str, Any] | None = None,
        if_sequence: int | None = None,
        only_new: bool = False,
        once: str | None = None,
    ) -> Written:
        """Add an item, or replace the one of this id: by its picture, which is stored, or by a vector.

        Args:
            if_sequence: only when the item was last written by this change (`Item.sequence`).
            only_new: only when there is no item of this id.
            once: an Idempotency-Key of your choice: sent again with it, the write is not done twice.
        """
        if (image is None) == (vector is None):
            raise UsageError(f'The item "{id}" needs either an image or a vector, and not both.')
        place, payload = self._place(collection, id), dict(payload or {})
        headers = conditions(if_sequence, once, only_new=only_new)
        if image is not None:
            files = {"file": ("image", read(image), "application/octet-stream")}
            data = {"payload": json.dumps(payload)}
            found = self._json("PUT", place, files=files, data=data, headers=headers)
        else:
            assert vector is not None
            body = {"vector": numbers(vector), "payload": payload}
            found = self._json("PUT", place, json=body, headers=headers)
        return Written(**found)

    def put_items(self, collection: str, items: Sequence[BatchItem], *, once: str | None = None) -> Batch:
        """Add or replace many items, and wait until it is done. One that is wrong does not stop the others.

        Args:
            once: as in `put_item`.
        """
        found = self._json("POST", f"{self._place(collection)}/items", **batch(items, once, wait=True))
        return batch_answer(found["results"])

    def put_items_later(self, collection: str, items: Sequence[BatchItem], *, once: str | None = None) -> Job:
        """As `put_items`, as a job that nobody waits for; see `wait_for`."""
        return Job(**self._json("POST", f"{self._place(collection)}/items", **batch(items, once, wait=False)))

    def update_payload(
        self,
        collection: str,
        id: str,
        changes: Mapping[str, Any],
        *,
        if_sequence: int | None = None,
        once: str | None = None,
    ) -> Item:
        """Merge into the payload; a value of None removes its key. `if_sequence`, `once`: see `put_item`."""
        headers, body = conditions(if_sequence, once), {"payload": dict(changes)}
        return item(self._json("PATCH", self._place(collection, id), json=body, headers=headers))

    def delete_item(self, collection: str, id: str, *, if_sequence: int | None = None) -> None:
        self._send("DELETE", self._place(collection, id), headers=conditions(if_sequence, None))

    def delete_items(self, collection: str, ids: Sequence[str]) -> int:
        """Forget several; how many were there."""
        found = self._json("POST", f"{self._place(collection)}/items/delete", json={"ids": list(ids)})
        return int(found["deleted"])

    def delete_matching(self, collection: str, filter: Mapping[str, Any]) -> int:
        """Forget the items that pass a filter; how many there were."""
        body = {"filter": dict(filter)}
        return int(self._json("POST", f"{self._place(collection)}/items/delete", json=body)["deleted"])

    def items(
        self,
        collection: str,
        *,
        with_vector: bool = False,
        page: int = 500,
        filter: Mapping[str, Any] | None = None,
    ) -> Iterator[Item]:
        """All items, or those that pass a filter, in the order of their ids, fetched `page` at a time."""
        cursor: str | None = None
        while True:
            params: dict[str, Any] = {"limit": page, "with_vector": with_vector}
            if filter is not None:
                params["filter"] = json.dumps(filter)
            if cursor is not None:
                params["cursor"] = cursor
            found = self._json("GET", f"{self._place(collection)}/items", params=params)
            yield from map(item, found["items"])
            cursor = found["next_cursor"]
            if cursor is None:
                return

    def count(self, collection: str, filter: Mapping[str, Any] | None = None) -> int:
        """How many items there are, or pass a filter."""
        body = {} if filter is None else {"filter": dict(filter)}
        return int(self._json("POST", f"{self._place(collection)}/count", json=body)["count"])

    def image(self, collection: str, id: str, *, size: Literal["thumb", "full"] = "full") -> bytes:
        """The picture of an item: as it was given, or small."""
        return self._send("GET", f"{self._place(collection, id)}/image", params={"size": size}).content

    # Jobs

    def rebuild(
        self,
        collection: str,
        *,
        kind: str | None = None,
        options: Mapping[str, Any] | None = None,
        target_recall: float | None = None,
        memory_budget: int | None = None,
        latency_budget: float | None = None,
    ) -> Job:
        """Have the index built anew: of a kind, of one that keeps a promised recall@10, or as before."""
        wishes = {
            "kind": kind,
            "options": None if options is None else dict(options),
            "target_recall": target_recall,
            "memory_budget": memory_budget,
            "latency_budget": latency_budget,
        }
        body = {name: value for name, value in wishes.items() if value is not None}
        return Job(**self._json("POST", f"{self._place(collection)}/rebuild", json=body))

    def duplicates(
        self,
        collection: str,
        *,
        level: Literal["file", "similar"] = "file",
        score_threshold: float = 0.95,
        limit: int = 1000,
    ) -> Job:
        """Look for items with the same file, or with nearly the same vector; the result names their ids."""
        body = {"level": level, "limit": limit, "score_threshold": score_threshold}
        return Job(**self._json("POST", f"{self._place(collection)}/duplicates", json=body))

    def jobs(self, *, limit: int = 100) -> list[Job]:
        """The newest jobs, newest first."""
        return [Job(**entry) for entry in self._json("GET", "/v1/jobs", params={"limit": limit})["items"]]

    def job(self, id: str) -> Job:
        return Job(**self._json("GET", f"/v1/jobs/{segment(id)}"))

    def cancel(self, id: str) -> Job:
        """Ask a job to stop as soon as it can."""
        return Job(**self._json("DELETE", f"/v1/jobs/{segment(id)}"))

    def wait_for(self, job: Job, *, seconds: float = 600.0) -> Job:
        """Return when the job has ended. Raises Problem when it failed, ServiceError when it takes longer."""
        end, pause = time.monotonic() + seconds, 0.02
        while not job.over:
            if time.monotonic() > end:
                raise ServiceError(f"The job {job.id} is still {job.state} after {seconds:g} seconds.")
            time.sleep(pause)
            pause = min(2.0, 1.5 * pause)
            job = self.job(job.id)
        if job.problem is not None:
            raise Problem(int(job.problem.get("status", 0)), job.problem)
        return job

    # Collections and aliases

    def create_collection(
        self,
        name: str,
        *,
        model: str | None = None,
        dim: int | None = None,
        kind: str = "auto",
        options: Mapping[str, Any] | None = None,
        target_recall: float | None = None,
        memory_budget: int | None = None,
        latency_budget: float | None = None,
    ) -> Collection:
        """Have an empty collection of this name; one with the same settings stays as it is.

        Args:
            model: fingerprint of an encoder of the service, or its beginning; None: the only one.
            dim: for vectors that are made elsewhere; `model` is any text then.
            kind, options: of the index.
            target_recall: recall@10 that the index is to keep, instead of a kind; with at most so many bytes
                (`memory_budget`) and seconds of one query (`latency_budget`).
        """
        promise = {
            "target_recall": target_recall,
            "memory_budget": memory_budget,
            "latency_budget": latency_budget,
        }
        index: dict[str, Any] = {"kind": kind, "options": dict(options or {})}
        index |= {name: value for name, value in promise.items() if value is not None}
        body: dict[str, Any] = {"index": index}
        body |= {k: v for k, v in (("model", model), ("dim", dim)) if v is not None}
        return collection_answer(self._json("PUT", self._place(name), json=body))

    def delete_collection(self, name: str) -> None:
        """Delete a collection with all that is in it."""
        self._send("DELETE", self._place(name))

    def reload(self) -> list[str]:
        """Have collections served that were put into the folder of the service since its start; their names.

        Raises:
            Problem: the first that cannot be served; the others are.
        """
        found = self._json("POST", "/v1/admin/reload")
        for entry in found["failed"]:
            raise Problem(int(entry["problem"].get("status", 0)), entry["problem"])
        return list(found["opened"])

    def aliases(self) -> dict[str, str]:
        """alias -> collection."""
        return {entry["alias"]: entry["collection"] for entry in self._json("GET", "/v1/aliases")["items"]}

    def set_alias(self, alias: str, collection: str) -> None:
        """Have an alias stand for a collection, from one request to the next."""
        self._json("PUT", f"/v1/aliases/{segment(alias)}", json={"collection": collection})

    def delete_alias(self, alias: str) -> None:
        self._send("DELETE", f"/v1/aliases/{segment(alias)}")

    # Feedback

    def send_feedback(self, collection: str, query_id: str, id: str, *, relevant: bool) -> None:
        """Say whether a hit was what was looked for."""
        body = {"query_id": query_id, "id": id, "relevant": relevant}
        self._json("POST", f"{self._place(collection)}/feedback", json=body)

    def feedback(self, collection: str) -> list[Judgement]:
        """All that was said of hits of a collection, oldest first."""
        text = self._send("GET", f"{self._place(collection)}/feedback").text
        return [Judgement(**json.loads(line)) for line in text.split("\n") if line]

    # What there is

    def about(self) -> Service:
        """What answers, its limits, and what this client may do there."""
        found = self._json("GET", "/v1")
        return Service(**{name: found[name] for name in Service.__dataclass_fields__})

    def collections(self) -> list[Collection]:
        found: list[Collection] = []
        cursor: str | None = None
        while True:
            page = self._json("GET", "/v1/collections", params={} if cursor is None else {"cursor": cursor})
            found += map(collection_answer, page["items"])
            cursor = page["next_cursor"]
            if cursor is None:
                return found

    def collection(self, name: str) -> Collection:
        return collection_answer(self._json("GET", self._place(name)))

    def models(self) -> list[Model]:
        found = self._json("GET", "/v1/models")["items"]
        return [Model(**{**entry, "collections": tuple(entry["collections"])}) for entry in found]

    def ready(self) -> bool:
        """Whether the service has loaded. Raises ServiceError when nobody answers."""
        try:
            return self._send("GET", "/readyz").status_code == 200
        except Problem as problem:
            if problem.status == 503:
                return False
            raise

    def wait_until_ready(self, seconds: float = 60.0) -> None:
        """Return as soon as the service answers and has loaded; ServiceError when it does not in time."""
        end = time.monotonic() + seconds
        last = "it is still loading"
        while time.monotonic() < end:
            try:
                if self.ready():
                    return
            except ServiceError as error:
                last = str(error)
            time.sleep(0.05)
        raise ServiceError(f"The service at {self.url} is not ready after {seconds:g} seconds: {last}")

    # The wire

    @staticmethod
    def _place(collection: str, id: str | None = None) -> str:
        place = f"/v1/collections/{segment(collection)}"
        return place if id is None else f"{place}/items/{segment(id)}"

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        response = self._send(method, path, **request)
        try:
            return response.json()
        except ValueError:
            raise ServiceError(
                f"{self.url}{path} answered {response.status_code} with something that is not JSON. "
                f"Is it the address of a dml service?"
            ) from None

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        """One request. Raises ServiceError."""
        try:
            response = self._http.request(method, path, **request)
        except httpx.TimeoutException as error:
            raise ServiceError(f"The service at {self.url} gave no answer in time ({error}).") from error
        except httpx.HTTPError as error:
            raise ServiceError(
                f"The service at {self.url} cannot be reached: {error}. Is it running? `dml serve` starts it."
            ) from error
        if response.is_success:
            return response
        try:
            members = response.json()
        except ValueError:
            members = {}
        if not isinstance(members, dict) or "detail" not in members:
            members = {"detail": f"{method} {path} was not answered by a dml service"}
        raise Problem(response.status_code, members)


def read(image: Picture) -> bytes:
    """The bytes of a picture. Raises UsageError for a file that cannot be read."""
    if not isinstance(image, Path):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise UsageError(f"{image} cannot be read: {error.strerror or error}") from None


def segment(name: str) -> str:
    """A name as one segment of a path: nothing in it may act as a slash, or as a step to the folder above."""
    return quote(name, safe="") if name not in (".", "..") else name.replace(".", "%2E")


def numbers(vector: ArrayLike) -> list[float]:
    """A vector as JSON can carry it. Raises UsageError for NaN and infinity, which it cannot."""
    row = np.asarray(vector, dtype=np.float32)
    if row.ndim != 1 or not np.isfinite(row).all():
        raise UsageError(
            f"A vector is a flat row of finite numbers; got shape {row.shape}, or NaN or infinity in it."
        )
    return row.tolist()


def conditions(if_sequence: int | None, once: str | None, *, only_new: bool = False) -> dict[str, str]:
    """The headers that say when a write is to be done."""
    headers = {} if if_sequence is None else {"If-Match": f'"{if_sequence}"'}
    if only_new:
        headers["If-None-Match"] = "*"
    return headers if once is None else {**headers, "Idempotency-Key": once}


def batch(items: Sequence[BatchItem], once: str | None, *, wait: bool) -> dict[str, Any]:
    """The request for many items: JSON, or multipart when all are pictures. Raises UsageError."""
    entries: list[dict[str, Any]] = [{"id": entry.id, "payload": dict(entry.payload)} for entry in items]
    images: list[bytes] = []
    for shown, entry in zip(entries, items, strict=True):
        if (entry.image is None) == (entry.vector is None):
            raise UsageError(f'The item "{entry.id}" needs either an image or a vector, and not both.')
        if entry.vector is not None:
            shown["vector"] = numbers(entry.vector)
        elif entry.image is not None:
            images.append(read(entry.image))
    headers, body = conditions(None, once), {"items": entries, "wait": wait}
    if len(images) == len(items) > 0:
        files = [("file", ("image", data, "application/octet-stream")) for data in images]
        return {"files": files, "data": {"items": json.dumps(body)}, "headers": headers}
    left = iter(images)
    for shown in entries:
        if "vector" not in shown:
            shown["image"] = base64.b64encode(next(left)).decode()
    return {"json": body, "headers": headers}


def batch_answer(results: Sequence[Mapping[str, Any]]) -> Batch:
    failed = {r["id"]: Problem(int(r["problem"]["status"]), r["problem"]) for r in results if "problem" in r}
    return Batch(tuple(Written(**r) for r in results if "problem" not in r), failed)


def search_answer(found: Mapping[str, Any]) -> SearchAnswer:
    return SearchAnswer(
        hits=tuple(hit(entry) for entry in found["hits"]),
        **{name: found[name] for name in SearchAnswer.__dataclass_fields__ if name != "hits"},
    )


def hit(entry: Mapping[str, Any]) -> Hit:
    return Hit(
        entry["id"],
        entry["score"],
        entry["rank"],
        label=entry.get("label"),
        payload=entry.get("payload", {}),
        image=entry.get("image"),
        vector=vector_of(entry),
        group=entry.get("group"),
    )


def item(entry: Mapping[str, Any]) -> Item:
    return Item(
        entry["id"],
        entry["payload"],
        entry["sequence"],
        label=entry.get("label"),
        image=entry.get("image"),
        vector=vector_of(entry),
    )


def vector_of(entry: Mapping[str, Any]) -> NDArray[np.float32] | None:
    return np.asarray(entry["vector"], dtype=np.float32) if "vector" in entry else None


def collection_answer(entry: Mapping[str, Any]) -> Collection:
    """What the service says about a collection; fields that a newer one adds are left out."""
    known = {name: entry[name] for name in Collection.__dataclass_fields__ if name in entry}
    known["accepts"] = tuple(known["accepts"])
    if known.get("capabilities") is not None:
        known["capabilities"] = tuple(known["capabilities"])
    return Collection(**known)
