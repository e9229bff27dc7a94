"""The claims themselves, as data: one row per claim and scope, grouped by the analysis that measures it."""

from gradlab._common.registry import Registry
from gradlab.ledger import (
    asymmetry,
    bandits,
    choice,
    clips,
    coefficients,
    combined,
    corrections,
    distance,
    fixed_points,
    language,
    metrics,
    off_policy,
    sequences,
    shipped,
    smollm2,
    tails,
    training,
    values,
)
from gradlab.ledger.form import Claim, Condition, among, claim, within
from gradlab.ledger.statements import PUBLISHED, STATEMENTS

#: gradlab's own claims, in the order of the analyses.
CLAIMS: tuple[Claim, ...] = (
    *values.CLAIMS,
    *coefficients.CLAIMS,
    *bandits.CLAIMS,
    *distance.CLAIMS,
    *asymmetry.CLAIMS,
    *tails.CLAIMS,
    *sequences.CLAIMS,
    *off_policy.CLAIMS,
    *fixed_points.CLAIMS,
    *language.CLAIMS,
    *smollm2.CLAIMS,
    *shipped.CLAIMS,
    *training.CLAIMS,
    *combined.CLAIMS,
    *choice.CLAIMS,
    *metrics.CLAIMS,
    *clips.CLAIMS,
    *corrections.CLAIMS,
)

#: Claims of the user's, each named by its id and its scope.
REGISTERED: Registry[Claim] = Registry("claim")


def claims() -> tuple[Claim, ...]:
    """All claims: gradlab's own, then the registered ones."""
    return (*CLAIMS, *REGISTERED.values())


__all__ = ["CLAIMS", "PUBLISHED", "REGISTERED", "STATEMENTS", "Claim", "Condition", "among", "claim", "claims", "within"]
