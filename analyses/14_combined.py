# %% [markdown]
# # What does the KL weigh in a whole loss?
#
# A KL regulariser may stand beside the reward's term, be folded into the advantage ("combined"), or have a clipped head of its own
# ("decoupled", arXiv 2510.01555). Folded in, it may come before the group is standardised or after. What each of them contributes is
# the loss with its coefficient less the loss at β = 0: is that β ∇KL, and how large is it beside the gradient of the reward?

# %%
import numpy as np
import pandas as pd

import gradlab as gl

study = gl.report.study("14_combined")
GROUP = 8
K1, K2, K3 = gl.Estimator("k1"), gl.Estimator("k2"), gl.Estimator("k3")
K1_RETURN = gl.Estimator("k1", "reward", "return")
K3_WEIGHTED = gl.Estimator("k3", weight="token", differentiate_weight=True)
COMPOSED = {
    "k1 before the std": {"regulariser": K1, "combine": "before"},
    "k1 after the std": {"regulariser": K1_RETURN, "combine": "after"},
    "k1 in a head": {"regulariser": K1_RETURN, "combine": "head"},
    "k2 beside": {"regulariser": K2},
    "k3 beside": {"regulariser": K3},
}
GRPO = {name: gl.PolicyLoss("group_std", GROUP, **parts) for name, parts in COMPOSED.items()}
RLOO = {"k1 before, no std": gl.PolicyLoss("leave_one_out", GROUP, regulariser=K1, combine="before")}

# %% [markdown]
# ## On-policy: which β does the regularised reward have?
#
# Bandits of five tokens, two of them right, by the probability of a right one; the reference is .1 nats away. Standardised rewards
# ascend a utility `U(p)`: their gradient is `U'(p)` times that of `p`, so that β beside it is β/U'(p) of the regularised reward.
# A KL that is standardised along with the rewards is blown up where they are equal.


# %%
def bandit(success: float, draw: int) -> gl.Scenario:
    """Two right tokens out of five, with their probability."""
    right = np.arange(5) < 2
    policy = np.exp(study.rng("bandits", draw).standard_normal(5))
    policy = np.where(right, success * policy / policy[right].sum(), (1 - success) * policy / policy[~right].sum())
    at = gl.Bandit(np.log(policy))
    reward = gl.TableReward(at, right.astype(float))
    reference = at.perturbed(kl=0.1, seed=study.child(draw))
    return gl.Scenario(at, reference, reward=reward, name=f"random bandit {draw}, p = {success:g}")


successes = (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
draws = study.pick(full=10, quick=3)
betas = [float(beta) for beta in np.geomspace(1e-4, 1, study.pick(full=9, quick=5))]
bandits = [bandit(success, draw) for success in successes for draw in range(draws)]
weight = gl.combined.contributions({**GRPO, **RLOO}, bandits, betas)
exponents = gl.combined.exponents(weight)

# %% [markdown]
# Where every response is right, nothing but the KL is left to standardise.

# %%
certain = []
for draw in range(draws):
    scenario = bandit(0.5, draw)
    alike = gl.TableReward(scenario.policy, np.ones(5))
    certain.append(gl.Scenario(scenario.policy, scenario.reference, reward=alike, name=f"random bandit {draw}, all right"))
equal = gl.combined.flatness(gl.combined.contributions({"k1 before the std": GRPO["k1 before the std"]}, certain, betas))

# %% [markdown]
# ## Off-policy, with the clip
#
# The ratio of GRPO and its clip at .2 act on the sum of advantage and KL where they are combined; in a head of its own the KL is
# clipped by its own sign. Random bandits and trees, a tenth of a nat from the reference.

# %%
CLIPPED = {"ratio": "token", "clip": 0.2}
OFF = {
    **{name: gl.PolicyLoss("group_std", GROUP, **CLIPPED, **COMPOSED[name]) for name in list(COMPOSED)[1:]},
    "k3 beside, weighted": gl.PolicyLoss("group_std", GROUP, **CLIPPED, regulariser=K3_WEIGHTED),
}
lags = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
BETA = 0.04


def first_two(rollout: gl.Rollout) -> object:
    """1 for a response that begins with one of the first two tokens."""
    return (rollout.tokens[:, 0] < 2).double()


def moved(policy: gl.Bandit | gl.Tree, draw: int, lag: float, kind: str) -> gl.Scenario:
    """A random reference, and data from a policy that lags behind."""
    behaviour = gl.off_policy.at_lag(policy, lag, study.child(200 + draw))
    reference = policy.perturbed(kl=0.1, seed=study.child(100 + draw))
    return gl.Scenario(policy, reference, behaviour, reward=first_two, name=f"random {kind} {draw}, lag {lag:g}")


parts = []
for lag in lags:
    worlds = [
        moved(gl.Bandit.random(5, study.child(draw)), draw, lag, "bandit") for draw in range(study.pick(full=20, quick=4))
    ]
    worlds += [
        moved(gl.Tree.random(3, 3, study.child(draw)), draw, lag, "tree") for draw in range(study.pick(full=12, quick=3))
    ]
    parts.append(gl.combined.contributions(OFF, worlds, [BETA]).assign(nominal=lag))
clipped = pd.concat(parts, ignore_index=True)
heads = gl.combined.against(clipped, "k1 in a head", "k1 after the std")

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts(
    {"14_weight": weight, "14_exponents": exponents, "14_equal": equal, "14_lag": clipped, "14_heads": heads}
)
study.save_frame("14_exponents", exponents)
study.save_frame("14_equal", equal)
study.save_frame("14_heads", heads)

# %% [markdown]
# ## Figures


# %%
def weight_text(frame: pd.DataFrame) -> tuple[str, str]:
    before = frame[frame["estimator"] == "k1 before the std"]

    def median(column: str, success: float, beta: float) -> float:
        rows = before[np.isclose(before["success"], success) & np.isclose(before["coefficient"], beta)]
        return float(rows[column].median())

    low = betas[0]
    small = frame[(frame["estimator"] == "k2 beside") & np.isclose(frame["coefficient"], 0.01)]
    size = small.groupby(small["success"].round(6))["size"].median()
    return (
        f"**What the KL weighs.** Effective β, as a share of β (a) and in units of the reward's gradient (b), for groups of {GROUP}. "
        f"Standardised with the rewards, a KL of β = {low:g} at p = .1 counts {median('share', 0.1, low):,.0f}-fold, and its weight "
        f"beside the reward hardly depends on β ({median('per_reward', 0.1, low):.2f}, at β = 1 "
        f"{median('per_reward', 0.1, 1.0):.2f}). (c) Gradient of k2 beside that of the reward. Medians over {draws} bandits; exact.",
        "* p: success probability. (a) at the smallest and a middle β, over p. (b) at p = .1, over β; grey: β itself.\n"
        f"* At β = .01 the gradient of k2 is {size.iloc[0]:.2g} of the reward's at p = {size.index[0]:g} and {size[0.5]:.2g} at p = .5: "
        "where hardly a group has two different rewards, the KL is most of the gradient.\n"
        "* Means are exact: over binomial numbers of right responses, or over all groups where each response has its own KL.",
    )


study.save_figure("14_weight", gl.figure("14_weight", weight), weight, *weight_text(weight), verdicts)


# %%
def lag_text(frame: pd.DataFrame) -> tuple[str, str]:
    def median(column: str, estimator: str, family: str, lag: float = 0.1) -> float:
        rows = frame[(frame["estimator"] == estimator) & (frame["family"] == family) & (frame["nominal"] == lag)]
        return float(rows[column].median())

    head, after = "k1 in a head", "k1 after the std"
    counts = {family: part["scenario"].nunique() // len(lags) for family, part in frame.groupby("family")}
    return (
        f"**Off-policy, with GRPO's clip at .2.** What is left of β, and the error of the KL's contribution, over the lag. At .1 nats a "
        f"clipped head keeps {median('share', head, 'bandit'):.2f} of β on bandits, a KL in the advantage "
        f"{median('share', after, 'bandit'):.2f}, and their errors are {median('bias', head, 'bandit'):.2f} and "
        f"{median('bias', after, 'bandit'):.2f}; on trees {median('bias', head, 'tree'):.2f} and {median('bias', after, 'tree'):.2f}. "
        f"Median and quartiles of {counts['bandit']} bandits and {counts['tree']} trees; exact.",
        f"* β = {BETA:g}, groups of {GROUP}, reference .1 nats away. Error: ‖Δ − β∇KL‖/‖β∇KL‖ for the reverse KL of responses.\n"
        "* In the advantage the clip looks at the sign of advantage and KL together, which is that of the advantage; in a head at that "
        "of the KL alone.\n"
        "* k3 beside, weighted: with a differentiated token ratio, exact on one step (no line in c); k2 and k3 beside have no ratio.\n"
        "* Errors at the lower edge of (c) are below .001.",
    )


study.save_figure("14_lag", gl.figure("14_lag", clipped), clipped, *lag_text(clipped), verdicts)
