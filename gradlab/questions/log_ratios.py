"""How far single tokens move: the distribution of the log-ratio `ℓ = log π − log ref`, token by token.

At every prefix a policy reaches, the tokens are counted three times over: by the policy's probability (what is drawn on-policy),
by the reference's (what it would have drawn there), and one each (what the vocabulary holds). All tokens of the vocabulary count
at every prefix, drawn or not, so only prefixes are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, log
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from gradlab._common.names import check_probability
from gradlab._common.provenance import versions
from gradlab._common.streams import generator
from gradlab.policies import Gaussian, LanguageModel
from gradlab.scenario import Scenario, is_of

Array = npt.NDArray[np.float64]

#: Logits (doubles) of one policy that are held at a time.
CHUNK = 2**22

COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "low": "lower end of the range of ℓ, nats, inclusive",
    "high": "upper end, nats, exclusive",
    "policy": "share of the policy's tokens whose ℓ is in the range",
    "reference": "share of the reference's tokens at the same prefixes",
    "vocabulary": "share of the vocabulary's tokens at the same prefixes",
    **{f"{name}_{end}": f"{end} end of its interval (sampled only)" for name in ("policy", "reference", "vocabulary")
       for end in ("low", "high")},
    "prefixes": "number of prefixes looked at",
    "via": "exact or sampled",
    "samples": "number of responses (missing when exact)",
}  # fmt: skip


def masses(
    scenario: Scenario,
    ranges: Sequence[tuple[float, float]],
    samples: int | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Share of tokens whose log-ratio lies in each of the `ranges` `[low, high)`, one row per range; columns in `COLUMNS`.

    Prefixes are those of responses from the policy itself. samples: `None` takes every prefix with its probability; otherwise
    prefixes of that many responses of a language model, with intervals that hold for any number of them and for masses that
    no response shows (`bounds`), each with probability `level`: where `ℓ < b` the policy has at most `e^b`, where `ℓ ≥ a` the
    reference at most `e^−a`.
    Raises `ValueError` for a Gaussian, for samples of a table, and where responses can neither be listed nor are sampled.
    """
    check_probability("level", level)
    if is_of(scenario, Gaussian):
        raise ValueError("ratios of tokens need tokens: a Gaussian has none")
    if samples is not None and not is_of(scenario, LanguageModel):
        raise ValueError("the prefixes of a table are counted exactly: leave samples out")
    ends = torch.tensor(ranges, dtype=torch.float64)
    cuts = torch.unique(ends)
    with torch.no_grad():
        if samples is not None and is_of(scenario, LanguageModel):
            by_kind, step_weight = _sampled_counts(scenario, cuts, samples, seed)
            weight = torch.ones(samples, 1, dtype=torch.float64)
        else:
            weight = scenario.policy.occupancy()[:, None]
            table, reference_table = (policy.table[:, None] for policy in (scenario.policy, scenario.reference))
            step_weight = torch.ones(len(weight), dtype=torch.float64)
            by_kind = _counts(table, reference_table, cuts, step_weight[:, None])
    rows: dict[str, Any] = {"scenario": scenario.label, "low": ends[:, 0], "high": ends[:, 1]}
    # A range is the bins between its ends; bin k lies below cut k.
    first, last = (torch.searchsorted(cuts, ends.T.contiguous()) + 1).unbind()
    by_kind = torch.stack([by_kind[..., a:b].sum(-1) for a, b in zip(first.tolist(), last.tolist(), strict=True)], -1)
    total = float((weight[:, 0] * step_weight).sum())
    most = {"policy": ends[:, 1].exp(), "reference": (-ends[:, 0]).exp(), "vocabulary": torch.ones(len(ends))}
    for k, name in enumerate(most):
        rows[name] = (weight * by_kind[:, k]).sum(0) / total
        rows[f"{name}_low"] = rows[f"{name}_high"] = float("nan")
        if samples is not None:
            limits = most[name].double().clamp(max=1).numpy()
            low, high = bounds(by_kind[:, k].numpy(), step_weight.numpy(), scenario.policy.length, limits, level)
            rows[f"{name}_low"], rows[f"{name}_high"] = low, high
    rows |= {
        "prefixes": int(step_weight.sum()) if samples else len(step_weight),
        "via": "sampled" if samples else "exact",
        "samples": samples,
    }
    frame = pd.DataFrame({key: value.numpy() if isinstance(value, Tensor) else value for key, value in rows.items()})
    frame = frame[list(COLUMNS)].astype({"samples": "Int64"})
    frame.attrs.update(seed=seed, **versions())
    return frame


def histogram(
    scenario: Scenario, edges: Sequence[float], samples: int | None = None, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """`masses` between successive `edges` of ℓ, and beyond the first and the last."""
    return masses(scenario, list(pairwise([-np.inf, *edges, np.inf])), samples, seed, level)


def bounds(found: Array, lengths: Array, longest: int, limits: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Ends `[k]` of intervals for `E Σ_t x_t / E L`, with `0 ≤ x_t ≤ limit`: of any number of responses, however rare what counts.

    `r` is the ratio if `U = (Σ_t x_t − r L)/(limit T)` has mean 0, and `U` is bounded: `K = mean_c Π_i (1 + c U_i/r)`, with `r`
    in units of the limit, has expectation 1 for bets `c ≤ 1`, so `K ≥ 2/(1 − level)` is unlikely, and so it is with
    `1 − c U_i/(1 − r)`; the interval holds the `r` for which neither is seen. With none in `n` full responses the upper end is
    near `limit · 4/n`. Widths are never 0.

    found: sums over the steps of a response `[n, k]`. lengths: `L` `[n]`. longest: `T`. limits `[k]`.
    Source: betting, Waudby-Smith & Ramdas, arXiv 2010.09686, with a mixture of fixed bets.
    """
    check_probability("level", level)
    n = len(found)
    bets = 4.0 ** -np.arange(1 + ceil(log(n, 16)))[:, None, None]
    masses, shares = found / (longest * limits), (lengths / longest)[:, None]
    evidence = np.log(2 * len(bets) / (1 - level))

    def refuted(r: Array, side: int) -> Array:
        """Whether so many responses would hardly have shown so little (side −1), or so much (side 1), if the ratio were `r`."""
        excess = side * (masses - r * shares) / np.maximum(r if side > 0 else 1 - r, 1e-300)
        capital = np.log1p(np.maximum(bets * excess, np.nextafter(-1, 0))).sum(1)
        return np.asarray(np.logaddexp.reduce(capital, axis=0) >= evidence)

    centre = found.sum(0) / lengths.sum() / limits
    ends = []
    for side, outside in ((1, np.zeros_like(centre)), (-1, np.ones_like(centre))):
        inside = centre.copy()
        for _ in range(50):
            middle = (inside + outside) / 2
            out = refuted(middle, side)
            inside, outside = np.where(out, inside, middle), np.where(out, middle, outside)
        ends.append(outside * limits)
    return ends[0], ends[1]


def _counts(logits: Tensor, reference_logits: Tensor, cuts: Tensor, mask: Tensor) -> Tensor:
    """Mass between successive cuts, summed over the live prefixes of a response: `[n, 3, bins]`, of logits `[n, t, v]`."""
    log_p, log_ref = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    bins = torch.bucketize(log_p - log_ref, cuts, right=True)
    distributions = (log_p.exp(), log_ref.exp(), torch.full_like(log_p, 1 / log_p.shape[-1]))
    empty = log_p.new_zeros(*log_p.shape[:-1], len(cuts) + 1)
    counts = torch.stack([empty.scatter_add(-1, bins, kind) for kind in distributions], -2)
    return (counts * mask[..., None, None]).sum(1)


def _sampled_counts(scenario: Scenario[LanguageModel], cuts: Tensor, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """`_counts` of the prefixes of sampled responses, a bounded number of them at a time, and the responses' lengths."""
    policy, reference = scenario.policy, scenario.reference
    responses = policy.sample(samples, generator(seed, "log_ratios"))
    size = max(1, CHUNK // (policy.length * policy.vocab))
    counts = []
    for start in range(0, samples, size):
        part = responses[start : start + size]
        logits, reference_logits = (p.logits(part.prompts, part.tokens) for p in (policy, reference))
        counts.append(_counts(logits, reference_logits, cuts, part.mask.double()))
    return torch.cat(counts), responses.mask.sum(1).double()
