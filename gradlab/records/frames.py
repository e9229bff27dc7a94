"""The frames of an inspection: what totals say of the KL, of estimators, weights, corrections and steps."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradlab._common.streams import generator
from gradlab.questions.tails import hill
from gradlab.records.corrections import CORRECTIONS
from gradlab.records.gaps import Gap, gap
from gradlab.records.means import NEEDED, mean
from gradlab.records.schema import NAMES
from gradlab.records.scored import estimators
from gradlab.records.steps import changes, trend
from gradlab.records.survey import Survey
from gradlab.records.table import Records
from gradlab.records.totals import EDGES, KERNELS, Totals, place_label

Array = npt.NDArray[Any]

#: Bootstrap replicates of the choice of a correction.
REPLICATES = 200

COLUMNS: dict[str, dict[str, str]] = {
    "kl": {
        "kernel": "k1, k2, k3; `δ − 1` is k3 − k1, whose expectation is 0 when the data are the policy's own",
        "per": "token or response",
        "value": "mean, nats", "low": "lower end of its interval", "high": "upper end, infinite where it cannot be known",
        "reliable": "whether enough groups carry the sum for Student's interval", "carriers": "how many equal ones it is as steady as",
    },
    "estimators": {
        "estimator": "name in the catalogue", "pull": "mean magnitude of its coefficient on a token's score",
        "over": "share of the pull on over-sampled tokens, ℓ > 0", "half": "number of tokens that carry half of the pull",
        "ten": "share of the pull on the ten largest tokens", "tail": "Hill's index of the coefficient's tail (below 2: infinite variance)",
        "tail_low": "lower end", "tail_high": "upper end",
        "batch": "responses from which on a batch's mean gradient is close to normal: noise allows a direction",
    },
    "weights": {
        "kind": "token, prefix, sequence or geometric", "by": "all, length or step", "at": "which length or step",
        "share": "effective sample size (Σw)²/Σw² over the number of weights",
        "chi2": "χ²(π‖μ) by the sample, n Σw²/(Σw)² − 1",
    },
    "corrections": {
        "correction": "name", "statement": "what stands for the weight",
        "removed_above": "share of tokens bounded or removed with a weight above 1",
        "removed_below": "share below 1", "bias": "E|f − w|: largest change of the mean of anything bounded by 1", "bias_low": "lower end",
        "bias_high": "upper end", "noise": "E f²", "error": "√(bias² + noise / responses of a step)",
        "wins": "share of bootstrap samples in which its error is the least",
    },
}  # fmt: skip


def overview_frame(records: Records, seen: Survey) -> pd.DataFrame:
    """One row: what the records are and how much they hold."""
    steps = seen.of("", "step")
    row = {
        "source": records.source, "format": records.format, "responses": len(seen.live), "tokens": int(seen.live.sum()),
        "steps": len(np.unique(steps)) if "step" in seen.columns else 1, "longest": int(seen.live.max()),
        "policies": " ".join(seen.policies),
    }  # fmt: skip
    return pd.DataFrame([row])


# ---- the KL -------------------------------------------------------------------------------------------------------------------


def kl_frame(totals: Totals, level: float) -> pd.DataFrame:
    """The KL by every kernel, per token and per response, with intervals."""
    r, rows = totals.responses, []
    r["δ − 1"] = r["k3"] - r["k1"]
    for kernel in (*KERNELS, "δ − 1"):
        for per, size in (("token", r["length"]), ("response", np.ones_like(r["length"]))):
            found = mean(r[kernel], size, r["cluster"], level, positive=kernel in ("k2", "k3"))
            rows.append({"kernel": kernel, "per": per, **vars(found)})
    return pd.DataFrame(rows)


def token_frames(totals: Totals, named: bool) -> dict[str, pd.DataFrame]:
    """Which tokens and places make the KL up: `places`, `largest` and, where ids are known, `tokens`."""
    columns = ["tokens", "k1", "k2", "k3"]
    places = pd.DataFrame(totals.by_place, columns=columns)
    places.insert(0, "place", [place_label(i) for i in range(len(places))])
    frames = {"places": places[places["tokens"] > 0].reset_index(drop=True)}
    single = pd.DataFrame(
        np.concatenate(totals.named), columns=["response", "place", "token_id", "log_ratio", "k3", "k1", "log_prob"]
    )
    frames["largest"] = single.astype({"response": int, "place": int, "token_id": int})
    frames["largest"]["token"] = [totals.texts.get(i, "") for i in frames["largest"]["token_id"]]
    if named and len(totals.by_token):
        tokens = pd.DataFrame(totals.by_token, columns=columns).rename_axis("token_id").reset_index()
        tokens = tokens[tokens["tokens"] > 0]
        shown = pd.concat(
            [tokens.nlargest(20, "k3"), tokens.assign(size=tokens["k1"].abs()).nlargest(20, "size")[tokens.columns]]
        )
        frames["tokens"] = shown.drop_duplicates("token_id").sort_values("k3", ascending=False, ignore_index=True)
        frames["tokens"]["token"] = [totals.texts.get(i, "") for i in frames["tokens"]["token_id"]]
    for frame in frames.values():
        frame["share"] = frame["k3"] / max(totals.responses["k3"].sum(), 1e-300)
    return frames


def ratios_frame(totals: Totals) -> pd.DataFrame:
    """Histograms of log-ratios and log-weights."""
    rows = []
    for name, counts in totals.ratios.items():
        ends = np.concatenate([[-np.inf], EDGES, [np.inf]])
        rows.append(pd.DataFrame({"ratio": name, "low": ends[:-1], "high": ends[1:], "share": counts / max(counts.sum(), 1)}))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["ratio", "low", "high", "share"])


# ---- estimators -----------------------------------------------------------------------------------------------------------------


def estimators_frame(totals: Totals) -> pd.DataFrame:
    """What each estimator would put on these tokens."""
    r, rows = totals.responses, []
    tokens, responses = r["length"].sum(), len(r["length"])
    for name in estimators():
        pull, over, second, third = totals.pulls[name].tolist()
        largest = np.sort(totals.largest.get(name, np.zeros(0)))[::-1]
        k = max(10, int(len(largest) ** 0.5) * 2)
        tail = float("nan")
        if k < len(largest):
            tail = hill(largest, k) if largest[0] > largest[k] else float("inf")
        steady = second**3 / third**2 if 0 < third < np.inf else 0.0
        row = {
            "estimator": name, "pull": pull / tokens, "over": over / pull if pull else np.nan,
            "half": _half(totals.sizes.get(name), pull, largest), "ten": largest[:10].sum() / pull if pull else np.nan,
            "tail": tail, "tail_low": tail / (1 + 1.96 / k**0.5), "tail_high": tail / max(1 - 1.96 / k**0.5, 1e-9),
            "batch": int(np.ceil(NEEDED * responses / steady)) if steady else None,
        }  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows).astype({"half": "Int64", "batch": "Int64"})


def _half(sizes: Array | None, pull: float, largest: Array) -> int | None:
    """How many of the largest magnitudes carry half: exactly where they are kept, else from the histogram."""
    if sizes is None or not pull > 0:
        return None
    running = np.cumsum(largest)
    if len(running) and running[-1] >= pull / 2:
        return int(np.searchsorted(running, pull / 2 * (1 - 1e-12)) + 1)
    counts, sums = sizes[::-1, 0], sizes[::-1, 1]
    at = int(np.searchsorted(np.cumsum(sums), pull / 2))
    before, rest = np.cumsum(counts)[at] - counts[at], pull / 2 - (np.cumsum(sums)[at] - sums[at])
    return int(before + np.ceil(rest / sums[at] * counts[at]))


# ---- weights ----------------------------------------------------------------------------------------------------------------------


def _share(total: float, square: float, count: float) -> dict[str, float]:
    with np.errstate(over="ignore"):
        share = total**2 / (count * square) if np.isfinite(square) and square > 0 else 0.0
    return {"share": share, "chi2": 1 / share - 1 if share else float("inf")}


def weights_frame(totals: Totals) -> pd.DataFrame:
    """Effective sample sizes by kind of weight: of all, against the length, and by step."""
    r = totals.responses
    with np.errstate(over="ignore"):
        each = {"sequence": np.exp(r["log_weight"]), "geometric": np.exp(r["log_weight"] / r["length"])}

        def rows(by: str, at: Any, some: Array) -> list[dict[str, Any]]:
            found = [("token", r["weight"][some].sum(), r["weight_square"][some].sum(), r["length"][some].sum())]
            found += [(kind, w[some].sum(), (w[some] ** 2).sum(), some.sum()) for kind, w in each.items()]
            return [{"kind": kind, "by": by, "at": at, **_share(*parts)} for kind, *parts in found]

        table = rows("all", "", np.ones(len(r["length"]), dtype=bool))
        for b, (count, total, square) in enumerate(totals.prefix):
            if count:
                table.append({"kind": "prefix", "by": "length", "at": place_label(b), **_share(total, square, count)})
        for step in np.unique(r["step"]) if len(np.unique(r["step"])) > 1 else []:
            table += rows("step", int(step), r["step"] == step)
    return pd.DataFrame(table)


def corrections_frame(totals: Totals, level: float, seed: int) -> pd.DataFrame:
    """Bias, noise and error of every correction, and how often it is the best of bootstrap samples."""
    r = totals.responses
    batch = len(r["length"]) / len(np.unique(r["step"]))
    _, index = np.unique(r["cluster"], return_inverse=True)
    sums = {"length": np.bincount(index, r["length"])}
    rows = []
    for name, correction in CORRECTIONS.items():
        bias = mean(r[f"{name} bias"], r["length"], r["cluster"], level, positive=True)
        noise = r[f"{name} square"].sum() / r["length"].sum()
        above, below = (
            r[f"{name} {side}"].sum() / r["length"].sum() if correction.bounds else 0.0 for side in ("above", "below")
        )
        sums |= {f"{name} {what}": np.bincount(index, r[f"{name} {what}"]) for what in ("bias", "square")}
        row = {
            "correction": name, "statement": correction.statement, "removed_above": above, "removed_below": below, "bias": bias.value,
            "bias_low": bias.low, "bias_high": bias.high, "noise": noise, "error": (bias.value**2 + noise / batch) ** 0.5,
            "reliable": bias.reliable,
        }  # fmt: skip
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame["wins"] = _wins(sums, batch, seed)
    return frame


def _wins(sums: dict[str, Array], batch: float, seed: int) -> Array:
    """Of how many bootstrap samples of the clusters each correction has the least error."""
    rng, count = generator(seed, "records.corrections"), len(sums["length"])
    columns = np.stack(list(sums.values()), -1)
    with np.errstate(invalid="ignore", over="ignore"):
        drawn = np.stack([np.bincount(rng.integers(count, size=count), minlength=count) @ columns for _ in range(REPLICATES)])
        bias, noise = (drawn[:, k::2] / drawn[:, :1] for k in (1, 2))
        error = np.sqrt(bias**2 + noise / batch)
    # Of equal ones the simplest is chosen: none first, the exact weight next, and then in the order of the table.
    order = np.array([0, error.shape[1] - 1, *range(1, error.shape[1] - 1)])
    lowest = np.nan_to_num(error, nan=np.inf)[:, order]
    best = order[(lowest <= lowest.min(1, keepdims=True) * (1 + 1e-9)).argmax(1)]
    return np.bincount(best, minlength=error.shape[1]) / REPLICATES


def engine_frame(seen: Survey, usable: set[str]) -> pd.DataFrame:
    """Policies that should be near each other, and what kind of difference there is."""
    rows = []
    for (base, other), thinned in seen.gaps.items():
        if {base, other} <= usable and other != "ref_logprob":
            pairs = seen.siblings.get((base, other))
            found = gap(thinned.rows, np.zeros((0, 2)) if pairs is None else pairs.rows)
            rows.append({"first": NAMES[base], "second": NAMES[other], **vars(found)})
    names = ["first", "second", *(field.name for field in fields(Gap))]
    return pd.DataFrame(rows, columns=names)


# ---- steps ------------------------------------------------------------------------------------------------------------------------

#: Numbers of a step, by their name and what they are sums of.
SERIES = {"k1": "k1", "k3": "k3", "mismatch": "mismatch", "surprise": "surprise"}


def steps_frame(totals: Totals, level: float) -> pd.DataFrame:
    """Numbers of every step, with their intervals."""
    r, rows = totals.responses, []
    for step in np.unique(r["step"]):
        some = r["step"] == step
        row: dict[str, Any] = {"step": int(step), "responses": int(some.sum()), "length": float(r["length"][some].mean())}
        if "reward" in r:
            row["reward"] = float(np.nanmean(r["reward"][some])) if np.isfinite(r["reward"][some]).any() else float("nan")
        for name, column in SERIES.items():
            if column in r:
                found = mean(r[column][some], r["length"][some], r["cluster"][some], level, positive=name in ("k3", "mismatch"))
                row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        if "weight" in r:
            row["worth"] = _share(r["weight"][some].sum(), r["weight_square"][some].sum(), r["length"][some].sum())["share"]
        if "removed" in r:
            row["removed"] = float(r["removed"][some].sum() / r["length"][some].sum())
        rows.append(row)
    return pd.DataFrame(rows)


def changes_frame(steps: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Trends of the numbers over steps, and where they change."""
    rows: list[dict[str, Any]] = []
    for name in ("k1", "k3", "mismatch", "surprise", "worth", "reward", "length"):
        if name not in steps or not np.isfinite(steps[name]).all():
            continue
        values, at = steps[name].to_numpy(), steps["step"].to_numpy()
        slope, tau, p = trend(at, values)
        row = {"number": name, "step": None, "before": values[0], "after": values[-1]}
        rows.append(row | {"kind": "trend", "slope": slope, "tau": tau, "p": p})
        places = changes(values, seed)
        cuts = [0, *(k for k, _ in places), len(values)]
        for i, (k, p_value) in enumerate(places):
            before, after = values[cuts[i] : k].mean(), values[k : cuts[i + 2]].mean()
            row = {"number": name, "step": int(at[k]), "before": before, "after": after}
            rows.append(row | {"kind": "change", "slope": np.nan, "tau": np.nan, "p": p_value})
    names = ["number", "kind", "step", "before", "after", "slope", "tau", "p"]
    return pd.DataFrame(rows, columns=names).astype({"step": "Int64"})
