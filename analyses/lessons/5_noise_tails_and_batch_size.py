# %% [markdown]
# # Noise, tails and batch size
#
# An estimate errs for two reasons: its expectation is not the gradient (bias), and it is one draw of many (noise). A batch of B responses
# has the mean squared error bias² + noise/B, both relative to the squared gradient. A larger batch helps against noise only. And where
# single draws carry nearly all of the expectation, a batch that does not hold them does not know that they exist.
#
# 25 minutes. You need lesson 1.

# %% [markdown]
# ## Before you run anything
#
# Ten tokens; the reference gives the first a fifth, and the policy has nearly dropped it: its logit is −9, which is a probability of
# 1.5e-4. A batch holds 64 samples. In how many of 100 batches is the dropped token drawn at least once?

# %%
import numpy as np

import gradlab as gl

lesson = gl.lesson(5)
guess = None

# %% [markdown]
# ## When does a bias matter?
#
# Near the reference: 0.1 nats, ten tokens.

# %%
policy = gl.Bandit.random(10, seed=0)
near = gl.Scenario(policy, policy.perturbed(kl=0.1, seed=1))
lesson.show(gl.measure(["k2-loss", "k3-loss"], near), "estimator", "bias", "noise")

# %% [markdown]
# ### Exercise: from which batch size on?
#
# From which B on is the squared bias of k3 as a loss larger than its variance? Above it more samples do not help. To 5 %.

# %%
matters = None
told = lesson.check("matters", matters)

# %% [markdown]
# The nearer the reference, the larger is that batch: near it, k3 and k2 agree to first order.

# %%
distances = [gl.Scenario(policy, policy.perturbed(kl=kl, seed=1)) for kl in (0.001, 0.01, 0.1, 1.0)]
gl.plots.crossovers(gl.measure(["k3-loss"], distances))

# %% [markdown]
# ## A dropped token
#
# Now the policy that has dropped a token. The gradient should bring it back. What does it expect on the token's logit?

# %%
reference = np.log([0.2, *[0.8 / 9] * 9])
logits = reference.copy()
logits[0] = -9.0
dropped = gl.Scenario(gl.Bandit(logits), gl.Bandit(reference))
exact = gl.components(["k2-loss", "k3-loss"], dropped)
lesson.show(exact[exact["parameter"] == "token 0"], "estimator", "truth", "expected", "std", digits=5)

# %% [markdown]
# k3 pulls 175 times as hard as the gradient of the KL does, and all of that pull is on the one token that is hardly ever drawn. What do
# 2,000 samples say?

# %%
few = gl.measure(["k2-loss", "k3-loss"], dropped, samples=2000, seed=0)
lesson.show(few, "estimator", "bias", "bias_low", "bias_high", "reliable", "unseen", digits=2)

# %% [markdown]
# The intervals are open, `reliable` is False, and `unseen` is the share of the second moment expected on gradients larger than any of the
# sample. Error bars from the spread of the sample alone would be narrow and wrong. With 200,000 samples the token is there:

# %%
many = gl.measure(["k2-loss", "k3-loss"], dropped, samples=200_000, seed=0)
lesson.show(many, "estimator", "bias", "bias_low", "bias_high", "reliable", "unseen", digits=2)

# %% [markdown]
# ### Exercise: infinite variance
#
# k3 has e^{−ℓ} = ref/π in it. For a policy N(0, σ) and a reference N(0, 1), what is the smallest σ at which the variance of its value is
# finite? To 1 %. (E_π[(ref/π)²] = ∫ ref²/π.)

# %%
finite = None
told = lesson.check("finite", finite)

# %% [markdown]
# ## What did you guess?

# %%
told = lesson.check("guess", guess)

# %% [markdown]
# ## What to take away
#
# Ask of a bias: at which batch size? And of an estimate: has the sample seen what carries the expectation? An error bar cannot
# know what was never drawn; the policy's probabilities can.
#
# ## To read
#
# * McCandlish et al., arXiv 1812.06162: the noise scale.
# * Liu et al., arXiv 2510.01555, App. I: the tails of k3.
# * `gradlab claims value-tails k3-asymmetry k3-variance`; figures 04_crossover, 05_dropped, 06_running.
