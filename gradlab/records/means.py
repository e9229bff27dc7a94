"""Means over responses with intervals that hold for their tails, or say that they cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from gradlab._common.names import check_probability
from gradlab.questions.log_ratios import bounds
from gradlab.reliability import NEEDED, is_well_sampled

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Mean:
    """A mean, its interval, whether that holds, and how many clusters carry it: `1/s²` for a skewness `s` of the sum.

    Where it does not hold, the ends that cannot be known are open: the upper one always, and the lower one where values may be
    negative. The lower end of a mean of values that are not negative holds for any law, by betting (`log_ratios.bounds`).
    """

    value: float
    low: float
    high: float
    reliable: bool
    carriers: float


def mean(x: Array, lengths: Array, clusters: Array, level: float = 0.95, positive: bool = False) -> Mean:
    """`Σ x / Σ lengths` over responses, `[n]` each, whose clusters (groups of one prompt) are independent of each other.

    Where there is one cluster its responses are taken as independent. What no response shows, no interval knows.

    Student's interval of the ratio, from the clusters' residuals `Σ (x − m · length)`, where as many of them as the package asks for
    carry their sum (`gradlab.reliability`). Raises `ValueError` for a level outside (0, 1).
    """
    check_probability("level", level)
    names, index = np.unique(clusters, return_inverse=True)
    if len(names) == 1:  # of one prompt the mean is that prompt's, and its responses are independent
        index = np.arange(len(x))
    sums, weights = np.bincount(index, x), np.bincount(index, lengths)
    total, count = weights.sum(), len(sums)
    value = float(sums.sum() / total) if total else float("nan")
    if not np.isfinite(value) or count < 2:
        return Mean(value, 0.0 if positive else -np.inf, np.inf, False, 0.0)
    residuals = sums - value * weights
    sizes = np.sort(np.abs(residuals))[::-1]
    held = is_well_sampled(np.ones(count), sizes)
    half = special.stdtrit(count - 1, (1 + level) / 2) * np.sqrt(count / (count - 1) * np.sum(residuals**2)) / total
    low, high = value - half, value + half
    if not held:
        low, high = (_least(sums, weights, level) if positive else -np.inf), np.inf
    return Mean(value, float(low), float(high), held, carriers(sizes))


def _least(sums: Array, weights: Array, level: float) -> float:
    """The lower end of a mean of values that are not negative."""
    limit = float(np.max(sums / np.maximum(weights, 1)))
    if not limit > 0:
        return 0.0
    return float(bounds(sums[:, None], weights, int(weights.max()), np.array([limit]), level)[0][0])


def carriers(sizes: Array) -> float:
    """How many equal parts a sum of these sizes is as steady as: `(Σ x²)³ / (Σ x³)²`; 0 where there is nothing to carry."""
    scaled = sizes / (sizes.max(initial=0.0) or 1.0)
    third = float(np.sum(scaled**3))
    return float(np.sum(scaled**2)) ** 3 / third**2 if third > 0 else 0.0


__all__ = ["NEEDED", "Mean", "carriers", "mean"]
