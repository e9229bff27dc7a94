"""verl: every KL penalty as a loss under every aggregation, the whole actor loss, and the KL in the reward with its chain."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from gradlab.audit.batch import Batch, Subject

PACKAGE = "verl"
INSTALL = (
    "pip install tensordict ray omegaconf codetiming torchdata peft datasets orjson cachetools uvicorn fastapi "
    "&& pip install --no-deps verl==0.9.1"
)

PENALTIES = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
#: Other names of the same penalties.
ALIASES = ("kl", "mse", "low_var_kl")
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
#: What the whole actor loss is audited with: its defaults, and what its documentation recommends instead.
WHOLE = (("low_var_kl", "token-mean"), ("k2", "seq-mean-token-sum"), ("k3+", "seq-mean-token-sum"))
#: Penalty in the reward, advantage estimator, whether GRPO divides by the group's standard deviation, aggregation.
REWARDS = (
    ("kl", "rloo", False, "token-mean large-batch"),
    ("kl", "rloo", False, "seq-mean-token-sum"),
    ("kl", "rloo", False, "token-mean"),
    ("low_var_kl", "rloo", False, "seq-mean-token-sum"),
    ("kl", "grpo", False, "seq-mean-token-sum"),
    ("kl", "grpo", True, "seq-mean-token-sum"),
    ("kl", "grpo", True, "token-mean"),
    ("kl", "reinforce_plus_plus", False, "seq-mean-token-sum"),
    ("kl", "reinforce_plus_plus", False, "token-mean"),
)


def subjects() -> list[Subject]:
    """Penalties × aggregations, aliases, the whole actor loss, and chains from the reward. verl ≥ 0.9."""
    shipped = version("verl")
    found = []
    function = "verl.trainer.ppo.core_algos.kl_penalty, agg_loss"
    for penalty in PENALTIES:
        for aggregation in AGGREGATIONS:
            options: dict[str, Any] = {"kl_penalty": penalty, "loss_agg_mode": aggregation}
            found.append(
                Subject(f"verl loss {penalty} {aggregation}", partial(as_loss, **options), "verl", shipped, function, options)
            )
        options = {"kl_penalty": penalty, "loss_agg_mode": "token-mean", "large_batch": True}
        name = f"verl loss {penalty} token-mean large-batch"
        found.append(Subject(name, partial(as_loss, **options), "verl", shipped, function, options))
    for penalty in ALIASES:
        options = {"kl_penalty": penalty, "loss_agg_mode": "seq-mean-token-sum"}
        name = f"verl loss {penalty} seq-mean-token-sum"
        found.append(Subject(name, partial(as_loss, **options), "verl", shipped, function, options))
    for penalty, aggregation in WHOLE:
        options = {"kl_loss_type": penalty, "loss_agg_mode": aggregation}
        name = f"verl actor {penalty} {aggregation}"
        found.append(
            Subject(name, partial(whole_loss, **options), "verl", shipped, "verl.workers.utils.losses.ppo_loss", options)
        )
    function = "verl.trainer.ppo.ray_trainer.apply_kl_penalty, compute_advantage; core_algos.compute_policy_loss_vanilla"
    for penalty, estimator, divided, aggregation in REWARDS:
        mode, _, large = aggregation.partition(" ")
        options = {
            "kl_penalty": penalty,
            "adv_estimator": estimator,
            "norm_adv_by_std_in_grpo": divided,
            "loss_agg_mode": mode,
            **({"large_batch": True} if large else {}),
        }
        name = f"verl reward {penalty} {estimator}{'-std' if divided else ''} {aggregation}"
        found.append(Subject(name, partial(in_reward, **options), "verl", shipped, function, options, group=2))
    return found


def as_loss(batch: Batch, *, kl_penalty: str, loss_agg_mode: str, large_batch: bool = False) -> Tensor:
    """`kl_penalty` of every token, aggregated by `agg_loss`: a scalar.

    `batch_num_tokens`, which `token-mean` divides by, is the number of tokens of the global batch: those of this batch, or
    with `large_batch` one per response, a constant in proportion to what it tends to as batches grow.
    """
    from verl.trainer.ppo import core_algos

    values = core_algos.kl_penalty(batch.log_prob, batch.reference_log_prob, kl_penalty)
    tokens = len(batch.mask) if large_batch else None
    loss: Tensor = core_algos.agg_loss(values, batch.mask, loss_agg_mode, batch_num_tokens=tokens)
    return loss


def whole_loss(batch: Batch, *, kl_loss_type: str, loss_agg_mode: str) -> Tensor:
    """`ppo_loss`, the actor's whole loss, with `use_kl_loss` and `kl_loss_coef=1`: a scalar."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.utils.losses import ppo_loss

    size, prompt, row_mask = len(batch.tokens), torch.zeros(len(batch.tokens), 1, dtype=torch.long), batch.mask.long()
    columns = {
        "prompts": prompt,
        "responses": batch.tokens,
        "attention_mask": torch.cat([prompt + 1, row_mask], -1),
        "response_mask": row_mask,
        "old_log_probs": batch.behaviour_log_prob,
        "ref_log_prob": batch.reference_log_prob,
        "advantages": batch.advantages,
    }
    data = TensorDict(columns, batch_size=[size])
    for name, value in (("dp_size", 1), ("batch_num_tokens", None), ("global_batch_size", None)):
        tensordict_utils.assign_non_tensor_data(data, name, value)
    # The model's output has no padding, and one entry more for the prompt: position t answers for token t + 1.
    rows = [torch.cat([row[: int(n)], row.new_zeros(1)]) for row, n in zip(batch.log_prob, batch.lengths, strict=True)]
    config = _actor(loss_agg_mode, use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type=kl_loss_type)
    loss: Tensor = ppo_loss(config, {"log_probs": torch.cat(rows)}, data)[0]
    return loss


def in_reward(
    batch: Batch,
    *,
    kl_penalty: str,
    adv_estimator: str,
    norm_adv_by_std_in_grpo: bool,
    loss_agg_mode: str,
    large_batch: bool = False,
) -> Tensor:
    """The penalty subtracted from the reward of a group of responses, their advantages, and the clipped policy loss.

    `large_batch` as in `as_loss`.
    """
    import numpy as np
    from verl import DataProto
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo import core_algos, ray_trainer

    columns = {
        "response_mask": batch.mask,
        "token_level_scores": batch.token_rewards,
        "old_log_probs": batch.behaviour_log_prob,
        "ref_log_prob": batch.reference_log_prob,
    }
    one_prompt = np.array(["prompt"] * len(batch.tokens), dtype=object)
    data = DataProto.from_dict(tensors=columns, non_tensors={"uid": one_prompt})
    data, _ = ray_trainer.apply_kl_penalty(data, core_algos.FixedKLController(1.0), kl_penalty)
    data = ray_trainer.compute_advantage(
        data, adv_estimator, norm_adv_by_std_in_grpo=norm_adv_by_std_in_grpo, config=AlgoConfig(adv_estimator=adv_estimator)
    )
    config = _actor(loss_agg_mode)
    config.global_batch_info["batch_num_tokens"] = len(batch.mask) if large_batch else None
    loss: Tensor = core_algos.compute_policy_loss_vanilla(
        batch.behaviour_log_prob, batch.log_prob, data.batch["advantages"], batch.mask, loss_agg_mode, config
    )[0]
    return loss


def _actor(loss_agg_mode: str, **options: Any) -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=loss_agg_mode, **options)
