"""Figures about bias and noise against the distance from the reference: bands over random scenarios, slopes, batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradlab.plots.style import COLUMN, NEUTRAL, PAGE, TRUTH, Figure, dots, handle, panels, style_of, styled

DISTANCE = "KL(policy ‖ reference), nats"
#: A relative bias below this is rounding.
ZERO = 1e-9
_ROWS = {"bias": "relative bias", "cosine": "cosine", "noise": "noise, tr Σ / ‖∇‖²"}


def band(ax: Axes, rows: pd.DataFrame, name: str, y: str, x: str = "kl", **kwargs: Any) -> None:
    """Median as a line with the estimator's markers, and the 10–90 % range as a band of its colour."""
    look = style_of(name)
    line: dict[str, Any] = {"color": look.colour, "linewidth": 1.1, "marker": look.marker, "markersize": 2.8, "label": name}
    ax.plot(rows[x], rows[y], **{**line, **kwargs})
    ax.fill_between(rows[x], rows[f"{y}_low"], rows[f"{y}_high"], color=look.colour, alpha=0.18, linewidth=0)


def _logarithmic(ax: Axes, both: bool = False) -> None:
    ax.set_xscale("log")
    ax.set_xticks([1e-4, 1e-3, 1e-2, 0.1, 1], ["$10^{-4}$", "$10^{-3}$", "0.01", "0.1", "1"])
    ax.minorticks_off()
    if both:
        ax.set_yscale("log")
        ax.minorticks_off()
    ax.grid()


@styled
def distances(frame: pd.DataFrame, bias: Sequence[str], noise: Sequence[str]) -> Figure:
    """Relative bias, cosine and noise over the KL: a column per family, bands over random scenarios.

    Reads `family, estimator, kl` and `bias, cosine, noise` with `_low`, `_high`. bias and noise name the estimators drawn in
    the rows they give their name to; a bias of 0 is not drawn.

    >>> frame = gl.claims.load("figures", ["04_bands"])["04_bands"]
    >>> len(gl.plots.distances(frame[frame["target"] == "reverse_kl"], bias=["k3-loss"], noise=["k2-loss", "k3-loss"]).axes)
    9
    """
    families = list(dict.fromkeys(frame["family"]))
    figure = Figure(figsize=(PAGE, 5.1))
    grid = figure.subplots(3, len(families), sharex=True, sharey="row", squeeze=False)
    for row, (axes, (statistic, label)) in enumerate(zip(grid, _ROWS.items(), strict=True)):
        for ax, family in zip(axes, families, strict=True):
            for name in noise if statistic == "noise" else bias:
                rows = frame[(frame["family"] == family) & (frame["estimator"] == name)]
                if len(rows) and (statistic != "bias" or rows["bias"].max() > ZERO):
                    band(ax, rows, name, statistic)
            _logarithmic(ax, both=statistic != "cosine")
            ax.axhline({"bias": 1, "cosine": 0, "noise": 1}[statistic], color="#777777", linewidth=0.6, zorder=1)
            ax.set_title(family if row == 0 else "")
        axes[0].set_ylabel(label)
    grid[0, 0].set_ylim(3e-4, 300)
    grid[1, 0].set_ylim(-1.05, 1.05)
    grid[2, 0].set_ylim(3e-2, 3e4)
    figure.legend(handles=[handle(name) for name in dict.fromkeys([*bias, *noise])], loc="outside upper center", ncols=5)
    figure.supxlabel(DISTANCE)
    panels(grid.flat)
    return figure


@styled
def catalogue(frame: pd.DataFrame) -> Figure:
    """Median relative bias and noise of every estimator over the KL, as colours; white where it is 0.

    Reads `family, estimator, kl, bias, noise`. Left half bias, right half noise, a column of panels per family.

    >>> frame = gl.claims.load("figures", ["04_catalogue"])["04_catalogue"]
    >>> len(gl.plots.catalogue(frame).axes)
    8
    """
    families, names = list(dict.fromkeys(frame["family"])), list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 0.75 + 0.128 * len(names)))
    grid = figure.subplots(1, 2 * len(families), sharey=True, squeeze=False, columns=len(families))[0]
    norms = {"bias": LogNorm(1e-3, 10), "noise": LogNorm(1e-1, 1e3)}
    for s, statistic in enumerate(norms):
        axes = grid[s * len(families) : (s + 1) * len(families)]
        for ax, family in zip(axes, families, strict=True):
            table = (
                frame[frame["family"] == family].pivot_table(index="estimator", columns="kl", values=statistic).reindex(names)
            )
            cells = np.where(table < ZERO, np.nan, table)
            picture = ax.imshow(cells, norm=norms[statistic], aspect="auto", interpolation="nearest")
            kls = table.columns.to_numpy(dtype=float)
            at = [int(np.abs(np.log(kls / kl)).argmin()) for kl in (1e-4, 0.01, 1)]
            ax.set_xticks(at, ["$10^{-4}$", ".01", "1"])
            ax.set_title(family)
            ax.tick_params(length=0, axis="y")
            unsolved = np.argwhere(np.repeat(table.isna().all(axis=1).to_numpy()[:, None], len(kls), axis=1))
            ax.plot(unsolved[:, 1], unsolved[:, 0], ".", color="#999999", markersize=1.5)
        bar = figure.colorbar(picture, ax=list(axes), location="bottom", aspect=30, pad=0.02, extend="both")
        bar.set_label(f"{_ROWS[statistic]} (white: 0)")
    grid[0].set_yticks(range(len(names)), names)
    figure.supxlabel(f"columns: {DISTANCE}")
    panels(grid)
    return figure


@styled
def slopes(frame: pd.DataFrame, exponents: Sequence[float] = (-0.5, 0, 0.5)) -> Figure:
    """Exponent of the relative bias as KL → 0, a dot per random scenario with the standard error of its fit.

    Reads `family, estimator, target, slope, slope_error`; families are told apart by height.

    >>> frame = gl.claims.load("figures", ["04_slopes"])["04_slopes"]
    >>> len(gl.plots.slopes(frame).axes)
    1
    """
    families = list(dict.fromkeys(frame["family"]))
    keys = list(dict.fromkeys(zip(frame["estimator"], frame["target"], strict=True)))
    figure = Figure(figsize=(COLUMN, 0.5 + 0.3 * len(keys)))
    ax = figure.subplots()
    for exponent in exponents:
        ax.axvline(exponent, **TRUTH)
    for i, (name, target) in enumerate(keys):
        for j, family in enumerate(families):
            rows = frame[(frame["estimator"] == name) & (frame["target"] == target) & (frame["family"] == family)]
            y = np.full(len(rows), i + 0.26 * (j - (len(families) - 1) / 2))
            error = {"xerr": rows["slope_error"].to_numpy()}
            ax.errorbar(rows["slope"], y, **error, fmt="none", color=style_of(name).colour, linewidth=0.6, alpha=0.6)
            dots(ax, rows["slope"], y, name, markersize=2.2, marker="osD"[j], alpha=0.8)
        if i:
            ax.axhline(i - 0.5, color="#DDDDDD", linewidth=0.5)
    labels = [name + ("\n(frozen prefix)" if target.endswith("frozen_prefix") else "") for name, target in keys]
    ax.set_yticks(range(len(keys)), labels)
    ax.set(xlabel="exponent of the relative bias in KL", ylim=(len(keys) - 0.5, -0.5))
    ax.tick_params(axis="y", length=0)
    ax.set_xticks([-0.5, -0.25, 0, 0.25, 0.5], ["−½", "−¼", "0", "¼", "½"])
    shapes = [
        Line2D([], [], color=NEUTRAL, marker="osD"[j], linestyle="none", markersize=3, label=family)
        for j, family in enumerate(families)
    ]
    figure.legend(handles=shapes, loc="outside upper center", ncols=3)
    return figure


@styled
def batches(frame: pd.DataFrame) -> Figure:
    """Root mean squared error against batch size: bands and lines exact, open dots from drawn batches; one panel per family × KL.

    Reads `family, kl, estimator, via, batch, rmse, rmse_low, rmse_high`.

    >>> frame = gl.claims.load("figures", ["04_batches"])["04_batches"]
    >>> len(gl.plots.batches(frame).axes)
    6
    """
    families, kls = list(dict.fromkeys(frame["family"])), list(dict.fromkeys(frame["kl"]))
    names = list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 0.5 + 1.45 * len(families)))
    grid = figure.subplots(len(families), len(kls), sharex=True, sharey=True, squeeze=False)
    for axes, family in zip(grid, families, strict=True):
        for ax, kl in zip(axes, kls, strict=True):
            part = frame[(frame["family"] == family) & (frame["kl"] == kl)]
            for name in names:
                rows = part[part["estimator"] == name]
                band(ax, rows[rows["via"] == "exact"], name, "rmse", "batch", marker="")
                sampled = rows[rows["via"] == "sampled"]
                ends = [sampled["rmse"] - sampled["rmse_low"], sampled["rmse_high"] - sampled["rmse"]]
                dots(ax, sampled["batch"], sampled["rmse"], name, "sampled", {"yerr": ends}, markersize=3)
            ax.axhline(1, color="#777777", linewidth=0.6, zorder=1)
            ax.set(xscale="log", yscale="log", title=f"{family}, KL {kl:.2g}")
            ax.set_ylim(2e-3, 30)
            ax.minorticks_off()
            ax.grid()
        axes[0].set_ylabel("relative rms error")
    lines = [handle(name, marker=style_of(name).marker, markersize=3) for name in names]
    shown = Line2D(
        [], [], color=NEUTRAL, marker="o", markerfacecolor="white", linestyle="none", markersize=3, label="drawn batches"
    )
    figure.legend(handles=[*lines, shown], loc="outside upper center", ncols=len(names) + 1)
    figure.supxlabel("batch size, responses")
    panels(grid.flat)
    return figure


@styled
def crossovers(frame: pd.DataFrame) -> Figure:
    """Batch size at which bias equals noise, over the KL, a panel per family: below it noise rules, above it bias.

    Reads `family, estimator, kl, crossover, crossover_low, crossover_high`; estimators without bias are left out.

    >>> frame = gl.claims.load("figures", ["04_crossover"])["04_crossover"]
    >>> len(gl.plots.crossovers(frame).axes)
    3
    """
    families = list(dict.fromkeys(frame["family"]))
    figure = Figure(figsize=(PAGE, 2.2))
    grid = figure.subplots(1, len(families), sharex=True, sharey=True, squeeze=False)[0]
    for ax, family in zip(grid, families, strict=True):
        for name, rows in frame[(frame["family"] == family) & np.isfinite(frame["crossover"])].groupby("estimator", sort=False):
            band(ax, rows, str(name), "crossover")
        _logarithmic(ax, both=True)
        ax.set(title=family, ylim=(0.5, 1e8))
    grid[0].set_ylabel("crossover, responses")
    names = list(dict.fromkeys(frame["estimator"]))
    figure.legend(handles=[handle(name) for name in names], loc="outside upper center", ncols=len(names))
    figure.supxlabel(DISTANCE)
    panels(grid)
    return figure


@styled
def ratios(frame: pd.DataFrame, statistic: str, label: str) -> Figure:
    """One estimator over another in the same scenario, over the KL: a panel per family, a band per pair.

    Reads `family, estimator, other, kl` and the statistic with `_low`, `_high`, `_min`, `_max` (dotted); crosses are single
    scenarios (`scenarios` 1).

    >>> frame = gl.claims.load("figures", ["04_weaker"])["04_weaker"]
    >>> len(gl.plots.ratios(frame, "norm_ratio", "‖E g‖ of k3 / of k2").axes)
    3
    """
    families = list(dict.fromkeys(frame["family"]))
    figure = Figure(figsize=(PAGE, 2.2))
    grid = figure.subplots(1, len(families), sharex=True, sharey=True, squeeze=False)[0]
    pairs = list(dict.fromkeys(zip(frame["estimator"], frame["other"], strict=True)))
    for ax, family in zip(grid, families, strict=True):
        for name, other in pairs:
            rows = frame[(frame["family"] == family) & (frame["estimator"] == name) & (frame["other"] == other)]
            many, single = rows[rows["scenarios"] > 1], rows[rows["scenarios"] == 1]
            band(ax, many, name, statistic)
            for end in ("min", "max"):
                ax.plot(many["kl"], many[f"{statistic}_{end}"], ":", color=style_of(name).colour, linewidth=0.8)
            ax.plot(single["kl"], single[statistic], "x", color="black", markersize=4.5, zorder=4)
        ax.axhline(1, **TRUTH)
        _logarithmic(ax, both=True)
        ax.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5], ["0.01", "", "", "0.1", "", "0.5", "1", "2", "5"])
        ax.set_title(family)
    grid[0].set_ylim(frame[f"{statistic}_low"].min() / 1.3, frame[f"{statistic}_max"].max() * 1.3)
    grid[0].set_ylabel(label)
    lines: list[Any] = [handle(name, label=f"{name} / {other}") for name, other in pairs]
    lines += [Patch(facecolor="#CCCCCC", label="10–90 % (dotted: all)")]
    if (frame["scenarios"] == 1).any():
        lines.append(Line2D([], [], color="black", marker="x", linestyle="none", markersize=4.5, label="counterexample"))
    figure.legend(handles=lines, loc="outside upper center", ncols=4)
    figure.supxlabel(DISTANCE)
    panels(grid)
    return figure
