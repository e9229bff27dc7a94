"""Figures about the value of KL estimators, and about what it does not say of their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.plots.style import PAGE, TRUTH, VIA, Figure, dots, hue, number, panels, small, style_of, styled

_TICK: dict[str, Any] = {"marker": "|", "color": "black", "linestyle": "none", "markersize": 11, "markeredgewidth": 0.9}


@styled
def schulman(frame: pd.DataFrame) -> Figure:
    """Bias and standard deviation of each kernel's value, over the KL: one row per scenario and kernel.

    Reads `scenario, kernel, via, bias, std` and their intervals; `via` is exact, sampled or closed form.

    >>> frame = gl.claims.load("figures", ["01_schulman"])["01_schulman"]
    >>> len(gl.plots.schulman(frame).axes)
    2
    """
    scenarios, kernels = list(dict.fromkeys(frame["scenario"])), list(dict.fromkeys(frame["kernel"]))
    height = len(kernels) + 1.3
    place = {(s, k): -(i * height + j + 1) for i, s in enumerate(scenarios) for j, k in enumerate(kernels)}
    figure = Figure(figsize=(PAGE, 0.55 + 0.135 * height * len(scenarios)))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, column in zip(axes, ("bias", "std"), strict=True):
        for (scenario, kernel), y in place.items():
            rows = frame[(frame["scenario"] == scenario) & (frame["kernel"] == kernel)].set_index("via")
            if "closed form" in rows.index:
                ax.plot(rows.loc["closed form", column], y, **_TICK)
            _exact_and_sampled(ax, rows, column, y, kernel)
        for i in range(1, len(scenarios)):
            ax.axhline(-i * height + 0.15, color="#DDDDDD", linewidth=0.6)
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
    axes[0].axvline(0, **TRUTH)
    axes[0].set(xlabel="bias of the value / KL", title="bias")
    axes[1].set(xlabel="standard deviation of one sample / KL", title="noise", xscale="log")
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[0].set_yticks(list(place.values()), [kernel for _, kernel in place])
    axes[0].set_ylim(-len(scenarios) * height - 0.2, 0.55)
    for i, scenario in enumerate(scenarios):
        kl = frame.loc[frame["scenario"] == scenario, "kl"].iloc[0]
        axes[0].text(
            0.012, -i * height - 0.2, f"{scenario},  KL {kl:.3g} nats", transform=axes[0].get_yaxis_transform(), va="center",
            fontsize=small(), bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    closed = Line2D([], [], **{**_TICK, "markersize": 7}, label="closed form")
    figure.legend(handles=[*_via_handles(), closed], loc="outside upper right", ncols=3)
    panels(axes)
    return figure


def _via_handles() -> list[Line2D]:
    grey: dict[str, Any] = {"color": "#555555", "linestyle": "none", "marker": "o"}
    return [
        Line2D([], [], **grey, label="exact"),
        Line2D([], [], **grey, markerfacecolor="white", label="sampled, 95 % interval"),
    ]


def _exact_and_sampled(ax: Axes, rows: pd.DataFrame, column: str, y: float, name: str) -> None:
    """An exact point, and the sampled one with its interval a little below."""
    if "sampled" in rows.index:
        low, mid, high = (number(rows, "sampled", f"{column}{end}") for end in ("_low", "", "_high"))
        dots(ax, [mid], [y - 0.36], name, "sampled", {"xerr": [[mid - low], [high - mid]]}, markersize=3.2)
    if "exact" in rows.index:
        dots(ax, [number(rows, "exact", column)], [y], name)


@styled
def crossover(frame: pd.DataFrame) -> Figure:
    """Noise of the values against the KL: all kernels where Schulman compared them, then k3 relative to k1 elsewhere.

    Reads `panel, group, scenario, kernel, kl, std, versus_k1, crossover`; the first panel shows `std`, the others
    `versus_k1` of k3, one line per scenario, with a dot where it reaches 1.

    >>> frame = gl.claims.load("figures", ["01_crossover"])["01_crossover"]
    >>> len(gl.plots.crossover(frame).axes)
    4
    """
    names = list(dict.fromkeys(frame["panel"]))
    figure = Figure(figsize=(PAGE, 2.3))
    axes = figure.subplots(1, len(names), width_ratios=[1.2, *[1.0] * (len(names) - 1)])
    first = frame[frame["panel"] == names[0]]
    for kernel, rows in first.groupby("kernel", sort=False):
        colour, end = style_of(str(kernel)).colour, rows.iloc[-1]
        axes[0].plot(rows["kl"], rows["std"], VIA["exact"], color=colour)
        _label(axes[0], str(kernel), (end["kl"], end["std"]), (2, 0), color=colour, va="center")
    meet = first["crossover"].iloc[0]
    axes[0].axvline(meet, **{**TRUTH, "linestyle": (0, (1, 1.5))})
    _label(axes[0], f"equal at\n{meet:.3f} nats", (meet, axes[0].get_ylim()[1]), (-3, -2), ha="right", va="top")
    axes[0].set_ylabel("std of one value / KL")
    for ax, name in zip(axes[1:], names[1:], strict=True):
        _ratios(ax, frame[(frame["panel"] == name) & (frame["kernel"] == "k3")])
        ax.set_ylim(0.03, 30)
        ax.tick_params(labelleft=ax is axes[1])
    axes[1].set_ylabel("std of k3 / std of k1")
    for ax, name in zip(axes, names, strict=True):
        ax.set(title=name, xscale="log", yscale="log", xlim=(6e-4, 9))
        ax.set_xticks([0.001, 0.01, 0.1, 1])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid()
    figure.supxlabel("KL(policy ‖ reference), nats")
    panels(axes)
    return figure


def _ratios(ax: Axes, part: pd.DataFrame) -> None:
    """One line per scenario and a dot at its crossover; few groups are named at their line, many lines by a legend."""
    ax.axhline(1, color=hue("k1"), linewidth=1.3)
    _label(ax, "k1", (7e-4, 1), (0, 1.5), color=hue("k1"))
    many = part["scenario"].nunique() > 2 * part["group"].nunique()
    for i, (group, rows) in enumerate(part.groupby("group", sort=False)):
        dash = ["-", (0, (4, 1.5)), (0, (1, 1))][i % 3] if many else "-"
        for _, line in rows.groupby("scenario", sort=False):
            shown = line[line["versus_k1"] <= 40]
            ax.plot(shown["kl"], shown["versus_k1"], linestyle=dash, color=hue("k3"), linewidth=0.7 if many else 1)
            if np.isfinite(meet := line["crossover"].iloc[0]):
                ax.plot(meet, 1, "o", markersize=2.6, color="black", zorder=3)
            if not many:
                top = shown.iloc[-1]
                x, y = min(top["kl"], 6), min(top["versus_k1"], 24)
                _label(ax, str(group), (x, y), (-2.5, 0 if y > 1 else -7), ha="right", va="center")
        if many:
            ax.plot([], [], linestyle=dash, color=hue("k3"), linewidth=0.8, label=group)
    if many:
        ax.legend(loc="upper left")


def _label(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **kwargs: Any) -> None:
    """Text beside a point of the data, offset in points; it takes no room from the panels."""
    ax.annotate(
        text, at, offset, textcoords="offset points", fontsize=small(), annotation_clip=False, in_layout=False, **kwargs
    )


@styled
def gradients(frame: pd.DataFrame) -> Figure:
    """What each estimator expects, beside the truth: the KL as a value, and every component of its gradient.

    Reads `scenario, estimator, parameter, via, expected, truth`; one row of panels per scenario, one column per parameter.

    >>> frame = gl.claims.load("figures", ["01_gradients"])["01_gradients"]
    >>> len(gl.plots.gradients(frame).axes)
    6
    """
    scenarios, parameters = list(dict.fromkeys(frame["scenario"])), list(dict.fromkeys(frame["parameter"]))
    estimators = list(dict.fromkeys(frame["estimator"]))[::-1]
    figure = Figure(figsize=(PAGE, 0.55 + len(scenarios) * (0.25 + 0.17 * len(estimators))))
    grid = figure.subplots(len(scenarios), len(parameters), sharey=True, sharex="col", squeeze=False)
    for axes, scenario in zip(grid, scenarios, strict=True):
        for ax, parameter in zip(axes, parameters, strict=True):
            part = frame[(frame["scenario"] == scenario) & (frame["parameter"] == parameter)]
            ax.axvline(part["truth"].iloc[0], **TRUTH)
            for y, name in enumerate(estimators):
                _exact_and_sampled(ax, part[part["estimator"] == name].set_index("via"), "expected", y + 0.18, name)
            ax.set(title="value" if parameter == "value" else f"∂/∂{parameter}", ylim=(-0.6, len(estimators) - 0.3))
            ax.grid(axis="x")
            ax.tick_params(axis="y", length=0)
            ax.margins(x=0.08)
        axes[0].set_ylabel(scenario, fontweight="bold")
    grid[0, 0].set_yticks(range(len(estimators)), estimators)
    for ax, parameter in zip(grid[-1], parameters, strict=True):
        ax.set_xlabel("nats" if parameter == "value" else f"nats per unit of {parameter}")
    figure.legend(handles=[*_via_handles(), Line2D([], [], **TRUTH, label="truth")], loc="outside upper right", ncols=3)
    panels(grid.flat)
    return figure
