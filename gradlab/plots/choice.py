"""The figure about the choice of a KL estimator: how much it changes a whole loss's gradient, and how many responses show it."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from gradlab.plots.combined import legend, line
from gradlab.plots.style import NEUTRAL, PAGE, Figure, panels, styled

#: A median difference below this is rounding.
ZERO = 1e-9


@styled
def estimator_choice(frame: pd.DataFrame, coefficient: float = 0.01, far: float = 1.0, group: int = 8) -> Figure:
    """Difference over the distance and over β, and the batch that shows it: medians of bandits, and stages of a model (open).

    Reads a frame of `gl.choice.differences` with `world` (`random bandits` or `addition`) and `nominal`, the KL asked for.

    >>> frame = gl.claims.load("figures", ["15_choice"])["15_choice"]
    >>> len(gl.plots.estimator_choice(frame).axes)
    3
    """
    frame = frame[frame["group"] == group]
    bandits, model = frame[frame["world"] == "random bandits"], frame[frame["world"] == "addition"]
    names = [str(name) for name, part in bandits.groupby("estimator", sort=False) if part["difference"].median() > ZERO]
    names += [name for name in dict.fromkeys(model["estimator"]) if name not in names]
    figure = Figure(figsize=(PAGE, 2.6))
    distance, strength, batch = axes = figure.subplots(1, 3)
    for name in names:
        own = bandits[(bandits["estimator"] == name) & (bandits["coefficient"] == coefficient)].groupby("nominal")
        stages = model[(model["estimator"] == name) & (model["coefficient"] == coefficient)]
        for ax, statistic in ((distance, "difference"), (batch, "visible_at")):
            middle = own[statistic].median()
            if own["difference"].median().max() > ZERO:
                line(ax, middle.index.to_series(), middle, name)
            _stages(ax, stages, statistic, name)
        at = bandits[(bandits["estimator"] == name) & (bandits["nominal"] == far)].groupby("coefficient")["difference"].median()
        if at.max() > ZERO:
            line(strength, at.index.to_series(), at, name)
    for ax in axes:
        ax.set(xscale="log", yscale="log")
        ax.grid()
    for ax in (distance, strength):
        ax.axhline(0.01, color=NEUTRAL, linestyle=":", linewidth=0.8)
    distance.set(xlabel="KL(π‖ref), nats", ylabel="change of the expected gradient", title=f"β = {coefficient:g}")
    strength.set(xlabel="β", title=f"KL = {far:g}")
    batch.set(xlabel="KL(π‖ref), nats", ylabel="responses that show it", title=f"β = {coefficient:g}")
    panels(axes)
    legend(figure, names)
    return figure


def _stages(ax: Axes, rows: pd.DataFrame, statistic: str, name: str) -> None:
    """Open points of the language model."""
    line(ax, rows["kl"], rows[statistic], name, markerfacecolor="white", linestyle="none", markersize=5)
