# %% [markdown]
# # How do bias and noise depend on the distance from the reference?
#
# A regulariser that keeps a policy near its reference is used at small KL most of the time. Losses that differ by what is of
# second order in the log-ratio agree there; how near is near, and at what batch size would anyone notice?

# %%
import numpy as np
import pandas as pd

import gradlab as gl
from gradlab.questions import distance
from gradlab.solvers import markov

study = gl.report.study("04_bias_and_noise_against_distance")
REVERSE, FROZEN = "reverse_kl", "reverse_kl_frozen_prefix"
BIAS_FLOOR = distance.BIAS_FLOOR

# %% [markdown]
# ## The whole catalogue, from 1e-4 to 5 nats
#
# Random policies, each with references at every distance along a random direction in logit space. Bandits and trees are
# enumerated, chains are solved by dynamic programming, so nothing here is sampled.

# %%
COUNTS = {"bandit": study.pick(full=40, quick=8), "tree": study.pick(full=40, quick=5), "markov": study.pick(full=8, quick=2)}
kls = np.geomspace(1e-4, 5, study.pick(full=12, quick=6))
points = study.pick(full=4, quick=3)
estimators = {
    **gl.ESTIMATORS,
    "k1-loss+reward-to_go": gl.Estimator("k1", "loss+reward", "to_go"),
    "k2-loss+reward-to_go": gl.Estimator("k2", "loss+reward", "to_go"),
}
scenarios = {
    family: distance.sweep(distance.random_policies(family, count, study.seed), kls, study.seed)
    for family, count in COUNTS.items()
}
solved = {name: loss for name, loss in estimators.items() if markov.decomposes(loss)}
quick_chains = {
    name: loss for name, loss in solved.items() if not (loss.weight != "none" or loss.baseline or loss.normalise != "sum")
}
losses = {"bandit": estimators, "tree": estimators, "markov": study.pick(full=solved, quick=quick_chains)}
measured = pd.concat(
    [gl.measure(losses[family], part, target=[REVERSE, FROZEN], jobs=study.jobs) for family, part in scenarios.items()],
    ignore_index=True,
)


def on_grid(frame: pd.DataFrame) -> pd.DataFrame:
    """The KL each reference was made for, free of its last digits."""
    nearest = np.abs(np.log(frame["kl"].to_numpy()[:, None] / kls)).argmin(-1)
    return frame.assign(kl=np.array([float(f"{kl:.6g}") for kl in kls])[nearest])


def described(frame: pd.DataFrame) -> pd.DataFrame:
    """Label of a band, and how it was made."""
    label = [f"{n} random {family} scenarios" for n, family in zip(frame["scenarios"], frame["family"], strict=True)]
    return frame.assign(scenario=label, via="exact")


measured = on_grid(measured)
BY = ["family", "estimator", "target", "kl"]
bands = described(distance.bands(measured, ["bias", "cosine", "noise", "crossover"], BY))

# %% [markdown]
# ## Exponents
#
# `1 − δ = ℓ − ½ℓ² + …`: near the reference k3 as loss lacks `E[½(δ−1)² score]`, of order KL, of a gradient of order KL^½. Is the
# relative bias ∝ KL^½, and is that term what is missing? A line is fitted to each scenario's smallest distances.

# %%
POWERS = {"k3-loss": (REVERSE, FROZEN), "k3-loss-sequence": (REVERSE,), "k2-loss": (REVERSE,), "k2-loss-token": (REVERSE,)}
POWERS |= {"k3-swapped-loss": (REVERSE,), "k2-loss+reward-to_go": (REVERSE,), "k3-reward-to-go": (REVERSE,)}
POWERS |= {"mse-loss": (REVERSE,), "abs-loss": (REVERSE,)}
fitted = distance.slopes(measured, "bias", points)
wanted = [target in POWERS.get(name, ()) for name, target in zip(fitted["estimator"], fitted["target"], strict=True)]
order = {(name, target): i for i, (name, target) in enumerate((n, t) for n, ts in POWERS.items() for t in ts)}
slopes = fitted[wanted].reset_index(drop=True)
rank = [order[key] for key in zip(slopes["estimator"], slopes["target"], strict=True)]
slopes = slopes.iloc[np.argsort(rank, kind="stable")].reset_index(drop=True)
enumerated = [scenario for family in ("bandit", "tree") for scenario in scenarios[family]]
left = pd.concat([distance.remainders(enumerated, credit) for credit in ("token", "sequence")], ignore_index=True)
remainders = described(distance.bands(on_grid(left), ["remainder"], ["family", "estimator", "credit", "target", "kl"]))

# %% [markdown]
# ## Mean squared error: from which batch size on does a bias matter?
#
# A batch of B responses errs by `bias² + noise/B`. Up to `B = noise/bias²` noise is the larger part. The formula is checked by
# drawing batches and looking at how far off they are.

# %%
RIVALS = ["k3-loss", "k2-loss", "k1-reward-to-go", "full-both"]
chosen_kls = [float(f"{kls[np.abs(np.log(kls / kl)).argmin()]:.6g}") for kl in (0.01, 0.1, 1)]
sizes = [int(size) for size in np.geomspace(1, 1e6, 13).round()]
drawn_sizes = study.pick(full=[1, 10, 100, 1_000, 10_000, 100_000], quick=[1, 100, 10_000])
at_kls = measured[measured["kl"].isin(chosen_kls) & measured["estimator"].isin(RIVALS) & (measured["target"] == REVERSE)]
at_kls = at_kls[at_kls["family"] != "markov"].sort_values(
    "estimator", key=lambda column: column.map(RIVALS.index), kind="stable"
)
curves = distance.bands(distance.batches(at_kls, sizes), ["rmse"], ["family", "kl", "estimator", "batch"])
parts = [described(curves)]
for family in ("bandit", "tree"):
    for kl in chosen_kls:
        close = [scenario for scenario in scenarios[family] if abs(np.log(scenario.kl() / kl)) < 1e-3]
        found = distance.sampled_rmse(RIVALS, close, drawn_sizes, replicates=study.pick(full=32, quick=8), seed=study.seed)
        parts.append(
            found.assign(family=family, kl=kl, scenarios=len(close), scenario=f"{len(close)} random {family} scenarios")
        )
batches = pd.concat(parts, ignore_index=True)
BIASED = {"bandit": ["k3-loss"], "tree": ["k3-loss", "k2-loss", "k3-loss-sequence"]}
BIASED["markov"] = BIASED["tree"]
shown = [name in BIASED[family] for name, family in zip(bands["estimator"], bands["family"], strict=True)]
crossovers = bands[np.array(shown) & (bands["target"] == REVERSE)].reset_index(drop=True)

# %% [markdown]
# ## One against another
#
# At equal coefficient, is k3 as loss the weaker regulariser? And does summing over the vocabulary ever add noise? Two scenarios
# made for the purpose join the random ones.

# %%
PAIRS = {
    ("k3-loss", "k2-loss"): REVERSE,
    ("k3-loss-sequence", "k2-loss-sequence"): REVERSE,
    ("k3-loss", "k1-reward-to-go"): REVERSE,
    ("k3-reward-to-go", "k1-reward-to-go"): REVERSE,
    ("full-loss", "k2-loss"): FROZEN,
    ("full-both", "k1-reward-to-go"): REVERSE,
}
made = [distance.compensating(), distance.sharing()]
single = gl.measure(["full-loss", "k2-loss", "full-both", "k1-reward-to-go"], made, target=[REVERSE, FROZEN])
STATISTICS = ["norm_ratio", "noise_ratio", "overtaken"]
PAIR = ["family", "estimator", "other", "target", "kl"]
versus = described(
    distance.bands(
        pd.concat([distance.versus(measured, *pair, target=target) for pair, target in PAIRS.items()], ignore_index=True),
        STATISTICS,
        PAIR,
    )
)
pairs = [("full-loss", "k2-loss", FROZEN, made[1]), ("full-both", "k1-reward-to-go", REVERSE, made[0])]
for name, other, target, scenario in pairs:
    one = distance.versus(single[single["scenario"] == scenario.label], name, other, target)
    row = distance.bands(one, STATISTICS, PAIR).assign(scenario=scenario.label, via="exact")
    versus = pd.concat([versus, row], ignore_index=True)

# %% [markdown]
# ## Verdicts

# %%
frames = {"04_bands": bands, "04_slopes": slopes, "04_remainders": remainders, "04_versus": versus}
verdicts = study.verdicts(frames)
study.save_frame("04_remainders", remainders)
study.save_frame("04_versus", versus)

# %% [markdown]
# ## Figures

# %%
SIZES = f"{COUNTS['bandit']} random bandits, {COUNTS['tree']} trees and {COUNTS['markov']} chains"
POLICIES = "Bandits of 3–20 tokens; trees of 2–4 tokens and 2–4 steps; chains of 2–5 tokens and 4–16 steps. On-policy."


def median(frame: pd.DataFrame, column: str, kl: float, **where: object) -> float:
    """A band's value at the distance nearest to `kl`."""
    at = frame["kl"].iloc[np.abs(np.log(frame["kl"] / kl)).argmin()]
    return float(gl.report.cell(frame, column, kl=at, **where))


def near(frame: pd.DataFrame, column: str, form: str, **where: object) -> str:
    """Medians of a column at 0.01, 0.1 and 1 nats, family by family, in words."""
    told = []
    for family in COUNTS:
        found = [format(median(frame, column, kl, family=family, **where), form) for kl in (0.01, 0.1, 1)]
        told.append(f"{family} {', '.join(found)}")
    return "; ".join(told)


def bands_text(frame: pd.DataFrame) -> tuple[str, str]:
    return (
        "**Bias and noise over the distance.** Relative bias, cosine and noise of single responses as gradients of the "
        f"reverse KL, for KL from {frame['kl'].min():.2g} to {frame['kl'].max():.2g} nats: median (line) and 10–90 % range "
        "(band). At KL near 0.01, 0.1 and 1 nats the bias of k3 as loss is "
        f"{near(frame, 'bias', '.2g', estimator='k3-loss', target=REVERSE)}. {SIZES}, exact.",
        f"{POLICIES} Estimators of bias 0 are left out of the first row.",
    )


study.save_figure("04_bands", gl.figure("04_bands", bands), bands, *bands_text(bands), verdicts)


# %%
def catalogue_text(frame: pd.DataFrame) -> tuple[str, str]:
    zero = frame.groupby("estimator", sort=False)["bias"].max() < BIAS_FLOOR
    return (
        "**The whole catalogue.** Median relative bias as a gradient of the reverse KL (a–c) and median noise of a single "
        f"response (d–f), for every estimator (rows) and KL from {frame['kl'].min():.2g} to {frame['kl'].max():.2g} nats "
        f"(columns). {zero.sum()} of {len(zero)} estimators have no bias in any family. {SIZES}, exact.",
        f"Without bias: {', '.join(zero[zero].index)}.\n\n{POLICIES} Weights are 1 on-policy; where they are differentiated "
        "they change the gradient all the same. Dots: not solved on chains in this run.",
    )


reverse = bands[bands["target"] == REVERSE]
medians = reverse[["scenario", "family", "scenarios", "estimator", "target", "via", "kl", "bias", "cosine", "noise"]]
study.save_figure("04_catalogue", gl.figure("04_catalogue", medians), medians, *catalogue_text(medians), verdicts)


# %%
def slopes_text(frame: pd.DataFrame, remainders: pd.DataFrame) -> tuple[str, str]:
    def rows(name: str, target: str = REVERSE) -> pd.DataFrame:
        return frame[(frame["estimator"] == name) & (frame["target"] == target)]

    def exponent(*of: str) -> str:
        return f"{rows(*of)['slope'].mean():.3f} ± {rows(*of)['slope'].std():.3f}"

    def factor(*of: str) -> str:
        found = rows(*of)["factor"]
        return f"{found.median():.2g} ({found.min():.2g}–{found.max():.2g})"

    left = {credit: part[part["kl"] == part["kl"].min()] for credit, part in remainders.groupby("credit")}
    smallest = {credit: part["remainder_max"].max() for credit, part in left.items()}
    kinds = {
        "k3 as loss, per token": ("k3-loss",),
        "against the frozen-prefix form": ("k3-loss", FROZEN),
        "the response as one action": ("k3-loss-sequence",),
        "k2 as loss, per token": ("k2-loss",),
    }
    return (
        f"**Exponents as KL → 0.** Relative bias ≈ factor · KL^exponent, fitted to each scenario's {frame['points'].iloc[0]} "
        f"smallest distances (bars: standard error). The exponent of k3 as loss is {exponent('k3-loss')} per token and "
        f"{exponent('k3-loss-sequence')} with the response as one action. Without E[½(δ−1)² score], at most "
        f"{max(smallest.values()):.1%} of its error is left at the smallest distance. {SIZES}, exact.",
        f"{POLICIES} Distances {frame['kl_min'].min():.2g}–{frame['kl_max'].max():.2g} nats. k2 as loss per token ignores what "
        "a token does to later prefixes. Exponent, and factor with its range:\n\n"
        + "\n".join(f"* {kind}: {exponent(*of)}, {factor(*of)}" for kind, of in kinds.items())
        + f"\n\nLeft without E[½(δ−1)² score]: {smallest['token']:.1%} per token, {smallest['sequence']:.1%} per response.",
    )


study.save_figure("04_slopes", gl.figure("04_slopes", slopes), slopes, *slopes_text(slopes, remainders), verdicts)


# %%
def batches_text(frame: pd.DataFrame) -> tuple[str, str]:
    samples = int(frame["samples"].dropna().iloc[0])
    exact = frame[(frame["via"] == "exact") & (frame["rmse"] > 1e-9)]  # in bandits summing over the vocabulary leaves rounding

    def level(family: str) -> str:
        """Estimators whose error has stopped falling: from a tenth of the largest batch on, noise alone would lose two thirds."""
        rows = exact[(exact["family"] == family) & (exact["kl"] == exact["kl"].max())].set_index("batch")
        last = rows.index.max()
        ratio = rows.loc[last].set_index("estimator")["rmse"] / rows.loc[last // 10].set_index("estimator")["rmse"]
        return f"in {family}s {', '.join(ratio.index[ratio > 0.9]) or 'none'}"

    return (
        "**Error against batch size.** Relative root mean squared error of a batch's gradient at KL of "
        f"{', '.join(f'{kl:.2g}' for kl in chosen_kls)} nats: exact median (line) and 10–90 % range (band) over "
        f"{COUNTS['bandit']} bandits and {COUNTS['tree']} trees, and the median of {samples} drawn batches of each size "
        f"(dots). At the largest KL these have reached their bias and stopped falling: {level('bandit')}; {level('tree')}.",
        f"{POLICIES} Dots with 95 % bootstrap intervals, in each scenario. k2 as loss, per token, misses what a token does to "
        "later prefixes. Summing over the vocabulary has no noise in bandits, so no curve there.",
    )


study.save_figure("04_batches", gl.figure("04_batches", batches), batches, *batches_text(batches), verdicts)


# %%
def crossover_text(frame: pd.DataFrame, versus: pd.DataFrame) -> tuple[str, str]:
    other = versus[(versus["estimator"] == "k3-loss") & (versus["other"] == "k1-reward-to-go")]
    k3 = frame[frame["estimator"] == "k3-loss"]
    near_kl = k3[k3["kl"] <= 2e-3].groupby("family")[["kl", "crossover"]]
    power = [np.polyfit(np.log(part["kl"]), np.log(part["crossover"]), 1)[0] for _, part in near_kl]
    return (
        "**From which batch size on the bias matters.** Batch size noise/bias², at which the squared bias equals the "
        "variance, for gradients of the reverse KL; above the line more responses do not help. k3 as loss at KL near 0.01, "
        f"0.1 and 1 nats: {near(frame, 'crossover', ',.0f', estimator='k3-loss', target=REVERSE)} responses. Median and 10–90 "
        f"% range over {SIZES}, exact.",
        f"{POLICIES}\n\nk1 in reward (to go), which has no bias but more noise on sequences, has the smaller error than k3 as "
        f"loss from {near(other, 'overtaken', ',.0f')} responses on. Up to 0.002 nats the crossover falls as "
        f"KL^{min(power):.2f} to KL^{max(power):.2f}; constant noise and a squared bias ∝ KL would make it KL^-1.",
    )


study.save_figure(
    "04_crossover", gl.figure("04_crossover", crossovers), crossovers, *crossover_text(crossovers, versus), verdicts
)


# %%
def weaker_text(frame: pd.DataFrame) -> tuple[str, str]:
    part = frame[frame["estimator"] == "k3-loss"]
    told = [
        f"{family} {median(part, 'norm_ratio', 1, family=family):.2f} ({median(part, 'norm_ratio_min', 1, family=family):.2f}–"
        f"{median(part, 'norm_ratio_max', 1, family=family):.2f})"
        for family in COUNTS
    ]
    return (
        "**Strength of k3 as loss against k2 as loss.** Norm of the expected gradient of k3 over that of k2 in the same "
        "scenario, per token and with the response as one action: median, 10–90 % band and extremes (dotted). At KL near 1 "
        f"nat, per token: {'; '.join(told)}. {SIZES}, exact.",
        POLICIES,
    )


weaker = versus[versus["other"].isin(["k2-loss", "k2-loss-sequence"]) & versus["estimator"].str.startswith("k3")]
weaker = weaker.reset_index(drop=True)
study.save_figure("04_weaker", gl.figure("04_weaker", weaker), weaker, *weaker_text(weaker), verdicts)


# %%
def blackwell_text(frame: pd.DataFrame) -> tuple[str, str]:
    worst = {row["scenario"]: row for row in frame[frame["scenarios"] == 1].to_dict("records")}
    told = [f"{row['noise_ratio']:.2f} times on the {name} (KL {row['kl']:.3g} nats)" for name, row in worst.items()]
    return (
        "**Summing over the vocabulary.** Noise of the full-vocabulary KL over that of k2 as loss, and of complete "
        "Rao–Blackwell over that of k1 in reward to go: median, 10–90 % band and extremes (dotted). In scenarios made for it "
        f"(crosses) it is {'; '.join(told)}. {SIZES}, exact.",
        f"{POLICIES} Each pair has the same expectation: the first per token with frozen prefixes, the second for the reverse "
        "KL. In a bandit no noise is left, so nothing is drawn.",
    )


blackwell = versus[versus["estimator"].isin(["full-loss", "full-both"])].reset_index(drop=True)
figure = gl.figure("04_rao_blackwell", blackwell)
study.save_figure("04_rao_blackwell", figure, blackwell, *blackwell_text(blackwell), verdicts)
