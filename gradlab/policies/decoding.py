"""Drawing from the small transformer, each position of a response read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradlab.policies.actions import inverse_cdf_sample
from gradlab.policies.transformer import Cache

if TYPE_CHECKING:
    from gradlab.policies.language import LanguageModel

#: Responses drawn together; their keys and values are held at once.
TOGETHER = 2**12


def draw_cached(policy: LanguageModel, prompts: Tensor, tokens: Tensor, uniforms: Tensor) -> None:
    """Fill `tokens` `[n, T]` as `LanguageModel.draw` does: every prompt is read once, then one token of each response at a time."""
    sizes = torch.tensor([len(prompt) for prompt in policy.prompts])[prompts]
    for size in torch.unique(sizes):
        for rows in torch.split(torch.nonzero(sizes == size)[:, 0], TOGETHER):
            tokens[rows] = _decoded(policy, prompts[rows], tokens[rows], uniforms[rows])


def _decoded(policy: LanguageModel, prompts: Tensor, tokens: Tensor, uniforms: Tensor) -> Tensor:
    """Responses `[n, T]` to prompts of one length; `tokens` say what stands after an end token."""
    cache, unfinished = Cache(), torch.arange(len(prompts))
    unique_prompts, which = torch.unique(prompts, return_inverse=True)
    ids = torch.tensor([[int(i) for i in policy.prompts[p]] for p in unique_prompts.tolist()])
    for t in range(policy.length):
        raw = policy.network(ids.to(policy.device), cache)[:, -1]
        if t == 0:  # from here on a row per response, not per prompt
            raw = raw[which]
            cache.select(which.to(policy.device))
        raw = raw.double().cpu()
        if not bool(torch.isfinite(raw.sum())):
            raise ValueError("the network gives NaN or infinite logits; check its weights and its precision")
        sampled = inverse_cdf_sample(policy.shaped(raw), uniforms[unfinished, t])
        tokens[unfinished, t] = sampled
        if policy.eos is not None and bool((ended := sampled == policy.eos).any()):
            unfinished, sampled = unfinished[~ended], sampled[~ended]
            cache.select(torch.nonzero(~ended)[:, 0].to(policy.device))
        if not len(unfinished):
            break
        ids = policy.chosen[sampled][:, None]
    return tokens
