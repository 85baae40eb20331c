"""JSON files that carry the sha256 of their own bytes, so that a change of any of them shows."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

KEY = "checksum"
BLANK = "0" * 64
SEAL = re.compile(rb'"[^"]*": "([^"]{64})"\s*\}\s*\Z')
"""The last entry of a file."""


def seal(tree: Mapping[str, Any]) -> bytes:
    """The tree as readable JSON whose last entry, "checksum", is the sha256 of the rest.

    It is computed with 64 zeros in its own place.
    """
    blank = {**{key: value for key, value in tree.items() if key != KEY}, KEY: BLANK}
    encoded = (json.dumps(blank, indent=2, ensure_ascii=False) + "\n").encode()
    before, _, after = encoded.rpartition(BLANK.encode())
    return before + hashlib.sha256(encoded).hexdigest().encode() + after


def seal_fits(data: bytes) -> bool | None:
    """Whether the bytes are as they were sealed; None for bytes that carry no checksum."""
    found = SEAL.search(data)
    if found is None:
        return False if f'"{KEY}"'.encode() in data else None
    blank = data[: found.start(1)] + BLANK.encode() + data[found.end(1) :]
    if hashlib.sha256(blank).hexdigest().encode() == found[1]:
        return True
    return False if found[0].startswith(f'"{KEY}"'.encode()) else None
