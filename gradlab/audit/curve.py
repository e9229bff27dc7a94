"""The coefficient a loss puts on one token as its log-ratio runs over ±40: where it blows up, goes dead, jumps or stops growing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gradlab.audit.batch import Subject
from gradlab.audit.precision import Precision
from gradlab.audit.synthetic import Tokens, coefficients, responses

#: The range of log-ratios looked at, and the step between them.
LIMIT, STEP = 40.0, 0.5

Response = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class Event:
    """Something that happens to a coefficient `c(x)` when `x` passes `at`, away from 0.

    kind: `not finite` (the coefficient or the loss), `dead` (exactly 0 from there on), `flat` (constant from there on, with a
    kink), `lost` (smaller than the rounding of the terms that it is the difference of). level: the coefficient just inside;
    value: the loss just outside.
    """

    kind: str
    at: float
    level: float
    value: float

    @property
    def where(self) -> str:
        """`below −2.61` or `above 11`."""
        return f"{'below' if self.at < 0 else 'above'} {self.at:.4g}"


def of_token(subject: Subject, companions: int = 0, vocab: int = 2) -> Response:
    """Coefficient and loss as a function of the log-ratio of the only token of a response, on-policy.

    `companions` more responses fill the batch of a loss that needs several; their log-ratios are 0.
    """

    def response(log_ratio: float) -> tuple[float, float]:
        companions_tokens = [Tokens.at(0.0)] * companions
        probe_batch, _ = responses(Tokens.at(log_ratio), *companions_tokens, columns=2, vocab=vocab)
        found, value = coefficients(subject, probe_batch)
        return float(found[0, 0]), value

    return response


def of_weight(subject: Subject, log_ratio: float, companions: int = 0, advantage: float = 1.0, vocab: int = 2) -> Response:
    """Coefficient and loss as a function of `log ρ` of a token of a given log-ratio, in a response with this advantage."""

    def response(log_weight: float) -> tuple[float, float]:
        companions_tokens = [Tokens.at(0.0, advantage=-advantage)] * companions
        token = Tokens.at(log_ratio, log_weight=log_weight, advantage=advantage)
        probe_batch, _ = responses(token, *companions_tokens, columns=2, vocab=vocab)
        found, value = coefficients(subject, probe_batch)
        return float(found[0, 0]), value

    return response


def sweep(response: Response, limit: float = LIMIT, step: float = STEP) -> pd.DataFrame:
    """`log_ratio, coefficient, value` over ±reach, four times as fine within ±4."""
    coarse, fine = np.arange(0, limit + step / 2, step), np.arange(0, min(limit, 4.0), step / 4)
    grid = np.unique(np.concatenate([coarse, -coarse, fine, -fine]))
    return pd.DataFrame([(x, *response(float(x))) for x in grid], columns=["log_ratio", "coefficient", "value"])


def events(response: Response, frame: pd.DataFrame, precision: Precision) -> list[Event]:
    """What happens on each side of 0, located by bisection."""
    return [event for sign in (-1, 1) for event in _on_side(response, frame, sign, precision)]


def _on_side(response: Response, frame: pd.DataFrame, sign: int, precision: Precision) -> Iterator[Event]:
    side = frame[sign * frame["log_ratio"] > 0].sort_values("log_ratio", ascending=sign > 0)
    # The first point stands for 0, where many coefficients vanish anyway.
    grid = [sign * 1e-3, *(float(x) for x in side["log_ratio"])]
    level = [response(grid[0])[0], *(float(c) for c in side["coefficient"])]
    value = [response(grid[0])[1], *(float(v) for v in side["value"])]
    broken = next((k for k, pair in enumerate(zip(level, value, strict=True)) if not _finite(pair)), len(level))
    if broken < len(level):
        at = _bisect(lambda x: _finite(response(x)), grid[max(broken - 1, 0)], grid[broken])
        yield Event("not finite", at, level[max(broken - 1, 0)], response(at)[1])
    if broken < 2:
        return
    last = level[broken - 1]

    def settled(c: float) -> bool:
        return abs(c - last) <= precision.level * abs(last)

    first = broken - 1
    while first > 0 and settled(level[first - 1]):
        first -= 1
    if first in (0, broken - 1):
        return  # the same all along, or still moving at the end
    at = _bisect(lambda x: not settled(response(x)[0]), grid[first - 1], grid[first])
    inside, outside = response(at - sign * 1e-6)[0], response(at + sign * 1e-6)[1]
    slope = abs(response(at - sign * 0.1)[0] - inside) / 0.1
    if abs(inside) <= 32 * precision.eps * abs(outside):
        yield Event("lost", at, inside, outside)
    elif last == 0:
        yield Event("dead", at, inside, outside)
    elif slope > max(10 * precision.level, 1e-4) * abs(last):
        yield Event("flat", at, last, outside)  # a kink; a curve that levels off smoothly has none


def _finite(pair: tuple[float, float]) -> bool:
    return math.isfinite(pair[0]) and math.isfinite(pair[1])


def _bisect(inside: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that holds at `low` and not at `high` stops holding."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return (low + high) / 2


def binding(clamp_events: list[Event]) -> str:
    """What the events of one kind mean in words: which clamp it is, where it binds."""
    places = " and ".join(f"ℓ {event.where}" for event in clamp_events)
    edges = sorted(event.at for event in clamp_events)
    symmetric = len(edges) == 2 and abs(edges[0] + edges[1]) <= 1e-6 * edges[1]
    level = [abs(event.value) for event in clamp_events]
    if _round(edges[-1]) and (symmetric or len(edges) == 1):
        return f"{places}: the log-ratio is clamped at ±{edges[-1]:.4g}" if symmetric else f"{places}: the log-ratio is clamped"
    if max(level) - min(level) <= 1e-6 * max(level) and max(level) > 0:
        return f"{places}: the value is clamped, the loss stays at {clamp_events[0].value:.4g}"
    return places


def _round(x: float) -> bool:
    return abs(x * 10 - round(x * 10)) <= 1e-5
