# %% [markdown]
# # What can a sample say about k3 when its tail is heavy?
#
# `k3 = δ − 1 − log δ` with `δ = ref/π`. Its expectation is the KL, always; its variance need not exist. Then the sample mean is
# far from the expectation for any sample one can afford, and the sample standard deviation measures the size of the sample.

# %%
import numpy as np
import pandas as pd

import gradlab as gl
from gradlab.plots.figures import REPORTED
from gradlab.questions import distance, tails

study = gl.report.study("06_heavy_tails")

# %% [markdown]
# ## A Gaussian pair, drawn for as long as one likes
#
# Policy N(.1, .2²), reference N(0, 1): the demonstration of arXiv 2510.01555, App. I, which reports sample standard deviations
# of 8.82 for k3 and .691 for k1. Here independent samples grow from 10 to ten million draws.

# %%
PAIR = gl.Scenario(gl.Gaussian(0.1, 0.2), gl.Gaussian(0, 1), name="N(0.1, std 0.2) ‖ N(0, 1)")
sizes = [int(n) for n in np.geomspace(10, study.pick(full=1e7, quick=1e6), study.pick(full=13, quick=6)).round()]
runs = study.pick(full=40, quick=12)
draws = tails.running(["k1", "k3"], PAIR, sizes, runs, study.seed, study.jobs)
reported = draws["kernel"].map(REPORTED)
draws = draws.assign(mean_ratio=draws["mean"] / draws["kl"], log_std_ratio=np.log(draws["std"] / reported))
running = tails.over_runs(draws, ["mean_ratio", "std", "log_std_ratio"])

# %% [markdown]
# An event of probability 1/n is not expected in n draws. How much of the expectation is on events rarer than that can be
# integrated: `E_π[δ 1_A] = ref(A)`.

# %%
events = np.geomspace(100, 1e12, study.pick(full=41, quick=11))
shares = pd.concat(
    [
        tails.rare_share(PAIR if std == 0.2 else gl.Scenario(gl.Gaussian(0.1, std), PAIR.reference), events).assign(std=std)
        for std in (0.2, 0.1, 0.4, 0.6, 0.8)
    ],
    ignore_index=True,
)

# %% [markdown]
# ## Where the variance is infinite
#
# `E_π[δ²] = ∫ ref²/π` of two normals exists iff `σ² > σ_ref²/2`. In closed form, by quadrature, and from samples, which are
# finite everywhere.


# %%
def at(mean: float, ratio: float) -> gl.Scenario:
    return gl.Scenario(gl.Gaussian(mean, ratio), gl.Gaussian(0, 1), name=f"N({mean:g}, std {ratio:g}) ‖ N(0, 1)")


BORDER = 0.5**0.5
parts = []
for mean in (0.1, 1.0):
    ratios = np.unique(
        np.concatenate([np.linspace(0.2, 2, study.pick(full=181, quick=61)), BORDER * (1 + np.geomspace(1e-3, 0.1, 12))])
    )
    line = [tails.k3_variance(at(mean, ratio)) ** 0.5 if ratio > BORDER else np.inf for ratio in ratios]
    parts.append(pd.DataFrame({"mean": mean, "ratio": ratios, "std": line, "via": "closed form"}))
    # Within a few percent of the border quadrature declines to tell a slow fall from none.
    dots = np.round([0.2, 0.3, 0.4, 0.5, 0.6, 0.66, 0.76, 0.8, 0.9, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0], 3)
    found = [gl.exact.value_moments("k3", at(mean, ratio)) for ratio in dots]
    std = np.sqrt([moments.variance for moments in found])
    labels = [at(mean, ratio).label for ratio in dots]
    exact = pd.DataFrame({"scenario": labels, "mean": mean, "ratio": dots, "std": std, "via": "exact"})
    parts.append(exact.assign(infinite=np.isinf(std).astype(float), agrees=(np.isinf(std) == (dots**2 <= 0.5)).astype(float)))
    n = study.pick(full=100_000, quick=10_000)
    for ratio in (0.2, 0.25, 0.35, 0.45, 0.55, 0.65, 0.85, 1.0, 1.3, 1.7):
        drawn = tails.running(["k3"], at(mean, ratio), [n], study.pick(full=40, quick=12), study.child(1))
        row = tails.over_runs(drawn, ["std"]).assign(mean=mean, ratio=ratio)
        parts.append(
            row[["scenario", "mean", "ratio", "via", "samples", "runs", "std", "std_low", "std_high", "std_q10", "std_q90"]]
        )
variance = pd.concat(parts, ignore_index=True)

# %% [markdown]
# ## The finite analogue: a dropped token
#
# With finitely many tokens every variance is finite, and a sample of `n ≪ 1/π(token)` draws behaves as if it were not. Ten tokens;
# the reference gives one of them probability 0.2, the policy next to nothing, and the rest keep their shares.

# %%
CHANCES = (1e-2, 1.542e-4, 1e-6)
PER_EVENT = (0.01, 0.1, 1, 10, 100, 1000)
found = []
for chance in CHANCES:
    reference, policy = ([p, *[(1 - p) / 9] * 9] for p in (0.2, chance))
    scenario = gl.Scenario(gl.Bandit(np.log(policy)), gl.Bandit(np.log(reference)), name=f"bandit, token of {chance:g} for 0.2")
    smooth = np.unique(
        np.concatenate([np.geomspace(10, 1e7, study.pick(full=121, quick=61)), [x / chance for x in PER_EVENT]]).round()
    )
    found.append(tails.dropped(scenario, [int(n) for n in smooth if n >= 1]))
    found.append(tails.dropped(scenario, [10**k for k in range(1, 8)], runs=study.pick(full=400, quick=100), seed=study.seed))
dropped = pd.concat(found, ignore_index=True)
dropped["draws_per_event"] = dropped["samples"] * dropped["probability"]

# %% [markdown]
# ## χ²(ref‖π) and the noise of the gradient
#
# `Var[1 − δ] = χ²(ref‖π)` is the variance of a coefficient. The gradient is coefficient times score, and the scores of a softmax
# have lengths from 0 to √2. Random bandits and trees at three distances, and every bandit of two tokens:
# `tr Cov = 2 (1 − 2p)² χ²`, nothing at all when both tokens are equally likely.

# %%
KLS = (0.01, 0.1, 1.0)
NAMES = {"bandit": "random bandits", "tree": "random trees"}
count = study.pick(full=150, quick=40)
parts = []
for family, group in NAMES.items():
    scenarios = distance.sweep(distance.random_policies(family, count, study.child(6)), KLS, study.child(6))
    asked = [kl for _ in range(count) for kl in KLS]
    parts.append(tails.variances(scenarios).assign(group=group, kl_asked=asked))
random = pd.concat(parts, ignore_index=True)
ranks = tails.rank_correlations(random, ["group", "kl_asked"])
ranks["distance"] = ranks["kl_asked"].map({0.01: "near", 0.1: "middle", 1.0: "far"})


def two(p: float, r: float) -> gl.Scenario:
    return gl.Scenario(
        gl.Bandit(np.log([p, 1 - p])), gl.Bandit(np.log([r, 1 - r])), name=f"({p:g} {1 - p:g}) ‖ ({r:g} {1 - r:g})"
    )


chances = np.linspace(0.05, 0.95, 19)
exact = tails.variances([two(float(p), 0.3) for p in chances if abs(p - 0.3) > 1e-9])
exact["probability"] = [p for p in chances if abs(p - 0.3) > 1e-9]
fine = np.linspace(0.005, 0.995, 199)
law = pd.DataFrame({"probability": fine, "gradient_ratio": 2 * (1 - 2 * fine) ** 2, "via": "closed form"})
laws = pd.concat([exact, law], ignore_index=True)
counterexample = tails.variances([two(0.5, 0.1), two(0.1, 0.2)]).assign(
    group=["two tokens, π = (.5 .5)", "two tokens, π = (.1 .9)"]
)
gaussians = tails.variances([at(mean, ratio) for mean in (0.0, 0.5) for ratio in (0.3, 0.5, 0.65, 0.8, 1.1, 1.5)])
together = np.isinf(gaussians["chi2"]) == np.isinf(gaussians["trace_cov"])
gaussians = gaussians.assign(group="Gaussians", infinite_together=together.astype(float))
chi2 = pd.concat([random, counterexample, gaussians], ignore_index=True)

# %% [markdown]
# ## Verdicts

# %%
frames = {"06_running": running, "06_variance": variance, "06_dropped": dropped, "06_chi2": chi2, "06_ranks": ranks}
verdicts = study.verdicts(frames)
study.save_frame("06_shares", shares)
study.save_frame("06_ranks", ranks)
study.save_frame("06_two_tokens", laws)

# %% [markdown]
# ## Figures

# %%
cell = gl.report.cell


def running_text(frame: pd.DataFrame) -> tuple[str, str]:
    def told(column: str, n: int) -> str:
        low, mid, high = (cell(frame, column + end, kernel="k3", samples=n) for end in ("_q10", "", "_q90"))
        return f"{mid:.3g} ({low:.3g}–{high:.3g})"

    last, first = max(sizes), next(n for n in sizes if n >= 900)
    k3 = frame[frame["kernel"] == "k3"]
    within = k3[(k3["std_q10"] <= REPORTED["k3"]) & (k3["std_q90"] >= REPORTED["k3"])]["samples"]
    usual = f"{within.min():,} to {within.max():,}" if len(within) else "no number of"
    share = shares[(shares["std"] == 0.2) & np.isclose(shares["samples"], events[np.abs(np.log(events / last)).argmin()])]
    index = tails.tail_index(PAIR)
    k1 = gl.exact.value_moments("k1", PAIR).variance ** 0.5
    return (
        f"**What a sample sees of k3**, whose variance is {'in' * (index <= 2)}finite here (KL {PAIR.kl():.4f} nats). (a) "
        f"Sample mean over the KL, (b) sample standard deviation over {runs} samples that grow to {last:,} draws: median and "
        f"10–90 % of samples. At {first:,} draws they are {told('mean_ratio', first)} and {told('std', first)} nats, at "
        f"{last:,} {told('mean_ratio', last)} and {told('std', last)}. (c) Share of E[k3] on events rarer than 1/n.",
        f"* {PAIR.label}: policy and reference of arXiv 2510.01555, App. I; tail index of δ {index:.3f}.\n"
        "* Bars: 95 % intervals of the median. Solid: exact expectation of k3 without events rarer than 1/n. Dotted: the "
        f"reported standard deviations, {REPORTED['k3']} (k3) and {REPORTED['k1']} (k1; exact {k1:.4f}). {REPORTED['k3']} is "
        f"within the usual range at {usual} draws.\n"
        f"* (c) Exact, policies N(0.1, σ²): {share['share'].iloc[0]:.0%} at n = {share['samples'].iloc[0]:.2g} for σ = 0.2.",
    )


figure = gl.figure("06_running", running, shares)
study.save_figure("06_running", figure, running, *running_text(running), verdicts)


# %%
def variance_text(frame: pd.DataFrame) -> tuple[str, str]:
    drawn = frame[frame["via"] == "sampled"]
    finite = frame[(frame["via"] == "exact") & np.isfinite(frame["std"])]
    gap = max(
        abs(row["std"] / tails.k3_variance(at(row["mean"], row["ratio"])) ** 0.5 - 1) for row in finite.to_dict("records")
    )
    largest = drawn[drawn["ratio"] < BORDER]["std"].max()
    return (
        "**Where the variance of k3 is infinite.** Standard deviation of one k3 for a policy N(mean, σ²) and the reference "
        f"N(0, 1), in closed form (lines, down to the border σ = {BORDER:.4g}), by quadrature (dots) and from "
        f"{int(drawn['samples'].iloc[0]):,} draws (open: median of {int(drawn['runs'].iloc[0])} samples, bars 10–90 %). "
        f"Where it is infinite samples give up to {largest:.2g} nats.",
        "The second moment ∫ref²/π stops existing at σ = √½: below it samples give finite numbers of nothing. Quadrature "
        f"and closed form differ by at most {gap:.0e}, relative.",
    )


study.save_figure("06_variance", gl.figure("06_variance", variance), variance, *variance_text(variance), verdicts)


# %%
def dropped_text(frame: pd.DataFrame) -> tuple[str, str]:
    exact = frame[frame["via"] == "exact"]
    told, notes = [], []
    for chance in CHANCES:
        part = exact[exact["probability"].between(0.999 * chance, 1.001 * chance)]
        row = part.iloc[np.abs(np.log(part["draws_per_event"] / 0.1)).argmin()]
        told.append(f"{row['mean_ratio']:.2f} for π = {chance:.2g}")
        notes.append(f"* π = {chance:.2g}: KL {row['kl']:.3f} nats, a tenth of 1/π is {row['samples']:,} draws")
    return (
        "**Sample mean of k3 over the KL with a dropped token**, of reference probability 0.2 and policy probability π, in a "
        "bandit of ten: exact median (line) and 10–90 % range (band) of a sample of n draws, and the median of "
        f"{int(frame['runs'].dropna().iloc[0])} counted samples (open, 95 % intervals). At a tenth of 1/π draws the median is "
        f"{', '.join(told)}.",
        "\n".join(notes)
        + "\n\nExact by the binomial law of how often the token is drawn. Up to about 1/π draws (dotted) most samples miss it.",
    )


study.save_figure("06_dropped", gl.figure("06_dropped", dropped), dropped, *dropped_text(dropped), verdicts)


# %%
def chi2_text(random: pd.DataFrame) -> tuple[str, str]:
    told = "\n".join(
        f"* {group}: {', '.join(f'{rank:.2f}' for rank in part['rank_trace_cov'])}"
        for group, part in ranks.groupby("group", sort=False)
    )
    flat, steep = counterexample.to_dict("records")
    ratio = random["gradient_ratio"]
    return (
        "**χ² against the variance of the gradient of k3 as loss.** (a, b) Covariance trace against χ²(ref‖π), summed over "
        f"steps, for {count} bandits and {count} trees at KL of {', '.join(f'{kl:g}' for kl in KLS)} nats, exact: the ratio "
        f"is {ratio.min():.2f} to {ratio.max():.2f}. (c) The ratio for two tokens. A counterexample: {flat['scenario']} has "
        f"χ² {flat['chi2']:.2f} and gradient variance {round(flat['trace_cov'], 12):.2g}, {steep['scenario']} "
        f"{steep['chi2']:.2f} and {steep['trace_cov']:.2f}.",
        "χ² is the variance of the coefficient 1 − δ. Bandits of 3–20 tokens, trees of 2–4 tokens and 2–4 steps, on-policy. "
        f"(c) 2(1 − 2p)² (line), and by enumeration with reference (.3 .7) (dots). Rank correlation at equal KL:\n\n{told}",
    )


study.save_figure("06_chi2", gl.figure("06_chi2", chi2, laws), chi2, *chi2_text(random), verdicts)
