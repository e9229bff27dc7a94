"""Targets: the objectives an expected gradient can turn out to descend, as differentiable functions of the policy.

A target reads three policies: the one being trained, the reference and the sampler of the prefixes. `frozen_prefix` targets
hold the distribution of prefixes fixed at the sampler's, which is what a per-token loss does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradlab import objectives
from gradlab._common.names import check_name
from gradlab._common.registry import Registry
from gradlab.estimators.kernels import KERNELS
from gradlab.objectives import OBJECTIVES, ScenarioTarget, of_responses
from gradlab.policies import Policy, Tree
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario

Objective = Callable[[Policy, Policy, Policy], Tensor]


@dataclass(frozen=True)
class Target:
    """A named objective: `objective(policy, reference, sampler)` is a scalar in nats, differentiable in the policy's table.

    >>> gl.TARGETS["forward_kl"].statement
    'KL(ref(y) ‖ π(y)) of whole responses'
    """

    name: str
    statement: str
    source: str
    objective: Objective


def _reverse_kl(policy: Policy, reference: Policy, sampler: Policy) -> Tensor:
    # Chain rule: every visit to a row costs that row's KL, and the visits are differentiated too.
    return policy.occupancy() @ policy.family.reverse_kl(policy.table, reference.table)


def _forward_kl(policy: Policy, reference: Policy, sampler: Policy) -> Tensor:
    return reference.occupancy() @ policy.family.forward_kl(policy.table, reference.table)


def _frozen(divergence: str) -> Objective:
    def objective(policy: Policy, reference: Policy, sampler: Policy) -> Tensor:
        rows: Tensor = getattr(policy.family, divergence)(policy.table, reference.table)
        return sampler.occupancy().detach() @ rows

    return objective


def _over_responses(function: Callable[[Rollout], Tensor]) -> Objective:
    def objective(policy: Policy, reference: Policy, sampler: Policy) -> Tensor:
        return of_responses(policy, reference, function)

    return objective


def _mse(policy: Policy, reference: Policy, sampler: Policy) -> Tensor:
    if policy.length == 1:
        return policy.occupancy() @ policy.family.mse(policy.table, reference.table)
    rollout = Rollout.enumerated(Scenario(policy, reference))
    log_ratio, log_ref = rollout.log_ratio.sum(-1), rollout.reference_log_prob.sum(-1)
    total = 0.5 * KERNELS["mse_sampled"].derivative(log_ratio, log_ref).square().sum()  # π − ref
    return total / len(policy.prompts)


_TANG = "Tang & Munos, arXiv 2506.09477"

_OWN = {
    target.name: target
    for target in (
        Target("reverse_kl", "KL(π(y) ‖ ref(y)) of whole responses", "arXiv 2510.01555, Eq. 12", _reverse_kl),
        Target(
            "reverse_kl_frozen_prefix",
            "E_{s~sg(μ)} Σ_t KL(π(·|s_t) ‖ ref(·|s_t)), prefixes not differentiated",
            _TANG,
            _frozen("reverse_kl"),
        ),
        Target("forward_kl", "KL(ref(y) ‖ π(y)) of whole responses", _TANG, _forward_kl),
        Target(
            "forward_kl_frozen_prefix",
            "E_{s~sg(μ)} Σ_t KL(ref(·|s_t) ‖ π(·|s_t)), prefixes not differentiated",
            _TANG,
            _frozen("forward_kl"),
        ),
        Target(
            "chi2_frozen_prefix",
            "E_{s~sg(μ)} Σ_t ½ χ²(π(·|s_t) ‖ ref(·|s_t)), prefixes not differentiated",
            "derived: E_π[(e^ℓ − 1) score] = ∇½χ²(π‖ref)",
            _frozen("chi2"),
        ),
        Target("mse", "½ Σ_y (π(y) − ref(y))² over whole responses", "arXiv 2510.01555, bounded alternatives", _mse),
        Target(
            "mse_frozen_prefix",
            "E_{s~sg(μ)} Σ_t ½ Σ_v (π(v|s_t) − ref(v|s_t))², prefixes not differentiated",
            "arXiv 2510.01555, bounded alternatives",
            _frozen("mse"),
        ),
        Target(
            "k2_value",
            "E_π[½ S²], the value of k2 on whole responses",
            "derived: gradient of the value of k2",
            _over_responses(lambda rollout: 0.5 * rollout.log_ratio.sum(-1).square()),
        ),
        Target(
            "inverse_length",
            "E_π[1/L], in which the reference does not occur",
            "derived: k1 as loss with a 1/L normaliser",
            _over_responses(lambda rollout: 1 / rollout.lengths),
        ),
        Target("zero", "nothing", "k1 as loss: arXiv 2510.01555 §5", lambda policy, *_: 0.0 * policy.table.sum()),
    )
}

#: Names → targets of three policies, in the order of tables; those that read a reward or have parameters are `OBJECTIVES`.
TARGETS: Registry[Target] = Registry("target", _OWN)


def target(name: str) -> Target | ScenarioTarget:
    """Look a target up, one of three policies or of a whole scenario. Raises `ValueError` for an unknown name, with the nearest."""
    if isinstance(name, str) and name in OBJECTIVES:
        return OBJECTIVES[name]
    check_name("target", name, [*TARGETS, *OBJECTIVES])
    return TARGETS[name]


def value(name: str, policy: Policy, scenario: Scenario, **parameters: Any) -> Tensor:
    """The objective of a target at `policy`, with the scenario's other policies and its reward.

    Raises `ValueError` for an unknown name, for parameters that are missing or that the target does not have, and where the scenario
    has no reward that is needed.
    """
    chosen = target(name)
    if isinstance(chosen, ScenarioTarget):
        return chosen.objective(policy, scenario, **objectives.given(chosen, parameters))
    for parameter in parameters:
        raise ValueError(f"target {name!r} has no parameters, got {parameter}; those that have are {_parametrised()}")
    return chosen.objective(policy, scenario.reference, scenario.sampler)


def _parametrised() -> str:
    return ", ".join(f"{each.name} ({', '.join(each.parameters)})" for each in OBJECTIVES.values() if each.parameters)


def check_target(target: Target) -> None:
    """Raise `ValueError` unless a target's objective is a finite scalar that is differentiable in the policy."""
    policy = Tree.random(3, 2, seed=1)
    scenario = Scenario(policy, policy.perturbed(scale=0.3, seed=2), policy.perturbed(scale=0.3, seed=3))
    try:
        with torch.enable_grad():
            leaf = policy.parameters.clone().requires_grad_(True)
            value = target.objective(policy.with_parameters(leaf), scenario.reference, scenario.sampler)
            scalar = isinstance(value, Tensor) and value.shape == () and bool(torch.isfinite(value.detach()))
            if not scalar or not value.requires_grad:
                raise ValueError(f"it gave {value!r:.80}")
            torch.autograd.grad(value, leaf)
    except Exception as error:
        raise ValueError(
            f"the objective of target {target.name} must be a function of policy, reference and sampler that returns one number "
            f"as a tensor, differentiable in policy.table: {type(error).__name__}: {error}"
        ) from error


def gradient_by_autograd(name: str, scenario: Scenario, **parameters: Any) -> Tensor:
    """Gradient of a target with respect to the policy's parameters, `[p]`, by autograd through its definition."""
    with torch.enable_grad():
        leaf = scenario.policy.parameters.detach().clone().requires_grad_(True)
        policy = scenario.policy.with_parameters(leaf)
        (grad,) = torch.autograd.grad(value(name, policy, scenario, **parameters), leaf)
    return scenario.policy.balanced(grad)
