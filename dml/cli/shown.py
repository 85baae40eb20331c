"""How the commands about collections show what they have done."""

import json
from collections.abc import Mapping
from typing import Any

import typer


def describe_index(built: Mapping[str, Any]) -> str:
    """One line about a built index and what was measured."""
    measured = built.get("measured")
    if built["exact"]:
        quality = "exact"
    elif measured:
        asked = f"{measured['queries']} {measured.get('of', 'held-out queries')}"
        quality = f"recall@10 {measured['recall_at_10']:.4f} over {asked}"
    else:
        quality = "approximate, recall not measured"
    return (
        f"index {built['kind']} over {built['count']:,} items: {quality}, built in {built['seconds']:.1f} s"
    )


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
