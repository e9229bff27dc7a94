"""Whole trees of tokens: every prefix a node, breadth-first, the children of node `i` at `i·v + 1`; and all responses they give.

Arithmetic of sizes and indices that knows no policy. `Tree` is one such tree of logits, a language model one per prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor


def nodes(vocab: int, length: int) -> int:
    """Prefixes of fewer than `length` tokens, `1 + v + … + v^(T−1)`."""
    return sum(vocab**t for t in range(length))


def prefixes(vocab: int, length: int) -> Tensor:
    """The longest prefixes in lexicographic order with one token to spare, `[v^(T−1), T]`: what to read to visit every node."""
    grid = torch.arange(vocab ** (length - 1))
    return torch.stack([*_digits(grid, vocab, length - 1), torch.zeros_like(grid)], -1)


def breadth_first(steps: Tensor) -> Tensor:
    """What follows the tokens of `prefixes`, `[x, v^(T−1), T, v]`, as rows of nodes `[x, nodes, v]`."""
    length, v = steps.shape[-2:]
    # The prefixes of depth t are the first t tokens of every v^(T − 1 − t)-th longest one.
    return torch.cat([steps[:, :: v ** (length - 1 - t), t] for t in range(length)], 1)


def rows(tokens: Tensor, vocab: int) -> Tensor:
    """Node that emits each token of `tokens` `[n, t]`, as `[n, t]`."""
    columns = [torch.zeros_like(tokens[:, 0])]
    for t in range(tokens.shape[1] - 1):
        columns.append(columns[-1] * vocab + 1 + tokens[:, t])
    return torch.stack(columns, -1)


def occupancy(p: Tensor, length: int, eos: int | None) -> Tensor:
    """Probability of reaching each node of `x` equally likely trees, `[x, nodes]`, from `p` `[x, nodes, v]`; differentiable."""
    x, _, v = p.shape
    if eos is not None:
        p = p * (torch.arange(v) != eos)  # nothing is emitted after the end token
    depths, start = [torch.full((x, 1), 1 / x, dtype=p.dtype)], 0
    for t in range(length - 1):
        depths.append((depths[-1][..., None] * p[:, start : start + v**t]).flatten(1))
        start += v**t
    return torch.cat(depths, 1)


def count(vocab: int, length: int, eos: int | None) -> int:
    """Number of different responses."""
    return int(vocab**length if eos is None else nodes(vocab - 1, length) + (vocab - 1) ** length)


@lru_cache(maxsize=8)
def responses(vocab: int, length: int, eos: int | None) -> tuple[Tensor, Tensor]:
    """Tokens `[n, T]` and mask `[n, T]` of every response, in lexicographic order."""
    return _part(torch.arange(vocab**length), vocab, length, eos)


def parts(vocab: int, length: int, eos: int | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`responses`, at most `size` of them at a time."""
    for start in range(0, vocab**length, size):
        tokens, mask = _part(torch.arange(start, min(start + size, vocab**length)), vocab, length, eos)
        if len(tokens):
            yield tokens, mask


def _part(numbers: Tensor, vocab: int, length: int, eos: int | None) -> tuple[Tensor, Tensor]:
    """The responses whose tokens are the digits of `numbers`."""
    tokens = torch.stack(_digits(numbers, vocab, length), -1)
    mask = response_mask(tokens, eos)
    if eos is None:
        return tokens, mask
    # One representative per response: everything after the end token is the end token again.
    keep = (mask | (tokens == eos)).all(-1)
    return tokens[keep], mask[keep]


def response_mask(tokens: Tensor, eos: int | None) -> Tensor:
    """Mask `[n, t]` of the tokens up to and including the end token."""
    if eos is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended_before = (tokens == eos).cumsum(-1)
    return (ended_before == 0) | ((ended_before == 1) & (tokens == eos))


def _digits(numbers: Tensor, base: int, length: int) -> list[Tensor]:
    return [numbers // base ** (length - 1 - t) % base for t in range(length)]
