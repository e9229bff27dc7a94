"""What a trust region removes of a loss's gradient, of its reward's part and of its KL's, and from which tokens.

Every token has a coefficient on its score, with the trust region and without. Their difference is what is removed: counted positive,
in shares of the coefficients without it, or along the expected gradient without it. A token is over-sampled where the policy gives it
more than the reference does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from scipy import optimize
from torch import Tensor

from gradlab._common.arguments import check_columns, checked, numbers
from gradlab._common.names import check_name, check_positive
from gradlab.estimators.closed_form import alone, of_advantage
from gradlab.estimators.coefficients import Coefficients
from gradlab.estimators.policy_loss import PolicyLoss, log_ratio
from gradlab.groups import given_others
from gradlab.measure import one_thread
from gradlab.moments import gathered
from gradlab.policies import Bandit, Tree
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, check_scenario

P = TypeVar("P", Bandit, Tree)

COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "family": "kind of its policies",
    "kl": "KL(policy ‖ reference) of whole responses, nats",
    "lag": "KL(behaviour ‖ policy) of whole responses, nats",
    "estimator": "name of the loss",
    "part": "`reward`: the loss at β = 0; `KL`: what its regulariser adds",
    "via": "exact",
    "removed": "expected |coefficient| that the trust region removes, over the expected |coefficient| without it",
    "over": "the part of `removed` on over-sampled tokens, ℓ > 0",
    "under": "the part of `removed` on under-sampled tokens, ℓ < 0",
    "above": "the part of `removed` on tokens whose ratio to the old policy is above 1",
    "below": "the part of `removed` on tokens whose ratio to the old policy is below 1",
    "rare": f"share of what is removed above on tokens that the old policy gives less than {0.2:g}",
    "offered": "share of the expected |coefficient| without the trust region on over-sampled tokens",
    "lost": "1 − ⟨E g, E g'⟩ / ‖E g'‖² of the expected gradients with and without the trust region",
    "bias": "‖E g − E g'‖ / ‖E g'‖",
}

#: Tokens less likely than this are rare: those that an upper bound keeps small, as DAPO has it.
RARE = 0.2
#: Coefficients whose share is below this are rounding.
ROUNDING = 1e-12


@checked
def after_steps(policy: P, direction: Tensor, lag: float) -> P:
    """The policy after a step along `−direction` `[p]`, at `KL(policy ‖ result) = lag` nats: where repeated updates on old data lead.

    Raises `ValueError` for a lag that is not positive, and where the direction never reaches it.

    >>> policy = gl.Bandit([0.0, 0.5, 1.0])
    >>> scenario = gl.Scenario(policy, policy, reward=gl.TableReward(policy, [1.0, 0.0, 0.0]))
    >>> moved = gl.clips.after_steps(policy, gl.exact.gradient("reward", scenario), 0.1)
    >>> round(float(policy.kl(moved)), 9)
    0.1
    """
    if not isinstance(policy, Bandit | Tree):
        raise ValueError(f"policy must be a gl.Bandit or a gl.Tree, got {policy!r:.60}")
    check_positive("lag", lag)
    direction = torch.from_numpy(numbers("direction", direction))
    if direction.shape != policy.parameters.shape or not float(direction.norm()) > 0:
        raise ValueError(
            f"direction is a gradient of {policy.parameters.numel()} parameters, not all 0, got {direction.tolist()!r:.60}"
        )
    unit = direction / direction.norm()

    def excess(log_size: float) -> float:
        return float(policy.kl(policy.moved(-float(np.exp(log_size)) * unit))) - lag

    high = -5.0
    while excess(high) < 0:
        high += 0.5
        if high > np.log(500):
            raise ValueError(f"no step in this direction leads {lag} nats away; take a smaller lag")
    low = high - 0.5
    while excess(low) > 0:
        low -= 2.0
    return policy.moved(-float(np.exp(optimize.brentq(excess, low, high, xtol=1e-14))) * unit)


@checked
def removed(losses: Mapping[str, PolicyLoss], scenarios: Sequence[Scenario]) -> pd.DataFrame:
    """What the trust region of each loss removes, exactly: one row per scenario × loss × part, see `COLUMNS`.

    losses: by name, each with a `clip`, a `mask`, a `truncate` or a `dual_clip` on tokens; one with a regulariser has a part `KL`.
    scenarios: bandits and trees with a reward. Shares of nothing are missing. Raises `ValueError` for a loss without a trust region,
    and where the groups of a reward are too many to list.

    >>> policy = gl.Bandit([0.0, 0.5, 1.0])
    >>> reward = gl.TableReward(policy, [1.0, 0.0, 0.0])
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.1), gl.off_policy.at_lag(policy, 0.1), reward=reward)
    >>> frame = gl.clips.removed({"PPO": gl.PolicyLoss("mean", 4, ratio="token", clip=0.2)}, scenario)
    >>> frame["part"].tolist(), bool(frame["removed"].between(0, 1).all())
    (['reward'], True)
    """
    if not isinstance(losses, Mapping) or not losses:
        raise ValueError(f"losses must be a mapping of names to gl.PolicyLoss, got {losses!r}")
    for name, loss in losses.items():
        if not isinstance(loss, PolicyLoss) or free(loss) == loss:
            raise ValueError(f"{name} must be a gl.PolicyLoss with a trust region, such as clip=0.2, got {loss!r}")
    rows = []
    for scenario in scenarios:
        check_scenario(scenario)
        if not isinstance(scenario.policy, Bandit | Tree):
            raise ValueError(f"clips are looked at on a gl.Bandit or a gl.Tree, got {type(scenario.policy).__name__}")
        with one_thread(), torch.no_grad():
            rollout = Rollout.enumerated(scenario)
            common = [scenario.label, scenario.family, scenario.kl(), scenario.lag()]
            for name, loss in losses.items():
                for part in ("reward", "KL") if loss.regulariser is not None else ("reward",):
                    rows.append([*common, name, part, "exact", *_shares(loss, part, rollout).values()])
    return pd.DataFrame(rows, columns=list(COLUMNS))


@checked
def sides(frame: pd.DataFrame, other: str, by: Sequence[str] = ("family",)) -> pd.DataFrame:
    """Which side what is removed lies on, over the scenarios of every cell of `by`, part and loss.

    Reads a frame of `removed`. Columns `by`, `part, estimator, via`, the mean `removed` and `offered`, the shares `over_share`,
    `above_share` and `rare_share` of what is removed that lies on over-sampled tokens, on ratios above 1, and (of the latter) on rare
    tokens, `relative` (over what the loss `other` removes), and the median `bias`. Shares of nothing are missing.
    Raises `ValueError` for a loss that the frame does not have.

    >>> import pandas as pd
    >>> columns = ["family", "part", "estimator", "via", "removed", "over", "above", "rare", "offered", "bias"]
    >>> rows = [["bandit", "KL", "a", "exact", 0.5, 0.375, 0.125, 1.0, 0.5, 0.2], ["bandit", "KL", "b", "exact", 0.125, 0, 0, None, 0.5, 0]]
    >>> gl.clips.sides(pd.DataFrame(rows, columns=columns), "a")[["estimator", "over_share", "relative"]].values.tolist()
    [['a', 0.75, 1.0], ['b', 0.0, 0.25]]
    """
    keys = [*by, "part", "estimator", "via"]
    check_columns(frame, *keys, "removed", "over", "above", "rare", "offered", "bias")
    check_name("estimator", other, dict.fromkeys(frame["estimator"]))
    groups = frame.assign(rare=(frame["rare"] * frame["above"]).fillna(0.0)).groupby(keys, sort=False)
    found = groups[["removed", "over", "above", "rare", "offered"]].mean()
    some = found["removed"] > ROUNDING
    found["over_share"] = (found["over"] / found["removed"]).where(some)
    found["above_share"] = (found["above"] / found["removed"]).where(some)
    found["rare_share"] = (found["rare"] / found["above"]).where(found["above"] > ROUNDING)
    found["bias"] = groups["bias"].median()
    found = found.reset_index()
    base = found[found["estimator"] == other][[*by, "part", "removed"]].rename(columns={"removed": "base"})
    found = found.merge(base, on=[*by, "part"], how="left")
    found["relative"] = found["removed"] / found["base"].where(found["base"] > ROUNDING)
    return found[[*keys, "removed", "offered", "over_share", "above_share", "rare_share", "relative", "bias"]]


@checked
def free(loss: PolicyLoss) -> PolicyLoss:
    """The loss without its trust region: no clip, truncation or mask; its correction for the engine stays.

    >>> gl.clips.free(gl.PolicyLoss("mean", 4, ratio="token", clip=0.2)) == gl.PolicyLoss("mean", 4, ratio="token")
    True
    """
    if not isinstance(loss, PolicyLoss):
        raise ValueError(f"a loss is a gl.PolicyLoss, got {loss!r}")
    return replace(loss, clip=None, clip_form="min", dual_clip=None, truncate=None, mask=None, negative_mask=None)


def _shares(loss: PolicyLoss, part: str, rollout: Rollout) -> dict[str, float]:
    advantage, chance = given_others(loss, rollout)
    ratio, sides = log_ratio(loss, rollout), rollout.log_ratio
    old = rollout.log_prob - ratio
    total, gone = torch.zeros_like(rollout.mask_float), torch.zeros_like(rollout.mask_float)
    means = [torch.zeros_like(total), torch.zeros_like(total)]
    for values, probability in zip(advantage.T, chance, strict=True):
        bounded, whole = (_part(each, part, rollout, values) for each in (loss, free(loss)))
        total, gone = total + probability * whole.abs(), gone + probability * (whole - bounded).abs()
        means = [mean + probability * each for mean, each in zip(means, (bounded, whole), strict=True)]

    def expected(of: Tensor, where: Tensor | None = None) -> float:
        return float(rollout.weight @ (of if where is None else of * where).sum(-1))

    size, above = expected(total), expected(gone, ratio > 0)
    if not size > 0:
        return dict.fromkeys(list(COLUMNS)[7:], float("nan"))
    bounded, whole = gathered(rollout, [Coefficients(mean) for mean in means]).mean(rollout.weight)
    norm = float(whole @ whole)
    found: dict[str, Any] = {
        "removed": expected(gone),
        "over": expected(gone, sides > 0),
        "under": expected(gone, sides < 0),
        "above": above,
        "below": expected(gone, ratio < 0),
    }
    return {
        **{name: share / size for name, share in found.items()},
        "rare": expected(gone, (ratio > 0) & (old.exp() < RARE)) / above if above > ROUNDING * size else float("nan"),
        "offered": expected(total, sides > 0) / size,
        "lost": 1 - float(bounded @ whole) / norm if norm > 0 else float("nan"),
        "bias": float((bounded - whole).norm()) / norm**0.5 if norm > 0 else float("nan"),
    }


def _part(loss: PolicyLoss, part: str, rollout: Rollout, advantage: Tensor) -> Tensor:
    """Coefficients `[n, t]` of a loss at given advantages `[n]`: at β = 0, or what the regulariser adds to that."""
    plain = replace(loss, beta=0.0)
    reward = of_advantage(plain, rollout, advantage) + alone(plain, rollout)
    if part == "reward":
        return reward.score
    return (of_advantage(loss, rollout, advantage) + alone(loss, rollout)).score - reward.score
