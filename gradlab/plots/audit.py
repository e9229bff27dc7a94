"""Figures of audited losses: what one token is pulled by, and which objectives the expected gradients point along."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from gradlab.plots.style import PAGE, TRUTH, Figure, panels, styled

#: Distinct curves that one panel can hold, and how they are told apart.
CURVES = 8
_DASHES = ("-", "--", "-.", ":")


@styled
def audited_curves(frame: pd.DataFrame) -> Figure:
    """Coefficient on the score of one token against its log-ratio, whole and close up; the line of k2 and k1 in reward is black.

    Reads `subject, log_ratio, coefficient`, at least the rows of one subject. Subjects with one curve share a line and a
    label; the commonest curves are drawn, and the title says how many are not. A gap in a line is a coefficient that is not a number.

    >>> frame = gl.claims.load("figures", ["12_pulls"])["12_pulls"]
    >>> len(gl.plots.audited_curves(frame).axes)
    2
    """
    by_subject = frame.groupby("subject", sort=False)
    wide = pd.DataFrame({name: part.set_index("log_ratio")["coefficient"] for name, part in by_subject})
    kinds: dict[bytes, list[str]] = {}
    for name in wide:
        kinds.setdefault(np.round(wide[name].to_numpy(dtype=float), 6).tobytes(), []).append(str(name))
    groups = sorted(kinds.values(), key=len, reverse=True)
    figure = Figure(figsize=(PAGE, 2.6 + 0.13 * min(len(groups), CURVES)))
    axes = figure.subplots(1, 2)
    for ax, x_limit in zip(axes, (wide.index.max(), 4.0), strict=True):
        part = wide[wide.index.to_series().abs() <= x_limit]
        line = {**TRUTH, "zorder": 3, "dashes": (1, 2.5)}
        ax.plot(part.index, part.index, **line, label="ℓ, as k2 in the loss and k1 in the reward have it")
        for k, names in enumerate(groups[:CURVES]):
            label = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            curve = part[names[0]].where(np.isfinite(part[names[0]]))
            ax.plot(part.index, curve, f"C{k % 6}{_DASHES[k // 6 % 4]}", linewidth=2.2 - 1.2 * k / CURVES, label=label)
        ax.set(xlabel="log-ratio ℓ = log π(y) − log ref(y)", xlim=(-x_limit, x_limit))
        ax.grid()
    axes[0].set_yscale("symlog", linthresh=1)
    finite = np.abs(wide.to_numpy(dtype=float))
    decades = int(np.ceil(np.log10(np.max(finite, initial=10.0, where=np.isfinite(finite)))))
    # Zero lies between the two ends of the linear part, which leave no room for a label.
    axes[0].set_yticks([sign * 10.0**k for sign in (-1, 1) for k in range(0, decades + 1, -(-decades // 5))])
    axes[0].set(ylabel="coefficient on ∇log π(y)", title="whole range")
    near_curves = wide[wide.index.to_series().abs() <= 4].to_numpy(dtype=float)
    bound = float(np.clip(np.nanmax(np.abs(near_curves), initial=1.0, where=np.isfinite(near_curves)), 1.0, 8.0))
    left_out = f", {len(groups) - CURVES} further curves not shown" if len(groups) > CURVES else ""
    axes[1].set(ylim=(-bound, bound), title=f"close up{left_out}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(labels) > 4 else 1, handlelength=2.4)
    panels(axes)
    return figure


@styled
def matches(frame: pd.DataFrame) -> Figure:
    """Cosine of each expected gradient with that of each objective, on-policy and off-policy; framed where they are equal.

    Reads `subject, policy` (`on`, `off`), `target, cosine, equal`; a blank cell has no direction to compare.

    >>> def k2(log_probs, ref_log_probs, mask):
    ...     return (mask * (log_probs - ref_log_probs) ** 2 / 2).sum() / len(mask)
    >>> frame = gl.audit(k2).cosines.assign(subject="k2")
    >>> len(gl.plots.matches(frame.assign(equal=frame["cosine"] > 1 - 1e-9)).axes)
    3
    """
    names, targets = list(dict.fromkeys(frame["subject"])), list(dict.fromkeys(frame["target"]))
    figure = Figure(figsize=(PAGE, 1.9 + 0.17 * len(names)))
    axes = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    for ax, policy in zip(axes, ("on", "off"), strict=True):
        part = frame[frame["policy"] == policy]
        cosines = {name: rows.set_index("target")["cosine"] for name, rows in part.groupby("subject")}
        grid = np.array([cosines[name][targets].to_numpy(dtype=float) for name in names])
        image = ax.imshow(grid, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        for row in part[part["equal"]].to_dict("records"):
            corner = targets.index(row["target"]) - 0.5, names.index(row["subject"]) - 0.5
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.4))
        ax.set_xticks(range(len(targets)), [target.replace("_", " ") for target in targets], rotation=90)
        ax.tick_params(length=0, labeltop=len(names) > 20)  # a long one is read from both ends
        ax.set_title(f"{policy}-policy")
        ax.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(names)), [textwrap.shorten(name, 60, placeholder="…") for name in names])
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.9, aspect=30, pad=0.01)
    panels(axes)
    return figure
