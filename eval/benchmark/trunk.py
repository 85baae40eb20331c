"""The trunk that all rows of a suite begin with, where the suite pretrains one.

It lies in WORK/SUITE as an ordinary training run, and is made once, by whichever process needs it first.
Every result says which trunk it began with; rows that began with different ones do not stand in one table.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dml.config import recipe_tree
from dml.encoder.artifact import WEIGHTS
from dml.errors import ConfigError
from eval.benchmark.folds import write_manifest
from eval.benchmark.measure import Bench, fingerprint_of, train_run
from eval.benchmark.results import Place, locked, read_row
from eval.benchmark.suite import digest_of

PAUSE = 1.0  # seconds

Report = Callable[[int, int], None]


def with_trunk(bench: Bench, place: Place, home: Path, report: Report) -> Bench:
    """The same bench with the weights of its trunk; trained first when they are not in `home` yet.

    Args:
        home: WORK/SUITE of the command, where trunks are kept.
    """
    if bench.suite.pretrain is None:
        return bench
    folder = home / f"trunk-{trunk_mark(bench)}"
    encoder = folder / "encoder"
    while not (encoder / "manifest.json").is_file():
        with locked(place, "trunk") as mine:
            if mine:
                source = write_manifest({"train": bench.pictures.pretrain}, folder.with_suffix(".csv"))
                train_run(bench.suite.pretraining_recipe(str(source)), folder, report, keep=True)
        if not mine:
            time.sleep(PAUSE)
    return replace(bench, weights=encoder / WEIGHTS, trunk=fingerprint_of(encoder))


def trunk_mark(bench: Bench) -> str:
    """Names a trunk by what it is made of: recipe, pictures, classes. Its code is not part of that, since all
    rows go on with one trunk however long a suite takes."""
    tree = recipe_tree(bench.suite.pretraining_recipe(""))
    return digest_of([tree, bench.pictures.digest, bench.pictures.folds.digest])[:8]


def refuse_other_trunks(bench: Bench, place: Place) -> None:
    """Raise ConfigError when results of the suite began with another trunk than this bench has."""
    for row in bench.suite.rows:
        for result in read_row(place, row).all():
            if result.get("trunk", bench.trunk) != bench.trunk:
                raise ConfigError(
                    f"The results of {row} began with the trunk {result['trunk'][:12]}, and the one in the "
                    f"work folder is {bench.trunk[:12]}. Give the work folder that made them (--work), or "
                    f"move the results of all rows away to measure them with this one."
                )
