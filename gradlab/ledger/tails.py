"""What analysis 06 settles: the value of k3 where its variance is large or infinite, and what χ² says about its gradient."""

from gradlab.ledger.form import Claim, Relation, claim, within

PAIR = "N(0.1, std 0.2) ‖ N(0, 1)"


def _running(
    identifier: str, scope: str, kernel: str, statistic: str, relation: Relation, value: float, margin: float, low: float = 0.0,
    high: float = float("inf"),
) -> Claim:  # fmt: skip
    """The median over independent samples of the paper's pair, at every number of draws in the range."""
    draws = within("samples", low, high)
    return claim(identifier, scope, "06_running", statistic, relation, value, margin, *draws, kernel=kernel, scenario=PAIR)


def _gradient(scope: str, statistic: str, relation: Relation, value: float, margin: float = 0.0, frame: str = "06_chi2",
              **columns: str | tuple[str, ...]) -> Claim:  # fmt: skip
    return claim("k3-variance", scope, frame, statistic, relation, value, margin, **columns)  # type: ignore[arg-type]


_RANDOM = ("random bandits", "random trees")

CLAIMS: tuple[Claim, ...] = (
    claim("value-tails", "Gaussian pair of App. I: infinite variance", "06_variance", "infinite", "=", 1, 0, scenario=PAIR, via="exact"),
    claim("value-tails", "Gaussians: finite iff σ² > σ_ref²/2", "06_variance", "agrees", "=", 1, 0, via="exact"),
    _running("value-tails", "Gaussian pair of App. I: sample mean 10 % low, up to 100,000 draws, median", "k3", "mean_ratio", "<", 0.9, 0,
             high=1.1e5),
    _running("value-tails", "Gaussian pair of App. I: sample mean 10 % low, a million draws and more, median", "k3", "mean_ratio", "<",
             0.9, 0, low=9e5),
    claim("value-tails", "bandits with a dropped token π: sample mean 10 % low, 0.1/π draws, median", "06_dropped", "mean_ratio", "<",
          0.9, 0, *within("draws_per_event", 0.09, 0.11), via="exact"),
    claim("value-tails", "bandits with a dropped token π: sample mean 10 % low, 1000/π draws, median", "06_dropped", "mean_ratio", "<",
          0.9, 0, *within("draws_per_event", 900, 1100), via="exact"),
    _running("value-std", "k1: 0.691 to its digits, 100,000 draws and more", "k1", "std", "=", 0.691, 0.0005, low=9e4),
    _running("value-std", "k1: 0.691 within 5 %, 100,000 draws and more", "k1", "std", "=", 0.691, 0.0346, low=9e4),
    _running("value-std", "k1: 0.691 within 0.015, a thousand draws and more", "k1", "std", "=", 0.691, 0.015, low=9e2),
    _running("value-std", "k3: 8.82 within a factor of two, any number of draws", "k3", "log_std_ratio", "=", 0, 0.6931471805599453,
             low=9e2),
    _gradient("coefficient, random bandits and trees", "coefficient_ratio", "=", 1, 1e-9, group=_RANDOM),
    _gradient("full gradient, random bandits and trees: at most 2χ²", "gradient_ratio", "<", 2, group=_RANDOM),
    _gradient("full gradient, Gaussians: infinite where χ² is", "infinite_together", "=", 1, group="Gaussians"),
    _gradient("full gradient, random bandits, ranks at equal KL ≤ 0.01: correlation above 0.9", "rank_trace_cov", ">", 0.9,
              frame="06_ranks", group="random bandits", distance="near"),
    _gradient("full gradient, random bandits, ranks at a KL of 1: correlation above 0.9", "rank_trace_cov", ">", 0.9,
              frame="06_ranks", group="random bandits", distance="far"),
    _gradient("full gradient, random trees, ranks at a KL of 1: correlation above 0.9", "rank_trace_cov", ">", 0.9,
              frame="06_ranks", group="random trees", distance="far"),
    _gradient("full gradient, two tokens of equal probability: some variance", "trace_cov", ">", 0, 1e-12,
              group="two tokens, π = (.5 .5)"),
)  # fmt: skip
