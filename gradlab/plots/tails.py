"""Figures about heavy tails: running means, where the variance is infinite, a rare token, and χ² against gradient noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradlab.plots.style import COLUMN, NEUTRAL, PAGE, TRUTH, Figure, hue, panels, small, styled

_MEDIAN: dict[str, Any] = {"linestyle": "--", "marker": "o", "markerfacecolor": "white", "markersize": 3, "linewidth": 1}


def _over_samples(ax: Axes, rows: pd.DataFrame, column: str, colour: str) -> None:
    """Median over runs with its interval as bars, and the 10–90 % range of a single run as a band."""
    ends = [rows[column] - rows[f"{column}_low"], rows[f"{column}_high"] - rows[column]]
    ax.errorbar(rows["samples"], rows[column], ends, color=colour, elinewidth=0.7, **_MEDIAN)
    ax.fill_between(rows["samples"], rows[f"{column}_q10"], rows[f"{column}_q90"], color=colour, alpha=0.18, linewidth=0)


def _decades(ax: Axes, low: int, high: int, step: int = 2) -> None:
    ax.set_xscale("log")
    ax.set_xticks([10.0**k for k in range(low, high + 1, step)])
    ax.minorticks_off()
    ax.grid()


@styled
def running(frame: pd.DataFrame, shares: pd.DataFrame, reported: dict[str, float]) -> Figure:
    """Sample mean and standard deviation of k1 and k3 as the sample grows; what rare events carry; what somebody reported.

    frame: `kernel, samples` and `mean_ratio, std` with `_low, _high, _q10, _q90`. shares: `scenario, samples, share` of
    `gl.tails.rare_share`; the first scenario is the frame's. reported: standard deviation by kernel.

    >>> frames = gl.claims.load("figures", ["06_running", "06_shares"])
    >>> len(gl.plots.running(frames["06_running"], frames["06_shares"], {"k1": 0.691, "k3": 8.82}).axes)
    3
    """
    figure = Figure(figsize=(PAGE, 2.35))
    means, stds, rare = figure.subplots(1, 3)
    for kernel, rows in frame.groupby("kernel", sort=False):
        colour = hue(str(kernel))
        _over_samples(means, rows, "mean_ratio", colour)
        _over_samples(stds, rows, "std", colour)
        if str(kernel) in reported:
            stds.axhline(reported[str(kernel)], color=colour, linestyle=":", linewidth=1.2)
    first = shares[(shares["scenario"] == shares["scenario"].iloc[0]) & (shares["samples"] <= frame["samples"].max())]
    means.plot(first["samples"], 1 - first["share"], "-", color=hue("k3"), linewidth=1.4)
    means.axhline(1, **TRUTH)
    means.set(title="mean", ylabel="sample mean / KL", ylim=(0, 1.7))
    stds.set(title="standard deviation", ylabel="sample std, nats", yscale="log")
    stds.yaxis.set_major_formatter("{x:g}")
    looks = ["-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (6, 2, 1, 2, 1, 2))]
    for i, (std, rows) in enumerate(shares.groupby("std", sort=True)):
        look = {"linestyle": looks[i % len(looks)], "color": hue("k3"), "linewidth": 1.2, "label": f"σ = {std:g}"}
        rare.plot(rows["samples"], 100 * rows["share"], **look)
    rare.legend(loc="upper right", handlelength=2.6, ncols=2)
    rare.set(title="rarer than 1/n", ylabel="share of E[k3], %", ylim=(0, 85))
    for ax in (means, stds, rare):
        _decades(ax, 1 if ax is not rare else 2, 7 if ax is not rare else 12)
    lines = [Line2D([], [], color=hue(str(kernel)), label=str(kernel), **_MEDIAN) for kernel in dict.fromkeys(frame["kernel"])]
    lines += [
        Line2D([], [], color=hue("k3"), linewidth=1.4, label="k3, exact, without\nevents rarer than 1/n"),
        Line2D([], [], color=NEUTRAL, linestyle=":", linewidth=1.2, label="reported std"),
    ]
    figure.legend(handles=lines, loc="outside upper center", ncols=4)
    figure.supxlabel("number of draws n")
    panels((means, stds, rare))
    return figure


@styled
def variance_map(frame: pd.DataFrame, border: float) -> Figure:
    """Standard deviation of k3 over the ratio of the policy's to the reference's std; shaded where it is infinite.

    Reads `mean, ratio, via, std` and, in sampled rows, `std_q10, std_q90`; via is closed form, exact or sampled.

    >>> frame = gl.claims.load("figures", ["06_variance"])["06_variance"]
    >>> len(gl.plots.variance_map(frame, border=0.5**0.5).axes)
    1
    """
    figure = Figure(figsize=(COLUMN, 2.6))
    ax = figure.subplots()
    colours = dict(zip(dict.fromkeys(frame["mean"]), (hue("k3"), "#6B2E00", "#F2B48C"), strict=False))
    for mean, part in frame.groupby("mean", sort=False):
        colour = colours[mean]
        line, dots, drawn = (
            part[(part["via"] == via) & np.isfinite(part["std"])] for via in ("closed form", "exact", "sampled")
        )
        ax.plot(line["ratio"], line["std"], "-", color=colour, label=f"mean {mean:g}")
        ax.plot(dots["ratio"], dots["std"], "o", color=colour, markersize=3)
        if len(drawn):
            ends = [drawn["std"] - drawn["std_q10"], drawn["std_q90"] - drawn["std"]]
            ax.errorbar(drawn["ratio"], drawn["std"], ends, **{**_MEDIAN, "linestyle": "none"}, color=colour, elinewidth=0.7)
    ax.axvspan(frame["ratio"].min(), border, color="#EEEEEE", linewidth=0)
    ax.axvline(border, **TRUTH)
    ax.text(border, 0.97, "infinite ", transform=ax.get_xaxis_transform(), ha="right", va="top", fontsize=small())
    ax.set(yscale="log", xlabel="std of policy / std of reference", ylabel="std of k3, nats", ylim=(3e-3, 1e3))
    ax.set_xlim(frame["ratio"].min(), frame["ratio"].max())
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid()
    grey: dict[str, Any] = {"color": NEUTRAL, "linestyle": "none", "marker": "o", "markersize": 3}
    handles = [Line2D([], [], color=colour, label=f"mean {mean:g}") for mean, colour in colours.items()]
    handles += [Line2D([], [], **grey, label="exact"), Line2D([], [], **grey, markerfacecolor="white", label="sampled")]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


@styled
def rare_token(frame: pd.DataFrame) -> Figure:
    """Sample mean of k3 over its expectation against the number of draws: exact quantiles, and counted samples.

    Reads `probability, samples, via, mean_ratio, mean_ratio_q10, mean_ratio_q90` and, in sampled rows, `mean_ratio_low, _high`;
    a panel per probability of the dropped token.

    >>> frame = gl.claims.load("figures", ["06_dropped"])["06_dropped"]
    >>> len(gl.plots.rare_token(frame).axes)
    3
    """
    chances = list(dict.fromkeys(frame["probability"]))
    figure = Figure(figsize=(PAGE, 2.0))
    grid = figure.subplots(1, len(chances), sharey=True, sharex=True, squeeze=False)[0]
    for ax, chance in zip(grid, chances, strict=True):
        part = frame[frame["probability"] == chance]
        line, drawn = part[part["via"] == "exact"], part[part["via"] == "sampled"]
        ax.plot(line["samples"], line["mean_ratio"], "-", color=hue("k3"))
        ax.fill_between(
            line["samples"], line["mean_ratio_q10"], line["mean_ratio_q90"], color=hue("k3"), alpha=0.22, linewidth=0
        )
        ends = [drawn["mean_ratio"] - drawn["mean_ratio_low"], drawn["mean_ratio_high"] - drawn["mean_ratio"]]
        ax.errorbar(
            drawn["samples"], drawn["mean_ratio"], ends, color=hue("k3"), elinewidth=0.7, **{**_MEDIAN, "linestyle": "none"}
        )
        ax.axhline(1, **TRUTH)
        ax.axvline(1 / chance, color=NEUTRAL, linewidth=0.9, linestyle=":")
        ax.annotate(
            "1/π",
            (1 / chance, 1.0),
            (2, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=small(),
            va="top",
        )
        ax.set_title(f"π(token) = {chance:.2g}")
        ax.set(ylim=(0, 3), xlim=(10, 3e8))
        _decades(ax, 1, 8)
    grid[0].set_ylabel("sample mean / KL")
    colour = hue("k3")
    handles: list[Any] = [
        Line2D([], [], color=colour, label="median, exact"),
        Patch(facecolor=colour, alpha=0.22, label="10–90 % of samples, exact"),
        Line2D([], [], color=colour, label="median, counted", **{**_MEDIAN, "linestyle": "none"}),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    figure.supxlabel("number of draws n")
    panels(grid)
    return figure


@styled
def chi2(frame: pd.DataFrame, laws: pd.DataFrame) -> Figure:
    """Covariance trace of the gradient of k3 as loss against χ²(ref‖π): a panel per group, the last for two tokens.

    frame: `group, kl_asked, chi2, trace_cov` of random scenarios. laws: `probability, gradient_ratio, via` of two-token bandits.

    >>> frames = gl.claims.load("figures", ["06_chi2", "06_two_tokens"])
    >>> random = frames["06_chi2"][frames["06_chi2"]["group"].str.startswith("random")]
    >>> len(gl.plots.chi2(random, frames["06_two_tokens"]).axes)
    3
    """
    groups = list(dict.fromkeys(frame["group"]))
    figure = Figure(figsize=(PAGE, 2.3))
    axes = figure.subplots(1, len(groups) + 1)
    shades = dict(zip(sorted(frame["kl_asked"].unique()), ("#F2B48C", hue("k3"), "#6B2E00"), strict=False))
    for ax, group in zip(axes, groups, strict=False):
        part = frame[frame["group"] == group]
        for kl, rows in part.groupby("kl_asked"):
            ax.plot(rows["chi2"], rows["trace_cov"], "o", color=shades[kl], markersize=2.2, markeredgewidth=0, alpha=0.8)
        ends = np.array([part["chi2"].min(), part["chi2"].max()])
        for factor, text in ((2, "2χ²"), (1, "χ²")):
            ax.plot(ends, factor * ends, color="black", linewidth=0.8, linestyle="-" if factor == 2 else (0, (1, 1.5)))
            ax.annotate(
                text, (ends[1], factor * ends[1]), (1, 0), textcoords="offset points", fontsize=small(), in_layout=False
            )
        ax.set(xscale="log", yscale="log", title=group, xlabel="χ²(ref‖π)")
        ax.minorticks_off()
        ax.grid()
    axes[0].set_ylabel("tr Cov of the gradient")
    law, dots = laws[laws["via"] == "closed form"], laws[laws["via"] == "exact"]
    axes[-1].plot(law["probability"], law["gradient_ratio"], "-", color=hue("k3"))
    axes[-1].plot(dots["probability"], dots["gradient_ratio"], "o", color=hue("k3"), markersize=3)
    axes[-1].set(title="two tokens", xlabel="probability of a token", ylabel="tr Cov / χ²", ylim=(-0.05, 2.05), xlim=(0, 1))
    axes[-1].grid()
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="none", markersize=3, label=f"KL {kl:g} nats")
        for kl, colour in shades.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    panels(axes)
    return figure
