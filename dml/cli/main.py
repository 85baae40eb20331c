"""The `dml` command. A verb's module is loaded when the verb is used, so that `dml --help` is instant."""

import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

from dml import __version__
from dml.cli.shown import Group
from dml.errors import DmlError
from dml.startup import prepare_process

VERBS: dict[str, tuple[str, str]] = {
    "train": ("dml.cli.train:train", "Learn an embedding from labelled pictures."),
    "eval": ("dml.cli.eval:eval", "Measure an encoder: Recall@K, MAP@R, a report with pictures."),
    "bench": ("dml.cli.bench:app", "Compare methods fairly, and repeat what was measured."),
    "encoder": ("dml.cli.encoder:app", "Make, export and check encoders."),
    "embed": ("dml.cli.encoder:embed", "Turn a folder of pictures into vectors."),
    "index": ("dml.cli.index:app", "Build and change collections of pictures."),
    "search": ("dml.cli.search:search", "Find the pictures that look like one."),
    "serve": ("dml.cli.serve:serve", "Answer searches over HTTP, with a web page."),
    "keys": ("dml.cli.keys:app", "Make, list and revoke the API keys of the service."),
    "feedback": ("dml.cli.feedback:feedback", "Export what users said of search results."),
    "data": ("dml.cli.data:app", "Check, split and draw data sets."),
    "list": ("dml.cli.catalogue:app", "Say what there is: losses, methods, data sets, trunks, recipes."),
    "demo": ("dml.cli.demo:demo", "From pictures, drawn or yours, to a search page in one go."),
    "doctor": ("dml.cli.doctor:doctor", "Say what is installed here and what is missing."),
}
"""verb -> (where its function or Typer app lives, one line of help)."""


class LazyGroup(Group):
    """A group whose commands are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        target, summary = VERBS[cmd_name]
        if only_the_list_is_wanted():
            return TyperCommand(cmd_name, help=summary)
        module, _, attribute = target.partition(":")
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            command = typer.main.get_command(found)
        else:
            wrapper = typer.Typer(rich_markup_mode=None, add_completion=False)
            wrapper.command(cmd_name)(found)
            command = typer.main.get_command(wrapper)
        command.name = cmd_name
        return command


def only_the_list_is_wanted() -> bool:
    """Whether the call is `dml` or `dml --help`: then no verb has to be loaded."""
    return not [a for a in sys.argv[1:] if not a.startswith("-")]


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From folders of images to a measured, served search.",
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dml {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; show our own errors as one clean message, and anything else as the bug it is."""
    prepare_process()
    try:
        app()
    except DmlError as error:
        # One write, so that the lines of another process on the same terminal cannot come in between.
        typer.echo(typer.style("error: ", fg=typer.colors.RED, bold=True) + str(error), err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
