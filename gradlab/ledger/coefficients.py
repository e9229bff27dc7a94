"""What analysis 02 settles: the coefficient a loss puts on the score of a sampled token."""

from gradlab.ledger.form import Claim, Condition, Relation, claim, within

PLAIN, SHIPPED = "plain", "clamped as shipped"
OVER, UNDER = "over-sampled", "under-sampled"
#: Reference probability for which log-ratios of both signs were measured. Coefficients of k2 and k3 depend on the log-ratio alone.
RARE = 3e-4
NEAR, FAR = within("log_ratio", -2, 2), within("log_ratio", high=-5)


def _coefficient(
    identifier: str, scope: str, estimator: str, statistic: str, relation: Relation, value: float, margin: float = 0.0,
    *ranges: Condition, clamp: str = PLAIN, **columns: str | float,
) -> Claim:  # fmt: skip
    where = {"estimator": estimator, "clamp": clamp, **columns}
    return claim(identifier, scope, "02_coefficients", statistic, relation, value, margin, *ranges, **where)  # type: ignore[arg-type]


def _k3(identifier: str, scope: str, statistic: str, relation: Relation, value: float, margin: float = 0.0,
        clamp: str = PLAIN, **columns: str) -> Claim:  # fmt: skip
    return _coefficient(
        identifier, scope, "k3-loss", statistic, relation, value, margin, clamp=clamp, reference=RARE, **columns
    )


CLAIMS: tuple[Claim, ...] = (
    _coefficient("k2-loss", "one token", "k2-loss", "error", "=", 0, 1e-12, reference=RARE),
    _k3("k3-asymmetry", "one token, no clamp", "asymmetry", ">", 1, side=UNDER),
    _k3("k3-asymmetry", "one token, clamped as shipped", "asymmetry", ">", 1, clamp=SHIPPED, side=UNDER),
    _k3("k3-asymmetry.saturates", "one token", "magnitude", "<", 1, side=OVER),
    _k3("k3-asymmetry.explodes", "one token", "asymmetry_rate", "=", 1, 1e-9, side=UNDER),
    _k3("k3-weaker", "over-sampled token (δ < 1)", "versus_principled", "<", 1, side=OVER),
    _k3("k3-weaker", "under-sampled token (δ > 1)", "versus_principled", "<", 1, side=UNDER),
    _k3("same-sign", "one token", "versus_principled", ">", 0),
    _coefficient("bounded", "one token", "mse-sampled-loss", "magnitude", "≤", 1),
    *(
        _coefficient(
            "clamp", f"{kernel}, {scope}", f"{kernel}-loss", "lost", "=", 0, 1e-12, *ranges, clamp=SHIPPED, reference=RARE
        )
        for kernel in ("k2", "k3")
        for scope, ranges in (("near the reference, |ℓ| ≤ 2", NEAR), ("a token dropped, ℓ ≤ −5", FAR))
    ),
)
