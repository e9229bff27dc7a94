"""Rewards: functions from a rollout to one number per response, or per token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradlab._common.arguments import checked
from gradlab._common.names import check_name
from gradlab.policies import Gaussian, LanguageModel, Policy, Tabular
from gradlab.policies.small import TASKS

if TYPE_CHECKING:
    from gradlab.rollout import Rollout

#: Rewards of the responses of a rollout: one per response `[n]`, or one per token `[n, t]`.
Reward = Callable[["Rollout"], Tensor]


def rewards_of(reward: Reward, rollout: Rollout) -> Tensor:
    """The rewards of a rollout, `[n]` or `[n, t]` with 0 behind the end of a response, float64.

    Raises `ValueError` unless the function gives one finite number per response or per token.
    """
    rewards = reward(rollout)
    n, t = rollout.tokens.shape
    if not isinstance(rewards, Tensor) or rewards.shape not in ((n,), (n, t)):
        shape = list(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(
            f"a reward gives one finite number per response, a tensor [{n}], or per token, [{n}, {t}], got {shape}; "
            "a scalar or a column [n, 1] usually misses a sum over tokens or a squeeze"
        )
    rewards = rewards.detach().double()
    if rewards.dim() == 2:
        rewards = torch.where(rollout.mask, rewards, 0.0)
    if not bool(torch.isfinite(rewards).all()):
        bad = torch.nonzero(~torch.isfinite(rewards))[0].tolist()
        raise ValueError(
            f"a reward gives one finite number per response or per token, got {rewards[tuple(bad)].item()} for response {bad[0]}; "
            "a reward model's overflow or the logarithm of 0 usually stands behind it"
        )
    return rewards


def given_reward(reward: Reward | None) -> Reward:
    """The reward of a scenario. Raises `ValueError` where there is none."""
    if reward is None:
        raise ValueError(
            "the scenario has no reward; give one, gl.Scenario(…, reward=fn) with fn a function of a rollout that gives one number per "
            "response, e.g. lambda rollout: (rollout.tokens[:, 0] == 2).double()"
        )
    return reward


@dataclass(frozen=True, eq=False)
class TableReward:
    """What each token earns in each context: a table with the shape of the policy's, `r(y) = Σ_t table[context_t, y_t]`.

    A reward per token, `[n, t]` of a rollout. Expected rewards are exact even on a `Markov` chain of any length, as the KL is.
    Raises `ValueError` for a Gaussian or a language model, another shape, and numbers that are not finite.

    >>> import gradlab as gl
    >>> policy = gl.Bandit([0.0, 0.0, 0.0])
    >>> scenario = gl.Scenario(policy, reference=policy, reward=gl.TableReward(policy, [1.0, 0.0, 0.0]))
    >>> round(gl.exact.objective("reward", scenario), 3)  # an objective to descend: −E r
    -0.333
    """

    policy: Tabular
    table: Tensor

    def __init__(self, policy: Policy, table: Tensor | Iterable[Any]) -> None:
        if isinstance(policy, Gaussian | LanguageModel):
            raise ValueError(f"a {type(policy).__name__} has no table of tokens; give a function of a rollout as reward")
        if not isinstance(policy, Tabular):
            raise ValueError(f"policy must be a table of logits such as gl.Tree, got {policy!r:.60}")
        try:
            given = torch.as_tensor(table, dtype=torch.float64)
        except (TypeError, ValueError):
            raise ValueError(f"a table of rewards is an array of numbers, got {table!r:.60}") from None
        rows, v = policy.table.shape
        if given.shape != (rows, v) and not (rows == 1 and given.shape == (v,)):
            raise ValueError(f"a table of rewards has the shape of the policy's, [{rows}, {v}], got {list(given.shape)}")
        if not bool(torch.isfinite(given).all()):
            raise ValueError("a table of rewards holds NaN or infinite numbers")
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "table", given.reshape(rows, v))

    def __call__(self, rollout: Rollout) -> Tensor:
        """The reward of every token, `[n, t]`."""
        return self.table[self.policy.contexts(rollout.tokens), rollout.tokens]


@checked
def task_reward(task: str, policy: LanguageModel) -> Reward:
    """The verifiable reward of a task that ships (see `gl.policies.small`) for this policy's prompts: 1 for a solution, else 0.

    Raises `ValueError` for an unknown task.

    >>> policy = gl.policies.small("names")
    >>> reward = gl.training.task_reward("names", policy)
    >>> scenario = gl.Scenario(policy, policy)
    >>> sorted(set(reward(gl.language.rollout_of(scenario, 64)).tolist()))
    [0.0, 1.0]
    """
    check_name("task", task, TASKS)
    return partial(_solved, task, policy)


def _solved(task: str, policy: LanguageModel, rollout: Rollout) -> Tensor:
    return TASKS[task].reward(policy, rollout.responses)
