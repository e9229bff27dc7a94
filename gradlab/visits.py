"""Moments of gradients that a linear recursion accumulates along a chain, from pairs of visits to one table row.

With `c ← C c` and `X ← C_x X + (C' c) ⊗ φ` (`gradlab.markov`), the gradient of a whole response is `g·X = Σ_t (a_tᵀ C'_t c_{t−1}) φ_t`,
where the adjoint runs backward from its end, `a ← C_xᵀ a` from `a = g`. Directions of two steps overlap only in a common row:

    E‖g·X‖² = Σ_{d ≥ 0} (2 − [d = 0]) Σ_t E[ (a_tᵀ C'_t c_{t−1}) (a_{t+d}ᵀ C'_{t+d} c_{t+d−1}) φ_t·φ_{t+d};  both leave one row ]

Of the past such a pair needs `E[c cᵀ]` in its row, of the future `E[a aᵀ]` behind its last token. What lies between is the same
at all times: the probability of coming back after `d` steps, with `C_x` and `C` multiplied along the way, which is a power of
one matrix `[v, v]` for every pair of states. So a distance `d` costs a product of such matrices, `v³`, and the sum over `t` of
past × future, `v² T`; where futures are the same at all times (credits that do not look ahead), `v²`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

#: Tables `[s, y]` over (row, token) by the states of past and future they meet.
Tables = dict[tuple[int, int, int, int], Tensor]
Pair = tuple[int, int]
Key = TypeVar("Key")
#: Times of the past and of the future that meet.
Span = tuple[slice, slice]
ALWAYS: Span = (slice(None), slice(None))
#: Distances are worked on several at once while their tables stay below this size.
STRIDE = 2**15


@dataclass(frozen=True)
class Injection:
    """Where a gradient enters: `factor` is `C'` `[r, v, m, k]`; token `y` pulls its row along `onehot · e_y + shift`, `[r, v]`."""

    factor: Tensor
    onehot: float
    shift: Tensor


@dataclass(frozen=True, eq=False)
class Walk:
    """A recursion on a chain whose row 0 emits the first token and row `y + 1` the token after `y`.

    `mu` `[r, v]` are the probabilities of tokens, 0 behind the end of a response; `c` `[r, v, k, k]` and `x` `[r, v, m, m]` are `C`
    and `C_x`, `start` `[k]` the states `c` before the first token. A response ends with `eos`, or after as many tokens as
    `scale` has entries; the gradient of one with `t` tokens is multiplied by `scale[t − 1]`. `settled` promises that `x` is the
    identity and `scale` constant.
    """

    mu: Tensor
    c: Tensor
    x: Tensor
    injected: tuple[Injection, ...]
    start: Tensor
    scale: Tensor
    eos: int | None
    settled: bool

    def mean(self, g: Tensor, value: Tensor) -> Tensor:
        """`E[(value·c)(g·X)]` of whole responses, `[p]`."""
        futures = self._futures(self._between, torch.outer(g, value)[None], 1)
        found = torch.zeros_like(self.mu)
        for each in self.injected:
            steps = [(i, k, j, m) for i, k in _filled(each.factor) for j, m in _filled(self.c)]
            tables = {(k, m, i, j): self.mu * each.factor[..., i, k] * self.c[..., j, m] for i, k, j, m in steps}
            taken = _meeting(tables, self._pasts, futures, [ALWAYS])[0, ..., 0]
            found += each.onehot * taken + each.shift * taken.sum(-1, keepdim=True)
        return found.flatten()

    def square(self, ends: Tensor) -> Tensor:
        """`E[Σ_ij Q_ij X_i·X_j]` of whole responses for the symmetric matrices `Q` of `ends` `[q, m, m]`, `[q]`."""
        pasts, futures = self._pasts, self._futures(_moves(self.mu, self.x, self.x), ends, 2)
        total = _meeting(self._together(), pasts, futures, [ALWAYS]).sum((0, 1, 2))
        pasts, steps = pasts[1:, 1:], len(self.scale) - 1
        if self.settled:
            pasts, futures = pasts.cumsum(0), futures[-1:]
        for distances, tables in self._apart():
            spans: list[Span] = [
                (slice(steps - d - 1, steps - d), slice(None)) if self.settled else (slice(steps - d), slice(1 + d, None))
                for d in distances
            ]
            total += 2 * _meeting(tables, pasts, futures, spans).sum((0, 1, 2))
        return total

    @property
    def arrays(self) -> int:
        """How many arrays `[v, v]` of doubles the moments hold at once, at most."""
        between_c, between_x, factor = (
            len(_filled(m)) for m in (self.c, self.x, torch.stack([each.factor.abs() for each in self.injected]).sum(0))
        )
        dense = sum(m[0, 0].numel() for m in (self.c, self.x, *(each.factor for each in self.injected)))
        pairs = self.c.shape[-1] * self.x.shape[-1]
        return dense + (between_c + between_x) ** 2 + (between_c + between_x) * factor + factor**2 + 4 * pairs**2

    @cached_property
    def _between(self) -> Tables:
        """How a step moves a gradient's state and a value together, by the states they come from and lead to."""
        return _moves(self.mu, self.x, self.c)

    @cached_property
    def _pasts(self) -> Tensor:
        """`E[c cᵀ]` before every token in every row, `[T, r, k, k]`."""
        moves, pasts = _moves(self.mu, self.c, self.c), self.mu.new_zeros(len(self.scale), len(self.mu), *self.c.shape[2:])
        pasts[0, 0] = torch.outer(self.start, self.start)
        for now, then in zip(pasts[1:], pasts[:-1], strict=True):
            for (k, m, i, j), table in moves.items():
                now[1:, i, j] += then[:, k, m] @ table
        return pasts

    def _futures(self, moves: Tables, ends: Tensor, power: int) -> Tensor:
        """What is left of `ends` `[q, a, b]`, taken after the last token, behind token `y` of every time, `[T, v, q, a, b]`."""
        scaled = self.scale[:, None, None, None] ** power * ends
        futures = scaled[:, None].repeat(1, self.mu.shape[1], 1, 1, 1)
        if self.settled and power == 2:
            return futures
        for t in range(len(futures) - 2, -1, -1):
            futures[t] = 0
            for (k, m, i, j), table in moves.items():
                futures[t, :, :, k, m] += table[1:] @ futures[t + 1, :, :, i, j]
            if self.eos is not None:
                futures[t, self.eos] = scaled[t]
        return futures

    def _together(self) -> Tables:
        """The pairs of a step with itself."""
        tables: Tables = {}
        for one in self.injected:
            for two in self.injected:
                dot = one.onehot * two.onehot + one.onehot * two.shift + two.onehot * one.shift
                flow = self.mu * (dot + (one.shift * two.shift).sum(-1, keepdim=True))
                for i, k in _filled(one.factor):
                    for j, m in _filled(two.factor):
                        _add(tables, (k, m, i, j), flow * one.factor[..., i, k] * two.factor[..., j, m])
        return tables

    def _apart(self) -> Iterator[tuple[range, Tables]]:
        """The pairs of steps 1, 2, 3 … apart, some distances at a time: tables `[d, s, y]`."""
        mu, c, x, last = self.mu[1:], self.c[1:], self.x[1:], len(self.scale) - 2
        moves = {((k, m), (i, j)): table[1:].T.contiguous() for (k, m, i, j), table in self._between.items()}
        injected = [Injection(each.factor[1:], each.onehot, each.shift[1:]) for each in self.injected]
        meets = {(i, j) for _, i in _filled(x) for each in injected for _, j in _filled(each.factor)}
        useful = _connected(meets, [(now, then) for then, now in moves])
        firsts = [  # of the first step: what it injects and hands on, by the pair of states behind it
            (each, (i, j), (k, m), mu * each.factor[..., i, k] * c[..., j, m])
            for each in injected for i, k in _filled(each.factor) for j, m in _filled(c) if (i, j) in useful
        ]  # fmt: skip
        seconds = [  # of the second step: what it makes of the pair of states before it
            (each, (i, j), (a, b), mu * x[..., a, i] * each.factor[..., b, j])
            for each in injected for a, i in _filled(x) for b, j in _filled(each.factor)
        ]  # fmt: skip
        # By the pair of states before the second step and behind the first: the weight of a row, given the first token.
        carried = {
            (now, source): torch.eye(len(mu), dtype=mu.dtype) * (now == source)
            for source in dict.fromkeys(pair for _, pair, _, _ in firsts)
            for now in _connected({source}, list(moves)) & useful
        }
        stride = max(1, STRIDE // mu.numel())
        for d in range(1, last + 1, stride):
            steps = []
            for _ in range(min(stride, last + 1 - d)):
                steps.append(carried)
                carried = _carried(carried, moves)
            pulled: Tables = {}  # along what the first step has pulled the row that the second one leaves
            for now, source in carried:
                if now in meets:
                    back = torch.stack([step[now, source] for step in steps])
                    for each, pair, past, table in firsts:
                        if pair == source:
                            flow = back * table
                            _add(pulled, (*now, *past), each.onehot * flow + each.shift * flow.sum(-1, keepdim=True))
            tables: Tables = {}
            for each, pair, future, table in seconds:
                for (i, j, k, m), pull in pulled.items():
                    if (i, j) == pair:
                        dot = each.onehot * pull + (each.shift * pull).sum(-1, keepdim=True)
                        _add(tables, (k, m, *future), table * dot)
            yield range(d, d + len(steps)), tables


def _meeting(tables: Tables, pasts: Tensor, futures: Tensor, spans: list[Span]) -> Tensor:
    """`Σ_t Σ_{kmij} table_{kmij} past_t[k, m] future_t[i, j]` over the times of every span, `[d, s, y, q]`.

    tables `[s, y]` or `[d, s, y]`, pasts `[t, s, k, k]`, futures `[t, y, q, a, b]`.
    """
    before, after = sorted({key[:2] for key in tables}), sorted({key[2:] for key in tables})
    shape = len(spans), pasts.shape[1], futures.shape[1], futures.shape[2]
    found = pasts.new_zeros(shape)
    if tables and spans:
        past = torch.stack([pasts[..., k, m] for k, m in before], 1)
        future = torch.stack([futures[..., i, j] for i, j in after], 1)
        joint = torch.stack([past[one].flatten(1).T @ future[two].flatten(1) for one, two in spans])
        joint = joint.view(shape[0], len(before), shape[1], len(after), *shape[2:])
        for key, table in tables.items():
            found += table[..., None] * joint[:, before.index(key[:2]), :, after.index(key[2:])]
    return found


def _carried(
    carried: dict[tuple[Pair, Pair], Tensor], moves: Mapping[tuple[Pair, Pair], Tensor]
) -> dict[tuple[Pair, Pair], Tensor]:
    """The same weights one token later."""
    found: dict[tuple[Pair, Pair], Tensor] = {}
    for (then, now), move in moves.items():
        for (at, source), weight in carried.items():
            if at == then and (now, source) in carried:
                _add(found, (now, source), move @ weight)
    return found


def _moves(mu: Tensor, left: Tensor, right: Tensor) -> Tables:
    """The map of pairs of states of one step, averaged over its token: `(k, m, i, j)` leads from `(k, m)` to `(i, j)`, `[r, v]`."""
    return {(k, m, i, j): mu * left[..., i, k] * right[..., j, m] for i, k in _filled(left) for j, m in _filled(right)}


def _connected(starts: set[Pair], edges: list[tuple[Pair, Pair]]) -> set[Pair]:
    """What edges lead to from `starts`, and these."""
    found = set(starts)
    while more := {end for start, end in edges if start in found} - found:
        found |= more
    return found


def _filled(matrix: Tensor) -> list[Pair]:
    """The entries of a matrix `[r, v, new, old]` that are not 0 everywhere."""
    return [(new, old) for new, old in matrix.flatten(0, 1).any(0).nonzero().tolist()]


def _add(sums: dict[Key, Tensor], key: Key, term: Tensor) -> None:
    """`sums[key] += term`, without changing what is already there."""
    sums[key] = sums[key] + term if key in sums else term
