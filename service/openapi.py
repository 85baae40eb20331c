"""The OpenAPI document as a file, for generating clients: `python -m service.openapi > docs/openapi.json`."""

import json
import sys

from service.app import create_app
from service.engine import Engine


def document() -> str:
    """The document as text. It describes the service, not what is served, so it needs no collection."""
    return json.dumps(create_app(Engine({})).openapi(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
