"""Figures about compositions of estimators: which objective each descends, which are unbiased, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle

from gradlab.plots.off_policy import CODES, LAG, ZERO, field_look
from gradlab.plots.style import PAGE, Figure, Style, panels, small, styled


def _goals(columns: Sequence[str], narrow: bool = False) -> list[str]:
    """How objectives are written on an axis."""
    names = {"frozen_prefix": "prefixes of μ", "policy_prefix": "prefixes of π", "": "responses"}
    if narrow:
        names = {"frozen_prefix": "prefix μ", "policy_prefix": "prefix π", "": "whole"}
    parts = [column.removeprefix("bias_").partition("_kl") for column in columns]
    return [f"{kind}{'' if narrow else ' KL,'}\n{names[rest.removeprefix('_')]}" for kind, _, rest in parts]


@styled
def weighted(frame: pd.DataFrame) -> Figure:
    """Which objective each estimator descends off-policy: its largest relative bias over the policies, filled where it is 0.

    Reads `family, estimator, target, bias` and the fields of the estimators; one block of columns per family.

    >>> frame = gl.claims.load("figures", ["08_published"])["08_published"]
    >>> len(gl.plots.weighted(frame[frame["off_policy"] & frame["estimator"].isin(["k2-loss", "k3-loss"])]).axes)
    2
    """
    names, families = list(dict.fromkeys(frame["estimator"])), list(dict.fromkeys(frame["family"]))
    targets = list(dict.fromkeys(frame["target"]))
    wide = [t for t in targets if not t.endswith("_prefix")]  # of one step, every prefix is the empty one
    shown = {family: wide if (frame.loc[frame["family"] == family, "length"] == 1).all() else targets for family in families}
    figure = Figure(figsize=(PAGE, 0.75 + 0.158 * len(names)))
    axes = figure.subplots(
        1, len(families), sharey=True, width_ratios=[len(shown[family]) for family in families], squeeze=False
    )[0]
    worst = frame.groupby(["family", "estimator", "target"])["bias"].max()
    for ax, family in zip(axes, families, strict=True):
        for y, name in enumerate(names):
            colour = field_look(frame[frame["estimator"] == name]).colour
            for x, target in enumerate(shown[family]):
                bias = float(worst.loc[(family, name, target)])
                zero = bias < ZERO
                if zero:
                    ax.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color=colour, linewidth=0))
                ink = "white" if zero and np.dot(to_rgb(colour), [0.3, 0.59, 0.11]) < 0.55 else "black"
                ax.text(x, y, "0" if zero else f"{bias:.2g}", ha="center", va="center", fontsize=small(), color=ink)
        ax.set_xticks(range(len(shown[family])), _goals(shown[family], narrow=True))
        ax.set_yticks(range(len(names)), names)
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.set(xlim=(-0.5, len(shown[family]) - 0.5), ylim=(len(names) - 0.5, -0.5), title=f"{family}s, KL")
        ax.spines[:].set_visible(False)
    panels(axes)
    return figure


@styled
def compositions(frame: pd.DataFrame, noises: Sequence[str]) -> Figure:
    """How many compositions descend which objective, by weight; and the noise of those unbiased for the reverse KL.

    Reads `estimator, same_as, unbiased, weight, bias_<goal>` and the columns `noises`, one per policy. Compositions that are the
    same response by response share a row, under the name of the first; `× n` says how many there are.

    >>> frame = gl.claims.load("figures", ["08_compositions"])["08_compositions"]
    >>> len(gl.plots.compositions(frame, ["noise_0", "noise_1", "noise_2"]).axes)
    2
    """
    kept = frame[frame["unbiased"]]
    order = kept.drop_duplicates("same_as").sort_values(noises[0], ascending=False)
    figure = Figure(figsize=(PAGE, 0.95 + 0.16 * len(order)))
    left, ax = figure.subplots(1, 2, width_ratios=[1.15, 1])
    _counts(left, frame)
    counts = kept["same_as"].value_counts()
    for y, (_, row) in enumerate(order.iterrows()):
        look = field_look(order[order["estimator"] == row["estimator"]])
        ax.plot(
            [row[n] for n in noises], [y] * len(noises), color=look.colour, marker=look.marker, linestyle="none", alpha=0.85
        )
    labels = [f"{_label(row)}  ×{counts[row['same_as']]}" for _, row in order.iterrows()]
    ax.set_yticks(range(len(order)), labels)
    ax.tick_params(axis="y", length=0)
    ax.set(xscale="log", xlabel="tr Cov / ‖∇KL‖²", ylim=(-0.6, len(order) - 0.4))
    ax.set_title("noise of the unbiased")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(axis="x")
    panels([left, ax])
    return figure


def _label(row: pd.Series[Any]) -> str:
    """A composition in words: kernel, placement, credit; weight; baseline."""
    placed = f"{row['kernel']} {row['placement'].replace('loss+reward', 'both')}"
    credit = "" if row["credit"] == "token" else f" {row['credit'].replace('_', '-')}"
    weight = f"{'diff. ' if row['differentiate_weight'] else ''}{row['weight']}"
    baseline = {"kl": ", −KL", "leave_one_out": ", leave-one-out"}.get(str(row["baseline"]), "")
    return f"{placed}{credit}, {weight}{baseline}"


def _counts(ax: Axes, frame: pd.DataFrame) -> None:
    """A table of counts: objective by weight."""
    goals = [c for c in frame.columns if c.startswith("bias_")]
    for x, weight in enumerate(CODES):
        part = frame[frame["weight"] == weight]
        for y, goal in enumerate(goals):
            count = int((part[goal] < ZERO).sum())
            ax.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color="#DCE9F2" if count else "#F6F6F6", linewidth=0))
            ax.text(x, y, str(count), ha="center", va="center", fontsize=small(), color="black" if count else "#999999")
    ax.set_yticks(range(len(goals)), _goals(goals))
    ax.set_xticks(range(len(CODES)), [f"{w}\n{int((frame['weight'] == w).sum())}" for w in CODES])
    ax.set(xlim=(-0.5, len(CODES) - 0.5), ylim=(len(goals) - 0.5, -0.5), title="unbiased for …")
    ax.set_xlabel("importance weight, number of compositions")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


@styled
def winners(frame: pd.DataFrame) -> Figure:
    """The estimator of least error for every lag and batch: colour is kernel and placement, the letter its weight.

    Reads `panel, nominal, batch, rmse, truncate` and the fields of the winner; below the letter stands the relative error. Where
    it exceeds 1 the best estimate is worse than none, and the cell is pale.

    >>> frame = gl.claims.load("figures", ["08_winners"])["08_winners"]
    >>> len(gl.plots.winners(frame[frame["batch"] <= 16]).axes)
    4
    """
    names = list(dict.fromkeys(frame["panel"]))
    columns = min(2, len(names))
    figure = Figure(figsize=(PAGE, 0.6 + 2.35 * -(-len(names) // columns)))
    grid = figure.subplots(-(-len(names) // columns), columns, squeeze=False)
    used: dict[str, Style] = {}
    for ax, name in zip(grid.flat, names, strict=True):
        part = frame[frame["panel"] == name]
        lag_values, batches = sorted(set(part["nominal"])), sorted(set(part["batch"]))
        for i in range(len(part)):
            row = part.iloc[i : i + 1]
            _cell(ax, lag_values.index(row["nominal"].iloc[0]), batches.index(row["batch"].iloc[0]), row, used)
        ax.set_xticks(range(len(lag_values)), [f"{x:g}" for x in lag_values])
        ax.set_yticks(range(len(batches)), [f"{n:,}" for n in batches])
        ax.set(xlim=(-0.5, len(lag_values) - 0.5), ylim=(-0.5, len(batches) - 0.5), title=name)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    for ax in grid[-1]:
        ax.set_xlabel(LAG)
    for ax in grid[:, 0]:
        ax.set_ylabel("responses in a batch")
    handles = [Patch(facecolor=look.colour, alpha=0.75, label=label) for label, look in used.items()]
    handles += [Patch(facecolor="none", edgecolor="none", label="– T P S: no, token, prefix, sequence weight; ≤ bound")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.0, columnspacing=0.9)
    panels(grid.flat)
    return figure


def _cell(ax: Axes, x: int, y: int, row: pd.DataFrame, used: dict[str, Style]) -> None:
    fields = row.iloc[0]
    label = f"{fields['kernel']} {fields['placement']}"
    look = used.setdefault(label, field_look(row))
    error = float(fields["rmse"])
    ax.add_patch(Rectangle((x - 0.49, y - 0.47), 0.98, 0.94, color=look.colour, alpha=0.75 if error < 1 else 0.2, linewidth=0))
    bound = fields["truncate"]
    code = CODES[str(fields["weight"])] + ("" if pd.isna(bound) else f"≤{bound:g}")
    shade = np.dot(to_rgb(look.colour), [0.3, 0.59, 0.11]) * 0.75 + 0.25
    ink = "black" if shade > 0.55 or error >= 1 else "white"
    ax.text(x, y + 0.2, code, ha="center", va="center", fontsize=small(), fontweight="bold", color=ink)
    ax.text(x, y - 0.22, f"{error:.2g}", ha="center", va="center", fontsize=small(), color=ink)
