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
    for name in ("per-step", "sum"):
        options = {"trajectory_return": None if name == "per-step" else name}
        function = "torchrl.envs.llm.transforms.KLComputation; torchrl.objectives.llm.MCAdvantage, GRPOLoss"
        label = f"torchrl reward k1 MCAdvantage {name}"
        found.append(Subject(label, partial(in_reward, **options), "torchrl", shipped, function, options, group=2))
    if hasattr(llm, "DistillationLoss"):
        for direction in ("reverse", "forward"):
            for normalised in (True, False):
                options = {"kl_direction": direction, "normalize_by_seq_length": normalised}
                label = f"torchrl distillation {direction} {'mean' if normalised else 'sum'}"
                function = "torchrl.objectives.llm.DistillationLoss"
                found.append(Subject(label, partial(distillation, **options), "torchrl", shipped, function, options))
    return found


def kl_to_ref(batch: Batch, *, loss: str) -> Tensor:
    """The whole loss with `kl_to_ref_coeff=1`: a scalar."""
    reference = {("next", "ref_log_probs", "full"): batch.reference_log_prob}
    out = _loss(batch, loss, batch.advantages, reference, kl_to_ref_coeff=1.0)
    total: Tensor = out.loss_objective + out.loss_kl_to_ref
    return total


def in_reward(batch: Batch, *, trajectory_return: str | None) -> Tensor:
    """`KLComputation` subtracts k1 from every token's reward, `MCAdvantage` standardises over the group, `GRPOLoss`: a scalar."""
    from tensordict import TensorDict, lazy_stack
    from torchrl.envs.llm.transforms.kl import KLComputation
    from torchrl.objectives.llm import MCAdvantage

    group = MCAdvantage(grpo_size=len(batch.tokens), prompt_key="prompt", trajectory_return=trajectory_return)
    done = torch.ones(1, 1, dtype=torch.bool)
    scored = None
    for i, n in enumerate(batch.lengths.tolist()):
        row = TensorDict(
            {
                ("log_probs", "full"): batch.behaviour_log_prob[i, :n],
                ("ref_log_probs", "full"): batch.reference_log_prob[i, :n],
                "reward": batch.token_rewards[i, :n, None],
            }
        )
        # A response is one step of the environment, with a reward for every token.
        answered = KLComputation()(lazy_stack([row]))
        rewards = answered.get("reward", as_list=True)
        step = TensorDict({"prompt": torch.zeros(1), "next": {"reward": torch.stack(list(rewards)), "done": done}}, [1])
        scored = group.inv(step)
    assert scored is not None
    advantages = torch.zeros_like(batch.advantages)
    for i, row in enumerate(scored.get("advantage", as_list=True)):
        advantages[i, : len(row)] = row[:, 0]
    loss: Tensor = _loss(batch, "GRPOLoss", advantages, {}).loss_objective
    return loss


def _loss(batch: Batch, loss: str, advantages: Tensor, more: dict[Any, Tensor], **options: Any) -> Any:
    from tensordict import TensorDict
    from torchrl.objectives import llm

    module = getattr(llm, loss)(None, entropy_bonus=False, **options)
    mask = batch.mask.bool()
    # The actor is the one part that is not the loss's own: what it would answer is in the batch.
    module._get_cur_log_prob = lambda data: (batch.log_prob, SimpleNamespace(mask=mask), False)
    data = {
        ("tokens", "full"): batch.tokens,
        "advantage": advantages[..., None],
        ("log_probs", "full"): batch.behaviour_log_prob,
        **more,
    }
    return module(TensorDict(data, batch_size=[len(batch.tokens)]))


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
