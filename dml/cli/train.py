"""`dml train`: a recipe and a folder in, a run folder out."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    data: Annotated[
        str, typer.Argument(metavar="[DATA]", help="Folder, manifest or data set; else the recipe's.")
    ] = "",
    recipe: Annotated[
        str, typer.Option(help="A bundled recipe (dml list recipes) or a .toml file.")
    ] = "multi_similarity",
    out: Annotated[Path | None, typer.Option(help="Run folder to make. Default: runs/RECIPE.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe value; may be repeated."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set train.seed=N.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on where an interrupted run stopped. no: refuse.")
    ] = "no",
    final: Annotated[
        bool,
        typer.Option("--final", help="After selecting, train again on all classes for the chosen epochs."),
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the effective recipe and stop.")
    ] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Learn an embedding from labelled pictures.

    \b
    dml train photos/ --recipe cbml --out runs/photos --set train.epochs=20
    """
    from dml.config import load_recipe, recipe_tree
    from dml.errors import UsageError

    if resume not in ("auto", "no"):
        raise UsageError(f'--resume is "auto" or "no", got "{resume}"')
    settings = load_recipe(recipe, read_overrides(overrides or [], seed=seed, source=data))
    if print_config:
        import tomli_w

        typer.echo(tomli_w.dumps(recipe_tree(settings)), nl=False)
        return
    folder = out or Path("runs") / Path(recipe).stem
    finished = run_and_show(settings, folder, resume=resume == "auto", final=final)
    if json_lines:
        import json

        typer.echo(
            json.dumps({"run": str(folder), "encoder": str(finished.encoder), **vars(finished.standing)})
        )


def read_overrides(pairs: list[str], *, seed: int | None = None, source: str = "") -> dict[str, str]:
    """Turn "a.b=c" texts and the short options into overrides of a recipe."""
    from dml.errors import UsageError

    wrong = [pair for pair in pairs if "=" not in pair or pair.startswith("=")]
    if wrong:
        raise UsageError(f'--set takes KEY=VALUE, for example --set train.epochs=5; got "{wrong[0]}"')
    found = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    if seed is not None:
        found["train.seed"] = str(seed)
    if source:
        import json

        found["data.source"] = json.dumps(source)  # quoted: a folder called 2024 is not a number
    return found


def run_and_show(settings, folder: Path, *, resume: bool, final: bool = False):
    """Train with a progress bar on stderr; return the `Finished` event.

    Ctrl-C leaves the last checkpoint behind and says how to go on.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dml.training.loop import Step
    from dml.training.run import Evaluated, Finished, Started, check_source, train, train_final

    check_source(settings)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    events = (train_final if final else train)(settings, folder, resume=resume)
    finished: Finished | None = None
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task, figures, loss = bar.add_task("reading", total=None, figures=""), "", 0.0
            for event in events:
                if isinstance(event, Started):
                    describe(console, event)
                    bar.remove_task(task)
                    task = bar.add_task(
                        "training", total=event.total_steps, completed=event.resumed_at, figures=""
                    )
                elif isinstance(event, Step):
                    loss = float(event.terms["loss"]) if event.number % 10 == 0 else loss
                    bar.update(task, completed=event.number, figures=f"loss {loss:.4f} {figures}")
                elif isinstance(event, Evaluated):
                    figures = f"validation MAP@R {event.figures['map_at_r']:.3f}"
                    mark = "  best so far" if event.best else ""
                    map_at_r, recall = event.figures["map_at_r"], event.figures["recall_at_1"]
                    console.print(
                        f"  epoch {event.epoch + 1:>3}  step {event.step:>5}  "
                        f"MAP@R {map_at_r:.4f}  Recall@1 {recall:.4f}{mark}"
                    )
                elif isinstance(event, Finished):
                    finished = event
    except KeyboardInterrupt:
        console.print(f"\nStopped. Go on with: dml train … --out {folder} --resume auto")
        raise typer.Exit(130) from None
    assert finished is not None
    early = " (stopped early)" if finished.stopped_early else ""
    console.print(f"Best: epoch {finished.standing.best_epoch + 1}{early}. Encoder: {finished.encoder}")
    return finished


def describe(console, event) -> None:
    """What the run stands on, in a few lines."""
    console.print(event.table.describe(), highlight=False)
    console.print(event.splits.describe(), highlight=False)
    for bad in event.bad[:5]:
        console.print(f"  skipped {bad.path}: {bad.reason}", style="yellow", markup=False)
    if len(event.bad) > 5:
        console.print(f"  … and {len(event.bad) - 5} more; all are listed in bad_images.csv", style="yellow")
    resumed = f", going on behind step {event.resumed_at}" if event.resumed_at else ""
    console.print(
        f"Training on {event.images} pictures of {event.classes} classes, {event.parameters:,} parameters, "
        f"{event.total_steps} steps{resumed}",
        highlight=False,
    )
