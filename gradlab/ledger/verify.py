"""The ledger: published claims, each settled by a measurement within its scope. No verdict is written by hand.

A claim names the frame that decides it, the rows in its scope, a statistic, a relation and a margin. Every row of the scope
is judged on its own; then the quantifier decides. Exact statistics are points, sampled ones their confidence interval, so a
run that cannot tell comes out UNDECIDED, with the number of samples that could.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from scipy.special import ndtri

from gradlab._common import frames as files
from gradlab._common.arguments import check_columns, checked
from gradlab._common.names import check_name, check_probability, check_real, check_whole, several
from gradlab.ledger import CLAIMS, PUBLISHED, STATEMENTS, Claim, Condition, claim
from gradlab.ledger import claims as all_claims
from gradlab.ledger.form import Relation

__all__ = [
    "CLAIMS",
    "Claim",
    "Condition",
    "Verdict",
    "claim",
    "judge",
    "ledger",
    "load",
    "samples_needed",
    "settle",
    "summary",
    "verify",
]

VerdictName = Literal["HOLDS", "FAILS", "UNDECIDED", "OPEN"]
#: Relations that hold where another fails, and the other way round.
_OPPOSITE: dict[Relation, Relation] = {"≤": ">", "≥": "<", "≠": "="}

#: Columns that say which row decided, in the order in which they are read out, and how. Numbers without a form are not read out.
EVIDENCE = {
    "subject": "{}",
    "policy": "{}-policy",
    "world": "{}",
    "group": "{}",
    "kind": "{}",
    "scenario": "{}",
    "behaviour": "{}",
    "estimator": "{}",
    "kernel": "{}",
    "clamp": "{}",
    "parameter": "{}",
    "target": "{}",
    "via": "{}",
    "samples": "{:.0f} samples",
    "kl": "KL {:.4g}",
    "log_ratio": "log-ratio {:.3g}",
}

#: Numbers as close as this, relative to the larger of 1 and the value they are held against, are equal.
EQUALITY_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Verdict:
    """What a frame says about a claim, with the row that decided it.

    `effect` is the statistic in the decisive row and `low`, `high` its interval (equal when exact); `resolution` is half the
    interval's width, the smallest discrepancy this run could tell; `samples_needed` is given where more samples would
    decide (with power 0.8, if the effect is as estimated). `rows` counts the rows in scope and `distinct` the
    different numbers in them, `evidence` describes the decisive one. An interval may be open to one side or both (infinite ends).

    >>> claim = gl.claims.claim("k2-unbiased", "bandit", "03_objectives", "bias", "=", 0, 1e-9, estimator="k2-loss")
    >>> gl.claims.settle(claim, gl.measure("k2-loss", gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1])))).verdict
    'HOLDS'
    """

    verdict: VerdictName
    effect: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    resolution: float = float("nan")
    samples_needed: int | None = None
    rows: int = 0
    distinct: int = 0
    evidence: str = ""


@checked
def ledger(claims: Iterable[Claim] | None = None) -> pd.DataFrame:
    """The claims as a frame: what is tested in which scope, what is published, by whom, and what decides.

    One row per claim and scope; all of them, registered ones too, unless `claims` are given. Claims of one id share a statement;
    an id is a topic, or a topic, a dot and a part of it.

    >>> frame = gl.claims.ledger()
    >>> frame.loc[frame["id"] == "k2-unbiased", "statement"].iloc[0]
    'k2 as loss is an unbiased gradient of the reverse KL'
    """
    claims = all_claims() if claims is None else claims
    columns = ("id", "scope", "statement", "published", "source", "frame", "figure", "rule")
    return pd.DataFrame([[getattr(claim, column) for column in columns] for claim in claims], columns=list(columns))


def verify(
    frames: Mapping[str, pd.DataFrame] | Path | str,
    only: str | Iterable[str] | None = None,
    claims: Iterable[Claim] | None = None,
) -> pd.DataFrame:
    """Settle the ledger with measured frames, or with a folder of their CSV files.

    Returns the ledger with the columns of `Verdict`; a claim whose frame is not there is OPEN. `only` restricts it to some
    ids or topics; `claims` settles these instead of the ledger's. Raises `ValueError` for an unknown id or frame, for a folder that
    does not exist or holds none of the frames, and for a frame without the columns or rows a claim needs.

    >>> settled = gl.claims.verify("figures", only="k3-weaker")
    >>> settled.loc[settled["frame"] == "02_coefficients", ["scope", "verdict"]].values.tolist()
    [['over-sampled token (δ < 1)', 'HOLDS'], ['under-sampled token (δ > 1)', 'FAILS']]
    """
    chosen = all_claims() if claims is None else tuple(claims)
    if wrong := [item for item in chosen if not isinstance(item, Claim)]:
        raise ValueError(f"claims must be made by gl.claims.claim(…), got {type(wrong[0]).__name__}")
    only = None if only is None else several(only)
    known = dict.fromkeys(name for item in chosen for name in (item.topic, item.id))
    for name in only or ():
        check_name("claim", name, known if claims is not None else dict.fromkeys([*PUBLISHED, *STATEMENTS, *known]))
    chosen = tuple(item for item in chosen if only is None or item.id in only or item.topic in only)
    if not isinstance(frames, str | Path | Mapping):
        raise ValueError(f"frames must be a folder, or a mapping from names to frames, got {frames!r}")
    if isinstance(frames, str | Path):
        frames = _read(Path(frames), {item.frame for item in chosen})
    named = dict.fromkeys(item.frame for item in (*all_claims(), *chosen))
    for name, frame in frames.items():
        check_name("frame", name, named)
        if not isinstance(frame, pd.DataFrame):
            raise ValueError(f"frames must be a mapping from names to frames, got {frame!r} for {name}")
    verdicts = [settle(item, frames[item.frame]) if item.frame in frames else Verdict("OPEN") for item in chosen]
    frame_by_name = {field.name: [getattr(verdict, field.name) for verdict in verdicts] for field in fields(Verdict)}
    return ledger(chosen).assign(**frame_by_name).astype({"samples_needed": "Int64"})


@checked
def summary(settled: pd.DataFrame) -> pd.DataFrame:
    """One row per topic of a settled ledger: `id`, what is `published`, and how many scopes came out as each verdict.

    >>> table = gl.claims.summary(gl.claims.verify("figures", only="k3-weaker"))
    >>> table.set_index("id")["published"].to_dict()
    {'k3-weaker': 'k3 as loss regularises more weakly than k2 as loss at equal coefficient'}
    """
    check_columns(settled, "id", "published", "verdict")
    topics = settled["id"].str.split(".").str[0]
    counts = pd.crosstab(topics, settled["verdict"]).reindex(columns=list(get_args(VerdictName)), fill_value=0)
    first = settled.assign(id=topics).drop_duplicates("id").set_index("id")[["published"]]
    return first.join(counts).reset_index()


def _read(folder: Path, names: set[str]) -> dict[str, pd.DataFrame]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; `gradlab reproduce --output {folder}` makes its data")
    frames = load(folder, names)
    if not frames:
        raise ValueError(
            f"{folder} holds none of the frames that settle claims; `gradlab reproduce --output {folder}` makes them"
        )
    return frames


@checked
def load(folder: Path | str, names: Iterable[str]) -> dict[str, pd.DataFrame]:
    """The saved frames of these names that are in the folder. Raises `ValueError` for a damaged one, see `gradlab._common.frames`.

    >>> list(gl.claims.load("figures", ["03_tokens"]))
    ['03_tokens']
    """
    if not isinstance(folder, str | Path) or not Path(folder).is_dir():
        raise ValueError(f"folder must be one that there is, got {folder!r}")
    there = [name for name in sorted(names) if (Path(folder) / f"{name}.csv").is_file()]
    return {name: files.load(Path(folder), name) for name in there}


@checked
def settle(claim: Claim, frame: pd.DataFrame) -> Verdict:
    """Judge one claim on one frame.

    Raises `ValueError` when the frame lacks a column or, unless the claim is `optional`, every row the claim needs; sampled rows
    need the statistic's `_low` and `_high`.

    >>> claim = gl.claims.claim("k3-biased", "bandit", "03_objectives", "bias", ">", 0, 0.01, estimator="k3-loss")
    >>> frame = gl.measure("k3-loss", gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1])))
    >>> gl.claims.settle(claim, frame).verdict
    'HOLDS'
    """
    _require(claim, frame, {claim.statistic, *(condition.column for condition in claim.where)})
    rows = frame
    for condition in claim.where:
        rows = rows[_selects(condition, rows[condition.column])]
    if rows.empty:
        if claim.optional:
            return Verdict("OPEN")
        raise ValueError(
            f"claim {claim.id} ({claim.scope}): no row of frame {claim.frame} is in its scope; "
            "is the frame whole, or was it made by another version?"
        )
    sampled = rows["via"].eq("sampled").to_numpy() if "via" in rows else np.zeros(len(rows), dtype=bool)
    centre = rows[claim.statistic].to_numpy(dtype=float)
    low, high = centre, centre
    if sampled.any():
        bounds = [f"{claim.statistic}_low", f"{claim.statistic}_high"]
        _require(claim, frame, {*bounds, "samples"})
        low, high = (np.where(sampled, rows[bound].to_numpy(dtype=float), centre) for bound in bounds)
    verdicts = [judge(claim, lo, hi) for lo, hi in zip(low, high, strict=True)]
    verdict, i = _decide(claim, verdicts, centre)
    needed = None
    if verdict == "UNDECIDED" and sampled[i]:
        needed = samples_needed(claim, centre[i], low[i], high[i], int(rows["samples"].iloc[i]))
    effect, least, most = float(centre[i]), float(low[i]), float(high[i])
    resolution = (most - least) / 2 if sampled[i] else 0.0
    distinct = len(np.unique(np.round(centre / _equal(claim))))
    return Verdict(verdict, effect, least, most, resolution, needed, len(rows), distinct, _describe(rows.iloc[i]))


def judge(claim: Claim, low: float, high: float) -> VerdictName:
    """Compare an interval `[low, high]` with the claim's relation; within its margin nothing is decided.

    `>`: HOLDS from `value + margin` on, FAILS at or below `value`, and equality within `EQUALITY_TOLERANCE` is no excess; `<` is its mirror
    image. `≤` and `≥` are the opposites of `>` and `<`, so equality holds. `=`: HOLDS when the interval lies within
    `value ± margin`, FAILS when it lies outside; `≠` is its opposite. NaN, and ends that are open on the side that would decide,
    are UNDECIDED.

    >>> claim = gl.claims.claim("k3-biased", "bandit", "03_objectives", "bias", ">", 0, 0.01, estimator="k3-loss")
    >>> [gl.claims.judge(claim, low, high) for low, high in ((0.1, 0.2), (0.0, 0.2), (-0.1, 0.0))]
    ['HOLDS', 'UNDECIDED', 'FAILS']
    """
    _check(claim, low=low, high=high)
    if np.isnan(low) or np.isnan(high):
        return "UNDECIDED"
    yes: VerdictName
    no: VerdictName
    yes, no = ("FAILS", "HOLDS") if claim.relation in _OPPOSITE else ("HOLDS", "FAILS")
    relation, value, margin, equal = _OPPOSITE.get(claim.relation, claim.relation), claim.value, claim.margin, _equal(claim)
    if relation == "=":
        holds, fails = value - margin <= low and high <= value + margin, high < value - margin or low > value + margin
    else:
        if relation == "<":
            low, high, value = -high, -low, -value
        holds, fails = low >= value + margin and low > value + equal, high <= value + equal
    return yes if holds else no if fails else "UNDECIDED"


def _check(claim: object, **numbers: object) -> None:
    """Raise `ValueError` unless these are a claim and numbers, of which a row may lack some (NaN)."""
    if not isinstance(claim, Claim):
        raise ValueError(f"claim must be made by gl.claims.claim(…), got {claim!r}")
    for name, given in numbers.items():
        check_real(name, given)


def _equal(claim: Claim) -> float:
    return EQUALITY_TOLERANCE * max(1.0, abs(claim.value))


def samples_needed(
    claim: Claim, centre: float, low: float, high: float, samples: int, level: float = 0.95, power: float = 0.8
) -> int | None:
    """How many samples would settle a row that `samples` left UNDECIDED, if its effect is `centre`; `None` if no number would.

    An interval `[low, high]` shrinks as 1/√samples. It settles the claim when it ends clear of the nearest threshold; for that
    to happen with probability `power` the gap must be `1 + z_power/z_level` times the interval's reach towards it.
    Raises `ValueError` for a level or power outside (0, 1).

    >>> claim = gl.claims.claim("k3-biased", "bandit", "03_objectives", "bias", ">", 0, 0.0, estimator="k3-loss")
    >>> gl.claims.samples_needed(claim, centre=0.1, low=-0.1, high=0.3, samples=100)
    818
    """
    _check(claim, centre=centre, low=low, high=high)
    for name, given in (("level", level), ("power", power)):
        check_probability(name, given)
    check_whole("samples", samples)
    value, margin, tails = claim.value, claim.margin, 1
    if claim.relation in ("=", "≠"):
        thresholds = [value - margin, value + margin]
        tails = 2 if thresholds[0] < centre < thresholds[1] else 1  # both ends must come clear
    else:
        above = claim.relation in (">", "≤")  # the zone where nothing is decided begins at the value and goes up
        thresholds = [value, value + margin] if above else [value - margin, value]
        if thresholds[0] < centre < thresholds[1]:
            return None  # within the indifference zone: no interval is ever clear of it
    factors = [0.0]
    for threshold in thresholds:
        half_width, gap = (high - centre, threshold - centre) if threshold >= centre else (centre - low, centre - threshold)
        factors.append(half_width / gap if gap > 0 else np.inf)
    ratio = (1 + ndtri(1 - (1 - power) / tails) / ndtri((1 + level) / 2)) * max(factors)
    return int(np.ceil(samples * ratio**2)) if np.isfinite(ratio) else None


def _decide(claim: Claim, verdicts: list[VerdictName], centre: np.ndarray[Any, Any]) -> tuple[VerdictName, int]:
    """Combine the rows: `every` needs all of them to hold, `some` one. Returns the verdict and the row that decides."""
    # Distance from the claimed side: the row with the most doubt decides `every`, the one with the least decides `some`.
    distance = np.abs(centre - claim.value)
    doubt = {"=": distance, "≠": -distance, "<": centre, "≤": centre, ">": -centre, "≥": -centre}[claim.relation]
    doubt = np.where(np.isnan(doubt), -np.inf if claim.quantifier == "every" else np.inf, doubt)
    order: tuple[VerdictName, ...] = ("FAILS", "UNDECIDED", "HOLDS")
    if claim.quantifier == "some":
        order = ("HOLDS", "UNDECIDED", "FAILS")
        doubt = -doubt
    verdict = next(v for v in order if v in verdicts)
    candidates = [i for i, v in enumerate(verdicts) if v == verdict]
    return verdict, max(candidates, key=lambda i: doubt[i])


def _require(claim: Claim, frame: pd.DataFrame, columns: set[str]) -> None:
    missing = sorted(columns - set(frame.columns))
    if missing:
        raise ValueError(
            f"claim {claim.id} ({claim.scope}) needs columns {missing} which frame {claim.frame} lacks; "
            "was it made by another version? run its analysis again"
        )


def _selects(condition: Condition, column: pd.Series[Any]) -> pd.Series[bool]:
    if condition.within is not None:
        return column.between(*condition.within)
    return column.isin(list(condition.among or ()))


def _describe(row: pd.Series[Any]) -> str:
    """The decisive row in words: who, where, how far; what the words before it say is not said again."""
    parts: list[str] = []
    for key, form in EVIDENCE.items():
        if key not in row.index or pd.isna(row[key]) or isinstance(row[key], str) == (":" in form):
            continue
        text = form.format(row[key])
        parts = [part for part in parts if part not in text]
        if not any(text in part for part in parts):
            parts.append(text)
    return ", ".join(parts)
