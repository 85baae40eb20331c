"""Profiles: who decodes, who computes, in which precision; and which of them may be compared.

A profile is written DECODER/RUNTIME-PRECISION, as "pillow/onnx-f32" (the reference) or
"fused/openvino-bf16". All profiles of an encoder share its weights and its one preprocessing; what they round
differs. Vectors of two profiles are compared only after it was measured, on real pictures, that neighbours
stay the same; the figures are kept in the encoder's manifest, see `dml.encoder.agreement`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from dml.encoder.decoders import DecoderName
from dml.errors import ModelMismatch, UsageError

PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "onnx": ("f32",),
    "openvino": ("f32", "bf16", "int8"),
    "torch": ("f32", "bf16"),
}
"""Runtime -> the precisions that it can compute in, the default first."""

NEEDED_QUERIES = 1000
NEEDED_TOP1 = 0.99
NEEDED_OVERLAP = 0.98


@dataclass(frozen=True)
class Profile:
    """How pictures become vectors, besides the weights and the preprocessing."""

    decoder: str = "pillow"
    runtime: str = "onnx"
    precision: str = "f32"

    def __post_init__(self) -> None:
        if (
            self.decoder not in get_args(DecoderName)
            or self.runtime not in PRECISIONS
            or self.precision not in PRECISIONS[self.runtime]
        ):
            known = [f"{name}-{p}" for name, found in PRECISIONS.items() for p in found]
            raise UsageError(
                f'There is no profile "{self}". A profile is DECODER/RUNTIME-PRECISION, with one of '
                f"{', '.join(get_args(DecoderName))} and one of {', '.join(known)}, as {REFERENCE_NAME}."
            )

    def __str__(self) -> str:
        return f"{self.decoder}/{self.runtime}-{self.precision}"

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """The inverse of `str`. Raises UsageError for anything else."""
        decoder, slash, engine = text.partition("/")
        runtime, dash, precision = engine.partition("-")
        if not slash or not dash:
            raise UsageError(
                f'"{text}" is no profile: write DECODER/RUNTIME-PRECISION, as {REFERENCE_NAME} or '
                f"fused/openvino-bf16."
            )
        return cls(decoder, runtime, precision)


def named(text: str) -> dict[str, Any]:
    """What an operator calls a runtime, as arguments of `Encoder.load`: "onnx" a runtime with its usual
    decoder and precision, "fused/openvino-bf16" a profile. Raises UsageError for a profile that there is not.
    """
    if "/" in text:
        return {"runtime": "auto", "profile": str(Profile.parse(text))}
    return {"runtime": text, "profile": None}


REFERENCE_NAME = "pillow/onnx-f32"
REFERENCE = Profile.parse(REFERENCE_NAME)


@dataclass(frozen=True)
class ProfileAgreement:
    """How often a query of one profile finds, among vectors of another, what their own queries find.

    Every picture is a query against all others; the worse direction of the two counts.
    """

    profiles: tuple[str, str]
    queries: int
    top1_equal: float  # share of queries whose nearest picture is the same
    overlap_at_10: float  # mean share of the ten nearest that are the same
    cosine_p1: float  # 1st percentile of the cosine between both vectors of a picture
    cosine_min: float
    data: str = ""  # name of the pictures
    measured: str = ""  # ISO 8601, UTC

    @property
    def problem(self) -> str | None:
        """Why vectors of the two are not to be compared; None when they may be."""
        if self.queries < NEEDED_QUERIES:
            return f"measured on {self.queries:,} queries only, at least {NEEDED_QUERIES:,} are needed"
        if self.top1_equal < NEEDED_TOP1:
            return (
                f"the nearest picture is the same for {self.top1_equal:.2%} only, {NEEDED_TOP1:.0%} is needed"
            )
        if self.overlap_at_10 < NEEDED_OVERLAP:
            return f"overlap@10 is {self.overlap_at_10:.4f}, at least {NEEDED_OVERLAP} is needed"
        return None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "profiles": list(self.profiles)}


def stored_agreements(tree: Mapping[str, Any]) -> list[ProfileAgreement]:
    """What an encoder's manifest holds of them."""
    found = tree.get("profiles", [])
    return [ProfileAgreement(**{**entry, "profiles": tuple(entry["profiles"])}) for entry in found]


def why_not_comparable(tree: Mapping[str, Any], one: Profile, other: Profile) -> str | None:
    """Why a query of one profile may not be compared with vectors of the other; None when it may be.

    ONNX Runtime and torch in float32 behind the same decoder count as one: they were compared when the model
    was exported, and an export that disagrees is refused.

    Args:
        tree: manifest of the encoder that both belong to.
    """
    exported = {(p.runtime, p.precision) for p in (one, other)} <= {("onnx", "f32"), ("torch", "f32")}
    if one == other or (exported and one.decoder == other.decoder and tree.get("agreement")):
        return None
    for agreement in stored_agreements(tree):
        if set(agreement.profiles) == {str(one), str(other)}:
            return agreement.problem
    return "their agreement has not been measured"


def require_comparable(tree: Mapping[str, Any], made_by: Iterable[Profile], query: Profile) -> None:
    """Refuse to compare vectors of a profile with those of others without a measured agreement.

    Args:
        tree: manifest of the encoder.
        made_by: the profiles of the vectors that are there.
        query: the profile of the vectors that come.

    Raises:
        ModelMismatch: saying which pair, why not, and how to measure it.
    """
    for profile in made_by:
        reason = why_not_comparable(tree, profile, query)
        if reason is not None:
            raise ModelMismatch(
                f"These vectors were made with the profile {profile}, and pictures would be embedded with "
                f"{query} here: {reason}. Use --profile {profile}, or measure the pair on at least "
                f"{NEEDED_QUERIES:,} pictures of yours: dml encoder check ENCODER --profile {profile} "
                f"--profile {query} --data FOLDER."
            )


def profiles_in(info: Mapping[str, Any]) -> tuple[Profile, ...]:
    """The profiles that made a collection's vectors, as its manifest tells about its encoder.

    Collections from before there were profiles name their runtime only: it decoded with Pillow and computed
    in float32. None are known where nothing is said, as of vectors that came from outside.
    """
    if "profiles" in info:
        return tuple(Profile.parse(text) for text in info["profiles"])
    return (Profile("pillow", info["runtime"], "f32"),) if info.get("runtime") in PRECISIONS else ()
