"""What analysis 06 settles: the value of k3 where its variance is large or infinite, and what χ² says about its gradient."""

from gradlab.ledger.form import EXACT, Claim, Relation, claim, within

_PAIR = "Gaussian pair of App. I"


def _running(
    identifier: str, scope: str, kernel: str, statistic: str, relation: Relation, value: float, margin: float, low: float = 0.0,
    high: float = float("inf"),
) -> Claim:  # fmt: skip
    """The median over independent samples of the paper's pair, at every number of draws in the range."""
    draws = within("samples", low, high)
    return claim(identifier, scope, "06_running", statistic, relation, value, margin, *draws, kernel=kernel)


def _dropped(scope: str, draws: float) -> Claim:
    few = within("draws_per_event", 0.9 * draws, 1.1 * draws)
    return claim("value-tails.mean", scope, "06_dropped", "mean_ratio", "<", 0.9, 0, *few, via="exact")


def _gradient(part: str, scope: str, statistic: str, relation: Relation, value: float, margin: float = 0.0,
              frame: str = "06_chi2", **columns: str | tuple[str, ...]) -> Claim:  # fmt: skip
    return claim(f"k3-variance{part}", scope, frame, statistic, relation, value, margin, **columns)  # type: ignore[arg-type]


def _ranks(scope: str, group: str, distance: str) -> Claim:
    return _gradient(".ranks", scope, "rank_trace_cov", ">", 0.9, frame="06_ranks", group=group, distance=distance)


_BANDITS, _TREES = "random bandits", "random trees"

CLAIMS: tuple[Claim, ...] = (
    claim("value-tails", _PAIR, "06_variance", "infinite", "=", 1, 0, mean=0.1, ratio=0.2, via="exact"),
    claim("value-tails.condition", "Gaussians", "06_variance", "agrees", "=", 1, 0, via="exact"),
    _running("value-tails.mean", f"{_PAIR}, up to 100,000 draws", "k3", "mean_ratio", "<", 0.9, 0, high=1.1e5),
    _running("value-tails.mean", f"{_PAIR}, a million draws and more", "k3", "mean_ratio", "<", 0.9, 0, low=9e5),
    _dropped("bandits with a dropped token π, 0.1/π draws", 0.1),
    _dropped("bandits with a dropped token π, 1000/π draws", 1000),
    _running("value-std.k1", "to the digits given, 100,000 draws and more", "k1", "std", "=", 0.691, 0.0005, low=9e4),
    _running("value-std.k1", "within 5 %, 100,000 draws and more", "k1", "std", "=", 0.691, 0.0346, low=9e4),
    _running("value-std.k1", "within 0.015, a thousand draws and more", "k1", "std", "=", 0.691, 0.015, low=9e2),
    _running(
        "value-std.k3",
        "within a factor of two, any number of draws",
        "k3",
        "log_std_ratio",
        "=",
        0,
        0.6931471805599453,
        low=9e2,
    ),
    _gradient("", "one token, random bandits and trees", "coefficient_ratio", "=", 1, EXACT, group=(_BANDITS, _TREES)),
    _gradient(".bound", "random bandits and trees", "gradient_ratio", "≤", 2, group=(_BANDITS, _TREES)),
    _gradient(".infinite", "Gaussians", "infinite_together", "=", 1, group="Gaussians"),
    _ranks("random bandits, KL 0.01", _BANDITS, "near"),
    _ranks("random bandits, KL 1", _BANDITS, "far"),
    _ranks("random trees, KL 1", _TREES, "far"),
    _gradient(".some", "two tokens of equal probability", "trace_cov", ">", 0, group="two tokens, π = (.5 .5)"),
)
