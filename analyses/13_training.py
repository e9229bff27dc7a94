# %% [markdown]
# # What do the regularisers do to a training run?
#
# The small transformer that spells US names is trained to end names in "a", by REINFORCE with a leave-one-out baseline, from its
# reference, under each regulariser: the same reward, the same seeds and draws, a few coefficients. Without a KL term it soon spells
# nothing but short names in "a". How far do the runs go, how much reward do they earn at which distance, and how noisy are they?
# The network computes in double precision: in single precision runs on two processors drift apart.

# %%
import pandas as pd
import torch

import gradlab as gl
from gradlab import training
from gradlab.policies import small
from gradlab.questions import training as runs

study = gl.report.study("13_training")
policy = small("names", precision=torch.float64)
reward = training.task_reward("names", policy)
steps, seeds, watch = study.pick(full=48, quick=4), study.pick(full=6, quick=3), study.pick(full=128, quick=64)
COEFFICIENTS = study.pick(full=[0.03, 0.1, 0.3], quick=[0.1])
MIDDLE = 0.1


def trained(names: list[str], coefficients: list[float], epochs: int = 1) -> pd.DataFrame:
    """Runs of equally many optimiser steps, however many of them a batch is used for."""
    recipe = training.Recipe(
        steps=steps // epochs, epochs=epochs, rate=5e-4, eval_every=max(1, steps // 6 // epochs), eval_responses=watch
    )
    return gl.train(policy, reward, names, coefficients, recipe=recipe, seeds=seeds, seed=study.seed, jobs=study.jobs)


# %% [markdown]
# ## One optimiser step per batch, and several

# %%
EPOCHS = study.pick(full=4, quick=2)
one = trained(["k1-loss", "k2-loss", "k3-loss"], COEFFICIENTS)
reward_kl = trained(["k1-reward"], [MIDDLE])
several = trained(["k2-loss", "k3-loss", "k1-reward"], [MIDDLE], EPOCHS)
one = pd.concat([one, reward_kl[reward_kl["estimator"] != "none"]], ignore_index=True)
compared = pd.concat([runs.compare(one), runs.compare(several)], ignore_index=True)
pairs = runs.pairs(one, "k1-reward", "k2-loss")
study.save_frame("13_pairs", pairs)
verdicts = study.verdicts({"13_training": compared, "13_pairs": pairs})

# %% [markdown]
# ## Pictures


# %%
def ratio(frame: pd.DataFrame, column: str, **where: object) -> str:
    """A quotient with its interval, in words."""
    ends = (gl.report.cell(frame, name, **where) for name in (column, f"{column}_low", f"{column}_high"))
    return "{:.2f} ({:.2f}–{:.2f})".format(*ends)


def runs_text(frame: pd.DataFrame) -> tuple[str, str]:
    last = runs.ends(frame).groupby(["estimator", "coefficient"], sort=False)[["kl", "reward"]].mean()
    said = "; ".join(
        f"{name} {row['kl']:.2f} nats, reward {row['reward']:.2f}"
        for (name, beta), row in last.iterrows()
        if name == "none" or beta == MIDDLE
    )
    return (
        f"**Training runs under each regulariser**, β = {MIDDLE:g}: (a) KL to the reference and (b) reward; means (lines) and "
        f"ranges (bands) of {seeds} seeds. Second half of the runs: {said}.",
        f"The small language model of names, rewarded for names in “a”; {steps} batches of 64 responses in groups of 8, Adam; "
        f"reward of {watch} fresh responses. The runs share the seeds. k1 in the reward and k2 as loss have the same gradient "
        "sample by sample.",
    )


shown = one[one["coefficient"].isin([0.0, MIDDLE])]
study.save_figure("13_runs", gl.figure("13_runs", shown), shown, *runs_text(shown), verdicts)


# %%
def compared_text(frame: pd.DataFrame) -> tuple[str, str]:
    equal = frame[(frame["budget"] == runs.COEFFICIENT) & (frame["data"] == runs.ONE_EPOCH)]
    listed = {
        (name, beta): ratio(equal, "kl_over_k2", estimator=name, coefficient=beta)
        for name, beta in zip(equal["estimator"], equal["coefficient"], strict=True)
        if name in ("k1-loss", "k3-loss")
    }
    middle = ", ".join(f"{name} {told}" for (name, beta), told in listed.items() if beta == MIDDLE)
    later = frame[frame["data"] == runs.EPOCHS]
    return (
        f"**Training runs compared, seed by seed.** {seeds} seeds, 95 % intervals. (a) Reward and KL in the second half of "
        f"each run, one dot per seed. (b) KL at the end over that of k2 as loss with the same β; open: {EPOCHS} optimiser "
        f"steps on every batch. (c) Noise of the gradient over what it is without the regulariser. At β = {MIDDLE:g} the KL "
        f"over that of k2 as loss is {middle}.",
        f"The small language model of names, β from {min(COEFFICIENTS):g} to {max(COEFFICIENTS):g}. KL at the end over that of "
        "k2 as loss:\n\n"
        + "\n".join(f"* {name} at β = {beta:g}: {told}" for (name, beta), told in listed.items())
        + f"\n* k1-reward with {EPOCHS} steps per batch: {ratio(later, 'kl_over_k2', estimator='k1-reward')}",
    )


ends = runs.ends(one)
study.save_frame("13_ends", ends)
study.save_figure("13_training", gl.figure("13_training", compared, ends), compared, *compared_text(compared), verdicts)
