"""Sampled moments: streamed in batches, with common random numbers across estimators and memory that does not grow.

Where the responses can be listed, the draws are counted: multinomial counts have the same distribution as drawing one by
one, at a cost independent of the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import lcm
from typing import cast, overload

import numpy as np
import torch
from torch import Tensor

from gradlab._common.arguments import checked
from gradlab._common.names import check_whole, is_several
from gradlab._common.streams import generator
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.policy_loss import PolicyLoss, fixed
from gradlab.moments import Loss, Moments, as_losses, gradients, is_grouped, unit_of
from gradlab.per_sample import backprop
from gradlab.policies import Gaussian, LanguageModel, Tabular
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, check_scenario, is_of
from gradlab.sums import Sums, added

#: Batches of one run; the error bars come from their spread.
BATCHES = 64
#: Draws are counted where the policy has at most this many responses.
COUNTED_RESPONSES = 2**15
#: Responses that a batch's mean and standard deviation are taken from at most, where they cannot be computed.
PILOT = 4096
#: Tokens of one run that are drawn one by one: hours of work. Those of a language model take longer, and its batches are held.
DRAWN_TOKENS, ANSWERED_TOKENS = 2**34, 2**27
#: Doubles of logits that are drawn from at once.
DRAWN = 2**19
#: Doubles held at a time for one block of drawn responses.
CHUNK = 2**22
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
    multiple of a group size, and when so many would have to be drawn one by one that it takes days.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1]))
    >>> moments = gl.montecarlo.moments(gl.ESTIMATORS["k1-loss"], scenario, samples=10_000)
    >>> moments.samples, bool(moments.mean.abs().max() < 0.05)
    (10000, True)
    """
    losses = as_losses(estimator)
    check_scenario(scenario)
    check_samples(samples)
    by_loss: dict[int, Moments] = {}
    losses = _with_constants(losses, scenario, samples, seed)
    grouped = {e for e, loss in enumerate(losses) if is_grouped(loss)}
    if is_of(scenario, LanguageModel) and any(isinstance(loss, PolicyLoss) for loss in losses):
        grouped = set(range(len(losses)))  # one run, so that a target that is estimated has the same draws
    for together in (sorted(grouped), [e for e in range(len(losses)) if e not in grouped]):
        if together:
            run = _run([losses[e] for e in together], scenario, samples, seed, stream)
            by_loss.update(zip(together, run, strict=True))
    return [by_loss[e] for e in range(len(losses))] if is_several(estimator) else by_loss[0]


def _with_constants(losses: Sequence[Loss], scenario: Scenario, samples: int, seed: int = 0) -> list[Loss]:
    """The losses, those that divide by a batch's spread with that of a large one.

    Exact where the responses can be listed; otherwise from as many responses as are measured, at most `PILOT`, that are drawn apart.
    """
    if not any(isinstance(loss, PolicyLoss) and loss.batch and loss.constants is None for loss in losses):
        return list(losses)
    with torch.no_grad():
        listed = is_of(scenario, Gaussian) or scenario.policy.enumerable
        rollout = (
            Rollout.enumerated(scenario) if listed else Rollout.from_sampler(scenario, min(samples, PILOT), _rng(seed, (2,)))
        )
        return [fixed(loss, rollout) if isinstance(loss, PolicyLoss) else loss for loss in losses]


def replicates(estimator: Loss, scenario: Scenario, samples: int, replicates: int, seed: int = 0) -> Tensor:
    """Mean gradients `[replicates, p]` of independent runs of `samples` responses each, by multinomial counts.

    The cost does not depend on `samples`. Raises `ValueError` when the responses cannot be listed, for a group baseline,
    and unless both numbers are positive.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1]))
    >>> means = gl.montecarlo.replicates(gl.ESTIMATORS["k1-loss"], scenario, samples=1_000_000, replicates=100)
    >>> means.shape, bool(means.abs().max() < 0.01)
    (torch.Size([100, 2]), True)
    """
    check_scenario(scenario)
    check_samples(samples)
    check_samples(replicates, "replicates")
    (estimator,) = as_losses(estimator)
    if not _countable(scenario) or is_grouped(estimator):
        raise ValueError(
            f"replicates() counts draws, for which {scenario.label} would need a list of at most {COUNTED_RESPONSES} "
            "responses and the estimator must treat responses one by one; call moments() with different seeds instead"
        )
    with torch.no_grad():
        rollout = Rollout.enumerated(scenario)
        batch = gradients([estimator], rollout)
        weights = rollout.multinomial_weights(samples, replicates, _rng(seed, ()))
        return torch.stack([batch.mean(weight)[0] for weight in weights])


def _run(losses: Sequence[Loss], scenario: Scenario, samples: int, seed: int, stream: tuple[int, ...]) -> list[Moments]:
    """Moments over units, a unit being a response or a group of them: `u` is the average gradient of one."""
    sizes = [unit_of(loss) for loss in losses]
    unit = lcm(*sizes)
    if samples % unit:
        raise ValueError(f"samples must be a multiple of the group size {unit} of the estimators, got {samples}")
    by_counts = unit == 1 and _countable(scenario)
    if not by_counts:
        _check_drawn(samples, scenario)
    units = samples // unit
    # Batches of one where two each would be too few; at least 8 of nearly equal size otherwise.
    max_batches = BATCHES
    if is_of(scenario, LanguageModel):
        max_batches = min(max_batches, BATCH_MEANS // (len(losses) * len(scenario.policy.parameters)))
    batches = max(8, min(max_batches, units // 16)) if units >= 16 else units
    shares = [unit * share for share in shared(units, batches)]
    rngs = [_rng(seed, (*stream, b)) for b in range(batches)]
    means: Tensor | Sums
    apart: tuple[float, float] | None = None
    with torch.no_grad():
        if by_counts:
            means, squares = _batch_of_counts(losses, scenario, shares, rngs)
        elif is_of(scenario, LanguageModel):
            parts = [_batch_of_lm(losses, scenario, n, sizes, unit, rng) for n, rng in zip(shares, rngs, strict=True)]
            means, squares = (torch.stack([part[side] for part in parts], 1) for side in (0, 1))
            near, far = (torch.stack([part[2] for part in parts]).sum(0) / samples).tolist()
            apart = near, far
        else:
            tables = cast("Scenario[Tabular | Gaussian]", scenario)
            means, squares = _batch_of_table(losses, tables, shares, sizes, unit, rngs)
        group, share = torch.tensor(sizes, dtype=torch.float64)[:, None], torch.tensor(shares, dtype=torch.float64)
        if isinstance(means, Sums):
            mean, norms = means.weighted(share / samples), means.squares()
        else:
            mean, norms = list(torch.einsum("ebp,b->ep", means, share / samples)), means.square().sum(-1)
        batch_traces = _trace(norms, squares, share / group, group)
        whole = torch.stack([each @ each for each in mean])[:, None]
        trace = _trace(whole, squares.sum(-1, keepdim=True), samples / group, group)
    has_traces = min(shares) > unit
    method = "counted" if by_counts else "drawn"
    return [
        Moments(
            mean[e], float(trace[e]), samples, means.only(e) if isinstance(means, Sums) else means[e],
            batch_traces[e] if has_traces else None, method, apart,
        )
        for e in range(len(losses))
    ]  # fmt: skip


@checked
def shared(samples: int, batches: int) -> list[int]:
    """Sizes of batches that differ by at most one, the larger ones first.

    >>> gl.montecarlo.shared(10, 4)
    [3, 3, 2, 2]
    """
    check_whole("batches", batches)
    check_whole("samples", samples, least=0)
    return [samples // batches + (b < samples % batches) for b in range(batches)]


def _trace(norms: Tensor, squares: Tensor, units: Tensor, group: Tensor) -> Tensor:
    """Unbiased covariance trace per response: `group · (Σ‖u‖² − k‖mean‖²) / (k − 1)` over `k` units, NaN for one."""
    trace = (group * (squares - units * norms) / (units - 1)).clamp(min=0)
    return torch.where(units > 1, trace, torch.nan)


def _batch_of_counts(
    losses: Sequence[Loss], scenario: Scenario, shares: list[int], rngs: list[np.random.Generator]
) -> tuple[Tensor, Tensor]:
    """Means `[e, b, p]` and sums of squares `[e, b]` of batches of counts."""
    listed = gradients(losses, Rollout.enumerated(scenario))
    counts = torch.cat([listed.rollout.multinomial_weights(n, 1, rng) * n for n, rng in zip(shares, rngs, strict=True)])
    share = torch.tensor(shares, dtype=torch.float64)
    return torch.stack([listed.mean(count) for count in counts], 1) / share[:, None], listed.squares() @ counts.T


def _batch_of_table(
    losses: Sequence[Loss],
    scenario: Scenario[Tabular | Gaussian],
    shares: list[int],
    sizes: list[int],
    unit: int,
    rngs: list[np.random.Generator],
) -> tuple[Sums, Tensor]:
    """Means and sums of squares `[e, b]` of batches drawn one by one, a block of responses at a time."""
    policy, sampler = scenario.policy, scenario.sampler
    (r, v), t = policy.table.shape, policy.length
    # An estimator takes a few numbers a token, another callable the logits and their cotangents. A pass over the tables, of which
    # every block takes some, should cost less than the block.
    others = sum(not isinstance(loss, Estimator | PolicyLoss) for loss in losses)
    block = max(CHUNK, 256 * policy.table.numel()) // (t * (24 + 4 * len(losses) + v * (others and 4 + others)))
    # What is drawn at once decides who gets which variate of several steps, so it depends on the policy alone, and on no other loss.
    most = block if t == 1 else DRAWN // max(t * v, r * v if policy.revisits or unit > 1 else 0)
    portion = max(1, most // unit) * unit
    length = float(sampler.occupancy().sum())
    parts: list[Sums] = []
    squares = torch.zeros(len(losses), len(shares), dtype=torch.float64)
    for batches, counts in _blocks(shares, portion, block):
        variates = torch.cat([sampler.variates(n, rngs[b]) for b, n in zip(batches, counts, strict=True)])
        of = torch.tensor(batches).repeat_interleave(torch.tensor(counts))
        rollout, rows = Rollout.made(scenario, variates, length).narrowed()
        found = gradients(losses, rollout)
        parts.append(found.sums(of, len(shares), 1 / torch.tensor(shares, dtype=torch.float64)[of]).placed(rows, r))
        if sum(len(part.cells) + len(part.lines) for part in parts[1:]) > len(parts[0].cells) + len(parts[0].lines):
            parts = [Sums.merged(parts)]
        for size in set(sizes):
            chosen = [e for e, own in enumerate(sizes) if own == size]
            squares[chosen] += added(found.squares(size)[chosen] / size**2, of[::size], len(shares))
    return Sums.merged(parts), squares


def _blocks(shares: list[int], portion: int, block: int) -> Iterator[tuple[list[int], list[int]]]:
    """Batches and numbers of responses to draw for them: portions of batches, as many as fit a block."""
    batches: list[int] = []
    counts: list[int] = []
    held = 0
    for batch, share in enumerate(shares):
        for start in range(0, share, portion):
            count = min(portion, share - start)
            if batches and held + count > block:
                yield batches, counts
                batches, counts, held = [], [], 0
            batches, counts, held = [*batches, batch], [*counts, count], held + count
    yield batches, counts


@checked
def kl(scenario: Scenario, samples: int, seed: int = 0) -> float:
    """Estimate of `KL(policy ‖ reference)` of a language model's whole responses, nats: `Σ_t w_{<t} KL_t` from `samples` responses.

    >>> policy, reference = (gl.policies.small("names", stage) for stage in ("few", "reference"))
    >>> gl.montecarlo.kl(gl.Scenario(policy, reference), samples=64) > 0.1
    False
    """
    return _distances(scenario, samples, seed)[0]


@checked
def lag(scenario: Scenario, samples: int, seed: int = 0) -> float:
    """Estimate of `KL(behaviour ‖ policy)` of a language model's whole responses, nats, from `samples` responses; 0 on-policy.

    >>> policy, behaviour = (gl.policies.small("names", stage) for stage in ("few", "reference"))
    >>> gl.montecarlo.lag(gl.Scenario(policy, policy, behaviour), samples=64) > 0.1
    False
    """
    check_samples(samples)
    return 0.0 if scenario.behaviour is None else _distances(scenario, samples, seed)[1]


def _distances(scenario: Scenario, samples: int, seed: int) -> list[float]:
    if not is_of(scenario, LanguageModel):
        raise ValueError(f"{scenario.label} has exact distances: scenario.kl() and scenario.lag()")
    check_samples(samples)
    policy = scenario.policy
    responses = scenario.sampler.sample(samples, _rng(seed, (1,)))
    total, chunk = torch.zeros(2, dtype=torch.float64), max(1, CHUNK // (policy.length * policy.vocab))
    with torch.no_grad():
        for part in (slice(start, start + chunk) for start in range(0, samples, chunk)):
            n = len(responses[part])
            rollout = Rollout.from_responses(scenario, responses[part], torch.full((n,), 1 / n, dtype=torch.float64))
            total += distances(rollout, scenario.behaviour is not None)
    return [float(x) for x in total / samples]


def _batch_of_lm(
    losses: Sequence[Loss], scenario: Scenario[LanguageModel], n: int, sizes: list[int], unit: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `[e, p]` and sum of squares `[e]` of one batch of a language model's answers, and `distances` summed over them `[2]`.

    A unit answers one prompt.
    """
    policy = scenario.policy
    responses = scenario.sampler.sample(n, rng, unit)
    length = float(responses.mask.sum()) / n
    chunk = max(1, CHUNK // (policy.length * policy.vocab * unit)) * unit
    sums = torch.zeros(len(losses), len(policy.parameters), dtype=torch.float64)
    squares = torch.zeros(len(losses), dtype=torch.float64)
    apart = torch.zeros(2, dtype=torch.float64)
    for part in (slice(start, start + chunk) for start in range(0, n, chunk)):
        ones = torch.ones(len(responses[part]), dtype=torch.float64)
        rollout = Rollout.from_responses(scenario, responses[part], ones / len(ones), length)
        for size in sorted(set(sizes)):
            same_group = [e for e, group_size in enumerate(sizes) if group_size == size]
            moments = backprop.pullback(policy, gradients([losses[e] for e in same_group], rollout), ones / size, unit=size)
            sums[same_group] += moments.total
            squares[same_group] += moments.square.sum(0) / size**2
        apart += distances(rollout, scenario.behaviour is not None)
    return sums * torch.tensor(sizes)[:, None] / n, squares, apart


def distances(rollout: Rollout, off_policy: bool) -> Tensor:
    """`KL(policy ‖ reference)` and `KL(behaviour ‖ policy)` in nats, summed over the responses of the sampler, `[2]`.

    Rao–Blackwellised: the step's whole distribution counts, only prefixes are drawn, `Σ_t w_{<t} KL_t` and `Σ_t KL_t`.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1]))
    >>> kl, lag = gl.montecarlo.distances(gl.Rollout.enumerated(scenario), off_policy=False).tolist()
    >>> abs(kl / 2 - scenario.kl()) < 1e-12, lag
    (True, 0.0)
    """
    before = (rollout.log_weight.cumsum(-1) - rollout.log_weight).exp() if off_policy else 1.0
    near, far = (before * rollout.divergence("full")).sum(), torch.zeros((), dtype=torch.float64)
    if off_policy:
        steps = rollout.family.reverse_kl(rollout.behaviour_table, rollout.table)[rollout.contexts]
        far = torch.where(rollout.mask, steps, 0.0).sum()
    return torch.stack([near, far])


def _countable(scenario: Scenario) -> bool:
    policy = scenario.policy
    return policy.countable and policy.enumerable and policy.vocab**policy.length <= COUNTED_RESPONSES


def _rng(seed: int, key: tuple[int, ...]) -> np.random.Generator:
    return generator(seed, "montecarlo", *key)


def check_samples(samples: int, what: str = "samples") -> None:
    """Raise `ValueError` unless `samples` is a positive whole number, and one that doubles count exactly.

    >>> gl.montecarlo.check_samples(64)
    >>> gl.montecarlo.check_samples(0)
    Traceback (most recent call last):
        ...
    ValueError: samples must be a positive whole number, got 0
    """
    check_whole(what, samples)
    if samples > 2**53:
        raise ValueError(f"{what} must be at most 2^53, up to which double precision counts exactly, got {samples}")


@checked
def check_reach(samples: int, scenario: Scenario, losses: Iterable[Loss]) -> None:
    """Raise `ValueError` when `moments` of the losses would have to draw so many responses one by one that it takes days.

    >>> scenario = gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1]))
    >>> gl.montecarlo.check_reach(10**12, scenario, [gl.ESTIMATORS["k2-loss"]])
    """
    check_samples(samples)
    if not _countable(scenario) or any(map(is_grouped, as_losses(losses))):
        _check_drawn(samples, scenario)


def _check_drawn(samples: int, scenario: Scenario) -> None:
    most = (ANSWERED_TOKENS if is_of(scenario, LanguageModel) else DRAWN_TOKENS) // scenario.policy.length
    if samples > most:
        raise ValueError(
            f"samples={samples} is more than the {most} responses of {scenario.label} that are drawn one by one in a run, which "
            "takes hours; take fewer, or average runs of several seeds (draws are counted, whatever their number, where at most "
            f"{COUNTED_RESPONSES} responses can be listed and no estimator compares the responses of a group)"
        )
