"""Figures of an inspected run: its log-ratios, the tokens that make up its KL, its weights, and its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from gradlab.plots.style import NEUTRAL, PAGE, TRUTH, Figure, handle, hue, panels, style_of, styled

#: Colours of what is no kernel: weights by kind.
WEIGHTS = {"token": "#0072B2", "geometric": "#009E73", "prefix": "#D55E00", "sequence": "#CC79A7"}
#: A share of effective samples smaller than this is drawn at the lower edge.
LEAST = 1e-4


@styled
def run_kl(ratios: pd.DataFrame, places: pd.DataFrame, largest: pd.DataFrame) -> Figure:
    """Where a run's KL is: the distribution of its ratios, the KL by place in a response, and the largest tokens' share of k3.

    Reads of `ratios` `ratio, low, high, share`, of `places` `place, tokens, k1, k2, k3`, of `largest` `share`.

    >>> import numpy as np
    >>> log_p = np.log(np.random.default_rng(0).uniform(0.2, 0.9, (64, 5)))
    >>> found = gl.inspect(gl.Records.from_arrays(logprob=log_p, ref_logprob=log_p[::-1]))
    >>> len(gl.plots.run_kl(found["ratios"], found["places"], found["largest"]).axes)
    3
    """
    figure = Figure(figsize=(PAGE, 2.4))
    axes = figure.subplots(1, 3)
    names = {"log_ratio": ("ℓ = log π − log ref", "#0072B2"), "log_weight": ("log ρ = log π − log μ", "#D55E00")}
    reach = 0.5
    for name, part in ratios.groupby("ratio", sort=False):
        label, colour = names[str(name)]
        inside = part[np.isfinite(part["low"]) & np.isfinite(part["high"])]
        axes[0].stairs(inside["share"], [*inside["low"], inside["high"].iloc[-1]], color=colour, label=label)
        seen = inside[inside["share"] > 0]
        reach = max(reach, float(np.abs(seen[["low", "high"]].to_numpy()).max(initial=0.0)))
    axes[0].axvline(0, **{**TRUTH, "linewidth": 0.6})
    axes[0].set(yscale="log", xlim=(-reach, reach), xlabel="nats", ylabel="share of tokens", title="ratios of tokens")
    axes[0].set_ylim(top=30)  # room for the legend
    axes[0].legend(loc="upper left")
    at = np.arange(len(places))
    for kernel in ("k1", "k2", "k3"):
        axes[1].plot(at, places[kernel] / places["tokens"], color=hue(kernel), marker="o", markersize=2.5, label=kernel)
    shown = at[:: max(1, len(at) // 7)]
    axes[1].set_xticks(shown, [str(places["place"].iloc[i]) for i in shown], rotation=90 if len(at) > 8 else 0)
    axes[1].axhline(0, **{**TRUTH, "linewidth": 0.6})
    axes[1].set(xlabel="place in the response", ylabel="mean per token, nats", title="KL by place")
    axes[1].legend()
    running = np.cumsum(largest["share"])
    axes[2].step(np.arange(1, len(running) + 1), running, where="mid", color=hue("k3"))
    axes[2].set(xlabel="tokens, the largest first", ylabel="share of k3", ylim=(0, 1), title="tokens that carry k3")
    for ax in axes:
        ax.grid()
    panels(axes)
    return figure


@styled
def run_estimators(estimators: pd.DataFrame) -> Figure:
    """What each estimator would put on a run's tokens: sides, concentration, and how many responses make a direction.

    Reads `estimator, over, half, batch`; a batch that is not known is left out.

    >>> import numpy as np
    >>> log_p = np.log(np.random.default_rng(0).uniform(0.2, 0.9, (64, 5)))
    >>> found = gl.inspect(gl.Records.from_arrays(logprob=log_p, ref_logprob=log_p[::-1]))
    >>> len(gl.plots.run_estimators(found["estimators"]).axes)
    3
    """
    figure = Figure(figsize=(PAGE, 0.8 + 0.15 * len(estimators)))
    axes = figure.subplots(1, 3, sharey=True)
    height = np.arange(len(estimators))[::-1]
    looks = [style_of(name) for name in estimators["estimator"]]
    for ax, column in zip(axes, ("over", "half", "batch"), strict=True):
        values = pd.to_numeric(estimators[column]).to_numpy(dtype=float, na_value=np.nan)
        for x, y, look in zip(values, height, looks, strict=True):
            ax.plot(x, y, color=look.colour, marker=look.marker, linestyle="none")
        ax.grid()
    axes[0].set_yticks(height, estimators["estimator"])
    axes[0].axvline(0.5, **{**TRUTH, "linewidth": 0.6})
    axes[0].set(xlim=(0, 1), xlabel="share of the pull on ℓ > 0", title="over-sampled tokens")
    axes[1].set(xscale="log", xlabel="tokens that carry half of the pull", title="concentration")
    axes[2].set(xscale="log", xlabel="responses for a direction", title="batch")
    for ax in axes[1:]:
        ax.xaxis.set_minor_formatter("")
    panels(axes)
    return figure


@styled
def run_weights(weights: pd.DataFrame, corrections: pd.DataFrame) -> Figure:
    """What a run's importance weights are worth against the length, and what each correction costs.

    Reads of `weights` `kind, by, at, share`, of `corrections` `correction, bias, error, wins`.

    >>> import numpy as np
    >>> log_p = np.log(np.random.default_rng(0).uniform(0.2, 0.9, (64, 5)))
    >>> found = gl.inspect(gl.Records.from_arrays(logprob=log_p, behaviour_logprob=log_p[::-1]))
    >>> len(gl.plots.run_weights(found["weights"], found["corrections"]).axes)
    2
    """
    figure = Figure(figsize=(PAGE, 2.6))
    axes = figure.subplots(1, 2)
    prefix = weights[weights["by"] == "length"]
    at = np.arange(len(prefix))
    share = prefix["share"].clip(lower=LEAST)
    axes[0].plot(at, share, color=WEIGHTS["prefix"], marker="o", markersize=3, label="prefix")
    for row in weights[weights["by"] == "all"].to_dict("records"):
        axes[0].axhline(max(row["share"], LEAST), color=WEIGHTS[row["kind"]], linestyle="--", linewidth=1, label=row["kind"])
    shown = at[:: max(1, len(at) // 7)]
    axes[0].set_xticks(shown, [str(prefix["at"].iloc[i]) for i in shown])
    axes[0].set(
        yscale="log", ylim=(LEAST, 1.2), xlabel="tokens before", ylabel="effective share", title="what weights are worth"
    )
    axes[0].legend()
    height = np.arange(len(corrections))[::-1]
    for column, marker, label in (("bias", "o", "bias E|f − w|"), ("error", "D", "√(bias² + noise / responses of a step)")):
        axes[1].plot(corrections[column].clip(lower=LEAST), height, marker, color=NEUTRAL, label=label, markersize=3.5)
    best = corrections["wins"].to_numpy().argmax()
    axes[1].plot(
        max(corrections["error"].iloc[best], LEAST), height[best], "D", color=WEIGHTS["prefix"], label="the least", markersize=5
    )
    axes[1].set_yticks(height, corrections["correction"])
    axes[1].set(xscale="log", ylim=(-0.6, len(corrections) + 1.9), xlabel="relative to the mean weight", title="corrections")
    axes[1].legend(loc="upper left")
    for ax in axes:
        ax.grid()
    panels(axes)
    return figure


@styled
def run_steps(steps: pd.DataFrame, changes: pd.DataFrame) -> Figure:
    """A run's numbers over its steps with their intervals; a grey line where one changes.

    Reads of `steps` `step` and what there is of `k1, k3` with their ends, `worth`, `reward`; of `changes` `number, kind, step`.

    >>> import numpy as np
    >>> log_p = np.log(np.random.default_rng(0).uniform(0.2, 0.9, (64, 5)))
    >>> records = gl.Records.from_arrays(logprob=log_p, ref_logprob=log_p[::-1], step=np.repeat(np.arange(8), 8))
    >>> found = gl.inspect(records)
    >>> len(gl.plots.run_steps(found["steps"], found["changes"]).axes)
    2
    """
    x = steps["step"].to_numpy()
    drawn = {
        "k1": "k1",
        "k3": "k3",
        "mismatch": "k3 of the engine",
        "worth": "effective share of tokens",
        "reward": "reward",
        "length": "length",
    }
    panel_of: dict[str, list[str]] = {"KL, nats per token": [name for name in ("k1", "k3") if name in steps]}
    panel_of |= {title: [name] for name, title in drawn.items() if name not in ("k1", "k3") and name in steps}
    panel_of = {title: names for title, names in panel_of.items() if names}
    figure = Figure(figsize=(PAGE, 2.1 * -(-len(panel_of) // 2)))
    axes: Any = list(figure.subplots(-(-len(panel_of) // 2), 2, squeeze=False).flat)
    used = []
    for ax, (title, names) in zip(axes, panel_of.items(), strict=False):
        used.append(ax)
        for name in names:
            colour = hue(name) if name in ("k1", "k3") else NEUTRAL
            ax.plot(x, steps[name], color=colour, marker="o", markersize=2, label=name)
            if f"{name}_low" in steps:
                low, high = (steps[f"{name}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
                ax.fill_between(
                    x,
                    *(np.where(np.isfinite(end), end, steps[name]) for end in (low, high)),
                    color=colour,
                    alpha=0.2,
                    linewidth=0,
                )
            for row in changes[(changes["number"] == name) & (changes["kind"] == "change")].to_dict("records"):
                ax.axvline(row["step"], color="0.6", linestyle="--", linewidth=0.8)
        if len(names) > 1:
            ax.legend(handles=[handle(name) for name in names])
        ax.set(title=title, xlabel="step")
        ax.grid()
    for ax in axes[len(used) :]:
        ax.remove()
    panels(used)
    return figure
