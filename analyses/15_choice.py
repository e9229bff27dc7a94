# %% [markdown]
# # When does the choice of a KL estimator matter at all?
#
# Beside a reward, at the coefficients in use, a KL term is a small part of a gradient. Here k2 is replaced by another estimator, or
# left out, and all else stays: how much does the expected gradient of the whole loss change, and how many responses show it?

# %%
import numpy as np
import pandas as pd
import torch

import gradlab as gl

study = gl.report.study("15_choice")
BETAS = (0.001, 0.01, 0.1)
K1_RETURN = gl.Estimator("k1", "reward", "return")
TERMS = {
    "k2 beside": {"regulariser": gl.Estimator("k2")},
    "k3 beside": {"regulariser": gl.Estimator("k3")},
    "k1 beside": {"regulariser": gl.Estimator("k1")},
    "k1 after the std": {"regulariser": K1_RETURN, "combine": "after"},
}
OTHER = "k2 beside"


def losses(beta: float, group: int) -> dict[str, gl.PolicyLoss]:
    """GRPO's advantage with each regulariser, and without one; on-policy its ratio is 1."""
    composed = {name: gl.PolicyLoss("group_std", group, beta=beta, **parts) for name, parts in TERMS.items()}
    return {**composed, "none": gl.PolicyLoss("group_std", group)}


# %% [markdown]
# ## Bandits, near and far
#
# Five tokens, two of them right; the reference at four distances, groups of 2, 8 and 64.

# %%
KLS = (0.001, 0.01, 0.1, 1.0)
GROUPS = (2, 8, 64)
right = np.arange(5) < 2
draws = study.pick(full=12, quick=3)


def bandit(draw: int, kl: float) -> gl.Scenario:
    policy = gl.Bandit.random(5, study.child(draw))
    reference = policy.perturbed(kl=kl, seed=study.child(100 + draw))
    return gl.Scenario(
        policy, reference, reward=gl.TableReward(policy, right.astype(float)), name=f"random bandit {draw}, KL {kl:g}"
    )


parts = []
for kl in KLS:
    worlds = [bandit(draw, kl) for draw in range(draws)]
    parts += [
        gl.choice.differences(losses(beta, group), OTHER, worlds).assign(nominal=kl, world="random bandits")
        for beta in BETAS
        for group in GROUPS
    ]

# %% [markdown]
# ## A small language model
#
# The transformer that adds two-digit numbers, after 5, 30 and 400 steps of REINFORCE away from its reference, on four questions;
# the reward is 1 for the right sum, β = .01. All responses are listed.

# %%
QUESTIONS = ["12+34=", "05+07=", "88+11=", "50+49="]
exactly = {"prompts": QUESTIONS, "precision": torch.float64}
reference = gl.policies.small("addition", "reference", **exactly)
for stage in study.pick(full=("few", "some", "many"), quick=("few",)):
    policy = gl.policies.small("addition", stage, **exactly)
    reward = gl.training.task_reward("addition", policy)
    scenario = gl.Scenario(policy, reference, reward=reward, name=f"addition, {stage}")
    parts.append(gl.choice.differences(losses(BETAS[1], 8), OTHER, [scenario]).assign(world="addition"))
choice = pd.concat(parts, ignore_index=True)

# %% [markdown]
# ## Verdicts and figure

# %%
verdicts = study.verdicts({"15_choice": choice})


# %%
def text(frame: pd.DataFrame) -> tuple[str, str]:
    bandits = frame[(frame["world"] == "random bandits") & (frame["group"] == 8)]

    def median(column: str, name: str, beta: float, kl: float) -> float:
        rows = bandits[(bandits["estimator"] == name) & (bandits["coefficient"] == beta) & (bandits["nominal"] == kl)]
        return float(rows[column].median())

    model = frame[(frame["world"] == "addition") & (frame["estimator"] == "k3 beside") & (frame["coefficient"] == 0.01)]
    count = frame[frame["world"] == "addition"]["scenario"].nunique()
    return (
        f"**When the estimator matters.** Change of a GRPO loss's expected gradient when its k2 is replaced (a, b), and responses in a "
        f"batch that show it (c). k3 changes it by {median('difference', 'k3 beside', 0.01, 0.1):.1%} at β = .01 and .1 nats, by "
        f"{median('difference', 'k3 beside', 0.1, 1.0):.0%} at β = .1 and one nat. In a language model that adds, at β = .01, by "
        f"{model['difference'].max():.2%} at most: visible from {model['visible_at'].min():.0e} responses on. Medians of {draws} "
        f"bandits, {count} stage(s); exact.",
        "* Open points: the language model. Groups of 8, on-policy.\n"
        "* none: without a regulariser, so that its line is the size of the KL's own gradient.\n"
        "* (c) Batch size at which the error of a batch's mean is as large as the change, at β = .01.\n"
        "* k1 after the std and k2 beside are one gradient on bandits (no line) and differ where responses have several tokens.\n"
        f"* The data have groups of {', '.join(map(str, GROUPS))}, too.",
    )


study.save_figure("15_choice", gl.figure("15_choice", choice), choice, *text(choice), verdicts)
