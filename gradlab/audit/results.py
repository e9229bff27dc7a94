"""The loss in what a function returns: which of several results it is, and how values by token or response are reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradlab.audit.batch import Batch

#: Ways to read the result of a function: what it is, or what of the reward it is.
RETURNS = ("loss", "penalty", "rewards", "advantages")
Pick = Callable[[Any], Any]


class AmbiguousError(ValueError):
    """Which of several results is the loss cannot be told, or there is none of that name."""


def picked(result: Any, chosen: str | int | None, label: str) -> tuple[Pick, str]:
    """Which of the results is the loss: as said by `chosen`, or the only one that can be, and what it is called.

    Raises `ValueError`, with the line to type, where several can be.
    """
    if chosen is not None:
        return _named(result, chosen, label)
    if isinstance(result, Tensor):
        return lambda r: r, ""
    parts = _parts(result)
    tensors = {key: item for key, item in parts.items() if isinstance(item, Tensor)}
    live = [key for key, item in tensors.items() if item.requires_grad]
    key: Any = None
    if isinstance(result, Mapping | tuple | list):
        preferred = [k for k in live if isinstance(k, str) and (k == "loss" or "total" in k)]
        first = [k for k in ("loss", "kl_loss") if k in tensors]
        if len(live) == 1:
            key = live[0]
        elif "loss" in live or len(preferred) == 1:
            key = "loss" if "loss" in live else preferred[0]
        elif live:
            raise AmbiguousError(
                f"{label} returns several results that carry gradient: {', '.join(map(str, live))}; say which is the loss with "
                f"--result {live[-1]}, or another of them"
            )
        elif tensors:
            key = next(iter([*first, *tensors]))
        if key is None:
            return lambda r: r, ""
        return (lambda r: _parts(r)[key]), str(key)
    return (lambda r: getattr(r, "loss", r)), "loss" if hasattr(result, "loss") else ""


def _parts(result: Any) -> dict[Any, Any]:
    if isinstance(result, Mapping):
        return dict(result)
    if isinstance(result, tuple) and hasattr(result, "_asdict"):
        return dict(result._asdict())
    return dict(enumerate(result)) if isinstance(result, tuple | list) else {}


def _named(result: Any, name: str | int, label: str) -> tuple[Pick, str]:
    key = int(name) if isinstance(name, int) or str(name).lstrip("-").isdigit() else str(name)
    if isinstance(key, int) and isinstance(result, tuple | list):
        if not -len(result) <= key < len(result):
            raise ValueError(f"{label} returns {len(result)} results, counted from 0: there is no number {key}")
        return (lambda r: r[key]), str(name)
    if isinstance(result, Mapping) and key in result:
        return (lambda r: r[key]), str(name)
    if isinstance(key, str) and hasattr(result, key):
        return (lambda r: getattr(r, key)), key
    offered = ", ".join(map(str, _parts(result))) or f"one {type(result).__name__}"
    raise AmbiguousError(f"{label} returns no {name!r}; it returns {offered}")


def reduced(result: Any, batch: Batch, returns: str) -> tuple[Any, str]:
    """The scalar that an optimiser would minimise, and how it came about."""
    if not isinstance(result, Tensor):
        return result, ""
    if returns != "loss":
        return _policy_loss(result, batch, returns)
    if result.shape == batch.mask.shape:
        return (torch.where(batch.mask.bool(), result, 0.0)).sum(-1).mean(), "sum over live tokens, mean over responses"
    if result.dim() == 1 and result.shape == batch.mask.shape[:1] and len(result) > 1:
        return result.mean(), "mean over responses"
    return result, ""


def _policy_loss(values: Tensor, batch: Batch, returns: str) -> tuple[Tensor, str]:
    """`−Σ_t sg(A_t) log π_t`, mean over responses, with `A` as returned or as the sum of the rewards that follow."""
    mask = batch.mask.bool()
    per_token = values if values.shape == batch.mask.shape else values.reshape(-1, 1).expand_as(batch.mask)
    if returns == "advantages" or values.shape != batch.mask.shape:
        advantage = -per_token if returns == "penalty" else per_token
    else:
        reward = torch.where(mask, -per_token if returns == "penalty" else per_token, 0.0)
        advantage = reward.flip(-1).cumsum(-1).flip(-1)
    loss = -torch.where(mask, advantage.detach() * batch.log_prob, 0.0).sum(-1).mean()
    return loss, "−Σ_t sg(advantage_t) log π_t, mean over responses" + ("" if returns == "advantages" else ", rewards to go")
