"""torchrl: the k3 to the reference of its GRPO-like losses, and its two distillation losses."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gradlab.audit.batch import Batch, Subject

PACKAGE = "torchrl"
INSTALL = "pip install torchrl==0.14.1"

LOSSES = ("GRPOLoss", "DAPO", "CISPOLoss")


def subjects() -> list[Subject]:
    """`kl_to_ref_coeff` of every GRPO-like loss; distillation by direction and normaliser. torchrl ≥ 0.14 with tensordict."""
    from torchrl.objectives import llm

    shipped = version("torchrl")
    found = []
    for name in LOSSES:
        if not hasattr(llm, name):
            continue  # an older version
        options: dict[str, Any] = {"loss": name}
        function = f"torchrl.objectives.llm.{name}"
        found.append(Subject(f"torchrl {name} kl_to_ref", partial(kl_to_ref, **options), "torchrl", shipped, function, options))
    if hasattr(llm, "DistillationLoss"):
        for direction in ("reverse", "forward"):
            for normalised in (True, False):
                options = {"kl_direction": direction, "normalize_by_seq_length": normalised}
                label = f"torchrl distillation {direction} {'mean' if normalised else 'sum'}"
                function = "torchrl.objectives.llm.DistillationLoss"
                found.append(Subject(label, partial(distillation, **options), "torchrl", shipped, function, options))
    return found


def kl_to_ref(batch: Batch, *, loss: str) -> Tensor:
    """The whole loss with `kl_to_ref_coeff=1`, of which advantages of 0 leave the regulariser: a scalar."""
    from tensordict import TensorDict
    from torchrl.objectives import llm

    module = getattr(llm, loss)(None, entropy_bonus=False, kl_to_ref_coeff=1.0)
    mask = batch.mask.bool()
    # The actor is the one part that is not the loss's own: what it would answer is in the batch.
    module._get_cur_log_prob = lambda data: (batch.log_prob, SimpleNamespace(mask=mask), False)
    data = {
        ("tokens", "full"): batch.tokens,
        "advantage": batch.advantages[..., None],
        ("log_probs", "full"): batch.behaviour_log_prob,
        ("next", "ref_log_probs", "full"): batch.reference_log_prob,
    }
    out = module(TensorDict(data, batch_size=[len(batch.tokens)]))
    total: Tensor = out.loss_objective + out.loss_kl_to_ref
    return total


def distillation(batch: Batch, *, kl_direction: str, normalize_by_seq_length: bool) -> Tensor:
    """`DistillationLoss` of the policy (student) towards the reference (teacher): a scalar."""
    from tensordict import TensorDict, lazy_stack
    from torchrl.objectives.llm import DistillationLoss

    def rows(**columns: Tensor) -> list[Any]:
        # Without padding, as the package has it; the conversation is read only where masks are missing.
        lengths, no_history = batch.lengths.tolist(), torch.zeros(1)
        return [TensorDict({"history": no_history, **{k: v[i, :n] for k, v in columns.items()}}) for i, n in enumerate(lengths)]

    mask = batch.mask.bool()
    student = lazy_stack(rows(log_prob=batch.log_prob))
    module = DistillationLoss(
        lambda data: student, tokenizer=object(), kl_direction=kl_direction, normalize_by_seq_length=normalize_by_seq_length
    )
    module.set_keys(log_probs="log_prob", teacher_log_prob="teacher", history="history")
    data = rows(teacher=batch.reference_log_prob, assistant=mask, attention=mask)
    for row in data:
        for kind in ("assistant", "attention"):
            row["masks", f"all_{kind}_mask"] = row.pop(kind)
    loss: Tensor = module(lazy_stack(data)).loss_distill
    return loss
