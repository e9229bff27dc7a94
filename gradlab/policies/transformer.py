"""A small causal transformer in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm self-attention and a feed-forward layer, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, s, width]` → `[n, s, width]`; position `s` reads positions up to `s`."""
        n, s, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, s, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        later = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
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

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the token after each position. Raises `ValueError` for more than `context` ids."""
        if ids.shape[1] > self.context:
            raise ValueError(f"{ids.shape[1]} ids are more than the context of {self.context}")
        # Positions in full, not broadcast over sequences: every sequence has its own gradient.
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
