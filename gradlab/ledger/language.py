"""What analysis 10 settles: small language models, in the space of their parameters."""

from __future__ import annotations

from gradlab.ledger.form import Claim, Condition, Relation, Value, claim, within

ZERO = 1e-9
REVERSE, FROZEN = "reverse_kl", "reverse_kl_frozen_prefix"
FAR = within("steps", low=400)
ADDITION, NAMES = "addition", "names"


def _bias(identifier: str, scope: str, estimator: str, relation: Relation, target: str = REVERSE, *ranges: Condition,
          world: str = ADDITION, via: str = "exact", margin: float = ZERO) -> Claim:  # fmt: skip
    where = {"world": world, "estimator": estimator, "target": target, "via": via}
    return claim(identifier, scope, "10_catalogue", "bias", relation, 0, margin, *ranges, **where)  # type: ignore[arg-type]


def _noise(scope: str, estimator: str, world: str, via: str) -> Claim:
    """Less noise than k1 in the reward with credit to-go."""
    where = {"world": world, "estimator": estimator, "target": REVERSE, "via": via}
    return claim("rao-blackwell", scope, "10_catalogue", "noise_ratio", "<", 1, 0.0, **where)  # type: ignore[arg-type]


def _extreme(scope: str, side: str, world: str) -> Claim:
    return claim("ratios-extreme", scope, "10_extremes", "responses", ">", 0.01, 0.0, *FAR, side=side, world=world)


def _side(scope: str, statistic: str, relation: Relation, value: float, world: str, margin: float = 0.0) -> Claim:
    where = {"estimator": "k3-loss", "world": world, "via": "exact"}
    return claim("k3-asymmetry", scope, "10_sides", statistic, relation, value, margin, **where)  # type: ignore[arg-type]


def _engine(identifier: str, scope: str, estimator: str, relation: Relation, target: str, full: bool | None,
            behaviour: str | tuple[str, ...], margin: float = ZERO) -> Claim:  # fmt: skip
    where = {"estimator": estimator, "target": target, "behaviour": behaviour} | (
        {} if full is None else {"full_support": full}
    )
    return claim(identifier, scope, "10_engines", "bias", relation, 0, margin, **where)  # type: ignore[arg-type]


def _noisier(scope: str, frame: str, value: float, *ranges: Condition, **where: Value | tuple[Value, ...]) -> Claim:
    """More noise than complete Rao–Blackwell with prefix weights, from the same data."""
    return claim("off-policy-noise", scope, frame, "noise_ratio", ">", value, 0.0, *ranges, **where)  # type: ignore[arg-type]


def _grows(scope: str, via: str, *ranges: Condition) -> Claim:
    """More noise than shorter responses have, every unbiased composition and every engine."""
    return claim("off-policy-growth", scope, "10_growth", "growth", ">", 1, 0.0, *ranges, via=via)


_FULL = ("bfloat16 engine", "temperature 0.8", "temperature 1.2", "stale weights")
_S, _L = "small language model", "small language models"

CLAIMS: tuple[Claim, ...] = (
    _extreme(f"δ < 1/10 in more than 1 % of responses, {_S} (names) after 400 steps", "δ → 0", NAMES),
    _extreme(f"δ > 10 in more than 1 % of responses, {_S} (names) after 400 steps", "δ → ∞", NAMES),
    _extreme(f"δ < 1/10 in more than 1 % of responses, {_S} (addition) after 400 steps", "δ → 0", ADDITION),
    _extreme(f"δ > 10 in more than 1 % of responses, {_S} (addition) after 400 steps", "δ → ∞", ADDITION),
    _bias("k2-loss", f"per token, {_S} (addition), against the reverse KL of responses", "k2-loss", "="),
    _bias("k2-loss", f"per token, {_S} (addition), against the frozen-prefix form", "k2-loss", "=", FROZEN),
    _bias("k2-loss", f"a response as one action, {_S} (addition)", "k2-loss-sequence", "="),
    _bias("k2-loss", f"per token, {_S} (names) after 400 steps, against the reverse KL of responses", "k2-loss", "=", REVERSE,
          *FAR, world=NAMES, via="sampled", margin=0.1),
    _bias("rao-blackwell", f"complete, {_S} (addition): unbiased", "full-both", "="),
    _bias("rao-blackwell", f"per token, {_S} (addition): unbiased for the frozen-prefix form", "full-loss", "=", FROZEN),
    _bias("rao-blackwell", f"per token, {_S} (addition): unbiased for the reverse KL of responses", "full-loss", "="),
    _noise(f"complete, {_S} (addition): less noise than k1 in the reward", "full-both", ADDITION, "exact"),
    _noise(f"complete, {_S} (names): less noise than k1 in the reward", "full-both", NAMES, "sampled"),
    _side(f"mean |coefficient|: more of it on one side than on the other, {_S} (addition)", "under_mass", "≠", 0.5, ADDITION, ZERO),
    _side(f"second moment: mostly under-sampled tokens, {_S} (addition)", "under_second", ">", 0.5, ADDITION),
    _side(f"second moment: a larger under-sampled share than k2 as loss, {_S} (addition)", "second_over_k2", ">", 0, ADDITION),
    _engine("off-policy-bias", f"k2 as loss, {_S}, every engine, against the frozen-prefix form", "k2-loss", "≠", FROZEN, True, _FULL),
    _engine("off-policy-bias", f"k2 as loss: more than 1 %, {_S}, bfloat16 engine, against the frozen-prefix form", "k2-loss", "≠",
            FROZEN, None, "bfloat16 engine", 0.01),
    _engine("off-policy-fix", f"complete Rao–Blackwell with prefix weights, {_S}, engines of full support", "full-both-prefix", "=",
            REVERSE, True, _FULL),
    _engine("off-policy-fix", f"k1 in reward with sequence weights, {_S}, engines of full support", "k1-reward-sequence-weight", "=",
            REVERSE, True, _FULL),
    _engine("off-policy-fix", f"complete Rao–Blackwell with prefix weights, {_S}, a nucleus of 0.95", "full-both-prefix", "=",
            REVERSE, None, "nucleus 0.95"),
    _noisier(f"every unbiased composition, {_S} (addition), engines of full support", "10_engines", 1 - ZERO, behaviour=_FULL,
             target=REVERSE, unbiased=True),
    _noisier(f"every unbiased composition of sampled tokens, {_S} (addition), engines of full support", "10_engines", 1,
             behaviour=_FULL, target=REVERSE, unbiased=True, sampled=True),
    _noisier(f"against itself with a sequence weight, {_S} (addition), engines of full support", "10_engines", 1, behaviour=_FULL,
             target=REVERSE, estimator="full-loss+reward-to_go-sequence-weight"),
    _noisier(f"six unbiased compositions, {_S} (names of two and three letters), three engines of full support", "10_growth",
             1 - ZERO, *within("length", low=2), via="exact"),
    _grows(f"from one letter to two and to three, {_S} (names), three engines of full support", "exact", *within("length", low=2)),
    _grows(f"from three letters to ten, {_S} (names), three engines of full support", "sampled"),
)  # fmt: skip
