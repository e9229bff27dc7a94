"""Data from another policy: how far it lags, what its importance weights are worth, and which estimator to take for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import scipy
import torch
from torch import Tensor

from gradlab._common.arguments import check_columns, checked
from gradlab._common.names import check_positive, check_whole
from gradlab.estimators.estimator import Estimator
from gradlab.policies import Bandit, Markov, Tree
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, is_of
from gradlab.solvers import exact

P = TypeVar("P", Bandit, Tree, Markov)


def _shipped() -> dict[str, tuple[Estimator, str]]:
    e = Estimator
    through, slime, nemo = {"differentiate_weight": True}, "slime --use-unbiased-kl", "NeMo-RL use_on_policy_kl_approximation"
    table: dict[str, tuple[Estimator, str]] = {
        "k1-loss": (e("k1"), "verl kl_loss_type=kl"),
        "k2-loss": (e("k2"), "verl kl_loss_type=mse; OpenRLHF kl_estimator k2"),
        "k3-loss": (e("k3"), "verl kl_loss_type=low_var_kl; TRL GRPOTrainer; NeMo-RL"),
        "abs-loss": (e("abs"), "verl kl_loss_type=abs"),
        "k1-plus": (e("k1", "straight_through"), "verl kl_loss_type=k1+"),
        "k3-plus": (e("k3", "straight_through"), "verl kl_loss_type=k3+"),
        "k1-loss-token": (e("k1", weight="token", **through), f"{slime}, kl_loss_type=k1"),  # type: ignore[arg-type]
        "k2-loss-token": (e("k2", weight="token", **through), f"{slime}, kl_loss_type=k2"),  # type: ignore[arg-type]
        "k3-loss-token": (
            e("k3", weight="token", **through),  # type: ignore[arg-type]
            f"DeepSeek-V3.2, arXiv 2512.02556; TRL use_bias_correction_kl; {slime}, kl_loss_type=k3",
        ),
        "k2-loss-token-detached": (e("k2", weight="token"), f"{nemo}, kl_type k2, weight detached"),
        "k3-loss-token-detached": (e("k3", weight="token"), f"{nemo}, kl_type k3, weight detached"),
        "k3-loss+reward": (e("k3", "loss+reward"), "NeMo-RL, kl_type k3: value-1 weight exp(x − sg(x)), differentiated"),
        "k2-loss+reward": (e("k2", "loss+reward"), "NeMo-RL, kl_type k2: value-1 weight exp(x − sg(x)), differentiated"),
        "k1-reward-clipped": (e("k1", "reward", "to_go", "token", clip=0.2), "PPO, arXiv 1707.06347; verl use_kl_in_reward"),
        "k3-reward-clipped": (e("k3", "reward", "to_go", "token", clip=0.2), "verl use_kl_in_reward, kl_penalty=low_var_kl"),
        "k1-reward-clipped-sequence": (e("k1", "reward", "sequence", "sequence", clip=0.2), "TRL RLOOTrainer, no baseline"),
    }
    return table


#: What frameworks ship as KL term of a policy loss: name → (composition, where). Normalisers, which add a bias of their own,
#: and clamps are left out.
SHIPPED: dict[str, tuple[Estimator, str]] = _shipped()


@checked
def at_lag(policy: P, lag: float, seed: int = 0) -> P:
    """A behaviour policy at `KL(behaviour ‖ policy) = lag` nats, whole responses, along one random direction per seed.

    The nearest such point of the ray. Raises `ValueError` for a lag that is not positive, or that the direction never reaches.

    >>> policy = gl.Tree.random(vocab=3, length=2, seed=0)
    >>> behaviour = gl.off_policy.at_lag(policy, 0.2, seed=1)
    >>> round(gl.Scenario(policy, policy, behaviour).lag(), 6)
    0.2
    """
    if not isinstance(policy, Bandit | Tree | Markov):
        raise ValueError(f"policy must be a gl.Bandit, a gl.Tree or a gl.Markov, got {policy!r:.60}")
    if not (np.isfinite(lag) and lag > 0):
        raise ValueError(f"lag is KL(behaviour ‖ policy) in nats and positive; got {lag!r} (on-policy: behaviour=None)")
    noise = policy.perturbed(scale=1.0, seed=seed).parameters - policy.parameters

    def excess(log_scale: float) -> float:
        return float(policy.moved(float(np.exp(log_scale)) * noise).kl(policy)) - lag

    high = 0.5 * np.log(lag) - 3.0
    while excess(high) < 0:
        high += 0.1
        if high > np.log(1e3):
            raise ValueError(f"no behaviour in the direction of seed {seed} is {lag} nats away: the KL of a ray is bounded")
    low = high - 0.1
    while excess(low) > 0:
        low -= 1.0
    return policy.moved(float(np.exp(scipy.optimize.brentq(excess, low, high, xtol=1e-14))) * noise)


@checked
def effective_sample_size(scenario: Scenario, truncate: float | None = None) -> Tensor:
    """Exact `(E_μ[w])² / E_μ[w²]` of the prefix weights `w_t = Π_{u ≤ t} ρ_u`, `[T]`: the share of a batch that is left.

    Behind the end of a response its weight stays, so the last entry belongs to the sequence weight and equals
    `exp(−D₂(π ‖ μ))`, the Rényi divergence of order 2. With `truncate=C` the weights are `min(w_t, C)`.
    By dynamic programming on `Markov`, by enumeration on `Bandit` and `Tree`. Raises `ValueError` for truncation on `Markov`.

    >>> policy, behaviour = gl.Bandit([0, 0]), gl.Bandit([0, 1])
    >>> gl.off_policy.effective_sample_size(gl.Scenario(policy, policy, behaviour)).round(decimals=4).tolist()
    [0.7864]
    """
    if truncate is not None:
        check_positive("truncate", truncate)
    policy, sampler = scenario.policy, scenario.sampler
    if not is_of(scenario, Markov):
        with torch.no_grad():
            rollout = Rollout.enumerated(scenario)
            w = rollout.log_weight.cumsum(-1).exp().clamp(max=np.inf if truncate is None else truncate)
            return (rollout.weight @ w).square() / (rollout.weight @ w.square())
    if truncate is not None:
        raise ValueError("a truncated prefix weight does not decompose over time; enumerate a short chain as gl.Tree")
    square = (2 * policy.table.log_softmax(-1) - sampler.table.log_softmax(-1)).exp()  # μ ρ² of every (row, token)
    state, ended, shares = square[0].clone(), torch.zeros((), dtype=torch.float64), []
    for t in range(policy.length):
        if t:
            state = state @ square[1:]
        if policy.eos is not None:
            ended, state[policy.eos] = ended + state[policy.eos], 0.0
        shares.append(1 / (ended + state.sum()))
    return torch.stack(shares)


@checked
def repulsion(scenarios: Sequence[Scenario], step: float = 0.1) -> pd.DataFrame:
    """What k1 as loss, without a weight, does off-policy: `E_μ[∇k1] = −∇KL(μ ‖ π)`, so descending it runs from the behaviour.

    Exact. Columns `scenario, family, kl, lag, estimator, via`, `gradient_norm`, `repulsion` (distance to `−∇KL(μ‖π)` over its
    norm), `moved` (how far the mean moves when the reference is another, over its norm) and `lag_change` of an exact step.

    >>> policy, behaviour = gl.Bandit([0, 0]), gl.Bandit([0, 1])
    >>> frame = gl.off_policy.repulsion([gl.Scenario(policy, gl.Bandit([1, 0]), behaviour)])
    >>> bool(frame["repulsion"].max() < 1e-9), bool(frame["lag_change"].min() > 0)
    (True, True)
    """
    check_positive("step", step)
    rows = []
    estimator = Estimator("k1")
    for scenario in scenarios:
        policy: Any = scenario.policy
        mean = exact.moments(estimator, scenario).mean
        away = -exact.gradient("forward_kl", Scenario(policy, scenario.sampler))
        elsewhere = exact.moments(estimator, Scenario(policy, policy.perturbed(scale=1.0, seed=1), scenario.behaviour)).mean
        sampler: Any = scenario.sampler
        after = float(sampler.kl(policy.moved(-step * mean))) - scenario.lag()
        norm = float(away.norm())
        shares = [float((mean - away).norm()) / norm, float((mean - elsewhere).norm()) / norm]
        known = [scenario.label, scenario.family, scenario.kl(), scenario.lag(), "k1-loss", "exact"]
        rows.append([*known, float(mean.norm()), *shares, after])
    names = ["scenario", "family", "kl", "lag", "estimator", "via", "gradient_norm", "repulsion", "moved", "lag_change"]
    return pd.DataFrame(rows, columns=names)


@checked
def errors(frame: pd.DataFrame, batches: Sequence[int], by: Sequence[str] = ("panel", "lag")) -> pd.DataFrame:
    """Root mean squared error `√(bias² + noise/N)` of every estimator for batches of `N` responses, over the draws.

    Reads `bias`, `noise`, `estimator` and the columns `by`; the geometric mean runs over everything else (draws of the
    policies). Columns `by`, `batch`, `estimator`, `rmse` (in units of ‖∇‖: 1 is what dropping the term would give) and
    `regret`, its ratio to the best estimator at that batch.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"panel": "a", "lag": 0.1, "estimator": ["quiet", "unbiased"], "bias": [0.1, 0.0], "noise": [1.0, 4.0]})
    >>> gl.off_policy.errors(frame, [16, 1024])[["batch", "estimator", "rmse"]].round(3).values.tolist()
    [[16, 'quiet', 0.269], [16, 'unbiased', 0.5], [1024, 'quiet', 0.105], [1024, 'unbiased', 0.062]]
    """
    check_columns(frame, "bias", "noise", "estimator", *by)
    for batch in batches:
        check_whole("a batch", batch)
    parts = []
    for batch in batches:
        log_error = 0.5 * np.log(frame["bias"] ** 2 + frame["noise"] / batch)
        mean = frame.assign(rmse=log_error).groupby([*by, "estimator"], sort=False)["rmse"].mean()
        parts.append(np.exp(mean).reset_index().assign(batch=batch))
    rmse: pd.DataFrame = pd.concat(parts, ignore_index=True)
    least = rmse.groupby([*by, "batch"])["rmse"].transform("min")
    rmse = rmse.assign(regret=rmse["rmse"] / least)
    return rmse[[*by, "batch", "estimator", "rmse", "regret"]]


@checked
def winners(ranked: pd.DataFrame, by: Sequence[str] = ("panel", "lag")) -> pd.DataFrame:
    """The rows of `errors` with the smallest error, and `runner_up` with the regret of taking it instead.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"panel": "a", "lag": 0.1, "estimator": ["quiet", "unbiased"], "bias": [0.1, 0.0], "noise": [1.0, 4.0]})
    >>> gl.off_policy.winners(gl.off_policy.errors(frame, [16, 1024]))["estimator"].tolist()
    ['quiet', 'unbiased']
    """
    check_columns(ranked, "rmse", "regret", "batch", "estimator", *by)
    # Errors that agree to rounding are equal, and the estimator named first wins: a bound that never binds wins nothing.
    order = np.log(ranked["rmse"]).round(9)
    ordered = ranked.assign(order=order).sort_values("order", kind="stable").drop(columns="order")
    place = ordered.groupby([*by, "batch"], sort=False).cumcount()
    second = ordered[place == 1].rename(columns={"estimator": "runner_up", "regret": "runner_up_regret"}).drop(columns="rmse")
    best = ordered[place == 0].merge(second, on=[*by, "batch"], how="left")
    return best.sort_values([*by, "batch"], kind="stable", ignore_index=True)


@checked
def regrets(found: pd.DataFrame, by: Sequence[str] = ("panel",)) -> pd.DataFrame:
    """How much worse than the best an estimator is over the lags and batches of `errors`: `median` and `worst` ratio.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"panel": "a", "lag": 0.1, "estimator": ["quiet", "unbiased"], "bias": [0.1, 0.0], "noise": [1.0, 4.0]})
    >>> gl.off_policy.regrets(gl.off_policy.errors(frame, [16, 1024]))[["estimator", "worst"]].round(3).values.tolist()
    [['quiet', 1.676], ['unbiased', 1.857]]
    """
    check_columns(found, "regret", "estimator", *by)
    table = found.groupby([*by, "estimator"], sort=False)["regret"].agg(median="median", worst="max").reset_index()
    # Regrets that agree to rounding are equal, and the estimator named first comes first.
    order = table.assign(worst=np.log(table["worst"]).round(9)).sort_values([*by, "worst"], kind="stable").index
    return table.loc[order].reset_index(drop=True)
