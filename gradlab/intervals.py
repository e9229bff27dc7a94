"""Error bars for sampled policy gradients: distance to a target, direction, noise, and the samples needed to see them.

A run of `N` iid per-sample gradients (mean `m`, covariance `Σ`) is kept as the means of `B` equal batches, `[B, p]`;
batch means are nearly Gaussian with covariance `S = ΣB/N`. Distances need only their `B × B` Gram matrix, never a
`p × p` one. A DCT over the batches turns them into one *signal* row `√B·mean` and `B − 1` *noise* rows, uncorrelated,
of mean zero and covariance `S`: products of different noise rows give `tr S²` and `tr S³` without plug-in bias.

Replicates go along leading axes, `[..., B, p]`; a single run gives numpy floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, special

Array = npt.NDArray[np.float64]

MINIMUM_BATCHES = 8


@dataclass(frozen=True)
class Interval:
    """A point estimate and the two ends of its confidence interval: numpy floats, or arrays of one shape."""

    estimate: Array
    low: Array
    high: Array


def squared_distance(means: npt.ArrayLike, target: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Squared distance `∥m − t∥²` of the mean gradient from a known target: right at zero, far from it and in between.

    Estimate: the U-statistic `Σ_{b≠c} ⟨m_b − t, m_c − t⟩ / B(B−1) = ∥mean − t∥² − tr Ŝ/B`; it may be negative.
    Interval: every `∥m − t∥²` at which neither tail of the statistic is too small (see `_probability_below`). `low > 0`
    is the test of `m ≠ t`, with error `1 − level`: near zero the lower end has the whole error to itself. The upper end
    is never below what an estimate of 0 would give, so it always states the resolution.

    means `[..., B, p]`, B ≥ 8, iid and close to Gaussian; target `[p]`.
    Raises ValueError on other shapes, on NaN or infinite values, and on a level outside (0, 1).
    Source: the U-statistic is that of Chen & Qin (Annals of Statistics 38, 2010); interval derived here.
    """
    means, target = _validated(means, target, level)
    return _squared_norm(means - target, level)


def bias(means: npt.ArrayLike, target: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Relative bias `∥m − t∥ / ∥t∥`: root of `squared_distance`, its estimate floored at 0; NaN for a zero target."""
    means, target = _validated(means, target, level)
    squared, size = _squared_norm(means - target, level), float(np.linalg.norm(target)) or np.nan
    return Interval(*(np.sqrt(np.maximum(end, 0)) / size for end in (squared.estimate, squared.low, squared.high)))


def cosine(means: npt.ArrayLike, target: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Cosine of the angle between the mean gradient and a known target.

    `cos = c / √(c² + ∥w∥²)` with `c = ⟨m, t⟩/∥t∥` and `w = m − c·t/∥t∥` is monotone in `c` and in `∥w∥²`: a Student
    interval for the one and a `squared_distance` interval for the other, each at half the error, bound it (Bonferroni;
    simulated coverage at 0.95 is 0.975 for cosines of 0 and ±1, and up to 0.998 between).
    The estimate is `c` over the root of the U-statistic of `∥m∥²`, which takes the noise out of the norm.

    NaN in [−1, 1] where `m` is not distinguishable from 0 at this level; all NaN for a zero target.
    Arguments and errors as in `squared_distance`. Source: derived here.
    """
    means, target = _validated(means, target, level)
    if not target.any():
        return Interval(*[np.full(means.shape[:-2], np.nan)[()]] * 3)
    norm, half, batches = _squared_norm(means, level), (1 + level) / 2, means.shape[-2]
    direction = target / np.linalg.norm(target)
    along = means @ direction
    across = _squared_norm(means - along[..., None] * direction, half)
    centre = along.mean(-1)
    reach = special.stdtrit(batches - 1, (1 + half) / 2) * along.std(-1, ddof=1) / np.sqrt(batches)
    low = _cosine_of(centre - reach, np.where(centre > reach, across.high, across.low))
    high = _cosine_of(centre + reach, np.where(centre > -reach, across.low, across.high))
    known = norm.low > 0
    estimate = np.clip(centre / np.sqrt(np.where(known, norm.estimate, np.nan)), -1, 1)
    return Interval(estimate, np.where(known, low, -1)[()], np.where(known, high, 1)[()])


def cosine_of_means(means: npt.ArrayLike, others: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Cosine of the angle between two mean gradients, both known from the same batches only: means and others `[B, p]`.

    `⟨m, t⟩ / √(∥m∥² ∥t∥²)` with every product an average over pairs of different batches, which takes the noise out of it;
    interval by the delete-one-batch jackknife with a Student quantile, cut at ±1. NaN in [−1, 1] where either squared norm is
    not told from zero. Raises ValueError as `squared_distance` does. Source: derived here.
    """
    _check_probability("level", level)
    x, y = _validated_means(means), _validated_means(others)
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"both runs need means [B, p] of one shape; got {x.shape} and {y.shape}")
    if min(_squared_norm(x, level).low, _squared_norm(y, level).low) <= 0:
        return Interval(np.float64(np.nan), np.float64(-1.0), np.float64(1.0))  # type: ignore[arg-type]
    batches = len(x)
    grams = [x @ y.T, x @ x.T, y @ y.T]

    def pairs(gram: Array, kept: slice | Array) -> float:
        part = gram[np.ix_(kept, kept)] if isinstance(kept, np.ndarray) else gram
        return float(part.sum() - np.trace(part)) / (len(part) * (len(part) - 1))

    def value(kept: slice | Array) -> float:
        cross, first, second = (pairs(gram, kept) for gram in grams)
        return float(cross / np.sqrt(max(first, 1e-300) * max(second, 1e-300)))

    whole = value(slice(None))
    left_out = np.array([value(np.delete(np.arange(batches), b)) for b in range(batches)])
    error = np.sqrt((batches - 1) * left_out.var())
    reach = special.stdtrit(batches - 1, (1 + level) / 2) * error
    return Interval(*(np.float64(np.clip(end, -1, 1)) for end in (whole, whole - reach, whole + reach)))  # type: ignore[arg-type]


def noise(means: npt.ArrayLike, traces: npt.ArrayLike | None, target: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Noise `tr Σ / ∥t∥²` of one sample: over N, the squared relative error of a mean of N. NaN for a zero target.

    Student interval for the mean of the batches' traces on the log scale (traces are positive and skewed to the right),
    with half of the `B − 1` degrees of freedom. Blind to rare huge gradients that no batch has met.

    traces `[..., B]`: per batch the unbiased estimate of `tr Σ`. None means batches of one sample, which have no trace;
    `∥m_b − mean∥² B/(B−1)` stands in. Errors as in `squared_distance`, and for negative traces.
    Source: the simple noise scale of McCandlish et al., arXiv 1812.06162, §2.2; interval derived here.
    """
    means, target = _validated(means, target, level)
    batches = means.shape[-2]
    if traces is None:
        traces = np.square(means - means.mean(-2, keepdims=True)).sum(-1) * (batches / (batches - 1))
    traces = _finite("traces", traces)
    if traces.shape != means.shape[:-1] or (traces < 0).any():
        raise ValueError(f"traces must be one number ≥ 0 per batch, shape {means.shape[:-1]}; got shape {traces.shape}")
    mean = traces.mean(-1)
    error = traces.std(-1, ddof=1) / np.sqrt(batches) / np.where(mean > 0, mean, 1)
    factor = np.exp(special.stdtrit((batches - 1) / 2, (1 + level) / 2) * error)
    estimate = mean / (float(target @ target) or np.nan)
    return Interval(estimate, estimate / factor, estimate * factor)


def anytime_mean(x: npt.ArrayLike, level: float = 0.95, start: int = 16) -> Interval:
    """Running mean of iid scalars with an interval to look at as often as wanted, from the `start`-th value on.

    `μ̂_k ± σ̂_k √( 2(kρ² + 1)/(k²ρ²) · log(√(kρ² + 1)/(1 − level)) )`, `ρ` minimising the width at `start`; studentised:
    the normal quantile in it is replaced by the Student quantile of the same tail. Before `start`: the whole line.
    P(the mean is ever outside) ≤ 1 − level, asymptotically in `start`: give very skewed values a later one.

    x `[..., n]` gives estimate, low and high `[..., n]`. ValueError on NaN, a bad level, or `start` < 2.
    Source: Waudby-Smith et al., arXiv 2103.06476, Theorem 2.2 (ρ: the exact minimiser, by Lambert's W).
    """
    _check_probability("level", level)
    x = _finite("x", x)
    if x.ndim == 0 or start < 2:
        raise ValueError(f"x must be [..., n] and start at least 2; got shape {x.shape} and start = {start}")
    alpha, k, origin = 1 - level, np.arange(1.0, x.shape[-1] + 1), x[..., :1]
    mean = np.cumsum(x, -1) / k
    squares = np.cumsum((x - origin) ** 2, -1) - k * (mean - origin) ** 2
    error = np.sqrt(np.maximum(squares, 0) / (np.maximum(k - 1, 1) * k))
    v = k / start * (-1 - special.lambertw(-(alpha**2) / np.e, -1).real)
    normal = np.sqrt(2 * (1 + 1 / v) * np.log(np.sqrt(v + 1) / alpha))
    student = -special.stdtrit(np.maximum(k - 1, 1), special.ndtr(-normal))
    reach = np.where(k < start, np.inf, error * student)
    return Interval(mean, mean - reach, mean + reach)


def anytime_squared_distance(means: npt.ArrayLike, target: npt.ArrayLike, level: float = 0.95, start: int = 16) -> Interval:
    """`∥m − t∥²` with an interval to look at after every pair of batches, from the `start`-th pair on.

    The cross products `⟨m_{2k−1} − t, m_{2k} − t⟩` are iid with mean `∥m − t∥²`; `anytime_mean` does the rest. Peeking
    costs most of the pairs and a wider boundary: for a number of samples fixed beforehand use `squared_distance`.

    `[..., B, p]` gives `[..., B // 2]`, ends floored at 0. Errors as in `squared_distance` and `anytime_mean`.
    """
    means, target = _validated(means, target, level)
    offset = means[..., : means.shape[-2] // 2 * 2, :] - target
    running = anytime_mean(np.sum(offset[..., ::2, :] * offset[..., 1::2, :], axis=-1), level, start)
    return Interval(running.estimate, np.maximum(running.low, 0), np.maximum(running.high, 0))


def effective_dimension(means: npt.ArrayLike) -> Array:
    """Effective number of noise directions, `(tr Σ)² / tr(Σ²)` in [1, p], from batch means `[..., B, p]`."""
    means = _validated_means(means)
    gram = _gram_statistics(means)
    return np.clip(gram.first**2 / gram.second, 1, means.shape[-1])


def detectable(samples: float, noise: float, dimension: float = 1.0, level: float = 0.95, power: float = 0.8) -> float:
    """Smallest relative bias `∥m − t∥/∥t∥` that a run of `samples` tells from zero (`bias(…).low > 0`) with this power.

    `√(λ·noise / (dimension·samples))`: a chi-square of `dimension` degrees of freedom and noncentrality `λ` exceeds the
    level-quantile of the central one with probability `power`. `noise` is `tr Σ/∥t∥²`, `dimension` is `(tr Σ)²/tr(Σ²)`,
    exact or from a run (1 is the hardest case). Exact for equal eigenvalues of Σ, else two moments matched.
    Raises ValueError unless samples, noise > 0, dimension ≥ 1 and level, power are in (0, 1) with power > 1 − level.
    """
    _check_probability("level", level)
    _check_probability("power", power)
    if not (0 < samples < np.inf and 0 < noise < np.inf and 1 <= dimension < np.inf and power > 1 - level):
        raise ValueError(
            "samples and noise must be positive, dimension at least 1 and power above 1 − level; "
            f"got {samples=}, {noise=}, {dimension=}, {power=}, {level=}"
        )
    noncentrality = special.chndtrinc(special.chdtri(dimension, 1 - level), dimension, 1 - power)
    return float(np.sqrt(noncentrality * noise / (dimension * samples)))


def samples_needed(effect: float, noise: float, dimension: float = 1.0, level: float = 0.95, power: float = 0.8) -> int:
    """Number of samples that tells a relative bias of `effect` from zero with this power: inverse of `detectable`."""
    if not 0 < effect < np.inf:
        raise ValueError(f"effect must be a positive relative bias; got {effect}")
    return int(np.ceil((detectable(1, noise, dimension, level, power) / effect) ** 2 * (1 - 1e-12)))


def _cosine_of(along: Array, across_squared: Array) -> Array:
    length = np.sqrt(along**2 + across_squared)
    return along / np.where(length > 0, length, 1)


@dataclass(frozen=True)
class _Gram:
    """What the Gram matrix says about the covariance `S` and the mean `d` of a batch; write `D = B∥d∥²`."""

    batches: int
    scale: Array  # mean squared norm of a batch, the unit of the others
    excess: Array  # D, unbiased
    first: Array  # tr S
    second: Array  # tr S²
    third: Array  # tr S³
    along: Array  # B dᵀSd
    slope: Array  # dᵀS²d / dᵀSd, or tr S³ / tr S² where d is lost in the noise


def _gram_statistics(points: Array) -> _Gram:
    """Rotate the batches into a signal row and B − 1 noise rows, and average products of different rows."""
    rows = fft.dct(points, axis=-2, norm="ortho")
    gram = rows @ np.swapaxes(rows, -1, -2)
    batches, free = gram.shape[-1], gram.shape[-1] - 1
    scale = np.trace(gram, axis1=-2, axis2=-1) / batches
    gram = gram / np.where(scale > 0, scale, 1)[..., None, None]
    signal, cross, pairs = gram[..., 0, 0], gram[..., 0, 1:], gram[..., 1:, 1:] * (1 - np.eye(free))
    first = (np.trace(gram, axis1=-2, axis2=-1) - signal) / free
    second = np.einsum("...ij,...ij", pairs, pairs) / (free * (free - 1))
    second = np.maximum(second, 1e-30)  # rounding, where a run has no noise
    third = np.einsum("...ij,...ij", pairs @ pairs, pairs) / (free * (free - 1) * (free - 2))
    third = np.clip(third, 1e-3 * second**1.5, second**1.5)
    once = np.square(cross).mean(-1)  # B dᵀSd + tr S²
    twice = np.einsum("...i,...ij,...j", cross, pairs, cross) / (free * (free - 1))  # B dᵀS²d + tr S³
    slope = np.clip((third + 2 * twice) / (second + 2 * once), 0, np.cbrt(third))
    return _Gram(batches, scale, signal - first, first, second, third, once - second, slope)


def _probability_below(gram: _Gram, excess: Array, distance: Array) -> Array:
    """P(`∥√B·mean∥² − tr Ŝ` ≤ excess) if `D` were `distance`: a studentised Pearson III law with three matched moments.

    Variance `2 tr S² B/(B−1) + 4B dᵀSd`, third cumulant `8 tr S³ + 24B dᵀS²d`. As in a score test, `dᵀSd` is estimated
    under the hypothesis: it shares its noise with the statistic and errs by `slope` times as much, and what the
    statistic lacks may hide in the noisiest direction, `tr S³/tr S²`. Else an interval that lands low is too short.
    The Student law has half of the `B − 1` degrees of freedom: at zero the variance is of fourth order in the data.
    """
    lack = distance - gram.excess
    slope = np.where(lack > 0, np.maximum(gram.slope, gram.third / gram.second), gram.slope)
    along = np.clip(gram.along + slope * lack, 0, np.cbrt(gram.third) * distance)
    variance = 2 * gram.second * gram.batches / (gram.batches - 1) + 4 * along
    shape = 4 * variance**3 / (8 * gram.third + 24 * slope * along) ** 2
    below = special.gammainc(shape, np.maximum(shape + (excess - distance) * np.sqrt(shape / variance), 0))
    return np.asarray(special.stdtr((gram.batches - 1) / 2, special.ndtri(below)))


def _largest_distance(gram: _Gram, excess: Array, probability: Array) -> Array:
    """Largest `D ≥ 0` with `_probability_below(D) > probability`, or 0, by bisection."""
    low, high = np.zeros_like(excess), np.maximum(excess, 0) + np.sqrt(gram.second)
    while (short := _probability_below(gram, excess, high) > probability).any():
        high = np.where(short, 2 * high, high)
    for _ in range(32):
        middle = (low + high) / 2
        below = _probability_below(gram, excess, middle) > probability
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def _squared_norm(points: Array, level: float) -> Interval:
    """`squared_distance` from the origin."""
    gram, alpha = _gram_statistics(points), 1 - level
    excess, floored, zero = gram.excess, np.maximum(gram.excess, 0), np.zeros_like(gram.excess)
    probability = np.reshape([alpha / 2, alpha, 1 - alpha, 1 - alpha / 2], (4, *[1] * excess.ndim))
    high, quiet, one, two = _largest_distance(gram, np.stack([floored, zero, excess, excess]), probability)
    # Up to `quiet` the upper end, never below that of an estimate of 0, cannot fail: a one-sided lower end is enough.
    low, unit = np.maximum(two, np.minimum(one, quiet)), gram.scale / gram.batches
    return Interval(unit * excess, unit * low, unit * high)


def _validated(means: npt.ArrayLike, target: npt.ArrayLike, level: float) -> tuple[Array, Array]:
    _check_probability("level", level)
    means, target = _validated_means(means), _finite("target", target)
    if target.shape != means.shape[-1:]:
        raise ValueError(f"target must match the parameters of means, shape {means.shape[-1:]}; got {target.shape}")
    return means, target


def _validated_means(means: npt.ArrayLike) -> Array:
    means = _finite("means", means)
    if means.ndim < 2 or means.shape[-2] < MINIMUM_BATCHES or means.shape[-1] == 0:
        raise ValueError(f"means must be [..., B, p] with at least {MINIMUM_BATCHES} batches; got shape {means.shape}")
    return means


def _finite(name: str, values: npt.ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite; got NaN or infinite values, usually an overflow in the loss")
    return array


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1; got {value}")
