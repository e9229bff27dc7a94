"""The claims themselves, as data: one row per claim and scope, grouped by the analysis that measures it."""

from gradlab.ledger import (
    asymmetry,
    bandits,
    coefficients,
    distance,
    fixedpoints,
    language,
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

CLAIMS: tuple[Claim, ...] = (
    *values.CLAIMS,
    *coefficients.CLAIMS,
    *bandits.CLAIMS,
    *distance.CLAIMS,
    *asymmetry.CLAIMS,
    *tails.CLAIMS,
    *sequences.CLAIMS,
    *off_policy.CLAIMS,
    *fixedpoints.CLAIMS,
    *language.CLAIMS,
    *smollm2.CLAIMS,
    *shipped.CLAIMS,
    *training.CLAIMS,
)

__all__ = ["CLAIMS", "PUBLISHED", "STATEMENTS", "Claim", "Condition", "among", "claim", "within"]
