"""A zoo of KL losses that are wrong in one way each: the audit names the exact cause, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import gradlab as gl
from gradlab.audit import Audit
from gradlab.audit.probes import NAMES

NO_WEIGHT = "no importance weight: off-policy data are used as if they were on-policy"


def k2(x):
    return 0.5 * x**2


def k3(x):
    return torch.expm1(-x) + x


def reduced(values, mask):
    """Sum over live tokens, mean over responses."""
    return (values * mask).sum(-1).mean()


# ---- the zoo ------------------------------------------------------------------------------------------------------------


def healthy_k2(log_probs, ref_log_probs, old_log_probs, mask):
    return reduced((log_probs - old_log_probs).exp().detach() * k2(log_probs - ref_log_probs), mask)


def healthy_k3(log_probs, ref_log_probs, old_log_probs, mask):
    return reduced((log_probs - old_log_probs).exp() * k3(log_probs - ref_log_probs), mask)


def ratio_upside_down(log_probs, ref_log_probs, mask):
    return reduced(k3(ref_log_probs - log_probs), mask)


def under_no_grad(log_probs, ref_log_probs, mask):
    with torch.no_grad():
        return reduced(k3(log_probs - ref_log_probs), mask)


def detached_log_ratio(log_probs, ref_log_probs, old_log_probs, mask):
    return reduced((log_probs - old_log_probs).exp() * k3((log_probs - ref_log_probs).detach()), mask)


def value_clamp(log_probs, ref_log_probs, mask):
    return reduced(k3(log_probs - ref_log_probs).clamp(-10, 10), mask)


def value_clamp_on_k2(log_probs, ref_log_probs, mask):
    return reduced(k2(log_probs - ref_log_probs).clamp(max=10), mask)


def log_ratio_clamp(log_probs, ref_log_probs, mask):
    return reduced(k3((log_probs - ref_log_probs).clamp(-3, 3)), mask)


def reward_clamp(log_probs, ref_log_probs, mask):
    return reduced((log_probs - ref_log_probs).clamp(-5, 5).detach() * log_probs, mask)


def missing_mask(log_probs, ref_log_probs):
    return k2(log_probs - ref_log_probs).sum(-1).mean()


def padding_in_the_return(log_probs, ref_log_probs, mask):
    return reduced((log_probs - ref_log_probs).sum(-1, keepdim=True).detach() * log_probs, mask)


def padded_mean(log_probs, ref_log_probs, mask):
    return (k2(log_probs - ref_log_probs) * mask).mean()


def differentiated_weight_on_k2(log_probs, ref_log_probs, old_log_probs, mask):
    return reduced((log_probs - old_log_probs).exp() * k2(log_probs - ref_log_probs), mask)


def detached_weight_on_k3(log_probs, ref_log_probs, old_log_probs, mask):
    return reduced((log_probs - old_log_probs).exp().detach() * k3(log_probs - ref_log_probs), mask)


def sign_flipped(log_probs, ref_log_probs, mask):
    return -reduced(k2(log_probs - ref_log_probs), mask)


def per_length(log_probs, ref_log_probs, mask):
    return ((k2(log_probs - ref_log_probs) * mask).sum(-1) / mask.sum(-1)).mean()


def per_length_k1(log_probs, ref_log_probs, mask):
    return (((log_probs - ref_log_probs) * mask).sum(-1) / mask.sum(-1)).mean()


def token_mean(log_probs, ref_log_probs, mask):
    return (k2(log_probs - ref_log_probs) * mask).sum() / mask.sum()


def k1_as_loss(log_probs, ref_log_probs, mask):
    return reduced(log_probs - ref_log_probs, mask)


def action_independent(log_probs, logits, ref_logits, mask):
    policy, reference = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    kl = (policy.exp() * (policy - reference)).sum(-1)
    return reduced(kl.detach() * log_probs, mask)


def sequence_ratio_on_token_k3(log_probs, ref_log_probs, old_log_probs, mask):
    ratio = ((log_probs - old_log_probs) * mask).sum(-1, keepdim=True).exp().detach()
    return reduced(ratio * k3(log_probs - ref_log_probs), mask)


def geometric_ratio(log_probs, ref_log_probs, old_log_probs, mask):
    mean = ((log_probs - old_log_probs) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return reduced(mean.exp() * k3(log_probs - ref_log_probs), mask)


def missing_weight(log_probs, ref_log_probs, old_log_probs, mask):
    return reduced(k2(log_probs - ref_log_probs), mask)


def truncated_weight(log_probs, ref_log_probs, old_log_probs, mask):
    return reduced((log_probs - old_log_probs).exp().clamp(max=2).detach() * k2(log_probs - ref_log_probs), mask)


def clipped_weight(log_probs, ref_log_probs, old_log_probs, mask):
    ratio, advantage = (log_probs - old_log_probs).exp(), -(log_probs - ref_log_probs).detach()
    return -reduced(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage), mask)


def forgotten_reference(log_probs, mask):
    return reduced(log_probs.detach() * log_probs, mask)


def wrong_direction(logits, ref_logits, mask):
    policy, reference = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return reduced((reference.exp() * (reference - policy)).sum(-1), mask)


def absolute_value(log_probs, ref_log_probs, mask):
    return reduced((log_probs - ref_log_probs).abs(), mask)


def half_precision(log_probs, ref_log_probs, mask):
    ratio = (log_probs - ref_log_probs).half()
    return reduced(torch.exp(-ratio) - 1 + ratio, mask)


def float32_inside(log_probs, ref_log_probs, old_log_probs, mask):
    policy = log_probs.float()
    return reduced((policy - old_log_probs.float()).exp() * k3(policy - ref_log_probs.float()), mask.float())


def not_a_number(log_probs, ref_log_probs, mask):
    ratio = log_probs - ref_log_probs
    return reduced(torch.where(ratio < 12, k2(ratio), torch.sqrt(12 - ratio)), mask)


def group_mean(log_probs, ref_log_probs, mask):
    kl = ((log_probs - ref_log_probs) * mask).sum(-1).detach()
    return ((kl - kl.mean()) * (log_probs * mask).sum(-1)).mean()


def group_standard_deviation(log_probs, ref_log_probs, mask):
    kl = ((log_probs - ref_log_probs) * mask).sum(-1).detach()
    return ((kl - kl.mean()) / (kl.std(correction=0) + 1e-6) * (log_probs * mask).sum(-1)).mean()


def length_penalty(log_probs, ref_log_probs, mask):
    reward = ((log_probs - ref_log_probs) * mask).sum(-1, keepdim=True) + 0.3 * mask.sum(-1, keepdim=True)
    return reduced(reward.detach() * log_probs, mask)


def pointwise_kl_div(log_probs, ref_log_probs, mask):
    return reduced(torch.nn.functional.kl_div(log_probs, ref_log_probs, log_target=True, reduction="none"), mask)


def overflows_far_away(log_probs, ref_log_probs, mask):
    ratio = log_probs - ref_log_probs
    return reduced(torch.where(ratio < 6, k2(ratio), torch.sqrt(6 - ratio)), mask)


@dataclass(frozen=True)
class Case:
    """A loss, what it descends on- and off-policy, its form, and which probes fail with which finding."""

    loss: Callable[..., Any]
    on: dict[str, float] | None
    off: dict[str, float] | None
    form: str | None
    failures: dict[str, str] = field(default_factory=dict)
    scope: str = "everywhere"
    off_scope: str = "everywhere"
    error: float = 1e-12

    @property
    def name(self) -> str:
        return self.loss.__name__


REVERSE, FORWARD = {"reverse_kl_frozen_prefix": 1.0}, {"forward_kl_frozen_prefix": 1.0}
GROWING = "at |ℓ| = 4 under-sampled tokens are pulled 54.6 times as hard as over-sampled ones, growing as e^|ℓ|"
UNWEIGHTED = {"weight": NO_WEIGHT}
NOTHING_MOVES = "minimising it does not move the policy in expectation"
MOVED = "even a policy that equals the reference is moved: no divergence from it does that"
NO_REFERENCE = "the reference does not enter the gradient at all"

ZOO = [
    Case(healthy_k2, REVERSE, REVERSE, "k2-loss-detached-token-weight"),
    Case(healthy_k3, REVERSE, REVERSE, "k3-loss-differentiated-token-weight"),
    Case(
        ratio_upside_down, {"chi2_frozen_prefix": 1.0}, None, "k3_swapped-loss",
        {**UNWEIGHTED, "asymmetry": "at |ℓ| = 4 over-sampled tokens are pulled 54.6 times as hard as under-sampled ones"},
    ),
    Case(
        under_no_grad, {"zero": 1.0}, {"zero": 1.0}, None,
        {
            "gradient": "no gradient reaches log π: the value depends on log π, so it is detached or computed under no_grad",
            "reference": NO_REFERENCE, "sign": NOTHING_MOVES,
        },
    ),
    Case(
        detached_log_ratio, *[{"reverse_kl_frozen_prefix": 1.0, "forward_kl_frozen_prefix": -1.0}] * 2,
        "k3-reward-detached-token-weight", {"asymmetry": "under-sampled tokens are pulled 16.4 times"},
    ),
    Case(
        value_clamp, FORWARD, None, "k3-loss", scope="not far",
        failures={
            **UNWEIGHTED, "clamps": "the gradient is 0 for ℓ below -2.611 and ℓ above 11: the value is clamped, the loss stays at 10",
            "asymmetry": "at |ℓ| = 2 under-sampled tokens are pulled 7.39 times as hard as over-sampled ones, growing as e^|ℓ|",
        },
    ),
    Case(
        value_clamp_on_k2, REVERSE, None, "k2-loss", scope="not far",
        failures={
            **UNWEIGHTED, "clamps": "ℓ below -4.472 and ℓ above 4.472: the value is clamped, the loss stays at 10",
        },
    ),
    Case(
        log_ratio_clamp, FORWARD, None, "k3-loss", scope="not far",
        failures={
            **UNWEIGHTED, "clamps": "the gradient is 0 for ℓ below -3 and ℓ above 3: the log-ratio is clamped at ±3",
            "asymmetry": "at |ℓ| = 2 under-sampled",
        },
    ),
    Case(
        reward_clamp, REVERSE, None, "k1-reward", scope="not far",
        failures={
            **UNWEIGHTED, "clamps": "the coefficient is constant for ℓ below -5 and ℓ above 5: the log-ratio is clamped at ±5",
        },
    ),
    Case(missing_mask, REVERSE, None, "k2-loss", {**UNWEIGHTED, "mask": "padded positions get a gradient"}),
    Case(
        padding_in_the_return, None, None, None,
        {
            **UNWEIGHTED, "stationary_at_reference": MOVED, "mask": "what stands in the padding changes the gradient of live tokens",
            "padding": "the gradient depends on how far the batch is padded",
            "length": "the pull of a token depends on the length of its response",
         "asymmetry": "",
        },
    ),
    Case(
        padded_mean, {"reverse_kl_frozen_prefix": 0.25}, None, "k2-loss",
        {**UNWEIGHTED, "padding": "the loss is divided by the padded length T"},
    ),
    Case(
        differentiated_weight_on_k2, *[{"k2_value_frozen_prefix": 1.0}] * 2, "k2-loss-differentiated-token-weight",
        {"asymmetry": "over-sampled tokens are pulled 3 times as hard"},
    ),
    Case(detached_weight_on_k3, FORWARD, FORWARD, "k3-loss-detached-token-weight", {"asymmetry": GROWING}),
    Case(
        sign_flipped, {"reverse_kl_frozen_prefix": -1.0}, None, "k2-loss", {**UNWEIGHTED, "sign": "minimising it raises the KL"},
    ),
    Case(
        per_length, {"reverse_kl_frozen_prefix": 0.5}, None, "k2-loss-by-length", scope="equal lengths",
        failures={**UNWEIGHTED, "length": "every response is weighted by 1/L"},
    ),
    Case(
        per_length_k1, {"inverse_length": 1.0}, {"behaviour_kl": -0.5}, "k1-loss-by-length", off_scope="equal lengths",
        failures={
            **UNWEIGHTED, "stationary_at_reference": MOVED, "reference": NO_REFERENCE,
            "sign": "minimising it raises the KL in some scenarios",
            "length": "every response is weighted by 1/L",
        },
    ),
    Case(
        token_mean, {"reverse_kl_frozen_prefix": 0.5}, None, "k2-loss-by-length", scope="equal lengths",
        failures={
            **UNWEIGHTED, "batch": "how long the other responses are: one mean over all tokens of the batch",
            "length": "divided by the number of tokens in the batch",
        },
    ),
    Case(
        k1_as_loss, {"zero": 1.0}, {"behaviour_kl": -1.0}, "k1-loss",
        {
            **UNWEIGHTED, "reference": NO_REFERENCE, "sign": NOTHING_MOVES,
            "depends_on_sample": "every token of a prefix is pulled alike, whatever was drawn: the pulls cancel",
        },
    ),
    Case(
        action_independent, {"zero": 1.0}, None, "full-reward",
        {
            **UNWEIGHTED, "sign": NOTHING_MOVES, "depends_on_sample": "every token of a prefix is pulled alike, whatever was drawn",
            "asymmetry": "",
        },
    ),
    Case(
        sequence_ratio_on_token_k3, FORWARD, {"forward_kl_policy_prefix": 1.0}, "k3-loss-detached-sequence-weight",
        {"asymmetry": GROWING},
    ),
    Case(
        geometric_ratio, {"reverse_kl": 0.5, "forward_kl_frozen_prefix": 0.5}, None, None, scope="equal lengths",
        failures={"length": "the pull of a token depends on the length of its response"},
    ),
    Case(missing_weight, REVERSE, None, "k2-loss", UNWEIGHTED),
    Case(
        truncated_weight, REVERSE, REVERSE, None, off_scope="near",
        failures={"weight": "token level; detached; truncated above ρ = 2"},
    ),
    Case(
        clipped_weight, REVERSE, REVERSE, None, off_scope="near",
        failures={"weight": "as a policy loss has it; no gradient below ρ = 0.8; no gradient above ρ = 1.2"},
    ),
    Case(
        forgotten_reference, {"entropy_frozen_prefix": -1.0}, None, None,
        {
            **UNWEIGHTED, "stationary_at_reference": MOVED, "reference": NO_REFERENCE,
            "sign": "minimising it raises the KL in some scenarios",
            "asymmetry": "",
        },
    ),
    Case(wrong_direction, FORWARD, FORWARD, None, {"asymmetry": ""}),
    Case(pointwise_kl_div, None, None, None, {**UNWEIGHTED, "stationary_at_reference": MOVED, "asymmetry": GROWING}),
    Case(absolute_value, {"total_variation_frozen_prefix": 2.0}, None, "abs-loss", UNWEIGHTED),
    Case(
        half_precision, FORWARD, None, "k3-loss", {**UNWEIGHTED, "finite": "NaN or infinite for ℓ below -11.09", "asymmetry": GROWING},
        error=5e-3,
    ),
    Case(float32_inside, REVERSE, REVERSE, "k3-loss-differentiated-token-weight", error=1e-6),
    Case(
        not_a_number, REVERSE, None, "k2-loss",
        {**UNWEIGHTED, "finite": "NaN or infinite for ℓ above 12"},
    ),
    Case(
        overflows_far_away, REVERSE, None, "k2-loss", scope="not far",
        failures={
            **UNWEIGHTED, "sign": "its expected gradient is not a number (far)", "finite": "NaN or infinite for ℓ above 6",
        },
    ),
    Case(group_mean, {"reverse_kl": 0.5}, None, None, {**UNWEIGHTED, "batch": "a group baseline"}),
    Case(group_standard_deviation, None, None, None, {**UNWEIGHTED, "batch": "a group baseline"}),
    Case(
        length_penalty, {"reverse_kl": 1.0, "length": 0.3}, None, None,
        {**UNWEIGHTED, "stationary_at_reference": MOVED, "length": "the pull of a token depends on the length of its response",
         "asymmetry": ""},
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def audited():
    """Audits by name, each made once."""
    found: dict[str, Audit] = {}

    def get(case: Case):
        if case.name not in found:
            found[case.name] = gl.audit(case.loss)
        return found[case.name]

    return get


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_the_objective_is_named(case, audited):
    audit = audited(case)
    for verdict, expected, scope in (
        (audit.on_policy, case.on, case.scope), (audit.off_policy, case.off, case.off_scope),
    ):  # fmt: skip
        assert list(verdict.combination) == list(expected or {}), verdict.text
        for name, share in (expected or {}).items():
            assert verdict.combination[name] == pytest.approx(share, rel=max(10 * case.error, 1e-9)), verdict.text
        if expected:
            assert verdict.scope == scope
            assert verdict.error <= case.error
        else:
            assert verdict.name == "none"
            assert "equals the gradient of no known objective; the closest is" in verdict.text


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_the_form_is_named(case, audited):
    form = audited(case).form
    assert (form and form.name) == case.form


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_the_cause_and_nothing_else_is_found(case, audited):
    failures = {probe.name: probe.finding for probe in audited(case).failures}
    assert list(failures) == [name for name in NAMES if name in case.failures], failures
    for name, finding in case.failures.items():
        assert finding in failures[name]
    assert all(probe.example for probe in audited(case).failures)


def test_what_the_reference_does_not_enter_is_said(audited):
    texts = {case.name: audited(case).on_policy.text for case in ZOO}
    free = {name for name, text in texts.items() if "in which the reference does not enter at all" in text}
    assert free == {"per_length_k1", "forgotten_reference"}


def test_saturation_is_located(audited):
    found = {case.name: audited(case).probe("clamps").finding for case in ZOO}
    assert found["ratio_upside_down"] == "no clamp within ±40; it saturates at -1 for ℓ below -4.5"
    assert found["detached_weight_on_k3"] == "no clamp within ±40; it saturates at 1 for ℓ above 4.5"
    assert found["healthy_k2"] == "no clamp within ±40"


def test_levels_and_kinds_of_weight_are_told_apart(audited):
    found = {case.name: audited(case).probe("weight").finding for case in ZOO}
    assert found["healthy_k2"] == "token level; detached"
    assert found["healthy_k3"] == "token level; differentiated"
    assert found["sequence_ratio_on_token_k3"] == "sequence level; detached"
    assert found["geometric_ratio"] == "sequence level, as the geometric mean of the ratios; differentiated"
    assert found["detached_log_ratio"] == "token level; on a detached coefficient, as a policy loss has it"
    assert found["wrong_direction"] == "no importance weight, and none is needed: off-policy it descends the same"
    prefix = gl.audit(prefix_weight).probe("weight").finding
    assert prefix == "prefix level; detached"


def prefix_weight(log_probs, ref_log_probs, old_log_probs, mask):
    ratio = ((log_probs - old_log_probs) * mask).cumsum(-1).exp().detach()
    return reduced(ratio * k2(log_probs - ref_log_probs), mask)


def test_precision_is_told_from_the_outside(audited):
    found = {case.name: audited(case).precision.name for case in ZOO}
    assert found.pop("half_precision") == "half"
    assert found.pop("float32_inside") == "float32"
    assert set(found.values()) == {"float64"}


def test_couplings_are_found_and_pairs_enumerated(audited):
    pairs = {case.name for case in ZOO if audited(case).group == 2}
    assert pairs == {"token_mean", "group_mean", "group_standard_deviation"}
