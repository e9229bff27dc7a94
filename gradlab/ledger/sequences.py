"""What analysis 07 settles: credit, length normalisers and baselines on responses of many tokens."""

from gradlab.ledger.form import EXACT, MATTERS, Claim, Condition, Relation, claim, within

REVERSE, FROZEN = "reverse_kl", "reverse_kl_frozen_prefix"
FORWARD, FORWARD_FROZEN = "forward_kl", "forward_kl_frozen_prefix"

RAW, CENTRED = "in [0, 1]", "centred"


def _bias(
    identifier: str, scope: str, estimator: str, target: str = REVERSE, relation: Relation = "=", margin: float = EXACT, *,
    frame: str = "07_objectives", via: str = "exact",
) -> Claim:  # fmt: skip
    """The relative bias of an estimator as a gradient of a target, over all policies of the frame."""
    where = {"estimator": estimator, "target": target, "via": via}
    return claim(identifier, scope, frame, "bias", relation, 0, margin, **where)  # type: ignore[arg-type]


def _same(scope: str, estimator: str, other: str) -> Claim:
    return claim("k2-loss", scope, "07_pairs", "difference", "=", 0, 1e-12, estimator=estimator, other=other)


def _length(scope: str, estimator: str, normaliser: str, variable: bool) -> Claim:
    where = {"estimator": estimator, "normaliser": normaliser, "variable": variable}
    return claim("length", scope, "07_normalisers", "sin_angle", "=", 0, EXACT, **where)  # type: ignore[arg-type]


def _inverse(identifier: str, scope: str, statistic: str, relation: Relation, margin: float = 0.0) -> Claim:
    where = {"estimator": "k1-loss", "normaliser": "mean", "variable": True}
    return claim(identifier, scope, "07_normalisers", statistic, relation, 0, margin, **where)  # type: ignore[arg-type]


def _baseline(identifier: str, scope: str, baseline: str, statistic: str, relation: Relation, value: float, margin: float = 0.0,
              *ranges: Condition) -> Claim:  # fmt: skip
    return claim(identifier, scope, "07_baselines", statistic, relation, value, margin, *ranges, baseline=baseline, via="exact")


def _noisier(scope: str, reward: str, low: float = 0.0) -> Claim:
    return claim("k1-loss-noise", scope, "07_noise", "noise_ratio", ">", 1, 0.0, *within("coefficient", low=low), reward=reward)


CLAIMS: tuple[Claim, ...] = (
    claim("k1-loss-zero", "on-policy, sequences", "07_objectives", "gradient_norm", "=", 0, 1e-10, estimator="k1-loss", target=REVERSE,
          via="exact"),
    _inverse("k1-loss-zero", "on-policy, 1/L normaliser, unequal lengths", "gradient_norm", "=", EXACT),
    claim("k1-loss-noise.mean", "a tree, rewards in [0, 1] and centred", "07_noise", "shift", "=", 0, EXACT, reward=(RAW, CENTRED)),
    _noisier("a tree, rewards in [0, 1]", RAW),
    _noisier("a tree, centred rewards", CENTRED),
    _noisier("a tree, centred rewards, β ≥ 0.1", CENTRED, 0.1),
    _bias("target", "sequences", "k1-reward-return"),
    _bias("k1-reward", "sequences, credit token", "k1-reward"),
    _bias("k1-reward", "sequences, credit to_go", "k1-reward-to-go"),
    _bias("k1-reward", "sequences, credit sequence", "k1-reward-sequence"),
    _bias("k1-reward.frozen", "sequences", "k1-reward", FROZEN),
    claim("k1-reward.direction", "a tree of 2 tokens and 2 steps", "07_step", "cosine", ">", 0, estimator="k1-reward"),
    _same("sequences, per token, k1 with credit token", "k2-loss", "k1-reward"),
    _same("sequences, a response as one action", "k2-loss-sequence", "k1-reward-sequence"),
    _same("sequences, per token, k1 with credit to_go", "k2-loss", "k1-reward-to-go"),
    _bias("k2-unbiased", "sequences, a response as one action", "k2-loss-sequence"),
    _bias("k2-unbiased", "sequences, per token", "k2-loss"),
    _bias("k2-unbiased.frozen", "sequences", "k2-loss", FROZEN),
    _bias("k2-unbiased", "a chain of 16 tokens, per token, sampled", "k2-loss", margin=0.05, frame="07_credit", via="sampled"),
    _bias("k3-biased", "sequences, per token", "k3-loss", relation="≠", margin=MATTERS),
    _bias("k3-biased", "sequences, a response as one action", "k3-loss-sequence", relation="≠", margin=MATTERS),
    _bias("k3-biased.frozen", "sequences", "k3-loss", FROZEN, "≠", MATTERS),
    _bias("k3-forward.frozen", "sequences", "k3-loss", FORWARD_FROZEN),
    _bias("k3-forward", "sequences, a response as one action", "k3-loss-sequence", FORWARD),
    *(_length(f"{name}, 1/L, variable length", name, "mean", True) for name in ("k1-reward-to-go", "k2-loss", "k3-loss")),
    *(_length(f"{name}, 1/L, equal lengths", name, "mean", False) for name in ("k1-reward-to-go", "k2-loss", "k3-loss")),
    _length("k2-loss, 1/T, variable length", "k2-loss", "fixed", True),
    _length("k2-loss, 1/ΣL of an infinite batch, variable length", "k2-loss", "token_mean", True),
    _length("k2-loss, 1/ΣL of 8 responses, variable length", "k2-loss", "token_mean of 8", True),
    _inverse("inverse-length", "variable length", "inverse_length", "=", EXACT),
    _inverse("inverse-length.longer", "variable length", "length_change", ">"),
    _baseline("detached-baseline", "k1 in reward, n = 2 … 8", "group_mean", "shrink_error", "=", 0, EXACT),
    _baseline("detached-baseline.leave-one-out", "k1 in reward, n = 2 … 8", "leave_one_out", "bias", "=", 0, EXACT),
    _baseline("baseline-noise", "KL of 10 nats, n = 2 … 8", "leave_one_out", "noise_ratio", "<", 1, 0.0, *within("kl", 9.0)),
    _baseline("baseline-noise", "KL of 0.1 nats, n = 2 … 8", "leave_one_out", "noise_ratio", "<", 1, 0.0, *within("kl", high=0.2)),
    _baseline("baseline-noise.step", "KL of 0.1 to 10 nats", "kl", "noise_ratio", "<", 1),
)  # fmt: skip
