# %% [markdown]
# # Token or response?
#
# A response is many tokens, and its KL is a sum over them: log π(y)/ref(y) = Σ_t ℓ_t. But a token also decides which prefixes come after
# it. An estimator can credit a token with its own log-ratio (`token`), with its own and the later ones (`to_go`), or with those of the
# whole response (`return`, `sequence`). This lesson finds out what that changes.
#
# 25 minutes. You need lessons 1 and 2.

# %% [markdown]
# ## Before you run anything
#
# Which of these have the gradient of the KL of whole responses, for four tokens? "k2-loss" (per token), "k2-loss-sequence" (½S², S the
# sum), "k1-reward" (each token its own), "k1-reward-to-go", "full-loss" (the KL of each step, summed over the vocabulary),
# "full-both" (that, and the KL of later steps in the reward). Write down a list of names.

# %%
import pandas as pd

import gradlab as gl

lesson = gl.lesson(3)
guess = None

# %% [markdown]
# ## A tree of responses
#
# A policy over four tokens and four steps with logits of its own for every prefix has 256 responses: all are listed, and all numbers are
# exact.

# %%
policy = gl.Tree.random(vocab=4, length=4, seed=0)
scenario = gl.Scenario(policy, policy.perturbed(kl=0.5, seed=1))
names = ["k2-loss", "k2-loss-sequence", "k1-reward", "k1-reward-to-go", "full-loss", "full-both"]
targets = ["reverse_kl", "reverse_kl_frozen_prefix"]
found = gl.measure(names, scenario, target=targets)
lesson.show(found.pivot_table(index="estimator", columns="target", values="bias", sort=False).reset_index())

# %% [markdown]
# What is per token descends the second objective, in which the distribution of prefixes is held fixed while each step is differentiated. It
# is a KL, too, but the part of the gradient is missing that says: avoid prefixes from which the policy is far from its reference.
#
# It costs something to include that part: noise. `noise` is the variance of one sample relative to the squared gradient.

# %%
drawn = gl.measure(names, scenario, target=targets, samples=4000, seed=0)
gl.plots.credit(pd.concat([found, drawn]))

# %% [markdown]
# ### Exercise: bias against noise
#
# A batch of B responses has the mean squared error bias² + noise/B, relative to the squared gradient. "k1-reward" has a bias and less
# noise, "k1-reward-to-go" no bias and more noise. At which B are they equally good? To 5 %.

# %%
lesson.show(found[found["target"] == "reverse_kl"], "estimator", "bias", "noise")
breaks_even = None
told = lesson.check("breaks_even", breaks_even)

# %% [markdown]
# ## How it grows
#
# Over longer responses the missing part becomes more important. At one step there is none.

# %%
trees = [gl.Tree.random(vocab=3, length=length, seed=3) for length in (1, 2, 4, 6)]
lengths = [gl.Scenario(tree, tree.perturbed(kl=0.2 * tree.length, seed=4)) for tree in trees]
lesson.show(gl.measure("k2-loss", lengths), "length", "kl", "bias", "noise")

# %% [markdown]
# ### Exercise: less noise
#
# Name an estimator of `gl.ESTIMATORS`, or compose one, that is unbiased for whole responses and has less than half the noise of
# k1-reward-to-go.

# %%
quieter = None
told = lesson.check("quieter", quieter)

# %% [markdown]
# ## What did you guess?

# %%
told = lesson.check("guess", guess)

# %% [markdown]
# ## What to take away
#
# "k2 as a loss is the same as k1 in the reward" holds with the same credit. With credit `token` both have the gradient of a KL whose
# prefixes are frozen. Summing a step's KL over the vocabulary takes most of the noise away.
#
# ## To read
#
# * Tang & Munos, arXiv 2506.09477: token-level losses are partial gradients.
# * Amini, Vieira & Cotterell, arXiv 2504.10637: Rao–Blackwell.
# * Yao et al., arXiv 2601.10201: the missing future KL.
# * `gradlab claims k2-loss rao-blackwell`; figures 07_objectives, 07_gap and 07_growth.
