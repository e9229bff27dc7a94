"""Distillation losses: divergences with a parameter, and those over the likeliest tokens, are named with it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

import gradlab as gl
from gradlab.audit import divergences, worlds


def summed(value, mask):
    return (value * mask).sum(-1).mean()


def jsd(beta, swapped=False):
    def loss(student_logits, teacher_logits, mask):
        s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        share = 1 - beta if swapped else beta
        middle = ((1 - share) * s.exp() + share * t.exp()).log()
        value = beta * kl_div(middle, t, reduction="none", log_target=True)
        value += (1 - beta) * kl_div(middle, s, reduction="none", log_target=True)
        return summed(value.sum(-1), mask)

    return loss


def skew(alpha):
    def loss(student_logits, teacher_logits, mask):
        p, q = student_logits.softmax(-1), teacher_logits.softmax(-1)
        return summed((q * (q / (alpha * q + (1 - alpha) * p)).log()).sum(-1), mask)

    return loss


def hellinger(student_logits, teacher_logits, mask):
    return summed((student_logits.softmax(-1).sqrt() - teacher_logits.softmax(-1).sqrt()).square().sum(-1), mask)


def tempered(student_logits, teacher_logits, mask):
    s, t = (student_logits / 2).log_softmax(-1), (teacher_logits / 2).log_softmax(-1)
    return summed(4 * (t.exp() * (t - s)).sum(-1), mask)


def top(form, k=2):
    def loss(student_logits, teacher_logits, mask):
        s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        chosen = s.topk(k, -1).indices
        s, t = s.gather(-1, chosen), t.gather(-1, chosen)
        if form == "renormalised":
            s, t = s.log_softmax(-1), t.log_softmax(-1)
        value = (s.exp() * (s - t)).sum(-1)
        if form == "generalised":
            value = value + (t.exp() - s.exp()).sum(-1)
        if form == "tail":
            rest, other = 1 - s.exp().sum(-1), 1 - t.exp().sum(-1)
            value = value + rest * (rest / other).log()
        return summed(value, mask)

    return loss


@pytest.mark.parametrize(
    ("loss", "name", "scale"),
    [
        (jsd(0.3), "generalised_jsd(0.3)", 1),
        (jsd(0.3, swapped=True), "swapped_jsd(0.3)", 1),
        (jsd(0.5), "jensen_shannon_frozen_prefix", 1),
        (skew(0.1), "skew_forward_kl(0.1)", 1),
        # Σ(√π − √ref)² is 2(1 − Σ√(π ref)), half of which over ¼ is the α divergence.
        (hellinger, "alpha(0.5)", 0.5),
        (tempered, "tempered_forward_kl(2)", 4),
        (top("raw"), "top2_policy_reverse_kl_raw", 1),
        (top("generalised"), "top2_policy_reverse_kl_generalised", 1),
        (top("renormalised"), "top2_policy_reverse_kl_renormalised", 1),
        (top("tail", 1), "top1_policy_reverse_kl_tail", 1),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_distillation_losses_are_named_with_their_parameter(loss, name, scale):
    audited = gl.audit(loss, quick=True)
    assert audited.on_policy.name == audited.off_policy.name == name
    assert audited.on_policy.scale == pytest.approx(scale, rel=1e-6)
    assert audited.on_policy.descends(name)


def test_a_sum_over_the_vocabulary_needs_no_weight_on_tokens_and_a_sampled_loss_does():
    def unnamed(student_logits, teacher_logits, mask):
        s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        return summed((s.exp() * (s - t).abs() ** 1.5).sum(-1), mask)

    def sampled(student_logits, teacher_logits, tokens, mask):
        s, t = (x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (student_logits, teacher_logits))
        return summed((s - t).abs() ** 1.5, mask)

    whole, drawn = gl.audit(unnamed), gl.audit(sampled)
    assert whole.on_policy.name == drawn.on_policy.name == "none"
    assert whole.probe("weight").passed is True
    assert "prefixes are the sampler's" in whole.probe("weight").finding
    assert drawn.probe("weight").passed is False


@pytest.mark.parametrize(
    "name",
    [
        "generalised_jsd(0.3)",
        "skew_reverse_kl(0.2)",
        "alpha(1.5)",
        "tempered_reverse_kl(0.7)",
        "top2_reference_forward_kl_tail",
    ],
)
def test_the_gradient_of_a_divergence_is_that_of_finite_differences(name):
    case = worlds.standard()[3]
    scenario, step = case.scenario, 1e-6
    rows = scenario.sampler.occupancy().detach()
    gradient = divergences.gradient(name, case)
    along = torch.linspace(-1, 1, len(gradient), dtype=torch.float64)
    family, _, rest = name.partition("(")

    def value(sign: int) -> float:
        policy = scenario.policy.with_parameters(scenario.policy.parameters + sign * step * along)
        x, y = policy.table.log_softmax(-1), scenario.reference.table.log_softmax(-1)
        if rest:
            return float(rows @ divergences.FAMILIES[family].rows(x, y, float(rest[:-1])))
        order = y.argsort(-1, descending=True)[:, :2]
        p, q = (z.exp().gather(-1, order) for z in (x, y))
        p, q = (torch.cat([z, 1 - z.sum(-1, keepdim=True)], -1) for z in (p, q))
        return float(rows @ (q * (q / p).log()).sum(-1))

    assert float(gradient @ along) == pytest.approx((value(1) - value(-1)) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("name", ["generalised_jsd(x)", "generalised_jsd", "top2_teacher_reverse_kl_raw", "jsd(0.3)"])
def test_no_other_name_is_a_divergence(name):
    assert not divergences.is_divergence(name)
    with pytest.raises(ValueError, match="target"):
        gl.audit.candidates.check(name)
