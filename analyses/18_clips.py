# %% [markdown]
# # What do clips remove of the KL's gradient, and of the reward's?
#
# PPO stops a token whose ratio to the old policy has gone beyond `1 ± ε` in its advantage's favour; DAPO gives it more room upwards;
# CISPO bounds the weight alone. A KL in the advantage is stopped along with the reward; in a head of its own (arXiv 2510.01555) by the
# sign of its own advantage. How much goes, of which part, and on which tokens: those that the policy over-samples or under-samples?

# %%
import pandas as pd

import gradlab as gl

study = gl.report.study("18_clips")
GROUP, BETA = 8, 0.04
K1_RETURN = gl.Estimator("k1", "reward", "return")
REGIONS = {
    "PPO": {"clip": 0.2},
    "DAPO": {"clip": (0.2, 0.28)},
    "CISPO": {"clip": (1.0, 4.0), "clip_form": "detached"},
}
KL = {"regulariser": K1_RETURN, "beta": BETA}


def losses(combine: str) -> dict[str, gl.PolicyLoss]:
    """GRPO's advantage with a token ratio under each trust region."""
    shared = {"ratio": "token", "combine": combine, **KL}
    return {name: gl.PolicyLoss("group_std", GROUP, **shared, **region) for name, region in REGIONS.items()}


# %% [markdown]
# ## Worlds
#
# Random bandits and trees; a response is right if it begins with one of the first two tokens, and the reference is .1 nats away. The
# policy has left the data in two ways: by updates along the loss's own gradient, as over the minibatches of one batch, or in a random
# direction, as another engine would.


# %%
def first_two(rollout: gl.Rollout) -> object:
    """1 for a response that begins with one of the first two tokens."""
    return (rollout.tokens[:, 0] < 2).double()


def worlds(policy: gl.Bandit | gl.Tree, draw: int, lag: float) -> dict[str, gl.Scenario]:
    reference = policy.perturbed(kl=0.1, seed=study.child(100 + draw))
    start = gl.Scenario(policy, reference, reward=first_two)
    ascent = gl.exact.moments(gl.PolicyLoss("group_std", GROUP, **KL, combine="after"), start).mean
    updated = gl.clips.after_steps(policy, ascent, lag)
    behind = gl.off_policy.at_lag(policy, lag, study.child(200 + draw))
    kind = type(policy).__name__.lower()
    return {
        "updates": gl.Scenario(
            updated, reference, policy, reward=first_two, name=f"random {kind} {draw}, updated, lag {lag:g}"
        ),
        "random": gl.Scenario(policy, reference, behind, reward=first_two, name=f"random {kind} {draw}, lag {lag:g}"),
    }


LAGS = (0.003, 0.01, 0.03, 0.1, 0.3)
bandits = [gl.Bandit.random(5, study.child(draw)) for draw in range(study.pick(full=20, quick=5))]
trees = [gl.Tree.random(3, 3, study.child(draw)) for draw in range(study.pick(full=12, quick=3))]
parts = []
for lag in study.pick(full=LAGS, quick=(0.003, 0.01, 0.1)):
    for policies in (bandits, trees):
        for draw, policy in enumerate(policies):
            for world, scenario in worlds(policy, draw, lag).items():
                head = gl.clips.removed(losses("head"), [scenario]).replace({"part": {"KL": "KL in a head"}})
                inside = gl.clips.removed(losses("after"), [scenario])
                inside = inside[inside["part"] == "KL"].assign(part="KL in the advantage")
                parts.append(pd.concat([head, inside]).assign(world=world, nominal=lag))
clips = pd.concat(parts, ignore_index=True)
sides = gl.clips.sides(clips, "PPO", by=["family", "world", "nominal"])

# %% [markdown]
# ## Verdicts and figure

# %%
verdicts = study.verdicts({"18_sides": sides})
study.save_frame("18_sides", sides)


# %%
def text(frame: pd.DataFrame, summary: pd.DataFrame) -> tuple[str, str]:
    def at(column: str, part: str, world: str, family: str = "bandit", name: str = "PPO") -> float:
        cell = {"part": part, "world": world, "family": family, "estimator": name, "nominal": 0.1}
        return float(gl.report.cell(summary, column, **cell))

    head, inside = "KL in a head", "KL in the advantage"
    counts = {family: rows["scenario"].nunique() for family, rows in frame.groupby("family")}
    every = 2 * frame["nominal"].nunique()
    return (
        "**What clips take.** Change of each part's expected gradient (bias). Bars: pulls that PPO removes, over-sampled tokens filled. "
        f"After updates of .1 nats, PPO's clip moves the reward's gradient by {at('bias', 'reward', 'updates'):.0%} on bandits and that "
        f"of a KL in the advantage by {at('bias', inside, 'updates'):.0%}, but a head's by {at('bias', head, 'updates'):.0%}; from data "
        f"of a random direction the head's moves by {at('bias', head, 'random'):.0%}. CISPO takes next to nothing. Medians of "
        f"{counts['bandit'] // every} bandits and {counts['tree'] // every} trees; exact.",
        f"* β = {BETA:g}, groups of {GROUP}, k1 with credit return, reference .1 nats away. Bounds: PPO .2; DAPO .2 and .28; CISPO 5.\n"
        "* A pull is the coefficient of a token's score, counted positive. Over-sampled: more likely than under the reference.\n"
        f"* What PPO removes of the reward after updates of .1 nats is on over-sampled tokens for "
        f"{at('over_share', 'reward', 'updates'):.0%} (bandits) and {at('over_share', 'reward', 'updates', 'tree'):.0%} (trees).\n"
        "* A head is stopped only where the KL has been followed; updates follow the reward, so that its clip hardly binds.",
    )


study.save_figure("18_clips", gl.figure("18_clips", clips, sides), clips, *text(clips, sides), verdicts)
