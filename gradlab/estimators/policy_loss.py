"""Losses of the whole objective: advantage × ratio × trust region × correction × regulariser × credit × normaliser.

A `PolicyLoss` is a recipe, as an `Estimator` is. Called on a rollout that is sampled in groups it gives the surrogate loss `[n]`,
written as the field writes it; `gradlab.estimators.closed_form` holds the same gradient as a coefficient per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gradlab.estimators import advantages, loss_rules
from gradlab.estimators.advantages import ADVANTAGES
from gradlab.estimators.corrections import bounded
from gradlab.estimators.estimator import Estimator, kernel_values, normaliser, reward_coefficients
from gradlab.rollout import Rollout

#: Constants of a batch: the mean that is subtracted and the standard deviation that is divided by.
Constants = tuple[float, float]


@dataclass(frozen=True)
class PolicyLoss:
    """A policy-gradient loss with its regulariser; `loss(rollout)` is its per-sample surrogate `[n]`, to be descended.

    With `W_t` the ratio, `A_t` the advantage, `c_t` the correction and `k` the regulariser's kernel, each response costs

        −Σ_t c_t min(W_t A_t, clip(W_t, 1−ε_l, 1+ε_h) A_t) + β · (regulariser),     times the normaliser.

    advantage: `reward` r · `mean` r − mean of the group · `leave_one_out` · `group_std` (r − mean) / (std + ε) · `batch_std` ·
        `mean_batch_std` · `pass_at_k` (with `k`), or a function of the rewards `[…, G]` of groups. group: responses `G` to one prompt.
        std: `population` or `sample`. epsilon: `ε`. A batch is large: its mean and standard deviation are constants, over tokens where
        the credit is `to_go`.
    ratio: `π/π_old` as `none` 1 · `token` `ρ_t` · `prefix` `Π_{u≤t} ρ_u` · `sequence` `Πρ` · `geometric` `(Πρ)^{1/L}`, a number on every
        token's score: `W_t A_t ∇log π_t`. `π_old` is the scenario's `old`; without one, or with `bypass`, the behaviour policy.
    clip: `ε`, or `(ε_l, ε_h)`. clip_form: `min` as PPO · `detached` a clipped weight on `log π` (CISPO) · `geometric` the mean over
        tokens of clipped log-ratios (GMPO). dual_clip: upper bound of the ratio where the advantage is negative.
    truncate: `min(W, C)`, detached. mask: ratios outside `(a, b)` count 0. negative_mask: responses of negative advantage with
        `mean_t log(μ/π)` above it count 0.
    correction: `c`, a detached `π_old/μ`, over the same levels as the ratio. correction_truncate: `min(c, C)`. correction_mask: 0
        outside `(a, b)`.
    combine: `separate` β times the regulariser as it stands · `before` `r − β sg(k)`, then compared or normalised · `after` the
        advantage less `β sg(k)` with the regulariser's credit · `head` (decoupled) a term of its own, `−min(W A, clip(W) A)` with
        `A = −β sg(k)`: with the loss's ratio and clip, or with the regulariser's own `weight` and `clip` where it has them.
    credit: `return` the whole response's reward on every token · `to_go` rewards from the token on, discounted by `discount`; with
        `values`, a function of a rollout that gives `V(s_t)` `[n, t]`, and `gae` (λ), generalised advantage estimation.
    normalise: `sum` · `mean` 1/L per response · `token_mean` 1/E_μ[L] · `fixed` 1/T; of the regulariser, too.
    target: what it descends on-policy where responses have one length, as shares of targets, up to a positive factor (`None`:
        nothing with a name). source: where the loss is from.

    Raises `ValueError` for an unknown name and for a combination that means nothing; on a rollout, for one without reward, not sampled in
    groups, or without a policy that the loss needs.
    Source: the field's own, see `gl.LOSSES`; combine: arXiv 2510.01555.

    >>> import gradlab as gl
    >>> policy = gl.Bandit.random(5, seed=0)
    >>> scenario = gl.Scenario(policy, policy.perturbed(kl=0.1), reward=gl.TableReward(policy, [1.0, 0, 0, 1, 0]))
    >>> loss = gl.PolicyLoss("leave_one_out", group=4, regulariser=gl.Estimator("k1"), beta=0.1, combine="before")
    >>> gap = gl.exact.moments(loss, scenario).mean - gl.exact.gradient("regularised", scenario, beta=0.1)
    >>> bool(gap.norm() < 1e-12)
    True
    """

    advantage: str | Callable[[Tensor], Tensor] = "reward"
    group: int | None = None
    ratio: Literal["none", "token", "prefix", "sequence", "geometric"] = "none"
    clip: float | tuple[float, float] | None = None
    regulariser: Estimator | None = None
    beta: float = 0.0
    combine: Literal["separate", "before", "after", "head"] = "separate"
    normalise: Literal["sum", "mean", "token_mean", "fixed"] = "sum"
    credit: Literal["return", "to_go"] = "return"
    std: Literal["population", "sample"] = "population"
    epsilon: float = 0.0
    k: int | None = None
    clip_form: Literal["min", "detached", "geometric"] = "min"
    dual_clip: float | None = None
    truncate: float | None = None
    mask: tuple[float, float] | None = None
    negative_mask: float | None = None
    correction: Literal["none", "token", "prefix", "sequence", "geometric"] = "none"
    correction_truncate: float | None = None
    correction_mask: tuple[float, float] | None = None
    bypass: bool = False
    discount: float = 1.0
    gae: float = 1.0
    values: Callable[[Rollout], Tensor] | None = None
    constants: Constants | None = field(default=None, repr=False)
    target: Mapping[str, float] | None = field(default=None, compare=False, repr=False)
    source: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.clip, int | float) and not isinstance(self.clip, bool):
            object.__setattr__(self, "clip", (float(self.clip), float(self.clip)))
        loss_rules.check(self)

    @property
    def grouped(self) -> bool:
        """Whether the loss compares responses to one prompt with each other."""
        return not isinstance(self.advantage, str) or ADVANTAGES[self.advantage].grouped

    @property
    def group_size(self) -> int:
        """How many responses to one prompt the loss takes together: its group, or 1."""
        return self.group or 1

    @property
    def batch(self) -> bool:
        """Whether the loss divides by the spread of a batch."""
        return isinstance(self.advantage, str) and ADVANTAGES[self.advantage].batch

    @property
    def linear(self) -> bool:
        """Whether the advantage is linear in the rewards of the group."""
        return isinstance(self.advantage, str) and ADVANTAGES[self.advantage].linear

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The clip's lower and upper bound of the ratio."""
        return None if self.clip is None else (1 - self.clip[0], 1 + self.clip[1])  # type: ignore[index]

    @property
    def name(self) -> str:
        """A compact name made of the fields that differ from their defaults."""
        parts = [self.advantage if isinstance(self.advantage, str) else getattr(self.advantage, "__name__", "advantage")]
        for item in fields(self)[1:]:
            value = getattr(self, item.name)
            if item.compare and item.name != "constants" and value != item.default:
                shown = value.name if isinstance(value, Estimator) else getattr(value, "__name__", value)
                parts.append(f"{item.name}={shown}")
        return "-".join(map(str, parts))

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return the per-sample surrogate loss `[n]`, differentiable in the rollout's policy logits."""
        if rollout.table.requires_grad:
            rollout = rollout.without_cache()
        check_policies(self, rollout)
        advantage = token_advantages(self, rollout, response_advantages(self, rollout)).detach()
        factor = correction(self, rollout).detach()
        total = _surrogate(self, rollout, factor, advantage).sum(-1)
        if self.regulariser is not None and self.combine == "separate":
            total = total + self.beta * self.regulariser(rollout)
        elif self.regulariser is not None and self.combine == "head":
            total = total + _surrogate(head(self), rollout, factor, head_advantages(self, rollout).detach()).sum(-1)
        return total * normaliser(self.normalise, rollout)


# ---- advantages ---------------------------------------------------------------------------------------------------------


def check_policies(loss: PolicyLoss, rollout: Rollout) -> None:
    """Raise `ValueError` where a rollout lacks a policy that the loss weights by."""
    if loss.correction != "none" and rollout.old_table is None:
        raise ValueError(
            f"the loss corrects for π_old/μ with correction={loss.correction!r}, and the scenario has no trainer's weights π_old beside "
            "the behaviour policy that drew; give gl.Scenario(…, behaviour=mu, old=pi_old)"
        )


def own_values(loss: PolicyLoss, rollout: Rollout) -> Tensor:
    """What is compared or normalised: rewards, less `β k` where they are combined before, `[n]`; with credit `to_go` `[n, t]`."""
    if loss.credit == "to_go":
        return _to_go(loss, rollout)
    values = rollout.rewards
    if loss.combine == "before" and loss.regulariser is not None:
        values = values - loss.beta * kernel_values(loss.regulariser, rollout).detach().sum(-1)
    return values


def _to_go(loss: PolicyLoss, rollout: Rollout) -> Tensor:
    """Discounted rewards to go, or generalised advantages where there are values, `[n, t]`."""
    rewards = rollout.token_rewards
    if rewards.dim() == 1:  # earned at the last token
        last = torch.arange(rollout.mask.shape[1]) == rollout.mask.sum(-1, keepdim=True) - 1
        rewards = torch.where(last, rewards[:, None], 0.0)
    if loss.combine == "before" and loss.regulariser is not None:
        rewards = rewards - loss.beta * kernel_values(loss.regulariser, rollout).detach() * rollout.mask_float
    if loss.values is not None:
        values = _values(loss.values, rollout)
        after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], -1)
        rewards = rewards + loss.discount * after - values
    decay, found = loss.discount * loss.gae, torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + decay * running
        found[:, t] = running
    return found * rollout.mask_float


def _values(function: Callable[[Rollout], Tensor], rollout: Rollout) -> Tensor:
    found = function(rollout)
    if not isinstance(found, Tensor) or found.shape != rollout.tokens.shape:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"values gives V(s_t) before every token, {list(rollout.tokens.shape)}, got {shape}")
    return torch.where(rollout.mask, found.detach().double(), 0.0)


def batch_constants(loss: PolicyLoss, rollout: Rollout) -> Constants:
    """Mean and standard deviation of what a large batch is normalised by, from a rollout of all responses, or of a large sample.

    Over responses; with credit `to_go` over tokens. `mean_batch_std` divides by the spread within groups, `(1 − 1/G)` of each prompt's
    variance, and subtracts nothing.
    """
    values, weight = own_values(loss, rollout), rollout.weight
    if loss.credit == "to_go":
        share = weight[:, None] * rollout.mask_float / (weight @ rollout.lengths)
        mean = (share * values).sum()
        return float(mean), float((share * (values - mean).square()).sum().sqrt())
    if loss.advantage == "batch_std":
        mean = weight @ values
        return float(mean), float((weight @ (values - mean).square()).sqrt())
    prompts = torch.zeros(len(weight), dtype=torch.long) if rollout.prompts is None else rollout.prompts
    blank = weight.new_zeros(int(prompts.max()) + 1)
    mass, total = (blank.index_add(0, prompts, each) for each in (weight, weight * values))
    centred = values - (total / mass.clamp(min=torch.finfo(mass.dtype).tiny))[prompts]
    return 0.0, float(((1 - 1 / loss.group_size) * (weight @ centred.square())).sqrt())


def fixed(loss: PolicyLoss, rollout: Rollout) -> PolicyLoss:
    """The loss with the constants of a batch worked out, where it has any and they are not given."""
    return replace(loss, constants=batch_constants(loss, rollout)) if loss.batch and loss.constants is None else loss


def normalised(loss: PolicyLoss, rollout: Rollout, values: Tensor) -> Tensor:
    """Values after the batch's mean and standard deviation; all 0 where a batch has no spread."""
    if not loss.batch:
        return values
    mean, std = loss.constants or batch_constants(loss, rollout)
    return (values - mean) / (std + loss.epsilon) if std > 0 else torch.zeros_like(values)


def response_advantages(loss: PolicyLoss, rollout: Rollout) -> Tensor:
    """The advantage of every response, `[n]` (`[n, t]` with credit `to_go`), before a KL that is combined after.

    Raises `ValueError` for an advantage that compares groups on a rollout that is not sampled in groups.
    """
    values = own_values(loss, rollout)
    if loss.grouped:
        size = loss.group_size
        if not rollout.sampled or len(values) % size:
            raise ValueError(
                f"advantage {loss.advantage!r} compares the {size} responses to one prompt: it needs a sampled rollout of a multiple of "
                f"{size} responses, got {'a weighted' if not rollout.sampled else 'a sampled'} one of {len(values)}; for exact moments use "
                "gl.exact.moments, which averages over groups"
            )
        of = advantages.within_group(loss.advantage, std=loss.std, epsilon=loss.epsilon, k=loss.k)
        values = of(values.view(-1, size)).flatten()
    return normalised(loss, rollout, values)


def token_advantages(loss: PolicyLoss, rollout: Rollout, advantage: Tensor) -> Tensor:
    """The advantage on every token, `[n, t]`, of responses' advantages `[n]` (or `[n, t]`): a KL that is combined after is taken off."""
    found = (advantage[:, None] if advantage.dim() == 1 else advantage) * rollout.mask_float
    if loss.combine == "after" and loss.regulariser is not None:
        found = found - loss.beta * in_advantage(loss.regulariser, rollout)
    return found


def in_advantage(regulariser: Estimator, rollout: Rollout) -> Tensor:
    """What a regulariser takes off the advantage of every token, with its own credit, `[n, t]`."""
    plain = replace(
        regulariser, placement="reward", weight="none", clip=None, truncate=None, differentiate_weight=False, normalise="sum"
    )
    return reward_coefficients(plain, rollout).detach().expand_as(rollout.log_prob) * rollout.mask_float


def head(loss: PolicyLoss) -> PolicyLoss:
    """Ratio and trust region of a decoupled KL head: the regulariser's own where it has a weight, otherwise the loss's."""
    own = loss.regulariser
    assert own is not None
    if own.weight == "none":
        return loss
    return replace(
        loss, ratio=own.weight, clip=None if own.clip is None else (own.clip, own.clip), clip_form="min", dual_clip=None,
        truncate=own.truncate, mask=None, negative_mask=None, regulariser=None, beta=0.0, combine="separate",
    )  # fmt: skip


def head_advantages(loss: PolicyLoss, rollout: Rollout) -> Tensor:
    """`−β sg(k)` on every token, `[n, t]`."""
    assert loss.regulariser is not None
    return -loss.beta * in_advantage(loss.regulariser, rollout)


# ---- ratios -------------------------------------------------------------------------------------------------------------


def level(name: str, steps: Tensor, rollout: Rollout) -> Tensor:
    """Log-ratios of tokens `[n, t]` at the level of tokens, prefixes, sequences or their geometric mean: `[n, t]` or `[n, 1]`."""
    if name == "none":
        return torch.zeros_like(steps[:, :1])
    if name == "token":
        return steps
    if name == "prefix":
        return steps.cumsum(-1)
    total = steps.sum(-1, keepdim=True)
    return total if name == "sequence" else total / rollout.lengths[:, None]


def log_ratio(loss: PolicyLoss, rollout: Rollout) -> Tensor:
    """`log π/π_old` of tokens, or `log π/μ` with `bypass`, `[n, t]`."""
    return rollout.log_weight if loss.bypass else rollout.old_log_weight


def correction(loss: PolicyLoss, rollout: Rollout) -> Tensor:
    """`c`, what the loss multiplies its terms by for `π_old/μ`, `[n, t]` or `[n, 1]`."""
    found = level(loss.correction, rollout.log_correction, rollout).exp()
    return bounded(found, loss.correction_truncate, loss.correction_mask)


def kept(loss: PolicyLoss, rollout: Rollout) -> Tensor:
    """Whether a response of negative advantage is kept, `[n, 1]`: not where it has become too unlikely under the policy."""
    assert loss.negative_mask is not None
    return -rollout.log_weight.sum(-1, keepdim=True) / rollout.lengths[:, None] <= loss.negative_mask


def _surrogate(loss: PolicyLoss, rollout: Rollout, factor: Tensor, advantage: Tensor) -> Tensor:
    """`−c min(W A, clip(W) A)` of every token, `[n, t]`, for detached `c` and `A`."""
    steps = log_ratio(loss, rollout)
    # A number that is the ratio, whose derivative by log π is the ratio too: W ∇log π.
    ratio = level(loss.ratio, steps, rollout).detach().exp() * (rollout.log_prob - rollout.log_prob.detach()).exp()
    gain = factor * advantage * rollout.mask_float
    if loss.negative_mask is not None:
        gain = torch.where((gain < 0) & ~kept(loss, rollout), 0.0, gain)
    if loss.mask is not None:
        low, high = loss.mask
        gain = torch.where((ratio.detach() >= low) & (ratio.detach() <= high), gain, 0.0)
    if loss.truncate is not None:
        return -ratio.detach().clamp(max=loss.truncate) * gain * rollout.log_prob
    if loss.bounds is None:
        return -ratio * gain
    low, high = loss.bounds
    if loss.clip_form == "detached":
        return -ratio.detach().clamp(low, high) * gain * rollout.log_prob
    if loss.clip_form == "geometric":
        clipped = torch.where(gain > 0, steps.exp().clamp(max=high), steps.exp().clamp(min=low)).log() * rollout.mask_float
        mean = clipped.sum(-1, keepdim=True) / rollout.lengths[:, None]
        return -mean.detach().exp() * (clipped - clipped.detach()).exp() * gain
    found = torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
    if loss.dual_clip is not None:
        found = torch.where(gain < 0, torch.maximum(found, loss.dual_clip * gain), found)
    return -found


def why_no_utility(loss: PolicyLoss) -> tuple[str, ...]:
    """What keeps a loss from ascending a utility of the success probability; on-policy, at one length, nothing of it matters."""
    found: list[str] = []
    if loss.normalise == "mean":
        found.append("each response is divided by its length, so where lengths differ the gradient is that of no function of p")
    if loss.ratio != "none" or loss.correction != "none":
        found.append("off-policy the ratio weighs responses, and p is no longer that of the policy that drew")
    if loss.clip is not None or loss.mask is not None or loss.truncate is not None or loss.negative_mask is not None:
        found.append("where the trust region binds, a response's weight depends on more than its reward")
    if loss.regulariser is not None and loss.combine == "before" and loss.beta:
        found.append("the KL is in the signal that is compared, which is not 0 or 1 any more")
    if loss.batch:
        found.append("it divides by the spread of the batch, so a prompt's gradient depends on the other prompts")
    return tuple(found)


def describe(loss: PolicyLoss) -> dict[str, Any]:
    """The fields of a loss that differ from their defaults, for lists."""
    return {
        item.name: getattr(loss, item.name)
        for item in fields(loss)
        if item.compare and item.name != "constants" and getattr(loss, item.name) != item.default
    }
