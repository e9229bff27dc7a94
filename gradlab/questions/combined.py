"""What a KL regulariser weighs in a whole loss: combined with the advantage, in a head of its own, or as a term beside the reward.

A loss with its coefficient β less the same loss at β = 0 is what the regulariser contributes, `Δ`. Along the gradient of the reverse
KL it has the *effective coefficient* `⟨Δ, ∇KL⟩ / ‖∇KL‖²`, which is β where `Δ = β ∇KL`. The rest of the loss has, along the gradient
of the reward, a weight of its own, `U'(p)` of a success probability (identity 14), so that the optimum is that of the ratio of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from torch import Tensor

from gradlab._common.arguments import check_columns, checked
from gradlab._common.names import check_name, check_real, several
from gradlab._common.statistics import power_law
from gradlab.estimators.policy_loss import PolicyLoss
from gradlab.measure import one_thread
from gradlab.moments import Moments
from gradlab.scenario import Scenario, check_scenario
from gradlab.solvers import exact

COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "family": "kind of its policies",
    "kl": "KL(policy ‖ reference) of whole responses, nats",
    "lag": "KL(behaviour ‖ policy) of whole responses, nats",
    "success": "expected reward of the policy, the success probability of a reward of 0 and 1",
    "estimator": "name of the loss",
    "coefficient": "β",
    "via": "how the moments were computed",
    "effective": "effective coefficient ⟨Δ, ∇KL⟩ / ‖∇KL‖² of the reverse KL of responses",
    "share": "effective coefficient over β",
    "reward_weight": "weight of the reward's gradient, ⟨E g, ∇(−E r)⟩ / ‖∇E r‖² at β = 0",
    "per_reward": "effective coefficient over the weight of the reward: the β of the regularised reward that is ascended; missing where "
    "the reward has no weight",
    "bias": "‖Δ − β ∇KL‖ / ‖β ∇KL‖",
    "size": "‖Δ‖ / ‖E g at β = 0‖: the regulariser's gradient beside the reward's",
    "noise": "tr Cov of the loss over tr Cov at β = 0",
}

#: Errors and weights below this are rounding, and have no ratio.
ROUNDING = 1e-9


@checked
def contributions(
    losses: Mapping[str, PolicyLoss], scenarios: Sequence[Scenario], coefficients: float | Sequence[float]
) -> pd.DataFrame:
    """What the regulariser of each loss contributes, exactly, at every coefficient: one row per scenario × loss × β, see `COLUMNS`.

    losses: by name, each with a regulariser. scenarios: with a reward. coefficients: numbers above 0.
    Raises `ValueError` for a loss without a regulariser, a coefficient that is not positive, and where exact moments refuse.

    >>> policy = gl.Bandit([0.0, 0.5, 1.0])
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.1), reward=gl.TableReward(policy, [1.0, 0.0, 0.0]))
    >>> loss = gl.PolicyLoss("leave_one_out", group=4, regulariser=gl.Estimator("k1"), combine="before")
    >>> frame = gl.combined.contributions({"RLOO": loss}, scenario, [0.05])
    >>> frame["share"].round(6).tolist(), frame["bias"].round(6).tolist()
    ([1.0], [0.0])
    """
    if not isinstance(losses, Mapping) or not losses:
        raise ValueError(f"losses must be a mapping of names to gl.PolicyLoss, got {losses!r}")
    for name, loss in losses.items():
        if not isinstance(loss, PolicyLoss) or loss.regulariser is None:
            raise ValueError(f"{name} must be a gl.PolicyLoss with a regulariser, got {loss!r}")
    sizes = several(coefficients)
    for size in sizes:
        check_real("a coefficient", size)
        if not size > 0:
            raise ValueError(f"a coefficient must be above 0, got {size}")
    rows = []
    for scenario in scenarios:
        check_scenario(scenario)
        with one_thread():
            kl, reward = exact.gradient("reverse_kl", scenario), exact.gradient("reward", scenario)
            common = {
                "scenario": scenario.label, "family": scenario.family, "kl": scenario.kl(), "lag": scenario.lag(),
                "success": -exact.objective("reward", scenario),
            }  # fmt: skip
            plain = exact.moments([replace(loss, beta=0.0) for loss in losses.values()], scenario)
            for size in map(float, sizes):
                whole = exact.moments([replace(loss, beta=size) for loss in losses.values()], scenario)
                for name, alone, both in zip(losses, plain, whole, strict=True):
                    row = {**common, "estimator": name, "coefficient": size, "via": both.method}
                    rows.append({**row, **_contribution(alone, both, size, kl, reward)})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _contribution(alone: Moments, both: Moments, beta: float, kl: Tensor, reward: Tensor) -> dict[str, Any]:
    delta = both.mean - alone.mean
    effective = float(delta @ kl) / float(kl @ kl)
    norm = float(reward @ reward)
    reward_weight = float(alone.mean @ reward) / norm if norm > 0 else float("nan")
    size = float(alone.mean.norm())
    return {
        "effective": effective,
        "share": effective / beta,
        "reward_weight": reward_weight,
        "per_reward": effective / reward_weight if abs(reward_weight) > ROUNDING else float("nan"),
        "bias": float((delta - beta * kl).norm() / (beta * kl.norm())),
        "size": float(delta.norm()) / size if size > 0 else float("inf"),
        "noise": both.trace_cov / alone.trace_cov if alone.trace_cov > 0 else float("inf"),
    }


@checked
def exponents(frame: pd.DataFrame) -> pd.DataFrame:
    """How a regulariser's weight beside the reward grows with β: the exponent of `per_reward ∝ β^exponent` in every scenario.

    Reads a frame of `contributions` with two or more coefficients; columns `scenario, success, estimator, exponent, via`.

    >>> policy = gl.Bandit([0.0, 0.5, 1.0])
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.1), reward=gl.TableReward(policy, [1.0, 0.0, 0.0]))
    >>> loss = gl.PolicyLoss("group_std", group=4, regulariser=gl.Estimator("k2"))
    >>> gl.combined.exponents(gl.combined.contributions({"k2": loss}, scenario, [0.01, 0.1]))["exponent"].round(6).tolist()
    [1.0]
    """
    check_columns(frame, "scenario", "success", "estimator", "coefficient", "per_reward", "via")
    rows = []
    for (scenario, name), part in frame.groupby(["scenario", "estimator"], sort=False):
        positive = part[part["per_reward"] > 0]
        slope, *_ = power_law(positive["coefficient"].to_numpy(), positive["per_reward"].to_numpy())
        rows.append([scenario, part["success"].iloc[0], name, float(slope), part["via"].iloc[0]])
    return pd.DataFrame(rows, columns=["scenario", "success", "estimator", "exponent", "via"])


@checked
def flatness(frame: pd.DataFrame) -> pd.DataFrame:
    """The effective coefficient at every β over that at the largest: 1 where β does not matter (identity 15).

    Reads a frame of `contributions`; columns `scenario, estimator, coefficient, effective, relative, via`.

    >>> policy = gl.Bandit([0.0, 0.5, 1.0])
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.1), reward=gl.TableReward(policy, [1.0, 1.0, 1.0]))
    >>> loss = gl.PolicyLoss("group_std", group=4, regulariser=gl.Estimator("k1"), combine="before")
    >>> gl.combined.flatness(gl.combined.contributions({"k1": loss}, scenario, [0.01, 0.1]))["relative"].round(6).tolist()
    [1.0, 1.0]
    """
    check_columns(frame, "scenario", "estimator", "coefficient", "effective", "via")
    last = frame.sort_values("coefficient").groupby(["scenario", "estimator"], sort=False)["effective"].transform("last")
    columns = ["scenario", "estimator", "coefficient", "effective", "relative", "via"]
    return frame.assign(relative=frame["effective"] / last)[columns].reset_index(drop=True)


@checked
def against(frame: pd.DataFrame, estimator: str, other: str) -> pd.DataFrame:
    """The error of one loss's contribution over another's in the same scenario: `bias_ratio`, below 1 where the first is nearer.

    Reads a frame of `contributions`; scenarios in which both errors are rounding are left out. Raises `ValueError` for a loss that the
    frame does not have.

    >>> policy = gl.Tree.random(vocab=2, length=2, seed=0)
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.1, seed=1), reward=lambda rollout: rollout.tokens[:, 0].double())
    >>> losses = {k: gl.PolicyLoss("group_std", 4, regulariser=gl.Estimator(k)) for k in ("k2", "k3")}
    >>> bool(gl.combined.against(gl.combined.contributions(losses, scenario, 0.1), "k2", "k3")["bias_ratio"].item() < 1)
    True
    """
    keys = ["family", "scenario", "coefficient", "lag", "via"]
    check_columns(frame, *keys, "estimator", "bias")
    for name in (estimator, other):
        check_name("estimator", name, dict.fromkeys(frame["estimator"]))
    left, right = (frame[frame["estimator"] == name].set_index(keys)["bias"] for name in (estimator, other))
    both = pd.DataFrame({"bias": left, "bias_other": right}).reset_index()
    both = both[both[["bias", "bias_other"]].max(axis=1) > ROUNDING].reset_index(drop=True)
    return both.assign(estimator=estimator, other=other, bias_ratio=both["bias"] / both["bias_other"])
