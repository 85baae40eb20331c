"""What the service remembers beside its collections: jobs, answers to repeated writes, aliases, feedback.

All of it lies in the state file (`service.state`), so it survives a restart. The file is made by the first
thing that is to be remembered; a service that only answers searches makes none.

Several services may share a state folder. What belongs to a collection is kept under the folder of that
collection (its place), so that each service sees only what is its own.
"""

from dml.errors import DmlError


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
