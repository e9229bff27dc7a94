"""Synthetic runs of gradlab's own small language models, and every fault that real dumps have, planted in them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

import gradlab as gl
from gradlab._common.streams import generator
from gradlab.policies.language import LanguageModel

Columns = dict[str, Any]
POLICIES = ("logprob", "ref_logprob", "behaviour_logprob")


@lru_cache
def run(
    task: str, n: int = 512, group: int = 8, stage: str = "many", temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
) -> Columns:
    """`n` responses of an engine, scored by the policy it serves and by the reference, right-padded `[n, t]`."""
    policy, reference = gl.policies.small(task, stage), gl.policies.small(task)
    engine = LanguageModel(
        policy.model,
        policy.prompts,
        policy.length,
        eos=policy.eos,
        context=policy.context,
        temperature=temperature,
        top_p=top_p,
    )
    drawn = engine.sample(n, generator(seed), group)
    prompts, tokens, mask = drawn.prompts, drawn.tokens, drawn.mask

    def scored(model: LanguageModel) -> Any:
        log_p = model.logits(prompts, tokens).detach().log_softmax(-1)
        return torch.where(mask, log_p.gather(-1, tokens[..., None])[..., 0], 0.0).numpy()

    groups = np.arange(n) // group
    return {
        "token_id": tokens.numpy(), "mask": mask.numpy(), "logprob": scored(policy), "ref_logprob": scored(reference),
        "behaviour_logprob": scored(engine), "group_id": groups, "response_id": np.arange(n), "step": np.ones(n, dtype=int),
    }  # fmt: skip


def moved(x: Any, by: int) -> Any:
    """Each row shifted by one to the left (1) or to the right (−1), with a zero where nothing is left."""
    found = np.zeros_like(x)
    found[:, slice(0, -1) if by > 0 else slice(1, None)] = x[:, slice(1, None) if by > 0 else slice(0, -1)]
    return found


def turned(x: Any, mask: Any) -> Any:
    """The numbers of every row at its right end, zeros on the left."""
    found = np.zeros_like(x)
    for i, row in enumerate(mask):
        found[i, len(row) - row.sum() :] = x[i, row]
    return found


def with_prompts(c: Columns, silent: bool) -> Columns:
    """The columns with six tokens of a prompt in front, inside the mask; engines are silent about them, or not."""
    rng, k, group = np.random.default_rng(0), 6, c["group_id"]
    shape = (group.max() + 1, k)
    prompt, log_p = rng.integers(0, 12, size=shape)[group], -rng.exponential(3, size=shape)[group]
    added = {"logprob": log_p, "ref_logprob": log_p - 0.1, "behaviour_logprob": 0 * log_p if silent else log_p}
    found = {name: np.concatenate([added[name], c[name]], 1) for name in POLICIES}
    tokens = np.concatenate([prompt, c["token_id"]], 1)
    return c | found | {"token_id": tokens, "mask": np.concatenate([np.ones_like(prompt, dtype=bool), c["mask"]], 1)}


def faults(task: str) -> Iterator[tuple[str, Columns, list[tuple[str, tuple[str, ...]]]]]:
    """Names of faults, columns that have them, and what the checks are to find: fault and columns."""
    c = run(task)
    m, rng = c["mask"], np.random.default_rng(1)
    yield "clean", c, []
    yield "float32", c | {name: torch.from_numpy(c[name]).float() for name in POLICIES}, []
    for name in POLICIES:
        for by in (1, -1):
            yield f"{name} shifted {by}", c | {name: moved(c[name], by)}, [("shifted", (name,))]
    for by in (1, -1):
        yield f"all shifted {by}", c | {name: moved(c[name], by) for name in POLICIES}, [("shifted", ("token_id",))]
    some, rows = rng.random(m.shape) < 0.05, rng.random((len(m), 1)) < 0.1
    for name in ("logprob", "ref_logprob"):
        yield f"{name} missing", c | {name: np.where(some, 0.0, c[name])}, [("missing", (name,))]
    yield (
        "engine silent in responses",
        c | {"behaviour_logprob": np.where(rows, 0.0, c["behaviour_logprob"])},
        [("missing", ("behaviour_logprob",))],
    )
    yield "−log π", c | {"logprob": -c["logprob"]}, [("positive", ("logprob",))]
    yield "probabilities", c | {"ref_logprob": np.where(m, np.exp(c["ref_logprob"]), 0.0)}, [("positive", ("ref_logprob",))]
    yield "some positive", c | {"ref_logprob": np.where(some, 0.3, c["ref_logprob"])}, [("positive", ("ref_logprob",))]
    if not m.all():
        for name in (*POLICIES, "token_id"):
            yield f"{name} padded on the left", c | {name: turned(c[name], m)}, [("padding", (name,))]
    yield "prompt, engine silent", with_prompts(c, True), [("prompt", ("mask",))]
    yield "prompt", with_prompts(c, False), [("prompt", ("mask",))]
    alone = with_prompts(c, True)
    alone.pop("group_id")
    yield "prompt, no groups", alone, [("prompt", ("mask",))]
    yield "prompt length", c | {"prompt_length": 1}, [("prompt", ("mask",))]
    broken = c["ref_logprob"].copy()
    broken[3, 0], broken[5, 1] = np.nan, -np.inf
    yield "NaN and −inf", c | {"ref_logprob": broken}, [("not finite", ("ref_logprob",))]
    yield "first step", c | {"ref_logprob": c["logprob"]}, [("reference", ("ref_logprob",))]
    later = np.repeat([1, 2], len(m) // 2)
    copied = np.where(later[:, None] == 2, c["logprob"], c["ref_logprob"])
    yield "reference copied", c | {"step": later, "ref_logprob": copied}, [("reference", ("ref_logprob",))]
    index = np.r_[np.arange(len(m)), np.arange(40, 48)]
    yield "twice", {name: np.asarray(x)[index] for name, x in c.items()}, [("twice", ("mask",))]
    for name in POLICIES:
        for kind in (torch.bfloat16, torch.float16):
            yield f"{name} in {kind}", c | {name: torch.from_numpy(c[name]).to(kind)}, [("rounded", (name,))]
    for temperature in (0.7, 0.95, 1.3):
        yield f"temperature {temperature}", run(task, temperature=temperature), [("tempered", ("behaviour_logprob",))]
    for top_p in (0.5, 0.7, 0.9):
        yield f"nucleus {top_p}", run(task, top_p=top_p), [("cut", ("behaviour_logprob",))]
