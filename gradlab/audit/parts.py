"""The two parts of a whole loss: what is left when the task's advantages are 0, and what they add."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from gradlab.audit.batch import Batch, Subject
from gradlab.audit.call import LossError, loss_gradient
from gradlab.audit.worlds import PADDING, AuditScenario, batch

#: A change of the gradient larger than this share of it is one; what two calls leave of a difference is less.
CHANGED = 1e-12


def kl_part(subject: Subject) -> Subject:
    """The loss with advantages and rewards of 0."""
    return replace(subject, loss=lambda batch: subject.loss(batch.without_reward()))


def policy_part(subject: Subject) -> Subject:
    """What advantages and rewards add to the loss: it less itself at advantages of 0."""

    def loss(batch: Batch) -> Tensor:
        total, rest = subject.loss(batch), subject.loss(batch.without_reward())
        return total - rest if bool(torch.isfinite(rest).all()) else total  # a standard deviation of 0 without an ε

    return replace(subject, loss=loss)


def rewarded(subject: Subject, case: AuditScenario) -> bool:
    """Whether advantages or rewards change the gradient at all."""
    columns = case.columns(PADDING)
    n = len(columns["mask"])
    for rows in ([0, n // 2, n - 1, 1], [2, 3], [n - 2]):
        try:
            whole, rest = (loss_gradient(part, *batch(columns, rows))[0] for part in (subject, kl_part(subject)))
        except LossError:
            continue  # it wants a group of another size
        if not float((whole - rest).norm()) <= CHANGED * float(whole.norm()):
            return True
    return False


@dataclass(frozen=True)
class RewardObjective:
    """An objective of the task: `−E_μ f(log ρ, A, L)` up to its gradient, in words and as a function of `[n, t]` and `[n]`."""

    words: str
    value: Callable[[Tensor, Tensor, Tensor], Tensor]


def _total(log_ratio: Tensor) -> Tensor:
    return log_ratio.sum(-1).exp()


def _prefix(log_ratio: Tensor) -> Tensor:
    before = log_ratio.cumsum(-1).detach()
    return (before.exp() * log_ratio).sum(-1)


#: Names → objectives that a policy term may descend, the likeliest first; log-ratios are 0 behind the end of a response.
REWARDS: dict[str, RewardObjective] = {
    "reward": RewardObjective("−E r (the expected reward rises)", lambda w, a, n: _total(w) * a),
    "reward_per_length": RewardObjective(
        "−E[(r − E r)/L]: each response counts 1/L", lambda w, a, n: _total(w) * a / n
    ),
    "reward_times_length": RewardObjective(
        "−E[(r − E r)·L]: each response counts L times", lambda w, a, n: _total(w) * a * n
    ),
    "reward_token_ratio": RewardObjective(
        "the surrogate −E_μ Σ_t ρ_t A with token ratios, which is −E r to first order in the distance from the sampler",
        lambda w, a, n: a * w.expm1().sum(-1),
    ),
    "reward_token_ratio_per_length": RewardObjective(
        "the surrogate −E_μ (1/L) Σ_t ρ_t A with token ratios", lambda w, a, n: a * w.expm1().sum(-1) / n
    ),
    "reward_prefix_ratio": RewardObjective(
        "the surrogate −E_μ Σ_t Π_{u≤t} ρ_u A with detached prefix ratios", lambda w, a, n: a * _prefix(w)
    ),
    "reward_geometric_ratio": RewardObjective(
        "GSPO's surrogate −E_μ (Πρ)^{1/L} A", lambda w, a, n: (w.sum(-1) / n).exp() * a
    ),
    "reward_geometric_ratio_times_length": RewardObjective(
        "the surrogate −E_μ L (Πρ)^{1/L} A, in which each response counts L times", lambda w, a, n: n * (w.sum(-1) / n).exp() * a
    ),
    "advantage_likelihood": RewardObjective(
        "−E_μ[A log π], the likelihood of the sampler's responses weighted by their advantages, without importance weights",
        lambda w, a, n: a * w.sum(-1),
    ),
    "advantage_likelihood_per_length": RewardObjective(
        "−E_μ[(A/L) log π], the likelihood of the sampler's responses weighted by their advantages over their lengths",
        lambda w, a, n: a * w.sum(-1) / n,
    ),
}  # fmt: skip


@lru_cache(maxsize=64)
def reward_gradients(case: AuditScenario) -> dict[str, Tensor]:
    """The gradient `[p]` of every objective of the task in a world, by autograd through all its responses."""
    rollout, policy = case.rollout, case.scenario.policy
    parameters = policy.parameters.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        table = policy.with_parameters(parameters).table.log_softmax(-1)
        log_ratio = torch.where(rollout.mask, table[rollout.contexts, rollout.tokens] - rollout.behaviour_log_prob, 0.0)
        gradients = {}
        for name, objective in REWARDS.items():
            value = -(rollout.weight @ objective.value(log_ratio, case.advantages, rollout.lengths))
            gradients[name] = torch.autograd.grad(value, parameters, retain_graph=True)[0]
    return gradients


def success(case: AuditScenario) -> float:
    """The success probability `p = E_π r` of the policy in a world."""
    rollout = case.rollout
    weight = torch.where(rollout.mask, rollout.log_prob, 0.0).sum(-1).exp()
    found = float(weight @ case.rewards)
    assert math.isfinite(found)
    return found
