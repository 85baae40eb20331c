"""A process that takes one free run after the other until nothing is left.

Which runs are free follows from the result files and from locks, so any number of workers, of one command or
of several, share the work without talking to each other.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from dml.errors import ConfigError, DmlError
from dml.startup import prepare_process
from eval.benchmark.folds import open_pictures
from eval.benchmark.measure import Bench, identity, measure, run_recipe
from eval.benchmark.plan import legacy, parameters_of, standing
from eval.benchmark.results import (
    Item,
    Place,
    check_row_results,
    differences,
    locked,
    read_result,
    read_row,
    write_result,
)
from eval.benchmark.suite import load_suite
from eval.benchmark.trunk import refuse_other_trunks, with_trunk

PAUSE = 1.0
"""Seconds until a worker looks again when every run that is ready is taken by another."""


@dataclass(frozen=True)
class Order:
    """What a worker is asked to do."""

    suite: str
    data: str
    results: str  # RESULTS/SUITE
    work: str  # WORK/SUITE
    rows: tuple[str, ...]
    until: Literal["trials", "seeds"] = "seeds"
    again: str = ""
    """Instead of what is left: the run of this result file once more …"""
    written: str = ""
    """… with its result in this file."""
    trunks: str = ""
    """WORK/SUITE of the pretrained trunk, where runs go somewhere else."""


@dataclass(frozen=True)
class Event:
    """What a worker tells."""

    kind: Literal["began", "step", "done", "failed", "idle"]
    row: str = ""
    item: str = ""
    step: int = 0
    steps: int = 0
    value: float = 0.0  # validation MAP@R
    seconds: float = 0.0
    text: str = ""


Tell = Callable[[Event], None]


def work(order: Order, tell: Tell) -> None:
    """Do runs until none is left for these rows. A row whose run cannot be done at all is left alone."""
    import torch

    suite = load_suite(order.suite)
    torch.set_num_threads(suite.protocol.threads)
    name = "lightning_fabric.utilities.rank_zero"  # it announces its precision for every run
    logging.getLogger(name).setLevel(logging.WARNING)
    place = Place(Path(order.results))
    bench = Bench(suite, open_pictures(suite, order.data, place.results), Path(order.work))
    home = Path(order.trunks or order.work)
    bench = with_trunk(bench, place, home, lambda step, steps: tell(Event("step", "", "trunk", step, steps)))
    if order.again:
        repeat_one(bench, Path(order.again), Path(order.written), tell)
        return
    refuse_other_trunks(bench, place)
    broken: set[str] = set()
    for row in order.rows:
        check_row_results(suite, row, read_row(place, row), bench.settings)
    while True:
        read = cache(partial(read_row, place))  # once for the row, and for those that inherit from it
        now = [
            standing(
                suite,
                row,
                read(row),
                until=order.until,
                inherited=legacy(suite, row, read),
            )
            for row in order.rows
            if row not in broken
        ]
        if not any(row.most_left for row in now):
            return
        if not do_one(bench, place, [item for row in now for item in row.ready], broken, tell):
            tell(Event("idle"))
            time.sleep(PAUSE)


def do_one(bench: Bench, place: Place, ready: Sequence[Item], broken: set[str], tell: Tell) -> bool:
    """Do the first run that is free; whether there was one. Rows whose run cannot be done become broken."""
    for item in ready:
        if item.row in broken:
            continue
        try:
            if attempt(bench, place, item, tell):
                return True
        except DmlError as error:
            broken.add(item.row)
            tell(Event("failed", item.row, item.name, text=str(error)))
    return False


def repeat_one(bench: Bench, recorded: Path, written: Path, tell: Tell) -> None:
    """The run of a result file once more.

    Raises:
        ConfigError: the suite or the defaults have changed, so that it would be another run.
    """
    old = read_result(recorded)
    if old is None:
        raise ConfigError(f"{recorded} is no result file")
    item = Item(old["row"], old["phase"], old["number"], old["fold"])
    new = identity(bench, item.row, run_recipe(bench, item, old["parameters"]))["recipe"]
    changed = [
        text for text in differences(old["recipe"], new) if not text.split(": ")[1].startswith("null ")
    ]
    if changed:
        raise ConfigError(f"The run of {recorded} cannot be repeated, since {'; '.join(changed)}.")
    tell(Event("began", item.row, item.name))

    def report(step: int, steps: int) -> None:
        tell(Event("step", item.row, item.name, step, steps))

    write_result(written, measure(bench, item, old["parameters"], report))


def attempt(bench: Bench, place: Place, item: Item, tell: Tell) -> bool:
    """Do a run unless another process has it or has done it; whether it was done here."""
    with locked(place, f"{item.row}.{item.name}") as mine:
        path = place.file(item.row, item.name)
        results = read_row(place, item.row)
        # Between planning and locking, another process may have done it, or pruned its trial.
        inherited = legacy(bench.suite, item.row, partial(read_row, place))
        if not mine or item not in standing(bench.suite, item.row, results, inherited=inherited).ready:
            return False
        tell(Event("began", item.row, item.name))

        def report(step: int, steps: int) -> None:
            tell(Event("step", item.row, item.name, step, steps))

        parameters = parameters_of(bench.suite, item, results, inherited)
        result = measure(bench, item, parameters, report)
        write_result(path, result)
        tell(
            Event(
                "done",
                item.row,
                item.name,
                value=result["figures"]["map_at_r"],
                seconds=result["seconds"],
                text=result.get("failure", ""),
            )
        )
        return True


def main() -> int:
    """A worker of its own process: the order as JSON in its first argument, events as JSON lines on stdout.

    It ends when its standard input closes, so that it never outlives whoever started it.
    """
    prepare_process()
    tree = json.loads(sys.argv[1])
    order = Order(**{**tree, "rows": tuple(tree["rows"])})
    threading.Thread(target=end_with_the_starter, daemon=True).start()

    def tell(event: Event) -> None:
        print(json.dumps(asdict(event)), flush=True)

    try:
        work(order, tell)
    except DmlError as error:
        tell(Event("failed", text=str(error)))
        return error.exit_code
    return 0


def end_with_the_starter() -> None:
    """Wait until standard input closes, then end at once: result files are whole or not there."""
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
