"""An example of every request and every answer, for the OpenAPI document: one small story of a shop's shoes.

The document shows them, generated clients test with them, and a test of ours sends the requests to a service.
"""

from collections.abc import Mapping
from typing import Any

FINGERPRINT = "eddee48f0b1c5d7a2f9e64c3b8a10d52c7f3e9b6041d8a5c2e7f60b9d3a4c815"
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR42mPcEqXBwMDAxMDAUMLQAwARJgI6gXQYdQAAAABJRU5E"
    "rkJggg=="
)
"""A PNG of 2 x 2 pixels in base64."""
ADDRESS = "/v1/collections/shoes/items/boots%2F12.jpg/image?v=bd9724324e274a39"
MADE = "2026-11-22T07:36:54.445+00:00"

HIT = {
    "id": "boots/12.jpg",
    "score": 0.913,
    "rank": 1,
    "label": "boots",
    "payload": {"label": "boots", "price": 80},
    "image": ADDRESS,
}
FOUND = {
    "query_id": "3f0c9d2a51b84e7f9c0d1e2f3a4b5c6d",
    "collection": "shoes",
    "generation": 1745,
    "model": FINGERPRINT,
    "metric": "cosine",
    "higher_is_better": True,
    "hits": [HIT],
    "total": 1744,
    "total_is_exact": True,
    "next_cursor": None,
    "approximate": False,
    "took_ms": 4.2,
}
ITEM = {
    "id": "boots/12.jpg",
    "label": "boots",
    "payload": {"label": "boots", "price": 80},
    "sequence": 1745,
    "image": ADDRESS,
}
SUMMARY = {
    "name": "shoes",
    "count": 1745,
    "dim": 128,
    "metric": "cosine",
    "model_fingerprint": FINGERPRINT,
    "accepts": ["image", "id", "vector"],
}
PROBLEM = {
    "type": "/problems/invalid-image",
    "title": "The picture cannot be decoded",
    "status": 422,
    "detail": "image file is truncated",
    "instance": "/v1/collections/shoes/items#/items/1",
    "request_id": "9a1e5c70",
}
REBUILD = {
    "id": "1143b2c0de4f4d0f8a7e6b5c4d3e2f10",
    "kind": "rebuild",
    "collection": "shoes",
    "state": "running",
    "progress": None,
    "message": "HNSW32, int12, over all items",
    "created": MADE,
    "started": "2026-11-22T07:36:54.487+00:00",
    "ended": None,
    "result": None,
    "problem": None,
}
UPSERT = {
    **REBUILD,
    "id": "2b7f0c94c1d84e6c9d3a5f1e7b8c6d20",
    "kind": "upsert",
    "state": "succeeded",
    "progress": 1.0,
    "message": "998 of 1,000 written, 2 could not be",
    "ended": "2026-11-22T07:37:20.101+00:00",
    "result": {"written": 998, "failed": 2, "results": []},
}
FILTER = {"must": [{"key": "price", "range": {"lte": 100}}]}

EXAMPLES: Mapping[str, list[Any]] = {
    # Requests
    "SearchRequest": [
        {"query": {"id": "boots/12.jpg", "negative": ["boots/7.jpg"]}, "limit": 5},
        {"query": {"image": PICTURE}, "limit": 5, "score_threshold": 0.5, "filter": FILTER},
        {"query": {"positive": ["boots/12.jpg"]}, "group_by": "label", "group_size": 2},
    ],
    "ImageSearchParams": [{"limit": 5, "filter": FILTER}],
    "BatchRequest": [{"searches": [{"query": {"id": "boots/12.jpg"}}, {"query": {"id": "boots/7.jpg"}}]}],
    "EmbeddingsRequest": [{"images": [{"b64": PICTURE}]}],
    "ItemRequest": [{"image": PICTURE, "payload": {"label": "boots", "price": 80}}],
    "PayloadText": [{"label": "boots", "price": 80}],
    "ItemsRequest": [
        {"items": [{"id": "new/1", "image": PICTURE, "payload": {"label": "boots"}}]},
        {"items": [{"id": "new/2", "image": PICTURE}], "wait": False},
    ],
    "DeleteRequest": [{"ids": ["new/1", "new/2"]}, {"filter": FILTER}],
    "PayloadRequest": [{"payload": {"price": 60, "sale": True}}],
    "CountRequest": [{"filter": FILTER}, {}],
    "CollectionRequest": [
        {"index": {"target_recall": 0.98}},
        {"index": {"kind": "hnsw", "options": {"links": 32}}},
        {"dim": 512, "model": "made elsewhere"},
    ],
    "RebuildRequest": [{"target_recall": 0.98, "latency_budget": 0.002}, {"kind": "hnsw"}, {}],
    "DuplicatesRequest": [{"level": "file"}, {"level": "similar", "score_threshold": 0.97, "limit": 100}],
    "AliasRequest": [{"collection": "shoes"}],
    "FeedbackRequest": [{"query_id": FOUND["query_id"], "id": "boots/12.jpg", "relevant": True}],
    # Answers
    "SearchAnswer": [FOUND],
    "BatchAnswer": [
        {
            "results": [
                FOUND,
                {**PROBLEM, "type": "/problems/unknown-item", "title": "No such item", "status": 404},
            ]
        }
    ],
    "EmbeddingsAnswer": [{"model": FINGERPRINT, "dim": 4, "embeddings": [[0.5, -0.5, 0.1, 0.7]]}],
    "ModelsAnswer": [
        {
            "items": [
                {
                    "id": FINGERPRINT[:12],
                    "fingerprint": FINGERPRINT,
                    "dim": 128,
                    "input_size": 224,
                    "loss": "proxy_anchor",
                    "trained_on": "shoes",
                    "collections": ["shoes"],
                }
            ]
        }
    ],
    "CollectionsAnswer": [{"items": [SUMMARY], "next_cursor": None}],
    "CollectionAnswer": [
        {
            **SUMMARY,
            "index": {"kind": "hnsw", "exact": False, "links": 32},
            "threshold": None,
            "measured_recall": 0.991,
            "promised_recall": 0.98,
            "generation": 1745,
            "pending": 12,
            "bytes_on_disk": 48_211_390,
            "capabilities": ["filter", "generation_cursor", "group"],
            "read_only": False,
        }
    ],
    "ItemAnswer": [ITEM],
    "ItemsAnswer": [{"items": [ITEM], "next_cursor": "MTpib290cy8xMi5qcGc"}],
    "WrittenAnswer": [{"id": "new/1", "created": True, "generation": 1746}],
    "UpsertAnswer": [
        {
            "results": [
                {"id": "new/1", "created": True, "generation": 1746},
                {"id": "new/2", "problem": PROBLEM},
            ],
            "written": 1,
            "failed": 1,
        }
    ],
    "JobAnswer": [REBUILD, UPSERT],
    "JobsAnswer": [{"items": [UPSERT, REBUILD]}],
    "AliasAnswer": [{"alias": "shop", "collection": "shoes"}],
    "AliasesAnswer": [{"items": [{"alias": "shop", "collection": "shoes"}]}],
    "FeedbackAnswer": [{"stored": True}],
    "DeletedAnswer": [{"deleted": 2}],
    "CountAnswer": [{"count": 612, "exact": True}],
    "ReloadAnswer": [{"opened": ["shoes-2"], "failed": []}],
    "ReadyAnswer": [{"status": "ready", "collections": ["shoes"], "model": [FINGERPRINT]}],
    "RootAnswer": [
        {
            "name": "dml",
            "version": "0.1.0",
            "limits": {"max_body_bytes": 16_777_216, "max_pixels": 25_000_000, "max_limit": 1000},
            "key": "shop",
            "scope": "search",
            "read_only": False,
            "default_collection": "shoes",
        }
    ],
    "ProblemAnswer": [
        {
            "type": "/problems/invalid-request",
            "title": "A field is wrong",
            "status": 422,
            "detail": "limit: Input should be less than or equal to 1000",
            "instance": "/v1/collections/shoes/search",
            "request_id": "9a1e5c70",
            "errors": [
                {"in": "body", "pointer": "/limit", "detail": "Input should be less than or equal to 1000"}
            ],
        },
        PROBLEM,
    ],
}
"""Name of a model of `service.schemas` -> bodies of that shape."""

TEXTS: Mapping[str, Mapping[str, str]] = {
    "/livez": {"text/plain": "ok\n"},
    "/metrics": {"text/plain": 'dml_collection_items{collection="shoes"} 1745.0\n'},
    "/v1/collections/{collection}/feedback": {
        "application/x-ndjson": '{"query_id": "3f0c9d2a51b84e7f9c0d1e2f3a4b5c6d", "id": "boots/12.jpg", '
        f'"relevant": true, "key": "shop", "at": "{MADE}"}}\n'
    },
}
"""Path -> media type -> an answer that is no JSON document."""

PARTS: Mapping[str, str] = {
    "params": '{"limit": 5, "filter": {"must": [{"key": "price", "range": {"lte": 100}}]}}',
    "payload": '{"label": "boots", "price": 80}',
    "items": '{"items": [{"id": "new/1", "payload": {"label": "boots"}}]}',
}
"""Text field of a multipart body -> its content."""

PARAMETERS: Mapping[str, str] = {
    "collection": "shoes",
    "id": "boots/12.jpg",
    "alias": "shop",
    "job": REBUILD["id"],
}
"""Parameter of a path -> its value."""


def add_examples(document: dict[str, Any]) -> None:
    """Put the examples into an OpenAPI document."""
    schemas = document["components"]["schemas"]
    for name, bodies in EXAMPLES.items():
        schemas[name]["examples"] = bodies
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["example"] = PARAMETERS[parameter["name"]]
            form = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data")
            for name, field in (form["schema"]["properties"] if form else {}).items():
                if name in PARTS:
                    field["examples"] = [PARTS[name]]
            for media, text in TEXTS.get(path, {}).items():
                content = operation["responses"].get("200", {}).get("content", {})
                if media in content:
                    content[media]["example"] = text
