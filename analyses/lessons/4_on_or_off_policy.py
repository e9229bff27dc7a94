# %% [markdown]
# # On- or off-policy?
#
# The responses of a batch are seldom drawn by the policy that is updated: several optimiser steps are taken on one batch, weights arrive
# late at the inference engine, and the engine computes in another precision. With data from μ the expectation is E_μ, and every
# identity of the lessons before was about E_π. Importance weights ρ = π/μ repair that: of the token, of the prefix up to it,
# or of the whole response.
#
# 25 minutes. You need lessons 2 and 3.

# %% [markdown]
# ## Before you run anything
#
# k1 in the reward, with credit to_go, multiplies the score of each token by the sum of its own and all later log-ratios. Which weight
# makes it unbiased for the KL of whole responses: "none", "token", "prefix" or "sequence"?

# %%
import pandas as pd

import gradlab as gl

lesson = gl.lesson(4)
guess = None

# %% [markdown]
# ## How much lag?
#
# The lag is KL(μ‖π), in nats per response. The bias of unweighted estimators grows with it, also of those without bias on-policy.

# %%
policy = gl.Tree.random(vocab=4, length=4, seed=0)
reference = policy.perturbed(kl=0.5, seed=1)
lags = [gl.Scenario(policy, reference, policy.perturbed(kl=kl, seed=2)) for kl in (0.001, 0.01, 0.1, 1.0)]
names = ["k1-loss", "k2-loss", "k3-loss", "k1-reward-to-go", "full-both"]
unweighted = gl.measure(names, lags)
lesson.show(unweighted.pivot_table(index="lag", columns="estimator", values="bias", sort=False).reset_index())

# %% [markdown]
# k1 as a loss does nothing on-policy. Off-policy E_μ[∇log π] = −∇KL(μ‖π): descending it drives the policy away from the one that
# drew the data.
#
# ## Weights
#
# Below, the same estimators with weights, at a lag of some 0.2 nats: bias against the KL of whole responses and against its form with
# frozen prefixes, and noise.

# %%
scenario = gl.Scenario(policy, reference, policy.perturbed(kl=0.2, seed=2))
weighted = ["k2-loss", "k3-loss", "k2-loss-token-detached", "k2-loss-token", "k3-loss-token", "k3-loss-prefix"]
weighted += ["k3-loss-sequence-weight", "k1-reward-sequence-weight", "full-both-prefix"]
targets = ["reverse_kl", "reverse_kl_frozen_prefix"]
exact = gl.measure(weighted, scenario, target=targets)
drawn = gl.measure(weighted, scenario, target=targets, samples=4000, seed=0)
gl.plots.credit(pd.concat([exact, drawn]))

# %% [markdown]
# Two things are to be seen:
#
# * Token weights are enough for the KL with frozen prefixes, if the weight of k2 is detached or that of k3 is differentiated.
#   Differentiating the weight of k2 makes it the gradient of E[½ℓ²].
# * For whole responses the weight has to reach further, and then the noise is that of a product of many ratios.
#
# ### Exercise: unbiased, from sampled tokens
#
# Compose an estimator, `gl.Estimator(kernel, placement=…, credit=…, weight=…, differentiate_weight=…)`, that is unbiased for
# whole responses here, reads the probabilities of the sampled tokens only, and has less noise than k1 in the reward with the
# sequence weight (12.3).

# %%
unbiased = None
told = lesson.check("unbiased", unbiased)

# %% [markdown]
# ## Truncation
#
# Products of ratios are heavy-tailed, so that frameworks truncate them: min(W, C). That brings the bias back. With `truncate=C`:

# %%
truncated = {f"C = {c:g}": gl.Estimator("k1", "reward", "to_go", "sequence", truncate=c) for c in (1.0, 2.0, 10.0)}
lesson.show(gl.measure(truncated, scenario), "estimator", "bias", "noise")

# %% [markdown]
# ### Exercise: how small may the bound be?
#
# Which is the smallest whole number C at which the relative bias is below 3 %?

# %%
bound = None
told = lesson.check("bound", bound)

# %% [markdown]
# ## What did you guess?

# %%
told = lesson.check("guess", guess)

# %% [markdown]
# ## What to take away
#
# First say which objective is wanted: with frozen prefixes token weights do, for whole responses they do not. Then choose what to
# differentiate; the two are not independent. A bound on the weights is a choice between bias and noise.
#
# ## To read
#
# * Liu et al., arXiv 2510.01555, the off-policy part; DeepSeek-V3.2, arXiv 2512.02556 §3.1, for the differentiated weight of k3.
# * Shah et al., arXiv 2512.21852, which leaves the unbiased off-policy gradient open.
# * `gradlab claims off-policy-bias off-policy-fix rho-k3`; figures 08_lag, 08_one and 08_winners, which says what to take.
