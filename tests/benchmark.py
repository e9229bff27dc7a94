"""Speed, as ratios to a floor measured in the same run: `python tests/benchmark.py`.

Machines are noisy, so nothing here is a test; each line names its floor and the ratio that the design aims at.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import distributed
import joblib
import numpy as np
import torch
from torch.func import functional_call, grad, vmap

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from make_checkpoints import initial

import gradlab as gl
from gradlab.moments import gradients
from gradlab.per_sample import backprop
from gradlab.policies import Bandit, LanguageModel, Tree
from gradlab.policies.small import TASKS
from gradlab.solvers import exact


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


def against(floor: Callable[[], object], function: Callable[[], object], rounds: int = 15) -> float:
    """Median ratio of one call to a call of the floor just before it: what slows the machine slows both."""
    runs = []
    for _ in range(rounds + 1):
        times = [time.perf_counter()]
        for each in (floor, function):
            each()
            times.append(time.perf_counter())
        runs.append((times[2] - times[1]) / (times[1] - times[0]))
    return statistics.median(runs[1:])


def enumerated_reverse_kl(policy: Tree, reference: Tree) -> Callable[[], torch.Tensor]:
    """The floor: enumerate, then one forward and backward pass of `Σ_y π(y) S(y)`, written as plainly as possible."""

    def forward_backward() -> torch.Tensor:
        tokens = policy.enumerate().tokens
        rows = policy.contexts(tokens)
        table = policy.table.detach().requires_grad_(True)
        log_pi = table.log_softmax(-1)[rows, tokens].sum(-1)
        log_ref = reference.table.log_softmax(-1)[rows, tokens].sum(-1)
        (gradient,) = torch.autograd.grad((log_pi.exp() * (log_pi - log_ref)).sum(), table)
        return gradient

    return forward_backward


def moved(policy: Bandit | Tree) -> gl.Scenario:
    """A policy on a reference a little away from it."""
    return gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1))


def drawn_pass(scenario: gl.Scenario, samples: int) -> Callable[[], torch.Tensor]:
    """The floor: draw responses, then one forward and backward pass of the squared log-ratio of their tokens."""
    policy, reference = scenario.policy, scenario.reference

    def forward_backward() -> torch.Tensor:
        tokens = policy.sample(samples, np.random.default_rng(0)).tokens
        rows = policy.contexts(tokens)
        table = policy.table.detach().requires_grad_(True)
        log_ratio = table.log_softmax(-1)[rows, tokens] - reference.table.log_softmax(-1)[rows, tokens]
        (gradient,) = torch.autograd.grad(0.5 * log_ratio.square().sum(-1).mean(), table)
        return gradient

    return forward_backward


def language_model(length: int, prompt: int, batch: int) -> None:
    """Parameter-space means and norms of six estimators, relative to one ordinary forward and backward pass of the batch."""
    names = ["k1-loss", "k2-loss", "k3-loss", "k1-reward-to-go", "k2-loss-sequence", "k3-both"]
    made = [initial(TASKS["names"], np.random.default_rng(seed)) for seed in (0, 1)]
    for network in made:
        network.position = torch.nn.Embedding.from_pretrained(torch.zeros(32, 64), freeze=False)
        network.context = 32
    policy, reference = (LanguageModel(network, [tuple(range(prompt))], length) for network in made)
    scenario, weight = gl.Scenario(policy, reference), torch.full((batch,), 1 / batch, dtype=torch.float64)
    answers = policy.sample(batch, np.random.default_rng(0))
    found = gradients([gl.ESTIMATORS[name] for name in names], gl.Rollout.from_responses(scenario, answers, weight))
    ((_, ids),) = policy.sequences(answers.prompts, answers.tokens)
    parameters = dict(policy.model.named_parameters())

    def ordinary() -> None:
        chosen = policy.model(ids)[:, -length:].log_softmax(-1).gather(-1, answers.tokens[..., None])
        torch.autograd.grad(chosen.sum() / batch, list(parameters.values()))

    score = found.rollout.logits.softmax(-1).neg()
    score = score.scatter_add(-1, answers.tokens[..., None], torch.ones_like(score[..., :1])).float()

    def surrogate(weights: dict[str, torch.Tensor], row: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        return (functional_call(policy.model, weights, (row[None],))[0, -length:] * seed).sum()

    def each_sample() -> None:
        for a in found.score:
            parts = vmap(grad(surrogate), (None, 0, 0))(parameters, ids, a[..., None].float() * score)
            flat = torch.cat([part.flatten(1) for part in parts.values()], 1)
            flat.mean(0), flat.square().sum(-1)

    what = f"{len(policy.parameters):,} parameters, {batch} responses, T = {length}"
    line(f"ordinary forward+backward: {what} (the floor)", 1e3 * seconds(ordinary), "ms", "")
    for label, pairs, aim in (("means and norms", False, {4: 3, 16: 4.5}[length]), ("and all inner products", True, None)):
        taken = against(ordinary, partial(backprop.pullback, policy, found, weight, pairs=pairs))
        line(f"  six estimators, {label}", taken, "x", f"(aim: at most {aim})" if aim else "")
    with (
        patch("gradlab.per_sample.tape.replayable", lambda policy: False),
        patch("gradlab.per_sample.backprop.replayable", lambda policy: False),
    ):
        taken = against(ordinary, partial(backprop.pullback, policy, found, weight))
    line("  six estimators, means and norms, recorded by autograd instead of replayed", taken, "x", "")
    line("  six estimators by vmap(grad)", against(ordinary, each_sample, 5), "x", "")


def drawing() -> None:
    """Responses of the small transformer, relative to one forward pass over the same sequences."""
    for task in ("names", "addition"):
        policy = gl.policies.small(task, "few")
        draws = policy.sample(2048, np.random.default_rng(0))

        def forward(policy: LanguageModel = policy, draws: gl.policies.Responses = draws) -> None:
            with torch.no_grad():
                policy.logits(draws.prompts, draws.tokens)

        def draw(policy: LanguageModel = policy) -> None:
            policy.sample(2048, np.random.default_rng(0))

        line(
            f"2048 responses of the small model, {task}, relative to a forward pass",
            against(forward, draw),
            "x",
            "(aim: at most 1.5)",
        )


def large_tree(vocab: int, length: int) -> None:
    """Time and memory of the whole catalogue on a tree, in a process of its own."""
    code = f"""
import resource, time, torch, gradlab as gl
torch.set_num_threads(1)
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
policy = gl.Tree.random(vocab={vocab}, length={length}, seed=0)
scenario = gl.Scenario(policy, policy.perturbed(scale=0.1, seed=1), policy.perturbed(scale=0.05, seed=2))
catalogue, small = list(gl.ESTIMATORS.values()), gl.Bandit([0.0, 1.0])
gl.exact.moments(catalogue, gl.Scenario(small, small))
before, started = peak(), time.process_time()
gl.exact.moments(catalogue, scenario)
print(time.process_time() - started, (peak() - before) / (8 * (len(catalogue) + 24) * policy.table.numel()))
"""
    taken, memory = map(float, subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.split())
    n = vocab**length
    line(f"exact mean and trace of the catalogue, tree of {n:,} responses, per million of them", 1e6 * taken / n, "s", "")
    line("  peak memory relative to what is stated", memory, "x", "(aim: at most 2)")


def written(folder: Path, steps: int) -> int:
    """Write a made-up run, a file for every step of 1,024 responses of a thousand tokens in the mean; returns how many tokens."""
    rng, tokens = np.random.default_rng(0), 0
    usual = rng.normal(-1.2, 0.8, 32_000)
    for step in range(steps):
        lengths = np.minimum(rng.geometric(1e-3, 1024), 8192)
        n = int(lengths.sum())
        ids, reward = np.minimum(rng.zipf(1.3, n) - 1, len(usual) - 1), rng.random(1024)
        log_p = -np.abs(usual[ids] + rng.normal(0, 0.7, n)) - 1e-9
        near, far = (np.minimum(log_p + rng.normal(0, spread, n), -1e-12) for spread in (0.01, 0.15))
        groups, cuts = [f"{step}-{i // 8}" for i in range(1024)], np.cumsum(lengths)[:-1]
        columns = {"token_id": ids, "logprob": log_p, "behaviour_logprob": near, "ref_logprob": far}
        rows = {name: np.split(values, cuts) for name, values in columns.items()}
        records = gl.Records.from_arrays(step=step, group_id=groups, reward=reward, advantage=reward - 0.5, **rows)
        records.write(folder / f"step-{step:05d}.parquet")
        tokens += n
    return tokens


def inspecting() -> None:
    """A run's files looked into, in a process of its own: seconds of one core and peak memory."""
    code = """
import resource, sys, time, torch, gradlab as gl
torch.set_num_threads(1)
records = gl.read_rollouts(sys.argv[1])
gl.inspect(gl.Records.from_arrays(logprob=[[-1.0]] * 64, ref_logprob=[[-1.1]] * 64, step=list(range(64))))
started = time.process_time()
gl.inspect(records)
print(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    found = {}
    for steps in (4, 16):
        with tempfile.TemporaryDirectory() as folder:
            tokens = written(Path(folder), steps)
            run = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True)
            found[steps] = tokens, *map(float, run.stdout.split())
    (few, short, small), (many, long, large) = found.values()
    line(
        f"gl.inspect of {many / 1e6:.0f} million tokens in parquet files, a core, per million",
        1e6 * long / many,
        "s",
        "(aim: 2)",
    )
    line(f"  time per token relative to that of {few / 1e6:.0f} million", long / short * few / many, "x", "(aim: 1)")
    line("  peak memory", large, "MB", "")
    line(f"  relative to that of {few / 1e6:.0f} million", large / small, "x", "(aim: at most 1.2)")


def on_workers() -> None:
    """The same frame on two worker processes of joblib and of a local dask cluster."""
    trees = [gl.Tree.random(vocab=6, length=5, seed=seed) for seed in range(16)]
    scenarios = [gl.Scenario(tree, tree.perturbed(kl=0.3, seed=1)) for tree in trees]

    def on_dask() -> None:
        with joblib.parallel_config(backend="dask"):
            gl.measure(["k2-loss", "k3-loss", "k1-reward-to-go"], scenarios)

    options = {"processes": True, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster):
        taken = against(lambda: gl.measure(["k2-loss", "k3-loss", "k1-reward-to-go"], scenarios, jobs=2), on_dask, 5)
    line("a frame on a local dask cluster, relative to joblib's processes", taken, "x", "(aim: at most 1.2)")


def line(what: str, value: float, unit: str, aim: str) -> None:
    print(f"{what:<86} {value:9.3g} {unit:<8} {aim}")


def whole_losses(what: str, policy: gl.Policy) -> None:
    """Every named loss at groups of 8, off-policy, against one enumerated forward and backward pass of the reward's loss."""
    behaviour = policy.perturbed(kl=0.05, seed=2)
    scenario = gl.Scenario(
        policy, policy.perturbed(kl=0.3, seed=1), behaviour, reward=lambda rollout: (rollout.tokens.sum(-1) % 3 == 0).double(),
        old=behaviour.perturbed(kl=0.01, seed=3),
    )  # fmt: skip
    losses = [dataclasses.replace(loss, group=8) if loss.grouped else loss for loss in gl.LOSSES.values()]

    def ordinary() -> None:
        leaf = gl.Rollout.enumerated(scenario).differentiable()
        loss = -(leaf.weight * leaf.rewards) @ leaf.log_prob.sum(-1)
        torch.autograd.grad(loss, leaf.table)

    taken = against(ordinary, partial(exact.moments, losses, scenario), 5) / len(losses)
    line(
        f"{what}: exact mean and trace of each of {len(losses)} whole losses, groups of 8", taken, "passes", "(aim: at most 20)"
    )


def main() -> None:
    torch.set_num_threads(1)
    catalogue = list(gl.ESTIMATORS.values())

    policy = gl.Tree.random(vocab=5, length=4, seed=0)
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1), policy.perturbed(kl=0.1, seed=2))
    floor = enumerated_reverse_kl(policy, scenario.reference)
    line("enumerated forward+backward of the reverse KL, 625 responses (the floor)", 1e3 * seconds(floor), "ms", "")
    ratio = against(floor, partial(exact.moments, catalogue, scenario), 101)
    line(
        f"exact mean and trace of {len(catalogue)} estimators on that tree, per estimator",
        ratio / len(catalogue),
        "x",
        "(aim: at most 0.4)",
    )
    for vocab, length in ((10, 4), (10, 6)):
        tree = gl.Tree.random(vocab=vocab, length=length, seed=0)
        larger = gl.Scenario(tree, tree.perturbed(scale=0.1, seed=1), tree.perturbed(scale=0.05, seed=2))
        ratio = against(enumerated_reverse_kl(tree, larger.reference), partial(exact.moments, catalogue, larger), 5)
        line(f"  and on a tree of {vocab**length:,} responses", ratio / len(catalogue), "x", "(aim: at most 0.4)")
    for vocab, length in ((10, 6), (4, 11)):
        large_tree(vocab, length)

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
        wide = []
        for vocab in (128, 256):
            chain = gl.Markov.random(vocab=vocab, length=64, seed=0)
            wide.append(gl.Scenario(chain, chain.perturbed(scale=0.1, seed=1), chain.perturbed(scale=0.05, seed=2)))
        narrow, wider = (seconds(partial(exact.moments, estimator, each), repeat=3) for each in wide)
        line("  256 tokens relative to 128, length 64", wider / narrow, "x", "(aim: at most 10)")
    many = gl.Estimator("k3", "reward", credit="sequence", weight="sequence", differentiate_weight=True)
    chain = gl.Markov.random(vocab=4, length=64, seed=0)
    short = gl.Scenario(chain, chain.perturbed(scale=0.1, seed=1), chain.perturbed(scale=0.05, seed=2))
    line(f"Markov, 4 tokens, length 64: {many.name}", 1e3 * seconds(partial(exact.moments, many, short), 3), "ms", "")
    gradient = seconds(lambda: exact.gradient("reverse_kl", chains[64]))
    line("exact reverse-KL gradient of that chain, length 64", 1e3 * gradient, "ms", "(aim: below 5)")

    chain = gl.Markov.random(vocab=8, length=16, seed=0)
    drawn = gl.Scenario(chain, chain.perturbed(kl=0.3, seed=1))
    peaks = []
    for samples in (20_000, 200_000):
        gl.montecarlo.moments(catalogue[:6], drawn, samples)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    line("peak memory of 200,000 drawn responses relative to 20,000", peaks[1] / peaks[0], "x", "(aim: 1)")

    chosen = [loss for loss in catalogue if not loss.grouped]
    for what, sampled in (
        ("Markov, 8 tokens, length 16", drawn),
        ("Tree, 8 tokens, length 6", moved(gl.Tree.random(vocab=8, length=6, seed=0))),
        ("Bandit, 50,000 tokens", moved(gl.Bandit.random(vocab=50_000, seed=0))),
    ):
        ordinary = drawn_pass(sampled, 20_000)
        line(f"{what}: 20,000 draws and one backward pass (the floor)", 1e3 * seconds(ordinary), "ms", "")
        for count, aim in ((1, 4), (6, 6), (28, 15)):
            taken = against(ordinary, partial(gl.montecarlo.moments, chosen[:count], sampled, 20_000), 5)
            line(f"  sampled means, traces and batches of {count} estimators", taken, "x", f"(aim: at most {aim})")
            taken = against(ordinary, partial(gl.measure, chosen[:count], sampled, samples=20_000), 5)
            line("    and the frame: with intervals, their reliability, and the target's exact gradient", taken, "x", "")

    for what, policy in (
        ("Bandit, 50 tokens", gl.Bandit.random(50, seed=0)),
        ("Tree, 625 responses", gl.Tree.random(5, 4, seed=0)),
    ):
        whole_losses(what, policy)

    inspecting()
    on_workers()
    drawing()

    for batch in (256, 1024):
        language_model(4, 6, batch)
        language_model(16, 1, batch)


if __name__ == "__main__":
    main()
