"""What analysis 09 settles: where exact ascent on reward minus a regulariser comes to rest."""

from gradlab.ledger.form import Claim, Relation, claim, within

#: Tolerance for the same probability, and for rewards approached from inside the simplex.
SAME, NEARLY = 1e-8, 1e-5
BANDIT, TREE = "bandit", "tree"
BOTH = (BANDIT, TREE)


def _ends(
    identifier: str, scope: str, estimator: str | tuple[str, ...], statistic: str, relation: Relation, value: float = 0.0,
    margin: float = SAME, family: str | tuple[str, ...] = BOTH, quantifier: str = "every",
) -> Claim:  # fmt: skip
    where = {"estimator": estimator, "family": family}
    return claim(
        identifier, f"fixed point: {scope}", "09_fixed_points", statistic, relation, value, margin,
        quantifier=quantifier, **where,  # type: ignore[arg-type]
    )  # fmt: skip


def _weaker(scope: str, kind: str, quantile: float, low: float, high: float) -> Claim:
    where = {"kind": kind, "quantile": quantile}
    name = f"fixed points, closed form: {scope}"
    return claim("k3-weaker", name, "09_weaker", "ratio", ">", 1.02, 0.0, *within("coefficient", low, high), **where)  # type: ignore[arg-type]


UNIFORM, GOOD, BAD = "uniform rewards", "one rare good token", "one rare bad token"
TREES, WHOLE = "trees, per token", "trees, one action"

CLAIMS: tuple[Claim, ...] = (
    _ends("train-k1-loss", "k1 as loss ends where ascent without a KL term ends", "k1-loss", "to_unregularised", "=", 0, NEARLY),
    _ends("train-k1-loss", "k1 as loss gives all to the best response, bandits, at any coefficient", "k1-loss", "regret", "=", 0, NEARLY,
          family=BANDIT),
    _ends("train-k1-loss", "k1 as loss gives all to the best response, trees, by the horizon", "k1-loss", "regret", "=", 0, NEARLY,
          family=TREE),
    _ends("train-k1-loss", "k1 as loss ends farther from the reference than k2 as loss", "k1-loss", "kl_over_k2", ">", 1, 0),
    _ends("k1-reward", "π*, bandits", "k1-reward", "to_reverse", "=", family=BANDIT),
    _ends("k1-reward", "π*, trees, credit to_go and return", ("k1-reward-to-go", "k1-reward-return"), "to_reverse", "=", family=TREE),
    _ends("k1-reward", "π*, trees, credit token", "k1-reward", "to_reverse", "=", family=TREE),
    _ends("k2-loss", "π*, bandits", "k2-loss", "to_reverse", "=", family=BANDIT),
    _ends("k2-loss", "π*, a response as one action", "k2-loss-sequence", "to_reverse", "=", family=TREE),
    _ends("k2-loss", "π*, per token, trees", "k2-loss", "to_reverse", "=", family=TREE),
    _ends("k2-loss", "per token, trees, the optimum of every context by itself", "k2-loss", "to_token_reverse", "=", family=TREE),
    _ends("k2-loss", "per token, trees, a gradient of something there", "k2-loss", "curl", "=", family=TREE),
    _ends("k3-biased", "not π*, bandits", "k3-loss", "to_reverse", "≠", margin=1e-4, family=BANDIT),
    _ends("k3-biased", "not π*, trees, a response as one action", "k3-loss-sequence", "to_reverse", "≠", margin=1e-4, family=TREE),
    _ends("k3-biased", "the forward-KL optimum, bandits", "k3-loss", "to_forward", "=", family=BANDIT),
    _ends("k3-biased", "the forward-KL optimum, a response as one action", "k3-loss-sequence", "to_forward", "=", family=TREE),
    _ends("k3-biased", "the forward-KL optimum, per token, trees", "k3-loss", "to_forward", "=", family=TREE),
    _ends("k3-biased", "per token, trees, the forward-KL optimum of every context by itself", "k3-loss", "to_token_forward", "=",
          family=TREE),
    _ends("k3-reward", "k3 in reward gives up a response, at any coefficient", "k3-reward-to-go", "rarest", "<", 1e-6, 0),
    _ends("k3-reward", "k3 in reward can end at a worse response than no penalty", "k3-reward-to-go", "regret_over_free", ">", 0.01, 0,
          quantifier="some"),
    _ends("k3-both", "π*", "k3-both", "to_reverse", "="),
    _ends("rao-blackwell", "per token reaches π*, trees", "full-loss", "to_reverse", "=", family=TREE),
    _ends("rao-blackwell", "complete, reaches π*, trees", "full-both", "to_reverse", "=", family=TREE),
    *(
        _weaker(f"farther from the reference by 2 %, {kind}, {part}", kind, 0.5, *ends)
        for kind in (UNIFORM, GOOD, BAD, TREES, WHOLE)
        for part, ends in (("β ≤ 0.1, median", (0.0, 0.11)), ("β ≥ 1, median", (0.99, 100.0)))
    ),
)  # fmt: skip
