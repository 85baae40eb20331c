"""faiss on GPUs: which device a search runs on, whether an index fits there, and the copy that is searched.

The index itself always lives on the CPU: it is what is saved, and what answers when the GPU cannot (more than
`GPU_K_LIMIT` neighbours, ranges). The copy is made at the first search and made anew after an add.
"""

import ctypes
import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.devices import shows_cuda
from dml.errors import ConfigError, MissingExtra
from dml.index.base import Vectors

log = logging.getLogger(__name__)

GPU_K_LIMIT = 2048
"""faiss's GPU kernels select at most this many neighbours, and look into at most this many cells."""

SCRATCH_BYTES = 512 << 20
"""What faiss may use on a GPU beside the vectors: intermediate results of a search."""


def gpu_count(faiss: Any) -> int:
    """GPUs that the installed faiss can use; 0 for faiss-cpu."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def choose_device(device: str, kind: str, *, on_gpu: bool, faiss: Any) -> str:
    """Decide "cpu", "cuda:N" or "cuda:N,M,…" from what was asked for and what is there; say so in the log.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N", or several GPUs as "cuda:0,1".
        on_gpu: whether this kind has a GPU form.

    Raises:
        ConfigError: not a device, a kind without GPU form, a number beyond the GPUs that are there.
        MissingExtra: a GPU asked for, and faiss built without one.
    """
    if device == "cpu":
        return device
    if device == "auto":
        chosen = "cuda:0" if on_gpu and gpu_count(faiss) else "cpu"
        log.info("index %s: device auto means %s", kind, chosen)
        return chosen
    numbers = device_numbers(device)
    if not on_gpu:
        raise ConfigError(
            f'The index kind "{kind}" has no GPU form. Use device = "cpu", or another kind (ivf).'
        )
    if not hasattr(faiss, "StandardGpuResources"):
        seen = "" if shows_cuda() else "; this machine shows no CUDA device at all"
        raise MissingExtra(f'faiss with GPU support (asked for by device = "{device}"{seen})', "gpu")
    there = gpu_count(faiss)
    if max(numbers) >= there:
        raise ConfigError(f'There is no "cuda:{max(numbers)}" (given: "{device}"): faiss sees {there} GPUs.')
    return "cuda:" + ",".join(map(str, numbers))


def device_numbers(device: str) -> list[int]:
    """ "cuda" -> [0], "cuda:1" -> [1], "cuda:0,1" -> [0, 1]. Raises ConfigError for anything else."""
    name, colon, listed = device.partition(":")
    numbers = listed.split(",") if colon else ["0"]
    if name != "cuda" or not all(number.isdigit() for number in numbers):
        raise ConfigError(f'Unknown device "{device}". Known: auto, cpu, cuda:N, cuda:N,M.')
    if len(set(map(int, numbers))) != len(numbers):
        raise ConfigError(f'A GPU is named twice in "{device}".')
    return [int(number) for number in numbers]


def plan_copies(needed: int, free: Sequence[int | None], *, device: str) -> bool:
    """Whether to split an index over the GPUs (True: a part on each) or to put all of it on each (False).

    Copies answer more queries at once and are taken where each fits; parts hold larger indexes.

    Args:
        needed: bytes of the whole index on a GPU.
        free: bytes free on each GPU; None where it is not known, which counts as enough.

    Raises:
        ConfigError: neither fits.
    """
    room = [None if one is None else max(0, one - SCRATCH_BYTES) for one in free]
    if all(one is None or one >= needed for one in room):
        return False
    part = -(-needed // len(room))
    if len(room) > 1 and all(one is None or one >= part for one in room):
        return True
    least = min(one for one in room if one is not None)
    raise ConfigError(
        f"The index needs {needed / 2**30:,.1f} GiB on {device}"
        f"{f' ({part / 2**30:,.1f} GiB on each)' if len(room) > 1 else ''}, and {least / 2**30:,.1f} GiB are "
        f"free there beside {SCRATCH_BYTES / 2**30:.1f} GiB for searching. Use another device, several "
        f'("cuda:0,1"), precision = "float16", the kind ivf with codes = "pq8", or device = "cpu".'
    )


def free_memory(number: int) -> int | None:
    """Bytes free on the GPU that CUDA numbers so; None where the driver does not say."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), number):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context):
            return None
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
        return None if failed else int(free.value)
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


class GpuCopy:
    """A copy of an index on one or several GPUs. faiss's GPU resources serve one thread at a time: searches
    queue up.

    Args:
        needed: bytes that the index takes there, checked before anything is copied.
        half: keep the vectors as float16 there.

    Raises:
        ConfigError: it does not fit.
    """

    def __init__(self, faiss: Any, engine: Any, device: str, *, needed: int, half: bool = False) -> None:
        numbers = device_numbers(device)
        split = plan_copies(needed, [free_memory(number) for number in numbers], device=device)
        self.resources = [faiss.StandardGpuResources() for _ in numbers]
        for one in self.resources:
            one.setTempMemory(SCRATCH_BYTES)
        options = faiss.GpuMultipleClonerOptions()
        options.useFloat16 = half
        options.shard = split
        try:
            if len(numbers) == 1:
                self.engine = faiss.index_cpu_to_gpu(self.resources[0], numbers[0], engine, options)
            else:
                self.engine = faiss.index_cpu_to_gpu_multiple_py(self.resources, engine, options, numbers)
        except RuntimeError as error:  # another process took the memory meanwhile
            if "out of memory" not in str(error) and "alloc" not in str(error):
                raise
            raise ConfigError(
                f"{device} ran out of memory while the index ({needed / 2**30:,.1f} GiB) was copied there. "
                f'Free some, or use device = "cpu".'
            ) from error
        self.lock = threading.Lock()

    def add(self, rows: Vectors) -> None:
        """More rows behind the last one (a copy that began empty)."""
        getattr(self.engine, "add_numpy", self.engine.add)(rows)

    def search(self, queries: Vectors, k: int, parameters: Any) -> tuple[Vectors, NDArray[np.int64]]:
        search = getattr(self.engine, "search_numpy", self.engine.search)
        with self.lock:
            return search(queries, k, params=parameters)
