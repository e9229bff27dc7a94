"""Every estimator's per-sample gradient in closed form: a coefficient per token on the score.

The gradient of a surrogate is `Σ_t a_t ∇log π(y_t|s_t) + b_t ∇D(s_t)`, with `D` the vocabulary kernel where there is one. The
coefficients `a`, `b` are what distinguishes estimators; scores are shared by all of them, which is why a whole catalogue
costs little more than one estimator. Autograd through `Estimator.__call__` is the tests' oracle for this module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradlab.estimators import kernels
from gradlab.estimators.estimator import (
    Estimator,
    kernel_arguments,
    kernel_values,
    raw_weights,
    reward_coefficients,
    scale,
    to_go,
    weights,
)
from gradlab.rollout import Readings


@dataclass(frozen=True)
class Coefficients:
    """`score` `[n, t]` multiplies `∇log π(y_t|s_t)`, `direct` `[n, t]` (or `None`) the gradient of the vocabulary kernel `kernel`."""

    score: Tensor
    direct: Tensor | None = None
    kernel: str | None = None

    def __add__(self, other: Coefficients) -> Coefficients:
        """The sum of two that have at most one vocabulary kernel between them."""
        own, others = self.direct, other.direct
        direct = own if others is None else others if own is None else own + others
        return Coefficients(self.score + other.score, direct, self.kernel or other.kernel)

    def __mul__(self, factor: Tensor) -> Coefficients:
        """Multiplied by a factor of every token, or of every response `[n, 1]`."""
        return Coefficients(self.score * factor, None if self.direct is None else self.direct * factor, self.kernel)

    def only(self, rows: Tensor) -> Coefficients:
        """Those of some responses."""
        return Coefficients(self.score[rows], None if self.direct is None else self.direct[rows], self.kernel)


def coefficients(estimator: Estimator, rollout: Readings) -> Coefficients:
    """Return the coefficients of the estimator's gradient on every token of the rollout; 0 after the end of a response.

    Raises `ValueError` for a group baseline on a rollout that is not sampled in groups.
    """
    if estimator.placement == "reward":
        found = _of_reward(estimator, rollout)
    elif estimator.placement == "loss+reward":
        found = _of_loss(estimator, rollout) + _of_reward(estimator, rollout)
    else:
        found = _of_loss(estimator, rollout)
    if estimator.normalise == "sum" and rollout.unpadded:
        return found
    factor = (
        rollout.mask_float if estimator.normalise == "sum" else rollout.mask_float * scale(estimator, rollout).reshape(-1, 1)
    )
    return found * factor


def group_parts(estimator: Estimator, rollout: Readings) -> tuple[Tensor, Tensor]:
    """A grouped estimator before its baseline: the coefficient `[n]` of each response and the weight `[n, t]` on its scores.

    Its gradient is `(coefficient − baseline) Σ_t weight_t ∇log π_t`.
    """
    values, w = kernel_values(estimator, rollout), weights(estimator, rollout)
    if estimator.on_vocabulary and estimator.weight == "prefix":
        values, w = w * values, torch.ones_like(w)  # the weight sits with its own term
    return values.sum(-1), w * rollout.mask_float * scale(estimator, rollout).reshape(-1, 1)


def ahead(e: Estimator, rollout: Readings) -> tuple[Tensor, Tensor] | None:
    """`β` and `f` `[n, t]`, with which a step's coefficient is that of its response cut behind it, plus `β_t Σ_{u>t} f_u`.

    `None` where later steps add nothing. For credits `token` and `to_go`, weights but `sequence`, without clip, and without a
    differentiated weight of a reward.
    """
    if e.credit == "to_go":
        values, w = kernel_values(e, rollout), weights(e, rollout)
        return (
            (torch.ones_like(values), w * values) if e.on_vocabulary and e.weight == "prefix" else (w.expand_as(values), values)
        )
    if e.differentiate_weight and e.weight == "prefix":
        values = kernel_values(e, rollout)
        return torch.ones_like(values), _weight_slope(e, rollout) * values
    return None


def _of_loss(e: Estimator, rollout: Readings) -> Coefficients:
    w = weights(e, rollout)
    if e.on_vocabulary:
        score, direct = w.new_zeros(()).expand_as(rollout.mask), w.expand_as(rollout.mask)
    else:
        bounds = (None, None) if e.placement == "straight_through" else (e.clamp_log_ratio, e.clamp_value)
        kernel = e.effective_gradient_kernel
        key = ("slope", kernel, e.credit == "sequence", bounds)
        slope = rollout.cached(key, lambda: kernels.derivative(kernel, *kernel_arguments(e, rollout, kernel), *bounds))
        score, direct = (w * slope).expand_as(rollout.mask), None
    if e.differentiate_weight:
        score = score + _through_weight(e, _weight_slope(e, rollout) * kernel_values(e, rollout), rollout)
    return Coefficients(score, direct, None if direct is None else e.kernel)


def _of_reward(e: Estimator, rollout: Readings) -> Coefficients:
    values, w = reward_coefficients(e, rollout), weights(e, rollout)
    if e.clip is not None:
        # The clipped branch is constant: it is taken where the ratio has moved far enough in the advantage's favour.
        clipped = ((values < 0) & (w > 1 + e.clip)) | ((values > 0) & (w < 1 - e.clip))
        if e.credit != "sequence":
            values = values * rollout.mask_float
        return Coefficients(_through_weight(e, torch.where(clipped, 0.0, w * values), rollout))
    if e.on_vocabulary and e.weight == "prefix":
        return Coefficients(values)
    score = (w * values).expand_as(rollout.mask)
    if e.differentiate_weight:
        score = score + _through_weight(e, _weight_slope(e, rollout) * values * rollout.log_prob, rollout)
    return Coefficients(score)


def _weight_slope(e: Estimator, rollout: Readings) -> Tensor:
    """`∂W_t / ∂ log π` of the tokens the weight runs over: the weight itself, 0 where truncation binds."""
    raw = raw_weights(e, rollout)
    return raw if e.truncate is None else torch.where(raw <= e.truncate, raw, 0.0)


def _through_weight(e: Estimator, terms: Tensor, rollout: Readings) -> Tensor:
    """Carry each term's weight gradient to the tokens whose ratios are in that weight, `[n, t]`."""
    if e.weight == "token":
        return terms
    if e.weight == "sequence":
        return terms.sum(-1, keepdim=True).expand_as(rollout.mask)
    later = to_go(terms)
    return later - terms if e.on_vocabulary else later
