"""Whether a sample can tell: intervals fail where few responses carry the gradient, and the policies say so before any is drawn.

An interval rests on the spread of the sample, so it is blind to rare responses with huge gradients that were not met. But at
every prefix the policies' whole distributions are known, and so is what each token would bring. Where responses can be listed,
or are integrated, the law of `x = ‖g − E g‖²` is known altogether. Otherwise it is looked up step by step: at steps of some drawn
responses every token of the vocabulary takes the place of the drawn one, and brings what `‖g‖²` of the response up to there
grows by. Only where a loss is neither an `Estimator` nor listed does the sample alone speak, by the skewness of its batches.

A sum of independent terms is close to normal when its skewness is small. As for `k` equal rare events, whose skewness is
`1/√k`, a skewness `s` counts as `1/s²` responses that carry the sum. The mean gradient is taken to be known when at least
`NEEDED` carry `Σ ‖g − E g‖`, the noise when they carry `Σ ‖g − E g‖²`. What is expected fewer than `RARE` times is left out of
that, and must not matter: it may not move the sum by more than `SHIFT` of its standard deviation.

Source: derived here; thresholds by simulation (tests/simulation.py). Pareto k̂ (arXiv 1507.02646) tells less: it does not
see what was not drawn, and tokens are so few that sizes repeat, which no Pareto law does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from gradlab._common.streams import generator
from gradlab.estimators.estimator import Estimator
from gradlab.moments import Gradients, Loss, Moments, gradients, is_grouped
from gradlab.policies import Gaussian, LanguageModel
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, is_of
from gradlab.solvers import exact, montecarlo

Array = npt.NDArray[np.float64]

#: Responses that have to carry a sum whose law is known or looked up, and one that is seen in batches only.
NEEDED, NEEDED_IN_BATCHES = 25.0, 60.0
#: Expected number of occurrences below which a response is not counted on, and what it may then move, in standard deviations.
RARE, SHIFT = 0.01, 0.25
#: Relative standard error of the second moment above which the batches do not know the spread of the mean.
LOOSE = 0.2
#: Steps that are looked at, and tokens (times length) that are put in their places together.
STEPS, TOKENS = 256, 2**17


@dataclass(frozen=True)
class Reliability:
    """`mean`: whether intervals of bias and cosine hold; `noise`: whether those of the noise do.

    `unseen` is the share of `E‖g − E g‖²` that lies, in expectation, on gradients larger than any of the sample; NaN where the
    law of the gradient is not known.
    """

    mean: bool
    noise: bool
    unseen: float

    def against(self, target: Reliability) -> Reliability:
        """Reliability of a comparison with a target that is estimated from the same draws."""
        return Reliability(self.mean and target.mean, self.noise and target.mean, float(np.fmax(self.unseen, target.unseen)))


def with_open_ends(row: dict[str, Any], known: Reliability) -> dict[str, Any]:
    """A row of sampled results with `reliable` and `unseen`, and with the ends opened that are not known."""
    ends: dict[str, tuple[float, float]] = {} if known.noise else {"noise": (0.0, np.inf)}
    if not known.mean:
        ends |= {"bias": (0.0, np.inf), "cosine": (-1.0, 1.0)}
    # What has no interval, as nothing is relative to a target of 0, gets none.
    opened_ends = {
        f"{column}_{side}": end
        for column, pair in ends.items()
        for side, end in zip(("low", "high"), pair, strict=True)
        if not np.isnan(row.get(f"{column}_{side}", np.nan))
    }
    return row | opened_ends | {"reliable": known.mean and known.noise, "unseen": known.unseen}


def unreliable_rows_message(frame: pd.DataFrame) -> str | None:
    """What a frame's readers are told about rows that are not reliable; `None` where all are."""
    rows = frame["reliable"].notna() & ~frame["reliable"].fillna(True).astype(bool)
    if not rows.any():
        return None
    unseen = frame.loc[rows, "unseen"].max()
    share = (
        ""
        if np.isnan(unseen)
        else f" (up to {unseen:.2g} of the second moment is expected on gradients larger than any of them)"
    )
    return (
        f"{int(rows.sum())} of {len(frame)} rows are not reliable: too few of the responses carry the gradient{share}; intervals that "
        "cannot be known from this many are open"
    )


def reliability(losses: Sequence[Loss], moments: Sequence[Moments], scenario: Scenario, seed: int = 0) -> list[Reliability]:
    """What the sampled moments `moments` of the losses can tell; the same seed looks at the same steps."""
    samples = moments[0].samples
    assert samples is not None
    with torch.no_grad():
        listed = is_of(scenario, Gaussian) or montecarlo._countable(scenario)
        ungrouped = [e for e, loss in enumerate(losses) if not is_grouped(loss)]
        known: dict[int, Reliability] = {}
        if listed and ungrouped:
            rates, sizes = _enumerated_norms([losses[e] for e in ungrouped], scenario)
            known = {e: assess(samples * rates, x, moments[e].mean.numel()) for e, x in zip(ungrouped, sizes, strict=True)}
        ahead = [e for e, loss in enumerate(losses) if e not in known and isinstance(loss, Estimator)]
        if ahead:
            rates, sizes = _one_step_ahead([losses[e] for e in ahead], scenario, samples, seed)  # type: ignore[misc]
            for e, x in zip(ahead, sizes, strict=True):
                known[e] = assess(samples * rates, x, moments[e].mean.numel())
    return [known[e] if e in ungrouped and listed else _with_batch_traces(moments[e], known.get(e)) for e in range(len(losses))]


def assess(rates: Array, sizes: Array, parameters: int) -> Reliability:
    """From the expected numbers of occurrences `[n]` of gradients and their squared distances `[n]` from the mean."""
    order = np.argsort(-sizes, kind="stable")
    rates, sizes = rates[order], sizes[order]
    total = float(rates @ sizes)
    if not np.isfinite(total):
        return Reliability(False, False, 1.0)
    # Batches estimate their own means, too: with few responses each, that is most of the error of a steady second moment.
    batch_mean_variance = 2 * montecarlo.BATCHES * (total / rates.sum()) ** 2 / parameters
    unseen = float((rates * sizes) @ np.exp(-_at_least(rates, sizes))) / total if total else 0.0
    return Reliability(
        is_well_sampled(rates, np.sqrt(sizes)), is_well_sampled(rates, sizes, batch_mean_variance, centred=True), unseen
    )


def is_well_sampled(rates: Array, sizes: Array, variance: float = 0.0, centred: bool = False) -> bool:
    """Whether enough responses carry `Σ sizes`, of events sorted by falling size with expected numbers `rates`."""
    rare = _at_least(rates, sizes) <= RARE
    rare_sum, common_sizes, common_rates = float(rates[rare] @ sizes[rare]), sizes[~rare], rates[~rare]
    excess = common_sizes - (common_rates @ common_sizes) / common_rates.sum() if centred else common_sizes
    second, third = float(common_rates @ excess**2) + variance, float(common_rates @ np.maximum(excess, 0) ** 3)
    return bool(third**2 * NEEDED <= second**3 < np.inf and rare_sum <= SHIFT * second**0.5)


def _at_least(rates: Array, sizes: Array) -> Array:
    """Expected number of events at least as large as each one, sorted by falling size; those within rounding are equally large.

    Otherwise rounding, which differs between processors, would order events of one size.
    """
    last = np.append(sizes[1:] < sizes[:-1] * (1 - 1e-9), True).nonzero()[0]
    return rates.cumsum()[last[np.searchsorted(last, np.arange(len(sizes)))]]


def _enumerated_norms(losses: Sequence[Loss], scenario: Scenario) -> tuple[Array, Array]:
    """Probabilities `[n]` of all responses, and squared distances `[e, n]` of their gradients from the mean."""
    rollout = exact.enumerated(losses, scenario)
    batch = gradients(losses, rollout)
    sizes = squared_norms(batch, batch.mean(rollout.weight))
    possible = rollout.weight > 0
    return (rollout.weight / rollout.weight.sum())[possible].numpy(), sizes[:, possible].numpy()


def squared_norms(batch: Gradients, centres: Tensor | None = None) -> Tensor:
    """`‖g_i − centre‖²` of every loss at every response, `[e, n]`, for centres `[e, p]`; what is rounding of `‖g_i‖²` is 0.

    Without centres steps are taken to have rows of their own.
    """
    rollout, family = batch.rollout, batch.rollout.family
    if centres is not None and rollout.revisits:
        each = [batch.tables(e).flatten(1) for e in range(len(batch.score))]
        return torch.stack([(g - centre).square().sum(-1) for g, centre in zip(each, centres, strict=True)])
    steps = rollout.table, rollout.contexts, rollout.tokens
    norms = (batch.score.square() * family.score_norm(*steps)).sum(-1)
    for losses, direct, slope in batch.direct:
        norms[losses] += (2 * batch.score[losses] * direct * family.score_dot(*steps, slope)).sum(-1)
        norms[losses] += (direct.square() * slope.square().sum(-1)[rollout.contexts]).sum(-1)
    for e, cotangent in batch.cotangents.items():
        norms[e] = cotangent.square().sum((-2, -1))
    if centres is None:
        return norms
    squared = norms.clone()
    for e, centre in enumerate(centres.view(-1, *rollout.table.shape)):
        along = (batch.score[e] * family.score_dot(*steps, centre)).sum(-1)
        for losses, direct, slope in batch.direct:
            if e in losses:
                along += (direct[losses.index(e)] * (slope * centre).sum(-1)[rollout.contexts]).sum(-1)
        if e in batch.cotangents:
            along = (batch.cotangents[e] * centre[rollout.contexts]).sum((-2, -1))
        squared[e] += centre.square().sum() - 2 * along
    return torch.where(squared < 1e-12 * (norms + centres.square().sum(-1, keepdim=True)), 0.0, squared)


def _one_step_ahead(losses: Sequence[Estimator], scenario: Scenario, samples: int, seed: int) -> tuple[Array, Array]:
    """Expected numbers per response `[k]` of tokens at some steps, and what `‖g‖²` grows by with them, `[e, k]`, in logits."""
    policy = scenario.policy
    # A normaliser by the length is applied afterwards: a response that is cut has another one.
    summed = [replace(loss, normalise="sum", baseline=None, group=None) for loss in losses]
    v, t = policy.vocab, policy.length
    count = 1 if t == 1 and not is_of(scenario, LanguageModel) else max(8, min(STEPS, TOKENS // (v * t)))
    rng = generator(seed, "reliability")
    sampled = Rollout.from_sampler(scenario, min(count, samples), rng)
    lengths = sampled.mask.sum(-1)
    steps = torch.from_numpy(rng.integers(0, lengths.numpy()))
    positions = torch.arange(sampled.tokens.shape[1])
    by_mean = torch.tensor([loss.normalise == "mean" for loss in losses])[:, None, None]
    rates, sizes = [], []
    for part in torch.split(torch.arange(len(steps)), max(1, TOKENS // (v * t))):
        step, m = steps[part], len(part)
        # Every token in the place of the drawn one, and last the response before it, where there is anything before it.
        tokens, contexts = (item[part].repeat_interleave(v + 1, 0) for item in (sampled.tokens, sampled.contexts))
        row_index = torch.arange(m * (v + 1)).view(m, v + 1)
        tokens[row_index[:, :v], step[:, None]] = torch.arange(v)
        ends = step[:, None].expand(m, v + 1).clone()
        ends[:, v] = (step - 1).clamp(min=0)
        prompts = None if sampled.prompts is None else sampled.prompts[part].repeat_interleave(v + 1)
        weight = torch.ones(len(tokens), dtype=torch.float64)
        cut = replace(
            sampled, tokens=tokens, mask=positions <= ends.view(-1, 1), contexts=contexts, prompts=prompts, weight=weight
        )
        norms = squared_norms(gradients(summed, cut.narrowed()[0])).view(-1, m, v + 1)
        grown = (norms[..., :v] - norms[..., v:] * (step > 0)[:, None]).abs()
        sizes.append(torch.where(by_mean, grown / lengths[part, None] ** 2, grown).flatten(1))
        at = sampled.behaviour_table[sampled.contexts[part, step]]
        rates.append((at.softmax(-1) * lengths[part, None] / len(steps)).flatten())
    return torch.cat(rates).double().numpy(), torch.cat(sizes, 1).double().numpy()


def _with_batch_traces(moments: Moments, known: Reliability | None) -> Reliability:
    """What the batches show besides: their traces are skewed, or vary, where few responses carry them."""
    mean, noise, unseen = (True, True, float("nan")) if known is None else (known.mean, known.noise, known.unseen)
    if moments.batch_traces is None or len(moments.batch_traces) < 2:
        return Reliability(mean, False, unseen) if known is not None else Reliability(False, False, unseen)
    traces = moments.batch_traces.numpy()
    if traces.mean() <= 1e-12 * float(moments.mean.square().sum()):
        return Reliability(mean, noise, unseen)  # no noise but rounding
    excess = traces - traces.mean()
    second, third = float(np.mean(excess**2)), float(np.mean(np.maximum(excess, 0) ** 3) - np.mean(np.maximum(-excess, 0) ** 3))
    narrow = second**0.5 <= LOOSE * len(traces) ** 0.5 * float(traces.mean())
    needed = NEEDED_IN_BATCHES if known is None else NEEDED
    not_skewed = max(third, 0.0) ** 2 * needed <= len(traces) * second**3
    return Reliability(mean and narrow, noise and not_skewed, unseen)
