"""Exact results against 60 digits, near the reference and near the corners of the simplex."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import oracles
import oracles_rounding as oracle
import pandas as pd
import pytest
import torch

import gradlab as gl
from gradlab.questions import tails

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


@pytest.mark.parametrize("target", oracles.TARGETS[:8])
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


@pytest.mark.parametrize("tables", [CORNERS["all but 3e-12"], CORNERS["all but 1e-9"], CORNERS["a token of 1e-12"]])
def test_an_unbiased_estimator_has_no_crossover_near_a_corner(tables: tuple[list[float], list[float]]) -> None:
    """The divergence of one step, differentiated, is the gradient of reverse KL itself."""
    row = gl.measure("full-loss", _bandit(*tables)[0]).iloc[0]
    assert row["bias"] == 0
    assert row["crossover"] == math.inf


@pytest.mark.parametrize("kl", [1e-4, 1e-8, 1e-12])
def test_value_and_variance_of_k3_near_the_reference(kl: float) -> None:
    mp.mp.dps = oracle.DIGITS
    shift = (2 * kl) ** 0.5
    scenario, world = _bandit([0.0, 0.0, 1.0], [shift, 0.0, 1.0])
    values = [oracle.kernel("k3", mp.log(p / q), q)[0] for p, q in zip(world.p[0], world.q[0], strict=True)]
    mean = mp.fsum(p * k for p, k in zip(world.p[0], values, strict=True))
    variance = mp.fsum(p * (k - mean) ** 2 for p, k in zip(world.p[0], values, strict=True))
    assert _relative(scenario.kl(), [mean]) < TOLERANCE
    assert _relative(tails.k3_variance(scenario), [variance]) < TOLERANCE
    # Of one width, k3 is e^{−ℓ} − 1 + ℓ of a normal ℓ of variance d²: e^{d²} − 1 − d².
    d2 = mp.mpf(shift) ** 2
    scenario = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(shift, 1))
    assert _relative(scenario.kl(), [d2 / 2]) < TOLERANCE
    assert _relative(tails.k3_variance(scenario), [mp.expm1(d2) - d2]) < TOLERANCE


GAUSSIANS = {f"{d:g} apart": ((0.0, 1.0), (d, 1.0 + d / 2)) for d in (1e-12, 1e-8, 1e-4)} | {
    "a narrow reference": ((0.0, 1.0), (0.2, 0.69)),
    "a wide reference": ((0.3, 0.8), (0.0, 1.0)),
}


@pytest.mark.parametrize("pair", GAUSSIANS.values(), ids=GAUSSIANS)
def test_values_and_slopes_of_gaussians(pair: tuple[tuple[float, float], tuple[float, float]]) -> None:
    mp.mp.dps = oracle.DIGITS
    (m, s), (mean, std) = ([mp.mpf(x) for x in each] for each in pair)
    both, gap = s**2 + std**2, m - mean
    cross = mp.exp(-(gap**2) / both / 2) / mp.sqrt(2 * mp.pi * both)
    root = mp.sqrt(mp.pi)
    truths = {  # value, by mean, by standard deviation
        "reverse_kl": ((s**2 + gap**2) / std**2 / 2 - mp.mpf(1) / 2 - mp.log(s / std), gap / std**2, s / std**2 - 1 / s),
        "forward_kl": (
            (std**2 + gap**2) / s**2 / 2 - mp.mpf(1) / 2 - mp.log(std / s),
            gap / s**2,
            1 / s - (std**2 + gap**2) / s**3,
        ),
        "mse": (
            (1 / s + 1 / std) / (4 * root) - cross,
            cross * gap / both,
            cross * s * (1 - gap**2 / both) / both - 1 / (4 * root * s**2),
        ),
    }
    scenario = gl.Scenario(*(gl.Gaussian(*each) for each in pair))
    for target, (value, *slope) in truths.items():
        assert _relative(gl.exact.objective(target, scenario), [value]) < TOLERANCE, target
        assert _relative(gl.exact.gradient(target, scenario), slope) < TOLERANCE, target


def test_a_kernel_of_a_gaussian_does_not_overflow_where_the_reference_vanishes() -> None:
    """`ref (e^ℓ − 1)` is π − ref: integrated by mpmath, for N(0, 1) and N(.2, .69²)."""
    mp.mp.dps = 20

    def density(x: mp.mpf, mean: float, std: float) -> mp.mpf:
        return mp.exp(-(((x - mean) / std) ** 2) / 2) / (std * mp.sqrt(2 * mp.pi))

    def integral(power: int, f: Callable[[mp.mpf], mp.mpf]) -> mp.mpf:
        def at(x: mp.mpf) -> mp.mpf:
            p = density(x, 0, 1)
            return p * (p - density(x, 0.2, 0.69)) ** power * f(x)

        return mp.quad(at, [-30, -8, -2, 0, 2, 8, 30])

    mean = [integral(1, lambda x: x), integral(1, lambda x: x**2 - 1)]
    square = integral(2, lambda x: x**2 + (x**2 - 1) ** 2)
    found = gl.exact.moments(gl.ESTIMATORS["mse-sampled-loss"], gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(0.2, 0.69)))
    assert _relative(found.mean, mean) < TOLERANCE
    assert _relative(found.trace_cov, [square - mp.fsum(x**2 for x in mean)]) < TOLERANCE
    assert [round(float(x), 5) for x in mean] == [-0.04389, 0.07246]


def test_what_single_precision_rounds_is_no_bias() -> None:
    """A network in float32 whose gradients differ from those of the target in the last places, and one bias that is none of that."""
    unbiased = ["k1-reward-to-go", "full-both", "k3-loss-prefix"]

    def measured(precision: torch.dtype) -> pd.DataFrame:
        at = (gl.policies.small("addition", stage, ["12+34="], precision=precision) for stage in ("few", "reference"))
        return gl.measure([*unbiased, "k2-loss"], gl.Scenario(*at)).set_index("estimator")

    single, double = measured(torch.float32), measured(torch.float64)
    assert (single.loc[unbiased, "bias"] == 0).all()
    assert np.isinf(single.loc[unbiased, "crossover"]).all()
    assert 0 < single.loc["k2-loss", "bias"] == pytest.approx(double.loc["k2-loss", "bias"], rel=1e-3)
    assert single.loc["k2-loss", "crossover"] == pytest.approx(double.loc["k2-loss", "crossover"], rel=1e-3)


@pytest.mark.parametrize(
    "estimator", ["k2-loss", "k3-loss", "mse-sampled-loss", "k1-reward-to-go", "full-loss", "full-both", "mse-loss"]
)
def test_moments_of_chains_near_a_corner(estimator: str) -> None:
    mp.mp.dps = oracle.DIGITS
    policy = np.random.default_rng(5).standard_normal((4, 3)) - [0, 27, 27]
    reference = policy + np.random.default_rng(6).standard_normal((4, 3))
    scenario = gl.Scenario(*(gl.Markov(table[0], table[1:], length=3) for table in (policy, reference)))
    world = oracle.World(policy.tolist(), reference.tolist(), None, lambda y: 1 + y[-1] if y else 0, 3)
    mean, trace = oracle.moments(world, ESTIMATORS[estimator])
    moments = gl.exact.moments(gl.ESTIMATORS[estimator], scenario)
    assert _relative(moments.mean, mean) < TOLERANCE
    assert _relative(moments.trace_cov, [trace]) < TOLERANCE
