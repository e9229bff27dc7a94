"""Figures about rollout corrections: bias, noise, samples and step over the length, the best for a batch, bounds, and chains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from gradlab.plots.style import NEUTRAL, OTHERS, PAGE, TRUTH, Figure, panels, styled

#: A statistic below this is drawn at the edge.
FLOOR = 1e-4
LEVELS: dict[str, Any] = {
    "none": NEUTRAL, "token": OTHERS[2], "geometric": OTHERS[5], "prefix": OTHERS[3], "sequence": OTHERS[1],
}  # fmt: skip
BOUNDS: dict[str, Any] = {"truncated": "--", "masked": ":"}
#: Corrections that are drawn as lines.
SHOWN = ("none", "geometric", "token", "sequence-truncated", "sequence-masked", "sequence")


def _look(name: str) -> dict[str, Any]:
    level, _, bound = name.partition("-")
    return {"color": LEVELS.get(level, NEUTRAL), "linestyle": BOUNDS.get(bound, "-"), "marker": "o", "markersize": 2.5}


@styled
def rollout_corrections(frame: pd.DataFrame, best: pd.DataFrame, bounds: pd.DataFrame, token_kl: float = 1e-3) -> Figure:
    """Bias, noise, share of effective samples and step over the length, the error of a batch, and the surrogate's bounds; of the reward.

    Reads frames of `gl.corrections.moments`, `gl.off_policy.errors` of it (with `mismatch, token_kl, length, signal`) and
    `gl.corrections.bounds`; medians over engines with the policy's support.

    >>> names = ["19_corrections", "19_best", "19_bounds"]
    >>> frames = gl.claims.load("figures", names)
    >>> len(gl.plots.rollout_corrections(*(frames[name] for name in names)).axes)
    6
    """
    figure = Figure(figsize=(PAGE, 4.2))
    grid = figure.subplots(2, 3).flatten()

    def some(of: pd.DataFrame) -> pd.DataFrame:
        return of[(of["signal"] == "reward") & (of["mismatch"] != "nucleus") & np.isclose(of["token_kl"], token_kl)]

    own = some(frame)
    said = {"bias": "bias", "noise": "noise of a response", "share": "effective samples", "step": "step along the gradient"}
    for ax, (statistic, label) in zip(grid, said.items(), strict=False):
        for name in SHOWN:
            middle = own[own["estimator"] == name].groupby("length")[statistic].median()
            ax.plot(middle.index, middle.clip(lower=FLOOR), **_look(name))
        ax.set(xscale="log", xlabel="tokens", ylabel=label, title=f"{token_kl:g} nats per token")
        ax.grid()
    for ax in grid[:2]:
        ax.set_yscale("log")
    for ax in grid[2:4]:
        ax.set_ylim(0, 1.05)
    longest = some(best)
    longest = longest[longest["length"] == longest["length"].max()]
    for name in SHOWN:
        middle = longest[longest["estimator"] == name].groupby("batch")["rmse"].median()
        grid[4].plot(middle.index, middle, **_look(name))
    grid[4].set(
        xscale="log", yscale="log", xlabel="responses in a batch", ylabel="error of the gradient",
        title=f"{longest['length'].iloc[0]} tokens",
    )  # fmt: skip
    grid[4].yaxis.set_minor_formatter(NullFormatter())
    grid[4].grid()
    _bounds(grid[5], bounds[np.isclose(bounds["token_kl"], token_kl)])
    panels(grid)
    shown = [Line2D([], [], label=name, **_look(name)) for name in SHOWN]
    figure.legend(handles=shown, loc="outside lower center", ncols=6)
    return figure


def _bounds(ax: Axes, rows: pd.DataFrame) -> None:
    for name, dashes in (("classical", ":"), ("mixed", "--"), ("Pinsker-marginal", "-.")):
        middle = rows[rows["estimator"] == name].groupby("length")["limit"].median()
        ax.plot(middle.index, middle, dashes, color=NEUTRAL, label=name)
    gap = rows.groupby("length")["gap"].median()
    ax.plot(gap.index, gap, **{**TRUTH, "marker": "o", "markersize": 2.5, "label": "largest error"})
    ax.legend(loc="upper left", fontsize="x-small", frameon=False, handlelength=1.8)
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="error of the surrogate", title="bounds")
    ax.grid()


@styled
def chain_corrections(frame: pd.DataFrame) -> Figure:
    """Bias of every correction on chains by length, with intervals where it is sampled (open) and without where it is exact (filled).

    Reads a frame of `gl.measure` with `length` and `signal`.

    >>> frame = gl.claims.load("figures", ["19_chains"])["19_chains"]
    >>> len(gl.plots.chain_corrections(frame).axes)
    2
    """
    signals, lengths = list(dict.fromkeys(frame["signal"])), sorted(frame["length"].unique())
    names = list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 2.9))
    axes = figure.subplots(1, len(signals), squeeze=False, sharey=True)[0]
    for ax, signal in zip(axes, signals, strict=True):
        for k, length in enumerate(lengths):
            rows = frame[(frame["signal"] == signal) & (frame["length"] == length)].set_index("estimator")
            for name, row in rows.iterrows():
                place = len(names) - 1 - names.index(str(name)) + (k - 1) * -0.22
                colour = LEVELS.get(str(name).partition("-")[0], NEUTRAL)
                sampled = row["via"] == "sampled"
                if sampled and np.isfinite(row["bias_high"]):
                    ax.plot([row["bias_low"], row["bias_high"]], [place, place], color=colour, linewidth=0.8)
                fill = "white" if sampled else colour
                ax.plot(row["bias"], place, "os^D"[k % 4], color=colour, markerfacecolor=fill, markersize=3.5)
        ax.set(
            xlabel="bias",
            title=f"{signal}, {'sampled' if (frame[frame['signal'] == signal]['via'] == 'sampled').all() else 'exact'}",
        )
        ax.axvline(0, **TRUTH)
        ax.grid(axis="x")
    axes[0].set_yticks(range(len(names)), names[::-1])
    panels(axes)
    shown = [Line2D([], [], color=NEUTRAL, marker="os^D"[k % 4], linestyle="none", markersize=3.5, label=f"{length} tokens")
             for k, length in enumerate(lengths)]  # fmt: skip
    figure.legend(handles=shown, loc="outside lower center", ncols=len(lengths))
    return figure
