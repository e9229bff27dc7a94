# %% [markdown]
# # Value or gradient?
#
# Reinforcement learning of language models keeps a policy π near a reference by a penalty on KL(π‖ref) = E log(π/ref). The KL is
# estimated from the sampled tokens. With ℓ = log π(y) − log ref(y) three estimators are in use:
#
# | | value | as a function of ℓ |
# |---|---|---|
# | k1 | unbiased, noisy, negative at times | ℓ |
# | k2 | biased, never negative | ½ ℓ² |
# | k3 | unbiased, never negative | e^{−ℓ} − 1 + ℓ |
#
# They were compared as *values* (Schulman, 2020). A policy is moved by their *gradient*. This lesson compares both.
#
# 25 minutes. You need: expectations, the KL divergence, gradients. To run a cell press Shift and Enter.

# %% [markdown]
# ## Before you run anything
#
# Each of the three is now used as a loss: it is averaged over samples of π, differentiated (not the sampling, which cannot be), and
# descended. Which one has the gradient of the KL as its expected gradient? Write down "k1", "k2" or "k3".

# %%
import numpy as np

import gradlab as gl

lesson = gl.lesson(1)
guess = None

# %% [markdown]
# ## The values
#
# Schulman's example is a pair of Gaussians, N(0, 1) and N(m, 1), here m = 0.1 and m = 1. Bias and standard deviation are relative to
# the KL, and exact: an integral by quadrature, no sampling.

# %%
pairs = [gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(m, 1), name=f"N(0, 1) ‖ N({m:g}, 1)") for m in (0.1, 1)]
values = gl.values(["k1", "k2", "k3"], pairs)
lesson.show(values, "scenario", "kernel", "kl", "bias", "std")

# %% [markdown]
# k1 and k3 have no bias, and near the reference k3 has a fourteenth of the noise of k1. So k3 is the best of the three, and
# frameworks took it as their default. *As a value* it is.
#
# ### Exercise: where does the order turn?
#
# At m = 0.1 the value of k3 has the smaller standard deviation. Far away it has the larger one. At which KL, in nats, are they equal?
# Find it to 1 % by trying other means in the cell above, or by computing it: Var k1 = m² and Var k3 = e^{m²} − 1 − m².

# %%
overtakes = None
told = lesson.check("overtakes", overtakes)

# %% [markdown]
# ## The gradients
#
# A Gaussian has two parameters, its mean and its standard deviation. `expected` is what a loss has as its expected gradient, `truth` is
# the gradient of the KL.

# %%
toy = pairs[1]
losses = ["k1-loss", "k2-loss", "k3-loss"]
lesson.show(gl.components(losses, toy), "estimator", "parameter", "truth", "expected")

# %% [markdown]
# For the mean, k2 and k3 are both right: the toy in which values were compared does not show that one of them is wrong. For the standard
# deviation k3 is not right. With a reference whose variance differs, no parameter of k3 is.

# %%
unequal = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1.1), name="N(0, 1) ‖ N(1, std 1.1)")
gl.plots.gradients(gl.components(losses, [toy, unequal]))

# %% [markdown]
# Why? The KL is an expectation under π, and its gradient has two parts:
#
# ∇E[k] = E[k · ∇log π] + E[∇k]
#
# A loss has the second part only. An unbiased value says something about the left side, and nothing about E[∇k] alone. As ∇k = k′(ℓ) ∇log π
# the losses have the expected gradients
#
# * k1: E[∇log π] = 0, whatever the reference is,
# * k2: E[ℓ ∇log π] = ∇KL(π‖ref), the one that was asked for,
# * k3: E[(1 − e^{−ℓ}) ∇log π] = ∇KL(ref‖π), the *other* KL.
#
# Tokens show the same. On four tokens, with the policy and the reference in opposite orders:

# %%
policy, reference = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
tokens = gl.components(losses, gl.Scenario(gl.Bandit(np.log(policy)), gl.Bandit(np.log(reference))))
lesson.show(tokens.pivot_table(index=["parameter", "truth"], columns="estimator", values="expected").reset_index())

# %% [markdown]
# k3 pushes token 1 down, and it should go up: the sign is wrong.
#
# ### Exercise: make it worse
#
# Give a policy and a reference over three tokens at which a descent step of 0.1 on the logits, with the exact expected gradient of k3 as
# loss, *raises* KL(π‖ref). One token that the policy has nearly dropped is a good beginning.

# %%
raises = None  # ([…, …, …], […, …, …]): the policy's probabilities, then the reference's
told = lesson.check("raises", raises)

# %% [markdown]
# ## What did you guess?

# %%
told = lesson.check("guess", guess)

# %% [markdown]
# ## What to take away
#
# An estimator's value and its gradient are two questions. k3 is a good thing to *log* near the reference, and as a loss descends another
# divergence. k2 is biased as a value, and as a loss is right: at least on one step, see lesson 3.
#
# ## To read
#
# * J. Schulman, "Approximating KL divergence" (2020): the values.
# * Tang & Munos, arXiv 2506.09477: the gradients.
# * Liu et al., arXiv 2510.01555, §4 and §5.
# * `gradlab claims value-implies-gradient k2-loss k3-biased`, with the evidence; figures 01 and 03.
