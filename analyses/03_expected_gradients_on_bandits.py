# %% [markdown]
# # Which way does each loss really push a policy?
#
# On one step everything can be computed: sum over the tokens instead of sampling them. What a loss does in expectation is the
# gradient of *some* objective, and it need not be the one it was written for.

# %%
import numpy as np
import pandas as pd

import gradlab as gl

study = gl.report.study("03_expected_gradients_on_bandits")

# %% [markdown]
# ## Four tokens
#
# `π = (.4, .3, .2, .1)` and `ref` the same backwards. A gradient has one component per logit; descent subtracts it.

# %%
NAMES = ["k1-reward", "k2-loss", "k3-loss", "k1-loss"]
p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
example = gl.Scenario(gl.Bandit(np.log(p)), gl.Bandit(np.log(q)), name="bandit (.4 .3 .2 .1) ‖ (.1 .2 .3 .4)")
samples = 1_000
tokens = pd.concat(
    [gl.components(NAMES, example), gl.components(NAMES, example, samples=samples, seed=study.seed)], ignore_index=True
)

# %% [markdown]
# ## Which objective, then?
#
# The same question over random policies at distances from 0.01 to 2 nats: the relative bias of every loss as a gradient of
# several objectives. One that is 0 everywhere is what the loss descends.

# %%
rng = study.rng()
bandits = [example]
for index in range(study.pick(full=30, quick=12)):
    policy = gl.Bandit.random(int(rng.integers(3, 20)), seed=int(rng.integers(2**31)))
    kl = float(np.exp(rng.uniform(np.log(0.01), np.log(2))))
    bandits.append(gl.Scenario(policy, policy.perturbed(kl=kl, seed=study.child(index)), name=f"random bandit {index}"))
losses = [
    *("k1-reward", "k2-loss", "k3-plus", "full-loss", gl.Estimator("k1", "loss+reward"), "k3-both"),
    *("k3-loss", "k3-swapped-loss", "mse-sampled-loss", "mse-loss"),
    *(gl.Estimator("k2", "loss+reward"), "abs-loss", "k1-loss"),
]
TARGETS = ["reverse_kl", "forward_kl", "chi2_frozen_prefix", "mse"]
exact = gl.measure(losses, bandits, target=TARGETS, jobs=study.jobs)
sampled = gl.measure(losses, example, target=TARGETS, samples=10_000, seed=study.seed)
objectives = pd.concat([exact, sampled], ignore_index=True)

# %% [markdown]
# ## Three tokens: the whole picture
#
# All policies over three tokens form a triangle. At every point one exact gradient step of size 0.1 is taken on the logits and
# the KL is computed before and after. Near the edges little can be seen in a triangle, so the same is shown over the logits.

# %%
FIELDS = ["k1-reward", "k2-loss", "k3-loss"]
STEP = 0.1
#: Reference → a policy from which a step with k3 as loss goes the wrong way.
INSTANCES = {(0.70, 0.01, 0.29): (0.01, 0.20, 0.79), (0.50, 0.20, 0.30): (0.68, 0.3198, 0.0002)}
columns = [f"policy_{v}" for v in range(3)]


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


side = np.linspace(-10, 10, study.pick(full=49, quick=33))
plane = softmax(np.stack([*(axis.ravel() for axis in np.meshgrid(side, side)), np.zeros(len(side) ** 2)], -1))
crowded = softmax(2 * np.log(gl.simplex(study.pick(full=28, quick=20))[columns].to_numpy()))  # squares: denser near the edges
spaced = gl.simplex(9, edge=0.5)[columns].to_numpy()


def over_grids(reference: tuple[float, ...]) -> pd.DataFrame:
    """What a step does at every point of every grid, for one reference; where a step leads is kept for the arrows only."""
    grids = [
        gl.field(FIELDS, crowded, reference, STEP).assign(grid="simplex"),
        gl.field(FIELDS, spaced, reference, STEP).assign(grid="arrows"),
        gl.field(FIELDS[-1:], plane, reference, STEP).assign(grid="logits"),
        gl.field(FIELDS, [INSTANCES[reference]], reference, STEP).assign(grid="instance"),
    ]
    frame = pd.concat(grids).assign(reference=f"({' '.join(f'{p:.2f}' for p in reference)})", step=STEP).drop(columns="point")
    frame.loc[frame["grid"] != "arrows", [f"after_{v}" for v in range(3)]] = np.nan
    return frame


field = pd.concat([over_grids(reference) for reference in INSTANCES], ignore_index=True)

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts({"03_tokens": tokens, "03_objectives": objectives, "03_field": field})

# %% [markdown]
# ## Figures

# %%
cell = gl.report.cell


def tokens_text(frame: pd.DataFrame, objectives: pd.DataFrame) -> tuple[str, str]:
    def vector(name: str, column: str) -> str:
        rows = frame[(frame["estimator"] == name) & (frame["via"] == "exact")]
        return f"({', '.join(f'{value + 0:.4f}' for value in rows[column].round(12))})"

    scenario = frame["scenario"].iloc[0]
    k3 = frame[(frame["estimator"] == "k3-loss") & (frame["via"] == "exact")]
    cosine = cell(objectives, "cosine", scenario=scenario, estimator="k3-loss", target="reverse_kl", via="exact")
    flipped = ", ".join(k3["parameter"][k3["ratio"] < 0]) or "none"
    vectors = {"truth": vector("k1-reward", "truth")} | {name: vector(name, "expected") for name in NAMES}
    return (
        f"**Expected gradient token by token.** {scenario}, KL {frame['kl'].iloc[0]:.5f} nats. k3 as loss: cosine with the "
        f"truth {cosine:.3f}; sign flipped: {flipped}. Exact (filled) and from {cell(frame, 'samples', via='sampled'):,} "
        "draws (open, 95 % intervals); black: the true gradient of the reverse KL.",
        "\n".join(f"* {name}: {numbers}" for name, numbers in vectors.items()),
    )


study.save_figure("03_tokens", gl.figure("03_tokens", tokens), tokens, *tokens_text(tokens, objectives), verdicts)


# %%
def objectives_text(frame: pd.DataFrame) -> tuple[str, str]:
    part = frame[frame["via"] == "exact"]
    nothing = part["gradient_norm"][part["estimator"] == "k1-loss"].max()
    told = "; ".join(f"{target} by {', '.join(names)}" for target, names in gl.report.unbiased(part).items())
    return (
        "**Which objective each loss descends on one step.** Largest relative bias ‖E g − ∇‖/‖∇‖ over "
        f"{part['scenario'].nunique()} bandits ({part['vocab'].min()}–{part['vocab'].max()} tokens, KL "
        f"{part['kl'].min():.2g}–{part['kl'].max():.2g} nats), exact. Filled: 0, the loss descends that objective: "
        f"{told or 'none'}. The expected gradient of k1 as loss has norm {round(float(nothing), 12):g}.",
        "½χ² is of π against ref, mse ½Σ(π−ref)².",
    )


study.save_figure("03_objectives", gl.figure("03_objectives", objectives), objectives, *objectives_text(objectives), verdicts)


# %%
def field_text(frame: pd.DataFrame) -> tuple[str, str]:
    at = frame[(frame["grid"] == "instance") & (frame["estimator"] == "k3-loss")]
    plane = frame[frame["grid"] == "logits"]
    widest = np.log(plane["policy_0"] / plane["policy_2"]).max()
    shares = (plane.set_index("reference")["rise"] > 0).groupby(level=0, sort=False).mean()
    area = ", ".join(f"{share:.2%} (ref {reference})" for reference, share in shares.items())
    others = frame["rise"][frame["estimator"] != "k3-loss"].max()
    points = "\n".join(
        f"* ({row.policy_0:g}, {row.policy_1:g}, {row.policy_2:g}): from {row.kl:.4f} to {row.kl + row.rise:.4f} nats, at a "
        f"cosine of {row.cosine:.3f} with the true gradient"
        for row in at.itertuples()
    )
    return (
        "**Descent over all policies on three tokens A, B, C**, for two references (star). Arrows: direction in which an "
        f"exact step on the logits moves the policy. Shaded, over the logits: a step of {frame['step'].iloc[0]:g} with k3 as "
        f"loss raises KL(π‖ref), for a share of {area}. k1 in reward and k2 as loss "
        f"{'never raise it' if others < 0 else 'raise it somewhere too'}. Exact.",
        f"Logits: |log π(·)/π(C)| ≤ {widest:.0f}. The step with k3 as loss takes the KL of the policies in "
        f"circles:\n\n{points}",
    )


study.save_figure("03_field", gl.figure("03_field", field), field, *field_text(field), verdicts)
