"""The exact expected gradient of a loss over batches: every response, or every pair of responses, enumerated."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradlab.audit.batch import Subject
from gradlab.audit.call import gradient
from gradlab.audit.worlds import PADDING, World, batch, nudged, standard

#: How often a random loss is evaluated at every batch.
REPEATS = 32
#: The most evaluations that the worlds of an audit may take together; a minute or so for a light loss, ten for a heavy one.
AFFORDABLE = 100_000


@dataclass(frozen=True, eq=False)
class Field:
    """The expected gradient of a loss in one world.

    mean: `E_μ[∇ loss]` with respect to the policy's table, `[p]`. size: root mean square of one batch's gradient, the scale
    against which a mean counts as 0. leak: root mean square of what flows into padded positions. error: standard error of the
    mean of a random loss, 0 otherwise. cotangents: `[groups, B, T, V]` with respect to every batch's own logits; values: the
    losses `[groups]`; weight: probabilities of the groups.
    """

    world: World
    mean: Tensor
    size: float
    leak: float
    error: float
    cotangents: Tensor
    values: Tensor
    weight: Tensor

    @property
    def finite(self) -> bool:
        """Whether the mean is a number."""
        return math.isfinite(float(self.mean.sum()))


def count(responses: int, group: int, exchangeable: bool) -> int:
    """How many groups of `group` out of `responses` there are, with repetition; `exchangeable` ones without their order."""
    return math.comb(responses + group - 1, group) if exchangeable else responses**group


def check_affordable(subject: Subject, group: int, random: bool, exchangeable: bool) -> None:
    """Raise `ValueError` when the groups of the standard worlds are too many to enumerate, with the largest size that is not."""
    sizes = [len(world.rollout.weight) for world in standard()]

    def evaluations(group: int) -> int:
        return sum(count(n, group, exchangeable) for n in sizes) * (REPEATS if random else 1)

    if evaluations(group) > AFFORDABLE:
        largest = next(g for g in itertools.count(1) if evaluations(g + 1) > AFFORDABLE)
        why = "" if exchangeable else ", in every order, because the order makes a difference to it or was not looked at"
        raise ValueError(
            f"groups of {group} responses cannot be enumerated: {subject.name} would be evaluated {evaluations(group)} times{why}; "
            f"at most {AFFORDABLE} are allowed, so the largest group is {largest}"
        )


def _product(items: Iterable[int], size: int) -> Iterable[tuple[int, ...]]:
    return itertools.product(items, repeat=size)


def field(
    subject: Subject, world: World, group: int, random: bool = False, exchangeable: bool = False, nudge: float = 0.0
) -> Field:
    """Enumerate all groups of `group` responses and average their gradients, weighted by the sampler's probabilities.

    exchangeable: the order of the responses makes no difference, so that one order stands for all. nudge: how far the logits
    that the loss sees are moved, see `rounding`.
    """
    rollout, columns = world.rollout, nudged(world.columns(PADDING), nudge)
    n = len(rollout.weight)
    listed = list((itertools.combinations_with_replacement if exchangeable else _product)(range(n), group))
    groups = torch.tensor(listed)
    orders = [math.factorial(group) // math.prod(map(math.factorial, Counter(rows).values())) for rows in listed]
    weight = rollout.weight[groups].prod(-1) * (torch.tensor(orders, dtype=torch.float64) if exchangeable else 1.0)
    cotangents, values, spread = [], [], 0.0
    for rows, share in zip(groups, weight, strict=True):
        draws = [gradient(subject, *batch(columns, rows)) for _ in range(REPEATS if random else 1)]
        drawn = torch.stack([cotangent for cotangent, _ in draws])
        cotangents.append(drawn.mean(0))
        values.append(float(sum(value for _, value in draws)) / len(draws))
        if random:
            spread += float(share) ** 2 * float(drawn.var(0).sum()) / len(draws)
    stacked = torch.stack(cotangents)
    t = rollout.tokens.shape[1]
    live = torch.zeros(n, t + PADDING, dtype=torch.bool)
    live[:, :t] = rollout.mask
    inside = torch.where(live[groups][..., None], stacked, 0.0)
    leak = torch.where(live[groups][..., None], 0.0, stacked).nan_to_num(nan=math.inf).square().sum((-3, -2, -1))
    mean = torch.zeros_like(rollout.table)
    mean.index_add_(0, rollout.contexts[groups].flatten(), (inside[..., :t, :] * weight[:, None, None, None]).flatten(0, 2))
    size = float((weight @ inside.square().sum((-3, -2, -1))).sqrt())
    return Field(
        world,
        mean.flatten(),
        size,
        float((weight @ leak).sqrt()),
        spread**0.5,
        inside,
        torch.tensor(values, dtype=torch.float64),
        weight,
    )


def rounding(subject: Subject, known: Field, group: int, exchangeable: bool, nudge: float) -> float:
    """The norm of the error that the loss's own rounding leaves in the mean of a field.

    nudge: a change that is far above the rounding of numbers and whose square is far below it. A second difference in such
    steps is of the order of `nudge²` for exact arithmetic; what is left of it is three rounding errors that have nothing to do
    with each other, with weights 1, −2 and 1.
    """
    left = []
    for step in (nudge, 2 * nudge):
        up, down = (field(subject, known.world, group, False, exchangeable, by).mean for by in (step, -step))
        left.append(float((up - 2 * known.mean + down).square().sum()) / 6)
    error = math.sqrt(sum(left) / len(left))
    return error if math.isfinite(error) else math.inf
