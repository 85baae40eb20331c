"""Everything that a service remembers beside its collections, in one hand."""

from pathlib import Path

from service.aliases import Aliases
from service.feedback import Feedback
from service.jobs import Jobs
from service.repeats import Repeats


class Remembered:
    """Jobs, answers to repeated writes, aliases and feedback in one state folder.

    Args:
        folder: the state folder; nothing is made there before something is to be remembered.
    """

    def __init__(self, folder: Path) -> None:
        self.jobs, self.repeats = Jobs(folder), Repeats(folder)
        self.aliases, self.feedback = Aliases(folder), Feedback(folder)

    def close(self) -> None:
        """Give up the jobs that run, and let go of the files."""
        for part in (self.jobs, self.repeats, self.aliases, self.feedback):
            part.close()
