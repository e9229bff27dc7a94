"""The exact expected gradient of a loss over batches: every response, or every pair of responses, enumerated."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradlab.audit.batch import Subject
from gradlab.audit.call import loss_gradient
from gradlab.audit.worlds import PADDING, AuditScenario, batch, perturbed_logits, standard

#: How often a random loss is evaluated at every batch.
REPEATS = 32
#: The most evaluations that the worlds of an audit may take together; a minute or so for a light loss, ten for a heavy one.
MAX_EVALUATIONS = 100_000


@dataclass(frozen=True, eq=False)
class ExpectedGradient:
    """The expected gradient of a loss in one world.

    mean: `E_μ[∇ loss]` with respect to the policy's table, `[p]`. size: root mean square of one batch's gradient, the scale
    against which a mean counts as 0. leak: root mean square of what flows into padded positions. error: standard error of the
    mean of a random loss, 0 otherwise. cotangents: `[groups, B, T, V]` with respect to every batch's own logits; values: the
    losses `[groups]`; weight: probabilities of the groups.
    """

    case: AuditScenario
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


def check_affordable(
    subject: Subject, group: int, random: bool, exchangeable: bool, cases: Sequence[AuditScenario] | None = None
) -> None:
    """Raise `ValueError` when the groups of the standard worlds are too many to enumerate, with the largest size that is not."""
    sizes = [len(case.rollout.weight) for case in cases or standard()]

    def evaluations(group: int) -> int:
        return sum(count(n, group, exchangeable) for n in sizes) * (REPEATS if random else 1)

    if evaluations(group) > MAX_EVALUATIONS:
        largest = next(g for g in itertools.count(1) if evaluations(g + 1) > MAX_EVALUATIONS)
        why = "" if exchangeable else ", in every order, because the order makes a difference to it or was not looked at"
        raise ValueError(
            f"groups of {group} responses cannot be enumerated: {subject.name} would be evaluated {evaluations(group)} times{why}; "
            f"at most {MAX_EVALUATIONS} are allowed, so the largest group is {largest}"
        )


def _product(items: Iterable[int], size: int) -> Iterable[tuple[int, ...]]:
    return itertools.product(items, repeat=size)


def expected_gradient(
    subject: Subject,
    case: AuditScenario,
    group: int,
    random: bool = False,
    exchangeable: bool = False,
    perturbation: float = 0.0,
) -> ExpectedGradient:
    """Enumerate all groups of `group` responses and average their gradients, weighted by the sampler's probabilities.

    exchangeable: the order of the responses makes no difference, so that one order stands for all. perturbation: how far the logits
    that the loss sees are moved, see `rounding_error`.
    """
    rollout, columns = case.rollout, perturbed_logits(case.columns(PADDING), perturbation)
    n = len(rollout.weight)
    combinations = list((itertools.combinations_with_replacement if exchangeable else _product)(range(n), group))
    groups = torch.tensor(combinations)
    permutations = [math.factorial(group) // math.prod(map(math.factorial, Counter(rows).values())) for rows in combinations]
    weight = rollout.weight[groups].prod(-1) * (torch.tensor(permutations, dtype=torch.float64) if exchangeable else 1.0)
    cotangents, values, spread = [], [], 0.0
    for rows, probability in zip(groups, weight, strict=True):
        draws = [loss_gradient(subject, *batch(columns, rows)) for _ in range(REPEATS if random else 1)]
        cotangents_of_draws = torch.stack([cotangent for cotangent, _ in draws])
        cotangents.append(cotangents_of_draws.mean(0))
        values.append(float(sum(value for _, value in draws)) / len(draws))
        if random:
            spread += float(probability) ** 2 * float(cotangents_of_draws.var(0).sum()) / len(draws)
    stacked = torch.stack(cotangents)
    t = rollout.tokens.shape[1]
    inside_mask = torch.zeros(n, t + PADDING, dtype=torch.bool)
    inside_mask[:, :t] = rollout.mask
    inside = torch.where(inside_mask[groups][..., None], stacked, 0.0)
    leak = torch.where(inside_mask[groups][..., None], 0.0, stacked).nan_to_num(nan=math.inf).square().sum((-3, -2, -1))
    mean = torch.zeros_like(rollout.table)
    mean.index_add_(0, rollout.contexts[groups].flatten(), (inside[..., :t, :] * weight[:, None, None, None]).flatten(0, 2))
    size = float((weight @ inside.square().sum((-3, -2, -1))).sqrt())
    return ExpectedGradient(
        case,
        mean.flatten(),
        size,
        float((weight @ leak).sqrt()),
        spread**0.5,
        inside,
        torch.tensor(values, dtype=torch.float64),
        weight,
    )


def rounding_error(subject: Subject, known: ExpectedGradient, group: int, exchangeable: bool, perturbation: float) -> float:
    """The norm of the error that the loss's own rounding leaves in the mean of a field.

    perturbation: a change that is far above the rounding of numbers and whose square is far below it. A second difference in such
    steps is of the order of `nudge²` for exact arithmetic; what is left of it is three rounding errors that have nothing to do
    with each other, with weights 1, −2 and 1.
    """
    squared_errors = []
    for step in (perturbation, 2 * perturbation):
        up, down = (expected_gradient(subject, known.case, group, False, exchangeable, by).mean for by in (step, -step))
        squared_errors.append(float((up - 2 * known.mean + down).square().sum()) / 6)
    error = math.sqrt(sum(squared_errors) / len(squared_errors))
    return error if math.isfinite(error) else math.inf
