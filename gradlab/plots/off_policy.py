"""Figures about data from another policy: bias and noise over the lag, truncation, all compositions, growth, and what to take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

from gradlab.estimators.estimator import Estimator
from gradlab.plots.style import PAGE, TRUTH, VIA, Figure, Style, look_of, panels, small, styled

#: How an importance weight is written in a cell.
CODES = {"none": "–", "token": "T", "prefix": "P", "sequence": "S"}
LAG = "lag KL(μ‖π), nats"
#: A relative bias below this is rounding.
ZERO = 1e-10


def field_look(rows: pd.DataFrame) -> Style:
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


def _short(name: str) -> str:
    """A name without what its panel already says."""
    base, _, rest = name.partition(", ")
    words = [
        word for word in rest.replace("differentiated", "diff.").replace(",", "").split() if word not in (*CODES, "weight")
    ]
    return ", ".join([base, *([" ".join(words)] if words else [])])


def _bands(axes: Iterable[Axes], rows: pd.DataFrame, floor: float, colour: Any, **kwargs: Any) -> None:
    """Median over the draws and their range, of the bias in the first panel and of the noise in the second."""
    for ax, statistic in zip(axes, ("bias", "noise"), strict=True):
        groups = rows.groupby("nominal")[statistic]
        middle, low, high = (part.clip(lower=floor) for part in (groups.median(), groups.min(), groups.max()))
        ax.fill_between(middle.index, low, high, color=colour, alpha=0.12, linewidth=0)
        ax.plot(middle.index, middle, color=colour, clip_on=False, **kwargs)


def _finish(grid: Any, frame: pd.DataFrame, floor: float, noise: tuple[float, float]) -> None:
    """Axes of a row of biases, whose lower edge is 0, above a row of noises."""
    for ax in grid.flat:
        ax.set_yscale("log")
        _logarithmic(ax, frame["nominal"])
    grid[0, 0].set(ylabel="relative bias", ylim=(floor, 4))
    grid[0, 0].set_yticks([floor, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    grid[0, 0].minorticks_off()
    grid[1, 0].set(ylabel="tr Cov / ‖∇KL‖²", ylim=noise)
    for ax in grid[1]:
        ax.set_xlabel(LAG)
    panels(grid.flat)


@styled
def lags(frame: pd.DataFrame, groups: Sequence[tuple[str, Sequence[str]]]) -> Figure:
    """Bias (above) and noise (below) over the lag: median of the draws and their range, one column per group of estimators.

    Reads `estimator, nominal, bias, noise` and the fields of the estimators; a bias of 0 is drawn at the lower edge, several of
    them a little above each other.

    >>> frame = gl.claims.load("figures", ["08_lag"])["08_lag"]
    >>> len(gl.plots.lags(frame, [("no weight", ["k2-loss", "k3-loss"]), ("token weight", ["k2-loss, token weight"])]).axes)
    4
    """
    figure = Figure(figsize=(PAGE, 4.9))
    grid = figure.subplots(2, len(groups), sharey="row", sharex=True)
    floor = 2e-3
    for column, (title, names) in enumerate(groups):
        handles, zeros = [], 0
        for name in names:
            rows = frame[frame["estimator"] == name]
            look = field_look(rows)
            zero = bool((rows["bias"] < ZERO).all())
            at = {"linestyle": VIA["exact"], "marker": look.marker, "markersize": 3}
            _bands(grid[:, column], rows, floor * 1.35**zeros if zero else floor, look.colour, **at)
            zeros += zero
            handles.append(Line2D([], [], color=look.colour, marker=look.marker, markersize=3.5, label=_short(name)))
        grid[0, column].set_title(title)
        grid[1, column].legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.1, -0.27), handlelength=1.4)
    _finish(grid, frame, floor, (1, 3e4))
    return figure


@styled
def truncation(frame: pd.DataFrame, bases: Sequence[str], shown: Sequence[float] = (2, 5, 10)) -> Figure:
    """What a bound on the weights costs and buys: bias (above) and noise (below) over the lag, one column per estimator.

    Reads `estimator, nominal, bias, noise` and the fields; darker is a smaller bound, given at the end of its line; dots
    are without a bound.

    >>> frame = gl.claims.load("figures", ["08_truncation"])["08_truncation"]
    >>> len(gl.plots.truncation(frame, ["full-both, prefix weight", "k2-loss, token weight"]).axes)
    4
    """
    figure = Figure(figsize=(PAGE, 3.4))
    grid = figure.subplots(2, len(bases), sharey="row", sharex=True)
    floor = 1e-3
    for column, base in enumerate(bases):
        rows = frame[frame["estimator"] == base]
        middle = rows.groupby("nominal")[["bias", "noise"]].median().clip(lower=floor)
        for i, bound in enumerate(shown):
            part = frame[frame["estimator"] == f"{base} ≤ {bound:g}"]
            share = 0.6 * (1 - i / max(len(shown) - 1, 1))
            colour = tuple((1 - share) * c for c in to_rgb(field_look(rows).colour))
            _bands(grid[:, column], part, floor, colour, linestyle=VIA["exact"])
            end = part.groupby("nominal")["noise"].median()
            grid[1, column].annotate(
                f"{bound:g}", (end.index[-1], end.iloc[-1]), (3, 3 * (i - 1)), textcoords="offset points", fontsize=small(),
                va="center", color=colour, annotation_clip=False,
            )  # fmt: skip
        for ax, statistic in zip(grid[:, column], ("bias", "noise"), strict=True):
            ax.plot(middle.index, middle[statistic], linestyle=(0, (1, 1.2)), color="black", clip_on=False)
        grid[0, column].set_title(base.replace(", ", "\n", 1).replace("differentiated", "diff."))
    handles = [
        Line2D([], [], color="#555555", label="weight min(W, C): darker is a smaller C, given at the end of the line"),
        Line2D([], [], color="black", linestyle=(0, (1, 1.2)), label="no bound"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    _finish(grid, frame, floor, (1, 3e4))
    return figure


@styled
def worth(frame: pd.DataFrame) -> Figure:
    """Noise of unbiased estimators over the length and over the lag, and the effective sample size of the weights.

    Reads `sweep, x, lag, estimator, noise, sequence, prefix` and the fields; medians of the draws. Black: `exp(−2 lag)`.

    >>> frame = gl.claims.load("figures", ["08_growth"])["08_growth"]
    >>> len(gl.plots.worth(frame).axes)
    4
    """
    sweeps, names = list(dict.fromkeys(frame["sweep"])), list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 2.9))
    axes = figure.subplots(1, len(sweeps) + 1)
    for ax, sweep in zip(axes, sweeps, strict=False):
        for name in names:
            rows = frame[(frame["sweep"] == sweep) & (frame["estimator"] == name)]
            middle, look = rows.groupby("x")["noise"].median(), field_look(rows)
            ax.plot(middle.index, middle, VIA["exact"], color=look.colour, marker=look.marker, markersize=3)
        title = sweep.partition(", ")[2] or f"{sweep} of a response"
        ax.set(yscale="log", ylim=(0.5, 1e3), title=title, xlabel=LAG if sweep == "lag" else "length, tokens")
        _logarithmic(ax, frame.loc[frame["sweep"] == sweep, "x"])
        ax.tick_params(labelleft=ax is axes[0])
    axes[0].set_ylabel("noise, tr Cov / ‖∇KL‖²")
    last, rows = axes[-1], frame[frame["sweep"] == sweeps[-1]].drop_duplicates(["x", "draw"])
    grid = np.geomspace(rows["lag"].min(), rows["lag"].max(), 60)
    last.plot(grid, np.exp(-2 * grid), **TRUTH, label="exp(−2 lag)")
    for column, marker in (("sequence", "h"), ("prefix", "d")):
        middle = rows.groupby("x")[column].median()
        last.plot(middle.index, middle, "--", color="#666666", linewidth=0.8, marker=marker, label=f"{column} weight")
    last.set(ylim=(0, 1.02), title="effective sample size", xlabel=LAG, ylabel="share of the batch")
    last.legend(loc="lower left")
    _logarithmic(last, rows["x"])
    handles = []
    for name in names:
        look = field_look(frame[frame["estimator"] == name])
        handles.append(Line2D([], [], color=look.colour, marker=look.marker, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    panels(axes)
    return figure
