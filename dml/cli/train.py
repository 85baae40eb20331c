"""`dml train`: a recipe and a folder in, a run folder out.

Several processes that torchrun has started train one model together; the first one speaks for all.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def train(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Folder, manifest or data set; else the recipe's.")
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
    with one_voice():
        run_command(
            recipe,
            read_overrides(overrides or [], seed=seed, source=data),
            out or Path("runs") / Path(recipe).stem,
            resume=resume,
            final=final,
            print_config=print_config,
            json_lines=json_lines,
        )


def run_command(
    recipe: str,
    overrides: dict[str, str],
    folder: Path,
    *,
    resume: str,
    final: bool,
    print_config: bool,
    json_lines: bool,
) -> None:
    """What `dml train` does, with its options read."""
    from dml.config import load_recipe, recipe_tree
    from dml.errors import UsageError

    if resume not in ("auto", "no"):
        raise UsageError(f'--resume is "auto" or "no", got "{resume}"')
    settings = load_recipe(recipe, overrides)
    if print_config:
        import tomli_w

        if speaks():
            typer.echo(tomli_w.dumps(recipe_tree(settings)), nl=False)
        return
    finished = run_and_show(settings, folder, resume=resume == "auto", final=final)
    if json_lines and speaks():
        import json

        typer.echo(
            json.dumps({"run": str(folder), "encoder": str(finished.encoder), **vars(finished.standing)})
        )


def speaks() -> bool:
    """Whether this process prints: of several that torchrun has started, the first. Loads no torch."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes, the first that fails says why; the others end in silence with the same code.

    Raises:
        typer.Exit: another process has said it.
        DmlError: another process is gone, and nobody could say why.
    """
    if os.environ.get("TORCHELASTIC_RUN_ID") is None or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    import logging

    if not speaks():
        logging.getLogger("dml").setLevel(logging.ERROR)  # every process skips the same pictures
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        from dml.errors import DmlError
        from dml.training.processes import end_at_once, lost_another, told_by_another

        code = getattr(error, "exit_code", 1)
        told = told_by_another(code)
        end_at_once(code if told is None else told)
        if told is not None:
            raise typer.Exit(told) from None
        if lost_another(error):
            raise DmlError(
                "Another process of this run has ended (killed, out of memory, or its machine is gone). "
                "Go on from the last checkpoint: the same command with --resume auto."
            ) from None
        raise


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
    console = Console(stderr=True, quiet=not speaks())
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
        with Progress(*columns, console=console, transient=True, disable=not speaks()) as bar:
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
    together = f" in {event.processes} processes" if event.processes > 1 else ""
    resumed = f", going on behind step {event.resumed_at}" if event.resumed_at else ""
    console.print(
        f"Training on {event.images} pictures of {event.classes} classes, {event.parameters:,} parameters, "
        f"{event.total_steps} steps{together}{resumed}",
        highlight=False,
    )
    if hint := unused_gpus(event.device.type, event.processes):
        console.print(hint, highlight=False, markup=False)


def unused_gpus(device: str, processes: int) -> str:
    """How to use all GPUs of this machine, where one process trains on one of several; else nothing."""
    import torch

    gpus = torch.cuda.device_count() if device == "cuda" and processes == 1 else 0
    if gpus < 2:
        return ""
    return f"This machine has {gpus} GPUs, one is used. All: torchrun --nproc-per-node {gpus} -m dml train …"
