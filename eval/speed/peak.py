"""The most memory that a call takes, seen from outside of the libraries that it uses.

torch keeps no statistics of its processor's memory, so the system is asked: the largest resident size
(`VmHWM`) of a fresh process that makes the inputs, runs something small (libraries load and set up their
buffers on first use), and then makes the call once. A refused allocation or too long a wait ends that
process and not the measurement.
"""

import ctypes
import gc
import multiprocessing
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

Call = Callable[[], object]
Make = Callable[..., Call]
"""Makes the inputs and returns the call to measure; importable by name, as it runs in another process."""

PRELOADED = [
    "eval.speed.losses",
    "eval.speed.bank",
    "eval.speed.class_statistics",
    "pytorch_metric_learning.losses",
    "pytorch_metric_learning.miners",
]
"""Loaded once, before processes are forked from the server, so that none of them waits for imports; Python
skips what is not installed."""
READY = "ready"


class Peak(NamedTuple):
    """What one call took."""

    extra: int | None  # bytes above those in use before the call
    seconds: float | None  # of that first call
    problem: str  # why there are no figures; empty when there are


def extra_memory(make: Make, *arguments: Any, small: tuple[Any, ...], patience: float, limit: float) -> Peak:
    """Run `make(*arguments)()` in a process of its own.

    Args:
        make: see `Make`.
        arguments: of the call to measure.
        small: arguments of a small call made first.
        patience: seconds until the process is ended, from the start of the call to measure.
        limit: GiB that the call may take besides its inputs.
    """
    ways = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    if "forkserver" in ways:
        context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(theirs, make, arguments, small, limit))
    process.start()
    theirs.close()
    try:
        return answer(ours, patience, limit)
    finally:
        process.kill()
        process.join()
        process.close()


def answer(connection: Connection, patience: float, limit: float) -> Peak:
    """What the process sends, or that it died or took too long.

    Raises:
        RuntimeError: with the process's traceback; a mistake is no reason to leave a contender out.
    """
    died = Peak(None, None, f"its process was ended by the system (limit {limit:g} GiB)")
    for wait, late in (
        (600, "its inputs were not ready within 10 minutes"),
        (patience, f"over {patience:g} s"),
    ):
        try:
            said = connection.recv() if connection.poll(wait) else late
        except EOFError:
            return died
        if isinstance(said, Peak):
            return said
        if said == late:
            return Peak(None, None, late)
        if said != READY:
            raise RuntimeError(f"measuring memory failed:\n{said}")
    return died


def measure(
    connection: Connection, make: Make, arguments: tuple[Any, ...], small: tuple[Any, ...], limit: float
) -> None:
    """What runs in the process: `READY`, then the `Peak`; or a traceback."""
    try:
        make(*small)()
        call = make(*arguments)
        settle()
        connection.send(READY)
        connection.send(peak_of(call, limit))
    except Exception:  # handed on to the process that asked
        connection.send(traceback.format_exc())


def peak_of(call: Call, limit: float) -> Peak:
    """Make the call once in this process, from now on allowed `limit` GiB more than it has."""
    before = resident("VmRSS")
    allow(int(limit * 2**30))
    started = time.perf_counter()
    try:
        kept = call()
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        return Peak(None, None, f"needs more than {limit:g} GiB")
    seconds = time.perf_counter() - started
    extra = None if before is None else max(0, (resident("VmHWM") or 0) - before)
    del kept
    return Peak(extra, seconds, "")


def settle() -> None:
    """Give freed memory back, and let the largest resident size start from what is in use now."""
    gc.collect()
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):  # another C library: what it keeps then counts as in use
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):  # not permitted: the peak then includes the making of the inputs
        Path("/proc/self/clear_refs").write_text("5")


def resident(kind: str) -> int | None:
    """Bytes in memory now ("VmRSS") or at most ("VmHWM"); None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = re.search(rf"{kind}:\s+(\d+) kB", status.read_text())
    return int(found[1]) * 1024 if found else None


def allow(extra: int) -> None:
    """Refuse allocations beyond so many bytes more than now, so that the machine is not brought to a halt."""
    used = resident("VmSize")
    if used is None:
        return
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (used + extra, used + extra))


def peak_memory() -> int:
    """The most bytes that this process has had in memory.

    Linux's `ru_maxrss` starts from the peak of the process that started this one; /proc does not.
    """
    import resource

    found = resident("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
