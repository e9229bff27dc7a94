"""The figure about trust regions: what they do to the reward's and to the KL's gradient, and which tokens they silence."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradlab.plots.style import NEUTRAL, OTHERS, PAGE, Figure, hue, panels, styled

#: Where the policy stands to the data, as a title has it.
TITLES = {"updates": "updates on old data", "random": "random direction"}
LINES: dict[str, Any] = {"PPO": "-", "DAPO": "--", "CISPO": ":"}
LAG = 0.1


def _colour(part: str) -> str:
    return {"reward": OTHERS[1], "KL in a head": hue("k1"), "KL in the advantage": OTHERS[5]}.get(part, NEUTRAL)


@styled
def clips(frame: pd.DataFrame, sides: pd.DataFrame) -> Figure:
    """How far a trust region moves each part's gradient over the lag, and the sides of what PPO removes; bandits above, trees below.

    Reads frames of `gl.clips.removed` and `gl.clips.sides` with `world` (`updates` or `random`) and `nominal`, the lag asked for.

    >>> frames = gl.claims.load("figures", ["18_clips", "18_sides"])
    >>> len(gl.plots.clips(frames["18_clips"], frames["18_sides"]).axes)
    6
    """
    families, worlds = list(dict.fromkeys(frame["family"])), list(dict.fromkeys(frame["world"]))
    parts, names = list(dict.fromkeys(frame["part"])), list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 4.2))
    grid = figure.subplots(len(families), len(worlds) + 1, squeeze=False)
    for row, family in zip(grid, families, strict=True):
        for ax, world in zip(row, worlds, strict=False):
            cell = frame[(frame["family"] == family) & (frame["world"] == world)]
            for part in parts:
                for name in names:
                    middle = cell[(cell["part"] == part) & (cell["estimator"] == name)].groupby("nominal")["bias"].median()
                    ax.plot(middle.index, middle, LINES.get(name, "-."), color=_colour(part), marker="o", markersize=2.5)
            ax.set(xscale="log", ylim=(-0.05, 1.6), xlabel="lag, nats", title=f"{family}s, {TITLES.get(world, world)}")
            ax.grid()
        row[0].set_ylabel("change of the gradient")
        _bars(row[-1], sides[(sides["family"] == family) & (sides["estimator"] == names[0])], parts, worlds)
        row[-1].set_title(f"{family}s, {names[0]}, lag {LAG:g}")
    panels(grid.flatten())
    shown: list[Artist] = [Line2D([], [], color=_colour(part), label=part) for part in parts]
    shown += [Line2D([], [], color=NEUTRAL, linestyle=LINES.get(name, "-."), label=name) for name in names]
    shown += [Patch(color=NEUTRAL, label="over-sampled"), Patch(facecolor="none", edgecolor=NEUTRAL, label="under-sampled")]
    figure.legend(handles=shown, loc="outside lower center", ncols=4)
    return figure


def _bars(ax: Axes, cell: pd.DataFrame, parts: list[str], worlds: list[str]) -> None:
    """Share of the pulls that is removed, of over-sampled tokens filled and of under-sampled ones open."""
    places, labels = [], []
    for w, world in enumerate(worlds):
        for p, part in enumerate(parts):
            row = cell[(cell["part"] == part) & (cell["world"] == world) & (cell["nominal"] == LAG)]
            if row.empty:
                continue
            place, size = w * (len(parts) + 0.7) + p, float(row["removed"].iloc[0])
            over = size * float(row["over_share"].fillna(0).iloc[0])
            ax.bar(place, over, color=_colour(part), width=0.8)
            ax.bar(place, size - over, bottom=over, facecolor="none", edgecolor=_colour(part), width=0.8)
        places.append(w * (len(parts) + 0.7) + (len(parts) - 1) / 2)
        labels.append(TITLES.get(world, world).replace(" ", "\n", 1))
    ax.set_xticks(places, labels)
    ax.set_ylim(0, 1)
    ax.set_ylabel("pulls removed")
    ax.grid(axis="y")
