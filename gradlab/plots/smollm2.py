"""Figures about a real language model: stages of training, log-ratios of its tokens, tokens by name, and inference engines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from gradlab.plots.style import NEUTRAL, PAGE, TRUTH, Figure, handle, hue, panels, small, style_of, styled

#: Letters that would not show.
SEEN = {"\n": "↵", " ": "␣"}


def _steps(stages: Sequence[int]) -> dict[int, str]:
    """A colour for every stage, from dark to light."""
    scale = mpl.colormaps["cividis"]
    return {steps: to_hex(scale(0.85 * k / max(len(stages) - 1, 1))) for k, steps in enumerate(sorted(stages))}


@styled
def stages(frame: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Bias, cosine and noise of estimators over the KL that training has put between policy and reference: a dot per prompt.

    Reads `scenario, steps, estimator, target, kl, bias, cosine, noise`, of the target `reverse_kl`; a line joins the medians of
    the stages. A bias of 0 is drawn at the lower edge.

    >>> frame = gl.claims.load("figures", ["11_catalogue"])["11_catalogue"]
    >>> len(gl.plots.stages(frame, ["k2-loss", "k3-loss"]).axes)
    3
    """
    rows = frame[(frame["target"] == "reverse_kl") & frame["estimator"].isin(names)]
    figure = Figure(figsize=(PAGE, 2.5))
    axes = figure.subplots(1, 3, sharex=True)
    floor = 0.002
    for name in names:
        part, look = rows[rows["estimator"] == name], style_of(name)
        for ax, column in zip(axes, ("bias", "cosine", "noise"), strict=True):
            values = part[column].clip(lower=floor) if column == "bias" else part[column]
            ax.plot(part["kl"], values, linestyle="none", marker=look.marker, markersize=2.8, color=look.colour, alpha=0.45,
                    markeredgewidth=0, clip_on=False)  # fmt: skip
            middle = part.assign(value=values).groupby("steps")[["kl", "value"]].median().sort_values("kl")
            ax.plot(middle["kl"], middle["value"], color=look.colour, marker=look.marker, markersize=3.2, clip_on=False)
    axes[0].set(yscale="log", ylim=(floor, 100), ylabel="relative bias")
    axes[0].set_yticks([floor, 0.01, 0.1, 1, 10, 100], ["0", "0.01", "0.1", "1", "10", "100"])
    axes[0].minorticks_off()
    axes[1].set(ylabel="cosine with the true gradient")
    axes[1].axhline(1, **TRUTH)
    axes[2].set(yscale="log", ylabel="tr Cov / ‖∇KL‖² of one response")
    for ax, title in zip(axes, ("bias", "direction", "noise"), strict=True):
        ax.set(xscale="log", xlabel="KL of a response, nats", title=title)
        ax.grid()
    figure.legend(
        handles=[handle(name, markersize=3.5) for name in names], loc="outside upper center", ncols=min(len(names), 7)
    )
    panels(axes)
    return figure


@styled
def token_ratios(frame: pd.DataFrame) -> Figure:
    """Share of tokens in each range of the log-ratio, by stage of training: one column per world, one row per way of counting.

    Reads `world, steps, low, high` and `policy, reference, vocabulary` with their intervals; bands where sampled.

    >>> frame = gl.claims.load("figures", ["10_ratios"])["10_ratios"]
    >>> len(gl.plots.token_ratios(frame).axes)
    6
    """
    worlds = list(dict.fromkeys(frame["world"]))
    colours = _steps(list(dict.fromkeys(frame["steps"])))
    counts = {"policy": "the policy's", "reference": "the reference's", "vocabulary": "one each"}
    figure = Figure(figsize=(PAGE, 3.6))
    grid = figure.subplots(len(worlds), len(counts), sharex=True, sharey=True, squeeze=False)
    for line, world in zip(grid, worlds, strict=True):
        for ax, (column, title) in zip(line, counts.items(), strict=True):
            for steps, colour in colours.items():
                part = frame[(frame["world"] == world) & (frame["steps"] == steps)].sort_values("low")
                inner = part[np.isfinite(part["low"]) & np.isfinite(part["high"])]
                edges = [*inner["low"], inner["high"].iloc[-1]]
                ax.stairs(inner[column], edges, color=colour, linewidth=1.1)
                if part["via"].eq("sampled").all():
                    low, high = inner[f"{column}_low"], inner[f"{column}_high"]
                    ax.stairs(high, edges, baseline=low.to_numpy(), color=colour, alpha=0.18, fill=True)
            ax.axvline(0, **{**TRUTH, "linewidth": 0.6})
            ax.set(yscale="log", ylim=(1e-5, 1), title=f"{world}: {title}")
            ax.grid()
    decades = np.arange(-3, 4)
    for ax in grid[-1]:
        ax.set_xticks(decades * np.log(10), ["10³", "10²", "10", "1", "1/10", "1/10²", "1/10³"])
        ax.set_xlabel("δ = ref/π   (ℓ grows to the right)")
    for ax in grid[:, 0]:
        ax.set_ylabel("share of tokens")
    figure.legend(
        handles=[Line2D([], [], color=colour, label=f"{steps} steps") for steps, colour in colours.items()],
        loc="outside upper center", ncols=len(colours),
    )  # fmt: skip
    panels(grid.flat)
    return figure


@styled
def named_tokens(frame: pd.DataFrame, sides: pd.DataFrame, labels: int = 5) -> Figure:
    """What each token brings to the expected gradient and to the second moment, by name, and what under-sampled ones bring in all.

    Reads, of one scenario, `prefix, token, estimator, log_ratio, expected, second`; of all of them, in `sides`, `estimator, kl,
    second`. Up to `labels` tokens with the largest shares are written out, as prefix · token.

    >>> frames = gl.claims.load("figures", ["10_tokens", "10_sides"])
    >>> sides = frames["10_sides"].rename(columns={"under_second": "second"})
    >>> len(gl.plots.named_tokens(frames["10_tokens"], sides).axes)
    3
    """
    figure = Figure(figsize=(PAGE, 2.7))
    axes = figure.subplots(1, 3, width_ratios=[1.15, 1.15, 0.8])
    names = list(dict.fromkeys(frame["estimator"]))
    for ax, column in zip(axes[:2], ("expected", "second"), strict=True):
        for name in names:
            part, look = frame[frame["estimator"] == name], style_of(name)
            ax.plot(part["log_ratio"], part[column], linestyle="none", marker=look.marker, markersize=3, color=look.colour,
                    markeredgewidth=0, alpha=0.85)  # fmt: skip
        ax.axvline(0, **{**TRUTH, "linewidth": 0.6})
        ax.axhline(0, color="0.6", linewidth=0.5)
        ax.margins(x=0.12, y=0.12)
        _label(ax, frame, column, labels)
        ax.set(xlabel="log-ratio ℓ of the token, nats")
    axes[0].set(title="expected gradient", ylabel="share along the true gradient")
    axes[1].set(title="second moment", ylabel="share")
    for name in names:
        part, look = sides[sides["estimator"] == name], style_of(name)
        axes[2].plot(
            part["kl"], part["second"], linestyle="none", marker=look.marker, markersize=3, color=look.colour, alpha=0.8
        )
    axes[2].axhline(0.5, **{**TRUTH, "linewidth": 0.6})
    axes[2].set(xscale="log", ylim=(0, 1.03), title="under-sampled", xlabel="KL of a response, nats",
                ylabel="share of the second moment")  # fmt: skip
    figure.legend(handles=[handle(name, linestyle="none") for name in names], loc="outside upper center", ncols=len(names))
    panels(axes)
    return figure


def _label(ax: Axes, frame: pd.DataFrame, column: str, labels: int) -> None:
    """Write out the tokens with the largest shares, where there is room, above the highest of their points."""
    tall = frame.loc[frame.groupby(["prefix", "token"])[column].idxmax()].nlargest(labels, column)
    width, height = (float(frame[key].max() - frame[key].min()) for key in ("log_ratio", column))
    placed: list[tuple[float, float, float]] = []
    for row in tall.itertuples():
        x, y = float(row.log_ratio), float(getattr(row, column))  # type: ignore[arg-type]
        text = _written(str(row.prefix), str(row.token))
        half = 0.018 * len(text) * width  # a letter takes about a thirtieth of a panel
        if any(abs(x - a) < half + other and abs(y - b) < 0.08 * height for a, b, other in placed):
            continue
        placed.append((x, y, half))
        ax.annotate(text, (x, y), textcoords="offset points", xytext=(0, 4), ha="center", fontsize=small())


def _written(prefix: str, token: str) -> str:
    return "".join(SEEN.get(letter, letter) for letter in f"{prefix}·{token}" if letter) if prefix else SEEN.get(token, token)


@styled
def engines(frame: pd.DataFrame, tokens: pd.DataFrame) -> Figure:
    """Bias of estimators with data from several engines, with and without importance weights, and an engine's own error.

    Reads `behaviour, estimator, target, bias` (median and range over prompts, target `reverse_kl`; 0 at the left edge), and of
    single tokens `engine, log_ratio`.

    >>> frames = gl.claims.load("figures", ["11_mismatch", "11_engine"])
    >>> len(gl.plots.engines(frames["11_mismatch"], frames["11_engine"]).axes)
    2
    """
    rows = frame[frame["target"] == "reverse_kl"]
    names = list(dict.fromkeys(rows["estimator"]))[::-1]
    kinds = list(dict.fromkeys(rows["behaviour"]))
    markers = dict(zip(kinds, "|osD^v", strict=False))
    hues = dict(zip(kinds, ["black", *[hue(k) for k in ("k1", "k2", "k3", "full")], NEUTRAL], strict=False))
    figure = Figure(figsize=(PAGE, 3.0))
    left, right = figure.subplots(1, 2, width_ratios=[1.9, 1])
    floor = 0.0003
    for k, kind in enumerate(kinds):
        for y, name in enumerate(names):
            bias = rows[(rows["behaviour"] == kind) & (rows["estimator"] == name)]["bias"].clip(lower=floor)
            height = y + 0.14 * ((len(kinds) - 1) / 2 - k)
            left.plot([bias.min(), bias.max()], [height, height], color=hues[kind], linewidth=0.9, clip_on=False)
            left.plot([bias.median()], [height], color=hues[kind], marker=markers[kind], markersize=3.4, clip_on=False)
    for y, _ in pairwise(range(len(names))):
        left.axhline(y + 0.5, color="0.85", linewidth=0.4)
    left.set(
        xscale="log",
        xlim=(floor, 100),
        ylim=(-0.6, len(names) - 0.4),
        title="bias",
        xlabel="relative bias against ∇KL of responses",
    )
    left.set_xticks([floor, 0.001, 0.01, 0.1, 1, 10, 100], ["0", "0.001", "0.01", "0.1", "1", "10", "100"])
    left.minorticks_off()
    left.set_yticks(range(len(names)), names)
    left.tick_params(axis="y", length=0)
    left.legend(
        handles=[Line2D([], [], color=hues[k], marker=markers[k], markersize=3.4, label=k) for k in kinds],
        loc="lower center", bbox_to_anchor=(0.3, 1.08), ncols=3,
    )  # fmt: skip
    _survival(right, tokens)
    panels([left, right])
    return figure


def _survival(ax: Axes, tokens: pd.DataFrame) -> None:
    """Share of tokens whose |log ρ| exceeds a value, for each engine."""
    for (engine, part), style in zip(tokens.groupby("engine", sort=False), ("--", "-"), strict=False):
        size = np.sort(part["log_ratio"].abs().clip(lower=1e-8))
        ax.plot(size, 1 - np.arange(len(size)) / len(size), color="black", linestyle=style, label=engine)
    ax.set(
        xscale="log",
        yscale="log",
        title="an engine's own error",
        xlabel="|log ρ| of a token, nats",
        ylabel="share of tokens beyond",
    )
    ax.grid()
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2)
