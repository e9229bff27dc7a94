"""What analysis 05 settles: which tokens carry the gradient of k3 as loss, and how soon it brings a token back."""

from gradlab.ledger.form import Claim, Condition, Relation, claim, within

ZERO = 1e-9
BANDITS, TREES = ("10 tokens", "1,000 tokens"), "trees"


def _share(
    scope: str, statistic: str, relation: Relation, value: float, margin: float = 0.0, *ranges: Condition,
    frame: str = "05_sides", **columns: str | float | tuple[str, ...],
) -> Claim:  # fmt: skip
    where = {"estimator": "k3-loss", "via": "exact", **columns}
    return claim("k3-asymmetry", scope, frame, statistic, relation, value, margin, *ranges, **where)  # type: ignore[arg-type]


def _median(scope: str, column: str, *ranges: Condition, world: str | tuple[str, ...] = BANDITS) -> Claim:
    where = {"quantity": column, "quantile": 0.5, "world": world}
    return _share(scope, "share", ">", 0.5, 0.0, *ranges, frame="05_bands", **where)  # type: ignore[arg-type]


def _slower(scope: str, *ranges: Condition) -> Claim:
    where = {"estimator": "k3-loss", "via": "exact"}
    return claim("k3-weaker", scope, "05_restoring", "versus_k2", ">", 1, 0.0, *ranges, **where)  # type: ignore[arg-type]


DROPPED, INFLATED = within("shift", high=0), within("shift", low=0)
COMMON, RARE = within("reference", low=0.15), within("reference", high=0.015)

CLAIMS: tuple[Claim, ...] = (
    _share("mean |coefficient|: more of it on one side than on the other, any policy", "under_mass", "≠", 0.5, ZERO),
    _share("expected gradient, parts counted positive: a larger under-sampled share than k2 as loss, any policy", "pull_over_k2",
           ">", 0),
    _share("expected gradient, signed parts: a larger under-sampled share than k2 as loss, bandits, KL ≤ 1", "expected_over_k2",
           ">", 0, 0.0, *within("kl", high=1), world=BANDITS),
    _share("second moment: a larger under-sampled share than k2 as loss, any policy", "second_over_k2", ">", 0),
    _median("expected gradient: mostly under-sampled tokens, median bandit, KL ≤ 0.1", "under_expected", *within("kl", high=0.1)),
    _median("expected gradient: mostly under-sampled tokens, median bandit, KL ≥ 1", "under_expected", *within("kl", low=0.99)),
    _median("second moment: mostly under-sampled tokens, median bandit, KL ≤ 0.1", "under_second", *within("kl", high=0.1)),
    _median("second moment: mostly under-sampled tokens, median bandit, KL ≥ 1", "under_second", *within("kl", low=0.99)),
    _median("second moment: mostly under-sampled tokens, median tree, KL ≥ 1", "under_second", *within("kl", low=0.99), world=TREES),
    _share("second moment: mostly under-sampled tokens, every bandit, KL ≥ 1", "under_second", ">", 0.5, 0.0,
           *within("kl", low=0.99), world=BANDITS),
    _share("dropped mode: the rare token carries the expected gradient", "expected_share", ">", 0.5, frame="05_dropped"),
    _share("dropped mode: the rare token carries the second moment", "second_share", ">", 0.5, frame="05_dropped"),
    _share("dropped mode: pulls the rare token harder than the true gradient", "ratio", ">", 1, frame="05_dropped"),
    _share("dropped mode: noise over its own signal at least twice that of k2 as loss", "noise_versus_k2", ">", 2,
           frame="05_dropped"),
    _share("restoring: a dropped token sooner than an inflated one, reference .2", "dropped_versus_inflated", "<", 1, 0.0,
           *DROPPED, *COMMON, frame="05_restoring"),
    _share("restoring: a dropped token sooner than an inflated one, reference .01", "dropped_versus_inflated", "<", 1, 0.0,
           *DROPPED, *RARE, frame="05_restoring"),
    _slower("slower to restore a dropped token, reference .2", *DROPPED, *COMMON),
    _slower("slower to restore a dropped token, reference .01", *DROPPED, *RARE),
    _slower("slower to restore an inflated token, reference .2", *INFLATED, *COMMON),
    _slower("slower to restore an inflated token, reference .01", *INFLATED, *RARE),
)  # fmt: skip
