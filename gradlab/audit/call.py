"""One guarded call of an audited loss: what it returns is checked, what it does to its inputs too, and its errors are its own."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from gradlab.audit.batch import Batch, Subject

IN_NUMPY = (
    "computes in numpy, which keeps no gradients, so that there is none to audit; write it with torch, or with jax.numpy, whose "
    "functions have the same names"
)
#: Called at every evaluation of a loss, for whoever shows how far an audit is.
watched: list[Callable[[], object]] = []

_OURS = str(Path(__file__).parents[1])


class LossError(ValueError):
    """The audited loss raised. `trace` is its traceback without the frames of gradlab in front.

    >>> def loss(log_probs, ref_log_probs):
    ...     return (log_probs @ ref_log_probs).sum()
    >>> try:
    ...     gl.audit(loss)
    ... except gl.audit.LossError as error:
    ...     print(isinstance(error, ValueError))
    True
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message, trace)
        self.trace = trace

    def __str__(self) -> str:
        return str(self.args[0])

    @classmethod
    def of(cls, subject: Subject, error: Exception) -> LossError:
        """The error of a subject, in one line and as a traceback."""
        frames = traceback.extract_tb(error.__traceback__)
        while frames and frames[0].filename.startswith(_OURS):
            del frames[0]
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        summary = [*str(error).strip().splitlines(), ""][0]
        trace = "".join([*lines, *traceback.format_exception_only(error)])
        return cls(f"{subject.name} raised {type(error).__name__}: {summary}{where}", trace)


def evaluate(subject: Subject, batch: Batch) -> Tensor:
    """`subject.loss(batch)`, a scalar; it may lack a gradient, which is a finding and no error.

    Raises `LossError` when the loss raises, and `ValueError` when it does not return a scalar tensor of floating point or
    changes its inputs in place.
    """
    for watch in watched:
        watch()
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    versions = {name: tensor._version for name, tensor in tensors.items()}
    try:
        with torch.enable_grad():
            loss = subject.loss(batch)
    except Exception as error:
        raise LossError.of(subject, error) from error
    changed = [name for name, tensor in tensors.items() if tensor._version != versions[name]]
    if changed:
        raise ValueError(
            f"{subject.name} changes its input {', '.join(changed)} in place, so whatever reads it next gets other numbers and "
            "no gradient can be trusted; work on a copy (x = x - y instead of x -= y)"
        )
    if type(loss).__module__ == "numpy":
        raise ValueError(f"{subject.name} {IN_NUMPY}")
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{subject.name} is not differentiable: it returned {type(loss).__name__}, not a tensor; leave out .item(), float() "
            "and .numpy()"
        )
    if loss.numel() != 1:
        raise ValueError(f"{subject.name} must return a scalar loss, got shape {list(loss.shape)}; reduce it over the batch")
    if not loss.is_floating_point():
        raise ValueError(f"{subject.name} is not differentiable: it returned {loss.dtype}, not floating-point numbers")
    return loss.reshape(())


def loss_gradient(subject: Subject, batch: Batch, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the loss with respect to `leaf`, zero where none reaches it, and the value of the loss."""
    loss = evaluate(subject, batch)
    if not loss.requires_grad:
        return torch.zeros_like(leaf), loss
    try:
        (derivative,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    except RuntimeError as error:
        raise LossError.of(subject, error) from error
    return torch.zeros_like(leaf) if derivative is None else derivative, loss.detach()
