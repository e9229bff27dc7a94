"""A whole loss's per-sample gradient in closed form: a coefficient per token on the score, given the response's advantage.

The gradient is `−Σ_t c_t W_t A_t ∇log π_t` where the trust region leaves it, plus `β` times the regulariser's. What does not depend on
the group stands apart, so that moments over groups need few gradients. Autograd through `PolicyLoss.__call__` is the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradlab.estimators.coefficients import Coefficients, coefficients
from gradlab.estimators.estimator import normaliser
from gradlab.estimators.policy_loss import (
    PolicyLoss,
    check_policies,
    correction,
    head,
    head_advantages,
    kept,
    level,
    log_ratio,
    response_advantages,
    token_advantages,
)
from gradlab.rollout import Rollout


def loss_coefficients(loss: PolicyLoss, rollout: Rollout) -> Coefficients:
    """The coefficients of the loss's gradient on every token; 0 behind the end. Raises `ValueError` as the loss does when called."""
    check_policies(loss, rollout)
    return of_advantage(loss, rollout, response_advantages(loss, rollout)) + alone(loss, rollout)


def of_advantage(loss: PolicyLoss, rollout: Rollout, advantage: Tensor) -> Coefficients:
    """The part that an advantage multiplies, for responses' advantages `[n]` (or `[n, t]` with credit `to_go`)."""
    gain = token_advantages(loss, rollout, advantage)
    return Coefficients(_scaled(loss, rollout, -correction(loss, rollout) * _taken(loss, rollout, gain)))


def alone(loss: PolicyLoss, rollout: Rollout) -> Coefficients:
    """The part that does not depend on the advantage: a regulariser of its own, or a KL head."""
    if loss.regulariser is None or loss.combine in ("before", "after"):
        return Coefficients(torch.zeros_like(rollout.log_prob))
    if loss.combine == "head":
        own = _taken(head(loss), rollout, head_advantages(loss, rollout))
        return Coefficients(_scaled(loss, rollout, -correction(loss, rollout) * own))
    return coefficients(loss.regulariser, rollout) * (loss.beta * normaliser(loss.normalise, rollout).reshape(-1, 1))


def _taken(loss: PolicyLoss, rollout: Rollout, gain: Tensor) -> Tensor:
    """`W A` of every token where the trust region lets its gradient through, `[n, t]`, for advantages `[n, t]`."""
    steps = log_ratio(loss, rollout)
    ratio = level(loss.ratio, steps, rollout).exp().expand_as(gain)
    if loss.negative_mask is not None:
        gain = torch.where((gain < 0) & ~kept(loss, rollout), 0.0, gain)
    if loss.mask is not None:
        gain = torch.where((ratio >= loss.mask[0]) & (ratio <= loss.mask[1]), gain, 0.0)
    if loss.truncate is not None:
        return ratio.clamp(max=loss.truncate) * gain
    if loss.bounds is None:
        return ratio * gain
    low, high = loss.bounds
    if loss.clip_form == "detached":
        return ratio.clamp(low, high) * gain
    if loss.clip_form == "geometric":
        each = steps.exp()
        stopped = ((gain > 0) & (each > high)) | ((gain < 0) & (each < low))
        bounded = torch.where(gain > 0, each.clamp(max=high), each.clamp(min=low)).log() * rollout.mask_float
        mean = (bounded.sum(-1, keepdim=True) / rollout.lengths[:, None]).exp()
        return torch.where(stopped, 0.0, mean * gain)
    stopped = ((gain > 0) & (ratio > high)) | ((gain < 0) & (ratio < low))
    if loss.dual_clip is not None:
        stopped = stopped | ((gain < 0) & (ratio > loss.dual_clip))
    return torch.where(stopped, 0.0, ratio * gain)


def _scaled(loss: PolicyLoss, rollout: Rollout, terms: Tensor) -> Tensor:
    return terms * rollout.mask_float * normaliser(loss.normalise, rollout).reshape(-1, 1)
