"""What analysis 02 settles: the coefficient a loss puts on the score of a sampled token."""

from gradlab.ledger.form import Claim, Condition, Relation, claim, within

PLAIN, SHIPPED = "plain", "clamped as shipped"
OVER, UNDER = "over-sampled", "under-sampled"
#: Reference probability for which log-ratios of both signs were measured.
RARE = 3e-4
NEAR, FAR = within("log_ratio", -2, 2), within("log_ratio", high=-5)


def _coefficient(
    identifier: str, scope: str, estimator: str, statistic: str, relation: Relation, value: float, margin: float = 0.0,
    *ranges: Condition, clamp: str = PLAIN, **columns: str | float,
) -> Claim:  # fmt: skip
    where = {"estimator": estimator, "clamp": clamp, **columns}
    return claim(identifier, scope, "02_coefficients", statistic, relation, value, margin, *ranges, **where)  # type: ignore[arg-type]


CLAIMS: tuple[Claim, ...] = (
    _coefficient("k2-loss", "sample by sample", "k2-loss", "error", "=", 0, 1e-12),
    _coefficient("k3-asymmetry", "coefficient saturates, over-sampled", "k3-loss", "magnitude", "<", 1, side=OVER),
    _coefficient("k3-asymmetry", "coefficient explodes as e^|ℓ|", "k3-loss", "asymmetry_rate", "=", 1, 1e-9, reference=RARE),
    _coefficient("k3-asymmetry", "coefficient as shipped", "k3-loss", "asymmetry", ">", 1, clamp=SHIPPED, reference=RARE),
    _coefficient("k3-weaker", "coefficient, over-sampled (δ < 1)", "k3-loss", "versus_principled", "<", 1, side=OVER),
    _coefficient("k3-weaker", "coefficient, under-sampled (δ > 1)", "k3-loss", "versus_principled", "<", 1, side=UNDER),
    _coefficient("same-sign", "per sample", "k3-loss", "versus_principled", ">", 0),
    _coefficient("bounded", "coefficient", "mse-sampled-loss", "magnitude", "<", 1),
    *(
        _coefficient("clamp", f"{kernel}, coefficient {scope}", f"{kernel}-loss", "lost", "=", 0, 1e-12, *ranges, clamp=SHIPPED)
        for kernel in ("k2", "k3")
        for scope, ranges in (("near the reference, |ℓ| ≤ 2", NEAR), ("of a token dropped, ℓ ≤ −5", FAR))
    ),
)
