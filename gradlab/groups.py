"""Exact moments of losses that compare the responses of a group, by the law of the others in it.

A response belongs to a class, that of its reward (or of its reward less βk). Among the `G − 1` others the classes are multinomial: for a
binary reward the right ones are binomial, and where each response is a class of its own this is enumeration of all groups. Given its
class and the others', a response's gradient is a combination `Σ_b α_b v_b(y)` of few: one for positive and one for negative advantages,
which a trust region treats differently, and one that does not depend on the group. So with `u` the average gradient of a group,

    E u = Σ_{j,b} E[α_b|j] V_{jb},     E‖u‖² = (1/G) Σ_j E[α_b α_b'|j] N_{jbb'} + (1 − 1/G) Σ E[α_b(j) α_b'(k)|j,k] ⟨V_{jb}, V_{kb'}⟩,

`V_{jb}` the sum over class `j` of `μ(y) v_b(y)`, `N` that of inner products, and the last expectation over the `G − 2` others of a pair.
An advantage that is linear needs no classes: with `d` a response's value less its mean, Hoeffding's moments of `d` and the scores do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradlab.estimators import advantages
from gradlab.estimators.closed_form import alone, of_advantage
from gradlab.estimators.coefficients import Coefficients
from gradlab.estimators.policy_loss import PolicyLoss, check_policies, fixed, normalised, own_values
from gradlab.moments import Moments, Pullback, gathered, over_prompts
from gradlab.rollout import Rollout

#: Advantages of groups that are worked out at most: compositions of the others times pairs of classes.
LAW = 2**22
#: Coefficients of single tokens that are held at most for the advantages of a loss whose clip acts on advantage less KL.
COEFFICIENTS = 2**23
#: Different values of responses that are told apart at most.
CLASSES = 2**9


def exact_moments(loss: PolicyLoss, rollout: Rollout, pullback: Pullback) -> Moments:
    """Moments of a grouped loss over an enumerated rollout: `mean` of the group average, `trace_cov` `G` times its covariance trace.

    The law is binomial, multinomial or an enumeration of groups; of a linear advantage with many values it is Hoeffding's.
    A group answers one prompt; over several prompts the variance between them is added.
    Raises `ValueError` where there are too many groups and the advantage is not linear.
    """
    check_policies(loss, rollout)
    loss = fixed(loss, rollout)
    return over_prompts([_one_prompt(loss, part, pullback) for part in rollout.by_prompt()], loss.group_size)


def _one_prompt(loss: PolicyLoss, rollout: Rollout, pullback: Pullback) -> Moments:
    values = own_values(loss, rollout)
    basis = basis_of(loss, rollout)
    if loss.linear and len(basis) == 2 and len(torch.unique(values)) > 2:
        return _hoeffding(loss, rollout, values, basis, pullback)
    levels, classes = torch.unique(values, return_inverse=True)
    _check_classes(loss, len(levels))
    weight = torch.zeros(len(levels), dtype=torch.float64).index_add(0, classes, rollout.weight)
    law = _law(loss, rollout, levels, weight)
    return _of_classes(loss, rollout, classes, law, basis, pullback, len(levels))


# ---- basis --------------------------------------------------------------------------------------------------------------


def basis_of(loss: PolicyLoss, rollout: Rollout) -> list[Coefficients]:
    """Gradients of which a response's is a combination: for advantages 1 and −1 (one where these differ in sign alone), and alone."""
    base = of_advantage(loss, rollout, torch.zeros_like(rollout.weight))
    ones = torch.ones_like(rollout.weight)
    up, down = (of_advantage(loss, rollout, sign * ones).score - base.score for sign in (1.0, -1.0))
    rest = base + alone(loss, rollout)
    one_sided = bool(((up + down).abs() <= 1e-14 * (up.abs() + down.abs())).all())
    return [Coefficients(up), rest] if one_sided else [Coefficients(up), Coefficients(down), rest]


def _shares(values: Tensor, basis: int) -> Tensor:
    """`α_b` of advantages, `[…, b]`."""
    one = torch.ones_like(values)
    if basis == 2:
        return torch.stack([values, one], -1)
    return torch.stack([values.clamp(min=0), -values.clamp(max=0), one], -1)


# ---- the law of the others ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """Advantages of a response of class `j` given the others, `single` `[j, m]`, and given one of class `k` too, `pair` `[j, k, m]`.

    The probabilities `[m]` of the others, and of the rest, sum to 1. Of a pair, the second's advantage is `pair[k, j]`.
    """

    single: Tensor
    single_weight: Tensor
    pair: Tensor
    pair_weight: Tensor


def _work(classes: int, group: int) -> int:
    """Advantages that the law of a group takes."""
    return classes**2 * group * math.comb(max(group - 2, 0) + classes - 1, classes - 1)


def compositions(total: int, classes: int) -> Tensor:
    """All ways in which `total` responses fall into classes, `[m, classes]`."""
    if total == 0:
        return torch.zeros(1, classes, dtype=torch.long)
    if total == 1:
        return torch.eye(classes, dtype=torch.long)
    if classes == 1:
        return torch.tensor([[total]])
    parts = []
    for first in range(total + 1):
        rest = compositions(total - first, classes - 1)
        parts.append(torch.cat([torch.full((len(rest), 1), first), rest], -1))
    return torch.cat(parts)


def probabilities(counts: Tensor, weight: Tensor) -> Tensor:
    """Multinomial probabilities `[m]` of counts `[m, classes]`."""
    total = int(counts[0].sum()) if len(counts) else 0
    log = math.lgamma(total + 1) - torch.lgamma(counts.double() + 1).sum(-1) + torch.xlogy(counts, weight).sum(-1)
    return log.exp()


def _rewards_of(counts: Tensor, levels: Tensor) -> Tensor:
    """Rewards `[m, total]` of groups with these counts."""
    index = torch.from_numpy(np.stack([np.repeat(np.arange(len(levels)), row) for row in counts.numpy()]))
    return levels[index]


def _law(loss: PolicyLoss, rollout: Rollout, levels: Tensor, weight: Tensor) -> Law:
    advantage = _first(loss, rollout)
    others = compositions(loss.group_size - 1, len(levels))
    single = torch.stack([advantage(_joined([own], others, levels)) for own in levels])
    pairs = compositions(loss.group_size - 2, len(levels))
    pair = torch.stack([torch.stack([advantage(_joined([own, other], pairs, levels)) for other in levels]) for own in levels])
    return Law(single, probabilities(others, weight), pair, probabilities(pairs, weight))


def given_others(loss: PolicyLoss, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """The advantage of every response given the others of its group, `[n, m]`, and the probabilities of these others, `[m]`.

    Of a loss that compares no group, its advantages `[n, 1]` with probability 1. Raises `ValueError` where there are too many groups.
    """
    values = own_values(loss, rollout)
    if not loss.grouped:
        return normalised(fixed(loss, rollout), rollout, values)[:, None], torch.ones(1, dtype=torch.float64)
    levels, classes = torch.unique(values, return_inverse=True)
    _check_classes(loss, len(levels))
    weight = torch.zeros(len(levels), dtype=torch.float64).index_add(0, classes, rollout.weight)
    others, advantage = compositions(loss.group_size - 1, len(levels)), _first(fixed(loss, rollout), rollout)
    single = torch.stack([advantage(_joined([own], others, levels)) for own in levels])
    return single[classes], probabilities(others, weight)


def _first(loss: PolicyLoss, rollout: Rollout) -> Callable[[Tensor], Tensor]:
    """The advantage of the first response of every group, `[m]` of rewards `[m, G]`."""
    of = advantages.within_group(loss.advantage, std=loss.std, epsilon=loss.epsilon, k=loss.k)
    return lambda groups: normalised(loss, rollout, of(groups))[..., 0]


def _check_classes(loss: PolicyLoss, count: int) -> None:
    if count > CLASSES or _work(count, loss.group_size) > LAW:
        instead = "" if loss.linear else " with an advantage that is not linear"
        raise ValueError(
            f"groups of {loss.group} out of {count} different values{instead} are too many to list; estimate from samples "
            "(samples=…), or give a reward of few values, a smaller group, or combine the KL after or in a term of its own"
        )


def _joined(first: Sequence[Tensor], counts: Tensor, levels: Tensor) -> Tensor:
    """Groups that begin with the given rewards, `[m, G]`."""
    heads = [own.expand(len(counts), 1) for own in first]
    return torch.cat([*heads, _rewards_of(counts, levels)], -1)


# ---- moments ------------------------------------------------------------------------------------------------------------


def _of_classes(
    loss: PolicyLoss, rollout: Rollout, classes: Tensor, law: Law, basis: list[Coefficients], pullback: Pullback, count: int
) -> Moments:
    size = loss.group_size
    linear = loss.combine != "after" or len(basis) == 2
    if linear:
        shares, paired = (_shares(each, len(basis)) for each in (law.single, law.pair))
        parts = basis
    else:
        # A trust region acts on the sum of advantage and KL: each advantage that occurs has a gradient of its own.
        levels = torch.unique(torch.cat([law.single.flatten(), law.pair.flatten()]))
        if len(levels) * rollout.mask.numel() > COEFFICIENTS:
            raise ValueError(
                f"a clip acts on advantage less βk, and {len(levels)} advantages occur: too many for {len(rollout.weight)} responses; "
                "estimate from samples (samples=…), or take a smaller group or a reward of fewer values"
            )
        shares, paired = (
            torch.nn.functional.one_hot(torch.searchsorted(levels, each), len(levels)).double()
            for each in (law.single, law.pair)
        )
        rest = alone(loss, rollout)
        parts = [of_advantage(loss, rollout, level.expand_as(rollout.weight)) + rest for level in levels]
    means, inner = zip(*(_class_sums(parts, rollout, classes == j, pullback, linear) for j in range(count)), strict=True)
    v, n = torch.stack(means), torch.stack(inner)
    single = torch.einsum("jmb,m->jb", shares, law.single_weight)
    own = torch.einsum("jmb,jmc,m,jbc->", shares, shares, law.single_weight, n)
    gram = torch.einsum("jbp,kcp->jbkc", v, v)
    between = torch.einsum("jkmb,kjmc,m,jbkc->", paired, paired, law.pair_weight, gram)
    mean = torch.einsum("jb,jbp->p", single, v)
    second = float(own) / size + (1 - 1 / size) * float(between)
    method = "binomial" if count <= 2 else "multinomial" if count < len(rollout.weight) else "enumeration of groups"
    return Moments(mean, max(size * (second - float(mean @ mean)), 0.0), method=method)


def _class_sums(
    parts: list[Coefficients], rollout: Rollout, rows: Tensor, pullback: Pullback, together: bool
) -> tuple[Tensor, Tensor]:
    """`Σ w v_b` `[b, p]` and `Σ w ⟨v_b, v_c⟩` `[b, c]` over the responses of a class, by polarisation.

    together: whether a response's gradient has several parts at once; otherwise products of different ones are not needed, and 0.
    """
    part, own = rollout.only(rows), [each.only(rows) for each in parts]
    pairs = [(b, c) for b in range(len(own)) for c in range(b)] if together else []
    means, squares = pullback(gathered(part, [*own, *(own[b] + own[c] for b, c in pairs)]), part.weight)
    inner = torch.diag(squares[: len(own)])
    for i, (b, c) in enumerate(pairs, len(own)):
        inner[b, c] = inner[c, b] = (squares[i] - squares[b] - squares[c]) / 2
    return means[: len(own)], inner


def _hoeffding(loss: PolicyLoss, rollout: Rollout, values: Tensor, basis: list[Coefficients], pullback: Pullback) -> Moments:
    """Moments of a linear advantage `a (x − mean of the others)`, whatever the values `x`.

    With `d = x − E x`, `s` the gradient for advantage 1 and `q` the part alone, a response's is `a (d − D) s + q`, `D` the mean of the
    others' `d`, which is independent of it. Of a pair, each one's `D` holds the other's `d` once.
    """
    size, weight = loss.group_size, rollout.weight
    of = advantages.within_group(loss.advantage, std=loss.std, epsilon=loss.epsilon, k=loss.k)
    first = torch.zeros(1, size, dtype=torch.float64)
    first[0, 0] = 1.0
    a = float(normalised(loss, rollout, of(first))[0, 0])
    apart = values - values[0]
    d = (apart - weight @ apart)[:, None]
    spread = float(weight @ d[:, 0].square())
    s, q = basis
    means, squares = pullback(gathered(rollout, [s, s * d, s * d * d, q, q * d, s * d + q]), weight)
    s_mean, c, second, q_mean, dq, _ = means
    s_square, ds_square, _, q_square, _, both = squares.tolist()
    others = 1 / (size - 1)
    own = a * a * (ds_square + others * spread * s_square) + a * (both - ds_square - q_square) + q_square
    pair = (
        a
        * a
        * ((1 + others**2) * (c @ c) - 2 * others * (second @ s_mean) + (size - 2) * others**2 * spread * (s_mean @ s_mean))
    )
    pair = pair + 2 * a * (c @ q_mean - others * (s_mean @ dq)) + q_mean @ q_mean
    mean = a * c + q_mean
    average = own / size + (1 - 1 / size) * float(pair)
    return Moments(mean, max(size * (average - float(mean @ mean)), 0.0), method="closed form")
