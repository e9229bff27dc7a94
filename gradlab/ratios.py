"""How far single tokens move: the distribution of the log-ratio `ℓ = log π − log ref`, token by token.

At every prefix a policy reaches, the tokens are counted three times over: by the policy's probability (what is drawn on-policy),
by the reference's (what it would have drawn there), and one each (what the vocabulary holds). All tokens of the vocabulary count
at every prefix, drawn or not, so only prefixes are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gradlab.policies import Gaussian, LanguageModel
from gradlab.provenance import versions
from gradlab.scenario import Scenario

#: Logits (doubles) of one policy that are held at a time.
CHUNK = 2**22

COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "low": "lower end of the range of ℓ, nats, inclusive",
    "high": "upper end, nats, exclusive",
    "policy": "share of the policy's tokens whose ℓ is in the range",
    "reference": "share of the reference's tokens at the same prefixes",
    "vocabulary": "share of the vocabulary's tokens at the same prefixes",
    **{f"{name}_{end}": f"{end} end of its 95 % interval (sampled only)" for name in ("policy", "reference", "vocabulary")
       for end in ("low", "high")},
    "prefixes": "number of prefixes looked at",
    "via": "exact or sampled",
    "samples": "number of responses (missing when exact)",
}  # fmt: skip


def masses(
    scenario: Scenario, ranges: Sequence[tuple[float, float]], samples: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Share of tokens whose log-ratio lies in each of the `ranges` `[low, high)`, one row per range; columns in `COLUMNS`.

    Prefixes are those of responses from the policy itself. samples: `None` takes every prefix with its probability; otherwise
    prefixes of that many responses of a language model, with intervals from the spread between responses (delta method).
    Raises `ValueError` for a Gaussian, for samples of a table, and where responses can neither be listed nor are sampled.
    """
    if isinstance(scenario.policy, Gaussian):
        raise ValueError("ratios of tokens need tokens: a Gaussian has none")
    if samples is not None and not isinstance(scenario.policy, LanguageModel):
        raise ValueError("the prefixes of a table are counted exactly: leave samples out")
    ends = torch.tensor(ranges, dtype=torch.float64)
    cuts = torch.unique(ends)
    with torch.no_grad():
        if samples is None:
            weight = scenario.policy.occupancy()[:, None]
            table, reference_table = (policy.table[:, None] for policy in (scenario.policy, scenario.reference))
            live = torch.ones(len(weight), dtype=torch.float64)
            found = _counts(table, reference_table, cuts, live[:, None])
        else:
            weight = torch.ones(samples, 1, dtype=torch.float64)
            found, live = _drawn(scenario, cuts, samples, seed)
    rows: dict[str, Any] = {"scenario": scenario.label, "low": ends[:, 0], "high": ends[:, 1]}
    # A range is the bins between its ends; bin k lies below cut k.
    first, last = (torch.searchsorted(cuts, ends.T.contiguous()) + 1).unbind()
    found = torch.stack([found[..., a:b].sum(-1) for a, b in zip(first.tolist(), last.tolist(), strict=True)], -1)
    total = float((weight[:, 0] * live).sum())
    for k, name in enumerate(("policy", "reference", "vocabulary")):
        share = (weight * found[:, k]).sum(0) / total
        rows[name] = share
        # A ratio of means: its error is that of the mean of residuals.
        spread = (found[:, k] - share * live[:, None]).square().sum(0).sqrt() / total if samples else share * float("nan")
        rows[f"{name}_low"], rows[f"{name}_high"] = (share - 1.96 * spread).clamp(min=0), share + 1.96 * spread
    rows |= {
        "prefixes": int(live.sum()) if samples else len(live),
        "via": "sampled" if samples else "exact",
        "samples": samples,
    }
    frame = pd.DataFrame({key: value.numpy() if isinstance(value, Tensor) else value for key, value in rows.items()})
    frame = frame[list(COLUMNS)].astype({"samples": "Int64"})
    frame.attrs.update(seed=seed, **versions())
    return frame


def histogram(scenario: Scenario, edges: Sequence[float], samples: int | None = None, seed: int = 0) -> pd.DataFrame:
    """`masses` between successive `edges` of ℓ, and beyond the first and the last."""
    return masses(scenario, list(pairwise([-np.inf, *edges, np.inf])), samples, seed)


def _counts(logits: Tensor, reference_logits: Tensor, cuts: Tensor, mask: Tensor) -> Tensor:
    """Mass between successive cuts, summed over the live prefixes of a response: `[n, 3, bins]`, of logits `[n, t, v]`."""
    log_p, log_ref = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    bins = torch.bucketize(log_p - log_ref, cuts, right=True)
    kinds = (log_p.exp(), log_ref.exp(), torch.full_like(log_p, 1 / log_p.shape[-1]))
    empty = log_p.new_zeros(*log_p.shape[:-1], len(cuts) + 1)
    found = torch.stack([empty.scatter_add(-1, bins, kind) for kind in kinds], -2)
    return (found * mask[..., None, None]).sum(1)


def _drawn(scenario: Scenario, cuts: Tensor, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """`_counts` of the prefixes of sampled responses, a bounded number of them at a time, and the responses' lengths."""
    policy, reference = scenario.policy, scenario.reference
    assert isinstance(policy, LanguageModel)
    assert isinstance(reference, LanguageModel)
    prompts, tokens, mask = policy.sample(samples, np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(14,))))
    size = max(1, CHUNK // (policy.length * policy.vocab))
    found = []
    for start in range(0, samples, size):
        part = slice(start, start + size)
        logits, reference_logits = (p.logits(prompts[part], tokens[part]) for p in (policy, reference))
        found.append(_counts(logits, reference_logits, cuts, mask[part].double()))
    return torch.cat(found), mask.sum(1).double()
