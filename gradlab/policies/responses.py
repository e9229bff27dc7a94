"""Responses of a policy: what enumerating and sampling return, whatever the kind of policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradlab._common.shapes import Bool, Int64, Num


@dataclass(frozen=True, eq=False)
class Responses:
    """Tokens `[n, t]`, their mask `[n, t]` and the number of the prompt that each response answers, `[n]`.

    The mask is true up to and including the end token. Tables and Gaussians answer one empty prompt, number 0.

    >>> import gradlab as gl
    >>> gl.Bandit([0.0, 1.0]).enumerate().tokens.tolist()
    [[0], [1]]
    """

    tokens: Num[Tensor, "n t"]
    mask: Bool[Tensor, "n t"]
    prompts: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> Responses:
        """The responses of some rows: a slice, their numbers or a mask `[n]`."""
        return Responses(self.tokens[rows], self.mask[rows], self.prompts[rows])

    @classmethod
    def without_prompt(cls, tokens: Num[Tensor, "n t"], mask: Bool[Tensor, "n t"]) -> Responses:
        """Responses to the one empty prompt."""
        return cls(tokens, mask, torch.zeros(len(tokens), dtype=torch.long))
