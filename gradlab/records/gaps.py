"""What tells two policies apart, from their log-probabilities of the same tokens: rounding, temperature, a nucleus, other weights.

Where two responses to one prompt part, they have emitted two tokens `y, y'` at one prefix, and normalisers cancel:
`Δ log μ = Δ log π / T` if one policy has another temperature `T`, and `Δ log μ = Δ log π` if one was cut to a nucleus after its
log-probabilities, or before. A cut moves every log-probability up by `−log mass ≤ −log top_p`, never down, and to 0 where
the nucleus is one token. Other weights, and rounding inside a network, move both ways and obey neither; they differ in size.

Source: derived here; the cut is NeMo-RL issue #2053.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Differences up to here, relative to the log-probability and absolute, are rounding of what was written.
RELATIVE, ABSOLUTE = 2.0**-8, 1e-4
#: Standard deviation, in nats, up to which a difference is of the size of arithmetic in 16 bits.
ARITHMETIC = 0.05
#: Pairs and tokens that are needed, and the share of pairs that a law has to explain.
PAIRS, TOKENS, EXPLAINED = 16, 64, 0.95
#: A temperature nearer to 1 than this is none.
TEMPERED = 0.01


@dataclass(frozen=True)
class Gap:
    """The difference `b − a` of two policies' log-probabilities, what kind it is, and what says so.

    kind: `none`, `rounding`, `temperature`, `nucleus`, `arithmetic` (of the size of 16 bits), `weights` or `unknown` (too few).
    temperature: of `b` relative to `a`. mass: the least mass of the nucleus. moved: correlation of `a − b` with the advantage.
    """

    kind: str
    tokens: int
    pairs: int
    mean: float
    std: float
    low: float
    high: float
    temperature: float
    mass: float
    moved: float
    sentence: str


def gap(rows: Array, pairs: Array) -> Gap:
    """Tell what kind of difference `rows` `[k, 3]` (`a`, `b`, sign of the advantage) and sibling `pairs` `[m, 2]` show."""
    a, b, sign = rows[:, 0], rows[:, 1], rows[:, 2]
    d = b - a
    tolerance = ABSOLUTE + RELATIVE * np.abs(a)
    if len(d) < TOKENS:
        nan = float("nan")
        sentence = f"{len(d)} tokens are too few to tell where a difference is from"
        return Gap("unknown", len(d), len(pairs), nan, nan, nan, nan, nan, nan, nan, sentence)
    low, high = (float(x) for x in np.quantile(d, [0.001, 0.999]))
    ratio, law = _slope(pairs)
    moved = _moved(d, sign)
    shape: dict[str, Any] = {
        "tokens": len(d), "pairs": len(pairs), "mean": float(d.mean()), "std": float(d.std()), "low": low, "high": high,
        "temperature": 1 / ratio if ratio and np.isfinite(ratio) else float("nan"), "mass": float("nan"), "moved": moved,
    }  # fmt: skip
    size = f"{shape['std']:.2g} nats"
    if not np.any(d):
        return Gap("none", **shape | {"sentence": "the two are equal at every token"})
    up, down = np.mean(d > tolerance), np.mean(d < -tolerance)
    if up + down < 0.01:
        return Gap("rounding", **shape | {"sentence": f"they differ by {size}, as rounding of the numbers written does"})
    if law and abs(1 / ratio - 1) > TEMPERED:
        sentence = (
            f"where two responses to one prompt part, the difference of the two tokens' log-probabilities is {ratio:.3g} times as large "
            f"({len(pairs)} pairs): another temperature, {1 / ratio:.3g} times that of the other"
        )
        return Gap("temperature", **shape | {"sentence": sentence})
    if down < 1e-3 and up > 0.01 and (law or len(pairs) < PAIRS) and np.mean(b == 0) > 0:
        shape["mass"] = float(np.exp(-d.max()))
        sentence = (
            f"the differences are all of one sign, at most {d.max():.3g} nats, and {np.mean(b == 0):.2g} of the tokens have probability "
            f"1: one was cut to a nucleus of mass {shape['mass']:.2g} or less, the other was not"
        )
        return Gap("nucleus", **shape | {"sentence": sentence})
    steep = _between(a, b) if len(pairs) < PAIRS else None
    if steep is not None:
        sentence = (
            f"log-odds of one are between {steep[0]:.3g} and {steep[1]:.3g} times those of the other over {len(d)} tokens, as under another"
            " temperature; responses in groups would tell it from a policy that has sharpened"
        )
        return Gap("temperature", **shape | {"temperature": 2 / sum(steep), "sentence": sentence})
    if shape["std"] <= ARITHMETIC:
        sentence = f"they differ both ways, by {size}: the size of arithmetic in 16 bits, or of weights of the step before"
        return Gap("arithmetic", **shape | {"sentence": sentence})
    along = f"; they went along the advantages (correlation {moved:.2f})" if moved > 0.05 else ""
    sentence = f"they differ both ways, by {size}, more than arithmetic does: other weights (stale, or of another model){along}"
    return Gap("weights", **shape | {"sentence": sentence})


def _slope(pairs: Array) -> tuple[float, bool]:
    """The median ratio of `Δb` to `Δa`, and whether it explains the pairs: all of them lie on one line through 0."""
    wide = np.abs(pairs[:, 0]) > 0.1
    x, y = pairs[wide, 0], pairs[wide, 1]
    if len(x) < PAIRS:
        return float("nan"), False
    ratio = float(np.median(y / x))
    on_line = np.abs(y - ratio * x) <= 4 * (ABSOLUTE + RELATIVE * np.abs(y))
    return ratio, bool(on_line.mean() >= EXPLAINED)


def _between(a: Array, b: Array) -> tuple[float, float] | None:
    """The two regression slopes of log-odds, where both exclude 1 on the same side and the relation is tight; else `None`."""
    inside = (a < -1e-5) & (b < -1e-5) & (a > -30) & (b > -30)
    if inside.sum() < TOKENS:
        return None
    x, y = (z - np.log(-np.expm1(z)) for z in (a[inside], b[inside]))
    covariance = np.cov(x, y)
    if covariance[0, 1] <= 0 or covariance[0, 1] ** 2 < 0.98 * covariance[0, 0] * covariance[1, 1]:
        return None
    low, high = sorted((covariance[0, 1] / covariance[0, 0], covariance[1, 1] / covariance[0, 1]))
    return (float(low), float(high)) if low > 1.03 or high < 0.97 else None


def _moved(d: Array, sign: Array) -> float:
    """Correlation of `a − b` with the sign of the advantage, NaN without one."""
    known = np.isfinite(sign) & (sign != 0)
    if known.sum() < TOKENS or not np.ptp(sign[known]) or not np.ptp(d[known]):
        return float("nan")
    return float(-np.corrcoef(d[known], sign[known])[0, 1])
