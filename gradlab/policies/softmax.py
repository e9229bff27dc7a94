"""Distributions of the rows of a table of logits, computed once for a table that is not differentiated.

What is kept belongs to the table and goes with it; a table that was written to is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Of every row of a table `[r, v]`: `log p` `[r, v]`, `p` `[r, v]` and its likeliest token `top` `[r, 1]`."""

    log_p: Tensor
    p: Tensor
    top: Tensor


class _Kept:
    """What is computed of a tensor, by its identity: `torch.utils.weak` has such a dictionary, which takes as long as small tables do."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[ref[Tensor], Any]] = {}

    def get(self, tensor: Tensor) -> Any:
        owner, value = self._held.get(id(tensor), (None, None))
        return value if owner is not None and owner() is tensor else None

    def put(self, tensor: Tensor, value: Any) -> None:
        key = id(tensor)
        self._held[key] = ref(tensor, lambda _: self._held.pop(key, None)), value


_rows, _compared = _Kept(), _Kept()


def rows(table: Tensor) -> Rows:
    """The distributions of the rows of `table` `[r, v]`; differentiable, and then not kept, where the table is."""
    if table.requires_grad and torch.is_grad_enabled():
        return Rows(table.log_softmax(-1), table.softmax(-1), table.detach().argmax(-1, keepdim=True))
    known: tuple[int, Rows] | None = _rows.get(table)
    if known is not None and known[0] == table._version:
        return known[1]
    # Elementwise over the whole table: for short rows several times as fast as log_softmax, which goes row by row.
    given = table.detach()
    highest, top = given.max(-1, keepdim=True)
    below = given - highest
    p = below.exp()
    total = p.sum(-1, keepdim=True)
    computed = Rows(below - total.log(), p / total, top)
    _rows.put(table, (table._version, computed))
    return computed


def compared(table: Tensor, other: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `compute` makes of two tables, kept for the last `other` unless one of them is differentiated."""
    if (table.requires_grad or other.requires_grad) and torch.is_grad_enabled():
        return compute(table, other)
    versions = table._version, other._version
    known: tuple[ref[Tensor], tuple[int, int], Tensor] | None = _compared.get(table)
    if known is not None and known[0]() is other and known[1] == versions:
        return known[2]
    value = compute(table, other)
    _compared.put(table, (ref(other), versions, value))
    return value
