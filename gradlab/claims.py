"""The ledger: published claims, each settled by a measurement within its scope. No verdict is written by hand.

A claim names the frame that decides it, the rows in its scope, a statistic, a relation and a margin. Every row of the scope
is judged on its own; then the quantifier decides. Exact statistics are points, sampled ones their confidence interval, so a
run that cannot tell comes out UNDECIDED, with the number of samples that could.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import ndtri

from gradlab.ledger import CLAIMS, Claim, Condition
from gradlab.names import check_name

VerdictName = Literal["HOLDS", "FAILS", "UNDECIDED", "OPEN"]

#: Columns that say which row decided, in the order in which they are read out.
EVIDENCE = ("scenario", "estimator", "kernel", "clamp", "parameter", "target", "via", "samples", "kl", "log_ratio")


@dataclass(frozen=True)
class Verdict:
    """What a frame says about a claim, with the row that decided it.

    `effect` is the statistic in the decisive row and `low`, `high` its interval (equal when exact); `resolution` is half the
    interval's width, the smallest discrepancy this run could tell; `samples_needed` is given where more samples would
    decide (with power 0.8, if the effect is as estimated). `rows` counts the rows in scope, `evidence` describes the
    decisive one.
    """

    verdict: VerdictName
    effect: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    resolution: float = float("nan")
    samples_needed: int | None = None
    rows: int = 0
    evidence: str = ""


def ledger() -> pd.DataFrame:
    """The claims as a frame: id, scope, statement, source, what decides them and where it is drawn. One row per claim and scope."""
    columns = ("id", "scope", "statement", "source", "frame", "figure", "rule")
    return pd.DataFrame([[getattr(claim, column) for column in columns] for claim in CLAIMS], columns=list(columns))


def verify(frames: Mapping[str, pd.DataFrame] | Path | str, only: Sequence[str] | None = None) -> pd.DataFrame:
    """Settle the ledger with measured frames, or with a folder of their CSV files.

    Returns the ledger with the columns of `Verdict`; a claim whose frame is not there is OPEN. `only` restricts it to some
    claim ids. Raises `ValueError` for an unknown id, and for a frame without the columns a claim needs.
    """
    for name in only or ():
        check_name("claim", name, dict.fromkeys(claim.id for claim in CLAIMS))
    chosen = [claim for claim in CLAIMS if only is None or claim.id in only]
    if isinstance(frames, str | Path):
        frames = load(frames, {claim.frame for claim in chosen})
    table = ledger()
    if only is not None:
        table = table[table["id"].isin(list(only))].reset_index(drop=True)
    verdicts = [settle(claim, frames[claim.frame]) if claim.frame in frames else Verdict("OPEN") for claim in chosen]
    found = {field.name: [getattr(verdict, field.name) for verdict in verdicts] for field in fields(Verdict)}
    return table.assign(**found).astype({"samples_needed": "Int64"})


def load(folder: Path | str, names: Iterable[str]) -> dict[str, pd.DataFrame]:
    """The saved frames of these names that are in the folder."""
    paths = {name: Path(folder) / f"{name}.csv" for name in sorted(names)}
    return {name: pd.read_csv(path) for name, path in paths.items() if path.is_file()}


def settle(claim: Claim, frame: pd.DataFrame) -> Verdict:
    """Judge one claim on one frame. No row in scope leaves it OPEN.

    Raises `ValueError` when the frame lacks a column the claim needs; sampled rows need the statistic's `_low` and `_high`.
    """
    _require(claim, frame, {claim.statistic, *(condition.column for condition in claim.where)})
    rows = frame
    for condition in claim.where:
        rows = rows[_selects(condition, rows[condition.column])]
    if rows.empty:
        return Verdict("OPEN")
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
    resolution = 0.0 if least == most else (most - least) / 2
    return Verdict(verdict, effect, least, most, resolution, needed, len(rows), _describe(rows.iloc[i]))


def judge(claim: Claim, low: float, high: float) -> VerdictName:
    """Compare an interval `[low, high]` with the claim's relation; within its margin nothing is decided.

    `>`: HOLDS from `value + margin` on, FAILS at or below `value`; `<` is its mirror image. `=`: HOLDS when the interval lies
    within `value ± margin`, FAILS when it lies outside; `≠` is its opposite. NaN is UNDECIDED.
    """
    value, margin = claim.value, claim.margin
    if np.isnan(low) or np.isnan(high):
        return "UNDECIDED"
    if claim.relation in ("=", "≠"):
        inside, outside = value - margin <= low and high <= value + margin, high < value - margin or low > value + margin
        holds, fails = (inside, outside) if claim.relation == "=" else (outside, inside)
        return "HOLDS" if holds else "FAILS" if fails else "UNDECIDED"
    if claim.relation == "<":
        low, high, value = -high, -low, -value
    if low >= value + margin and low > value:
        return "HOLDS"
    return "FAILS" if high <= value else "UNDECIDED"


def samples_needed(
    claim: Claim, centre: float, low: float, high: float, samples: int, level: float = 0.95, power: float = 0.8
) -> int | None:
    """How many samples would settle a row that `samples` left UNDECIDED, if its effect is `centre`; `None` if no number would.

    An interval `[low, high]` shrinks as 1/√samples. It settles the claim when it ends clear of the nearest threshold; for that
    to happen with probability `power` the gap must be `1 + z_power/z_level` times the interval's reach towards it.
    """
    value, margin, tails = claim.value, claim.margin, 1
    if claim.relation in ("=", "≠"):
        thresholds = [value - margin, value + margin]
        tails = 2 if thresholds[0] < centre < thresholds[1] else 1  # both ends must come clear
    else:
        thresholds = [value, value + margin] if claim.relation == ">" else [value - margin, value]
        if thresholds[0] < centre < thresholds[1]:
            return None  # within the indifference zone: no interval is ever clear of it
    factors = [0.0]
    for threshold in thresholds:
        reach, gap = (high - centre, threshold - centre) if threshold >= centre else (centre - low, centre - threshold)
        factors.append(reach / gap if gap > 0 else np.inf)
    ratio = (1 + ndtri(1 - (1 - power) / tails) / ndtri((1 + level) / 2)) * max(factors)
    return int(np.ceil(samples * ratio**2)) if np.isfinite(ratio) else None


def _decide(claim: Claim, verdicts: list[VerdictName], centre: np.ndarray[Any, Any]) -> tuple[VerdictName, int]:
    """Combine the rows: `every` needs all of them to hold, `some` one. Returns the verdict and the row that decides."""
    # Distance from the claimed side: the row with the most doubt decides `every`, the one with the least decides `some`.
    distance = np.abs(centre - claim.value)
    doubt = {"=": distance, "≠": -distance, "<": centre, ">": -centre}[claim.relation]
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
    """The decisive row in words: who, where, how far."""
    parts = []
    for key in EVIDENCE:
        if key not in row.index or pd.isna(row[key]):
            continue
        form = {"kl": "KL {:.4g}", "samples": "{:.0f} samples", "log_ratio": "log-ratio {:.3g}"}.get(key, "{}")
        parts.append(form.format(row[key]))
    return ", ".join(parts)
