"""All addresses of the service. A new one is a file here, and its router in this table.

Order matters only inside a file: longer paths before those that would swallow them.
"""

from fastapi import APIRouter

from service.routes import aliases, collections, embeddings, feedback, items, jobs, operations, page, search

ROUTERS: tuple[APIRouter, ...] = (
    operations.router,
    page.router,
    embeddings.router,
    search.router,
    items.router,
    jobs.router,
    aliases.router,
    feedback.router,
    collections.router,
)
