"""liger-kernel: the k3 of its fused GRPO loss, for every loss type it shares with TRL."""

from __future__ import annotations

import inspect
from importlib.metadata import version

from torch import Tensor

from gradlab.audit.adapters import grpo as grpo_types
from gradlab.audit.batch import Batch, Subject

PACKAGE = "liger_kernel"
INSTALL = "pip install liger-kernel==0.8.5"

#: Loss types that refuse sequence-level ratios.
TOKEN_ONLY = ("cispo", "sapo", "vespo")


def subjects() -> list[Subject]:
    """Loss types × correction of the KL; `dapo` also in the limit of a large batch. liger-kernel ≥ 0.8."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    shipped, function = version("liger-kernel"), "liger_kernel.chunked_loss.grpo_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn"
    source = inspect.getsource(LigerFusedLinearGRPOFunction.ppo_loss_fn)
    return list(grpo_types.configurations("liger", grpo, "liger_kernel", shipped, function, source, TOKEN_ONLY))


def grpo(
    batch: Batch,
    *,
    loss_type: str,
    use_bias_correction_kl: bool,
    importance_sampling_level: str,
    large_batch: bool = False,
) -> Tensor:
    """`LigerFusedLinearGRPOFunction.ppo_loss_fn` with `beta=1`: a scalar.

    `max_completion_length`, the constant that `dr_grpo` divides by, is 1. `num_items_in_batch`, which `dapo`, `cispo` and
    `vespo` divide by, is left out, which means the tokens of this batch; with `large_batch` it is one per response, a constant
    in proportion to what it tends to as batches grow.
    """
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    loss: Tensor = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        per_token_logps=batch.log_prob,
        attention_mask=batch.mask,
        advantages=batch.response_advantages,
        full_attention_mask=batch.mask,
        ref_per_token_logps=batch.reference_log_prob,
        old_per_token_logps=batch.behaviour_log_prob,
        beta=1.0,
        loss_type=loss_type,
        max_completion_length=1,
        importance_sampling_level=importance_sampling_level,
        use_bias_correction_kl=use_bias_correction_kl,
        num_items_in_batch=len(batch.mask) if large_batch else None,
    )[0]
    return loss
