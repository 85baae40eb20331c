"""What our commands set for their own process before anything heavy is loaded.

Only entry points call this (`dml`, the service with it, and the benchmark's workers): importing the library
changes nothing. A variable that the user has set stays as it is.

faiss's wheels bring an OpenBLAS of 2021, which does not know processors made since and takes kernels for much
older ones (Zen or even Prescott on a machine with AVX-512). Which it will take cannot be asked before it is
loaded, and not be changed afterwards: so where the processor has all of AVX-512 that the newest kernels want,
they are named. numpy's own, newer OpenBLAS reads the same variable, and takes such kernels there by itself.
"""

import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

DEFAULTS = {
    # Threads that wait by spinning fight each other for cores as soon as anything else runs on the machine;
    # sleeping costs next to nothing when nothing does.
    "OMP_WAIT_POLICY": "passive",
    "KMP_BLOCKTIME": "0",
}

SERVICE_DEFAULTS = {
    # OpenBLAS's threads look for more work for some 30 ms after every product: in a service that is asked
    # several times a second they take the cores from decoding and embedding. 2^4 cycles: they sleep at once.
    "OPENBLAS_THREAD_TIMEOUT": "4",
}

CORE_VARIABLE = "OPENBLAS_CORETYPE"
AVX512_CORE = "SkylakeX"
AVX512_FLAGS = frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "fma"})

_prepared = False


def prepare_process() -> None:
    """Set the defaults above, and the kernels of faiss's BLAS, where the user has not."""
    global _prepared
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if CORE_VARIABLE not in os.environ and faiss_brings_openblas():
        core = best_core(processor_flags())
        if core is not None:
            os.environ[CORE_VARIABLE] = core
    _prepared = True


def prepare_service() -> None:
    """Set what a process needs besides that answers requests; before numpy and faiss are loaded."""
    for name, value in SERVICE_DEFAULTS.items():
        os.environ.setdefault(name, value)


def best_core(flags: frozenset[str]) -> str | None:
    """The OpenBLAS kernels to name for a processor with these features; None: OpenBLAS may choose."""
    return AVX512_CORE if flags >= AVX512_FLAGS else None


def processor_flags() -> frozenset[str]:
    """What the first processor can do, as Linux on x86-64 names it; nothing elsewhere."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as listing:
            for line in listing:
                if line.startswith("flags"):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def faiss_brings_openblas() -> bool:
    """Whether a faiss that is not loaded yet is a wheel with its own OpenBLAS; does not load it."""
    if "faiss" in sys.modules:
        return False  # its BLAS has chosen
    found = find_spec("faiss")
    if found is None or found.origin is None:
        return False
    site = Path(found.origin).parent.parent
    return any(site.glob("faiss_*.libs/libopenblas*"))


def is_prepared() -> bool:
    """Whether this process is one of our own commands, which may be tuned as a whole."""
    return _prepared
