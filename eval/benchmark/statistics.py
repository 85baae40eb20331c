"""Intervals and tests for a handful of runs.

Runs of two rows are paired by seed: equal seed, equal fold. Their training sets overlap, so the differences
are not independent and the ordinary paired t-test claims too much; the variance is corrected after Nadeau and
Bengio, "Inference for the Generalization Error", Machine Learning 52, 2003.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev, variance

from dml.errors import MissingExtra


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; None where one value gives none."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Comparison:
    """The mean difference of paired runs, its 95 % interval, and the two-sided p-value."""

    difference: float
    low: float | None
    high: float | None
    p: float | None
    count: int


def interval(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """mean ± t_{n-1} s / sqrt(n), Student's interval for independent values."""
    count, mean = len(values), fmean(values)
    if count < 2:
        return Estimate(mean, None, None, count)
    half = quantile(level, count - 1) * stdev(values) / sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def paired(differences: Sequence[float], *, share: float, level: float = 0.95) -> Comparison:
    """The corrected resampled t-test.

    t = d / sqrt(s² (1/n + share)) with n - 1 degrees of freedom, for n differences of mean d and variance
    s².

    Args:
        share: size of a run's validation part over that of its training part (folds: 1 / (folds - 1)).
    """
    count, mean = len(differences), fmean(differences)
    if count < 2:
        return Comparison(mean, None, None, None, count)
    error = sqrt(variance(differences) * (1 / count + share))
    if error == 0:
        return Comparison(mean, mean, mean, 1.0 if mean == 0 else 0.0, count)
    half = quantile(level, count - 1) * error
    return Comparison(mean, mean - half, mean + half, two_sided(mean / error, count - 1), count)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for so many comparisons: step-down after Holm (1979)."""
    adjusted: dict[str, float] = {}
    so_far = 0.0
    for place, name in enumerate(sorted(values, key=lambda name: values[name])):
        so_far = max(so_far, min(1.0, (len(values) - place) * values[name]))
        adjusted[name] = so_far
    return adjusted


def quantile(level: float, degrees: int) -> float:
    """t with P(|T| <= t) = level."""
    return float(student().ppf((1 + level) / 2, degrees))


def two_sided(t: float, degrees: int) -> float:
    """P(|T| >= |t|)."""
    return float(2 * student().sf(abs(t), degrees))


def student():
    """scipy's Student distribution."""
    try:
        from scipy.stats import t
    except ImportError:
        raise MissingExtra("scipy (it knows Student's distribution)", "bench") from None
    return t
