"""Calls that take turns on the clock, the machine they ran on, and the table of what came out.

Absolute times belong to a machine and its neighbours. Repeats alternate between the contenders, so that a
busy neighbour slows all of them; what counts are medians and the ratios inside one run.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dml.errors import DmlError

SHORTEST = 0.02
"""Seconds: a call that takes less is repeated until its turn lasts this long."""


class Timing(NamedTuple):
    """How long one contender took."""

    seconds: float  # median of a call
    spread: float  # (longest - shortest) / median


class Disagreement(DmlError):
    """A contender computes something else than what it is raced against: its time would mean nothing."""


def race(contenders: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, Timing]:
    """Time calls that have run once already, in turns; each turn begins with another of them."""
    names = list(contenders)
    turns: dict[str, int] = {}
    for name in names:
        started = time.perf_counter()
        contenders[name]()
        turns[name] = max(1, round(SHORTEST / max(time.perf_counter() - started, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            for _ in range(turns[name]):
                contenders[name]()
            taken[name].append((time.perf_counter() - started) / turns[name])
    return {
        name: Timing(statistics.median(runs), (max(runs) - min(runs)) / statistics.median(runs))
        for name, runs in taken.items()
    }


def machine() -> dict[str, Any]:
    """What it was measured on."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "processor": processor_name(),
        "processors": processors,
        "threads": os.environ.get("OMP_NUM_THREADS", str(processors)),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    if "torch" in sys.modules:
        found["torch"] = str(sys.modules["torch"].__version__)
    return found


def processor_name() -> str:
    """The model as the system names it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def limit_threads(count: int) -> None:
    """Give every contender the same number of threads: start again with it in the environment."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    if all(os.environ.get(name) == str(count) for name in names):
        return
    os.environ.update(dict.fromkeys(names, str(count)))
    os.execv(sys.executable, [sys.executable, "-m", "eval.speed", *sys.argv[1:]])


def heading(here: Mapping[str, Any], repeats: int) -> str:
    """One line on where and how it was measured."""
    load = "" if here["load"] is None else f", load {here['load']} at the start"
    return (
        f"{here['processor']}, {here['threads']} of {here['processors']} processors{load}, {repeats} repeats"
    )


def lines_of(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Callable[[Any], str]]) -> list[str]:
    """Rows under a header: the name, then each column as its function writes it; "–" where there is none.

    A row with a "problem" shows that instead of figures.
    """
    width = max((len(row["name"]) for row in rows), default=0) + 2
    lines = [" " * width + "".join(f"{name:>14}" for name in columns)]
    for row in rows:
        if row.get("problem"):
            lines.append(f"{row['name']:<{width}}  left out: {row['problem']}")
            continue
        cells = ["–" if row.get(name) is None else write(row[name]) for name, write in columns.items()]
        lines.append(f"{row['name']:<{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


def milliseconds(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"


def ratio(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def megabytes(value: float) -> str:
    return f"{value / 2**20:,.0f}"


def share(value: float) -> str:
    return f"{value:.0%}"


def difference(value: float) -> str:
    return f"{value:.0e}"
