"""Covariance matrices against the trace of the moments, a slow oracle and the closed form of k1."""

import math

import numpy as np
import oracles
import pytest
import torch

import gradlab as gl

PLAIN = {name: estimator for name, estimator in gl.ESTIMATORS.items() if not estimator.grouped}


def scenarios() -> dict[str, gl.Scenario]:
    found = {"gaussian": gl.Scenario(gl.Gaussian(0.2, 1.0), gl.Gaussian(0.5, 1.05), gl.Gaussian(0.1, 1.1))}
    for name, policy in {
        "bandit": gl.Bandit.random(5, seed=3),
        "tree": gl.Tree.random(vocab=3, length=3, seed=1, eos=2),
    }.items():
        found[name] = gl.Scenario(policy, policy.perturbed(scale=0.3, seed=2), policy.perturbed(scale=0.2, seed=5))
    return found


@pytest.mark.parametrize("name", ["bandit", "tree", "gaussian"])
@pytest.mark.parametrize("estimator", PLAIN)
def test_trace_is_that_of_the_moments(name: str, estimator: str) -> None:
    scenario = scenarios()[name]
    covariance = gl.exact.covariance(PLAIN[estimator], scenario)
    torch.testing.assert_close(covariance, covariance.T, rtol=1e-12, atol=1e-15 * float(covariance.abs().max()))
    assert float(covariance.trace()) == pytest.approx(
        gl.exact.moments(PLAIN[estimator], scenario).trace_cov, rel=1e-10, abs=1e-14
    )


def test_every_entry_against_the_oracle() -> None:
    scenario = scenarios()["tree"]
    estimator = gl.Estimator("k3", "loss+reward", "to_go", "prefix", truncate=1.5)
    covariance = gl.exact.covariance(estimator, scenario).numpy()
    for i, j in ((0, 0), (1, 5), (7, 2)):
        # The trace of (g_i + g_j) and of (g_i − g_j), polarised.
        plus, minus = (
            oracles.moments(
                estimator,
                *(policy.table.numpy() for policy in (scenario.policy, scenario.reference, scenario.behaviour)),
                eos=2,
                fold=lambda g, i=i, j=j, sign=sign: np.array([g[i] + sign * g[j]]),
            )[1]
            for sign in (1, -1)
        )
        assert covariance[i, j] == pytest.approx((plus - minus) / 4, rel=1e-10, abs=1e-15)


def test_k1_as_loss_has_the_fisher_matrix() -> None:
    scenario = scenarios()["bandit"].on_policy()
    p = scenario.policy.table.softmax(-1)[0]
    torch.testing.assert_close(
        gl.exact.covariance(gl.ESTIMATORS["k1-loss"], scenario), p.diag() - p.outer(p), rtol=1e-12, atol=1e-15
    )


def test_published_errors_of_50_000_samples() -> None:
    scenario = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1.1))
    truth = gl.exact.gradient("reverse_kl", scenario)
    error = (gl.exact.covariance(gl.ESTIMATORS["k3-loss"], scenario).diag() / 50_000).sqrt() / truth.abs()
    assert float(error[0]) == pytest.approx(0.0267, abs=5e-5)


def test_callables_and_short_chains_are_enumerated() -> None:
    chain = gl.Markov.random(vocab=3, length=4, seed=0)
    scenario = gl.Scenario(chain, chain.perturbed(scale=0.5, seed=1))
    as_function = gl.exact.covariance(lambda rollout: gl.ESTIMATORS["k2-loss"](rollout), scenario)
    covariance = gl.exact.covariance(gl.ESTIMATORS["k2-loss"], scenario)
    torch.testing.assert_close(as_function, covariance, rtol=1e-10, atol=1e-14)
    trace = gl.exact.moments(gl.ESTIMATORS["k2-loss"], scenario).trace_cov
    assert float(covariance.trace()) == pytest.approx(trace, rel=1e-10)


def test_divergent_variances_are_infinite() -> None:
    # Var of k3 as loss is finite iff the reference has less than twice the policy's variance.
    covariance = gl.exact.covariance(gl.ESTIMATORS["k3-loss"], gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(0.5, 1.6)))
    assert covariance.diag().tolist() == [math.inf, math.inf]
    assert math.isnan(float(covariance[0, 1]))


@pytest.mark.parametrize(
    ("estimator", "policy", "words"),
    [
        ("k1-reward-loo", gl.Bandit.random(3), "compares responses"),
        ("k2-loss", gl.Tree.random(vocab=3, length=9), "parameters over 19683 responses"),
        ("k2-loss", gl.Markov.random(vocab=4, length=64), "4\\^64 responses"),
    ],
)
def test_what_is_refused(estimator: str, policy: gl.Policy, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gl.exact.covariance(gl.ESTIMATORS[estimator], gl.Scenario(policy, policy.perturbed(scale=0.1)))
