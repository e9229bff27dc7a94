"""Targets of the whole objective: rewards, their utilities, entropy, and the reward less the KL, each to be descended.

They read a whole scenario, its reward among the rest, and some take parameters. A policy-gradient loss descends the negative of
what it is meant to raise, so the signs here are those of a loss: `reward` is `−E r`, `regularised` is `−E r + β KL`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradlab._common.names import check_name, check_real, check_whole
from gradlab._common.registry import Registry
from gradlab.policies import Gaussian, LanguageModel, Policy
from gradlab.rewards import Reward, TableReward, given_reward
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario


@dataclass(frozen=True)
class ScenarioTarget:
    """A named objective of a whole scenario: `objective(policy, scenario, **parameters)` is a scalar, differentiable in the policy.

    parameters: the names of those that are given, such as `beta`; all are needed.
    """

    name: str
    statement: str
    source: str
    objective: Callable[..., Tensor]
    parameters: tuple[str, ...] = ()


def of_responses(
    policy: Policy, reference: Policy, function: Callable[[Rollout], Tensor], reward: Reward | None = None
) -> Tensor:
    """`E_π[f(y)]`, as a weighted sum over all responses in which the policy's probability is differentiated."""
    rollout = Rollout.enumerated(Scenario(policy, reference, reward=reward))
    log_prob, weight, values = rollout.log_prob.sum(-1), rollout.weight.detach(), function(rollout)
    # Probabilities sum to 1, so a constant has no gradient: leaving out the likeliest response's value, none cancels.
    usual = values[weight.argmax()].detach()
    return usual * weight.sum() + (weight * (log_prob - log_prob.detach()).exp()) @ (values - usual)


def expected_reward(policy: Policy, scenario: Scenario) -> Tensor:
    """`E_π r`, mean over prompts; by visits to the rows of a table where the reward is one."""
    reward = given_reward(scenario.reward)
    if isinstance(reward, TableReward) and not isinstance(policy, Gaussian | LanguageModel):
        rows = (policy.table.softmax(-1) * (reward.table - reward.table.amax(-1, keepdim=True))).sum(-1)
        visits = policy.occupancy()
        return visits @ (rows + reward.table.amax(-1))
    return of_responses(policy, scenario.reference, lambda rollout: rollout.rewards, reward)


def success(policy: Policy, scenario: Scenario) -> Tensor:
    """Success probability `p_x` of a binary reward for every prompt, `[prompts]`. Raises `ValueError` for rewards but 0 and 1."""
    rollout = Rollout.enumerated(Scenario(policy, scenario.reference, reward=given_reward(scenario.reward)))
    check_binary(rollout.rewards)
    log_prob = rollout.log_prob.sum(-1)
    weight = rollout.weight.detach() * (log_prob - log_prob.detach()).exp()
    if not isinstance(policy, LanguageModel) or rollout.prompts is None:
        return (weight @ rollout.rewards)[None]
    count = len(policy.prompts)  # each has the same share of the weight
    return count * weight.new_zeros(count).index_add(0, rollout.prompts, weight * rollout.rewards)


def check_binary(rewards: Tensor) -> None:
    """Raise `ValueError` unless all rewards are 0 or 1."""
    other = rewards[(rewards != 0) & (rewards != 1)]
    if len(other):
        raise ValueError(
            f"a success probability needs rewards of 0 and 1, got {float(other[0]):g}; threshold the reward, "
            "e.g. lambda rollout: (score(rollout) > 0.5).double()"
        )


def _regularised(policy: Policy, scenario: Scenario, beta: float) -> Tensor:
    check_real("beta", beta)
    if not torch.isfinite(torch.tensor(float(beta))):
        raise ValueError(f"beta must be a finite number, the coefficient of the KL, got {beta!r}")
    divergence = policy.occupancy() @ policy.family.reverse_kl(policy.table, scenario.reference.table.detach())
    return beta * divergence - expected_reward(policy, scenario)


def _pass_at_k(policy: Policy, scenario: Scenario, k: int) -> Tensor:
    check_whole("k", k)
    return ((1 - success(policy, scenario)) ** int(k) - 1).mean()


def _utility(policy: Policy, scenario: Scenario, utility: Any) -> Tensor:
    if not (hasattr(utility, "value") and hasattr(utility, "slope")):
        raise ValueError(f"utility must be a gl.utility(advantage, group=…), with value(p) and slope(p), got {utility!r}")
    p = success(policy, scenario)
    held = p.detach().numpy()
    value, slope = (torch.as_tensor(function(held), dtype=p.dtype) for function in (utility.value, utility.slope))
    return -(value + slope * (p - p.detach())).mean()


def _entropy(policy: Policy, scenario: Scenario) -> Tensor:
    if isinstance(policy, Gaussian):
        return -0.5 * torch.log(2 * torch.pi * torch.e * policy.table[0, 1].square())
    log_p = policy.table.log_softmax(-1)
    return policy.occupancy() @ (log_p.exp() * log_p.clamp(min=-1e300)).sum(-1)


_YAO = "Yao et al., arXiv 2601.10201"

_OWN = {
    target.name: target
    for target in (
        ScenarioTarget(
            "reward", "−E_{y~π} r(y)", "Williams (1992), REINFORCE", lambda policy, scenario: -expected_reward(policy, scenario)
        ),
        ScenarioTarget(
            "regularised", "−E_{y~π} r(y) + β KL(π(y) ‖ ref(y))", "Ouyang et al., arXiv 2203.02155", _regularised, ("beta",)
        ),
        ScenarioTarget(
            "pass_at_k", "−E_x [1 − (1 − p_x)^k], p the success probability of a prompt", "arXiv 2505.15201", _pass_at_k, ("k",)
        ),
        ScenarioTarget("utility", "−E_x U(p_x), U what an advantage ascends: gl.utility", _YAO, _utility, ("utility",)),
        ScenarioTarget("entropy", "−H(π(y)) = E_π log π(y) of whole responses", "Williams & Peng (1991)", _entropy),
    )
}

#: Names → targets of a whole scenario, in the order of tables.
OBJECTIVES: Registry[ScenarioTarget] = Registry("objective", _OWN)


def parameters_of(target: object, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the parameters that a target has."""
    names = target.parameters if isinstance(target, ScenarioTarget) else ()
    return {name: value for name, value in parameters.items() if name in names}


def given(target: ScenarioTarget, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a target. Raises `ValueError` for one that is missing or that it does not have."""
    for name in parameters:
        check_name(f"parameter of target {target.name!r}", name, target.parameters)
    missing = [name for name in target.parameters if name not in parameters]
    if missing:
        example = {"beta": "beta=0.04", "k": "k=4", "utility": "utility=gl.utility('group_std', group=8)"}
        raise ValueError(
            f"target {target.name!r} needs {', '.join(missing)}: give {', '.join(example[name] for name in missing)}"
        )
    return dict(parameters)
