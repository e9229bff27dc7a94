"""Figure of k1, k2 and k3 as logged numbers: where batches' means lie, and how often intervals hold."""

from __future__ import annotations

import numpy as np
import pandas as pd

from gradlab.plots.style import PAGE, TRUTH, Figure, hue, panels, styled

#: Lower edge of the axis of means, where those that are less, or negative, end.
LEAST = 0.1


@styled
def logged(frame: pd.DataFrame) -> Figure:
    """Means of batches over the KL (median, 5–95 % range), one panel per world and stage; below, how often intervals hold the KL.

    Reads `world, stage, behaviour, samples, kernel, median, q05, q95, student, open`; of batches that the policy itself drew.

    >>> frame = gl.claims.load("figures", ["16_metrics"])["16_metrics"]
    >>> len(gl.plots.logged(frame).axes) % 2
    0
    """
    frame = frame[frame["behaviour"] == "the policy"]
    places = list(dict.fromkeys(zip(frame["world"], frame["stage"], strict=True)))
    figure = Figure(figsize=(PAGE, 4.2))
    axes = figure.subplots(2, len(places), sharey="row", squeeze=False)
    for column, (world, stage) in enumerate(places):
        part = frame[(frame["world"] == world) & (frame["stage"] == stage)]
        above, below = axes[0, column], axes[1, column]
        for k, (kernel, rows) in enumerate(part.groupby("kernel", sort=False)):
            x = rows["samples"] * 1.06 ** (k - 1)
            ends = np.abs(np.stack([rows["median"] - rows["q05"].clip(lower=LEAST), rows["q95"] - rows["median"]]))
            above.errorbar(
                x, rows["median"], ends, color=hue(str(kernel)), marker="o", markersize=3, elinewidth=0.8, label=kernel
            )
            if kernel != "k2":
                below.plot(x, rows["student"], color=hue(str(kernel)), marker="o", markersize=3, label=f"{kernel}, Student")
                below.plot(
                    x,
                    rows["open"],
                    color=hue(str(kernel)),
                    marker="s",
                    markersize=3,
                    linestyle=":",
                    label=f"{kernel}, open ends",
                )
        above.axhline(1, **TRUTH)
        below.axhline(0.95, **TRUTH)
        above.set(xscale="log", title=f"{str(world).split(',')[0]}, {stage}")
        below.set(xscale="log", ylim=(0.7, 1.01))
        for ax in (above, below):
            ax.grid()
    axes[0, 0].set(ylabel="logged number / KL", yscale="log", ylim=(LEAST, None))
    axes[1, 0].set(ylabel="share that holds the KL")
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[1, 0].get_legend_handles_labels()[0]]
    labels = [*axes[0, 0].get_legend_handles_labels()[1], *axes[1, 0].get_legend_handles_labels()[1]]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.supxlabel("responses of a batch")
    panels(axes.flat)
    return figure
