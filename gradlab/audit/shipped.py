"""What training frameworks ship: audits of every configuration as frames, which of them behave alike, and what to set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import joblib
import numpy as np
import pandas as pd

from gradlab._common.parallel import spread
from gradlab.audit import adapters
from gradlab.audit.batch import Subject
from gradlab.audit.run import Audit, audit, frame

#: What one may want to descend, and on whose data: the sequence reverse KL, or what a token-level loss can have of it.
GOALS = (
    ("reverse_kl", "on"),
    ("reverse_kl", "off"),
    ("reverse_kl_frozen_prefix", "on"),
    ("reverse_kl_frozen_prefix", "off"),
)
#: Scopes in which a setting is worth naming: responses of any length, at least near the reference.
SCOPES = ("everywhere", "not far", "near")
#: Cosines closer than this are the same: two losses differ by more, one loss at two precisions by less.
ALIKE = 1e-5


def audits(subjects: Sequence[Subject], jobs: int = 1) -> list[Audit]:
    """Audit the KL part of every subject, `jobs` at a time; the same result for any number of them."""
    return spread((joblib.delayed(audit)(subject, policy=False) for subject in subjects), jobs)


def configurations(audited: Sequence[Audit]) -> pd.DataFrame:
    """`frame`, with the framework, whether it is the limit of a large batch, and `kind`, see `verdict_kinds`.

    `moving` says whether any gradient is left in the mean: where pulls cancel there is no direction to compare.
    """
    subset = frame(audited)
    limit = {a.subject.name: bool(a.subject.configuration.get("large_batch", False)) for a in audited}
    return subset.assign(
        framework=subset["subject"].str.split().str[0],
        large_batch=subset["subject"].map(limit),
        kind=subset["subject"].map(verdict_kinds(subset, directions(audited))),
        moving=subset["closest"] != "zero",
    )


def directions(audited: Sequence[Audit]) -> pd.DataFrame:
    """How every expected gradient lies to that of every objective: `subject, policy, target, cosine, degrees, moving, match`.

    `degrees` is the angle of that cosine, the mean over worlds, to 1e-5 degrees: a cosine in float64 tells 1e-6 from 0 no more.
    `match`: `everywhere` or `limited` (in some scope) where the gradient is a multiple of that one objective's, else empty.
    """
    rows = []
    for a in audited:
        for row in a.cosines.to_dict("records"):
            verdict = a.on_policy if row["policy"] == "on" else a.off_policy
            match = "" if list(verdict.combination) != [row["target"]] else "limited"
            match = "everywhere" if match and verdict.scope == "everywhere" else match
            angle = round(math.degrees(math.acos(min(max(row["cosine"], -1.0), 1.0))), 5)
            rows.append(
                {"subject": a.subject.name, **row, "degrees": angle, "moving": verdict.closest != "zero", "match": match}
            )
    return pd.DataFrame(rows)


def curves(audited: Sequence[Audit]) -> pd.DataFrame:
    """Coefficient of one token against its log-ratio: `subject, log_ratio, coefficient`, for losses of single responses."""
    parts = [a.curve.assign(subject=a.subject.name) for a in audited if (a.subject.group or 1) == 1]
    return pd.concat(parts, ignore_index=True)[["subject", "log_ratio", "coefficient"]]


def distinct(curves: pd.DataFrame) -> pd.DataFrame:
    """One curve for all that are the same up to |ℓ| = 20, labelled by the first and the number of the others.

    Further out float64 cannot tell the terms of k3 times the ratio from each other: what it should be there is rounding.
    """
    distinct_curves: dict[str, pd.DataFrame] = {}
    counts: dict[str, int] = {}
    for name, part in curves.groupby("subject", sort=False):
        same = [
            k for k, rows in distinct_curves.items() if np.allclose(_within(rows), _within(part), 1e-4, 1e-4, equal_nan=True)
        ]
        representative = same[0] if same else str(name)
        distinct_curves.setdefault(representative, part)
        counts[representative] = counts.get(representative, 0) + 1
    order = sorted(distinct_curves, key=lambda name: -counts[name])
    labels = {name: name + (f" and {counts[name] - 1} more" if counts[name] > 1 else "") for name in order}
    return pd.concat([distinct_curves[name].assign(subject=labels[name]) for name in order], ignore_index=True)


def _within(curve: pd.DataFrame, reach: float = 20.0) -> np.ndarray[Any, Any]:
    return curve.loc[curve["log_ratio"].abs() <= reach, "coefficient"].to_numpy()


def verdict_kinds(audits_frame: pd.DataFrame, cosines: pd.DataFrame) -> dict[str, str]:
    """Configurations with the same verdicts, under the name of the first; where nothing matches, with the same cosines.

    Returns subject → name of its kind. Scales and failed probes may differ.
    """
    wide = cosines.pivot_table(index="subject", columns=["policy", "target"], values="cosine", dropna=False)
    verdicts = audits_frame.pivot_table(index="subject", columns="policy", values="verdict", aggfunc="first")
    first: dict[tuple[object, ...], str] = {}
    kind = {}
    for name in dict.fromkeys(audits_frame["subject"]):
        same = tuple(verdicts.loc[name])
        if set(same) == {"none"}:
            same = tuple((wide.loc[name] / ALIKE).round().fillna(-1).astype(int))
        kind[name] = first.setdefault(same, name)
    return kind


def by_kind(audits_frame: pd.DataFrame, cosines: pd.DataFrame) -> pd.DataFrame:
    """`directions` of the first configuration of every kind, with the number of configurations per framework, `n_<framework>`.

    Ordered by what they descend on-policy.
    """
    counts = audits_frame[audits_frame["policy"] == "on"].pivot_table(
        index="kind", columns="framework", aggfunc="size", fill_value=0
    )
    counts = counts[list(dict.fromkeys(audits_frame["framework"]))].add_prefix("n_").reset_index()
    on = audits_frame[(audits_frame["policy"] == "on") & (audits_frame["subject"] == audits_frame["kind"])].set_index("kind")[
        "verdict"
    ]
    order = sorted(on.index, key=lambda name: _rank(str(on.to_dict()[name])))
    rows = cosines[cosines["subject"].isin(order)].rename(columns={"subject": "kind"}).merge(counts, on="kind")
    return rows.sort_values("kind", key=lambda column: column.map(order.index), kind="stable").reset_index(drop=True)


def _rank(verdict: str) -> tuple[int, str, bool]:
    """Whole matches of one objective first, objectives together, then combinations, then what is unknown, then nothing."""
    name, _, scope = verdict.partition(" [")
    last = {"none": 3, "unresolved": 3, "zero": 4}.get(name, 2 if " " in name else 1)
    return last, name if last > 1 or not name.startswith("reverse") else f" {name}", bool(scope)


def settings(audits_frame: pd.DataFrame) -> pd.DataFrame:
    """What to set in each framework to descend each of `GOALS`: one row per framework and goal.

    Of the configurations that descend a goal without leaking into padding: those that do so everywhere before those whose
    clamps bind far from the reference (`scope`); then the fewest failed probes, then the framework's own order. `others`
    counts the rest of that scope. Where none does, `subject` is empty.
    """
    rows = []
    for framework, part in audits_frame.groupby("framework", sort=False):
        for target, policy in GOALS:
            fits = part[(part["policy"] == policy) & ~part["failures"].str.contains("mask")]
            fits = fits.assign(count=fits["failures"].str.count(";") + (fits["failures"] != ""))
            best, scope = pd.DataFrame(), ""
            for scope in SCOPES:
                best = fits[fits["verdict"] == (target if scope == "everywhere" else f"{target} [{scope}]")]
                if len(best):
                    break
            best = best.sort_values(["count", "large_batch"], kind="stable") if len(best) else best
            row = best.iloc[0] if len(best) else pd.Series({"subject": "", "configuration": "", "scale": float("nan")})
            rows.append(
                {
                    "framework": framework, "version": part["version"].iloc[0], "target": target, "policy": policy,
                    "subject": row["subject"], "configuration": row["configuration"], "scale": row["scale"],
                    "scope": scope if len(best) else "", "others": max(len(best) - 1, 0),
                    "configurations": part["subject"].nunique(),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def measured(only: Sequence[str] | None = None, jobs: int = 1) -> list[Audit]:
    """Audits of every configuration of the installed frameworks, or of those named."""
    return audits(adapters.subjects(only), jobs)
