"""Figures about expected gradients of one step: token by token, objective by objective, and over the whole simplex."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.tri import Triangulation

from gradlab.plots.style import COLUMN, PAGE, TRUTH, Figure, dots, handle, number, panels, small, style_of, styled

Array = np.ndarray[Any, np.dtype[np.float64]]

#: Corners of the triangle for tokens 0, 1, 2.
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
LETTERS = "ABC"
#: A relative bias below this is rounding.
ZERO = 1e-9
#: Fill of the policies from which a step raises the KL.
RAISED = "#E9A06B"


@styled
def tokens(frame: pd.DataFrame) -> Figure:
    """Expected gradient on the logit of every token, beside the truth (black bars); grey where a sign is flipped.

    Reads `estimator, parameter, via, expected, expected_low, expected_high, truth, ratio` of one scenario.

    >>> frame = gl.claims.load("figures", ["03_tokens"])["03_tokens"]
    >>> len(gl.plots.tokens(frame).axes)
    1
    """
    names, parameters = list(dict.fromkeys(frame["estimator"])), list(dict.fromkeys(frame["parameter"]))
    figure = Figure(figsize=(COLUMN, 2.5))
    ax = figure.subplots()
    width = 0.8 / len(names)
    for x, parameter in enumerate(parameters):
        part = frame[frame["parameter"] == parameter]
        if ((part["via"] == "exact") & (part["ratio"] < -ZERO)).any():
            ax.axvspan(x - 0.5, x + 0.5, color="#EEEEEE", linewidth=0)
        ax.plot([x - 0.45, x + 0.45], [part["truth"].iloc[0]] * 2, **TRUTH)
        for e, name in enumerate(names):
            rows = part[part["estimator"] == name].set_index("via")
            at = x - 0.4 + (e + 0.3) * width
            if "sampled" in rows.index:
                low, mid, high = (number(rows, "sampled", f"expected{end}") for end in ("_low", "", "_high"))
                error = {"yerr": [[mid - low], [high - mid]]}
                dots(ax, [at + 0.45 * width], [mid], name, "sampled", error, markersize=2.8)
            dots(ax, [at], [number(rows, "exact", "expected")], name)
    ax.axhline(0, color="#999999", linewidth=0.6, zorder=1)
    ax.set_xticks(range(len(parameters)), [parameter.replace("token ", "token\u00a0") for parameter in parameters])
    ax.set(ylabel="expected gradient on the logit, nats", xlim=(-0.5, len(parameters) - 0.5))
    ax.tick_params(axis="x", length=0)
    handles: list[Artist] = [handle(name, linestyle="none") for name in names]
    handles += [Line2D([], [], **TRUTH, label="∇KL, truth"), Patch(facecolor="#EEEEEE", label="a sign is flipped")]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, handletextpad=0.4)
    return figure


@styled
def objectives(frame: pd.DataFrame) -> Figure:
    """Which objective each estimator descends: the largest relative bias over the scenarios, filled where it is 0.

    Reads exact rows of `estimator, target, bias`.

    >>> frame = gl.claims.load("figures", ["03_objectives"])["03_objectives"]
    >>> len(gl.plots.objectives(frame).axes)
    1
    """
    names, targets = list(dict.fromkeys(frame["estimator"])), list(dict.fromkeys(frame["target"]))
    worst = frame[frame["via"] == "exact"].pivot_table(index="estimator", columns="target", values="bias", aggfunc="max")
    figure = Figure(figsize=(COLUMN, 0.45 + 0.2 * len(names)))
    ax = figure.subplots()
    for y, name in enumerate(names):
        colour = style_of(name).colour
        for x, target in enumerate(targets):
            bias = worst.loc[name, target]
            text, ink = f"{bias:.2g}" if bias < 99.5 else f"{bias:.0f}", "black"
            if bias < ZERO:
                ax.add_patch(Rectangle((x - 0.42, y - 0.4), 0.84, 0.8, color=colour, linewidth=0))
                text, ink = "0", "black" if np.dot(to_rgb(colour), [0.3, 0.59, 0.11]) > 0.55 else "white"
            ax.text(x, y, text, ha="center", va="center", fontsize=small(), color=ink)
    short = [target.replace("_frozen_prefix", "").replace("_kl", " KL").replace("chi2", "½χ²") for target in targets]
    # Of one step both forms are the same; beside the whole one the frozen one says what it is.
    short = [f"{name}\nfrozen" if target.removesuffix("_frozen_prefix") in {*targets} - {target} else name
             for name, target in zip(short, targets, strict=True)]  # fmt: skip
    ax.set_xticks(range(len(targets)), short)
    ax.set_yticks(range(len(names)), names)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set(xlim=(-0.5, len(targets) - 0.5), ylim=(len(names) - 0.5, -0.5))
    ax.spines[:].set_visible(False)
    ax.set_xlabel("relative bias as a gradient of …")
    ax.xaxis.set_label_position("top")
    return figure


@styled
def field(frame: pd.DataFrame) -> Figure:
    """Descent directions over three-token policies, one row per reference; shaded where an exact step raises the KL.

    Reads `reference, grid, estimator, policy_0 … policy_2, after_0 … after_2, rise`. Rows of grid `arrows` are drawn as arrows
    (direction only), `simplex` and `logits` are shaded, `instance` is marked; `logits` appears as a panel of its own. A frame of
    `gl.field` without a `grid` is drawn as all but the last.

    >>> frame = gl.claims.load("figures", ["03_field"])["03_field"]
    >>> len(gl.plots.field(frame).axes)
    8
    """
    if "grid" not in frame:
        frame = pd.concat([frame.assign(grid=kind) for kind in ("simplex", "arrows", "logits")], ignore_index=True)
    references, names = list(dict.fromkeys(frame["reference"])), list(dict.fromkeys(frame["estimator"]))
    figure = Figure(figsize=(PAGE, 0.35 + 1.65 * len(references)))
    grid = figure.subplots(len(references), len(names) + 1, squeeze=False)
    for axes, reference in zip(grid, references, strict=True):
        part = frame[frame["reference"] == reference]
        for ax, name in zip(axes, names, strict=False):
            _triangle(ax, part[part["estimator"] == name], name)
            ax.set_title(name)
        last = part[(part["grid"] == "logits") & (part["estimator"] == names[-1])]
        _plane(axes[-1], last, part[part["grid"] == "instance"], _numbers(reference))
        axes[-1].set_title(f"{names[-1]}, logits")
        axes[-1].tick_params(labelbottom=axes[-1] is grid[-1, -1])
        for ax in axes[:-1]:
            _mark(ax, _flat(np.array([_numbers(reference)])), part[part["grid"] == "instance"])
        axes[0].text(
            -0.02, 1.0, f"ref {reference}", transform=axes[0].transAxes, rotation=90, va="top", ha="right", fontsize=small()
        )
    grid[-1, -1].set_xlabel("log π(A)/π(C)")
    handles = [
        Line2D([], [], marker="*", color="black", linestyle="none", markersize=6, label="reference"),
        Line2D([], [], marker="o", color="black", markerfacecolor="none", linestyle="none", markersize=5, label="instance"),
        Patch(facecolor=RAISED, label="an exact step raises KL(π‖ref)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    panels(grid.flat)
    return figure


def _numbers(reference: str) -> tuple[float, ...]:
    return tuple(float(part) for part in reference.strip("()").split())


def _flat(p: Array) -> Array:
    """Barycentric → plane coordinates, `[n, 3]` → `[n, 2]`."""
    flat: Array = p @ CORNERS
    return flat


def _probabilities(rows: pd.DataFrame, what: str = "policy") -> Array:
    return rows[[f"{what}_{v}" for v in range(3)]].to_numpy(dtype=float)


def _triangle(ax: Axes, part: pd.DataFrame, name: str) -> None:
    shade, arrows = part[part["grid"] == "simplex"], part[part["grid"] == "arrows"]
    _shade(ax, _flat(_probabilities(shade)), shade["rise"])
    start, move = _flat(_probabilities(arrows)), _flat(_probabilities(arrows, "after") - _probabilities(arrows))
    move /= np.linalg.norm(move, axis=1, keepdims=True)
    look: dict[str, Any] = {"scale": 15, "width": 0.009, "headwidth": 4, "headlength": 4, "headaxislength": 3.6, "pivot": "mid"}
    ax.quiver(*start.T, *move.T, color=style_of(name).colour, **look)
    ax.plot(*np.vstack([CORNERS, CORNERS[:1]]).T, color="black", linewidth=0.7)
    for letter, corner, offset in zip(LETTERS, CORNERS, ((-5, -2), (5, -2), (0, 4)), strict=True):
        ax.annotate(letter, corner, offset, textcoords="offset points", ha="center", va="center", fontsize=7.5)
    ax.set(aspect="equal", xlim=(-0.07, 1.07), ylim=(-0.06, 0.95))
    ax.axis("off")


def _plane(ax: Axes, rows: pd.DataFrame, instance: pd.DataFrame, reference: tuple[float, ...]) -> None:
    def logits(p: Array) -> Array:
        gaps: Array = np.log(p[:, :2] / p[:, 2:])
        return gaps

    at = logits(_probabilities(rows))
    _shade(ax, at, rows["rise"])
    ax.plot(*logits(np.array([reference])).T, "*", color="black", markersize=6)
    if len(instance):
        ax.plot(*logits(_probabilities(instance)[:1]).T, "o", color="black", markerfacecolor="none", markersize=5)
    low, high = at.min(), at.max()
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal", ylabel="log π(B)/π(C)")
    ax.set_xticks([-10, -5, 0, 5, 10])
    ax.set_yticks([-10, -5, 0, 5, 10])
    ax.grid()


def _shade(ax: Axes, at: Array, rise: pd.Series) -> None:
    """Fill where `rise` is positive; the cube root, of the same sign, spans fewer decades between neighbouring points."""
    root = np.cbrt(rise.to_numpy())
    if root.max() > 0:
        ax.tricontourf(Triangulation(*at.T), root, levels=[0, 2 * root.max()], cmap=ListedColormap([RAISED]), vmin=0, vmax=1)


def _mark(ax: Axes, reference: Array, instance: pd.DataFrame) -> None:
    ax.plot(*reference.T, "*", color="black", markersize=6, zorder=3)
    if len(instance):
        ax.plot(*_flat(_probabilities(instance)[:1]).T, "o", color="black", markerfacecolor="none", markersize=5, zorder=3)
