"""Behaviour policies as they come about in practice: what draws the data is never quite the policy that is trained.

Each function takes a language model, this package's own or a pretrained one, and gives the policy that would draw the data in
its place; `gl.Scenario(policy, reference, behaviour)` measures what that does.

**A nucleus leaves responses out.** With `top_p < 1` some responses have `μ(y) = 0` and `π(y) > 0`. The ratio `ρ = π/μ` is defined
on every response that is drawn, and importance weights do all they can: `E_μ[ρ f] = E_π[f; μ > 0]`, the part of the
expectation that lies in the support. What is left out cannot be weighted back. `missing_support_probability` is its probability `π(μ = 0)`;
estimators stay what they are, and the bias that they show with weights against the full target is the cost of the nucleus.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import numpy as np
import scipy
import torch
from torch import Tensor

from gradlab._common.names import check_held, check_probability, check_whole
from gradlab._common.streams import generator
from gradlab.policies.causal import Pretrained
from gradlab.policies.language import LanguageModel
from gradlab.policies.trunk import Trunk

P = TypeVar("P", bound=LanguageModel)


def stale(policy: P, parameters: Tensor) -> P:
    """The policy with the weights `[p]` it had some updates ago, which the sampling engine still holds."""
    if parameters.shape != policy.parameters.shape:
        raise ValueError(f"stale weights must be a vector of {len(policy.parameters)} numbers, got {list(parameters.shape)}")
    return policy.with_parameters(parameters.detach())


def tempered(policy: P, temperature: float) -> P:
    """The policy with its logits divided by `temperature`. Raises `ValueError` unless it is positive."""
    return policy.changed(temperature=policy.temperature * temperature)


def nucleus(policy: P, top_p: float) -> P:
    """The policy cut to the smallest set of tokens that has at least the probability `top_p`, at every step, and renormalised.

    Raises `ValueError` unless `0 < top_p ≤ 1`.
    """
    return policy.changed(top_p=top_p)


def low_precision(policy: P, dtype: torch.dtype = torch.bfloat16) -> P:
    """The same weights rounded to `dtype` and the network computed in it, as a separate inference engine does.

    The softmax stays in float64: what differs is the logits. In 16 bits every operation is rounded to the nearest number, so that
    they are the same on every processor; an engine whose sums are rounded on the way is as far off as this one, not equal to it.
    Raises `ValueError` for a `dtype` that is not a floating-point one.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"a network computes in a floating-point precision, got {dtype}")
    if isinstance(policy, Pretrained):
        return cast(P, policy.in_precision(dtype))
    model = copy.deepcopy(policy.model)
    known, sizes = dict(model.named_parameters()), [weight.numel() for weight in policy.weights.values()]
    with torch.no_grad():
        for name, part in zip(policy.weights, torch.split(policy.parameters, sizes), strict=True):
            known[name].copy_(part.view_as(known[name]))
    trunk = None if policy.trunk is None else Trunk(copy.deepcopy(policy.trunk.module).to(dtype))
    # `replace`, not `changed`: the parameters of the new policy are the rounded ones of its own network.
    return replace(policy, model=model.to(dtype), trunk=trunk)


@dataclass(frozen=True)
class Estimate:
    """A probability, with the interval `low`–`high` where it was sampled (equal to it when exact)."""

    value: float
    low: float
    high: float


def missing_support_probability(
    policy: LanguageModel, behaviour: LanguageModel, samples: int | None = None, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Probability under the policy of responses that the behaviour never gives, `π(μ = 0)`, mean over prompts.

    samples: `None` sums over all responses; otherwise `1 − E_μ[Π_t ρ_t]` from that many responses, with the normal
    interval of `level`. Raises `ValueError` where there are too many responses to list, for policies that do not share vocabulary, length,
    end token and prompts, and for a level outside (0, 1).
    """
    check_probability("level", level)
    if policy.signature != behaviour.signature:
        raise ValueError("policy and behaviour must share vocabulary, length, end token and prompts")
    with torch.no_grad():
        if samples is None:
            responses = policy.enumerate()
            contexts = policy.rows_of(responses)
            policy_probability, behaviour_probability = (
                torch.where(responses.mask, p.family.log_prob(p.table, contexts, responses.tokens), 0.0).sum(-1).exp()
                for p in (policy, behaviour)
            )
            probability = float(policy_probability[behaviour_probability == 0].sum()) / len(policy.prompts)
            return Estimate(probability, probability, probability)
        check_whole("samples", samples)
        check_held(samples, 1)
        rng = generator(seed, "behaviour.missing_support")
        weights = []
        for part in np.array_split(np.arange(samples), max(1, samples // 64)):
            responses = behaviour.sample(len(part), rng)
            prompts, tokens = responses.prompts, responses.tokens
            ratio = log_probs(policy, prompts, tokens) - log_probs(behaviour, prompts, tokens)
            weights.append(torch.where(responses.mask, ratio, 0.0).sum(-1).exp())
        weight = torch.cat(weights).numpy()
        probability, half_width = 1 - weight.mean(), scipy.special.ndtri((1 + level) / 2) * weight.std(ddof=1) / samples**0.5
        return Estimate(float(probability), float(probability - half_width), float(probability + half_width))


def log_probs(policy: LanguageModel, prompts: Tensor, tokens: Tensor) -> Tensor:
    """`log π(y_t|s_t)` of given tokens `[n, t]` after prompts `[n]`, as `[n, t]`."""
    return policy.logits(prompts, tokens).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
