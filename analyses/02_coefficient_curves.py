# %% [markdown]
# # How hard does each loss push a token?
#
# Used as a loss, a kernel `k(ℓ)` multiplies the score `∇log π(y)` by its derivative. Figure 1 of Liu et al. (arXiv 2510.01555)
# compares these coefficients; the principled one, of k1 in the reward, is `ℓ = log π(y) − log ref(y)` itself. A token that the
# policy likes more than the reference does (`ℓ > 0`) is over-sampled, one it likes less (`ℓ < 0`) under-sampled.
#
# The coefficients below are those the package uses for every gradient, read off one sampled token at a time.

# %%
import numpy as np
import pandas as pd
import torch

import gradlab as gl
from gradlab.estimators.coefficients import coefficients

study = gl.report.study("02_coefficient_curves")

# %% [markdown]
# ## Measure
#
# One response of one token for every probability the policy may give it, with the reference's fixed. As shipped: the clamps
# that verl 0.9.1 puts on k3 in `kl_penalty`, log-ratio ±20 and kernel ±10, here on every kernel of the log-ratio.

# %%
NAMES = ["k1-loss", "k2-loss", "k3-loss", "k3-swapped-loss", "abs-loss", "mse-sampled-loss"]
SHIPPED = {"clamp_log_ratio": 20.0, "clamp_value": 10.0}


def on_one_token(estimator: gl.Estimator, log_ratio: np.ndarray, reference: float) -> np.ndarray:
    """Coefficient that an estimator puts on the score of a token, for each log-ratio `[n]`."""
    n, p = len(log_ratio), reference * np.exp(log_ratio)
    # Two tokens, of which the first was sampled; logits are log-probabilities.
    logits, ref = (torch.from_numpy(np.log(np.stack([q, 1 - q], -1)))[:, None] for q in (p, np.full(n, reference)))
    sampled, live = torch.zeros(n, 1, dtype=torch.long), torch.ones(n, 1, dtype=torch.bool)
    rollout = gl.Rollout.from_logits(sampled, live, torch.full((n,), 1 / n, dtype=torch.float64), logits, ref)
    return coefficients(estimator, rollout).score[:, 0].numpy()


def curves(reference: float, log_ratio: np.ndarray) -> pd.DataFrame:
    """Coefficients of every estimator, plain and as shipped, at every log-ratio and at its opposite where that exists."""
    principled = on_one_token(gl.ESTIMATORS["k1-reward"], log_ratio, reference)
    frames = []
    for clamp, bounds in (("plain", {}), ("clamped as shipped", SHIPPED)):
        for name in NAMES:
            kernel = gl.ESTIMATORS[name].kernel
            estimator = gl.Estimator(kernel, **({} if kernel == "mse_sampled" else bounds))
            columns = {
                "estimator": name,
                "clamp": clamp,
                "reference": reference,
                "log_ratio": log_ratio,
                "coefficient": on_one_token(estimator, log_ratio, reference),
                "plain": on_one_token(gl.ESTIMATORS[name], log_ratio, reference),
                "principled": principled,
            }
            frames.append(pd.DataFrame(columns))
    frame = pd.concat(frames, ignore_index=True)
    frame["side"] = np.where(frame["log_ratio"] > 0, "over-sampled", "under-sampled")
    frame["probability"] = frame["reference"] * np.exp(frame["log_ratio"])
    frame["magnitude"] = frame["coefficient"].abs()
    frame["error"] = frame["coefficient"] - frame["principled"]
    frame["versus_principled"] = frame["coefficient"] / frame["principled"]
    frame["lost"] = 1 - frame["coefficient"] / frame["plain"]  # share of the coefficient that the clamps remove
    return frame


def with_asymmetry(frame: pd.DataFrame) -> pd.DataFrame:
    """Add `asymmetry = |c(−x)| / |c(x)|`, x = |ℓ|, and its rate `log(asymmetry) / x`: 1 for a coefficient exploding as "
    "`e^x`."""
    keys = ["estimator", "clamp", "size"]
    frame = frame.assign(size=frame["log_ratio"].abs())
    sides = frame.pivot_table(index=keys, columns="side", values="magnitude")
    ratio = (sides["under-sampled"] / sides["over-sampled"]).rename("asymmetry")
    frame = frame.merge(ratio.reset_index(), on=keys)
    with np.errstate(divide="ignore"):
        frame["asymmetry_rate"] = np.log(frame["asymmetry"]) / frame["size"]
    return frame.drop(columns="size")


points = study.pick(full=120, quick=80)
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


def text(frame: pd.DataFrame) -> tuple[str, str]:
    plain, shipped = dict.fromkeys(frame["clamp"])

    def rows(name: str, clamp: str) -> pd.DataFrame:
        return frame[(frame["estimator"] == name) & (frame["clamp"] == clamp)]

    def reach(name: str) -> tuple[float, float]:
        kept = rows(name, shipped)["log_ratio"][rows(name, shipped)["lost"] < 0.5]
        return float(kept.min()), float(kept.max())

    k3, k2_reach = rows("k3-loss", plain), reach("k2-loss")
    on_k2 = rows("k2-loss", plain)["error"].abs().max() < 1e-12
    return (
        "**The coefficient each loss puts on the score of a sampled token**, of reference probability "
        f"{frame['reference'].max():g}: (a) plain, (b) with the clamps that verl puts on k3. k2 as loss is "
        f"{'on' if on_k2 else 'off'} the principled log-ratio (dotted). Up to |ℓ| = {k3['log_ratio'].max():g}, k3 as loss "
        f"reaches {k3['coefficient'].max():.4f} on the over-sampled and {k3['coefficient'].min():,.0f} on the under-sampled "
        f"side (grey), an asymmetry (c) of up to {k3['asymmetry'].max():,.0f}. Exact.",
        f"* Clamps: log-ratio ±{SHIPPED['clamp_log_ratio']:g}, kernel ±{SHIPPED['clamp_value']:g}. Clamped, k3 has a gradient "
        f"only for ℓ ≥ {reach('k3-loss')[0]:.2f} and k2 only for {k2_reach[0]:.2f} ≤ ℓ ≤ {k2_reach[1]:.2f} (on a grid of "
        f"{x[0]:.2g}).\n"
        f"* (c) |c(−x)|/|c(x)| of the plain coefficients, reference probability {frame['reference'].min():g}.",
    )


study.save_figure("02_coefficients", gl.figure("02_coefficients", frame), frame, *text(frame), verdicts)
