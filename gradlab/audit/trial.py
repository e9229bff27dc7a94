"""A trial of a loss before it is audited: which forms of its arguments fit, how many tokens it needs, what it needs around it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradlab.audit.batch import Batch
from gradlab.audit.synthetic import Tokens, responses
from gradlab.audit.worlds import VOCAB

#: The most tokens whose responses can be enumerated in good time.
MAX_VOCAB = 8


def batch_of(vocab: int | None) -> Batch:
    """Two responses, of three tokens and of two, with advantages of both signs, and misleading padding."""
    tokens = Tokens.at(0.3, -0.2, 0.1, log_weight=0.05), Tokens.at(0.1, 0.4, log_weight=-0.03, advantage=-1.0)
    return responses(*tokens, columns=4, vocab=vocab or 2)[0]


class _TopK(TorchFunctionMode):
    """Notes the largest `k` of `topk`."""

    largest = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "topk":
            k = kwargs.get("k", args[1] if len(args) > 1 else 0)
            self.largest = max(self.largest, int(k))
            x = kwargs.get("input", args[0] if args else None)
            if isinstance(x, Tensor) and int(k) > x.shape[-1]:
                raise ValueError(f"top-{k} of {x.shape[-1]} tokens")
        return function(*args, **kwargs)


def vocabulary(value: Callable[[Batch], Any], label: str) -> int | None:
    """How many tokens a loss needs: one more than the k of a top-k, so that there is a tail; `None` where it has none.

    Raises `ValueError` when these are more than can be enumerated.
    """
    seen = _TopK()
    try:
        with seen:
            value(batch_of(VOCAB))
    except Exception:  # what else may be wrong is told later
        pass
    if not seen.largest:
        return None
    if seen.largest + 1 > MAX_VOCAB:
        raise ValueError(
            f"{label} takes the top {seen.largest} tokens, and responses over more than {MAX_VOCAB} tokens are too many to "
            "enumerate; audit it with a smaller k, such as --set topk=2"
        )
    return max(VOCAB, seen.largest + 1)


def distributed(call: Callable[[], Any]) -> Any:
    """The result of a call; one that wants a process group gets one of a single process."""
    try:
        return call()
    except (RuntimeError, ValueError) as error:
        if "process group has not been initialized" not in str(error) or torch.distributed.is_initialized():
            raise
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return call()
    finally:
        torch.distributed.destroy_process_group()


def misfit(value: Callable[[Batch], Tensor], trial: Batch, roles: Collection[str], padding_mask: bool) -> bool:
    """Whether arguments in these forms cannot be meant: one response's advantage reaches another, or only padding has a gradient."""
    if "advantages" in roles:
        before, other = _gradient(value, trial), trial.advantages.clone()
        other[1] *= 1.5
        after = _gradient(value, replace(trial, advantages=other))
        if float((after[0] - before[0]).norm()) > 1e-9 * float(before.norm()):
            return True
    if padding_mask:
        gradient, live = _gradient(value, trial), trial.mask.bool()
        return not bool(gradient[live].abs().max() > 0) and bool(gradient[~live].abs().max() > 0)
    return False


def _gradient(value: Callable[[Batch], Tensor], trial: Batch) -> Tensor:
    log_prob = trial.log_prob.detach().requires_grad_(True)
    logits = trial.logits.detach().requires_grad_(True)
    result = value(replace(trial, log_prob=log_prob, logits=logits))
    if not isinstance(result, Tensor) or not result.requires_grad:
        return torch.zeros_like(trial.mask)
    found = torch.autograd.grad(result, [log_prob, logits], allow_unused=True)
    total = torch.zeros_like(trial.mask)
    total = total if found[0] is None else total + found[0]
    return total if found[1] is None else total + found[1].abs().sum(-1)
