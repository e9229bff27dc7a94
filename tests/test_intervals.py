"""Coverage of every interval by simulation: Gaussian and softmax-bandit gradients, 1 to 300 parameters, any bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
from scipy import fft, stats

from gradlab import intervals

Array = npt.NDArray[np.float64]

LEVEL = 0.95
SURE = 1e-4  # a test of coverage that fails, fails at this significance
BATCHES = 64


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(20251001, spawn_key=key))


def too_low(hits: int, trials: int, level: float = LEVEL) -> bool:
    """Whether `hits` of `trials` is significantly below the nominal level."""
    return bool(stats.binomtest(hits, trials, level, alternative="less").pvalue < SURE)


def assert_covers(interval: intervals.Interval, truth: float, sharp: bool = False, level: float = LEVEL) -> None:
    """Coverage is not significantly below `level`; of an interval meant to be sharp, it is not near 1 either."""
    covered = (interval.low <= truth) & (truth <= interval.high)
    hits, trials = int(covered.sum()), covered.size
    assert not too_low(hits, trials, level), f"coverage {hits / trials:.4f} of {level}"
    if sharp:
        assert hits / trials < level + 0.8 * (1 - level), f"coverage {hits / trials:.4f}: wider than needed"


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────

SPECTRA: dict[str, Array] = {
    "one": np.ones(1),
    "three_equal": np.ones(3),
    "three_steep": np.array([1.0, 0.1, 0.01]),
    "fifty_geometric": 0.8 ** np.arange(50),
    "hundred_spiked": np.r_[1.0, np.full(100, 0.03)],
    "three_hundred": np.ones(300),
}
# In units of the standard deviation of the squared distance at zero: none, lost in the noise, comparable, obvious.
SIZES = {"zero": 0.0, "small": 1.0, "comparable": 5.0, "large": 100.0}


def gaussian_means(spectrum: Array, replicates: int, rng: np.random.Generator, batches: int = BATCHES) -> Array:
    """Batch means whose overall mean has covariance diag(spectrum)."""
    noise = rng.standard_normal((replicates, batches, len(spectrum)))
    return np.asarray(noise * np.sqrt(spectrum * batches))


@dataclass(frozen=True)
class BanditGradients:
    """Per-sample gradients `k'(ℓ) · (onehot − π)` of k2 or k3 as a loss for a softmax bandit: discrete and skewed."""

    gradients: Array  # [v, p], the gradient when token v is drawn
    policy: Array  # [v]

    @classmethod
    def random(cls, vocab: int, kernel: str, rng: np.random.Generator) -> BanditGradients:
        logits = rng.standard_normal((2, vocab)) * [[0.7], [0.4]]
        log_policy, log_reference = (x - np.logaddexp.reduce(x) for x in (logits[0], logits.sum(0)))
        ratio, policy = log_policy - log_reference, np.exp(log_policy)
        coefficient = ratio if kernel == "k2" else -np.expm1(-ratio)
        return cls(coefficient[:, None] * (np.eye(vocab) - policy), policy)

    @property
    def mean(self) -> Array:
        return self.policy @ self.gradients

    @property
    def covariance(self) -> Array:
        centred = self.gradients - self.mean
        return (centred * self.policy[:, None]).T @ centred

    def sample(self, size: int, replicates: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Batch means [r, B, p] and traces [r, B] (NaN for batches of one)."""
        counts = rng.multinomial(size, self.policy, size=(replicates, BATCHES)).astype(np.float64)
        means = counts @ self.gradients / size
        squares = counts @ np.square(self.gradients).sum(1) - size * np.square(means).sum(-1)
        return means, squares / (size - 1) if size > 1 else np.full(squares.shape, np.nan)


# ── Distance to the target ────────────────────────────────────────────────────────────────────────────────────────


def test_the_estimate_is_the_u_statistic_over_pairs_of_batches() -> None:
    rng = generator(0)
    means, target = rng.standard_normal((9, 4)), rng.standard_normal(4)
    offset = means - target
    pairs = [offset[b] @ offset[c] for b in range(9) for c in range(9) if b != c]
    trace = np.trace(np.cov(means.T))
    interval = intervals.squared_distance(means, target)
    assert interval.estimate == pytest.approx(np.mean(pairs), rel=1e-12)
    assert interval.estimate == pytest.approx(np.square(offset.mean(0)).sum() - trace / 9, rel=1e-12)


def test_bias_is_the_root_of_the_squared_distance_relative_to_the_target() -> None:
    rng = generator(1)
    means, target = rng.standard_normal((20, 10, 3)), np.array([1.0, -2.0, 2.0])
    squared, bias = intervals.squared_distance(means, target), intervals.bias(means, target)
    np.testing.assert_allclose(bias.estimate, np.sqrt(np.maximum(squared.estimate, 0)) / 3)
    np.testing.assert_allclose(bias.low, np.sqrt(squared.low) / 3)
    np.testing.assert_allclose(bias.high, np.sqrt(squared.high) / 3)
    assert (squared.low >= 0).all()
    assert (squared.low <= np.maximum(squared.estimate, 0)).all()
    assert (squared.estimate < squared.high).all()
    assert (squared.high > 0).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["one", "three_steep", "fifty_geometric", "hundred_spiked", "three_hundred"])
def test_distance_covers_for_gaussian_gradients(name: str, size: str) -> None:
    spectrum = SPECTRA[name]
    rng = generator(2, list(SPECTRA).index(name), list(SIZES).index(size))
    means = gaussian_means(spectrum, 2000 if len(spectrum) <= 3 else 400 if len(spectrum) > 200 else 1000, rng)
    truth = SIZES[size] * np.sqrt(2 * np.square(spectrum).sum())
    target = np.zeros(len(spectrum))
    target[0] = np.sqrt(truth)
    assert_covers(intervals.squared_distance(means, target), truth, sharp=True)


@pytest.mark.parametrize("direction", ["quietest", "mixed"])
@pytest.mark.parametrize("size", ["comparable", "large"])
@pytest.mark.parametrize("name", ["three_steep", "hundred_spiked"])
def test_distance_covers_when_bias_and_noise_point_elsewhere(name: str, size: str, direction: str) -> None:
    spectrum = SPECTRA[name]
    rng = generator(3, list(SPECTRA).index(name), list(SIZES).index(size), len(direction))
    means = gaussian_means(spectrum, 1000, rng)
    truth = SIZES[size] * np.sqrt(2 * np.square(spectrum).sum())
    unit = np.eye(len(spectrum))[-1] if direction == "quietest" else np.full(len(spectrum), len(spectrum) ** -0.5)
    assert_covers(intervals.squared_distance(means, np.sqrt(truth) * unit), truth)


@pytest.mark.parametrize("size", ["zero", "comparable", "large"])
@pytest.mark.parametrize("vocab", [3, 50, 300])
def test_bias_covers_for_bandit_gradients(vocab: int, size: str) -> None:
    rng = generator(4, vocab, list(SIZES).index(size))
    bandit = BanditGradients.random(vocab, "k3", rng)
    means, _ = bandit.sample(32, 300 if vocab > 200 else 1000, rng)
    covariance = bandit.covariance / (32 * BATCHES)
    away = rng.standard_normal(vocab)
    away *= np.sqrt(SIZES[size] * np.sqrt(2 * np.square(covariance).sum())) / np.linalg.norm(away)
    target = bandit.mean + away
    assert_covers(intervals.bias(means, target), float(np.linalg.norm(away) / np.linalg.norm(target)))


@pytest.mark.parametrize("batches", [8, 16])
@pytest.mark.parametrize("size", ["zero", "comparable"])
def test_distance_covers_with_few_batches(batches: int, size: str) -> None:
    spectrum = SPECTRA["fifty_geometric"]
    means = gaussian_means(spectrum, 2000, generator(5, batches, list(SIZES).index(size)), batches)
    truth = SIZES[size] * np.sqrt(2 * np.square(spectrum).sum())
    target = np.sqrt(truth) * np.eye(len(spectrum))[0]
    assert_covers(intervals.squared_distance(means, target), truth)


@pytest.mark.parametrize("level", [0.5, 0.99])
def test_distance_covers_at_other_levels(level: float) -> None:
    means = gaussian_means(SPECTRA["three_steep"], 2000, generator(6))
    for truth in (0.0, 200.0):
        interval = intervals.squared_distance(means, [np.sqrt(truth), 0, 0], level)
        assert_covers(interval, truth, sharp=True, level=level)


def test_one_parameter_far_from_the_target_gives_the_student_interval() -> None:
    means = gaussian_means(SPECTRA["one"], 200, generator(7))
    interval = intervals.bias(means - 50, [1.0])
    reach = stats.t.ppf(0.975, BATCHES - 1) * means[..., 0].std(-1, ddof=1) / np.sqrt(BATCHES)
    np.testing.assert_allclose((interval.high - interval.low) / 2, reach, rtol=0.04)


def test_a_normal_interval_with_plug_in_variance_is_caught() -> None:
    """The simulation tells the method from the obvious shortcut, `estimate ± 1.96 · 2 √(dᵀSd/B)`."""
    means = gaussian_means(SPECTRA["three_steep"], 2000, generator(8))
    interval = intervals.squared_distance(means, np.zeros(3))
    along = np.einsum("rbp,rp->rb", means, means.mean(1))
    error = 2 * along.std(-1, ddof=1) / np.sqrt(BATCHES)
    hits = (interval.estimate - 1.96 * error <= 0) & (interval.estimate + 1.96 * error >= 0)
    assert too_low(int(hits.sum()), hits.size)


# ── Cosine ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cosine", [1.0, 0.9, 0.0, -1.0])
@pytest.mark.parametrize("name", ["three_equal", "three_steep", "fifty_geometric", "three_hundred"])
def test_cosine_covers_for_gaussian_gradients(name: str, cosine: float) -> None:
    spectrum = SPECTRA[name]
    rng = generator(9, list(SPECTRA).index(name), round(10 * cosine) + 10)
    target, across = np.linalg.qr(rng.standard_normal((len(spectrum), 2)))[0].T
    mean = cosine * target + np.sqrt(1 - cosine**2) * across
    size = np.sqrt(12 * np.sqrt(2 * np.square(spectrum).sum()))
    means = gaussian_means(spectrum, 250 if len(spectrum) > 200 else 800, rng) + size * mean
    interval = intervals.cosine(means, target)
    assert_covers(interval, cosine)
    known = ~np.isnan(interval.estimate)
    assert known.mean() > 0.9
    assert (np.abs(interval.estimate[known]) <= 1).all()
    assert np.median(interval.estimate[known]) == pytest.approx(cosine, abs=0.05)
    assert np.median(interval.high - interval.low) < 1.2


@pytest.mark.parametrize("kernel", ["k2", "k3"])
def test_cosine_covers_for_bandit_gradients(kernel: str) -> None:
    rng = generator(10, len(kernel), int(kernel[1]))
    bandit = BanditGradients.random(10, kernel, rng)
    reverse = bandit.policy @ BanditGradients.random(10, "k2", generator(10, len(kernel), int(kernel[1]))).gradients
    means, _ = bandit.sample(64, 2000, rng)
    truth = bandit.mean @ reverse / np.linalg.norm(bandit.mean) / np.linalg.norm(reverse)
    assert truth == pytest.approx(1) if kernel == "k2" else truth < 0.99
    assert_covers(intervals.cosine(means, reverse), min(truth, 1.0))


def test_cosine_of_a_vanishing_gradient_is_not_a_number() -> None:
    interval = intervals.cosine(gaussian_means(SPECTRA["three_steep"], 1000, generator(11)), [1.0, 0, 0])
    unknown = np.isnan(interval.estimate)
    assert not too_low(int(unknown.sum()), 1000)
    assert (interval.low[unknown] == -1).all()
    assert (interval.high[unknown] == 1).all()


def test_cosine_with_one_parameter_is_a_sign() -> None:
    means = gaussian_means(SPECTRA["one"], 1, generator(12))[0]
    for shift, sign in ((30, 1), (-30, -1)):
        interval = intervals.cosine(means + shift, [2.0])
        assert (interval.estimate, interval.low, interval.high) == (sign, sign, sign)


def test_cosine_of_means_is_a_jackknife_over_pairs_of_different_batches() -> None:
    """Explicit loops over pairs, with every batch left out in turn; two runs that share their noise, and one that is none."""
    rng = generator(32)
    shared = rng.standard_normal((9, 4))
    x, y = shared + 0.3 * rng.standard_normal((9, 4)) + np.array([3, 0, 1, 0]), shared + np.array([2, 1, 0, 0])

    def cosine(kept: list[int]) -> float:
        pairs = list(permutations(kept, 2))
        xy, xx, yy = (np.mean([a[b] @ c[d] for b, d in pairs]) for a, c in ((x, y), (x, x), (y, y)))
        return float(xy / np.sqrt(xx * yy))

    whole, every = cosine([*range(9)]), [cosine([b for b in range(9) if b != out]) for out in range(9)]
    error = np.sqrt(8 / 9 * np.square(np.array(every) - np.mean(every)).sum())
    for level in (0.5, 0.9):
        found = intervals.cosine_of_means(x, y, level)
        reach = stats.t.ppf((1 + level) / 2, 8) * error
        assert found.estimate == pytest.approx(whole, rel=1e-9)
        assert (found.low, found.high) == pytest.approx((whole - reach, min(whole + reach, 1)), rel=1e-9)
    for pair in ((x - x.mean(0), y), (y, x - x.mean(0))):
        unknown = intervals.cosine_of_means(*pair)
        assert np.isnan(unknown.estimate)
        assert (unknown.low, unknown.high) == (-1, 1)
    with pytest.raises(ValueError, match="level"):
        intervals.cosine_of_means(x, y, 1.0)
    with pytest.raises(ValueError, match="one shape"):
        intervals.cosine_of_means(x, y[:8])


# ── Noise ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 2, 32])
@pytest.mark.parametrize("vocab", [3, 50])
def test_noise_covers_for_bandit_gradients(vocab: int, size: int) -> None:
    rng = generator(13, vocab, size)
    bandit = BanditGradients.random(vocab, "k2", rng)
    means, traces = bandit.sample(size, 2000, rng)
    interval = intervals.noise(means, None if size == 1 else traces, bandit.mean)
    truth = np.trace(bandit.covariance) / np.square(bandit.mean).sum()
    assert interval.estimate.mean() == pytest.approx(truth, rel=0.02)
    assert_covers(interval, truth, sharp=True, level=0.93 if size == 1 else LEVEL)  # 64 samples in all: 0.935 measured


@pytest.mark.parametrize("size", [2, 64])
def test_noise_covers_for_gaussian_gradients(size: int) -> None:
    rng = generator(14, size)
    traces = rng.chisquare(3 * (size - 1), (3000, BATCHES)) / (size - 1)
    assert_covers(intervals.noise(np.zeros((3000, BATCHES, 3)), traces, [0, 0, 2.0]), 0.75, sharp=True)


# ── Looking at any time ───────────────────────────────────────────────────────────────────────────────────────────


def assert_never_excludes(running: intervals.Interval, truth: float, start: int) -> None:
    assert np.isinf(running.high[..., : start - 1]).all()
    assert np.isfinite(running.high[..., start - 1 :]).all()
    kept = ((running.low <= truth) & (truth <= running.high)).all(-1)
    assert not too_low(int(kept.sum()), kept.size), f"ever excluded: {1 - kept.mean():.4f}"


def test_anytime_mean_follows_the_published_boundary() -> None:
    """Theorem 2.2 with the `ρ` that minimises the width at `start`, found here by search; far out Student is normal."""
    x, alpha, start, n = generator(15).standard_normal(20_000), 0.05, 100, 20_000
    width: Callable[[float, int], float] = lambda rho, k: np.sqrt(  # noqa: E731
        2 * (k * rho**2 + 1) / (k * rho) ** 2 * np.log(np.sqrt(k * rho**2 + 1) / alpha)
    )
    rho = min(np.geomspace(0.01, 10, 20_001), key=lambda rho: width(rho, start))
    running = intervals.anytime_mean(x, 1 - alpha, start)
    assert running.estimate[-1] == pytest.approx(x.mean())
    assert running.high[-1] - x.mean() == pytest.approx(x.std(ddof=1) * width(rho, n), rel=1e-3)


@pytest.mark.parametrize("draw", ["normal", "uniform", "gamma"])
def test_anytime_mean_is_never_wrong_too_often(draw: str) -> None:
    rng, shape = generator(16, len(draw)), (3000, 1000)
    x = {"normal": rng.standard_normal, "uniform": rng.random, "gamma": lambda s: rng.standard_gamma(4, s)}[draw](shape)
    truth = {"normal": 0.0, "uniform": 0.5, "gamma": 4.0}[draw]
    assert_never_excludes(intervals.anytime_mean(x), truth, start=16)
    fixed = np.abs(np.cumsum(x - truth, -1))[:, 15:] > 1.96 * x.std() * np.sqrt(np.arange(16, 1001))
    assert fixed.any(-1).mean() > 0.25  # what looking 985 times at a fixed-size interval would do


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batches", [64, 257])
@pytest.mark.parametrize("name", ["one", "three_steep", "fifty_geometric"])
def test_anytime_distance_is_never_wrong_too_often(name: str, batches: int, size: str) -> None:
    spectrum = SPECTRA[name]
    rng = generator(17, list(SPECTRA).index(name), batches, list(SIZES).index(size))
    means = gaussian_means(spectrum, 400 if len(spectrum) > 3 else 2000, rng, batches)
    truth = SIZES[size] * np.sqrt(2 * np.square(spectrum).sum())
    target = np.sqrt(truth) * np.eye(len(spectrum))[0]
    running = intervals.anytime_squared_distance(means, target)
    assert running.low.shape == (len(means), batches // 2)
    assert (running.low >= 0).all()
    assert_never_excludes(running, truth, start=16)


def test_anytime_distance_holds_for_bandit_gradients() -> None:
    rng = generator(18)
    bandit = BanditGradients.random(20, "k3", rng)
    means, _ = bandit.sample(64, 2000, rng)
    for target in (bandit.mean, bandit.mean + 0.02, 0 * bandit.mean):
        running = intervals.anytime_squared_distance(means, target)
        assert_never_excludes(running, float(np.square(bandit.mean - target).sum()), start=16)


# ── Constants, by another route ───────────────────────────────────────────────────────────────────────────────────


def test_the_law_of_the_squared_distance_has_the_third_cumulant_of_a_noncentral_chi_square() -> None:
    """Known `S = 1` in `k` dimensions and many batches: then `∥√B·mean∥²` is noncentral chi-square, of known cumulants."""
    for k, noncentrality in ((1, 4.0), (3, 10.0), (20, 5.0), (5, 60.0)):
        known = [np.float64(x) for x in (1, noncentrality, k, k, k, noncentrality, 1)]
        found = intervals._Statistics(10**9, *known)
        law = stats.ncx2(k, noncentrality)
        values = law.ppf([0.01, 0.025, 0.2, 0.5, 0.8, 0.975, 0.99])
        mean, variance, skew = law.stats("mvs")
        below = intervals._probability_below(found, values - k, np.float64(noncentrality))
        np.testing.assert_allclose(below, stats.pearson3(skew, mean, variance**0.5).cdf(values), rtol=1e-6)
        if k > 1:  # three moments leave the lower tail open where the density is steep at 0
            np.testing.assert_allclose(below, law.cdf(values), rtol=0, atol=0.004)


@pytest.mark.parametrize(("batches", "level"), [(8, 0.95), (10, 0.8), (64, 0.99)])
def test_noise_is_a_student_interval_of_the_logarithm_with_half_of_the_degrees_of_freedom(batches: int, level: float) -> None:
    traces = generator(26, batches).gamma(3.0, size=batches)
    found = intervals.noise(np.zeros((batches, 2)), traces, [3.0, 4.0], level)
    spread = stats.t((batches - 1) / 2, np.log(traces.mean() / 25), stats.sem(traces) / traces.mean())
    assert found.estimate == pytest.approx(traces.mean() / 25, rel=1e-12)
    assert np.log([found.low, found.high]) == pytest.approx(spread.interval(level), rel=1e-9)


def test_noise_covers_with_few_skewed_batches_and_would_not_with_all_degrees_of_freedom() -> None:
    traces = generator(27).chisquare(3, (20_000, 8))
    found = intervals.noise(np.zeros((*traces.shape, 1)), traces, [1.0])
    assert_covers(found, 3.0)
    shorter = np.log(found.high / found.estimate) * stats.t.ppf(0.975, 7) / stats.t.ppf(0.975, 3.5)
    hits = np.abs(np.log(found.estimate / 3)) <= shorter
    assert too_low(int(hits.sum()), hits.size)


def test_either_part_of_a_cosine_has_half_of_the_error() -> None:
    """Noise along the target only, or across only: the ends follow from a Student or a `squared_distance` interval at 0.975."""
    along = generator(28).standard_normal(12) + 9
    reach = stats.t.ppf(0.9875, 11) * stats.sem(along)
    found = intervals.cosine(np.stack([along, np.full(12, 4.0)], -1), [2.0, 0.0])
    for end, at in ((found.low, along.mean() - reach), (found.high, along.mean() + reach)):
        assert end == pytest.approx(at / np.hypot(at, 4), rel=1e-9)
    across = generator(29).standard_normal((12, 3)) + 2
    found = intervals.cosine(np.concatenate([np.full((12, 1), 4.0), across], -1), [3.0, 0, 0, 0])
    part = intervals.squared_distance(across, np.zeros(3), 0.975)
    assert (found.low, found.high) == pytest.approx([4 / np.sqrt(16 + end) for end in (part.high, part.low)], rel=1e-9)


@pytest.mark.parametrize("start", [3, 5, 16])
def test_anytime_mean_starts_with_a_student_quantile(start: int) -> None:
    """Against 30 digits: the boundary at `start`, with the tail of the normal quantile found in Student's law."""
    x = generator(30, start).standard_normal(start)
    with mpmath.workdps(30):
        squared = -mpmath.lambertw(-(mpmath.mpf("0.05") ** 2) / mpmath.e, -1).real - 1  # ρ²·start
        normal = mpmath.sqrt(2 * (squared + 1) / squared * mpmath.log(mpmath.sqrt(squared + 1) / mpmath.mpf("0.05")))
        tail, free = mpmath.ncdf(-normal), start - 1

        def excess(log: mpmath.mpf) -> mpmath.mpf:
            beyond = mpmath.betainc(mpmath.mpf(free) / 2, 0.5, 0, free / (free + mpmath.exp(2 * log)), regularized=True) / 2
            return mpmath.log(beyond / tail)

        quantile = float(mpmath.exp(mpmath.findroot(excess, mpmath.log(normal))))
    found = intervals.anytime_mean(x, 0.95, start)
    assert found.high[-1] - found.estimate[-1] == pytest.approx(quantile * stats.sem(x), rel=1e-6)
    assert found.estimate[-1] - found.low[-1] == pytest.approx(quantile * stats.sem(x), rel=1e-6)


def test_anytime_mean_holds_from_an_early_start_and_would_not_with_normal_quantiles() -> None:
    x, start = generator(31).standard_normal((4000, 60)), 4
    found = intervals.anytime_mean(x, start=start)
    assert_never_excludes(found, 0.0, start)
    k = np.arange(start, 61.0)
    errors = (found.high - found.estimate)[:, start - 1 :]
    student = errors[0] / [x[0, : int(n)].std(ddof=1) / n**0.5 for n in k]
    normal = -stats.norm.ppf(stats.t.sf(student, k - 1))
    kept = (np.abs(found.estimate[:, start - 1 :]) <= errors * normal / student).all(-1)
    assert too_low(int(kept.sum()), kept.size)


# ── Power ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["one", "three_equal", "fifty_geometric", "three_hundred"])
def test_the_detectable_bias_is_detected_with_the_power_stated(name: str) -> None:
    spectrum = SPECTRA[name]
    samples, replicates = 64_000, 400 if len(spectrum) > 200 else 1000
    noise, dimension = samples * spectrum.sum(), spectrum.sum() ** 2 / np.square(spectrum).sum()
    effect = intervals.detectable(samples, noise, dimension, power=0.8)
    rng = generator(19, list(SPECTRA).index(name))
    direction = np.sqrt(spectrum) * rng.standard_normal((replicates, len(spectrum)))  # any, drawn like the noise
    direction *= effect / np.linalg.norm(direction, axis=-1, keepdims=True)
    means = gaussian_means(spectrum, replicates, rng) + direction[:, None]
    detected = intervals.squared_distance(means, np.zeros(len(spectrum))).low > 0
    assert detected.mean() == pytest.approx(0.8, abs=0.05)


def test_samples_needed_inverts_detectable() -> None:
    for dimension in (1, 7.5, 300, 1e5):
        effect = intervals.detectable(1000, 20.0, dimension)
        assert intervals.samples_needed(effect, 20.0, dimension) == 1000
        assert intervals.samples_needed(effect / 2, 20.0, dimension) == 4000
    assert intervals.detectable(100, 1.0, power=0.9) > intervals.detectable(100, 1.0, power=0.8)
    assert intervals.detectable(100, 1.0, level=0.99) > intervals.detectable(100, 1.0, level=0.95)
    normal = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)  # one dimension: the two-sided z-test
    assert intervals.detectable(100, 1.0) == pytest.approx(normal / 10, rel=1e-4)


@pytest.mark.parametrize("name", SPECTRA)
def test_effective_dimension(name: str) -> None:
    spectrum = SPECTRA[name]
    found = intervals.effective_dimension(gaussian_means(spectrum, 100, generator(20)) + 5)
    truth = spectrum.sum() ** 2 / np.square(spectrum).sum()
    assert np.median(found) == pytest.approx(truth, rel=0.1)
    assert ((found >= 1) & (found <= len(spectrum))).all()


# ── Symmetries, edges, bad input ──────────────────────────────────────────────────────────────────────────────────


def test_replicates_agree_with_single_runs_and_single_runs_give_floats() -> None:
    rng = generator(21)
    means, traces, target = rng.standard_normal((2, 3, 10, 4)) + 1, rng.random((2, 3, 10)), rng.standard_normal(4)
    calls: list[Callable[..., intervals.Interval]] = [
        lambda m, _: intervals.squared_distance(m, target),
        lambda m, _: intervals.bias(m, target),
        lambda m, _: intervals.cosine(m, target),
        lambda m, t: intervals.noise(m, t, target),
        lambda m, _: intervals.noise(m, None, target),
    ]
    for call in calls:
        together, alone = call(means, traces), call(means[1, 2], traces[1, 2])
        for field in ("estimate", "low", "high"):
            assert getattr(together, field).shape == (2, 3)
            assert isinstance(getattr(alone, field), float)
            np.testing.assert_allclose(getattr(together, field)[1, 2], getattr(alone, field), rtol=1e-9)


def test_every_run_with_every_target_is_row_by_row() -> None:
    rng = generator(24)
    means, traces = rng.standard_normal((5, 12, 4)) * np.geomspace(1e-8, 1, 5)[:, None, None] + 1, rng.random((5, 12))
    targets = np.concatenate([rng.standard_normal((2, 4)), np.zeros((1, 4)), means.mean(1)])
    split, spread = intervals.Batches.of(means[:, None]), traces[:, None]
    calls: dict[str, Callable[..., intervals.Interval]] = {
        "distance": lambda m, _, t: intervals.squared_distance(m, t),
        "bias": lambda m, _, t: intervals.bias(m, t, 0.9),
        "cosine": lambda m, _, t: intervals.cosine(m, t),
        "noise": lambda m, x, t: intervals.noise(m, x, t),
    }
    for name, call in calls.items():
        together = call(split, spread, targets)
        for field in ("estimate", "low", "high"):
            rows = [[getattr(call(m, x, t), field) for t in targets] for m, x in zip(means, traces, strict=True)]
            np.testing.assert_allclose(getattr(together, field), rows, rtol=1e-8, atol=1e-15, err_msg=name)
    assert np.isnan(calls["cosine"](split, spread, targets).low[:, 2]).all()


@pytest.mark.parametrize("left_out", [False, True])
def test_statistics_are_averages_over_pairs_and_triples_of_different_rows(left_out: bool) -> None:
    """Against the DCT of the points themselves, with what is left out projected out of them, and explicit loops."""
    rng = generator(25)
    points, offset, unit = rng.standard_normal((9, 5)), rng.standard_normal(5), np.eye(5)[1]
    run = intervals.Batches.of(points)
    shifted = points - points.mean(0) + offset
    if left_out:
        shifted -= np.outer(shifted @ unit, unit)
        offset = offset * (1 - unit)
    signal, *noise = fft.dct(shifted, axis=0, norm="ortho")
    found = intervals._statistics(run, offset, run.along(unit) if left_out else None)
    one, two, three = (list(permutations(noise, k)) for k in (1, 2, 3))
    expected = {
        "unit": np.square(shifted).sum() / 81,
        "first": np.mean([x @ x for (x,) in one]),
        "second": np.mean([(x @ y) ** 2 for x, y in two]),
        "third": np.mean([(x @ y) * (y @ z) * (z @ x) for x, y, z in three]),
        "excess": signal @ signal - np.mean([x @ x for (x,) in one]),
        "along": np.mean([(signal @ x) ** 2 for (x,) in one]) - np.mean([(x @ y) ** 2 for x, y in two]),
    }
    twice = np.mean([(signal @ x) * (x @ y) * (y @ signal) for x, y in two])
    once = np.mean([(signal @ x) ** 2 for (x,) in one])
    scale = 9 * expected["unit"]
    powers = {"unit": 0, "second": 2, "third": 3, "along": 2}
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value / scale ** powers.get(name, 1), rel=1e-12), name
    slope = (expected["third"] + 2 * twice) / (expected["second"] + 2 * once)
    assert found.slope == pytest.approx(slope / scale, rel=1e-12)


@pytest.mark.parametrize("call", [intervals.bias, intervals.cosine])
def test_relative_quantities_ignore_scale_and_rotation_and_higher_levels_are_wider(
    call: Callable[..., intervals.Interval],
) -> None:
    rng = generator(22)
    means, target = rng.standard_normal((16, 5)) + 2, rng.standard_normal(5) + 2
    rotation = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    plain, moved = call(means, target), call(1e-60 * means @ rotation, 1e-60 * target @ rotation)
    wide = call(means, target, level=0.99)
    assert (moved.estimate, moved.low, moved.high) == pytest.approx((plain.estimate, plain.low, plain.high), rel=1e-9)
    assert wide.estimate == plain.estimate
    assert wide.low < plain.low < plain.high < wide.high


def test_a_noiseless_run_has_a_point_interval() -> None:
    means, target = np.tile([3.0, 4.0], (8, 1)), np.array([3.0, 0.0])
    exact = intervals.squared_distance(means, target)
    assert (exact.low, exact.high) == pytest.approx((16, 16), rel=1e-9)
    assert intervals.cosine(means, target).estimate == pytest.approx(0.6)
    nothing = intervals.squared_distance(means, means[0])
    assert (nothing.estimate, nothing.low, nothing.high) == (0, 0, 0)
    silent = intervals.noise(means, np.zeros(8), target)
    assert (silent.estimate, silent.low, silent.high) == (0, 0, 0)


def test_a_zero_target_has_no_relative_error() -> None:
    means, target = generator(23).standard_normal((4, 8, 3)), np.zeros(3)
    for interval in (
        intervals.bias(means, target),
        intervals.cosine(means, target),
        intervals.noise(means, None, target),
    ):
        assert np.isnan([interval.estimate, interval.low, interval.high]).all()
        assert interval.estimate.shape == (4,)


MEANS, TARGET = np.ones((8, 3)), np.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals.squared_distance(MEANS[:7], TARGET), "at least 8 batches"),
        (lambda: intervals.squared_distance(MEANS[0], TARGET), "at least 8 batches"),
        (lambda: intervals.squared_distance(MEANS[:, :0], []), "at least 8 batches"),
        (lambda: intervals.bias(MEANS, TARGET[:2]), "target must match"),
        (lambda: intervals.bias(np.ones((2, 8, 3)), np.ones((5, 3))), "target must match"),
        (lambda: intervals.bias(MEANS, TARGET, level=1.0), "level"),
        (lambda: intervals.cosine(MEANS, TARGET, level=95), "level"),
        (lambda: intervals.cosine(MEANS * np.nan, TARGET), "means must be finite"),
        (lambda: intervals.squared_distance(MEANS, TARGET * np.inf), "target must be finite"),
        (lambda: intervals.noise(MEANS, np.ones(7), TARGET), "one number ≥ 0 per batch"),
        (lambda: intervals.noise(MEANS, -np.ones(8), TARGET), "one number ≥ 0 per batch"),
        (lambda: intervals.noise(MEANS, np.full(8, np.nan), TARGET), "traces must be finite"),
        (lambda: intervals.anytime_mean([1.0, np.nan]), "x must be finite"),
        (lambda: intervals.anytime_mean(1.0), "x must be"),
        (lambda: intervals.anytime_mean([1.0, 2.0], start=1), "start"),
        (lambda: intervals.anytime_mean([1.0, 2.0], level=0), "level"),
        (lambda: intervals.anytime_squared_distance(MEANS[:4], TARGET), "at least 8 batches"),
        (lambda: intervals.effective_dimension(MEANS[:4]), "at least 8 batches"),
        (lambda: intervals.detectable(0, 1.0), "positive"),
        (lambda: intervals.detectable(10, np.nan), "noise must be a number"),
        (lambda: intervals.detectable(10, 1.0, dimension=0.5), "at least 1"),
        (lambda: intervals.detectable(10, 1.0, power=0.04), "power above"),
        (lambda: intervals.detectable(10, 1.0, power=1.0), "power"),
        (lambda: intervals.samples_needed(0.0, 1.0), "effect"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_law_of_the_distance_is_a_pearson_law_and_a_lower_hypothesis_does_not_borrow_the_noisiest_direction() -> None:
    """Against scipy's, by its skewness; above the estimate `dᵀSd` grows by `tr S³/tr S²` for each unit of distance, below by `slope`."""
    second, third, slope, along = 0.6, 0.3, 0.1, 0.4
    known = intervals._Statistics(16, *map(np.asarray, (1.0, 2.0, 1.0, second, third, along, slope)))  # type: ignore[arg-type]
    for distance, rate in ((3.0, third / second), (1.5, slope)):
        expected = along + rate * (distance - 2.0)
        variance = 2 * second * 16 / 15 + 4 * expected
        law = stats.pearson3((8 * third + 24 * rate * expected) / variance**1.5, loc=distance, scale=variance**0.5)
        for excess in (1.0, 2.0, 4.0):
            found = intervals._probability_below(known, np.asarray(excess), np.asarray(distance))
            assert found == pytest.approx(law.cdf(excess), rel=1e-9)


@pytest.mark.parametrize("batches", [8, 64])
def test_estimated_moments_cost_half_of_the_degrees_of_freedom(batches: int) -> None:
    known = intervals._Statistics(batches, *[np.ones(())] * 7)
    for level in (0.5, 0.9, 0.99):
        assert intervals._studentised(known, level) == pytest.approx(
            stats.norm.cdf(stats.t((batches - 1) / 2).ppf(level)), rel=1e-10
        )


def test_a_third_moment_that_is_lost_in_the_noise_is_bounded_by_the_second() -> None:
    found = intervals._statistics(run := intervals.Batches.of(generator(31).standard_normal((200, 8, 400))), run.mean)
    share = found.third / found.second**1.5
    assert share.min() == pytest.approx(1e-3, rel=1e-9)  # where the average of triples is negative
    assert share.max() <= 1 + 1e-12


def test_a_cosine_of_means_knows_no_scale_and_takes_runs_one_by_one() -> None:
    rng = generator(32)
    one, two = (rng.normal(centre, 0.3, size=(3, 16, 2)) for centre in ([1.0, 0.2], [0.5, 1.0]))
    together = intervals.cosine_of_means(one, 1e-3 * two)
    for run in range(3):
        alone = intervals.cosine_of_means(one[run], two[run])
        for field in ("estimate", "low", "high"):
            assert getattr(together, field)[run] == pytest.approx(getattr(alone, field), rel=1e-10)
    assert (together.high - together.low > 0.01).all()


def test_looks_begin_where_they_are_told_to() -> None:
    means = generator(33).normal(1.0, 0.1, size=(24, 3))
    for start in (2, 5):
        found = intervals.anytime_squared_distance(means, np.zeros(3), start=start)
        assert np.isfinite(found.high).tolist() == [k + 1 >= start for k in range(12)]
    scalars = intervals.anytime_mean(means[:, 0], start=2)
    assert np.isfinite(scalars.high).tolist() == [k > 0 for k in range(24)]


def test_less_power_needs_fewer_samples() -> None:
    needed = {power: intervals.samples_needed(0.1, 2.0, power=power) for power in (0.5, 0.8, 0.95)}
    assert needed[0.5] < needed[0.8] < needed[0.95]
    # One direction, known noise: the root of n effect²/noise is the quantile of 1 − level/2 plus that of the power.
    root = stats.norm.ppf(0.975) + stats.norm.ppf(0.95)
    assert needed[0.95] == pytest.approx(2.0 * (root / 0.1) ** 2, rel=1e-3)
