"""Everything that a service remembers beside its collections, in one hand."""

from pathlib import Path

from service.aliases import Aliases
from service.feedback import Feedback
from service.jobs import Jobs
from service.repeats import Repeats
from service.state import StateFile


class Remembered:
    """Jobs, answers to repeated writes, aliases and feedback in one state file.

    Args:
        state: the file, or its folder; nothing is made there before something is to be remembered.
    """

    def __init__(self, state: StateFile | Path) -> None:
        self._own = isinstance(state, Path)
        self._file = file = StateFile(state) if isinstance(state, Path) else state
        self.jobs, self.repeats = Jobs(file), Repeats(file)
        self.aliases, self.feedback = Aliases(file), Feedback(file)

    def close(self) -> None:
        """Give up the jobs that run, and let go of the file; one that was given stays open."""
        for part in (self.jobs, self.repeats, self.aliases, self.feedback):
            part.close()
        if self._own:
            self._file.close()
