# %% [markdown]
# # Where does training end, if nothing but the regulariser differs?
#
# Exact ascent on `E[r] − β·penalty`, with the exact expected gradient of each estimator in place of the penalty's: no sampling, no
# optimiser, the flow `dθ/dτ = ∇E[r] − β E[g]` until it rests. With the reverse KL it rests at `π* ∝ ref · exp(r/β)`, with the
# forward KL at `β · ref/(Λ − r)` (GX-Chen et al., arXiv 2510.20817). An estimator need not descend either.

# %%
import numpy as np
import pandas as pd
import torch

import gradlab as gl

study = gl.report.study("09_fixed_points")
rng = study.rng()

# %% [markdown]
# ## Worlds
#
# Two bandits and two trees whose responses have random rewards in [0, 1]; the second tree has an end token.

# %%
three = gl.ascent.World("3 tokens", gl.Bandit(np.log([0.5, 0.3, 0.2])), torch.tensor([0.0, 0.5, 1.0]))


def world(name: str, reference: gl.Bandit | gl.Tree) -> gl.ascent.World:
    return gl.ascent.World(name, reference, torch.from_numpy(rng.random(len(reference.enumerate()))))


ten = world("10 tokens", gl.Bandit.random(10, study.seed))
tree = world("tree, 3 tokens, 3 steps", gl.Tree.random(3, 3, study.seed))
ended = world("tree with an end token", gl.Tree.random(3, 3, study.child(1), eos=0))
coefficients = study.pick(full=[0.1, 0.3, 1.0], quick=[0.3])
ONE_STEP = ["k1-loss", "k1-reward", "k2-loss", "k3-loss", "k3-both", "k3-reward-to-go", "mse-sampled-loss", "k3-swapped-loss"]
STEPS = [
    *("k1-loss", "k1-reward", "k1-reward-to-go", "k1-reward-return", "k2-loss", "k2-loss-sequence", "k3-loss"),
    *("k3-loss-sequence", "k3-both", "k3-reward-to-go", "full-loss", "full-both", "mse-sampled-loss"),
]

drop = study.pick(full=set(), quick={"k3-swapped-loss", "mse-sampled-loss", "k1-reward-return"})
ONE_STEP, STEPS = ([name for name in names if name not in drop] for names in (ONE_STEP, STEPS))

# %% [markdown]
# ## Ends

# %%
ends = pd.concat(
    [
        gl.fixedpoints.measure(ONE_STEP, study.pick(full=[three, ten], quick=[three]), coefficients, study.jobs),
        gl.fixedpoints.measure(STEPS, study.pick(full=[tree, ended], quick=[tree]), coefficients, study.jobs),
    ],
    ignore_index=True,
)
# How far each goes from the reference, over k2 as loss with the same credit.
OWN = {"k3-loss-sequence": "k2-loss-sequence"}
k2 = ends[ends["estimator"].isin(["k2-loss", "k2-loss-sequence"])].set_index(["world", "estimator", "coefficient"])["kl"]
keys = zip(ends["world"], ends["estimator"].map(OWN).fillna("k2-loss"), ends["coefficient"], strict=True)
ends["kl_over_k2"] = ends["kl"] / k2.reindex(pd.MultiIndex.from_tuples(keys)).to_numpy()
free = ends[ends["estimator"] == gl.fixedpoints.UNREGULARISED].set_index("world")["regret"]
ends["regret_over_free"] = ends["regret"] - ends["world"].map(free)
study.save_frame("09_fixed_points", ends)

# %% [markdown]
# ## The same in closed form
#
# Where a per-token loss rests every context solves a problem of its own: `π(v|s) ∝ ref(v|s) exp(Q(s, v)/β)` with the reward
# `Q` that the policy goes on to collect, and without the KL it goes on to pay. The optimum of the whole response has the soft value there.

# %%
FORMS = {
    "k2-loss": ("reverse_kl", "token"),
    "k3-loss": ("forward_kl", "token"),
    "k3-loss-sequence": ("forward_kl", "sequence"),
    "mse-sampled-loss": ("mse", "token"),
}
grid = np.geomspace(0.05, 10, study.pick(full=40, quick=8))
rows = []
for at in study.pick(full=[tree, ended], quick=[tree]):
    for beta in grid:
        best = gl.optima.optimum(at.reference, at.reward, beta)
        for name, (divergence, credit) in FORMS.items():
            p = gl.optima.optimum(at.reference, at.reward, beta, divergence, credit)
            gap = float((np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / best), 0)).sum())
            rows.append([at.name, name, beta, "closed form", gap])
curves = pd.DataFrame(rows, columns=["world", "estimator", "coefficient", "via", "kl_reverse"])
study.save_frame("09_curves", curves)

# %% [markdown]
# ## Ways
#
# Three responses, rewards 0, ½ and 1, from the reference and from two other policies.

# %%
SHOWN = ["k1-loss", "k3-reward-to-go", "k2-loss", "k3-loss", "mse-sampled-loss"]
starts = {
    "reference": None,
    "mostly worst": gl.Bandit(np.log([0.9, 0.05, 0.05])),
    "mostly middle": gl.Bandit(np.log([0.05, 0.9, 0.05])),
}
starts = study.pick(full=starts, quick={"reference": None})
parts = []
for beta in study.pick(full=[1.0, 0.3, 0.1], quick=[0.3]):
    for name in SHOWN:
        for label, start in starts.items():
            found = gl.ascent.ascend(
                three, name, beta, start, points=study.pick(full=400, quick=80), tolerance=study.pick(full=1e-6, quick=1e-2)
            )
            columns = {"coefficient": beta, "estimator": name, "start": label, "via": "exact", "time": found.times}
            columns |= {f"policy_{v}": found.path[:, v] for v in range(3)}
            parts.append(pd.DataFrame(columns).assign(**{f"reward_{v}": float(three.reward[v]) for v in range(3)}))
paths = pd.concat(parts, ignore_index=True)
rows = []
for beta in [*np.geomspace(0.03, 100, 60), *paths["coefficient"].unique()]:
    for divergence in ("reverse_kl", "forward_kl"):
        p = gl.optima.tilted(three.reward, [0.5, 0.3, 0.2], beta, divergence)
        rows.append([divergence, beta, "closed form", *p])
optima = pd.DataFrame(rows, columns=["divergence", "coefficient", "via", *(f"policy_{v}" for v in range(3))])
study.save_frame("09_optima", optima)

# %% [markdown]
# ## Which of the two holds harder?
#
# At equal coefficient, k3 as loss rests at the forward-KL optimum and k2 as loss at the reverse one; compared is how far each is from
# the reference. 100 tokens; rewards uniform in [0, 1], or 1 for one token of reference probability .01 and 0 for the others, or
# the other way round.

# %%
TOKENS, RARE = 100, 0.01
draws = study.pick(full=200, quick=20)


def rewards(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A reward and a reference `[v]`."""
    reference = np.exp(rng.standard_normal(TOKENS))
    reference /= reference.sum()
    if kind == "uniform rewards":
        return rng.random(TOKENS), reference
    reference[1:] *= (1 - RARE) / reference[1:].sum()
    reference[0] = RARE
    return (np.arange(TOKENS) == 0) == (kind == "one rare good token"), reference


def nats(p: np.ndarray, reference: np.ndarray) -> float:
    """KL(p ‖ reference)."""
    return float((p * np.log(np.maximum(p, 1e-300) / reference)).sum())


def of_bandit(kind: str) -> list[float]:
    """KL ratio of one random bandit at every coefficient."""
    reward, reference = rewards(kind)
    reward = reward.astype(float)
    pair = [
        [nats(gl.optima.tilted(reward, reference, beta, f"{d}_kl"), reference) for beta in betas]
        for d in ("forward", "reverse")
    ]
    return [k3 / k2 for k3, k2 in zip(*pair, strict=True)]


def of_tree(reference: gl.Tree, reward: np.ndarray, credit: str) -> list[float]:
    """The same on a tree, every context by itself (`token`) or the response as one action (`sequence`)."""
    responses = gl.Rollout.enumerated(gl.Scenario(reference, reference)).weight.numpy()
    pair = [
        [nats(gl.optima.optimum(reference, reward, beta, f"{d}_kl", credit), responses) for beta in betas]
        for d in ("forward", "reverse")
    ]
    return [k3 / k2 for k3, k2 in zip(*pair, strict=True)]


betas = np.geomspace(0.03, 10, study.pick(full=16, quick=6))
# With two levels of reward the ratio depends on the rare token's probability alone: there is nothing to draw.
cases = {"uniform rewards": draws, "one rare good token": 1, "one rare bad token": 1}
ratios = {kind: [of_bandit(kind) for _ in range(count)] for kind, count in cases.items()}
forest = [(gl.Tree.random(3, 3, study.child(100 + i)), rng.random(27)) for i in range(study.pick(full=50, quick=10))]
ratios["trees, per token"] = [of_tree(*case, "token") for case in forest]
ratios["trees, one action"] = [of_tree(*case, "sequence") for case in forest]
rows = [
    [kind, beta, quantile, "closed form", value, len(found)]
    for kind, found in ratios.items()
    for quantile in (0.1, 0.5, 0.9)
    for beta, value in zip(betas, np.quantile(found, quantile, axis=0), strict=True)
]
weaker = pd.DataFrame(rows, columns=["kind", "coefficient", "quantile", "via", "ratio", "count"])

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts({"09_fixed_points": ends, "09_weaker": weaker})

# %% [markdown]
# ## Figures

# %%
cell = gl.report.cell


def paths_text(frame: pd.DataFrame) -> tuple[str, str]:
    def at(column: str, estimator: str, beta: float) -> float:
        return float(cell(frame, column, world=three.name, estimator=estimator, coefficient=beta))

    beta = min(coefficients)
    error = frame[(frame["estimator"] == "k2-loss") & (frame["family"] == "bandit")]["to_reverse"].max()
    other = frame[(frame["estimator"] == "k3-loss") & (frame["family"] == "bandit")]["to_forward"].max()
    return (
        f"**Exact ascent over three responses** of E[r] − β·penalty, from {len(starts)} start(s). k2 as loss ends at π* ∝ "
        f"ref·exp(r/β) (star) to {error:.0e}, k3 as loss at the forward-KL optimum β·ref/(Λ − r) (square) to {other:.0e}: at "
        f"β = {beta:g} {at('kl', 'k2-loss', beta):.3f} and {at('kl', 'k3-loss', beta):.3f} nats from the reference. k1 as "
        f"loss and k3 in reward end {round(at('regret', 'k1-loss', beta), 12):.0g} and "
        f"{round(at('regret', 'k3-reward-to-go', beta), 12):.0g} in reward from the best response.",
        "Lines: the flow under the exact expected gradient of each regulariser; rewards at the corners, reference (.5, .3, "
        ".2); dotted: both optima over all β. Errors are the largest difference of a probability. No sampling; integrated to "
        f"time {gl.ascent.T_MAX:.0e}.",
    )


study.save_figure("09_paths", gl.figure("09_paths", paths, optima), paths, *paths_text(ends), verdicts)


# %%
def trees_text(frame: pd.DataFrame) -> tuple[str, str]:
    def worst(estimator: str, column: str) -> float:
        return float(frame.loc[frame["estimator"] == estimator, column].max())

    beta = min(coefficients)
    k2 = frame[(frame["estimator"] == "k2-loss") & (frame["coefficient"] == beta)]
    gaps = "; ".join(f"{part['kl_reverse'].iloc[0]:.3g} nats ({world})" for world, part in k2.groupby("world", sort=False))
    sizes = " and ".join(f"{len(w.reward)}" for w in (tree, ended) if w.name in set(frame["world"]))
    at_optimum = [name for name in ("k1-reward-to-go", "k2-loss-sequence", "full-both") if worst(name, "to_reverse") < 1e-6]
    return (
        "**Where a regulariser leaves a tree.** KL of the end point from π* over the coefficient; dots: exact ascent, "
        f"dotted: closed form, grey: rounding. At π* end {', '.join(at_optimum) or 'none'}. Per-token k2 ends, at β = "
        f"{beta:g}, {gaps} from it. Trees of 3 tokens and 3 steps ({sizes} responses), exact.",
        "* Rewards uniform in [0, 1].\n"
        f"* k2 as loss of the whole response is off π* by at most {worst('k2-loss-sequence', 'to_reverse'):.0e} of a "
        "probability.\n"
        "* Per-token k2 ends where every context solves its own problem with the reward it goes on to collect but not the KL "
        f"it goes on to pay (to {worst('k2-loss', 'to_token_reverse'):.0e}). Its expected gradient there is the gradient of "
        f"no function if its Jacobian is not symmetric: the antisymmetric part is up to {worst('k2-loss', 'curl'):.2f} of the "
        "symmetric part.",
    )


ON_TREES = ["k2-loss-sequence", "k1-reward-to-go", "full-both", "k2-loss", "k3-loss", "k3-loss-sequence", "mse-sampled-loss"]
shown = ends[(ends["family"] == "tree") & ends["estimator"].isin(ON_TREES)].copy()
shown["estimator"] = pd.Categorical(shown["estimator"], ON_TREES, ordered=True)
shown = shown.sort_values(["world", "estimator", "coefficient"]).astype({"estimator": str})
study.save_figure("09_trees", gl.figure("09_trees", shown, curves), shown, *trees_text(shown), verdicts)


# %%
def weaker_text(frame: pd.DataFrame) -> tuple[str, str]:
    def median(kind: str, beta: float) -> float:
        return float(cell(frame, "ratio", kind=kind, coefficient=beta, quantile=0.5))

    kinds = dict.fromkeys(frame["kind"])
    ratios = ", ".join(f"{kind} {median(kind, betas[0]):.2f}" for kind in kinds)
    high = ", ".join(f"{median(kind, betas[-1]):.2f}" for kind in kinds)
    counts = frame.drop_duplicates("kind").set_index("kind")["count"]
    return (
        "**At equal coefficient, which holds harder?** KL to the reference at the fixed point of k3 as loss over that of k2 "
        f"as loss; above 1 k3 is the weaker regulariser. At β = {betas[0]:g}: {ratios}. Median and 10–90 % band over "
        f"{counts['uniform rewards']} bandits (a) and {counts['trees, per token']} trees (d, e); single cases (b, c). Closed "
        "form.",
        f"* At β = {betas[-1]:g}, in the same order: {high}.\n"
        f"* (a) {TOKENS} tokens, rewards uniform in [0, 1].\n"
        f"* (b, c) Reward 1 for one token of reference probability {RARE:g} and 0 for the others, or the other way round; that "
        "probability fixes the case.\n"
        "* (d, e) Trees of 3 tokens and 3 steps with uniform rewards, per token and with the response as one action.",
    )


study.save_figure("09_weaker", gl.figure("09_weaker", weaker), weaker, *weaker_text(weaker), verdicts)
