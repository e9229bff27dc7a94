"""What analysis 14 settles: a KL regulariser in a whole loss, combined with the advantage or in a head of its own."""

from gradlab.ledger.form import EXACT, MATTERS, Claim, Condition, Relation, claim, within

AFTER, HEAD, BEFORE, ALONE = "k1 after the std", "k1 in a head", "k1 before the std", "k1 before, no std"
K2, K3, WEIGHTED = "k2 beside", "k3 beside", "k3 beside, weighted"


def _on(scope: str, estimator: str) -> Claim:
    """What a regulariser contributes on-policy is β ∇KL."""
    ranges = within("coefficient", 0.009, 0.011)
    return claim("combined", f"{scope}, β = 0.01", "14_weight", "bias", "=", 0, EXACT, *ranges, estimator=estimator)


def _off(scope: str, family: str, estimator: str, *ranges: Condition) -> Claim:
    return claim("combined.clipped", scope, "14_lag", "bias", "=", 0, MATTERS, *ranges, family=family, estimator=estimator)


def _exponent(scope: str, estimator: str, *ranges: Condition) -> Claim:
    return claim("standardised-kl", scope, "14_exponents", "exponent", "=", 1, MATTERS, *ranges, estimator=estimator)


def _size(scope: str, relation: Relation, beta: float, low: float, high: float) -> Claim:
    ranges = (*within("coefficient", beta * 0.9, beta * 1.1), *within("success", low, high))
    return claim("kl-choice.size", scope, "14_weight", "size", relation, 0.1, 0, *ranges, estimator=K2)


_CLIPPED = within("nominal", low=0.02)

CLAIMS: tuple[Claim, ...] = (
    _on("after the group's standard deviation", AFTER),
    _on("a head of its own", HEAD),
    _on("before the group's mean, without a standard deviation", ALONE),
    _on("before the group's standard deviation", BEFORE),
    _on("k2 beside the reward", K2),
    _on("k3 beside the reward", K3),
    *(
        _off(f"{name}, {family}s, lag ≥ 0.03", family, estimator, *_CLIPPED)
        for family in ("bandit", "tree")
        for name, estimator in (("in the advantage", AFTER), ("a head of its own", HEAD), ("k3 with a differentiated ratio", WEIGHTED))
    ),
    *(
        claim("combined.nearer", f"{family}s, lag ≥ 0.03", "14_heads", "bias_ratio", "<", 1, 0, *within("lag", low=0.02), family=family)
        for family in ("bandit", "tree")
    ),
    _exponent("after the standard deviation", AFTER),
    _exponent("before, without a standard deviation", ALONE),
    _exponent("before the standard deviation, p ≤ 0.1", BEFORE, *within("success", high=0.11)),
    claim("standardised-kl.flat", "before the standard deviation, rewards all equal", "14_equal", "relative", "=", 1, EXACT),
    _size("β = 0.01, p from 0.1 to 0.9", "<", 0.01, 0.09, 0.91),
    _size("β = 0.01, p ≤ 0.01", "<", 0.01, 0.0, 0.011),
    _size("β = 0.1, p from 0.1 to 0.9", "<", 0.1, 0.09, 0.91),
)  # fmt: skip
