"""Exact results against 60 digits, near the reference and near the corners of the simplex."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import oracles_rounding as oracle
import pytest

import gradlab as gl

#: Largest relative error of a value, of a covariance trace, and of a gradient (its norm), anywhere below.
TOLERANCE = 1e-11
#: Logits of the reference less those of the policy.
DISTANCES = [1e-16, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0]

ESTIMATORS = {
    "k1-loss": oracle.as_loss("k1"),
    "k2-loss": oracle.as_loss("k2"),
    "k3-loss": oracle.as_loss("k3"),
    "k3-swapped-loss": oracle.as_loss("k3_swapped"),
    "mse-sampled-loss": oracle.as_loss("mse_sampled"),
    "k3-loss-token": oracle.as_loss("k3", "token"),
    "k3-loss-prefix": oracle.as_loss("k3", "prefix"),
    "k1-reward-to-go": oracle.in_reward("k1"),
    "k3-reward-to-go": oracle.in_reward("k3"),
    "k2-loss-sequence": oracle.of_sequence("k2"),
    "k3-loss-sequence": oracle.of_sequence("k3"),
    "full-loss": oracle.on_vocabulary("reverse_kl"),
    "full-both": oracle.on_vocabulary("reverse_kl", complete=True),
    "mse-loss": oracle.on_vocabulary("mse"),
}

TARGETS = (
    "reverse_kl",
    "reverse_kl_frozen_prefix",
    "forward_kl",
    "forward_kl_frozen_prefix",
    "chi2_frozen_prefix",
    "mse",
    "mse_frozen_prefix",
    "k2_value",
)

#: Below this share of the other a squared mean, or a covariance trace, is 0 but for the 60 digits' rounding.
ZERO = mp.mpf(10) ** -60
CANCELLING = ("k3-loss-token", "k3-loss-prefix")


def _relative(found: object, truth: list[mp.mpf]) -> float:
    """`‖found − truth‖ / ‖truth‖`."""
    numbers = [mp.mpf(x) for x in np.atleast_1d(np.asarray(found, dtype=np.float64)).tolist()]
    size = mp.sqrt(mp.fsum(t**2 for t in truth))
    return float(mp.sqrt(mp.fsum((x - t) ** 2 for x, t in zip(numbers, truth, strict=True))) / size)


def _bandit(policy: list[float], reference: list[float]) -> tuple[gl.Scenario, oracle.World]:
    scenario = gl.Scenario(gl.Bandit(policy), gl.Bandit(reference))
    return scenario, oracle.World([policy], [reference], None, lambda _: 0, 1)


def _near(distance: float) -> tuple[gl.Scenario, oracle.World]:
    """A tree of three tokens and two steps; the reference lies `distance` away."""
    rng = np.random.default_rng(5)
    policy = rng.standard_normal((4, 3))
    tables = [policy, policy + distance * rng.standard_normal((4, 3)), policy + rng.standard_normal((4, 3))]
    scenario = gl.Scenario(*(gl.Tree(table) for table in tables))
    return scenario, oracle.World(*(table.tolist() for table in tables), lambda y: 0 if not y else 1 + y[0], 2)


CORNERS = {
    "all but 3e-12": ([0, -27, -27.2], [0, -27.5, -26]),
    "all but 1e-9": ([0, math.log(1e-9), -23.0], [0, math.log(3e-9), -22.0]),
    "a token of 1e-12": ([0.3, 0.1, math.log(1e-12)], [0.2, 0.4, math.log(5e-12)]),
    "far from the corner of the reference": ([0, -27, -27.2], [0, 1.0, -1.0]),
    "towards a corner": ([0, 1.0, -1.0], [0, -27, -27.2]),
    "another corner": ([0, -27, -27.2], [-27, 0, -26.0]),
}
WORLDS = {name: (_bandit, tables) for name, tables in CORNERS.items()} | {f"near {d:g}": (_near, (d,)) for d in DISTANCES}


@pytest.fixture(params=WORLDS, scope="module")
def world(request: pytest.FixtureRequest) -> tuple[gl.Scenario, oracle.World]:
    mp.mp.dps = oracle.DIGITS
    build, arguments = WORLDS[request.param]
    return build(*arguments)


@pytest.mark.parametrize("target", TARGETS)
def test_values_and_gradients_of_targets(world: tuple[gl.Scenario, oracle.World], target: str) -> None:
    scenario, exact = world
    value, gradient = oracle.objective(exact, target)
    assert _relative(gl.exact.objective(target, scenario), [value]) < TOLERANCE
    assert _relative(gl.exact.gradient(target, scenario), gradient) < TOLERANCE


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_moments_of_estimators(world: tuple[gl.Scenario, oracle.World], estimator: str) -> None:
    scenario, exact = world
    mean, trace = oracle.moments(exact, ESTIMATORS[estimator])
    found = gl.exact.moments(gl.ESTIMATORS[estimator], scenario)
    square = mp.fsum(x**2 for x in mean)
    # In a differentiated weight's value plus slope, ℓ, the δ of both cancels: a double holds it to a part of itself, which is the
    # coefficient of k3 as loss. There a sample's size is the measure, and its share in those terms.
    size, lost = mp.sqrt(square), mp.mpf(1)
    if estimator in CANCELLING:
        size = mp.sqrt(square + trace)
        terms, spread = oracle.moments(exact, ESTIMATORS["k3-loss"])
        lost = max(lost, mp.sqrt((mp.fsum(x**2 for x in terms) + spread) / (square + trace)))
    if square > trace * ZERO:
        apart = mp.sqrt(mp.fsum((mp.mpf(x) - y) ** 2 for x, y in zip(found.mean.tolist(), mean, strict=True)))
        assert apart < TOLERANCE * size * lost
    else:  # k1 as loss
        assert float(found.mean.norm()) ** 2 < 1e-28 * trace
    if trace > square * ZERO:
        assert _relative(found.trace_cov, [trace]) < TOLERANCE * lost
    else:  # a step's divergence as loss is the same for every response of one step
        assert found.trace_cov < 1e-24 * square
