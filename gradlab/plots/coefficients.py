"""Figures about the coefficient a loss puts on the score of one sampled token."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradlab.plots.style import PAGE, TRUTH, VIA, Figure, panels, small, style_of, styled

#: Backgrounds of the two sides: under-sampled tokens (π < ref) and over-sampled ones (π > ref).
UNDER, OVER = "#F2F2F2", "white"


@styled
def coefficients(frame: pd.DataFrame) -> Figure:
    """Coefficient on the score against the token's probability, plain and clamped, and how lopsided it is.

    Reads `estimator, clamp, reference, probability, log_ratio, coefficient, principled, asymmetry`: one panel per clamp at the
    first reference, then the asymmetry `|c(−x)| / |c(x)|` against `x = |ℓ|`. The principled coefficient is the black line.

    >>> frame = gl.claims.load("figures", ["02_coefficients"])["02_coefficients"]
    >>> len(gl.plots.coefficients(frame).axes)
    3
    """
    clamps, names = list(dict.fromkeys(frame["clamp"])), list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 2.75))
    axes = figure.subplots(1, len(clamps) + 1, width_ratios=[*[1.25] * len(clamps), 1])
    reference = frame["reference"].iloc[0]
    curves, mirrored = frame[frame["reference"] == reference], frame[frame["asymmetry"].notna() & (frame["log_ratio"] > 0)]
    for ax, clamp in zip(axes, clamps, strict=False):
        part = curves[curves["clamp"] == clamp]
        ax.axvspan(part["probability"].min(), reference, color=UNDER, linewidth=0)
        _curves(ax, part, "probability", "coefficient", names)
        truth = part[part["estimator"] == names[0]]
        ax.plot(truth["probability"], truth["principled"], **{**TRUTH, "zorder": 3}, dashes=(1, 2.5))
        ax.set_yscale("symlog", linthresh=1, linscale=0.8)
        ax.set(xscale="log", title=clamp, xlabel=f"π(y), where ref(y) = {reference:g}")
        ax.set(xlim=(part["probability"].min(), 1), ylim=(-2e3, 9))
        ax.set_yticks([-1000, -100, -10, -1, 0, 1], ["−1000", "−100", "−10", "−1", "0", "1"])
        for x, y, text in ((0.38, 0.985, "under-sampled"), (0.888, 0.13, "over-\nsampled")):
            ax.text(x, y, text, transform=ax.transAxes, ha="center", va="top", fontsize=small(), color="#555555")
        ax.grid(axis="y")
    axes[0].set_ylabel("coefficient on ∇log π(y)")
    if len(clamps) > 1:
        axes[1].tick_params(labelleft=False)
    _asymmetry(axes[-1], mirrored[mirrored["clamp"] == clamps[0]], names)
    handles = [Line2D([], [], color=style_of(name).colour, label=name) for name in names]
    handles.append(Line2D([], [], **TRUTH, dashes=(1, 2.5), label="principled, k1 in reward"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.3, columnspacing=0.9)
    panels(axes)
    return figure


def _curves(ax: Axes, part: pd.DataFrame, x: str, y: str, names: list[str]) -> None:
    for i, name in enumerate(names):
        rows = part[part["estimator"] == name].sort_values(x)
        # Narrower as they go, so that curves on top of each other all show.
        width = 2.4 - 1.4 * i / max(len(names) - 1, 1)
        jump = rows[y].diff().abs().gt(0.5) & rows[y].eq(0).ne(rows[y].shift().eq(0))
        shown = rows[y].where(~jump | (rows[x].diff().isna()), np.nan)
        ax.plot(rows[x], shown, VIA["exact"], color=style_of(name).colour, linewidth=width)


def _asymmetry(ax: Axes, part: pd.DataFrame, names: list[str]) -> None:
    _curves(ax, part, "log_ratio", "asymmetry", names)
    ax.set(yscale="log", title="asymmetry", xlabel="x = |ℓ|", ylabel="|c(−x)| / |c(x)|", xlim=(0, 8), ylim=(2e-4, 5e3))
    ax.grid()
