"""The form of a claim: who said what, in which scope, and which measurement decides — all of it data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradlab.ledger.statements import STATEMENTS
from gradlab.names import check_name

Relation = Literal["<", ">", "=", "≠"]
Quantifier = Literal["every", "some"]
Value = str | bool | int | float


#: Frames that are not drawn under their own name → the figure that shows them (for one claim, `frame/id`).
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
}


@dataclass(frozen=True)
class Condition:
    """Rows whose `column` is `among` some values, or `within` a closed range."""

    column: str
    among: tuple[Value, ...] | None = None
    within: tuple[float, float] | None = None


@dataclass(frozen=True)
class Claim:
    """A published statement in one scope: `every` (or `some`) row of `frame` that meets `where` has `statistic relation value`.

    `margin` is the indifference zone: an effect smaller than it does not decide. For `=` and `≠` it is the tolerance.
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

    @property
    def figure(self) -> str:
        """The figure that shows the frame and tells the verdict in its caption."""
        return DRAWN_IN.get(f"{self.frame}/{self.id}", DRAWN_IN.get(self.frame, self.frame))

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
    **columns: Value | tuple[Value, ...],
) -> Claim:
    """One row of the ledger: a statement of `STATEMENTS` in one scope, decided by the rows with these `columns` and `ranges`.

    Raises `ValueError` for an unknown identifier.
    """
    check_name("claim", identifier, STATEMENTS)
    statement, source = STATEMENTS[identifier]
    where = (*among(**columns), *ranges)
    return Claim(identifier, scope, statement, source, frame, where, statistic, relation, value, margin, quantifier)
