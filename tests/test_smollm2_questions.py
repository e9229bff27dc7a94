"""Digit tasks: questions with right answers, exact rewards, and steps that follow the policy gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradlab.policies import LanguageModel
from gradlab.policies.transformer import Transformer
from gradlab.questions import smollm2

LETTERS = "0123456789\n+-*="


@pytest.fixture(scope="module")
def asked():
    rng = np.random.default_rng(0)
    return [q for task in smollm2.TASKS for q in smollm2.questions(task, 2, rng, shots=1)]


@pytest.fixture(scope="module")
def policy(asked):
    """A network of random weights that reads the questions letter by letter."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    net = Transformer(len(LETTERS), 16, width=16, layers=1, heads=2).double()
    torch.random.set_rng_state(state)
    prompts = [[LETTERS.index(letter) for letter in q.prompt] for q in asked]
    return LanguageModel(net, prompts, smollm2.LENGTH, actions=range(len(smollm2.ACTIONS)), tolerance=1.0)


def test_questions_are_solved_examples_and_one_more():
    rng = np.random.default_rng(3)
    for task, (sign, _) in smollm2.TASKS.items():
        for q in smollm2.questions(task, 50, rng):
            *solved, last = q.prompt.split("\n")
            assert len(solved) == 4
            assert all(eval(line.split("=")[0]) == int(line.split("=")[1]) >= 0 for line in solved)
            assert last == q.line
            assert last.endswith("=")
            assert sign in last
            assert q.answer == f"{eval(last[:-1])}\n"[:2]
    with pytest.raises(ValueError, match="addition"):
        smollm2.questions("adition", 1, rng)


def test_listed_probabilities_and_rewards_are_those_of_single_responses(policy, asked):
    answers = [q.answer for q in asked]
    log_prob = smollm2.listed(policy)
    assert log_prob.shape == (len(asked), 121)
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(len(asked)).double(), rtol=0, atol=1e-12)
    found = smollm2.accuracy(policy, answers)
    for k, answer in enumerate(answers):
        tokens = torch.tensor([[smollm2.ACTIONS.index(letter) for letter in answer]])
        steps = policy.logits(torch.tensor([k]), tokens).log_softmax(-1)[0]
        assert float(found[k]) == pytest.approx(float(steps[range(2), tokens[0]].sum().exp()), rel=1e-10)
    assert smollm2.rewards(policy, answers).sum(1).tolist() == [1.0] * len(asked)


def test_steps_raise_the_reward_and_repeat(policy, asked):
    answers = [q.answer for q in asked]
    first = smollm2.reinforce(policy, answers, [0, 5, 40], seed=1, rate=1e-2)
    again = smollm2.reinforce(policy, answers, [5], seed=1, rate=1e-2)
    other = smollm2.reinforce(policy, answers, [5], seed=2, rate=1e-2)
    assert torch.equal(first[0], policy.parameters)
    assert torch.equal(first[5], again[5])
    assert not torch.equal(first[5], other[5])
    before, after = (float(smollm2.accuracy(policy.with_parameters(first[k]), answers).mean()) for k in (0, 40))
    assert after > 3 * before, (before, after)
    with pytest.raises(ValueError, match="as many answers"):
        smollm2.reinforce(policy, answers[:-1], [1])


def test_one_step_is_the_policy_gradient(policy, asked):
    """With many responses the first step of Adam, whose size is fixed, has the sign of the exact gradient."""
    answers = [q.answer for q in asked]
    theta = policy.parameters.clone().requires_grad_(True)
    log_prob = smollm2.listed(policy.with_parameters(theta))
    (exact,) = torch.autograd.grad((log_prob.exp() * smollm2.rewards(policy, answers)).sum(-1).mean(), theta)
    step = smollm2.reinforce(policy, answers, [1], seed=0, group=20_000, rate=1e-6)[1] - policy.parameters
    # Where the gradient is far from 0 its sign is not in doubt.
    large = exact.abs() > exact.abs().quantile(0.9)
    assert float((step.sign() == exact.sign())[large].double().mean()) > 0.99
