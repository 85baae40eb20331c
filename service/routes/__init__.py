"""All addresses of the service. A new one is a file here, and its router in this table.

Order matters only inside a file: longer paths before those that would swallow them.
"""

from fastapi import APIRouter

from service.routes import collections, embeddings, items, operations, page, search

ROUTERS: tuple[APIRouter, ...] = (
    operations.router,
    page.router,
    embeddings.router,
    search.router,
    items.router,
    collections.router,
)
