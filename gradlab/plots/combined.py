"""Figures about a KL regulariser in a whole loss: what it weighs beside the reward, and what a clip leaves of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.plots.style import NEUTRAL, PAGE, TRUTH, Figure, Style, hue, panels, style_of, styled

#: A relative error below this is rounding.
ZERO = 1e-3


def _look(name: str) -> tuple[Style, Any]:
    """Colour by kernel, marker and line style by where the regulariser stands."""
    if name == "none":  # upon a regulariser whose expected gradient is 0
        return Style(NEUTRAL, "x"), ":"
    kernel, _, place = name.partition(" ")
    marker = {"before the std": "^", "before, no std": "v", "after the std": "s", "in a head": "D", "beside": "o"}.get(
        place, "P"
    )
    line = {"before the std": "-", "before, no std": ":", "after the std": "--", "in a head": "-."}.get(place, "-")
    return Style(hue(kernel) if kernel in ("k1", "k2", "k3") else style_of(name).colour, marker), line


def line(ax: Axes, x: pd.Series, y: pd.Series, name: str, **kwargs: Any) -> None:
    """A line of a loss, named by its regulariser and where it stands."""
    look, dashes = _look(name)
    shown = {"linestyle": dashes, "marker": look.marker, "markersize": 3.5, "linewidth": 1.2, "label": name}
    ax.plot(x, y, color=look.colour, **{**shown, **kwargs})


def legend(figure: Figure, names: list[str]) -> None:
    """Entries of losses, below the panels."""
    handles = []
    for name in names:
        look, line = _look(name)
        handles.append(Line2D([], [], color=look.colour, marker=look.marker, linestyle=line, markersize=3.5, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


@styled
def kl_weights(frame: pd.DataFrame, success: float = 0.1) -> Figure:
    """Effective coefficient over β by success probability, the same beside the reward over β, and the size of the KL's gradient.

    Reads a frame of `gl.combined.contributions`: `success, estimator, coefficient, share, per_reward, size`; medians over scenarios.

    >>> frame = gl.claims.load("figures", ["14_weight"])["14_weight"]
    >>> len(gl.plots.kl_weights(frame).axes)
    3
    """
    frame = frame.assign(success=frame["success"].round(6))
    middle = (
        frame.groupby(["estimator", "coefficient", "success"], sort=False)[["share", "per_reward", "size"]]
        .median()
        .reset_index()
    )
    names, betas = list(dict.fromkeys(frame["estimator"])), sorted(frame["coefficient"].unique())
    figure = Figure(figsize=(PAGE, 2.7))
    shares, beside, sizes = figure.subplots(1, 3)
    for name in names:
        own = middle[middle["estimator"] == name]
        part = own[np.isclose(own["coefficient"], betas[len(betas) // 2])].sort_values("success")
        line(shares, part["success"], part["share"], name)
        part = own[np.isclose(own["success"], success)].sort_values("coefficient")
        line(beside, part["coefficient"], part["per_reward"], name)
    beside.plot(betas, betas, **{**TRUTH, "color": NEUTRAL, "linestyle": ":"})
    chosen = [betas[0], betas[len(betas) // 2], betas[-1]]
    for beta, dashes in zip(chosen, (":", "--", "-"), strict=True):
        part = middle[(middle["estimator"] == "k2 beside") & np.isclose(middle["coefficient"], beta)].sort_values("success")
        sizes.plot(part["success"], part["size"], dashes, color=hue("k2"), marker="o", markersize=3)
        sizes.annotate(f"β = {beta:g}", (part["success"].iloc[0], part["size"].iloc[0]), (6, 1), textcoords="offset points")
    for ax in (shares, beside, sizes):
        ax.set_yscale("log")
        ax.grid()
    for ax in (shares, sizes):
        ax.set_xscale("logit")
        ax.set_xticks([0.001, 0.01, 0.1, 0.5, 0.9, 0.99], [".001", ".01", ".1", ".5", ".9", ".99"])
        ax.minorticks_off()
        ax.set_xlabel("success probability p")
    beside.set(xscale="log", xlabel="β", ylabel="effective β / weight of the reward", title=f"p = {success:g}")
    shares.set(ylabel="effective β / β", title=f"β = {betas[len(betas) // 2]:g}")
    sizes.set(ylabel="‖KL gradient‖ / ‖reward gradient‖", title="k2 beside")
    panels((shares, beside, sizes))
    legend(figure, names)
    return figure


@styled
def clipped_kl(frame: pd.DataFrame) -> Figure:
    """Share of β that is left and error of the KL's contribution over the lag, for bandits and trees: median and quartiles.

    Reads `family, nominal, estimator, share, bias`.

    >>> frame = gl.claims.load("figures", ["14_lag"])["14_lag"]
    >>> len(gl.plots.clipped_kl(frame).axes)
    4
    """
    names, families = list(dict.fromkeys(frame["estimator"])), list(dict.fromkeys(frame["family"]))
    figure = Figure(figsize=(PAGE, 2.6))
    grid = figure.subplots(1, 2 * len(families))
    for ax, (statistic, family) in zip(grid, [(s, f) for s in ("share", "bias") for f in families], strict=True):
        for name in names:
            rows = frame[(frame["family"] == family) & (frame["estimator"] == name)]
            groups = rows.groupby("nominal")[statistic]
            low, middle, high = groups.quantile(0.25), groups.median(), groups.quantile(0.75)
            if statistic == "bias" and float(middle.max()) < ZERO:
                continue
            floor = ZERO if statistic == "bias" else -np.inf
            look, _ = _look(name)
            ax.fill_between(
                middle.index, low.clip(lower=floor), high.clip(lower=floor), color=look.colour, alpha=0.1, linewidth=0
            )
            line(ax, middle.index.to_series(), middle.clip(lower=floor), name)
        ax.set(xscale="log", xlabel="lag KL(μ‖π), nats", title=f"{family}s")
        ax.grid()
    for ax in grid[: len(families)]:
        ax.axhline(1, **TRUTH)
    for ax in grid[len(families) :]:
        ax.set_yscale("log")
    grid[0].set_ylabel("effective β / β")
    grid[len(families)].set_ylabel("error of the KL's part")
    panels(grid)
    legend(figure, names)
    return figure
