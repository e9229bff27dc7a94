"""Bias and noise against the distance from the reference: random scenarios, summarised as bands, slopes and batch sizes.

Every scenario is a random policy and a direction in logit space; walking along it gives references at each KL asked for, so
that a slope is fitted within one scenario and a band says how much scenarios differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from gradlab._common.names import check_probability, check_seed, check_whole
from gradlab._common.statistics import power_law
from gradlab._common.streams import child, generator
from gradlab.measure import by_name, one_thread
from gradlab.moments import Loss
from gradlab.policies import Bandit, Gaussian, Markov, Tabular, Tree
from gradlab.policies.perturb import UnreachableKL
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario
from gradlab.solvers import exact, montecarlo

#: How many directions are tried for one that reaches the distances asked for.
DIRECTIONS = 32

Array = npt.NDArray[np.float64]

#: A relative bias below this is rounding: it has no slope.
BIAS_FLOOR = 1e-9
#: Quantiles of a band, besides its ends `min` and `max`.
QUANTILES = {"low": 0.1, "median": 0.5, "high": 0.9}


def sweep(policies: Mapping[str, Tabular | Gaussian], kls: Iterable[float], seed: int = 0) -> list[Scenario]:
    """References at every distance `KL(policy ‖ reference) = kl` (nats) along one random direction per policy.

    The scenario has the policy's name at every distance. A direction that does not reach all distances is replaced by
    another. Raises `ValueError` where none is found.
    """
    distances = [float(kl) for kl in kls]
    return [
        Scenario(policy, reference, name=name)
        for index, (name, policy) in enumerate(policies.items())
        for reference in _along(policy, distances, child(seed, index))
    ]


def _along(policy: Tabular | Gaussian, kls: Sequence[float], seed: int) -> list[Tabular | Gaussian]:
    """References at each distance along the first of some directions that reaches all of them.

    One that only raises a token that is nearly certain takes the others out of float64's range before it is far enough.
    """
    for attempt in range(DIRECTIONS):
        direction = child(seed, attempt) if attempt else seed
        try:
            return [policy.perturbed(kl=kl, seed=direction) for kl in kls]
        except UnreachableKL:
            continue
    raise ValueError(
        f"none of {DIRECTIONS} directions reaches KLs of {', '.join(map(str, kls))} nats from {policy}; ask for less"
    )


def random_policies(family: str, count: int, seed: int = 0) -> dict[str, Tabular | Gaussian]:
    """Random policies by name: bandits of 3–20 tokens; trees of 2–4 tokens, 2–4 steps; chains of 2–5 tokens, 4–16 steps.

    Logits are Gaussian with a standard deviation between 0.5 and 2. Raises `ValueError` for another family.
    """
    rng = generator(seed, "distance.random_policies", family)
    policies: dict[str, Tabular | Gaussian] = {}
    for index in range(count):
        own_seed, scale, name = int(rng.integers(2**31)), float(rng.uniform(0.5, 2)), f"random {family} {index}"
        if family == "bandit":
            policies[name] = Bandit.random(int(rng.integers(3, 21)), own_seed, scale)
        elif family == "tree":
            policies[name] = Tree.random(int(rng.integers(2, 5)), int(rng.integers(2, 5)), own_seed, scale=scale)
        elif family == "markov":
            policies[name] = Markov.random(int(rng.integers(2, 6)), int(rng.integers(4, 17)), own_seed, scale=scale)
        else:
            raise ValueError(f"family must be 'bandit', 'tree' or 'markov', got {family!r}")
    return policies


def compensating(free_layers: int = 2) -> Scenario:
    """The tree on which complete Rao–Blackwell is noisier than sampling: two tokens, `free_layers + 2` steps.

    `ℓ` of the last step cancels that of the step before, so `log π(y)/ref(y)` hardly varies while `Σ_t KL_t` does; before them,
    layers in which policy and reference agree. Two of those are enough for the gradient, none for the value.
    """
    half, layers = [0.5, 0.5], 2**free_layers
    policy = [half] * (layers - 1) + [half] * layers + [half, [0.999, 0.001]] * layers
    reference = [half] * (layers - 1) + [[0.25, 0.75]] * layers + [half, [1 / 3, 2 / 3]] * layers
    name = f"compensating tree, {free_layers + 2} steps"
    return Scenario(Tree(np.log(policy)), Tree(np.log(reference)), name=name)


def sharing() -> Scenario:
    """The chain on which the frozen-prefix form of Rao–Blackwell is noisier than sampling: two tokens, three steps.

    Two steps emit from the row of token 0, and share its logits. There a drawn `ℓ · score` tends to be followed by a step whose
    expected gradient has the opposite sign; summing over the vocabulary gives up that compensation. On a tree, whose steps have
    logits of their own, it cannot happen.
    """
    first, other = [0.9, 0.1], [0.5, 0.5]
    policy, reference = (Markov(np.log(first), np.log([row, other]), length=3) for row in ([0.3, 0.7], [0.99, 0.01]))
    return Scenario(policy, reference, name="sharing chain, 3 steps")


def bands(frame: pd.DataFrame, columns: Sequence[str], by: Sequence[str]) -> pd.DataFrame:
    """Quantiles over scenarios, one row per combination of `by`.

    Columns: `scenarios` (their number) and, for every one of `columns`, its `_low` (10 %), median (under the column's own name),
    `_high` (90 %), `_min` and `_max`. Missing values are left out, infinite ones ranked last.
    """
    groups = frame.groupby(list(by), sort=False, dropna=False)
    # Nearest order statistics, so that an infinite value does not turn into NaN by interpolation.
    ends = {share: groups[list(columns)].quantile(share, interpolation="nearest") for share in (*QUANTILES.values(), 0.0, 1.0)}
    quantiles_by_group: dict[str, Any] = {"scenarios": groups.size()}
    for column in columns:
        for end, share in (*QUANTILES.items(), ("min", 0.0), ("max", 1.0)):
            quantiles_by_group[column if end == "median" else f"{column}_{end}"] = ends[share][column]
    return pd.DataFrame(quantiles_by_group).reset_index()


def slopes(frame: pd.DataFrame, column: str = "bias", points: int = 4) -> pd.DataFrame:
    """Power laws as KL → 0: regression of log `column` on log KL over the `points` smallest KLs of each scenario.

    `column ≈ factor · KL^slope`. Returns one row per scenario × estimator × target with `family, slope, slope_error` (standard
    error of the fit), `factor, kl_min, kl_max, points`; estimators whose values are rounding, or missing, are left out.
    Raises `ValueError` for fewer than three points.
    """
    if points < 3:
        raise ValueError(f"a slope with an error needs at least 3 points, got {points}")
    keys = ["family", "scenario", "estimator", "target"]
    near = frame.sort_values("kl", kind="stable").groupby(keys, sort=False).head(points)
    near = near[near[column] > BIAS_FLOOR]
    counts = near.groupby(keys, sort=False)[column].transform("size")
    near = near[counts == points]
    group = near.groupby(keys, sort=False).ngroup()
    near = near.iloc[np.lexsort((near["kl"], group))]
    kl, value = (near[name].to_numpy(dtype=float).reshape(-1, points) for name in ("kl", column))
    slope, error, factor = power_law(kl, value)
    fit_by_group = near[keys].iloc[::points].reset_index(drop=True).assign(via="exact", statistic=column)
    fits = {"slope": slope, "slope_error": error, "factor": factor}
    return fit_by_group.assign(**fits, kl_min=kl[:, 0], kl_max=kl[:, -1], points=points)


def versus(frame: pd.DataFrame, estimator: str, other: str, target: str = "reverse_kl") -> pd.DataFrame:
    """One estimator over another in the same scenario: `norm_ratio`, `noise_ratio`, `overtaken`.

    `norm_ratio` is `‖E g‖ / ‖E g'‖`, `noise_ratio` `tr Σ / tr Σ'`. From a batch of `overtaken` responses on the other one has the
    smaller mean squared error: `b² + n/B = b'² + n'/B` at `B = (n' − n)/(b² − b'²)`; 0 when the other always has, `inf` when it
    does not have it for good. Rows: one per scenario × KL, with `family, scenario, kl, estimator, other, target, via`.
    """
    keys = ["family", "scenario", "kl", "target", "via"]
    chosen = frame[frame["target"] == target]
    left, right = (chosen[chosen["estimator"] == name].set_index(keys) for name in (estimator, other))
    joined = left.join(right.add_suffix("_other"), how="inner")
    bias_gap, cost = joined["bias"] ** 2 - joined["bias_other"] ** 2, joined["noise_other"] - joined["noise"]
    # Biases of two estimators of one mean differ by rounding only.
    bias_gap = bias_gap.where(bias_gap.abs() > BIAS_FLOOR * (joined["bias"] + joined["bias_other"]), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        meet = (cost / bias_gap).to_numpy()
    overtaken = np.where(bias_gap > 0, np.maximum(meet, 0.0), np.where((bias_gap == 0) & (cost < 0), 0.0, np.inf))
    columns = {
        "estimator": estimator,
        "other": other,
        "norm_ratio": joined["gradient_norm"] / joined["gradient_norm_other"],
        "noise_ratio": joined["trace_cov"] / joined["trace_cov_other"],
        "overtaken": overtaken,
    }
    return pd.DataFrame(columns, index=joined.index).reset_index()


def batches(frame: pd.DataFrame, sizes: Sequence[int]) -> pd.DataFrame:
    """Relative root mean squared error `√(bias² + noise/B)` of a batch of `B` responses, one row per row of `frame` and size."""
    parts = [frame.assign(batch=size, rmse=np.sqrt(frame["bias"] ** 2 + frame["noise"] / size)) for size in sizes]
    return pd.concat(parts, ignore_index=True)


def sampled_rmse(
    estimators: Loss | str | Sequence[Loss | str] | Mapping[str, Loss],
    scenarios: Sequence[Scenario],
    sizes: Sequence[int],
    target: str = "reverse_kl",
    replicates: int = 64,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Median over scenarios of the root mean squared error that batches really had, each drawn `replicates` times.

    The direct route to `√(bias² + noise/B)`. Returns one row per estimator × size with `estimator, batch, via, samples`
    (replicates of a scenario), `rmse` and the ends of its bootstrap interval over replicates, scenarios held fixed. Responses
    are counted, so a policy must be small enough to list them; raises `ValueError` otherwise.
    """
    check_seed(seed)
    check_whole("replicates", replicates)
    check_probability("level", level)
    losses, rows = by_name(estimators), []
    rng = generator(seed, "distance.bootstrap")
    resampled = rng.integers(replicates, size=(400, replicates))
    with one_thread():
        truths = [exact.gradient(target, scenario) for scenario in scenarios]
        for name, loss in losses.items():
            for size in sizes:
                errors = np.stack(
                    [
                        _squared_errors(loss, scenario, truth, size, replicates, child(seed, index))
                        for index, (scenario, truth) in enumerate(zip(scenarios, truths, strict=True))
                    ]
                )
                median = float(_median(errors.mean(-1, keepdims=True))[0])
                resampled_median = _median(errors[:, resampled].mean(-1))
                low, high = np.quantile(resampled_median, [(1 - level) / 2, (1 + level) / 2])
                ends = {"rmse": median, "rmse_low": min(low, median), "rmse_high": max(high, median)}
                rows.append({"estimator": name, "batch": size, "via": "sampled", "samples": replicates, **ends})
    return pd.DataFrame(rows)


def _median(squares: Array) -> Array:
    """Root of the median over scenarios, the median of `bands`."""
    median: Array = pd.DataFrame(squares).quantile(0.5, interpolation="nearest").to_numpy() ** 0.5
    return median


def _squared_errors(loss: Loss, scenario: Scenario, truth: Tensor, size: int, replicates: int, seed: int) -> Array:
    means = montecarlo.replicates(loss, scenario, size, replicates, seed)
    squared: Array = ((means - truth).square().sum(-1) / truth.square().sum()).numpy()
    return squared


def second_order(rollout: Rollout) -> Tensor:
    """`Σ_t sg(½(δ_t − 1)²) log π(y_t|s_t)`, `[n]`: per token, the error claimed for k3 as loss (arXiv 2510.01555)."""
    gap = torch.expm1(-rollout.log_ratio)
    return (0.5 * gap.square().detach() * rollout.log_prob).sum(-1)


def second_order_sequence(rollout: Rollout) -> Tensor:
    """`sg(½(δ − 1)²) log π(y)`, `[n]`, with `δ = ref(y)/π(y)`: the same for the response as one action."""
    gap = torch.expm1(-rollout.log_ratio.sum(-1))
    return 0.5 * gap.square().detach() * rollout.log_prob.sum(-1)


def remainders(scenarios: Sequence[Scenario], credit: str = "token") -> pd.DataFrame:
    """Is the error of k3 as loss `½(δ−1)²`? One row per scenario: what is left of the error once that is taken away.

    `remainder = ‖e − E[½(δ−1)² score]‖ / ‖e‖` with `e = ∇ − E g`, `g` k3 as loss and `∇` the reverse KL of the same credit
    (`token`: frozen prefixes). Exact; for policies that can be enumerated. Raises `ValueError` for an unknown credit.
    """
    claimed: dict[str, tuple[str, str, Callable[[Rollout], Tensor]]] = {
        "token": ("k3-loss", "reverse_kl_frozen_prefix", second_order),
        "sequence": ("k3-loss-sequence", "reverse_kl", second_order_sequence),
    }
    if credit not in claimed:
        raise ValueError(f"credit must be one of {list(claimed)}, got {credit!r}")
    name, target, correction = claimed[credit]
    (loss,) = by_name(name).values()
    rows = []
    with one_thread():
        for scenario in scenarios:
            k3, second = exact.moments([loss, correction], scenario)
            error = exact.gradient(target, scenario) - k3.mean
            left = float((error - second.mean).norm() / error.norm())
            family = scenario.family
            common = {"family": family, "scenario": scenario.label, "estimator": name, "target": target, "credit": credit}
            rows.append({**common, "via": "exact", "kl": scenario.kl(), "remainder": left})
    return pd.DataFrame(rows)
