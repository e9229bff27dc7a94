"""Several steps: how each number went, its trend, and where it changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradlab._common.streams import generator

Array = npt.NDArray[Any]

#: Error of the test for a change, orders in which the steps are put to make it, and steps on either side of one.
ERROR, ORDERS, APART = 0.01, 4000, 3


def changes(values: Array, seed: int = 0) -> list[tuple[int, float]]:
    """Where the mean of a series changes: the first number after each change, and its p-value, in order.

    The largest standardised difference of the means before and after a place is compared with those of the same numbers in other
    orders, for the whole series and then for each side of a change. Ranks take the place of numbers, so that one step that is far
    out is not two changes; where a change is, the numbers say, cut to Tukey's fences.
    Source: binary segmentation, Scott & Knott (1974); a permutation test of CUSUM, Antoch & Hušková (2001).
    """
    ranks = pd.Series(values).rank().to_numpy()
    found: list[tuple[int, float]] = []
    parts = [(0, len(ranks))]
    rng = generator(seed, "records.changes")
    while parts:
        start, end = parts.pop()
        part = ranks[start:end]
        if len(part) < 2 * APART or not np.ptp(part):
            continue
        score = _scores(part[None]).max()
        others = _scores(rng.permuted(np.tile(part, (ORDERS, 1)), axis=1)).max(1)
        p = (1 + np.sum(others >= score - 1e-12)) / (1 + ORDERS)
        if p <= ERROR:
            low, high = np.quantile(values[start:end], [0.25, 0.75])
            fenced = np.clip(values[start:end], low - 1.5 * (high - low), high + 1.5 * (high - low))
            at = start + APART + int(_scores(fenced[None])[0].argmax())
            found.append((at, float(p)))
            parts += [(start, at), (at, end)]
    return sorted(found)


def _scores(series: Array) -> Array:
    """Of each series `[m, n]` the standardised difference of means before and after every place from `APART` on."""
    n = series.shape[1]
    k = np.arange(APART, n - APART + 1)
    centred = series - series.mean(1, keepdims=True)
    return np.asarray(np.abs(np.cumsum(centred, 1)[:, k - 1]) / np.sqrt(k * (n - k) / n))


def trend(steps: Array, values: Array) -> tuple[float, float, float]:
    """Slope per step (the median of all pairs'), Kendall's τ and its p-value; NaN for fewer than four steps."""
    from scipy import stats

    if len(steps) < 4 or not np.ptp(values):
        return float("nan"), float("nan"), float("nan")
    result = stats.kendalltau(steps, values)
    return float(stats.theilslopes(values, steps)[0]), float(result.statistic), float(result.pvalue)
