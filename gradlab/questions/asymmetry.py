"""Which tokens carry a gradient: over- and under-sampled sides, tails, and what it takes to bring a token back.

A token is over-sampled where the log-ratio that the kernel reads is positive (`ℓ > 0`, or `S > 0` with credit `sequence`) and
under-sampled where it is negative. With `a` the coefficient a response puts on the score `s` of one of its tokens, and `u` the
true gradient over its norm, the sides share out four totals:

* `mass`, `E Σ|a|`: how much coefficient there is;
* `expected`, `E Σ a ⟨s, u⟩ = ⟨E g, u⟩`: the expected gradient along the true one. Parts are signed and may exceed the whole;
* `pull`, `E Σ|a ⟨s, u⟩|`: the same with every part counted as positive, so that its shares lie between 0 and 1;
* `second`, `E Σ a² ‖s‖² = E‖g‖²`: the second moment, which noise is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gradlab._common.arguments import check_columns, checked
from gradlab._common.names import check_probability, check_seed, several
from gradlab._common.statistics import jackknife
from gradlab._common.streams import generator
from gradlab.estimators.coefficients import coefficients
from gradlab.estimators.estimator import Estimator, log_ratio
from gradlab.measure import ZERO_TOLERANCE, by_name, one_thread
from gradlab.moments import Loss
from gradlab.policies import Bandit, Tree
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, check_scenario, is_of
from gradlab.solvers import exact, montecarlo

Array = np.ndarray[Any, np.dtype[np.float64]]

COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "family": "kind of policy",
    "vocab": "number of tokens v",
    "length": "largest number of tokens T",
    "estimator": "catalogue or composed name",
    "target": "objective whose gradient gives the direction u",
    "via": "exact or sampled",
    "samples": "number of responses (missing when exact)",
    "kl": "KL(policy ‖ reference) of whole responses, nats",
    "under_probability": "share of sampled tokens that are under-sampled",
    "under_mass": "share of E Σ|a| on under-sampled tokens",
    "over_mass": "share of E Σ|a| on over-sampled tokens",
    "under_expected": "share of ⟨E g, u⟩ that comes from under-sampled tokens; signed",
    "over_expected": "share of ⟨E g, u⟩ that comes from over-sampled tokens; signed",
    "under_pull": "share of E Σ|a⟨s, u⟩| on under-sampled tokens",
    "over_pull": "share of E Σ|a⟨s, u⟩| on over-sampled tokens",
    "under_second": "share of E‖g‖² that comes from under-sampled tokens",
    "over_second": "share of E‖g‖² that comes from over-sampled tokens",
    "skewness": "skewness of one response's ⟨g, u⟩",
    "largest_expected": "largest share of Σ|parts of ⟨E g, u⟩| of a single token in its context",
    "largest_second": "largest share of E‖g‖² of a single token in its context",
    "largest_token": "the token with the largest share of E‖g‖²",
    "largest_probability": "how often a response holds that token there",
}
#: Columns with an interval, `_low` and `_high`, in sampled rows.
SAMPLED = ("under_mass", "under_expected", "under_pull", "under_second", "skewness")
_SIDES = ("mass", "expected", "pull", "second")


def measure(
    estimators: Loss | str | Sequence[Loss | str] | Mapping[str, Loss],
    scenarios: Scenario | Sequence[Scenario],
    target: str = "reverse_kl",
    samples: int | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Share out the expected gradient and its second moment between over- and under-sampled tokens.

    estimators: `Estimator`s or catalogue names whose gradient is a coefficient on the scores of the sampled tokens.
    samples: `None` for exact shares; otherwise that many counted draws, with delete-one-batch jackknife intervals of `level`
    (they cannot show a token that was never drawn). Estimators share their draws.

    Returns one row per scenario × estimator with the columns of `COLUMNS`, and `_low`, `_high` of those in `SAMPLED`. Raises
    `ValueError` for policies other than `Bandit` and `Tree`, for callables, for kernels over the whole vocabulary (their
    gradient belongs to no sampled token) and for group baselines.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0, 0]), gl.Bandit([0, 1, 2]))
    >>> frame = gl.asymmetry.measure(["k2-loss", "k3-loss"], scenario)
    >>> frame.set_index("estimator")["under_mass"].round(3).to_dict()
    {'k2-loss': 0.299, 'k3-loss': 0.5}
    """
    losses = {name: _require_scores(name, loss) for name, loss in by_name(estimators).items()}
    listed = several(scenarios)
    if not listed:
        raise ValueError(f"scenarios must hold at least one, got {scenarios!r}")
    check_seed(seed)
    check_probability("level", level)
    if samples is not None:
        montecarlo.check_samples(samples)
    rows = []
    for index, scenario in enumerate(listed):
        check_scenario(scenario)
        if not (is_of(scenario, Bandit) or is_of(scenario, Tree)):
            kind = type(scenario.policy).__name__
            raise ValueError(f"shares are exact sums over tokens: the policy must be a gl.Bandit or a gl.Tree, got {kind}")
        with one_thread(), torch.no_grad():
            rollout, direction = Rollout.enumerated(scenario), exact.gradient(target, scenario)
            size = direction.norm()
            direction = direction / torch.where(size > 0, size, torch.nan)
            weight = rollout.weight[None] if samples is None else _batch_weights(rollout, samples, seed, index)
            common = {
                "scenario": scenario.label,
                "family": scenario.family,
                "vocab": scenario.policy.vocab,
                "length": scenario.policy.length,
                "target": target,
                "via": "exact" if samples is None else "sampled",
                "samples": samples,
                "kl": scenario.kl(),
            }
            for name, estimator in losses.items():
                row = _row(estimator, rollout, direction, weight, level)
                rows.append(
                    {**common, "estimator": name, **row, "largest_token": scenario.policy.parameter_names[row["largest_token"]]}
                )
    columns = []
    for column in COLUMNS:
        columns += [column, *([f"{column}_low", f"{column}_high"] if column in SAMPLED else [])]
    return pd.DataFrame(rows, columns=columns).astype({"samples": "Int64"})


@checked
def per_token(estimator: Estimator | str, scenario: Scenario, target: str = "reverse_kl") -> pd.DataFrame:
    """What every token of every context contributes, exactly; the rows of one context-token pair are summed over responses.

    Columns: `parameter`, `probability` (expected number of times a response holds it), `log_ratio`, and its part of
    `mass`, `expected`, `pull` and `second` (see the module). Raises `ValueError` as `measure` does.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0, 0]), gl.Bandit([0, 1, 2]))
    >>> frame = gl.asymmetry.per_token("k3-loss", scenario)
    >>> frame["parameter"].tolist(), frame["log_ratio"].round(3).tolist()
    (['token 0', 'token 1', 'token 2'], [1.309, 0.309, -0.691])
    """
    ((name, loss),) = by_name(estimator).items()
    with one_thread(), torch.no_grad():
        rollout, direction = Rollout.enumerated(scenario), exact.gradient(target, scenario)
        parts = _parts(_require_scores(name, loss), rollout, direction / direction.norm())
        cells = {what: _cells(part, rollout, rollout.weight).numpy() for what, part in parts.items() if what in _SIDES}
        probability = _cells(rollout.mask_float, rollout, rollout.weight).numpy()
        log_ratio = (scenario.policy.table.log_softmax(-1) - scenario.reference.table.log_softmax(-1)).flatten().numpy()
    return pd.DataFrame(
        {"parameter": scenario.policy.parameter_names, "probability": probability, "log_ratio": log_ratio, **cells}
    )


@checked
def bands(frame: pd.DataFrame, by: Sequence[str], columns: Sequence[str], quantiles: Sequence[float]) -> pd.DataFrame:
    """Quantiles over scenarios: one row per group of `by` × quantile × `quantity` (a column of the frame), in `share`, with the `count`.

    >>> policies = [gl.Bandit.random(5, seed) for seed in range(8)]
    >>> frame = gl.asymmetry.measure("k3-loss", [gl.Scenario(p, p.perturbed(kl=0.3, seed=1)) for p in policies])
    >>> gl.asymmetry.bands(frame, ["estimator"], ["under_mass"], [0.1, 0.5, 0.9])["share"].round(6).tolist()
    [0.5, 0.5, 0.5]
    """
    check_columns(frame, *by, *columns)
    if not all(0 <= q <= 1 for q in quantiles):
        raise ValueError(f"quantiles must lie between 0 and 1, got {quantiles}")
    rows = []
    for key, part in frame.groupby(list(by), sort=False):
        for column in columns:
            values = part[column].dropna().to_numpy(dtype=float)
            if len(values):
                rows += [[*key, column, q, float(np.quantile(values, q)), len(values)] for q in quantiles]
    return pd.DataFrame(rows, columns=[*by, "quantity", "quantile", "share", "count"])


def _require_scores(name: str, loss: Loss) -> Estimator:
    """Refuse what puts no coefficient on the sampled tokens' scores."""
    if not isinstance(loss, Estimator):
        raise ValueError(f"{name} is a function: only a gl.Estimator has a known coefficient on every sampled token")
    if loss.on_vocabulary or loss.grouped:
        what = "sums over the whole vocabulary" if loss.on_vocabulary else "compares responses"
        raise ValueError(f"{name} {what}, so its gradient cannot be shared out between sampled tokens")
    return loss


def _parts(estimator: Estimator, rollout: Rollout, direction: Tensor) -> dict[str, Tensor]:
    """What every sampled token contributes, `[n, t]`, and its side (−1 under-sampled, 1 over-sampled)."""
    a = coefficients(estimator, rollout).score
    scores = rollout.table, rollout.contexts, rollout.tokens
    along = rollout.family.score_dot(*scores, direction.view_as(rollout.table))
    side = log_ratio(estimator, rollout).sign().expand_as(a) * rollout.mask_float
    norm = rollout.family.score_norm(*scores)
    expected = a * along
    return {"mass": a.abs(), "expected": expected, "pull": expected.abs(), "second": a.square() * norm, "side": side}


def _cells(part: Tensor, rollout: Rollout, weight: Tensor) -> Tensor:
    """Sum a part over responses into context-token pairs, `[p]`."""
    flat = (rollout.contexts * rollout.table.shape[-1] + rollout.tokens).flatten()
    return part.new_zeros(rollout.table.numel()).index_add_(0, flat, (part * rollout.mask_float * weight[:, None]).flatten())


def _row(estimator: Estimator, rollout: Rollout, direction: Tensor, weight: Tensor, level: float) -> dict[str, Any]:
    """All columns of one estimator, from one set of weights or from batches of them, `[b, n]`."""
    parts = _parts(estimator, rollout, direction)
    side, x = parts["side"], parts["expected"].sum(-1)
    columns = [(parts[what] * (side == sign)).sum(-1) for what in _SIDES for sign in (-1, 1, 0)]
    columns += [((side < 0) * rollout.mask_float).sum(-1), rollout.lengths, x, x**2, x**3]
    sums = (weight @ torch.stack(columns, -1).to(weight.dtype)).numpy()
    row = _statistics(sums.mean(0))
    if len(sums) > 1:
        batches = len(sums)
        left_out = _statistics((sums.sum(0) - sums) / (batches - 1))
        for column in SAMPLED:
            half_width = jackknife(left_out[column], level)
            row[f"{column}_low"], row[f"{column}_high"] = row[column] - half_width, row[column] + half_width
    pooled = weight.mean(0)
    expected, second = (_cells(parts[what], rollout, pooled).abs().numpy() for what in ("expected", "second"))
    largest = int(second.argmax())
    with np.errstate(invalid="ignore"):  # of a gradient that is 0 nothing is the largest part
        row["largest_expected"], row["largest_second"] = expected.max() / expected.sum(), second.max() / second.sum()
    row |= {
        "largest_token": largest,
        "largest_probability": float(_cells(rollout.mask_float, rollout, rollout.weight)[largest]),
    }
    return row


def _statistics(sums: Array) -> dict[str, Any]:
    """Shares and skewness from the sums of `_row`, the last axis."""
    under_tokens, tokens, mean, square, cube = np.moveaxis(sums[..., 3 * len(_SIDES) :], -1, 0)
    statistics: dict[str, Any] = {"under_probability": under_tokens / tokens}
    for i, what in enumerate(_SIDES):
        parts = sums[..., 3 * i : 3 * i + 3]
        total = parts.sum(-1)
        total = np.where(np.abs(total) <= ZERO_TOLERANCE * np.abs(parts).sum(-1), np.nan, total)  # of nothing there is no share
        statistics[f"under_{what}"], statistics[f"over_{what}"] = (parts[..., side] / total for side in (0, 1))
    variance = np.maximum(square - mean**2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        statistics["skewness"] = (cube - 3 * mean * square + 2 * mean**3) / variance**1.5
    return statistics


def _batch_weights(rollout: Rollout, samples: int, seed: int, index: int) -> Tensor:
    """Weights of independent batches of counted draws, `[b, n]`; their mean is the weight of the whole run."""
    rng = generator(seed, "asymmetry", index)
    batches = max(1, min(montecarlo.BATCHES, samples // 16))
    if samples % batches:
        raise ValueError(f"samples must be a multiple of the {batches} batches that error bars come from, got {samples}")
    return rollout.multinomial_weights(samples // batches, batches, rng)
