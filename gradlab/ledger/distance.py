"""What analysis 04 settles: bias and noise against the distance from the reference, over many random scenarios."""

from gradlab.ledger.form import EXACT, MATTERS, Claim, Condition, Quantifier, Relation, claim, within

REVERSE, FROZEN = "reverse_kl", "reverse_kl_frozen_prefix"
NEAR, FAR = within("kl", high=1.1e-3), within("kl", low=0.99)
FAMILIES = {"bandit": "bandits", "tree": "trees", "markov": "chains"}


def _slope(scope: str, estimator: str, family: str | tuple[str, ...], target: str) -> Claim:
    """Exponent of the relative bias as KL → 0, in every random scenario."""
    where = {"estimator": estimator, "family": family, "target": target}
    return claim("k3-first-order", scope, "04_slopes", "slope", "=", 0.5, 0.1, **where)  # type: ignore[arg-type]


def _band(
    identifier: str, scope: str, estimator: str | tuple[str, ...], statistic: str, relation: Relation, value: float, margin: float,
    *ranges: Condition, target: str = REVERSE, family: str | tuple[str, ...] = tuple(FAMILIES), quantifier: Quantifier = "every",
) -> Claim:  # fmt: skip
    where: dict[str, str | tuple[str, ...]] = {"estimator": estimator, "family": family, "target": target}
    return claim(identifier, scope, "04_bands", statistic, relation, value, margin, *ranges, quantifier=quantifier, **where)  # type: ignore[arg-type]


def _unbiased(identifier: str, scope: str, estimator: str, target: str = REVERSE) -> Claim:
    return _band(identifier, scope, estimator, "bias_max", "=", 0, EXACT, family=_SEQUENCES, target=target)


def _ratio(
    identifier: str, scope: str, estimator: str, other: str, statistic: str, relation: Relation, *ranges: Condition,
    family: str | tuple[str, ...] = tuple(FAMILIES), value: float = 1.0,
) -> Claim:  # fmt: skip
    where = {"estimator": estimator, "other": other, "family": family}
    return claim(identifier, scope, "04_versus", statistic, relation, value, 0, *ranges, **where)  # type: ignore[arg-type]


def _shorter(scope: str, statistic: str, *ranges: Condition, family: str | tuple[str, ...], suffix: str = "") -> Claim:
    return _ratio("k3-weaker.gradient", scope, f"k3-loss{suffix}", f"k2-loss{suffix}", statistic, "<", *ranges, family=family)


def _error(scope: str, credit: str, statistic: str, *ranges: Condition) -> Claim:
    return claim("k3-first-order.error", scope, "04_remainders", statistic, "<", 0.2, 0, *ranges, credit=credit)


_SEQUENCES = ("tree", "markov")

CLAIMS: tuple[Claim, ...] = (
    _slope("bandits", "k3-loss", "bandit", REVERSE),
    _slope("sequences, per token, for the reverse KL with frozen prefixes", "k3-loss", _SEQUENCES, FROZEN),
    _slope("sequences, per token, for the reverse KL of responses", "k3-loss", _SEQUENCES, REVERSE),
    _slope("sequences, a response as one action", "k3-loss-sequence", _SEQUENCES, REVERSE),
    _error("per token, KL ≤ 0.001, every scenario", "token", "remainder_max", *NEAR),
    _error("a response as one action, KL ≤ 0.001, every scenario", "sequence", "remainder_max", *NEAR),
    _error("per token, KL ≥ 1, median", "token", "remainder", *FAR),
    _band("k3-first-order.near", "KL ≤ 0.001, nine scenarios in ten", "k3-loss", "bias_high", "<", 0.1, 0, *NEAR),
    _band("k3-first-order.near", "KL ≥ 0.1, median", "k3-loss", "bias", "<", 0.1, 0, *within("kl", low=0.09)),
    *(
        _band("k3-biased", f"random sequences, {label}, {place}", estimator, "bias_min", "≠", 0, MATTERS, *ranges, family=_SEQUENCES)
        for label, estimator in (("per token", "k3-loss"), ("a response as one action", "k3-loss-sequence"))
        for place, ranges in (("KL ≤ 0.001", NEAR), ("KL ≥ 0.1", within("kl", low=0.09)))
    ),
    *(_shorter(f"random {plural}, every scenario", "norm_ratio_max", family=family) for family, plural in FAMILIES.items()),
    *(_shorter(f"random {plural}, KL ≥ 1, median", "norm_ratio", *FAR, family=family) for family, plural in FAMILIES.items()),
    _shorter("a response as one action, every scenario", "norm_ratio_max", family=_SEQUENCES, suffix="-sequence"),
    _shorter("a response as one action, KL ≥ 1, median", "norm_ratio", *FAR, family=_SEQUENCES, suffix="-sequence"),
    _ratio("k3-reward.vanishes", "KL ≤ 0.001, median", "k3-reward-to-go", "k1-reward-to-go", "norm_ratio", "<", *NEAR, value=0.1),
    _band("k3-reward.opposed", "some random tree", "k3-reward-to-go", "cosine_min", "<", 0, 0, family="tree", quantifier="some"),
    _band("k3-reward.opposed", "random trees, median at every KL", "k3-reward-to-go", "cosine", "<", 0, 0, family="tree"),
    *(
        _unbiased("k3-both", f"{kernel}, random sequences", name)
        for kernel, name in (("k1", "k1-loss+reward-to_go"), ("k2", "k2-loss+reward-to_go"), ("k3", "k3-both"))
    ),
    _unbiased("rao-blackwell.token", "random sequences", "full-loss"),
    _unbiased("rao-blackwell.frozen", "random sequences", "full-loss", FROZEN),
    _unbiased("rao-blackwell", "random sequences", "full-both"),
    *(
        _ratio(f"rao-blackwell.{part}", scope, estimator, other, "noise_ratio_max", "≤", *ranges, family=family)
        for part, estimator, other, alone, one in (
            ("noise", "full-loss", "k2-loss", "a chain of 2 tokens and 3 steps", "markov"),
            ("complete-noise", "full-both", "k1-reward-to-go", "a tree whose log-ratios compensate each other", "tree"),
        )
        for scope, ranges, family in (
            ("random scenarios", within("scenarios", low=2), tuple(FAMILIES)),
            (alone, within("scenarios", high=1), one),
        )
    ),
)  # fmt: skip
