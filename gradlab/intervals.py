"""Error bars for sampled policy gradients: distance to a target, direction, noise, and the samples needed to see them.

A run of `N` iid per-sample gradients (mean `m`, covariance `Σ`) is kept as the means of `B` equal batches, `[B, p]`;
batch means are nearly Gaussian with covariance `S = ΣB/N`. Distances need only their `B × B` Gram matrix, never a
`p × p` one. A DCT over the batches turns them into one *signal* row `√B·mean` and `B − 1` *noise* rows, uncorrelated,
of mean zero and covariance `S`: products of different noise rows give `tr S²` and `tr S³` without plug-in bias.

Leading axes of means `[..., B, p]` and target `[..., p]` broadcast: `[e, 1, B, p]` and `[g, p]` compare every run with every
target, `[..., B, p]` and `[p]` are replicates of one run. A single run gives numpy floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from scipy import fft, special

from gradlab._common.arguments import checked
from gradlab._common.names import check_probability
from gradlab._common.statistics import jackknife
from gradlab.sums import Deviations, Layout, Sums

Array = npt.NDArray[np.float64]

MINIMUM_BATCHES = 8
#: Halvings of a bracket: an end of an interval is found to 2⁻³² of the width searched.
HALVINGS = 32


@dataclass(frozen=True)
class Interval:
    """A point estimate and the two ends of its confidence interval: numpy floats, or arrays of one shape.

    >>> found = gl.intervals.anytime_mean([1.0, 2.0, 3.0], start=2)
    >>> found.estimate.tolist(), found.low.shape
    ([1.0, 1.5, 2.0], (3,))
    """

    estimate: Array
    low: Array
    high: Array


@dataclass(frozen=True, eq=False)
class Batches:
    """Batch means `[..., B, p]`, split into mean and deviations: what all intervals of a run share is computed once.

    Every function here takes means or these. Raises ValueError as `squared_distance` does.

    >>> import numpy as np
    >>> means = np.random.default_rng(0).normal([1.0, 0.0], 0.1, size=(32, 2))
    >>> batches = gl.intervals.Batches.of(means)
    >>> batches.mean.shape, batches.deviations.shape
    ((2,), (32, 2))
    """

    mean: Array  # [..., p]
    deviations: Array  # [..., B, p], from the mean

    @classmethod
    def of(cls, means: npt.ArrayLike | Batches) -> Batches:
        """Batches of means; what is split already stays as it is."""
        if isinstance(means, Batches):
            return means
        means = _finite("means", means)
        if means.ndim < 2 or means.shape[-2] < MINIMUM_BATCHES or means.shape[-1] == 0:
            raise ValueError(f"means must be [..., B, p] with at least {MINIMUM_BATCHES} batches; got shape {means.shape}")
        mean = means.mean(-2)
        return cls(mean, means - mean[..., None, :])

    @property
    def count(self) -> int:
        """Number of batches `B`."""
        return int(self.deviations.shape[-2])

    @cached_property
    def gram(self) -> Array:
        """Inner products of the deviations, `[..., B, B]`."""
        return np.asarray(self.deviations @ np.swapaxes(self.deviations, -1, -2))

    @cached_property
    def noise(self) -> Array:
        """Gram matrix of the noise rows, `[..., B − 1, B − 1]`; they are those of the deviations."""
        return _noise_rows(np.swapaxes(_noise_rows(self.gram), -1, -2))

    def along(self, direction: Array) -> Array:
        """Inner products of the deviations with a vector `[..., p]`, `[..., B]`."""
        return np.asarray((self.deviations @ direction[..., None])[..., 0])


@dataclass(frozen=True, eq=False)
class Scattered(Batches):
    """Batches of several runs on a wide table, `mean` `[e, 1, p]`: their deviations are known by inner products, never in full.

    >>> policy = gl.Bandit.random(vocab=40_000, seed=0)
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1))
    >>> run = gl.montecarlo.moments(gl.ESTIMATORS["k2-loss"], scenario, samples=1_000)
    >>> batches = gl.intervals.Scattered.sums([run.batches])
    >>> found = gl.intervals.bias(batches, gl.exact.gradient("reverse_kl", scenario).numpy()[None])
    >>> batches.count, found.low.shape
    (62, (1, 1))
    """

    runs: Sequence[Deviations] = ()

    @classmethod
    def sums(cls, means: Sequence[Sums]) -> Scattered:
        """Batches of the means of several losses over the same responses."""
        layout, batches = Layout(means[0]), means[0].shape[0]
        even = torch.full((batches,), 1 / batches, dtype=torch.float64)
        mean = np.stack([each.weighted(even)[0].numpy() for each in means])[:, None]
        return cls(mean, np.empty(0), [layout.deviations(each) for each in means])

    @property
    def count(self) -> int:
        return len(self.runs[0].gram)

    @cached_property
    def gram(self) -> Array:
        return np.stack([run.gram for run in self.runs])[:, None]

    def along(self, direction: Array) -> Array:
        each = np.broadcast_to(direction, (len(self.runs), *direction.shape[-2:]) if direction.ndim > 1 else self.mean.shape)
        return np.stack([[run.along(vector) for vector in row] for run, row in zip(self.runs, each, strict=True)])


@checked
def squared_distance(means: npt.ArrayLike | Batches, target: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Squared distance `∥m − t∥²` of the mean gradient from a known target: right at zero, far from it and in between.

    Estimate: the U-statistic `Σ_{b≠c} ⟨m_b − t, m_c − t⟩ / B(B−1) = ∥mean − t∥² − tr Ŝ/B`; it may be negative. It is unbiased, as
    two batches are independent: `E⟨m_b − t, m_c − t⟩ = ∥m − t∥²`. The forms agree by `Σ_{b≠c} ⟨x_b, x_c⟩ = ∥Σ x_b∥² − Σ ∥x_b∥²`.
    Interval: every `∥m − t∥²` at which neither tail of the statistic is too small (see `_probability_below`). `low > 0`
    is the test of `m ≠ t`, with error `1 − level`: near zero the lower end has the whole error to itself. The upper end
    is never below what an estimate of 0 would give, so it always states the resolution.

    means `[..., B, p]`, B ≥ 8, iid and close to Gaussian; target `[..., p]`.
    Raises ValueError on other shapes, on NaN or infinite values, and on a level outside (0, 1).
    Source: the U-statistic is that of Chen & Qin (Annals of Statistics 38, 2010); interval derived here.

    >>> import numpy as np
    >>> means = np.random.default_rng(0).normal([1.0, 0.0], 0.1, size=(32, 2))  # 32 batch means of a gradient [1, 0]
    >>> found = gl.intervals.squared_distance(means, [0.0, 0.0])
    >>> bool(found.low < 1 < found.high)
    True
    """
    run, target = _validated(means, target, level)
    return _squared_norm(_statistics(run, run.mean - target), level)


@checked
def bias(means: npt.ArrayLike | Batches, target: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Relative bias `∥m − t∥ / ∥t∥`: root of `squared_distance`, its estimate floored at 0; NaN for a zero target.

    >>> import numpy as np
    >>> means = np.random.default_rng(0).normal([1.2, 0.0], 0.1, size=(32, 2))
    >>> found = gl.intervals.bias(means, [1.0, 0.0])
    >>> bool(0 < found.low < 0.2 < found.high)
    True
    """
    run, target = _validated(means, target, level)
    squared, size = squared_distance(run, target, level), _length(target)
    return Interval(*(np.sqrt(np.maximum(end, 0)) / size for end in (squared.estimate, squared.low, squared.high)))


@checked
def cosine(means: npt.ArrayLike | Batches, target: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Cosine of the angle between the mean gradient and a known target.

    `cos = c / √(c² + ∥w∥²)` with `c = ⟨m, t⟩/∥t∥` and `w = m − c·t/∥t∥` is monotone in `c` and in `∥w∥²`: a Student
    interval for the one and a `squared_distance` interval for the other, each at half the error, bound it (Bonferroni;
    simulated coverage at 0.95 is 0.975 for cosines of 0 and ±1, and up to 0.998 between).
    The estimate is `c` over the root of the U-statistic of `∥m∥²`, which takes the noise out of the norm.

    NaN in [−1, 1] where `m` is not distinguishable from 0 at this level; all NaN for a zero target.
    Arguments and errors as in `squared_distance`. Source: derived here.

    >>> import numpy as np
    >>> means = np.random.default_rng(0).normal([1.0, 1.0], 0.1, size=(32, 2))
    >>> found = gl.intervals.cosine(means, [1.0, 0.0])
    >>> bool(found.low < 0.5**0.5 < found.high)
    True
    """
    run, target = _validated(means, target, level)
    half, batches, size = (1 + level) / 2, run.count, _length(target)
    direction = target / np.nan_to_num(size, nan=1.0)[..., None]
    norm = _statistics(run, run.mean)
    along, centre = run.along(direction), (run.mean * direction).sum(-1)
    across = _squared_norm(_statistics(run, run.mean - centre[..., None] * direction, along), half)
    half_width = special.stdtrit(batches - 1, (1 + half) / 2) * along.std(-1, ddof=1) / np.sqrt(batches)
    low = _cosine_of(centre - half_width, np.where(centre > half_width, across.high, across.low))
    high = _cosine_of(centre + half_width, np.where(centre > -half_width, across.low, across.high))
    significant, squared = _significantly_nonzero(norm, level), norm.unit * norm.excess
    estimate = np.clip(centre / np.sqrt(np.where(significant, squared, np.nan)), -1, 1)
    ends = estimate, np.where(significant, low, -1.0), np.where(significant, high, 1.0)
    return Interval(*(np.where(np.isnan(size), np.nan, end)[()] for end in ends))


@checked
def cosine_of_means(means: npt.ArrayLike | Batches, others: npt.ArrayLike | Batches, level: float = 0.95) -> Interval:
    """Cosine of the angle between two mean gradients, both known from the same batches only: means and others `[..., B, p]`.

    `⟨m, t⟩ / √(∥m∥² ∥t∥²)` with every product an average over pairs of different batches, which takes the noise out of it;
    interval by the delete-one-batch jackknife with a Student quantile, cut at ±1. NaN in [−1, 1] where either squared norm is
    not significantly different from zero. Raises ValueError as `squared_distance` does. Source: derived here.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> one, two = (rng.normal(mean, 0.1, size=(32, 2)) for mean in ([1.0, 0.0], [1.0, 1.0]))
    >>> found = gl.intervals.cosine_of_means(one, two)
    >>> bool(found.low < 0.5**0.5 < found.high)
    True
    """
    check_probability("level", level)
    x, y = Batches.of(means), Batches.of(others)
    if x.deviations.shape != y.deviations.shape:
        raise ValueError(f"both runs need means of one shape; got {x.deviations.shape} and {y.deviations.shape}")
    B = x.count

    def pairs(a: Batches, b: Batches) -> Array:
        """Mean of `⟨a_b, b_c⟩` over `b ≠ c`, of all batches and with each left out, `[..., 1 + B]`."""
        middle, once = (a.mean * b.mean).sum(-1)[..., None], a.along(b.mean) + b.along(a.mean)
        own = (a.deviations * b.deviations).sum(-1)
        total = own.sum(-1, keepdims=True)
        left_out = middle - once / (B - 1) - (total - 2 * own) / ((B - 1) * (B - 2))
        return np.concatenate([middle - total / (B * (B - 1)), left_out], -1)

    value = pairs(x, y) / np.sqrt(np.maximum(pairs(x, x), 1e-300) * np.maximum(pairs(y, y), 1e-300))
    estimate, half_width = value[..., 0], jackknife(value[..., 1:], level)
    significant = _significantly_nonzero(_statistics(x, x.mean), level) & _significantly_nonzero(_statistics(y, y.mean), level)
    ends = ((estimate, np.nan), (estimate - half_width, -1.0), (estimate + half_width, 1.0))
    return Interval(*(np.where(significant, np.clip(end, -1, 1), default)[()] for end, default in ends))


@checked
def noise(means: npt.ArrayLike | Batches, traces: npt.ArrayLike | None, target: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Noise `tr Σ / ∥t∥²` of one sample: over N, the squared relative error of a mean of N. NaN for a zero target.

    Student interval for the mean of the batches' traces on the log scale (traces are positive and skewed to the right),
    with half of the `B − 1` degrees of freedom. Blind to rare huge gradients that no batch has met.

    traces `[..., B]`: per batch the unbiased estimate of `tr Σ`. None means batches of one sample, which have no trace;
    `∥m_b − mean∥² B/(B−1)` stands in. Errors as in `squared_distance`, and for negative traces.
    Source: the simple noise scale of McCandlish et al., arXiv 1812.06162, §2.2; interval derived here.

    >>> import numpy as np
    >>> samples = np.random.default_rng(0).normal([2.0, 0.0], 1.0, size=(200, 2))  # trace 2, squared norm 4
    >>> found = gl.intervals.noise(samples, None, [2.0, 0.0])
    >>> bool(found.low < 0.5 < found.high)
    True
    """
    run, target = _validated(means, target, level)
    batches, shape = run.count, run.gram.shape[:-1]
    if traces is None:
        traces = np.diagonal(run.gram, axis1=-2, axis2=-1) * (batches / (batches - 1))
    traces = _finite("traces", traces)
    if traces.shape != shape or (traces < 0).any():
        raise ValueError(f"traces must be one number ≥ 0 per batch, shape {shape}; got shape {traces.shape}")
    mean = traces.mean(-1)
    error = traces.std(-1, ddof=1) / np.sqrt(batches) / np.where(mean > 0, mean, 1)
    factor = np.exp(special.stdtrit((batches - 1) / 2, (1 + level) / 2) * error)
    estimate = mean / _length(target) ** 2
    return Interval(estimate, estimate / factor, estimate * factor)


@checked
def anytime_mean(x: npt.ArrayLike, level: float = 0.95, start: int = 16) -> Interval:
    """Running mean of iid scalars with an interval to look at as often as wanted, from the `start`-th value on.

    `μ̂_k ± σ̂_k √( 2(kρ² + 1)/(k²ρ²) · log(√(kρ² + 1)/(1 − level)) )`, `ρ` minimising the width at `start`; studentised:
    the normal quantile in it is replaced by the Student quantile of the same tail. Before `start`: the whole line.
    P(the mean is ever outside) ≤ 1 − level, asymptotically in `start`: give very skewed values a later one.

    x `[..., n]` gives estimate, low and high `[..., n]`. ValueError on NaN, a bad level, or `start` < 2.
    Source: Waudby-Smith et al., arXiv 2103.06476, Theorem 2.2 (ρ: the exact minimiser, by Lambert's W).

    >>> import numpy as np
    >>> found = gl.intervals.anytime_mean(np.random.default_rng(0).normal(size=1000))
    >>> bool((found.low <= 0).all() and (found.high >= 0).all())
    True
    """
    check_probability("level", level)
    x = _finite("x", x)
    if x.ndim == 0 or not x.size or start < 2:
        raise ValueError(f"x must be [..., n] and start at least 2; got shape {x.shape} and start = {start}")
    alpha, k, origin = 1 - level, np.arange(1.0, x.shape[-1] + 1), x[..., :1]
    mean = np.cumsum(x, -1) / k
    squares = np.cumsum((x - origin) ** 2, -1) - k * (mean - origin) ** 2
    error = np.sqrt(np.maximum(squares, 0) / (np.maximum(k - 1, 1) * k))
    v = k / start * (-1 - special.lambertw(-(alpha**2) / np.e, -1).real)
    normal = np.sqrt(2 * (1 + 1 / v) * np.log(np.sqrt(v + 1) / alpha))
    student = -special.stdtrit(np.maximum(k - 1, 1), special.ndtr(-normal))
    half_width = np.where(k < start, np.inf, error * student)
    return Interval(mean, mean - half_width, mean + half_width)


@checked
def anytime_squared_distance(means: npt.ArrayLike, target: npt.ArrayLike, level: float = 0.95, start: int = 16) -> Interval:
    """`∥m − t∥²` with an interval to look at after every pair of batches, from the `start`-th pair on.

    The cross products `⟨m_{2k−1} − t, m_{2k} − t⟩` are iid with mean `∥m − t∥²`; `anytime_mean` does the rest. Peeking
    costs most of the pairs and a wider boundary: for a number of samples fixed beforehand use `squared_distance`.

    `[..., B, p]` gives `[..., B // 2]`, ends floored at 0. Errors as in `squared_distance` and `anytime_mean`.

    >>> import numpy as np
    >>> means = np.random.default_rng(0).normal([1.0, 0.0], 0.1, size=(64, 2))
    >>> found = gl.intervals.anytime_squared_distance(means, [0.0, 0.0])
    >>> found.estimate.shape, bool(found.low[-1] < 1 < found.high[-1])
    ((32,), True)
    """
    run, target = _validated(means, target, level)
    offset = (run.mean - target)[..., None, :] + run.deviations[..., : run.count // 2 * 2, :]
    running = anytime_mean(np.sum(offset[..., ::2, :] * offset[..., 1::2, :], axis=-1), level, start)
    return Interval(running.estimate, np.maximum(running.low, 0), np.maximum(running.high, 0))


@checked
def effective_dimension(means: npt.ArrayLike | Batches) -> Array:
    """Effective number of noise directions, `(tr Σ)² / tr(Σ²)` in [1, p], from batch means `[..., B, p]`.

    >>> import numpy as np
    >>> means = np.random.default_rng(0).normal(size=(1000, 4))
    >>> bool(3 < gl.intervals.effective_dimension(means) <= 4)
    True
    """
    run = Batches.of(means)
    stats = _statistics(run, np.zeros_like(run.mean))
    return np.clip(stats.first**2 / stats.second, 1, run.mean.shape[-1])


@checked
def detectable(samples: float, noise: float, dimension: float = 1.0, level: float = 0.95, power: float = 0.8) -> float:
    """Smallest relative bias `∥m − t∥/∥t∥` that a run of `samples` tells from zero (`bias(…).low > 0`) with this power.

    `√(λ·noise / (dimension·samples))`: a chi-square of `dimension` degrees of freedom and noncentrality `λ` exceeds the
    level-quantile of the central one with probability `power`. `noise` is `tr Σ/∥t∥²`, `dimension` is `(tr Σ)²/tr(Σ²)`,
    exact or from a run (1 is the hardest case). Exact for equal eigenvalues of Σ, else two moments matched.
    Raises ValueError unless samples, noise > 0, dimension ≥ 1 and level, power are in (0, 1) with power > 1 − level.

    >>> round(gl.intervals.detectable(10_000, noise=4.0), 4)
    0.056
    >>> round(gl.intervals.detectable(40_000, noise=4.0), 4)
    0.028
    """
    check_probability("level", level)
    check_probability("power", power)
    if not (0 < samples < np.inf and 0 < noise < np.inf and 1 <= dimension < np.inf and power > 1 - level):
        raise ValueError(
            "samples and noise must be positive, dimension at least 1 and power above 1 − level; "
            f"got {samples=}, {noise=}, {dimension=}, {power=}, {level=}"
        )
    noncentrality = special.chndtrinc(special.chdtri(dimension, 1 - level), dimension, 1 - power)
    return float(np.sqrt(noncentrality * noise / (dimension * samples)))


@checked
def samples_needed(effect: float, noise: float, dimension: float = 1.0, level: float = 0.95, power: float = 0.8) -> int:
    """Number of samples that tells a relative bias of `effect` from zero with this power: inverse of `detectable`.

    Raises `ValueError` for an effect that is not positive, and as `detectable` does.

    >>> needed = gl.intervals.samples_needed(0.05, noise=4.0)
    >>> gl.intervals.detectable(needed, noise=4.0) <= 0.05 < gl.intervals.detectable(needed - 1, noise=4.0)
    True
    """
    if not 0 < effect < np.inf:
        raise ValueError(f"effect must be a positive relative bias; got {effect}")
    return int(np.ceil((detectable(1, noise, dimension, level, power) / effect) ** 2 * (1 - 1e-12)))


def _cosine_of(along: Array, across_squared: Array) -> Array:
    length = np.sqrt(along**2 + across_squared)
    return along / np.where(length > 0, length, 1)


@dataclass(frozen=True)
class _Statistics:
    """What batches say about the covariance `S` of a batch and an offset `d` of the mean; write `D = B∥d∥²`."""

    batches: int
    unit: Array  # of the squared norm of a mean; the others are in units of B times that
    excess: Array  # D, unbiased
    first: Array  # tr S
    second: Array  # tr S²
    third: Array  # tr S³
    along: Array  # B dᵀSd
    slope: Array  # dᵀS²d / dᵀSd, or tr S³ / tr S² where d is lost in the noise


def _noise_rows(values: Array) -> Array:
    """DCT over the batches, `[..., B]`, without the constant row: `[..., B − 1]`."""
    rows: Array = fft.dct(values, axis=-1, norm="ortho")[..., 1:]
    return rows


def _statistics(run: Batches, offset: Array, without: Array | None = None) -> _Statistics:
    """Averages of products of different rows, for a signal row `√B · offset`.

    without `[..., B]`: the batches' component along a unit vector that is left out of the noise.
    """
    batches, free = run.count, run.count - 1
    noise, cross = run.noise, np.sqrt(batches) * _noise_rows(run.along(offset))
    if without is not None:
        rows = _noise_rows(without)
        noise = noise - rows[..., :, None] * rows[..., None, :]
    first, signal = np.trace(noise, axis1=-2, axis2=-1) / free, batches * np.square(offset).sum(-1)
    first = np.maximum(first, 0)  # rounding, where what is left out is all there is
    size = (signal + free * first) / batches  # mean squared norm of a batch
    scale, share = (np.where(each > 0, each, 1) for each in (size, first))
    pairs, share = noise / share[..., None, None] * (1 - np.eye(free)), share / scale
    signal, first, cross = signal / scale, first / scale, cross / scale[..., None]
    second = share**2 * np.square(pairs).sum((-2, -1)) / (free * (free - 1))
    second = np.maximum(second, 1e-30)  # rounding, where a run has no noise
    third = share**3 * ((pairs @ pairs) * pairs).sum((-2, -1)) / (free * (free - 1) * (free - 2))
    third = np.clip(third, 1e-3 * second**1.5, second**1.5)
    once = np.square(cross).mean(-1)  # B dᵀSd + tr S²
    twice = share * ((pairs @ cross[..., None])[..., 0] * cross).sum(-1) / (free * (free - 1))  # B dᵀS²d + tr S³
    slope = np.clip((third + 2 * twice) / (second + 2 * once), 0, np.cbrt(third))
    return _Statistics(batches, size / batches, signal - first, first, second, third, once - second, slope)


def _probability_below(stats: _Statistics, excess: Array, distance: Array) -> Array:
    """P(`∥√B·mean∥² − tr Ŝ` ≤ excess) if `D` were `distance`: a Pearson III law with three matched moments.

    Variance `2 tr S² B/(B−1) + 4B dᵀSd`, third cumulant `8 tr S³ + 24B dᵀS²d`. As in a score test, `dᵀSd` is estimated
    under the hypothesis: it shares its noise with the statistic and errs by `slope` times as much, and what the
    statistic lacks may hide in the noisiest direction, `tr S³/tr S²`. Else an interval that lands low is too short.
    """
    shortfall = distance - stats.excess
    slope = np.where(shortfall > 0, np.maximum(stats.slope, stats.third / stats.second), stats.slope)
    along = np.clip(stats.along + slope * shortfall, 0, np.cbrt(stats.third) * distance)
    variance = 2 * stats.second * stats.batches / (stats.batches - 1) + 4 * along
    shape = 4 * variance**3 / (8 * stats.third + 24 * slope * along) ** 2
    return np.asarray(special.gammainc(shape, np.maximum(shape + (excess - distance) * np.sqrt(shape / variance), 0)))


def _studentised(stats: _Statistics, probability: float | Array) -> Array:
    """Probability that a law with known moments must exceed for one with estimated moments to exceed `probability`.

    The normal quantile is replaced by a Student one with half of the `B − 1` degrees of freedom: at zero the variance is of
    fourth order in the data.
    """
    return np.asarray(special.ndtr(special.stdtrit((stats.batches - 1) / 2, probability)), dtype=np.float64)


def _significantly_nonzero(stats: _Statistics, level: float) -> npt.NDArray[np.bool_]:
    """Whether the lower end of `_squared_norm` is above 0."""
    return np.greater(_probability_below(stats, stats.excess, np.zeros_like(stats.excess)), _studentised(stats, level))


def _largest_distance(stats: _Statistics, excess: Array, probability: Array) -> Array:
    """Largest `D ≥ 0` with `_probability_below(D)` above a probability, or 0, by bisection."""
    least = _studentised(stats, probability)
    low, high = np.zeros_like(excess), np.maximum(excess, 0) + np.sqrt(stats.second)
    while (short := _probability_below(stats, excess, high) > least).any():
        high = np.where(short, 2 * high, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = _probability_below(stats, excess, middle) > least
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def _squared_norm(stats: _Statistics, level: float) -> Interval:
    """Interval for the squared norm of the offset, see `squared_distance`."""
    alpha = 1 - level
    excess, floored, zero = stats.excess, np.maximum(stats.excess, 0), np.zeros_like(stats.excess)
    probability = np.reshape([alpha / 2, alpha, 1 - alpha, 1 - alpha / 2], (4, *[1] * excess.ndim))
    high, quiet, one, two = _largest_distance(stats, np.stack([floored, zero, excess, excess]), probability)
    # Up to `quiet` the upper end, never below that of an estimate of 0, cannot fail: a one-sided lower end is enough.
    low = np.maximum(two, np.minimum(one, quiet))
    return Interval(stats.unit * excess, stats.unit * low, stats.unit * high)


def _validated(means: npt.ArrayLike | Batches, target: npt.ArrayLike, level: float) -> tuple[Batches, Array]:
    check_probability("level", level)
    run, target = Batches.of(means), _finite("target", target)
    if target.shape[-1:] != run.mean.shape[-1:] or not _broadcast(run.mean, target):
        raise ValueError(f"target must match the parameters of means, shape {run.mean.shape}; got {target.shape}")
    return run, target


def _broadcast(*arrays: Array) -> bool:
    try:
        return bool(np.broadcast_shapes(*(array.shape for array in arrays)))
    except ValueError:
        return False


def _length(target: Array) -> Array:
    """Norm of a target, NaN for a zero one, which nothing is relative to."""
    size = np.linalg.norm(target, axis=-1)
    return np.asarray(np.where(size > 0, size, np.nan))


def _finite(name: str, values: npt.ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite; got NaN or infinite values, usually an overflow in the loss")
    return array
