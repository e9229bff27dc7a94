"""The thirteen identities of the field, through the public interface, on random bandits, trees and a Gaussian.

Where an identity is quoted for more than it is true for (Rao–Blackwell, number 13), the true part is tested and a
counterexample of the rest is pinned.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from worlds import TREES, assert_prints, assert_same, combination, scenario

import gradlab as gl
from gradlab.estimators.coefficients import coefficients
from gradlab.estimators.kernels import derivative
from gradlab.moments import gradients

E = gl.Estimator
WORLDS = [(shape, seed) for shape in ("bandit", *TREES) for seed in (0, 1)] + [("gaussian", 0)]
everywhere = pytest.mark.parametrize(("shape", "seed"), WORLDS)
one_position = pytest.mark.parametrize(("shape", "seed"), [w for w in WORLDS if w[0] in ("bandit", "gaussian")])
bandits = pytest.mark.parametrize("seed", range(4))
trees = pytest.mark.parametrize(("shape", "seed"), [w for w in WORLDS if w[0] in TREES])

REVERSE, FORWARD, ZERO = {"reverse_kl": 1}, {"forward_kl": 1}, {"zero": 1}
FROZEN, FORWARD_FROZEN = {"reverse_kl_frozen_prefix": 1}, {"forward_kl_frozen_prefix": 1}


def assert_descends(estimator, parts, world, prefixes=None):
    """E g = Σ share · ∇target, to 1e-10 of the reverse KL's gradient; `prefixes`: the scenario whose prefixes are frozen."""
    scale = float(gl.exact.gradient("reverse_kl", world).norm())
    assert scale > 0.05
    assert_same(gl.exact.moments(estimator, world).mean, combination(parts, prefixes or world), scale, what=estimator.name)


def relative_bias(estimator, world, target="reverse_kl"):
    return gl.measure(estimator, world, target)["bias"].item()


def probabilities(policy):
    return policy.table[0].softmax(-1).numpy()


# ------------------------------------------------------------------------------------- one position, 1 to 7


@everywhere
def test_1_k1_as_loss_is_zero_with_fisher_covariance(shape, seed):
    world = scenario(shape, seed=seed)
    for credit in ("token", "sequence"):
        assert_descends(E("k1", credit=credit), ZERO, world)
    rollout = gl.Rollout.enumerated(world)
    per_sample = gradients([E("k1")], rollout).tables(0).flatten(1)
    covariance = per_sample.T @ (rollout.weight[:, None] * per_sample)
    if shape == "gaussian":
        fisher = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)) / world.policy.std**2
    else:  # block-diagonal: visits · (diag p − p pᵀ)
        p, visits = world.policy.table.softmax(-1), world.policy.occupancy()
        fisher = torch.block_diag(*(n * (torch.diag(q) - torch.outer(q, q)) for n, q in zip(visits, p, strict=True)))
    assert_same(covariance, fisher)
    assert gl.exact.moments(E("k1"), world).trace_cov == pytest.approx(float(fisher.trace()), rel=1e-10)


@everywhere
def test_1_off_policy_k1_as_loss_pushes_away_from_the_sampler(shape, seed):
    world = scenario(shape, off_policy=True, seed=seed)
    to_sampler = gl.exact.gradient("forward_kl", gl.Scenario(world.policy, world.behaviour))
    mean = gl.exact.moments(E("k1"), world).mean
    assert_same(mean, -to_sampler)
    step = 1e-3 / float(mean.norm())
    moved = world.policy.with_parameters(world.policy.parameters - step * mean)
    assert world.behaviour.kl(moved) > world.lag()


@everywhere
def test_2_log_ratio_times_score(shape, seed):
    world = scenario(shape, seed=seed)
    for pair in [(E("k1", "reward"), E("k2")), (E("k1", "reward", "sequence"), E("k2", credit="sequence"))]:
        rewarded, as_loss = (coefficients(e, gl.Rollout.enumerated(scenario(shape, True, seed))).score for e in pair)
        torch.testing.assert_close(rewarded, as_loss, rtol=1e-12, atol=1e-14)  # sample by sample, whoever drew the samples
    returned = coefficients(E("k1", "reward", "return"), gl.Rollout.enumerated(world)).score
    assert_same(returned, coefficients(E("k2", credit="sequence"), gl.Rollout.enumerated(world)).score)
    assert_descends(E("k2", credit="sequence"), REVERSE, world)


@one_position
def test_3_k3_as_loss_is_the_forward_kl(shape, seed):
    world = scenario(shape, seed=seed)
    assert_descends(E("k3"), FORWARD, world)
    if shape == "bandit":
        by_hand = probabilities(world.policy) - probabilities(world.reference)
        assert_same(gl.exact.moments(E("k3"), world).mean, by_hand)


@one_position
def test_4_k3_in_reward_is_the_difference(shape, seed):
    world = scenario(shape, seed=seed)
    assert_descends(E("k3", "reward"), {"reverse_kl": 1, "forward_kl": -1}, world)
    for kernel in ("k1", "k3"):
        assert_descends(E(kernel, "loss+reward"), REVERSE, world)
    assert_descends(E("k2", "loss+reward"), {"k2_value": 1}, world)  # for k2 the sum is another objective
    assert relative_bias(E("k2", "loss+reward"), world) > 0.05


@bandits
def test_4_k3_in_reward_collapses_near_the_reference(seed):
    policy = gl.Bandit.random(5, seed=seed)
    sizes = []
    for scale in (1e-3, 5e-4):
        world = gl.Scenario(policy, policy.perturbed(scale=scale, seed=seed + 9))
        strength = gl.exact.moments(E("k3", "reward"), world).mean.norm() / gl.exact.gradient("reverse_kl", world).norm()
        sizes.append(float(strength))
    assert sizes[0] < 2e-3
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=1e-2)  # its gradient is of second order in the distance


@everywhere
def test_5_k3_swapped_as_loss_is_chi2(shape, seed):
    world = scenario(shape, seed=seed)
    assert_descends(E("k3_swapped"), {"chi2_frozen_prefix": 1}, world)
    if shape == "bandit":  # ∇½(Σ π²/ref − 1)
        p, ratio = probabilities(world.policy), probabilities(world.policy) / probabilities(world.reference)
        assert_same(gl.exact.moments(E("k3_swapped"), world).mean, p * (ratio - p @ ratio))


@one_position
def test_6_variance_of_the_coefficient_is_chi2(shape, seed):
    world = scenario(shape, seed=seed)
    rollout = gl.Rollout.enumerated(world)
    coefficient = coefficients(E("k3"), rollout).score[:, 0]
    mean = rollout.weight @ coefficient
    variance = float(rollout.weight @ (coefficient - mean).square())
    chi2 = 2 * gl.exact.objective("chi2_frozen_prefix", gl.Scenario(world.reference, world.policy))
    assert variance == pytest.approx(chi2, rel=1e-10)
    assert abs(gl.exact.moments(E("k3"), world).trace_cov / chi2 - 1) > 0.05  # of the coefficient, not of the gradient


def test_7_coefficients_of_k2_and_k3():
    log_ratio = torch.linspace(-6, 6, 97, dtype=torch.float64)
    k2, k3 = (derivative(kernel, log_ratio, log_ratio, None, None) for kernel in ("k2", "k3"))
    delta = torch.exp(-log_ratio)
    assert_same(k2 - k3, -delta.log() - (1 - delta), tolerance=1e-14)
    assert (k2 - k3 >= 0).all()
    assert ((k2 - k3 > 0) == (log_ratio != 0)).all()
    for x in (0.02, -0.02, 0.01, -0.01):  # ½(δ−1)² − ⅓(δ−1)³ + ¼(δ−1)⁴ − …
        at = torch.tensor(x, dtype=torch.float64)
        gap = float(derivative("k2", at, at, None, None) - derivative("k3", at, at, None, None))
        u = math.expm1(-x)
        assert gap == pytest.approx(u**2 / 2 - u**3 / 3, abs=0.3 * u**4)
        assert abs(gap - u**2 / 2 + u**3 / 3) > 0.2 * u**4
    x = log_ratio[log_ratio > 0]
    asymmetry = {k: derivative(k, -x, x, None, None).abs() / derivative(k, x, x, None, None).abs() for k in ("k2", "k3")}
    assert_same(asymmetry["k2"], torch.ones_like(x), tolerance=1e-14)
    torch.testing.assert_close(asymmetry["k3"], x.exp(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("weight", ["token", "prefix", "sequence"])
@one_position
def test_importance_weights_at_one_position(shape, seed, weight):
    off, on = scenario(shape, True, seed), scenario(shape, seed=seed)
    for world in (off, on):
        for kernel in ("k1", "k3"):
            assert_descends(E(kernel, weight=weight, differentiate_weight=True), REVERSE, world)
        assert_descends(E("k2", weight=weight), REVERSE, world)
        assert_descends(E("k2", weight=weight, differentiate_weight=True), {"k2_value": 1}, world)
        assert_descends(E("k3", weight=weight), FORWARD, world)
    # On-policy ρ ≡ 1 as a number, but differentiating it still changes the gradient.
    plain, weighted = (gl.exact.moments(E("k3", **w), on).mean for w in ({}, {"weight": weight, "differentiate_weight": True}))
    assert float((plain - weighted).norm()) > 0.05 * float(plain.norm())


# --------------------------------------------------------------------------------------------- sequences, 8 to 12


@everywhere
def test_8_per_token_is_the_frozen_prefix_form(shape, seed):
    world = scenario(shape, seed=seed)
    for e in (E("k2"), E("k1", "reward"), E("full"), E("k3", "straight_through")):
        assert_descends(e, FROZEN, world)
    whole = [E("k2", credit="sequence"), E("k1", "reward", "to_go"), E("k1", "reward", "return")]
    whole += [E("k1", "reward", "sequence"), E("full", "loss+reward", "to_go"), E("full", "loss+reward", "return")]
    for e in whole:
        assert_descends(e, REVERSE, world)
    if shape in TREES:
        assert relative_bias(E("k2"), world) > 0.02


@everywhere
def test_9_k3_as_loss_is_the_forward_kl_of_its_unit(shape, seed):
    world = scenario(shape, seed=seed)
    assert_descends(E("k3"), FORWARD_FROZEN, world)
    assert_descends(E("k3", credit="sequence"), FORWARD, world)
    if shape in TREES:
        assert relative_bias(E("k3"), world, "forward_kl") > 0.02


@everywhere
def test_10_k3_in_reward_with_to_go(shape, seed):
    world = scenario(shape, seed=seed)
    assert_descends(E("k3", "reward", "to_go"), {"reverse_kl": 1, "forward_kl_frozen_prefix": -1}, world)
    for credit in ("to_go", "return", "sequence"):
        assert_descends(E("k3", "loss+reward", credit), REVERSE, world)
        assert_descends(E("k1", "loss+reward", credit), REVERSE, world)
    parts = [gl.exact.moments(E("k3", *rest), world).mean for rest in (("reward", "to_go"), ("loss",))]
    assert_same(sum(parts), gl.exact.gradient("reverse_kl", world))


@trees
def test_11_a_length_normaliser_is_an_objective_of_its_own(shape, seed):
    world = scenario(shape, seed=seed)
    assert_descends(E("k1", normalise="mean"), {"inverse_length": 1}, world)
    assert_descends(E("k1"), ZERO, world)
    length = world.policy.length
    for e, right in [(E("k2"), FROZEN), (E("k3"), FORWARD_FROZEN), (E("k1", "reward", "to_go"), REVERSE)]:
        truth = combination(right, world)
        mean = gl.exact.moments(dataclasses.replace(e, normalise="mean"), world).mean
        if world.policy.eos is None:  # one length: 1/L is a constant
            assert_same(length * mean, truth)
        else:  # correlated with the length: no constant undoes it
            share = float(mean @ truth) / float(truth @ truth)
            assert float((mean - share * truth).norm()) > 0.01 * float(mean.norm())
        for normalise, factor in (("fixed", length), ("token_mean", float(world.policy.occupancy().sum()))):
            assert_descends(dataclasses.replace(e, normalise=normalise), {k: v / factor for k, v in right.items()}, world)


@trees
def test_11_length_normaliser_of_k1_moves_the_length(shape, seed):
    world = scenario(shape, seed=seed)
    gradient = gl.exact.gradient("inverse_length", world)
    if world.policy.eos is None:
        assert float(gradient.norm()) < 1e-15
    else:  # it has no reference in it: another one gives the same
        other = gl.Scenario(world.policy, world.policy.perturbed(scale=1.0, seed=5))
        assert_same(gl.exact.moments(E("k1", normalise="mean"), other).mean, gradient)
        longer = world.policy.with_parameters(world.policy.parameters - 0.1 * gradient)
        assert float(longer.occupancy().sum()) > float(world.policy.occupancy().sum())


@everywhere
def test_12_off_policy(shape, seed):
    world, on = scenario(shape, True, seed), scenario(shape, seed=seed)
    unbiased = [
        E(kernel, weight=weight, differentiate_weight=True) for kernel in ("k1", "k3") for weight in ("sequence", "prefix")
    ]
    unbiased += [E(kernel, "loss", "sequence", "sequence", differentiate_weight=True) for kernel in ("k1", "k3")]
    unbiased += [E("k1", "reward", credit, "sequence") for credit in ("to_go", "return", "sequence")]
    unbiased += [E("k2", "loss", "sequence", "sequence"), E("k3", "loss+reward", "to_go", "sequence")]
    unbiased += [E("full", "loss+reward", "to_go", weight) for weight in ("prefix", "sequence")]
    for e in unbiased:
        assert_descends(e, REVERSE, world)
    # Detached prefix weights give the frozen form, with prefixes from π rather than from the sampler.
    for e in (E("k2", weight="prefix"), E("full", weight="prefix")):
        assert_descends(e, FROZEN, world, prefixes=on)
    for e in (E("k2", weight="token"), E("k3", weight="token", differentiate_weight=True), E("full")):
        assert_descends(e, FROZEN, world)
    if shape in TREES:  # token weights are not enough, and no weights are less
        for e in (E("k1", weight="token", differentiate_weight=True), E("k3", weight="token", differentiate_weight=True)):
            assert relative_bias(e, world) > 0.02
        for e in (E("k1", "reward", "to_go", "token"), E("k1", "reward", "to_go"), E("full", "loss+reward", "to_go")):
            assert relative_bias(e, world) > 0.02


# ------------------------------------------------------------------------- 13, Rao–Blackwell: what is true of it


@one_position
def test_13_rao_blackwell_at_one_position(shape, seed):
    """No noise at all is left, in the value or in the gradient."""
    world = scenario(shape, seed=seed)
    k1, full = (gl.exact.value_moments(kernel, world) for kernel in ("k1", "full"))
    assert full.mean == pytest.approx(k1.mean, rel=1e-10)
    assert full.variance <= 1e-20 < k1.variance
    assert gl.exact.moments(E("full"), world).trace_cov <= 1e-15 < gl.exact.moments(E("k2"), world).trace_cov


@trees
def test_13_the_frozen_prefix_gradient_is_never_noisier_on_a_tree(shape, seed):
    """Steps of a tree have parameters of their own, so each is a conditional expectation by itself."""
    for world in (scenario(shape, seed=seed), scenario(shape, True, seed)):
        full, sampled = (gl.exact.moments(e, world) for e in (E("full"), E("k2", weight="token")))
        assert_same(full.mean, sampled.mean)
        assert full.trace_cov < sampled.trace_cov


def compensating(free_layers: int) -> gl.Scenario:
    """ℓ_2 cancels what ℓ_1 did: log π(y)/ref(y) hardly varies, Σ_t KL_t does. Before them, layers with π = ref."""
    half, layers = [0.5, 0.5], 2**free_layers
    policy = [half] * (layers - 1) + [half] * layers + [half, [0.999, 0.001]] * layers
    reference = [half] * (layers - 1) + [[0.25, 0.75]] * layers + [half, [1 / 3, 2 / 3]] * layers
    return gl.Scenario(gl.Tree(np.log(policy)), gl.Tree(np.log(reference)))


def test_13_fails_for_the_value_of_a_sequence():
    """Σ_t KL_t(s_t) is no conditional expectation of Σ_t ℓ_t: every term conditions on another prefix."""
    world = compensating(0)
    k1, full = (gl.exact.value_moments(kernel, world) for kernel in ("k1", "full"))
    assert full.mean == pytest.approx(k1.mean, rel=1e-12)
    assert_prints(k1.variance, "0.0289")
    assert_prints(full.variance, "0.297")
    # By hand: S is log 2, log(⅔ · 2.997) or log(⅔ · .0015); Σ KL_t is its KL at the root plus 0 or KL at the second step.
    probability, s = np.array([0.5, 0.4995, 0.0005]), np.log([2, 2 / 3 * 2.997, 2 / 3 * 0.0015])
    assert k1.variance == pytest.approx(probability @ s**2 - (probability @ s) ** 2, rel=1e-10)
    second = 0.999 * math.log(2.997) + 0.001 * math.log(0.0015)
    assert full.variance == pytest.approx(second**2 / 4, rel=1e-10)


def test_13_fails_for_the_complete_gradient():
    world = compensating(2)
    full, sampled = (gl.exact.moments(e, world) for e in (E("full", "loss+reward", "to_go"), E("k1", "reward", "to_go")))
    assert_same(full.mean, sampled.mean)
    assert full.trace_cov > 1.15 * sampled.trace_cov
    # not for want of a layer where π = ref: with none the usual order holds
    full, sampled = (
        gl.exact.moments(e, compensating(0)) for e in (E("full", "loss+reward", "to_go"), E("k1", "reward", "to_go"))
    )
    assert full.trace_cov < sampled.trace_cov


# ------------------------------------------------------------------------------ value of the gradient, gradient of the value


@pytest.mark.parametrize("kernel", ["k1", "k2", "k3", "abs", "k3_swapped"])
@pytest.mark.parametrize("shape", ["bandit", "tree", "eos"])
def test_gradient_of_the_value_is_score_term_plus_direct_term(shape, kernel):
    """∇E[k] = E[k · score] + E[∇k], by central differences of E[k]."""
    world = scenario(shape)
    policy, found, step = world.policy, [], 1e-3
    for i in range(len(policy.parameters)):
        shift = torch.zeros_like(policy.parameters)
        shift[i] = step

        def value(times, shift=shift):
            moved = gl.Scenario(policy.with_parameters(policy.parameters + times * shift), world.reference)
            return gl.exact.value_moments(kernel, moved, "sequence").mean

        found.append((8 * (value(1) - value(-1)) - value(2) + value(-2)) / (12 * step))
    both = gl.exact.moments(E(kernel, "loss+reward", "sequence"), world).mean
    parts = [gl.exact.moments(E(kernel, placement, "sequence"), world).mean for placement in ("loss", "reward")]
    assert_same(sum(parts), both, tolerance=1e-12)
    assert np.linalg.norm(np.array(found) - both.numpy()) < 1e-9
    assert float(both.norm()) > 0.05
    # An unbiased value says nothing about the direct term.
    if kernel in ("k1", "k3"):
        assert relative_bias(E(kernel, credit="sequence"), world) > 0.02
