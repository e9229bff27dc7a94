"""What analysis 07 settles: credit, length normalisers and baselines on responses of many tokens."""

from gradlab.ledger.form import Claim, Condition, Relation, claim, within

ZERO = 1e-9
REVERSE, FROZEN = "reverse_kl", "reverse_kl_frozen_prefix"
FORWARD, FORWARD_FROZEN = "forward_kl", "forward_kl_frozen_prefix"

RAW, CENTRED = "in [0, 1]", "centred"


def _bias(
    identifier: str, scope: str, estimator: str | tuple[str, ...], relation: Relation, target: str = REVERSE,
    margin: float = ZERO, frame: str = "07_objectives", via: str = "exact",
) -> Claim:  # fmt: skip
    """The relative bias of an estimator as a gradient of a target, over all policies of the frame."""
    where = {"estimator": estimator, "target": target, "via": via}
    return claim(identifier, scope, frame, "bias", relation, 0, margin, **where)  # type: ignore[arg-type]


def _same(scope: str, estimator: str, other: str) -> Claim:
    return claim("k2-loss", scope, "07_pairs", "difference", "=", 0, 1e-12, estimator=estimator, other=other)


def _length(scope: str, estimator: str, normaliser: str, variable: bool) -> Claim:
    where = {"estimator": estimator, "normaliser": normaliser, "variable": variable}
    return claim("length", scope, "07_normalisers", "misdirection", "=", 0, ZERO, **where)  # type: ignore[arg-type]


def _inverse(identifier: str, scope: str, statistic: str, relation: Relation, margin: float = 0.0) -> Claim:
    where = {"estimator": "k1-loss", "normaliser": "mean", "variable": True}
    return claim(identifier, scope, "07_normalisers", statistic, relation, 0, margin, **where)  # type: ignore[arg-type]


def _baseline(identifier: str, scope: str, baseline: str, statistic: str, relation: Relation, value: float, margin: float = 0.0,
              *ranges: Condition) -> Claim:  # fmt: skip
    return claim(identifier, scope, "07_baselines", statistic, relation, value, margin, *ranges, baseline=baseline, via="exact")


def _noise(
    scope: str, statistic: str, relation: Relation, value: float, margin: float, reward: tuple[str, ...], low: float = 0.0
) -> Claim:
    scope = f"on-policy moments: {scope}"
    ranges = within("coefficient", low=low)
    return claim("k1-loss-noise", scope, "07_noise", statistic, relation, value, margin, *ranges, reward=reward)


CLAIMS: tuple[Claim, ...] = (
    claim("k1-loss-zero", "sequences, on-policy sum", "07_objectives", "gradient_norm", "=", 0, 1e-10,
          estimator="k1-loss", via="exact"),
    _inverse("k1-loss-zero", "sequences of unequal length, 1/L normaliser", "gradient_norm", "=", ZERO),
    _noise("mean of a reward's gradient unchanged", "shift", "=", 0, ZERO, (RAW, CENTRED)),
    _noise("only more noise, rewards in [0, 1]", "noise_ratio", ">", 1, 0.0, (RAW,)),
    _noise("only more noise, centred rewards", "noise_ratio", ">", 1, 0.0, (CENTRED,)),
    _noise("only more noise, centred rewards, β ≥ 0.1", "noise_ratio", ">", 1, 0.0, (CENTRED,), 0.1),
    _bias("target", "sequences, E[S ∇log π(y)]", "k1-reward-return", "="),
    _bias("k1-reward", "sequences, credit token", "k1-reward", "="),
    _bias("k1-reward", "sequences, credit token, against the frozen-prefix form", "k1-reward", "=", FROZEN),
    _bias("k1-reward", "sequences, credit to_go, on-policy", "k1-reward-to-go", "="),
    _bias("k1-reward", "sequences, credit return, on-policy", "k1-reward-return", "="),
    _bias("k1-reward", "sequences, credit sequence, on-policy", "k1-reward-sequence", "="),
    claim("k1-reward", "credit token, direction, a tree of 2 tokens and 2 steps", "07_step", "cosine", ">", 0,
          estimator="k1-reward"),
    _same("sample by sample, sequences, credit token", "k2-loss", "k1-reward"),
    _same("sample by sample, a response as one action", "k2-loss-sequence", "k1-reward-sequence"),
    _same("sample by sample, per token against credit to_go", "k2-loss", "k1-reward-to-go"),
    _bias("k2-loss", "in expectation, a response as one action", "k2-loss-sequence", "="),
    _bias("k2-loss", "in expectation, per token, T > 1", "k2-loss", "="),
    _bias("k2-loss", "in expectation, per token, T > 1, against the frozen-prefix form", "k2-loss", "=", FROZEN),
    _bias("k2-loss", "in expectation, per token, sampled chain", "k2-loss", "=", margin=0.05, frame="07_credit", via="sampled"),
    _bias("k3-biased", "sequences, per token and as one action", ("k3-loss", "k3-loss-sequence"), "≠"),
    _bias("k3-biased", "sequences, per token, unbiased for the frozen-prefix forward KL", "k3-loss", "=", FORWARD_FROZEN),
    _bias("k3-biased", "sequences, as one action, unbiased for the forward KL", "k3-loss-sequence", "=", FORWARD),
    *(_length(f"{name}, 1/L, variable length", name, "mean", True) for name in ("k1-reward-to-go", "k2-loss", "k3-loss")),
    *(_length(f"{name}, 1/L, equal lengths", name, "mean", False) for name in ("k1-reward-to-go", "k2-loss", "k3-loss")),
    _length("k2-loss, 1/T, variable length", "k2-loss", "fixed", True),
    _length("k2-loss, 1/ΣL of an infinite batch, variable length", "k2-loss", "token_mean", True),
    _length("k2-loss, 1/ΣL of 8 responses, variable length", "k2-loss", "token_mean of 8", True),
    _inverse("length", "k1 as loss, 1/L, variable length: still nothing", "gradient_norm", "=", ZERO),
    _inverse("inverse-length", "expected gradient", "inverse_length", "=", ZERO),
    _inverse("inverse-length", "expected length after an exact step", "length_change", ">"),
    _baseline("detached-baseline", "group mean, n = 2 … 8: shrinks by 1 − 1/n", "group_mean", "shrink_error", "=", 0, ZERO),
    _baseline("detached-baseline", "leave-one-out, n = 2 … 8: exact", "leave_one_out", "bias", "=", 0, ZERO),
    _baseline("baseline-noise", "leave-one-out, KL of 10 nats, n = 2 … 8", "leave_one_out", "noise_ratio", "<", 1, 0.0,
              *within("kl", 9.0)),
    _baseline("baseline-noise", "leave-one-out, KL of 0.1 nats, n = 2 … 8", "leave_one_out", "noise_ratio", "<", 1, 0.0,
              *within("kl", high=0.2)),
    _baseline("baseline-noise", "KL of the step, KL of 0.1 to 10 nats", "kl", "noise_ratio", "<", 1),
)  # fmt: skip
