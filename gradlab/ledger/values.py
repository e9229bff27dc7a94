"""What analysis 01 settles: the value of KL estimators, its noise, and whether it vouches for the gradient."""

from gradlab.ledger.form import Claim, Condition, Relation, claim, within

#: Tolerance for an exact zero.
ZERO = 1e-9
EQUAL, UNEQUAL = "N(0, 1) ‖ N(1, 1)", "N(0, 1) ‖ N(1, std 1.1)"
BOTH = ("mean", "std")

_RELATIONS: dict[str, Relation] = {"k1": "=", "k2": "≠", "k3": "="}
_MEAN = tuple(
    claim(f"value-{kernel}", scope, "01_schulman", "bias", relation, 0, ZERO, kernel=kernel, family=family, via="exact")
    for kernel, relation in _RELATIONS.items()
    for family, scope in (("gaussian", "Gaussian"), ("bandit", "bandit"), ("tree", "tree"))
)


def _quieter_up_to(kl: float, scope: str, panel: str, **columns: str) -> Claim:
    """k3 has the lower standard deviation in every policy of the scope until its KL has passed `kl`."""
    where = {"panel": panel, "kernel": "k3", **columns}
    return claim("value-variance", f"{scope}, KL ≤ {kl:g}", "01_crossover", "crossover", ">", kl, **where)  # type: ignore[arg-type]


def _quieter(scope: str, panel: str, *ranges: Condition, **columns: str) -> Claim:
    """k3 has the lower standard deviation at every KL of the scope."""
    where = {"panel": panel, "kernel": "k3", **columns}
    return claim("value-variance", scope, "01_crossover", "versus_k1", "<", 1, 0, *ranges, **where)  # type: ignore[arg-type]


_GAUSSIANS, _RANDOM = "Gaussian policies", "random categoricals"
_VARIANCE = (
    _quieter_up_to(0.1, "Gaussian, equal variances", "equal variances"),
    _quieter("Gaussian, equal variances, KL ≥ 1", "equal variances", *within("kl", low=1)),
    _quieter_up_to(0.1, "Gaussian, policy narrower than the reference", _GAUSSIANS, group="narrower"),
    _quieter("Gaussian, policy wider than the reference, any KL", _GAUSSIANS, group="wider"),
    _quieter_up_to(0.01, "random bandits and trees", _RANDOM),
    _quieter_up_to(0.1, "random bandits and trees", _RANDOM),
    _quieter("random bandits and trees, KL ≥ 1", _RANDOM, *within("kl", low=1)),
    _quieter_up_to(0.01, "bandits that drop one token", "one token dropped"),
)


def _component(
    identifier: str, scope: str, estimator: str, statistic: str, relation: str, margin: float = ZERO, **columns: object
) -> Claim:
    """A component of an expected gradient in the Gaussian toys, compared with 0."""
    where = {"estimator": estimator, "via": "exact", "parameter": BOTH, "scenario": UNEQUAL, **columns}
    return claim(identifier, scope, "01_gradients", statistic, relation, 0, margin, **where)  # type: ignore[arg-type]


_GRADIENT = (
    _component(
        "value-implies-gradient",
        "k3, Gaussian, equal variances, mean",
        "k3-loss",
        "bias",
        "=",
        scenario=EQUAL,
        parameter="mean",
    ),
    _component("value-implies-gradient", "k3, Gaussian, unequal variances", "k3-loss", "bias", "="),
    _component("value-implies-gradient", "k1, Gaussian, unequal variances", "k1-loss", "bias", "="),
    _component("k1-loss-zero", "Gaussian, on-policy sum", "k1-loss", "expected", "=", scenario=(EQUAL, UNEQUAL)),
    _component("target", "Gaussian", "k1-reward", "bias", "="),
    _component("k2-loss", "Gaussian, in expectation", "k2-loss", "bias", "="),
    _component("k3-both", "k3, Gaussian", "k3-both", "bias", "="),
    _component("k3-biased", "Gaussian, equal variances, mean", "k3-loss", "bias", "≠", scenario=EQUAL, parameter="mean"),
    _component("k3-biased", "Gaussian, equal variances, std", "k3-loss", "expected", "≠", scenario=EQUAL, parameter="std"),
    _component("k3-biased", "Gaussian, unequal variances", "k3-loss", "bias", "≠"),
    _component("k3-biased", "Gaussian, unequal variances, 50,000 samples", "k3-loss", "bias", "≠", 0.05, via="sampled"),
)

CLAIMS: tuple[Claim, ...] = (*_MEAN, *_VARIANCE, *_GRADIENT)
