"""What an inspection's frames say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gradlab.records.corrections import CLIP
from gradlab.records.schema import NAMES
from gradlab.records.totals import Totals

Frames = Mapping[str, pd.DataFrame]

#: k1 and k3 agree when they differ by at most this share of the larger.
AGREE = 0.1
#: A step whose k3 is so many times the median one's is a spike.
SPIKE = 3.0
#: Mean magnitude of log ρ of a token up to which data are taken to be the policy's own.
OWN = 0.05
#: p-value up to which a trend is told.
TREND = 0.01


def interval(row: Mapping[Any, Any]) -> str:
    """`0.12 [0.1, 0.14]`, with `∞` for an open end."""
    low, high = (f"{row[end]:.3g}".replace("inf", "∞").replace("-", "−") for end in ("low", "high"))
    return f"{row['value']:.3g} [{low}, {high}]".replace("-", "−")


def of_kl(frames: Frames, totals: Totals) -> list[str]:
    """How large the KL is, and whether a difference of k3 and k1 is the policy's or the estimator's."""
    rows = {row["kernel"]: row for row in frames["kl"].to_dict("records") if row["per"] == "response"}
    k1, k3, error = rows["k1"], rows["k3"], rows["δ − 1"]
    told = [f"KL of {NAMES[totals.policy]} from the reference, nats per response: k1 {interval(k1)}, k3 {interval(k3)}"]
    tokens = int(totals.responses["length"].sum())
    carry = f"ten of {tokens:,} tokens carry {frames['largest']['share'].head(10).sum():.0%} of k3"
    own = totals.behaviour is None or float(totals.responses["absolute"].sum()) <= OWN * tokens
    apart = abs(error["value"])
    if apart <= AGREE * max(abs(k1["value"]), abs(k3["value"])):
        unknown = "" if k3["reliable"] else f"; but {carry}, and how large k3's mean may be is not known from these"
        told.append(f"k1 and k3 agree to {apart:.2g} nats{unknown}")
    elif not own:
        told.append(
            f"k3 − k1 = mean δ − 1 = {interval(error)}, which is 0 in expectation on the policy's own data only: another policy drew "
            f"these (see the weights), so that neither k1 nor k3 is a KL; {carry}"
        )
    elif not error["reliable"]:
        sure = "believe k1" if k1["reliable"] else "k1 is not sure either, so more responses are needed"
        told.append(
            f"k3 − k1 = mean δ − 1 = {error['value']:.3g}, whose expectation is 0 on the policy's own data: this is the estimator's "
            f"error and no distance; {carry}; {sure}"
        )
    else:
        told.append(
            f"k3 − k1 = mean δ − 1 = {interval(error)} is 0 in expectation on the policy's own data, and is not: the reference emits what "
            "the policy never does, or another policy drew these"
        )
    square = float(totals.responses["square"].sum() / tokens)
    told.append(f"χ²(reference ‖ policy) by the sample is {square:.3g} per token: the variance of k3's coefficient, 1 − δ")
    return told


def of_weights(frames: Frames, totals: Totals) -> list[str]:
    """What the weights are worth, which correction is best, and what the run and a clip remove."""
    weights = frames["weights"][frames["weights"]["by"] == "all"]
    shares = [f"{row['share']:.1%} by {row['kind']} weight" for row in weights.to_dict("records")]
    told = ["effective sample size: " + ", ".join(shares)]
    frame = frames["corrections"]
    best = max(frame.to_dict("records"), key=lambda row: row["wins"])
    exact = frame[frame["correction"] == "sequence"].to_dict("records")[0]
    tokens = totals.responses["length"].sum()
    if float(totals.responses["absolute"].sum()) == 0:
        told.append(f"{NAMES[totals.policy]} is {NAMES[str(totals.behaviour)]} at every token: no correction is needed")
    elif not bool(frame["reliable"].all()):
        told.append(
            "which correction is best cannot be told: few responses carry the exact weight Πρ, so that the bias of the others is not known"
        )
    else:
        told.append(
            f"of the corrections, {best['correction']} ({best['statement']}) has the least error at the size of a step, "
            f"{best['error']:.3g} against {exact['error']:.3g} of the exact weight, in {best['wins']:.0%} of bootstrap samples"
        )
    if "removed" in totals:
        above = totals.responses["removed above"].sum() / tokens
        removed = totals.responses["removed"].sum() / tokens
        told.append(f"the run itself removes {removed:.2%} of the tokens from the gradient, {above:.2%} with ρ > 1")
    if "clip above" in totals:
        above, below = (totals.responses[f"clip {side}"].sum() / tokens for side in ("above", "below"))
        told.append(
            f"a clip at 1 ± {CLIP:g} silences {above + below:.2%} of the tokens: {above:.2%} above with a positive advantage, "
            f"{below:.2%} below with a negative one"
        )
    return told


def of_engine(frames: Frames) -> list[str]:
    """What kind of difference there is between two policies that should be near each other."""
    return [f"{row['first']} and {row['second']}: {row['sentence']}" for row in frames["engine"].to_dict("records")]


def of_steps(frames: Frames) -> list[str]:
    """Whose a spike is, where numbers change, and how they go."""
    steps, told = frames["steps"], []
    if "k3" in steps:
        middle, usual = float(steps["k3"].median()), float(steps["k1"].median())
        worst = max(steps.to_dict("records"), key=lambda row: row["k3"])
        if middle > 0 and worst["k3"] > SPIKE * middle:
            rise, moved = worst["k3"] - middle, worst["k1"] - usual
            whose = "the policy's" if moved > 0.5 * rise else "the estimator's"
            told.append(
                f"k3 spikes to {worst['k3']:.3g} nats per token at step {worst['step']}, {worst['k3'] / middle:.3g} times the median "
                f"step's; k1 moved by {moved:.3g} of the {rise:.3g}: the spike is {whose}"
            )
    for row in frames["changes"].to_dict("records"):
        before, after = f"{row['before']:.3g}", f"{row['after']:.3g}"
        if row["kind"] == "change":
            told.append(f"{row['number']} changes at step {row['step']}: {before} before, {after} after (p {row['p']:.2g})")
        elif row["p"] < TREND:
            way = "rises" if row["tau"] > 0 else "falls"
            told.append(f"{row['number']} {way} over the steps, from {before} to {after} (Kendall's τ {row['tau']:.2f})")
    return told or ["nothing changes over the steps that chance does not"]
