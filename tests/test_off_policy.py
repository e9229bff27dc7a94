"""Lag, effective sample size, repulsion and the choice of an estimator, each against a second way of getting it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

import gradlab as gl
from gradlab.questions import off_policy

E = gl.Estimator
POLICIES = {
    "bandit": gl.Bandit.random(5, 3),
    "tree": gl.Tree.random(3, 3, 3, eos=0),
    "chain": gl.Markov.random(3, 4, 3),
    "ended chain": gl.Markov.random(3, 4, 3, eos=2),
}


def scenario(kind: str, lag: float = 0.4) -> gl.Scenario:
    policy = POLICIES[kind]
    return gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1), off_policy.at_lag(policy, lag, 2))


def responses(world: gl.Scenario):
    """Every response by hand: its live tokens, and the log-probabilities of its steps under policy and behaviour."""
    policy, sampler = world.policy, world.sampler
    seen = set()
    for tokens in itertools.product(range(policy.vocab), repeat=policy.length):
        end = policy.length if policy.eos not in tokens else tokens.index(policy.eos) + 1
        if tokens[:end] in seen:
            continue
        seen.add(tokens[:end])
        rows = policy.contexts(torch.tensor([tokens]))[0]
        logs = [[float(p.table[rows[t]].log_softmax(-1)[tokens[t]]) for t in range(end)] for p in (policy, sampler)]
        yield np.array(logs[0]), np.array(logs[1])


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("lag", [1e-4, 0.03, 1.0])
def test_behind_has_the_lag_asked_for(kind, lag):
    world = scenario(kind, lag)
    total = sum(math.exp(mu.sum()) * (mu.sum() - pi.sum()) for pi, mu in responses(world))
    assert world.lag() == pytest.approx(lag, rel=1e-9)
    assert total == pytest.approx(lag, rel=1e-7)


def test_behind_goes_one_way_per_seed():
    policy = POLICIES["tree"]
    steps = [(off_policy.at_lag(policy, lag, 5).parameters - policy.parameters) for lag in (0.01, 0.5)]
    assert float(torch.cosine_similarity(*steps, dim=0)) == pytest.approx(1, abs=1e-12)
    assert steps[0].norm() < steps[1].norm()
    assert torch.equal(off_policy.at_lag(policy, 0.1, 5).parameters, off_policy.at_lag(policy, 0.1, 5).parameters)
    assert not torch.equal(off_policy.at_lag(policy, 0.1, 5).parameters, off_policy.at_lag(policy, 0.1, 6).parameters)


@pytest.mark.parametrize(
    ("lag", "message"), [(0.0, "positive"), (-1.0, "positive"), (float("nan"), "a number"), (50.0, "bounded")]
)
def test_a_lag_that_cannot_be_is_refused(lag, message):
    with pytest.raises(ValueError, match=message):
        off_policy.at_lag(POLICIES["bandit"], lag)


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("bound", [None, 1.5])
def test_effective_sample_size_by_hand(kind, bound):
    world = scenario(kind)
    if bound is not None and "chain" in kind:
        with pytest.raises(ValueError, match="Tree"):
            off_policy.effective_sample_size(world, bound)
        return
    first, second = np.zeros((2, world.policy.length))
    for pi, mu in responses(world):
        ratios = (pi - mu).cumsum()
        # Behind the end of a response its weight stays what it was.
        w = np.exp(np.append(ratios, np.full(world.policy.length - len(ratios), ratios[-1])))
        w = w if bound is None else np.minimum(w, bound)
        first, second = first + math.exp(mu.sum()) * w, second + math.exp(mu.sum()) * w**2
    found = off_policy.effective_sample_size(world, bound).numpy()
    assert found == pytest.approx(first**2 / second, rel=1e-10)
    assert (np.diff(found) <= 1e-12).all()
    assert found[-1] < 0.8


def test_on_policy_every_sample_counts():
    policy = POLICIES["chain"]
    assert off_policy.effective_sample_size(gl.Scenario(policy, policy)).numpy() == pytest.approx(np.ones(4), abs=1e-12)


def test_the_effective_sample_size_is_what_a_weighted_mean_has():
    world = scenario("chain", 0.2)
    drawn = world.sampler.sample(200_000, np.random.default_rng(0))
    tokens, mask = drawn.tokens, drawn.mask
    rows = world.policy.contexts(tokens)
    w = torch.exp(
        sum(s * p.family.log_prob(p.table, rows, tokens).sum(-1) for s, p in ((1, world.policy), (-1, world.sampler)))
    )
    sampled = float(w.mean() ** 2 / w.square().mean())
    assert bool(mask.all())
    assert float(off_policy.effective_sample_size(world)[-1]) == pytest.approx(sampled, rel=0.02)


def test_k1_as_loss_runs_from_the_behaviour():
    worlds = [scenario(kind) for kind in ("bandit", "tree")]
    frame = off_policy.repulsion(worlds)
    assert (frame["repulsion"] < 1e-12).all()
    assert (frame["moved"] < 1e-12).all()
    assert (frame["lag_change"] > 1e-4).all()
    policy, sampler = worlds[0].policy.table.softmax(-1)[0], worlds[0].sampler.table.softmax(-1)[0]
    assert frame["gradient_norm"].iloc[0] == pytest.approx(float((sampler - policy).norm()), rel=1e-12)


def frame_of(rows):
    return pd.DataFrame(rows, columns=["panel", "lag", "draw", "estimator", "bias", "noise"])


def test_errors_winners_and_regrets_by_hand():
    rows = [("p", 0.1, d, "quiet", 0.5, 1.0) for d in (0, 1)] + [("p", 0.1, d, "unbiased", 0.0, 16.0 * 4**d) for d in (0, 1)]
    found = off_policy.errors(frame_of(rows), [4, 400])
    table = found.set_index(["estimator", "batch"])
    assert table.loc[("quiet", 4), "rmse"] == pytest.approx(math.sqrt(0.25 + 0.25))
    assert table.loc[("unbiased", 4), "rmse"] == pytest.approx(math.sqrt(2.0 * 4.0))  # geometric mean of 2 and 4
    assert table.loc[("unbiased", 4), "regret"] == pytest.approx(4.0)
    assert table.loc[("quiet", 4), "regret"] == 1
    best = off_policy.winners(found).set_index("batch")
    assert best["estimator"].to_dict() == {4: "quiet", 400: "unbiased"}
    assert best.loc[4, "runner_up"] == "unbiased"
    assert best.loc[4, "runner_up_regret"] == pytest.approx(4.0)
    regrets = off_policy.regrets(found).set_index("estimator")
    assert regrets.index[0] == "quiet"
    assert regrets.loc["unbiased", "worst"] == pytest.approx(4.0)


def test_a_tie_goes_to_the_first_named():
    rows = [("p", 0.1, 0, name, 0.0, noise) for name, noise in (("free", 1.0), ("bounded", 1.0 - 1e-13))]
    assert off_policy.winners(off_policy.errors(frame_of(rows), [1]))["estimator"].tolist() == ["free"]


def test_no_shipped_composition_is_unbiased_on_a_tree_but_some_are_on_a_bandit():
    shipped = {name: estimator for name, (estimator, _) in off_policy.SHIPPED.items()}
    assert all(source for _, source in off_policy.SHIPPED.values())
    frame = gl.search.against(shipped, [scenario("tree"), scenario("bandit")], ["reverse_kl"])
    zero = frame[frame["bias"] < 1e-10]
    assert set(zero["family"]) == {"bandit"}
    assert set(zero["estimator"]) == {"k1-loss-token", "k2-loss-token-detached", "k3-loss-token"}


def test_nemo_rl_value_one_weight_is_the_sum_of_loss_and_reward():
    world = scenario("tree")

    def shipped(rollout):
        surrogate = torch.exp(rollout.log_prob - rollout.log_prob.detach())
        return (surrogate * (torch.expm1(-rollout.log_ratio) + rollout.log_ratio) * rollout.mask_float).sum(-1)

    ours = off_policy.SHIPPED["k3-loss+reward"][0]
    a, b = gl.exact.moments([shipped, ours], world)
    assert float((a.mean - b.mean).norm()) <= 1e-12 * float(b.mean.norm())
    assert a.trace_cov == pytest.approx(b.trace_cov, rel=1e-10)


def test_the_clipped_ratio_of_a_response_is_one_term():
    """RLOO as shipped: one ratio and one coefficient per response, whatever its length."""
    world = scenario("tree")

    def shipped(rollout):
        ratio, kl = torch.exp(rollout.log_weight.sum(-1)), rollout.log_ratio.sum(-1).detach()
        return -torch.minimum(ratio * -kl, ratio.clamp(0.8, 1.2) * -kl)

    a, b = gl.exact.moments([shipped, off_policy.SHIPPED["k1-reward-clipped-sequence"][0]], world)
    assert float((a.mean - b.mean).norm()) <= 1e-12 * float(b.mean.norm())
    assert a.trace_cov == pytest.approx(b.trace_cov, rel=1e-10)


def test_intervals_cover_the_exact_bias_under_importance_weights():
    """95 % intervals over 60 draws: below 85 % has probability 0.002 for a row that is calibrated."""
    names = ["k2-loss", "k3-loss", "k3-loss-prefix", "k1-reward-sequence-weight", "full-both-prefix"]
    policy = gl.Tree.random(4, 3, 4)
    world = gl.Scenario(policy, policy.perturbed(kl=0.5, seed=104), off_policy.at_lag(policy, 0.3, 4))
    exact = gl.measure(names, world)["bias"].to_numpy()
    drawn = [gl.measure(names, world, samples=20_000, seed=seed) for seed in range(60)]
    covered = [(f["bias_low"].to_numpy() <= exact + 1e-9) & (exact <= f["bias_high"].to_numpy()) for f in drawn]
    assert (np.mean(covered, axis=0) >= 0.85).all()
    assert np.mean([f["bias_high"].iloc[0] - f["bias_low"].iloc[0] for f in drawn]) < 0.15 * exact[0]
