"""Figure of k1, k2 and k3 as logged numbers: where batches' means lie, and how often intervals hold."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from gradlab.plots.style import NEUTRAL, PAGE, TRUTH, Figure, hue, panels, styled

#: Upper edge of the axis of means; ranges that leave the panel end at its frame.
MOST = 2.5


@styled
def logged(frame: pd.DataFrame) -> Figure:
    """Means of batches over the KL (median, 5–95 % range) after the fewest and the most steps; below, how often intervals hold the KL.

    Reads `world, stage, steps, behaviour, samples, kernel, median, q05, q95, student, open`; of batches that the policy itself drew.

    >>> frame = gl.claims.load("figures", ["16_metrics"])["16_metrics"]
    >>> len(gl.plots.logged(frame).axes)
    8
    """
    frame = frame[(frame["behaviour"] == "the policy") & frame["steps"].isin([frame["steps"].min(), frame["steps"].max()])]
    places = list(dict.fromkeys(zip(frame["world"], frame["steps"], strict=True)))
    figure = Figure(figsize=(PAGE, 4.0))
    axes = figure.subplots(2, len(places), sharex=True, sharey="row", squeeze=False)
    for (above, below), (world, steps) in zip(axes.T, places, strict=True):
        part = frame[(frame["world"] == world) & (frame["steps"] == steps)]
        for k, (kernel, rows) in enumerate(part.groupby("kernel", sort=False)):
            look: dict[str, Any] = {"color": hue(str(kernel)), "marker": "o", "markersize": 3}
            ends = [rows["median"] - rows["q05"], rows["q95"] - rows["median"]]
            above.errorbar(rows["samples"] * 1.1 ** (k - 1), rows["median"], ends, elinewidth=0.8, **look)
            if kernel != "k2":
                below.plot(rows["samples"], rows["student"], **look)
                below.plot(rows["samples"], rows["open"], linestyle=":", **look)
        above.axhline(1, **TRUTH)
        below.axhline(0.95, **TRUTH)
        above.set(xscale="log", title=f"{str(world).split(',')[0]}, {steps} steps", ylim=(0, MOST))
        below.set(xscale="log", ylim=(0.7, 1.01), xlabel="responses of a batch")
        for ax in (above, below):
            ax.grid()
    axes[0, 0].set_ylabel("logged number / KL")
    axes[1, 0].set_ylabel("holds the KL")
    panels(axes.flat)
    shown = [
        Line2D([], [], color=hue(str(kernel)), marker="o", markersize=3, label=kernel)
        for kernel in dict.fromkeys(frame["kernel"])
    ]
    shown += [
        Line2D([], [], color=NEUTRAL, label="Student's interval"),
        Line2D([], [], color=NEUTRAL, linestyle=":", label="open where few responses carry the mean"),
    ]
    figure.legend(handles=shown, loc="outside upper center", ncols=len(shown))
    return figure
