"""The form of a claim: who said what, in which scope, and which measurement decides — all of it data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from gradlab._common.arguments import checked
from gradlab._common.names import check_name
from gradlab.ledger.statements import PUBLISHED, STATEMENTS

Relation = Literal["<", "≤", ">", "≥", "=", "≠"]
Quantifier = Literal["every", "some"]
Value = str | bool | int | float

#: Tolerance of an identity in double precision.
EXACT = 1e-9
#: The smallest relative bias that counts as one. Where the noise tr Σ/‖∇‖² is 1, a bias of 1 % is less than the error of sampling in
#: every batch of under 10,000 responses.
MATTERS = 0.01

#: Frames that are not drawn under their own name → the figure that shows them (for one topic, `frame/topic`).
DRAWN_IN = {
    "04_remainders": "04_slopes",
    "04_versus": "04_weaker",
    "04_versus/rao-blackwell": "04_rao_blackwell",
    "04_versus/k3-reward": "04_bands",
    "05_sides": "05_bands",
    "06_ranks": "06_chi2",
    "07_pairs": "07_credit",
    "07_step": "07_gap",
    "08_shipped": "08_compositions",
    "08_exponents": "08_growth",
    "08_repulsion": "08_published",
    "09_fixed_points": "09_trees",
    "10_engines/off-policy-noise": "10_growth",
    "10_extremes": "10_ratios",
    "11_sides": "11_tokens",
    "12_configurations": "12_kinds",
    "12_directions": "12_kinds",
    "13_pairs": "13_training",
    "14_exponents": "14_weight",
    "14_equal": "14_weight",
    "14_heads": "14_lag",
    "16_exact": "16_metrics",
    "18_sides": "18_clips",
    "19_best": "19_corrections",
    "19_bounds": "19_corrections",
    "19_growth": "19_corrections",
}


@dataclass(frozen=True)
class Condition:
    """Rows whose `column` is `among` some values, or `within` a closed range. Raises `ValueError` when none can be.

    >>> gl.claims.Condition("estimator", among=("k2-loss", "k3-loss"))
    Condition(column='estimator', among=('k2-loss', 'k3-loss'), within=None)
    """

    column: str
    among: tuple[Value, ...] | None = None
    within: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.among and self.within is None:
            raise ValueError(f"the condition on {self.column} names neither a value nor a range, so no row meets it")
        if self.within is not None and not self.within[0] <= self.within[1]:
            raise ValueError(f"the condition on {self.column} has an empty range {self.within}")


@dataclass(frozen=True)
class Claim:
    """A sentence in one scope: `every` (or `some`) row of `frame` that meets `where` has `statistic relation value`.

    The id is a topic, or a topic, a dot and a part of it; all claims of one id share one sentence. `margin` is the indifference
    zone: an effect smaller than it does not decide; for `=` and `≠` it is the tolerance. A scope without rows is a mistake,
    unless `optional`: then a small run may leave it open.
    Raises `ValueError` for an unknown relation or quantifier, a frame that no analysis could make, and a negative margin.

    >>> claim = gl.claims.claim("k2-unbiased", "bandit", "03_objectives", "bias", "=", 0, 1e-9, estimator="k2-loss")
    >>> claim.topic, claim.rule
    ('k2-unbiased', 'every row of 03_objectives has bias = 0 ± 1e-09')
    """

    id: str
    scope: str
    statement: str
    source: str
    frame: str
    where: tuple[Condition, ...]
    statistic: str
    relation: Relation
    value: float
    margin: float
    quantifier: Quantifier = "every"
    optional: bool = False

    def __post_init__(self) -> None:
        check_name("relation", self.relation, dict.fromkeys(get_args(Relation)))
        check_name("quantifier", self.quantifier, dict.fromkeys(get_args(Quantifier)))
        if self.topic in PUBLISHED and not re.fullmatch(r"[0-9]{2}_\w+", self.frame):
            raise ValueError(
                f"claim {self.id} ({self.scope}): {self.frame!r} is no frame of an analysis, such as 03_objectives"
            )
        if not (math.isfinite(self.value) and math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(
                f"claim {self.id} ({self.scope}): value and margin must be finite and the margin not negative, "
                f"got {self.value} and {self.margin}"
            )

    @property
    def topic(self) -> str:
        """The published claim this one is part of."""
        return self.id.split(".")[0]

    @property
    def published(self) -> str:
        """The sentence as it is published or commonly said; of a claim of the user's, the statement itself."""
        return PUBLISHED[self.topic][0] if self.topic in PUBLISHED else self.statement

    @property
    def figure(self) -> str:
        """The figure that shows the frame; its text tells the verdict."""
        return DRAWN_IN.get(f"{self.frame}/{self.topic}", DRAWN_IN.get(self.frame, self.frame))

    @property
    def rule(self) -> str:
        """What decides, in words."""
        margin = f" ± {self.margin:g}" if self.relation in "=≠" else f" by {self.margin:g}" if self.margin else ""
        return f"{self.quantifier} row of {self.frame} has {self.statistic} {self.relation} {self.value:g}{margin}"


def among(**columns: Value | tuple[Value, ...]) -> tuple[Condition, ...]:
    """Conditions that columns equal a value, or one of several."""
    return tuple(Condition(column, values if isinstance(values, tuple) else (values,)) for column, values in columns.items())


def within(column: str, low: float = -float("inf"), high: float = float("inf")) -> tuple[Condition, ...]:
    """Condition that a column lies in a closed range."""
    return (Condition(column, within=(low, high)),)


@checked
def claim(
    identifier: str,
    scope: str,
    frame: str,
    statistic: str,
    relation: Relation,
    value: float,
    margin: float = 0.0,
    *ranges: Condition,
    quantifier: Quantifier = "every",
    optional: bool = False,
    statement: str | None = None,
    source: str | None = None,
    where: Mapping[str, Value | tuple[Value, ...]] | None = None,
    **columns: Value | tuple[Value, ...],
) -> Claim:
    """One row of the ledger: a sentence in one scope, decided by the rows with these `columns` and `ranges`.

    `where` holds columns whose names are no keywords. An identifier of gradlab's has its sentence and source in `STATEMENTS` and
    `PUBLISHED`; one of the user's comes with `statement` and `source`.
    Raises `ValueError` for an unknown identifier without a statement, for a column given twice, and as `Claim` does.

    >>> claim("mine", "bandit", "20_mine", "bias", "<", 0.1, statement="mine is nearly unbiased", where={"via": "exact"}).rule
    'every row of 20_mine has bias < 0.1'
    """
    if statement is None:
        check_name("claim", identifier, STATEMENTS)
        statement, source = STATEMENTS[identifier], source or PUBLISHED[identifier.split(".")[0]][1]
    elif identifier in STATEMENTS and statement != STATEMENTS[identifier]:
        raise ValueError(f"claim {identifier} says {STATEMENTS[identifier]!r} already; give another sentence another id")
    if twice := sorted(set(where or ()) & set(columns)):
        raise ValueError(f"claim {identifier} ({scope}): {', '.join(twice)} is given twice, in where and by name")
    conditions = (*among(**{**(where or {}), **columns}), *ranges)
    source = source or "not published"
    return Claim(
        identifier, scope, statement, source, frame, conditions, statistic, relation, value, margin, quantifier, optional
    )
