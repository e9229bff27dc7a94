"""Figures about the small language models that ship with the package: estimators with their intervals, and which side weighs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gradlab.plots.style import PAGE, TRUTH, dots, handle, panels, style_of, styled

#: Lower edge of a logarithmic axis of biases, where 0 is drawn.
FLOOR = 0.003


@styled
def language_models(frame: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Bias, cosine and noise of estimators on several language models: exact filled, sampled open with 95 % intervals.

    Reads `world, scenario, estimator, via` and `bias, cosine, noise` with their ends, of one target; one row of panels per world,
    the scenarios of a world from top to bottom within each estimator's line. A bias of 0 is drawn at the left edge.
    """
    worlds = list(dict.fromkeys(frame["world"]))
    directed = frame[frame["estimator"].isin(names)].dropna(subset=["cosine"])
    lowest = min(float(directed[["cosine", "cosine_low"]].min().min()), 0.99)
    figure = Figure(figsize=(PAGE, 0.9 + 2.5 * len(worlds)))
    grid = figure.subplots(len(worlds), 3, sharex="col", sharey=True, squeeze=False)
    for line, world in zip(grid, worlds, strict=True):
        part = frame[frame["world"] == world]
        places = list(dict.fromkeys(zip(part["scenario"], part["via"], strict=True)))
        for y, name in enumerate(names[::-1]):
            for k, (scenario, via) in enumerate(places):
                rows = part[(part["estimator"] == name) & (part["scenario"] == scenario) & (part["via"] == via)]
                height = y + 0.7 * ((len(places) - 1) / 2 - k) / len(places)
                for ax, column in zip(line, ("bias", "cosine", "noise"), strict=True):
                    known = rows.dropna(subset=[column])
                    low, high = (known[f"{column}_{end}"].fillna(known[column]) for end in ("low", "high"))
                    if column == "bias":
                        known = known.assign(bias=known["bias"].clip(lower=FLOOR))
                        low, high = low.clip(lower=FLOOR), high.clip(lower=FLOOR)
                    centre = known[column].to_numpy()
                    reach = np.abs(np.stack([centre - low, high - centre]))
                    dots(ax, centre, np.full(len(known), height), name, via, {"xerr": reach}, markersize=2.6)
        for y in range(len(names) - 1):
            for ax in line:
                ax.axhline(y + 0.5, color="0.85", linewidth=0.4)
        line[0].set(xscale="log", xlim=(FLOOR, 10), title=f"{world}: bias")
        line[0].set_xticks([FLOOR, 0.01, 0.1, 1, 10], ["0", "0.01", "0.1", "1", "10"])
        line[0].minorticks_off()
        line[0].set_yticks(range(len(names)), names[::-1])
        line[0].tick_params(axis="y", length=0)
        line[0].set_ylim(-0.6, len(names) - 0.4)
        line[1].set(xlim=(lowest - 0.08 * (1 - lowest), 1 + 0.08 * (1 - lowest)), title="direction")
        line[1].axvline(1, **{**TRUTH, "linewidth": 0.6})
        line[2].set(xscale="log", title="noise")
    for ax, label in zip(grid[-1], ("relative bias", "cosine with ∇KL", "tr Cov / ‖∇KL‖²"), strict=True):
        ax.set_xlabel(label)
    panels(grid.flat)
    return figure


@styled
def side_shares(frame: pd.DataFrame) -> Figure:
    """What under-sampled tokens bring at each stage of training, one panel per quantity, one line per world and estimator.

    Reads `world, kl, estimator, under_mass, under_pull, under_second`.
    """
    figure = Figure(figsize=(PAGE, 2.3))
    columns = {"under_mass": "mean |coefficient|", "under_pull": "expected gradient, |parts|", "under_second": "second moment"}
    axes = figure.subplots(1, len(columns), sharey=True)
    names, worlds = list(dict.fromkeys(frame["estimator"])), list(dict.fromkeys(frame["world"]))
    lines = dict(zip(worlds, ("-", "--", ":"), strict=False))
    for ax, (column, title) in zip(axes, columns.items(), strict=True):
        for world in worlds:
            for name in names:
                part = frame[(frame["world"] == world) & (frame["estimator"] == name)].sort_values("kl")
                look = style_of(name)
                ax.plot(part["kl"], part[column], lines[world], color=look.colour, marker=look.marker, markersize=3)
        ax.axhline(0.5, **{**TRUTH, "linewidth": 0.6})
        ax.set(xscale="log", ylim=(0, 1), title=title, xlabel="KL of a response, nats")
        ax.grid()
    axes[0].set_ylabel("share of under-sampled tokens")
    handles = [handle(name, linestyle="none") for name in names]
    handles += [Line2D([], [], color="0.3", linestyle=style, label=world) for world, style in lines.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    panels(axes)
    return figure
