"""Digit tasks for a small language model: questions with one right answer, and a few real policy-gradient steps on them.

A question is a prompt of solved examples and one unsolved line, `2+3=5 … 2+6=`; its answer is spelled in the digits and the
newline, so that every response of a policy restricted to those can be listed and its reward is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradlab._common.names import check_name
from gradlab._common.streams import generator
from gradlab.policies import LanguageModel

#: What answers are spelled in: one token each for most tokenisers.
ACTIONS = (*"0123456789", "\n")
#: Longest answer, and the number of its tokens that a response holds.
LENGTH = 2

#: Operation → sign and result; operands are one digit each.
TASKS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "addition": ("+", lambda a, b: a + b),
    "subtraction": ("-", lambda a, b: a - b),
    "multiplication": ("*", lambda a, b: a * b),
}


@dataclass(frozen=True)
class Question:
    """A prompt, the first `LENGTH` tokens of its right answer (newline included), and the task it is from."""

    task: str
    prompt: str
    answer: str

    @property
    def line(self) -> str:
        """The unsolved line."""
        return self.prompt.rsplit("\n", 1)[-1]


def questions(task: str, count: int, rng: np.random.Generator, shots: int = 4) -> list[Question]:
    """Random questions with `shots` solved examples each; results are never negative. Raises `ValueError` for an unknown task."""
    check_name("task", task, TASKS)
    sign, result = TASKS[task]
    asked = []
    for _ in range(count):
        lines = []
        for _ in range(shots + 1):
            a, b = (int(x) for x in rng.integers(1, 10, size=2))
            a, b = (max(a, b), min(a, b)) if task == "subtraction" else (a, b)
            lines.append((f"{a}{sign}{b}=", str(result(a, b))))
        prompt = "".join(f"{left}{right}\n" for left, right in lines[:-1]) + lines[-1][0]
        asked.append(Question(task, prompt, f"{lines[-1][1]}\n"[:LENGTH]))
    return asked


def spelled(answers: Sequence[str]) -> Tensor:
    """Answers as positions in `ACTIONS`, `[n, LENGTH]`."""
    return torch.tensor([[ACTIONS.index(letter) for letter in answer] for answer in answers])


def listed(policy: LanguageModel) -> Tensor:
    """Log-probability of every response to every prompt, `[prompts, responses]`, in the order of `LanguageModel.enumerate`."""
    responses = policy.enumerate()
    log_prob = policy.family.log_prob(policy.table, policy.rows_of(responses), responses.tokens)
    return torch.where(responses.mask, log_prob, 0.0).sum(-1).view(len(policy.prompts), -1)


def rewards(policy: LanguageModel, answers: Sequence[str]) -> Tensor:
    """1 for the right response to each prompt and 0 for every other, `[prompts, responses]`."""
    tokens = policy.enumerate().tokens
    return (tokens.view(len(answers), -1, LENGTH) == spelled(answers)[:, None]).all(-1).double()


def accuracy(policy: LanguageModel, answers: Sequence[str]) -> Tensor:
    """Probability of the right answer to each prompt, `[prompts]`, exact."""
    with torch.no_grad():
        return (listed(policy).exp() * rewards(policy, answers)).sum(-1)


def reinforce(
    policy: LanguageModel, answers: Sequence[str], steps: Sequence[int], seed: int = 0, group: int = 16, rate: float = 1e-3
) -> dict[int, Tensor]:
    """Policy-gradient steps on the reward alone, from `policy`: its parameters `[p]` after each number of `steps`.

    Every step draws `group` responses to each prompt, weighs their scores with the reward less its leave-one-out mean (RLOO, arXiv
    2402.14740) and takes a step of Adam. Draws invert the distribution over all listed responses. Raises `ValueError` unless there
    is an answer to each prompt.
    """
    if len(answers) != len(policy.prompts):
        raise ValueError(f"{len(policy.prompts)} prompts need as many answers, got {len(answers)}")
    rng = generator(seed, "smollm2.reinforce")
    theta = policy.parameters.detach().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([theta], lr=rate)
    reward = rewards(policy, answers)
    reward_history = {0: theta.detach().clone()} if 0 in steps else {}
    for step in range(1, max(steps) + 1):
        with torch.enable_grad():
            log_prob = listed(policy.with_parameters(theta))
            uniforms = torch.from_numpy(rng.random((len(answers), group)))
            cdf = log_prob.detach().exp().cumsum(-1)
            sampled = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
            got = reward.gather(1, sampled)
            advantage = got - (got.sum(1, keepdim=True) - got) / (group - 1)
            loss = -(advantage * log_prob.gather(1, sampled)).mean()
            (theta.grad,) = torch.autograd.grad(loss, theta)
        optimiser.step()
        if step in steps:
            reward_history[step] = theta.detach().clone()
    return reward_history
