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
    image_url: str | None = Field(default=None, description="Refused unless the operator allows its host")
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


class DeletedAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    deleted: int


class CountAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    count: int
    exact: bool


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


BatchAnswer.model_rebuild()
