"""A suite: one recipe that all rows share, and rows that change nothing but the method.

A suite is a TOML file::

    title = "Omniglot, 32 px"
    status = "measured"                     # or "not yet run"

    [data]
    about = "where the pictures come from"
    digest = "…"                            # of the pictures; `dml bench run` names what it finds

    [protocol]                              # defaults: see `Protocol`
    folds = 3

    [base]                                  # a recipe, as for `dml train`; every row shares it
    train.epochs = 30

    [pretrain]                              # optional: all rows begin with a trunk that is trained first,
    classes = 40                            # on so many of the training classes, which no row sees then
    recipe.loss = { name = "cross_entropy" }

    [rows.triplet]
    title = "Triplet"
    recipe.loss = { name = "triplet", args = { margin = 0.1 } }
    space = { "loss.args.margin" = { low = 0.02, high = 0.4, log = true } }

    [rows.triplet_iaa]
    title = "Triplet + IAA"
    against = "triplet"                     # the row without the method
    …

`like = "omniglot"` takes base, protocol and rows of another suite (a bundled name, or a file beside this one)
and puts this file's over them.
"""

import copy
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dml.config import Recipe, at_least, parse_recipe, put, recipe_tree
from dml.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "suites"
"""Where the bundled suites lie."""

STRICT = ConfigDict(extra="forbid")

METHOD = (
    "loss",
    "method",
    "clean",
    "augment",
    "memory",
    "regularizers",
    "model.attention",
    "model.attention_reduction",
    "train.learning_rate",
    "train.loss_learning_rate",
)
"""What a row may set. Everything else is shared, so that a difference between rows belongs to the method."""

Kind = Literal["trained", "pixels", "untrained", "features", "whitened"]


@dataclass(frozen=True)
class Dimension:
    """The values that tuning may give to one key of the recipe: a range, or choices."""

    __pydantic_config__ = STRICT

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[str | bool | int | float, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.choices) == (self.low is not None and self.high is not None):
            raise ValueError("give either low and high, or choices")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low must be below high, got {self.low} and {self.high}")
            if self.log and self.low <= 0:
                raise ValueError(f"a logarithmic range must begin above 0, got {self.low}")

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value, where there are no choices."""
        if self.low is None or self.high is None:
            raise ValueError("choices have no range")
        return self.low, self.high

    def holds(self, value: Any) -> bool:
        """Whether tuning could give this value."""
        if self.choices:
            return value in self.choices
        low, high = self.range
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Row:
    """One method of a suite."""

    __pydantic_config__ = STRICT

    title: str
    group: str = ""
    """Rows of one group stand together in plots."""
    kind: Kind = "trained"
    """What is measured: a trained net; or without training: "pixels" (grey values), "untrained" (the net with
    random weights), "features" (a pretrained trunk without a head), "whitened" (those, whitened by PCA)."""
    against: str = ""
    """The row to be compared with: the same loss or head without the method."""
    inherit: bool = False
    """Begin where `against` ended: its tuned values replace what this row states for the same keys, and are
    kept for those that this row does not tune. What the row tunes is then the method alone."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """What the row changes in the base recipe: only keys of `METHOD`."""
    space: dict[str, Dimension] = field(default_factory=dict)
    """Dotted recipe keys that are tuned. Trial 0 is the stated values, so each must be stated."""


@dataclass(frozen=True)
class Protocol:
    """How much work a row is, the same for every row."""

    __pydantic_config__ = STRICT

    folds: int = 3
    """Class-disjoint parts of the training classes; each validates while the others train."""
    fold_seed: int = 0
    trials: int = 12
    """Settings tried per row; each on every fold, unless pruned."""
    trial_share: float = 1 / 3
    """Share of the schedule that a trial trains for."""
    startup: int = 4
    """So many trials, the stated values first, are drawn at random and never pruned."""
    tuning_seed: int = 0
    seeds: int = 5
    """Full runs with the best settings; seed s validates on fold s modulo the number of folds."""
    threads: int = 1
    """CPU threads of a run: part of the protocol, because figures depend on them in their last digits. One is
    the best use of a CPU when runs stand side by side."""

    def __post_init__(self) -> None:
        at_least(self, 2, "folds", "seeds")
        at_least(self, 1, "trials", "startup", "threads")
        if not 0 < self.trial_share <= 1:
            raise ValueError(f"trial_share must be above 0 and at most 1, got {self.trial_share}")

    @property
    def validation_share(self) -> float:
        """Validation classes per training class: what the corrected test needs to know."""
        return 1 / (self.folds - 1)


@dataclass(frozen=True)
class Pretraining:
    """A trunk that is trained once, before all rows, as a substitute for published weights."""

    __pydantic_config__ = STRICT

    classes: int
    """How many of the training classes it is trained on (a fifth of them chooses its weights); no row sees
    their pictures."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """What it changes in the base recipe; the trunk must stay the same."""

    def __post_init__(self) -> None:
        at_least(self, 4, "classes")


@dataclass(frozen=True)
class SuiteData:
    """Which pictures a suite is about."""

    __pydantic_config__ = STRICT

    about: str = ""
    digest: str = ""
    """Of class names, file names and file sizes; rows on other pictures are refused. Empty: any pictures."""


@dataclass(frozen=True)
class Suite:
    """A suite as its file states it, checked."""

    __pydantic_config__ = STRICT

    title: str
    rows: dict[str, Row]
    base: dict[str, Any]
    status: Literal["measured", "not yet run"] = "not yet run"
    about: str = ""
    data: SuiteData = SuiteData()
    protocol: Protocol = Protocol()
    pretrain: Pretraining | None = None
    name: str = ""
    path: Path = Path()

    def row(self, name: str) -> Row:
        """A row by its name.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self.rows:
            guess = get_close_matches(name, self.rows, n=1)
            hint = f' Did you mean "{guess[0]}"?' if guess else ""
            raise ConfigError(
                f'The suite {self.name} has no row "{name}".{hint} Rows: {", ".join(self.rows)}.'
            )
        return self.rows[name]

    def stated(self, name: str) -> dict[str, Any]:
        """The values that a row states for the keys that are tuned: its trial 0."""
        tree = recipe_tree(self.recipe(name))
        return {key: value_at(tree, key) for key in self.rows[name].space}

    def recipe(
        self,
        name: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        share: float = 1.0,
        source: str = "",
        weights: str = "",
    ) -> Recipe:
        """The recipe of one run.

        Args:
            parameters: tuned keys and their values; None: as stated.
            share: of the epochs.
            source: the manifest of the run's fold.
            weights: file of the pretrained trunk, where the suite has one.

        Raises:
            ConfigError: the parts do not make a valid recipe.
        """
        tree = merged(self.base, self.row(name).recipe)
        if weights:
            put(tree, "model.weights", weights)
        for key, value in (parameters or {}).items():
            put(tree, key, value)
        # The manifest lists no test pictures, and none of its own are to be held out for testing.
        fixed = {"data.source": source, "data.protocol": "open-set", "data.test_share": 0.0}
        for key, value in {**fixed, "train.seed": seed}.items():
            put(tree, key, value)
        recipe = parse_recipe(tree, f"{self.path}, row {name}")
        if share < 1:
            put(tree, "train.epochs", max(1, round(share * recipe.train.epochs)))
            recipe = parse_recipe(tree, f"{self.path}, row {name}")
        return recipe

    def pretraining_recipe(self, source: str) -> Recipe:
        """The recipe of the trunk that all rows begin with.

        Args:
            source: the manifest of its classes.

        Raises:
            ConfigError: there is no such trunk, it is another one than that of the rows, or the parts do
                not make a valid recipe.
        """
        if self.pretrain is None:
            raise ConfigError(f"The suite {self.name} has no [pretrain].")
        tree = merged(self.base, self.pretrain.recipe)
        fixed = {"data.source": source, "data.protocol": "open-set", "data.test_share": 0.0}
        for key, value in {**fixed, "train.seed": self.protocol.fold_seed}.items():
            put(tree, key, value)
        recipe, base = parse_recipe(tree, f"{self.path}, pretrain"), parse_recipe(self.base, str(self.path))
        for key in ("trunk", "trunk_args"):
            ours, theirs = getattr(recipe.model, key), getattr(base.model, key)
            if ours != theirs:
                raise ConfigError(
                    f"{self.path}, pretrain: model.{key} is {ours!r}, and that of the rows {theirs!r}"
                )
        return recipe

    def row_digest(self, name: str) -> str:
        """A hash of what defines a row's runs besides what all rows share."""
        row = self.rows[name]
        space = {key: [d.low, d.high, d.log, list(d.choices)] for key, d in row.space.items()}
        tree = {"kind": row.kind, "recipe": row.recipe, "space": space}
        return digest_of({**tree, "inherit": row.against} if row.inherit else tree)

    def beginnings(self, names: Sequence[str]) -> tuple[str, ...]:
        """These rows and those that they inherit from, each behind the row that it inherits from."""
        found: dict[str, None] = {}
        for name in names:
            chain = [name]
            while self.row(chain[-1]).inherit:
                chain.append(self.rows[chain[-1]].against)
            found.update(dict.fromkeys(reversed(chain)))
        return tuple(found)

    def settings(self, data: str, folds: str) -> dict[str, Any]:
        """What must be equal for results to stand in one table: base recipe, protocol, pictures and folds."""
        shared = {"base": self.base, "protocol": vars(self.protocol), "data": data, "folds": folds}
        return shared if self.pretrain is None else {**shared, "pretrain": vars(self.pretrain)}


def load_suite(source: str | Path) -> Suite:
    """Read a bundled suite by its name, or a file of your own.

    Raises:
        ConfigError: no such suite, not TOML, an unknown key, a row that changes more than the method, or a
            tuned key without a stated value inside its range.
    """
    path = suite_path(source)
    tree = suite_tree(path)
    try:
        suite = TypeAdapter(Suite).validate_python({**tree, "name": path.stem, "path": path})
    except ValidationError as error:
        problems = "\n".join(f"  {explained(problem)}" for problem in error.errors())
        raise ConfigError(f"{path} is not a valid suite:\n{problems}") from None
    for name in suite.rows:
        check_row(suite, name)
    if suite.pretrain is not None:
        suite.pretraining_recipe("")
    return suite


def suite_tree(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a suite's file states, put over what it is like."""
    if path in above:
        raise ConfigError(f"{path} is like itself: {' → '.join(p.name for p in (*above, path))}")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    like = tree.pop("like", None)
    if like is None:
        return tree
    beside = path.parent / str(like)
    other = suite_tree(beside if beside.is_file() else suite_path(str(like)), (*above, path))
    shared = {key: merged(other.get(key, {}), tree.get(key, {})) for key in ("base", "protocol", "rows")}
    return {**tree, **shared}


def suite_names() -> list[str]:
    """The bundled suites, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def suite_path(source: str | Path) -> Path:
    """The file of a suite given by name or path."""
    if str(source) in suite_names():
        return FOLDER / f"{source}.toml"
    path = Path(source)
    if path.is_file():
        return path
    guess = get_close_matches(str(source), suite_names(), n=1)
    hint = f' Did you mean "{guess[0]}"?' if guess else ""
    raise ConfigError(
        f'There is no suite "{source}".{hint} Bundled: {", ".join(suite_names())}; or give a .toml file.'
    )


def explained(problem: Any) -> str:
    """One line for one problem that pydantic found, with a hint where a key is misspelt."""
    location = problem["loc"]
    if problem["type"] not in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{'.'.join(map(str, location))}: {problem['msg'].removeprefix('Value error, ')}"
    match location[:-1]:
        case ("data",):
            here: type = SuiteData
        case ("protocol",):
            here = Protocol
        case ("pretrain",):
            here = Pretraining
        case ("rows", _):
            here = Row
        case ("rows", _, "space", _):
            here = Dimension
        case _:
            here = Suite
    known = [f.name for f in fields(here) if f.name not in ("name", "path")] + ["like"] * (here is Suite)
    guess = get_close_matches(str(location[-1]), known, n=1)
    hint = f' Did you mean "{guess[0]}"?' if guess else ""
    return f"{'.'.join(map(str, location))}: unknown key.{hint} Known here: {', '.join(known)}"


def check_row(suite: Suite, name: str) -> None:
    """Raise ConfigError for a row that is not a fair one, and say why."""
    row, where = suite.rows[name], f"{suite.path}, row {name}"
    strange = [key for key in dotted_keys(row.recipe) if not is_method(key)]
    strange += [key for key in row.space if not is_method(key)]
    if strange:
        raise ConfigError(
            f"{where}: {strange[0]} is not part of the method, and all rows must share it: put it in [base]. "
            f"A row may set {', '.join(METHOD)}."
        )
    if row.against and row.against not in suite.rows:
        raise ConfigError(f'{where}: it is compared with "{row.against}", which is no row of the suite')
    above = [name]
    while suite.rows[above[-1]].inherit:
        parent = suite.rows[above[-1]].against
        if not parent or not suite.rows[parent].space:
            raise ConfigError(f"{where}: it inherits, and its `against` names no row that is tuned")
        if parent in above:
            raise ConfigError(f"{where}: it inherits from itself: {' → '.join([*above, parent])}")
        above.append(parent)
    if row.kind != "trained":
        if row.recipe or row.space:
            raise ConfigError(f"{where}: nothing is trained ({row.kind}), so it has no recipe and no space")
        return
    tree = recipe_tree(suite.recipe(name))
    for key, dimension in row.space.items():
        try:
            value = value_at(tree, key)
        except KeyError:
            raise ConfigError(
                f"{where}: {key} is tuned, and its stated value is missing. Trial 0 is the stated values: "
                f"write it into the row's recipe."
            ) from None
        if not dimension.holds(value):
            raise ConfigError(f"{where}: the stated {key} = {value!r} lies outside of its space")


def is_method(key: str) -> bool:
    return any(key == own or key.startswith(f"{own}.") for own in METHOD)


def dotted_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """ "a.b.c" for every value in nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def value_at(tree: Mapping[str, Any], dotted: str) -> Any:
    """The value at "a.b.c". Raises KeyError."""
    node: Any = tree
    for step in dotted.split("."):
        node = node[step]
    return node


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with the changes put over the base; a part that is named anew loses its arguments."""
    out = copy.deepcopy(dict(base))
    for key, value in change.items():
        there = out.get(key)
        if isinstance(value, Mapping) and isinstance(there, Mapping) and "name" not in value:
            out[key] = merged(there, value)
        else:
            out[key] = copy.deepcopy(value)
    return out


def digest_of(tree: Any) -> str:
    """16 hexadecimal digits for a tree of plain values."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=list).encode()).hexdigest()[:16]
