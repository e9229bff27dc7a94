"""One pass over records that collects what the checks ask: counts for each response, and a bounded number of everything else.

What is kept grows with the number of responses (some 30 numbers each), never with that of tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import torch

from gradlab._common.parallel import spread
from gradlab.records.block import Block
from gradlab.records.schema import POLICIES
from gradlab.records.table import Records

Array = npt.NDArray[Any]

#: A log-probability above this is no rounding of 0.
POSITIVE = 1e-6
#: Below this another policy says that a log-probability of exactly 0 is none: the token is far from certain. Engine and trainer are
#: near each other, and a reference is not near either of them.
UNCERTAIN, DISTANT = -1.0, -4.0
#: Log-probabilities of one token in two lists differ by less than this.
SAME = 2e-3
#: A certain token is seldom exactly so: beside zeros that are numbers there are others this near.
TINY = 1e-3
#: Shifts that are looked at, and numbers of tokens, buckets of token ids, folds and places that are kept.
SHIFTS = (-1, 0, 1)
KEPT, BUCKETS, FOLDS, PLACES = 2**18, 2**12, 16, 8


@dataclass
class Survey:
    """Counts `[responses]` by column and what is counted, and bounded samples; see `survey`."""

    policies: tuple[str, ...]
    columns: tuple[str, ...]
    _parts: dict[tuple[str, str], list[Array]] = field(default_factory=dict)
    moments: dict[tuple[str, str], Array] = field(default_factory=dict)
    gaps: dict[tuple[str, str], Thinned] = field(default_factory=dict)
    siblings: dict[tuple[str, str], Thinned] = field(default_factory=dict)
    by_token: Array = field(default_factory=lambda: np.zeros((FOLDS, len(SHIFTS), 3, BUCKETS)))
    at_place: Array = field(default_factory=lambda: np.zeros((2 * PLACES, 2, BUCKETS)))
    k3_total: float = 0.0
    tops: Array = field(default_factory=lambda: np.zeros(len(SHIFTS)))

    def add(self, column: str, what: str, values: Array) -> None:
        """Append one number for each response of a block."""
        self._parts.setdefault((column, what), []).append(np.asarray(values))

    @cached_property
    def counts(self) -> dict[tuple[str, str], Array]:
        """What was counted, by column and kind, one number for each response."""
        return {key: np.concatenate(parts) for key, parts in self._parts.items()}

    def of(self, column: str, what: str) -> Array:
        """One kind of count; zeros where it was not taken."""
        found = self.counts.get((column, what))
        return np.zeros(len(self.live), dtype=np.int64) if found is None else found

    @property
    def live(self) -> Array:
        """Number of tokens that count of each response."""
        return self.counts[("", "live")]

    def merge(self, other: Survey) -> None:
        """Add what was seen of the part of the records that follows."""
        for key, parts in other._parts.items():
            self._parts.setdefault(key, []).extend(parts)
        for key, sums in other.moments.items():
            self.moments[key] = self.moments.get(key, 0) + sums
        for mine, theirs in ((self.gaps, other.gaps), (self.siblings, other.siblings)):
            for pair, kept in theirs.items():
                mine.setdefault(pair, Thinned(kept.width)).merge(kept)
        self.by_token, self.at_place, self.tops = (
            self.by_token + other.by_token, self.at_place + other.at_place, self.tops + other.tops
        )  # fmt: skip
        self.k3_total += other.k3_total

    @property
    def base(self) -> str:
        """The policy that others are compared with: that of the trainer, where it is there."""
        return self.policies[0]


@dataclass
class Thinned:
    """Of a stream of rows at most `KEPT`: those whose place in the records has a number below `2^(64 − halvings)`.

    The number is a hash of the place, so that what is kept depends on neither order nor parts.
    """

    width: int
    halvings: int = 0
    _keys: list[Array] = field(default_factory=list)
    _parts: list[Array] = field(default_factory=list)

    def add(self, rows: Array, response: Array, place: Array) -> None:
        """Take rows `[m, width]` of responses `[m]` and places in them `[m]`."""
        self._take(_scattered(response, place), rows)

    def merge(self, other: Thinned) -> None:
        """Take what another has kept of another part."""
        self.halvings = max(self.halvings, other.halvings)
        held = list(zip(self._keys + other._keys, self._parts + other._parts, strict=True))
        self._keys, self._parts = [], []
        for keys, rows in held:
            self._take(keys, rows)

    def _take(self, keys: Array, rows: Array) -> None:
        kept = keys < self._limit
        self._keys.append(keys[kept])
        self._parts.append(rows[kept])
        while sum(map(len, self._keys)) > KEPT:
            self.halvings += 1
            kept = (keys := np.concatenate(self._keys)) < self._limit
            self._keys, self._parts = [keys[kept]], [np.concatenate(self._parts)[kept]]

    @property
    def _limit(self) -> Any:
        return np.uint64(2**64 - 1 if not self.halvings else 2 ** (64 - self.halvings))

    @property
    def rows(self) -> Array:
        """What is kept, `[k, width]`, in the order of the hash."""
        if not self._parts:
            return np.zeros((0, self.width))
        return np.asarray(np.concatenate(self._parts)[np.argsort(np.concatenate(self._keys), kind="stable")])


def _scattered(response: Array, place: Array) -> Array:
    """A number below 2^64 for each place, that looks random. Source: splitmix64, Steele, Lea & Flood (2014)."""
    x = (response.astype(np.uint64) << np.uint64(24)) + place.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(x ^ (x >> np.uint64(31)))


def survey(records: Records | Iterable[Block], jobs: int = 1) -> Survey:
    """Go through all records once, on `jobs` processes where they come in parts. Raises `ValueError` where there is none."""
    if isinstance(records, Records):
        tasks = [joblib.delayed(_survey)(part, records.policies, records.columns) for part in records.parts(jobs)]
        seen = spread(tasks, jobs)
        found: Survey = seen[0]
        for other in seen[1:]:
            found.merge(other)
    else:
        found = _survey(records, POLICIES, ())
    if not found._parts:
        raise ValueError("there are no responses in these records: the files are empty, or no response was kept")
    return found


def _survey(blocks: Iterable[Block], policies: tuple[str, ...], columns: tuple[str, ...]) -> Survey:
    found = Survey(policies, columns)
    for block in blocks:
        _look(found, block)
    return found


def _look(found: Survey, block: Block) -> None:
    n, mask = len(block), block.mask
    found.add("", "live", block.live)
    found.add("", "step", block["step"] if "step" in block else np.zeros(n, dtype=np.int64))
    found.add("", "digest", _digests(block))
    found.add("", "name", _names(block))
    names = [name for name in found.policies if name in block]
    prompt = _prompts(found, block, names)
    for name in found.policies:
        if name in names:
            _of_column(found, block, name, names, prompt)
        else:
            found.add(name, "null", np.ones(n, dtype=bool))
    _mirrored_tokens(found, block)
    for other in names[1:] if names and names[0] == found.base else ():
        _of_pair(found, block, found.base, other)
    if found.base in names and "token_id" in block:
        _of_tokens(found, block, mask)
    sampler = next((name for name in ("behaviour_logprob", "old_logprob", "logprob") if name in names), None)
    total = np.zeros(n) if sampler is None else block.sums(np.where(mask & np.isfinite(block[sampler]), block[sampler], 0.0))
    found.add("", "chance", total)


def _of_column(found: Survey, block: Block, name: str, names: list[str], prompt: Array) -> None:
    x, mask, owner = block[name], block.mask, block.owner
    null = block.absent.get(name, np.zeros(len(block), dtype=bool))
    live = mask & ~null[owner]
    finite = np.isfinite(x)
    found.add(name, "null", null)
    found.add(name, "not finite", block.sums(live & ~finite))
    found.add(name, "−inf", block.sums(live & (x == -np.inf)))
    found.add(name, "positive", block.sums(live & finite & (x > POSITIVE)))
    found.add(name, "above 1", block.sums(live & finite & (x > 1)))
    zero = live & (x == 0)
    found.add(name, "zero", block.sums(zero))
    threshold = np.full(len(block), UNCERTAIN)
    if "top_p" in block:  # a nucleus of one token makes that token certain
        threshold = np.minimum(threshold, np.log(np.clip(np.nan_to_num(block["top_p"], nan=1.0), 1e-6, 1)) * 1.05)
    kin = {"logprob", "old_logprob", "behaviour_logprob"}
    near = [other for other in names if other != name and {name, other} <= kin]
    limit = threshold[owner] if near else DISTANT
    others = near or [other for other in names if other != name]
    against = (
        np.any([(block[other] < limit) & (block[other] != 0) for other in others], axis=0) if others else np.zeros(len(x), bool)
    )
    found.add(name, "missing", block.sums(zero & against & ~prompt))
    found.add(name, "tiny", block.sums(live & (x < 0) & (x > -TINY)))
    place, last = block.place, block.live[owner] - 1
    found.add(name, "zero at start", block.sums(zero & (place == 0)))
    found.add(name, "zero at end", block.sums(zero & (place == last)))
    counted = live & finite & (x != 0)
    found.add(name, "counted", block.sums(counted))
    for grid, kept in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        short = torch.from_numpy(np.where(finite, x, 0.0)).to(kept).double().numpy()
        found.add(name, grid, block.sums(counted & (short == x)))
    found.add(name, "mirrored", _mirrored(block, finite & (x != 0), 0.9))


def _mirrored(block: Block, support: Array, share: float) -> Array:
    """Responses whose numbers stand where the mask would be if it were padded on the other side."""
    mask, mirror = block.mask, _mirror(block)
    here, there = mask & ~mirror, mirror & ~mask
    wide = block.sums(here)
    return (wide >= 2) & (block.sums(here & ~support) > 0.9 * wide) & (block.sums(there & support) > share * wide)


def _mirrored_tokens(found: Survey, block: Block) -> None:
    if "token_id" not in block or bool(block.mask.all()):
        found.add("token_id", "mirrored", np.zeros(len(block), dtype=bool))
        return
    tokens, mirror = block["token_id"], _mirror(block)
    here = tokens[block.mask & ~mirror]
    if not len(here):
        found.add("token_id", "mirrored", np.zeros(len(block), dtype=bool))
        return
    ids, counts = np.unique(here, return_counts=True)
    # The end token may be the padding, so that one real token looks like it.
    turned = _mirrored(block, tokens != ids[counts.argmax()], 0.4)
    some = turned.mean() > 0.5 * (block.sums(block.mask & ~mirror) >= 2).mean()
    found.add("token_id", "mirrored", turned & some)


def _mirror(block: Block) -> Array:
    """The mask of every response from its end to its beginning."""
    ends = block.offsets
    return np.asarray(block.mask[(ends[:-1] + ends[1:] - 1)[block.owner] - np.arange(len(block.mask))])


def _of_pair(found: Survey, block: Block, base: str, other: str) -> None:
    """Products of two columns, as they stand and with one of them shifted; where they are equal; their gaps."""
    a, b = block[base], block[other]
    usable = block.mask & np.isfinite(a) & np.isfinite(b)
    found.add(other, "equal", block.sums(usable & (a == b)))
    found.add(other, "both", block.sums(usable))
    x, y = (np.where(usable, z, 0.0) for z in (a, b))
    moments = found.moments.setdefault((base, other), np.zeros((FOLDS, len(SHIFTS), 2, 6)))
    fold = (block.first + np.arange(len(block))) % FOLDS
    for s, shift in enumerate(SHIFTS):
        there = usable & _beside(usable, block.owner, shift)
        u = x * there
        for k, z in enumerate((y * there, np.roll(y, -shift) * there)):
            for m, product in enumerate((there, u, z, u * u, z * z, u * z)):
                moments[:, s, k, m] += np.bincount(fold, weights=block.sums(product), minlength=FOLDS)
    sign = np.sign(block["advantage"]) if "advantage" in block else np.full(len(a), np.nan)
    rows = np.stack([a, b, sign], -1)[usable]
    found.gaps.setdefault((base, other), Thinned(3)).add(rows, (block.first + block.owner)[usable], block.place[usable])


def _beside(marked: Array, owner: Array, shift: int) -> Array:
    """Tokens whose neighbour at `shift` is marked and of the same response."""
    found = np.roll(marked, -shift) & (np.roll(owner, -shift) == owner)
    if shift:
        found[-1 if shift > 0 else 0] = False
    return np.asarray(found)


def _of_tokens(found: Survey, block: Block, mask: Array) -> None:
    """Sums by token, as it stands and shifted, and where in a response k3 lies."""
    x, bucket = block[found.base], block["token_id"] % BUCKETS
    good = mask & np.isfinite(x)
    inner = good & _beside(good, block.owner, -1) & _beside(good, block.owner, 1)
    fold = (block.first + block.owner) % FOLDS
    for s, shift in enumerate(SHIFTS):
        index = (fold * BUCKETS + np.roll(bucket, -shift))[inner]
        for k in range(3):
            sums = np.bincount(index, weights=x[inner] ** k, minlength=FOLDS * BUCKETS)
            found.by_token[:, s, k] += sums.reshape(FOLDS, BUCKETS)
    if "top_ids" in block and "top_logprob" in block and "logprob" in block:
        for s, shift in enumerate(SHIFTS):
            # Lists and log-probabilities belong to another token than the one beside them, or log-probabilities alone do.
            pairs = [
                (np.roll(block["token_id"], -shift), block["logprob"]),
                (block["token_id"], np.roll(block["logprob"], -shift)),
            ]
            found.tops[s] += max(
                ((block["top_ids"] == i[:, None]) & (np.abs(block["top_logprob"] - p[:, None]) < SAME) & inner[:, None]).sum()
                for i, p in pairs
            )
    if "ref_logprob" in block:
        ratio = x - block["ref_logprob"]
        good &= np.isfinite(ratio)
        k3 = np.expm1(-ratio, where=good, out=np.zeros(len(x))) + np.where(good, ratio, 0.0)
        found.k3_total += float(k3.sum())
        place = block.place
        for start, at in ((0, place), (PLACES, block.live[block.owner] - 1 - place)):
            near = good & (at >= 0) & (at < PLACES)
            index = ((start + at) * BUCKETS + bucket)[near]
            for k, weights in enumerate((None, k3[near])):
                sums = np.bincount(index, weights=weights, minlength=2 * PLACES * BUCKETS)
                found.at_place[:, k] += sums.reshape(2 * PLACES, BUCKETS)


# ---- responses to one prompt ------------------------------------------------------------------------------------------------


def _prompts(found: Survey, block: Block, names: list[str]) -> Array:
    """Mark live tokens `[N]` that are the prompt's, and count them; on the way, compare responses to one prompt.

    They are where `prompt_length` says so; where the engine has a run of zeros at the beginning, since engines report nothing
    about prompts; and where all responses of a group begin alike that hardly could have.
    """
    mask, n, owner = block.mask, len(block), block.owner
    position = np.arange(len(mask)) - block.offsets[owner]
    length, chance = np.zeros(n, dtype=np.int64), np.zeros(n)
    if "prompt_length" in block:
        length = block.sums(mask & (position < block["prompt_length"][owner])).astype(np.int64)
    if "behaviour_logprob" in names and len(names) > 1:
        silent = mask & (block["behaviour_logprob"] == 0)
        spoken = np.full(n, np.iinfo(np.int64).max)
        np.minimum.at(spoken, owner[mask & ~silent], block.place[mask & ~silent])
        run = np.minimum(spoken, block.live)
        other = block[next(name for name in names if name != "behaviour_logprob")]
        inside = mask & (block.place < run[owner])
        # Prompts are a run in most responses, and the trainer is certain of their tokens nowhere near always.
        possible = (run >= 3) & (run < block.live) & (block.sums(inside & (other < -0.05)) > 0)
        if possible.mean() > 0.5 and np.mean(other[inside & possible[owner]] < UNCERTAIN) > 0.3:
            length = np.maximum(length, np.where(possible, run, 0))
    if "token_id" in block and ("group_id" in block or "prompt_id" in block):
        alike, chance = _compare(found, block, names)
        length = np.maximum(length, alike)
    found.add("", "prompt", length)
    found.add("", "alike", chance)
    return np.asarray(mask & (block.place < length[owner]))


def _compare(found: Survey, block: Block, names: list[str]) -> tuple[Array, Array]:
    """Responses to one prompt in the order of their tokens: where neighbours part they have emitted two tokens at one prefix.

    Returns how many tokens each response shares with all others of its group where that could not be chance, and the logarithm of
    how likely it was.
    """
    kept = {name: _live_rows(block, name) for name in ["token_id", *names]}
    ids = kept["token_id"]
    shared, chance = np.zeros(len(block), dtype=np.int64), np.zeros(len(block))
    sampler = next((name for name in ("behaviour_logprob", "logprob", "old_logprob") if name in names), None)
    parted: list[list[float]] = []
    where: list[tuple[int, int]] = []
    for members in _groups(block):
        order = sorted(members, key=lambda i: ids[i].tolist())
        least = min(len(ids[i]) for i in members)
        common = _common(ids[order[0]], ids[order[-1]])
        distinct = 1
        for i, j in pairwise(order):
            at = _common(ids[i], ids[j])
            distinct += at < max(len(ids[i]), len(ids[j]))
            if at < min(len(ids[i]), len(ids[j])):
                parted.append([kept[name][i][at] for name in names] + [kept[name][j][at] for name in names])
                where.append((block.first + int(i), at))
        if sampler is not None and distinct > 1 and 0 < common <= least:
            steps = kept[sampler][order[0]][:common]
            for other in (name for name in ("logprob", "old_logprob") if name in names):  # an engine is silent about a prompt
                told = kept[other][order[0]][:common]
                steps = np.where((steps == 0) & (told < UNCERTAIN), told, steps)
            steps = np.where(np.isfinite(steps) & (steps < 0), steps, 0.0)
            likely = (distinct - 1) * float(steps.sum())
            shared[members], chance[members] = common, likely
    pairs, places = np.array(parted).reshape(-1, 2, len(names)), np.array(where, dtype=np.int64).reshape(-1, 2)
    for k, name in enumerate(names):
        if name != found.base and found.base in names:
            steps = (pairs[:, 1] - pairs[:, 0])[:, [names.index(found.base), k]]
            finite = np.isfinite(steps).all(-1)
            found.siblings.setdefault((found.base, name), Thinned(2)).add(steps[finite], *places[finite].T)
    return np.where(chance < LIKELY, shared, 0), chance


#: Logarithm of the chance below which a beginning that all responses of a group share was not drawn.
LIKELY = -25.0


def _live_rows(block: Block, name: str) -> list[Array]:
    return np.split(block[name][block.mask], np.cumsum(block.live)[:-1])


def _groups(block: Block) -> Iterator[Array]:
    """Numbers of the responses of every group of at least two, of one step and run."""
    keys = [block[name] for name in ("run", "step", "group_id" if "group_id" in block else "prompt_id") if name in block]
    members: dict[Any, list[int]] = {}
    for i, key in enumerate(zip(*(key.tolist() for key in keys), strict=True)):
        if key[-1] is not None and block.live[i]:
            members.setdefault(key, []).append(i)
    return (np.array(some) for some in members.values() if len(some) > 1)


def _common(a: Array, b: Array) -> int:
    """Length of the beginning that two sequences share."""
    least = min(len(a), len(b))
    differ = np.flatnonzero(a[:least] != b[:least])
    return int(differ[0]) if len(differ) else least


def _digests(block: Block) -> Array:
    """A number for each response that is the same for the same tokens (or, without them, log-probabilities) of one step."""
    name = "token_id" if "token_id" in block else next(name for name in POLICIES if name in block)
    return _hashed(block, [row.tobytes() for row in _live_rows(block, name)])


def _names(block: Block) -> Array:
    """A number for each response that is the same for one name in one step; 0 for those without a name."""
    if "response_id" not in block:
        return np.zeros(len(block), dtype=np.uint64)
    named = block["response_id"].tolist()
    found = _hashed(block, [str(name).encode() for name in named])
    return np.where([name is not None for name in named], found, np.uint64(0))


def _hashed(block: Block, contents: list[bytes]) -> Array:
    keys = zip(*(block[name].tolist() for name in ("run", "step") if name in block), strict=True)
    owners = [repr(key).encode() for key in keys] or [b""] * len(block)
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(owner + content, digest_size=8).digest(), "little")
            for owner, content in zip(owners, contents, strict=True)
        ],
        dtype=np.uint64,
    )
