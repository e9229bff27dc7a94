"""Networks in 16 bits give the nearest numbers, in whatever order a processor adds."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gradlab.policies.arithmetic import portable


def nearest(x: float) -> float:
    """The nearest bfloat16 number of a normal one, ties to even: 8 significant binary digits."""
    unit = Fraction(2) ** (int(np.frexp(x)[1]) - 8)
    return float(round(Fraction(x) / unit) * unit)


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal(shape)).to(torch.bfloat16) for shape in ((5, 300), (300, 7), (300,))]


def test_a_product_of_matrices_is_rounded_once(drawn):
    a, b, _ = drawn
    with portable(torch.bfloat16):
        found = a @ b
    assert found.dtype == torch.bfloat16
    for i, row in enumerate(a.double().tolist()):
        for j, column in enumerate(b.double().T.tolist()):
            exact = sum(Fraction(x) * Fraction(y) for x, y in zip(row, column, strict=True))
            assert float(found[i, j]) == nearest(float(exact))


def test_the_order_of_a_sum_does_not_matter(drawn):
    a, b, c = drawn
    order = torch.from_numpy(np.random.default_rng(1).permutation(300))
    with portable(torch.bfloat16):
        pairs = [
            (a @ b, a[:, order] @ b[order]),
            (F.linear(a, b.T, b[0]), F.linear(a[:, order], b.T[:, order], b[0])),
            (a.mean(-1), a[:, order].mean(-1)),
            (c.softmax(-1)[order], c[order].softmax(-1)),
            (F.rms_norm(a, (300,), c)[:, order], F.rms_norm(a[:, order], (300,), c[order])),
        ]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=0)  # what is rounded to the nearest number is one number


def test_precisions_meet_as_they_do_without(drawn):
    a, _, c = drawn
    single = a.float()
    with portable(torch.bfloat16):
        assert (a * single).dtype == torch.float32
        assert a.float().mean(-1).dtype == torch.float32
        assert (a * c).dtype == torch.bfloat16
        assert (single * single.double()).dtype == torch.float64
        assert (a * torch.tensor(0.1)).dtype == torch.bfloat16  # a tensor without dimensions is a number
        assert (a > 0).dtype == torch.bool
        kept = torch.zeros_like(a)
        kept += a
    torch.testing.assert_close(kept, a, rtol=0, atol=0)


def test_gradients_pass(drawn):
    a, b, _ = drawn
    weight = b.clone().requires_grad_(True)
    with portable(torch.bfloat16):
        loss = (a @ weight).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, a.sum(0)[:, None].expand(300, 7), rtol=0.02, atol=0.02)
