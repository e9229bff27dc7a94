# %% [markdown]
# # How hard does each loss push a token?
#
# Used as a loss, a kernel `k(ℓ)` multiplies the score `∇log π(y)` by its derivative. Figure 1 of Liu et al. (arXiv 2510.01555)
# compares these coefficients; the principled one, of k1 in the reward, is `ℓ = log π(y) − log ref(y)` itself. A token the policy
# likes more than the reference does (`ℓ > 0`) is over-sampled, one it has nearly dropped (`ℓ < 0`) under-sampled.
#
# The coefficients below are those the package uses for every gradient, read off one sampled token at a time.

# %%
import numpy as np
import pandas as pd
import torch

import gradlab as gl
from gradlab.coefficients import coefficients

study = gl.report.study(__file__)

# %% [markdown]
# ## Measure
#
# One response of one token for every probability the policy may give it, with the reference's fixed. As shipped: the clamps
# that verl 0.9.1 puts on k3 in `kl_penalty`, the log-ratio at ±20 and the kernel at ±10, applied to every kernel of the log-ratio.

# %%
NAMES = ["k1-loss", "k2-loss", "k3-loss", "k3-swapped-loss", "abs-loss", "mse-sampled-loss"]
SHIPPED = {"clamp_log_ratio": 20.0, "clamp_value": 10.0}


def on_one_token(estimator: gl.Estimator, log_ratio: np.ndarray, reference: float) -> np.ndarray:
    """Coefficient that an estimator puts on the score of a token, for each log-ratio `[n]`."""
    probability = reference * np.exp(log_ratio)
    logits, ref = (torch.from_numpy(np.stack([p, 1 - p], -1)).log()[:, None] for p in (probability, np.full_like(probability, reference)))
    tokens, mask = torch.zeros(len(log_ratio), 1, dtype=torch.long), torch.ones(len(log_ratio), 1, dtype=torch.bool)
    rollout = gl.Rollout.from_logits(tokens, mask, torch.full((len(log_ratio),), 1 / len(log_ratio)).double(), logits, ref)
    return coefficients(estimator, rollout).score[:, 0].numpy()


def curves(reference: float, log_ratio: np.ndarray) -> pd.DataFrame:
    """Coefficients of every estimator, plain and as shipped, at every log-ratio and at its opposite where that exists."""
    principled = on_one_token(gl.ESTIMATORS["k1-reward"], log_ratio, reference)
    frames = []
    for clamp, bounds in (("plain", {}), ("clamped as shipped", SHIPPED)):
        for name in NAMES:
            kernel = gl.ESTIMATORS[name].kernel
            estimator = gl.Estimator(kernel, **({} if kernel == "mse_sampled" else bounds))
            found, plain = on_one_token(estimator, log_ratio, reference), on_one_token(gl.ESTIMATORS[name], log_ratio, reference)
            columns = {"estimator": name, "clamp": clamp, "reference": reference, "log_ratio": log_ratio, "coefficient": found}
            frames.append(pd.DataFrame(columns).assign(principled=principled, plain=plain))
    frame = pd.concat(frames, ignore_index=True)
    frame["side"] = np.where(frame["log_ratio"] > 0, "over-sampled", "under-sampled")
    frame["probability"] = frame["reference"] * np.exp(frame["log_ratio"])
    frame["magnitude"] = frame["coefficient"].abs()
    frame["error"] = frame["coefficient"] - frame["principled"]
    frame["versus_principled"] = frame["coefficient"] / frame["principled"]
    frame["lost"] = 1 - frame["coefficient"] / frame["plain"]  # share of the coefficient that the clamps remove
    return frame


def with_asymmetry(frame: pd.DataFrame) -> pd.DataFrame:
    """Add `asymmetry = |c(−x)| / |c(x)|`, x = |ℓ|, and its rate `log(asymmetry) / x`: 1 for a coefficient that explodes as `e^x`."""
    keys = ["estimator", "clamp", "size"]
    frame = frame.assign(size=frame["log_ratio"].abs())
    sides = frame.pivot(index=keys, columns="side", values="magnitude")
    ratio = (sides["under-sampled"] / sides["over-sampled"]).rename("asymmetry")
    frame = frame.merge(ratio.reset_index(), on=keys)
    with np.errstate(divide="ignore"):
        frame["asymmetry_rate"] = np.log(frame["asymmetry"]) / frame["size"]
    return frame.drop(columns="size")


points = study.pick(full=160, quick=80)
x = np.arange(1, points + 1) * 8 / points
# A reference of 0.1 leaves room for log-ratios up to 2.3; to mirror ±8 it takes a rarer token.
shown = curves(0.1, np.concatenate([-x[::-1], np.linspace(0.02, 0.999, points // 4) * np.log(10)]))
mirrored = with_asymmetry(curves(3e-4, np.concatenate([-x, x])))
frame = pd.concat([shown, mirrored], ignore_index=True)

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts({"02_coefficients": frame})

# %% [markdown]
# ## Figure

# %%


def caption(frame: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    def extreme(name: str, clamp: str, side: str) -> float:
        part = frame[(frame["estimator"] == name) & (frame["clamp"] == clamp) & (frame["side"] == side)]
        return float(part.loc[part["magnitude"].idxmax(), "coefficient"])

    def range_of(name: str) -> tuple[float, float]:
        part = frame[(frame["estimator"] == name) & (frame["clamp"] == clamps[1]) & (frame["lost"] < 0.5)]
        return float(part["log_ratio"].min()), float(part["log_ratio"].max())

    clamps = list(dict.fromkeys(frame["clamp"]))
    widest, reference = frame["log_ratio"].abs().max(), frame["reference"].max()
    far = frame[(frame["estimator"] == "k3-loss") & (frame["clamp"] == clamps[0])]["asymmetry"].max()
    return (
        f"**The coefficient each loss puts on the score of a sampled token.** (a) Plain, (b) with the clamps verl puts on k3 (log-ratio "
        f"±{SHIPPED['clamp_log_ratio']:g}, kernel ±{SHIPPED['clamp_value']:g}), against the probability the policy gives a token whose "
        f"reference probability is {reference:g}; grey: under-sampled side. The principled coefficient (dotted) is the log-ratio ℓ, and "
        f"k2 as loss is on it. Up to |ℓ| = {widest:g}, k3 as loss reaches {extreme('k3-loss', clamps[0], 'over-sampled'):.4f} on the "
        f"over-sampled side and {extreme('k3-loss', clamps[0], 'under-sampled'):,.0f} on the under-sampled side. Clamped, k3 pulls only "
        f"for ℓ above {range_of('k3-loss')[0]:.2f} and k2 only for ℓ from {range_of('k2-loss')[0]:.2f} to {range_of('k2-loss')[1]:.2f} "
        f"(grid of {widest / points:g}): beyond, the token is let go. (c) Asymmetry |c(−x)|/|c(x)| of the plain coefficients, "
        f"up to {far:,.0f} for k3 (reference probability {frame['reference'].min():g}). Exact, no sampling. "
        f"Verdicts: {gl.report.sentence(verdicts)}"
    )


study.save_figure("02_coefficients", gl.plots.coefficients(frame), frame, caption(frame, verdicts))
