"""What analysis 09 settles: the stationary points of exact ascent on reward minus a regulariser."""

from gradlab.ledger.form import MATTERS, Claim, Condition, Quantifier, Relation, claim, within

#: Tolerance for the same probability, and for rewards approached from inside the simplex.
SAME, NEARLY = 1e-8, 1e-5
BANDIT, TREE = "bandit", "tree"
BOTH = (BANDIT, TREE)


def _ends(
    identifier: str, scope: str, estimator: str | tuple[str, ...], statistic: str, family: str | tuple[str, ...] = BOTH,
    relation: Relation = "=", value: float = 0.0, margin: float = SAME, *ranges: Condition, quantifier: Quantifier = "every",
    optional: bool = False,
) -> Claim:  # fmt: skip
    return claim(identifier, f"fixed points of {scope}", "09_fixed_points", statistic, relation, value, margin, *ranges,
                 quantifier=quantifier, optional=optional, estimator=estimator, family=family)  # fmt: skip


def _reverse(identifier: str, scope: str, estimator: str | tuple[str, ...], family: str | tuple[str, ...] = TREE) -> Claim:
    return _ends(identifier, scope, estimator, "to_reverse", family)


def _forward(scope: str, estimator: str, family: str = TREE) -> Claim:
    return _ends("k3-forward.optimum", scope, estimator, "to_forward", family)


def _off(scope: str, estimator: str, family: str, *ranges: Condition, optional: bool = False) -> Claim:
    """Off the optimum of the reverse KL."""
    return _ends("k3-biased.optimum", scope, estimator, "to_reverse", family, "≠", 0, MATTERS, *ranges, optional=optional)


def _farther(scope: str, kind: str, low: float, high: float) -> Claim:
    where = {"kind": kind, "quantile": 0.5}
    return claim("k3-weaker.optimum", scope, "09_weaker", "ratio", ">", 1.02, 0.0, *within("coefficient", low, high), **where)  # type: ignore[arg-type]


UNIFORM, GOOD, BAD = "uniform rewards", "one rare good token", "one rare bad token"
TREES, WHOLE = "trees, per token", "trees, one action"

CLAIMS: tuple[Claim, ...] = (
    _ends("train-k1-loss", "bandits and trees", "k1-loss", "to_unregularised", margin=NEARLY),
    _ends("train-k1-loss.best", "bandits, any β", "k1-loss", "regret", BANDIT, margin=NEARLY),
    _ends("train-k1-loss.best", "trees, by the horizon", "k1-loss", "regret", TREE, margin=NEARLY),
    _ends("train-k1-loss.drifts", "bandits and trees", "k1-loss", "kl_over_k2", BOTH, ">", 1, 0),
    _reverse("k1-reward.optimum", "bandits", "k1-reward", BANDIT),
    _reverse("k1-reward.optimum", "trees, credit to_go and return", ("k1-reward-to-go", "k1-reward-return")),
    _reverse("k1-reward.optimum", "trees, credit token", "k1-reward"),
    _reverse("k2-unbiased.optimum", "bandits", "k2-loss", BANDIT),
    _reverse("k2-unbiased.optimum", "trees, a response as one action", "k2-loss-sequence"),
    _reverse("k2-unbiased.optimum", "trees, per token", "k2-loss"),
    _ends("k2-unbiased.token-optimum", "trees", "k2-loss", "to_token_reverse", TREE),
    _ends("k2-unbiased.field", "trees", "k2-loss", "curl", TREE),
    _off("bandits", "k3-loss", BANDIT),
    _off("trees, a response as one action, β ≤ 0.3", "k3-loss-sequence", TREE, *within("coefficient", high=0.5)),
    # A small run has one coefficient.
    _off("trees, a response as one action, β = 1", "k3-loss-sequence", TREE, *within("coefficient", low=0.5), optional=True),
    _forward("bandits", "k3-loss", BANDIT),
    _forward("trees, a response as one action", "k3-loss-sequence"),
    _forward("trees, per token", "k3-loss"),
    _ends("k3-forward.token-optimum", "trees", "k3-loss", "to_token_forward", TREE),
    _ends("k3-reward.gives-up", "bandits and trees, any β", "k3-reward-to-go", "rarest", BOTH, "<", 1e-6, 0),
    _ends("k3-reward.worse", "some bandit or tree", "k3-reward-to-go", "regret_over_free", BOTH, ">", 0.01, 0, quantifier="some"),
    _reverse("k3-both.optimum", "bandits and trees", "k3-both", BOTH),
    _reverse("rao-blackwell.token-optimum", "trees", "full-loss"),
    _reverse("rao-blackwell.optimum", "trees", "full-both"),
    *(
        _farther(f"closed form, {kind}, {part}, median", kind, *ends)
        for kind in (UNIFORM, GOOD, BAD, TREES, WHOLE)
        for part, ends in (("β ≤ 0.1", (0.0, 0.11)), ("β ≥ 1", (0.99, 100.0)))
    ),
)  # fmt: skip
