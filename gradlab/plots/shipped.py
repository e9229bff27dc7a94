"""Figures of what frameworks ship: which objective each kind of loss descends, and what to set where."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from gradlab.plots.style import PAGE, Figure, panels, small, styled

#: Objectives shown, with a name short enough for a column.
TARGETS = {
    "reverse_kl": "reverse KL",
    "reverse_kl_frozen_prefix": "… frozen prefix",
    "forward_kl": "forward KL",
    "forward_kl_frozen_prefix": "… frozen prefix",
    "chi2_frozen_prefix": "χ²",
    "jensen_shannon_frozen_prefix": "Jensen–Shannon",
    "total_variation_frozen_prefix": "total variation",
    "inverse_length": "E[1/L]",
    "behaviour_kl": "KL(μ‖π)",
}


@styled
def shipped_kinds(frame: pd.DataFrame) -> Figure:
    """Kinds of shipped losses: how many configurations of each framework, and the cosine with every objective.

    Reads one row per kind, policy and target: `kind, policy, target, cosine, match`, and one column `n_<framework>` per
    framework. A full frame marks equality, a dashed one equality in a limited scope; a blank cell has no direction.

    >>> frame = gl.claims.load("figures", ["12_kinds"])["12_kinds"]
    >>> len(gl.plots.shipped_kinds(frame).axes)
    4
    """
    frame = frame.fillna({"match": ""})
    names = list(dict.fromkeys(frame["kind"]))
    frameworks = [column.removeprefix("n_") for column in map(str, frame) if column.startswith("n_")]
    figure = Figure(figsize=(PAGE, 1.45 + 0.152 * len(names)))
    left, *axes = figure.subplots(1, 3, sharey=True, width_ratios=[len(frameworks), len(TARGETS), len(TARGETS)])
    counts = frame.drop_duplicates("kind").set_index("kind")
    for x, framework in enumerate(frameworks):
        for y, name in enumerate(names):
            count = int(counts[f"n_{framework}"].to_dict()[name])
            if count:
                left.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color="#DCE9F2", linewidth=0))
                left.text(x, y, str(count), ha="center", va="center", fontsize=small())
    left.set_xticks(range(len(frameworks)), frameworks, rotation=90)
    left.set(title="configurations", xlim=(-0.5, len(frameworks) - 0.5))
    left.set_yticks(range(len(names)), names, fontsize=small())
    for ax, policy in zip(axes, ("on", "off"), strict=True):
        _cells(ax, frame[frame["policy"] == policy], names)
        ax.set_title(f"{policy}-policy")
    left.set_ylim(len(names) - 0.5, -0.5)
    for ax in (left, *axes):
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    # The grey level of a printed page and the sign both survive a red–blue scale.
    figure.colorbar(axes[-1].images[0], ax=axes, label="cosine with the gradient of the objective", orientation="horizontal",
                    shrink=0.6, aspect=45, pad=0.01)  # fmt: skip
    panels([left, *axes])
    return figure


def _cells(ax: Axes, part: pd.DataFrame, names: list[str]) -> None:
    targets = list(TARGETS)
    wide = part.pivot_table(index="kind", columns="target", values="cosine", dropna=False).loc[names, targets]
    ax.imshow(wide.to_numpy(dtype=float), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for row in part[part["match"] != ""].to_dict("records"):
        if row["target"] in targets:
            corner = targets.index(row["target"]) - 0.46, names.index(row["kind"]) - 0.44
            style = {"linewidth": 1.2} if row["match"] == "everywhere" else {"linewidth": 0.9, "linestyle": (0, (1.5, 1.2))}
            ax.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor="black", **style))
    ax.set_xticks(range(len(targets)), list(TARGETS.values()), rotation=90)


#: Goals as the columns of the table of settings.
GOALS = {
    ("reverse_kl", "on"): "sequence reverse KL,\non-policy",
    ("reverse_kl", "off"): "sequence reverse KL,\noff-policy",
    ("reverse_kl_frozen_prefix", "on"): "with frozen prefixes,\non-policy",
    ("reverse_kl_frozen_prefix", "off"): "with frozen prefixes,\noff-policy",
}


#: Scope → colour of its cell, and what limits it in words.
SHADES = {"everywhere": "#B9D6EA", "not far": "#E4EFF7", "near": "#E4EFF7", "": "#EEEEEE"}
LIMITS = {"not far": "until a clamp binds", "near": "near the sampler only"}


@styled
def shipped_settings(frame: pd.DataFrame) -> Figure:
    """What to set in each framework to descend each goal; in a grey cell nothing does.

    Reads `framework, version, target, policy, subject, scope, others, configurations`. A `subject` is the name of a
    configuration, `others` how many more descend the same; where the scope is limited the cell is pale and says so.

    >>> frame = gl.claims.load("figures", ["12_settings"])["12_settings"]
    >>> len(gl.plots.shipped_settings(frame).axes)
    1
    """
    frame = frame.fillna({"subject": "", "scope": "", "configuration": ""})  # no text is read from a file as missing
    rows = frame.drop_duplicates("framework")
    figure = Figure(figsize=(PAGE, 0.75 + 0.42 * len(rows)))
    ax = figure.subplots()
    for y, (_, head) in enumerate(rows.iterrows()):
        for x, (target, policy) in enumerate(GOALS):
            part = frame[(frame["framework"] == head["framework"]) & (frame["target"] == target) & (frame["policy"] == policy)]
            cell = part.iloc[0]
            name = str(cell["subject"]).removeprefix(f"{head['framework']} ")
            ax.add_patch(Rectangle((x - 0.49, y - 0.46), 0.98, 0.92, color=SHADES[str(cell["scope"])], linewidth=0))
            more = f"\n+ {cell['others']} more" if cell["others"] else ""
            limit = "" if cell["scope"] in ("", "everywhere") else f"\n({LIMITS[str(cell['scope'])]})"
            text = _wrapped(name) + more + limit if name else "no configuration"
            ax.text(x, y, text, ha="center", va="center", fontsize=small(), color="black" if name else "#777777")
    labels = [f"{h['framework']} {h['version']}\n{h['configurations']} configurations" for _, h in rows.iterrows()]
    ax.set_yticks(range(len(rows)), labels)
    ax.set_xticks(range(len(GOALS)), list(GOALS.values()))
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set(xlim=(-0.5, len(GOALS) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    ax.spines[:].set_visible(False)
    return figure


def _wrapped(name: str, width: int = 26) -> str:
    words, lines = name.split(), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
