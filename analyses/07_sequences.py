# %% [markdown]
# # What changes when a response has many tokens?
#
# The KL of a response is a sum over its tokens, and an early token decides which prefixes are met later. A loss that takes
# every token by itself differentiates the summands and forgets the prefixes. Which estimators remember them, what does that
# cost in noise, and what happens when responses differ in length?

# %%
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import gradlab as gl

study = gl.report.study("07_sequences")
E = gl.Estimator

# %% [markdown]
# ## Which objective does each credit descend?
#
# Random chains and trees, with and without an end token. Chains are solved by dynamic programming, trees by enumeration.

# %%
CREDITS = {
    **{name: gl.ESTIMATORS[name] for name in ("k1-reward", "k1-reward-to-go", "k1-reward-return")},
    "k1-reward-sequence": E("k1", "reward", "sequence"),
    **{name: gl.ESTIMATORS[name] for name in ("k2-loss", "k2-loss-sequence", "k3-loss", "k3-loss-sequence")},
    **{name: gl.ESTIMATORS[name] for name in ("full-loss", "full-both", "k1-loss")},
}
TARGETS = ["reverse_kl", "reverse_kl_frozen_prefix", "forward_kl", "forward_kl_frozen_prefix"]
rng = study.rng()
policies = []
for index in range(study.pick(full=24, quick=6)):
    seed, kl = int(rng.integers(2**31)), float(np.exp(rng.uniform(np.log(0.05), np.log(3))))
    eos = 0 if index % 4 >= 2 else None
    if index % 2:
        policy = gl.Tree.random(3, int(rng.integers(2, 6)), seed, eos=eos)
    else:
        policy = gl.Markov.random(int(rng.integers(2, 7)), int(rng.integers(2, 65)), seed, eos=eos)
    policies.append(
        gl.Scenario(
            policy,
            policy.perturbed(kl=kl, seed=study.child(index)),
            name=f"random {type(policy).__name__.lower()} {index}",
        )
    )
objectives = gl.measure(CREDITS, policies, target=TARGETS, jobs=study.jobs)

# %% [markdown]
# The same on one chain that remembers ten tokens, exact and from samples. Two pairs are the same estimator, response by
# response: k2 as loss and k1 in reward, with the credit of a token and with the credit of a whole response.

# %%
start = gl.sequences.lazy_chain(vocab=4, length=16, memory=10, seed=study.seed)
chain = gl.Scenario(start, start.perturbed(kl=1, seed=study.child(1)), name="chain, 4 tokens, memory 10, length 16")
samples = study.pick(full=40_000, quick=4_000)
credit = pd.concat(
    [
        gl.measure(CREDITS, chain, target=TARGETS[:2]),
        gl.measure(CREDITS, chain, target=TARGETS[:2], samples=samples, seed=study.seed),
    ],
    ignore_index=True,
)
tree = gl.Tree.random(3, 4, study.seed)
PAIRS = [("k2-loss", "k1-reward"), ("k2-loss-sequence", "k1-reward-sequence"), ("k2-loss", "k1-reward-to-go")]
pairs = gl.sequences.compared([(CREDITS[one], CREDITS[two]) for one, two in PAIRS], gl.Scenario(tree, tree.perturbed(0.7, 1)))
study.save_frame("07_pairs", pairs)

# %% [markdown]
# ## What a token's own gradient cannot see
#
# `∇KL = E Σ_t ∇KL_t + E Σ_t KL_t Σ_{u<t} ∇log π(y_u|s_u)`; per-token k2 has the first sum only. The second is of second order
# in the distance to the reference and reaches as far as the policy remembers. Lazy chains repeat the last token with
# probability `1 − 1/memory` and draw a fresh one otherwise; the reference is a random neighbour.

# %%
draws = study.pick(full=7, quick=2)
longest = study.pick(full=512, quick=64)
PER_TOKEN = 0.02


def lazy(vocab: int, length: int, memory: float, kl: float, draw: int, name: str) -> gl.Scenario:
    policy = gl.sequences.lazy_chain(vocab, length, memory, seed=study.child(draw))
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=study.child(100 + draw)), name=name)


SWEEPS = {
    "length": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "kl": [0.01, 0.03, 0.1, 0.3, 1, 3, 10],
    "vocab": [2, 4, 8, 16, 32, *study.pick(full=[64, 128], quick=[])],
    "memory": [1, 2, 4, 8, 16, 32, 64],
}
found = []
for draw in tqdm(range(draws), desc="gap", disable=None, delay=2):
    base = lazy(8, longest, 10, PER_TOKEN * longest, draw, "longest")
    for sweep, points in SWEEPS.items():
        for x in points:
            at = {"vocab": 8, "length": 64, "memory": 10, "kl": 64 * PER_TOKEN} | {sweep: x}
            name = f"lazy chain {draw}, {sweep} {x:g}"
            if sweep == "length" and x > longest:
                continue
            scenario = gl.sequences.shortened(base, x, name) if sweep == "length" else lazy(**at, draw=draw, name=name)
            part = gl.sequences.gap(["k2-loss", "k3-loss", "k3-loss-sequence"], [scenario])
            found.append(part.assign(sweep=sweep, x=x, draw=draw))
gap = pd.concat(found, ignore_index=True)

# %% [markdown]
# How wrong can it be? The smallest tree: at the root the policy picks `a` half of the time and the reference 70 %, so its
# own KL asks for more `a`; but behind `a` lies nearly all of the KL, in a row so saturated that its own gradient is small.

# %%
root = [[0.5, 0.5], [0.99, 0.01], [0.5, 0.5]], [[0.7, 0.3], [0.01, 0.99], [0.5, 0.5]]
smallest = gl.Scenario(*(gl.Tree(np.log(rows)) for rows in root), name="tree of 2 tokens and 2 steps")
step = gl.measure(["k1-reward", "k2-loss", "k3-loss", "k1-reward-to-go"], smallest)
STEP = 0.1


def rise(name: str) -> float:
    """Change of the KL by one exact step of size 0.1 against the expected gradient."""
    g = gl.exact.moments(gl.ESTIMATORS[name], smallest).mean
    return float(smallest.policy.moved(-STEP * g).kl(smallest.reference)) - smallest.kl()


step["rise"] = [rise(name) for name in step["estimator"]]
study.save_frame("07_step", step)

# %% [markdown]
# ## How the noise grows
#
# Noise is `tr Cov/‖∇‖²` of one response. It is followed over the length at a fixed KL per token and at a fixed KL per response,
# over the KL and over the vocabulary.

# %%
GROWTH = ["k1-loss", "k1-reward", "full-loss", "k1-reward-to-go", "full-both", "k1-reward-return", "k1-reward-loo", "k3-loss",
          "k3-loss-sequence"]  # fmt: skip
RATE = 0.05
lengths = [2**k for k in range(1, 10) if 2**k <= study.pick(full=512, quick=32)]


def dense(vocab: int, length: int, kl: float, draw: int, name: str) -> gl.Scenario:
    policy = gl.Markov.random(vocab, length, seed=study.child(50 + draw))
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=study.child(150 + draw)), name=name)


scenarios = []
for draw in range(study.pick(full=3, quick=1)):
    full_length = dense(4, lengths[-1], RATE * lengths[-1], draw, "longest")
    scenarios += [("length, KL per token", x, gl.sequences.shortened(full_length, x)) for x in lengths]
    scenarios += [("length, KL per response", x, dense(4, x, 1.0, draw, "")) for x in lengths]
    scenarios += [
        ("KL", x, dense(4, study.pick(64, 8), x, draw, ""))
        for x in study.pick((0.01, 0.03, 0.1, 0.3, 1, 3, 10), (0.01, 0.1, 1))
    ]
    scenarios += [("vocabulary", x, dense(x, study.pick(32, 8), 1.0, draw, "")) for x in study.pick((2, 4, 8, 16), (2, 4))]
named = [gl.Scenario(s.policy, s.reference, name=f"{sweep} {x:g} #{i}") for i, (sweep, x, s) in enumerate(scenarios)]
growth = gl.measure(GROWTH, named, jobs=study.jobs)
keys = pd.DataFrame(
    {"scenario": [s.name for s in named], "sweep": [k for k, *_ in scenarios], "x": [x for _, x, _ in scenarios]}
)
growth = keys.merge(growth, on="scenario")
LARGE = {"length, KL per token": lengths[-4], "length, KL per response": lengths[-4], "KL": 0.1, "vocabulary": 2}
median = growth.groupby(["sweep", "estimator", "x"], sort=False)["noise"].median().reset_index()
if growth["noise"].isna().any():
    raise ValueError("a noise is missing: the median of the draws would be one of fewer draws")
fits = pd.concat(
    [
        gl.sequences.exponents(median[median["sweep"] == sweep], ["sweep", "estimator"], "x", "noise", low)
        for sweep, low in LARGE.items()
    ],
    ignore_index=True,
)
study.save_frame("07_exponents", fits)

# %% [markdown]
# ## Baselines
#
# The coefficient of `return` credit is the KL of the response; its mean can be subtracted, from the group with or without the
# response itself. `−KL_t` subtracts what a step's own KL is expected to be.

# %%
SIZES = range(2, 9)


def grouped(n: int) -> dict[str, gl.Estimator]:
    return {f"{kind} {n}": E("k1", "reward", "return", baseline=kind, group=n) for kind in ("group_mean", "leave_one_out")}


OTHERS = {name: gl.ESTIMATORS[name] for name in ("k1-reward-return", "k1-reward-to-go", "k1-reward-kl-baseline", "full-both")}
AGAINST = {"k1-reward-kl-baseline": "k1-reward-to-go"}
parts = []
tokens = study.pick(full=32, quick=8)
middle = dense(4, tokens, 1.0, 0, f"chain of {tokens}, KL 1")
for kl in (0.1, 1.0, 10.0):
    scenario = middle if kl == 1 else dense(4, tokens, kl, 0, f"chain of {tokens}, KL {kl:g}")
    sizes = SIZES if kl == 1 else study.pick(full=SIZES, quick=(2, 8))
    parts.append(gl.measure({**OTHERS, **{k: v for n in sizes for k, v in grouped(n).items()}}, scenario))
drawn = study.pick(full=20_160, quick=3_360)
parts.append(gl.measure(OTHERS, middle, samples=drawn, seed=study.seed))
parts += [gl.measure(grouped(n), middle, samples=drawn, seed=study.seed) for n in study.pick(full=SIZES, quick=(2, 4, 8))]
baselines = pd.concat(parts, ignore_index=True)
split = baselines["estimator"].str.extract(r"^(group_mean|leave_one_out) (\d)$")
baselines["baseline"] = split[0].fillna(baselines["estimator"].map({"k1-reward-kl-baseline": "kl"})).fillna("none")
baselines["group"] = split[1].astype("Int64")
names = {"group_mean": "k1-reward-group", "leave_one_out": "k1-reward-loo"}
baselines["look"] = baselines["baseline"].map(names).fillna(baselines["estimator"])
baselines["shrink"] = baselines["cosine"] * baselines["gradient_norm"] / baselines["target_norm"]
expected = np.where(baselines["baseline"] == "group_mean", 1 - 1 / baselines["group"].astype(float), 1.0)
baselines["shrink_error"] = (baselines["shrink"] - expected).where(baselines["via"] == "exact")
without = baselines[baselines["baseline"] == "none"].set_index(["scenario", "via", "estimator"])["noise"]
key = zip(baselines["scenario"], baselines["via"], baselines["estimator"].map(AGAINST).fillna("k1-reward-return"), strict=True)
# A group mean shrinks signal and noise alike: noise is compared at equal signal.
baselines["noise_ratio"] = baselines["noise"] / expected**2 / [without[k] for k in key]

# %% [markdown]
# ## Length normalisers
#
# With an end token responses differ in length, and a factor 1/L belongs to the response, not to the token. Then k1 as loss
# has the gradient `E[1/L Σ_t ∇log π(y_t|s_t)] = ∇E[1/L]`: the reference is gone. k1 in reward with `return` becomes
# `∇E[S/L] − ∇E[1/L]`. One mean over all tokens of a batch of n divides by its own tokens too, which matters at finite n.

# %%
NORMALISED = {
    name: CREDITS[name] for name in ("k1-loss", "k1-reward-to-go", "k1-reward-return", "k2-loss", "k2-loss-sequence", "k3-loss")
}
ended, equal = [], []
for draw in range(study.pick(full=8, quick=2)):
    policy = gl.Markov.random(5, study.pick(64, 24), seed=study.child(200 + draw), eos=0)
    rarely = policy.table.clone()
    rarely[:, 0] -= 1.5
    policy = policy.with_parameters(rarely.flatten())
    ended.append(
        gl.Scenario(policy, policy.perturbed(kl=0.5, seed=study.child(300 + draw)), name=f"chain {draw} with an end token")
    )
    equal.append(dense(5, 16, 0.5, draw, f"chain {draw} of 16 tokens"))
small = gl.Tree.random(3, 6, study.seed, eos=0)
tree_ended = gl.Scenario(small, small.perturbed(kl=0.5, seed=study.child(1)), name="tree with an end token")
BATCHES = study.pick(full=(1, 2, 4, 8, 16, 32, 64), quick=(4, 8, 64))
normalisers = pd.concat(
    [gl.lengths.normalisers(NORMALISED, [*ended, *equal]), gl.lengths.normalisers(NORMALISED, [tree_ended], BATCHES)],
    ignore_index=True,
)

# %% [markdown]
# ## Does k1 as loss only add noise?
#
# Its gradient is the score, so adding `β·k1` subtracts the constant `β` from the reward: no bias, and a baseline.

# %%
bushy = gl.Tree.random(4, 3, study.seed)
world = gl.Scenario(bushy, bushy.perturbed(kl=0.3, seed=study.child(1)), name="tree of 4 tokens and 3 steps")
responses = gl.Rollout.enumerated(world)
draws_of_reward = study.pick(full=10, quick=4)
raw = study.rng("rewards").random((draws_of_reward, len(responses.weight)))
rewards = {}
for draw, reward in enumerate(torch.from_numpy(raw)):
    rewards |= {f"in [0, 1], {draw}": reward, f"centred, {draw}": reward - responses.weight @ reward}
noise = gl.sequences.with_reward(rewards, world, np.geomspace(0.01, 2, study.pick(full=47, quick=15)).tolist())
noise["draw"] = noise["reward"].str.extract(r", (\d+)$")[0].astype(int)
noise["reward"] = noise["reward"].str.replace(r", \d+$", "", regex=True)

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts(
    {
        "07_objectives": objectives, "07_credit": credit, "07_pairs": pairs, "07_step": step, "07_baselines": baselines,
        "07_normalisers": normalisers, "07_noise": noise,
    }
)  # fmt: skip

# %% [markdown]
# ## Figures

# %%
cell = gl.report.cell


def range_of(frame: pd.DataFrame, column: str) -> str:
    return f"{frame[column].min():.2g}–{frame[column].max():.2g}"


def objectives_text(frame: pd.DataFrame) -> tuple[str, str]:
    part = frame[frame["target"] == TARGETS[0]]
    token = part[part["estimator"] == "k2-loss"]
    descended = gl.report.unbiased(frame)
    return (
        "**Which objective each credit descends.** Largest relative bias ‖E g − ∇‖/‖∇‖; filled: 0. The reverse KL of whole "
        f"responses is descended by {', '.join(descended.get(TARGETS[0], ['none']))}; per token, k2 as loss misses its "
        f"gradient by {token['bias'].min():.1%} to {token['bias'].max():.1%}. {frame['scenario'].nunique()} random chains and "
        f"trees ({frame['vocab'].min()}–{frame['vocab'].max()} tokens, length "
        f"{frame['length'].min()}–{frame['length'].max()}, KL {range_of(part, 'kl')} nats), exact.",
        "From left to right: KL(π‖ref) of whole responses, its frozen-prefix form, KL(ref‖π) of whole responses, its "
        "frozen-prefix form. Half of the policies have an end token.\n\n"
        + "\n".join(f"* {target} by {', '.join(names)}" for target, names in descended.items()),
    )


study.save_figure("07_objectives", gl.figure("07_objectives", objectives), objectives, *objectives_text(objectives), verdicts)


# %%
def credit_text(frame: pd.DataFrame) -> tuple[str, str]:
    def of(name: str, column: str) -> float:
        return float(cell(frame, column, estimator=name, target="reverse_kl", via="exact"))

    inside, sampled = (rows.set_index(["estimator", "target"]) for _, rows in frame.groupby("via"))
    hits = {
        c: ((sampled[f"{c}_low"] <= inside[c] + 1e-12) & (inside[c] <= sampled[f"{c}_high"])).mean() for c in ("bias", "noise")
    }
    even = (of("k1-reward-to-go", "noise") - of("k1-reward", "noise")) / of("k1-reward", "bias") ** 2
    return (
        f"**Credit on one chain**, KL {chain.kl():.3g} nats: bias as a gradient of the reverse KL of responses (a) and of its "
        f"frozen-prefix form (b), and noise (c). k1 in reward has bias {of('k1-reward', 'bias'):.3f} and noise "
        f"{of('k1-reward', 'noise'):.3g} with credit token, {round(of('k1-reward-to-go', 'bias'), 9):g} and "
        f"{of('k1-reward-to-go', 'noise'):.3g} with to_go; complete Rao–Blackwell (full-both) has noise "
        f"{of('full-both', 'noise'):.3g}. Exact (filled) and from {samples:,} responses (open, 95 % intervals).",
        f"* {chain.label}\n"
        f"* Credit return has noise {of('k1-reward-return', 'noise'):.3g}. Token beats to_go in root mean squared error up to "
        f"batches of {even:.0f} responses.\n"
        f"* The exact value lies in {hits['bias']:.0%} of the intervals of the bias and {hits['noise']:.0%} of those of the "
        "noise; all estimators share the draws.",
    )


study.save_figure("07_credit", gl.figure("07_credit", credit), credit, *credit_text(credit), verdicts)


# %%
def gap_text(frame: pd.DataFrame, step: pd.DataFrame) -> tuple[str, str]:
    k2 = frame[frame["estimator"] == "k2-loss"]

    def ends(sweep: str, column: str = "bias") -> str:
        middle = k2[k2["sweep"] == sweep].groupby("x")[column].median()
        return f"from {middle.iloc[0]:.3f} to {middle.iloc[-1]:.3f}"

    middle = k2.groupby(["sweep", "x"])["bias"].median().reset_index()
    slope = gl.sequences.exponents(middle, ["sweep"], "x", "bias").set_index("sweep")["exponent"]
    at = step.set_index("estimator")
    return (
        "**What the gradient of a token's own KL misses.** Relative bias (above) and cosine (below) against the gradient of "
        f"the reverse KL of responses. The median bias of k2 as loss goes {ends('length')} over the length, {ends('kl')} over "
        f"the KL, {ends('vocab')} over the vocabulary and {ends('memory')} over the memory. Median and range of {draws} "
        "chains, exact.",
        f"* Lazy chains of 8 tokens, memory 10, length 64, {PER_TOKEN:g} nats per token unless swept. k2 as loss per token "
        "equals k1 in reward with credit token, and full; k3 as loss per token and on the response.\n"
        f"* Exponent of the median bias of k2: {slope['kl']:.2f} in the KL, {slope['memory']:.2f} in the memory, over which "
        f"its cosine goes {ends('memory', 'cosine')} (lowest of all draws {k2['cosine'].min():.2f}).\n"
        f"* On a tree of 2 tokens and 2 steps, KL {at['kl']['k2-loss']:.3f} nats, its cosine is "
        f"{at['cosine']['k2-loss']:.3f}: an exact step of {STEP:g} changes the KL by {at['rise']['k2-loss']:+.4f} with k2 as "
        f"loss, {at['rise']['k1-reward-to-go']:+.4f} with k1 in reward to_go.",
    )


study.save_figure("07_gap", gl.figure("07_gap", gap), gap, *gap_text(gap, step), verdicts)


# %%
def growth_text(frame: pd.DataFrame, fits: pd.DataFrame) -> tuple[str, str]:
    table = fits.set_index(["sweep", "estimator"])

    def of(sweep: str, *names: str) -> str:
        rows = [table.loc[(sweep, name)] for name in names]
        return ", ".join(
            f"{name} {row['exponent']:+.2f} ± {row['exponent_error']:.2f}" for name, row in zip(names, rows, strict=True)
        )

    first, second = "length, KL per token", "length, KL per response"
    told = ("k1-reward", "k1-reward-to-go", "full-both")
    others = ("full-loss", "k1-reward-return", "k1-reward-loo")
    top = frame[(frame["sweep"] == first) & (frame["estimator"] == "k3-loss-sequence")].groupby("x")["noise"].median()
    return (
        "**How the noise of one response grows.** Noise tr Cov/‖∇KL‖² over the length at a fixed KL per token (a) and per "
        f"response (b), over the KL (c) and the vocabulary (d). Exponents in the length: (a) {of(first, *told)}; (b) "
        f"{of(second, *told)}. Median of {study.pick(3, 1)} random chains, exact.",
        f"* (a) {RATE:g} nats per token and (b) 1 nat per response, 4 tokens; (c) length {study.pick(64, 8)}; (d) 1 nat, "
        f"length {study.pick(32, 8)}. The chain's parameters are shared by all steps, so in (a) the squared signal grows as "
        "length².\n"
        f"* Exponents by least squares ± standard error, length ≥ {LARGE[first]:g}; others: (a) {of(first, *others)}; (b) "
        f"{of(second, *others)}. Between the two longest, to_go in (a) has "
        f"{table.loc[(first, 'k1-reward-to-go'), 'last']:+.2f}.\n"
        f"* k3 as loss on the response has a noise of {top.iloc[-1]:.1e} at {top.index[-1]:g} tokens, beyond the frame.",
    )


study.save_figure("07_growth", gl.figure("07_growth", growth, fits), growth, *growth_text(growth, fits), verdicts)


# %%
def baselines_text(frame: pd.DataFrame) -> tuple[str, str]:
    exact = frame[frame["via"] == "exact"]
    step_kl = exact[exact["baseline"] == "kl"]
    ratios = "; ".join(
        f"KL {kl:.3g}: {rows['noise_ratio'].iloc[0]:.2f} (n = 2) to {rows['noise_ratio'].iloc[-1]:.2f} (n = 8)"
        for kl, rows in exact[exact["baseline"] == "leave_one_out"].groupby("kl")
    )
    return (
        f"**Baselines for the KL in the reward**, k1 in reward with credit return, chains of length {tokens}. (a) Relative "
        f"bias of the group mean and of leave-one-out: exact (filled) and from {drawn:,} responses (open, 95 % intervals). "
        f"(b) Noise of leave-one-out over that without baseline: {ratios}.",
        f"* (a) The group mean shrinks the gradient by 1 − 1/n, a bias of 1/n; KL {middle.kl():.3g} nats, 4 tokens.\n"
        "* (b) Equal to the group mean's at equal signal.\n"
        f"* Subtracting the step's KL from to_go leaves {step_kl['noise_ratio'].min():.3f}–{step_kl['noise_ratio'].max():.3f} "
        "of its noise.",
    )


study.save_figure("07_baselines", gl.figure("07_baselines", baselines), baselines, *baselines_text(baselines), verdicts)


# %%
def normalisers_text(frame: pd.DataFrame) -> tuple[str, str]:
    variable = frame[frame["variable"] & (frame["normaliser"] == "mean")]
    k1, k2 = (variable[variable["estimator"] == name] for name in ("k1-loss", "k2-loss"))
    finite = frame[frame["normaliser"].str.startswith("token_mean of") & (frame["estimator"] == "k2-loss")]
    batch = finite.assign(batch=finite["normaliser"].str.extract(r"(\d+)$")[0].astype(int))
    slope = gl.sequences.exponents(batch, ["estimator"], "batch", "sin_angle", low=4)["exponent"].iloc[0]
    longer = (k1["length_change"] > 0).sum()
    kept = frame.loc[frame["normaliser"].isin(["fixed", "token_mean"]), "sin_angle"].max()
    return (
        "**Dividing by the length.** (a) Sine of the angle between the expected gradient with and without 1/L: "
        f"{k2['sin_angle'].min():.2f}–{k2['sin_angle'].max():.2f} for k2 as loss. (b) Cosine between the descent "
        f"direction and longer responses, without (small) and with 1/L (large): k1 as loss lengthens responses in {longer} of "
        f"{len(k1)} policies. (c) One mean over all tokens of a batch of n: the angle falls as n^{slope:.2f}. "
        f"{variable['scenario'].nunique()} policies with an end token, exact.",
        f"* Mean length {range_of(variable, 'mean_length')}, KL {variable['kl'].median():.2g} nats.\n"
        "* k1 as loss, which has no expected gradient otherwise, becomes ∇E[1/L] (relative error "
        f"{k1['inverse_length'].max():.0e}).\n"
        f"* (c) Tree of 3 tokens and 6 steps; with 1/T or an infinite batch the angle is {kept:.0e}.",
    )


study.save_figure(
    "07_normalisers", gl.figure("07_normalisers", normalisers), normalisers, *normalisers_text(normalisers), verdicts
)


# %%
def noise_text(frame: pd.DataFrame) -> tuple[str, str]:
    def least(kind: str) -> str:
        rows = frame[frame["reward"] == kind]
        at = rows.loc[rows["noise_ratio"].idxmin()]
        return f"{at['noise_ratio']:.3f} (at β = {at['coefficient']:.2g})"

    return (
        f"**k1 as loss beside a reward.** Noise of −r ∇log π + β ∇k1 over that without k1, KL {world.kl():.2g} nats, "
        f"{draws_of_reward} random rewards per response (solid) and the same less their mean (dotted). It falls to "
        f"{least('in [0, 1]')} with raw rewards and to {least('centred')} with centred ones; the mean gradient changes by at "
        f"most {frame['shift'].max():.0e}. Exact.",
        f"* {world.label}; rewards uniform in [0, 1].\n* The mean gradient stays because β is a constant baseline.",
    )


study.save_figure("07_noise", gl.figure("07_noise", noise), noise, *noise_text(noise), verdicts)
