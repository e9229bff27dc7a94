# %% [markdown]
# # Reward or loss?
#
# A kernel k(ℓ) of the log-ratio ℓ = log π(y) − log ref(y) can stand in two places. In the *loss* it is differentiated: E[∇k]. In the
# *reward* it is detached and multiplies the score: E[k ∇log π]. Frameworks offer both, often under one name. Lesson 1 found that the
# loss has one part only of the gradient
#
# ∇E[k] = E[k · ∇log π] + E[∇k]
#
# and the reward has the other part only. So each of them is the gradient of something, but of what?
#
# 20 minutes. You need lesson 1.

# %% [markdown]
# ## Before you run anything
#
# Three kernels, two places: "k1-loss", "k1-reward", "k2-loss", "k2-reward", "k3-loss", "k3-reward". Which of the six have the gradient
# of KL(π‖ref)? Write down a list of names.

# %%
import gradlab as gl

lesson = gl.lesson(2)
guess = None

# %% [markdown]
# ## Six estimators
#
# On one step nothing has to be sampled: the sum over tokens is the expectation. `bias` is the distance of the expected gradient from the
# gradient of the KL, relative to its length; `cosine` compares the directions.

# %%
estimators = {f"{kernel}-{place}": gl.Estimator(kernel, place) for kernel in ("k1", "k2", "k3") for place in ("loss", "reward")}
policy = gl.Bandit.random(6, seed=0)
scenario = gl.Scenario(policy, policy.perturbed(kl=0.5, seed=1))
lesson.show(gl.measure(estimators, scenario), "estimator", "bias", "cosine")

# %% [markdown]
# A bias that is not 0 does not say what an estimator does instead. For that, measure it against other objectives, on policies at several
# distances. Filled: 0, so that the estimator descends that objective.

# %%
policies = {kl: gl.Bandit.random(6, seed=seed) for seed, kl in enumerate((0.1, 0.5, 1.0))}
scenarios = [gl.Scenario(policy, policy.perturbed(kl=kl, seed=7)) for kl, policy in policies.items()]
both = gl.Estimator("k2", "loss+reward")
found = gl.measure({**estimators, "k2-loss+reward": both}, scenarios, target=["reverse_kl", "forward_kl", "k2_value"])
gl.plots.objectives(found)

# %% [markdown]
# * k1 as a loss descends nothing: E[∇log π] = 0. In the reward it is right.
# * k2 as a loss is the same as k1 in the reward, sample by sample: ∇½ℓ² = ℓ ∇log π.
# * k3 as a loss descends the forward KL. In the reward it has ∇reverse − ∇forward, which vanishes near the reference.
# * k2 in both places descends what k2 estimates, E[½ℓ²]; that is not the KL.
#
# ### Exercise: the ratio upside down
#
# Code often has `exp(ref − logp)` where it should have `exp(logp − ref)`, or the other way round. "k3-swapped-loss" is k3 with e^{ℓ}
# for e^{−ℓ}, as a loss. Which of the objectives in `gl.TARGETS` does it descend?

# %%
descends = None
told = lesson.check("descends", descends)

# %% [markdown]
# ### Exercise: save k3
#
# Compose an estimator of kernel k3 that has no bias for KL(π‖ref): `gl.Estimator("k3", placement=…)`.

# %%
compose = None
told = lesson.check("compose", compose)

# %% [markdown]
# ## What did you guess?

# %%
told = lesson.check("guess", guess)

# %% [markdown]
# ## What to take away
#
# "KL with k3" does not say what is descended; the place has to be told, too. k1 belongs into the reward and k2 into the loss.
#
# ## To read
#
# * Liu et al., arXiv 2510.01555, §5, for the equivalence of k1 in the reward and k2 as a loss.
# * Shah et al., arXiv 2512.21852: the same kernel in both places.
# * `gradlab list estimators`, and `gradlab claims k1-reward k2-loss k3-reward k3-both`; figure 03_objectives.
