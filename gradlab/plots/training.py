"""Figures about training runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gradlab.plots.style import PAGE, TRUTH, Figure, dots, handle, panels, style_of, styled

_WITHOUT = "none"


@styled
def training_runs(frame: pd.DataFrame) -> Figure:
    """KL to the reference and reward along training runs: means over seeds and the range of the seeds.

    Reads `estimator, seed, step, kl, reward`: one coefficient per estimator.

    >>> frame = gl.claims.load("figures", ["13_runs"])["13_runs"]
    >>> len(gl.plots.training_runs(frame).axes)
    2
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

    >>> frames = gl.claims.load("figures", ["13_training", "13_ends"])
    >>> len(gl.plots.training_compared(frames["13_training"], frames["13_ends"]).axes)
    3
    """
    figure = Figure(figsize=(PAGE, 3.0))
    axes = figure.subplots(1, 3, width_ratios=[1.2, 1, 1])
    names = list(dict.fromkeys(ends["estimator"]))
    for i, name in enumerate(names):
        rows, look = ends[ends["estimator"] == name], style_of(name)
        # Smaller as they go, so that points on top of each other all show.
        size = 5 - 2.5 * i / max(len(names) - 1, 1)
        axes[0].plot(rows["kl"], rows["reward"], look.marker, color=look.colour, markersize=size, alpha=0.8, markeredgewidth=0)
    axes[0].set(title="where runs end", xlabel="KL(π ‖ ref), nats", ylabel="mean reward", xscale="log")
    _ticks(axes[0], ends["kl"])
    axes[0].grid()
    rows = frame[frame["budget"] == "equal coefficient"].reset_index(drop=True)
    labels = [f"{name}, β = {beta:g}" for name, beta in zip(rows["estimator"], rows["coefficient"], strict=True)]
    for ax, column, title in zip(
        axes[1:], ("kl_over_k2", "noise_over_none"), ("KL over k2-loss", "noise over none"), strict=True
    ):
        _quotients(ax, rows, column)
        ax.set_title(title)
        ax.set_yticks([-i for i in range(len(rows))], labels if ax is axes[1] else [])
    axes[1].tick_params(axis="y", labelsize=6.5)
    handles = [handle(name, linestyle="none", markersize=3.5) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names))
    panels(axes)
    return figure


def _quotients(ax: Axes, rows: pd.DataFrame, column: str) -> None:
    """One line per row: centre and interval, on a logarithmic axis; open for several epochs."""
    ax.axvline(1, **TRUTH)
    for i, row in enumerate(rows.to_dict("records")):
        if row["estimator"] == "k2-loss" and column == "kl_over_k2":
            continue
        centre, low, high = (float(row[key]) for key in (column, f"{column}_low", f"{column}_high"))
        error_widths: dict[str, Any] = {"xerr": np.nan_to_num([[centre - low], [high - centre]])}
        fill = style_of(row["estimator"]).colour if row["data"] == "one epoch per batch" else "white"
        dots(ax, [centre], [-i], row["estimator"], "sampled", error_widths, markersize=4, markerfacecolor=fill)
    ax.set_xscale("log")
    _ticks(ax, rows[[f"{column}_low", f"{column}_high"]].to_numpy().ravel())
    ax.grid(axis="x")


def _ticks(ax: Axes, values: Any) -> None:
    """Round numbers within a logarithmic axis."""
    low, high = np.nanmin(values), np.nanmax(values)
    ax.set_xticks([x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if 0.9 * low <= x <= 1.1 * high])
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter("{x:g}")
