# %% [markdown]
# # Does a good estimate of the KL give a good gradient of the KL?
#
# Estimators of `KL(π‖ref)` are compared by the bias and the noise of their *value*: Schulman (2020) recommends
# `k3 = e^{−ℓ} − 1 + ℓ` over `k1 = ℓ` and `k2 = ½ℓ²` because it is unbiased and, near the reference, far less noisy.
# Training differentiates it, and the gradient of the value is not the value of the gradient:
#
# `∇E[k] = E[k · score] + E[∇k]`
#
# where a loss keeps only the second term. Here both are measured on the same policies.

# %%
import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq

import gradlab as gl

study = gl.report.study("01_value_versus_gradient")
KERNELS = ("k1", "k2", "k3")

# %% [markdown]
# ## Schulman's table
#
# One draw from `N(0,1)` against `N(m,1)`, where everything has a closed form, and three policies where it has not.

# %%
p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
bandit = gl.Scenario(gl.Bandit(np.log(p)), gl.Bandit(np.log(q)), name="bandit (.4 .3 .2 .1) ‖ (.1 .2 .3 .4)")
tree = gl.Tree.random(vocab=4, length=3, seed=study.seed)
scenarios = [
    *(gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(m, 1), name=f"N(0, 1) ‖ N({m:g}, 1)") for m in (0.1, 1)),
    gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(1, 1.1), name="N(0, 1) ‖ N(1, std 1.1)"),
    bandit,
    gl.Scenario(tree, tree.perturbed(kl=0.3, seed=study.child(1)), name="random tree, 4 tokens, 3 steps"),
]
samples = study.pick(full=1_000_000, quick=100_000)


def closed_form(m: float) -> pd.DataFrame:
    """Bias and standard deviation of the three kernels over the KL for two Gaussians of equal variance."""
    std = [2 / m, (2 + m**2) ** 0.5, 2 * (np.expm1(m**2) - m**2) ** 0.5 / m**2]
    rows = {"kernel": KERNELS, "bias": [0, m**2 / 4, 0], "std": std, "via": "closed form", "kl": m**2 / 2}
    return pd.DataFrame(rows).assign(scenario=f"N(0, 1) ‖ N({m:g}, 1)", family="gaussian", parameter="value")


schulman = pd.concat(
    [
        gl.values(KERNELS, scenarios),
        closed_form(0.1),
        closed_form(1.0),
        gl.values(KERNELS, scenarios, samples=samples, seed=study.seed),
    ],
    ignore_index=True,
)

# %% [markdown]
# ## Where k3 stops being the quieter one
#
# The policy walks away from a fixed reference and the standard deviations are compared exactly. The crossover is where
# `Var k3 = Var k1`. Gaussians move along a direction in (mean, log std); categorical policies along random logits, or they
# drop one token. The second moment of k3 is `Σ ref²/π`: infinite for a Gaussian whose variance is half the reference's.


# %%
def scenario_at(reference: gl.Policy, direction: torch.Tensor, scale: float) -> gl.Scenario:
    return gl.Scenario(reference.moved(scale * direction), reference)


def deviations(scenario: gl.Scenario, kernels: tuple[str, ...] = ("k1", "k3")) -> list[float]:
    return [gl.exact.value_moments(kernel, scenario).variance ** 0.5 for kernel in kernels]


def walk(where: tuple[str, str, str], reference: gl.Policy, direction: torch.Tensor, scales: np.ndarray) -> pd.DataFrame:
    """Standard deviation of each kernel's value over the KL along one direction, and the KL at which k3 overtakes k1."""
    kls, found = [], []
    for scale in scales:
        at = scenario_at(reference, direction, scale)
        kls.append(at.kl())
        found.append(deviations(at, KERNELS))
    std = np.array(found)
    gap = np.sign(std[:, 2] - std[:, 0])
    crossover = np.inf
    if (crossings := np.flatnonzero((gap[:-1] < 0) & (gap[1:] >= 0))).size:
        ends = np.log(scales[crossings[0] : crossings[0] + 2])

        def excess(log_scale: float) -> float:
            k1, k3 = deviations(scenario_at(reference, direction, float(np.exp(log_scale))))
            return float(np.log(k3 / k1)) if np.isfinite(k3) else 1e3

        crossover = scenario_at(reference, direction, float(np.exp(brentq(excess, *ends, xtol=1e-13)))).kl()
    common = dict(zip(("panel", "group", "scenario"), where, strict=True)) | {"crossover": crossover}
    parts = [
        pd.DataFrame({**common, "kernel": kernel, "kl": kls, "std": std[:, k] / kls, "versus_k1": std[:, k] / std[:, 0]})
        for k, kernel in enumerate(KERNELS)
    ]
    return pd.concat(parts)


points = study.pick(full=48, quick=20)
start, right = gl.Gaussian(0, 1), torch.tensor([1.0, 0.0], dtype=torch.float64)
parts = [walk(("equal variances", "shifted", "N(m, 1) ‖ N(0, 1)"), start, right, np.geomspace(0.03, 3, points))]
for angle, group in ((-90, "narrower"), (-30, "both"), (0, "shifted"), (90, "wider")):
    direction = torch.tensor([np.cos(np.radians(angle)), np.sin(np.radians(angle))], dtype=torch.float64)
    scales = np.geomspace(0.03, 1.6 if angle > 0 else 3.0, points)
    if angle < 0:
        # Quadrature refuses the last few percent before the second moment of k3 ceases to exist.
        limit = np.log(2) / 2 / abs(float(direction[1]))
        scales = np.append(scales[scales < 0.7 * limit], limit * np.array([0.7, 0.75, 0.8, 0.85, 1.1, 1.5]))
    parts.append(walk(("Gaussian policies", group, f"Gaussian moved at {angle}°"), start, direction, scales))
for seed in range(20):
    for group, reference in (("bandit", gl.Bandit.random(10, seed)), ("tree", gl.Tree.random(3, 3, seed))):
        noise = reference.perturbed(scale=1.0, seed=seed).parameters - reference.parameters
        parts.append(walk(("random categoricals", group, f"{group} {seed}"), reference, noise, np.geomspace(0.05, 6, points)))
for share in (0.2, 0.05, 0.01):
    reference = gl.Bandit(np.log([share, *[(1 - share) / 9] * 9]))
    away = -torch.eye(10, dtype=torch.float64)[0]
    where = ("one token dropped", f"{share:g}", f"bandit, token of probability {share:g}")
    parts.append(walk(where, reference, away, np.geomspace(0.2, 8, points)))
crossover = pd.concat(parts, ignore_index=True)

# %% [markdown]
# ## From the value to the gradient
#
# The same kernels, differentiated: `π = N(0, 1)` with parameters (mean, std). With equal variances k3 as loss gets the mean's
# gradient right, which is why this toy never raised suspicion; the std's it gets wrong, and with unequal variances both.

# %%
NAMES = ["k1-reward", "k2-loss", "k3-loss", "k3-both", "k1-loss", "abs-loss"]
published = 50_000
toys = [scenarios[1], scenarios[2]]


def value_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The value of the kernel of every estimator, as rows beside its gradient."""
    kernels = pd.DataFrame({"estimator": NAMES, "kernel": [gl.ESTIMATORS[name].kernel for name in NAMES]})
    return kernels.merge(frame, on="kernel")


asked = dict.fromkeys(gl.ESTIMATORS[name].kernel for name in NAMES)
gradients = pd.concat(
    [
        value_rows(gl.values(list(asked), toys)),
        gl.components(NAMES, toys),
        value_rows(gl.values(list(asked), toys, samples=published, seed=study.seed)),
        gl.components(NAMES, toys, samples=published, seed=study.seed),
    ],
    ignore_index=True,
).drop(columns="kernel")
gradients["variances"] = gradients["scenario"].map({toys[0].label: "equal", toys[1].label: "unequal"})
gradients["std_of_mean"] = gradients["std"] / published**0.5  # standard error of a mean of 50,000 samples over the truth

# %% [markdown]
# ## Verdicts

# %%
verdicts = study.verdicts({"01_schulman": schulman, "01_crossover": crossover, "01_gradients": gradients})

# %% [markdown]
# ## Figures

# %%
cell = gl.report.cell


def schulman_text(frame: pd.DataFrame) -> tuple[str, str]:
    def at(column: str, scenario: str, kernel: str) -> float:
        return float(cell(frame, column, scenario=scenario, kernel=kernel, via="exact"))

    near, far = "N(0, 1) ‖ N(0.1, 1)", "N(0, 1) ‖ N(1, 1)"
    kls = [at("kl", scenario, "k1") for scenario in (near, far)]
    stds = [", ".join(f"{at('std', scenario, kernel):.3f}" for kernel in KERNELS) for scenario in (near, far)]
    biases = [f"{at('bias', scenario, 'k2'):.4f}" for scenario in (near, far)]
    return (
        "**Value of three KL estimators.** Bias (a) and standard deviation (b) of one draw's k1, k2 and k3, over the true KL. "
        f"For Gaussians of equal variance the standard deviations of k1, k2, k3 are {stds[0]} at KL {kls[0]:.3g} nats and "
        f"{stds[1]} at {kls[1]:.3g} nats; the bias of k2 is {biases[0]} and {biases[1]}. Exact, in closed form, and from "
        f"{cell(frame, 'samples', via='sampled'):,} draws.",
        "Intervals are 95 %. Where the tail of k3 is heavy a sample of this size can still understate its "
        "noise, and its interval with it.",
    )


study.save_figure("01_schulman", gl.figure("01_schulman", schulman), schulman, *schulman_text(schulman), verdicts)


# %%
def crossover_text(frame: pd.DataFrame) -> tuple[str, str]:
    def where(panel: str) -> str:
        found = frame[(frame["panel"] == panel) & (frame["kernel"] == "k3")].drop_duplicates("scenario")["crossover"]
        met = found[np.isfinite(found)]
        reach = f", at {met.min():.2g}–{met.max():.2g} nats" if len(met) else ""
        return f"in {len(met)} of {len(found)} cases{reach}"

    shift = cell(frame, "crossover", panel="equal variances")
    return (
        "**Where k3 stops being quieter than k1.** Standard deviation of one value (a) and that of k3 over that of k1 (b–d) "
        f"as the policy leaves a fixed reference. k3 overtakes k1 (a) at {shift:.5f} nats, (b) Gaussian policies: "
        f"{where('Gaussian policies')}, (c) random bandits and trees: {where('random categoricals')}, (d) one token dropped: "
        f"{where('one token dropped')}. Exact.",
        "* (a) Policy N(m, 1) against reference N(0, 1).\n"
        "* (b) Gaussian policies that shift, narrow, do both, or widen. Lines end where the variance of k3 becomes infinite or "
        "the walk stops.\n"
        "* (c) Softmax policies (bandits of 10 tokens, trees of 3 tokens and 3 steps) moved along random logits.\n"
        "* (d) Ten tokens, one of the given reference probability dropped.",
    )


study.save_figure("01_crossover", gl.figure("01_crossover", crossover), crossover, *crossover_text(crossover), verdicts)


# %%
def gradients_text(frame: pd.DataFrame) -> tuple[str, str]:
    equal, unequal = (toy.label for toy in toys)

    def k3(column: str, parameter: str) -> float:
        return float(cell(frame, column, scenario=unequal, estimator="k3-loss", parameter=parameter, via="exact"))

    truth = ", ".join(f"{k3('truth', parameter):.6f}" for parameter in ("mean", "std"))
    bias, error = ([f"{k3(column, parameter):.4g}" for parameter in ("mean", "std")] for column in ("bias", "std_of_mean"))
    draws = f"{cell(frame, 'samples', via='sampled'):,}"
    return (
        "**Bias of the value and of the gradient.** Expected value and gradient (mean, std) of each estimator for the policy "
        "N(0, 1), reference N(1, 1) above and N(1, std 1.1) below. Below, k3 as loss has value bias "
        f"{round(k3('bias', 'value'), 9) + 0:g} and gradient bias {bias[0]} (mean), {bias[1]} (std) relative to the truth. "
        f"Exact and from {draws} draws (95 % intervals).",
        f"KL {cell(frame, 'kl', scenario=equal):.3g} nats above, {cell(frame, 'kl', scenario=unequal):.3g} below, where the "
        f"true gradient is ({truth}). The relative standard error of a mean of {draws} draws of k3 as loss is {error[0]} "
        f"(mean) and {error[1]} (std).",
    )


study.save_figure("01_gradients", gl.figure("01_gradients", gradients), gradients, *gradients_text(gradients), verdicts)
