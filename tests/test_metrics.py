"""Logged numbers of k1, k2 and k3: expectations against enumeration by hand, and shares against what is planted."""

from __future__ import annotations

import numpy as np
import pytest

import gradlab as gl
from gradlab.questions import metrics
from gradlab.reliability import is_well_sampled


def test_expectations_are_those_of_value_moments():
    policy = gl.Tree.random(3, 3, seed=0)
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.5, seed=1))
    frame = metrics.exact({"on": scenario}).set_index("kernel")
    for kernel in metrics.KERNELS:
        found = gl.exact.value_moments(kernel, scenario, credit="token")
        assert frame.loc[kernel, "bias"] == pytest.approx(float(found.mean) / scenario.kl() - 1, abs=1e-12)
        assert frame.loc[kernel, "noise"] == pytest.approx(float(found.variance) ** 0.5 / scenario.kl(), rel=1e-9)
    assert frame.loc["k1", "noise_ratio"] == 1
    stale = gl.Scenario(policy, scenario.reference, scenario.reference)
    assert abs(metrics.exact({"off": stale}).set_index("kernel").loc["k3", "bias"]) > 0.01


def test_intervals_of_steady_numbers_hold_and_of_a_dropped_token_do_not():
    steady = gl.Scenario(gl.Bandit([0.0, 0.3, 0.1]), gl.Bandit([0.0, 0.0, 0.0]))
    k1 = metrics.batches(steady, [400], 1000, 0).set_index("kernel").loc["k1"]
    assert 0.93 <= k1["student"] <= 0.97
    assert k1["held"] > 0.99
    dropped = gl.Scenario(gl.Bandit(np.log([0.6, 0.3995, 0.0005])), gl.Bandit(np.log([0.4, 0.4, 0.2])))
    k3 = metrics.batches(dropped, [400], 1000, 0).set_index("kernel").loc["k3"]
    assert k3["below"] == pytest.approx((1 - 0.0005) ** 400, abs=0.05)  # unless the token is drawn, the number is too small
    assert k3["student"] < 0.5
    for size in (50, 400):  # the rule that the package has for its intervals
        x = np.random.default_rng(size).lognormal(0, 1, (20, size))
        closed = metrics._of_batches(x, 1.0, 0.95)[:, 2]
        sorted_sizes = -np.sort(-np.abs(x - x.mean(1, keepdims=True)))
        assert closed.tolist() == [float(is_well_sampled(np.ones(size), row)) for row in sorted_sizes]
    again = metrics.batches(dropped, [400], 1000, 0).set_index("kernel").loc["k3"]
    assert again.equals(k3)
