"""χ²(ref‖π) beside what it is said to predict: the variance of the coefficient, and of the gradient, of k3 as loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy
import torch

from gradlab import exact
from gradlab.catalogue import ESTIMATORS
from gradlab.coefficients import coefficients
from gradlab.measure import one_thread
from gradlab.policies import Gaussian
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario


def chi2(scenario: Scenario) -> float:
    """`χ²(ref‖π)` summed over the steps of a response, prefixes from the policy: `E_π Σ_t Var[δ_t | s_t]`; may be `inf`."""
    policy, reference = scenario.policy, scenario.reference
    return 2 * float(policy.occupancy() @ policy.family.chi2(reference.table, policy.table))


def variances(scenarios: Sequence[Scenario], estimator: str = "k3-loss") -> pd.DataFrame:
    """χ²(ref‖π) beside what it is said to predict: the variance of the coefficient and of the gradient of k3 as loss.

    One row per scenario: `chi2` (summed over steps), `coefficient_variance` (`E Σ_t a_t²` of the centred coefficients, missing
    for Gaussians), `trace_cov` of the gradient, `noise` (over the squared norm of the true gradient), and `coefficient_ratio`,
    `gradient_ratio` (each over `chi2`). On logits `gradient_ratio < 2` on trees, whose steps are uncorrelated: `‖score‖² < 2`.
    """
    loss, rows = ESTIMATORS[estimator], []
    with one_thread(), torch.no_grad():
        for scenario in scenarios:
            found, size = exact.moments(loss, scenario), float(exact.gradient("reverse_kl", scenario).square().sum())
            spread, coefficient = chi2(scenario), float("nan")
            if not isinstance(scenario.policy, Gaussian):
                rollout = Rollout.enumerated(scenario)
                a = coefficients(loss, rollout).score * rollout.live
                coefficient = float(rollout.weight @ a.square().sum(-1))
            family = type(scenario.policy).__name__.lower()
            both = np.isinf(spread) and np.isinf(found.trace_cov)
            row = {"chi2": spread, "coefficient_variance": coefficient, "trace_cov": found.trace_cov}
            noise = found.trace_cov / size if size > 0 else float("nan")
            ratio = float("nan") if both or spread == 0 else found.trace_cov / spread
            row |= {"noise": noise, "coefficient_ratio": coefficient / spread, "gradient_ratio": ratio}
            rows.append(
                {
                    "scenario": scenario.label,
                    "family": family,
                    "estimator": estimator,
                    "via": "exact",
                    "kl": scenario.kl(),
                    **row,
                }
            )
    return pd.DataFrame(rows)


def rank_correlations(frame: pd.DataFrame, by: Sequence[str], columns: Sequence[str] = ("trace_cov", "noise")) -> pd.DataFrame:
    """Spearman's rank correlation of `chi2` with each column among the scenarios of a group: `rank_trace_cov`, …; `scenarios`."""
    rows = []
    for key, part in frame.groupby(list(by), sort=False):
        ranks = {f"rank_{column}": float(scipy.stats.spearmanr(part["chi2"], part[column]).statistic) for column in columns}
        rows.append({**dict(zip(by, key, strict=True)), "scenarios": len(part), "via": "exact", **ranks})
    return pd.DataFrame(rows)
