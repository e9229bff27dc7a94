"""The form of a loss: which composition of kernel, placement, credit and weight has the same gradient at every response."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gradlab.audit.engine import ExpectedGradient
from gradlab.audit.worlds import AuditScenario
from gradlab.estimators.coefficients import coefficients
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.kernels import KERNELS


def compositions() -> Iterator[Estimator]:
    """Estimators that a loss is compared with, the plainest first."""
    weights = [("none", False), *itertools.product(("token", "prefix", "sequence"), (False, True))]
    for weight, differentiate in weights:
        for kernel in KERNELS:
            yield Estimator(kernel, weight=weight, differentiate_weight=differentiate)  # type: ignore[arg-type]
            if weight in ("none", "sequence"):
                yield Estimator(kernel, "loss", "sequence", weight, differentiate)  # type: ignore[arg-type]
        if weight in ("none", "prefix", "token") and not differentiate:
            yield from (Estimator("full", weight=weight), Estimator("mse", weight=weight))  # type: ignore[arg-type]
    for (weight, differentiate), placement in itertools.product(weights, ("reward", "loss+reward")):
        if differentiate and placement == "reward":
            continue  # PPO's ratio has the gradient of a detached weight
        for kernel, credit in itertools.product(KERNELS, ("token", "to_go", "return")):
            yield Estimator(kernel, placement, credit, weight, differentiate)  # type: ignore[arg-type]
        if weight in ("none", "sequence"):
            yield from (Estimator(kernel, placement, "sequence", weight, differentiate) for kernel in KERNELS)  # type: ignore[arg-type]
        if not differentiate:
            credits = ("token", "to_go", "return")
            yield from (Estimator("full", placement, credit, weight) for credit in credits)  # type: ignore[arg-type]


@lru_cache(maxsize=16)
def _table(case: AuditScenario) -> tuple[tuple[Estimator, ...], Tensor]:
    """All compositions and their gradients at every response with respect to its own logits, `[e, n, t, v]`."""
    rollout, estimators = case.rollout, tuple(compositions())
    p = rollout.table.softmax(-1)[rollout.contexts]
    score = torch.nn.functional.one_hot(rollout.tokens, p.shape[-1]) - p
    by_estimator = []
    for estimator in estimators:
        parts = coefficients(estimator, rollout)
        gradient = parts.score.expand_as(rollout.log_prob)[..., None] * score
        if parts.direct is not None:
            slope = rollout.family.slope(estimator.kernel, rollout.table, rollout.reference_table)
            gradient = gradient + parts.direct[..., None] * slope[rollout.contexts]
        by_estimator.append(torch.where(rollout.mask[..., None], gradient, 0.0))
    return estimators, torch.stack(by_estimator)


@lru_cache(maxsize=16)
def _values(case: AuditScenario) -> Tensor:
    """The surrogate losses of all compositions at every response, `[e, n]`."""
    return torch.stack([estimator(case.rollout) for estimator in compositions()])


@dataclass(frozen=True)
class Form:
    """A composition that has the gradient of the loss at every response, up to one factor.

    by_length: its loss is divided by the length of the response. equivalent_estimators: other compositions with the same gradients.
    """

    estimator: Estimator
    by_length: bool
    factor: float
    equivalent_estimators: tuple[Estimator, ...]

    @property
    def name(self) -> str:
        """The name of the composition, such as `k3-loss-token-weight`."""
        e = self.estimator
        weight = (
            "" if e.weight == "none" else f"-{'differentiated' if e.differentiate_weight else 'detached'}-{e.weight}-weight"
        )
        credit = "" if e.credit == "token" else f"-{e.credit}"
        return f"{e.kernel}-{e.placement}{credit}{weight}{'-by-length' if self.by_length else ''}"


def form(expected_gradients: Sequence[ExpectedGradient], tolerance: float) -> Form | None:
    """The composition with the same gradient at every response of all fields, up to one factor.

    Where several have it, one whose loss has the same value too, then the plainest. `None` when there is none, or when the
    fields enumerate more than single responses.
    """
    if any(expected.cotangents.shape[1] != 1 or expected.size == 0 or not expected.finite for expected in expected_gradients):
        return None
    goals, tables, lengths, levels, values = [], [], [], [], []
    for expected in expected_gradients:
        rollout = expected.case.rollout
        cotangent = expected.cotangents[:, 0, : rollout.tokens.shape[1]].flatten(1)
        scale = 1 / float(cotangent.norm())
        goals.append(cotangent * scale)
        tables.append(_table(expected.case)[1].flatten(2) * scale)
        lengths.append(rollout.lengths)
        levels.append(expected.values)
        values.append(_values(expected.case))
    goal, length, level = torch.cat(goals).flatten(), torch.cat(lengths), torch.cat(levels)
    for by_length in (False, True):
        share = 1 / length if by_length else torch.ones_like(length)
        flat = (torch.cat(tables, 1) * share[:, None]).flatten(1)
        factor = (flat @ goal) / flat.square().sum(-1).clamp(min=1e-300)
        error = (goal - factor[:, None] * flat).norm(dim=-1)
        matches = [int(e) for e in torch.nonzero((error <= tolerance * len(expected_gradients)) & (factor != 0))]
        if matches:
            estimators = _table(expected_gradients[0].case)[0]
            shown = torch.cat(values, 1) * share * factor[:, None]
            misses = [float((level - shown[e]).norm()) > 1e-4 * float(level.norm()) for e in matches]
            first = matches[misses.index(False)] if False in misses else matches[0]
            equivalents = tuple(estimators[e] for e in matches if e != first)
            return Form(estimators[first], by_length, float(factor[first]), equivalents)
    return None
