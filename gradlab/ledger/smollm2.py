"""What analysis 11 settles: the claims on a real language model, SmolLM2-135M-Instruct on digit questions."""

from gradlab.ledger.form import Claim, Relation, Value, claim

#: Exact moments in float64; what is unbiased comes out below this.
ZERO = 1e-9
REVERSE, FROZEN, FORWARD_FROZEN = "reverse_kl", "reverse_kl_frozen_prefix", "forward_kl_frozen_prefix"
MODEL = "SmolLM2, digits"
#: Engines that can give every response, and one that leaves some out.
WHOLE, NUCLEUS = ("bfloat16", "stale", "temperature 0.9"), "top-p 0.95"


def _catalogue(identifier: str, scope: str, estimator: str, relation: Relation, target: str = REVERSE, statistic: str = "bias",
               value: float = 0, margin: float = ZERO) -> Claim:  # fmt: skip
    """Every prompt at every stage of training, exactly."""
    where: dict[str, Value] = {"estimator": estimator, "target": target, "via": "exact"}
    return claim(identifier, f"{MODEL}: {scope}", "11_catalogue", statistic, relation, value, margin, **where)  # type: ignore[arg-type]


def _extreme(scope: str, world: str, kind: str, stage: str, statistic: str = "policy") -> Claim:
    where: dict[str, Value] = {"world": world, "kind": kind, "stage": stage}
    return claim("ratios-extreme", f"SmolLM2, {scope}", "11_ratios", statistic, ">", 0.01, 0.0, **where)  # type: ignore[arg-type]


def _side(scope: str, statistic: str, value: float) -> Claim:
    where: dict[str, Value] = {"estimator": "k3-loss", "via": "exact"}
    return claim("k3-asymmetry", f"{MODEL}: {scope}", "11_sides", statistic, ">", value, 0.0, **where)  # type: ignore[arg-type]


def _engine(identifier: str, scope: str, estimator: str, behaviour: Value | tuple[Value, ...], relation: Relation,
            target: str = REVERSE, value: float = 0, margin: float = ZERO) -> Claim:  # fmt: skip
    where = {"estimator": estimator, "behaviour": behaviour, "target": target}
    return claim(identifier, f"{MODEL}: {scope}", "11_mismatch", "bias", relation, value, margin, **where)  # type: ignore[arg-type]


CLAIMS: tuple[Claim, ...] = (
    _catalogue("k1-loss-zero", "every prompt", "k1-loss", "=", statistic="gradient_norm"),
    _catalogue("k2-loss", "per token, against the reverse KL of responses", "k2-loss", "="),
    _catalogue("k2-loss", "per token, against its form with frozen prefixes", "k2-loss", "=", FROZEN),
    _catalogue("k2-loss", "a response as one action", "k2-loss-sequence", "="),
    _catalogue("k1-reward", "credit to_go", "k1-reward-to-go", "="),
    _catalogue("k3-biased", "per token, against the reverse KL of responses", "k3-loss", "≠"),
    _catalogue("k3-biased", "per token, against the reverse KL with frozen prefixes", "k3-loss", "≠", FROZEN),
    _catalogue("k3-biased", "per token, against the forward KL with frozen prefixes", "k3-loss", "=", FORWARD_FROZEN),
    _catalogue("k3-reward", "to go: half the true gradient or more is missing", "k3-reward-to-go", ">", value=0.5, margin=0),
    _catalogue("k3-both", "k3 to go", "k3-both", "="),
    _catalogue("rao-blackwell", "per token, against the reverse KL of responses", "full-loss", "="),
    _catalogue("rao-blackwell", "per token, against its form with frozen prefixes", "full-loss", "=", FROZEN),
    _catalogue("rao-blackwell", "complete", "full-both", "="),
    _catalogue("rao-blackwell", "complete: less noise than k1 in reward to go", "full-both", "<", statistic="noise_ratio",
               value=1, margin=0),
    *(
        _extreme(f"{scope}, {said}: more than 1 % of drawn tokens have {kind}", world, kind, stage)
        for world, scope in (("digits", "digits"), ("all tokens", "all 49,152 tokens"))
        for stage, said in (("first", "after 3 steps"), ("last", "after the last step"))
        for kind in ("δ < 1/10", "δ > 10")
    ),
    _extreme("digits, after the last step: more than 1 % of the tokens the reference draws have δ > 10", "digits", "δ > 10", "last",
             "reference"),
    _side("expected gradient: a larger under-sampled share than k2 as loss, every prompt", "expected_over_k2", 0),
    _side("second moment: a larger under-sampled share than k2 as loss, every prompt", "second_over_k2", 0),
    _side("second moment: mostly under-sampled tokens, every prompt", "under_second", 0.5),
    *(
        _engine("off-policy-bias", f"{name}, without a weight, data from {kind}", estimator, kind, "≠")
        for name, estimator in (("k1 in reward to go", "k1-reward-to-go"), ("complete Rao–Blackwell", "full-both"))
        for kind in (*WHOLE, NUCLEUS)
    ),
    _engine("off-policy-bias", "k1 in reward to go, without a weight, data from bfloat16: more than 5 %", "k1-reward-to-go",
            "bfloat16", ">", value=0.05, margin=0),
    *(
        _engine("off-policy-fix", f"{name}, data from {said}", estimator, kind, "=", target)
        for name, estimator, target in (
            ("k1 in reward to go, sequence weight", "k1-reward-to-go, sequence weight", REVERSE),
            ("k2 per token, token weight, against the form with frozen prefixes", "k2-loss, token weight", FROZEN),
            ("complete Rao–Blackwell, prefix weight", "full-both, prefix weight", REVERSE),
        )
        for said, kind in (("bfloat16, older weights or another temperature", WHOLE), ("a nucleus of 0.95", NUCLEUS))
    ),
    _engine("rho-k3", "per token, against the reverse KL of responses", "k3-loss, diff. token weight", WHOLE, "="),
    _engine("rho-k3", "per token, against its form with frozen prefixes", "k3-loss, diff. token weight", WHOLE, "=", FROZEN),
)  # fmt: skip
