"""Per-sample gradients of many losses over one rollout, and their moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor

from gradlab._common.names import several
from gradlab._common.shapes import Float64
from gradlab.estimators.closed_form import loss_coefficients
from gradlab.estimators.coefficients import Coefficients, coefficients, group_parts
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.kernels import VOCABULARY_KERNELS
from gradlab.estimators.policy_loss import PolicyLoss
from gradlab.rollout import Rollout
from gradlab.sums import Sums, added, distinct

#: Whatever maps a rollout to per-sample losses `[n]`: an `Estimator`, a framework's loss, a user's function.
Loss = Callable[[Rollout], Tensor]
#: A covariance trace below this share of the mean's square is no longer `E‖g‖² − ‖E g‖²`, which would have lost three digits …
CANCELLED = 1e-3
#: … but a sum over responses of squared distances from the mean, where their gradients in full are no more numbers than this.
CENTRED_DOUBLES = 2**23
#: Weighted sums `Σ w g` `[e, p]` and `Σ w ‖g‖²` `[e]` of gradients, in the parameters of the policy.
Pullback = Callable[["Gradients", Tensor], tuple[Tensor, Tensor]]


#: An enumerated rollout, one part after the other: each with the rows of the whole table that it holds (`None` where it is whole),
#: and the factor that makes its weights those of the whole.
Parts = Callable[[], Iterable[tuple[Rollout, Tensor | None, float]]]


def as_losses(given: Loss | Iterable[Loss]) -> list[Loss]:
    """One loss or several as a list. Raises `ValueError` for anything that is neither callable nor a list of callables."""
    losses: list[Loss] = several(given)
    for loss in losses:
        if not callable(loss):
            hint = f"; gl.ESTIMATORS[{loss!r}] looks a catalogue name up" if isinstance(loss, str) else ""
            raise ValueError(f"an estimator is a gl.Estimator or a function of a rollout, got {loss!r}{hint}")
    if not losses:
        raise ValueError(f"no estimators were given, got {given!r}")
    return losses


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean gradient `[p]` and trace of the covariance of one sample's gradient.

    `samples` is `None` for exact moments. Sampled ones carry the means `[b, p]` (as a tensor, or as sums over segments that are
    batches) and covariance traces `[b]` of `b` independent batches, from which `gradlab.intervals` makes error bars. `method` says
    how they were computed. `distances` are `KL(policy ‖ reference)` and `KL(behaviour ‖ policy)` in nats as a language model's
    responses estimate them.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1]))
    >>> moments = gl.exact.moments(gl.ESTIMATORS["k1-loss"], scenario)
    >>> moments.mean.tolist(), moments.trace_cov
    ([0.0, 0.0], 0.5)
    """

    mean: Float64[Tensor, " p"]
    trace_cov: float
    samples: int | None = None
    batches: Float64[Tensor, "b p"] | Sums | None = None
    batch_traces: Float64[Tensor, " b"] | None = None
    method: str = "enumeration"
    distances: tuple[float, float] | None = None

    @cached_property
    def batch_means(self) -> Tensor:
        """Mean gradients of the batches in full, `[b, p]`; exact moments have none, `[0, p]`."""
        if self.batches is None:
            return self.mean.new_empty(0, len(self.mean))
        return self.batches.dense()[0] if isinstance(self.batches, Sums) else self.batches


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradient of every loss `e` at every response `n`, with respect to the table rows `[r, v]` (parameters `p = r·v`).

    Estimators are kept as coefficients on shared scores, `score` `[e, n, t]`; `direct` lists, for each vocabulary kernel in
    use, which losses have it, their coefficients `[k, n, t]` on its gradient, and that gradient `[r, v]`. Any other callable
    is kept as the cotangent of the logits, `cotangents[e]` `[n, t, v]`.
    """

    rollout: Rollout
    score: Tensor
    direct: tuple[tuple[list[int], Tensor, Tensor], ...] = ()
    cotangents: dict[int, Tensor] = field(default_factory=dict)

    def mean(self, weight: Tensor) -> Tensor:
        """`Σ_i weight_i g_i` of every loss, `[e, p]`, for weights `[n]`: one contraction for all estimators."""
        rollout = self.rollout
        weighted = self.score * weight[:, None]
        total = rollout.family.score_sum(rollout.table, rollout.contexts, rollout.tokens, weighted)
        rows = rollout.contexts.flatten()
        for losses, direct, slope in self.direct:
            visits = direct.new_zeros(len(losses), len(slope)).index_add_(1, rows, (direct * weight[:, None]).flatten(1))
            total[losses] += visits[..., None] * slope
        for e, cotangent in self.cotangents.items():
            total[e].index_add_(0, rows, (cotangent * weight[:, None, None]).flatten(0, 1))
        return total.flatten(1)

    def square(self, weight: Tensor) -> Tensor:
        """`Σ_i weight_i ‖g_i‖²` of every loss, `[e]`, for weights `[n]`."""
        return self.squares() @ weight

    def squares(self, size: int = 1) -> Tensor:
        """`‖Σ g_i‖²` of every loss over every `size` consecutive responses, `[e, n / size]`."""
        rollout = self.rollout
        (n, t), (r, v) = rollout.tokens.shape, rollout.table.shape
        if size > 1 or rollout.revisits:
            # Steps share rows. Whole tables are the shorter way where a response visits most of them.
            if r * v <= 8 * t * size:
                whole = (self.tables(e).view(-1, size, r, v).sum(1) for e in range(len(self.score)))
                return torch.stack([table.square().sum((-2, -1)) for table in whole])
            return self.sums(torch.arange(n) // size, n // size).squares()
        # No response emits twice from one row, so the steps of a response are orthogonal and their squares add up.
        scores = rollout.table, rollout.contexts, rollout.tokens
        found = (self.score.square() * rollout.family.score_norm(*scores)).sum(-1)
        for losses, direct, slope in self.direct:
            along, length = rollout.family.score_dot(*scores, slope), slope.square().sum(-1)[rollout.contexts]
            found[losses] += (direct * (2 * self.score[losses] * along + direct * length)).sum(-1)
        for e, cotangent in self.cotangents.items():
            found[e] = cotangent.square().sum((-2, -1))
        return found

    def sums(self, segment: Tensor, segments: int, weight: Tensor | None = None) -> Sums:
        """`Σ_i weight_i g_i` of every loss over the responses of every segment, for their segments `[n]` and weights `[n]`."""
        rollout, (r, v) = self.rollout, self.rollout.table.shape
        taken, multiples, shared = rollout.family.split(rollout.table, rollout.contexts, rollout.tokens)
        each = torch.ones_like(self.score[0, :, :1]) if weight is None else weight[:, None]
        keys = segment[:, None] * r + rollout.contexts
        lines, line = distinct(keys.flatten(), segments * r)
        rows, _ = distinct(rollout.contexts.flatten(), r)
        score = self.score * each
        along = score.new_zeros(len(shared) + len(self.direct), len(score), len(lines))
        for d, multiple in enumerate(multiples):
            along[d] = added((score * multiple).flatten(1), line, len(lines))
        for d, (losses, direct, _) in enumerate(self.direct, len(shared)):
            along[d, losses] = added((direct * each).flatten(1), line, len(lines))
        found = (taken & rollout.mask).flatten().nonzero()[:, 0]
        tokens = rollout.tokens.flatten()[found].long()
        cells, cell = distinct(keys.flatten()[found] * v + tokens, segments * r * v)
        return Sums(
            (segments, r, v),
            cells,
            added(score.flatten(1).index_select(1, found), cell, len(cells)),
            lines,
            along,
            rows,
            torch.cat([shared[:, rows], *(slope[None, rows] for _, _, slope in self.direct)]),
            {
                e: part.new_zeros(len(lines), v).index_add_(0, line, (part * each[..., None]).flatten(0, 1))
                for e, part in self.cotangents.items()
            },
        )

    def tables(self, e: int) -> Tensor:
        """Loss `e`'s gradient at every response in full, `[n, r, v]`: the slow form, for steps that share rows."""
        rollout = self.rollout
        n, (r, v) = len(rollout.weight), rollout.table.shape
        if e in self.cotangents:
            rows = (rollout.contexts + r * torch.arange(n)[:, None]).flatten()
            full = torch.zeros(n * r, v, dtype=rollout.weight.dtype)
            return full.index_add_(0, rows, self.cotangents[e].flatten(0, 1)).view(n, r, v)
        full = rollout.family.score_tables(rollout.table, rollout.contexts, rollout.tokens, self.score[e])
        for losses, direct, slope in self.direct:
            if e in losses:
                visits = direct.new_zeros(n, r).scatter_add_(1, rollout.contexts, direct[losses.index(e)])
                full = full + visits[..., None] * slope
        return full


def gradients(losses: Sequence[Loss], rollout: Rollout) -> Gradients:
    """Differentiate every loss at every response: estimators in closed form, other callables by one backward pass each."""
    parts: list[Coefficients | None] = [
        coefficients(loss, rollout)
        if isinstance(loss, Estimator)
        else loss_coefficients(loss, rollout)
        if isinstance(loss, PolicyLoss)
        else None
        for loss in losses
    ]
    cotangents = {e: cotangent(loss, rollout) for e, loss in enumerate(losses) if parts[e] is None}
    return gathered(rollout, parts, cotangents)


def gathered(
    rollout: Rollout, parts: Sequence[Coefficients | None], cotangents: Mapping[int, Tensor] | None = None
) -> Gradients:
    """Gradients of several losses from the coefficients of each, or `None` where it has a cotangent."""
    blank = torch.zeros(rollout.mask.shape, dtype=torch.float64)
    score = torch.stack([blank if part is None else part.score for part in parts])
    direct = []
    for kernel in VOCABULARY_KERNELS:
        found = {
            e: part.direct
            for e, part in enumerate(parts)
            if part is not None and part.direct is not None and part.kernel == kernel
        }
        if found:
            slope = rollout.family.slope(kernel, rollout.table, rollout.reference_table)
            direct.append((list(found), torch.stack(list(found.values())), slope))
    return Gradients(rollout, score, tuple(direct), dict(cotangents or {}))


def is_grouped(loss: Loss) -> TypeGuard[Estimator | PolicyLoss]:
    """Whether a loss compares responses to one prompt with each other, so that a single one has no gradient of its own."""
    return isinstance(loss, Estimator | PolicyLoss) and loss.grouped


def unit_of(loss: Loss) -> int:
    """How many responses to one prompt a loss takes together."""
    return loss.group_size if isinstance(loss, Estimator | PolicyLoss) and loss.grouped else 1


def cotangent(loss: Loss, rollout: Rollout) -> Tensor:
    """Gradient of a callable's per-sample losses with respect to each response's own logits, `[n, t, v]`, by autograd.

    What leaks from after the end of a response stays in: a callable that forgets the mask descends that, too.
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
    return grad.view(*leaf.tokens.shape, -1)


def in_logits(batch: Gradients, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums of gradients and of their squares where the parameters are the logits."""
    return batch.mean(weight), batch.square(weight)


def total(parts: Parts, batch: Callable[[Rollout], Gradients], pullback: Pullback, rows: int = 0) -> tuple[Tensor, Tensor]:
    """`Σ_i weight_i g_i` `[e, p]` and `Σ_i weight_i ‖g_i‖²` `[e]` over all parts of a rollout whose whole table has `rows` rows."""
    sums = squares = None
    for rollout, own, share in parts():
        found, square = pullback(batch(rollout), share * rollout.weight)
        if own is None:
            return found, square
        found = found.view(len(found), len(own), -1)
        sums = found.new_zeros(len(found), rows, found.shape[-1]) if sums is None else sums
        for each, part in zip(sums, found, strict=True):  # a loss at a time: rows of one table lie close together
            each.index_add_(0, own, part)
        squares = square if squares is None else squares + square
    assert sums is not None
    assert squares is not None
    return sums.flatten(1), squares


def moments_in_parts(losses: Sequence[Loss], parts: Parts, rows: int, method: str) -> list[Moments]:
    """`moments_of` where an enumerated rollout is never held whole: of responses to no prompt, in the logits of `rows` rows."""
    return _moments(losses, [parts], rows, method, in_logits)


def moments_of(losses: Sequence[Loss], rollout: Rollout, method: str, pullback: Pullback = in_logits) -> list[Moments]:
    """Exact moments of every loss over an enumerated rollout, in the parameters that `pullback` leads to.

    Grouped estimators are averaged over all groups in closed form, see `group_moments`.
    Raises `ValueError` when a mean overflows float64.
    """
    by_loss = _moments(losses, [_whole(part) for part in rollout.by_prompt()], 0, method, pullback, _whole(rollout))
    if pullback is in_logits and rollout.weight.numel() * rollout.table.numel() <= CENTRED_DOUBLES:
        by_loss = [
            recentred(loss, each, rollout) if digits_lost(loss, each) else each
            for loss, each in zip(losses, by_loss, strict=True)
        ]
    return by_loss


def digits_lost(loss: Loss, found: Moments) -> bool:
    """Whether a covariance trace `E‖g‖² − ‖E g‖²` of single responses is a small difference of large numbers."""
    grouped = is_grouped(loss)
    return not grouped and found.trace_cov < CANCELLED * float(found.mean.square().sum())


def recentred(loss: Loss, found: Moments, rollout: Rollout) -> Moments:
    """The moments with the trace summed over an enumerated rollout's squared distances from the mean."""
    return replace(found, trace_cov=float(centred_trace(gradients([loss], rollout), 0, found.mean)))


def _whole(rollout: Rollout) -> Parts:
    return lambda: [(rollout, None, 1.0)]


def _moments(
    losses: Sequence[Loss], prompts: Sequence[Parts], rows: int, method: str, pullback: Pullback, parts: Parts | None = None
) -> list[Moments]:
    """Moments over `parts`, of grouped estimators over those of every prompt (of the one there is, without `parts`)."""
    groups = {e: loss for e, loss in enumerate(losses) if isinstance(loss, Estimator) and loss.grouped}
    plain = [e for e in range(len(losses)) if e not in groups]
    found = group_moments(groups, prompts, rows, method, pullback)
    if plain:
        chosen = [losses[e] for e in plain]
        means, squares = total(parts or prompts[0], lambda part: gradients(chosen, part), pullback, rows)
        for e, mean, square in zip(plain, means, squares.tolist(), strict=True):
            found[e] = Moments(mean, max(square - float(mean.square().sum()), 0.0), method=method)
    check_finite(losses, [found[e] for e in range(len(losses))])
    return [found[e] for e in range(len(losses))]


def check_finite(losses: Sequence[Loss], found: Sequence[Moments]) -> None:
    """Raise `ValueError` for a mean that overflowed."""
    for loss, each in zip(losses, found, strict=True):
        # A trace is finite only if the mean is, and a sum only if every term is.
        if not (math.isfinite(each.trace_cov) or math.isfinite(float(each.mean.sum()))):
            name = loss.name if isinstance(loss, Estimator | PolicyLoss) else getattr(loss, "__name__", "loss")
            raise ValueError(f"the expected gradient of {name} is not finite: the policies are so far apart that it overflows")


def centred_trace(batch: Gradients, e: int, mean: Tensor) -> Tensor:
    """`Σ_i weight_i ‖g_i − mean‖²` of loss `e` over an enumerated rollout, from every response's gradient in full."""
    return batch.rollout.weight @ (batch.tables(e).flatten(1) - mean).square().sum(-1)


def group_moments(
    estimators: Mapping[int, Estimator], prompts: Sequence[Parts], rows: int, method: str, pullback: Pullback
) -> dict[int, Moments]:
    """Exact moments of estimators that compare the `G` responses of a group, from the responses to every prompt.

    With `c` a response's coefficient and `s` its weighted score sum, leave-one-out averages to the U-statistic
    `(G(G−1))⁻¹ Σ_{i≠j} (c_i − c_j) s_i`, the sample covariance of `c` and `s`; the group mean is `1 − 1/G` times that. Its
    variance is Hoeffding's `2/(G(G−1)) [2(G−2) ζ₁ + ζ₂]`. Proof: `c_i − (G−1)⁻¹ Σ_{j≠i} c_j = (G−1)⁻¹ Σ_j (c_i − c_j)`, and
    `c_i − G⁻¹ Σ_j c_j` is `1 − 1/G` times that; the terms of `i, j` and `j, i` add to twice the symmetric kernel
    `h = ½ (c_i − c_j)(s_i − s_j)`, with `E h = Cov(c, s)`, `ζ₁ = tr Cov E[h | i]` and `ζ₂ = tr Cov h`.
    `mean` is the expected gradient of the group average, `trace_cov` is `G` times the covariance trace of the group average, so
    that both compare with ungrouped estimators sample for sample.
    A group answers one prompt; over several prompts the variance between them is added (law of total variance).
    """
    by_loss = {}
    statistics: dict[Estimator, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for e, estimator in estimators.items():
        ungrouped = replace(estimator, baseline=None, group=None)
        if ungrouped not in statistics:
            statistics[ungrouped] = [_covariance_statistics(ungrouped, parts, rows, pullback) for parts in prompts]
        by_loss[e] = over_prompts([of_group(estimator, *each, method) for each in statistics[ungrouped]], estimator.group_size)
    return by_loss


def over_prompts(parts: list[Moments], group: int) -> Moments:
    """Moments of a group average when the prompt is drawn first, from those of every prompt."""
    if len(parts) == 1:
        return parts[0]
    means = torch.stack([part.mean for part in parts])
    between = float((means - means.mean(0)).square().sum(-1).mean())
    within = sum(part.trace_cov for part in parts) / len(parts)
    return replace(parts[0], mean=means.mean(0), trace_cov=within + group * between)


def of_group(estimator: Estimator, covariance: Tensor, zeta1: Tensor, zeta2: Tensor, method: str) -> Moments:
    """Moments of a group baseline from `Cov(c, s)` `[p]` and Hoeffding's `ζ₁`, `ζ₂`, see `group_moments`."""
    size = estimator.group_size
    variance = 2 / (size * (size - 1)) * (2 * (size - 2) * zeta1 + zeta2)
    shrink = 1 - 1 / size if estimator.baseline == "group_mean" else 1.0
    return Moments(shrink * covariance, max(float(shrink**2 * size * variance), 0.0), method=method)


def _covariance_statistics(estimator: Estimator, parts: Parts, rows: int, pullback: Pullback) -> tuple[Tensor, Tensor, Tensor]:
    """`Cov(c, s)` `[p]` and Hoeffding's `ζ₁`, `ζ₂` of the kernel `½ (c − c')(s − s')`."""
    held = [(share * rollout.weight, group_parts(estimator, rollout)[0]) for rollout, _, share in parts()]
    weight, values = (torch.cat(each) for each in zip(*held, strict=True))
    average = weight @ values
    variance = weight @ (values - average).square()

    def stacked(rollout: Rollout) -> Gradients:
        c, s = group_parts(estimator, rollout)
        a = (c - average)[:, None]
        return Gradients(rollout, torch.stack([s.expand_as(rollout.mask), a * s, a * a * s]))

    means, squares = total(parts, stacked, pullback, rows)
    return group_statistics(means, squares[:2], variance)


def group_statistics(means: Sequence[Tensor] | Tensor, squares: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Cov(c, s)` `[p]` and Hoeffding's `ζ₁`, `ζ₂` of the coefficients `c` and the score sums `s` of responses.

    With `a` the coefficient less its mean: means `[p]` of `s`, `a s` and `a² s`, mean squared norms `[2]` of `s` and `a s`, and `E[a²]`.
    """
    (centre, covariance, second), (square_s, square_as) = means, squares
    m22 = square_as - 2 * second @ centre + variance * (centre @ centre)
    zeta1 = (m22 - covariance @ covariance) / 4
    zeta2 = (m22 + variance * (square_s - centre @ centre)) / 2
    return covariance, zeta1, zeta2
