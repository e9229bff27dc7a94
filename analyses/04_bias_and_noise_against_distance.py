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

study = gl.report.study(__file__)
REVERSE, FROZEN = "reverse_kl", "reverse_kl_frozen_prefix"
ROUNDING = distance.ROUNDING

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
POLICIES = (
    f"{COUNTS['bandit']} random bandits (3–20 tokens), {COUNTS['tree']} trees (2–4 tokens, 2–4 steps), {COUNTS['markov']} chains "
    f"(2–5 tokens, 4–16 steps), on-policy, seed {study.seed}"
)


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


BIAS = ["k3-loss", "k3-loss-sequence", "k2-loss", "k3-reward-to-go", "abs-loss"]
NOISE = ["k1-loss", "k2-loss", "k3-loss", "k3-loss-sequence", "k1-reward-to-go", "full-both"]


def bands_caption(frame: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    told = near(frame, "bias", ".2g", estimator="k3-loss", target=REVERSE)
    return (
        "**Bias and noise over the distance.** Relative bias, cosine and noise of single responses as gradients of the reverse KL, "
        f"for KL from {frame['kl'].min():.2g} to {frame['kl'].max():.2g} nats: median (line) and 10–90 % range (band) over "
        f"{POLICIES}. All exact. Median relative bias of k3 as loss at KL near 0.01, 0.1 and 1 nats: {told}. "
        f"Estimators of bias 0 are left out of the first row. Verdicts: {gl.report.sentence(verdicts, '04_bands')} "
        f"{gl.report.sentence(verdicts, '04_versus', 'k3-reward')}"
    )


reverse = bands[bands["target"] == REVERSE]
figure = gl.plots.distances(reverse, BIAS, NOISE)
study.save_figure("04_bands", figure, bands, bands_caption(bands, verdicts))


# %%
def catalogue_caption(frame: pd.DataFrame) -> str:
    zero = frame.groupby("estimator", sort=False)["bias"].max() < ROUNDING
    return (
        "**The whole catalogue.** Median over scenarios of the relative bias as a gradient of the reverse KL (a–c) and of the noise of "
        f"a single response (d–f), for every estimator (rows) and KL from {frame['kl'].min():.2g} to {frame['kl'].max():.2g} nats "
        f"(columns): {POLICIES}. Exact. Without bias in all three families: {', '.join(zero[zero].index)}. Weights are 1 on-policy; "
        "where they are differentiated they change the gradient all the same. Dots: not solved on chains in this run."
    )


medians = reverse[["scenario", "family", "scenarios", "estimator", "target", "via", "kl", "bias", "cosine", "noise"]]
study.save_figure("04_catalogue", gl.plots.catalogue(medians), medians, catalogue_caption(medians))


# %%
def slopes_caption(frame: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    def of(name: str, target: str = REVERSE) -> str:
        part = frame[(frame["estimator"] == name) & (frame["target"] == target)]
        found, factor = part["slope"], part["factor"]
        return f"{found.mean():.3f} ± {found.std():.3f} (factor {factor.median():.2g}, {factor.min():.2g}–{factor.max():.2g})"

    left = {credit: remainders[remainders["credit"] == credit] for credit in ("token", "sequence")}
    smallest = {credit: part[part["kl"] == part["kl"].min()]["remainder_max"].max() for credit, part in left.items()}
    return (
        "**Exponents as KL → 0.** Relative bias ≈ factor · KL^exponent, fitted to each random scenario's "
        f"{frame['points'].iloc[0]} smallest distances, {frame['kl_min'].min():.2g}–{frame['kl_max'].max():.2g} nats; bars: standard "
        f"error of the fit; {POLICIES}. Exact. k3 as loss has {of('k3-loss')} per token, {of('k3-loss', FROZEN)} against the "
        f"frozen-prefix form and {of('k3-loss-sequence')} with the response as one action; k2 as loss per token, which ignores "
        f"prefixes, {of('k2-loss')}. Taking E[½(δ−1)² score] away leaves at most {smallest['token']:.1%} (token) and "
        f"{smallest['sequence']:.1%} (sequence) of the error of k3 at the smallest distance. Verdicts: "
        f"{gl.report.sentence(verdicts, '04_slopes')} {gl.report.sentence(verdicts, '04_remainders')}"
    )


study.save_figure("04_slopes", gl.plots.slopes(slopes), slopes, slopes_caption(slopes, verdicts))


# %%
def batches_caption(frame: pd.DataFrame) -> str:
    samples = int(frame["samples"].dropna().iloc[0])
    counts = ", ".join(f"{COUNTS[family]} {plural}" for family, plural in (("bandit", "bandits"), ("tree", "trees")))
    exact = frame[(frame["via"] == "exact") & (frame["rmse"] > 1e-9)]  # in bandits summing over the vocabulary leaves rounding

    def level(family: str) -> str:
        """Estimators whose error has stopped falling: from a tenth of the largest batch on, noise alone would lose two thirds."""
        rows = exact[(exact["family"] == family) & (exact["kl"] == exact["kl"].max())].set_index("batch")
        last = rows.index.max()
        ratio = rows.loc[last].set_index("estimator")["rmse"] / rows.loc[last // 10].set_index("estimator")["rmse"]
        return f"{family}s: {', '.join(ratio.index[ratio > 0.9]) or 'none'}"

    return (
        "**Error against batch size.** Relative root mean squared error of a batch's gradient: exact median (line) and 10–90 % range "
        f"(band) over {counts}, and the median of batches really drawn (open dots, {samples} of each size in each scenario, 95 % "
        f"bootstrap intervals, seed {study.seed}). KL of {', '.join(f'{kl:.2g}' for kl in chosen_kls)} nats. A curve that levels "
        f"off has reached its bias; at the largest KL that is, in {level('bandit')}; in {level('tree')} (k2 as loss, per token, misses "
        "what a token does to later prefixes). Summing over the vocabulary has no noise in bandits, so no curve there."
    )


study.save_figure("04_batches", gl.plots.batches(batches), batches, batches_caption(batches))


# %%
def crossover_caption(frame: pd.DataFrame) -> str:
    told = near(frame, "crossover", ",.0f", estimator="k3-loss", target=REVERSE)
    other = versus[(versus["estimator"] == "k3-loss") & (versus["other"] == "k1-reward-to-go")]
    beaten = near(other, "overtaken", ",.0f")
    k3 = frame[frame["estimator"] == "k3-loss"]
    near_kl = k3[k3["kl"] <= 2e-3].groupby("family")[["kl", "crossover"]]
    power = [np.polyfit(np.log(part["kl"]), np.log(part["crossover"]), 1)[0] for _, part in near_kl]
    return (
        "**At what batch size does the bias matter?** Batch size at which the squared bias equals the variance, noise/bias², as "
        f"gradients of the reverse KL: median and 10–90 % range over {POLICIES}. Exact. Above the line more responses do not help. "
        f"k3 as loss at KL near 0.01, 0.1 and 1 nats, median: {told} responses. k1 in reward (to go), which has no bias but "
        f"more noise on sequences, has the smaller error from {beaten} responses on. Up to 0.002 nats the crossover falls "
        f"as KL^{min(power):.2f} to KL^{max(power):.2f}: near the reference noise is constant and the squared bias ∝ KL."
    )


study.save_figure("04_crossover", gl.plots.crossovers(crossovers), crossovers, crossover_caption(crossovers))


# %%
def weaker_caption(frame: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    part = frame[frame["estimator"] == "k3-loss"]
    told = [
        f"{family} {median(part, 'norm_ratio', 1, family=family):.2f} ({median(part, 'norm_ratio_min', 1, family=family):.2f}–"
        f"{median(part, 'norm_ratio_max', 1, family=family):.2f})"
        for family in COUNTS
    ]
    return (
        "**Is k3 as loss the weaker regulariser?** Norm of the expected gradient of k3 as loss over that of k2 as loss in the same "
        f"scenario, per token and with the response as one action: median, 10–90 % band and extremes (dotted) over {POLICIES}. Exact. "
        f"At KL near 1 nat, per token: {'; '.join(told)}. Verdicts: {gl.report.sentence(verdicts, '04_versus', 'k3-weaker')}"
    )


weaker = versus[versus["other"].isin(["k2-loss", "k2-loss-sequence"]) & versus["estimator"].str.startswith("k3")]
weaker = weaker.reset_index(drop=True)
figure = gl.plots.ratios(weaker, "norm_ratio", "‖E g‖ of k3 / of k2")
study.save_figure("04_weaker", figure, weaker, weaker_caption(weaker, verdicts))


# %%
def blackwell_caption(frame: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    worst = {row["scenario"]: row for row in frame[frame["scenarios"] == 1].to_dict("records")}
    told = [f"{name} (KL {row['kl']:.3g} nats): {row['noise_ratio']:.2f} times" for name, row in worst.items()]
    return (
        "**Summing over the vocabulary.** Noise of the full-vocabulary KL per token over that of k2 as loss (same expectation, frozen "
        "prefixes), and of complete Rao–Blackwell over that of k1 in reward to go (same expectation, reverse KL): median, 10–90 % "
        f"band and extremes (dotted) over {POLICIES}; crosses: scenarios made to be noisier. Exact. It adds noise on the "
        f"{'; on the '.join(told)} that of sampling. In a bandit there is none left, so nothing is drawn. Verdicts: "
        f"{gl.report.sentence(verdicts, topic='rao-blackwell')}"
    )


blackwell = versus[versus["estimator"].isin(["full-loss", "full-both"])].reset_index(drop=True)
shown = blackwell[blackwell["family"] != "bandit"]
figure = gl.plots.ratios(shown, "noise_ratio", "noise / noise of sampling")
study.save_figure("04_rao_blackwell", figure, blackwell, blackwell_caption(blackwell, verdicts))
