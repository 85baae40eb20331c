"""One run again, in a process like the one that made it: the same code path, threads and settings."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dml.errors import ConfigError, DmlError
from eval.benchmark.results import Place, Result, check_row_results, differences, read_row
from eval.benchmark.run import events_of, workers
from eval.benchmark.suite import Suite, load_suite
from eval.benchmark.worker import Event, Order


@dataclass(frozen=True)
class Replay:
    """A recorded run beside its repetition."""

    recorded: Result
    repeated: Result

    @property
    def is_equal(self) -> bool:
        """Whether every figure and the chosen step are the same to the last digit."""
        return all(self.recorded[key] == self.repeated[key] for key in ("figures", "step"))

    def changes(self) -> list[str]:
        """What was different around the two runs: machine, versions, code."""
        left, right = (
            {**r["environment"], "code": r["code"]["parts"], "trunk": r.get("trunk", "")}
            for r in (self.recorded, self.repeated)
        )
        return differences(left, right)

    def as_json(self) -> dict[str, Any]:
        return {
            "row": self.recorded["row"],
            "seed": self.recorded["number"],
            "recorded": self.recorded["figures"],
            "repeated": self.repeated["figures"],
            "step": [self.recorded["step"], self.repeated["step"]],
            "equal": self.is_equal,
            "changes": self.changes(),
        }

    def describe(self) -> str:
        """Figures side by side, and what to think of a difference."""
        names = self.recorded["figures"]
        lines = [f"{'':<12} {'recorded':>10} {'repeated':>10} {'difference':>12}"]
        for name in names:
            old, new = self.recorded["figures"][name], self.repeated["figures"][name]
            lines.append(f"{name:<12} {old:>10.6f} {new:>10.6f} {new - old:>+12.2e}")
        lines.append(f"{'step':<12} {self.recorded['step']:>10} {self.repeated['step']:>10}")
        lines.append("equal to the last digit" if self.is_equal else "not equal")
        lines += [f"  changed since: {change}" for change in self.changes()]
        return "\n".join(lines)


def replay(order: Order, place: Place, row: str, seed: int, *, tell: Callable[[Event], None]) -> Replay:
    """Repeat a full run into a work folder of its own, which is removed afterwards.

    Raises:
        ConfigError: there is no such result, or the suite states other settings now.
    """
    suite = load_suite(order.suite)
    suite.row(row)
    results = read_row(place, row)
    if seed not in results.seeds:
        there = ", ".join(map(str, sorted(results.seeds))) or "none"
        raise ConfigError(f"There is no result of {row} with seed {seed} in {place.results}; seeds: {there}.")
    recorded = results.seeds[seed]
    check_row_results(suite, row, results, suite.settings(recorded["data_digest"], recorded["folds_digest"]))
    Path(order.work).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"replay-{row}-{seed}-", dir=order.work))
    try:
        repeated = repeat(
            replace(order, work=str(work), trunks=order.work),
            suite,
            place.file(row, f"seed-{seed}"),
            tell=tell,
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Replay(recorded, repeated)


def repeat(order: Order, suite: Suite, recorded: Path, *, tell: Callable[[Event], None]) -> Result:
    """Do the run of a result file again in a worker; the recorded file stays as it is.

    The run's encoder stays in the work folder of the order.

    Raises:
        DmlError: the run cannot be done, with the worker's reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "again.json"
        again = replace(order, again=str(recorded.resolve()), written=str(written))
        failure = ""
        with workers(again, 1, threads=suite.protocol.threads) as processes:
            for _, event in events_of(processes):
                failure = event.text if event.kind == "failed" else failure
                tell(event)
        if not written.is_file():
            raise DmlError(failure or "the worker that repeats the run ended early; its message is above")
        return json.loads(written.read_text(encoding="utf-8"))
