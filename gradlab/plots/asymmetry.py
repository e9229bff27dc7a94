"""Figures about which tokens carry a gradient, and about the recovery of a dropped or an inflated token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.plots.style import PAGE, TRUTH, VIA, Figure, dots, handle, number, panels, small, style_of, styled

#: What the columns of the bands are called on paper.
TITLES = {
    "under_mass": "of the mean |coefficient|",
    "under_expected": "of the expected gradient",
    "under_second": "of the second moment",
    "skewness": "skewness",
    "largest_second": "largest token",
}
_HALF: dict[str, Any] = {**TRUTH, "linestyle": (0, (1, 1.5))}


@styled
def sides(frame: pd.DataFrame) -> Figure:
    """Share of each total that under-sampled tokens carry, over the KL: median and band over random policies.

    Reads `world, estimator, kl, quantity, quantile, share`; one row of panels per world, the lowest and highest quantile give
    the band.

    >>> frame = gl.claims.load("figures", ["05_bands"])["05_bands"]
    >>> len(gl.plots.sides(frame).axes)
    9
    """
    worlds = list(dict.fromkeys(frame["world"]))
    columns = [column for column in TITLES if column.startswith("under") and column in set(frame["quantity"])]
    names = list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 0.6 + 1.35 * len(worlds)))
    grid = figure.subplots(len(worlds), len(columns), sharex=True, sharey=True, squeeze=False)
    for axes, world in zip(grid, worlds, strict=True):
        for ax, column in zip(axes, columns, strict=True):
            ax.axhline(0.5, **_HALF)
            _bands(ax, frame[(frame["world"] == world) & (frame["quantity"] == column)], names)
            ax.set(title=TITLES[column] if ax in grid[0] else "", xscale="log", ylim=(-0.03, 1.03))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.grid()
        axes[0].set_ylabel(f"{world}\nshare of under-sampled")
    figure.supxlabel("KL(policy ‖ reference), nats")
    handles = [handle(name, marker="") for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names))
    panels(grid.flat)
    return figure


def _bands(ax: Axes, part: pd.DataFrame, names: list[str]) -> None:
    for name in names:
        rows = part[part["estimator"] == name].pivot_table(index="kl", columns="quantile", values="share")
        if len(rows):
            low, high, colour = rows.columns.min(), rows.columns.max(), style_of(name).colour
            ax.fill_between(rows.index, rows[low], rows[high], color=colour, alpha=0.15, linewidth=0)
            ax.plot(rows.index, rows[0.5], VIA["exact"], color=colour)


@styled
def dropped_sides(frame: pd.DataFrame) -> Figure:
    """The dropped token: expected pull on its logit, noise over that, and how much of everything it carries.

    Reads `estimator, via, pull, noise_at_64, expected_share, second_share` with `_low`, `_high`; pull is minus the expected
    gradient on the token's logit.

    >>> frame = gl.claims.load("figures", ["05_dropped"])["05_dropped"]
    >>> len(gl.plots.dropped_sides(frame).axes)
    4
    """
    names = list(dict.fromkeys(frame["estimator"]))[::-1]
    shown = {
        "pull": "pull on its logit",
        "noise_at_64": "noise / signal at 64",
        "expected_share": "expected gradient",
        "second_share": "second moment",
    }
    figure = Figure(figsize=(PAGE, 0.55 + 0.26 * len(names)))
    axes = figure.subplots(1, len(shown), sharey=True)
    for ax, (column, label) in zip(axes, shown.items(), strict=True):
        for y, name in enumerate(names):
            rows = frame[frame["estimator"] == name].set_index("via")
            if "sampled" in rows.index:
                low, mid, high = (number(rows, "sampled", f"{column}{end}") for end in ("_low", "", "_high"))
                error = {"xerr": [[mid - low], [high - mid]]} if np.isfinite([low, high]).all() else {}
                dots(ax, [mid], [y - 0.2], name, "sampled", error, markersize=3.2)
            dots(ax, [number(rows, "exact", column)], [y + 0.12], name)
        ax.set(title=label, ylim=(-0.6, len(names) - 0.4))
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
    axes[0].set(xscale="log", xlabel="−E g on its logit, nats")
    axes[0].axvline(frame["truth"].iloc[0], **TRUTH)
    axes[1].set_xlabel("std of a mean of 64 / |E g|")
    for ax in axes[2:]:
        ax.set(xlim=(-0.05, 1.07), xlabel="share of the rare token")
    axes[0].set_yticks(range(len(names)), names)
    grey: dict[str, Any] = {"color": "#555555", "linestyle": "none", "marker": "o"}
    handles = [
        Line2D([], [], **grey, label="exact"),
        Line2D([], [], **grey, markerfacecolor="white", label="sampled, 95 % interval"),
        Line2D([], [], **TRUTH, label="truth"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    panels(axes)
    return figure


@styled
def tail_indices(frame: pd.DataFrame, hill: pd.DataFrame) -> Figure:
    """Skewness of one response's gradient and the largest share of one token, over the KL; tail index of a Gaussian's `δ`.

    Reads bands as `sides` does (quantities `skewness`, `largest_second`), and `ratio, k, index, index_low, index_high, exact`.

    >>> frames = gl.claims.load("figures", ["05_tails", "05_hill"])
    >>> len(gl.plots.tail_indices(frames["05_tails"], frames["05_hill"]).axes)
    3
    """
    names = list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 2.3))
    axes = figure.subplots(1, 3)
    for ax, column in zip(axes, ("skewness", "largest_second"), strict=False):
        _bands(ax, frame[frame["quantity"] == column], names)
        ax.set(xscale="log", xlabel="KL(policy ‖ reference), nats")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid()
    axes[0].set(title="skewness", ylabel="skewness of one response's ⟨g, u⟩", yscale="symlog")
    axes[0].axhline(0, color="#999999", linewidth=0.6, zorder=1)
    axes[1].set(title="largest token", ylabel="its share of the second moment", ylim=(0, 1.03))
    colour = style_of("k3-loss").colour
    for ratio, rows in hill.groupby("ratio", sort=False):
        exact = rows["exact"].iloc[0]
        axes[2].axhline(exact, **TRUTH)
        axes[2].fill_between(rows["k"], rows["index_low"], rows["index_high"], color=colour, alpha=0.2, linewidth=0)
        axes[2].plot(rows["k"], rows["index"], VIA["sampled"], color=colour)
        x, y = rows["k"].max() * 1.3, rows["index"].iloc[-1]
        axes[2].annotate(f"{ratio:g} σ_ref\nα = {exact:.3g}", (x, y), fontsize=small(), va="center", annotation_clip=False)
    axes[2].axhline(2, color="#999999", linewidth=0.6, linestyle=(0, (3, 2)))
    axes[2].set(
        title="tail index of δ, Gaussian", xlabel="k largest of the draws", ylabel="tail index α", xscale="log", yscale="log"
    )
    axes[2].set_yticks([1, 2, 3, 5, 8], ["1", "2", "3", "5", "8"])
    axes[2].set_yticks([], minor=True)
    figure.legend(handles=[handle(name, marker="") for name in names], loc="outside upper center", ncols=len(names))
    panels(axes)
    return figure


@styled
def restoring(paths: pd.DataFrame, times: pd.DataFrame) -> Figure:
    """Recovery of a dropped token, then its duration from every distance; hollow: not recovered within the limit.

    Reads `estimator, time, probability, reference` of one start, and `estimator, reference, shift, time, restored`: one
    panel per reference probability.

    >>> frames = gl.claims.load("figures", ["05_paths", "05_restoring"])
    >>> len(gl.plots.restoring(frames["05_paths"], frames["05_restoring"]).axes)
    3
    """
    references, names = list(dict.fromkeys(times["reference"])), list(dict.fromkeys(times["estimator"]))
    figure = Figure(figsize=(PAGE, 2.35))
    axes = figure.subplots(1, 1 + len(references))
    axes[0].axhline(paths["reference"].iloc[0], **TRUTH)
    for name in names:
        rows = paths[(paths["estimator"] == name) & (paths["time"] > 0)]
        axes[0].plot(rows["time"], rows["probability"], VIA["exact"], color=style_of(name).colour)
    axes[0].set(xscale="log", yscale="log", xlabel="time, steps × step size", ylabel="π of the dropped token")
    axes[0].set(title=f"dropped by {-paths['shift'].iloc[0]:.3g} nats")
    for ax, reference in zip(axes[1:], references, strict=True):
        for name in names:
            rows = times[(times["estimator"] == name) & (times["reference"] == reference)].sort_values("shift")
            look = style_of(name)
            for side in (rows[rows["shift"] < 0], rows[rows["shift"] > 0]):
                ax.plot(side["shift"], side["time"].where(side["restored"]), "-", color=look.colour, linewidth=1)
            for restored, fill in ((True, look.colour), (False, "white")):
                part = rows[rows["restored"] == restored]
                ax.plot(part["shift"], part["time"], look.marker, color=look.colour, markerfacecolor=fill, markersize=3)
        ax.axvline(0, color="#999999", linewidth=0.6)
        ax.set(yscale="log", xlabel="log-odds off at the start, nats", title=f"reference probability {reference:g}")
        for x, text in ((0.25, "dropped"), (0.75, "inflated")):
            ax.text(x, 0.99, text, transform=ax.transAxes, ha="center", va="top", fontsize=small(), color="#555555")
        ax.grid()
    low, high = times["time"].min() / 2, times["time"].max() * 4
    for ax in axes[1:]:
        ax.set_ylim(low, high)
    axes[1].set_ylabel("time until back within a factor of 2")
    figure.legend(handles=[handle(name, linestyle="-") for name in names], loc="outside upper center", ncols=len(names))
    panels(axes)
    return figure
