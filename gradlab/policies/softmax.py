"""Distributions of the rows of a table of logits, computed once for a table that is not differentiated.

What is kept belongs to the table and goes with it; a table that was written to is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Rows(NamedTuple):
    """Of every row of a table `[r, v]`: `log p` `[r, v]`, `p` `[r, v]` and its likeliest token `top` `[r, 1]`."""

    log_p: Tensor
    p: Tensor
    top: Tensor


_kept: Any = WeakTensorKeyDictionary()
_compared: Any = WeakTensorKeyDictionary()


def rows(table: Tensor) -> Rows:
    """The distributions of the rows of `table` `[r, v]`; differentiable, and then not kept, where the table is."""
    if table.requires_grad and torch.is_grad_enabled():
        return Rows(table.log_softmax(-1), table.softmax(-1), table.detach().argmax(-1, keepdim=True))
    version, kept = _kept.get(table, (None, None))
    found: Rows | None = kept
    if found is None or version != table._version:
        # Elementwise over the whole table: for short rows several times as fast as log_softmax, which goes row by row.
        given = table.detach()
        highest, top = given.max(-1, keepdim=True)
        below = given - highest
        p = below.exp()
        total = p.sum(-1, keepdim=True)
        found = Rows(below - total.log(), p / total, top)
        _kept[table] = table._version, found
    return found


def compared(table: Tensor, other: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `compute` makes of two tables, kept for the last `other` unless one of them is differentiated."""
    if (table.requires_grad or other.requires_grad) and torch.is_grad_enabled():
        return compute(table, other)
    known, versions, kept = _compared.get(table, (None, None, None))
    found: Tensor | None = kept
    if found is None or known() is not other or versions != (table._version, other._version):
        found = compute(table, other)
        _compared[table] = ref(other), (table._version, other._version), found
    return found
