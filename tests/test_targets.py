"""Targets: gradients against central differences of the objective, the oracle, and closed forms on Gaussians."""

import numpy as np
import oracles
import pytest
import torch
import worlds

import gradlab as gl

BOTH = pytest.mark.parametrize("off_policy", [False, True])


def central_differences(name: str, world: gl.Scenario) -> np.ndarray:
    """Of the objective, with the sampler of the prefixes held where it is; fourth order, to 1e-10."""
    found, step = [], 1e-3
    for i in range(len(world.policy.parameters)):
        shift = torch.zeros_like(world.policy.parameters)
        shift[i] = step

        def objective(times: float, shift: torch.Tensor = shift) -> float:
            policy = world.policy.with_parameters(world.policy.parameters + times * shift)
            return gl.exact.objective(name, gl.Scenario(policy, world.reference, world.sampler))

        found.append((8 * (objective(1) - objective(-1)) - objective(2) + objective(-2)) / (12 * step))
    return np.array(found)


def test_the_list():
    assert list(gl.TARGETS) == oracles.TARGETS
    assert all(target.name == name and target.statement and target.source for name, target in gl.TARGETS.items())


@BOTH
@pytest.mark.parametrize("shape", worlds.SHAPES)
@pytest.mark.parametrize("name", oracles.TARGETS)
def test_against_the_oracle(name, shape, off_policy):
    world = worlds.scenario(shape, off_policy)
    gradient, oracle = gl.exact.gradient(name, world), oracles.target(name, *worlds.arrays(world))
    value = oracles.objective(name, *worlds.arrays(world))
    assert gl.exact.objective(name, world) == pytest.approx(value, rel=1e-12, abs=1e-15)
    if name == "zero" or (name == "inverse_length" and world.policy.eos is None):
        assert gradient.abs().max() <= 1e-15
    else:
        worlds.assert_same(gradient, oracle, tolerance=1e-12)
        assert np.linalg.norm(oracle) > 0.02


@BOTH
@pytest.mark.parametrize("shape", ["tree", "eos", "gaussian"])
@pytest.mark.parametrize("name", oracles.TARGETS)
def test_against_central_differences(name, shape, off_policy):
    world = worlds.scenario(shape, off_policy)
    gradient = gl.exact.gradient(name, world)
    assert float(np.linalg.norm(gradient.numpy() - central_differences(name, world))) < 1e-9
    constant = name == "zero" or (name == "inverse_length" and shape != "eos")
    assert float(gradient.norm()) > 0.02 or constant


@BOTH
@pytest.mark.parametrize("shape", ["bandit", "gaussian"])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "mse"])
def test_frozen_is_unfrozen_at_one_position(name, shape, off_policy):
    world = worlds.scenario(shape, off_policy)
    worlds.assert_same(gl.exact.gradient(f"{name}_frozen_prefix", world), gl.exact.gradient(name, world), tolerance=1e-13)


@pytest.mark.parametrize("shape", worlds.TREES)
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "mse"])
def test_frozen_is_not_unfrozen_beyond(name, shape):
    world = worlds.scenario(shape)
    frozen, free = (gl.exact.gradient(f"{name}{tail}", world) for tail in ("_frozen_prefix", ""))
    assert float((frozen - free).norm()) > 0.03 * float(free.norm())


@pytest.mark.parametrize("shape", worlds.TREES)
@pytest.mark.parametrize("name", oracles.TARGETS)
def test_only_frozen_prefixes_look_at_the_sampler(name, shape):
    on, off = (gl.exact.gradient(name, worlds.scenario(shape, off_policy)) for off_policy in (False, True))
    if name.endswith("_frozen_prefix"):
        assert float((on - off).norm()) > 0.01 * float(on.norm())
    else:
        torch.testing.assert_close(on, off, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("look_up", [gl.exact.gradient, gl.exact.objective])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("reverse-kl", "did you mean 'reverse_kl'"),
        ("forward", "did you mean 'forward_kl'"),
        ("reverse_kl_frozen", "did you mean 'reverse_kl_frozen_prefix'"),
        ("k2value", "did you mean 'k2_value'"),
        ("surprise", f"known: {', '.join(oracles.TARGETS)}, reward, regularised"),
    ],
)
def test_unknown_names(look_up, name, hint):
    with pytest.raises(ValueError, match=f"unknown target '{name}'") as caught:
        look_up(name, worlds.scenario("bandit"))
    assert hint in str(caught.value)


# ------------------------------------------------------------------------------------------------------- Gaussians


def closed_form(name: str, m: torch.Tensor, s: torch.Tensor, m_ref: float, s_ref: float) -> torch.Tensor:
    """The objective between two normals, from textbook integrals."""
    gap = m - m_ref
    if name == "reverse_kl":
        return torch.log(s_ref / s) + (s**2 + gap**2) / (2 * s_ref**2) - 0.5
    if name == "forward_kl":
        return torch.log(s / s_ref) + (s_ref**2 + gap**2) / (2 * s**2) - 0.5
    if name == "chi2":  # ½(∫p²/q − 1)
        spread = 2 * s_ref**2 - s**2
        return 0.5 * (s_ref**2 / (s * spread.sqrt()) * torch.exp(gap**2 / spread) - 1)
    if name == "mse":  # ½(∫p² + ∫q² − 2∫pq)
        cross = torch.exp(-(gap**2) / (2 * (s**2 + s_ref**2))) / torch.sqrt(2 * np.pi * (s**2 + s_ref**2))
        return 0.25 / np.sqrt(np.pi) * (1 / s + 1 / s_ref) - cross
    # k2_value: ℓ = a + b z + c z² with z standard normal, and E[z⁴] = 3
    a = torch.log(s_ref / s) + gap**2 / (2 * s_ref**2)
    b, c = s * gap / s_ref**2, 0.5 * (s**2 / s_ref**2 - 1)
    return 0.5 * (a**2 + b**2 + 3 * c**2 + 2 * a * c)


@BOTH
@pytest.mark.parametrize("pair", [((0.3, 0.9), (-0.2, 1.0)), ((0.0, 1.0), (1.0, 1.1)), ((1.5, 0.4), (1.0, 0.35))], ids=str)
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "chi2", "mse", "k2_value"])
def test_gaussian_closed_forms(name, pair, off_policy):
    (m, s), reference = pair
    world = gl.Scenario(gl.Gaussian(m, s), gl.Gaussian(*reference), gl.Gaussian(m + 0.1, 1.2 * s) if off_policy else None)
    theta = torch.tensor([m, s], dtype=torch.float64, requires_grad=True)
    value = closed_form(name, *theta, *reference)
    (gradient,) = torch.autograd.grad(value, theta)
    for known in {name, f"{name}_frozen_prefix"} & set(oracles.TARGETS):
        assert gl.exact.objective(known, world) == pytest.approx(value.item(), rel=1e-11)
        worlds.assert_same(gl.exact.gradient(known, world), gradient, tolerance=1e-11)


def test_gaussian_gradients_by_hand():
    world = gl.Scenario(gl.Gaussian(0.3, 0.9), gl.Gaussian(-0.2, 1.0))
    gap, s, s_ref = 0.5, 0.9, 1.0
    reverse = [gap / s_ref**2, s / s_ref**2 - 1 / s]
    forward = [gap / s**2, 1 / s - (s_ref**2 + gap**2) / s**3]
    worlds.assert_same(gl.exact.gradient("reverse_kl", world), reverse, tolerance=1e-14)
    worlds.assert_same(gl.exact.gradient("forward_kl", world), forward, tolerance=1e-14)
