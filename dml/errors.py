"""Everything a user can do wrong, as exceptions that explain themselves.

::

    DmlError                     exit 1   anything below; shown as one clean message, never a traceback
    ├── UsageError               exit 2   the command or call itself is wrong
    │   ├── ConfigError                   a recipe, a setting or a name in one
    │   └── MissingExtra                  an optional engine is not installed; names the install command
    ├── DataError                exit 3   labelled data that cannot be used
    │   ├── TooManyBadImages              more unreadable pictures than the caller allows
    │   └── TooManyRemovals               more items would be deleted than the caller allows
    ├── InvalidImage             exit 3   bytes that are not a picture we can use
    │   ├── UnsupportedImage              a format that is not read here
    │   └── ImageTooLarge                 more bytes or pixels than allowed (a decompression bomb)
    ├── TrainingDiverged                  the loss is no number any more
    ├── EncoderError                      an encoder folder that is missing, damaged or too new
    ├── VectorError                       a vector that cannot be searched or stored
    │   └── DimensionMismatch             its length differs from the collection's
    ├── CollectionError                   a collection that cannot do what was asked
    │   ├── UnknownCollection
    │   ├── UnknownItem
    │   ├── ImageNotKept                  the item has no picture
    │   ├── ModelMismatch                 made by another encoder, or a profile that does not agree
    │   ├── FilterInvalid        exit 2   names the condition by its JSON Pointer
    │   ├── CursorInvalid                 not given out here, or for another search
    │   ├── CursorExpired
    │   ├── CollectionLocked              another process is writing
    │   ├── ReadOnly
    │   ├── DamagedFile                   a checksum or a format that does not fit
    │   ├── Unreachable                   the server that keeps it does not answer
    │   └── NotAvailable                  known, but this backend or version does not have it
    ├── StorageError                      the disk is full or refuses
    ├── ServiceError                      the service answered with a problem, or not at all
    └── GateNotMet               exit 4   a measured figure is below what was demanded

A message says four things: what is wrong, where, what was given, what to do.
"""


class DmlError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code = 1


class UsageError(DmlError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class MissingExtra(UsageError):
    def __init__(self, need: str, extra: str) -> None:
        super().__init__(f'{need} is not installed. Install it with: pip install "dml[{extra}]".')


class DataError(DmlError):
    exit_code = 3


class TooManyBadImages(DataError):
    pass


class TooManyRemovals(DataError):
    pass


class InvalidImage(DmlError):
    exit_code = 3


class UnsupportedImage(InvalidImage):
    pass


class ImageTooLarge(InvalidImage):
    pass


class TrainingDiverged(DmlError):
    pass


class EncoderError(DmlError):
    pass


class VectorError(DmlError):
    pass


class DimensionMismatch(VectorError):
    def __init__(self, expected: int, given: int, where: str = "the vector") -> None:
        super().__init__(f"{where} has {given} numbers, but this collection holds vectors of {expected}")
        self.expected, self.given = expected, given


class CollectionError(DmlError):
    pass


class UnknownCollection(CollectionError):
    pass


class UnknownItem(CollectionError):
    pass


class ImageNotKept(CollectionError):
    pass


class ModelMismatch(CollectionError):
    pass


class FilterInvalid(CollectionError):
    """Has `pointer`, the JSON Pointer of what is wrong in the filter, and `detail`, what that is."""

    exit_code = 2  # as of other conditions that cannot be read: the command is wrong, not the collection

    def __init__(self, detail: str, *, pointer: str = "") -> None:
        super().__init__(f"filter{pointer}: {detail}")
        self.detail, self.pointer = detail, pointer


class CursorInvalid(CollectionError):
    pass


class CursorExpired(CollectionError):
    pass


class CollectionLocked(CollectionError):
    pass


class ReadOnly(CollectionError):
    pass


class DamagedFile(CollectionError):
    pass


class Unreachable(CollectionError):
    pass


class NotAvailable(CollectionError):
    pass


class StorageError(DmlError):
    pass


class ServiceError(DmlError):
    pass


class GateNotMet(DmlError):
    exit_code = 4
