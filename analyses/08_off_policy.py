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
bandits = [bandit(draw, LAG) for draw in range(study.pick(full=6, quick=3))]
many = [*trees, *(tree(3, 4, draw, LAG) for draw in range(3, study.pick(full=9, quick=4)))]
in_use = gl.search.against(shipped, [*bandits, *many])
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
published = gl.search.against(PUBLISHED, [*bandits, *many, *on_policy])
study.save_frame("08_published", published)
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
    **variant("k1-reward-to-go", "token", clip=0.2), **CLIPPED, **variant("k2-loss", "prefix"), **variant("k3-loss", "prefix", True), **variant("k3-both", "prefix"),
    **variant("k1-reward-to-go", "prefix"), **variant("k3-both", "sequence"), **variant("k1-reward-to-go", "sequence"),
}  # fmt: skip
BOUNDED = {
    name: e
    for bound in TRUNCATIONS
    for part in (
        variant("full-both", "prefix", truncate=bound), variant("full-both", "sequence", truncate=bound),
        variant("k2-loss", "token", truncate=bound), variant("k3-loss", "token", True, bound),
        variant("k3-loss", "prefix", True, bound), variant("k3-both", "prefix", truncate=bound),
        variant("k3-both", "sequence", truncate=bound), variant("k1-reward-to-go", "sequence", truncate=bound),
    )
    for name, e in part.items()
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
longest, middle = study.pick(full=(128, 64), quick=(64, 16))
RATE = 0.01


def chain(length: int, lag: float, draw: int, kl: float = 1.0) -> gl.Scenario:
    policy = gl.Markov.random(4, length, seed + 30 + draw)
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=seed + 130 + draw), behind(policy, lag, seed + 30 + draw))


lengths = [2**k for k in range(1, 8) if 2**k <= longest]
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
    growth.groupby(["sweep", "estimator", "x"], sort=False)["noise"].median().reset_index(), ["sweep", "estimator"], "x", "noise", 4
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
        part = gl.search.against({**WHOLE, **{k: e for k, e in SAMPLED.items() if e.clip is None}}, [chain(middle, lag, draw)], [GOAL])
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

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts(
    {
        "08_compositions": compositions, "08_shipped": in_use, "08_published": published, "08_repulsion": repulsion, "08_lag": lags,
        "08_growth": growth, "08_exponents": fits.assign(via="exact"),
    }
)  # fmt: skip
