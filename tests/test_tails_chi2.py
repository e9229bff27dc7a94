"""χ² as a predictor of the noise of k3 as loss: what is an identity, what is a bound, and what is neither."""

import numpy as np
import pandas as pd
import pytest
from worlds import scenario

import gradlab as gl
from gradlab.questions import tails


def two(p: float, r: float) -> gl.Scenario:
    return gl.Scenario(gl.Bandit(np.log([p, 1 - p])), gl.Bandit(np.log([r, 1 - r])))


@pytest.mark.parametrize("shape", ["bandit", "tree", "deep", "eos", "eos first"])
def test_coefficient_variance_is_chi2_and_bounds_the_gradient(shape):
    row = tails.variances([scenario(shape)]).iloc[0]
    assert row["coefficient_ratio"] == pytest.approx(1, rel=1e-10)
    assert 0 < row["gradient_ratio"] < 2
    assert row["noise"] == pytest.approx(gl.measure("k3-loss", scenario(shape))["noise"].iloc[0], rel=1e-12)


@pytest.mark.parametrize("shape", ["tree", "eos"])
def test_chi2_of_steps_is_a_plain_sum_over_nodes(shape):
    world = scenario(shape)
    p, q = (np.exp(x.table.log_softmax(-1).numpy()) for x in (world.policy, world.reference))
    rows = (q**2 / p).sum(-1) - 1
    assert tails.chi2(world) == pytest.approx(float(world.policy.occupancy().numpy() @ rows), rel=1e-12)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.8])
def test_two_tokens_have_the_variance_of_a_parabola(p):
    """By hand: the gradient is `(1−δ)(1−p)` or `−(1−δ)p` along (1, −1)."""
    row = tails.variances([two(p, 0.4)]).iloc[0]
    g = np.array([(1 - 0.4 / p) * (1 - p), -(1 - 0.6 / (1 - p)) * p])
    weight = np.array([p, 1 - p])
    by_hand = 2 * (weight @ g**2 - (weight @ g) ** 2)
    assert row["trace_cov"] == pytest.approx(by_hand, rel=1e-12, abs=1e-14)
    assert row["trace_cov"] == pytest.approx(2 * (1 - 2 * p) ** 2 * row["chi2"], rel=1e-12, abs=1e-14)


def test_smallest_counterexample_orders_two_policies_the_wrong_way():
    flat, steep = tails.variances([two(0.5, 0.1), two(0.1, 0.2)]).to_dict("records")
    assert flat["chi2"] > 5 * steep["chi2"]
    assert flat["trace_cov"] < 1e-15 < 0.1 < steep["trace_cov"]


@pytest.mark.parametrize(("std", "infinite"), [(0.3, True), (0.65, True), (0.8, False)])
def test_gaussian_variances_are_infinite_together(std, infinite):
    row = tails.variances([gl.Scenario(gl.Gaussian(0.5, std), gl.Gaussian(0, 1))]).iloc[0]
    assert np.isinf(row["chi2"]) == np.isinf(row["trace_cov"]) == infinite


def test_rank_correlation_per_group():
    frame = pd.DataFrame({"group": ["a"] * 4 + ["b"] * 3, "chi2": [1, 2, 3, 4, 1, 2, 3], "trace_cov": [1, 3, 2, 4, 3, 2, 1]})
    found = tails.rank_correlations(frame.assign(noise=1.0 * frame["chi2"]), ["group"]).set_index("group")
    assert found["rank_trace_cov"].to_list() == pytest.approx([0.8, -1])
    assert found["rank_noise"].to_list() == pytest.approx([1, 1])
    assert found["scenarios"].to_list() == [4, 3]
