"""Scores: a metric of a network together with what it rests on, so that it says how sure it is.

A metric of samples that were drawn is an estimate. Its standard error is that of the jackknife with groups left out,
which takes any smooth function of the samples, and groups of different sizes; for a mean of single samples it is the
usual s / √n. The difference of two networks on the same samples is judged by the groups' own differences: most of what
makes one group harder than another is the same for both.

Source: Busing, Meijer & van der Leeden, Delete-m jackknife for unequal m, Statistics and Computing 9 (1999), eq. 4-6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

FEWEST_GROUPS = 8
"""Groups of samples below which a standard error is itself too uncertain to be given."""

NOISE = 2.0
"""Standard errors within which a difference is called noise: about the 95 % limit of a normal distribution."""

Groups = NDArray[np.float64]
Numbers = Sequence[float] | Groups


class Score(float):
    """A metric's value, and its pseudo-values for groups of samples where these are known.

    Args:
        value: The metric on all samples.
        groups: The pseudo-value of each group; their mean, weighted by sizes, is the metric but for a bias of 1 / n.
        sizes: Samples of each group.

    Example:
        >>> score = Score.of_samples([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
        >>> score, score.samples, round(score.stderr, 4)  # 0.4629 / √8
        (0.75, 8, 0.1637)
        >>> Score(0.5).stderr is None
        True
    """

    __slots__ = ("groups", "sizes")

    groups: Groups
    sizes: Groups

    def __new__(cls, value: float, groups: Numbers = (), sizes: Numbers = ()) -> Score:
        """A value, with its groups if they are known."""
        score = super().__new__(cls, value)
        score.groups, score.sizes = np.asarray(groups, np.float64), np.asarray(sizes, np.float64)
        return score

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is copied, and sent to other processes."""
        return Score, (float(self), self.groups, self.sizes)

    @classmethod
    def of_samples(cls, values: Iterable[SupportsFloat]) -> Score:
        """The mean of one value a sample."""
        groups = np.array([float(x) for x in values], np.float64)
        return cls(float(groups.mean()), groups, np.ones(len(groups)))

    @classmethod
    def of_means(cls, means: Numbers, sizes: Numbers) -> Score:
        """The mean over samples, from means of groups of them.

        Example:
            >>> Score.of_means([1.0, 4.0], [2, 1])
            2.0
        """
        return cls(float(np.average(means, weights=sizes)), means, sizes)

    @classmethod
    def of_parts(cls, value: float, without: Numbers, sizes: Numbers) -> Score:
        """Any metric, from its values with each group of samples left out.

        Example:
            >>> Score.of_parts(2.0, [2.5, 2.0, 1.5], [1, 1, 1]).groups.tolist()  # of the mean of 1, 2 and 3
            [1.0, 2.0, 3.0]
        """
        shares = np.sum(sizes) / np.asarray(sizes, np.float64)
        return cls(value, shares * value - (shares - 1) * np.asarray(without, np.float64), sizes)

    @property
    def samples(self) -> int | None:
        """Number of samples, or ``None`` if it is not known."""
        return round(float(self.sizes.sum())) if len(self.sizes) else None

    @property
    def stderr(self) -> float | None:
        """Standard error, or ``None`` if it is not known."""
        return jackknife_stderr(self.groups, self.sizes)

    def less(self, other: float) -> Difference:
        """This score less that of another network; paired where both are of the same groups of samples.

        Example:
            >>> a, b = Score.of_samples(range(1, 9)), Score.of_samples(range(8))
            >>> a.less(b), a.less(0.5).stderr is None
            (Difference(value=1.0, stderr=0.0), True)
        """
        stderr = None
        if isinstance(other, Score) and np.array_equal(self.sizes, other.sizes):
            stderr = jackknife_stderr(self.groups - other.groups, self.sizes)
        return Difference(float(self) - float(other), stderr)


@dataclass(frozen=True)
class Difference:
    """A difference of two networks in one metric.

    Attributes:
        value: The difference.
        stderr: Its standard error, paired by samples; ``None`` if it is not known.
    """

    value: float
    stderr: float | None

    @property
    def most(self) -> float:
        """The difference and two of its standard errors, as far as these are known.

        Example:
            >>> Difference(0.25, 0.125).most, Difference(0.25, None).most
            (0.5, 0.25)
        """
        return self.value + NOISE * (self.stderr or 0.0)

    @property
    def within_noise(self) -> bool:
        """Whether it is smaller than two of its standard errors; ``False`` where these are not known.

        Example:
            >>> Difference(0.01, 0.02).within_noise, Difference(0.05, 0.02).within_noise, Difference(0, 0).within_noise
            (True, False, True)
        """
        return self.stderr is not None and (abs(self.value) < NOISE * self.stderr or self.value == 0)


@dataclass(frozen=True)
class LogRatio:
    """By what factor the output errors of one network are those of another, sample by sample.

    Where accuracies of two networks agree but for noise, this still tells them apart: every sample counts, not only
    those whose class changes.

    Attributes:
        mean: Mean over samples of log(error of the one / error of the other).
        stderr: Its standard error; ``None`` where there are too few samples.
        samples: Number of samples.
    """

    mean: float
    stderr: float | None
    samples: int

    @property
    def factor(self) -> float:
        """The factor, a geometric mean over samples.

        Example:
            >>> LogRatio(0.0, 0.1, 64).factor
            1.0
        """
        return math.exp(self.mean)

    @property
    def within_noise(self) -> bool:
        """Whether the logarithm is smaller than two of its standard errors."""
        return Difference(self.mean, self.stderr).within_noise


def log_ratio(errors: Numbers, others: Numbers) -> LogRatio | None:
    """The paired log ratio of two networks' errors on the same samples.

    Args:
        errors: Error of each sample's output by the one network, shape (samples,).
        others: By the other. Samples at which either is zero, or not finite, are left out.

    Returns:
        The ratio; ``None`` where no sample is left.

    Example:
        >>> ratio = log_ratio([2.0, 4.0] * 4, [1.0, 2.0] * 4)
        >>> round(ratio.factor, 6), ratio.stderr, ratio.samples
        (2.0, 0.0, 8)
    """
    a, b = np.asarray(errors, np.float64), np.asarray(others, np.float64)
    if a.shape != b.shape:
        return None
    usable = (a > 0) & (b > 0) & np.isfinite(a) & np.isfinite(b)
    if not usable.any():
        return None
    logs = np.log(a[usable]) - np.log(b[usable])
    return LogRatio(float(logs.mean()), jackknife_stderr(logs, np.ones(len(logs))), len(logs))


def jackknife_stderr(groups: Groups, sizes: Groups) -> float | None:
    """Standard error by pseudo-values θ̃_j of groups of m_j of n samples: √(Σ (θ̃_j − θ̄)² / (n / m_j − 1) / g).

    Args:
        groups: The pseudo-values, shape (groups,).
        sizes: Samples of each group, shape (groups,).

    Returns:
        The standard error; ``None`` for fewer than 8 groups, or where a value is not finite.

    Example:
        >>> round(jackknife_stderr(np.arange(9.0), np.ones(9)), 4), round(float(np.arange(9.0).std(ddof=1)) / 3, 4)
        (0.9129, 0.9129)
    """
    if len(groups) < FEWEST_GROUPS or not np.isfinite(groups).all():
        return None
    others = sizes.sum() / sizes - 1
    return float(np.sqrt(((groups - np.average(groups, weights=sizes)) ** 2 / others).mean()))


def as_scores(metrics: Mapping[str, Any]) -> dict[str, Score]:
    """Metrics as scores: numbers as they are, arrays as one value a sample.

    Args:
        metrics: Name to a number, or to one number for each sample, whose mean is then the metric.

    Example:
        >>> as_scores({"acc": np.array([True, False]), "loss": 0.5})
        {'acc': 0.5, 'loss': 0.5}
    """
    return {name: _as_score(value) for name, value in metrics.items()}


def _as_score(value: Any) -> Score:
    if isinstance(value, Score):
        return value
    if getattr(value, "ndim", 0) or isinstance(value, (list, tuple)):
        values = value.detach().cpu() if hasattr(value, "detach") else np.asarray(value)
        return Score.of_samples(values.reshape(-1).tolist())
    return Score(float(value))
