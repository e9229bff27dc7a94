"""The audit's probe of nuclei whose log-probabilities are reported from before the cut, against loops over responses."""

from __future__ import annotations

import math
import re

import numpy as np
import oracles
import pytest
from worlds import assert_same

import gradlab as gl
from gradlab.audit import Subject, bind, engine, worlds
from gradlab.audit.probes.nucleus import NucleusScenario


def corrected(log_probs, ref_log_probs, old_log_probs, mask):
    ratio = (log_probs - old_log_probs).exp().detach()
    return (ratio * 0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()


def plain(log_probs, ref_log_probs, mask):
    return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()


def cut(p: np.ndarray, top_p: float) -> np.ndarray:
    """The likeliest actions until they have `top_p`, renormalised."""
    kept, total = np.zeros_like(p), 0.0
    for a in np.argsort(-p):
        if total < top_p:
            kept[a] = p[a]
            total += p[a]
    return kept / total


def by_loops(world: worlds.AuditScenario, top_p: float, honest: bool) -> tuple[np.ndarray, float]:
    """`E Σ_t ρ_t ℓ_t ∇log π_t` over responses of the nucleus, with the ratio of what is reported; the most that is cut off."""
    table, reference = world.scenario.policy.table.numpy(), world.scenario.reference.table.numpy()
    mean, lost = np.zeros_like(table), 0.0
    for y in oracles.responses(3, 3, eos=0):
        row, weight, pull = 0, 1.0, np.zeros_like(table)
        for token in y:
            p, q = (np.exp(x[row]) / np.exp(x[row]).sum() for x in (table, reference))
            drawn = cut(p, top_p)
            weight *= drawn[token]
            if not weight:
                break
            lost = max(lost, 1 - p[drawn > 0].sum())
            ratio = p[token] / drawn[token] if honest else 1.0
            pull[row] += ratio * math.log(p[token] / q[token]) * (np.eye(3)[token] - p)
            row = 3 * row + 1 + token
        mean += weight * pull if weight else 0.0
    return mean.ravel(), lost


@pytest.mark.parametrize("world", worlds.standard()[::2], ids=lambda world: world.name)
@pytest.mark.parametrize("top_p", [0.5, 0.7, 0.9])
def test_a_nucleus_is_sampled_and_what_is_reported_is_what_the_loss_sees(world, top_p):
    subject = bind(corrected)
    for honest in (True, False):
        made = NucleusScenario(world.name, world.scenario, top_p, honest)
        assert_same(engine.expected_gradient(subject, made, 1).mean, by_loops(world, top_p, honest)[0])
        assert float(made.rollout.weight.sum()) == pytest.approx(1, rel=1e-12)


def test_log_probabilities_of_before_the_cut_are_found_out():
    probe = gl.audit(corrected, top_p=0.7).probe("nucleus")
    sizes, lost = [], 0.0
    for world in worlds.standard()[::2]:
        (true, here), (raw, _) = (by_loops(world, 0.7, honest) for honest in (True, False))
        sizes.append(np.linalg.norm(raw - true) / np.linalg.norm(true))
        lost = max(lost, here)
    assert probe.passed is False
    found = re.match(
        r"log-probabilities of before the cut change .* by up to (\S+) of its size, .*, up to (\S+) at a", probe.finding
    )
    assert [float(x) for x in found.groups()] == pytest.approx([max(sizes), lost], rel=0.05)
    assert min(sizes) > 0.05


def test_a_loss_that_does_not_read_them_cannot_be_misled_and_a_whole_nucleus_misleads_nobody():
    probe = gl.audit(plain, top_p=0.7).probe("nucleus")
    assert probe.passed
    world = worlds.standard()[4]
    true, whole = by_loops(world, 0.7, False)[0], by_loops(world, 1.0, False)[0]
    share = float(re.search(r"the nucleus of 0.7 itself changes it by up to (\S+) of its size", probe.finding).group(1))
    assert share >= 0.95 * np.linalg.norm(true - whole) / np.linalg.norm(whole) > 0.1
    assert gl.audit(corrected, top_p=1.0).probe("nucleus").passed is None


def test_it_is_asked_only_when_a_nucleus_is_given_and_then_of_groups_too():
    with pytest.raises(KeyError):
        gl.audit(plain).probe("nucleus")
    for top_p in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match=f"top_p is the probability of the nucleus, above 0 and up to 1; got {top_p:g}"):
            gl.audit(plain, top_p=top_p)

    def ranked(batch):
        kl = ((batch.log_prob - batch.reference_log_prob) * batch.mask).sum(-1).detach()
        ratio = ((batch.log_prob - batch.behaviour_log_prob) * batch.mask).sum(-1).exp()
        return ((kl - kl.mean()) * ratio).mean()

    assert gl.audit(Subject("pairs", ranked), group=2, top_p=0.7).probe("nucleus").passed is False
