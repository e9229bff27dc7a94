"""The audit's engine and identification, against slow oracles and the catalogue; and what bad losses are told."""

from __future__ import annotations

import itertools
import math
import pickle
import re
import time
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from worlds import assert_same

import gradlab as gl
from gradlab.audit import Batch, LossError, Subject, candidates, checks, curve, engine, forms, frame, synthetic, worlds
from gradlab.audit.identify import Identification, formula, identify
from gradlab.audit.precision import PRECISIONS
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.kernels import derivative
from gradlab.moments import cotangent


def subject_of(estimator: Estimator) -> Subject:
    """An estimator in the seat of a framework's loss: mean over the batch of its surrogate."""

    def loss(batch: Batch) -> torch.Tensor:
        rollout = gl.Rollout.from_logits(
            batch.tokens, batch.mask.bool(), torch.full((len(batch.mask),), 1 / len(batch.mask), dtype=torch.float64),
            batch.logits, batch.reference_logits, batch.behaviour_logits, length=3, expected_length=2.0,
        )  # fmt: skip
        return estimator(rollout).mean()

    return Subject(estimator.name, loss, group=estimator.group)


def arrays(world: worlds.AuditScenario):
    scenario = world.scenario
    behaviour = None if scenario.behaviour is None else scenario.behaviour.table.numpy()
    return scenario.policy.table.numpy(), scenario.reference.table.numpy(), behaviour, scenario.policy.eos


# ---- the engine against loops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [*worlds.standard(), worlds.equal_lengths()[3]], ids=lambda w: f"{w.name} {w.off_policy}")
@pytest.mark.parametrize("name", ["k3-loss", "k1-reward-to-go", "k3-loss-token", "full-both-prefix"])
def test_expected_gradients_are_those_of_loops_over_responses(world, name):
    estimator = gl.ESTIMATORS[name]
    found = engine.expected_gradient(subject_of(estimator), world, 1)
    logits, reference, behaviour, eos = arrays(world)
    mean, trace = oracles.moments(estimator, logits, reference, behaviour, eos)
    size = math.sqrt(trace + float(mean @ mean))
    assert_same(found.mean, mean, scale=size)
    assert found.size == pytest.approx(size, rel=1e-10)
    assert found.leak == 0


@pytest.mark.parametrize(("baseline", "share"), [("leave_one_out", 1.0), ("group_mean", 0.5)])
def test_pairs_are_those_of_loops_over_groups(baseline, share):
    estimator = Estimator("k1", "reward", "return", baseline=baseline, group=2)
    world = worlds.standard()[3]

    def loss(batch):
        kl = ((batch.log_prob - batch.reference_log_prob) * batch.mask).sum(-1).detach()
        other = kl.mean() if baseline == "group_mean" else kl.flip(0)
        return ((kl - other) * (batch.log_prob * batch.mask).sum(-1)).mean()

    mean, _ = oracles.moments(estimator, *arrays(world))
    subject = Subject("pairs", loss)
    found = engine.expected_gradient(subject, world, 2)
    assert_same(found.mean, mean)
    assert checks.exchangeable(subject, world, 2, 1e-10)
    half = engine.expected_gradient(subject, world, 2, exchangeable=True)
    assert len(half.weight) == 120 < len(found.weight) == 225
    assert_same(half.mean, mean)
    assert half.size == pytest.approx(found.size, rel=1e-12)
    audited = gl.audit(Subject("pairs", loss))
    assert audited.group == 2
    assert audited.on_policy.combination == {"reverse_kl": pytest.approx(share, rel=1e-12)}


def test_a_group_of_three_is_enumerated_when_asked_for():
    def loss(batch):
        kl = ((batch.log_prob - batch.reference_log_prob) * batch.mask).sum(-1).detach()
        return ((kl - kl.mean()) * (batch.log_prob * batch.mask).sum(-1)).mean()

    world = worlds.standard()[0]
    truth = gl.exact.gradient("reverse_kl", world.scenario)
    subject = Subject("threes", loss)
    assert_same(engine.expected_gradient(subject, world, 3).mean, 2 / 3 * truth)
    assert_same(engine.expected_gradient(subject, world, 3, exchangeable=True).mean, 2 / 3 * truth)


def standardised(batch: Batch) -> torch.Tensor:
    """k1 in the reward, divided by the standard deviation of the group, as GRPO has it; equal rewards pull nothing."""
    kl = ((batch.log_prob - batch.reference_log_prob) * batch.mask).sum(-1).detach()
    spread = kl.std()
    advantage = (kl - kl.mean()) / spread if spread > 1e-12 else torch.zeros_like(kl)
    return (advantage * (batch.log_prob * batch.mask).sum(-1)).mean()


def bandit(actions: int = 3, kl: float = 0.4) -> worlds.AuditScenario:
    policy = gl.Tree.random(vocab=actions, length=1, seed=5)
    return worlds.AuditScenario("moderate", gl.Scenario(policy, policy.perturbed(kl=kl, seed=6)))


@pytest.mark.parametrize(("actions", "group"), [(3, 2), (3, 3), (3, 4), (4, 3), (2, 6)])
def test_standardised_groups_are_those_of_loops_over_all_of_them(actions, group):
    world = bandit(actions)
    p = np.exp(world.scenario.policy.table.numpy()[0])
    p /= p.sum()
    q = np.exp(world.scenario.reference.table.numpy()[0])
    kl = np.log(p) - np.log(q / q.sum())
    mean = np.zeros(actions)
    for drawn in itertools.product(range(actions), repeat=group):
        rewards = [kl[a] for a in drawn]
        middle = sum(rewards) / group
        spread = math.sqrt(sum((r - middle) ** 2 for r in rewards) / (group - 1))
        for a, r in zip(drawn, rewards, strict=True):
            if spread > 1e-12:
                mean += math.prod(p[b] for b in drawn) * (r - middle) / spread / group * (np.eye(actions)[a] - p)
    subject = Subject("standardised", standardised)
    ordered, unordered = (engine.expected_gradient(subject, world, group, exchangeable=how) for how in (False, True))
    assert_same(ordered.mean, mean)
    assert_same(unordered.mean, mean)
    for found, how in ((ordered, False), (unordered, True)):
        assert len(found.weight) == engine.count(actions, group, how)
        assert float(found.weight.sum()) == pytest.approx(1, rel=1e-12)


def test_standardised_groups_turn_to_the_reverse_kl_as_they_grow():
    world = bandit()
    truth = gl.exact.gradient("reverse_kl", world.scenario)
    spread = world.rollout.weight @ world.rollout.log_ratio[:, 0].square() - world.scenario.kl() ** 2
    angles, scales = {}, {}
    for group in (2, 16, 32, 64):
        mean = engine.expected_gradient(Subject("standardised", standardised), world, group, exchangeable=True).mean
        angles[group] = math.acos(float(mean @ truth / mean.norm() / truth.norm()))
        scales[group] = float(mean @ truth / truth.square().sum())
    assert angles[2] > 0.05
    # What the deviation of a group has to do with its rewards falls as 1/n, and so does the angle.
    assert angles[16] / angles[32] == pytest.approx(2, rel=0.2)
    assert angles[32] / angles[64] == pytest.approx(2, rel=0.1)
    assert scales[64] == pytest.approx(float(spread) ** -0.5, rel=0.02)


def test_an_audit_tells_what_a_larger_group_changes():
    audits = {group: gl.audit(Subject("standardised", standardised), group=group) for group in (2, 3)}
    for group, audited in audits.items():
        on = worlds.standard()[::2]
        means = [engine.expected_gradient(audited.subject, world, group).mean for world in on]
        truths = [candidates.candidate_gradients(world)["reverse_kl"] for world in on]
        wanted = np.mean([float(m @ t / m.norm() / t.norm()) for m, t in zip(means, truths, strict=True)])
        assert (audited.group, frame([audited])["group"][0]) == (group, group)
        assert audited.cosine == pytest.approx(wanted, rel=1e-9)
        assert (audited.on_policy.name, audited.on_policy.closest) == ("none", "reverse_kl")
    assert audits[3].cosine > audits[2].cosine + 0.01


def test_a_mean_over_the_batch_is_recognised_in_a_larger_group():
    def loss(log_probs, ref_log_probs, mask):
        return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum() / mask.sum()

    assert gl.audit(loss, group=3).probe("batch").finding.endswith("one mean over all tokens of the batch")


def test_no_place_in_a_group_is_overlooked():
    def at(*places):
        return lambda batch: ((batch.log_prob - batch.reference_log_prob).square() * batch.mask)[list(places)].sum()

    world = worlds.standard()[3]
    for places in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 3), (1, 2, 3)):
        assert not checks.exchangeable(Subject("some", at(*places)), world, 4, 1e-10), places
    assert checks.exchangeable(Subject("all", at(0, 1, 2, 3)), world, 4, 1e-10)

    def neighbours(batch):  # which a turn leaves neighbours
        k2 = ((batch.log_prob - batch.reference_log_prob).square() * batch.mask).sum(-1)
        return (k2 * k2.roll(1)).sum()

    assert checks.exchangeable(Subject("three", neighbours), world, 3, 1e-10)
    assert not checks.exchangeable(Subject("four", neighbours), world, 4, 1e-10)


def test_groups_that_are_too_many_say_how_many_and_what_is_possible():
    def first(batch):
        return ((batch.log_prob - batch.reference_log_prob).square() * batch.mask)[0].sum()

    assert engine.count(15, 5, True) == len(list(itertools.combinations_with_replacement(range(15), 5)))
    per_world = math.comb(20, 6)  # 6 of 15 responses, with repetition
    says = rf"groups of 6 responses cannot be enumerated: mine would be evaluated {6 * per_world} times; .* largest group is 5$"
    with pytest.raises(ValueError, match=says):
        gl.audit(Subject("mine", standardised), group=6)
    says = rf"groups of 4 responses .* evaluated {6 * 15**4} times, in every order, because .* the largest group is 3$"
    with pytest.raises(ValueError, match=says):
        gl.audit(Subject("mine", first), group=4)
    with pytest.raises(ValueError, match="group is the number of responses enumerated together, at least 1; got 0"):
        gl.audit(Subject("mine", first), group=0)
    engine.check_affordable(Subject("mine", first), 5, False, True)
    with pytest.raises(ValueError, match=f"evaluated {32 * 6 * math.comb(19, 5)} times; .* the largest group is 2$"):
        engine.check_affordable(Subject("mine", first), 5, True, True)


def test_the_order_of_a_group_is_kept_where_it_matters():
    def first(batch):
        return ((batch.log_prob - batch.reference_log_prob).square() * batch.mask)[0].sum() / 2

    subject, world = Subject("first", first), worlds.standard()[2]
    assert not checks.exchangeable(subject, world, 2, 1e-10)
    audited = gl.audit(subject, group=2)
    assert audited.on_policy.combination == {"reverse_kl_frozen_prefix": pytest.approx(1.0, rel=1e-12)}


def test_padding_is_misleading_and_its_pull_is_measured():
    world = worlds.standard()[2]

    def loss(batch):
        return (batch.log_prob * (1 - batch.mask)).sum()

    found = engine.expected_gradient(Subject("padding", loss), world, 1)
    assert float(found.mean.norm()) == 0
    columns = world.columns(worlds.PADDING)
    p = columns["logits"].softmax(-1)
    pull = (torch.nn.functional.one_hot(columns["tokens"], 3) - p).square().sum(-1)
    expected = world.rollout.weight @ torch.where(columns["mask"], 0.0, pull).sum(-1)
    assert found.leak == pytest.approx(float(expected) ** 0.5, rel=1e-12)


def test_worlds_are_what_they_say():
    assert [(w.name, w.off_policy) for w in worlds.standard()] == [
        (name, off) for name in ("near", "moderate", "far") for off in (False, True)
    ]
    for world in worlds.standard():
        kl, lag, *_ = worlds.DISTANCES[world.name]
        assert world.scenario.kl() == pytest.approx(kl, rel=1e-9)
        assert (world.scenario.lag() > lag / 2) is world.off_policy
        assert len(set(world.rollout.lengths.tolist())) == 3
    far = worlds.standard()[4].rollout.log_ratio
    assert float(far.min()) < -4
    assert float(far.max()) > 5
    assert all(set(w.rollout.lengths.tolist()) == {2.0} for w in worlds.equal_lengths())


# ---- candidates against loops -------------------------------------------------------------------------------------------


def slow_objective(name, theta, reference, sampler, eos):
    """The audit's extra objectives by loops over prefixes and responses."""
    responses = oracles.responses(theta.shape[1], oracles.length_of(theta), eos)
    terms = []
    if name in ("behaviour_kl", "length", "entropy"):
        for y in responses:
            log_pi, log_mu = oracles.log_probability(theta, y), oracles.log_probability(sampler, y)
            of_response = {
                "behaviour_kl": log_mu.exp() * (log_mu - log_pi), "length": log_pi.exp() * len(y), "entropy": -log_pi.exp() * log_pi,
            }  # fmt: skip
            terms.append(of_response[name])
        return oracles.total(terms)
    for prefix in sorted({y[:t] for y in responses for t in range(len(y))}):
        log_pi, log_ref = (oracles.rows_along(x, (*prefix, 0))[-1] for x in (theta, reference))
        pi, ref = log_pi.exp(), log_ref.exp()
        middle = ((pi + ref) / 2).log()
        row = {
            "reverse_kl_policy_prefix": pi * (log_pi - log_ref), "forward_kl_policy_prefix": ref * (log_ref - log_pi),
            "k2_value_frozen_prefix": pi * 0.5 * (log_pi - log_ref) ** 2, "total_variation_frozen_prefix": 0.5 * (pi - ref).abs(),
            "jensen_shannon_frozen_prefix": 0.5 * (pi * (log_pi - middle) + ref * (log_ref - middle)),
            "entropy_frozen_prefix": -pi * log_pi,
        }[name]  # fmt: skip
        visits = oracles.log_probability(theta if "policy_prefix" in name else sampler, prefix).exp().detach()
        terms.append(visits * row.sum())
    return oracles.total(terms)


@pytest.mark.parametrize("world", worlds.standard()[2:4], ids=["on", "off"])
@pytest.mark.parametrize("name", candidates.EXTRAS)
def test_extra_objectives_are_those_of_loops(world, name):
    logits, reference, behaviour, eos = arrays(world)
    theta = torch.tensor(logits, requires_grad=True)
    sampler = oracles.table(logits if behaviour is None else behaviour)
    (expected,) = torch.autograd.grad(slow_objective(name, theta, reference, sampler, eos), theta)
    assert_same(candidates.candidate_gradients(world)[name], expected.flatten(), scale=max(float(expected.norm()), 0.1))


def test_every_candidate_has_words_and_targets_come_first():
    assert set(candidates.WORDS) == set(candidates.CANDIDATES)
    assert list(candidates.CANDIDATES)[: len(gl.TARGETS)] == list(gl.TARGETS)


# ---- positive controls: the catalogue -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", gl.CATALOGUE)
def test_every_estimator_is_identified_as_the_catalogue_declares(name):
    entry = gl.CATALOGUE[name]
    estimator = entry.estimator
    shrink = 1.0
    if estimator.grouped:  # fours become pairs, which shrink a group mean by 1 − 1/2 instead of 1 − 1/4
        estimator = replace(estimator, group=2)
        shrink = 0.5 / 0.75 if estimator.baseline == "group_mean" else 1.0
        audited = gl.audit(_grouped(estimator))
    else:
        audited = gl.audit(subject_of(estimator))
    for verdict, declared in ((audited.on_policy, entry.on_policy), (audited.off_policy, entry.off_policy)):
        if declared is None:
            assert not set(verdict.combination) & (set(gl.TARGETS) - {"zero"}) or verdict.scope != "everywhere", verdict.text
            continue
        assert verdict.scope == "everywhere"
        assert verdict.error <= 1e-12
        expected = {key: share * shrink for key, share in declared.items()}
        assert verdict.combination == pytest.approx(expected, rel=1e-9), verdict.text


def _grouped(estimator: Estimator) -> Subject:
    def loss(batch: Batch) -> torch.Tensor:
        rollout = gl.Rollout.from_logits(
            batch.tokens, batch.mask.bool(), torch.full((2,), 0.5, dtype=torch.float64),
            batch.logits, batch.reference_logits, batch.behaviour_logits,
        )  # fmt: skip
        return estimator(rollout).mean()

    return Subject(estimator.name, loss, group=2)


@pytest.mark.parametrize(
    "name", [n for n, e in gl.ESTIMATORS.items() if not e.grouped and e.clip is None and e.baseline is None]
)
def test_the_form_of_an_estimator_is_that_estimator_or_has_its_gradient(name):
    estimator = gl.ESTIMATORS[name]
    found = gl.audit(subject_of(estimator)).form
    assert found is not None
    assert found.by_length is (estimator.normalise == "mean")
    same = [found.estimator, *found.equivalent_estimators]
    plain = replace(estimator, normalise="sum")
    if estimator.placement == "straight_through":
        plain = Estimator("k2")
    assert plain in same
    # All of them really have one gradient, by autograd through the surrogates.
    rollout = worlds.standard()[3].rollout
    first = cotangent(plain, rollout)
    for twin in same:
        assert_same(cotangent(twin, rollout), first)


def test_forms_prefer_the_composition_whose_value_agrees():
    corrected = Estimator("k3", weight="token", differentiate_weight=True)
    assert gl.audit(subject_of(corrected)).form.estimator == corrected
    detached = Estimator("k2", weight="token")
    assert gl.audit(subject_of(detached)).form.estimator == detached


@pytest.mark.parametrize(
    "estimator", [Estimator("k3", weight="token", differentiate_weight=True), Estimator("k2", weight="token")]
)
def test_values_tell_compositions_by_length_apart_too(estimator):
    """Both have the gradient of others; what the loss is worth, divided by the length, says which it is."""
    found = gl.audit(subject_of(replace(estimator, normalise="mean"))).form
    assert (found.estimator, found.by_length) == (estimator, True)
    assert len(found.equivalent_estimators) >= 1


def test_a_form_with_the_wrong_sign_is_named_with_its_negative_factor():
    def ascent(log_probs, ref_log_probs, mask):
        return -2.5 * (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()

    found = gl.audit(ascent).form
    assert found.estimator == Estimator("k2")
    assert found.factor == pytest.approx(-2.5, rel=1e-9)


def test_compositions_are_distinct():
    listed = list(forms.compositions())
    assert len(listed) == len(set(listed)) > 200


# ---- identification -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"a": 2.5}, "a"),
        ({"a": -2.5}, "−a"),
        ({"a": 1, "b": -1}, "a − b"),
        ({"a": -1, "b": 1 + 1e-6}, "−a + b"),
        ({"a": 0.5, "b": 2.0}, "0.5·a + 2·b"),
        ({"a": -0.25, "b": -3.00004}, "−0.25·a − 3·b"),
        ({"a": -2.0, "b": 1.0002}, "−2·a + 1·b"),
        ({"a": 1, "b": -1, "c": 0.123456}, "a − b + 0.1235·c"),
    ],
)
def test_a_combination_is_written_as_a_formula(parts, text):
    assert formula(parts) == text


def test_only_a_positive_multiple_everywhere_descends():
    verdict = Identification({"reverse_kl": 0.5}, 0.0, "everywhere", "reverse_kl", 1.0, "")
    assert verdict.descends("reverse_kl")
    assert not verdict.descends("forward_kl")
    for changed in ({"scope": "near"}, {"combination": {"reverse_kl": -0.5}}, {"combination": {"reverse_kl": 0.0}},
                    {"combination": {"reverse_kl": 0.5, "forward_kl": 1.0}}, {"combination": {}}):  # fmt: skip
        assert not replace(verdict, **changed).descends("reverse_kl")


def test_a_scale_is_reported_and_a_foreign_gradient_is_not_explained_away():
    def scaled(log_probs, ref_log_probs, mask):
        return 0.04 * (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()

    def foreign(log_probs, ref_log_probs, mask):
        return (torch.sin(3 * (log_probs - ref_log_probs)) * mask).sum(-1).mean()

    verdict = gl.audit(scaled).on_policy
    assert verdict.scale == pytest.approx(0.04, rel=1e-12)
    assert verdict.text.startswith("equals the gradient of the reverse KL with frozen prefixes, relative error ")
    assert verdict.text.endswith(", scale 0.04")

    def turned(log_probs, ref_log_probs, mask):
        ratio = log_probs - ref_log_probs
        return -((0.5 * ratio**2 + 0.2 * torch.sin(3 * ratio)) * mask).sum(-1).mean()

    verdict = gl.audit(turned).on_policy
    means = [
        engine.expected_gradient(gl.audit.bind(turned), world, 1).mean for world in worlds.standard() if not world.off_policy
    ]
    truths = [candidates.candidate_gradients(world) for world in worlds.standard() if not world.off_policy]
    cosines = {
        name: np.mean([float(m @ t[name] / m.norm() / t[name].norm()) for m, t in zip(means, truths, strict=True)])
        for name in truths[0]
        if all(float(t[name].norm()) > 1e-12 for t in truths)
    }
    assert verdict.closest == max(cosines, key=lambda name: abs(cosines[name])) != max(cosines, key=cosines.get)
    assert verdict.cosine == pytest.approx(cosines[verdict.closest], rel=1e-9)
    assert verdict.cosine < -0.5

    verdict = gl.audit(foreign).on_policy
    assert verdict.name == "none"
    assert verdict.closest in candidates.CANDIDATES
    assert math.isnan(verdict.error)


def test_a_tiny_admixture_breaks_a_match():
    def mixed(log_probs, ref_log_probs, mask):
        ratio = log_probs - ref_log_probs
        return ((0.5 * ratio**2 + 1e-6 * torch.sin(3 * ratio)) * mask).sum(-1).mean()

    assert gl.audit(mixed).on_policy.name == "none"


@pytest.mark.parametrize(
    ("first", "second"), [("reverse_kl", "forward_kl"), ("k2_value", "inverse_length"), ("mse", "entropy"), ("reverse_kl", "length")]
)  # fmt: skip
def test_two_objectives_are_told_apart_with_their_coefficients(first, second):
    fields = []
    for world in worlds.standard()[::2]:
        gradients = candidates.candidate_gradients(world)
        mean = 0.7 * gradients[first] - 1.3 * gradients[second]
        fields.append(made_up(world, mean))
    verdict = identify([("everywhere", fields)], 1e-10)
    assert verdict.combination == pytest.approx({first: 0.7, second: -1.3}, rel=1e-8)
    assert f"{first} − 1.3·{second}" in verdict.name


def test_what_an_identification_says():
    """Of gradients made up from objectives, single and in pairs; of noise; and of what is no number."""
    on = worlds.standard()[::2]
    known = [candidates.candidate_gradients(world) for world in on]

    def verdict(make):
        return identify([("everywhere", [made_up(world, make(each)) for world, each in zip(on, known, strict=True)])], 1e-7)

    up = verdict(lambda g: -2.5 * g["reverse_kl"])
    assert (up.name, up.closest, up.descends("reverse_kl")) == ("−reverse_kl", "reverse_kl", False)
    assert up.scale == pytest.approx(-2.5)
    assert up.cosine == pytest.approx(-1)
    assert "minus the gradient of" in up.text
    assert "scale 2.5" in up.text
    pair = verdict(lambda g: g["reverse_kl"] - 0.5 * g["forward_kl"])
    assert math.isnan(pair.scale)
    assert "0.5 × that of" in pair.text
    assert " minus 0.5" in pair.text
    length = verdict(lambda g: 3 * g["length"])
    assert "in which the reference does not enter at all" in length.text
    nothing = verdict(lambda g: g["reverse_kl"] + torch.linspace(-1, 1, len(g["mse"]), dtype=torch.float64).cos() * 1e-3)
    assert (nothing.combination, nothing.name, nothing.scope, nothing.resolved) == ({}, "none", "everywhere", True)
    assert f"equals the gradient of no known objective; the closest is {candidates.words(nothing.closest)}" in nothing.text
    fields = [g["reverse_kl"] + torch.linspace(-1, 1, len(g["mse"]), dtype=torch.float64).cos() * 1e-3 for g in known]
    cosines = [float(f @ g[nothing.closest] / f.norm() / g[nothing.closest].norm()) for f, g in zip(fields, known, strict=True)]
    assert nothing.cosine == pytest.approx(np.mean(cosines), rel=1e-9)
    assert math.isnan(nothing.error)
    silent = identify(
        [("everywhere", [made_up(world, torch.full_like(g["mse"], math.nan)) for world, g in zip(on, known, strict=True)])],
        1e-7,
    )
    assert (silent.name, silent.closest) == ("none", "")
    assert silent.text.startswith("is not a number")
    null = verdict(lambda g: 0 * g["mse"])
    assert (null.name, null.closest, null.scale) == ("zero", "zero", 0)
    two = [made_up(world, g["reverse_kl"] + 2 * g["forward_kl"]) for world, g in zip(on[:2], known, strict=False)]
    assert identify([("equal lengths", two)], 1e-7).combination == pytest.approx({"reverse_kl": 1, "forward_kl": 2}, rel=1e-6)


def made_up(world: worlds.AuditScenario, mean: torch.Tensor) -> engine.ExpectedGradient:
    """A field with a given mean."""
    one = torch.ones(1, dtype=torch.float64)
    return engine.ExpectedGradient(world, mean, 1.0, 0.0, 0.0, one, one, one)


def test_a_match_has_to_hold_in_every_world():
    on = worlds.standard()[::2]
    truths = [candidates.candidate_gradients(world)["reverse_kl"] for world in on]
    fields = [made_up(world, truth) for world, truth in zip(on, truths, strict=True)]
    assert identify([("everywhere", fields)], 1e-7).name == "reverse_kl"
    aside = torch.ones_like(truths[2])
    aside = aside - (aside @ truths[2]) / (truths[2] @ truths[2]) * truths[2]  # so that the common factor stays 1
    off = made_up(on[2], truths[2] + 1e-4 * float(truths[2].norm()) * aside / float(aside.norm()))
    assert identify([("everywhere", [*fields[:2], off])], 1e-7).name == "none"
    assert identify([("everywhere", [*fields[:2], off]), ("not far", fields[:2])], 1e-7).name == "reverse_kl [not far]"


def test_one_world_fits_no_pair():
    near = worlds.standard()[0]
    gradients = candidates.candidate_gradients(near)
    field = made_up(near, 0.3 * gradients["length"] + 0.2 * gradients["inverse_length"])
    assert identify([("near", [field])], 1e-7).name == "none"


# ---- rounding -----------------------------------------------------------------------------------------------------------


def k3_in_reward(kind: torch.dtype, offset: float = 0.0) -> Subject:
    """k3 in the reward, whose terms nearly cancel near the reference, computed in `kind` with an offset that takes digits."""

    def loss(batch):
        ratio = (batch.log_prob - batch.reference_log_prob).detach().to(kind)
        k3 = ((-ratio).exp() - 1 + ratio + offset) - offset
        to_go = (k3.double() * batch.mask).flip(-1).cumsum(-1).flip(-1)
        return (to_go * batch.log_prob * batch.mask).sum(-1).mean()

    return Subject(f"k3 in the reward in {kind}", loss)


@pytest.mark.parametrize("world", worlds.standard()[:5], ids=lambda w: f"{w.name} {w.off_policy}")
def test_the_rounding_of_a_mean_is_its_distance_from_the_exact_one(world):
    fields = {
        kind: engine.expected_gradient(k3_in_reward(kind), world, 1) for kind in (torch.float64, torch.float32, torch.bfloat16)
    }
    truth = fields[torch.float64].mean
    for precision in PRECISIONS[1:]:
        known = fields[precision.dtype]
        found = engine.rounding_error(k3_in_reward(precision.dtype), known, 1, False, precision.perturbation)
        error = float((known.mean - truth).norm())
        assert error / 4 < found < 4 * error
    exact = engine.rounding_error(k3_in_reward(torch.float64), fields[torch.float64], 1, False, PRECISIONS[0].perturbation)
    assert exact < 1e-12 * float(truth.norm())


def test_a_kink_at_a_ratio_of_one_is_no_rounding():
    def loss(batch):
        ratio = (batch.log_prob - batch.behaviour_log_prob).float().exp()
        k2 = 0.5 * (batch.log_prob - batch.reference_log_prob).float() ** 2
        return (torch.minimum(ratio * k2, k2) * batch.mask).sum(-1).mean()

    on_policy = worlds.standard()[2]
    known = engine.expected_gradient(Subject("kink", loss), on_policy, 1)
    assert engine.rounding_error(Subject("kink", loss), known, 1, False, PRECISIONS[1].perturbation) < 1e-6 * float(
        known.mean.norm()
    )


def test_terms_that_nearly_cancel_match_as_well_as_their_rounding_allows():
    exact, rounded = (gl.audit(k3_in_reward(kind)).on_policy for kind in (torch.float64, torch.float32))
    assert exact.combination == pytest.approx({"reverse_kl": 1, "forward_kl_frozen_prefix": -1}, rel=1e-11)
    assert rounded.combination == pytest.approx({"reverse_kl": 1, "forward_kl_frozen_prefix": -1}, rel=1e-5)
    assert (exact.scope, rounded.scope) == ("everywhere", "everywhere")
    assert exact.text.startswith("equals a combination of gradients")
    assert re.match(r"agrees, within the rounding of the loss, \de-06 of its expected gradient, with a comb", rounded.text)
    assert PRECISIONS[1].match < rounded.error < 5e-5


def test_what_rounding_hides_is_unresolved_with_the_evidence():
    audited = gl.audit(k3_in_reward(torch.float32, offset=1e4))
    verdict = audited.on_policy
    assert (verdict.name, verdict.combination, verdict.descends("reverse_kl")) == ("unresolved", {}, False)
    assert audited.precision.name == "half"  # an offset of 1e4 leaves float32 three digits
    share, norm = map(float, re.match(
        r"is not resolved: near the reference the rounding of the loss is (\S+) times its expected gradient, whose norm is (\S+),",
        verdict.text,
    ).groups())  # fmt: skip
    near = worlds.standard()[0]
    mean, truth = (
        engine.expected_gradient(k3_in_reward(*how), near, 1).mean for how in ((torch.float32, 1e4), (torch.float64,))
    )
    assert norm == pytest.approx(float(mean.norm()), rel=0.05)
    assert 1 / 4 < share * norm / float((mean - truth).norm()) < 4
    # Farther away the digits suffice.
    elsewhere = verdict.text.partition("; elsewhere it equals a combination of gradients, ")[2]
    shares = re.match(r"(\S+) × that of the sequence reverse KL minus (\S+) × that of the forward KL with frozen", elsewhere)
    assert [float(share) for share in shares.groups()] == pytest.approx([1, 1], rel=1e-3)
    assert "does not descend reverse_kl on-policy: its expected gradient is not resolved" in audited.why_not("reverse_kl")


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_a_null_gradient_is_zero_and_a_foreign_one_none_whatever_the_precision(kind):
    def null(log_probs, ref_log_probs, mask):
        return ((log_probs.to(kind) - ref_log_probs.to(kind)) * mask).sum(-1).mean()

    def nothing_but_rounding(log_probs, ref_log_probs, mask):
        ratio = (log_probs - ref_log_probs).detach().to(kind)
        # One that digits are lost to, and not the ratio whole: that would be a function of the ratio like any other.
        offset = 1 if kind is torch.bfloat16 else 100
        return (((ratio + offset) - offset - ratio) * log_probs * mask).sum(-1).mean()

    def foreign(log_probs, mask):
        return -(log_probs.to(kind).exp() * mask).sum(-1).mean()

    assert gl.audit(null).on_policy.name == "zero"
    assert gl.audit(foreign).on_policy.name == "none"
    if kind is not torch.float64:
        verdict = gl.audit(nothing_but_rounding).on_policy
        assert verdict.name == "unresolved"
        assert "near the reference the rounding of the loss is" in verdict.text


def test_rounding_decides_only_what_the_other_worlds_leave_open():
    on = worlds.standard()[::2]
    truths = [candidates.candidate_gradients(world)["reverse_kl"] for world in on]
    fields = [made_up(world, truth) for world, truth in zip(on, truths, strict=True)]
    aside = made_up(
        on[0], truths[0] + 1e-3 * float(truths[0].norm()) * torch.nn.functional.normalize(torch.ones_like(truths[0]), dim=0)
    )

    def verdict(given, *shares):
        errors = {f.case.name: share * float(f.mean.norm()) for f, share in zip(given, shares, strict=True)}
        return identify([("everywhere", given)], 1e-6, lambda f: errors[f.case.name])

    moved = [aside, *fields[1:]]
    assert verdict(moved, 0, 0, 0).name == "none"
    assert verdict(moved, 1e-4, 0, 0).name == "none"
    assert verdict(moved, 3e-4, 0, 0).name == "reverse_kl"
    assert verdict(moved, 3e-4, 0, 0).error == pytest.approx(1e-3, rel=0.2)
    assert verdict(moved, 0, 3e-4, 3e-4).name == "none"  # an error in one world excuses none in another
    assert verdict(moved, 0.5, 0, 0).name == "unresolved"
    assert verdict(moved, 0.5, 0, 0).combination == {}
    assert "elsewhere it equals the gradient of the sequence reverse KL, relative error" in verdict(moved, 0.5, 0, 0).text
    assert verdict(moved, 0.5, 0.5, 0).name == "unresolved"  # one world fits no pair, so it rules none out
    foreign = [
        made_up(world, torch.linspace(-1, 2, len(truth), dtype=torch.float64).sin())
        for world, truth in zip(on, truths, strict=True)
    ]
    assert verdict(foreign, 0.5, 0, 0).name == "none"
    assert verdict(fields, 0.5, 0.5, 0.5).name == "reverse_kl"  # what matches to the last digit is not lost to rounding


def test_the_frame_has_one_row_on_policy_and_one_off():
    audited = gl.audit(subject_of(gl.ESTIMATORS["k3-loss"]))
    table = frame([audited])
    assert list(table["policy"]) == ["on", "off"]
    assert list(table["verdict"]) == ["forward_kl_frozen_prefix", "none"]
    worlds_on = [w for w in worlds.standard() if not w.off_policy]
    moments = [gl.exact.moments(gl.ESTIMATORS["k3-loss"], w.scenario).mean for w in worlds_on]
    truths = [gl.exact.gradient("reverse_kl", w.scenario) for w in worlds_on]
    expected = np.mean([float(m @ t / m.norm() / t.norm()) for m, t in zip(moments, truths, strict=True)])
    assert table["cosine"][0] == pytest.approx(expected, rel=1e-10)


# ---- curves -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["k1", "k2", "k3", "abs", "k3_swapped"])
def test_the_curve_of_a_kernel_is_its_derivative(kernel):
    subject = subject_of(Estimator(kernel))
    table = curve.sweep(curve.of_token(subject), limit=12.0)
    table = table[table["log_ratio"] != 0]
    x = torch.tensor(table["log_ratio"].to_numpy())
    assert_same(table["coefficient"], derivative(kernel, x, torch.zeros_like(x), None, None))


@pytest.mark.parametrize(("low", "high"), [(-7.3, 2.125), (-0.77, 31.0)])
def test_clamps_are_located_wherever_they_are(low, high):
    def loss(batch):
        ratio = (batch.log_prob - batch.reference_log_prob).clamp(low, high)
        return (0.5 * ratio**2 * batch.mask).sum(-1).mean()

    response = curve.of_token(Subject("clamped", loss))
    found = curve.events(response, curve.sweep(response), PRECISIONS[0])
    assert [event.kind for event in found] == ["dead", "dead"]
    assert [event.at for event in found] == pytest.approx([low, high], abs=1e-8)


def test_saturation_is_no_clamp():
    for name in ("k3-loss", "k3-swapped-loss", "k2-loss", "k1-loss"):
        response = curve.of_token(subject_of(gl.ESTIMATORS[name]))
        assert curve.events(response, curve.sweep(response), PRECISIONS[0]) == []


def test_hand_made_batches_hold_what_was_asked_for():
    rows = synthetic.Tokens.at(0.5, -30.0, 40.0, log_weight=[0.0, 1.5, -2.0]), synthetic.Tokens.at(0.1)
    batch, _ = synthetic.responses(*rows, columns=5)
    assert batch.mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    ratio, weight = batch.log_prob - batch.reference_log_prob, batch.log_prob - batch.behaviour_log_prob
    assert ratio[0, :3].tolist() == pytest.approx([0.5, -30.0, 40.0], rel=1e-12)
    assert weight[0, :3].tolist() == pytest.approx([0.0, 1.5, -2.0], abs=1e-12)
    assert float(weight[0, 0].detach()) == 0


# ---- bad losses ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_raises_shows_its_own_traceback():
    def broken(log_probs, ref_log_probs, mask):
        return log_probs @ ref_log_probs

    with pytest.raises(LossError, match="broken raised RuntimeError") as caught:
        gl.audit(broken)
    assert "return log_probs @ ref_log_probs" in caught.value.trace
    assert "gradlab/audit" not in caught.value.trace
    assert len(str(caught.value).splitlines()) == 1
    twin = pickle.loads(pickle.dumps(caught.value))  # as it comes back from a worker process
    assert (str(twin), twin.trace) == (str(caught.value), caught.value.trace)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda log_probs, mask: float(log_probs.detach().sum()), "not differentiable: it returned float"),
        (lambda log_probs, mask: (log_probs * mask).sum().long(), "not differentiable: it returned torch.int64"),
        (lambda log_probs, mask: (log_probs * mask)[:, :-1], "must return a scalar loss, got shape"),
        (lambda log_probs, ref_log_probs, mask: (log_probs * mask.mul_(0)).sum(), "changes its input mask in place"),
        (lambda log_probs, ref_log_probs: log_probs.sub_(ref_log_probs).sum(), "changes its input log_prob in place"),
    ],
)
def test_what_cannot_be_audited_says_why(loss, says):
    with pytest.raises(ValueError, match=says):
        gl.audit(loss, name="mine")


@pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "a generator of its own"])
def test_a_random_loss_is_averaged_with_a_warning_and_still_named(own):
    generator = torch.Generator().manual_seed(0) if own else None

    def noisy(log_probs, ref_log_probs, mask):
        kept = (torch.rand(log_probs.shape, generator=generator, dtype=log_probs.dtype) < 0.9) / 0.9
        return (0.5 * (log_probs - ref_log_probs) ** 2 * mask * kept).sum(-1).mean()

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="noisy is random: two calls with one batch differ"):
        audited = gl.audit(noisy)
    assert audited.random
    assert audited.failures[0].name == "deterministic"
    assert list(audited.on_policy.combination) == ["reverse_kl_frozen_prefix"]
    assert audited.on_policy.text.startswith("agrees, within the noise of a random loss, with the gradient of the reverse KL")
    assert 1e-4 < audited.on_policy.error < 0.1
    # With draws that can be repeated, probes tell what else is wrong; with others they are not asked.
    assert [probe.name for probe in audited.failures] == (["deterministic"] if own else ["deterministic", "weight"])


def test_a_loss_too_random_to_tell_is_not_named():
    def wild(log_probs, ref_log_probs, mask):
        return (0.5 * (log_probs - ref_log_probs) ** 2 * mask * torch.randn(())).sum(-1).mean()

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="wild is random"):
        assert gl.audit(wild).on_policy.name == "none"


def test_checks_do_not_mistake_one_kind_of_loss_for_another():
    moderate = worlds.standard()[3]
    plain = subject_of(gl.ESTIMATORS["k3-loss"])
    assert not checks.is_random(plain, moderate)
    assert not checks.couples(plain, moderate, 1e-10)
    assert checks.precision(plain, moderate).name == "float64"
    constant = Subject("constant", lambda batch: batch.log_prob.sum() * 0)
    assert checks.precision(constant, moderate).name == "float64"
    assert not checks.couples(constant, moderate, 1e-10)


def test_a_full_audit_takes_less_than_ten_seconds_even_over_pairs():
    def loss(log_probs, ref_log_probs, mask):
        return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum() / mask.sum()

    started = time.process_time()
    assert gl.audit(loss).group == 2
    assert time.process_time() - started < 10


def test_a_loss_that_wants_a_group_gets_one():
    def loss(batch):
        if len(batch.mask) < 2:
            raise RuntimeError("needs a group")
        kl = ((batch.log_prob - batch.reference_log_prob) * batch.mask).sum(-1).detach()
        return ((kl - kl.flip(0)) * (batch.log_prob * batch.mask).sum(-1)).mean()

    audited = gl.audit(Subject("wants a group", loss))
    assert audited.group == 2
    assert audited.form is None
    assert audited.on_policy.descends("reverse_kl")


def test_a_flipped_sign_does_not_descend():
    def flipped(log_probs, ref_log_probs, mask):
        return -(0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()

    audited = gl.audit(flipped)
    assert "equals minus the gradient of the reverse KL" in audited.why_not("reverse_kl_frozen_prefix")
    assert not audited.on_policy.descends("reverse_kl_frozen_prefix")


def test_a_caller_that_has_switched_gradients_off_is_told_the_same():
    subject = subject_of(gl.ESTIMATORS["k3-loss"])
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert gl.audit(subject).on_policy.name == "forward_kl_frozen_prefix"


def test_a_gradient_off_policy_alone_is_a_gradient():
    def loss(log_probs, ref_log_probs, old_log_probs, mask):
        lag = (log_probs - old_log_probs).detach()
        return (lag * 0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()

    audited = gl.audit(loss)
    assert audited.on_policy.text == "is zero: no gradient reaches the policy at all"
    assert audited.off_policy.name != "zero"
    assert "no gradient reaches" not in audited.probe("gradient").finding


def test_a_gradient_that_is_nan_in_the_padding_alone_is_a_leak():
    def loss(log_probs, ref_log_probs, mask):
        behind = log_probs.masked_fill(mask.bool(), 1.0) * 0
        return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean() + behind.sqrt().sum()

    audited = gl.audit(loss)
    assert audited.on_policy.descends("reverse_kl_frozen_prefix")
    assert audited.probe("mask").finding.startswith("padded positions get a gradient, inf of what live ones get")


def test_a_loss_that_is_nan_with_a_gradient_is_found_out():
    def loss(batch):
        ratio = batch.log_prob - batch.reference_log_prob
        broken = torch.where(ratio > 7.3, float("nan"), 0.0)  # no gradient, but NaN in every log
        return ((0.5 * ratio**2 + broken) * batch.mask).sum(-1).mean()

    response = curve.of_token(Subject("logs nan", loss))
    (event,) = curve.events(response, curve.sweep(response), PRECISIONS[0])
    assert (event.kind, event.at) == ("not finite", pytest.approx(7.3, abs=1e-8))


def test_what_is_unmet_says_what_is_there_instead():
    audited = gl.audit(subject_of(gl.ESTIMATORS["k3-loss"]))
    assert audited.why_not("forward_kl_frozen_prefix") is None
    assert "off-policy" in audited.why_not("forward_kl_frozen_prefix", off_policy=True)
    assert "the gradient of the forward KL with frozen prefixes" in audited.why_not("reverse_kl")
    with pytest.raises(ValueError, match="did you mean 'reverse_kl'"):
        audited.why_not("revers_kl")
    unmasked = gl.audit(lambda logprob, ref_logprob: (0.5 * (logprob - ref_logprob) ** 2).sum(-1).mean(), name="unmasked")
    assert "the mask is not applied" in unmasked.why_not("reverse_kl_frozen_prefix")


def test_twins_differ_in_name():
    names = [target.name for target in candidates.CANDIDATES.values()]
    assert all(x != y for x, y in itertools.combinations(names, 2))
