"""Sampled moments: streamed in batches, with common random numbers across estimators and memory that does not grow.

Where the responses can be listed, the draws are counted: multinomial counts have the same distribution as drawing one by
one, at a cost independent of the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import lcm
from typing import overload

import numpy as np
import torch
from torch import Tensor

from gradlab import backprop
from gradlab.draws import generator
from gradlab.estimators import Estimator
from gradlab.moments import Gradients, Loss, Moments, as_losses, gradients
from gradlab.names import check_whole, is_several
from gradlab.policies import Gaussian, LanguageModel
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, check_scenario

#: Batches of one run; the error bars come from their spread.
BATCHES = 64
#: Draws are counted where the policy has at most this many responses.
COUNTED_RESPONSES = 2**15
#: Doubles held at a time for one chunk of drawn responses.
CHUNK = 2**19
#: Doubles that the batch means of a language model may take together; it gets fewer batches when it has more parameters.
BATCH_MEANS = 2**25


@overload
def moments(
    estimator: Loss, scenario: Scenario, samples: int = ..., seed: int = ..., *, stream: tuple[int, ...] = ...
) -> Moments: ...
@overload
def moments(
    estimator: Iterable[Loss], scenario: Scenario, samples: int = ..., seed: int = ..., *, stream: tuple[int, ...] = ...
) -> list[Moments]: ...
def moments(
    estimator: Loss | Iterable[Loss],
    scenario: Scenario,
    samples: int = 10_000,
    seed: int = 0,
    *,
    stream: tuple[int, ...] = (),
) -> Moments | list[Moments]:
    """Mean gradient and covariance trace from `samples` responses of the sampler, for one estimator or several.

    All estimators see the same responses, except that group baselines, which need single draws rather than counts, have a
    run of their own. `trace_cov` is the unbiased sample covariance; `batch_means` and `batch_traces` feed
    `gradlab.intervals`. The same `seed` (and `stream`, which tells runs of one seed apart) gives the same bytes. Memory
    depends on the policy, not on `samples`. Raises `ValueError` when `samples` is not a positive whole number, or not a
    multiple of a group size.
    """
    losses = as_losses(estimator)
    check_scenario(scenario)
    check_samples(samples)
    found: dict[int, Moments] = {}
    grouped = {e for e, loss in enumerate(losses) if isinstance(loss, Estimator) and loss.grouped}
    for chosen in (sorted(grouped), [e for e in range(len(losses)) if e not in grouped]):
        if chosen:
            run = _run([losses[e] for e in chosen], scenario, samples, seed, stream)
            found.update(zip(chosen, run, strict=True))
    return [found[e] for e in range(len(losses))] if is_several(estimator) else found[0]


def replicates(estimator: Loss, scenario: Scenario, samples: int, replicates: int, seed: int = 0) -> Tensor:
    """Mean gradients `[replicates, p]` of independent runs of `samples` responses each, by multinomial counts.

    The cost does not depend on `samples`. Raises `ValueError` when the responses cannot be listed, for a group baseline,
    and unless both numbers are positive.
    """
    check_scenario(scenario)
    check_samples(samples)
    check_samples(replicates, "replicates")
    if not _countable(scenario) or (isinstance(estimator, Estimator) and estimator.grouped):
        raise ValueError(
            f"replicates() counts draws, for which {scenario.label} would need a list of at most {COUNTED_RESPONSES} "
            "responses and the estimator must treat responses one by one; call moments() with different seeds instead"
        )
    with torch.no_grad():
        rollout = Rollout.enumerated(scenario)
        batch = gradients([estimator], rollout)
        weights = rollout.counted(samples, replicates, _rng(seed, ()))
        return torch.stack([batch.mean(weight)[0] for weight in weights])


def _run(losses: Sequence[Loss], scenario: Scenario, samples: int, seed: int, stream: tuple[int, ...]) -> list[Moments]:
    """Batch by batch: sums of gradients and of squared norms over units, a unit being a response or a group of them."""
    sizes = [loss.group or 1 if isinstance(loss, Estimator) else 1 for loss in losses]
    unit = lcm(*sizes)
    if samples % unit:
        raise ValueError(f"samples must be a multiple of the group size {unit} of the estimators, got {samples}")
    units = samples // unit
    # Batches of one where two each would be too few; at least 8 of nearly equal size otherwise.
    most = BATCHES
    if isinstance(scenario.policy, LanguageModel):
        most = min(most, BATCH_MEANS // (len(losses) * len(scenario.policy.parameters)))
    batches = max(8, min(most, units // 16)) if units >= 16 else units
    shares = [unit * len(part) for part in np.array_split(np.empty(units), batches)]
    counted = _countable(scenario) and unit == 1
    with torch.no_grad():
        if counted:
            listed = gradients(losses, Rollout.enumerated(scenario))
            parts = [_counted(listed, n, _rng(seed, (*stream, b))) for b, n in enumerate(shares)]
        else:
            drawn = _answered if isinstance(scenario.policy, LanguageModel) else _drawn
            parts = [drawn(losses, scenario, n, sizes, unit, _rng(seed, (*stream, b))) for b, n in enumerate(shares)]
    sums, squares = (torch.stack([part[side] for part in parts]) for side in (0, 1))
    group, share = torch.tensor(sizes, dtype=torch.float64), torch.tensor(shares, dtype=torch.float64)
    batch_traces = _trace(sums, squares, share[:, None] / group, group)
    mean, trace = sums.sum(0) * (group / samples)[:, None], _trace(sums.sum(0), squares.sum(0), samples / group, group)
    batch_means = sums * (group / share[:, None])[..., None]
    enough = min(shares) > unit
    method = "counted" if counted else "drawn"
    return [
        Moments(mean[e], float(trace[e]), samples, batch_means[:, e], batch_traces[:, e] if enough else None, method)
        for e in range(len(losses))
    ]


def _trace(sums: Tensor, squares: Tensor, units: Tensor, group: Tensor) -> Tensor:
    """Unbiased covariance trace per response from sums over units: `group · (Σ‖u‖² − ‖Σu‖²/k) / (k − 1)`, NaN for one."""
    found = (group * (squares - sums.square().sum(-1) / units) / (units - 1)).clamp(min=0)
    return torch.where(units > 1, found, torch.nan)


def _counted(listed: Gradients, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    weight = listed.rollout.counted(n, 1, rng)[0] * n
    return listed.mean(weight), listed.square(weight)


def _drawn(
    losses: Sequence[Loss], scenario: Scenario, n: int, sizes: list[int], unit: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Sums over the units of one batch, a chunk at a time."""
    policy = scenario.policy
    assert not isinstance(policy, LanguageModel)
    r, v = policy.table.shape
    # Single steps take length · v doubles a response, whole gradients (where steps share rows, and in groups) take r · v.
    per_response = max(policy.length * v, r * v if policy.revisits or unit > 1 else 0)
    chunk = max(1, CHUNK // (per_response * unit)) * unit
    sums = torch.zeros(len(losses), r * v, dtype=torch.float64)
    squares = torch.zeros(len(losses), dtype=torch.float64)
    for start in range(0, n, chunk):
        batch = gradients(losses, Rollout.drawn(scenario, min(chunk, n - start), rng))
        if unit == 1:
            ones = torch.ones_like(batch.rollout.weight)
            sums += batch.mean(ones)
            squares += batch.square(ones)
            continue
        for e, size in enumerate(sizes):
            averages = batch.tables(e).flatten(1).view(-1, size, r * v).mean(1)
            sums[e] += averages.sum(0)
            squares[e] += averages.square().sum()
    return sums, squares


def kl(scenario: Scenario, samples: int, seed: int = 0) -> float:
    """Estimate of `KL(policy ‖ reference)` of a language model's whole responses, nats: `Σ_t w_{<t} KL_t` from `samples` responses."""
    return _divergence(scenario, samples, seed)


def lag(scenario: Scenario, samples: int, seed: int = 0) -> float:
    """Estimate of `KL(behaviour ‖ policy)` of a language model's whole responses, nats, from `samples` responses; 0 on-policy."""
    return 0.0 if scenario.behaviour is None else _divergence(Scenario(scenario.behaviour, scenario.policy), samples, seed)


def _divergence(scenario: Scenario, samples: int, seed: int) -> float:
    """Rao–Blackwellised: the step's whole distribution counts, only prefixes are drawn."""
    policy, sampler = scenario.policy, scenario.sampler
    if not isinstance(policy, LanguageModel) or not isinstance(sampler, LanguageModel):
        raise ValueError(f"{scenario.label} has exact distances: scenario.kl() and scenario.lag()")
    check_samples(samples)
    prompts, tokens, mask = sampler.sample(samples, _rng(seed, (1,)))
    total, chunk = 0.0, max(1, 8 * CHUNK // (policy.length * policy.vocab))
    for part in (slice(start, start + chunk) for start in range(0, samples, chunk)):
        share = torch.full((len(tokens[part]),), 1 / len(tokens[part]), dtype=torch.float64)
        rollout = Rollout.answered(scenario, prompts[part], tokens[part], mask[part], share)
        before = (rollout.log_weight.cumsum(-1) - rollout.log_weight).exp()
        total += float((before * rollout.divergence("full")).sum())
    return total / samples


def _answered(
    losses: Sequence[Loss], scenario: Scenario, n: int, sizes: list[int], unit: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Sums over the units of one batch of a language model's answers; a unit answers one prompt."""
    policy, sampler = scenario.policy, scenario.sampler
    assert isinstance(policy, LanguageModel)
    assert isinstance(sampler, LanguageModel)
    prompts, tokens, mask = sampler.sample(n, rng, unit)
    length = float(mask.sum()) / n
    chunk = max(1, 8 * CHUNK // (policy.length * policy.vocab * unit)) * unit
    sums = torch.zeros(len(losses), len(policy.parameters), dtype=torch.float64)
    squares = torch.zeros(len(losses), dtype=torch.float64)
    for part in (slice(start, start + chunk) for start in range(0, n, chunk)):
        ones = torch.ones(len(tokens[part]), dtype=torch.float64)
        rollout = Rollout.answered(scenario, prompts[part], tokens[part], mask[part], ones / len(ones), length)
        for size in sorted(set(sizes)):
            chosen = [e for e, own in enumerate(sizes) if own == size]
            found = backprop.pull(policy, gradients([losses[e] for e in chosen], rollout), ones / size, unit=size)
            sums[chosen] += found.total
            squares[chosen] += found.square.sum(0) / size**2
    return sums, squares


def _countable(scenario: Scenario) -> bool:
    policy = scenario.policy
    # Each count of a language model's responses would cost a pass over all of them.
    return (
        not isinstance(policy, Gaussian | LanguageModel)
        and policy.enumerable
        and policy.vocab**policy.length <= COUNTED_RESPONSES
    )


def _rng(seed: int, key: tuple[int, ...]) -> np.random.Generator:
    return generator(seed, 2, *key)


def check_samples(samples: int, what: str = "samples") -> None:
    """Raise `ValueError` unless `samples` is a positive whole number."""
    check_whole(what, samples)
