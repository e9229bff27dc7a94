"""Whole losses: the policy part and the KL part are told apart, each against its own objectives, and how arguments are bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradlab as gl
from gradlab.audit import Batch, Subject, engine, worlds
from gradlab.audit.parts import kl_part, policy_part, reward_gradients


def kl(log_probs, ref_log_probs, mask):
    return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()


def test_the_policy_part_is_that_of_loops_over_responses():
    world = worlds.standard()[2]
    rollout, rewards = world.rollout, world.rewards.numpy()
    p = world.scenario.policy.table.softmax(-1).numpy()
    expected = np.zeros_like(p)
    baseline = float(rollout.weight @ world.rewards)
    for i, n in enumerate(rollout.lengths.int().tolist()):
        for t in range(n):
            context, token = int(rollout.contexts[i, t]), int(rollout.tokens[i, t])
            score = np.eye(p.shape[1])[token] - p[context]
            expected[context] -= float(rollout.weight[i]) * (rewards[i] - baseline) * score
    assert reward_gradients(world)["reward"].numpy() == pytest.approx(expected.flatten(), abs=1e-13)

    def loss(batch: Batch):
        ratio = (batch.log_prob - batch.behaviour_log_prob).exp()
        return (-ratio * batch.advantages * batch.mask).sum(-1).mean() + 3 * kl(
            batch.log_prob, batch.reference_log_prob, batch.mask
        )

    subject = Subject("whole", loss)
    found = engine.expected_gradient(policy_part(subject), world, 1).mean.numpy()
    assert found == pytest.approx(expected.flatten(), abs=1e-13)
    rest = engine.expected_gradient(kl_part(subject), world, 1).mean.numpy()
    truth = 3 * gl.exact.gradient("reverse_kl_frozen_prefix", world.scenario).numpy()
    assert rest == pytest.approx(truth, abs=1e-13)


def test_a_whole_loss_has_a_verdict_for_each_part():
    def loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, beta=0.04):
        ratio = (log_probs - old_log_probs).exp()
        policy = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return (policy * mask).sum(-1).mean() + beta * kl(log_probs, ref_log_probs, mask)

    found = gl.audit(loss)
    assert found.kl.on_policy.combination == {"reverse_kl_frozen_prefix": pytest.approx(0.04, rel=1e-9)}
    assert found.policy.on_policy.combination == {"reward": pytest.approx(1.0, rel=1e-9)}
    assert list(found.policy.off_policy.combination) == ["reward_token_ratio"]
    assert found.policy.off_policy.scope == "near"  # where the clip does not bind
    assert found.total[0].name == "reward + 0.04·reverse_kl_frozen_prefix"
    assert found.on_policy.combination == found.kl.on_policy.combination
    assert "policy part" in found.on_policy.text
    weight = found.probe("weight", "policy part")
    assert weight.passed
    assert "no gradient above ρ = 1.2 for A > 0; no gradient below ρ = 0.8 for A < 0" in weight.finding


@pytest.mark.parametrize("planted", ["sign", "unmasked", "dropped", "wrong side", "no ratio"])
def test_errors_of_the_policy_part_are_found_though_the_kl_is_right(planted):
    def loss(log_probs, old_log_probs, ref_log_probs, advantages, mask):
        ratio = (log_probs - old_log_probs).exp()
        policy = {
            "sign": ratio * advantages,
            "unmasked": -ratio * advantages,
            "dropped": -ratio.clamp(max=1.28) * advantages,
            "wrong side": -torch.max(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages),
            "no ratio": -log_probs * advantages,
        }[planted]
        return (policy * (1 if planted == "unmasked" else mask)).sum(-1).mean() + kl(log_probs, ref_log_probs, mask)

    found = gl.audit(loss)
    assert found.kl.on_policy.descends("reverse_kl_frozen_prefix")
    name, says = {
        "sign": ("sign", "lowers the expected reward"),
        "unmasked": ("mask", "the mask is not applied"),
        "dropped": ("weight", "no gradient above ρ = 1.28 whatever the sign"),
        "wrong side": ("weight", "the clip is on the wrong side"),
        "no ratio": ("weight", "off-policy data are used as if they were on-policy"),
    }[planted]
    probe = found.probe(name, "policy part")
    assert probe.passed is False
    assert says in probe.finding
    failed = [p.name for p in found.policy.probes if p.passed is False]
    assert failed == [name]


def test_what_is_absent_is_said():
    def policy(log_probs, old_log_probs, advantages, mask):
        return (-(log_probs - old_log_probs).exp() * advantages * mask).sum(-1).mean()

    found = gl.audit(policy)
    assert found.kl.text == "absent: no argument is the reference's"
    assert found.on_policy.descends("reward")
    assert gl.audit(kl).policy.text == "absent: no argument is an advantage or a reward"

    def grpo(log_probs, ref_log_probs, advantages, mask, beta=0.0):
        return (-log_probs * advantages * mask).sum(-1).mean() + beta * kl(log_probs, ref_log_probs, mask)

    assert gl.audit(grpo).kl.absent == "the coefficient beta is 0 by default; --set beta=0.04 turns it on"
    assert gl.audit(grpo, settings={"beta": 0.5}).kl.on_policy.scale == pytest.approx(0.5, rel=1e-9)


def test_a_loss_that_makes_its_advantages_has_a_utility():
    def grouped(divide):
        def loss(log_probs, rewards, mask):
            centred = rewards - rewards.mean()
            advantage = centred / (rewards.std(correction=0) + 1e-9) if divide else centred
            return -(advantage[:, None] * log_probs * mask).sum(-1).mean()

        return gl.audit(loss)

    mean, std = grouped(False), grouped(True)
    # Groups of two: of the mean a half is left, and a standard deviation makes ±1 of every pair that differs.
    assert mean.on_policy.combination == {"reward": pytest.approx(0.5, rel=1e-9)}
    assert std.on_policy.combination == {"reward": pytest.approx(1.0, rel=1e-6)}
    assert mean.probe("utility").finding == "it ascends U(p) = p, the success probability"
    assert "2 arcsin √p" in std.probe("utility").finding
    slope = gl.utility("group_std", group=8).slope
    assert f"U'(0.05) ∝ {slope(0.05) / slope(0.5):.4g}" in std.probe("utility").example


# ---- binding --------------------------------------------------------------------------------------------------------------


class Module(nn.Module):
    def forward(self, pi_logprobs, ref_logprobs, padding_masks=None):
        return kl(pi_logprobs, ref_logprobs, padding_masks)


def of_mapping(batch):
    return kl(batch["log_probs"], batch["ref_log_prob"], batch["response_mask"])


def of_attributes(data):
    return kl(data.logps, data.ref_logps, data.loss_mask)


def of_labels(log_probs, ref_log_probs, labels):
    return kl(log_probs, ref_log_probs, labels.ne(-100))


def of_padding(log_probs, ref_log_probs, padding_mask):
    return kl(log_probs, ref_log_probs, ~padding_mask)


def of_results(log_probs, ref_log_probs, mask):
    total = kl(log_probs, ref_log_probs, mask)
    return {"kl": total.detach(), "total_loss": total}


@pytest.mark.parametrize(
    "function",
    [Module(), of_mapping, of_attributes, of_labels, of_padding, of_results],
    ids=lambda f: getattr(f, "__name__", type(f).__name__),
)
def test_conventions_of_users_are_understood(function):
    found = gl.audit(function)
    assert found.on_policy.descends("reverse_kl_frozen_prefix")
    assert found.probe("mask").passed
    roles = {bound.role for bound in found.subject.binding}
    assert {"log_prob", "reference_log_prob"} <= roles


def test_advantages_are_passed_in_the_form_in_which_responses_are_kept_apart():
    def loss(log_probs, ref_log_probs, advantages, mask):
        return ((-log_probs * advantages.unsqueeze(1)) * mask).sum(-1).mean() + kl(log_probs, ref_log_probs, mask)

    found = gl.audit(loss)  # as [B, T] they would make [B, B, T], and the KL count B times
    assert next(b.role for b in found.subject.binding if b.how == "the form in which it is taken") == "[B]"
    assert found.policy.on_policy.combination == {"reward": pytest.approx(1.0, rel=1e-9)}


def test_what_is_ambiguous_is_asked():
    def old(log_probs, old_log_probs, mask):
        return ((log_probs - old_log_probs) * mask).sum(-1).mean()

    with pytest.raises(ValueError, match=r"--bind old_log_probs=reference_log_prob or --bind old_log_probs=behaviour_log_prob"):
        gl.audit(old)

    def several(log_probs, ref_log_probs, mask):
        value = kl(log_probs, ref_log_probs, mask)
        return value, 2 * value

    with pytest.raises(ValueError, match="several results that carry gradient: 0, 1; say which is the loss"):
        gl.audit(several)
    assert gl.audit(several, result=1).on_policy.scale == pytest.approx(2.0, rel=1e-9)

    def pairs(policy_chosen_logps, policy_rejected_logps):
        return policy_chosen_logps - policy_rejected_logps

    with pytest.raises(ValueError, match=r"preference losses .* are out of scope"):
        gl.audit(pairs)

    def configured(log_probs, ref_log_probs, mask, config):
        return config.kl.coef * kl(log_probs, ref_log_probs, mask)

    with pytest.raises(ValueError, match=r"It reads --set config\.kl\.coef=VALUE"):
        gl.audit(configured)
    assert gl.audit(configured, settings={"config.kl.coef": 0.3}).on_policy.scale == pytest.approx(0.3, rel=1e-9)


def test_state_is_told_from_chance():
    class Adaptive:
        beta = 0.1

        def __call__(self, log_probs, ref_log_probs, mask):
            value = kl(log_probs, ref_log_probs, mask)
            self.beta *= 1.01 if value.item() > 0.02 else 0.99
            return self.beta * value

    found = gl.audit(Adaptive())
    assert not found.random
    assert found.on_policy.descends("reverse_kl_frozen_prefix")
    assert found.failures[0].name == "state"
    assert "it depends on earlier calls" in found.failures[0].finding


# ---- worlds -----------------------------------------------------------------------------------------------------------------


def test_a_top_k_gets_one_token_more_than_it_takes():
    def loss(student_logits, teacher_logits, mask):
        s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        top, index = t.topk(3, -1)
        return ((top.exp() * (top - s.gather(-1, index))).sum(-1) * mask).sum(-1).mean()

    found = gl.audit(loss)
    assert found.subject.vocab == 4
    assert found.on_policy.combination == {"top3_reference_forward_kl_raw": pytest.approx(1.0, rel=1e-9)}
    with pytest.raises(ValueError, match="--set topk=2"):
        gl.audit(lambda logits, ref_logits: logits.topk(20).values.sum())


def test_a_temperature_of_the_loss_is_that_of_the_sampler():
    def loss(logits, ref_logits, completion_ids, mask, temperature=0.7):
        def chosen(x):
            return (x / temperature).log_softmax(-1).gather(-1, completion_ids[..., None])[..., 0]

        return kl(chosen(logits), chosen(ref_logits), mask)

    found = gl.audit(loss)
    assert found.on_policy.combination == {"reverse_kl_frozen_prefix@0.7": pytest.approx(1.0, rel=1e-9)}
    assert not gl.audit(loss, temperature=1.0).on_policy.combination
    assert math.isclose(found.subject.temperature, 0.7)
