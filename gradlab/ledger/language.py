"""What analysis 10 settles: small language models, in the space of their parameters."""

from __future__ import annotations

from gradlab.ledger.form import EXACT, MATTERS, Claim, Condition, Relation, Value, claim, within

REVERSE, FROZEN = "reverse_kl", "reverse_kl_frozen_prefix"
FAR = within("steps", low=400)
ADDITION, NAMES = "addition", "names"
_S = "small language model"


def _unbiased(identifier: str, scope: str, estimator: str, target: str = REVERSE, *ranges: Condition, world: str = ADDITION,
              via: str = "exact", margin: float = EXACT) -> Claim:  # fmt: skip
    where = {"world": world, "estimator": estimator, "target": target, "via": via}
    return claim(identifier, f"{_S}, {scope}", "10_catalogue", "bias", "=", 0, margin, *ranges, **where)  # type: ignore[arg-type]


def _noise(world: str, via: str) -> Claim:
    where = {"world": world, "estimator": "full-both", "target": REVERSE, "via": via}
    return claim("rao-blackwell.complete-noise", f"{_S}, {world}", "10_catalogue", "noise_ratio", "≤", 1, 0.0, **where)  # type: ignore[arg-type]


def _extreme(part: str, side: str, world: str) -> Claim:
    scope = f"responses of the {_S} of {world} after 400 steps"
    return claim(f"ratios-extreme.{part}", scope, "10_extremes", "responses", ">", 0.01, 0.0, *FAR, side=side, world=world)


def _side(part: str, statistic: str, value: float) -> Claim:
    where = {"estimator": "k3-loss", "world": ADDITION, "via": "exact"}
    return claim(f"k3-asymmetry.{part}", f"{_S}, addition", "10_sides", statistic, ">", value, 0.0, **where)  # type: ignore[arg-type]


def _engine(identifier: str, scope: str, estimator: str, behaviour: Value | tuple[Value, ...], relation: Relation = "=",
            target: str = REVERSE) -> Claim:  # fmt: skip
    margin = EXACT if relation == "=" else MATTERS
    where = {"estimator": estimator, "target": target, "behaviour": behaviour}
    return claim(identifier, f"{_S}, {scope}", "10_engines", "bias", relation, 0, margin, **where)  # type: ignore[arg-type]


def _noisier(
    identifier: str, scope: str, frame: str, relation: Relation, *ranges: Condition, **where: Value | tuple[Value, ...]
) -> Claim:
    """Noise over that of complete Rao–Blackwell with prefix weights, from the same data."""
    return claim(identifier, scope, frame, "noise_ratio", relation, 1, 0.0, *ranges, **where)  # type: ignore[arg-type]


def _grows(scope: str, via: str, *ranges: Condition) -> Claim:
    """More noise than shorter responses have, every unbiased composition and every engine."""
    return claim(
        "off-policy-growth", f"{_S} of names, {scope}, three engines", "10_growth", "growth", ">", 1, 0.0, *ranges, via=via
    )


#: Engines that can give every response.
_FULL = ("bfloat16 engine", "temperature 0.8", "temperature 1.2", "stale weights")
_DRAWN: dict[str, Value | tuple[Value, ...]] = {"behaviour": _FULL, "target": REVERSE, "unbiased": True}

CLAIMS: tuple[Claim, ...] = (
    _extreme("small", "δ → 0", NAMES),
    _extreme("large", "δ → ∞", NAMES),
    _extreme("small", "δ → 0", ADDITION),
    _extreme("large", "δ → ∞", ADDITION),
    _unbiased("k2-unbiased", "addition, per token", "k2-loss"),
    _unbiased("k2-unbiased.frozen", "addition", "k2-loss", FROZEN),
    _unbiased("k2-unbiased", "addition, a response as one action", "k2-loss-sequence"),
    _unbiased("k2-unbiased", "names after 400 steps, per token, sampled", "k2-loss", REVERSE, *FAR, world=NAMES, via="sampled", margin=0.1),
    _unbiased("rao-blackwell", "addition", "full-both"),
    _unbiased("rao-blackwell.frozen", "addition", "full-loss", FROZEN),
    _unbiased("rao-blackwell.token", "addition", "full-loss"),
    _noise(ADDITION, "exact"),
    _noise(NAMES, "sampled"),
    _side("mass", "under_mass", 0.5),
    _side("second", "under_second", 0.5),
    _side("second-k2", "second_over_k2", 0),
    _engine("off-policy-bias.frozen", "k2, engines of full support", "k2-loss", _FULL, "≠", FROZEN),
    _engine("rao-blackwell.prefix", "engines of full support", "full-both-prefix", _FULL),
    _engine("rao-blackwell.prefix", "a nucleus of 0.95", "full-both-prefix", "nucleus 0.95"),
    _engine("k1-reward.off-policy", "credit to_go, sequence weight, engines of full support", "k1-reward-sequence-weight", _FULL),
    _noisier("off-policy-noise", f"{_S}, addition, engines of full support", "10_engines", "≥", **_DRAWN),
    _noisier("off-policy-noise.more", f"unbiased compositions of sampled tokens, {_S}, addition, engines of full support", "10_engines",
             ">", **_DRAWN, sampled=True),
    _noisier("off-policy-noise.more", f"complete Rao–Blackwell with a sequence weight, {_S}, addition, engines of full support",
             "10_engines", ">", behaviour=_FULL, target=REVERSE, estimator="full-loss+reward-to_go-sequence-weight"),
    _noisier("off-policy-noise", f"{_S} of names of two and three letters, three engines", "10_growth", "≥",
             *within("length", low=2), via="exact"),
    _grows("from one letter to two and to three", "exact", *within("length", low=2)),
    _grows("from three letters to ten", "sampled"),
)  # fmt: skip
