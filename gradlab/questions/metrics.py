"""k1, k2 and k3 as metrics: what a dashboard shows of the KL, from batches of a run's responses, against the KL itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special, stats

from gradlab._common.streams import generator
from gradlab.estimators import kernels
from gradlab.reliability import NEEDED
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario

Array = npt.NDArray[np.float64]

KERNELS = ("k1", "k2", "k3")
#: Numbers that are held at a time.
HELD = 2**22


def exact(scenarios: Mapping[Any, Scenario]) -> pd.DataFrame:
    """Expectation and noise of logged numbers, whose responses can be listed: one row per scenario and kernel.

    The number is `Σ_t k(ℓ_t)` of a response, drawn by the scenario's behaviour. `bias`: `(E number − KL)/KL`; `noise`: its standard
    deviation over the KL; `noise_ratio`: over that of k1; `most`: the largest value over the KL. KL is that of whole responses.
    """
    rows = []
    for label, scenario in scenarios.items():
        truth = scenario.kl()
        weight, values = _listed(scenario)
        for kernel, x in values.items():
            mean = float(weight @ x)
            noise = float(weight @ (x - mean) ** 2) ** 0.5 / truth
            row = {"scenario": label, "kernel": kernel, "via": "exact", "kl": truth, "bias": mean / truth - 1, "noise": noise}
            rows.append(row | {"most": x.max() / truth})
    frame = pd.DataFrame(rows)
    k1 = frame[frame["kernel"] == "k1"].set_index("scenario")["noise"]
    return frame.assign(noise_ratio=frame["noise"] / frame["scenario"].map(k1))


def batches(scenario: Scenario, sizes: Sequence[int], runs: int, seed: int, level: float = 0.95) -> pd.DataFrame:
    """The logged number of `runs` independent batches of each size: one row per size and kernel.

    `median, q05, q95` of the mean over the KL; `below`: share of the batches in which it is too small; `student`: share in which
    Student's interval holds the KL; `open`: the same where ends are open that few responses carry (`gradlab.reliability`), and
    `held`: share of the batches whose interval is closed. Shares have Clopper–Pearson ends.
    """
    truth = scenario.kl()
    weight, values = _listed(scenario)
    rng, rows = generator(seed, "metrics"), []
    for size in sizes:
        found: dict[str, list[Array]] = {kernel: [] for kernel in KERNELS}
        left = runs
        while left:
            count = min(left, max(1, HELD // size))
            drawn = rng.choice(len(weight), size=(count, size), p=weight / weight.sum())
            for kernel, x in values.items():
                found[kernel].append(_of_batches(x[drawn], truth, level))
            left -= count
        for kernel, parts in found.items():
            mean, student, closed = np.concatenate(parts).T
            row: dict[str, Any] = {"via": "sampled", "samples": size, "kernel": kernel, "kl": truth, "median": np.median(mean)}
            row |= {"q05": np.quantile(mean, 0.05), "q95": np.quantile(mean, 0.95)}
            for name, hits in (
                ("below", mean < 1),
                ("student", student > 0),
                ("open", (student > 0) | (closed == 0)),
                ("held", closed > 0),
            ):
                ends = stats.binomtest(int(hits.sum()), runs).proportion_ci(level)
                row |= {name: hits.mean(), f"{name}_low": ends.low, f"{name}_high": ends.high}
            rows.append(row)
    return pd.DataFrame(rows)


def _listed(scenario: Scenario) -> tuple[Array, dict[str, Array]]:
    """Probabilities of all responses under the sampler, and the logged number of each by kernel."""
    rollout = Rollout.enumerated(scenario)
    ratio, log_ref = rollout.log_ratio.detach(), rollout.reference_log_prob.detach()
    values = {k: (kernels.value(k, ratio, log_ref, None, None) * rollout.mask).sum(-1).numpy() for k in KERNELS}
    return rollout.weight.detach().numpy(), values


def _of_batches(x: Array, truth: float, level: float) -> Array:
    """Of batches `[b, n]`: the mean over the truth, whether Student's interval holds the truth, whether it is closed, `[b, 3]`."""
    n = x.shape[1]
    mean, half = x.mean(1), special.stdtrit(n - 1, (1 + level) / 2) * x.std(1, ddof=1) / n**0.5
    apart = np.abs(x - mean[:, None])
    closed = (apart**3).sum(1) ** 2 * NEEDED <= (apart**2).sum(1) ** 3  # as `gradlab.reliability.is_well_sampled` has it
    return np.stack([mean / truth, (np.abs(mean - truth) <= half).astype(float), closed.astype(float)], -1)
