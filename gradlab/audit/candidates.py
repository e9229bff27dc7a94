"""What an expected gradient is compared with: the targets of gradlab, and a few more that explain mistakes."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from gradlab._common.names import check_name
from gradlab.audit import divergences
from gradlab.audit.parts import REWARDS
from gradlab.audit.worlds import AuditScenario, tempered
from gradlab.policies import Policy, Tree
from gradlab.scenario import Scenario
from gradlab.solvers import exact
from gradlab.targets import TARGETS, Objective, Target

_DERIVED = "derived"


def _at_prefixes(rows: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    """`E_{s~sg(μ)} Σ_t f(π(·|s_t), ref(·|s_t))` from log-probabilities `[r, v]`."""

    def objective(policy: Policy, reference: Policy, sampler: Policy) -> Tensor:
        return sampler.occupancy().detach() @ rows(policy.table.log_softmax(-1), reference.table.log_softmax(-1))

    return objective


def _mixture(x: Tensor, y: Tensor) -> Tensor:
    middle = torch.stack([x, y]).logsumexp(0) - torch.log(torch.tensor(2.0, dtype=x.dtype))
    return 0.5 * ((x.exp() * (x - middle)).sum(-1) + (y.exp() * (y - middle)).sum(-1))


def _behaviour(policy: Policy, reference: Policy, sampler: Policy) -> Tensor:
    table = sampler.table.detach()
    return sampler.occupancy().detach() @ policy.family.forward_kl(policy.table, table)


def _entropy(policy: Policy, reference: Policy, sampler: Policy) -> Tensor:
    log_prob = policy.table.log_softmax(-1)
    return -policy.occupancy() @ (log_prob.exp() * log_prob).sum(-1)


def _on_policy(name: str) -> Objective:
    def objective(policy: Policy, reference: Policy, sampler: Policy) -> Tensor:
        return TARGETS[name].objective(policy, reference, policy)

    return objective


_k2_value = _at_prefixes(lambda x, y: 0.5 * (x.exp() * (x - y).square()).sum(-1))
_total_variation = _at_prefixes(lambda x, y: 0.5 * (x.exp() - y.exp()).abs().sum(-1))
_row_entropy = _at_prefixes(lambda x, y: -(x.exp() * x).sum(-1))
_GKD = "GKD, arXiv 2306.13649"

#: Objectives that only the audit looks for, in the order of preference; on-policy some coincide with a target.
EXTRAS: dict[str, Target] = {
    name: Target(name, statement, source, objective)
    for name, statement, source, objective in (
        ("reverse_kl_policy_prefix", "E_{s~sg(π)} Σ_t KL(π ‖ ref)", _DERIVED, _on_policy("reverse_kl_frozen_prefix")),
        ("forward_kl_policy_prefix", "E_{s~sg(π)} Σ_t KL(ref ‖ π)", _DERIVED, _on_policy("forward_kl_frozen_prefix")),
        ("k2_value_frozen_prefix", "E_{s~sg(μ)} Σ_t E_π[½ ℓ_t²]", _DERIVED, _k2_value),
        ("total_variation_frozen_prefix", "E_{s~sg(μ)} Σ_t ½ Σ_v |π − ref|", _DERIVED, _total_variation),
        ("jensen_shannon_frozen_prefix", "E_{s~sg(μ)} Σ_t JS(π, ref)", _GKD, _at_prefixes(_mixture)),
        ("behaviour_kl", "KL(μ(y) ‖ π(y)), without the reference", _DERIVED, _behaviour),
        ("length", "E_π[L], without the reference", _DERIVED, lambda policy, *_: policy.occupancy().sum()),
        ("entropy", "entropy of π(y), without the reference", _DERIVED, _entropy),
        ("entropy_frozen_prefix", "E_{s~sg(μ)} Σ_t entropy of π, without the reference", _DERIVED, _row_entropy),
    )
}
#: What an audit looks for: the targets, registered ones too, then the extras.
CANDIDATES: Mapping[str, Target] = ChainMap(EXTRAS, TARGETS)  # type: ignore[arg-type]  # it is only read

#: How a verdict names an objective: "equals the gradient of …".
WORDS = {
    "reverse_kl": "the sequence reverse KL",
    "reverse_kl_frozen_prefix": "the reverse KL with frozen prefixes",
    "forward_kl": "the sequence forward KL",
    "forward_kl_frozen_prefix": "the forward KL with frozen prefixes",
    "chi2_frozen_prefix": "half the χ² divergence χ²(π‖ref) with frozen prefixes",
    "mse": "half the squared difference ½Σ(π−ref)² of whole responses",
    "mse_frozen_prefix": "half the squared difference ½Σ(π−ref)² with frozen prefixes",
    "k2_value": "the value of k2, E_π[½S²], of whole responses",
    "inverse_length": "the expected inverse length E_π[1/L]",
    "zero": "nothing",
    "reverse_kl_policy_prefix": "the reverse KL with frozen prefixes of the policy itself",
    "forward_kl_policy_prefix": "the forward KL with frozen prefixes of the policy itself",
    "k2_value_frozen_prefix": "the value of k2, E_π[½ℓ²], with frozen prefixes",
    "total_variation_frozen_prefix": "the total variation with frozen prefixes",
    "jensen_shannon_frozen_prefix": "the Jensen–Shannon divergence with frozen prefixes",
    "behaviour_kl": "KL(μ‖π), the distance from the sampler",
    "length": "the expected length E_π[L]",
    "entropy": "the sequence entropy",
    "entropy_frozen_prefix": "the entropy with frozen prefixes",
}


#: Objectives that do not know the reference.
WITHOUT_REFERENCE = ("inverse_length", "behaviour_kl", "length", "entropy", "entropy_frozen_prefix")


def check(name: str) -> None:
    """Raise `ValueError` for the name of an objective that no audit can find, with the nearest ones."""
    if not divergences.is_divergence(name):
        check_name("target", name, [*CANDIDATES, *REWARDS])


def words(name: str) -> str:
    """How a verdict names an objective: "equals the gradient of …"; a registered one by its statement."""
    if divergences.is_divergence(name):
        return divergences.words(name)
    name, _, temperature = name.partition("@")
    said = REWARDS[name].words if name in REWARDS else WORDS[name] if name in WORDS else CANDIDATES[name].statement
    return said + (f" of the policies at temperature {temperature}" if temperature else "")


def candidate_gradients(case: AuditScenario) -> dict[str, Tensor]:
    """The gradient `[p]` of every candidate in a world, by autograd through the definitions.

    Where the sampler has a temperature, those of policies at that temperature come first, as `name@temperature`.
    """
    found = {name: _candidate_gradient(name, case) for name in CANDIDATES}
    if case.temperature == 1:
        return found
    at = {f"{name}@{case.temperature:g}": _tempered_gradient(name, case) for name in CANDIDATES}
    return at | found


@lru_cache(maxsize=512)
def _tempered_gradient(name: str, case: AuditScenario) -> Tensor:
    t, scenario = case.temperature, case.scenario
    assert isinstance(scenario.policy, Tree)
    assert isinstance(scenario.reference, Tree)
    cooled = Scenario(
        tempered(scenario.policy, t), tempered(scenario.reference, t), None if case.base is None else tempered(case.base, t)
    )
    return _candidate_gradient(name, AuditScenario(case.name, cooled)) / t


@lru_cache(maxsize=2048)
def _candidate_gradient(name: str, case: AuditScenario) -> Tensor:
    scenario = case.scenario
    if name in TARGETS:
        return exact.gradient(name, scenario)
    with torch.enable_grad():
        parameters = scenario.policy.parameters.detach().clone().requires_grad_(True)
        policy = scenario.policy.with_parameters(parameters)
        (derivative,) = torch.autograd.grad(EXTRAS[name].objective(policy, scenario.reference, scenario.sampler), parameters)
    return derivative
