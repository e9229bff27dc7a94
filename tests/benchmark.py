"""Speed, as ratios to a floor measured in the same run: `python tests/benchmark.py`.

Machines are noisy, so nothing here is a test; each line names its floor and the ratio that the design aims at.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import gradlab as gl
from gradlab import exact
from gradlab.policies import Tree


def seconds(function: Callable[[], object], repeat: int = 7, at_least: float = 0.05) -> float:
    """Median time of one call, each repetition long enough to be measured."""
    function()
    started = time.perf_counter()
    function()
    loops = max(1, int(at_least / max(time.perf_counter() - started, 1e-7)))
    runs = []
    for _ in range(repeat):
        started = time.perf_counter()
        for _ in range(loops):
            function()
        runs.append((time.perf_counter() - started) / loops)
    return statistics.median(runs)


def enumerated_reverse_kl(policy: Tree, reference: Tree) -> Callable[[], torch.Tensor]:
    """The floor: enumerate, then one forward and backward pass of `Σ_y π(y) S(y)`, written as plainly as possible."""

    def forward_backward() -> torch.Tensor:
        tokens, _ = policy.enumerate()
        rows = policy.contexts(tokens)
        table = policy.table.detach().requires_grad_(True)
        log_pi = table.log_softmax(-1)[rows, tokens].sum(-1)
        log_ref = reference.table.log_softmax(-1)[rows, tokens].sum(-1)
        (gradient,) = torch.autograd.grad((log_pi.exp() * (log_pi - log_ref)).sum(), table)
        return gradient

    return forward_backward


def line(what: str, value: float, unit: str, aim: str) -> None:
    print(f"{what:<86} {value:9.3g} {unit:<8} {aim}")


def main() -> None:
    torch.set_num_threads(1)
    catalogue = list(gl.ESTIMATORS.values())

    policy = gl.Tree.random(vocab=5, length=4, seed=0)
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1), policy.perturbed(kl=0.1, seed=2))
    floor = seconds(enumerated_reverse_kl(policy, scenario.reference))
    whole = seconds(lambda: exact.moments(catalogue, scenario))
    line("enumerated forward+backward of the reverse KL, 625 responses (the floor)", 1e3 * floor, "ms", "")
    line(f"exact mean and trace of all {len(catalogue)} estimators on that tree", 1e3 * whole, "ms", "")
    line("  per estimator, relative to the floor", whole / len(catalogue) / floor, "x", "(aim: at most 0.5)")

    bandit = gl.Bandit.random(vocab=1000, seed=0)
    wide = gl.Scenario(bandit, bandit.perturbed(kl=0.3, seed=1))
    counted = seconds(lambda: gl.montecarlo.replicates(gl.ESTIMATORS["k3-loss"], wide, 10**6, 1000), repeat=3)
    line("a million draws x a thousand replicates on a 1000-token bandit, by counts", counted, "s", "(aim: at most 2)")

    chains = {}
    for length in (64, 512):
        chain = gl.Markov.random(vocab=32, length=length, seed=0)
        chains[length] = gl.Scenario(chain, chain.perturbed(scale=0.1, seed=1), chain.perturbed(scale=0.05, seed=2))
    for name in ("k2-loss", "k1-reward-to-go", "full-both-prefix"):
        estimator = gl.ESTIMATORS[name]
        short, long = (seconds(partial(exact.moments, estimator, chain), repeat=3) for chain in chains.values())
        line(f"Markov, 32 tokens, length 64: exact mean and trace of {name}", 1e3 * short, "ms", "")
        line("  length 512 relative to length 64", long / short, "x", "(aim: at most 10)")
    gradient = seconds(lambda: exact.gradient("reverse_kl", chains[64]))
    line("exact reverse-KL gradient of that chain, length 64", 1e3 * gradient, "ms", "(aim: below 5)")

    chain = gl.Markov.random(vocab=8, length=16, seed=0)
    drawn = gl.Scenario(chain, chain.perturbed(kl=0.3, seed=1))
    peaks = []
    for samples in (20_000, 200_000):
        gl.montecarlo.moments(catalogue[:6], drawn, samples)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    line("peak memory of 200,000 drawn responses relative to 20,000", peaks[1] / peaks[0], "x", "(aim: 1)")


if __name__ == "__main__":
    main()
