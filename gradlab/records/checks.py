"""Checks: every fault that dumps are known to have, with a probe, a sentence and the rows of its own.

A serious fault means that numbers cannot be right: nothing is computed from the columns it names unless forced. The others are
properties of the data that change how a result reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradlab.records.block import Block
from gradlab.records.gaps import Gap, gap
from gradlab.records.schema import NAMES
from gradlab.records.survey import BUCKETS, LIKELY, PLACES, SHIFTS, Survey, survey
from gradlab.records.table import Records

Array = npt.NDArray[Any]

#: Error of a test that decides on a fault.
ERROR = 1e-6
#: Share of a column's numbers that lie on the grid of a 16-bit format before it is taken to be one.
ON_GRID = 0.95
#: Numbers, or tokens, without which a probe says nothing.
NEEDED = 32
#: Chance of a repeated response below which it was not drawn twice.
TWICE = 1e-6
#: Share of k3 on one token in one place, and of the responses that have it there, from which a template is suspected.
DOMINANT, EVERYWHERE = 0.5, 0.8


@dataclass(frozen=True, eq=False)
class Finding:
    """A fault: its name, the columns it spoils, whether these cannot be right, a sentence, and the responses that show it.

    rows: numbers of responses in the records, and how many tokens of each (`response`, `tokens`).

    >>> found = gl.records.check(gl.Records.from_arrays(logprob=[[-1.0, 0.5]], ref_logprob=[[-1.0, -0.5]]))
    >>> [(finding.fault, finding.columns, finding.serious) for finding in found]
    [('positive', ('logprob',), True)]
    """

    fault: str
    columns: tuple[str, ...]
    serious: bool
    sentence: str
    rows: pd.DataFrame


def check(records: Records | Iterable[Block]) -> list[Finding]:
    """Every fault found in the records, the serious ones first; none for records that are as they should be.

    Faults: `padding`, `shifted`, `prompt`, `not finite`, `positive`, `missing`, `twice`, `cut`, `tempered`, `reference`, `rounded`,
    `template`. A column that a fault explains is not asked for others. Raises `ValueError` where there are no responses.

    >>> gl.records.check(gl.Records.from_arrays(logprob=[[-1.0, float("nan")]], ref_logprob=[[-1.0, -0.5]]))[0].sentence
    'logprob is NaN, infinite or null at 1 token of 1 of 1 responses, the first number 0; no mean over them exists'
    """
    return found(survey(records))


def found(seen: Survey) -> list[Finding]:
    """Every fault that a survey shows, see `check`."""
    spoiled: set[str] = set()
    findings: list[Finding] = []
    for probe in _PROBES:
        for finding in probe(seen, spoiled):
            findings.append(finding)
        spoiled |= {column for finding in findings if finding.fault in _EXPLAINS for column in finding.columns}
    return sorted(findings, key=lambda finding: not finding.serious)


def frame(findings: Sequence[Finding]) -> pd.DataFrame:
    """One row per fault: `fault, columns, serious, responses, sentence`."""
    rows = [(f.fault, " ".join(f.columns), f.serious, len(f.rows), f.sentence) for f in findings]
    return pd.DataFrame(rows, columns=["fault", "columns", "serious", "responses", "sentence"])


def spoiled(findings: Iterable[Finding]) -> set[str]:
    """Columns that nothing should be computed from; `mask` stands for all."""
    return {column for finding in findings if finding.serious for column in finding.columns}


def _rows(counts: Array) -> pd.DataFrame:
    index = np.flatnonzero(counts)
    return pd.DataFrame({"response": index, "tokens": np.asarray(counts)[index].astype(np.int64)})


def _of(rows: pd.DataFrame, seen: Survey) -> str:
    """`1,024 tokens of 12 of 256 responses, the first number 7`."""
    count, first = int(rows["tokens"].sum()), int(rows["response"].iloc[0])
    tokens = f"{count:,} token{'s' if count > 1 else ''} of "
    return f"{tokens}{len(rows):,} of {len(seen.live):,} responses, the first number {first}"


# ---- probes, in the order in which one explains what a later one would see ----------------------------------------------------


def _padding(seen: Survey, _: set[str]) -> Iterator[Finding]:
    for name in ("token_id", *seen.policies):
        rows = _rows(seen.of(name, "mirrored"))
        if len(rows):
            sentence = (
                f"{name} is padded on the other side than the mask: in {len(rows):,} of {len(seen.live):,} responses (the first number "
                f"{rows['response'].iloc[0]}) its numbers stand where the mask has padding; turn one of them round"
            )
            yield Finding("padding", (name,), True, sentence, rows)


def _shifted(seen: Survey, spoiled: set[str]) -> Iterator[Finding]:
    if seen.base in spoiled:
        return
    others = [name for name in seen.policies[1:] if name not in spoiled]
    shifts = {name: found for name in others if (found := _shift_of(seen, name))}
    if len(others) > 1 and len(shifts) == len(others) and len({shift for shift, *_ in shifts.values()}) == 1:
        # All others are shifted alike: it is the base that is.
        _, here, there = next(iter(shifts.values()))
        yield _shifted_by(seen, seen.base, others[0], (seen.base,), here, there)
    else:
        for name, (_, here, there) in shifts.items():
            columns = (name, seen.base) if len(others) == 1 else (name,)
            yield _shifted_by(seen, name, seen.base, columns, here, there)
    if not shifts and (by := _against_tokens(seen)):
        sentence = (
            f"log-probabilities are shifted by one against the tokens: what a position says of its token belongs to the one {_side(by)} "
            "(logits at t emit token t + 1); all columns are shifted alike, so that ratios are right and tokens are wrong"
        )
        yield Finding("shifted", ("token_id",), True, sentence, _rows(seen.live))


def _shift_of(seen: Survey, name: str) -> tuple[int, float, float] | None:
    """By how much a column is shifted against the base, with the correlations as they stand and moved; `None` where it is not."""
    moments = seen.moments.get((seen.base, name))
    if moments is None:
        return None
    for s in (0, 2):
        usable = (moments[:, s, :, 0] >= 8).all(-1)
        here, there = (_correlation(moments[usable, s, k]) for k in (0, 1))
        more = there - here
        if len(more) < 8 or not np.isfinite(more).all():
            continue
        spread = more.std(ddof=1) / len(more) ** 0.5
        if more.mean() > 0.2 and there.mean() > 0.4 and more.mean() > 5 * spread:
            return SHIFTS[s], float(here.mean()), float(there.mean())
    return None


def _correlation(moments: Array) -> Array:
    """Correlations `[folds]` from sums `n, x, y, x², y², xy`."""
    n, x, y, xx, yy, xy = moments.T
    return np.asarray((n * xy - x * y) / np.sqrt(np.maximum((n * xx - x * x) * (n * yy - y * y), 1e-300)))


def _shifted_by(seen: Survey, name: str, other: str, columns: tuple[str, ...], here: float, there: float) -> Finding:
    one = f"one of {name} and {other} (two columns do not say which)" if len(columns) > 1 else name
    sentence = (
        f"{one} is shifted by one: its correlation with {other} over the tokens is {here:.2f} as it stands and {there:.2f} when moved by "
        "one; logits at position t emit token t + 1"
    )
    return Finding("shifted", columns, True, sentence, _rows(seen.of(name if name != seen.base else other, "both")))


def _side(shift: int) -> str:
    return "after it" if shift > 0 else "before it"


def _against_tokens(seen: Survey) -> int:
    """By how much all columns are shifted against the tokens, 0 where they are not or nothing tells.

    By the lists of likeliest tokens, where there are any. Otherwise by how well a token's id predicts its log-probability: adjusted
    shares of the variance between ids, of the neighbours' ids and its own, compared over folds of responses.
    """
    answered = int((seen.live > 1).sum())
    for shift, end in ((-1, "start"), (1, "end")):  # what a shift leaves empty
        empty = [seen.of(name, f"zero at {end}").sum() for name in seen.policies]
        inside = [seen.of(name, "zero").sum() for name in seen.policies]
        if answered >= NEEDED and min(empty) >= 0.95 * answered and all(2 * e > i for e, i in zip(empty, inside, strict=True)):
            return shift
    if seen.tops.max() >= NEEDED:
        best = int(seen.tops.argmax())
        return SHIFTS[best] if best != 1 and seen.tops[best] > 2 * seen.tops[1] + NEEDED else 0
    count, first, second = seen.by_token[:, :, 0], seen.by_token[:, :, 1], seen.by_token[:, :, 2]
    n = count.sum(-1)
    full = (n > 2 * (count > 0).sum(-1)).all(1)
    if full.sum() < 8:
        return 0
    mean = first.sum(-1) / np.maximum(n, 1)
    total = second.sum(-1) - n * mean**2
    between = (first**2 / np.maximum(count, 1)).sum(-1) - n * mean**2
    kinds = (count > 0).sum(-1)
    share = (1 - (total - between) / np.maximum(total, 1e-300) * (n - 1) / np.maximum(n - kinds, 1))[full]
    for s, shift in ((0, -1), (2, 1)):
        more = share[:, s] - share[:, 1]
        spread = more.std(ddof=1) / len(more) ** 0.5
        if more.mean() > 0.05 and more.mean() > 6 * spread and share[:, s].mean() > 2 * share[:, 1].mean():
            return shift
    return 0


def _prompt(seen: Survey, spoiled: set[str]) -> Iterator[Finding]:
    rows = _rows(seen.of("", "prompt"))
    if not len(rows) or spoiled & {"token_id", *seen.policies}:
        return
    chance = seen.of("", "alike")[rows["response"]].min()
    why = (
        f"; that the responses of a group begin alike had probability 1e{chance / np.log(10):.0f} if they were drawn"
        if chance < LIKELY
        else "; the engine, or the length of the prompt, says so"
    )
    sentence = f"prompt tokens are inside the mask: {_of(rows, seen)}, at the beginning{why}"
    yield Finding("prompt", ("mask",), True, sentence, rows)


def _not_finite(seen: Survey, spoiled: set[str]) -> Iterator[Finding]:
    for name in seen.policies:
        rows = _rows(seen.of(name, "not finite"))
        if len(rows) and name not in spoiled:
            infinite = int(seen.of(name, "−inf").sum())
            of = (
                f" ({infinite:,} of them −∞: a token that this policy cannot emit, as outside of a nucleus)" if infinite else ""
            )
            sentence = f"{name} is NaN, infinite or null at {_of(rows, seen)}{of}; no mean over them exists"
            yield Finding("not finite", (name,), True, sentence, rows)


def _positive(seen: Survey, spoiled: set[str]) -> Iterator[Finding]:
    for name in seen.policies:
        rows = _rows(seen.of(name, "positive"))
        if not len(rows) or name in spoiled:
            continue
        share = seen.of(name, "positive").sum() / max(seen.of(name, "counted").sum(), 1)
        why = "a log-probability is never above 0: logits that were not normalised, or a sum of rounded terms"
        if share > 0.99:
            beyond = seen.of(name, "above 1").sum()
            why = "these are −log π: turn the sign" if beyond else "these are probabilities: take the logarithm"
        yield Finding("positive", (name,), True, f"{name} is positive at {_of(rows, seen)}; {why}", rows)


def _missing(seen: Survey, spoiled: set[str]) -> Iterator[Finding]:
    for name in seen.policies:
        counts, zeros = seen.of(name, "missing"), seen.of(name, "zero")
        why = "another policy says that they are far from certain"
        # A cut makes tokens of the engine's exactly certain; elsewhere a certain token is so to rounding, and others nearly are.
        if name != "behaviour_logprob" and zeros.sum() >= 8 and seen.of(name, "tiny").sum() < zeros.sum() / 4:
            counts, why = zeros, "no other token is nearly as certain"
        silent = (zeros == seen.live) & (seen.live >= 8)
        if not counts.any() and silent.any():
            counts, why = np.where(silent, seen.live, 0), "every token of these responses would be certain"
        rows = _rows(counts)
        edges = seen.of(name, "zero at start").sum() + seen.of(name, "zero at end").sum()
        shifted = "token_id" in spoiled and counts.sum() <= edges  # what a shift of all columns leaves empty
        if len(rows) and name not in spoiled and not shifted:
            sentence = (
                f"{name} is exactly 0 at {_of(rows, seen)}, where {why}: 0 stands for a number that is missing; write null"
            )
            yield Finding("missing", (name,), True, sentence, rows)


def _twice(seen: Survey, spoiled: set[str]) -> Iterator[Finding]:
    digests, chance = seen.counts[("", "digest")], seen.counts[("", "chance")]
    live = seen.live > 0
    _, index, counts = np.unique(digests, return_inverse=True, return_counts=True)
    n = len(digests)
    # Among n responses a given one of probability p is expected n·p times; where that is small, it was not drawn again.
    again = (counts[index] > 1) & live & (chance + np.log(max(n, 1)) < np.log(TWICE))
    again |= _repeated(digests, np.minimum(chance, 0.0)) & live
    again &= not spoiled & {"mask", "token_id"}  # whose tokens, or their chances, are not those that were drawn
    named = seen.of("", "name")
    _, of_name, times = np.unique(named, return_inverse=True, return_counts=True)
    by_name = (named != 0) & (times[of_name] > 1) & live
    if by_name.any():
        again, index = by_name, of_name
    if again.any():
        rows = _rows(np.where(again, seen.live, 0))
        more = int(again.sum() - len(np.unique(index[again])))
        first = np.flatnonzero(again & (index == index[np.flatnonzero(again)[0]]))[:2].tolist()
        why = (
            "one response_id in one step"
            if by_name.any()
            else f"the same tokens in the same step, which were drawn again with probability below {TWICE:g}"
        )
        sentence = (
            f"{more:,} response{'s are' if more > 1 else ' is'} written twice, such as numbers {first[0]} and {first[1]}: {why}; usually "
            "two ranks wrote one batch"
        )
        yield Finding("twice", ("mask",), True, sentence, rows)


def _repeated(digests: Array, chance: Array) -> Array:
    """Responses in runs that come again in the same order, of a length that chance does not make."""
    n = len(digests)
    order = np.argsort(digests, kind="stable")
    same = digests[order][1:] == digests[order][:-1]
    lags, counts = np.unique((order[1:] - order[:-1])[same], return_counts=True)
    found = np.zeros(n, dtype=bool)
    for lag in lags[np.argsort(-counts, kind="stable")[:4]].tolist():
        equal = np.concatenate([[False], digests[lag:] == digests[:-lag], [False]])
        edges = np.flatnonzero(np.diff(equal.astype(np.int8)))
        total = np.concatenate([[0.0], np.cumsum(chance)])
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if total[end] - total[start] + 2 * np.log(n) < np.log(TWICE):
                found[start:end] = found[start + lag : end + lag] = True
    return found


def _engine(seen: Survey, spoiled: set[str]) -> Iterator[Finding]:
    """Log-probabilities of before a cut, or of another temperature, for one of the policies only."""
    for (base, other), rows in seen.gaps.items():
        if spoiled & {base, other, "mask"}:
            continue
        known = gap(rows.rows, _pairs(seen, base, other))
        exact = len(_pairs(seen, base, other)) > 0
        if known.kind == "nucleus":
            yield _cut(seen, base, other, known, other)
        elif (reverse := gap(rows.rows[:, [1, 0, 2]], _pairs(seen, base, other)[:, ::-1])).kind == "nucleus":
            yield _cut(seen, base, other, reverse, base)
        elif known.kind == "temperature" and (exact or other != "ref_logprob"):
            sentence = (
                f"{base} and {other} are of different temperatures: {known.sentence}; recompute one of them at the other's"
            )
            yield Finding("tempered", (other,), True, sentence, _rows(seen.of(other, "both")))


def _cut(seen: Survey, base: str, other: str, known: Gap, which: str) -> Finding:
    rest = base if which == other else other
    sentence = (
        f"{which} is of after a cut to a nucleus and {rest} of before it: {known.sentence}; ratios of the two are wrong by the mass, so "
        "take both before or both after the cut"
    )
    return Finding("cut", (other,), True, sentence, _rows(seen.of(other, "both")))


def _pairs(seen: Survey, base: str, other: str) -> Array:
    found = seen.siblings.get((base, other))
    return np.zeros((0, 2)) if found is None else found.rows


def _reference(seen: Survey, spoiled: set[str]) -> Iterator[Finding]:
    if "ref_logprob" not in seen.policies or "ref_logprob" in spoiled or seen.base == "ref_logprob":
        return
    both, equal, step = seen.of("ref_logprob", "both"), seen.of("ref_logprob", "equal"), seen.of("", "step")
    steps = pd.DataFrame({"step": step, "both": both, "equal": equal}).groupby("step").sum()
    same = steps[(steps["both"] >= NEEDED) & (steps["both"] == steps["equal"])].index
    if not len(same):
        return
    first = bool("step" in seen.columns and (same == steps.index.min()).all())
    alone = "step" not in seen.columns or len(steps) == 1
    why = (
        "as it should in the first step only"
        if first or alone
        else "which only the first step's can: a copy, or the run has not moved"
    )
    sentence = f"ref_logprob equals {seen.base} at every token of {len(same):,} step{'s' if len(same) > 1 else ''}, {why}; every KL is 0"
    yield Finding("reference", ("ref_logprob",), not (first or alone), sentence, _rows(np.where(np.isin(step, same), both, 0)))


def _rounded(seen: Survey, spoiled: set[str]) -> Iterator[Finding]:
    for name in seen.policies:
        counted = seen.of(name, "counted")
        if counted.sum() < NEEDED or name in spoiled:
            continue
        for grid, bits in (("bfloat16", 9), ("float16", 12)):
            on = seen.of(name, grid)
            if on.sum() >= ON_GRID * counted.sum():
                sentence = (
                    f"{name} was rounded to {grid}: all its numbers lie on that grid, so each is off by up to a relative 2^−{bits}; "
                    f"log-ratios smaller than that of a log-probability are rounding"
                )
                yield Finding("rounded", (name,), False, sentence, _rows(on))
                break


def _template(seen: Survey, spoiled: set[str]) -> Iterator[Finding]:
    if spoiled & {seen.base, "ref_logprob", "token_id"} or seen.k3_total <= 0:
        return
    responses = int((seen.live > 0).sum())
    place, bucket = np.unravel_index(int(seen.at_place[:, 1].argmax()), (2 * PLACES, BUCKETS))
    count, k3 = seen.at_place[place, :, bucket]
    if responses >= NEEDED and count >= EVERYWHERE * responses and k3 > DOMINANT * seen.k3_total and seen.live.mean() > 2:
        where = f"{place + 1} from the beginning" if place < PLACES else f"{place - PLACES + 1} from the end"
        sentence = (
            f"one token (id {bucket} modulo {BUCKETS}), number {where}, is in {count / responses:.0%} of the responses and carries "
            f"{k3 / seen.k3_total:.0%} of k3: a token of the template, which nobody chooses; leave it out of the mask"
        )
        yield Finding("template", ("token_id",), False, sentence, _rows(seen.live > 0))


_PROBES: tuple[Callable[[Survey, set[str]], Iterator[Finding]], ...] = (
    _padding, _positive, _shifted, _prompt, _not_finite, _missing, _twice, _engine, _reference, _rounded, _template,
)  # fmt: skip
#: Faults that explain what other probes would see in their columns.
_EXPLAINS = {"padding", "shifted", "prompt", "positive", "missing"}

__all__ = ["NAMES", "Finding", "check", "found", "frame", "spoiled"]
