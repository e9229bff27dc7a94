"""Moments of trees from prefixes and from parts, against those of all responses at once."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

import gradlab as gl
from gradlab.moments import moments_in_parts, moments_of
from gradlab.policies import softmax
from gradlab.rollout import Rollout
from gradlab.solvers import exact, prefixes


def user_loss(rollout):
    """Something that is no estimator: k3 per token, times the response's length."""
    ratio = rollout.log_prob - rollout.reference_log_prob
    return ((torch.expm1(-ratio) + ratio) * rollout.mask).sum(-1) * rollout.lengths


def compositions() -> list[gl.Estimator]:
    """Every composition of a kernel of each kind that means something, with each modifier by itself."""
    fields = (
        ["k3", "mse_sampled", "full"],
        ["loss", "reward", "loss+reward", "straight_through"],
        ["token", "to_go", "return", "sequence"],
        ["none", "token", "prefix", "sequence"],
    )
    modifiers = [
        {},
        {"differentiate_weight": True},
        {"differentiate_weight": True, "truncate": 1.05},
        {"truncate": 1.1},
        {"clip": 0.1},
        {"baseline": "kl"},
        {"baseline": "leave_one_out", "group": 4},
        {"clamp_value": 0.1},
        {"normalise": "mean"},
        {"normalise": "token_mean", "baseline": "group_mean", "group": 2},
    ]
    found = []
    for kernel, placement, credit, weight in itertools.product(*fields):
        for modifier in modifiers:
            with contextlib.suppress(ValueError):
                found.append(gl.Estimator(kernel, placement, credit, weight, **modifier))
    return found


@pytest.mark.parametrize("together", [1, 2**17])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(("vocab", "length", "eos"), [(3, 3, None), (3, 4, 1), (2, 1, None)])
def test_sums_over_prefixes_are_those_over_responses(monkeypatch, vocab, length, eos, off_policy, together):
    policy = gl.Tree.random(vocab, length, seed=0, eos=eos)
    behaviour = policy.perturbed(scale=0.4, seed=2) if off_policy else None
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.5, seed=1), behaviour)
    monkeypatch.setattr(prefixes, "TOGETHER", together)
    monkeypatch.setattr(prefixes, "LISTED", 20)
    losses = compositions()
    assert len(losses) > 500
    for one, other in zip(exact.moments(losses, scenario), moments_of(losses, Rollout.enumerated(scenario), ""), strict=True):
        square = float(other.mean.square().sum()) + other.trace_cov
        torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=1e-13 * square**0.5)
        assert one.trace_cov == pytest.approx(other.trace_cov, rel=1e-11, abs=1e-13 * square)


def test_what_lies_behind_an_end_token_is_not_read():
    policy = gl.Tree.random(3, 3, seed=0, eos=1)
    logits = policy.table.clone()
    behind = policy.with_parameters(0 * policy.parameters).occupancy() == 0
    logits[behind] *= 500
    scenario = gl.Scenario(policy, policy.perturbed(scale=0.5, seed=1), policy.perturbed(scale=0.4, seed=2))
    other = gl.Scenario(gl.Tree(logits, eos=1), scenario.reference, scenario.behaviour)
    losses = list(gl.ESTIMATORS.values())
    for one, two in zip(exact.moments(losses, scenario), exact.moments(losses, other), strict=True):
        torch.testing.assert_close(two.mean, one.mean, rtol=1e-12, atol=1e-14)
        assert two.trace_cov == pytest.approx(one.trace_cov, rel=1e-11)


@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("size", [7, 64])
def test_moments_in_parts_are_those_of_the_whole(eos, off_policy, size):
    policy = gl.Tree.random(4, 4, seed=0, eos=eos)
    behaviour = policy.perturbed(kl=0.1, seed=2) if off_policy else None
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1), behaviour)
    losses = [*gl.ESTIMATORS.values(), gl.Estimator("k2", "reward", "to_go", normalise="token_mean"), user_loss]
    whole = moments_of(losses, Rollout.enumerated(scenario), "")
    parts = moments_in_parts(losses, lambda: Rollout.parts(scenario, size), len(policy.table), "")
    for one, part in zip(whole, parts, strict=True):
        scale = float(one.mean.norm()) + one.trace_cov**0.5
        torch.testing.assert_close(part.mean, one.mean, rtol=0, atol=1e-13 * scale)
        assert part.trace_cov == pytest.approx(one.trace_cov, rel=1e-11)


def test_a_function_of_many_responses_is_visited_in_parts(monkeypatch):
    policy = gl.Tree.random(4, 4, seed=0)
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1))
    losses = [user_loss, gl.ESTIMATORS["k1-reward-to-go"]]
    whole = exact.moments(losses, scenario)
    monkeypatch.setattr(exact, "WHOLE_RESPONSES", 64)
    for one, part in zip(whole, exact.moments(losses, scenario), strict=True):
        torch.testing.assert_close(part.mean, one.mean, rtol=1e-12, atol=1e-14)
        assert part.trace_cov == pytest.approx(one.trace_cov, rel=1e-11)


def test_parts_hold_every_response_once_over_the_rows_they_visit():
    policy = gl.Tree.random(3, 3, seed=0, eos=2)
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1))
    whole, found = Rollout.enumerated(scenario), list(Rollout.parts(scenario, 4))
    assert torch.equal(torch.cat([part.tokens for part, _, _ in found]), whole.tokens)
    torch.testing.assert_close(torch.cat([share * part.weight for part, _, share in found]), whole.weight)
    torch.testing.assert_close(torch.cat([part.log_ratio for part, _, _ in found]), whole.log_ratio)
    for part, rows, _ in found:
        assert torch.equal(part.table, policy.table[rows])
        assert len(part.tokens) <= 4


def test_more_responses_or_parameters_than_are_visited_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"has up to 5\^10 responses, more than the 8,388,608 that are visited"):
        exact.moments(user_loss, gl.Scenario(*[gl.Tree(torch.zeros((5**10 - 1) // 4, 5))] * 2))
    tree = gl.Tree.random(3, 3, seed=0)
    monkeypatch.setattr(exact, "WHOLE_RESPONSES", 8)
    monkeypatch.setattr(exact, "MOMENT_BYTES", 8 * 26 * 39 - 1)
    with pytest.raises(ValueError, match="the moments of 2 estimators in 39 parameters take"):
        exact.moments([gl.ESTIMATORS["k1-loss"], gl.ESTIMATORS["k2-loss"]], gl.Scenario(tree, tree))


def test_distributions_are_kept_for_a_table_until_it_changes():
    table = torch.randn(5, 3, dtype=torch.float64)
    one = softmax.rows(table)
    assert softmax.rows(table) is one
    torch.testing.assert_close(one.log_p, table.log_softmax(-1))
    torch.testing.assert_close(one.p, table.softmax(-1))
    assert torch.equal(one.top, table.argmax(-1, keepdim=True))
    table[0, 0] += 1
    torch.testing.assert_close(softmax.rows(table).p, table.softmax(-1))
    leaf = table.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(softmax.rows(leaf).log_p[0, 1], leaf)
    torch.testing.assert_close(slope[0], torch.eye(3, dtype=torch.float64)[1] - table.softmax(-1)[0])
    other = torch.zeros(5, 3, dtype=torch.float64)
    first = softmax.compared(table, other, torch.sub)
    assert softmax.compared(table, other, torch.sub) is first
    other += 1
    assert torch.equal(softmax.compared(table, other, torch.sub), table - other)
