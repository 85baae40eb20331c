"""What our commands set for their own process before anything heavy is loaded.

Only entry points call this (`dml`, the service with it, and the benchmark's workers): importing the library
changes nothing. A variable that the user has set stays as it is.
"""

import os

DEFAULTS = {
    # Threads that wait by spinning fight each other for cores as soon as anything else runs on the machine;
    # sleeping costs next to nothing when nothing does.
    "OMP_WAIT_POLICY": "passive",
    "KMP_BLOCKTIME": "0",
}


_prepared = False


def prepare_process() -> None:
    """Set the defaults above where the user has not."""
    global _prepared
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    _prepared = True


def is_prepared() -> bool:
    """Whether this process is one of our own commands, which may be tuned as a whole."""
    return _prepared
