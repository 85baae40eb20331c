"""Which encoder makes vectors for a collection: of the same fingerprint, and of a profile that agrees."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml.collection.local import LocalCollection
from dml.collection.manifest import read_manifest
from dml.encoder.profiles import REFERENCE, Profile, profiles_in, require_comparable
from dml.errors import EncoderError, MissingExtra

if TYPE_CHECKING:
    from dml.encoder import Encoder

log = logging.getLogger(__name__)


def load_encoder_of(
    folder: Path,
    *,
    path: Path | None = None,
    profile: str | None = None,
    runtime: str = "auto",
    device: str = "auto",
) -> "Encoder":
    """The encoder for queries and new items of the collection in `folder`.

    Without a profile and a runtime it is the profile that made the vectors, where that can run here, and
    otherwise the default one.

    Args:
        path: another folder of the same encoder; None: the one in the collection.

    Raises:
        ModelMismatch: another encoder, or a profile whose vectors are not to be compared with those there.
        EncoderError, MissingExtra, UsageError: as `Encoder.load`.
    """
    from dml.encoder import Encoder

    manifest = read_manifest(folder)
    made_by, where = profiles_in(manifest.encoder), path or folder / "encoder"
    encoder = None
    if profile is None and runtime == "auto" and made_by and not is_default(made_by[0]):
        try:
            encoder = Encoder.load(where, profile=made_by[0], device=device)
        except (EncoderError, MissingExtra) as error:
            log.warning("the profile %s of %s cannot run here: %s", made_by[0], folder, error)
    encoder = encoder or Encoder.load(where, profile=profile, runtime=runtime, device=device)
    if encoder.fingerprint == manifest.fingerprint:  # else whoever opens the collection with it says so
        require_comparable(encoder.manifest, made_by, encoder.profile)
    return encoder


def check_profile(collection: LocalCollection, encoder: "Encoder") -> None:
    """Refuse queries of a profile that does not agree with the vectors there. Raises ModelMismatch."""
    require_comparable(encoder.manifest, profiles_in(collection.manifest.encoder), encoder.profile)


def is_default(profile: Profile) -> bool:
    """Whether the runtime that is chosen for a machine gives the same vectors: ONNX Runtime or torch."""
    return profile.decoder == REFERENCE.decoder and (profile.runtime, profile.precision) in (
        ("onnx", "f32"),
        ("torch", "f32"),
    )


def admit(collection: LocalCollection, encoder: "Encoder") -> None:
    """Let an encoder add to a collection, and note its profile there.

    Raises:
        ModelMismatch: another encoder, or a profile that is not to be mixed with those there.
    """
    collection.check_fingerprint(encoder.fingerprint)
    info = collection.manifest.encoder
    there = profiles_in(info)
    if not len(collection):
        there = ()
    require_comparable(encoder.manifest, there, encoder.profile)
    names = list(dict.fromkeys([*map(str, there), str(encoder.profile)]))
    if names != info.get("profiles"):
        collection.set_encoder_info({**info, "profiles": names})


def describe_encoder(encoder: "Encoder") -> dict[str, Any]:
    """What a collection's manifest says about its encoder."""
    wanted = ("model", "image_size", "decoder", "created", "provenance", "agreement")
    known = {key: encoder.manifest[key] for key in wanted if key in encoder.manifest}
    here = {"path": str(encoder.path), "runtime": encoder.runtime, "device": encoder.device}
    return {**here, "profiles": [str(encoder.profile)], **known}
