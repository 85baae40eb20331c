"""The shapes of requests and answers. Unknown fields are refused; a number in quotes is not a number."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, RootModel, StringConstraints, model_validator

ItemId = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Numbers = Annotated[list[FiniteFloat], Field(min_length=1, max_length=65_536)]
Examples = Annotated[list[ItemId], Field(max_length=1000)]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, regex_engine="rust-regex")


class ImageQuery(Request):
    """What may stand beside an uploaded picture."""

    positive: Examples = Field(default=[], description="Ids of items that are like what is looked for")
    negative: Examples = Field(default=[], description="Ids of items that are not")


class QuerySpec(ImageQuery):
    """What to look for: one of image, id, vector, text; or positive examples; or both."""

    image: str | None = Field(default=None, description="A picture file in base64")
    image_url: str | None = Field(
        default=None, description="Address of a picture, on a host that the operator allows"
    )
    id: ItemId | None = Field(default=None, description="An item of this collection")
    vector: Numbers | None = Field(
        default=None, description="As long as the collection's; any length of arrow"
    )
    text: str | None = Field(default=None, description="Only for models with a text tower")

    @model_validator(mode="after")
    def one_of(self) -> "QuerySpec":
        given = [
            name for name in ("image", "image_url", "id", "vector", "text") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"give exactly one of image, id, vector, text, got {' and '.join(given)}")
        if not given and not self.positive:
            raise ValueError("give one of image, id, vector, text, or at least one positive example")
        return self


class SearchTuning(Request):
    """How hard to look."""

    exact: bool = Field(default=False, description="Compare with every item, whatever the index")
    effort: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        default=None, description="HNSW: efSearch, IVF: nprobe; left out: the index's own"
    )


class SearchOptions(Request):
    """Everything of a search but its query."""

    limit: int = Field(default=10, ge=1, le=1000)
    offset: int = Field(default=0, ge=0, le=10_000)
    score_threshold: float | None = Field(
        default=None, ge=-1, le=1, description="Leave out hits of a lower cosine similarity"
    )
    with_payload: bool = True
    with_vector: bool = False
    params: SearchTuning = SearchTuning()
    filter: dict[str, Any] | None = Field(default=None, description="must, should, must_not; see the docs")
    group_by: str | None = Field(
        default=None, max_length=512, description="A path in the payload; limit and offset count groups then"
    )
    group_size: int = Field(default=1, ge=1, le=100, description="Hits of each group")
    cursor: str | None = Field(
        default=None, max_length=1024, description='"*" starts a walk, next_cursor goes on with it'
    )
    match_rate: float | None = Field(default=None, gt=0, lt=1)


class SearchRequest(SearchOptions):
    query: QuerySpec


class ImageSearchParams(SearchOptions):
    """The `params` part of an upload."""

    query: ImageQuery = ImageQuery()


class BatchRequest(Request):
    searches: Annotated[list[SearchRequest], Field(min_length=1, max_length=1000)]


class EmbeddingImage(Request):
    b64: str = Field(description="A picture file in base64")


class EmbeddingsRequest(Request):
    images: Annotated[list[EmbeddingImage], Field(min_length=1, max_length=1000)]


class ItemRequest(Request):
    """An item to add or replace: exactly one of image and vector."""

    image: str | None = Field(default=None, description="A picture file in base64; it is stored")
    vector: Numbers | None = None
    payload: dict[str, Any] = {}


class BatchItem(Request):
    """One item of a batch: exactly one of image and vector, or its file beside it in a multipart body."""

    id: ItemId
    image: str | None = Field(default=None, description="A picture file in base64; it is stored")
    vector: Numbers | None = None
    payload: dict[str, Any] = {}


class ItemsRequest(Request):
    items: Annotated[list[BatchItem], Field(min_length=1, max_length=10_000)]
    wait: bool = Field(default=True, description="false: answered 202 at once, and done as a job")


class PromiseRequest(Request):
    """A kind of index, or a promise: the cheapest kind that keeps it is found by measuring."""

    kind: str | None = Field(default=None, max_length=64, description="auto, flat, hnsw, ivf, …")
    options: dict[str, Any] | None = Field(default=None, description="Of that kind")
    target_recall: float | None = Field(default=None, gt=0, le=1, description="recall@10")
    memory_budget: int | None = Field(default=None, gt=0, description="Bytes; with target_recall")
    latency_budget: float | None = Field(
        default=None, gt=0, description="Seconds of one query; with target_recall"
    )

    @model_validator(mode="after")
    def fits(self) -> "PromiseRequest":
        if self.target_recall is not None and (self.kind not in (None, "auto") or self.options):
            raise ValueError("target_recall chooses the kind of index itself; leave out kind and options")
        if self.target_recall is None and (self.memory_budget or self.latency_budget) is not None:
            raise ValueError("memory_budget and latency_budget need a target_recall")
        return self


class IndexSettings(PromiseRequest):
    """The index of a new collection. It is built, or found, when there are items enough; searches are exact
    until then."""


class CollectionRequest(Request):
    """A collection that is to be there."""

    model_config = ConfigDict(protected_namespaces=())
    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="Fingerprint of an encoder, or its beginning; needed among several. With dim: any text",
    )
    dim: int | None = Field(default=None, ge=1, le=65_536, description="For vectors that are made elsewhere")
    metric: Literal["cosine"] = "cosine"
    index: IndexSettings = IndexSettings()


class RebuildRequest(PromiseRequest):
    """A kind of index, or a promise; neither: as before."""


class DuplicatesRequest(Request):
    level: Literal["file", "edited", "similar"] = Field(
        default="file", description="file: the same bytes; similar: vectors nearer than the threshold"
    )
    limit: int = Field(default=1000, ge=1, le=10_000, description="Groups or pairs that are listed")
    score_threshold: float = Field(default=0.95, ge=-1, le=1, description="For the level similar")


class AliasRequest(Request):
    collection: str = Field(min_length=1, max_length=255)


class FeedbackRequest(Request):
    query_id: str = Field(min_length=1, max_length=128, description="Of the search answer")
    id: ItemId
    relevant: bool


class PayloadRequest(Request):
    payload: dict[str, Any] = Field(description="Merged into the item's; null removes a key")


class PayloadText(RootModel[dict[str, Any]]):
    """The payload part of a multipart body."""


class DeleteRequest(Request):
    ids: Annotated[list[ItemId], Field(min_length=1)] | None = None
    filter: dict[str, Any] | None = None

    @model_validator(mode="after")
    def one_of(self) -> "DeleteRequest":
        if (self.ids is None) == (self.filter is None):
            raise ValueError("give exactly one of ids and filter")
        return self


class CountRequest(Request):
    filter: dict[str, Any] | None = None


# Answers. They describe the API; routes write them directly, and tests hold the two together.


class HitAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    score: float = Field(description="Cosine similarity, -1 to 1; higher is nearer")
    rank: int = Field(ge=1)
    label: str | None = None
    payload: dict[str, Any] | None = None
    vector: list[float] | None = None
    group: str | int | float | bool | None = Field(default=None, description="What it was grouped by")
    match_probability: float | None = None
    image: str | None = Field(
        description="Address of the picture (add size=thumb for a small one); null: none kept"
    )


class SearchAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    query_id: str
    collection: str
    generation: int
    model: str
    metric: Literal["cosine"]
    higher_is_better: Literal[True]
    hits: list[HitAnswer]
    total: int = Field(description="Items (or groups) that qualify; a lower bound unless total_is_exact")
    total_is_exact: bool
    next_cursor: str | None = Field(description="Where the next page of a walk starts; null at its end")
    approximate: bool = Field(description="Whether a true neighbour may be missing")
    took_ms: float


class BatchAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    results: list["SearchAnswer | ProblemAnswer"]


class EmbeddingsAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    dim: int
    embeddings: list[list[float]]


class ModelAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    id: str
    fingerprint: str
    dim: int
    input_size: int | None
    loss: str | None
    trained_on: str | None
    collections: list[str]


class ModelsAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    items: list[ModelAnswer]


class CollectionSummary(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    name: str
    count: int
    dim: int
    metric: str
    model_fingerprint: str
    accepts: list[str]


class CollectionsAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    items: list[CollectionSummary]
    next_cursor: str | None


class CollectionAnswer(CollectionSummary):
    index: dict[str, Any]
    threshold: float | None
    measured_recall: float | None
    promised_recall: float | None = Field(description="recall@10 that the index was chosen for; null: none")
    generation: int
    pending: int
    bytes_on_disk: int
    capabilities: list[str]
    read_only: bool


class ItemAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    label: str | None = None
    payload: dict[str, Any]
    sequence: int
    image: str | None
    vector: list[float] | None = None


class ItemsAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    items: list[ItemAnswer]
    next_cursor: str | None


class WrittenAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    created: bool
    generation: int


class FailedItem(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    problem: "ProblemAnswer"


class UpsertAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    results: list["WrittenAnswer | FailedItem"] = Field(description="One for each item, in the order sent")
    written: int
    failed: int


class JobAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    kind: str
    collection: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: float | None = Field(description="The share that is done, 0 to 1; null: not known")
    message: str
    created: str
    started: str | None
    ended: str | None
    result: dict[str, Any] | None
    problem: "ProblemAnswer | None"


class JobsAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    items: list[JobAnswer]


class AliasAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    alias: str
    collection: str


class AliasesAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    items: list[AliasAnswer]


class FeedbackAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    stored: Literal[True]


class DeletedAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    deleted: int


class CountAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    count: int
    exact: bool


class FailedCollection(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    problem: "ProblemAnswer"


class ReloadAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    opened: list[str] = Field(description="Collections that are served from now on")
    failed: list[FailedCollection] = Field(description="Those that lie there and cannot be served")


class ReadyAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    status: Literal["ready"]
    collections: list[str]
    model: list[str]


class RootAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    version: str
    limits: dict[str, int]
    key: str | None = Field(description="Name of the key that was sent; null: the service asks for none")
    scope: Literal["search", "write", "admin"] = Field(description="What the sender may do")
    read_only: bool = Field(description="Every write is refused, whatever the scope")
    default_collection: str | None = Field(
        description="The first that was named at the start; null: there is none, or it is still being read"
    )


class FieldError(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    where: str = Field(alias="in", description="body, query, path or header")
    pointer: str = Field(description="JSON Pointer into it")
    detail: str


class ProblemAnswer(BaseModel):
    """RFC 9457, application/problem+json."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[FieldError] | None = None
    limit: int | None = None
    allowed: list[str] | None = None
    missing: str | None = None


for _model in (BatchAnswer, FailedCollection, ReloadAnswer, FailedItem, UpsertAnswer, JobAnswer, JobsAnswer):
    _model.model_rebuild()
