"""What analysis 08 settles: data from an older policy, importance weights, truncation and clipping."""

from gradlab.ledger.form import Claim, Condition, Relation, Value, claim, within

ZERO = 1e-9
REVERSE, FROZEN, POLICY = "reverse_kl", "reverse_kl_frozen_prefix", "reverse_kl_policy_prefix"
FORWARD, FORWARD_FROZEN = "forward_kl", "forward_kl_frozen_prefix"
BANDIT, TREE = "bandit", "tree"


def _bias(identifier: str, scope: str, family: str, estimator: str, relation: Relation, target: str = REVERSE,
          off_policy: bool = True, statistic: str = "bias") -> Claim:  # fmt: skip
    """The relative bias of a published estimator as a gradient of a target, over all policies of a family."""
    where: dict[str, Value] = {"family": family, "estimator": estimator, "off_policy": off_policy, "target": target}
    return claim(identifier, scope, "08_published", statistic, relation, 0, ZERO, **where)  # type: ignore[arg-type]


def _lag(identifier: str, scope: str, estimator: str, relation: Relation, *ranges: Condition, statistic: str = "bias",
         value: float = 0, margin: float = ZERO) -> Claim:  # fmt: skip
    """Bias against the reverse KL of responses at every lag of the random trees."""
    return claim(identifier, scope, "08_lag", statistic, relation, value, margin, *ranges, estimator=estimator)


def _none(scope: str, **where: Value | tuple[Value, ...]) -> Claim:
    """No composition among these is unbiased for the reverse KL of responses."""
    return claim("open-off-policy", scope, "08_compositions", "bias_reverse_kl", "≠", 0, 1e-10, **where)  # type: ignore[arg-type]


def _noisier(scope: str, estimator: str, *ranges: Condition, by: float = 1) -> Claim:
    return claim("off-policy-noise", scope, "08_growth", "noise_ratio", ">", by, 0, *ranges, estimator=estimator)


_FAR = within("nominal", low=0.1)
_NEAR = within("nominal", high=0.1)
_K1_SEQUENCE, _RB = "k1-reward-to-go, sequence weight", "full-both, prefix weight"
_K3_PREFIX = "k3-loss, differentiated prefix weight"
_CLIPPED = "k1-reward-sequence, sequence weight, clip 0.2"

_BIAS = (
    *(_bias("off-policy-bias", f"{k} as loss, bandit", BANDIT, f"{k}-loss", "≠") for k in ("k1", "k2", "k3", "full")),
    _bias("off-policy-bias", "k3 as loss, bandit, against the forward KL, its on-policy objective", BANDIT, "k3-loss", "≠", FORWARD),
    *(_lag("off-policy-bias", f"{k} as loss, per token, trees, every lag", f"{k}-loss", "≠") for k in ("k1", "k2", "k3", "full")),
    _bias("off-policy-bias", "k2 as loss, trees, against the frozen-prefix form", TREE, "k2-loss", "≠", FROZEN),
    _bias("off-policy-bias", "k3 as loss, trees, against the frozen-prefix forward KL", TREE, "k3-loss", "≠", FORWARD_FROZEN),
    _bias("off-policy-bias", "full as loss, trees, against the frozen-prefix form", TREE, "full-loss", "≠", FROZEN),
    *(
        _lag("off-policy-bias", f"{name}, trees: more than on-policy, lag ≥ 0.1", name, ">", *_FAR, statistic="excess", margin=0)
        for name in ("k2-loss", "k3-loss", "full-loss", "full-both", "k1-reward-to-go")
    ),
)  # fmt: skip

_FIX = (
    _bias("off-policy-fix", "k2, bandit", BANDIT, "k2-loss, token weight", "="),
    _bias("off-policy-fix", "k2, a response as one action, sequence weight", TREE, "k2-loss-sequence, sequence weight", "="),
    _bias("off-policy-fix", "k2 per token, token weight", TREE, "k2-loss, token weight", "="),
    _bias("off-policy-fix", "k2 per token, token weight, against the form with frozen prefixes of the behaviour", TREE,
          "k2-loss, token weight", "=", FROZEN),
    _bias("off-policy-fix", "k2 per token, prefix weight", TREE, "k2-loss, prefix weight", "="),
    _bias("off-policy-fix", "k2 per token, prefix weight, against the form with frozen prefixes of the policy", TREE,
          "k2-loss, prefix weight", "=", POLICY),
    _bias("off-policy-fix", "k3, bandit, against the reverse KL", BANDIT, "k3-loss, token weight", "="),
    _bias("off-policy-fix", "k3, bandit, against the forward KL", BANDIT, "k3-loss, token weight", "=", FORWARD),
    _bias("off-policy-fix", "k3 per token, token weight, against the frozen-prefix forward KL", TREE, "k3-loss, token weight", "=",
          FORWARD_FROZEN),
    _bias("off-policy-fix", "k3, a response as one action, sequence weight, against the reverse KL", TREE,
          "k3-loss-sequence, sequence weight", "="),
    _bias("off-policy-fix", "k3, a response as one action, sequence weight, against the forward KL", TREE,
          "k3-loss-sequence, sequence weight", "=", FORWARD),
    _bias("off-policy-fix", "before PPO clipping, bandit", BANDIT, "k1-reward-to-go, token weight", "="),
    _bias("off-policy-fix", "after PPO clipping, bandit", BANDIT, "k1-reward-to-go, token weight, clip 0.2", "="),
    _bias("off-policy-fix", "after PPO clipping, bandit, on-policy", BANDIT, "k1-reward-to-go, token weight, clip 0.2", "=",
          off_policy=False),
    _bias("off-policy-fix", "before PPO clipping, sequence weight", TREE, "k1-reward-return, sequence weight", "="),
    _bias("off-policy-fix", "after PPO clipping, sequence weight", TREE, _CLIPPED, "="),
    *(_lag("off-policy-fix", f"sequence weight truncated at {c}, every lag", f"{_K1_SEQUENCE} ≤ {c}", "=") for c in (2, 5, 10)),
    *(
        _lag("off-policy-fix", f"sequence weight truncated at {c}, lag ≤ 0.1: bias below 5 %", f"{_K1_SEQUENCE} ≤ {c}", "<", *_NEAR,
             value=0.05, margin=0)
        for c in (2, 5, 10)
    ),
    *(
        _lag("off-policy-fix", f"complete Rao–Blackwell, prefix weight truncated at {c}, lag ≤ 0.1: bias below 5 %",
             f"{_RB} ≤ {c}", "<", *_NEAR, value=0.05, margin=0)
        for c in (2, 5, 10)
    ),
)  # fmt: skip

_RATIO = (
    _bias("rho-k3", "bandit", BANDIT, "k3-loss, differentiated token weight", "="),
    _bias("rho-k3", "per token, T > 1", TREE, "k3-loss, differentiated token weight", "="),
    _bias("rho-k3", "per token, T > 1, against the form with frozen prefixes of the behaviour", TREE,
          "k3-loss, differentiated token weight", "=", FROZEN),
    _bias("rho-k3", "per token with a differentiated prefix weight, T > 1", TREE, "k3-loss, differentiated prefix weight", "="),
    _bias("rho-k3", "detached ratio, bandit", BANDIT, "k3-loss, token weight", "="),
    _bias("rho-k2", "detached, bandit", BANDIT, "k2-loss, token weight", "="),
    _bias("rho-k2", "differentiated, bandit", BANDIT, "k2-loss, differentiated token weight", "="),
    _bias("rho-k2", "differentiated, bandit, on-policy", BANDIT, "k2-loss, differentiated token weight", "=", off_policy=False),
    _bias("rho-k2", "detached, per token, T > 1", TREE, "k2-loss, token weight", "="),
    _bias("rho-k2", "detached, per token, T > 1, against the form with frozen prefixes of the behaviour", TREE,
          "k2-loss, token weight", "=", FROZEN),
    _bias("rho-k2", "differentiated, per token, T > 1, against the form with frozen prefixes of the behaviour", TREE,
          "k2-loss, differentiated token weight", "=", FROZEN),
    _bias("k3-plus", "on-policy, T > 1", TREE, "k3-plus", "=", off_policy=False),
    _bias("k3-plus", "on-policy, T > 1, against the frozen-prefix form", TREE, "k3-plus", "=", FROZEN, off_policy=False),
    _bias("k3-plus", "off-policy, T = 1", BANDIT, "k3-plus", "="),
    _bias("k3-plus", "off-policy, T > 1", TREE, "k3-plus", "="),
    _bias("k3-plus", "off-policy, T > 1, against the frozen-prefix form", TREE, "k3-plus", "=", FROZEN),
    _bias("k3-plus", "off-policy with a detached token weight, T = 1", BANDIT, "k3-plus, token weight", "="),
    _bias("k3-plus", "off-policy with a detached token weight, T > 1, against the frozen-prefix form", TREE,
          "k3-plus, token weight", "=", FROZEN),
)  # fmt: skip

_OPEN = (
    *(
        claim("open-off-policy", f"{len_}, sums of tokens, no clamp", "08_shipped", "bias", "≠", 0, ZERO, family=family,
              target=REVERSE)
        for family, len_ in ((TREE, "shipped, T > 1"), (BANDIT, "shipped, T = 1"))
    ),
    _none("any composition without a weight", weight="none"),
    _none("any composition with a token weight", weight="token"),
    _none("any composition of sampled tokens with a detached prefix weight", weight="prefix", sampled=True,
          differentiate_weight=False),
    _none("any composition of sampled tokens with a differentiated prefix weight", weight="prefix", sampled=True,
          differentiate_weight=True),
    _none("any composition of sampled tokens with a sequence weight", weight="sequence", sampled=True),
    _none("any composition over the whole vocabulary with a prefix weight", weight="prefix", sampled=False),
    claim("off-policy-noise", "every unbiased composition, trees, lag 0.3", "08_compositions", "noise_ratio", ">", 1 - ZERO,
          unbiased=True),
    _noisier("chains, against k1 in reward with a sequence weight", _K1_SEQUENCE),
    _noisier("chains, against k1 as loss with a differentiated prefix weight", "k1-loss, differentiated prefix weight"),
    _noisier("chains of at most 8 tokens, against k3 as loss with a differentiated prefix weight", _K3_PREFIX,
             *within("length", high=8)),
    _noisier("chains of 64 tokens and more, against k3 as loss with a differentiated prefix weight, by a quarter", _K3_PREFIX,
             *within("length", low=64), by=1.25),
    _noisier("chains, against itself with a sequence weight", "full-both, sequence weight"),
    claim("off-policy-growth", "fixed lag per response", "08_exponents", "exponent", ">", 0.3, sweep="length, fixed lag per response"),
    claim("off-policy-growth", "fixed lag per token", "08_exponents", "last", ">", 0.3, sweep="length, fixed lag per token"),
)  # fmt: skip

_K1 = (
    _bias("k1-loss-zero", "off-policy, bandit", BANDIT, "k1-loss", "=", statistic="gradient_norm"),
    _bias("k1-loss-zero", "off-policy, trees", TREE, "k1-loss", "=", statistic="gradient_norm"),
    claim("k1-loss-repels", "expected gradient is −∇KL(μ‖π)", "08_repulsion", "repulsion", "=", 0, ZERO),
    claim("k1-loss-repels", "the reference does not occur", "08_repulsion", "moved", "=", 0, ZERO),
    claim("k1-loss-repels", "KL(μ‖π) after an exact step", "08_repulsion", "lag_change", ">", 0),
    _bias("k1-reward", "off-policy, bandit, no weight", BANDIT, "k1-reward-to-go", "="),
    _bias("k1-reward", "off-policy, bandit, weighted", BANDIT, "k1-reward-to-go, token weight", "="),
    _bias("k1-reward", "off-policy, credit to_go, no weight", TREE, "k1-reward-to-go", "="),
    *(
        _bias("k1-reward", f"off-policy, credit to_go, {w} weight", TREE, f"k1-reward-to-go, {w} weight", "=")
        for w in ("token", "prefix", "sequence")
    ),
    _bias("k1-reward", "off-policy, credit return, no weight", TREE, "k1-reward-return", "="),
    _bias("k1-reward", "off-policy, credit return, sequence weight", TREE, "k1-reward-return, sequence weight", "="),
    _bias(
        "k1-reward", "off-policy, credit to_go, token weight, PPO clip", TREE, "k1-reward-to-go, token weight, clip 0.2", "="
    ),
    _bias("k1-reward", "off-policy, credit sequence, sequence weight, PPO clip", TREE, _CLIPPED, "="),
)

CLAIMS: tuple[Claim, ...] = (*_BIAS, *_FIX, *_RATIO, *_OPEN, *_K1)
