"""KLs and gradients at recorded prefixes from lists of tokens, against enumerated bandits and trees."""

from __future__ import annotations

import numpy as np
import pytest

import gradlab as gl
from gradlab._common.streams import generator
from gradlab.records.vocabulary import gradient_frame, kl_frame


def listed(rollout: gl.Rollout, k: int) -> gl.Records:
    """Records with the k likeliest tokens of the policy at every prefix."""
    log_p, log_ref = (logits.log_softmax(-1) for logits in (rollout.logits, rollout.reference_logits))
    top, ids = log_p.topk(k, -1)
    return gl.Records.from_rollout(rollout, top_ids=ids, top_logprob=top, top_ref_logprob=log_ref.gather(-1, ids))


def test_gradients_at_a_prefix_are_those_of_the_bandit_there():
    policy = gl.Bandit.random(6, seed=1)
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.5, seed=2))
    found = gradient_frame(listed(gl.Rollout.from_sampler(scenario, 3, generator(0, "montecarlo")), 6)).set_index("estimator")
    exact = gl.measure(list(found.index), scenario).set_index("estimator")
    for name in found.index:
        for column in ("bias", "noise"):
            assert found.loc[name, column] == pytest.approx(exact.loc[name, column], rel=1e-9, abs=1e-12), name
        if name != "k1-loss":
            assert found.loc[name, "cosine"] == pytest.approx(exact.loc[name, "cosine"], rel=1e-9)
    assert np.isnan(found.loc["k1-loss", "cosine"])


def test_complete_lists_give_the_kl_of_the_prefixes():
    policy = gl.Tree.random(5, 3, seed=0)
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.7, seed=1))
    rollout = gl.Rollout.from_sampler(scenario, 200, generator(1, "montecarlo"))
    frame = kl_frame(listed(rollout, 5)).set_index("form")
    truth = float(rollout.divergence("full")[rollout.mask].mean())
    for form in ("raw", "generalised", "renormalised", "tail"):
        assert frame.loc[form, "value"] == pytest.approx(truth, rel=1e-9)
    assert frame.loc["k1", "value"] == pytest.approx(float(rollout.log_ratio[rollout.mask].mean()), rel=1e-9)
    width = frame["high"] - frame["low"]
    assert width["tail"] < width["k1"]
    assert frame["mass"].iloc[0] == pytest.approx(1)


def test_short_lists_bound_the_kl_from_below_and_the_raw_form_does_not():
    policy = gl.Tree.random(8, 2, seed=3)
    scenario = gl.Scenario(policy, policy.perturbed(scale=1.0, seed=4))
    rollout = gl.Rollout.from_sampler(scenario, 300, generator(2, "montecarlo"))
    truth = float(rollout.divergence("full")[rollout.mask].mean())
    tails = [kl_frame(listed(rollout, k)).set_index("form")["value"] for k in (2, 4, 8)]
    assert tails[0]["tail"] < tails[1]["tail"] < tails[2]["tail"] == pytest.approx(truth, rel=1e-9)
    assert all(0 < row["generalised"] <= truth + 1e-12 for row in tails)
    same = gl.Scenario(policy, policy.perturbed(scale=1e-3, seed=4))
    near = kl_frame(listed(gl.Rollout.from_sampler(same, 300, generator(2, "montecarlo")), 2)).set_index("form")["value"]
    assert near["tail"] >= 0
    assert near["generalised"] >= 0


def test_what_is_missing_is_said():
    records = gl.Records.from_arrays(logprob=[[-1.0]], ref_logprob=[[-1.0]])
    for function in (kl_frame, gradient_frame):
        with pytest.raises(ValueError, match="the records lack top_logprob and top_ref_logprob"):
            function(records)
    same = gl.Records.from_arrays(logprob=[[-0.7]], top_logprob=np.log([[[0.5, 0.5]]]), top_ref_logprob=np.log([[[0.5, 0.5]]]))
    with pytest.raises(ValueError, match="equal at every recorded prefix"):
        gradient_frame(same)


def test_an_inspection_tells_what_the_lists_say():
    policy = gl.Tree.random(5, 3, seed=0)
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.7, seed=1))
    records = listed(gl.Rollout.from_sampler(scenario, 64, generator(1, "montecarlo")), 5)
    found = gl.inspect(records)
    assert found["vocabulary"]["form"].tolist() == ["raw", "generalised", "renormalised", "tail", "k1"]
    assert found["prefixes"].set_index("estimator")["bias"]["k2-loss"] < 1e-9
    first = gl.inspect(listed(gl.Rollout.from_sampler(gl.Scenario(policy, policy), 64, generator(1, "montecarlo")), 5))
    assert first["vocabulary"]["value"].tolist() == [0.0] * 5
    assert "prefixes" not in first.frames
