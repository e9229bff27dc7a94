"""Configurations of frameworks: which KL terms are live, what they descend together, which settings nothing reads."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

import gradlab as gl
from gradlab.cli import main

configured = gl.audit.configured


def needs(name):
    here = importlib.util.find_spec(name) is not None and importlib.util.find_spec("yaml") is not None
    return pytest.mark.skipif(not here, reason=f"{name} is not here; install it")


BOTH = {
    "algorithm": {
        "adv_estimator": "rloo",
        "use_kl_in_reward": True,
        "norm_adv_by_std_in_grpo": True,
        "kl_ctrl": {"kl_coef": 0.01, "target_kl": 0.2},
    },
    "actor_rollout_ref": {
        "actor": {"use_kl_loss": True, "kl_loss_coef": 0.02, "kl_loss_type": "k3+", "loss_agg_mode": "seq-mean-token-sum"}
    },
}


def keys(found):
    return {(switch.key.rpartition(".")[2], switch.kind) for switch in found.switches}


@needs("verl")
def test_the_sum_of_two_terms_descends_both_with_their_coefficients():
    found = configured(BOTH)
    assert [(term.place, term.coefficient) for term in found.terms] == [("loss", 0.02), ("reward", 0.01)]
    assert ("the KL to the reference", "counted twice") in keys(found)
    assert {("target_kl", "dead"), ("norm_adv_by_std_in_grpo", "dead")} <= keys(found)
    whole = found.subjects[-1]
    assert whole.name == "configuration: sum"
    audited = gl.audit(whole, quick=True)
    assert audited.on_policy.combination == pytest.approx({"reverse_kl": 0.01, "reverse_kl_frozen_prefix": 0.02}, rel=1e-6)


@needs("verl")
def test_what_a_switch_turns_off_is_dead_and_defaults_are_not_told():
    found = configured({"actor_rollout_ref.actor.kl_loss_coef": 0.1, "algorithm.kl_penalty": "k3"})
    assert found.terms == ()
    assert found.subjects == []
    assert keys(found) == {("kl_loss_coef", "dead"), ("kl_penalty", "dead")}
    assert "no KL term is live" in found.lines[0]


@needs("verl")
def test_a_reward_divided_by_its_spread_has_no_plain_coefficient_and_a_critic_is_not_audited():
    divided = configured({"algorithm": {"use_kl_in_reward": True, "adv_estimator": "grpo"}})
    assert ("norm_adv_by_std_in_grpo", "no plain factor") in keys(divided)
    critic = configured({"algorithm": {"use_kl_in_reward": True}, "actor_rollout_ref": {"actor": {"entropy_coeff": 0.5}}})
    assert critic.subjects == []
    assert critic.lines[:2] == [
        "verl: a KL in the reward is live, coefficient 0.001, not audited: adv_estimator=gae needs a critic; rloo, grpo and "
        "reinforce_plus_plus can be audited",
        "verl: an entropy bonus is live, coefficient 0.5, not audited: it has no reference",
    ]


@needs("trl")
def test_the_options_of_trl_are_passed_on_and_a_coefficient_of_zero_kills_the_rest():
    found = configured({"beta": 0.04, "use_bias_correction_kl": False, "ref_model_sync_steps": 64, "vespo_k_pos": 1.0})
    assert keys(found) == {("ref_model_sync_steps", "dead"), ("vespo_k_pos", "dead")}
    (subject,) = found.subjects
    assert subject.configuration["use_bias_correction_kl"] is False
    audited = gl.audit(subject, quick=True)
    assert audited.on_policy.combination == pytest.approx({"forward_kl_frozen_prefix": 0.04}, rel=1e-6)
    off = configured({"beta": 0, "use_bias_correction_kl": True, "loss_type": "grpo"})
    assert (off.terms, keys(off)) == ((), {("use_bias_correction_kl", "dead")})
    (rloo,) = configured({"beta": 0.1, "normalize_advantages": False}).terms
    assert (rloo.place, rloo.group) == ("reward", 2)


@needs("openrlhf")
def test_openrlhf_has_one_term_in_one_of_two_places():
    loss = configured({"algo": {"kl": {"use_loss": True, "horizon": 3}}, "actor": {"loss_agg_mode": "seq-mean-token-mean"}})
    assert [(term.place, term.options["token_level_loss"]) for term in loss.terms] == [("loss", True)]
    assert keys(loss) == {("horizon", "dead"), ("loss_agg_mode", "read by the policy loss alone")}
    reward = configured({"algo.kl.unbiased_gradient": True, "algo.advantage.estimator": "rloo"})
    assert [(term.place, term.group) for term in reward.terms] == [("reward", 2)]
    assert keys(reward) == {("unbiased_gradient", "dead")}
    assert configured({"algo.kl.init_coef": 0, "algo.kl.estimator": "k3"}).terms == ()


@needs("verl")
def test_the_command_tells_terms_and_audits_them(monkeypatch, capsys, tmp_path):
    path = tmp_path / "verl.json"
    path.write_text(json.dumps({"algorithm": {"use_kl_in_reward": False}, **{k: BOTH[k] for k in ["actor_rollout_ref"]}}))
    arguments = ["--config", str(path), "--quick", "--expect", "reverse_kl_frozen_prefix"]
    monkeypatch.setattr(sys, "argv", ["gradlab", "audit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "verl: a KL in the loss is live, coefficient 0.02\n" in out
    assert "verl.json: loss" in out


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        (None, {}, "no file "),
        ("[1, 2]", {}, "holds no settings by name, but list"),
        ("{", {}, "cannot be read: "),
        ('{"lr": 1}', {}, r"cannot tell of which framework c.json is: .*say it with --framework verl \| trl"),
        ('{"lr": 1}', {"framework": "ver"}, "unknown framework 'ver'; did you mean 'verl'"),
    ],
)
def test_what_is_no_configuration_says_why(tmp_path, text, options, says):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=says):
        configured(path, **options)


def test_a_framework_that_is_not_installed_is_told_with_its_line(monkeypatch):
    monkeypatch.setattr(gl.audit.adapters, "missing", lambda: {"verl": "pip install verl"})
    with pytest.raises(ValueError, match="verl is not installed; to audit its configuration: pip install verl"):
        configured({"algorithm": {"kl_penalty": "k3"}})
