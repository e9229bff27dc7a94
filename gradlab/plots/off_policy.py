"""Figures about data from another policy: bias and noise over the lag, truncation, all compositions, growth, and what to take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from gradlab.estimators import Estimator
from gradlab.plots.style import PAGE, TRUTH, VIA, Style, look_of, panels, styled

#: How an importance weight is written in a cell.
CODES = {"none": "–", "token": "T", "prefix": "P", "sequence": "S"}
LAG = "lag KL(μ‖π), nats"
#: A relative bias below this is rounding.
ZERO = 1e-10


def _look(rows: pd.DataFrame) -> Style:
    """The style of the estimator whose fields the rows carry."""
    row = rows.iloc[0]
    clip = None if pd.isna(row.get("clip")) else float(row["clip"])
    flag = bool(row["differentiate_weight"])
    return look_of(Estimator(row["kernel"], row["placement"], row["credit"], row["weight"], flag, clip=clip))


def _logarithmic(ax: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis of lags, with every other value as tick."""
    ticks = sorted(set(values))
    ax.set_xscale("log")
    ax.set_xticks(ticks[::2] if len(ticks) > 5 else ticks, [f"{x:g}" for x in (ticks[::2] if len(ticks) > 5 else ticks)])
    ax.minorticks_off()
    ax.grid()


@styled
def lags(frame: pd.DataFrame, groups: Sequence[tuple[str, Sequence[str]]]) -> Figure:
    """Bias (above) and noise (below) over the lag: median of the draws and their range, one column per group of estimators.

    Reads `estimator, nominal, bias, noise` and the fields of the estimators; a bias of 0 is drawn on the lower edge.
    """
    figure = Figure(figsize=(PAGE, 4.1))
    grid = figure.subplots(2, len(groups), sharey="row", sharex=True)
    floor = 3e-3
    for column, (title, names) in enumerate(groups):
        handles = []
        for name in names:
            rows = frame[frame["estimator"] == name]
            look = _look(rows)
            for ax, statistic in zip(grid[:, column], ("bias", "noise"), strict=True):
                grouped = rows.groupby("nominal")[statistic]
                middle, low, high = (part.clip(lower=floor) for part in (grouped.median(), grouped.min(), grouped.max()))
                ax.fill_between(middle.index, low, high, color=look.colour, alpha=0.12, linewidth=0)
                ax.plot(middle.index, middle, VIA["exact"], color=look.colour, marker=look.marker, markersize=3, clip_on=False)
            label = name.replace(", ", ",\n", 1).replace(" weight", "") if len(name) > 16 else name
            handles.append(Line2D([], [], color=look.colour, marker=look.marker, markersize=3.5, label=label))
        grid[0, column].set_title(title)
        grid[1, column].set_xlabel(LAG)
        grid[1, column].legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.3), handlelength=1.4, labelspacing=0.35)
    for ax in grid.flat:
        ax.set_yscale("log")
        _logarithmic(ax, frame["nominal"])
    grid[0, 0].set(ylabel="relative bias against ∇KL", ylim=(floor, 4))
    grid[0, 0].set_yticks([floor, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    grid[0, 0].minorticks_off()
    grid[1, 0].set(ylabel="noise, tr Cov / ‖∇KL‖²", ylim=(1, 3e4))
    panels(grid.flat)
    return figure


@styled
def truncation(frame: pd.DataFrame, bases: Sequence[str], shown: Sequence[float] = (2, 5, 10)) -> Figure:
    """What a bound on the weights costs and buys: bias (above) and noise (below) over the lag, one column per estimator.

    Reads `estimator, truncate, nominal, bias, noise` and the fields; darker is a smaller bound, black dots no bound.
    """
    figure = Figure(figsize=(PAGE, 3.3))
    grid = figure.subplots(2, len(bases), sharey="row", sharex=True)
    floor = 1e-3
    for column, base in enumerate(bases):
        look = _look(frame[frame["estimator"] == base])
        for i, bound in enumerate([*shown, None]):
            rows = frame[frame["estimator"] == (base if bound is None else f"{base} ≤ {bound:g}")]
            share = 0.55 * i / len(shown)
            colour = "black" if bound is None else tuple((1 - share) * c + share for c in to_rgb(look.colour))
            for ax, statistic in zip(grid[:, column], ("bias", "noise"), strict=True):
                grouped = rows.groupby("nominal")[statistic]
                middle = grouped.median().clip(lower=floor)
                if bound is not None:
                    ax.fill_between(middle.index, grouped.min().clip(lower=floor), grouped.max().clip(lower=floor),
                                    color=colour, alpha=0.15, linewidth=0)  # fmt: skip
                dash: Any = (0, (1, 1.2)) if bound is None else VIA["exact"]
                marker = "" if bound is None else f"${bound:g}$"
                ax.plot(middle.index, middle, linestyle=dash, color=colour, marker=marker, markersize=4.5, clip_on=False)
        grid[0, column].set_title(base.replace(", ", ",\n", 1))
        grid[1, column].set_xlabel(LAG)
    for ax in grid.flat:
        ax.set_yscale("log")
        _logarithmic(ax, frame["nominal"])
    grid[0, 0].set(ylabel="relative bias", ylim=(floor, 2))
    grid[0, 0].set_yticks([floor, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    grid[0, 0].minorticks_off()
    grid[1, 0].set(ylabel="noise, tr Cov / ‖∇KL‖²", ylim=(1, 3e4))
    handles = [Line2D([], [], color="#777777", marker=f"${c:g}$", markersize=5, label=f"min(W, {c:g})") for c in shown]
    handles.append(Line2D([], [], color="black", linestyle=(0, (1, 1.2)), label="no bound: unbiased"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    for letter, ax in zip("abcdefgh", grid.flat, strict=False):
        ax.text(-0.02, 1.02, letter, transform=ax.transAxes, fontweight="bold", ha="right", va="bottom")
    return figure


@styled
def compositions(frame: pd.DataFrame, noises: Sequence[str]) -> Figure:
    """How many compositions descend which objective, by weight; and the noise of those unbiased for the reverse KL.

    Reads `estimator, same_as, unbiased, weight, bias_<goal>` and the columns `noises`, one per policy. Compositions that are the
    same response by response share a row, under the name of the first; `× n` says how many there are.
    """
    kept = frame[frame["unbiased"]]
    order = kept.drop_duplicates("same_as").sort_values(noises[0], ascending=False)
    figure = Figure(figsize=(PAGE, 0.95 + 0.16 * len(order)))
    left, ax = figure.subplots(1, 2, width_ratios=[1, 0.95])
    _counts(left, frame)
    counts = kept["same_as"].value_counts()
    for y, (_, row) in enumerate(order.iterrows()):
        look = _look(order[order["estimator"] == row["estimator"]])
        ax.plot(
            [row[n] for n in noises], [y] * len(noises), color=look.colour, marker=look.marker, linestyle="none", alpha=0.85
        )
    labels = [f"{_short(name)}  × {counts[name]}" for name in order["same_as"]]
    ax.set_yticks(range(len(order)), labels)
    ax.tick_params(axis="y", length=0)
    ax.set(xscale="log", xlabel="noise of one response, tr Cov / ‖∇KL‖²", ylim=(-0.6, len(order) - 0.4))
    ax.set_title("unbiased for ∇KL of responses")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(axis="x")
    panels([left, ax])
    return figure


def _short(name: str) -> str:
    parts = {"-differentiate_weight=True": ", diff.", "-baseline=leave_one_out-group=4": ", leave-one-out"}
    for old, new in (parts | {"-baseline=kl": ", −KL_t", "-weight": " W", "_": " "}).items():
        name = name.replace(old, new)
    return name


def _counts(ax: Axes, frame: pd.DataFrame) -> None:
    """A table of counts: objective by weight."""
    goals = [c for c in frame.columns if c.startswith("bias_")]
    for x, weight in enumerate(CODES):
        part = frame[frame["weight"] == weight]
        for y, goal in enumerate(goals):
            count = int((part[goal] < ZERO).sum())
            ax.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color="#DCE9F2" if count else "#F6F6F6", linewidth=0))
            ax.text(x, y, str(count), ha="center", va="center", fontsize=7, color="black" if count else "#999999")
    names = {"frozen prefix": "prefixes of μ", "policy prefix": "prefixes of π"}
    labels = []
    for goal in goals:
        kind, _, rest = goal.removeprefix("bias_").partition("_kl")
        labels.append(f"{kind} KL" + (f", {names[rest.strip('_').replace('_', ' ')]}" if rest else " of responses"))
    ax.set_yticks(range(len(goals)), labels)
    ax.set_xticks(range(len(CODES)), [f"{w}\nof {int((frame['weight'] == w).sum())}" for w in CODES])
    ax.set(xlim=(-0.5, len(CODES) - 0.5), ylim=(len(goals) - 0.5, -0.5), title="compositions unbiased for …")
    ax.set_xlabel("importance weight")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


@styled
def worth(frame: pd.DataFrame) -> Figure:
    """Noise of unbiased estimators over the length and over the lag, and the effective sample size of the weights.

    Reads `sweep, x, lag, estimator, noise, sequence, prefix` and the fields; medians of the draws. Black: `exp(−2 lag)`.
    """
    sweeps, names = list(dict.fromkeys(frame["sweep"])), list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 2.9))
    axes = figure.subplots(1, len(sweeps) + 1)
    for ax, sweep in zip(axes, sweeps, strict=False):
        for name in names:
            rows = frame[(frame["sweep"] == sweep) & (frame["estimator"] == name)]
            middle, look = rows.groupby("x")["noise"].median(), _look(rows)
            ax.plot(middle.index, middle, VIA["exact"], color=look.colour, marker=look.marker, markersize=3)
        title = sweep.partition(", ")[2] or f"{sweep} of a response"
        ax.set(yscale="log", ylim=(1, 2e4), title=title, xlabel=LAG if sweep == "lag" else "length, tokens")
        _logarithmic(ax, frame.loc[frame["sweep"] == sweep, "x"])
        ax.tick_params(labelleft=ax is axes[0])
    axes[0].set_ylabel("noise, tr Cov / ‖∇KL‖²")
    last, rows = axes[-1], frame[frame["sweep"] == sweeps[-1]].drop_duplicates(["x", "draw"])
    grid = np.geomspace(rows["lag"].min(), rows["lag"].max(), 60)
    last.plot(grid, np.exp(-2 * grid), **TRUTH)
    last.annotate("exp(−2 lag)", (grid[-1], np.exp(-2 * grid[-1])), (-6, 3), textcoords="offset points", fontsize=7, ha="right")
    for column, marker in (("sequence", "h"), ("prefix", "d")):
        middle = rows.groupby("x")[column].median()
        last.plot(middle.index, middle, "--", color="#666666", linewidth=0.8, marker=marker, label=f"{column} weight")
    last.set(ylim=(0, 1.02), title="effective sample size", xlabel=LAG, ylabel="share of the batch")
    last.legend(loc="lower left")
    _logarithmic(last, rows["x"])
    handles = []
    for name in names:
        look = _look(frame[frame["estimator"] == name])
        handles.append(Line2D([], [], color=look.colour, marker=look.marker, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    panels(axes)
    return figure


@styled
def winners(frame: pd.DataFrame) -> Figure:
    """The estimator of least error for every lag and batch: colour is kernel and placement, the letter its weight.

    Reads `panel, nominal, batch, rmse, truncate` and the fields of the winner; below the letter stands the relative error. Where
    it exceeds 1 the best estimate is worse than none, and the cell is pale.
    """
    names = list(dict.fromkeys(frame["panel"]))
    columns = min(2, len(names))
    figure = Figure(figsize=(PAGE, 0.6 + 2.35 * -(-len(names) // columns)))
    grid = figure.subplots(-(-len(names) // columns), columns, squeeze=False)
    used: dict[str, Style] = {}
    for ax, name in zip(grid.flat, names, strict=True):
        part = frame[frame["panel"] == name]
        lag_values, batches = sorted(set(part["nominal"])), sorted(set(part["batch"]))
        for i in range(len(part)):
            row = part.iloc[i : i + 1]
            _cell(ax, lag_values.index(row["nominal"].iloc[0]), batches.index(row["batch"].iloc[0]), row, used)
        ax.set_xticks(range(len(lag_values)), [f"{x:g}" for x in lag_values])
        ax.set_yticks(range(len(batches)), [f"{n:,}" for n in batches])
        ax.set(xlim=(-0.5, len(lag_values) - 0.5), ylim=(-0.5, len(batches) - 0.5), title=name)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    for ax in grid[-1]:
        ax.set_xlabel(LAG)
    for ax in grid[:, 0]:
        ax.set_ylabel("responses in a batch")
    handles = [Patch(facecolor=look.colour, alpha=0.75, label=label) for label, look in used.items()]
    handles += [Patch(facecolor="none", edgecolor="none", label="– T P S: no, token, prefix, sequence weight; ≤ bound")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.0, columnspacing=0.9)
    panels(grid.flat)
    return figure


def _cell(ax: Axes, x: int, y: int, row: pd.DataFrame, used: dict[str, Style]) -> None:
    fields = row.iloc[0]
    label = f"{fields['kernel']} {fields['placement']}"
    look = used.setdefault(label, _look(row))
    error = float(fields["rmse"])
    ax.add_patch(Rectangle((x - 0.49, y - 0.47), 0.98, 0.94, color=look.colour, alpha=0.75 if error < 1 else 0.2, linewidth=0))
    bound = fields["truncate"]
    code = CODES[str(fields["weight"])] + ("" if pd.isna(bound) else f"≤{bound:g}")
    shade = np.dot(to_rgb(look.colour), [0.3, 0.59, 0.11]) * 0.75 + 0.25
    ink = "black" if shade > 0.55 or error >= 1 else "white"
    ax.text(x, y + 0.2, code, ha="center", va="center", fontsize=7, fontweight="bold", color=ink)
    ax.text(x, y - 0.22, f"{error:.2g}", ha="center", va="center", fontsize=7, color=ink)
