"""Figures about responses of many tokens: credit, what a token cannot see, growth of noise, baselines, length normalisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gradlab.plots.style import COLUMN, PAGE, TRUTH, VIA, Figure, dots, handle, panels, small, style_of, styled
from gradlab.plots.values import _via_handles as via_handles

#: How targets are written on an axis.
SHORT = {"reverse_kl": "∇KL(π‖ref)", "reverse_kl_frozen_prefix": "its frozen form"}


@styled
def credit(frame: pd.DataFrame) -> Figure:
    """Bias against each target and noise of every estimator on one chain, exact (filled) and sampled (open, with intervals).

    Reads `estimator, target, via, bias, noise` and the intervals of both.

    >>> frame = gl.claims.load("figures", ["07_credit"])["07_credit"]
    >>> len(gl.plots.credit(frame).axes)
    3
    """
    names, targets = list(dict.fromkeys(frame["estimator"]))[::-1], list(dict.fromkeys(frame["target"]))
    figure = Figure(figsize=(PAGE, 0.75 + 0.185 * len(names)))
    axes = figure.subplots(1, len(targets) + 1, sharey=True)
    for ax, (target, column) in zip(axes, [*((t, "bias") for t in targets), (targets[0], "noise")], strict=True):
        for y, name in enumerate(names):
            rows = frame[(frame["estimator"] == name) & (frame["target"] == target)].set_index("via")
            low, mid, high = (float(rows.loc["sampled", f"{column}{end}"]) for end in ("_low", "", "_high"))
            dots(ax, [mid], [y - 0.2], name, "sampled", {"xerr": [[max(mid - low, 0)], [max(high - mid, 0)]]}, markersize=3)
            dots(ax, [float(rows.loc["exact", column])], [y + 0.2], name)
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        ax.set_title(f"against {SHORT.get(target, target)}" if column == "bias" else "noise")
        ax.set_xlabel("relative bias" if column == "bias" else "tr Cov / ‖∇KL‖² of one response")
        if column == "bias":
            ax.axvline(0, **TRUTH)
        else:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    figure.legend(handles=via_handles(), loc="outside upper right", ncols=2)
    panels(axes)
    return figure


@styled
def gap(frame: pd.DataFrame) -> Figure:
    """Bias (above, from 0.008) and cosine (below) of expected gradients over each sweep: median of the draws, and their range.

    Reads `sweep, x, estimator, bias, cosine`; one column of panels per sweep.

    >>> frame = gl.claims.load("figures", ["07_gap"])["07_gap"]
    >>> len(gl.plots.gap(frame).axes)
    8
    """
    labels = {"length": "length, tokens", "kl": "KL of a response, nats", "vocab": "vocabulary", "memory": "memory, tokens"}
    sweeps, names = list(dict.fromkeys(frame["sweep"])), list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 3.1))
    grid = figure.subplots(2, len(sweeps), sharey="row", sharex="col")
    for column, sweep in enumerate(sweeps):
        for name in names:
            part = frame[(frame["sweep"] == sweep) & (frame["estimator"] == name)]
            for ax, statistic in zip(grid[:, column], ("bias", "cosine"), strict=True):
                _band(ax, part, statistic, name)
        grid[0, column].set(
            xscale="log", yscale="log", title=f"over the {'KL' if sweep == 'kl' else sweep.replace('vocab', 'vocabulary')}"
        )
        grid[1, column].set(xlabel=labels.get(sweep, sweep))
        grid[1, column].axhline(1, **TRUTH)
        grid[1, column].axhline(0, color="#999999", linewidth=0.6)
        ticks = _ticks(frame.loc[frame["sweep"] == sweep, "x"])
        grid[1, column].set_xticks(ticks, [f"{x:g}" for x in ticks])
        grid[1, column].minorticks_off()
    for ax in grid.flat:
        ax.grid()
    grid[0, 0].set(ylabel="relative bias", ylim=(8e-3, 3))
    grid[0, 0].yaxis.set_major_formatter("{x:g}")
    grid[1, 0].set_ylabel("cosine with the truth")
    figure.legend(handles=[handle(name) for name in names], loc="outside upper right", ncols=len(names))
    panels(grid.flat)
    return figure


def _ticks(values: pd.Series[Any]) -> list[float]:
    """At most four of the points of a sweep."""
    points = sorted({float(value) for value in values})
    return points[:: (len(points) + 3) // 4]


def _band(ax: Axes, part: pd.DataFrame, statistic: str, name: str) -> None:
    groups, look = part.groupby("x")[statistic], style_of(name)
    middle = groups.median()
    ax.fill_between(middle.index, groups.min(), groups.max(), color=look.colour, alpha=0.15, linewidth=0)
    ax.plot(middle.index, middle, VIA["exact"], color=look.colour, marker=look.marker, markersize=3)


@styled
def growth(frame: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """Noise of one response over each sweep, median of the draws, with the fitted exponents beside the names.

    Reads `sweep, x, estimator, noise`, and `sweep, estimator, exponent` of the fits.

    >>> frames = gl.claims.load("figures", ["07_growth", "07_exponents"])
    >>> len(gl.plots.growth(frames["07_growth"], frames["07_exponents"]).axes)
    4
    """
    sweeps, names = list(dict.fromkeys(frame["sweep"])), list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 3.4))
    axes = figure.subplots(1, len(sweeps), sharey=True)
    for ax, sweep in zip(axes, sweeps, strict=True):
        for name in names:
            part = frame[(frame["sweep"] == sweep) & (frame["estimator"] == name)]
            middle, look = part.groupby("x")["noise"].median(), style_of(name)
            ax.plot(middle.index, middle, VIA["exact"], color=look.colour, marker=look.marker, markersize=3)
        quantity, _, fixed = sweep.partition(", ")
        ax.set(xscale="log", yscale="log", title=f"fixed {fixed}" if fixed else f"over the {sweep}")
        ax.set(xlabel={"length": "length, tokens", "KL": "KL of a response, nats"}.get(quantity, quantity))
        ticks = _ticks(frame.loc[frame["sweep"] == sweep, "x"])
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
        ax.grid()
    axes[0].set_ylim(3e-3, 3e4)
    axes[0].set_ylabel("noise of one response, tr Cov / ‖∇KL‖²")
    slopes = fits.set_index(["sweep", "estimator"])["exponent"]
    handles = [handle(name, label=f"{name}  {_exponents(slopes, sweeps[:2], name)}") for name in names]
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=3, title="estimator, exponent in the length (a, b)", alignment="left"
    )
    legend.get_title().set_fontweight("bold")
    panels(axes)
    return figure


def _exponents(slopes: pd.Series[Any], sweeps: Sequence[str], name: str) -> str:
    values = [float(slopes[sweep, name]) for sweep in sweeps if (sweep, name) in slopes.index]
    return ", ".join(f"{value:+.2f}" if abs(value) < 5 else "exp" for value in values).replace("-", "−")


@styled
def baselines(frame: pd.DataFrame) -> Figure:
    """Group baselines over the size of the group: bias, and noise at equal signal relative to no baseline.

    Reads `scenario, baseline, group, look, via, kl, bias, noise_ratio` and the interval of `bias`; the bias is shown where
    there are samples, the noise of leave-one-out in every scenario.

    >>> frame = gl.claims.load("figures", ["07_baselines"])["07_baselines"]
    >>> len(gl.plots.baselines(frame).axes)
    2
    """
    grouped = frame[frame["group"].notna()]
    figure = Figure(figsize=(PAGE, 2.3))
    axes = figure.subplots(1, 2)
    shown = grouped[grouped["scenario"].isin(grouped.loc[grouped["via"] == "sampled", "scenario"])]
    n = np.linspace(grouped["group"].min(), grouped["group"].max(), 50)
    axes[0].plot(n, 1 / n, **TRUTH)
    axes[0].annotate("1/n", (n[5], 1 / n[5]), (4, 3), textcoords="offset points", fontsize=small())
    axes[0].axhline(0, **TRUTH)
    for look, part in shown.groupby("look", sort=False):
        exact, sampled = part[part["via"] == "exact"], part[part["via"] == "sampled"]
        dots(axes[0], exact["group"], exact["bias"], str(look))
        error = np.maximum([sampled["bias"] - sampled["bias_low"], sampled["bias_high"] - sampled["bias"]], 0)
        x = sampled["group"].astype(float) + 0.2
        dots(axes[0], x, sampled["bias"], str(look), "sampled", {"yerr": error}, markersize=3)
    axes[0].set(title="bias", xlabel="responses to one prompt, n", ylabel="relative bias against ∇KL")
    loo = grouped[(grouped["baseline"] == "leave_one_out") & (grouped["via"] == "exact")]
    shape = style_of("k1-reward-loo")
    for _, part in loo.groupby("scenario", sort=False):
        axes[1].plot(part["group"], part["noise_ratio"], VIA["exact"], color=shape.colour, marker=shape.marker, markersize=3.5)
        last = part.iloc[-1]
        axes[1].annotate(f"KL {last['kl']:.3g}", (last["group"], last["noise_ratio"]), (4, 0), textcoords="offset points",
                         fontsize=small(), va="center", annotation_clip=False)  # fmt: skip
    axes[1].axhline(1, **TRUTH)
    axes[1].set(title="noise", xlabel="responses to one prompt, n", ylabel="noise / noise without baseline", yscale="log")
    axes[1].set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    axes[1].minorticks_off()
    axes[1].set_xlim(right=float(grouped["group"].max()) + 0.8)
    for ax in axes:
        ax.grid()
    handles = [handle(str(name), linestyle="none") for name in dict.fromkeys(shown["look"])]
    for entry, label in zip(handles, ("group mean", "leave-one-out"), strict=False):
        entry.set_label(label)
    figure.legend(handles=[*handles, *via_handles()], loc="outside upper right", ncols=4)
    panels(axes)
    return figure


@styled
def normalisers(frame: pd.DataFrame) -> Figure:
    """What 1/L does: sin_angle, pull on the length before and after, and what is left of it in a finite batch.

    Reads `scenario, variable, estimator, normaliser, sin_angle, length_cosine`.

    >>> frame = gl.claims.load("figures", ["07_normalisers"])["07_normalisers"]
    >>> len(gl.plots.normalisers(frame).axes)
    3
    """
    names = list(dict.fromkeys(frame["estimator"]))[::-1]
    figure = Figure(figsize=(PAGE, 2.4))
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    whole = frame[frame["variable"]]
    for y, name in enumerate(names):
        part = whole[whole["estimator"] == name]
        mean = part[part["normaliser"] == "mean"]
        dots(axes[0], mean["sin_angle"], np.full(len(mean), y), name, alpha=0.8, markersize=3.5)
        plain = part[part["normaliser"] == "sum"].set_index("scenario")["length_cosine"].reindex(mean["scenario"])
        for i, (before, after) in enumerate(zip(plain, mean["length_cosine"], strict=True)):
            at = y + (i / max(len(mean) - 1, 1) - 0.5) * 0.62
            if np.isfinite(before):
                axes[1].plot([before, after], [at, at], color=style_of(name).colour, linewidth=0.7)
                dots(axes[1], [before], [at], name, markersize=2, alpha=0.5)
            dots(axes[1], [after], [at], name, markersize=3)
        if mean["sin_angle"].isna().all():
            axes[0].text(0.03, y, "no direction without 1/L", fontsize=small(), va="center")
    for ax in axes[:2]:
        ax.axvline(0, **TRUTH)
        ax.grid(axis="x")
        ax.set(ylim=(-0.5, len(names) - 0.5))
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set(title="1/L, direction", xlabel="sine of the angle to the sum")
    axes[1].set_yticks(range(len(names)), [])
    axes[1].set(title="1/L, length", xlabel="cos(−E g, ∇E[L]), longer →", xlim=(-1, 1))
    finite = frame[frame["normaliser"].str.startswith("token_mean of")]
    for name in [n for n in names[::-1] if finite.loc[finite["estimator"] == n, "sin_angle"].notna().any()]:
        part, look = finite[finite["estimator"] == name], style_of(name)
        batch = part["normaliser"].str.extract(r"(\d+)$")[0].astype(int)
        axes[2].plot(batch, part["sin_angle"], VIA["exact"], color=look.colour, marker=look.marker, markersize=3)
    axes[2].set(title="token mean of a batch", xlabel="responses in the batch", xscale="log", yscale="log")
    axes[2].set_ylabel("sine of the angle")
    axes[2].set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axes[2].yaxis.set_major_formatter("{x:g}")
    axes[2].minorticks_off()
    axes[2].grid()
    panels(axes)
    return figure


@styled
def shifted(frame: pd.DataFrame) -> Figure:
    """Noise of a reward's gradient with β·k1 as loss over without, one line per reward.

    Reads `reward, draw, coefficient, noise_ratio`.

    >>> frame = gl.claims.load("figures", ["07_noise"])["07_noise"]
    >>> len(gl.plots.shifted(frame).axes)
    1
    """
    figure = Figure(figsize=(COLUMN, 2.1))
    ax = figure.subplots()
    look = style_of("k1-loss")
    for kind, dash in zip(dict.fromkeys(frame["reward"]), ("-", (0, (1, 1))), strict=False):
        for _, part in frame[frame["reward"] == kind].groupby("draw"):
            ax.plot(part["coefficient"], part["noise_ratio"], linestyle=dash, color=look.colour, linewidth=0.8)
        ax.plot([], [], linestyle=dash, color=look.colour, label=f"rewards {kind}")
    ax.axhline(1, **TRUTH)
    ax.set(xscale="log", yscale="log", xlabel="coefficient β of k1 as loss", ylabel="noise / noise without it", ylim=(0.1, 40))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend(loc="upper left")
    ax.grid()
    return figure
