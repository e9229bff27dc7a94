"""What analysis 04 settles: bias and noise against the distance from the reference, over many random scenarios."""

from gradlab.ledger.form import Claim, Condition, Quantifier, Relation, claim, within

ZERO = 1e-9
REVERSE, FROZEN = "reverse_kl", "reverse_kl_frozen_prefix"
NEAR, FAR = within("kl", high=1.1e-3), within("kl", low=0.99)
FAMILIES = {"bandit": "bandits", "tree": "trees", "markov": "chains"}


def _slope(scope: str, estimator: str, family: str | tuple[str, ...], target: str, exponent: float) -> Claim:
    """Exponent of the relative bias as KL → 0, in every random scenario."""
    where = {"estimator": estimator, "family": family, "target": target}
    return claim("k3-first-order", scope, "04_slopes", "slope", "=", exponent, 0.1, **where)  # type: ignore[arg-type]


def _band(
    identifier: str, scope: str, estimator: str | tuple[str, ...], statistic: str, relation: Relation, value: float, margin: float,
    *ranges: Condition, target: str = REVERSE, family: str | tuple[str, ...] = tuple(FAMILIES), quantifier: Quantifier = "every",
) -> Claim:  # fmt: skip
    where = {"estimator": estimator, "family": family, "target": target}
    return claim(identifier, scope, "04_bands", statistic, relation, value, margin, *ranges, quantifier=quantifier, **where)


def _ratio(
    identifier: str, scope: str, estimator: str, other: str, statistic: str, relation: Relation, *ranges: Condition,
    family: str | tuple[str, ...] = tuple(FAMILIES), value: float = 1.0,
) -> Claim:  # fmt: skip
    where = {"estimator": estimator, "other": other, "family": family}
    return claim(identifier, scope, "04_versus", statistic, relation, value, 0, *ranges, **where)  # type: ignore[arg-type]


def _error(scope: str, credit: str, statistic: str, relation: Relation, value: float, *ranges: Condition) -> Claim:
    return claim("k3-first-order", scope, "04_remainders", statistic, relation, value, 0, *ranges, credit=credit)


_SEQUENCES = ("tree", "markov")

CLAIMS: tuple[Claim, ...] = (
    _slope("bandits: relative bias ∝ KL^½", "k3-loss", "bandit", REVERSE, 0.5),
    _slope("sequences, per token, against the frozen-prefix form: ∝ KL^½", "k3-loss", _SEQUENCES, FROZEN, 0.5),
    _slope("sequences, per token, against the reverse KL: ∝ KL^½", "k3-loss", _SEQUENCES, REVERSE, 0.5),
    _slope("sequences, response as one action: ∝ KL^½", "k3-loss-sequence", _SEQUENCES, REVERSE, 0.5),
    _error("error is ½(δ−1)², per token, KL ≤ 0.001", "token", "remainder_max", "<", 0.2, *NEAR),
    _error("error is ½(δ−1)², response as one action, KL ≤ 0.001", "sequence", "remainder_max", "<", 0.2, *NEAR),
    _error("error is ½(δ−1)², per token, KL ≥ 1, median", "token", "remainder", "<", 1, *FAR),
    _band("k3-first-order", "relative bias below 10 %, KL ≤ 0.001, nine scenarios in ten", "k3-loss", "bias_high", "<", 0.1, 0, *NEAR),
    _band("k3-first-order", "relative bias below 10 %, KL ≥ 0.1, median", "k3-loss", "bias", "<", 0.1, 0, *within("kl", low=0.09)),
    _band("k3-biased", "random sequences at every KL, per token", "k3-loss", "bias_min", "≠", 0, 1e-6, family=_SEQUENCES),
    _band("k3-biased", "random sequences at every KL, response as one action", "k3-loss-sequence", "bias_min", "≠", 0, 1e-6,
          family=_SEQUENCES),
    *(
        _ratio("k3-weaker", f"expected gradient norm, random {plural}, every scenario", "k3-loss", "k2-loss", "norm_ratio_max", "<",
               family=family)
        for family, plural in FAMILIES.items()
    ),
    *(
        _ratio("k3-weaker", f"expected gradient norm, random {plural}, median, KL ≥ 1", "k3-loss", "k2-loss", "norm_ratio", "<",
               *FAR, family=family)
        for family, plural in FAMILIES.items()
    ),
    _ratio("k3-weaker", "expected gradient norm, response as one action, every scenario", "k3-loss-sequence", "k2-loss-sequence",
           "norm_ratio_max", "<", family=_SEQUENCES),
    _ratio("k3-weaker", "expected gradient norm, response as one action, median, KL ≥ 1", "k3-loss-sequence",
           "k2-loss-sequence", "norm_ratio", "<", *FAR, family=_SEQUENCES),
    _ratio("k3-reward", "near the reference, KL ≤ 0.001: under 10 % of the gradient is left", "k3-reward-to-go", "k1-reward-to-go",
           "norm_ratio", "<", *NEAR, value=0.1),
    _band("k3-reward", "random trees: in some scenario it points away from the gradient", "k3-reward-to-go", "cosine_min", "<", 0, 0,
          family="tree", quantifier="some"),
    _band("k3-reward", "random trees: it points away from the gradient, median", "k3-reward-to-go", "cosine", "<", 0, 0,
          family="tree"),
    *(
        _band("k3-both", f"{kernel}, random sequences", name, "bias_max", "=", 0, ZERO, family=_SEQUENCES)
        for kernel, name in (("k1", "k1-loss+reward-to_go"), ("k2", "k2-loss+reward-to_go"), ("k3", "k3-both"))
    ),
    _band("rao-blackwell", "per token, unbiased for the reverse KL, random sequences", "full-loss", "bias_max", "=", 0, ZERO,
          family=_SEQUENCES),
    _band("rao-blackwell", "per token, unbiased for the frozen-prefix form, random sequences", "full-loss", "bias_max", "=", 0, ZERO,
          family=_SEQUENCES, target=FROZEN),
    _band("rao-blackwell", "complete, unbiased for the reverse KL, random sequences", "full-both", "bias_max", "=", 0, ZERO,
          family=_SEQUENCES),
    _ratio("rao-blackwell", "per token, noise at most that of k2 as loss, random scenarios", "full-loss", "k2-loss",
           "noise_ratio_max", "<", *within("scenarios", low=2)),
    _ratio("rao-blackwell", "per token, noise at most that of k2 as loss, a chain of 2 tokens and 3 steps", "full-loss", "k2-loss",
           "noise_ratio_max", "<", *within("scenarios", high=1), family="markov"),
    _ratio("rao-blackwell", "complete, noise at most that of k1 in reward, random scenarios", "full-both", "k1-reward-to-go",
           "noise_ratio_max", "<", *within("scenarios", low=2)),
    _ratio("rao-blackwell", "complete, noise at most that of k1 in reward, compensating tree", "full-both", "k1-reward-to-go",
           "noise_ratio_max", "<", *within("scenarios", high=1), family="tree"),
)  # fmt: skip
