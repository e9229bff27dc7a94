"""What has to be known about a loss before it is audited: is it random, how precise is it, does it couple its samples?"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gradlab.audit.batch import Batch, Subject
from gradlab.audit.call import LossError, evaluate, loss_gradient
from gradlab.audit.precision import PRECISIONS, Precision
from gradlab.audit.worlds import PADDING, AuditScenario, batch, perturbed_logits

#: How often a loss is called to see whether it is random; dropout may spare a small batch now and then.
REPEATED_CALLS = 8
#: Largest relative difference between two calls that is rounding, in the single precision that most losses compute in.
SAME = 1e-6


def is_random(subject: Subject, case: AuditScenario) -> bool:
    """Whether calls with the same batch differ, by more than the order in which a processor adds."""
    columns = case.columns(PADDING)
    rows = list(range(min(2, len(columns["mask"]))))
    first, *others = (
        [torch.nan_to_num(x) for x in loss_gradient(subject, *batch(columns, rows))] for _ in range(REPEATED_CALLS)
    )
    slope, value = (float(x.abs().max()) for x in first)
    sizes = slope, max(slope, value)  # a value of 0 is a sum of parts as large as its slopes
    return any(
        float((x - y).abs().max()) > SAME * size for other in others for x, y, size in zip(first, other, sizes, strict=True)
    )


def seeded(subject: Subject) -> Subject:
    """The same loss with torch's and numpy's global generators set alike before every call, and restored after it.

    A loss that draws from them answers alike twice; one with a generator of its own does not.
    """

    def loss(batch: Batch) -> Tensor:
        state = np.random.get_state()  # noqa: NPY002 - the user's generator, not ours
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            try:
                return subject.loss(batch)
            finally:
                np.random.set_state(state)  # noqa: NPY002

    return replace(subject, loss=loss)


def precision(subject: Subject, case: AuditScenario) -> Precision:
    """The precision a loss computes in, whatever it is given: told by how smoothly it answers to small changes."""

    def response(step: float) -> Tensor:
        probe_batch, _ = batch(perturbed_logits(case.columns(PADDING), step), [1, 4])
        loss = evaluate(subject, probe_batch)
        slope = torch.autograd.grad(loss, probe_batch.log_prob, allow_unused=True)[0] if loss.requires_grad else None
        numbers = [loss.detach().double().reshape(1)] + ([] if slope is None else [slope.double().flatten()])
        return torch.cat(numbers)

    base, small = response(0.0), 3e-7

    def rough(step: float) -> float:
        steps, size = (step, 1.7 * step, 3.1 * step), float(base.abs().max()) or 1.0
        return max(float((response(h) - 2 * base + response(-h)).abs().max()) for h in steps) / size

    if torch.equal(base, response(0.1)):
        return PRECISIONS[0]  # constants are as precise as can be
    # A second difference is of the order of the step squared and of rounding: 1e-13 and 1e-16 or 1e-7. Where some numbers are
    # in half precision and others are not, small steps move the others alone; larger ones tell 1e-7 from 1e-3.
    if rough(2e-4) > 1e-4:
        return PRECISIONS[-1]
    if torch.equal(base, response(small)):
        # Too little for float32 to notice, as where an advantage is little more than a sign; or for half precision, which
        # larger changes tell.
        return PRECISIONS[-1 if torch.equal(base, response(1e-5)) else 1]
    return PRECISIONS[0 if rough(small) <= 1e-9 else 1]


def couples(subject: Subject, case: AuditScenario, tolerance: float) -> bool:
    """Whether the gradient at one response depends on the others in its batch, beyond one constant factor."""
    columns = case.columns(PADDING)
    n = len(columns["mask"])
    selected = sorted({0, 1, n // 2, n - 1})
    alone, together = [], []
    for i, j in itertools.product(selected, repeat=2):
        together.append(loss_gradient(subject, *batch(columns, [i, j]))[0][0])
        try:
            alone.append(loss_gradient(subject, *batch(columns, [i]))[0][0])
        except LossError:
            return True  # it wants a group
    x, y = torch.stack(alone).flatten(), torch.stack(together).flatten()
    size = float(y.norm())
    if not math.isfinite(float(x.sum())):
        return math.isfinite(size)
    if float(x.norm()) <= 1e-12 * size or size == 0:
        return size > 0
    factor = float(x @ y) / float(x @ x)
    return float((y - factor * x).norm()) > 10 * tolerance * size


def exchangeable(subject: Subject, case: AuditScenario, group: int, tolerance: float) -> bool:
    """Whether the order of the responses in a batch makes no difference."""
    columns = case.columns(PADDING)
    n = len(columns["mask"])
    for start in range(3):
        rows = [(start + 4 * k) % n for k in range(group)]
        x = loss_gradient(subject, *batch(columns, rows))[0]
        # Every order is made of turns and of swaps of the first two.
        for order in ([*range(1, group), 0], [1, 0, *range(2, group)]):
            y = loss_gradient(subject, *batch(columns, [rows[i] for i in order]))[0]
            if not float((x[order] - y).norm()) <= tolerance * float(x.norm()):
                return False
    return True
