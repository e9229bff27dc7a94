# %% [markdown]
# # What does the KL gradient become when the data come from an older policy?
#
# Responses are sampled from a behaviour policy `μ` and the policy `π` has moved on since. The lag is `KL(μ‖π)` of whole
# responses. Which losses still descend `KL(π‖ref)`, with which importance weights, at what noise, and which one is best for
# a given batch? arXiv 2512.21852 leaves the unbiased off-policy gradient of the sequence KL open; here every composition of
# kernel, placement, credit and weight is tried.

# %%
import numpy as np
import pandas as pd
from tqdm import tqdm

import gradlab as gl
from gradlab.plots.figures import BASES

study = gl.report.study("08_off_policy")
seed = study.seed
at_lag, variant = gl.off_policy.at_lag, gl.search.reweighted
TRUNCATIONS = (1, 2, 5, 10)
GOAL = "reverse_kl"

# %% [markdown]
# ## Every composition, on random trees
#
# Three random trees, one of them with an end token, each with a random reference and a random behaviour policy. What is
# unbiased on all of them is unbiased: nothing cancels by accident. Some compositions are the same estimator, response by
# response; they are counted once.


# %%
def tree(vocab: int, length: int, draw: int, lag: float, kl: float = 0.5, eos: int | None = None) -> gl.Scenario:
    policy = gl.Tree.random(vocab, length, study.child(draw), eos=eos)
    behaviour = at_lag(policy, lag, study.child(draw)) if lag else None
    name = f"random tree {draw}, {vocab} tokens, {length} steps" + (f", lag {lag:g}" if lag else ", on-policy")
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=study.child(100 + draw)), behaviour, name)


def bandit(draw: int, lag: float) -> gl.Scenario:
    policy = gl.Bandit.random(5, study.child(draw))
    behaviour = at_lag(policy, lag, study.child(draw)) if lag else None
    name = f"random bandit {draw}, 5 tokens" + (f", lag {lag:g}" if lag else ", on-policy")
    return gl.Scenario(policy, policy.perturbed(kl=0.5, seed=study.child(100 + draw)), behaviour, name)


LAG = 0.3
trees = [tree(3, 3, 0, LAG), tree(3, 4, 1, LAG, eos=0), tree(2, 5, 2, LAG)]
tried = {e.name: e for e in gl.search.compositions(baselines=(None, "kl", "leave_one_out"))}
searched = gl.search.against(tried, trees)
compositions = gl.search.described(tried).merge(gl.search.worst(searched), on="estimator")
noises = searched[searched["target"] == GOAL].pivot_table(index="estimator", columns="scenario", values="noise", sort=False)
compositions = compositions.merge(noises.set_axis([f"noise_{i}" for i in range(len(trees))], axis=1).reset_index())
compositions["sampled"] = ~compositions["kernel"].isin(["full", "mse"])
compositions["unbiased"], compositions["via"] = compositions[f"bias_{GOAL}"] < gl.search.UNBIASED, "exact"
unbiased = compositions.loc[compositions["unbiased"], "estimator"]
rao_blackwell = gl.ESTIMATORS["full-both-prefix"].name
ratios = noises / noises.loc[rao_blackwell]
compositions["noise_ratio"] = compositions["estimator"].map(ratios.min(axis=1))
compositions["same_as"] = compositions["estimator"].map(
    gl.search.equivalent_estimators({n: tried[n] for n in unbiased}, trees[0])
)

# %% [markdown]
# ## What is shipped, and what is published
#
# The compositions that training frameworks offer, and those that papers propose, on- and off-policy, for one step and for many.

# %%
shipped = {name: e for name, (e, _) in gl.off_policy.SHIPPED.items()}
bandits = [bandit(draw, LAG) for draw in range(study.pick(full=4, quick=2))]
many = [*trees, *(tree(3, 4, draw, LAG) for draw in range(3, study.pick(full=6, quick=4)))]
in_use = gl.search.against(shipped, [*bandits, *many], [GOAL, f"{GOAL}_frozen_prefix"])
in_use["source"] = in_use["estimator"].map({name: source for name, (_, source) in gl.off_policy.SHIPPED.items()})
study.save_frame("08_shipped", in_use)

#: One ratio and one coefficient for the whole response.
CLIPPED = {"k1-reward-sequence, sequence weight, clip 0.2": gl.Estimator("k1", "reward", "sequence", "sequence", clip=0.2)}
PUBLISHED = {
    **{name: gl.ESTIMATORS[name] for name in ("k1-loss", "k2-loss", "k3-loss", "full-loss", "k3-plus", "k2-loss-sequence")},
    **variant("k2-loss", "token"), **variant("k2-loss", "token", True), **variant("k2-loss", "prefix"),
    **variant("k2-loss-sequence", "sequence"), **variant("k2-loss-sequence", "sequence", True),
    **variant("k3-loss", "token"), **variant("k3-loss", "token", True), **variant("k3-loss", "prefix"),
    **variant("k3-loss", "prefix", True), **variant("k3-loss-sequence"), **variant("k3-loss-sequence", "sequence"),
    **variant("k3-loss-sequence", "sequence", True), **variant("k3-plus", "token"),
    **variant("k1-reward-to-go"), **variant("k1-reward-to-go", "token"), **variant("k1-reward-to-go", "prefix"),
    **variant("k1-reward-to-go", "sequence"), **variant("k1-reward-to-go", "token", clip=0.2), **variant("k1-reward-return"),
    **variant("k1-reward-return", "sequence"), **CLIPPED, **variant("full-both", "prefix"),
}  # fmt: skip
on_policy = [gl.Scenario(s.policy, s.reference, name=f"{s.name}, on-policy") for s in [*bandits, *many]]
published = gl.search.against(PUBLISHED, [*bandits, *many, *on_policy]).merge(gl.search.described(PUBLISHED), on="estimator")
repulsion = gl.off_policy.repulsion([*bandits, *many])
study.save_frame("08_repulsion", repulsion)

# %% [markdown]
# ## Bias and noise against the lag
#
# Random trees of three tokens and five steps, 0.5 nats from their reference. Truncated weights `min(W, C)` have no closed form and
# no dynamic program: their exact bias comes from enumeration.

# %%
WHOLE = {
    **variant("full-loss"), **variant("full-both"), **variant("full-both", "token"),
    **variant("full-both", "prefix"), **variant("full-both", "sequence"),
}  # fmt: skip
SAMPLED = {
    **variant("k1-loss"), **variant("k2-loss"), **variant("k3-loss"), **variant("k3-both"), **variant("k1-reward-to-go"),
    **variant("k2-loss", "token"), **variant("k2-loss", "token", True), **variant("k3-loss", "token", True),
    **variant("k3-both", "token"), **variant("k1-reward-to-go", "token"),
    **variant("k1-reward-to-go", "token", clip=0.2), **CLIPPED,
    **variant("k2-loss", "prefix"), **variant("k3-loss", "prefix", True), **variant("k3-both", "prefix"),
    **variant("k1-reward-to-go", "prefix"), **variant("k3-both", "sequence"), **variant("k1-reward-to-go", "sequence"),
}  # fmt: skip
BOUNDED = {
    name: e
    for bound in TRUNCATIONS
    for base, weight, differentiate in (
        ("full-both", "prefix", False), ("full-both", "sequence", False), ("k2-loss", "token", False), ("k3-loss", "token", True),
        ("k3-loss", "prefix", True), ("k3-both", "prefix", False), ("k3-both", "sequence", False),
        ("k1-reward-to-go", "sequence", False),
    )
    for name, e in variant(base, weight, differentiate, bound).items()
}  # fmt: skip
ALL = {**WHOLE, **SAMPLED, **BOUNDED}
FIELDS = gl.search.described(ALL)
DROPPED = [c for c in gl.search.COLUMNS if c in ("vocab", "length", "gradient_norm")]
LAGS = study.pick(full=[0.003, 0.01, 0.03, 0.1, 0.3, 1, 2], quick=[0.01, 0.1, 0.3, 1])
draws = study.pick(full=10, quick=3)
parts, worth = [], []
for draw in tqdm(range(draws), desc="lag", disable=None, delay=2):
    start = gl.search.against(ALL, [tree(3, 5, 10 + draw, 0)], [GOAL])
    before = start.set_index("estimator")["bias"]
    for lag in LAGS:
        scenario = tree(3, 5, 10 + draw, lag)
        part = gl.search.against(ALL, [scenario], [GOAL]).assign(draw=draw, nominal=lag)
        parts.append(part.assign(excess=part["bias"] - part["estimator"].map(before)))
        for bound in (None, *TRUNCATIONS):
            left = gl.off_policy.effective_sample_size(scenario, bound)
            worth.append([draw, lag, scenario.lag(), bound, float(left[-1]), float(left.mean())])
lags = pd.concat(parts, ignore_index=True).drop(columns=DROPPED).merge(FIELDS, on="estimator")
truncated_worth = pd.DataFrame(worth, columns=["draw", "nominal", "lag", "truncate", "sequence", "prefix"])
study.save_frame("08_truncated_sample_size", truncated_worth)

# %% [markdown]
# ## One tree, exact and sampled

# %%
NAMES = ["k1-loss", "k2-loss", "k3-loss", "full-loss", "k2-loss-token-detached", "k3-loss-token", "k1-reward-clipped", "k1-loss-prefix",
         "k3-loss-prefix", "k3-loss-sequence-weight", "k1-reward-sequence-weight", "full-both", "full-both-prefix"]  # fmt: skip
one = tree(4, 4, 4, LAG)
samples = study.pick(full=100_000, quick=20_000)
targets = ["reverse_kl", "reverse_kl_frozen_prefix"]
credit = pd.concat(
    [gl.measure(NAMES, one, target=targets), gl.measure(NAMES, one, target=targets, samples=samples, seed=seed)],
    ignore_index=True,
)

# %% [markdown]
# ## How the noise grows with the length and with the lag
#
# Chains of four tokens, one nat from their reference, by dynamic programming.

# %%
UNBIASED = {
    **variant("k1-reward-to-go", "sequence"), **variant("k1-loss", "prefix", True), **variant("k3-both", "sequence"),
    **variant("k3-loss", "prefix", True), **variant("full-both", "sequence"), **variant("full-both", "prefix"),
}  # fmt: skip
middle = study.pick(full=64, quick=16)
RATE = 0.01


def chain(length: int, lag: float, draw: int, kl: float = 1.0) -> gl.Scenario:
    policy = gl.Markov.random(4, length, study.child(30 + draw))
    return gl.Scenario(
        policy,
        policy.perturbed(kl=kl, seed=study.child(130 + draw)),
        at_lag(policy, lag, study.child(30 + draw)),
    )


lengths = study.pick(full=[2, 4, 8, 16, 32, 64, 128], quick=[2, 4, 8, 32, 64])
CHAIN_LAGS = study.pick(full=[0.003, 0.01, 0.03, 0.1, 0.3, 1, 2], quick=[0.01, 0.1, 1])
points = [("length, fixed lag per response", T, T, LAG) for T in lengths]
points += [("length, fixed lag per token", T, T, RATE * T) for T in lengths]
points += [("lag", lag, middle, lag) for lag in CHAIN_LAGS]
settings = [(*point, draw) for draw in range(study.pick(full=3, quick=1)) for point in points]
chains = [chain(length, lag, draw) for *_, length, lag, draw in settings]
named = [gl.Scenario(s.policy, s.reference, s.behaviour, f"chain {i}") for i, s in enumerate(chains)]
growth = gl.measure(UNBIASED, named, jobs=study.jobs)
left = [gl.off_policy.effective_sample_size(s) for s in named]
keys = pd.DataFrame(settings, columns=["sweep", "x", "T", "nominal", "draw"]).assign(scenario=[s.name for s in named])
keys["sequence"], keys["prefix"] = [float(part[-1]) for part in left], [float(part.mean()) for part in left]
columns = ["scenario", "family", "length", "estimator", "target", "via", "kl", "lag", "bias", "noise"]
growth = keys.merge(growth[columns], on="scenario").merge(gl.search.described(UNBIASED), on="estimator")
best = growth[growth["estimator"] == "full-both, prefix weight"].set_index("scenario")["noise"]
growth["noise_ratio"] = growth["noise"] / growth["scenario"].map(best)
fits = gl.sequences.exponents(
    growth.groupby(["sweep", "estimator", "x"], sort=False)["noise"].median().reset_index(),
    ["sweep", "estimator"],
    "x",
    "noise",
    4,
)
study.save_frame("08_exponents", fits.assign(via="exact"))

# %% [markdown]
# ## Which one to take
#
# The error of a batch of `N` responses is `√(bias² + noise/N)`: a small batch prefers a quiet, biased estimator, a large one an
# unbiased one. Candidates that need every token's probability stand beside those that need the sampled token's only.

# %%
BATCHES = [4, 16, 64, 256, 1024, 4096, 16384]
PANELS = ["trees, whole vocabulary", "trees, sampled tokens", "chains, whole vocabulary", "chains, sampled tokens"]
chain_draws = study.pick(full=3, quick=1)
parts = []
for draw in tqdm(range(chain_draws), desc="chains", disable=None, delay=2):
    for lag in CHAIN_LAGS:
        part = gl.search.against(
            {**WHOLE, **{k: e for k, e in SAMPLED.items() if e.clip is None}}, [chain(middle, lag, draw)], [GOAL]
        )
        parts.append(part.assign(draw=draw, nominal=lag))
long = pd.concat(parts, ignore_index=True)


def candidates(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The estimators a panel chooses from; k1 as loss regularises nothing and is left out."""
    kept = frame[~frame["estimator"].str.startswith("k1-loss")]
    known = np.where(kept["estimator"].str.startswith("full-"), "whole vocabulary", "sampled tokens")
    kept = kept.assign(panel=[f"{where}, {part}" for part in known])
    return kept[["panel", "nominal", "draw", "estimator", "bias", "noise"]]


pool = pd.concat([candidates(lags, "trees"), candidates(long, "chains")], ignore_index=True)
found = gl.off_policy.errors(pool, BATCHES, by=("panel", "nominal"))
regrets = gl.off_policy.regrets(found)
study.save_frame("08_regrets", regrets)
winners = gl.off_policy.winners(found, by=("panel", "nominal")).merge(FIELDS, on="estimator")
winners = winners.sort_values("panel", key=lambda column: column.map(PANELS.index), kind="stable", ignore_index=True)

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts(
    {
        "08_compositions": compositions, "08_shipped": in_use, "08_published": published, "08_repulsion": repulsion, "08_lag": lags,
        "08_growth": growth, "08_exponents": fits.assign(via="exact"),
    }
)  # fmt: skip

# %% [markdown]
# ## Figures


# %%
def median(name: str, column: str, lag: float) -> float:
    return float(lags[(lags["estimator"] == name) & (lags["nominal"] == lag)][column].median())


FAMILY = "Trees of 3 tokens and 5 steps, 0.5 nats from their reference"


def lag_text() -> tuple[str, str]:
    near, far = LAGS[0], max(lag for lag in LAGS if lag <= 1)
    slope = np.log(median("full-both", "bias", 0.1) / median("full-both", "bias", 0.01)) / np.log(10)

    def change(name: str, column: str = "bias") -> str:
        return f"from {median(name, column, near):.3g} to {median(name, column, far):.3g}"

    def bias(name: str, lag: float = far) -> str:
        return f"{median(name, 'bias', lag):.3g}"

    return (
        "**Bias and noise against the lag.** Relative bias as a gradient of the reverse KL of responses (above) and noise of "
        f"one response (below). From a lag of {near:g} to {far:g} nats the bias goes {change('k2-loss')} for k2 as loss, "
        f"{change('k3-loss')} for k3 as loss and {change('k1-reward-to-go')} for k1 in reward to go, without a weight. Median "
        f"and range over {draws} random trees, exact.",
        f"{FAMILY}.\n\n"
        f"* Without a weight the bias of full as loss goes {change('full-loss')}. What is unbiased on-policy (full-both) is "
        f"biased as the lag to the power {slope:.2f}.\n"
        f"* With token weights the bias at a lag of {far:g} is {bias('k2-loss, token weight')} for k2 (detached) and "
        f"{bias('k3-loss, differentiated token weight')} for k3 (differentiated).\n"
        "* A PPO clip of 0.2 turns the bias of k1 in reward at a lag of 0.1 from "
        f"{bias('k1-reward-to-go, token weight', 0.1)} into {bias('k1-reward-to-go, token weight, clip 0.2', 0.1)}.\n"
        "* Unbiased: k3 as loss with a differentiated prefix weight (noise "
        f"{change('k3-loss, differentiated prefix weight', 'noise')}), complete Rao–Blackwell with prefix weights "
        f"({change('full-both, prefix weight', 'noise')}), k1 in reward with the sequence weight "
        f"({change('k1-reward-to-go, sequence weight', 'noise')}).",
    )


study.save_figure("08_lag", gl.figure("08_lag", lags), lags, *lag_text(), verdicts)

# %%
bounded = lags[lags["estimator"].str.replace(r" ≤ \d+$", "", regex=True).isin(BASES)]


def truncation_text() -> tuple[str, str]:
    far = max(lag for lag in LAGS if lag <= 1)

    def at(base: str, bound: int) -> str:
        name = f"{base} ≤ {bound}"
        worst = lags[(lags["estimator"] == name) & (lags["nominal"] == far)]["bias"].max()
        return f"{median(name, 'bias', far):.2g} (at most {worst:.2g}) at {median(name, 'noise', far) / median(base, 'noise', far):.0%}"

    rows = "\n".join(f"* {base}: {', '.join(at(base, c) for c in (2, 5, 10))} of the noise" for base in BASES[:3])
    worth_at = truncated_worth[truncated_worth["nominal"] == far].groupby("truncate", dropna=False)["sequence"].median()
    return (
        "**What truncating a weight costs.** Relative bias (above) and noise (below) with weights min(W, C). At a lag of "
        f"{far:g} nats C = 2 gives complete Rao–Blackwell with prefix weights a bias of {at(BASES[0], 2)} of the noise, k3 as "
        f"loss with a differentiated prefix weight {at(BASES[1], 2)}, and k1 in reward with the sequence weight "
        f"{at(BASES[2], 2)}. Median and range over {draws} random trees, exact.",
        f"{FAMILY}. A differentiated weight has no gradient where its bound binds. Median bias at a lag of {far:g} nats with C "
        f"= 2, 5, 10:\n\n{rows}\n* k2 with a token weight: {median(BASES[3], 'bias', far):.2g} without a bound and "
        f"{median(BASES[3] + ' ≤ 2', 'bias', far):.2g} with C = 2\n\n"
        f"Median effective sample size of the sequence weight there: {worth_at[np.nan]:.1%} of a batch; truncated "
        f"{worth_at[2.0]:.0%}, {worth_at[5.0]:.0%} and {worth_at[10.0]:.0%}.",
    )


study.save_figure("08_truncation", gl.figure("08_truncation", bounded), bounded, *truncation_text(), verdicts)

# %%
off = published[published["off_policy"]]


def published_text(frame: pd.DataFrame) -> tuple[str, str]:
    on_trees = frame[frame["family"] == "tree"]
    descended = gl.report.unbiased(on_trees)
    return (
        "**The weight decides the objective.** Largest relative bias as a gradient of the reverse and the forward KL, of "
        "whole responses or per token with prefixes frozen at the behaviour's (prefix μ) or at the policy's (prefix π); "
        f"filled: 0. On trees {len(descended.get(GOAL, []))} of {on_trees['estimator'].nunique()} have no bias for the "
        f"reverse KL of responses. {len(bandits)} bandits (a) and {len(many)} random trees (b), lag {LAG:g} nats, exact.",
        f"Bandits of 5 tokens, trees of {on_trees['length'].min()}–{on_trees['length'].max()} steps, KL 0.5 nats. Without bias "
        "on trees:"
        "\n\n" + "\n".join(f"* {target}: {'; '.join(names)}" for target, names in descended.items()),
    )


study.save_figure("08_published", gl.figure("08_published", published), published, *published_text(off), verdicts)


# %%
def compositions_text(frame: pd.DataFrame, in_use: pd.DataFrame) -> tuple[str, str]:
    kept = frame[frame["unbiased"]]
    noise = [f"noise_{i}" for i in range(len(trees))]
    least = dict.fromkeys(kept.loc[kept[column].idxmin(), "same_as"] for column in noise)
    sampled_only = kept[kept["sampled"]].groupby("estimator")[noise].max().max(axis=1).idxmin()
    goal = in_use[in_use["target"] == GOAL]
    shipped = goal.pivot_table(index="estimator", columns="family", values="bias", aggfunc="max")
    return (
        f"**Every composition, tried off-policy**: {len(frame)} of kernel, placement, credit, weight and baseline, at lag "
        f"{LAG:g} nats on {len(trees)} random trees. (a) How many descend which objective on all of them. (b) The {len(kept)} "
        f"that are unbiased for the reverse KL of responses are {kept['same_as'].nunique()} different estimators; the least "
        f"noisy is {' and '.join(least)}, of those that need the sampled tokens only {sampled_only}. Exact.",
        f"* {'; '.join(s.name or '' for s in trees)}; KL 0.5 nats. Unbiased: to a relative {gl.search.UNBIASED:g}. × how many "
        "compositions are the same, response by response.\n"
        "* Complete Rao–Blackwell with prefix weights is the same as "
        f"{gl.report.cell(frame, 'same_as', estimator=rao_blackwell)}.\n"
        f"* Unbiased are {int((kept['weight'] == 'none').sum())} without a weight, {int((kept['weight'] == 'token').sum())} "
        "with token weights.\n"
        f"* Of {in_use['estimator'].nunique()} compositions that frameworks ship (sums of tokens, no clamp), "
        f"{int((shipped['tree'] < 1e-9).sum())} are unbiased on trees (the least bias on any is "
        f"{goal.loc[goal['family'] == 'tree', 'bias'].min():.2g}) and {int((shipped['bandit'] < 1e-9).sum())} on bandits.",
    )


figure = gl.figure("08_compositions", compositions)
study.save_figure("08_compositions", figure, compositions, *compositions_text(compositions, in_use), verdicts)


# %%
def one_text(frame: pd.DataFrame) -> tuple[str, str]:
    inside, drawn = (part.set_index(["estimator", "target"]) for _, part in frame.groupby("via"))
    hit = ((drawn["noise_low"] <= inside["noise"]) & (inside["noise"] <= drawn["noise_high"])).mean()
    covered = ((drawn["bias_low"] <= inside["bias"] + 1e-9) & (inside["bias"] <= drawn["bias_high"])).mean()
    descended = gl.report.unbiased(frame[frame["via"] == "exact"])
    return (
        f"**One tree, exact and sampled**, KL {one.kl():.3g} nats, data of another policy: bias as a gradient of the reverse "
        "KL of responses (a) and of its form with frozen prefixes of the behaviour (b), and noise (c); exact (filled) and "
        f"from {samples:,} responses (open, 95 % intervals). The intervals hold {covered:.0%} of the exact biases and "
        f"{hit:.0%} of the exact noises.",
        f"{one.name}. All rows share one draw of responses, so they hit or miss together. Without bias:\n\n"
        + "\n".join(f"* {target}: {', '.join(names)}" for target, names in descended.items()),
    )


study.save_figure("08_one", gl.figure("08_one", credit), credit, *one_text(credit), verdicts)


# %%
def growth_text(frame: pd.DataFrame) -> tuple[str, str]:
    def at(sweep: str, name: str, x: float) -> float:
        rows = frame[(frame["sweep"] == sweep) & (frame["estimator"] == name) & (frame["x"] == x)]
        return float(rows["noise"].median())

    def ends(sweep: str, low: float, high: float) -> list[str]:
        return [f"{at(sweep, name, low):.3g} to {at(sweep, name, high):.3g}" for name in (rb, k3, k1)]

    fixed, token, lag = dict.fromkeys(frame["sweep"])
    rb, k3, k1 = "full-both, prefix weight", "k3-loss, differentiated prefix weight", "k1-reward-to-go, sequence weight"
    ratio = frame.loc[frame["estimator"] == k3, "noise_ratio"]
    share = frame[frame["sweep"] == lag].drop_duplicates(["x", "draw"])
    fit = share["sequence"] * np.exp(2 * share["lag"])
    by_length = ends(fixed, lengths[1], lengths[-1])
    return (
        f"**Noise of the unbiased estimators** on chains, median of {frame['draw'].nunique()} draws, exact. (a) At a lag of "
        f"{LAG:g} nats per response it goes, from {lengths[1]} to {lengths[-1]} tokens, from {by_length[0]} for complete "
        f"Rao–Blackwell with prefix weights, {by_length[1]} for k3 as loss with a differentiated prefix weight, "
        f"{by_length[2]} for k1 in reward with the sequence weight. (b) At {RATE:g} nats per token. (c) Over the lag. (d) "
        "Effective sample size.",
        "Chains of 4 tokens, 1 nat from their reference, by dynamic programming. Noise of the same three estimators:\n\n"
        f"* (b) {', '.join(ends(token, lengths[1], lengths[-1]))}\n"
        f"* (c) {middle} tokens, lags {CHAIN_LAGS[0]:g} to {CHAIN_LAGS[-1]:g}: "
        f"{', '.join(ends(lag, CHAIN_LAGS[0], CHAIN_LAGS[-1]))}\n\n"
        f"k3 with a differentiated prefix weight, which reads only the sampled tokens, has {ratio.min():.2f} to "
        f"{ratio.max():.2g} times the noise of complete Rao–Blackwell.\n\n"
        f"(d) (E w)²/E w²: the sequence weight's is {fit.min():.2f} to {fit.max():.2f} times exp(−2 lag); the prefix weight's "
        "is averaged over positions.",
    )


study.save_figure("08_growth", gl.figure("08_growth", growth), growth, *growth_text(growth), verdicts)


# %%
def winners_text(winners: pd.DataFrame, regrets: pd.DataFrame) -> tuple[str, str]:
    safest, notes = [], []
    for panel in PANELS:
        first = regrets[regrets["panel"] == panel].iloc[0]
        most = winners.loc[winners["panel"] == panel, "estimator"].value_counts()
        safest.append(f"{first['estimator']} ({first['worst']:.2g})")
        notes.append(
            f"* {panel}: {most.index[0]} wins most cells ({most.iloc[0]} of {most.sum()}); the least regret at worst has "
            f"{first['estimator']}, never more than {first['worst']:.2g} times the best error (median {first['median']:.2f})"
        )
    lost = int((winners["rmse"] >= 1).sum())
    return (
        "**Which estimator to take.** The least root mean squared error √(bias² + noise/N) relative to ‖∇KL‖, by lag and "
        f"batch. The least regret at worst, in times the best error, panel by panel: {'; '.join(safest)}. In {lost} of "
        f"{len(winners)} cells the best error is above 1 (pale). {draws} trees, {chain_draws} chains, exact.",
        "\n".join(notes)
        + "\n\nAn error above 1 is more than dropping the regulariser would cost. Cell: weight (letter; differentiated in k3 as "
        f"loss, otherwise detached), bound on it, error; geometric mean over draws. {FAMILY}. Chains: 4 tokens, T = {middle}, "
        "1 nat from their reference, where truncated prefix and sequence weights have no exact moments and are not candidates.",
    )


study.save_figure("08_winners", gl.figure("08_winners", winners), winners, *winners_text(winners, regrets), verdicts)
