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

study = gl.report.study(__file__)
seed = study.seed
behind, variant = gl.off_policy.behind, gl.search.reweighted
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
    policy = gl.Tree.random(vocab, length, seed + draw, eos=eos)
    behaviour = behind(policy, lag, seed + draw) if lag else None
    name = f"random tree {draw}, {vocab} tokens, {length} steps" + (f", lag {lag:g}" if lag else ", on-policy")
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=seed + 100 + draw), behaviour, name)


def bandit(draw: int, lag: float) -> gl.Scenario:
    policy = gl.Bandit.random(5, seed + draw)
    behaviour = behind(policy, lag, seed + draw) if lag else None
    name = f"random bandit {draw}, 5 tokens" + (f", lag {lag:g}" if lag else ", on-policy")
    return gl.Scenario(policy, policy.perturbed(kl=0.5, seed=seed + 100 + draw), behaviour, name)


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
compositions["same_as"] = compositions["estimator"].map(gl.search.twins({n: tried[n] for n in unbiased}, trees[0]))

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
    policy = gl.Markov.random(4, length, seed + 30 + draw)
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=seed + 130 + draw), behind(policy, lag, seed + 30 + draw))


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
cell, sentence = gl.report.cell, gl.report.sentence


def median(name: str, column: str, lag: float) -> float:
    return float(lags[(lags["estimator"] == name) & (lags["nominal"] == lag)][column].median())


FAMILY = f"random trees of 3 tokens and 5 steps, 0.5 nats from their reference ({draws} draws, seed {seed})"
GROUPS = [
    ("no weight", ["k1-loss", "k2-loss", "k3-loss", "full-loss", "k1-reward-to-go", "full-both"]),
    ("token weight", ["k2-loss, token weight", "k2-loss, differentiated token weight", "k3-loss, differentiated token weight",
                      "k1-reward-to-go, token weight", "k1-reward-to-go, token weight, clip 0.2", "full-both, token weight"]),
    ("prefix weight", ["k2-loss, prefix weight", "k3-loss, differentiated prefix weight", "k3-both, prefix weight",
                       "k1-reward-to-go, prefix weight", "full-both, prefix weight"]),
    ("sequence weight", ["k3-both, sequence weight", "k1-reward-to-go, sequence weight",
                         "k1-reward-sequence, sequence weight, clip 0.2", "full-both, sequence weight"]),
]  # fmt: skip


def lag_caption() -> str:
    near, far = LAGS[0], max(lag for lag in LAGS if lag <= 1)
    slope = np.log(median("full-both", "bias", 0.1) / median("full-both", "bias", 0.01)) / np.log(10)

    def change(name: str, column: str = "bias") -> str:
        return f"from {median(name, column, near):.3g} to {median(name, column, far):.3g}"

    return (
        "**Bias and noise against the lag.** Relative bias as a gradient of the reverse KL of responses (above) and noise of one "
        f"response (below), median and range over {FAMILY}; exact. Between a lag of {near:g} and {far:g} nats the bias of k2 as loss "
        f"without a weight goes {change('k2-loss')}, of k3 as loss {change('k3-loss')}, of full as loss {change('full-loss')}, of k1 "
        f"in reward to go {change('k1-reward-to-go')}. What is unbiased on-policy (full-both, without weight) is biased as the lag to "
        f"the power {slope:.2f}. With token weights the biases of k2 (detached) and k3 (differentiated) at a lag of {far:g} are "
        f"{median('k2-loss, token weight', 'bias', far):.3g} and "
        f"{median('k3-loss, differentiated token weight', 'bias', far):.3g}; a PPO clip of 0.2 turns the bias of k1 in reward at a "
        f"lag of 0.1 from {median('k1-reward-to-go, token weight', 'bias', 0.1):.3g} into "
        f"{median('k1-reward-to-go, token weight, clip 0.2', 'bias', 0.1):.3g}. Unbiased are k3 as loss with a differentiated prefix "
        f"weight (noise {change('k3-loss, differentiated prefix weight', 'noise')}), complete Rao–Blackwell with prefix weights "
        f"({change('full-both, prefix weight', 'noise')}) and k1 in reward with the sequence weight "
        f"({change('k1-reward-to-go, sequence weight', 'noise')}). Verdicts: {sentence(verdicts, '08_lag')}"
    )


study.save_figure("08_lag", gl.plots.lags(lags, GROUPS), lags, lag_caption())

# %%
BASES = ["full-both, prefix weight", "k3-loss, differentiated prefix weight", "k1-reward-to-go, sequence weight",
         "k2-loss, token weight"]  # fmt: skip
bounded = lags[lags["estimator"].str.replace(r" ≤ \d+$", "", regex=True).isin(BASES)]


def truncation_caption() -> str:
    far = max(lag for lag in LAGS if lag <= 1)

    def at(base: str, bound: int) -> str:
        name = f"{base} ≤ {bound}"
        worst = lags[(lags["estimator"] == name) & (lags["nominal"] == far)]["bias"].max()
        return f"{median(name, 'bias', far):.2g} (at most {worst:.2g}) at {median(name, 'noise', far) / median(base, 'noise', far):.0%}"

    rows = "; ".join(f"{base}: {', '.join(at(base, c) for c in (2, 5, 10))} of the noise" for base in BASES[:3])
    worth_at = truncated_worth[truncated_worth["nominal"] == far].groupby("truncate", dropna=False)["sequence"].median()
    return (
        "**What truncating a weight costs.** Exact relative bias (above) and noise (below) with weights min(W, C), median and range "
        f"over {FAMILY}. Median bias at a lag of {far:g} nats with C = 2, 5, 10: {rows}. The median effective sample size of the "
        f"sequence weight there is {worth_at[np.nan]:.1%} of a batch, truncated {worth_at[2.0]:.0%}, {worth_at[5.0]:.0%} and "
        f"{worth_at[10.0]:.0%}. A differentiated weight has no gradient where its bound binds, so k3 as loss with a truncated prefix "
        "weight loses more than complete Rao–Blackwell, whose weight is detached. k2 with a token weight has a bias of "
        f"{median(BASES[3], 'bias', far):.2g} without and {median(BASES[3] + ' ≤ 2', 'bias', far):.2g} with C = 2. Verdicts: "
        f"{sentence(verdicts[verdicts['id'].str.contains('truncation')])}"
    )


study.save_figure("08_truncation", gl.plots.truncation(bounded, BASES), bounded, truncation_caption())

# %%
off = published[published["off_policy"]]
study.save_figure(
    "08_published",
    gl.plots.weighted(off),
    published,
    "**The weight decides the objective.** Largest relative bias as a gradient of the reverse and the forward KL, of whole responses "
    "or per token with prefixes frozen at the behaviour's (prefix μ) or at the policy's (prefix π), "
    "from data of another policy (filled: 0 to rounding). "
    f"(a) {len(bandits)} bandits of 5 tokens; (b) {len(many)} random trees of {off.loc[off['family'] == 'tree', 'length'].min()}–"
    f"{off['length'].max()} steps; lag {LAG:g} nats, KL 0.5 nats, seed {seed}, exact. Verdicts: {sentence(verdicts, '08_published')} "
    f"{sentence(verdicts, '08_repulsion')}",
)

# %%
kept = compositions[compositions["unbiased"]]
distinct = kept.drop_duplicates("same_as")
least = [kept.loc[kept[f"noise_{i}"].idxmin(), "same_as"] for i in range(len(trees))]
sampled_only = kept[kept["sampled"]].groupby("estimator")[[f"noise_{i}" for i in range(len(trees))]].max().max(axis=1).idxmin()
least_shipped = in_use.loc[(in_use["target"] == GOAL) & (in_use["family"] == "tree"), "bias"].min()
shipped_bias = in_use[in_use["target"] == GOAL].pivot_table(index="estimator", columns="family", values="bias", aggfunc="max")
study.save_figure(
    "08_compositions",
    gl.plots.compositions(compositions, [f"noise_{i}" for i in range(len(trees))]),
    compositions,
    f"**Every composition, tried off-policy.** {len(compositions)} valid compositions of kernel, placement, credit, weight, detached "
    f"or differentiated, and baseline, at lag {LAG:g} nats on {len(trees)} random trees ({'; '.join(s.name or '' for s in trees)}; KL "
    f"0.5 nats, seed {seed}), exact. (a) How many have the gradient of which objective on all of them, to a relative "
    f"{gl.search.UNBIASED:g}. (b) The {len(kept)} that are unbiased for the reverse KL of responses are {len(distinct)} different "
    f"estimators; noise on each tree, × how many compositions are the same, response by response. The least noisy is "
    f"{' and '.join(dict.fromkeys(least))}; complete Rao–Blackwell with prefix weights is the same as "
    f"{cell(compositions, 'same_as', estimator=rao_blackwell)}. Of those that need the sampled tokens only it is {sampled_only}. "
    f"Unbiased are {int((kept['weight'] == 'none').sum())} without a weight, {int((kept['weight'] == 'token').sum())} with token "
    f"weights. Of {in_use['estimator'].nunique()} compositions that frameworks ship (sums of tokens, no clamp), "
    f"{int((shipped_bias['tree'] < 1e-9).sum())} are unbiased on trees (the least bias on any is {least_shipped:.2g}) and "
    f"{int((shipped_bias['bandit'] < 1e-9).sum())} on bandits. Verdicts: "
    f"{sentence(verdicts, '08_compositions')} {sentence(verdicts, '08_shipped')}",
)


# %%
def one_caption() -> str:
    inside, drawn = (part.set_index(["estimator", "target"]) for _, part in credit.groupby("via"))
    hit = ((drawn["noise_low"] <= inside["noise"]) & (inside["noise"] <= drawn["noise_high"])).mean()
    covered = ((drawn["bias_low"] <= inside["bias"] + 1e-9) & (inside["bias"] <= drawn["bias_high"])).mean()
    return (
        f"**One tree, exact and sampled.** {one.name}, KL {one.kl():.3g} nats: bias as a gradient of the reverse KL of responses (a) "
        f"and of its form with frozen prefixes of the behaviour (b), and noise (c), from data of another policy; exact (filled) and "
        f"from {samples:,} responses (open, 95 % intervals, seed {seed}). The intervals hold {covered:.0%} of the exact biases and "
        f"{hit:.0%} of the exact noises; all rows share one draw of responses, so they hit or miss together. Unbiased for the first: "
        f"{', '.join(n for n in NAMES if inside.loc[(n, 'reverse_kl'), 'bias'] < 1e-9)}; for the second: "
        f"{', '.join(n for n in NAMES if inside.loc[(n, 'reverse_kl_frozen_prefix'), 'bias'] < 1e-9)}."
    )


study.save_figure("08_one", gl.plots.credit(credit), credit, one_caption())


# %%
def growth_caption() -> str:
    def at(sweep: str, name: str, x: float) -> float:
        rows = growth[(growth["sweep"] == sweep) & (growth["estimator"] == name) & (growth["x"] == x)]
        return float(rows["noise"].median())

    def ends(sweep: str, name: str, low: float, high: float) -> str:
        return f"{at(sweep, name, low):.3g} to {at(sweep, name, high):.3g}"

    fixed, token, lag = dict.fromkeys(growth["sweep"])
    rb, k3, k1 = "full-both, prefix weight", "k3-loss, differentiated prefix weight", "k1-reward-to-go, sequence weight"
    closest = growth[growth["estimator"] == k3]
    share = growth[growth["sweep"] == lag].drop_duplicates(["x", "draw"])
    fit = share["sequence"] * np.exp(2 * share["lag"])
    return (
        "**Noise of the unbiased estimators.** Chains of 4 tokens, 1 nat from their reference, by dynamic programming; medians of "
        f"{growth['draw'].nunique()} draws (seed {seed}). (a) At a lag of {LAG:g} nats per response: from "
        f"T = {lengths[1]} to {lengths[-1]}, {ends(fixed, rb, lengths[1], lengths[-1])} for complete Rao–Blackwell with prefix weights, "
        f"{ends(fixed, k3, lengths[1], lengths[-1])} for k3 as loss with a differentiated prefix weight, "
        f"{ends(fixed, k1, lengths[1], lengths[-1])} for k1 in reward with the sequence weight. (b) At {RATE:g} nats per token: "
        f"{ends(token, rb, lengths[1], lengths[-1])}, {ends(token, k3, lengths[1], lengths[-1])} and "
        f"{ends(token, k1, lengths[1], lengths[-1])}. (c) At T = {middle}, lags {CHAIN_LAGS[0]:g} to {CHAIN_LAGS[-1]:g}: "
        f"{ends(lag, rb, CHAIN_LAGS[0], CHAIN_LAGS[-1])}, {ends(lag, k3, CHAIN_LAGS[0], CHAIN_LAGS[-1])}, "
        f"{ends(lag, k1, CHAIN_LAGS[0], CHAIN_LAGS[-1])}. k3 with a differentiated prefix weight, which reads only the sampled tokens, "
        f"has {closest['noise_ratio'].min():.2f} to {closest['noise_ratio'].max():.2g} times the noise of complete Rao–Blackwell. (d) "
        f"Effective sample size (E w)²/E w²: the sequence weight's is {fit.min():.2f} to {fit.max():.2f} times exp(−2 lag); the "
        f"prefix weight's is averaged over "
        f"positions. Verdicts: {sentence(verdicts, '08_growth')} {sentence(verdicts, '08_exponents')}"
    )


study.save_figure("08_growth", gl.plots.worth(growth), growth, growth_caption())


# %%
def winners_caption() -> str:
    parts = []
    for panel in PANELS:
        first = regrets[regrets["panel"] == panel].iloc[0]
        most = winners.loc[winners["panel"] == panel, "estimator"].value_counts()
        parts.append(
            f"{panel}: {most.index[0]} wins most cells ({most.iloc[0]} of {most.sum()}); the least regret at worst has "
            f"{first['estimator']}, never more than {first['worst']:.2g} times the best error (median {first['median']:.2f})"
        )
    lost = int((winners["rmse"] >= 1).sum())
    return (
        "**Which estimator to take.** The least root mean squared error √(bias² + noise/N) relative to ‖∇KL‖, by lag and batch, "
        f"geometric mean over draws; exact. Trees: {FAMILY}. Chains: 4 tokens, T = {middle}, 1 nat from their reference ({chain_draws} "
        f"draws), where truncated prefix and sequence weights have no exact moments and are not candidates. Cell: weight (letter; "
        f"differentiated in k3 as loss, otherwise detached), "
        f"bound on it, error. {'. '.join(parts)}. In {lost} of {len(winners)} cells the best error is above 1, more than dropping the "
        "regulariser would cost (pale)."
    )


study.save_figure("08_winners", gl.plots.winners(winners), winners, winners_caption())
