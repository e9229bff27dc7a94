"""One step of a language model: which of the network's tokens are in play, how likely they are, and how one is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

#: Logit of a token outside the nucleus: finite, and probability 0.
MASKED_LOGIT = -1e9


def check_actions(
    first: Tensor,
    prompts: Sequence[Sequence[int]],
    actions: Sequence[int] | None,
    eos: int | None,
    words: Sequence[str] | None,
    tolerance: float,
) -> Tensor:
    """The network's id of every action, `[v]`, checked against its logits `[prompts, ids]` of the `first` step.

    Warns when the actions lose more than `tolerance` of that step's probability. Raises `ValueError` for prompts or actions outside
    the network's vocabulary, and for an end token or words that do not fit the actions.
    """
    width = first.shape[-1]
    smallest, largest = min(min(p) for p in prompts), max(max(p) for p in prompts)
    chosen = list(range(width)) if actions is None else [int(action) for action in actions]
    if len(chosen) < 2 or len(set(chosen)) < len(chosen) or min(chosen) < 0 or max(chosen) >= width:
        raise ValueError(f"actions must be at least two different ids below {width}, the network's vocabulary, got {chosen}")
    if smallest < 0 or largest >= width:
        raise ValueError(f"prompts hold ids from {smallest} to {largest}, but the network knows 0 to {width - 1}")
    if eos is not None and not 0 <= eos < len(chosen):
        raise ValueError(f"eos is a position among the {len(chosen)} actions, or None, got {eos!r}")
    if words is not None and len(words) != len(chosen):
        raise ValueError(f"words must name each of the {len(chosen)} tokens, got {len(words)}")
    if actions is not None:
        lost = 1 - first.softmax(-1)[:, chosen].sum(-1)
        if float(lost.max()) > tolerance:
            warnings.warn(
                f"the action set leaves out up to {float(lost.max()):.1%} of the first step's probability "
                f"({float(lost.mean()):.1%} on average over prompts), more than the tolerance of {tolerance:.1%}: "
                "results are about the model conditioned on its actions",
                stacklevel=5,  # whoever made the policy
            )
    return torch.tensor(chosen)


def cut_to_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """`logits` `[…, v]` of the smallest set of tokens with at least the probability `top_p`; the others at `MASKED_LOGIT`."""
    if top_p == 1:
        return logits
    p, order = logits.detach().softmax(-1).sort(-1, descending=True)
    outside = (p.cumsum(-1) - p >= top_p).gather(-1, order.argsort(-1))
    return logits.masked_fill(outside, MASKED_LOGIT)


def inverse_cdf_sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative distribution of `logits` `[n, v]` passes `uniforms` `[n]`, `[n]`."""
    p = logits.softmax(-1)
    cdf = p.cumsum(-1)
    # Rounding must neither lead past the last token nor to one of probability 0.
    last = (p > 0).to(torch.int64).cumsum(-1).argmax(-1)
    return torch.searchsorted(cdf, uniforms[:, None], right=True)[:, 0].minimum(last)
