"""What analysis 05 settles: which tokens carry the gradient of k3 as loss, and how soon it brings a token back."""

from gradlab.ledger.form import Claim, Condition, Relation, claim, within

BANDITS, TREES = ("10 tokens", "1,000 tokens"), "trees"


def _k3(
    part: str, scope: str, frame: str, statistic: str, relation: Relation, value: float, *ranges: Condition,
    **columns: str | float | tuple[str, ...],
) -> Claim:  # fmt: skip
    where = {"estimator": "k3-loss", "via": "exact", **columns}
    return claim(f"k3-asymmetry.{part}", scope, frame, statistic, relation, value, 0.0, *ranges, **where)  # type: ignore[arg-type]


def _median(part: str, scope: str, *ranges: Condition, world: str | tuple[str, ...] = BANDITS) -> Claim:
    """More than half, in the median scenario at every KL."""
    return _k3(
        part, scope, "05_bands", "share", ">", 0.5, *ranges, quantity=f"under_{_COLUMN[part]}", quantile=0.5, world=world
    )


def _sooner(scope: str, *ranges: Condition) -> Claim:
    return _k3("restoring", scope, "05_restoring", "dropped_versus_inflated", "<", 1, *DROPPED, *ranges)


def _slower(scope: str, *ranges: Condition) -> Claim:
    where = {"estimator": "k3-loss", "via": "exact"}
    return claim("k3-weaker.restoring", scope, "05_restoring", "versus_k2", ">", 1, 0.0, *ranges, **where)  # type: ignore[arg-type]


_COLUMN = {"gradient": "expected", "second": "second"}
_NEAR, _FAR = within("kl", high=0.1), within("kl", low=0.99)
DROPPED, INFLATED = within("shift", high=0), within("shift", low=0)
COMMON, RARE = within("reference", low=0.15), within("reference", high=0.015)
_MODE = "dropped mode, 10 tokens"

CLAIMS: tuple[Claim, ...] = (
    _k3("mass", "any policy", "05_sides", "under_mass", ">", 0.5),
    _k3("pull-k2", "any policy", "05_sides", "pull_over_k2", ">", 0),
    _k3("gradient-k2", "bandits, KL ≤ 1", "05_sides", "expected_over_k2", ">", 0, *within("kl", high=1), world=BANDITS),
    _k3("second-k2", "any policy", "05_sides", "second_over_k2", ">", 0),
    _median("gradient", "median bandit, KL ≤ 0.1", *_NEAR),
    _median("gradient", "median bandit, KL ≥ 1", *_FAR),
    _median("second", "median bandit, KL ≤ 0.1", *_NEAR),
    _median("second", "median bandit, KL ≥ 1", *_FAR),
    _median("second", "median tree, KL ≥ 1", *_FAR, world=TREES),
    _k3("second", "every bandit, KL ≥ 1", "05_sides", "under_second", ">", 0.5, *_FAR, world=BANDITS),
    _k3("one-token", _MODE, "05_dropped", "expected_share", ">", 0.5),
    _k3("one-token-second", _MODE, "05_dropped", "second_share", ">", 0.5),
    _k3("overshoot", _MODE, "05_dropped", "ratio", ">", 1),
    _k3("noise", _MODE, "05_dropped", "noise_versus_k2", ">", 2),
    _sooner("reference .2", *COMMON),
    _sooner("reference .01", *RARE),
    _slower("dropped token, reference .2", *DROPPED, *COMMON),
    _slower("dropped token, reference .01", *DROPPED, *RARE),
    _slower("inflated token, reference .2", *INFLATED, *COMMON),
    _slower("inflated token, reference .01", *INFLATED, *RARE),
)
