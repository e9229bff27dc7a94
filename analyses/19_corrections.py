# %% [markdown]
# # Which rollout correction, and when?
#
# An engine draws from `μ`, a trainer differentiates `π`. The weight that makes a sum over responses right is the product `Πρ` of all
# ratios; in its place stand ratios of tokens, of prefixes, geometric means, truncated, masked, or nothing. What does each do to the
# gradient of the reward and of the KL as the mismatch and the length grow?

# %%
import pandas as pd
import torch

import gradlab as gl

study = gl.report.study("19_corrections")
NAMES = [
    "none", "token", "token-truncated", "token-masked", "geometric", "geometric-truncated", "geometric-masked",
    "sequence", "sequence-truncated", "sequence-masked",
]  # fmt: skip
KLS = (1e-4, 1e-3, 1e-2)
MISMATCHES = study.pick(full=("noise", "stale", "temperature", "nucleus"), quick=("noise", "stale", "nucleus"))

# %% [markdown]
# ## Exactly, up to 512 tokens
#
# Tokens drawn independently out of three: a response is its counts, and everything but a weight of prefixes is a sum over them. The
# engine differs by noise on its logits, by a step up the reward, by a sharper temperature, or by a nucleus; a KL of 1e-4 nats per token
# is an error of some .014 in a log-probability.

# %%
draws = study.pick(full=3, quick=1)
lengths = study.pick(full=(1, 8, 32, 128, 512), quick=(8, 512))
settings = [gl.corrections.setting(kind, kl, study.child(draw)) for kind in MISMATCHES for kl in KLS for draw in range(draws)]
corrections = gl.corrections.moments(NAMES, settings, lengths)

# %% [markdown]
# Which is best for a batch of so many responses? The root mean squared error is that of the gradient of a batch.

# %%
BATCHES = (64, 256, 1024, 4096, 16384)
BY = ["mismatch", "token_kl", "length", "signal"]
best = gl.off_policy.errors(corrections[corrections["bias"] + corrections["noise"] > 0], BATCHES, by=BY).assign(via="exact")

# %% [markdown]
# ## Bounds of the surrogate
#
# arXiv 2512.23075 bounds the error of the surrogate that token-level ratios give. Over all rewards from 0 to 1 the largest error is
# `½ E|Πρ − 1 − Σ(ρ − 1)|`, exactly.

# %%
supported = [each for each in settings if each.mismatch != "nucleus"]
bounds = gl.corrections.bounds(supported, study.pick(full=(8, 32, 128, 512), quick=(8, 128, 512)))
growth = gl.corrections.growth(bounds)

# %% [markdown]
# ## Chains
#
# Where tokens depend on each other the order counts, and prefixes have weights of their own. A chain of five tokens with a memory of
# four, and a reward that each token earns a part of; the lag grows by a thousandth of a nat with each token. The KL in the reward is
# solved by dynamic programming; bounded weights of several tokens do not decompose over time, and are sampled.

# %%
ON_CHAINS = [*NAMES, "prefix", "prefix-truncated", "prefix-masked"]
SAMPLES = study.pick(full=20_000, quick=1_000)
KL_TERMS = {
    "none": gl.Estimator("k1", "reward", "return"),
    **{name: gl.Estimator("k1", "reward", "return", name) for name in ("token", "prefix", "sequence")},
    "token-truncated": gl.Estimator("k1", "reward", "return", "token", truncate=2.0),
}


def chain(length: int) -> gl.Scenario:
    policy = gl.sequences.lazy_chain(5, length, memory=4, seed=study.child(0))
    behaviour = gl.off_policy.at_lag(policy, 1e-3 * length, study.child(1))
    table = torch.from_numpy(study.rng("rewards").uniform(0, 1, policy.table.shape))
    plain = gl.Scenario(policy, policy, reward=gl.TableReward(policy, table))
    mean = -gl.exact.objective("reward", plain) / length
    return gl.Scenario(
        policy, policy.perturbed(kl=0.1, seed=study.child(2)), behaviour, old=policy,
        reward=gl.TableReward(policy, table - mean), name=f"chain of {length}",
    )  # fmt: skip


parts = []
for length in study.pick(full=(32, 128, 512), quick=(128,)):
    world = chain(length)
    of_reward = {name: gl.corrections.as_loss(name) for name in ON_CHAINS}
    found = gl.measure(of_reward, world, target="reward", samples=SAMPLES, seed=study.child(3))
    parts.append(found.assign(length=length, signal="reward"))
    parts.append(gl.measure(KL_TERMS, world, jobs=study.jobs).assign(length=length, signal="KL in the reward"))
chains = pd.concat(parts, ignore_index=True)

# %% [markdown]
# ## Verdicts and figures

# %%
verdicts = study.verdicts(
    {
        "19_corrections": corrections,
        "19_best": best,
        "19_bounds": bounds,
        "19_growth": growth,
        "19_chains": chains,
    }
)
study.save_frame("19_best", best)
study.save_frame("19_bounds", bounds)
study.save_frame("19_growth", growth)


# %%
def text(frame: pd.DataFrame, limits: pd.DataFrame) -> tuple[str, str]:
    longest = frame["length"].max()
    some = frame[(frame["length"] == longest) & (frame["signal"] == "reward") & (frame["mismatch"] != "nucleus")]

    def median(column: str, name: str, kl: float = 1e-3) -> float:
        return float(some[(some["estimator"] == name) & (some["token_kl"] == kl)][column].median())

    near = limits[(limits["token_kl"] == 1e-3) & (limits["length"] == longest) & (limits["estimator"] == "Pinsker-marginal")]
    return (
        f"**Rollout corrections.** At 1e-3 nats per token and {longest} tokens the geometric mean's gradient is that of no correction to "
        f"{median('from_none', 'geometric'):.1%}; token ratios leave a bias of {median('bias', 'token'):.2f} (none: "
        f"{median('bias', 'none'):.2f}); the product has none, but {median('share', 'sequence'):.0%} of the samples; capped, its step is "
        f"{median('step', 'sequence-truncated'):.2f}. (f) The surrogate's largest error, {near['gap'].median():.2g}, grows like T; its "
        f"bounds are above {near['slack'].min():.0f} times that. Medians over noise, staleness, temperature; exact.",
        "* Reward: 1 for at least the expected number of the first token. (a–d) 1e-3 nats per token; (e) the same at the largest length.\n"
        "* Caps and masks at 2 (tokens .5 to 2, geometric means within 1 %). Step: ⟨E g, ∇⟩/‖∇‖².\n"
        "* Detached. Differentiated, a truncated weight has no gradient where it binds: it is a mask.\n"
        "* A nucleus drops what the policy may say: its product is unbiased for nothing, and a constant that shrinks with the length.",
    )


study.save_figure(
    "19_corrections",
    gl.figure("19_corrections", corrections, best, bounds),
    corrections,
    *text(corrections, bounds),
    verdicts,
)


# %%
def chain_text(frame: pd.DataFrame) -> tuple[str, str]:
    longest = frame["length"].max()
    rows = frame[frame["length"] == longest].set_index(["signal", "estimator"])

    def of(name: str, signal: str = "reward") -> str:
        row = rows.loc[(signal, name)]
        ends = f" ({row['bias_low']:.2f} to {row['bias_high']:.2f})" if row["via"] == "sampled" else ""
        return f"{row['bias']:.2f}{ends}"

    return (
        f"**Corrections on chains.** Bias for the reward, sampled with intervals of 95 %, and for the KL in the reward, exact, by length. "
        f"At {longest} tokens: no correction {of('none')}, geometric mean {of('geometric')}, token ratios {of('token')}. "
        f"For the KL: none {of('none', 'KL in the reward')}, token {of('token', 'KL in the reward')}, prefix "
        f"{of('prefix', 'KL in the reward')}.",
        f"* Five tokens, memory four, {SAMPLES:,} responses, lag 1e-3 nats per token, reference .1 nats away, credit return.\n"
        "* With credit return every token is weighted for the whole reward, so that neither its own ratio nor those up to it are enough.\n"
        "* Open intervals: too few effective samples to know (`reliable`).",
    )


study.save_figure("19_chains", gl.figure("19_chains", chains), chains, *chain_text(chains), verdicts)
