"""Per-sample gradients of many losses over one rollout, and their moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradlab.coefficients import coefficients, group_parts
from gradlab.estimators import Estimator
from gradlab.rollout import Rollout

#: Whatever maps a rollout to per-sample losses `[n]`: an `Estimator`, a framework's loss, a user's function.
Loss = Callable[[Rollout], Tensor]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean gradient `[p]` and trace of the covariance of one sample's gradient.

    `samples` is `None` for exact moments. Sampled ones carry the means `[b, p]` and covariance traces `[b]` of `b`
    independent batches, from which `gradlab.intervals` makes error bars. `method` says how they were computed.
    """

    mean: Tensor
    trace_cov: float
    samples: int | None = None
    batch_means: Tensor | None = None
    batch_traces: Tensor | None = None
    method: str = "enumeration"


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradient of every loss `e` at every response `n`, with respect to the table rows `[r, v]` (parameters `p = r·v`).

    Estimators are kept as coefficients on shared scores, `score` `[e, n, t]` and `direct[kernel]` `[e, n, t]` on the gradient
    of a vocabulary kernel; any other callable as the cotangent of the logits, `cotangents[e]` `[n, t, v]`.
    """

    rollout: Rollout
    score: Tensor
    direct: dict[str, Tensor]
    cotangents: dict[int, Tensor]

    def mean(self, weight: Tensor) -> Tensor:
        """`Σ_i weight_i g_i` of every loss, `[e, p]`, for weights `[n]`: one contraction for all estimators."""
        rollout = self.rollout
        weighted = self.score * weight[:, None]
        total = rollout.family.score_sum(rollout.table, rollout.contexts, rollout.tokens, weighted)
        rows = rollout.contexts.flatten()
        for kernel, direct in self.direct.items():
            visits = torch.zeros(total.shape[:2], dtype=total.dtype)
            visits.index_add_(1, rows, (direct * weight[:, None]).flatten(1))
            total = torch.addcmul(total, visits[..., None], direction(kernel, rollout))
        for e, cotangent in self.cotangents.items():
            total[e].index_add_(0, rows, (cotangent * weight[:, None, None]).flatten(0, 1))
        return total.flatten(1)

    @cached_property
    def squares(self) -> Tensor:
        """`‖g_i‖²` of every loss and response, `[e, n]`."""
        rollout = self.rollout
        if rollout.revisits:
            return torch.stack([self.tables(e).square().sum((-2, -1)) for e in range(len(self.score))])
        # No response emits twice from one row, so the steps of a response are orthogonal.
        scores = rollout.table, rollout.contexts, rollout.tokens
        squares = (self.score.square() * rollout.family.score_norm(*scores)).sum(-1)
        for kernel, direct in self.direct.items():
            slope = direction(kernel, rollout)
            along = rollout.family.score_dot(*scores, slope)
            length = slope.square().sum(-1)[rollout.contexts]
            squares = squares + (direct * (2 * self.score * along + direct * length)).sum(-1)
        for e, cotangent in self.cotangents.items():
            squares[e] = cotangent.square().sum((-2, -1))
        return squares

    def tables(self, e: int) -> Tensor:
        """Loss `e`'s gradient at every response in full, `[n, r, v]`: the slow form, for steps that share rows."""
        rollout = self.rollout
        r, v = rollout.table.shape
        n = len(rollout.weight)
        if e in self.cotangents:
            rows = (rollout.contexts + r * torch.arange(n)[:, None]).flatten()
            full = torch.zeros(n * r, v, dtype=rollout.weight.dtype)
            return full.index_add_(0, rows, self.cotangents[e].flatten(0, 1)).view(n, r, v)
        full = rollout.family.score_tables(rollout.table, rollout.contexts, rollout.tokens, self.score[e])
        for kernel, direct in self.direct.items():
            visits = torch.zeros(n, r, dtype=full.dtype).scatter_add_(1, rollout.contexts, direct[e])
            full = full + visits[..., None] * direction(kernel, rollout)
        return full


def gradients(losses: Sequence[Loss], rollout: Rollout) -> Gradients:
    """Differentiate every loss at every response: estimators in closed form, other callables by one backward pass each."""
    parts = {e: coefficients(loss, rollout) for e, loss in enumerate(losses) if isinstance(loss, Estimator)}
    blank = torch.zeros_like(rollout.log_prob)
    score = torch.stack([parts[e].score if e in parts else blank for e in range(len(losses))])
    direct = {}
    for kernel in sorted({loss.kernel for loss in losses if isinstance(loss, Estimator) and loss.on_vocabulary}):
        found = [
            part.direct
            if (part := parts.get(e)) and part.direct is not None and isinstance(loss, Estimator) and loss.kernel == kernel
            else blank
            for e, loss in enumerate(losses)
        ]
        direct[kernel] = torch.stack(found)
    cotangents = {e: cotangent(loss, rollout) for e, loss in enumerate(losses) if e not in parts}
    return Gradients(rollout, score, direct, cotangents)


def cotangent(loss: Loss, rollout: Rollout) -> Tensor:
    """Gradient of a callable's per-sample losses with respect to each response's own logits, `[n, t, v]`, by autograd.

    Raises `ValueError` when the callable does not return one differentiable loss per response.
    """
    name = getattr(loss, "__name__", type(loss).__name__)
    with torch.enable_grad():
        leaf = rollout.differentiable()
        values = loss(leaf)
        if not isinstance(values, Tensor) or values.shape != leaf.weight.shape:
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"loss {name} must return one value per response, [{len(leaf.weight)}], got {shape}")
        if not values.requires_grad:
            raise ValueError(f"loss {name} does not depend on the policy's logits: was it computed under no_grad or detached?")
        (grad,) = torch.autograd.grad(values.sum(), leaf.table)
    return grad.view(*leaf.tokens.shape, -1) * leaf.mask[..., None]


def direction(kernel: str, rollout: Rollout) -> Tensor:
    """Gradient of a vocabulary kernel with respect to each row of the table, `[r, v]`, by autograd through its definition."""
    with torch.enable_grad():
        table = rollout.table.detach().requires_grad_(True)
        of_rows = rollout.family.reverse_kl if kernel == "full" else rollout.family.mse
        (slope,) = torch.autograd.grad(of_rows(table, rollout.reference_table).sum(), table)
    return slope


def moments_of(losses: Sequence[Loss], rollout: Rollout, method: str) -> list[Moments]:
    """Exact moments of every loss over an enumerated rollout.

    Grouped estimators are averaged over all groups in closed form, see `group_moments`.
    Raises `ValueError` when a mean overflows float64.
    """
    plain = [e for e, loss in enumerate(losses) if not (isinstance(loss, Estimator) and loss.grouped)]
    found: dict[int, Moments] = {}
    if plain:
        batch = gradients([losses[e] for e in plain], rollout)
        means = batch.mean(rollout.weight)
        # Weight first: E‖g‖² can exist where ‖g‖² alone overflows.
        squares = batch.squares @ rollout.weight
        traces = (squares - means.square().sum(-1)).clamp(min=0)
        for e, mean, trace in zip(plain, means, traces.tolist(), strict=True):
            found[e] = Moments(mean, trace, method=method)
    for e, loss in enumerate(losses):
        if isinstance(loss, Estimator) and loss.grouped:
            found[e] = group_moments(loss, rollout, method)
        if not bool(torch.isfinite(found[e].mean).all()):
            name = loss.name if isinstance(loss, Estimator) else getattr(loss, "__name__", "loss")
            raise ValueError(f"the expected gradient of {name} is not finite: the policies are so far apart that it overflows")
    return [found[e] for e in range(len(losses))]


def group_moments(estimator: Estimator, rollout: Rollout, method: str) -> Moments:
    """Exact moments of an estimator that compares the `G` responses of a group.

    With `c` a response's coefficient and `s` its weighted score sum, leave-one-out averages to the U-statistic
    `(G(G−1))⁻¹ Σ_{i≠j} (c_i − c_j) s_i`, the sample covariance of `c` and `s`; the group mean is `1 − 1/G` times that. Its
    variance is Hoeffding's `2/(G(G−1)) [2(G−2) ζ₁ + ζ₂]`. `mean` is the expected gradient of the group average, `trace_cov`
    is `G` times the covariance trace of the group average, so that both compare with ungrouped estimators sample for sample.
    """
    size = estimator.group
    assert size is not None
    c, s = group_parts(estimator, rollout)
    parts = Gradients(rollout, s.expand_as(rollout.log_prob)[None], {}, {})
    w, square = rollout.weight, parts.squares[0]
    a = c - w @ c
    centre, first, second = parts.mean(w)[0], parts.mean(w * a)[0], parts.mean(w * a * a)[0]
    spread = w @ (a * a)
    m22 = w @ (a * a * square) - 2 * second @ centre + spread * (centre @ centre)
    zeta1 = (m22 - first @ first) / 4
    zeta2 = (m22 + spread * (w @ square - centre @ centre)) / 2
    variance = 2 / (size * (size - 1)) * (2 * (size - 2) * zeta1 + zeta2)
    shrink = 1 - 1 / size if estimator.baseline == "group_mean" else 1.0
    return Moments(shrink * first, float(shrink**2 * size * variance), method=method)
