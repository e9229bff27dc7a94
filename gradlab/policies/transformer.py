"""A small causal transformer in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Cache:
    """Keys and values `[n, heads, s, d]` of every block at the `s` positions read so far, of `n` sequences."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Positions read so far."""
        return self.blocks[0][0].shape[2] if self.blocks else 0

    def extended(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a block at all positions, with those of the new ones."""
        if block in self.blocks:
            keys, values = (torch.cat(parts, 2) for parts in zip(self.blocks[block], (keys, values), strict=True))
        self.blocks[block] = keys, values
        return keys, values

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; one may be taken several times."""
        self.blocks = {block: (keys[rows], values[rows]) for block, (keys, values) in self.blocks.items()}


class Block(nn.Module):
    """Pre-norm self-attention and a feed-forward layer, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, index: int = 0, cache: Cache | None = None) -> Tensor:
        """`[n, s, width]` → `[n, s, width]`; position `s` reads positions up to `s`, and those that a cache has of block `index`."""
        n, s, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, s, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extended(index, k, v)
        later = torch.ones(s, k.shape[2], dtype=torch.bool, device=x.device).triu(1 + k.shape[2] - s)
        scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        read = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, s, width)
        x = x + self.out(read)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class Transformer(nn.Module):
    """Ids `[n, s]` → logits `[n, s, vocab]`: token and position embeddings, blocks, a final norm, an untied head."""

    def __init__(self, vocab: int, context: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.context = context
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of the token after each position, behind those that a cache has read, which then has read these, too.

        Raises `ValueError` for more than `context` ids.
        """
        read = 0 if cache is None else cache.length
        if read + ids.shape[1] > self.context:
            raise ValueError(f"{read + ids.shape[1]} ids are more than the context of {self.context}")
        # Positions in full, not broadcast over sequences: every sequence has its own gradient.
        x = self.token(ids) + self.position(torch.arange(read, read + ids.shape[1], device=ids.device).expand_as(ids))
        for index, block in enumerate(self.blocks):
            x = block(x, index, cache)
        logits: Tensor = self.head(self.norm(x))
        return logits
