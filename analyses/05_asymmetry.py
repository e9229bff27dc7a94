# %% [markdown]
# # Which tokens carry the gradient?
#
# As a loss, k3 puts the coefficient `1 − δ` on the score of a sampled token, `δ = ref/π`: at most 1 where the policy
# over-samples (`ℓ > 0`), without bound where it under-samples (`ℓ < 0`). A coefficient is met as often as its token is drawn, so
# what the asymmetry does to the gradient is another question. Here its totals are shared out between the two sides: the mean
# |coefficient|, the expected gradient along the true one, and the second moment, of which noise is made.

# %%
import numpy as np
import pandas as pd
from tqdm import tqdm

import gradlab as gl

study = gl.report.study("05_asymmetry")
NAMES = ["k2-loss", "k3-loss", "mse-sampled-loss"]

# %% [markdown]
# ## Ten tokens, one of them dropped
#
# The reference gives token J probability .2 and the rest equal shares; the policy's logits are the reference's log-probabilities
# with J's set to −9. Only J is under-sampled.

# %%
J = 0
ref = np.array([0.2] + [0.8 / 9] * 9)
logits = np.log(ref)
logits[J] = -9
mode = gl.Scenario(gl.Bandit(logits), gl.Bandit(np.log(ref)), name="dropped mode, 10 tokens")
samples = study.pick(full=6_400_000, quick=640_000)


def dropped_rows(samples: int | None) -> pd.DataFrame:
    """The gradient on J's logit, its noise, and the shares of J."""
    pulled = gl.components(NAMES, mode, samples=samples, seed=study.seed)
    pulled = pulled[pulled["parameter"] == f"token {J}"].drop(columns="parameter")
    shares = gl.asymmetry.measure(NAMES, mode, samples=samples, seed=study.seed).set_index("estimator")
    frame = pulled.assign(pull=-pulled["expected"], pull_low=-pulled["expected_high"], pull_high=-pulled["expected_low"])
    # `std` is over |truth|; what a batch sees is the noise over the signal of its own expected gradient.
    for end in ("", "_low", "_high"):
        frame[f"noise_at_64{end}"] = pulled[f"std{end}"] * pulled["truth"].abs() / pulled["expected"].abs() / 64**0.5
        for what in ("expected", "second"):
            frame[f"{what}_share{end}"] = frame["estimator"].map(shares[f"under_{what}{end}"])
    frame["truth"] = -frame["truth"]
    k2 = float(frame.loc[frame["estimator"] == "k2-loss", "noise_at_64"].iloc[0])
    return frame.assign(noise_versus_k2=frame["noise_at_64"] / k2)


dropped = pd.concat([dropped_rows(None), dropped_rows(samples)], ignore_index=True)

# %% [markdown]
# ## Random policies
#
# Softmax policies with Gaussian logits and references at a given KL: bandits of 10 and of 1,000 tokens (logits of standard
# deviation 1 and 2.5: the larger ones have a long tail of rare tokens, as language models do), and trees of 3 tokens and 4 steps.

# %%
WORLDS = {
    "10 tokens": lambda seed: gl.Bandit.random(10, seed),
    "1,000 tokens": lambda seed: gl.Bandit.random(1000, seed, scale=2.5),
    "trees": lambda seed: gl.Tree.random(3, 4, seed),
}
draws = study.pick(full=60, quick=8)
kls = np.geomspace(0.01, 5, study.pick(full=9, quick=3))
scenarios, places = [], {}
for world, make in WORLDS.items():
    for draw in range(draws):
        policy = make(study.child(draw))
        for kl in kls:
            name = f"{world} {draw}, KL {kl:.3g}"
            scenarios.append(gl.Scenario(policy, policy.perturbed(kl=kl, seed=study.child(1000 + draw)), name=name))
            places[name] = world, kl
parts = [gl.asymmetry.measure(NAMES, s) for s in tqdm(scenarios, desc="sides", disable=None, delay=2)]
sides = pd.concat(parts, ignore_index=True)
sides.insert(0, "world", [places[name][0] for name in sides["scenario"]])
k2 = sides[sides["estimator"] == "k2-loss"].set_index("scenario")
for what in ("mass", "expected", "pull", "second"):
    sides[f"{what}_over_k2"] = sides[f"under_{what}"] - sides["scenario"].map(k2[f"under_{what}"])
study.save_frame("05_sides", sides)
columns = ["under_mass", "under_expected", "under_second", "skewness", "largest_second"]
at = sides.assign(kl=[places[name][1] for name in sides["scenario"]])
bands = gl.asymmetry.bands(at, ["world", "estimator", "via", "kl"], columns, [0.1, 0.5, 0.9])

# %% [markdown]
# ## Tails
#
# With finitely many tokens there is no tail, only a largest one. A Gaussian policy narrower than its reference has one:
# `P(δ > t) ~ t^{−α}`, `α = 1/(1 − σ²/σ_ref²)`, and the variance of k3 is finite iff `α > 2`. Hill's estimate reads the index off
# the `k` largest of the draws.

# %%
many = study.pick(full=2_000_000, quick=200_000)
rows = []
for index, ratio in enumerate((0.9, 0.8, 0.7, 0.5)):
    scenario = gl.Scenario(gl.Gaussian(0, ratio), gl.Gaussian(0, 1))
    rng = study.rng("", index)
    delta = np.exp(-gl.Rollout.from_sampler(scenario, many, rng).log_ratio[:, 0].numpy())
    for k in np.geomspace(30, many // 100, 15).astype(int):
        found = gl.tails.hill(delta, int(k))
        ends = {"index_low": found / (1 + 1.96 / k**0.5), "index_high": found / max(1 - 1.96 / k**0.5, 1e-3)}
        rows.append({"ratio": ratio, "via": "sampled", "samples": many, "k": k, "index": found, **ends,
                     "exact": gl.tails.tail_index(scenario)})  # fmt: skip
hill = pd.DataFrame(rows)
study.save_frame("05_hill", hill)

# %% [markdown]
# ## Bringing a token back
#
# Gradient descent on the regulariser alone, with its full expected gradient and a fixed step, from the reference with one logit
# shifted; the token is back when its odds are within a factor of two of the reference's.

# %%
STEP = 0.5
shifts = [s * d for s in (-1, 1) for d in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]
limit = study.pick(full=6_000, quick=300)
times = pd.concat(
    [gl.restoring.times(NAMES, [q, *[(1 - q) / 9] * 9], J, shifts, STEP, limit) for q in (0.2, 0.01)], ignore_index=True
)
times = gl.restoring.compared(times, "k2-loss")
start = logits[J] - np.log(ref[J])
way = gl.restoring.paths(NAMES, ref, J, start, limit, STEP)
study.save_frame("05_paths", way)

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts({"05_sides": sides, "05_bands": bands, "05_dropped": dropped, "05_restoring": times})

# %% [markdown]
# ## Figures

# %%
cell = gl.report.cell


def dropped_text(frame: pd.DataFrame) -> tuple[str, str]:
    def at(column: str, estimator: str, via: str = "exact") -> float:
        return float(cell(frame, column, estimator=estimator, via=via))

    probability = float(mode.policy.table.softmax(-1)[0, J])
    return (
        f"**One token of ten dropped**, from reference probability {ref[J]:g} to {probability:.3e} (KL {mode.kl():.4f} nats). "
        f"Minus the expected gradient on its logit: {at('pull', 'k3-loss'):.5f} with k3 as loss, {at('pull', 'k2-loss'):.5f} "
        f"with k2 as loss, the true one. A mean of 64 tokens has noise over that signal of {at('noise_at_64', 'k3-loss'):.2f} "
        f"(k3) and {at('noise_at_64', 'k2-loss'):.2f} (k2). Exact (filled) and from {cell(frame, 'samples', via='sampled'):,} "
        "draws (open, 95 % intervals).",
        f"* {(1 - probability) ** 64:.1%} of all batches of 64 do not hold the token.\n"
        f"* Its share of the expected gradient along the true one: {at('expected_share', 'k3-loss'):.2%} (k3), "
        f"{at('expected_share', 'k2-loss'):.2%} (k2); of the second moment: {at('second_share', 'k3-loss'):.2%} (k3), "
        f"{at('second_share', 'k2-loss'):.2%} (k2).\n"
        f"* With the bounded form the signal is {at('pull', 'mse-sampled-loss'):.2e}.\n"
        "* The other tokens have equal shares of the reference. Intervals in (b) are of the noise alone, without the error "
        "of the signal it is divided by.",
    )


study.save_figure("05_dropped", gl.figure("05_dropped", dropped), dropped, *dropped_text(dropped), verdicts)


# %%
def sides_text(frame: pd.DataFrame, raw: pd.DataFrame) -> tuple[str, str]:
    def median(world: str, estimator: str, quantity: str, kl: float) -> float:
        return float(cell(frame, "share", world=world, estimator=estimator, quantity=quantity, kl=kl, quantile=0.5))

    far = kls[-1]
    shares = "; ".join(
        f"{world} {median(world, 'k2-loss', 'under_second', far):.2f} (k2) and "
        f"{median(world, 'k3-loss', 'under_second', far):.2f} (k3)"
        for world in WORLDS
    )
    apart = raw.loc[raw["estimator"] == "k3-loss", "under_mass"].sub(0.5).abs().max()
    return (
        "**What under-sampled tokens carry.** Share of tokens with π < ref in the mean |coefficient|, in the expected "
        f"gradient along the true one and in the second moment E‖g‖². At {far:.2g} nats the median share of the second moment "
        f"is {shares}. Median and 10–90 % band over {draws} random policies a row, exact.",
        "* Bandits of 10 and 1,000 tokens, logits of standard deviation 1 and 2.5; trees of 3 tokens and 4 steps; KL "
        f"{kls[0]:.2g}–{far:.2g} nats.\n"
        "* E[1 − δ] = 0: over- and under-sampled tokens have equal shares of the mean |coefficient| of k3 as loss. The "
        f"measured share is off one half by at most {round(float(apart), 12):g}.",
    )


study.save_figure("05_bands", gl.figure("05_bands", bands), bands, *sides_text(bands, sides), verdicts)


# %%
def tails_text(frame: pd.DataFrame, hill: pd.DataFrame) -> tuple[str, str]:
    def median(estimator: str, quantity: str) -> float:
        where = {"world": "1,000 tokens", "estimator": estimator, "quantity": quantity, "kl": kls[-1], "quantile": 0.5}
        return float(cell(frame, "share", **where))

    ends = "\n".join(
        f"* {part['exact'].iloc[0]:.3g} against {part['index'].iloc[0]:.3g} at k = {part['k'].iloc[0]}"
        for _, part in hill.groupby("ratio", sort=False)
    )
    return (
        "**How heavy the tails are.** (a) Skewness of one response's gradient along the true one and (b) largest share of "
        f"the second moment on one token: at {kls[-1]:.2g} nats {median('k2-loss', 'skewness'):.1f} and "
        f"{median('k2-loss', 'largest_second'):.1%} (k2), {median('k3-loss', 'skewness'):.1f} and "
        f"{median('k3-loss', 'largest_second'):.1%} (k3); median and 10–90 % band over {draws} bandits of 1,000 tokens, "
        "exact. (c) Tail index of δ for Gaussian policies: exact (black) and Hill's estimate; below 2 (grey) the variance of "
        "k3 is infinite.",
        f"(c) Policies narrower than their reference; Hill's estimate from {cell(hill, 'samples'):,} draws over the number k "
        "of largest values used (band: ± 1.96/√k). The tail is a power times a power of log δ, which Hill's estimate forgets "
        f"only slowly. Exact against estimated:\n\n{ends}",
    )


tail_bands = bands[(bands["world"] == "1,000 tokens") & bands["quantity"].isin(["skewness", "largest_second"])]
study.save_figure("05_tails", gl.figure("05_tails", tail_bands, hill), tail_bands, *tails_text(tail_bands, hill), verdicts)


# %%
def restoring_text(frame: pd.DataFrame) -> tuple[str, str]:
    def took(estimator: str, q: float, d: float) -> str:
        where = {"estimator": estimator, "reference": q, "shift": float(d)}
        mark = "" if cell(frame, "restored", **where) else "more than "
        return f"{mark}{cell(frame, 'time', **where):g}"

    def pair(q: float, d: float) -> str:
        return f"{took('k2-loss', q, d)} with k2, {took('k3-loss', q, d)} with k3"

    return (
        "**Bringing a token back by the regulariser alone.** Exact gradient descent on the logits with the expected "
        "gradient: (a) the dropped token of the bandit of ten; (b, c) time until a token's odds are within a factor of two "
        f"of the reference's, over how far they were off. Reference probability .2, dropped by 7 nats: {pair(0.2, -7)}; "
        f"inflated: {pair(0.2, 7)}.",
        f"Reference probability .01, dropped by 7 nats: {pair(0.01, -7)}; inflated: {pair(0.01, 7)}.\n\n"
        f"Time is steps × step size, step {STEP:g}; hollow: not within {limit:,} steps. No sampling. The expected gradient of "
        "k3 is π − ref: it restores a dropped token at the rate ref and an inflated one at the rate π − ref, whereas the "
        "true gradient vanishes with π.",
    )


study.save_figure("05_restoring", gl.figure("05_restoring", way, times), times, *restoring_text(times), verdicts)
