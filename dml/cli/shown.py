"""How commands are listed, and how those about collections show what they have done."""

import json
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperGroup


class Group(TyperGroup):
    """Lists each of its commands with a whole sentence, however narrow the terminal is."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        rows = [(name, first_sentence(one.help or "")) for name, one in commands if one is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def first_sentence(text: str) -> str:
    """Of a docstring."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


def group(about: str) -> typer.Typer:
    """A command that has commands."""
    return typer.Typer(
        cls=Group, no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=about
    )


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
