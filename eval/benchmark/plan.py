"""Which runs come next, as a function of the result files alone.

A row is tuned first: `startup` trials (the stated values, then a Latin hypercube), then trials that Optuna's
tree of Parzen estimators proposes from all earlier ones. Each trial runs on one fold after the other; from
the end of the startup on it is pruned when its mean over the folds so far is below the median of the
finished trials' at the same fold. The best mean over all folds wins, and is trained in full with every seed.

No database: whoever has the files has the state, on any machine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from dml.errors import MissingExtra
from eval.benchmark.results import Item, RowResults
from eval.benchmark.suite import Dimension, Protocol, Suite


@dataclass(frozen=True)
class Trial:
    """One setting and the folds that it was measured on, in order."""

    number: int
    parameters: dict[str, Any]
    values: tuple[float, ...]  # best validation MAP@R of folds 0, 1, …
    pruned: bool
    failures: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        return fmean(self.values)


@dataclass(frozen=True)
class Standing:
    """How far a row is."""

    trials: tuple[Trial, ...]  # in order; those with at least one fold
    ready: tuple[Item, ...]  # runs that nothing has to wait for
    most_left: int  # runs to do at most (pruning may spare some)
    best: dict[str, Any] | None  # the parameters of the full runs, once tuning is over
    seeds: int  # full runs done


def standing(
    suite: Suite,
    row: str,
    results: RowResults,
    *,
    until: str = "seeds",
    inherited: Mapping[str, Any] | None = None,
) -> Standing:
    """What is done and what comes next in a row.

    Args:
        until: "trials" plans the tuning only.
        inherited: see `legacy`. A row that inherits has nothing ready before it is known, or before trial 0
            has been begun with it.
    """
    protocol = suite.protocol
    trials, ready, left = tuning_of(suite, row, results)
    best = best_parameters(trials, protocol) if not left else None
    if suite.rows[row].space == {}:
        best = {}
    if suite.rows[row].inherit and not any(number == 0 for number, _ in results.trials):
        # What is inherited is read from trial 0 from then on: nothing else may begin beside it.
        ready = [] if inherited is None else ready[:1]
    seeds = [s for s in range(protocol.seeds) if s not in results.seeds]
    if until == "seeds":
        left += len(seeds)
        if best is not None:
            ready += [Item(row, "seed", seed, seed % protocol.folds) for seed in seeds]
    return Standing(tuple(trials), tuple(ready), left, best, protocol.seeds - len(seeds))


def tuning_of(suite: Suite, row: str, results: RowResults) -> tuple[list[Trial], list[Item], int]:
    """The trials so far, the trial runs that can start now, and how many are left at most."""
    protocol = suite.protocol
    trials: list[Trial] = []
    ready: list[Item] = []
    left = 0
    if not suite.rows[row].space:
        return trials, ready, left
    finished: list[Trial] = []
    waiting = False
    for number in range(protocol.trials):
        trial = trial_of(number, results, finished, protocol)
        if trial is not None:
            trials.append(trial)
        startup = number < protocol.startup
        if trial is not None and (trial.pruned or len(trial.values) == protocol.folds):
            finished.append(trial)
            continue
        missing = [f for f in range(protocol.folds) if (number, f) not in results.trials]
        left += len(missing)
        if startup:
            ready += [Item(row, "trial", number, fold) for fold in missing]
        elif not waiting:
            ready.append(Item(row, "trial", number, missing[0]))
        waiting = True
    return trials, ready, left


def trial_of(number: int, results: RowResults, finished: Sequence[Trial], protocol: Protocol) -> Trial | None:
    """A trial from its result files; folds count in order, and none behind the fold where it was pruned."""
    values: list[float] = []
    failures: list[str] = []
    parameters: dict[str, Any] | None = None
    for fold in range(protocol.folds):
        result = results.trials.get((number, fold))
        if result is None:
            break
        parameters = result["parameters"]
        values.append(result["figures"]["map_at_r"])
        if result.get("failure"):
            failures.append(result["failure"])
        if number >= protocol.startup and is_pruned(values, finished, protocol):
            return Trial(number, parameters or {}, tuple(values), True, tuple(failures))
    if parameters is None:
        return None
    return Trial(number, parameters, tuple(values), False, tuple(failures))


def is_pruned(values: Sequence[float], finished: Sequence[Trial], protocol: Protocol) -> bool:
    """Whether the mean over the folds so far is below the median of the finished trials at the same fold."""
    count = len(values)
    whole = [t for t in finished if len(t.values) == protocol.folds]
    if count == protocol.folds or not whole:
        return False
    return fmean(values) < median(fmean(t.values[:count]) for t in whole)


def best_parameters(trials: Sequence[Trial], protocol: Protocol) -> dict[str, Any] | None:
    """The parameters with the best mean over all folds; the earliest of equals."""
    whole = [t for t in trials if len(t.values) == protocol.folds]
    return max(whole, key=lambda t: (t.mean, -t.number)).parameters if whole else None


def legacy(suite: Suite, row: str, read: Callable[[str], RowResults]) -> dict[str, Any] | None:
    """What a row inherits: the tuned values of the row it is compared with; None while those are not known.

    Args:
        read: gives the results of a row by its name.
    """
    if not suite.rows[row].inherit:
        return {}
    parent = suite.rows[row].against
    return standing(suite, parent, read(parent), until="trials").best


def first_trial(suite: Suite, row: str, inherited: Mapping[str, Any]) -> dict[str, Any]:
    """Trial 0: what the row states, with what it inherits where its space allows that."""
    space = suite.rows[row].space
    found = {**suite.stated(row), **inherited}
    for key, dimension in space.items():
        if dimension.holds(found[key]):
            continue
        value = suite.stated(row)[key]
        if not dimension.choices:
            low, high = dimension.range
            value = min(max(float(found[key]), low), high)
        found[key] = value
    return found


def parameters_of(
    suite: Suite, item: Item, results: RowResults, inherited: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values of a run that is ready: those tuned, and those inherited.

    Args:
        inherited: see `legacy`; a row that has begun keeps what it began with.
    """
    now = standing(suite, item.row, results)
    if item.phase == "seed":
        if now.best is None:
            raise ValueError(f"{item.row} is not tuned yet")
        return now.best
    for (number, _), result in results.trials.items():
        if number == item.number:
            return result["parameters"]
    space, protocol = suite.rows[item.row].space, suite.protocol
    begun = [result["parameters"] for (number, _), result in results.trials.items() if number == 0]
    first = begun[0] if begun else first_trial(suite, item.row, inherited or {})
    if item.number == 0:
        return first
    if item.number < protocol.startup:
        return {**first, **startup_draw(space, protocol, number=item.number)}
    earlier = [t for t in now.trials if t.number < item.number]
    return {**first, **propose(space, earlier, protocol, number=item.number)}


def startup_draw(space: Mapping[str, Dimension], protocol: Protocol, *, number: int) -> dict[str, Any]:
    """A random setting of the startup, from a Latin hypercube: each key's range is cut into as many parts as
    there are draws, and every part is drawn from once.

    Draws of a key depend on its name and the tuning seed only, so rows that tune the same key get the same.
    """
    draws = protocol.startup - 1
    parameters = {}
    for key, dimension in space.items():
        chance = np.random.default_rng([protocol.tuning_seed, *key.encode()])
        share = float((chance.permutation(draws)[number - 1] + chance.random(draws)[number - 1]) / draws)
        parameters[key] = rounded(value_in(dimension, share), dimension)
    return parameters


def value_in(dimension: Dimension, share: float) -> Any:
    """The value at a share in [0, 1) of a range (of its logarithm), or of the choices."""
    if dimension.choices:
        return dimension.choices[int(share * len(dimension.choices))]
    low, high = dimension.range
    return low * (high / low) ** share if dimension.log else low + share * (high - low)


def propose(
    space: Mapping[str, Dimension], trials: Sequence[Trial], protocol: Protocol, *, number: int
) -> dict[str, Any]:
    """The setting to try behind the startup, the same for the same earlier trials.

    Raises:
        MissingExtra: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtra("optuna (it proposes the settings to try)", "bench") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: distribution_of(dimension) for key, dimension in space.items()}
    seed = 1000 * protocol.tuning_seed + number
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=protocol.startup)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        state = optuna.trial.TrialState.PRUNED if trial.pruned else optuna.trial.TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=None if trial.pruned else trial.mean,
                params={key: trial.parameters[key] for key in space},
                distributions=distributions,
                intermediate_values={
                    fold: fmean(trial.values[: fold + 1]) for fold in range(len(trial.values))
                },
            )
        )
    asked = study.ask(distributions)
    return {key: rounded(asked.params[key], dimension) for key, dimension in space.items()}


def distribution_of(dimension: Dimension) -> Any:
    import optuna

    if dimension.choices:
        return optuna.distributions.CategoricalDistribution(dimension.choices)
    return optuna.distributions.FloatDistribution(*dimension.range, log=dimension.log)


def rounded(value: Any, dimension: Dimension) -> Any:
    """Four digits, so that a frozen recipe can be read; never outside of the range."""
    if dimension.choices or not isinstance(value, float) or not math.isfinite(value):
        return value
    low, high = dimension.range
    return min(max(float(f"{value:.4g}"), low), high)
