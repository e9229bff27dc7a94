"""What analysis 03 settles: expected gradients of one step, where every token can be summed over."""

from gradlab.ledger.form import EXACT, MATTERS, Claim, Relation, claim

FORWARD, REVERSE = "forward_kl", "reverse_kl"


def _bias(
    identifier: str, scope: str, estimator: str | tuple[str, ...], relation: Relation = "=", margin: float = EXACT, *,
    target: str = REVERSE, via: str = "exact",
) -> Claim:  # fmt: skip
    """The relative bias of an estimator as a gradient of a target, over all bandits of the frame."""
    where = {"estimator": estimator, "target": target, "via": via}
    return claim(identifier, scope, "03_objectives", "bias", relation, 0, margin, **where)  # type: ignore[arg-type]


def _raises(scope: str, reference: str) -> Claim:
    where = {"estimator": "k3-loss", "reference": reference}
    return claim("k3-raises", scope, "03_field", "rise", ">", 0, quantifier="some", **where)  # type: ignore[arg-type]


CLAIMS: tuple[Claim, ...] = (
    claim("k1-loss-zero", "on-policy, bandit", "03_objectives", "gradient_norm", "=", 0, 1e-12, estimator="k1-loss", target=REVERSE,
          via="exact"),
    _bias("target", "bandit", "k1-reward"),
    _bias("k2-unbiased", "bandit", "k2-loss"),
    _bias("k3-biased", "bandit", "k3-loss", "≠", MATTERS),
    _bias("k3-biased", "bandit, 10,000 samples", "k3-loss", "≠", MATTERS, via="sampled"),
    _bias("k3-forward", "bandit", "k3-loss", target=FORWARD),
    claim("same-sign.gradient", "bandit", "03_tokens", "ratio", ">", 0, estimator="k3-loss", via="exact"),
    _bias("k3-plus", "on-policy, bandit", "k3-plus"),
    _bias("k3-both", "k1, bandit", "k1-loss+reward"),
    _bias("k3-both", "k2, bandit", "k2-loss+reward"),
    _bias("k3-both", "k3, bandit", "k3-both"),
    _bias("bounded.gradient", "bandit, sampled and whole vocabulary", ("mse-sampled-loss", "mse-loss"), target="mse"),
    _raises("three tokens, reference (.70 .01 .29)", "(0.70 0.01 0.29)"),
    _raises("three tokens, reference (.50 .20 .30)", "(0.50 0.20 0.30)"),
)  # fmt: skip
