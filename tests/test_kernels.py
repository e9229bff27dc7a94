"""Kernels against their formulas in 50-digit arithmetic, and their derivatives against autograd of the value."""

import mpmath
import numpy as np
import pytest
import torch
import worlds

import gradlab as gl
from gradlab.estimators.kernels import KERNELS, VOCABULARY_KERNELS, derivative, value
from gradlab.solvers.exact import kinks

MP = mpmath.MPContext()
MP.dps = 50
EPS = 2.0**-52

#: value and ∂/∂log π, as functions of ℓ and ref.
FORMULAS = {
    "k1": (lambda x, r: x, lambda x, r: MP.one),
    "k2": (lambda x, r: x**2 / 2, lambda x, r: x),
    "k3": (lambda x, r: MP.exp(-x) - 1 + x, lambda x, r: 1 - MP.exp(-x)),
    "abs": (lambda x, r: abs(x), lambda x, r: MP.sign(x)),
    "k3_swapped": (lambda x, r: MP.exp(x) - 1 - x, lambda x, r: MP.exp(x) - 1),
    "mse_sampled": (lambda x, r: r * MP.exp(x) - r - r * x, lambda x, r: r * MP.exp(x) - r),
}
SIZES = [0.0, 1e-14, 1e-8, 1e-4, 0.02, 0.3, 1.0, 2.5, 9.75, 21.0, 40.0]
LOG_RATIOS = torch.tensor([sign * size for size in SIZES for sign in (1, -1)], dtype=torch.float64)
LOG_REF = torch.linspace(-45, -0.01, len(LOG_RATIOS), dtype=torch.float64)


def test_every_kernel_has_a_formula():
    assert list(KERNELS) == list(FORMULAS)
    assert all(kernel.source for kernel in KERNELS.values())


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_derivative(name):
    values, slopes = (f(name, LOG_RATIOS, LOG_REF, None, None).tolist() for f in (value, derivative))
    for x, log_ref, found, slope in zip(LOG_RATIOS.tolist(), LOG_REF.tolist(), values, slopes, strict=True):
        ref, exact = MP.exp(MP.mpf(log_ref)), MP.mpf(x)
        formula, formula_slope = (f(exact, ref) for f in FORMULAS[name])
        size = ref if name == "mse_sampled" else 1  # exp(log ref) is off by a few ulp of log ref
        ulps = 4 * EPS * (1 - log_ref if name == "mse_sampled" else 1)
        # expm1: k3 is rounded like ℓ, not like 1, and its derivative is accurate to the last digits even there.
        assert abs(found - formula) <= ulps * (size * abs(x) + abs(formula)), (x, found)
        assert abs(slope - formula_slope) <= ulps * abs(formula_slope), (x, slope)


@pytest.mark.parametrize("name", ["k3", "k3_swapped"])
def test_expm1_keeps_digits_where_the_plain_formula_has_none(name):
    x = torch.tensor([1e-8, -1e-8], dtype=torch.float64)
    found = value(name, x, x, None, None)
    sign = -1 if name == "k3" else 1
    plain = (sign * x).exp() - 1 - sign * x
    assert ((found / 5e-17 - 1).abs() < 1e-7).all()
    assert ((plain / 5e-17 - 1).abs() > 0.1).all()


BOUNDS = [(None, None), (0.3, None), (None, 0.5), (2.5, 1.0), (10.0, None), (None, 10.0), (21.0, 10.0)]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_derivative_is_autograd_of_the_value(name, bounds):
    # Right on a clamp as well: ℓ = ±0.3 … ±21, and ½ℓ² = 0.5 at ℓ = ±1.
    log_pi = (LOG_RATIOS + LOG_REF).requires_grad_(True)
    ratio = log_pi - LOG_REF + (LOG_RATIOS - (log_pi - LOG_REF)).detach()
    (slope,) = torch.autograd.grad(value(name, ratio, LOG_REF, *bounds).sum(), log_pi)
    found = derivative(name, LOG_RATIOS, LOG_REF, *bounds)
    # autograd of expm1 is expm1 + 1, rounded like 1
    torch.testing.assert_close(found, slope, rtol=1e-13, atol=4 * EPS)
    if bounds != (None, None):
        free = derivative(name, LOG_RATIOS, LOG_REF, None, None)
        bound = found != free
        assert (found[bound] == 0).all()
        assert bound.any() or name == "mse_sampled"


@pytest.mark.parametrize("name", FORMULAS)
def test_clamped_value(name):
    bounded = value(name, LOG_RATIOS, LOG_REF, 2.5, 1.0)
    for x, log_ref, found in zip(LOG_RATIOS.tolist(), LOG_REF.tolist(), bounded.tolist(), strict=True):
        free = FORMULAS[name][0](MP.mpf(min(max(x, -2.5), 2.5)), MP.exp(MP.mpf(log_ref)))
        assert found == pytest.approx(float(min(max(free, -1), 1)), rel=1e-13, abs=2e-16)


@pytest.mark.parametrize(
    ("name", "alive", "dead"),
    [("k2", 20**0.5 - 1e-9, 20**0.5 + 1e-9), ("k3", -np.log(13.60), -np.log(13.62)), ("k1", 10.0, 10.0 + 1e-9)],
)
def test_where_a_value_clamp_at_ten_kills_the_gradient(name, alive, dead):
    """k2 at |ℓ| = 4.47; k3 where ref is 13.6 times π, the root of δ − log δ = 11."""
    x = torch.tensor([alive, dead], dtype=torch.float64)
    slope = derivative(name, x, x, None, 10.0)
    assert abs(float(slope[0])) >= 1
    assert slope[1] == 0


@pytest.mark.parametrize("shape", ["bandit", "eos"])
def test_vocabulary_kernels(shape):
    assert list(VOCABULARY_KERNELS) == ["full", "mse"]
    rollout = gl.Rollout.enumerated(worlds.scenario(shape))
    weights = np.exp([rollout.table.numpy(), rollout.reference_table.numpy()])
    p, r = weights / weights.sum(-1, keepdims=True)
    rows, live = rollout.contexts.numpy(), rollout.mask.numpy()
    for name, by_row in (("full", (p * np.log(p / r)).sum(-1)), ("mse", 0.5 * ((p - r) ** 2).sum(-1))):
        np.testing.assert_allclose(rollout.divergence(name), np.where(live, by_row[rows], 0), rtol=1e-13)


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs", "k3_swapped"])
@pytest.mark.parametrize("level", [1e-3, 0.4, 5.0])
def test_kinks_are_where_a_clamped_value_meets_its_bound(name, level):
    found = [x for x in kinks(gl.Estimator(name, clamp_value=level), 0.0)[0] if x != 0]
    assert sorted(map(np.sign, found)) == [-1, 1]
    for x in found:
        assert abs(float(FORMULAS[name][0](MP.mpf(x), None))) == pytest.approx(level, rel=1e-9)
