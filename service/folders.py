"""The folder below which a service makes and deletes collections, and the opening of those that are there.

::

    DATA/NAME                a collection
    DATA/.NAME.building      one that is being made; left by a crash: made anew
    DATA/.NAME.discarded     one that is on its way out; left by a crash: removed at the next start
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml.collection import Collection, CollectionInfo, create_collection, is_collection, open_collection
from dml.collection.place import building, discarded, recover
from dml.errors import ConfigError, NotAvailable, UsageError
from dml.index import KINDS, check_options
from dml.storage import flush_to_disk, storage_errors
from service.memory import Conflict
from service.settings import Settings

if TYPE_CHECKING:
    from dml.encoder import Encoder

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of collections and aliases that are made here: they are names of folders, and parts of addresses."""


class Folder:
    """Where collections are made and deleted.

    Args:
        path: made when it is not there.
        runtime: of the encoders of collections that are opened later: "auto", "onnx" or "torch".
    """

    def __init__(self, path: Path, *, runtime: str = "auto") -> None:
        self.path, self.runtime = path, runtime

    def collections(self, *, tidy: bool) -> list[Path]:
        """The collections that are there, by name. `tidy`: remove what a crash left half deleted."""
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if tidy:
                for left in self.path.glob(".*.discarded"):
                    shutil.rmtree(left, ignore_errors=True)
        return [
            child for child in sorted(self.path.iterdir()) if child.name[0] != "." and is_collection(child)
        ]

    def create(
        self, name: str, *, dim: int, fingerprint: str, index: Mapping[str, Any], encoder: Any | None
    ) -> Collection:
        """An empty collection, whole or not at all. Raises Conflict, ConfigError, StorageError."""
        check_name(name)
        place = self.path / name
        if place.exists():
            raise Conflict(
                f'There is something called "{name}" in the folder of this service that is no collection.'
            )
        half, source = building(place), getattr(encoder, "path", None)
        with storage_errors(place):
            shutil.rmtree(half, ignore_errors=True)
            made = create_collection(
                half,
                dim=dim,
                fingerprint=fingerprint,
                name=name,
                index=index["kind"],
                options=index["options"],
                promise=index["promise"],
                encoder_info=about_encoder(encoder),
            )
            made.close()
            if source is not None:
                copy_encoder(Path(source), half / "encoder")
            half.rename(place)
            flush_to_disk(self.path)
        return open_collection(place, fingerprint=fingerprint)

    def holds(self, name: str) -> bool:
        """Whether a whole collection lies in the folder under this name, opened or not."""
        return NAME.fullmatch(name) is not None and is_collection(self.path / name)

    def open(
        self, name: str, encoders: Mapping[str, Any], *, settings: Settings
    ) -> tuple[Collection, dict[str, Any]]:
        """A collection that lies here, and the encoders with its own among them.

        Raises:
            Conflict: it calls itself by another name.
            CollectionError, EncoderError: it cannot be opened.
        """
        opened: dict[str, Collection] = {}
        known = dict(encoders)
        open_one(self.path / name, opened, known, runtime=self.runtime, settings=settings)
        [collection] = opened.values()
        if collection.name != name:
            collection.close()
            raise Conflict(
                f'The collection in the folder "{name}" is called "{collection.name}". '
                f"Call it as its folder: dml index rename {self.path / name} {name}"
            )
        return collection, known

    @staticmethod
    def check_same(info: CollectionInfo, *, dim: int, fingerprint: str, index: Mapping[str, Any]) -> None:
        """Raises Conflict, naming what differs."""
        is_so, promise = info.manifest["index"], index["promise"]
        there = {"dim": info.dim, "model": info.fingerprint, **is_so}
        wanted: dict[str, Any] = {"dim": dim, "model": fingerprint}
        if promise is None:
            wanted |= {"kind": index["kind"], "options": index["options"]}
        else:  # kind and options are those that were chosen for it
            there, wanted["promise"] = {"promise": "none", **there}, asdict(promise)
        for name, value in wanted.items():
            if there[name] != value:
                raise Conflict(
                    f'The collection "{info.name}" is there with {name} {there[name]}, and not {value}. '
                    f"Delete it first, choose another name, or change its index by a rebuild."
                )

    def check_within(self, name: str, place: str) -> None:
        """Raises Conflict for a collection that lies elsewhere."""
        if Path(place).parent != self.path.resolve():
            raise Conflict(
                f'The collection "{name}" was named at the start of the service and lies outside its folder '
                f"for collections, so it is not deleted from here."
            )

    @staticmethod
    def remove(place: Path) -> None:
        """Delete the folder of a closed collection: from one moment to the next it is not there any more."""
        left = discarded(place)
        with storage_errors(place):
            shutil.rmtree(left, ignore_errors=True)
            place.rename(left)
            flush_to_disk(place.parent)
        shutil.rmtree(left, ignore_errors=True)


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a collection or an alias. Raises ConfigError."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f'A name has 1 to 128 letters, digits, ".", "_" or "-", and begins with a letter or digit; '
            f'got "{name[:200]}".'
        )


def check_index(kind: str | None, options: Mapping[str, Any]) -> None:
    """Refuse an index that a client may not ask for: a class of its own ("module:Class") would be imported.

    Raises:
        ConfigError
    """
    if kind is not None and kind != "auto" and kind not in KINDS:
        known = ", ".join(["auto", *KINDS])
        raise ConfigError(f'There is no index kind "{kind[:64]}" here. There is: {known}.')
    if kind is not None:
        check_options(kind, options)


def about_encoder(encoder: Any | None) -> dict[str, Any]:
    """What the manifest of a collection says of its encoder; nothing for one that is not a folder."""
    if getattr(encoder, "path", None) is None:
        return {}
    from dml.collection.encoding import describe_encoder

    return describe_encoder(encoder)  # type: ignore[arg-type]


def copy_encoder(source: Path, target: Path) -> None:
    """Copy an encoder's files and flush them. Raises NotAvailable when they are not there any more."""
    if not source.is_dir():
        raise NotAvailable(
            "The files of this encoder are not there any more, since the collection that they came with was "
            "deleted. Start the service with --encoder FOLDER."
        )
    shutil.copytree(source, target)
    for path in [*target.rglob("*"), target]:
        flush_to_disk(path)


def open_all(
    paths: Sequence[Path], encoders: Sequence[Path], *, runtime: str, settings: Settings
) -> tuple[dict[str, Collection], dict[str, "Encoder"]]:
    """Collections by name and encoders by fingerprint; all or none are left open.

    Raises:
        CollectionError, EncoderError, UsageError: as `Engine.open`.
    """
    from dml.encoder import Encoder
    from dml.encoder.profiles import named

    collections: dict[str, Collection] = {}
    known: dict[str, Encoder] = {}
    try:
        for path in encoders:
            encoder = Encoder.load(path, **named(runtime))
            known.setdefault(encoder.fingerprint, encoder)
        for path in paths:
            open_one(path, collections, known, runtime=runtime, settings=settings)
    except BaseException:
        for collection in collections.values():
            collection.close()
        raise
    return collections, known


def open_one(
    path: Path,
    collections: dict[str, Collection],
    encoders: dict[str, "Encoder"],
    *,
    runtime: str,
    settings: Settings,
) -> None:
    """Open one, and put it and its encoder among the others."""
    from dml.collection.encoding import check_profile, load_encoder_of
    from dml.encoder.profiles import named

    recover(path)  # a collection that a killed build left half replaced, before its encoder is read
    folder = path / "encoder"
    encoder = load_encoder_of(path, **named(runtime)) if folder.is_dir() else None
    collection = open_collection(
        path, read_only=settings.read_only, fingerprint=encoder.fingerprint if encoder else None
    )
    if collection.name in collections:
        collection.close()
        raise UsageError(
            f'Two collections are called "{collection.name}", the second in {path}. '
            f"Call one by another name (`dml index rename`), or serve them on two ports."
        )
    collections[collection.name] = collection
    if encoder is not None:
        # One encoder serves all collections of its fingerprint.
        check_profile(collection, encoders.setdefault(encoder.fingerprint, encoder))
