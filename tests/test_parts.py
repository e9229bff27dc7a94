"""Moments of trees that are never held whole, against those of the whole tree."""

from __future__ import annotations

import pytest
import torch

import gradlab as gl
from gradlab.policies import softmax
from gradlab.rollout import Rollout
from gradlab.solvers import exact


def user_loss(rollout):
    """Something that is no estimator: k3 per token, times the response's length."""
    ratio = rollout.log_prob - rollout.reference_log_prob
    return ((torch.expm1(-ratio) + ratio) * rollout.mask).sum(-1) * rollout.lengths


@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("size", [7, 64])
def test_moments_in_parts_are_those_of_the_whole(monkeypatch, eos, off_policy, size):
    policy = gl.Tree.random(4, 4, seed=0, eos=eos)
    behaviour = policy.perturbed(kl=0.1, seed=2) if off_policy else None
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1), behaviour)
    losses = [
        *gl.ESTIMATORS.values(),
        gl.Estimator("k3", normalise="mean"),
        gl.Estimator("k2", "reward", "to_go", normalise="token_mean"),
        gl.Estimator("full", "reward", "return", "prefix", normalise="fixed"),
        gl.Estimator("k1", "reward", weight="token", clip=0.1, normalise="fixed"),
        user_loss,
    ]
    whole = exact.moments(losses, scenario)
    monkeypatch.setattr(exact, "WHOLE_RESPONSES", size)
    for one, part in zip(whole, exact.moments(losses, scenario), strict=True):
        scale = float(one.mean.norm()) + one.trace_cov**0.5
        torch.testing.assert_close(part.mean, one.mean, rtol=0, atol=1e-13 * scale)
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
    with pytest.raises(ValueError, match=r"has up to 4\^12 responses, more than the 8,388,608 that are visited"):
        exact.moments(gl.ESTIMATORS["k3-loss-sequence"], gl.Scenario(*[gl.Tree(torch.zeros((4**12 - 1) // 3, 4))] * 2))
    tree = gl.Tree.random(3, 3, seed=0)
    monkeypatch.setattr(exact, "WHOLE_RESPONSES", 8)
    monkeypatch.setattr(exact, "MOMENT_BYTES", 8 * 10 * 39 - 1)
    with pytest.raises(ValueError, match="the mean gradients of 2 estimators in 39 parameters take"):
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
