"""What analysis 08 settles: data from an older policy, importance weights, truncation and clipping."""

from gradlab.ledger.form import EXACT, MATTERS, Claim, Condition, Relation, Value, claim, within

REVERSE, FROZEN, POLICY = "reverse_kl", "reverse_kl_frozen_prefix", "reverse_kl_policy_prefix"
FORWARD, FORWARD_FROZEN = "forward_kl", "forward_kl_frozen_prefix"
BANDIT, TREE = "bandit", "tree"


def _published(identifier: str, scope: str, family: str, estimator: str, relation: Relation, margin: float, target: str = REVERSE,
               off_policy: bool = True, statistic: str = "bias") -> Claim:  # fmt: skip
    """The relative bias of a published estimator as a gradient of a target, over all policies of a family."""
    where: dict[str, Value] = {"family": family, "estimator": estimator, "off_policy": off_policy, "target": target}
    return claim(identifier, scope, "08_published", statistic, relation, 0, margin, **where)  # type: ignore[arg-type]


def _unbiased(
    identifier: str, scope: str, family: str, estimator: str, target: str = REVERSE, off_policy: bool = True
) -> Claim:
    return _published(identifier, scope, family, estimator, "=", EXACT, target, off_policy)


def _biased(part: str, scope: str, family: str, estimator: str, target: str) -> Claim:
    return _published(f"off-policy-bias{part}", scope, family, estimator, "≠", MATTERS, target)


def _lag(identifier: str, scope: str, estimator: str, relation: Relation, *ranges: Condition, statistic: str = "bias",
         value: float = 0, margin: float = 0) -> Claim:  # fmt: skip
    """Bias against the reverse KL of responses at every lag of the random trees."""
    return claim(identifier, scope, "08_lag", statistic, relation, value, margin, *ranges, estimator=estimator)


def _none(scope: str, **where: Value | tuple[Value, ...]) -> Claim:
    """No composition among these is unbiased for the reverse KL of responses."""
    return claim("open-off-policy.compositions", scope, "08_compositions", "bias_reverse_kl", "≠", 0, MATTERS, **where)  # type: ignore[arg-type]


def _noisier(scope: str, estimator: str, *ranges: Condition) -> Claim:
    return claim("off-policy-noise.more", scope, "08_growth", "noise_ratio", ">", 1, 0, *ranges, estimator=estimator)


_FAR = within("nominal", low=0.1)
_NEAR = within("nominal", high=0.1)
_K1_SEQUENCE, _RB = "k1-reward-to-go, sequence weight", "full-both, prefix weight"
_K3_PREFIX = "k3-loss, differentiated prefix weight"
_TOKEN_CLIP, _SEQUENCE_CLIP = "k1-reward-to-go, token weight, clip 0.2", "k1-reward-sequence, sequence weight, clip 0.2"

_BIAS = (
    *(_biased("", f"{k}, bandit", BANDIT, f"{k}-loss", REVERSE) for k in ("k1", "k2", "k3", "full")),
    *(_lag("off-policy-bias", f"{k} per token, trees, every lag", f"{k}-loss", "≠", margin=MATTERS) for k in ("k1", "k2", "k3", "full")),
    _biased(".frozen", "k2, trees", TREE, "k2-loss", FROZEN),
    _biased(".frozen", "full vocabulary, trees", TREE, "full-loss", FROZEN),
    _biased(".forward", "bandit", BANDIT, "k3-loss", FORWARD),
    _biased(".forward-frozen", "trees", TREE, "k3-loss", FORWARD_FROZEN),
    *(
        _lag("off-policy-bias.excess", f"{name}, trees, lag ≥ 0.1", name, ">", *_FAR, statistic="excess")
        for name in ("k2-loss", "k3-loss", "full-loss", "full-both", "k1-reward-to-go")
    ),
)  # fmt: skip

_FIX = (
    _unbiased("off-policy-fix", "bandit", BANDIT, "k2-loss, token weight"),
    _unbiased("off-policy-fix", "trees, a response as one action, sequence weight", TREE, "k2-loss-sequence, sequence weight"),
    _unbiased("off-policy-fix", "trees, per token, token weight", TREE, "k2-loss, token weight"),
    _unbiased("off-policy-fix", "trees, per token, prefix weight", TREE, "k2-loss, prefix weight"),
    _unbiased("off-policy-fix.frozen", "trees, token weight, prefixes of the behaviour", TREE, "k2-loss, token weight", FROZEN),
    _unbiased("off-policy-fix.frozen", "trees, prefix weight, prefixes of the policy", TREE, "k2-loss, prefix weight", POLICY),
    _unbiased("off-policy-fix.k3", "bandit", BANDIT, "k3-loss, token weight"),
    _unbiased("off-policy-fix.k3", "trees, a response as one action, sequence weight", TREE, "k3-loss-sequence, sequence weight"),
    _unbiased("off-policy-fix.k3-forward", "bandit", BANDIT, "k3-loss, token weight", FORWARD),
    _unbiased("off-policy-fix.k3-forward", "trees, a response as one action, sequence weight", TREE,
              "k3-loss-sequence, sequence weight", FORWARD),
    _unbiased("off-policy-fix.k3-forward-frozen", "trees, token weight", TREE, "k3-loss, token weight", FORWARD_FROZEN),
    _unbiased("off-policy-fix.clip", "bandit, on-policy", BANDIT, _TOKEN_CLIP, off_policy=False),
    _unbiased("off-policy-fix.clip", "bandit, off-policy", BANDIT, _TOKEN_CLIP),
    _unbiased("off-policy-fix.clip", "trees, credit to_go, token weight", TREE, _TOKEN_CLIP),
    _unbiased("off-policy-fix.clip", "trees, credit sequence, sequence weight", TREE, _SEQUENCE_CLIP),
    *(_lag("off-policy-fix.truncation", f"trees, at {c}, every lag", f"{_K1_SEQUENCE} ≤ {c}", "=", margin=EXACT) for c in (2, 5, 10)),
    *(
        _lag("off-policy-fix.truncation-small", f"{label} truncated at {c}, trees, lag ≤ 0.1", f"{name} ≤ {c}", "<", *_NEAR, value=0.05)
        for label, name in (("k1 in reward, sequence weight", _K1_SEQUENCE), ("complete Rao–Blackwell, prefix weight", _RB))
        for c in (2, 5, 10)
    ),
)  # fmt: skip

_RATIO = (
    _unbiased("rho-k3", "bandit", BANDIT, "k3-loss, differentiated token weight"),
    _unbiased("rho-k3", "trees, per token, ratio of the token", TREE, "k3-loss, differentiated token weight"),
    _unbiased("rho-k3", "trees, per token, ratio of the prefix", TREE, _K3_PREFIX),
    _unbiased("rho-k3.frozen", "trees, ratio of the token, prefixes of the behaviour", TREE,
              "k3-loss, differentiated token weight", FROZEN),
    _unbiased("rho-k2", "off-policy, bandit", BANDIT, "k2-loss, differentiated token weight"),
    _unbiased("rho-k2", "on-policy, bandit", BANDIT, "k2-loss, differentiated token weight", off_policy=False),
    _unbiased("rho-k2.frozen", "off-policy, trees, prefixes of the behaviour", TREE, "k2-loss, differentiated token weight", FROZEN),
    _unbiased("k3-plus", "on-policy, trees", TREE, "k3-plus", off_policy=False),
    _unbiased("k3-plus", "off-policy, bandit", BANDIT, "k3-plus"),
    _unbiased("k3-plus", "off-policy, trees", TREE, "k3-plus"),
    _unbiased("k3-plus", "off-policy, bandit, detached token weight", BANDIT, "k3-plus, token weight"),
    _unbiased("k3-plus.frozen", "on-policy, trees", TREE, "k3-plus", FROZEN, off_policy=False),
    _unbiased("k3-plus.frozen", "off-policy, trees", TREE, "k3-plus", FROZEN),
    _unbiased("k3-plus.frozen", "off-policy, trees, detached token weight", TREE, "k3-plus, token weight", FROZEN),
)  # fmt: skip

_OPEN = (
    *(
        claim("open-off-policy", f"as shipped, sums of tokens, no clamp, {label}", "08_shipped", "bias", "≠", 0, MATTERS, family=family,
              target=REVERSE)
        for family, label in ((TREE, "trees"), (BANDIT, "bandits"))
    ),
    _none("without a weight", weight="none"),
    _none("token weight", weight="token"),
    _none("sampled tokens, detached prefix weight", weight="prefix", sampled=True, differentiate_weight=False),
    _none("sampled tokens, differentiated prefix weight", weight="prefix", sampled=True, differentiate_weight=True),
    _none("sampled tokens, sequence weight", weight="sequence", sampled=True),
    _none("whole vocabulary, prefix weight", weight="prefix", sampled=False),
    claim("off-policy-noise", "trees, lag 0.3", "08_compositions", "noise_ratio", "≥", 1, unbiased=True),
    _noisier("k1 in reward with a sequence weight, chains", _K1_SEQUENCE),
    _noisier("k1 as loss with a differentiated prefix weight, chains", "k1-loss, differentiated prefix weight"),
    _noisier("k3 as loss with a differentiated prefix weight, chains of at most 8 tokens", _K3_PREFIX, *within("length", high=8)),
    _noisier("k3 as loss with a differentiated prefix weight, chains of 64 tokens and more", _K3_PREFIX, *within("length", low=64)),
    _noisier("complete Rao–Blackwell with a sequence weight, chains", "full-both, sequence weight"),
    claim("off-policy-growth.exponent", "chains, fixed lag per response", "08_exponents", "exponent", ">", 0.3,
          sweep="length, fixed lag per response"),
    claim("off-policy-growth.exponent", "chains, fixed lag per token, at the long end", "08_exponents", "last", ">", 0.3,
          sweep="length, fixed lag per token"),
)  # fmt: skip

_K1 = (
    *(
        _published("k1-loss-zero", f"off-policy, {label}", family, "k1-loss", "=", EXACT, statistic="gradient_norm")
        for label, family in (("bandit", BANDIT), ("trees", TREE))
    ),
    claim("k1-loss-repels", "bandits and trees", "08_repulsion", "repulsion", "=", 0, EXACT),
    claim("k1-loss-repels.reference", "bandits and trees", "08_repulsion", "moved", "=", 0, EXACT),
    claim("k1-loss-repels.step", "bandits and trees", "08_repulsion", "lag_change", ">", 0),
    _unbiased("k1-reward.off-policy", "bandit, no weight", BANDIT, "k1-reward-to-go"),
    _unbiased("k1-reward.off-policy", "bandit, token weight", BANDIT, "k1-reward-to-go, token weight"),
    _unbiased("k1-reward.off-policy", "trees, credit to_go, no weight", TREE, "k1-reward-to-go"),
    *(
        _unbiased("k1-reward.off-policy", f"trees, credit to_go, {w} weight", TREE, f"k1-reward-to-go, {w} weight")
        for w in ("token", "prefix", "sequence")
    ),
    _unbiased("k1-reward.off-policy", "trees, credit return, no weight", TREE, "k1-reward-return"),
    _unbiased("k1-reward.off-policy", "trees, credit return, sequence weight", TREE, "k1-reward-return, sequence weight"),
)

CLAIMS: tuple[Claim, ...] = (*_BIAS, *_FIX, *_RATIO, *_OPEN, *_K1)
