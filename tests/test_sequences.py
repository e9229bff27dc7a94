"""Chains of a chosen memory, gaps, exponents and what k1 does beside a reward, each against an independent second route."""

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from worlds import assert_same

import gradlab as gl
from gradlab.questions import sequences


def scenario(memory=5.0, vocab=3, length=4, kl=0.3, seed=0):
    policy = sequences.lazy_chain(vocab, length, memory, seed)
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=seed + 1))


@pytest.mark.parametrize("memory", [1.0, 2.0, 10.0, 64.0])
def test_a_lazy_chain_remembers_as_long_as_it_says(memory):
    chain = sequences.lazy_chain(5, 8, memory, seed=3)
    p = chain.transition.softmax(-1).numpy()
    # Correlations of any function of the token decay by 1 − 1/memory a step, from the stationary first token on.
    start, f = chain.initial.softmax(-1).numpy(), np.arange(5.0)
    assert_same(start @ p, start)
    f = f - start @ f
    assert_same((start * f) @ p @ f, (1 - 1 / memory) * (start @ f**2), scale=start @ f**2, tolerance=1e-12)
    assert sequences.relaxation_time(chain) == pytest.approx(memory, rel=1e-9)


@pytest.mark.parametrize("memory", [0.5, float("inf")])
def test_an_impossible_memory_is_refused(memory):
    with pytest.raises(ValueError, match="at least 1"):
        sequences.lazy_chain(3, 4, memory)


def test_shortening_keeps_the_chains_and_refuses_trees():
    world = scenario(length=6)
    short = sequences.shortened(world, 2, "short")
    assert short.policy.length == 2
    assert short.label == "short"
    assert torch.equal(short.policy.table, world.policy.table)
    assert torch.equal(short.reference.table, world.reference.table)
    tree = gl.Tree.random(2, 2)
    with pytest.raises(ValueError, match="Markov"):
        sequences.shortened(gl.Scenario(tree, tree), 1)


@pytest.mark.parametrize("name", ["k2-loss", "k3-loss", "k3-loss-sequence", "k1-reward-to-go", "k3-reward-to-go"])
def test_expected_gradients_without_moments(name):
    world = scenario()
    policy, reference = world.policy, world.reference
    trees = [oracles.markov_as_tree(p.initial.numpy(), p.transition.numpy(), p.length) for p in (policy, reference)]
    mean, _ = oracles.moments(gl.ESTIMATORS[name], *trees, fold=lambda g: oracles.fold_markov(g, 3, 4))
    assert_same(sequences.expected_gradient(name, world), mean)


def test_expected_gradients_are_refused_where_none_is_known():
    world = scenario()
    off = gl.Scenario(world.policy, world.reference, world.policy.perturbed(0.1, seed=7))
    for name, where in (("k2-loss", off), ("abs-loss", world)):
        with pytest.raises(ValueError, match="no combination"):
            sequences.expected_gradient(name, where)


def test_the_gap_is_the_bias_that_measure_finds():
    worlds = [scenario(memory, seed=seed) for memory in (1.0, 8.0) for seed in range(2)]
    names = ["k2-loss", "k3-loss"]
    found, measured = sequences.gap(names, worlds), gl.measure(names, worlds)
    assert_same(found["bias"], measured["bias"])
    assert_same(found["cosine"], measured["cosine"])
    assert (found["memory"].round(6) == [1, 1, 1, 1, 8, 8, 8, 8]).all()


def test_one_token_leaves_no_gap_and_memory_widens_it():
    one = sequences.gap(["k2-loss"], [scenario(length=1)])
    assert one["bias"].iloc[0] < 1e-12
    bias = [sequences.gap(["k2-loss"], [scenario(memory, 8, 64, 1.0)])["bias"].iloc[0] for memory in (1, 4, 16)]
    assert bias[0] < 0.7 * bias[1] < 0.7 * bias[2]


def test_exponents_of_a_power_law_and_of_none():
    x = np.array([1.0, 2, 4, 8, 16])
    frame = pd.concat(
        [
            pd.DataFrame({"law": "power", "x": x, "y": 3 * x**1.5}),
            pd.DataFrame({"law": "exponential", "x": x, "y": np.exp(x)}),
            pd.DataFrame({"law": "single", "x": [4.0], "y": [1.0]}),
        ]
    ).sample(frac=1, random_state=0)
    fit = sequences.exponents(frame, ["law"], "x", "y").set_index("law")
    assert set(fit.index) == {"power", "exponential"}
    assert fit.loc["power", ["exponent", "last"]].tolist() == pytest.approx([1.5, 1.5])
    assert fit.loc["power", "exponent_error"] < 1e-12
    assert abs(fit.loc["power", "curvature"]) < 1e-12
    assert fit.loc["exponential", "last"] == pytest.approx(8 / np.log(2))
    assert fit.loc["exponential", "curvature"] > 0.5
    upper = sequences.exponents(frame, ["law"], "x", "y", low=4).set_index("law")
    assert upper.loc["exponential", ["points", "from", "to"]].tolist() == pytest.approx([3, 4, 16])


def test_per_sample_comparison_sees_equality_and_a_planted_slip():
    world, off = gl.Scenario(tree := gl.Tree.random(3, 3, 1), tree.perturbed(0.6, 2)), scenario()
    detached = gl.Estimator("k2", credit="sequence"), gl.Estimator("k1", "reward", "sequence")
    for where, samples in ((world, None), (off, 50)):
        found = sequences.compared([("k2-loss", "k1-reward"), detached, ("k2-loss", "k3-loss")], where, samples)
        assert (found["difference"].iloc[:2] < 1e-14).all()
        assert found["difference"].iloc[2] > 0.1
    double = sequences.compared([("k2-loss", lambda rollout: 2 * gl.ESTIMATORS["k2-loss"](rollout))], world)
    assert double["difference"].iloc[0] == pytest.approx(1)


def test_k1_beside_a_reward_is_a_baseline():
    tree = gl.Tree.random(3, 2, 0)
    world = gl.Scenario(tree, tree.perturbed(0.5, 1))
    rollout = gl.Rollout.enumerated(world)
    reward = torch.linspace(0, 1, len(rollout.weight)).double()
    found = sequences.with_reward({"r": reward}, world, [0.3, 1.0])
    # Second route: the gradient of every response by hand, with β subtracted from the reward.
    leaf = tree.parameters.clone().requires_grad_(True)
    log_prob = gl.Rollout.enumerated(gl.Scenario(tree.with_parameters(leaf), world.reference)).log_prob.sum(-1)
    scores = torch.stack([torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in log_prob])

    def trace(beta):
        g = -(reward - beta)[:, None] * scores
        return float(rollout.weight @ g.square().sum(-1) - (rollout.weight @ g).square().sum())

    assert found["noise_ratio"].tolist() == pytest.approx([trace(0.3) / trace(0), trace(1.0) / trace(0)])
    assert found["noise_ratio"].iloc[0] < 1
    assert found["shift"].max() < 1e-12
    with pytest.raises(ValueError, match="one number per response"):
        sequences.with_reward({"r": reward[1:]}, world, [1.0])


def test_a_heavy_tail_does_not_make_a_target_zero():
    """Noise beyond 1e24 of its signal says nothing about the size of the target: bias and noise are numbers, and right."""
    policy = gl.Markov.random(4, 512, seed=51)
    world = gl.Scenario(policy, policy.perturbed(kl=25.6, seed=151))
    rows = gl.measure("k3-loss-sequence", world, target=["reverse_kl", "forward_kl"]).set_index("target")
    assert rows.loc["forward_kl", "bias"] < 1e-9
    assert rows.loc["reverse_kl", "bias"] > 0.01
    # Var e^{−S} = Σ ref²/π − 1 by its own transfer matrix; the trace is that times a score norm of order length.
    pi, ref = (p.table.softmax(-1).numpy() for p in (world.policy, world.reference))
    state = (ref**2 / pi)[0]
    for _ in range(511):
        state = state @ (ref**2 / pi)[1:]
    assert 1 < rows.loc["reverse_kl", "trace_cov"] / state.sum() / 512 < 100
