"""What an advantage ascends: against loops over all groups, closed forms, and derivatives of the value."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracles_objective import advantage as plain_advantage
from scipy import integrate, stats

import gradlab as gl

P = np.linspace(0.03, 0.97, 9)
KINDS = {
    "reward": {},
    "mean": {},
    "leave_one_out": {},
    "group_std": {},
    "sample": {"std": "sample", "epsilon": 0.1},
    "pass_at_k": {"k": 3},
}


def given(name):
    return {"advantage": "group_std" if name == "sample" else name, **KINDS[name]}


@pytest.mark.parametrize("group", [3, 5, 10])
@pytest.mark.parametrize("name", KINDS)
def test_the_slope_is_that_of_all_groups(name, group):
    """E[(1/G) Σ A_i ∇log π(y_i)] for one Bernoulli response each, by a loop over all 2^G groups."""
    arguments = given(name)
    loss = gl.PolicyLoss(arguments["advantage"], group, **KINDS[name])
    found = gl.utility(**arguments, group=group)
    for p in (0.1, 0.5, 0.85):
        total = 0.0
        for rewards in itertools.product([0.0, 1.0], repeat=group):
            share = math.prod(p if r else 1 - p for r in rewards)
            scores = [1 / p if r else -1 / (1 - p) for r in rewards]  # of p itself
            total += share * sum(plain_advantage(loss, list(rewards), i, None) * s for i, s in enumerate(scores)) / group
        assert found.slope(p) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("group", [3, 7, 64])
@pytest.mark.parametrize("name", KINDS)
def test_the_value_is_the_integral_of_the_slope(name, group):
    found = gl.utility(**given(name), group=group)
    for p in (0.05, 0.6, 0.99):
        assert found.value(p) == pytest.approx(integrate.quad(found.slope, 0, p, epsabs=1e-13)[0], rel=1e-10)
    assert found.value(0.0) == 0


@pytest.mark.parametrize("group", [2, 3, 8, 64])
def test_the_slope_by_binomial_probabilities(group):
    found = gl.utility("group_std", group=group)
    c = np.arange(group)
    right = [math.sqrt((group - n) / n) for n in range(1, group + 1)]
    wrong = [-math.sqrt(n / (group - n)) for n in range(group)]
    for p in P:
        assert found.slope(p) == pytest.approx(float(stats.binom.pmf(c, group - 1, p) @ (np.array(right) - wrong)), rel=1e-12)


def test_closed_forms():
    np.testing.assert_allclose(gl.utility("leave_one_out", group=5).value(P), P, rtol=1e-14)
    np.testing.assert_allclose(gl.utility("mean", group=5).value(P), 0.8 * P, rtol=1e-14)
    np.testing.assert_allclose(gl.utility("group_std", group=2).value(P), P, rtol=1e-14)
    np.testing.assert_allclose(gl.utility("group_std", group=3).value(P), math.sqrt(2) * P, rtol=1e-14)
    np.testing.assert_allclose(gl.utility("pass_at_k", group=16, k=4).value(P), 1 - (1 - P) ** 4, rtol=1e-12)
    np.testing.assert_allclose(gl.utility("group_std").slope(P), 1 / np.sqrt(P * (1 - P)), rtol=1e-14)
    limit, gaps = gl.utility("group_std").value(P), []
    for group in (64, 256, 1024):
        gaps.append(
            np.abs(
                gl.utility("group_std", group=group).value(P)
                - gl.utility("group_std", group=group).value(0.5)
                - limit
                + math.pi / 2
            ).max()
        )
    assert gaps[2] < gaps[1] / 2 < gaps[0] / 4
    assert gaps[2] < 2e-3


def test_names():
    assert gl.utility("reward").name == "p"
    assert gl.utility("leave_one_out", group=8).name == "p"
    assert gl.utility("mean", group=8).name == "(1 − 1/8) p"
    assert gl.utility("group_std", group=2).name == "p"
    assert gl.utility("group_std", group=3).name == "1.41421 p"
    assert gl.utility("group_std", group=8).name == "2 arcsin √p as G → ∞"
    assert gl.utility("group_std").name == "2 arcsin √p"
    assert gl.utility("pass_at_k", group=8, k=4).name == "pass@4"
    assert gl.utility(lambda rewards: rewards * rewards.sum(-1, keepdim=True), group=4).name is None
    assert str(gl.utility("reward")) == "U(p) = p (reward, G = 1)"


@pytest.mark.parametrize("name", ["batch_std", "mean_batch_std"])
def test_a_batch_has_no_utility(name):
    assert gl.utility(name, group=8) is None


def test_why_a_loss_has_none():
    why = gl.estimators.policy_loss.why_no_utility
    assert why(gl.LOSSES["reinforce"]) == why(gl.LOSSES["pkpo"]) == ()
    assert any("length" in reason for reason in why(gl.LOSSES["grpo"]))
    assert any("off-policy" in reason for reason in why(gl.LOSSES["dr-grpo"]))
    assert any("trust region" in reason for reason in why(gl.LOSSES["cispo"]))
    assert any("KL is in the signal" in reason for reason in why(gl.LOSSES["rloo"]))
    assert any("spread of the batch" in reason for reason in why(gl.LOSSES["reinforce++-baseline"]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gl.utility("group-std", group=8), "unknown advantage 'group-std'; did you mean 'group_std'"),
        (lambda: gl.utility("leave_one_out"), "give group="),
        (lambda: gl.utility("pass_at_k", group=4), "needs it"),
        (lambda: gl.utility("reward").slope(1.5), "lies between 0 and 1, got 1.5"),
        (lambda: gl.utility(lambda rewards: torch.ones(3), group=2), "as many finite numbers"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_loss_has_the_utility_of_its_advantage_under_conditions():
    loss = gl.LOSSES["grpo-sample-std"]
    found = gl.utility(loss)
    assert found.slope(0.3) == gl.utility("group_std", group=8, std="sample", epsilon=1e-4).slope(0.3)
    assert found.conditions == gl.estimators.policy_loss.why_no_utility(loss)
    assert gl.utility(loss, group=4).group == 4
    assert gl.utility(gl.LOSSES["pkpo"]).name == "pass@4"
    assert gl.utility(gl.LOSSES["rloo"]) is None
    assert gl.utility(gl.LOSSES["reinforce++-baseline"]) is None
