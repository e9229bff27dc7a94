"""Heavy tails of k3: what a sample of n draws can see of its value, what χ² predicts of it, and how heavy the tail is.

`δ = ref/π` has expectation 1 whatever the policies; where the policy is narrow, events that hardly ever happen carry much of
it. `E_π[δ 1_A] = ref(A)`: an event of probability 1/n under the policy takes with it what the *reference* gives to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy
import torch
from tqdm import tqdm

from gradlab._common.arguments import check_columns, checked, numbers
from gradlab._common.names import check_jobs, check_name, check_probability, check_seed, check_whole, several
from gradlab._common.parallel import spread
from gradlab._common.streams import generator, sequence
from gradlab.estimators.catalogue import ESTIMATORS
from gradlab.estimators.coefficients import coefficients
from gradlab.measure import one_thread
from gradlab.moments import CANCELLED
from gradlab.policies import Bandit, Gaussian
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, check_scenario, is_of
from gradlab.solvers import exact

Array = npt.NDArray[np.float64]

#: Draws held at a time.
CHUNK = 2**16
#: Value of a kernel as a function of `ℓ`, for arrays.
VALUES: dict[str, Callable[[Array], Array]] = {
    "k1": lambda x: x,
    "k2": lambda x: 0.5 * x * x,
    "k3": lambda x: np.expm1(-x) + x,
}


@checked
def k3_variance(scenario: Scenario) -> float:
    """`Var k3 = χ²(ref‖π) + Var ℓ − 2 [KL(π‖ref) + KL(ref‖π)]`, one step; the closed form beside `exact.value_moments`.

    From `k3 = δ − 1 + ℓ` and `E_π[δ ℓ] = −KL(ref‖π)`. For Gaussians `inf` iff `σ² ≤ σ_ref²/2` (arXiv 2510.01555, App. I).
    Near the reference, where the terms cancel to a share of about KL, it is the moment itself.
    Raises `ValueError` for responses of several steps.

    >>> scenario = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1))
    >>> abs(gl.tails.k3_variance(scenario) - gl.exact.value_moments("k3", scenario).variance) < 1e-9
    True
    >>> gl.tails.k3_variance(gl.Scenario(gl.Gaussian(0, 0.7), gl.Gaussian(0, 1)))
    inf
    """
    if scenario.policy.length != 1:
        raise ValueError(f"the closed form is for one step, got responses of {scenario.policy.length}; see exact.value_moments")
    both = scenario.kl() + exact.objective("forward_kl", scenario)
    ratios = chi2(scenario)
    variance = ratios + exact.value_moments("k1", scenario).variance - 2 * both
    return variance if variance == np.inf or variance > CANCELLED * ratios else exact.value_moments("k3", scenario).variance


@checked
def rare_share(scenario: Scenario, sizes: Sequence[float]) -> pd.DataFrame:
    """Exact share of `E[k3] = KL(π‖ref)` on events rarer than 1/n: `A = {δ > t}` with `π(A) = 1/n`.

    For a Gaussian narrower than its reference, where `A = {|x − c| > r}`, or a bandit, whose tokens are taken in the order of `δ`
    (the last one in part). Returns `scenario, kl, samples` (n), `share`, `reference_probability` (`ref(A)`) and `truncated_mean`, the
    part of the expectation in nats on everything else. Raises `ValueError` for other policies and for n < 2.

    >>> frame = gl.tails.rare_share(gl.Scenario(gl.Gaussian(0.1, 0.2), gl.Gaussian(0, 1)), [1e3, 1e6])
    >>> frame["share"].round(2).tolist()
    [0.45, 0.29]
    """
    if min(sizes) < 2:
        raise ValueError(f"sizes must be at least 2, got {min(sizes)}")
    share_of: Any = _gaussian_share if is_of(scenario, Gaussian) else _bandit_share
    kl, rows = scenario.kl(), []
    for n in sizes:
        value, reference = share_of(scenario, 1 / n)
        row = {"samples": n, "share": value / kl, "reference_probability": reference, "truncated_mean": kl - value}
        rows.append({"scenario": scenario.label, "via": "exact", "kl": kl, **row})
    return pd.DataFrame(rows)


def _gaussian_share(scenario: Scenario[Gaussian], probability: float) -> tuple[float, float]:
    policy, reference = scenario.policy, scenario.reference
    a, b = policy.std**-2, reference.std**-2
    if not a > b:
        raise ValueError(
            f"δ is unbounded where the policy is narrower than the reference; got std {policy.std} and {reference.std}"
        )
    p, q = scipy.stats.norm(policy.mean, policy.std), scipy.stats.norm(reference.mean, reference.std)
    centre = (a * policy.mean - b * reference.mean) / (a - b)  # where δ is smallest

    def inside(law: Any, r: float) -> float:
        return float(law.cdf(centre + r) - law.cdf(centre - r))

    def outside(law: Any, r: float) -> float:
        return float(law.sf(centre + r) + law.cdf(centre - r))

    far = abs(centre - policy.mean) + 40 * policy.std
    radius = scipy.optimize.brentq(lambda r: np.log(max(outside(p, r), 1e-300) / probability), 0, far, xtol=1e-14)

    def k3(x: float) -> float:
        log_ratio = np.asarray(p.logpdf(x) - q.logpdf(x), dtype=np.float64)
        return float(p.pdf(x) * VALUES["k3"](log_ratio))

    ends = np.unique(np.clip([centre - radius, policy.mean, centre, centre + radius], centre - radius, centre + radius))
    truncated_mean = sum(scipy.integrate.quad(k3, low, high, epsabs=1e-13, epsrel=1e-12)[0] for low, high in pairwise(ends))
    return scenario.kl() - truncated_mean, outside(q, radius)


def _bandit_share(scenario: Scenario, probability: float) -> tuple[float, float]:
    if not is_of(scenario, Bandit):
        raise ValueError(f"rare_share needs a gl.Gaussian or a gl.Bandit, got {type(scenario.policy).__name__}")
    p, ref, value = _tokens(scenario)
    order = np.argsort(p / ref, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    fraction = np.clip((probability - before) / p[order], 0, 1)
    return float(fraction @ (p * value)[order]), float(fraction @ ref[order])


def _tokens(scenario: Scenario) -> tuple[Array, Array, Array]:
    """Policy, reference and k3 of every token of a bandit."""
    log_p, log_ref = (x.table.log_softmax(-1)[0].numpy() for x in (scenario.policy, scenario.reference))
    return np.exp(log_p), np.exp(log_ref), VALUES["k3"](log_p - log_ref)


def running(
    kernels: Sequence[str], scenario: Scenario, sizes: Sequence[int], runs: int, seed: int = 0, jobs: int = 1
) -> pd.DataFrame:
    """Sample mean and standard deviation of the value after `sizes` draws of one growing sample, for independent `runs`.

    Streamed in chunks of `CHUNK` draws: memory does not grow. Gaussians only; other policies are counted, see `dropped`.
    Returns `scenario, kl, kernel, run, samples, mean, std`; the same bytes for any number of jobs. Raises `ValueError` for
    other policies, unknown kernels, and sizes that do not increase from at least 2.

    >>> scenario = gl.Scenario(gl.Gaussian(0.1, 0.2), gl.Gaussian(0, 1))
    >>> frame = gl.tails.running(["k3"], scenario, [10, 100, 1000], runs=2)
    >>> frame[["run", "samples"]].values.tolist()
    [[0, 10], [0, 100], [0, 1000], [1, 10], [1, 100], [1, 1000]]
    """
    kernels, sizes = several(kernels), several(sizes)
    check_scenario(scenario)
    check_whole("runs", runs)
    check_seed(seed)
    check_jobs(jobs)
    for size in sizes:
        check_whole("each of sizes", size)
    if not is_of(scenario, Gaussian):
        raise ValueError(f"running() draws from a gl.Gaussian, got {type(scenario.policy).__name__}")
    for kernel in kernels:
        check_name("kernel", kernel, VALUES)
    if not kernels:
        raise ValueError(f"kernels must hold at least one, got {kernels!r}")
    if not sizes or sizes[0] < 2 or (np.diff(sizes) <= 0).any():
        raise ValueError(f"sizes must increase from at least 2, got {list(sizes)}")
    tasks = (
        joblib.delayed(_run)(kernels, scenario, sizes, sequence(seed, "tails.running", run))
        for run in tqdm(range(runs), desc="running means", unit="run", disable=None, delay=2)
    )
    runs_of_rows = spread(tasks, jobs)
    common = {"scenario": scenario.label, "via": "sampled", "kl": scenario.kl()}
    rows = [{**common, "run": run, **row} for run, part in enumerate(runs_of_rows) for row in part]
    return pd.DataFrame(rows)


def _run(
    kernels: Sequence[str], scenario: Scenario[Gaussian], sizes: Sequence[int], entropy: np.random.SeedSequence
) -> list[dict[str, Any]]:
    policy, reference = scenario.policy, scenario.reference
    rng, rows = np.random.default_rng(entropy), []
    shift, scale = (policy.mean - reference.mean) / reference.std, policy.std / reference.std
    count, mean, squares = 0, np.zeros(len(kernels)), np.zeros(len(kernels))
    for size in sizes:
        while count < size:
            z = rng.standard_normal(min(CHUNK, size - count))
            log_ratio = 0.5 * ((shift + scale * z) ** 2 - z * z) - np.log(scale)
            for k, kernel in enumerate(kernels):
                values = VALUES[kernel](log_ratio)
                part, n = values.mean(), len(z)
                # Chan, Golub & LeVeque: merge the moments of two parts without cancellation.
                step = part - mean[k]
                squares[k] += np.square(values - part).sum() + step**2 * count * n / (count + n)
                mean[k] += step * n / (count + n)
            count += len(z)
        stds = np.sqrt(squares / (count - 1))
        rows += [
            {"kernel": kernel, "samples": size, "mean": m, "std": s}
            for kernel, m, s in zip(kernels, mean.tolist(), stds.tolist(), strict=True)
        ]
    return rows


@checked
def over_runs(frame: pd.DataFrame, columns: Sequence[str], level: float = 0.95) -> pd.DataFrame:
    """Median of `columns` over runs, per scenario, kernel and number of samples, with what a single run may give.

    For every column: the median with `_low`, `_high` (its interval from order statistics, exact for any law), and the 10 % and
    90 % quantiles of a run, `_q10` and `_q90`; `runs` counts them. The interval is open where the runs are too few for one
    (at 95 %: fewer than 6). Raises `ValueError` for a level outside (0, 1).

    >>> scenario = gl.Scenario(gl.Gaussian(0.1, 0.2), gl.Gaussian(0, 1))
    >>> frame = gl.tails.over_runs(gl.tails.running(["k3"], scenario, [10, 100], runs=8), ["mean"])
    >>> frame["runs"].tolist(), bool((frame["mean_low"] <= frame["mean_high"]).all())
    ([8, 8], True)
    """
    check_columns(frame, "scenario", "kernel", "samples", "kl", *columns)
    check_probability("level", level)
    rows = []
    for (scenario, kernel, samples), part in frame.groupby(["scenario", "kernel", "samples"], sort=False):
        runs = len(part)
        row: dict[str, Any] = {
            "scenario": scenario,
            "kernel": kernel,
            "samples": samples,
            "via": "sampled",
            "kl": part["kl"].iloc[0],
        }
        for column in columns:
            values = part[column].to_numpy()
            interval: Any = scipy.stats.quantile_test(values, p=0.5).confidence_interval(level)
            low, high = (-np.inf, np.inf) if np.isnan(interval.low) else (interval.low, interval.high)
            ends = {"": np.median(values), "_low": low, "_high": high}
            ends |= {"_q10": np.quantile(values, 0.1), "_q90": np.quantile(values, 0.9)}
            row |= {f"{column}{end}": value for end, value in ends.items()}
        rows.append({**row, "runs": runs})
    return pd.DataFrame(rows)


@checked
def dropped(scenario: Scenario, sizes: Iterable[int], runs: int | None = None, seed: int = 0) -> pd.DataFrame:
    """The sample mean of k3 over its expectation when a bandit's k3 takes two values: one rare token against all the rest.

    The rare token is met a binomial number of times, so quantiles over runs are exact (`runs=None`); or `runs` multinomial
    samples are counted. Returns `scenario, kl, probability` (of the rare token), `samples, via`, the median `mean_ratio`,
    its quantiles `_q10, _q90`, in sampled rows `_low, _high`, and `p_never_sampled`, the probability of never meeting the token.
    Raises `ValueError` unless k3 takes exactly two values.

    >>> scenario = gl.Scenario(gl.Bandit([-8.0, 0.0, 0.0]), gl.Bandit([0.0, 0.0, 0.0]))
    >>> frame = gl.tails.dropped(scenario, [100, 1_000_000])
    >>> frame["mean_ratio"].round(2).tolist()
    [0.18, 1.0]
    """
    for size in sizes:
        check_whole("each of sizes", size)
    if runs is not None:
        check_whole("runs", runs)
    if not is_of(scenario, Bandit):
        raise ValueError(f"dropped() needs a gl.Bandit, got {type(scenario.policy).__name__}")
    p, _, value = _tokens(scenario)
    rare = np.isclose(value, value[p.argmin()], rtol=1e-9, atol=0)
    if rare.sum() != 1 or np.ptp(value[~rare]) > 1e-9 * value.max():
        raise ValueError("k3 must take two values: the policy is the reference with one token's probability changed")
    probability, high, low, kl = float(p[rare][0]), float(value[rare][0]), float(value[~rare].mean()), scenario.kl()
    rows = []
    for n in sizes:
        row: dict[str, Any] = {"scenario": scenario.label, "kernel": "k3", "kl": kl, "probability": probability, "samples": n}
        if runs is None:
            counts = scipy.stats.binom(n, probability).ppf([0.5, 0.1, 0.9])
            row |= dict(
                zip(("mean_ratio", "mean_ratio_q10", "mean_ratio_q90"), (low + (high - low) * counts / n) / kl, strict=True)
            )
            row |= {"via": "exact", "runs": pd.NA}
        else:
            rng = generator(seed, "tails.dropped", int(n))
            means = rng.multinomial(n, p / p.sum(), size=runs) @ value / n
            drawn = pd.DataFrame({"scenario": scenario.label, "kernel": "k3", "kl": kl, "samples": n, "mean_ratio": means / kl})
            row |= {str(key): value for key, value in over_runs(drawn, ["mean_ratio"]).iloc[0].items()}
        rows.append({**row, "p_never_sampled": float(np.exp(n * np.log1p(-probability)))})
    return pd.DataFrame(rows)


# ---- χ² and what it predicts -----------------------------------------------------------------------------------------------


@checked
def chi2(scenario: Scenario) -> float:
    """`χ²(ref‖π)` summed over the steps of a response, prefixes from the policy: `E_π Σ_t Var[δ_t | s_t]`; may be `inf`.

    >>> round(gl.tails.chi2(gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1))), 6)  # e − 1
    1.718282
    """
    policy, reference = scenario.policy, scenario.reference
    return 2 * float(policy.occupancy() @ policy.family.chi2(reference.table, policy.table))


@checked
def variances(scenarios: Sequence[Scenario], estimator: str = "k3-loss") -> pd.DataFrame:
    """χ²(ref‖π) beside what it is said to predict: the variance of the coefficient and of the gradient of k3 as loss.

    One row per scenario: `chi2` (summed over steps), `coefficient_variance` (`E Σ_t a_t²` of the centred coefficients, missing
    for Gaussians), `trace_cov` of the gradient, `noise` (over the squared norm of the true gradient), and `coefficient_ratio`,
    `gradient_ratio` (each over `chi2`). On logits `gradient_ratio < 2` on trees, whose steps are uncorrelated: `‖score‖² < 2`.

    >>> frame = gl.tails.variances([gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1]))])
    >>> frame["chi2"].item() > 0.1, abs(round(frame["trace_cov"].item(), 12))  # no variance of the gradient for two equal tokens
    (True, 0.0)
    """
    check_name("estimator", estimator, ESTIMATORS)
    loss, rows = ESTIMATORS[estimator], []
    with one_thread(), torch.no_grad():
        for scenario in scenarios:
            moments, size = exact.moments(loss, scenario), float(exact.gradient("reverse_kl", scenario).square().sum())
            spread, coefficient = chi2(scenario), float("nan")
            if not is_of(scenario, Gaussian):
                rollout = Rollout.enumerated(scenario)
                a = coefficients(loss, rollout).score * rollout.mask_float
                coefficient = float(rollout.weight @ a.square().sum(-1))
            family = scenario.family
            both = np.isinf(spread) and np.isinf(moments.trace_cov)
            row = {"chi2": spread, "coefficient_variance": coefficient, "trace_cov": moments.trace_cov}
            noise = moments.trace_cov / size if size > 0 else float("nan")
            ratio = float("nan") if both or spread == 0 else moments.trace_cov / spread
            row |= {"noise": noise, "coefficient_ratio": coefficient / spread, "gradient_ratio": ratio}
            rows.append(
                {
                    "scenario": scenario.label,
                    "family": family,
                    "estimator": estimator,
                    "via": "exact",
                    "kl": scenario.kl(),
                    **row,
                }
            )
    return pd.DataFrame(rows)


@checked
def rank_correlations(frame: pd.DataFrame, by: Sequence[str], columns: Sequence[str] = ("trace_cov", "noise")) -> pd.DataFrame:
    """Spearman's rank correlation of `chi2` with each column among the scenarios of a group: `rank_trace_cov`, …; `scenarios`.

    >>> policies = [gl.Bandit.random(5, seed) for seed in range(8)]
    >>> frame = gl.tails.variances([gl.Scenario(p, p.perturbed(scale=0.5, seed=1)) for p in policies]).assign(kind="bandit")
    >>> gl.tails.rank_correlations(frame, ["kind"])[["kind", "scenarios"]].values.tolist()
    [['bandit', 8]]
    """
    check_columns(frame, "chi2", *by, *columns)
    rows = []
    for key, part in frame.groupby(list(by), sort=False):
        ranks = {f"rank_{column}": float(scipy.stats.spearmanr(part["chi2"], part[column]).statistic) for column in columns}
        rows.append({**dict(zip(by, key, strict=True)), "scenarios": len(part), "via": "exact", **ranks})
    return pd.DataFrame(rows)


# ---- tail indices ----------------------------------------------------------------------------------------------------------


@checked
def hill(values: Sequence[float] | Array, k: int) -> float:
    """Hill's estimate of the tail index `α`, `P(x > t) ~ t^{−α}`, from the `k` largest of the values' magnitudes.

    `1/α = (1/k) Σ_{i≤k} log(x_(i) / x_(k+1))`; its relative standard error is `1/√k` where the tail is a pure power.
    Raises `ValueError` unless `1 ≤ k` and there are more than `k` non-zero values. Source: Hill (1975), Ann. Statist. 3.

    >>> import numpy as np
    >>> index = gl.tails.hill(np.random.default_rng(0).pareto(2.0, 100_000) + 1, k=5_000)
    >>> abs(index - 2) < 0.1
    True
    """
    magnitude = np.abs(numbers("values", values))
    magnitude = magnitude[magnitude > 0]
    if not 1 <= k < len(magnitude):
        raise ValueError(
            f"Hill's estimate from the k = {k} largest values needs more than k non-zero ones, got {len(magnitude)}"
        )
    top = np.sort(np.partition(magnitude, len(magnitude) - k - 1)[-k - 1 :])
    return float(1 / np.mean(np.log(top[1:] / top[0])))


@checked
def tail_index(scenario: Scenario) -> float:
    """Exact tail index `α` of `δ = ref/π` under a Gaussian policy, `P(δ > t) ~ t^{−α}` up to powers of `log t`.

    `α = 1/(1 − σ²/σ_ref²)` where the policy is narrower than the reference; `inf` where it is as wide (log-normal tail) or
    wider (bounded). The variance of k3 is finite iff `α > 2`, that is `σ² > σ_ref²/2` (arXiv 2510.01555, App. I).
    Raises `ValueError` for other policies: with finitely many tokens there is no tail, only a largest share.

    >>> round(gl.tails.tail_index(gl.Scenario(gl.Gaussian(0, 0.5), gl.Gaussian(0, 1))), 6)
    1.333333
    """
    if not is_of(scenario, Gaussian):
        raise ValueError(
            f"a tail index needs a gl.Gaussian, got {type(scenario.policy).__name__}; see `largest_second` instead"
        )
    ratio = float((scenario.policy.table[0, 1] / scenario.reference.table[0, 1]).square())
    return 1 / (1 - ratio) if ratio < 1 else float("inf")
