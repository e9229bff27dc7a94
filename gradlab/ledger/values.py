"""What analysis 01 settles: the value of KL estimators, its noise, and whether it vouches for the gradient."""

from gradlab.ledger.form import EXACT, MATTERS, Claim, Condition, Relation, claim, within

BOTH = ("mean", "std")


def _mean(kernel: str, scope: str, family: str, relation: Relation, margin: float, *ranges: Condition) -> Claim:
    where = {"kernel": kernel, "family": family, "via": "exact"}
    return claim(f"value-{kernel}", scope, "01_schulman", "bias", relation, 0, margin, *ranges, **where)  # type: ignore[arg-type]


_MEAN = (
    *(
        _mean(kernel, scope, family, "=", EXACT)
        for kernel in ("k1", "k3")
        for family, scope in (("gaussian", "Gaussian"), ("bandit", "bandit"), ("tree", "tree"))
    ),
    _mean("k2", "Gaussian, KL 0.005", "gaussian", "≠", MATTERS, *within("kl", high=0.01)),
    _mean("k2", "Gaussian, KL ≥ 0.4", "gaussian", "≠", MATTERS, *within("kl", low=0.4)),
    _mean("k2", "bandit", "bandit", "≠", MATTERS),
    _mean("k2", "tree", "tree", "≠", MATTERS),
)


def _quieter(scope: str, panel: str, *ranges: Condition, **columns: str) -> Claim:
    """k3 has the lower standard deviation at every KL of the scope."""
    where = {"panel": panel, "kernel": "k3", **columns}
    return claim("value-variance", scope, "01_crossover", "versus_k1", "<", 1, 0, *ranges, **where)  # type: ignore[arg-type]


_GAUSSIANS, _RANDOM = "Gaussian policies", "random categoricals"
_VARIANCE = (
    _quieter("Gaussian, equal variances, KL ≤ 0.1", "equal variances", *within("kl", high=0.1)),
    _quieter("Gaussian, equal variances, KL ≥ 1", "equal variances", *within("kl", low=1)),
    _quieter("Gaussian, policy narrower than the reference, KL ≤ 0.1", _GAUSSIANS, *within("kl", high=0.1), group="narrower"),
    _quieter("Gaussian, policy wider than the reference, any KL", _GAUSSIANS, group="wider"),
    _quieter("random bandits and trees, KL ≤ 0.01", _RANDOM, *within("kl", high=0.01)),
    _quieter("random bandits and trees, KL ≤ 0.1", _RANDOM, *within("kl", high=0.1)),
    _quieter("random bandits and trees, KL ≥ 1", _RANDOM, *within("kl", low=1)),
    _quieter("bandits that drop one token, KL ≤ 0.01", "one token dropped", *within("kl", high=0.01)),
)


def _component(
    identifier: str, scope: str, estimator: str, relation: Relation = "=", margin: float = EXACT, statistic: str = "bias",
    **columns: str | tuple[str, ...],
) -> Claim:  # fmt: skip
    """A component of an expected gradient in the Gaussian toys, compared with 0."""
    where: dict[str, str | tuple[str, ...]] = {"via": "exact", "parameter": BOTH, "variances": "unequal", **columns}
    return claim(identifier, scope, "01_gradients", statistic, relation, 0, margin, estimator=estimator, **where)  # type: ignore[arg-type]


_GRADIENT = (
    _component("value-implies-gradient", "k3, Gaussian, equal variances, mean", "k3-loss", variances="equal", parameter="mean"),
    _component("value-implies-gradient", "k3, Gaussian, unequal variances", "k3-loss"),
    _component("value-implies-gradient", "k1, Gaussian, unequal variances", "k1-loss"),
    _component("k1-loss-zero", "on-policy, Gaussian", "k1-loss", statistic="expected", variances=("equal", "unequal")),
    _component("target", "Gaussian", "k1-reward"),
    _component("k2-unbiased", "Gaussian", "k2-loss"),
    _component("k3-both", "k3, Gaussian", "k3-both"),
    _component("k3-biased", "Gaussian, equal variances, mean", "k3-loss", "≠", MATTERS, variances="equal", parameter="mean"),
    _component("k3-biased", "Gaussian, equal variances, std: a pull where the true gradient is 0", "k3-loss", "≠", MATTERS, "expected",
               variances="equal", parameter="std"),
    _component("k3-biased", "Gaussian, unequal variances", "k3-loss", "≠", MATTERS),
    _component("k3-biased", "Gaussian, unequal variances, 50,000 samples", "k3-loss", "≠", MATTERS, via="sampled"),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (*_MEAN, *_VARIANCE, *_GRADIENT)
