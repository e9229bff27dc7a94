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

study = gl.report.study(__file__)
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
rng = np.random.default_rng(np.random.SeedSequence(study.seed, spawn_key=(7,)))
policies = []
for index in range(study.pick(full=24, quick=6)):
    seed, kl = int(rng.integers(2**31)), float(np.exp(rng.uniform(np.log(0.05), np.log(3))))
    eos = 0 if index % 4 >= 2 else None
    if index % 2:
        policy = gl.Tree.random(3, int(rng.integers(2, 6)), seed, eos=eos)
    else:
        policy = gl.Markov.random(int(rng.integers(2, 7)), int(rng.integers(2, 65)), seed, eos=eos)
    policies.append(
        gl.Scenario(policy, policy.perturbed(kl=kl, seed=index), name=f"random {type(policy).__name__.lower()} {index}")
    )
objectives = gl.measure(CREDITS, policies, target=TARGETS, jobs=study.jobs)

# %% [markdown]
# The same on one chain that remembers ten tokens, exact and from samples. Two pairs are the same estimator, response by
# response: k2 as loss and k1 in reward, with the credit of a token and with the credit of a whole response.

# %%
start = gl.sequences.lazy_chain(vocab=4, length=16, memory=10, seed=study.seed)
chain = gl.Scenario(start, start.perturbed(kl=1, seed=study.seed + 1), name="chain, 4 tokens, memory 10, length 16")
samples = study.pick(full=40_000, quick=8_000)
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
draws = study.pick(full=7, quick=3)
longest = study.pick(full=512, quick=64)
PER_TOKEN = 0.02


def lazy(vocab: int, length: int, memory: float, kl: float, draw: int, name: str) -> gl.Scenario:
    policy = gl.sequences.lazy_chain(vocab, length, memory, seed=study.seed + draw)
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=study.seed + 100 + draw), name=name)


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
# How wrong can it be? The smallest tree: at the root the policy picks `a` half of the time and the reference 70 %, so the root's
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
lengths = [2**k for k in range(1, 10) if 2**k <= longest]


def dense(vocab: int, length: int, kl: float, draw: int, name: str) -> gl.Scenario:
    policy = gl.Markov.random(vocab, length, seed=study.seed + 50 + draw)
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=study.seed + 150 + draw), name=name)


scenarios = []
for draw in range(study.pick(full=3, quick=1)):
    full_length = dense(4, longest, RATE * longest, draw, "longest")
    scenarios += [("length, KL per token", x, gl.sequences.shortened(full_length, x)) for x in lengths]
    scenarios += [("length, KL per response", x, dense(4, x, 1.0, draw, "")) for x in lengths]
    scenarios += [("KL", x, dense(4, 64, x, draw, "")) for x in (0.01, 0.03, 0.1, 0.3, 1, 3, 10)]
    scenarios += [("vocabulary", x, dense(x, 32, 1.0, draw, "")) for x in (2, 4, 8, *study.pick(full=[16], quick=[]))]
named = [gl.Scenario(s.policy, s.reference, name=f"{sweep} {x:g} #{i}") for i, (sweep, x, s) in enumerate(scenarios)]
growth = gl.measure(GROWTH, named, jobs=study.jobs)
keys = pd.DataFrame({"scenario": [s.name for s in named], "sweep": [k for k, *_ in scenarios], "x": [x for _, x, _ in scenarios]})
growth = keys.merge(growth, on="scenario")
LARGE = {"length, KL per token": longest / 8, "length, KL per response": longest / 8, "KL": 0.1, "vocabulary": 2}
median = growth.groupby(["sweep", "estimator", "x"], sort=False)["noise"].median().reset_index()
fits = pd.concat(
    [gl.sequences.exponents(median[median["sweep"] == sweep], ["sweep", "estimator"], "x", "noise", low) for sweep, low in LARGE.items()],
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
BASE = E("k1", "reward", "return")


def grouped(n: int) -> dict[str, gl.Estimator]:
    return {f"{kind} {n}": E("k1", "reward", "return", baseline=kind, group=n) for kind in ("group_mean", "leave_one_out")}


OTHERS = {name: gl.ESTIMATORS[name] for name in ("k1-reward-return", "k1-reward-to-go", "k1-reward-kl-baseline", "full-both")}
AGAINST = {"k1-reward-kl-baseline": "k1-reward-to-go"}
parts = []
middle = dense(4, 32, 1.0, 0, "chain of 32, KL 1")
for kl in (0.1, 1.0, 10.0):
    scenario = middle if kl == 1 else dense(4, 32, kl, 0, f"chain of 32, KL {kl:g}")
    parts.append(gl.measure({**OTHERS, **{k: v for n in SIZES for k, v in grouped(n).items()}}, scenario))
drawn = study.pick(full=20_160, quick=5_040)
parts.append(gl.measure(OTHERS, middle, samples=drawn, seed=study.seed))
parts += [gl.measure(grouped(n), middle, samples=drawn, seed=study.seed) for n in SIZES]
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
# With an end token responses differ in length, and a factor 1/L belongs to the response, not to the token. The gradient of k1 as
# loss is then `E[1/L Σ_t ∇log π(y_t|s_t)] = ∇E[1/L]`: the reference is gone. k1 in reward with `return` becomes
# `∇E[S/L] − ∇E[1/L]`. One mean over all tokens of a batch of n divides by its own tokens too, which matters at finite n.

# %%
NORMALISED = {name: CREDITS[name] for name in ("k1-loss", "k1-reward-to-go", "k1-reward-return", "k2-loss", "k2-loss-sequence", "k3-loss")}
ended, equal = [], []
for draw in range(study.pick(full=8, quick=3)):
    policy = gl.Markov.random(5, 64, seed=study.seed + 200 + draw, eos=0)
    rarely = policy.table.clone()
    rarely[:, 0] -= 1.5
    policy = policy.with_parameters(rarely.flatten())
    ended.append(gl.Scenario(policy, policy.perturbed(kl=0.5, seed=study.seed + 300 + draw), name=f"chain {draw} with an end token"))
    equal.append(dense(5, 16, 0.5, draw, f"chain {draw} of 16 tokens"))
small = gl.Tree.random(3, 6, study.seed, eos=0)
tree_ended = gl.Scenario(small, small.perturbed(kl=0.5, seed=study.seed + 1), name="tree with an end token")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
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
world = gl.Scenario(bushy, bushy.perturbed(kl=0.3, seed=study.seed + 1), name="tree of 4 tokens and 3 steps")
responses = gl.Rollout.enumerated(world)
draws_of_reward = study.pick(full=10, quick=4)
raw = np.random.default_rng(np.random.SeedSequence(study.seed, spawn_key=(8,))).random((draws_of_reward, len(responses.weight)))
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
