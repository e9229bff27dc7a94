"""Figures about the stationary points of exact ascent on reward minus a regulariser."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.plots.bandits import CORNERS
from gradlab.plots.style import PAGE, TRUTH, VIA, Figure, handle, panels, small, style_of, styled

_CLOSED: dict[str, Any] = {"color": "black", "linestyle": VIA["closed form"], "linewidth": 1.0}


@styled
def ascents(paths: pd.DataFrame, optima: pd.DataFrame) -> Figure:
    """Exact ascents over the triangle of three-response policies, one panel per coefficient, from several starts.

    Reads `coefficient, estimator, start, time, policy_0 … policy_2`, and `coefficient, divergence, policy_0 …`: the optima of
    the reverse KL (star) and of the forward KL (square). The dotted lines are those optima over all coefficients.

    >>> frames = gl.claims.load("figures", ["09_paths", "09_optima"])
    >>> len(gl.plots.ascents(frames["09_paths"], frames["09_optima"]).axes)
    3
    """
    coefficients, names = sorted(paths["coefficient"].unique())[::-1], list(dict.fromkeys(paths["estimator"]))
    figure = Figure(figsize=(PAGE, 2.45))
    axes = figure.subplots(1, len(coefficients), squeeze=False)[0]
    marks = {"reverse_kl": "*", "forward_kl": "s"}
    for ax, coefficient in zip(axes, coefficients, strict=True):
        ax.plot(*np.vstack([CORNERS, CORNERS[:1]]).T, color="black", linewidth=0.7)
        for divergence in marks:
            line = optima[optima["divergence"] == divergence].sort_values("coefficient")
            ax.plot(*_flat(line).T, **{**_CLOSED, "linewidth": 0.7}, zorder=1)
        part = paths[paths["coefficient"] == coefficient]
        for i, name in enumerate(names):
            look = style_of(name)
            for _, line in part[part["estimator"] == name].groupby("start", sort=False):
                at = _flat(line.sort_values("time"))
                # Narrower as they go, so that lines on top of each other all show.
                ax.plot(*at.T, color=look.colour, linewidth=2.2 - 1.3 * i / max(len(names) - 1, 1), solid_capstyle="round")
                ax.plot(*at[-1], look.marker, color=look.colour, markersize=4, zorder=3)
        for divergence, marker in marks.items():
            best = optima[(optima["divergence"] == divergence) & np.isclose(optima["coefficient"], coefficient)]
            size = 9 if marker == "*" else 6.5
            ax.plot(
                *_flat(best).T, marker, markersize=size, markerfacecolor="none", color="black", markeredgewidth=0.8, zorder=4
            )
        _corners(ax, paths)
        ax.set_title(f"β = {coefficient:g}")
    handles = [handle(name, markersize=3.5) for name in names]
    hollow: dict[str, Any] = {"linestyle": "none", "color": "black", "markerfacecolor": "none", "markeredgewidth": 0.8}
    handles.append(Line2D([], [], marker="*", markersize=7, **hollow, label="π*"))
    handles.append(Line2D([], [], marker="s", markersize=5, **hollow, label="forward-KL optimum"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    panels(axes)
    return figure


def _flat(rows: pd.DataFrame) -> Any:
    return rows[[f"policy_{v}" for v in range(3)]].to_numpy(dtype=float) @ CORNERS


def _corners(ax: Axes, paths: pd.DataFrame) -> None:
    for v, (corner, offset) in enumerate(zip(CORNERS, ((0, -8), (0, -8), (0, 6)), strict=True)):
        text = f"r = {paths[f'reward_{v}'].iloc[0]:g}"
        ax.annotate(
            text, corner, offset, textcoords="offset points", ha="center", va="center", fontsize=small(), annotation_clip=False
        )
    ax.set(aspect="equal", xlim=(-0.05, 1.05), ylim=(-0.1, 0.95))
    ax.axis("off")


@styled
def fixed_points(frame: pd.DataFrame, curves: pd.DataFrame, floor: float = 1e-12) -> Figure:
    """Distance of the end point from π*, over the coefficient: dots from exact ascent, dotted lines in closed form.

    Reads `world, estimator, coefficient, kl_reverse` of both frames; one panel per world. Everything below `floor` nats is
    drawn there: it is rounding.

    >>> frames = gl.claims.load("figures", ["09_trees", "09_curves"])
    >>> curves = frames["09_curves"][frames["09_curves"]["world"].isin(frames["09_trees"]["world"])]
    >>> len(gl.plots.fixed_points(frames["09_trees"], curves).axes)
    2
    """
    worlds, names = list(dict.fromkeys(frame["world"])), list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 2.6))
    axes = figure.subplots(1, len(worlds), sharey=True, squeeze=False)[0]
    for ax, world in zip(axes, worlds, strict=True):
        ax.axhspan(floor / 5, floor * 5, color="#EEEEEE", linewidth=0)
        for i, name in enumerate(names):
            look, shift = style_of(name), 1.045 ** (i - (len(names) - 1) / 2)
            line = curves[(curves["world"] == world) & (curves["estimator"] == name)].sort_values("coefficient")
            ax.plot(
                line["coefficient"], line["kl_reverse"].clip(lower=floor), VIA["closed form"], color=look.colour, linewidth=1
            )
            rows = frame[(frame["world"] == world) & (frame["estimator"] == name)]
            height = rows["kl_reverse"].clip(lower=floor)
            ax.plot(rows["coefficient"] * shift, height, look.marker, color=look.colour, markersize=4)
        ax.set(title=world, xscale="log", yscale="log", xlabel="coefficient β")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid()
    axes[0].set_ylabel("KL(end ‖ π*), nats")
    handles: list[Line2D] = [handle(name, linestyle="none") for name in names]
    handles.append(Line2D([], [], **{**_CLOSED, "color": "#555555"}, label="closed form"))
    figure.legend(handles=handles, loc="outside upper center", ncols=5)
    panels(axes)
    return figure


@styled
def weaker(frame: pd.DataFrame) -> Figure:
    """KL to the reference where k3 as loss ends, over that of k2 as loss: median and band over random bandits.

    Reads `kind, coefficient, quantile, ratio`; one panel per kind of reward.

    >>> frame = gl.claims.load("figures", ["09_weaker"])["09_weaker"]
    >>> len(gl.plots.weaker(frame).axes)
    5
    """
    kinds = list(dict.fromkeys(frame["kind"]))
    figure = Figure(figsize=(PAGE, 2.05))
    axes = figure.subplots(1, len(kinds), sharey=True)
    colour = style_of("k3-loss").colour
    for ax, kind in zip(axes, kinds, strict=True):
        rows = frame[frame["kind"] == kind].pivot_table(index="coefficient", columns="quantile", values="ratio")
        ax.axhline(1, **{**TRUTH, "color": style_of("k2-loss").colour, "linewidth": 1.3})
        ax.fill_between(rows.index, rows[rows.columns.min()], rows[rows.columns.max()], color=colour, alpha=0.2, linewidth=0)
        ax.plot(rows.index, rows[0.5], VIA["closed form"], color=colour)
        ax.set(title=fill(kind, 13), xscale="log", yscale="log", xlabel="coefficient β")
        ax.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16, 32], ["¼", "½", "1", "2", "4", "8", "16", "32"])
        ax.set_yticks([], minor=True)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid()
    axes[0].set_ylabel("KL to the reference,\nk3 as loss over k2 as loss")
    panels(axes)
    return figure
