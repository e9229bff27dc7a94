"""Sums of gradients over segments of many responses, kept where they are not zero: a batch touches few entries of a wide table.

A segment is a response, a group or a batch. A family splits a score into at most one entry of its row and multiples of
directions that all draws from that row share (`Family.split`); the slopes of the vocabulary kernels are further directions. So
a sum is some entries of the table, and for every row a few multiples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of the gradients of losses `e` over `segments`, in tables `[r, v]`: `shape` is `(segments, r, v)`.

    cells `[k]`, sorted: entries of the table that a segment touches, as `(segment · r + row) · v + token`; taken `[e, k]`: what is
    there. lines `[l]`, sorted: rows it visits, as `segment · r + row`; along `[d, e, l]`: multiples there of directions, which
    `directions` `[d, q, v]` holds for `rows` `[q]`, sorted. full: whole rows `[l, v]` of losses that have no such form.
    """

    shape: tuple[int, int, int]
    cells: Tensor
    taken: Tensor
    lines: Tensor
    along: Tensor
    rows: Tensor
    directions: Tensor
    full: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def merged(cls, parts: Sequence[Sums]) -> Sums:
        """Sums over the same segments of further responses, added up."""
        first = parts[0]
        if len(parts) == 1:
            return first
        segments, r, v = first.shape
        (cells, cell), (lines, line), (rows, row) = (
            distinct(torch.cat([getattr(part, name) for part in parts]), size)
            for name, size in (("cells", segments * r * v), ("lines", segments * r), ("rows", r))
        )
        directions = first.directions.new_zeros(len(first.directions), len(rows), v)
        return cls(
            first.shape,
            cells,
            added(torch.cat([part.taken for part in parts], -1), cell, len(cells)),
            lines,
            added(torch.cat([part.along for part in parts], -1), line, len(lines)),
            rows,
            directions.index_copy_(1, row, torch.cat([part.directions for part in parts], 1)),
            {
                e: full.new_zeros(len(lines), v).index_add_(0, line, torch.cat([part.full[e] for part in parts]))
                for e, full in first.full.items()
            },
        )

    def placed(self, rows: Tensor, r: int) -> Sums:
        """The same sums in tables of `r` rows, of which these tables hold `rows`, sorted."""
        segments, few, v = self.shape
        lines, of_cells = (line // few * r + rows[line % few] for line in (self.lines, self.cells // v))
        return replace(self, shape=(segments, r, v), cells=of_cells * v + self.cells % v, lines=lines, rows=rows[self.rows])

    def only(self, e: int) -> Sums:
        """The sums of one loss."""
        full = {0: self.full[e]} if e in self.full else {}
        return replace(self, taken=self.taken[e : e + 1], along=self.along[:, e : e + 1], full=full)

    def squares(self) -> Tensor:
        """Squared norms of all sums, `[e, segments]`."""
        segments, r, v = self.shape
        of_cells, of_lines, row = self.cells // (r * v), self.lines // r, self._row()
        line = torch.searchsorted(self.lines, self.cells // v)
        directions = self.directions.flatten(1)[:, row[line] * v + self.cells % v]
        products = torch.einsum("dqv,cqv->dcq", self.directions, self.directions)[..., row]
        found = self.taken.new_zeros(len(self.taken), segments)
        for e, taken in enumerate(self.taken):
            along = self.along[:, e]
            used = _used(along)
            beyond, pulled = torch.zeros_like(taken), torch.zeros_like(along[0])
            for d in used:
                beyond += along[d][line] * directions[d]
                pulled += along[d] * sum(along[c] * products[c, d] for c in used)
            found[e] = added(taken * (taken + 2 * beyond), of_cells, segments) + added(pulled, of_lines, segments)
        for e, full in self.full.items():
            found[e] = added(full.square().sum(-1), of_lines, segments)
        return found.clamp(min=0)

    def weighted(self, weight: Tensor) -> list[Tensor]:
        """`Σ_s weight_s · sum_s` of every loss, `[p]` each, for weights `[segments]`."""
        _, r, v = self.shape
        of_lines, of_cells, cell = weight[self.lines // r], weight[self.cells // (r * v)], self.cells % (r * v)
        along = added(self.along * of_lines, self._row(), len(self.rows))
        found = []
        for e, taken in enumerate(self.taken):
            table = added(taken * of_cells, cell, r * v).view(r, v)
            for d in _used(along[:, e]):
                table.index_add_(0, self.rows, along[d, e, :, None] * self.directions[d])
            if e in self.full:
                table.index_add_(0, self.lines % r, self.full[e] * of_lines[:, None])
            found.append(table.flatten())
        return found

    def dense(self) -> Tensor:
        """All sums in full, `[e, segments, p]`."""
        segments, r, v = self.shape
        found = self.taken.new_zeros(len(self.taken), segments * r * v)
        tables = found.view(-1, segments * r, v)
        tables[:, self.lines] = torch.einsum("del,dlv->elv", self.along, self.directions[:, self._row()])
        found[:, self.cells] += self.taken
        for e, full in self.full.items():
            tables[e].index_add_(0, self.lines, full)
        return found.view(-1, segments, r * v)

    def _row(self) -> Tensor:
        """Place of every line's row among `rows`."""
        return torch.searchsorted(self.rows, self.lines % self.shape[1])


def _used(along: Tensor) -> list[int]:
    """Directions with a multiple that is not zero, of multiples `[d, l]`: most losses have few."""
    return [d for d, multiples in enumerate(along) if bool(multiples.any())]


def distinct(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sorted keys that hold all of `keys`, which are below `size`, and their places there: all keys where those are no more."""
    if size <= len(keys):
        return torch.arange(size), keys
    found, places = torch.unique(keys, return_inverse=True)
    return found, places


def added(values: Tensor, places: Tensor, size: int) -> Tensor:
    """Sums of `values` `[…, k]` that have one of `size` places `[k]` in common, `[…, size]`."""
    found = values.new_zeros(*values.shape[:-1], size)
    return found.scatter_add_(-1, places.expand_as(values), values)
