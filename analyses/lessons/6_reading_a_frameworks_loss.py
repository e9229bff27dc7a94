# %% [markdown]
# # Reading (and auditing) a framework's loss
#
# What a framework does with the KL is in its code: a kernel, a clamp, a mask, a mean. Every one of these changes what is descended. This
# lesson reads a loss as one finds it, guesses, and lets `gradlab audit` answer: it calls the function on all responses of small policies,
# and compares the expected gradient with that of every objective it knows.
#
# 30 minutes. You need lessons 2 and 4.

# %% [markdown]
# ## Before you run anything
#
# Read this loss. Which objective does it descend near the reference, on-policy? One of "reverse_kl", "reverse_kl_frozen_prefix",
# "forward_kl", "forward_kl_frozen_prefix", "chi2_frozen_prefix", "zero".

# %%
import torch

import gradlab as gl

lesson = gl.lesson(6)
guess = None


def kl_loss(log_probs, ref_log_probs, response_mask):
    log_ratio = log_probs - ref_log_probs
    value = torch.exp(-log_ratio) - 1 + log_ratio
    return (value.clamp(-10, 10) * response_mask).sum(-1).mean()


# %% [markdown]
# ## An audit
#
# The arguments are bound by their names. On the command line the same is `gradlab audit losses.py:kl_loss`.

# %%
audited = gl.audit(kl_loss)
print(audited.on_policy.text)
print(audited.off_policy.text)

# %% [markdown]
# Beside the objective there are probes, each one question to the loss. Those that it fails:

# %%
for probe in audited.failures:
    print(f"{probe.name}: {probe.finding}")

# %% [markdown]
# A probe that fails is a property to know, not always a defect. The coefficient of one token shows the clamp: the gradient of what is
# clamped is exactly 0.

# %%
gl.plots.audited_curves(audited.curve.assign(subject="kl_loss"))

# %% [markdown]
# ### Exercise: where is it silent?
#
# Below which log-ratio ℓ is the gradient of this loss exactly 0? To 0.01. Compute it before you look at the audit's finding.

# %%
silent = None
told = lesson.check("silent", silent)

# %% [markdown]
# ## A mean that changes the objective
#
# The same kernel-free loss, k1, with two ways to average: over tokens of a batch of responses, and over responses after a mean over
# the tokens of each.


# %%
def k1_mean(log_probs, ref_log_probs, response_mask):
    per_response = ((log_probs - ref_log_probs) * response_mask).sum(-1) / response_mask.sum(-1)
    return per_response.mean()


print(gl.audit(k1_mean).on_policy.text)

# %% [markdown]
# The reference does not occur in that objective. Whoever adds this loss to keep the policy near its reference trains for the length of
# responses.
#
# ### Exercise: repair
#
# Write a loss that descends the reverse KL with frozen prefixes, on-policy *and* off-policy, without a clamp. Off-policy the
# data are drawn by the policy of `old_log_probs`.

# %%
repair = None  # def repair(log_probs, old_log_probs, ref_log_probs, mask): …
told = lesson.check("repair", repair)

# %% [markdown]
# ## What did you guess?

# %%
told = lesson.check("guess", guess)

# %% [markdown]
# ## What to take away
#
# Read a loss for five things: the kernel and which way its ratio stands, its place, what is detached, the weight, and what it is divided
# by. Then test it: `gradlab.testing.assert_descends` is a line in a test suite, and `gradlab audit --installed` does it for every
# framework that is installed.
#
# ## To read
#
# * `figures/audit.html` and figures 12_settings and 12_kinds: what seven frameworks ship.
# * `gradlab claims clamp length k1-loss-zero`.
# * The source of the loss that you use.
