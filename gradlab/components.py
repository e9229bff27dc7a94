"""One row per parameter: every component of an expected gradient, or the expected value, beside its truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import special

from gradlab import intervals
from gradlab._common.lazy import callable_module
from gradlab._common.names import check_probability, check_seed, several
from gradlab._common.streams import generator
from gradlab.estimators.estimator import Estimator, kernel_values
from gradlab.measure import ZERO_TOLERANCE, by_name, one_thread
from gradlab.moments import Loss
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, check_scenario
from gradlab.solvers import exact, montecarlo

Array = np.ndarray[Any, np.dtype[np.float64]]

COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "family": "kind of policy",
    "estimator": "name of the gradient estimator (gradients only)",
    "target": "objective whose gradient is the truth (gradients only)",
    "kernel": "kernel (values only)",
    "parameter": "`mean`, `std`; `token 2`; `node 1 token 2`; `value`",
    "via": "exact or sampled",
    "samples": "number of responses (missing when exact)",
    "kl": "KL(policy ‖ reference) of whole responses, nats",
    "truth": "component of the target's gradient, nats per unit of parameter; for a value the KL, nats",
    "expected": "component of the expected gradient (sampled: of the mean gradient), or expected value, units of the truth",
    "ratio": "expected / truth: 1 is right, 0 is missing, below 0 is the wrong sign",
    "bias": "ratio − 1",
    "std": "standard deviation of a single sample / |truth|",
}
#: Columns that have an interval in sampled rows.
SAMPLED = ("expected", "ratio", "bias", "std")


def components(
    estimators: Loss | str | Iterable[Loss | str] | Mapping[str, Loss],
    scenarios: Scenario | Iterable[Scenario],
    target: str = "reverse_kl",
    samples: int | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Compare the expected gradient with a target's, parameter by parameter.

    `measure` says how far the whole vector is off; this says where. Exact (`samples=None`) or from `samples` responses with
    Student intervals over batches; estimators share their draws. Returns one row per scenario × estimator × parameter with the
    columns of `COLUMNS`, and `_low`, `_high` of those in `SAMPLED`. Raises `ValueError` as `measure` does, and for policies
    too large for a covariance matrix.

    >>> scenario = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1))
    >>> frame = gl.components("k3-loss", scenario)
    >>> frame["parameter"].tolist(), frame["truth"].round(6).tolist(), frame["expected"].round(6).tolist()
    (['mean', 'std'], [-1.0, 0.0], [-1.0, -1.0])
    """
    losses, rows = by_name(estimators), []
    check_seed(seed)
    check_probability("level", level)
    for index, scenario in enumerate(_checked(scenarios)):
        with one_thread():
            truth = exact.gradient(target, scenario).numpy()
            if samples is not None:
                runs = montecarlo.moments(list(losses.values()), scenario, samples, seed, stream=(index,))
            for e, (name, loss) in enumerate(losses.items()):
                if samples is None:
                    mean = exact.moments(loss, scenario).mean.numpy()
                    columns = _exact(mean, exact.covariance(loss, scenario).diag().sqrt().numpy(), truth)
                else:
                    columns = _sampled(runs[e].batch_means.numpy().T, None, truth, samples, level)
                for j, parameter in enumerate(scenario.policy.parameter_names):
                    row = {"estimator": name, "target": target, "parameter": parameter}
                    rows.append({**_common(scenario, samples), **row, **{key: column[j] for key, column in columns.items()}})
    return _frame(rows, "kernel")


def values(
    kernels: str | Iterable[str],
    scenarios: Scenario | Iterable[Scenario],
    credit: str = "token",
    samples: int | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Compare the expected *value* of kernels with `KL(policy ‖ reference)`: what KL estimators are usually judged by.

    `Σ_t k(ℓ_t)` with credit `token`, `k(S)` with `sequence`; exact, or from `samples` responses that all kernels share.
    Returns one row per scenario × kernel, columns as in `components`. Raises `ValueError` for an unknown kernel or credit and for
    samples that are not positive. Source: Schulman, "Approximating KL divergence" (2020).

    >>> frame = gl.values(["k1", "k2", "k3"], gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1)))
    >>> frame.set_index("kernel")[["bias", "std"]].round(3).to_dict("list")
    {'bias': [0.0, 0.25, 0.0], 'std': [2.0, 1.732, 1.695]}
    """
    kernels = several(kernels)
    check_seed(seed)
    check_probability("level", level)
    estimators, rows = [Estimator(kernel, credit=credit) for kernel in kernels], []  # type: ignore[arg-type]
    for index, scenario in enumerate(_checked(scenarios)):
        truth = np.full(1, scenario.kl())
        with one_thread():
            if samples is not None:
                means, variances = _value_batches(estimators, scenario, samples, seed, index)
            for e, kernel in enumerate(kernels):
                if samples is None:
                    moments = exact.value_moments(kernel, scenario, credit)
                    columns = _exact(np.full(1, moments.mean), np.full(1, moments.variance) ** 0.5, truth)
                else:
                    columns = _sampled(means[e, None], variances[e, None], truth, samples, level)
                row = {"kernel": kernel, "parameter": "value", **{key: column[0] for key, column in columns.items()}}
                rows.append({**_common(scenario, samples), **row})
    return _frame(rows, "estimator", "target")


def _checked(scenarios: Scenario | Iterable[Scenario]) -> list[Scenario]:
    listed: list[Scenario] = several(scenarios)
    for scenario in listed:
        check_scenario(scenario)
    if not listed:
        raise ValueError(f"scenarios must hold at least one, got {scenarios!r}")
    return listed


def _common(scenario: Scenario, samples: int | None) -> dict[str, Any]:
    via = "exact" if samples is None else "sampled"
    return {"scenario": scenario.label, "family": scenario.family, "via": via, "samples": samples, "kl": scenario.kl()}


def _frame(rows: list[dict[str, Any]], *without: str) -> pd.DataFrame:
    columns = []
    for column in (c for c in COLUMNS if c not in without):
        columns += [column, *([f"{column}_low", f"{column}_high"] if column in SAMPLED else [])]
    return pd.DataFrame(rows, columns=columns).astype({"samples": "Int64"})


def _exact(mean: Array, std: Array, truth: Array) -> dict[str, Array]:
    ratio, std = _relative(mean, truth), _relative(std, np.abs(truth))
    return {"truth": truth, "expected": mean, "ratio": ratio, "bias": ratio - 1, "std": std}


def _relative(numerator: Array, denominator: Array) -> Array:
    return numerator / np.where(np.abs(denominator) <= ZERO_TOLERANCE, np.nan, denominator)


def _sampled(means: Array, variances: Array | None, truth: Array, samples: int, level: float) -> dict[str, Array]:
    """From batch means `[p, B]` and, where there are any, variances within batches `[p, B]`."""
    batches = means.shape[-1]
    mean = means.mean(-1)
    low, high, std, std_low, std_high = (np.full(len(means), end) for end in (-np.inf, np.inf, np.nan, 0.0, np.inf))
    if batches >= intervals.MINIMUM_BATCHES:
        half_width = special.stdtrit(batches - 1, (1 + level) / 2) * means.std(-1, ddof=1) / batches**0.5
        low, high = mean - half_width, mean + half_width
        # The noise of a single parameter is its variance; without variances the spread of the batch means stands in.
        noise = intervals.noise(means[..., None], variances, [1.0], level)
        scale = samples / batches if variances is None else 1.0
        std, std_low, std_high = (
            _relative(np.sqrt(scale * end), np.abs(truth)) for end in (noise.estimate, noise.low, noise.high)
        )
    ends = np.sort(np.stack([_relative(low, truth), _relative(high, truth)]), axis=0)
    ratio = _relative(mean, truth)
    return {
        "truth": truth,
        **{"expected": mean, "expected_low": low, "expected_high": high},
        **{"ratio": ratio, "ratio_low": ends[0], "ratio_high": ends[1]},
        **{"bias": ratio - 1, "bias_low": ends[0] - 1, "bias_high": ends[1] - 1},
        **{"std": std, "std_low": std_low, "std_high": std_high},
    }


def _value_batches(estimators: list[Estimator], scenario: Scenario, samples: int, seed: int, index: int) -> tuple[Array, Array]:
    """Means and variances of the kernels' values in independent batches, each `[e, B]`."""
    montecarlo.check_samples(samples)
    parts = montecarlo.shared(samples, max(1, min(montecarlo.BATCHES, samples // 16)))
    means, variances = [], []
    with torch.no_grad():
        for batch, size in enumerate(parts):
            rng = generator(seed, "components.values", index, batch)
            rollout = Rollout.from_sampler(scenario, size, rng)
            kernel_sums = np.stack([kernel_values(estimator, rollout).sum(-1).numpy() for estimator in estimators])
            means.append(kernel_sums.mean(-1))
            variances.append(kernel_sums.var(-1, ddof=1) if size > 1 else np.full(len(kernel_sums), np.nan))
    return np.stack(means, -1), np.stack(variances, -1)


called = callable_module(__name__, components)
