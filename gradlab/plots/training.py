"""Figures about training runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradlab.plots.style import PAGE, TRUTH, dots, handle, panels, style_of, styled

_WITHOUT = "none"


@styled
def training_runs(frame: pd.DataFrame) -> Figure:
    """KL to the reference and reward along training runs: means over seeds and the range of the seeds.

    Reads `estimator, seed, step, kl, reward`: one coefficient per estimator.
    """
    names = list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 2.5))
    axes = figure.subplots(1, 2)
    for ax, column, label in zip(axes, ("kl", "reward"), ("KL(π ‖ ref), nats", "mean reward"), strict=True):
        for i, name in enumerate(names):
            look = style_of(name)
            steps = frame[frame["estimator"] == name].groupby("step")[column]
            middle = steps.mean()
            # Narrower as they go, so that lines on top of each other all show.
            width = 2.6 - 1.6 * i / max(len(names) - 1, 1)
            ax.plot(middle.index, middle, "-", marker=look.marker, markersize=3, color=look.colour, linewidth=width)
            ax.fill_between(middle.index, steps.min(), steps.max(), color=look.colour, alpha=0.15, linewidth=0)
        ax.set(title=label, xlabel="batches", ylim=(0, None))
        ax.grid()
    figure.legend(handles=[handle(name, markersize=3.5) for name in names], loc="outside upper center", ncols=len(names))
    panels(axes)
    return figure


@styled
def training_compared(frame: pd.DataFrame, ends: pd.DataFrame) -> Figure:
    """Where runs end, and quotients of their KL and noise with intervals.

    Reads of `frame` `estimator, data, budget, coefficient` and, with `_low` and `_high`, `kl_over_k2, noise_over_none`; of `ends`
    `estimator, coefficient, kl, reward`, one row per run.
    """
    figure = Figure(figsize=(PAGE, 2.9))
    axes = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    names = list(dict.fromkeys(ends["estimator"]))
    for name in names:
        rows = ends[ends["estimator"] == name]
        look = style_of(name)
        axes[0].plot(rows["kl"], rows["reward"], look.marker, color=look.colour, markersize=3.5, alpha=0.7, markeredgewidth=0)
    axes[0].set(title="where runs end", xlabel="KL(π ‖ ref), nats", ylabel="mean reward", xscale="log")
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_formatter("{x:g}")
    axes[0].tick_params(axis="x", which="minor", labelsize=6)
    equal = frame[frame["budget"] == "equal coefficient"]
    _quotients(axes[1], equal[equal["estimator"] != "k2-loss"], "kl_over_k2", "KL over that of k2-loss")
    _quotients(axes[2], equal, "noise_over_none", "noise over that without")
    figure.legend(
        handles=[handle(name, linestyle="none", markersize=3.5) for name in names], loc="outside upper center", ncols=len(names)
    )
    panels(axes)
    return figure


def _quotients(ax: Axes, frame: pd.DataFrame, column: str, label: str) -> None:
    """One line per estimator, coefficient and number of epochs: centre and interval, on a logarithmic axis."""
    rows = frame[frame[column].notna()].reset_index(drop=True)
    ax.axvline(1, **TRUTH)
    for i, row in enumerate(rows.to_dict("records")):
        centre, low, high = (float(row[key]) for key in (column, f"{column}_low", f"{column}_high"))
        reach: dict[str, Any] = {"xerr": np.nan_to_num([[centre - low], [high - centre]])}
        several = row["data"] != "one epoch per batch"
        look = style_of(row["estimator"])
        dots(
            ax,
            [centre],
            [-i],
            row["estimator"],
            "sampled",
            reach,
            markersize=4,
            markerfacecolor="white" if several else look.colour,
        )
    ax.set(title=label, xscale="log")
    labels = [f"{name}, β = {beta:g}" for name, beta in zip(rows["estimator"], rows["coefficient"], strict=True)]
    ax.set_yticks([-i for i in range(len(rows))], labels)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.tick_params(axis="y", labelsize=6.5)
    ax.grid(axis="x")
