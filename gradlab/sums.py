"""Sums of gradients over segments of many responses, kept where they are not zero: a batch touches few entries of a wide table.

A segment is a response, a group or a batch. A family splits a score into at most one entry of its row and multiples of
directions that all draws from that row share (`Family.split`); the slopes of the vocabulary kernels are further directions. So
a sum is some entries of the table, and for every row a few multiples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

Array = npt.NDArray[np.float64]


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

    @property
    def scattered(self) -> bool:
        """Whether inner products of segments are better had from cells and lines than from whole tables."""
        segments, r, v = self.shape
        return not self.full and r * v > WIDE and 4 * (len(self.cells) + len(self.lines)) < segments * r * v

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


#: Parameters of a table up to which segments are compared in full.
WIDE = 2**12
#: A cell or row that this share of the segments touches is held for all of them.
FREQUENT = 0.25


class Pattern:
    """Which of `columns` each of `segments` touches, as sorted keys `segment · columns + column`.

    A column that many segments touch is worked on for all of them, so that its mean is taken off before anything is multiplied. In
    the others most segments have 0, and the mean is so small that nothing is lost by taking it off afterwards.
    """

    def __init__(self, keys: Tensor, segments: int, columns: int) -> None:
        self.segments = segments
        self.segment, column = keys.numpy() // columns, keys.numpy() % columns
        self.columns, place, count = np.unique(column, return_inverse=True, return_counts=True)
        frequent = count >= FREQUENT * segments
        self.frequent, self.rare = frequent.nonzero()[0], (~frequent).nonzero()[0]
        index = np.where(frequent, frequent.cumsum(), (~frequent).cumsum()) - 1
        self.among_frequent, self.among_rare = frequent[place].nonzero()[0], (~frequent)[place].nonzero()[0]
        self.column = index[place]

    def often(self, values: Array) -> Array:
        """Values `[k]` in the frequent columns, less their means, `[segments, f]`."""
        at = self.among_frequent
        found = np.zeros((self.segments, len(self.frequent)))
        found[self.segment[at], self.column[at]] = values[at]
        return np.asarray(found - found.mean(0))

    def seldom(self, values: Array) -> sparse.csr_array:
        """Values `[k]` in the other columns, `[segments, c]`."""
        at = self.among_rare
        starts = np.searchsorted(self.segment[at], np.arange(self.segments + 1))
        return sparse.csr_array((values[at], self.column[at], starts), shape=(self.segments, len(self.rare)))


class Layout:
    """Inner products of the segments' deviations from their mean, for sums that have cells, lines and directions in common."""

    def __init__(self, sums: Sums) -> None:
        segments, r, v = self.shape = sums.shape
        self.directions = sums.directions.numpy()
        self.cells, self.lines = Pattern(sums.cells, segments, r * v), Pattern(sums.lines, segments, r)
        # Every line's row among those of the directions, and every cell's line.
        self.row = np.searchsorted(sums.rows.numpy(), sums.lines.numpy() % r)
        self.rows = np.searchsorted(sums.rows.numpy(), self.lines.columns)
        self.line = np.searchsorted(sums.lines.numpy(), sums.cells.numpy() // v)
        self.at_cells = self.directions.reshape(len(self.directions), -1)[:, self.row[self.line] * v + sums.cells.numpy() % v]

    @cached_property
    def products(self) -> Array:
        """Inner products of the directions of every row, `[d, d, q]`."""
        found: Array = np.einsum("dqv,cqv->dcq", self.directions, self.directions)
        return found

    @cached_property
    def _frequent_cells(self) -> tuple[Array, sparse.csr_array]:
        """The directions at the frequent cells, `[d, f]`, and which of the frequent rows has each, `[f, rows]`."""
        _, _, v = self.shape
        cells, lines = self.cells.columns[self.cells.frequent], self.lines.columns[self.lines.frequent]
        rows = self.rows[self.lines.frequent]
        owner = np.searchsorted(lines, cells // v)
        held = sparse.csr_array((np.ones(len(cells)), (np.arange(len(cells)), owner)), shape=(len(cells), len(lines)))
        return self.directions.reshape(len(self.directions), -1)[:, rows[owner] * v + cells % v], held

    def deviations(self, sums: Sums) -> Deviations:
        """Those of one loss."""
        segments = self.shape[0]
        taken, along = sums.taken[0].numpy(), sums.along[:, 0].numpy()
        used = [d for d, multiples in enumerate(along) if multiples.any()]
        often, seldom = self.cells.often(taken), self.cells.seldom(taken)
        gram = often @ often.T + (seldom @ seldom.T).toarray()
        at_frequent, held = self._frequent_cells
        rare_cells = np.zeros(len(taken))
        rare_cells[self.cells.among_rare] = taken[self.cells.among_rare]
        frequent_rows, parts = self.rows[self.lines.frequent], {}
        for d in used:
            parts[d] = self.lines.often(along[d]), self.lines.seldom(along[d])
        for d in used:
            # What the cells have along a direction, in the rows that many segments visit and in the others.
            at_lines = np.bincount(self.line, rare_cells * self.at_cells[d], len(along[d])).astype(np.float64)
            many = self.lines.often(at_lines) + (held.T @ (often * at_frequent[d]).T).T
            few = at_lines + sum(0.5 * along[c] * self.products[c, d][self.row] for c in used)
            many = many + sum(0.5 * parts[c][0] * self.products[c, d][frequent_rows] for c in used)
            half = parts[d][0] @ many.T + (parts[d][1] @ self.lines.seldom(few).T).toarray()
            gram = gram + half + half.T
        centre = np.eye(segments) - 1 / segments
        return Deviations(self, centre @ gram @ centre, often, seldom, parts)


@dataclass(frozen=True, eq=False)
class Deviations:
    """Deviations of a loss's segments from their mean: their Gram matrix `[s, s]`, and what inner products with others take."""

    layout: Layout
    gram: Array
    often: Array
    seldom: sparse.csr_array
    lines: Mapping[int, tuple[Array, sparse.csr_array]]

    def along(self, vector: Array) -> Array:
        """Inner products with a vector `[p]`, `[s]`."""
        layout, (_, r, v) = self.layout, self.layout.shape
        at_cells, table = vector[layout.cells.columns], vector.reshape(r, v)[layout.lines.columns]
        found = self.often @ at_cells[layout.cells.frequent] + self.seldom @ at_cells[layout.cells.rare]
        for d, (often, seldom) in self.lines.items():
            at_rows = np.einsum("qv,qv->q", layout.directions[d][layout.rows], table)
            found = found + often @ at_rows[layout.lines.frequent] + seldom @ at_rows[layout.lines.rare]
        return np.asarray(found - found.mean())


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
