"""Length normalisers: what they descend, against enumeration, finite differences and batches drawn by brute force."""

import itertools

import numpy as np
import pytest
import torch
from worlds import assert_same

import gradlab as gl
from gradlab.questions import lengths

TREE = gl.Tree.random(3, 3, 0, eos=1)
CHAIN = gl.Markov.random(3, 4, 0, eos=2)


def world(policy=TREE, kl=0.4):
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=5))


def enumerated(policy):
    rollout = gl.Rollout.enumerated(gl.Scenario(policy, policy))
    return rollout.weight.numpy(), rollout.mask.sum(-1).numpy()


@pytest.mark.parametrize("policy", [TREE, CHAIN, gl.Tree.random(2, 3, 1), gl.Markov.random(2, 3, 1)])
def test_the_distribution_of_lengths(policy):
    weight, length = enumerated(policy)
    assert_same(lengths.length_distribution(policy), np.bincount(length, weight, policy.length + 1), tolerance=1e-13)
    assert float(lengths.expected_length(policy)) == pytest.approx(weight @ length, rel=1e-13)


@pytest.mark.parametrize("policy", [TREE, CHAIN])
def test_the_gradient_of_the_expected_length(policy):
    found = lengths.length_gradient(policy)
    eps = 1e-5
    for j in range(len(found)):
        e = eps * torch.eye(len(found), dtype=torch.float64)[j]
        ends = [enumerated(policy.moved(sign * e)) for sign in (1, -1)]
        slope = (ends[0][0] @ ends[0][1] - ends[1][0] @ ends[1][1]) / (2 * eps)
        assert float(found[j]) == pytest.approx(slope, abs=1e-8)


def test_without_an_end_token_the_length_has_no_gradient():
    assert not lengths.length_gradient(gl.Bandit.random(3)).any()
    assert float(lengths.length_gradient(gl.Markov.random(3, 5)).norm()) < 1e-14


def test_the_factor_of_a_finite_batch():
    p = lengths.length_distribution(TREE)
    assert_same(lengths.batch_factor(p, 1)[1:], 1 / np.arange(1, 4))
    by_hand = [
        3 * sum(float(p[a] * p[b]) / (length + a + b) for a, b in itertools.product(range(1, 4), repeat=2))
        for length in (1, 2, 3)
    ]
    assert_same(lengths.batch_factor(p, 3)[1:], by_hand)
    mean = float(lengths.expected_length(TREE))
    assert_same(lengths.batch_factor(p, 2000)[1:], [1 / mean] * 3, tolerance=2e-3)
    with pytest.raises(ValueError, match="at least one"):
        lengths.batch_factor(p, 0)


@pytest.mark.parametrize("name", ["k2-loss", "k1-loss", "k3-loss"])
def test_a_batch_of_two_by_brute_force(name):
    """Every pair of responses: the gradient of Σ loss / Σ tokens."""
    scenario, estimator = world(), gl.ESTIMATORS[name]
    weight, length = enumerated(TREE)
    leaf = TREE.parameters.clone().requires_grad_(True)
    rollout = gl.Rollout.enumerated(gl.Scenario(TREE.with_parameters(leaf), scenario.reference))
    ell = rollout.log_ratio
    values = {"k1-loss": ell, "k2-loss": 0.5 * ell**2, "k3-loss": torch.expm1(-ell) + ell}[name]
    per_response = torch.where(rollout.mask, values, 0.0).sum(-1)
    batch_loss = sum(
        float(weight[i] * weight[j]) * (per_response[i] + per_response[j]) / float(length[i] + length[j])
        for i, j in itertools.product(range(len(weight)), repeat=2)
    )
    (truth,) = torch.autograd.grad(batch_loss, leaf)
    found = gl.exact.moments(lengths.token_mean_of(estimator, scenario, 2), scenario).mean
    assert_same(found, truth)
    with pytest.raises(ValueError, match="already has"):
        lengths.token_mean_of(gl.Estimator("k2", normalise="mean"), scenario, 2)


@pytest.mark.parametrize("policy", [TREE, CHAIN])
def test_k1_under_one_over_length_lengthens_whatever_the_reference(policy):
    changes = []
    for kl in (0.1, 1.0):
        frame = lengths.normalisers({"k1-loss": gl.ESTIMATORS["k1-loss"]}, [world(policy, kl)]).set_index("normaliser")
        assert frame.loc["mean", "inverse_length"] < 1e-12
        assert (frame.loc[["sum", "fixed", "token_mean"], "gradient_norm"] < 1e-14).all()
        assert frame["sin_angle"].isna().all()
        changes.append(frame.loc["mean", "length_change"])
    assert changes[0] > 0.001
    assert changes[0] == pytest.approx(changes[1], rel=1e-12)


def test_return_under_one_over_length_is_the_mean_kl_less_the_inverse_length():
    """(1/L) S Σ∇log π has expectation ∇E[S/L] − ∇E[1/L]; with to_go it has not."""
    scenario = world()
    leaf = TREE.parameters.clone().requires_grad_(True)
    rollout = gl.Rollout.enumerated(gl.Scenario(TREE.with_parameters(leaf), scenario.reference))
    s, length = rollout.log_ratio.sum(-1), rollout.mask.sum(-1)
    value = (rollout.log_prob.sum(-1).exp() * (s - 1) / length).sum()
    (truth,) = torch.autograd.grad(value, leaf)
    means = [gl.exact.moments(gl.Estimator("k1", "reward", c, normalise="mean"), scenario).mean for c in ("return", "to_go")]
    assert_same(means[0], truth)
    assert float((means[1] - truth).norm()) > 1e-2 * float(truth.norm())


def test_normalisers_rescale_or_misdirect():
    estimators = {name: gl.ESTIMATORS[name] for name in ("k2-loss", "k1-reward-to-go")}
    frame = lengths.normalisers(estimators, [world()], batches=(1, 400)).set_index(["estimator", "normaliser"])
    for name in estimators:
        rows = frame.loc[name]
        assert (rows.loc[["sum", "token_mean", "fixed"], "sin_angle"] < 1e-12).all()
        assert rows.loc["token_mean", "scale"] == pytest.approx(1)
        assert rows.loc["fixed", "scale"] == pytest.approx(rows["mean_length"].iloc[0] / 3)
        assert rows.loc["mean", "sin_angle"] > 0.02
        assert rows.loc["token_mean of 1", "sin_angle"] == pytest.approx(rows.loc["mean", "sin_angle"])
        assert rows.loc["token_mean of 400", "sin_angle"] < 0.01 * rows.loc["mean", "sin_angle"]
    equal = lengths.normalisers(estimators, [world(gl.Tree.random(3, 3, 2))])
    assert not equal["variable"].any()
    assert (equal["sin_angle"] < 1e-12).all()
    assert equal["length_cosine"].isna().all()
