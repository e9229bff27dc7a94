"""What analysis 13 settles: training runs of a small language model. These rules were fixed before there were any runs."""

from gradlab.ledger.form import Claim, Relation, among, claim

#: A final KL within this factor of another counts as the same; runs in single precision agree to less than `RUN_TOL`.
ALIKE, RUN_TOL = 0.1, 1e-3
COEFFICIENT, MATCHED = "equal coefficient", "matched final KL"
ONE_EPOCH, EPOCHS = "one epoch per batch", "several epochs per batch"
_RUNS = "runs of a small language model"


def _runs(
    identifier: str, label: str, estimator: str, statistic: str, relation: Relation, margin: float = 0.0, optional: bool = False,
    **where: str,
) -> Claim:  # fmt: skip
    """`statistic` is the run's figure over that of the run it is compared with, so the value to hold against is 1."""
    where = {"estimator": estimator, "data": ONE_EPOCH, "budget": COEFFICIENT, **where}
    scope = f"{_RUNS}{label}"
    return claim(identifier, scope, "13_training", statistic, relation, 1, margin, *among(**where), optional=optional)


CLAIMS: tuple[Claim, ...] = (
    _runs("train-k1-loss", "", "k1-loss", "kl_over_none", "=", ALIKE),
    _runs("train-k1-loss.drifts", "", "k1-loss", "kl_over_k2", ">"),
    _runs("k1-loss-noise", "", "k1-loss", "noise_over_none", ">"),
    _runs("train-k2-k3", ", equal coefficient", "k3-loss", "kl_over_k2", ">"),
    # With one coefficient, as in a small run, no two final distances can be matched.
    _runs("train-k2-k3.reward", "", "k3-loss", "reward_over_k2", "<", budget=MATCHED, optional=True),
    _runs("train-k2-k3.spread", ", equal coefficient", "k3-loss", "spread_over_k2", ">"),
    claim("train-k1-reward", f"{_RUNS}, one epoch per batch, run by run with the same draws", "13_pairs", "difference", "=", 0, RUN_TOL,
          estimator="k1-reward", other="k2-loss"),
    _runs("train-k1-reward", ", several epochs per batch", "k1-reward", "kl_over_k2", "=", ALIKE, data=EPOCHS),
)  # fmt: skip
