"""Optimisation runs: the same policy, reward and draws under each regulariser.

A run is REINFORCE with the mean of the other responses of a group as baseline; with several epochs per batch the ratio to the
policy that drew the data comes in, clipped as PPO clips it. A regulariser is added with its coefficient β:
`g = −Σ_t min-clipped ρ_t A ∇log π_t + β ∇(surrogate)`. What it puts into the reward is worked out once per batch, at the policy
that drew it, and takes part in ratio and clipping like the reward does; what it puts into the loss is worked out anew at every
step. That is how frameworks do it, and with one epoch it is the estimator as it stands in the catalogue.

Source: REINFORCE leave-one-out, Ahmadian et al., arXiv 2402.14740; clipping, Schulman et al., arXiv 1707.06347.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from gradlab._common.names import check_jobs, check_real, check_seed, check_whole, several
from gradlab._common.parallel import spread
from gradlab._common.provenance import versions
from gradlab._common.streams import generator
from gradlab.estimators.coefficients import coefficients
from gradlab.estimators.estimator import Estimator
from gradlab.measure import by_name, one_thread
from gradlab.moments import Gradients, Loss, cotangent, gradients
from gradlab.per_sample import backprop
from gradlab.policies import LanguageModel, Policy
from gradlab.recipe import Recipe
from gradlab.rewards import Reward, rewards_of
from gradlab.rewards import task_reward as task_reward
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, is_of

#: The run without a regulariser, in frames.
NONE = "none"

COLUMNS: dict[str, str] = {
    "estimator": "regulariser by its catalogue name, or none",
    "coefficient": "β, nats of the regulariser against units of the reward; 0 without one",
    "epochs": "optimiser steps per batch",
    "seed": "number of the run; runs of one number share their draws",
    "step": "batches so far",
    "reward": "mean reward of fresh responses",
    "kl": "KL(policy ‖ reference) of whole responses, nats: exact, or summed over the vocabulary at drawn prefixes",
    "length": "mean number of tokens of a response",
    "trace_cov": "tr Cov of a response's gradient with its group's baseline, squared units of the gradient",
    "trace_cov_none": "the same at the same policy and responses without the regulariser",
    "diverged": "whether a parameter is not finite any more, or a token has probability 0; what is measured is missing from there on",
}


def train(
    policy: Policy,
    reward: Reward,
    regularisers: Loss | str | Iterable[Loss | str] | Mapping[str, Loss],
    coefficients: float | Iterable[float] = 0.1,
    *,
    reference: Policy | None = None,
    recipe: Recipe | None = None,
    seeds: int = 4,
    seed: int = 0,
    jobs: int = 1,
) -> pd.DataFrame:
    """Train a policy under each regulariser, with each coefficient, from each of `seeds` streams, and once without any.

    reward: maps a rollout to one reward per response, `[n]`, e.g. `lambda rollout: (rollout.tokens[:, 0] == 2).double()`; for a
    task that ships, `gl.training.task_reward("names", policy)`. reference: by default the policy as given. seed: entropy of all draws; runs
    of one number share their random streams, so that comparisons between regularisers are paired.
    Returns one row per run and look, see `COLUMNS`; the same bytes for any `jobs`. A run that diverges is marked and the others go on.
    Raises `ValueError` for a reward or a regulariser that does not give one finite number per response, for group baselines
    (groups are the recipe's), and for coefficients that are negative or not finite.

    >>> recipe = gl.training.Recipe(steps=4, eval_every=2)
    >>> policy = gl.Tree.random(vocab=3, length=2, seed=0)
    >>> frame = gl.train(policy, lambda rollout: (rollout.tokens[:, 0] == 2).double(), "k2-loss", recipe=recipe, seeds=2)
    >>> frame.groupby("estimator").size().to_dict()
    {'k2-loss': 6, 'none': 6}
    """
    recipe = recipe or Recipe()
    named = by_name(regularisers)
    grouped = [name for name, loss in named.items() if isinstance(loss, Estimator) and loss.grouped]
    if grouped:
        raise ValueError(f"a recipe has its own groups; regularisers with a group baseline cannot be trained with: {grouped}")
    for size in (sizes := several(coefficients)):
        check_real("a coefficient", size)
    sizes = [float(size) for size in sizes]
    if not sizes or not all(np.isfinite(size) and size >= 0 for size in sizes):
        raise ValueError(f"coefficients must be numbers from 0 on, got {sizes}")
    check_whole("seeds", seeds)
    check_seed(seed)
    check_jobs(jobs)
    if not callable(reward):
        raise ValueError(f"reward must be a function of a rollout that returns one reward per response, got {reward!r}")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe must be a gl.training.Recipe, got {recipe!r}")
    runs: list[tuple[str, Loss | None, float]] = [(NONE, None, 0.0)]
    runs += [(name, loss, size) for (name, loss), size in product(named.items(), sizes)]
    start = Scenario(policy, reference or policy, name="start")
    numbered_runs = list(product(runs, range(seeds)))
    tasks = (
        joblib.delayed(_run)(start, reward, name, loss, size, recipe, seed, number)
        for (name, loss, size), number in tqdm(numbered_runs, desc="train", unit="run", disable=None, delay=2)
    )
    rows = [row for part in spread(tasks, jobs) for row in part]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.attrs.update(seed=seed, **versions())
    return frame


# ---- one run ------------------------------------------------------------------------------------------------------------


def _run(
    start: Scenario, reward: Reward, name: str, loss: Loss | None, coefficient: float, recipe: Recipe, seed: int, number: int
) -> list[dict[str, Any]]:
    """Rows of one run. Draws of batches and of looks have streams of their own, so that looking changes nothing."""
    batch_rng, evaluation_rng = (generator(seed, "training", number, k) for k in (0, 1))
    rows = []
    with one_thread():
        for step, scenario in _steps(start, reward, loss, coefficient, recipe, batch_rng):
            if step % recipe.eval_every and step != recipe.steps:
                continue
            run = {"estimator": name, "coefficient": coefficient, "epochs": recipe.epochs, "seed": number, "step": step}
            evaluation = {} if scenario is None else _evaluate(scenario, reward, loss, coefficient, recipe, evaluation_rng)
            rows.append({**run, **evaluation, "diverged": scenario is None})
    return rows


def _steps(
    start: Scenario, reward: Reward, loss: Loss | None, coefficient: float, recipe: Recipe, rng: np.random.Generator
) -> Iterator[tuple[int, Scenario | None]]:
    """The policy before the first batch and after every one; `None` from where it diverged."""
    theta = start.policy.parameters.detach().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([theta], lr=recipe.rate)
    scenario = start
    yield 0, scenario
    for step in range(1, recipe.steps + 1):
        sampled = _sample(scenario, recipe.batch, recipe.group, rng)
        advantages = _advantages(_rewards(sampled, reward), recipe.group)
        reward_penalty = _penalty_in_reward(loss, sampled)
        behaviour = scenario.policy
        for epoch in range(recipe.epochs):
            rollout = sampled if epoch == 0 else _reevaluate(replace(scenario, behaviour=behaviour), sampled)
            batch = _gradients(rollout, advantages, loss, coefficient, reward_penalty, recipe.clip)
            with torch.no_grad():
                theta.grad = _mean(scenario.policy, batch).to(theta)
            optimiser.step()
            stepped = _with_parameters(scenario, theta.detach().clone())
            if stepped is None:
                yield from ((remaining, None) for remaining in range(step, recipe.steps + 1))
                return
            scenario = stepped
        yield step, scenario


def _with_parameters(scenario: Scenario, theta: Tensor) -> Scenario | None:
    """The scenario with the policy's parameters after a step, or `None` where nothing can be computed with them."""
    if not np.isfinite(float(theta.sum())):
        return None
    try:
        return replace(scenario, policy=scenario.policy.with_parameters(theta))
    except ValueError:  # the policy has lost support: it is what the step changes
        return None


def _evaluate(
    scenario: Scenario, reward: Reward, loss: Loss | None, coefficient: float, recipe: Recipe, rng: np.random.Generator
) -> dict[str, float]:
    rollout = _sample(scenario, recipe.eval_responses, recipe.group, rng)
    rewards, reward_penalty = _rewards(rollout, reward), _penalty_in_reward(loss, rollout)
    advantages = _advantages(rewards, recipe.group)
    return {
        "reward": float(rewards.mean()),
        "kl": scenario.kl() if not is_of(scenario, LanguageModel) else float(rollout.divergence("full").sum(-1).mean()),
        "length": float(rollout.lengths.mean()),
        **{
            column: _trace(
                scenario.policy, _gradients(rollout, advantages, loss, size, reward_penalty, recipe.clip), recipe.group
            )
            for column, size in (("trace_cov", coefficient), ("trace_cov_none", 0.0))
        },
    }


def _sample(scenario: Scenario, n: int, group: int, rng: np.random.Generator) -> Rollout:
    """`n` responses of the policy itself, in groups to one prompt."""
    return Rollout.from_sampler(scenario, n, rng, group)


def _reevaluate(scenario: Scenario, sampled: Rollout) -> Rollout:
    """The same responses at the policy as it is by now."""
    if is_of(scenario, LanguageModel):
        return Rollout.from_responses(scenario, sampled.responses, sampled.weight)
    policy, behaviour = scenario.policy.table.detach(), scenario.sampler.table.detach()
    return replace(sampled, table=policy, behaviour_table=behaviour)


def _rewards(rollout: Rollout, reward: Reward) -> Tensor:
    values = rewards_of(reward, rollout)
    if values.dim() != 1:
        raise ValueError(
            f"a run compares whole responses: a reward gives one number for each, [{len(values)}], got {list(values.shape)}"
        )
    return values


def _advantages(rewards: Tensor, group: int) -> Tensor:
    """Reward less the mean of the other responses of the group, `[n]`."""
    rewards = rewards.view(-1, group)
    return (rewards - rewards.mean(1, keepdim=True)).flatten() * group / (group - 1)


def _penalty_in_reward(loss: Loss | None, rollout: Rollout) -> Tensor | None:
    """What a regulariser puts into the reward of every token, `[n, t]`, at the policy that drew the data."""
    if not isinstance(loss, Estimator) or loss.placement not in ("reward", "loss+reward"):
        return None
    # There the ratio is 1; at later steps the recipe's own takes its place.
    plain = replace(loss, placement="reward", weight="none", clip=None, truncate=None, differentiate_weight=False)
    return coefficients(plain, rollout).score


def _gradients(
    rollout: Rollout, advantages: Tensor, loss: Loss | None, coefficient: float, reward_penalty: Tensor | None, clip: float
) -> Gradients:
    """Gradients of every response, with the recipe's clipped ratio on all that is in the reward."""
    advantage = advantages[:, None] * rollout.mask_float
    if reward_penalty is not None:
        advantage = advantage - coefficient * reward_penalty
    ratio = rollout.log_weight.exp()
    clipped = ((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip))
    score = -torch.where(clipped, 0.0, ratio * advantage)[None]
    if loss is None or (isinstance(loss, Estimator) and loss.placement == "reward"):
        return Gradients(rollout, score)
    if not isinstance(loss, Estimator):
        cotangents = coefficient * cotangent(loss, rollout) + cotangent(
            lambda leaf: (score[0] * leaf.log_prob).sum(-1), rollout
        )
        return Gradients(rollout, torch.zeros_like(score), cotangents={0: cotangents})
    in_loss = replace(loss, placement="loss", credit="token") if loss.placement == "loss+reward" else loss
    loss_gradients = gradients([in_loss], rollout)
    direct = tuple(
        (losses, coefficient * coefficients_of_kernel, slope) for losses, coefficients_of_kernel, slope in loss_gradients.direct
    )
    return Gradients(rollout, score + coefficient * loss_gradients.score, direct)


def _mean(policy: Policy, batch: Gradients) -> Tensor:
    """The mean gradient of the batch, `[p]`."""
    weight = batch.rollout.weight
    return (backprop.pullback(policy, batch, weight).total if isinstance(policy, LanguageModel) else batch.mean(weight))[0]


def _trace(policy: Policy, batch: Gradients, group: int) -> float:
    """`G · tr Cov` of a group's mean gradient, unbiased, from the groups of a batch."""
    groups = len(batch.rollout.weight) // group
    if isinstance(policy, LanguageModel):
        moments = backprop.pullback(policy, batch, batch.rollout.weight, unit=group)
        second, mean = float(moments.square[:, 0].mean()) / group**2, moments.total[0]
    else:
        group_weights = torch.eye(groups, dtype=torch.float64).repeat_interleave(group, 1) / group
        means = torch.cat([batch.mean(weight) for weight in group_weights])
        second, mean = float(means.square().sum(-1).mean()), means.mean(0)
    return group * (second - float(mean @ mean)) * groups / (groups - 1) if groups > 1 else float("nan")
