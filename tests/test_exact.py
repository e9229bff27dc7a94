"""Exact moments: where quadrature is cut, where it stops, which route is taken, and what is measured together."""

import math
import re

import pytest
import torch
from scipy import stats

import gradlab as gl
from gradlab.solvers.exact import kinks


def test_kinks_of_every_bound_are_told_and_only_a_baseline_moves_the_sign_of_an_advantage():
    estimator = gl.Estimator("k2", "reward", weight="token", clip=0.2, clamp_log_ratio=3.0, baseline="kl")
    ratios, log_weights = kinks(estimator, kl=0.08)
    assert sorted(ratios) == pytest.approx([-3, -0.4, 0.4, 3], abs=1e-9)  # ℓ²/2 = 0.08
    assert sorted(log_weights) == pytest.approx([math.log(0.8), math.log(1.2)])
    assert kinks(gl.Estimator("k2", "reward", weight="token", clip=0.2), kl=0.08)[0] == [0.0]
    assert kinks(gl.Estimator("k2", weight="token", truncate=2.0), kl=0.08) == ([], [pytest.approx(math.log(2))])


def test_a_clamp_and_a_truncation_are_cut_where_they_bind():
    """`E[ℓ 1{|ℓ| < ½} ∂log π/∂μ]` of N(0, 1) against N(1, 1): `ℓ = ½ − x`, so the clamp leaves 0 < x < 1."""
    scenario = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1))
    density = stats.norm.pdf
    by_parts = (density(0) - density(1)) / 2 - (stats.norm.cdf(1) - 0.5 - density(1))
    found = gl.exact.moments(gl.Estimator("k2", clamp_log_ratio=0.5), scenario)
    assert float(found.mean[0]) == pytest.approx(by_parts, rel=1e-12)
    assert found.method == "quadrature"
    # Drawn from N(1, 1): ρ = exp(½ − x), truncated at 2 below x₀ = ½ − log 2; k1 in reward is ℓ = ½ − x as well.
    off = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1), gl.Gaussian(1, 1))
    edge = 0.5 - math.log(2)
    above = stats.norm.expect(lambda x: (0.5 - x) * x, lb=edge, epsabs=1e-13)
    below = 2 * stats.norm.expect(lambda x: (0.5 - x) * x, loc=1, ub=edge, epsabs=1e-13)
    bounded = gl.exact.moments(gl.Estimator("k1", "reward", weight="token", truncate=2.0), off)
    assert float(bounded.mean[0]) == pytest.approx(above + below, rel=1e-9)


@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
def test_a_trace_diverges_whatever_the_unit_of_length(scale):
    """`E[ref²/π]` exists iff `σ_ref² < 2σ²`."""
    policy = gl.Gaussian(0, scale)
    assert gl.exact.moments(gl.ESTIMATORS["k3-loss"], gl.Scenario(policy, gl.Gaussian(0, 1.5 * scale))).trace_cov == math.inf
    assert gl.exact.moments(gl.ESTIMATORS["k3-loss"], gl.Scenario(policy, gl.Gaussian(0, 1.2 * scale))).trace_cov < math.inf


def test_a_mean_that_does_not_exist_is_refused_with_the_name_of_its_scenario():
    """`E_μ[ref/π]` exists iff `1/σ_μ² + 1/σ_ref² > 1/σ²`."""
    scenario = gl.Scenario(gl.Gaussian(0, 0.706), gl.Gaussian(0, 1), gl.Gaussian(0, 1))
    with pytest.raises(ValueError, match=re.escape(f"the expected gradient on {scenario.label} does not fit")):
        gl.exact.moments(gl.ESTIMATORS["k3-loss"], scenario)


@pytest.mark.parametrize("policy", [gl.Bandit.random(4, seed=0), gl.Tree.random(vocab=3, length=9, seed=0)])
def test_a_callable_is_enumerated_whole_or_in_parts_with_the_moments_of_its_estimator(policy):
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.3, seed=1))
    estimator = gl.ESTIMATORS["k2-loss"]
    found, known = gl.exact.moments([lambda rollout: estimator(rollout), estimator], scenario)
    assert found.method == known.method == "enumeration"
    torch.testing.assert_close(found.mean, known.mean, rtol=1e-9, atol=1e-13)
    assert found.trace_cov == pytest.approx(known.trace_cov, rel=1e-9)


def test_two_sums_over_the_vocabulary_are_measured_together_as_alone():
    policy = gl.Tree.random(vocab=3, length=3, seed=4)
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.4, seed=5))
    pair = [gl.Estimator("full"), gl.Estimator("mse"), gl.Estimator("full", "loss+reward", "to_go")]
    for together, estimator in zip(gl.exact.moments(pair, scenario), pair, strict=True):
        alone = gl.exact.moments(estimator, scenario)
        torch.testing.assert_close(together.mean, alone.mean, rtol=1e-12, atol=1e-15)
        assert together.trace_cov == pytest.approx(alone.trace_cov, rel=1e-10)


@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_values_on_a_chain_are_those_of_its_responses(credit):
    policy = gl.Markov.random(vocab=3, length=4, seed=2)
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.4, seed=3))
    rollout = gl.Rollout.enumerated(scenario)
    ratios = rollout.log_ratio.sum(-1, keepdim=True) if credit == "sequence" else rollout.log_ratio
    values = (ratios.square() / 2).sum(-1)
    mean = float(rollout.weight @ values)
    found = gl.exact.value_moments("k2", scenario, credit)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.variance == pytest.approx(float(rollout.weight @ (values - mean).square()), rel=1e-10)
    assert gl.exact.objective("reverse_kl", scenario) == pytest.approx(
        float(rollout.weight @ rollout.log_ratio.sum(-1)), rel=1e-12
    )


def test_weights_have_a_row_for_every_response():
    from gradlab.estimators.estimator import raw_weights

    policy = gl.Tree.random(vocab=2, length=3, seed=1)
    rollout = gl.Rollout.enumerated(gl.Scenario(policy, policy.perturbed(scale=0.1, seed=1)))
    assert raw_weights(gl.ESTIMATORS["k2-loss"], rollout).shape == (8, 1)
