"""What analysis 11 settles: the claims on a real language model, SmolLM2-135M-Instruct on digit questions."""

from gradlab.ledger.form import EXACT, MATTERS, Claim, Relation, Value, claim

REVERSE, FROZEN, FORWARD_FROZEN = "reverse_kl", "reverse_kl_frozen_prefix", "forward_kl_frozen_prefix"
MODEL = "SmolLM2, digits"
#: Engines that can give every response, and one that leaves some out.
WHOLE, NUCLEUS = ("bfloat16", "stale", "temperature 0.9"), "top-p 0.95"
_WHOLE, _NUCLEUS = "data from bfloat16, older weights or another temperature", "data from a nucleus of 0.95"


def _catalogue(identifier: str, scope: str, estimator: str, target: str = REVERSE, relation: Relation = "=", value: float = 0,
               margin: float = EXACT, statistic: str = "bias") -> Claim:  # fmt: skip
    """Every prompt at every stage of training, exactly."""
    where: dict[str, Value] = {"estimator": estimator, "target": target, "via": "exact"}
    scope = f"{MODEL}, {scope}" if scope else MODEL
    return claim(identifier, scope, "11_catalogue", statistic, relation, value, margin, **where)  # type: ignore[arg-type]


def _extreme(part: str, scope: str, world: str, kind: str, stage: str, statistic: str = "policy") -> Claim:
    where: dict[str, Value] = {"world": world, "kind": kind, "stage": stage}
    return claim(f"ratios-extreme.{part}", f"SmolLM2, {scope}", "11_ratios", statistic, ">", 0.01, 0.0, **where)  # type: ignore[arg-type]


def _side(part: str, statistic: str, value: float) -> Claim:
    where: dict[str, Value] = {"estimator": "k3-loss", "via": "exact"}
    return claim(f"k3-asymmetry.{part}", MODEL, "11_sides", statistic, ">", value, 0.0, **where)  # type: ignore[arg-type]


def _engine(identifier: str, scope: str, estimator: str, behaviour: Value | tuple[Value, ...], relation: Relation = "=",
            target: str = REVERSE) -> Claim:  # fmt: skip
    margin = EXACT if relation == "=" else MATTERS
    where = {"estimator": estimator, "behaviour": behaviour, "target": target}
    return claim(identifier, f"{MODEL}, {scope}", "11_mismatch", "bias", relation, 0, margin, **where)  # type: ignore[arg-type]


CLAIMS: tuple[Claim, ...] = (
    _catalogue("k1-loss-zero", "on-policy", "k1-loss", statistic="gradient_norm"),
    _catalogue("k2-unbiased", "per token", "k2-loss"),
    _catalogue("k2-unbiased", "a response as one action", "k2-loss-sequence"),
    _catalogue("k2-unbiased.frozen", "", "k2-loss", FROZEN),
    _catalogue("k1-reward", "credit to_go", "k1-reward-to-go"),
    _catalogue("k3-biased", "per token", "k3-loss", REVERSE, "≠", margin=MATTERS),
    _catalogue("k3-biased.frozen", "", "k3-loss", FROZEN, "≠", margin=MATTERS),
    _catalogue("k3-forward.frozen", "", "k3-loss", FORWARD_FROZEN),
    _catalogue("k3-reward.misses", "credit to_go", "k3-reward-to-go", REVERSE, ">", 0.5, 0),
    _catalogue("k3-both", "k3, credit to_go", "k3-both"),
    _catalogue("rao-blackwell.token", "", "full-loss"),
    _catalogue("rao-blackwell.frozen", "", "full-loss", FROZEN),
    _catalogue("rao-blackwell", "", "full-both"),
    _catalogue("rao-blackwell.complete-noise", "", "full-both", REVERSE, "≤", 1, 0, "noise_ratio"),
    *(
        _extreme(part, f"tokens drawn from {scope} {label}", world, kind, stage)
        for world, scope in (("digits", "digits"), ("all tokens", "all 49,152"))
        for stage, label in (("first", "after 3 steps"), ("last", "after the last step"))
        for part, kind in (("small", "δ < 1/10"), ("large", "δ > 10"))
    ),
    _extreme("large", "tokens the reference draws from digits, after the last step", "digits", "δ > 10", "last", "reference"),
    _side("gradient-k2", "expected_over_k2", 0),
    _side("second-k2", "second_over_k2", 0),
    _side("second", "under_second", 0.5),
    *(
        _engine("off-policy-bias.unweighted", f"{name}, data from {kind}", estimator, kind, "≠")
        for name, estimator in (("k1 in reward to go", "k1-reward-to-go"), ("complete Rao–Blackwell", "full-both"))
        for kind in (*WHOLE, NUCLEUS)
    ),
    *(
        _engine(identifier, f"{name}{label}", estimator, kind, "=", target)
        for identifier, name, estimator, target in (
            ("k1-reward.off-policy", "credit to_go, sequence weight, ", "k1-reward-to-go, sequence weight", REVERSE),
            ("off-policy-fix.frozen", "token weight, ", "k2-loss, token weight", FROZEN),
            ("rao-blackwell.prefix", "", "full-both, prefix weight", REVERSE),
        )
        for label, kind in ((_WHOLE, WHOLE), (_NUCLEUS, NUCLEUS))
    ),
    _engine("rho-k3", f"per token, ratio of the token, {_WHOLE}", "k3-loss, diff. token weight", WHOLE),
    _engine("rho-k3.frozen", f"ratio of the token, {_WHOLE}", "k3-loss, diff. token weight", WHOLE, target=FROZEN),
)
