"""Figures about the small language models that ship with the package: estimators with their intervals, and which side weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.plots.off_policy import field_look
from gradlab.plots.style import PAGE, TRUTH, VIA, Figure, Style, dots, handle, panels, style_of, styled

#: Lower edge of a logarithmic axis of biases, where 0 is drawn.
FLOOR = 0.003


@styled
def language_models(frame: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Bias, cosine and noise of estimators on several language models: exact filled, sampled open with 95 % intervals.

    Reads `world, scenario, estimator, via` and `bias, cosine, noise` with their ends, of one target; one row of panels per world,
    the scenarios of a world from top to bottom within each estimator's line. A bias of 0 is drawn at the left edge.

    >>> frame = gl.claims.load("figures", ["10_catalogue"])["10_catalogue"]
    >>> len(gl.plots.language_models(frame[frame["target"] == "reverse_kl"], ["k2-loss", "k3-loss"]).axes)
    6
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

    >>> frame = gl.claims.load("figures", ["10_sides"])["10_sides"]
    >>> len(gl.plots.side_shares(frame).axes)
    3
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


@styled
def engine_noise(engines: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    """Noise of unbiased compositions with data from another engine: over that of the best one, and against the length.

    Reads of `engines` `estimator, behaviour, noise_ratio` (a marker per engine), and of `growth` `estimator, behaviour, length, via,
    noise` with its ends (a panel per engine; open with 95 % intervals where sampled, less than 0.1 at the lower edge); of both the
    fields of the estimators.

    >>> frames = gl.claims.load("figures", ["10_engines", "10_growth"])
    >>> rivals = frames["10_engines"].query("unbiased and off_policy and full_support and target == 'reverse_kl' and noise_ratio > 1")
    >>> len(gl.plots.engine_noise(rivals, frames["10_growth"]).axes)
    4
    """
    names = list(engines.groupby("estimator")["noise_ratio"].max().sort_values().index)
    figure = Figure(figsize=(PAGE, 3.3 + 0.17 * len(names)))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[0.7 + 0.17 * len(names), 2.6]).flat
    ax = above.subplots()
    markers = dict(zip(dict.fromkeys(engines["behaviour"]), "oD^vs", strict=False))
    for y, name in enumerate(names):
        rows = engines[engines["estimator"] == name]
        for kind, ratio in zip(rows["behaviour"], rows["noise_ratio"], strict=True):
            ax.plot([ratio], [y], linestyle="none", marker=markers[kind], markersize=4, color=field_look(rows).colour,
                    markeredgecolor="white", markeredgewidth=0.3)  # fmt: skip
    ax.axvline(1, **TRUTH)
    ax.set(xscale="log", ylim=(-0.7, len(names) - 0.3), title="noise over that of complete Rao–Blackwell with prefix weights")
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    handles = [Line2D([], [], color="0.3", linestyle="none", marker=mark, markersize=4, label=k) for k, mark in markers.items()]
    ax.legend(handles=handles, loc="lower right")
    kinds, looks, floor = list(dict.fromkeys(growth["behaviour"])), {}, 0.1
    lines = below.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for line, kind in zip(lines, kinds, strict=True):
        for k, name in enumerate(dict.fromkeys(growth["estimator"])):
            rows = growth[(growth["behaviour"] == kind) & (growth["estimator"] == name)].sort_values("length")
            looks[name] = field_look(rows)
            # What is sampled stands a little beside its length, so that intervals do not cover each other.
            beside = rows["length"] * np.where(rows["via"] == "sampled", 1.05 ** (k - 2.5), 1)
            _grown(line, rows.assign(length=beside), looks[name], floor)
        lengths = sorted(set(growth["length"]))
        line.set(xscale="log", yscale="log", title=kind, xlabel="letters of a name, at most")
        line.set_xticks(lengths, [f"{n}" for n in lengths])
        line.minorticks_off()
        line.grid()
    known = growth[["noise", "noise_high"]].replace(np.inf, np.nan)  # intervals that are open have no end to show
    lines[0].set(ylim=(floor, 2 * known.max().max()), ylabel="tr Cov / ‖∇KL‖²")
    entries = [Line2D([], [], color=k.colour, marker=k.marker, markersize=3.5, label=name) for name, k in looks.items()]
    below.legend(handles=entries, loc="outside lower center", ncols=2)
    panels([ax, *lines])
    return figure


def _grown(ax: Axes, rows: pd.DataFrame, look: Style, floor: float) -> None:
    """Noise of one estimator over the length: a line through the exact values, and on to the sampled ones with their intervals."""
    x, noise, drawn = rows["length"], rows["noise"].clip(lower=floor), rows["via"] == "sampled"
    common: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markersize": 3}
    ax.plot(x[~drawn], noise[~drawn], VIA["exact"], clip_on=False, **common)
    tail = drawn | (x == x[~drawn].max())
    ax.plot(x[tail], noise[tail], VIA["sampled"], color=look.colour, linewidth=0.8)
    reach = np.abs(rows.loc[drawn, ["noise_low", "noise_high"]].to_numpy().T - noise[drawn].to_numpy())
    reach[~np.isfinite(reach)] = np.nan
    hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 0.8, "linestyle": "none", "elinewidth": 0.8}
    ax.errorbar(x[drawn], noise[drawn], yerr=reach, **common, **hollow)
