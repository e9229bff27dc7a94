"""Tinker cookbook: k1 in the advantages, centred over the batch, by token or summed over what is still to come."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gradlab.audit.batch import Batch, Subject

PACKAGE = "tinker_cookbook"
INSTALL = "pip install --no-deps tinker-cookbook==0.6.1 && pip install tinker chz pillow termcolor blobfile"


def subjects() -> list[Subject]:
    """`kl_discount_factor` 0 (the default) and 1. tinker-cookbook ≥ 0.6."""
    shipped, found = version("tinker-cookbook"), []
    function = "tinker_cookbook.rl.metrics.incorporate_kl_penalty, then the service's importance_sampling loss"
    for discount in (0.0, 1.0):
        options: dict[str, Any] = {"kl_discount_factor": discount}
        name = f"tinker reward discount={discount:g}"
        found.append(Subject(name, partial(in_reward, **options), "tinker_cookbook", shipped, function, options, group=2))
    return found


def in_reward(batch: Batch, *, kl_discount_factor: float) -> Tensor:
    """`incorporate_kl_penalty` on the task's advantages, then `−Σ ratio · advantage`: a scalar. Float32 inside.

    The second step runs in Tinker's service, which is not installed anywhere; it is written here as its documentation states
    the loss `importance_sampling`, a sum over all tokens of the batch.
    """
    import tinker
    from tinker_cookbook.rl.metrics import incorporate_kl_penalty

    lengths = batch.lengths.tolist()
    data, answers = [], {}
    for i, n in enumerate(lengths):
        tokens, log_prob = batch.tokens[i, :n].tolist(), batch.behaviour_log_prob[i, :n].float()
        columns = {
            "target_tokens": torch.tensor(tokens),
            "logprobs": log_prob,
            "mask": torch.ones(n),
            "advantages": batch.advantages[i, :n].float(),
        }
        inputs = {name: tinker.TensorData.from_torch(column) for name, column in columns.items()}
        # The first position is the prompt, which tells the responses apart.
        data.append(tinker.Datum(model_input=tinker.ModelInput.from_ints([i, *tokens[:-1]]), loss_fn_inputs=inputs))
        answers[i] = [None, *batch.reference_log_prob[i, :n].tolist()]
    with ThreadPoolExecutor(1) as pool:  # a thread of its own, so that it also works where an event loop already runs
        pool.submit(asyncio.run, incorporate_kl_penalty(data, _Client(answers), 1.0, kl_discount_factor)).result()
    advantages = torch.zeros_like(batch.reference_log_prob)
    for i, (datum, n) in enumerate(zip(data, lengths, strict=True)):
        advantages[i, :n] = datum.loss_fn_inputs["advantages"].to_torch().to(advantages.dtype)
    ratio = (batch.log_prob - batch.behaviour_log_prob).exp()
    return -(ratio * advantages * batch.mask).sum()


class _Client:
    """Stands in for the reference model's sampling client."""

    def __init__(self, answers: dict[int, list[float | None]]) -> None:
        self.answers = answers

    def sample(self, prompt: Any, **_: Any) -> Any:
        """What the service answers to a request for the log-probabilities of a prompt."""

        async def coroutine() -> Any:
            return SimpleNamespace(prompt_logprobs=self.answers[prompt.to_ints()[0]], sequences=[], prompt_cache_hit_tokens=0)

        return SimpleNamespace(coroutine=coroutine)

    async def compute_logprobs_async(self, prompt: Any) -> list[float | None]:
        """The same request, as versions before 0.6 make it."""
        return self.answers[prompt.to_ints()[0]]
