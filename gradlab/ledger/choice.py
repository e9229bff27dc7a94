"""What analysis 15 settles: whether the choice of a KL estimator can be seen in the gradient of a whole loss."""

from gradlab.ledger.form import MATTERS, Claim, Condition, claim, within

K3, NONE, K1_LOSS = "k3 beside", "none", "k1 beside"
BANDITS, ADDITION = "random bandits", "addition"


def _beta(beta: float) -> tuple[Condition, ...]:
    return within("coefficient", beta * 0.9, beta * 1.1)


def _changes(scope: str, estimator: str, world: str, *ranges: Condition) -> Claim:
    return claim("kl-choice", scope, "15_choice", "difference", "<", MATTERS, 0, *ranges, estimator=estimator, world=world)


def _visible(scope: str, world: str, *ranges: Condition) -> Claim:
    return claim("kl-choice.visible", scope, "15_choice", "visible_at", ">", 1e5, 0, *ranges, estimator=K3, world=world)


_NEAR, _MIDDLE, _FAR = within("nominal", high=0.011), within("nominal", 0.09, 0.11), within("nominal", low=0.9)

CLAIMS: tuple[Claim, ...] = (
    _changes("k3, β = 0.001, KL 0.1, bandits", K3, BANDITS, *_beta(0.001), *_MIDDLE),
    _changes("k3, β = 0.01, KL ≤ 0.01, bandits", K3, BANDITS, *_beta(0.01), *_NEAR),
    _changes("k3, β = 0.01, KL 1, bandits", K3, BANDITS, *_beta(0.01), *_FAR),
    _changes("k3, β = 0.1, KL 0.1, bandits", K3, BANDITS, *_beta(0.1), *_MIDDLE),
    _changes("k3, β = 0.1, KL 1, bandits", K3, BANDITS, *_beta(0.1), *_FAR),
    _changes("k3, β = 0.01, a small model that adds", K3, ADDITION, *_beta(0.01)),
    _changes("no KL, β = 0.01, a small model that adds", NONE, ADDITION, *_beta(0.01)),
    _visible("β = 0.01, KL 0.1, bandits", BANDITS, *_beta(0.01), *_MIDDLE),
    _visible("β = 0.1, KL 1, bandits", BANDITS, *_beta(0.1), *_FAR),
    _visible("β = 0.01, a small model that adds", ADDITION, *_beta(0.01)),
)
