"""Moments of gradients that a linear recursion accumulates along a chain, from pairs of visits to one table row.

With `c ← C c` and `X ← C_x X + (C' c) ⊗ φ` (`gradlab.solvers.markov`), the gradient of a whole response is
`g·X = Σ_t (a_tᵀ C'_t c_{t−1}) φ_t`, where the adjoint runs backward from its end, `a ← C_xᵀ a` from `a = g`. Directions of two
steps overlap only in a common row:

    E‖g·X‖² = Σ_{d ≥ 0} (2 − [d = 0]) Σ_t E[ (a_tᵀ C'_t c_{t−1}) (a_{t+d}ᵀ C'_{t+d} c_{t+d−1}) φ_t·φ_{t+d};  both leave one row ]

Of the past such a pair needs `E[c cᵀ]` in its row, of the future `E[a aᵀ]` after its last token. What lies between is the same
at all times: the probability of coming back after `d` steps, with `C_x` and `C` multiplied along the way, which is a power of
one matrix `[v, v]` for every pair of states. So a distance `d` costs a product of such matrices, `v³`, and the sum over `t` of
past × future, `v² T`; where futures are the same at all times (credits that do not look ahead), `v²`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

#: Tables `[s, y]` over (row, token) by the states of past and future they meet.
Tables = dict[tuple[int, int, int, int], Tensor]
Pair = tuple[int, int]
#: An injection, and the entries of its `C'` and of a step.
Term = tuple[int, int, int]
Key = TypeVar("Key", bound=Hashable)
#: Times of the past and of the future that meet.
Span = tuple[slice, slice]
ALWAYS: Span = (slice(None), slice(None))
#: Distances are worked on several at once while their tables stay below this size.
STRIDE = 2**15


@dataclass(frozen=True)
class Injection:
    """Where a gradient enters: `factor` is `C'` `[r, v, m, k]`; token `y` pulls its row along `onehot · e_y + shift`, `[r, v]`.

    `norm` `[r, v]` are the squares of those directions, to their own digits.
    """

    factor: Tensor
    onehot: float
    shift: Tensor
    norm: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """What pairs of steps apart are made of: equal entries of `C_x`, `C` and `C'` are one kind, and products are worked on once.

    `recursion` says how every class of weights between two visits continues, `Σ count · move · class`, with `moves` the products
    of kinds in use; classes of `starts` begin as the identity. `meetings` are sums over classes and first steps, each with the
    second steps that follow, and the pairs of states of past and future around both; pasts and futures are symmetric.
    """

    kinds: list[Tensor]
    moves: set[Pair]
    recursion: list[Counter[tuple[Pair, int]]]
    starts: set[int]
    meetings: list[tuple[frozenset[tuple[tuple[int, Term], int]], Counter[tuple[Term, Pair, Pair]]]]


@dataclass(frozen=True, eq=False)
class Walk:
    """A recursion on a chain whose row 0 emits the first token and row `y + 1` the token after `y`.

    `mu` `[r, v]` are the probabilities of tokens, 0 after the end of a response; `c` `[r, v, k, k]` and `x` `[r, v, m, m]` are `C`
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
        futures = self._futures(_moves(self.mu, self.x, self.c), torch.outer(g, value)[None], 1)
        gradient = torch.zeros_like(self.mu)
        for each in self.injected:
            steps = [(i, k, j, m) for i, k in _filled(each.factor) for j, m in _filled(self.c)]
            tables = {(k, m, i, j): self.mu * each.factor[..., i, k] * self.c[..., j, m] for i, k, j, m in steps}
            taken = _meeting(tables, self._pasts, futures, [ALWAYS])[0, ..., 0]
            gradient += each.onehot * taken + each.shift * taken.sum(-1, keepdim=True)
        return gradient.flatten()

    def square(self, ends: Tensor) -> Tensor:
        """`E[Σ_ij Q_ij X_i·X_j]` of whole responses for the symmetric matrices `Q` of `ends` `[q, m, m]`, `[q]`."""
        pasts, futures = self._pasts, self._futures(_moves(self.mu, self.x, self.x), ends, 2)
        total = _meeting(self._same_step(), pasts, futures, [ALWAYS]).sum((0, 1, 2))
        pasts, steps = pasts[1:, 1:], len(self.scale) - 1
        if self.settled:
            pasts, futures = pasts.cumsum(0), futures[-1:]
        for distances, tables in self._distinct_steps():
            spans: list[Span] = [
                (slice(steps - d - 1, steps - d), slice(None)) if self.settled else (slice(steps - d), slice(1 + d, None))
                for d in distances
            ]
            total += 2 * _meeting(tables, pasts, futures, spans).sum((0, 1, 2))
        return total

    @property
    def arrays(self) -> int:
        """How many arrays `[v, v]` of doubles the moments hold at once, at most."""
        plan, (k, m) = self._plan, (self.c.shape[-1], self.x.shape[-1])
        dense = sum(matrix[0, 0].numel() for matrix in (self.c, self.x, *(each.factor for each in self.injected)))
        together = 2 * max(len(_filled(self.c)), len(_filled(self.x))) ** 2
        apart = len(plan.moves) + 3 * len(plan.recursion) + 5 * (k * (k + 1) // 2) * (m * (m + 1) // 2)
        return dense + len(plan.kinds) + max(together, apart)

    @cached_property
    def _pasts(self) -> Tensor:
        """`E[c cᵀ]` before every token in every row, `[T, r, k, k]`."""
        moves, pasts = _moves(self.mu, self.c, self.c), self.mu.new_zeros(len(self.scale), len(self.mu), *self.c.shape[2:])
        pasts[0, 0] = torch.outer(self.start, self.start)
        tables, (k, m, i, j) = torch.stack(list(moves.values())), torch.tensor(list(moves)).T
        into = i * self.c.shape[-1] + j
        for now, then in zip(pasts[1:], pasts[:-1], strict=True):
            moved = then[:, k, m].T[:, None] @ tables
            now[1:].flatten(1).index_add_(1, into, moved[:, 0].T)
        return pasts

    def _futures(self, moves: Tables, ends: Tensor, power: int) -> Tensor:
        """What is left of `ends` `[q, a, b]`, taken after the last token, after token `y` of every time, `[T, v, q, a, b]`."""
        scaled = self.scale[:, None, None, None] ** power * ends
        futures = scaled[:, None].repeat(1, self.mu.shape[1], 1, 1, 1)
        if self.settled and power == 2:
            return futures
        tables, (k, m, i, j) = torch.stack([table[1:] for table in moves.values()]), torch.tensor(list(moves)).T
        into = k * futures.shape[-1] + m
        for t in range(len(futures) - 2, -1, -1):
            moved = tables @ futures[t + 1][..., i, j].permute(2, 0, 1)
            futures[t] = 0
            futures[t].flatten(2).index_add_(2, into, moved.permute(1, 2, 0))
            if self.eos is not None:
                futures[t, self.eos] = scaled[t]
        return futures

    def _same_step(self) -> Tables:
        """The pairs of a step with itself."""
        tables: Tables = {}
        for one in self.injected:
            for two in self.injected:
                dot = one.norm
                if two is not one:
                    dot = one.onehot * two.onehot + one.onehot * two.shift + two.onehot * one.shift
                    dot = dot + (one.shift * two.shift).sum(-1, keepdim=True)
                flow = self.mu * dot
                for i, k in _filled(one.factor):
                    for j, m in _filled(two.factor):
                        _add(tables, (*_sorted(k, m), *_sorted(i, j)), flow * one.factor[..., i, k] * two.factor[..., j, m])
        return tables

    @cached_property
    def _plan(self) -> Plan:
        """Which products the pairs of steps apart need."""
        factors = [each.factor[1:] for each in self.injected]
        kinds, (x_kind, c_kind, *factor_kinds) = _distinct([self.x[1:], self.c[1:], *factors])
        moves = {((k, m), (i, j)): _sorted(x_kind[i, k], c_kind[j, m]) for i, k in x_kind for j, m in c_kind}
        # By the states after the first step, what it injects and hands on; by those before the second, what it makes of them.
        firsts: dict[Pair, list[tuple[Pair, Term]]] = {}
        seconds: dict[Pair, list[tuple[Pair, Term]]] = {}
        for e, kind in enumerate(factor_kinds):
            for (b, k), factor in kind.items():
                for (j, m), step in c_kind.items():
                    firsts.setdefault((b, j), []).append((_sorted(k, m), (e, factor, step)))
                for (a, i), step in x_kind.items():
                    seconds.setdefault((i, k), []).append((_sorted(a, b), (e, factor, step)))
        useful = _connected(set(seconds), [(now, then) for then, now in moves])
        sources = [pair for pair in firsts if pair in useful]
        carried = [(now, source) for source in sources for now in sorted(_connected({source}, list(moves)) & useful)]
        place, recursion = _classes(carried, moves)
        sums: dict[tuple[Pair, Pair], Counter[tuple[int, Term]]] = {}
        for now, source in carried:
            if now in seconds:
                for past, term in firsts[source]:
                    sums.setdefault((now, past), Counter())[place[now, source], term] += 1
        meetings: dict[frozenset[tuple[tuple[int, Term], int]], Counter[tuple[Term, Pair, Pair]]] = {}
        for (now, past), pulled in sums.items():
            counts = meetings.setdefault(frozenset(pulled.items()), Counter())
            for future, term in seconds[now]:
                counts[term, past, future] += 1
        starts = {place[now, source] for now, source in carried if now == source}
        return Plan(kinds, {move for terms in recursion for move, _ in terms}, recursion, starts, list(meetings.items()))

    def _distinct_steps(self) -> Iterator[tuple[range, Tables]]:
        """The pairs of steps 1, 2, 3 … apart, some distances at a time: tables `[d, s, y]`."""
        mu, last, plan, kinds = self.mu[1:], len(self.scale) - 2, self._plan, self._plan.kinds
        shifts = [(each.onehot, each.shift[1:]) for each in self.injected]
        moves = {(a, b): (mu * kinds[a] * kinds[b]).T.contiguous() for a, b in plan.moves}
        weights = [torch.eye(len(mu), dtype=mu.dtype) * (at in plan.starts) for at in range(len(plan.recursion))]
        stride = max(1, STRIDE // mu.numel())
        for d in range(1, last + 1 if plan.meetings else 1, stride):
            steps = []
            for _ in range(min(stride, last + 1 - d)):
                steps.append(torch.stack(weights))
                weights = [
                    sum((count * (moves[move] @ weights[at]) for (move, at), count in terms.items()), torch.zeros_like(mu))
                    for terms in plan.recursion
                ]
            tables: Tables = {}
            back = torch.stack(steps, 1)
            for terms, ends in plan.meetings:
                second_row = torch.zeros_like(mu)  # along what the first step has pulled the row that the second one leaves
                for (at, (e, factor, step)), count in terms:
                    flow, (onehot, shift) = back[at] * (count * mu * kinds[factor] * kinds[step]), shifts[e]
                    second_row = second_row + onehot * flow + shift * flow.sum(-1, keepdim=True)
                dots = [onehot * second_row + (shift * second_row).sum(-1, keepdim=True) for onehot, shift in shifts]
                for ((e, factor, step), past, future), count in ends.items():
                    _add(tables, (*past, *future), dots[e] * (count * mu * kinds[factor] * kinds[step]))
            yield range(d, d + len(steps)), tables


def _distinct(matrices: list[Tensor]) -> tuple[list[Tensor], list[dict[Pair, int]]]:
    """The entries of matrices `[r, v, new, old]`, equal ones once, and which of them stands where.

    Equal entries that rounding has moved apart are worked on twice, to the same result.
    """
    kinds: list[Tensor] = []

    def kind(entry: Tensor) -> int:
        for index, known in enumerate(kinds):
            if torch.equal(known, entry):
                return index
        kinds.append(entry)
        return len(kinds) - 1

    return kinds, [{(i, k): kind(matrix[..., i, k].contiguous()) for i, k in _filled(matrix)} for matrix in matrices]


def _classes(
    carried: list[tuple[Pair, Pair]], moves: Mapping[tuple[Pair, Pair], Pair]
) -> tuple[dict[tuple[Pair, Pair], int], list[Counter[tuple[Pair, int]]]]:
    """Pairs `(now, source)` whose weights start and continue alike are one class: the class of each, how each class continues."""
    before: dict[tuple[Pair, Pair], list[tuple[Pair, tuple[Pair, Pair]]]] = {pair: [] for pair in carried}
    for (then, now), move in moves.items():
        for at, source in carried:
            if at == then and (now, source) in before:
                before[now, source].append((move, (then, source)))
    place, classes = {pair: int(pair[0] == pair[1]) for pair in carried}, 0
    while True:  # until members of a class have one continuation
        counts = {pair: Counter((move, place[old]) for move, old in before[pair]) for pair in carried}
        known: dict[tuple[int, frozenset[tuple[tuple[Pair, int], int]]], int] = {}
        place = {pair: known.setdefault((place[pair], frozenset(counts[pair].items())), len(known)) for pair in carried}
        if len(known) == classes:
            continued = {place[pair]: Counter((move, place[old]) for move, old in before[pair]) for pair in carried}
            return place, [continued[at] for at in range(classes)]
        classes = len(known)


def _sorted(a: int, b: int) -> Pair:
    return (a, b) if a <= b else (b, a)


def _meeting(tables: Tables, pasts: Tensor, futures: Tensor, spans: list[Span]) -> Tensor:
    """`Σ_t Σ_{kmij} table_{kmij} past_t[k, m] future_t[i, j]` over the times of every span, `[d, s, y, q]`.

    tables `[s, y]` or `[d, s, y]`, pasts `[t, s, k, k]`, futures `[t, y, q, a, b]`.
    """
    before, after = sorted({key[:2] for key in tables}), sorted({key[2:] for key in tables})
    shape = len(spans), pasts.shape[1], futures.shape[1], futures.shape[2]
    meeting = pasts.new_zeros(shape)
    if tables and spans:
        past = torch.stack([pasts[..., k, m] for k, m in before], 1)
        future = torch.stack([futures[..., i, j] for i, j in after], 1)
        joint = torch.stack([past[one].flatten(1).T @ future[two].flatten(1) for one, two in spans])
        joint = joint.view(shape[0], len(before), shape[1], len(after), *shape[2:])
        for key, table in tables.items():
            meeting += table[..., None] * joint[:, before.index(key[:2]), :, after.index(key[2:])]
    return meeting


def _moves(mu: Tensor, left: Tensor, right: Tensor) -> Tables:
    """The map of pairs of states of one step, averaged over its token: `(k, m, i, j)` leads from `(k, m)` to `(i, j)`, `[r, v]`."""
    return {(k, m, i, j): mu * left[..., i, k] * right[..., j, m] for i, k in _filled(left) for j, m in _filled(right)}


def _connected(starts: set[Pair], edges: list[tuple[Pair, Pair]]) -> set[Pair]:
    """What edges lead to from `starts`, and these."""
    reached = set(starts)
    while more := {end for start, end in edges if start in reached} - reached:
        reached |= more
    return reached


def _filled(matrix: Tensor) -> list[Pair]:
    """The entries of a matrix `[r, v, new, old]` that are not 0 everywhere."""
    return [(new, old) for new, old in matrix.flatten(0, 1).any(0).nonzero().tolist()]


def _add(sums: dict[Key, Tensor], key: Key, term: Tensor) -> None:
    """`sums[key] += term`, without changing what is already there."""
    sums[key] = sums[key] + term if key in sums else term
