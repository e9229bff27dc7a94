"""What analysis 13 settles: training runs of a small language model. These rules were fixed before there were any runs."""

from gradlab.ledger.form import Claim, Relation, among, claim

#: A final KL within this factor of another counts as the same.
ALIKE = 0.1
COEFFICIENT, MATCHED = "equal coefficient", "matched final KL"
ONE_EPOCH, EPOCHS = "one epoch per batch", "several epochs per batch"


def _runs(
    identifier: str, scope: str, estimator: str, statistic: str, relation: Relation, margin: float = 0.0, **where: str
) -> Claim:
    """`statistic` is the run's figure over that of the run it is compared with, so the value to hold against is 1."""
    where = {"estimator": estimator, "data": ONE_EPOCH, "budget": COEFFICIENT, **where}
    scope = f"training a small language model: {scope}"
    return claim(identifier, scope, "13_training", statistic, relation, 1, margin, *among(**where))


CLAIMS: tuple[Claim, ...] = (
    _runs("train-k1-loss", "final KL as without a KL term", "k1-loss", "kl_over_none", "=", ALIKE),
    _runs("train-k1-loss", "farther from the reference than k2 as loss", "k1-loss", "kl_over_k2", ">"),
    _runs("k1-loss-noise", "more noise than without a KL term", "k1-loss", "noise_over_none", ">"),
    _runs("train-k2-k3", "k3 as loss ends farther away, equal coefficient", "k3-loss", "kl_over_k2", ">"),
    _runs("train-k2-k3", "k3 as loss earns less, matched final KL", "k3-loss", "reward_over_k2", "<", budget=MATCHED),
    _runs("train-k2-k3", "k3 as loss spreads more over seeds, equal coefficient", "k3-loss", "spread_over_k2", ">"),
    _runs("k3-weaker", "farther from the reference, equal coefficient", "k3-loss", "kl_over_k2", ">"),
    _runs("train-k1-reward", "same final KL, one epoch per batch", "k1-reward", "kl_over_k2", "=", ALIKE),
    _runs("train-k1-reward", "same final KL, several epochs per batch", "k1-reward", "kl_over_k2", "=", ALIKE, data=EPOCHS),
)
