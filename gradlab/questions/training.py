"""What training runs say: pairs of runs that share their draws, compared over seeds.

A run ends where its policy spent the second half of its steps: its reward and KL are means over the looks from there on. Runs of
one seed share their random streams, so quotients are taken seed by seed; their intervals treat the logarithms as normal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy

from gradlab._common.arguments import check_columns, checked
from gradlab._common.names import check_name, check_probability
from gradlab.training import NONE

#: Names of what differs between comparisons besides the regulariser.
ONE_EPOCH, EPOCHS = "one epoch per batch", "several epochs per batch"
COEFFICIENT, MATCHED = "equal coefficient", "matched final KL"

COLUMNS: dict[str, str] = {
    "estimator": "regulariser",
    "data": "one epoch per batch, or several",
    "budget": "what is equal between the compared runs: the coefficient or the final KL",
    "coefficient": "β of the run it is compared with",
    "via": "sampled: the draws of every seed are random",
    "samples": "number of seeds",
    "reward": "mean reward over seeds at the end",
    "kl": "mean KL(policy ‖ reference) over seeds at the end, nats",
    "kl_over_none": "KL at the end over that without a regulariser, geometric mean over seeds",
    "kl_over_k2": "KL at the end over that of k2 as loss",
    "reward_over_k2": "reward at the end over that of k2 as loss",
    "spread_over_k2": "standard deviation over seeds of the reward at the end, over that of k2 as loss",
    "noise_over_none": "tr Cov of the gradient, summed along the run, over what it is there without the regulariser",
}


class Ratio(NamedTuple):
    """A quotient with the ends of its interval.

    >>> centre, low, high = gl.runs.quotient([2.0, 2.0, 2.1], [1.0, 1.0, 1.0])
    >>> low < centre < high
    True
    """

    centre: float
    low: float
    high: float


UNKNOWN = Ratio(np.nan, np.nan, np.nan)


@checked
def ends(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run of a frame of `gl.train`: `reward` and `kl` at the end, traces summed along the run; missing if it diverged.

    >>> policy = gl.Tree.random(vocab=3, length=2, seed=0)
    >>> recipe = gl.training.Recipe(steps=4, eval_every=2)
    >>> frame = gl.train(policy, lambda rollout: (rollout.tokens[:, 0] == 2).double(), "k2-loss", recipe=recipe, seeds=2)
    >>> gl.runs.ends(frame)[["estimator", "seed"]].values.tolist()
    [['none', 0], ['none', 1], ['k2-loss', 0], ['k2-loss', 1]]
    """
    check_columns(frame, "estimator", "coefficient", "epochs", "seed", "step", "reward", "kl", "trace_cov", "trace_cov_none")
    late = frame[frame["step"] >= frame["step"].max() / 2]
    key = ["estimator", "coefficient", "epochs", "seed"]
    means = late.groupby(key, sort=False)[["reward", "kl"]].mean()
    traces = frame.groupby(key, sort=False)[["trace_cov", "trace_cov_none"]].sum()
    together: pd.DataFrame = pd.concat([means, traces], axis=1)
    if "diverged" in frame:
        together[frame.groupby(key, sort=False)["diverged"].any()] = np.nan
    return together.reset_index()


@checked
def quotient(x: npt.ArrayLike, y: npt.ArrayLike, level: float = 0.95) -> Ratio:
    """Geometric mean of `x/y` over pairs `[n]`, with the interval of a t-test on `log(x/y)`.

    Unknown where a value is not positive, as a mean reward may be, and without an interval for fewer than two pairs. Raises
    `ValueError` for a level outside (0, 1), as all do that take one.

    >>> round(gl.runs.quotient([2.0, 8.0], [1.0, 2.0]).centre, 4)  # √(2 · 4)
    2.8284
    """
    check_probability("level", level)
    x, y = _pairs(x, y)
    if not len(x) or not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        return UNKNOWN
    logs = np.log(x) - np.log(y)
    centre, n = logs.mean(), len(logs)
    if n < 2:
        return Ratio(float(np.exp(centre)), np.nan, np.nan)
    half_width = scipy.stats.t.ppf((1 + level) / 2, n - 1) * logs.std(ddof=1) / np.sqrt(n)
    return Ratio(*(float(np.exp(end)) for end in (centre, centre - half_width, centre + half_width)))


@checked
def spread(x: npt.ArrayLike, y: npt.ArrayLike, level: float = 0.95) -> Ratio:
    """Quotient of the standard deviations of pairs `[n]`, normal and correlated, with Pitman's interval.

    With `w` the quotient of variances and `r` the correlation its ends are `w (K ± √(K² − 1))`, `K = 1 + 2(1 − r²)t²/(n − 2)`.
    Unknown for fewer than three pairs and where one side does not vary. Raises `ValueError` for a level outside (0, 1).
    Source: Pitman, Biometrika 31 (1939) 9.

    >>> round(gl.runs.spread([0.0, 1.0, 2.0, 5.0], [0.0, 2.0, 4.0, 10.0]).centre, 6)
    0.5
    """
    check_probability("level", level)
    x, y = _pairs(x, y)
    n = len(x)
    if n < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()) or x.std() == 0 or y.std() == 0:
        return UNKNOWN
    w, r = x.var(ddof=1) / y.var(ddof=1), np.corrcoef(x, y)[0, 1]
    k = 1 + 2 * (1 - r**2) * scipy.stats.t.ppf((1 + level) / 2, n - 2) ** 2 / (n - 2)
    half_width = np.sqrt(max(k * k - 1, 0.0))
    return Ratio(*(float(np.sqrt(w * factor)) for factor in (1.0, k - half_width, k + half_width)))


def _pairs(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    one, other = (np.atleast_1d(np.asarray(side, dtype=float)) for side in (x, y))
    if one.shape != other.shape:
        raise ValueError(f"pairs need as many of one as of the other, got {x!r:.40} and {y!r:.40}")
    return one, other


@checked
def compare(frame: pd.DataFrame, base: str = "k2-loss", level: float = 0.95) -> pd.DataFrame:
    """Compare every regulariser of a frame of `gl.train` with no regulariser and with `base`, see `COLUMNS`.

    At equal coefficient, run by run. At matched final KL the reward is read off the straight line, in the logarithm of the KL,
    between the ends of the regulariser's runs of one seed, at the KL where `base` ended; only where that KL lies between ends.
    Raises `ValueError` for a level outside (0, 1).

    >>> policy = gl.Tree.random(vocab=3, length=2, seed=0)
    >>> recipe = gl.training.Recipe(steps=4, eval_every=2)
    >>> reward = lambda rollout: (rollout.tokens[:, 0] == 2).double()
    >>> frame = gl.runs.compare(gl.train(policy, reward, ["k2-loss", "k3-loss"], recipe=recipe, seeds=3))
    >>> frame["estimator"].unique().tolist()
    ['k2-loss', 'k3-loss']
    """
    ends(frame)
    check_name("estimator of the frame", base, frame["estimator"].unique())
    check_probability("level", level)
    last = ends(frame)
    runs: dict[tuple[str, float, int], pd.DataFrame] = {}
    for row in last[["estimator", "coefficient", "epochs"]].drop_duplicates().to_dict("records"):
        key: tuple[str, float, int] = (row["estimator"], row["coefficient"], row["epochs"])
        runs[key] = last[(last[list(row)] == list(key)).all(axis=1)].set_index("seed")
    rows = []
    for (estimator, coefficient, epochs), run in runs.items():
        if estimator == NONE:
            continue
        none, other = runs[NONE, 0.0, epochs].loc[run.index], runs.get((base, coefficient, epochs))
        other = None if other is None else other.reindex(run.index)
        rows.append({
            **_named(estimator, epochs, COEFFICIENT, coefficient, len(run)), "reward": run["reward"].mean(), "kl": run["kl"].mean(),
            **_ends("kl_over_none", quotient(run["kl"], none["kl"], level)),
            **_ends("noise_over_none", quotient(run["trace_cov"], run["trace_cov_none"], level)),
            **_ends("kl_over_k2", UNKNOWN if other is None else quotient(run["kl"], other["kl"], level)),
            **_ends("reward_over_k2", UNKNOWN if other is None else quotient(run["reward"], other["reward"], level)),
            **_ends("spread_over_k2", UNKNOWN if other is None else spread(run["reward"], other["reward"], level)),
        })  # fmt: skip
    for name, epochs in dict.fromkeys((name, epochs) for name, _, epochs in runs if name not in (NONE, base)):
        part = last[(last["estimator"] == name) & (last["epochs"] == epochs)]
        for coefficient in sorted(c for other, c, e in runs if other == base and e == epochs):
            matched = runs[base, coefficient, epochs]
            read = pd.Series({seed: _reward_at(part[part["seed"] == seed], kl) for seed, kl in matched["kl"].items()})
            if read.notna().all():
                rows.append({
                    **_named(name, epochs, MATCHED, coefficient, len(read)), "reward": read.mean(), "kl": matched["kl"].mean(),
                    **_ends("reward_over_k2", quotient(read, matched["reward"], level)),
                })  # fmt: skip
    columns = [c for name in COLUMNS for c in (name, *(f"{name}_{end}" for end in ("low", "high") if "_over_" in name))]
    return pd.DataFrame(rows).reindex(columns=columns)


@checked
def pairs(frame: pd.DataFrame, estimator: str, other: str) -> pd.DataFrame:
    """Runs of two regularisers with the same seed, coefficient and epochs, as a frame of `gl.train` has them.

    One row per pair: `kl` at the end, and `difference`, by how much it is off that of `other`, relative. Both runs have the same
    draws, so a difference is one of the regularisers and no matter of chance.

    >>> policy = gl.Tree.random(vocab=3, length=2, seed=0)
    >>> recipe = gl.training.Recipe(steps=4, eval_every=2)
    >>> reward = lambda rollout: (rollout.tokens[:, 0] == 2).double()
    >>> frame = gl.train(policy, reward, ["k2-loss-sequence", "k1-reward"], recipe=recipe, seeds=2)
    >>> len(gl.runs.pairs(frame, "k1-reward", "k2-loss-sequence"))
    2
    """
    ends(frame)
    for name in (estimator, other):
        check_name("estimator of the frame", name, frame["estimator"].unique())
    last = ends(frame)
    key = ["coefficient", "epochs", "seed"]
    one, two = (last[last["estimator"] == name].set_index(key)["kl"] for name in (estimator, other))
    joined = pd.concat([one, two], axis=1, join="inner", keys=["kl", "kl_other"]).reset_index()
    difference = joined["kl"] / joined["kl_other"] - 1
    differences = joined.drop(columns="kl_other").assign(difference=difference, via="same draws")
    differences.insert(0, "estimator", estimator)
    differences.insert(1, "other", other)
    return differences


def _named(estimator: str, epochs: int, budget: str, coefficient: float, seeds: int) -> dict[str, Any]:
    data = ONE_EPOCH if epochs == 1 else EPOCHS
    return {
        "estimator": estimator,
        "data": data,
        "budget": budget,
        "coefficient": coefficient,
        "via": "sampled",
        "samples": seeds,
    }


def _ends(name: str, ratio: Ratio) -> dict[str, float]:
    return {name: ratio.centre, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def _reward_at(runs: pd.DataFrame, kl: float) -> float:
    """Reward of one seed's runs at a KL between their ends."""
    runs = runs.sort_values("kl")
    logs = np.log(runs["kl"].to_numpy(dtype=float))
    return float(np.interp(np.log(kl), logs, runs["reward"].to_numpy(dtype=float), left=np.nan, right=np.nan))
