"""manifest.json of a local collection: what it is, and what its index was built as."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dml.checksums import KEY as CHECKSUM
from dml.checksums import seal, seal_fits
from dml.errors import DamagedFile, UnknownCollection
from dml.storage import opened_aside

FORMAT = 2
"""1 has no checksum."""
FILE = "manifest.json"
SUFFIX = ".collection"
"""Of a folder's name, no part of the collection's: shoes.collection holds "shoes"."""


@dataclass(frozen=True)
class Manifest:
    """Everything about a collection that is not an item of it."""

    name: str
    dim: int
    fingerprint: str
    created: str  # ISO 8601, UTC
    metric: str = "cosine"
    index: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for: {"kind": "auto" or a kind, "options": {...}}, and "promise" where there is one.
    Kind and options are then those that were chosen for it; "auto" until then."""
    built: Mapping[str, Any] = field(default_factory=dict)
    """What the last build made: kind, sequence, count, seconds, measured recall; {} before the first."""
    roots: Mapping[str, str] = field(default_factory=dict)
    """name -> absolute path of a folder with referenced pictures."""
    encoder: Mapping[str, Any] = field(default_factory=dict)
    """About the encoder, for people."""
    backend: Mapping[str, Any] = field(default_factory=dict)
    """{} for a collection in this folder, or what keeps it: {"kind": "milvus", "uri": …, "collection": …}."""
    format: int = FORMAT

    def with_(self, **changes: Any) -> "Manifest":
        return replace(self, **changes)


def default_name(folder: Path) -> str:
    """What the collection in a folder is called unless somebody says otherwise: shoes.collection is "shoes".

    The name is what clients of the service write into addresses; the ending is there for people who look at
    folders.
    """
    whole = folder.resolve().name
    return whole.removesuffix(SUFFIX) or whole


def promise_of(manifest: Manifest) -> tuple[float | None, bool | None]:
    """The recall that is promised, and whether the last measurement keeps it; None: nothing to tell."""
    promise = manifest.index.get("promise") or {}
    return promise.get("recall"), (manifest.built.get("promise") or {}).get("holds") if promise else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put it into the folder in one step. Raises StorageError."""
    with opened_aside(folder / FILE) as file:
        file.write(seal(asdict(replace(manifest, format=FORMAT))))


def read_manifest(folder: Path) -> Manifest:
    """Read it.

    Raises:
        UnknownCollection: there is none.
        DamagedFile: not readable as one, not as it was written, or of a newer format.
    """
    path = folder / FILE
    try:
        data = path.read_bytes()
        tree = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        raise UnknownCollection(no_collection(folder)) from None
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path} cannot be read: {error}") from error
    return parsed(tree, path, sealed=seal_fits(data))


def no_collection(folder: Path) -> str:
    """What to tell of a place without a collection: what is there is kept, so one is made elsewhere."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return (
            f"There is no collection at {folder}. `dml index build FOLDER --encoder RUN --out {folder}` "
            f"makes one of a folder of pictures."
        )
    if not folder.is_dir():
        return f"{folder} is a file; a collection is a folder, as `dml index build` makes it."
    new = folder.with_name(folder.name + SUFFIX) if folder.name else Path(f"new{SUFFIX}")
    return (
        f"{folder} is not a collection (no {FILE} in it). If it holds pictures, `dml index build {folder} "
        f"--encoder RUN --out {new}` makes one of them."
    )


def parsed(tree: Any, path: Path, *, sealed: bool | None) -> Manifest:
    """The manifest that a JSON tree is.

    Args:
        path: for the errors.
        sealed: whether its checksum fits; None: it has none.

    Raises:
        DamagedFile: as `read_manifest`.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("format"), int):
        raise DamagedFile(f"{path} is not the manifest of a collection")
    if tree["format"] > FORMAT:
        raise DamagedFile(
            f"{path} has format {tree['format']}, and this version of dml reads up to {FORMAT}; "
            f"update dml to open it"
        )
    if sealed is False or (sealed is None and tree["format"] > 1):
        raise DamagedFile(
            f"{path} is not as it was written: its checksum does not fit. "
            f"`dml index repair {path.parent}` writes it again as the catalogue remembers it."
        )
    try:
        return Manifest(**{key: value for key, value in tree.items() if key != CHECKSUM})
    except TypeError as error:
        raise DamagedFile(f"{path} is not the manifest of a collection: {error}") from None
