"""One pass over records that adds up what the statistics are made of: sums for each response, histograms, and the largest tokens.

What is kept grows with the number of responses (some 50 numbers each) and with the vocabulary, not with the number of tokens.
Totals of parts add up to those of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from gradlab._common.parallel import spread
from gradlab.estimators import kernels
from gradlab.estimators.coefficients import coefficients
from gradlab.records import corrections
from gradlab.records.block import Block
from gradlab.records.scored import estimators, rollouts
from gradlab.records.table import Records

Array = npt.NDArray[Any]

KERNELS = ("k1", "k2", "k3")
#: Edges of the histograms of log-ratios, and of magnitudes of coefficients (natural logarithm).
EDGES = np.arange(-20.0, 20.01, 0.25)
SIZES = np.arange(-30.0, 60.01, 0.05)
#: Largest tokens that are kept by name, and by magnitude.
NAMED, LARGEST = 40, 4096
#: Places in a response are counted one by one up to here and by powers of two from there on.
SINGLE = 8


@dataclass
class Totals:
    """Sums over records: `[n]` for each response, and bounded ones over all tokens. See `add_up`."""

    policy: str
    reference: str | None
    behaviour: str | None
    longest: int
    left_out: int = 0
    _parts: dict[str, list[Array]] = field(default_factory=dict)
    ratios: dict[str, Any] = field(default_factory=dict)
    by_token: Array = field(default_factory=lambda: np.zeros((0, 4)))
    by_place: Array = field(default_factory=lambda: np.zeros((64, 4)))
    prefix: Array = field(default_factory=lambda: np.zeros((64, 3)))
    named: list[Array] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    largest: dict[str, Array] = field(default_factory=dict)
    #: Of each estimator: sums of magnitudes, of those of over-sampled tokens, of `x = Σ_t c² ‖score‖²` and of `x^1.5` over responses.
    pulls: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, values: Array) -> None:
        """Append one number for each response of a block."""
        self._parts.setdefault(name, []).append(np.asarray(values))

    def merge(self, other: Totals) -> None:
        """Add the totals of the part of the records that follows."""
        self.left_out += other.left_out
        for name, parts in other._parts.items():
            self._parts.setdefault(name, []).extend(parts)
        for mine, theirs in ((self.ratios, other.ratios), (self.sizes, other.sizes), (self.pulls, other.pulls)):
            for name, sums in theirs.items():
                mine[name] = mine.get(name, 0) + sums
        for name, values in other.largest.items():
            _keep_largest(self, name, values)
        self.by_token = _widened(self.by_token, len(other.by_token))
        self.by_token[: len(other.by_token)] += other.by_token
        self.by_place, self.prefix = self.by_place + other.by_place, self.prefix + other.prefix
        if other.named:
            _keep_named(self, np.concatenate(other.named))
        self.texts = other.texts | self.texts

    @cached_property
    def responses(self) -> dict[str, Array]:
        """What was summed over each response, `[n]`."""
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._parts


def add_up(
    records: Records, policy: str, reference: str | None, behaviour: str | None, lengths: tuple[int, float], jobs: int = 1
) -> Totals:
    """Go through the records once, on `jobs` processes where they come in parts. Responses that lack a number are left out.

    lengths: longest and mean number of tokens that count.
    """
    tasks = [joblib.delayed(_add_up)(part, policy, reference, behaviour, lengths) for part in records.parts(jobs)]
    totals, *others = spread(tasks, jobs)
    for other in others:
        totals.merge(other)
    found: Totals = totals
    return found


def _add_up(
    blocks: Iterable[Block], policy: str, reference: str | None, behaviour: str | None, lengths: tuple[int, float]
) -> Totals:
    totals = Totals(policy, reference, behaviour, lengths[0])
    needed = [name for name in (policy, reference, behaviour) if name is not None]
    chosen = estimators() if reference is not None else {}
    for block in blocks:
        known = block.known(*needed)
        totals.left_out += int((~known).sum())
        first, kept = block.first + np.flatnonzero(known), block.take(known)
        if len(kept):
            _add(totals, kept, first)
            if reference is not None:
                _add_estimators(totals, kept, chosen, reference, lengths)
    return totals


def place_of(place: Array) -> Array:
    """Bin of a place in a response: one by one up to `SINGLE`, then by powers of two."""
    far = np.floor(np.log2(np.maximum(place, 1) / SINGLE)).astype(np.int64)
    return np.where(place < SINGLE, place, SINGLE + np.maximum(far, 0))


def place_label(index: int) -> str:
    """`3`, or `16–31`, counted from 0."""
    if index < SINGLE:
        return str(index)
    low = SINGLE * 2 ** (index - SINGLE)
    return f"{low}–{2 * low - 1}"


def _add(totals: Totals, block: Block, first: Array) -> None:
    mask = block.mask
    totals.add("response", first)
    totals.add("length", block.live)
    totals.add("step", block["step"] if "step" in block else np.zeros(len(block)))
    if "reward" in block:
        totals.add("reward", block["reward"])
    totals.add("cluster", clusters(block, first))
    log_p = np.where(mask, block[totals.policy], 0.0)
    totals.add("surprise", -block.sums(log_p))
    if "removed" in block:
        totals.add("removed", block.sums(mask & block["removed"]))
    if totals.reference is not None:
        ratio = np.where(mask, block[totals.policy] - np.where(mask, block[totals.reference], 0.0), 0.0)
        values = {name: _kernel(name, ratio) for name in KERNELS}
        for name, value in values.items():
            totals.add(name, block.sums(value))
        with np.errstate(over="ignore"):
            totals.add("square", block.sums(np.expm1(-ratio) ** 2))
        totals.add("below", block.sums(mask & (ratio < 0)))
        _histogram(totals, "log_ratio", ratio[mask])
        _by_token(totals, block, first, ratio, values)
    if totals.behaviour is not None:
        weight = np.where(mask, block[totals.policy] - np.where(mask, block[totals.behaviour], 0.0), 0.0)
        if "removed" in block:
            totals.add("removed above", block.sums(mask & block["removed"] & (weight > 0)))
        totals.add("log_weight", block.sums(weight))
        totals.add("mismatch", block.sums(_kernel("k3", -weight)))
        totals.add("absolute", block.sums(np.abs(weight)))
        with np.errstate(over="ignore"):
            rho = np.exp(weight)
            totals.add("weight", block.sums(rho * mask))
            totals.add("weight_square", block.sums(rho**2 * mask))
        totals.add("largest_weight", _most(block, np.abs(weight)))
        _histogram(totals, "log_weight", weight[mask])
        _prefixes(totals, block, weight)
        sign = np.sign(block["advantage"]) if "advantage" in block else None
        for name, value in corrections.sums(block, weight, sign).items():
            totals.add(name, value)


def clusters(block: Block, first: Array) -> Array:
    """A number for each group of a step, whose responses share a prompt; without groups, for each response."""
    own = pd.util.hash_array(first.astype(np.uint64))
    name = next((name for name in ("group_id", "prompt_id") if name in block), None)
    if name is None:
        return own
    steps = block["step"].astype(np.uint64) if "step" in block else np.zeros(len(block), dtype=np.uint64)
    null = np.array([group is None for group in block[name].tolist()])
    groups = pd.util.hash_array(block[name].astype(str).astype(object), categorize=False) ^ pd.util.hash_array(steps)
    return np.where(null, own, groups)


def _kernel(name: str, ratio: Array) -> Array:
    x = torch.from_numpy(ratio)
    found: Array = kernels.value(name, x, torch.zeros_like(x), None, None).numpy()
    return found


def _most(block: Block, values: Array) -> Array:
    found = np.zeros(len(block))
    np.maximum.at(found, block.owner, values)
    return found


def _histogram(totals: Totals, name: str, values: Array) -> None:
    counts = np.bincount(_bin(EDGES, values), minlength=len(EDGES) + 1)
    totals.ratios[name] = totals.ratios.get(name, 0) + counts


def _bin(edges: Array, values: Array) -> Array:
    """Number of equidistant edges that are not above each value."""
    place: Array = np.floor((values - edges[0]) / (edges[1] - edges[0])) + 1
    return np.asarray(np.clip(place, 0, len(edges)), dtype=np.int64)


def _widened(sums: Array, size: int) -> Array:
    """The rows of sums by token, at least so many."""
    return np.concatenate([sums, np.zeros((size - len(sums), sums.shape[1]))]) if size > len(sums) else sums


def _by_token(totals: Totals, block: Block, first: Array, ratio: Array, values: dict[str, Array]) -> None:
    """Sums by token id and by place, and the tokens with the largest k3 and the largest log-ratio."""
    mask = block.mask
    bins = place_of(block.place)[mask]
    for k, weights in enumerate((None, values["k1"], values["k2"], values["k3"])):
        totals.by_place[:, k] += np.bincount(bins, None if weights is None else weights[mask], minlength=64)
    ids = block.columns.get("token_id")
    if ids is not None and ids.size and ids[mask].min() >= 0 and ids[mask].max() < 2**23:
        size = int(ids[mask].max()) + 1
        totals.by_token = _widened(totals.by_token, size)
        for k, weights in enumerate((None, values["k1"], values["k2"], values["k3"])):
            totals.by_token[:size, k] += np.bincount(ids[mask], None if weights is None else weights[mask], minlength=size)
        if "token" in block:
            new = np.unique(ids[mask], return_index=True)
            totals.texts |= {
                int(i): str(block["token"][mask][at]) for i, at in zip(*new, strict=True) if int(i) not in totals.texts
            }
    k3 = np.where(mask, values["k3"], -1.0)
    top = np.argpartition(-k3, min(NAMED, len(k3) - 1))[:NAMED]
    top = top[mask[top]]
    rows = [
        first[block.owner[top]],
        block.place[top],
        np.full(len(top), -1) if ids is None else ids[top],
        ratio[top],
        k3[top],
        values["k1"][top],
    ]
    _keep_named(totals, np.stack([*rows, block[totals.policy][top]], -1))


def _keep_named(totals: Totals, rows: Array) -> None:
    """The tokens with the largest k3, of equal ones the earliest."""
    both = np.concatenate([*totals.named, rows])
    totals.named = [both[np.lexsort((both[:, 1], both[:, 0], -both[:, 4]))[:NAMED]]]


def _prefixes(totals: Totals, block: Block, weight: Array) -> None:
    """Sums of the prefix weights and of their squares after so many tokens; a response that has ended keeps its weight."""
    running = np.cumsum(weight)
    before = np.concatenate([[0.0], running])[block.offsets[:-1]]
    place, end = block.place, block.live[block.owner] - 1
    with np.errstate(over="ignore"):
        prefix = np.exp(running - before[block.owner])
    for b in range(int(place_of(np.array([totals.longest - 1]))[0]) + 1):
        at = b if b < SINGLE else SINGLE * 2 ** (b - SINGLE)
        here = block.mask & ((place == at) | ((place == end) & (end < at)))
        w = prefix[here]
        totals.prefix[b] += len(w), w.sum(), (w**2).sum()


def _add_estimators(totals: Totals, block: Block, chosen: dict[str, Any], reference: str, lengths: tuple[int, float]) -> None:
    for _, rollout in rollouts(block, totals.policy, reference, totals.behaviour, *lengths):
        live = rollout.mask.numpy()
        over = (rollout.log_ratio > 0).double()
        score = (1 - rollout.log_prob.exp()).square()
        for name, estimator in chosen.items():
            c = coefficients(estimator, rollout).score.abs() * rollout.mask_float
            norm = (c.square() * score).sum(-1)
            parts = c.sum(), (c * over).sum(), norm.sum(), norm.pow(1.5).sum()
            totals.pulls[name] = totals.pulls.get(name, 0) + np.array([float(part) for part in parts])
            _add_sizes(totals, name, c.numpy()[live])


def _add_sizes(totals: Totals, name: str, magnitudes: Array) -> None:
    positive = magnitudes[magnitudes > 0]
    bins = _bin(SIZES, np.log(positive))
    found = totals.sizes.setdefault(name, np.zeros((len(SIZES) + 1, 2)))
    found[:, 0] += np.bincount(bins, minlength=len(found))
    found[:, 1] += np.bincount(bins, positive, minlength=len(found))
    _keep_largest(totals, name, positive)


def _keep_largest(totals: Totals, name: str, magnitudes: Array) -> None:
    held = totals.largest.get(name, np.zeros(0))
    if len(held) == LARGEST:
        magnitudes = magnitudes[magnitudes > held.min()]
    both = np.concatenate([held, magnitudes])
    totals.largest[name] = np.partition(both, len(both) - LARGEST)[-LARGEST:] if len(both) > LARGEST else both
