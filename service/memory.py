"""What the service remembers beside its collections: jobs, answers to repeated writes, aliases, feedback.

All of it lies in the state file (`service.state`), so it survives a restart. The file is made by the first
thing that is to be remembered; a service that only answers searches makes none.

Several services may share a state folder. What belongs to a collection is kept under the folder of that
collection (its place), so that each service sees only what is its own.
"""

import threading
from pathlib import Path

from dml.errors import DmlError
from service.state import FILE, Section, State


class Conflict(DmlError):
    """What is asked does not go with what is there now."""


class IdempotencyConflict(DmlError):
    """The Idempotency-Key was used for another request."""


class UnknownJob(DmlError):
    """No job of this id."""


class UnknownAlias(DmlError):
    """No alias of this name."""


class ConditionFailed(DmlError):
    """The item is not as the request says it has to be."""


class Drawer:
    """The tables of one section, opened when they are first needed. Any thread may ask.

    Args:
        folder: the state folder.
        section: whose tables.

    Raises:
        StorageError, DamagedFile, UsageError: by every method, as `State` does.
    """

    def __init__(self, folder: Path, section: Section) -> None:
        self.folder, self._section = folder, section
        self._lock = threading.Lock()
        self._state: State | None = None

    def if_there(self) -> State | None:
        """The tables; None when nothing was ever written. A file that took another's place is opened anew."""
        with self._lock:
            if self._state is not None and not self._state.is_current():
                self._state.close()
                self._state = None
            if self._state is None and (self.folder / FILE).exists():
                self._state = State(self.folder, self._section)
            return self._state

    def made(self) -> State:
        """The tables; made when they are not there."""
        found = self.if_there()
        if found is not None:
            return found
        with self._lock:
            if self._state is None:
                self._state = State(self.folder, self._section)
            return self._state

    def close(self) -> None:
        with self._lock:
            if self._state is not None:
                self._state.close()
            self._state = None
