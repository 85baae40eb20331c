"""The part of docs/benchmarks.md that is about speed: what was measured, as the commands printed it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.speed.__main__ import PRINT, TABLES

FOLDER = "speed"
"""Below the folder of results; holds what `--out` wrote, NAME.json."""

HEAD = """## Speed

Side by side in one run, in turns, on the same inputs and threads; medians, and *spread*, the range of the
turns as a share of the median. Times belong to a machine and its neighbours: compare within a table. What the
tables mean, and what else there is, says [evaluation](evaluation.md#speed). Each block is what its command
printed.
"""


def speed_section(results: Path) -> str:
    """All tables in the folder, in the order of the commands; nothing where there are none."""
    found = [(path.stem, json.loads(path.read_text("utf-8"))) for path in (results / FOLDER).glob("*.json")]
    found.sort(key=lambda one: (TABLES.index(one[1]["table"]), one[0]))
    return "\n".join([HEAD, *(block(name, result) for name, result in found)]) if found else ""


def block(name: str, result: Mapping[str, Any]) -> str:
    printed = PRINT[result["table"]](result)
    return f"### {name.replace('-', ' ').capitalize()}\n\n`{result['command']}`\n\n```text\n{printed}\n```\n"
