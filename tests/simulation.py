"""How often intervals of sampled moments hold, among rows called reliable and among the others: run as a script for a table.

    python tests/simulation.py 300 300 1000 10000 100000

for 300 runs each of 300 to 100,000 responses. Responses are counted, so a run costs the same for any number of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

import gradlab as gl
from gradlab import intervals, reliability

PLAIN = ["k1-loss", "k2-loss", "k3-loss", "k3-both"]
WEIGHTED = ["k3-loss-token", "k2-loss-token-detached", "k3-loss-prefix", "k3-loss-sequence-weight", "k1-reward-sequence-weight"]
SEQUENCES = [*PLAIN, "k2-loss-sequence", "k3-loss-sequence", "k1-reward-to-go", "full-both", "full-both-prefix", *WEIGHTED]


def dropped(logit: float) -> gl.Scenario:
    """Ten tokens, the first of probability .2 under the reference and a small logit under the policy."""
    reference = np.log(np.r_[0.2, np.full(9, 0.8 / 9)])
    return gl.Scenario(gl.Bandit(np.r_[logit, reference[1:]]), gl.Bandit(reference), name=f"dropped {logit:g}")


def sine(off_policy: bool) -> gl.Scenario:
    at = np.arange(39).reshape(13, 3)
    reference = np.sin(1.7 * at + 0.3)
    policy = reference + 0.8 * np.sin(2.3 * at + 1.1)
    behaviour = gl.Tree(policy + 0.4 * np.sin(0.9 * at + 2.0)) if off_policy else None
    return gl.Scenario(gl.Tree(policy), gl.Tree(reference), behaviour, "sine, off-policy" if off_policy else "sine")


def worlds() -> Iterator[tuple[gl.Scenario, list[str], bool]]:
    """Scenarios, the estimators to run there, and whether gradients are light-tailed."""
    for logit in (-4, -5, -6, -7, -8, -9, -11):
        yield dropped(logit), ["k1-loss", "k2-loss", "k3-loss", "k3-swapped-loss"], False
    for own, other in (((0, 0.6), (0.1, 1)), ((0, 0.9), (0.1, 1)), ((0, 1), (1, 1.1)), ((0, 1), (1, 1)), ((0, 1), (0.1, 0.5))):
        yield gl.Scenario(gl.Gaussian(*own), gl.Gaussian(*other), name=f"N{own} to N{other}"), PLAIN, False
    for off_policy in (False, True):
        yield sine(off_policy), SEQUENCES, True
    rng = np.random.default_rng(7)
    for i in range(12):
        # A spread of logits of up to 1 and moderate distances.
        scale, kl, lag = rng.uniform(0.5, 1.0), float(rng.uniform(0.02, 0.5)), float(rng.uniform(0.02, 0.2))
        policy = gl.Bandit.random(int(rng.integers(3, 21)), i, scale) if i % 2 else gl.Tree.random(3, 3, i, scale=scale)
        behaviour = policy.perturbed(kl=lag, seed=i) if i % 4 > 1 else None
        yield (gl.Scenario(policy, policy.perturbed(kl=kl, seed=i + 1), behaviour, f"random {i}"),
               [*PLAIN, *WEIGHTED] if i % 2 else SEQUENCES, True)  # fmt: skip


def coverage(scenario: gl.Scenario, name: str, samples: int, runs: int, rng: np.random.Generator) -> dict[str, object]:
    """Shares of runs whose intervals hold the truth, and what `gradlab.reliability` says of such runs."""
    loss = gl.ESTIMATORS[name]
    rates, sizes = reliability._enumerated_norms([loss], scenario)
    rollout = gl.exact.enumerated([loss], scenario)
    gradients = gl.moments.gradients([loss], rollout).tables(0).flatten(1).numpy()[(rollout.weight > 0).numpy()]
    known = reliability.assess(samples * rates, sizes[0], gradients.shape[1])
    target = gl.exact.gradient("reverse_kl", scenario).numpy()
    mean, size = rates @ gradients, np.linalg.norm(target)
    truth = {"bias": np.linalg.norm(mean - target) / size, "cosine": mean @ target / np.linalg.norm(mean) / size}
    truth["noise"] = gl.exact.moments(loss, scenario).trace_cov / size**2
    truth["crossover"] = truth["noise"] / truth["bias"] ** 2 if truth["bias"] > 1e-10 else np.inf
    batches = max(8, min(64, samples // 16))
    shares = np.array([len(part) for part in np.array_split(np.empty(samples), batches)])
    hits: dict[str, list[np.ndarray]] = {key: [] for key in truth}
    block = max(1, int(2e7 // (batches * len(rates))))
    for start in range(0, runs, block):
        k = min(block, runs - start)
        counts = np.stack([rng.multinomial(n, rates, size=k) for n in shares], 1)
        sums, squares = counts @ gradients, counts @ np.square(gradients).sum(-1)
        traces = np.maximum((squares - np.square(sums).sum(-1) / shares) / (shares - 1), 0)
        if not np.isfinite(squares).all():
            continue
        means = sums / shares[:, None]
        found = {
            "bias": intervals.bias(means, target),
            "cosine": intervals.cosine(means, target),
            "noise": intervals.noise(means, traces, target),
        }
        with np.errstate(divide="ignore"):
            low, high = found["noise"].low / found["bias"].high ** 2, found["noise"].high / found["bias"].low ** 2
        found["crossover"] = intervals.Interval(low, low, np.where(found["bias"].low > 0, high, np.inf))
        for key, interval in found.items():
            # Rounding is no miss: a noise of 0, a cosine of 1.
            slack = 1e-9 * min(abs(truth[key]), 1) + 1e-10
            hits[key].append((interval.low <= truth[key] + slack) & (truth[key] - slack <= interval.high))
    held = {key: float(np.concatenate(each).mean()) if each else np.nan for key, each in hits.items()}
    return {"scenario": scenario.label, "estimator": name, "samples": samples, "runs": runs, "mean_known": known.mean,
            "noise_known": known.noise, "unseen": known.unseen, **held}  # fmt: skip


def table(runs: int, sizes: list[int], light: bool | None = None, seed: int = 0, every: int = 1) -> pd.DataFrame:
    """One row per scenario, estimator and number of responses."""
    rng, rows = np.random.default_rng(seed), []
    for i, (scenario, names, tame) in enumerate(worlds()):
        if light in (None, tame) and i % every == 0:
            rows += [{**coverage(scenario, name, n, runs, rng), "light": tame} for name in names for n in sizes]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    frame = table(int(sys.argv[1]), [int(n) for n in sys.argv[2:]])
    frame.to_csv("coverage.csv", index=False)
    for column, known in {"bias": "mean_known", "cosine": "mean_known", "noise": "noise_known"}.items():
        for told in (True, False):
            part = frame[frame[known] == told].groupby("samples")[column]
            print(column, "reliable" if told else "not reliable")
            print(part.agg(["size", "mean", "min"]).round(3).to_string())
    unmarked = frame["mean_known"] & frame["noise_known"]
    print("crossover\n", frame[unmarked].groupby("samples")["crossover"].agg(["size", "mean", "min"]).round(3).to_string())
    print("light-tailed rows that are marked\n", (~unmarked)[frame["light"]].groupby(frame["samples"]).agg(["sum", "size"]))
