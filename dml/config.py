"""What one training run is made of. A recipe is a TOML file with the same shape.

Defaults live here and nowhere else; a recipe states only what differs. Rules that join two fields are
checked in `__post_init__`, and their messages say why.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dml.errors import ConfigError

STRICT = ConfigDict(extra="forbid")


def at_least(config: Any, limit: float, *names: str) -> None:
    """Raise ValueError for the first of these fields that is below the limit, or no number (NaN)."""
    for name in names:
        if not getattr(config, name) >= limit:
            raise ValueError(f"{name} must be at least {limit}, got {getattr(config, name)}")


@dataclass(frozen=True)
class Part:
    """One swappable component: a known name or "package.module:Class", and its keyword arguments."""

    __pydantic_config__ = STRICT

    name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """A regulariser: its weight in the sum of losses, and the keyword arguments of its class."""

    __pydantic_config__ = STRICT

    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Which images, how they are divided, and how they are prepared."""

    __pydantic_config__ = STRICT

    source: str = ""
    """A folder, a manifest (.csv, .parquet) or the name of a data set; the command line's DATA goes here."""
    protocol: Literal["auto", "open-set", "closed-set"] = "auto"
    """open-set: validation and test classes are not trained on. closed-set: held-out images of the same
    classes.
    auto: open-set from 20 classes on, closed-set below."""
    validation_share: float = 0.2
    """Share of the classes (open-set) or of each class's images (closed-set) that selects the model."""
    test_share: float = 0.2
    """The same for the test split, when the data has none of its own; 0: no test split."""
    split_seed: int = 0
    """Decides what is held out. Apart from train.seed, so that seeds of one comparison share a split."""
    image_size: int = 64
    """Side of the square the network sees, in pixels."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """How a picture becomes square: cut the middle, add borders, or ignore its proportions."""
    augmentation: Part = Part("standard")
    """Random changes to training pictures."""
    max_bad_share: float = 0.05
    """Unreadable pictures are skipped and listed; a run fails when more than this share of them is."""
    memory_gb: float = 2.0
    """Decoded training pictures are kept in memory as uint8 when they fit in this many gigabytes (in each
    process)."""
    workers: int = 2
    """Processes that decode pictures when they are not kept in memory; 0: none beside the one that trains."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share must be between 0 and 1 (both excluded), got {self.validation_share}"
            )
        if not 0 <= self.test_share < 1:
            raise ValueError(f"test_share must be at least 0 and below 1, got {self.test_share}")
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share {self.validation_share} and test_share {self.test_share} "
                f"leave nothing to train on"
            )
        if self.image_size < 16:
            raise ValueError(f"image_size must be at least 16 pixels, got {self.image_size}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {self.max_bad_share}")
        at_least(self, 0, "memory_gb", "split_seed", "workers")


@dataclass(frozen=True)
class ModelConfig:
    """Picture to vector: trunk, pooling, linear head, unit length."""

    __pydantic_config__ = STRICT

    trunk: str = "tiny"
    """ "tiny" (small pictures, CPU), or any timm model by its name."""
    trunk_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    """Load timm's published weights (needs a network once, or timm's cache)."""
    weights: str = ""
    """A local safetensors file for the trunk, instead of `pretrained`."""
    pooling: Literal["avg", "max", "avg+max", "gem"] = "avg"
    dim: int = 128
    """Length of the embedding."""
    freeze_batch_norm: bool = False
    """Keep the running statistics of BatchNorm as they are (usual when fine-tuning small batches)."""
    attention: Literal["none", "branch", "gate"] = "none"
    """Squeeze-and-excitation on the feature map: "branch" feeds CC-Loss only and is dropped after training,
    "gate" multiplies the features and stays."""
    attention_reduction: int = 16

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ValueError(f"dim must be at least 2, got {self.dim}")
        if self.pretrained and self.weights:
            raise ValueError("give either pretrained = true or weights = FILE, not both")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast, in what precision, and what decides which model is kept."""

    __pydantic_config__ = STRICT

    epochs: int = 40
    steps_per_epoch: int = 0
    """Optimiser steps in an epoch; 0: as many as it takes to show as many images as there are."""
    classes_per_batch: int = 16
    images_per_class: int = 4
    """Batch size is the product of the two: every anchor then has positives and negatives. It is that of all
    processes together."""
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    learning_rate: float = 1e-3
    loss_learning_rate: float = 0.0
    """For the loss's own parameters (proxies, classifiers, centres); 0: the same as learning_rate."""
    weight_decay: float = 1e-4
    momentum: float = 0.9
    """Only for sgd and rmsprop."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.6, 0.85)
    """For "step": at these shares of the run the learning rate is multiplied by `decay`."""
    decay: float = 0.1
    warmup_share: float = 0.05
    """Share of the run in which the learning rate rises from 0."""
    clip_norm: float = 0.0
    """Gradients longer than this are shortened to it; 0: never."""
    precision: Literal["float32", "bfloat16"] = "float32"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    sync_batch_norm: bool = False
    """Several GPUs: BatchNorm measures the whole batch instead of each process's slice."""
    seed: int = 0
    evaluate_every: int = 2
    """Epochs between evaluations on the validation split. MAP@R there chooses the checkpoint."""
    patience: int = 0
    """Stop after this many evaluations without a better MAP@R; 0: never."""
    checkpoint_every: int = 1
    """Epochs between checkpoints to resume from."""

    def __post_init__(self) -> None:
        if self.classes_per_batch < 2 or self.images_per_class < 2:
            raise ValueError(
                f"a batch of {self.classes_per_batch} classes x {self.images_per_class} images has "
                f"no pairs to compare; both numbers must be at least 2"
            )
        at_least(self, 1, "epochs", "evaluate_every", "checkpoint_every")
        at_least(self, 0, "steps_per_epoch", "seed", "patience", "weight_decay", "clip_norm")
        at_least(self, 0, "loss_learning_rate")
        for name in ("momentum", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share must be at least 0 and below 1, got {self.warmup_share}")


@dataclass(frozen=True)
class Recipe:
    """Everything needed to repeat a run."""

    __pydantic_config__ = STRICT

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: Part = Part("multi_similarity")
    method: Part = Part("supervised")
    """The objective: what is minimised on a batch."""
    clean: Part | None = None
    """Stage that drops rows of a batch."""
    augment: Part | None = None
    """Stage that adds synthetic candidates (intra_class)."""
    memory: Part | None = None
    """Stage that adds remembered candidates (cross_batch)."""
    regularizers: dict[str, Term] = field(default_factory=dict)
    """Terms added to the loss, by name (channel_correlation)."""
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        if "channel_correlation" in self.regularizers and self.model.attention == "none":
            raise ValueError(
                "the regulariser channel_correlation compares channel attentions, and this model makes none; "
                'set model.attention to "branch" or "gate"'
            )


def load_recipe(source: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe, apply "train.epochs" -> "5" style overrides, and check every key.

    Args:
        source: a TOML file, or the name of a bundled recipe (`recipe_names()`).
        overrides: dotted key -> value as text, read as TOML (5, true, [1, 2]) and else as plain text.

    Raises:
        ConfigError: no such recipe, not TOML, an unknown key, or a value that does not fit; it names each.
    """
    path = recipe_path(source)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not overrides:
        return parse_recipe(tree, str(path))
    alone = problems_of(tree)
    for dotted, value in overrides.items():
        put(tree, dotted, toml_value(value))
    added = [problem for problem in problems_of(tree) if problem not in alone]
    if added:
        given = " ".join(f"--set {key}={value}" for key, value in overrides.items() if is_about(added, key))
        problems = "\n".join(f"  {text}" for _, text in added)
        raise ConfigError(f"{given or 'What --set says'} does not go with the recipe {source}:\n{problems}")
    return parse_recipe(tree, str(path))


def parse_recipe(tree: Mapping[str, Any], where: str) -> Recipe:
    """Check a tree of plain values and make the recipe of it."""
    try:
        return TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        problems = "\n".join(f"  {explain(problem)}" for problem in error.errors())
        raise ConfigError(f"{where} is not a valid recipe:\n{problems}") from None


Located = tuple[tuple[str, ...], str]
"""Where in a recipe something is wrong, and what."""


def problems_of(tree: Mapping[str, Any]) -> list[Located]:
    """What is wrong with a tree of plain values."""
    try:
        TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        return [(tuple(map(str, problem["loc"])), explain(problem)) for problem in error.errors()]
    return []


def is_about(problems: Sequence[Located], dotted: str) -> bool:
    """Whether one of these lies at "a.b.c", above or below it; what concerns the whole recipe does not."""
    key = tuple(dotted.split("."))
    return any(where and where[: len(key)] == key[: len(where)] for where, _ in problems)


def explain(problem: Mapping[str, Any]) -> str:
    """One line for one problem that pydantic found, with a hint where a key is misspelt."""
    location = problem["loc"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = known_keys(location[:-1])
        guess = get_close_matches(str(location[-1]), known, n=1)
        hint = f' Did you mean "{guess[0]}"?' if guess else ""
        message = f"unknown key.{hint} Known here: {', '.join(sorted(known))}"
    where = ".".join(map(str, location))
    given = problem.get("input")
    told = "unknown key" in message or "got" in message
    shown = f", got {given!r}" if isinstance(given, (str, int, float, bool)) and not told else ""
    return f"{where}: {message}{shown}" if where else f"{message}{shown}"


def known_keys(location: tuple[Any, ...]) -> list[str]:
    """The field names of the dataclass at a place in the recipe."""
    here: Any = Recipe
    for step in location:
        if not is_dataclass(here):
            break
        hint = get_type_hints(here).get(str(step))
        inner = [t for t in getattr(hint, "__args__", ()) if is_dataclass(t)]
        here = hint if is_dataclass(hint) else (inner[0] if inner else here)
    return [f.name for f in fields(here)] if is_dataclass(here) else []


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set "a.b.c" in nested dictionaries, making those that are missing."""
    *parents, leaf = dotted.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f'"{dotted}" cannot be set: "{parent}" is a value, not a group')
    node[leaf] = value


def toml_value(text: str) -> Any:
    """Read 5 as a number, true as a flag, [1, 2] as a list, and anything else as plain text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def recipe_names() -> list[str]:
    """The bundled recipes, by name."""
    folder = resources.files("dml") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def recipe_path(source: str | Path) -> Path:
    """The file of a recipe given as a path or as the name of a bundled one."""
    path = Path(source)
    names = recipe_names()
    if str(source) not in names and (path.suffix == ".toml" or path.is_file()):
        if not path.is_file():
            raise ConfigError(
                f"There is no recipe file {path}. Bundled recipes: {', '.join(recipe_names())}."
            )
        return path
    if str(source) not in names:
        guess = get_close_matches(str(source), names, n=1)
        hint = f' Did you mean "{guess[0]}"?' if guess else ""
        known = ", ".join(names)
        raise ConfigError(f'Unknown recipe "{source}".{hint} Bundled: {known}; or give a .toml file.')
    return Path(str(resources.files("dml") / "recipes" / f"{source}.toml"))


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain values, every default spelled out; None (an absent stage) is left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return plain(asdict(recipe))
