"""Trinity-RFT: every registered KL function as a loss, under every aggregation, and k1 in the reward with its chain."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

from torch import Tensor

from gradlab.audit.batch import Batch, Subject

PACKAGE = "trinity"
INSTALL = "pip install ray omegaconf tensordict codetiming transformers orjson && pip install --no-deps trinity-rft==0.6.0 verl==0.9.1"

FUNCTIONS = ("k1", "k2", "k3", "low_var_kl", "abs", "corrected_k3", "none")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
#: KL function in the reward, advantage function, aggregation of the policy loss.
REWARDS = (
    ("k1", "rloo", "seq-mean-token-sum"),
    ("k1", "rloo", "token-mean"),
    ("k3", "rloo", "seq-mean-token-sum"),
    ("k1", "grpo_verl", "seq-mean-token-sum"),
    ("k1", "reinforceplusplus", "seq-mean-token-sum"),
)


def subjects() -> list[Subject]:
    """KL functions × aggregations, and chains from the reward. Trinity-RFT ≥ 0.6."""
    shipped, found = version("trinity-rft"), []
    for name in FUNCTIONS:
        # Without a KL there is nothing to aggregate.
        for aggregation in AGGREGATIONS if name != "none" else AGGREGATIONS[:1]:
            options: dict[str, Any] = {"kl_loss_fn": name, "loss_agg_mode": aggregation}
            function = "trinity.algorithm.kl_fn.KL_FN, KLFn.calculate_kl_loss"
            label = f"trinity {name} {aggregation}"
            found.append(Subject(label, partial(as_loss, **options), "trinity", shipped, function, options))
    function = (
        "trinity.algorithm.kl_fn.KLFn.apply_kl_penalty_to_reward; advantage_fn.ADVANTAGE_FN; policy_loss_fn.POLICY_LOSS_FN"
    )
    for name, advantage, aggregation in REWARDS:
        options = {"kl_penalty_fn": name, "advantage_fn": advantage, "policy_loss_fn": "ppo", "loss_agg_mode": aggregation}
        label = f"trinity reward {name} {advantage} {aggregation}"
        found.append(Subject(label, partial(in_reward, **options), "trinity", shipped, function, options, group=2))
    return found


def as_loss(batch: Batch, *, kl_loss_fn: str, loss_agg_mode: str) -> Tensor:
    """`calculate_kl_loss` of a registered function with `kl_coef=1`: a scalar."""
    from trinity.algorithm.kl_fn import KL_FN

    kl = KL_FN.get(kl_loss_fn)(kl_coef=1.0)
    loss: Tensor = kl.calculate_kl_loss(
        batch.log_prob, batch.reference_log_prob, batch.mask, loss_agg_mode, old_logprob=batch.behaviour_log_prob
    )[0]
    # `none` is a constant: there is something to differentiate only in the policy loss that it is added to.
    return loss + 0.0 * batch.log_prob.sum()


def in_reward(batch: Batch, *, kl_penalty_fn: str, advantage_fn: str, policy_loss_fn: str, loss_agg_mode: str) -> Tensor:
    """The penalty subtracted from the reward of a group of responses, their advantages (float32 inside), the clipped policy loss."""
    import numpy as np
    from trinity.algorithm import ADVANTAGE_FN, KL_FN, POLICY_LOSS_FN
    from verl import DataProto

    columns = {
        "responses": batch.tokens,
        "attention_mask": batch.mask,
        "response_mask": batch.mask,
        "token_level_scores": batch.token_rewards,
        "old_log_probs": batch.behaviour_log_prob,
        "ref_log_prob": batch.reference_log_prob,
    }
    one_prompt = np.array(["prompt"] * len(batch.tokens), dtype=object)
    data = DataProto.from_dict(tensors=columns, non_tensors={"uid": one_prompt})
    data, _ = KL_FN.get(kl_penalty_fn)(kl_coef=1.0).apply_kl_penalty_to_reward(data)
    advantages = ADVANTAGE_FN.get(advantage_fn)
    data, _ = advantages(**advantages.default_args())(data)
    chosen = POLICY_LOSS_FN.get(policy_loss_fn)
    policy_loss = chosen(**{**chosen.default_args(), "loss_agg_mode": loss_agg_mode})
    loss: Tensor = policy_loss(
        batch.log_prob,
        old_logprob=batch.behaviour_log_prob,
        action_mask=batch.mask,
        advantages=data.batch["advantages"],
    )[0]
    return loss
