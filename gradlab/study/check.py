"""What moved between two folders of results: frames compared column by column, within what arithmetic may change.

Two processors differ in the last digits of every sum. An exact number may move by `EXACT` of itself, or by rounding next to its
column's scale; numbers of networks that compute in single precision by `SINGLE`. A sampled one may move further, because a draw
falls to another token where a probability crosses it by one unit in the last place: one draw of `n` moves a mean by some `1/√n` of
its interval, so `SHARE` of the half-width is allowed; where a sampled column has no interval, `SAMPLED` of itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradlab._common import frames
from gradlab.ledger import claims, verify

EXACT, SINGLE, SAMPLED, SHARE = 1e-6, 1e-3, 1e-2, 0.1

#: Analyses of networks that compute in single precision.
_SINGLE = ("10", "11")

#: Columns that are differences of nearly equal numbers: what they may move by.
_ABSOLUTE = {
    ("10_growth", "lag"): 1e-5,  # KL to the same weights at a lower precision
    ("10_precision", "bias_error"): 1e-4,  # single against double precision
    ("10_precision", "noise_error"): 1e-3,
    ("11_engine", "log_ratio"): 1e-4,  # a network's own report against a second pass of it
    ("11_mismatch", "excess"): 1e-4,  # bias less bias
    ("14_weight", "bias"): 1e-9,  # a loss less the same loss at β = 0, over β down to 1e-4
}

#: Batches of more responses than this are told apart from infinite ones by rounding alone.
_ENDLESS = 1e12

COLUMNS: dict[str, str] = {
    "frame": "name of the frame",
    "column": "what moved in it: a column, or its rows or columns",
    "moved": "how many cells lie outside the tolerance",
    "worst": "largest distance, in tolerances",
    "before": "what the folder holds there",
    "after": "what was measured",
}


def compare(folder: Path, anew: Path, analysis: str) -> pd.DataFrame:
    """Every column of an analysis's frames that moved, see `COLUMNS`; both folders hold its sidecar."""
    rows = []
    one, two = frames.names(folder, analysis), frames.names(anew, analysis)
    for name in sorted({*one, *two}):
        if name not in one or name not in two:
            rows.append((name, "(frame)", 1, np.inf, "there" if name in one else "–", "there" if name in two else "–"))
        else:  # what the sidecars tell of is there, or loading it says so
            rows += [(name, *change) for change in moved(frames.load(folder, name), frames.load(anew, name), name)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def moved(before: pd.DataFrame, after: pd.DataFrame, frame: str = "") -> list[tuple[str, int, float, Any, Any]]:
    """The columns of two versions of a frame that differ: name, cells, largest distance in tolerances, its two values."""
    if list(before) != list(after):
        return [("(columns)", 1, np.inf, ", ".join(map(str, before)), ", ".join(map(str, after)))]
    if len(before) != len(after):
        return [("(rows)", abs(len(before) - len(after)), np.inf, len(before), len(after))]
    changes = []
    for name in map(str, before):
        distance = _distance(before, after, name, frame)
        if (distance > 1).any():
            i = int(distance.argmax())
            changes.append((name, int((distance > 1).sum()), float(distance[i]), before[name].iloc[i], after[name].iloc[i]))
    return changes


def verdicts(folder: Path, anew: Path) -> tuple[pd.DataFrame, int]:
    """Claims that what was measured settles otherwise than the folder: id, scope, frame, before, after; and how many there were."""
    frames_of = {claim.frame for claim in claims()}
    settled = [
        verify.verify(verify.load(path, frames_of)).set_index(["id", "scope", "frame"])["verdict"] for path in (folder, anew)
    ]
    both = pd.DataFrame({"before": settled[0], "after": settled[1]})
    both = both[both["after"] != "OPEN"]
    return both[both["before"] != both["after"]].reset_index(), len(both)


def _distance(before: pd.DataFrame, after: pd.DataFrame, name: str, frame: str) -> np.ndarray[Any, Any]:
    """How far every cell moved, in tolerances; infinite where text, or what is infinite or missing, changed."""
    one, two = before[name], after[name]
    if not (one.dtype.kind in "iuf" and two.dtype.kind in "iuf"):
        return np.where((one == two) | (one.isna() & two.isna()), 0.0, np.inf)
    x, y = one.to_numpy(dtype=np.float64), two.to_numpy(dtype=np.float64)
    if name.startswith("crossover"):
        x, y = (np.where(values > _ENDLESS, np.inf, values) for values in (x, y))
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    known = np.isfinite(x) & np.isfinite(y)
    share = np.full(len(x), SINGLE if frame.split("_")[0] in _SINGLE else EXACT)
    if name.startswith("crossover"):
        share *= 3  # noise over the square of a bias
    reach = np.full(len(x), frames.NOISE * frames.scale(name) + _ABSOLUTE.get((frame, name), 0.0))
    if "via" in before:
        sampled = before["via"].eq("sampled").to_numpy()
        share = np.where(sampled, np.maximum(share, SAMPLED), share)
        low, high = (f"{name.removesuffix('_low').removesuffix('_high')}_{end}" for end in ("low", "high"))
        if low in before and high in before:
            half = (before[high] - before[low]).to_numpy(dtype=np.float64) / 2
            reach = np.where(sampled & np.isfinite(half), np.maximum(reach, SHARE * half), reach)
            share = np.where(sampled & np.isfinite(half), EXACT, share)
    gap = np.where(known & ~same, np.abs(np.where(known, x, 0) - np.where(known, y, 0)), 0.0)
    size = np.where(known, np.maximum(np.abs(x), np.abs(y)), 1.0)
    tolerance = np.maximum(share * size, reach)
    return np.where(same, 0.0, np.where(known, gap / np.where(tolerance > 0, tolerance, 1.0), np.inf))
