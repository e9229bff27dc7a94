"""Named losses against the frameworks' own functions, where they are installed: the gradient of a sampled batch, in logits."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import worlds
from test_policy_loss import world_of

import gradlab as gl
from gradlab.estimators.policy_loss import batch_constants
from gradlab.moments import gradients

GROUP, RESPONSES = 4, 24


def sample(seed: int = 0) -> gl.Rollout:
    """Responses of unequal length to one prompt, off-policy; the mean over tokens is that of this batch."""
    world, _, _ = world_of("eos", True, seed=2)
    world = dataclasses.replace(world, old=None)
    rollout = gl.Rollout.from_sampler(world, RESPONSES, np.random.default_rng(seed))
    assert 0 < rollout.rewards.mean() < 1
    assert len(set(rollout.lengths.tolist())) > 1
    return dataclasses.replace(rollout, expected_length=float(rollout.lengths.mean()))


def ours(loss: gl.PolicyLoss, rollout: gl.Rollout) -> torch.Tensor:
    """The gradient of the batch in closed form."""
    return gradients([loss], rollout).mean(rollout.weight)[0]


def theirs(scalar: Any, rollout: gl.Rollout) -> torch.Tensor:
    """The gradient of a framework's scalar: a function of the policy's log-probabilities of a batch."""
    table = rollout.table.detach().clone().requires_grad_(True)
    log_prob = torch.where(rollout.mask, table.log_softmax(-1)[rollout.contexts, rollout.tokens], 0.0)
    (found,) = torch.autograd.grad(scalar(log_prob), table)
    return found.flatten()


def same(loss: gl.PolicyLoss, rollout: gl.Rollout, scalar: Any) -> None:
    # Their ε of 1e-6 and 1e-8 in denominators, and sums in another order.
    worlds.assert_same(ours(loss, rollout), theirs(scalar, rollout), tolerance=1e-6)


# ------------------------------------------------------------------------------------------------- verl

VERL: dict[str, tuple[gl.PolicyLoss, str, str, str, tuple[float, float]]] = {}
_SAMPLE = {"std": "sample", "epsilon": 1e-6, "group": GROUP, "regulariser": None, "beta": 0.0}
for _name, _policy_loss, _aggregation, _fields, _clip in (
    ("grpo", "vanilla", "seq-mean-token-mean", {**_SAMPLE, "dual_clip": 3.0}, (0.2, 0.2)),
    ("dapo", "vanilla", "token-mean", {**_SAMPLE, "dual_clip": 3.0}, (0.2, 0.28)),
    ("gspo", "gspo", "seq-mean-token-mean", _SAMPLE, (3e-4, 4e-4)),
    ("gmpo", "geo_mean", "token-mean", _SAMPLE, (0.4, 0.4)),
    ("cispo", "cispo", "token-mean", {**_SAMPLE, "clip": (0.2, 0.3)}, (0.2, 0.3)),
):
    VERL[_name] = (dataclasses.replace(gl.LOSSES[_name], **_fields), _policy_loss, _aggregation, "grpo", _clip)
VERL["rloo, clipped"] = (
    gl.PolicyLoss("leave_one_out", GROUP, "token", 0.2, dual_clip=3.0, normalise="token_mean"), "vanilla", "token-mean", "rloo", (0.2, 0.2),
)  # fmt: skip


def verl_loss(
    rollout: gl.Rollout, policy_loss: str, aggregation: str, advantages: torch.Tensor, clip: tuple[float, float]
) -> Any:
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=aggregation,
        clip_ratio=clip[0], clip_ratio_low=clip[0], clip_ratio_high=clip[1],
    )  # fmt: skip
    function = core_algos.POLICY_LOSS_REGISTRY[policy_loss]
    old = rollout.behaviour_log_prob

    def scalar(log_prob: torch.Tensor) -> torch.Tensor:
        return function(old, log_prob, advantages, rollout.mask_float, aggregation, config)[0]

    return scalar


def token_scores(rollout: gl.Rollout) -> torch.Tensor:
    """The reward at the last token, `[n, t]`."""
    last = torch.arange(rollout.mask.shape[1]) == rollout.mask.sum(-1, keepdim=True) - 1
    return torch.where(last, rollout.rewards[:, None], 0.0)


@pytest.mark.parametrize("name", VERL)
def test_verl(name):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    loss, policy_loss, aggregation, estimator, clip = VERL[name]
    rollout = sample()
    index = np.repeat(np.arange(RESPONSES // GROUP), GROUP)
    advantages = core_algos.ADV_ESTIMATOR_REGISTRY[estimator](token_scores(rollout), rollout.mask_float, index=index)[0]
    same(loss, rollout, verl_loss(rollout, policy_loss, aggregation, advantages, clip))
    free = dataclasses.replace(loss, clip=None, dual_clip=None, clip_form="min")
    assert float((ours(free, rollout) - ours(loss, rollout)).norm()) > 1e-2 * float(ours(loss, rollout).norm())  # not idle


@pytest.mark.parametrize("name", ["reinforce++", "reinforce++-baseline"])
def test_verl_whitens_over_the_batch(name):
    """verl's standard deviation is a sample's, over tokens; as constants of the batch the loss takes any."""
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    rollout = sample()
    beta = 0.3 if name == "reinforce++" else 0.0
    scores = token_scores(rollout) - beta * (rollout.behaviour_log_prob - rollout.reference_log_prob) * rollout.mask_float
    key = name.replace("++", "_plus_plus").replace("-", "_")
    options = {"index": np.repeat(np.arange(RESPONSES // GROUP), GROUP), "config": SimpleNamespace(gamma=1.0)}
    advantages = core_algos.ADV_ESTIMATOR_REGISTRY[key](scores, rollout.mask_float, **options)[0]
    # On-policy, as the KL of verl's reward is taken at the policy that drew.
    rollout = dataclasses.replace(rollout, table=rollout.behaviour_table)
    loss = gl.LOSSES[name]
    if name == "reinforce++":
        loss = dataclasses.replace(loss, beta=beta)
        mean, std = batch_constants(loss, rollout)
    else:
        loss = dataclasses.replace(loss, group=GROUP, regulariser=None, beta=0.0)
        values = rollout.rewards.view(-1, GROUP)
        centred = (values - values.mean(-1, keepdim=True)).flatten()[:, None].expand(rollout.mask.shape)[rollout.mask]
        mean, std = float(centred.mean()), float(centred.std(correction=0))
    tokens = float(rollout.mask.sum())
    loss = dataclasses.replace(loss, constants=(mean, std * math.sqrt(tokens / (tokens - 1))))
    same(loss, rollout, verl_loss(rollout, "vanilla", "token-mean", advantages, (0.2, 0.2)))


# ------------------------------------------------------------------------------------------------- TRL

TRL = {
    "grpo": {"normalise": "mean"},
    "dapo": {"normalise": "token_mean"},
    "dr_grpo": {"normalise": "sum"},  # the adapter's constant is 1
    "corrected": {"normalise": "mean", "regulariser": gl.Estimator("k3", weight="token", differentiate_weight=True)},
    "sequence": {"normalise": "mean", "ratio": "geometric"},
}


@pytest.mark.parametrize("name", TRL)
def test_trl(name):
    pytest.importorskip("trl")
    from gradlab.audit.adapters import trl

    rollout = sample()
    rewards = rollout.rewards.view(-1, GROUP)
    advantages = ((rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)).flatten()
    loss = dataclasses.replace(gl.LOSSES["grpo-sample-std"], group=GROUP, beta=1.0, **TRL[name])

    def scalar(log_prob: torch.Tensor) -> torch.Tensor:
        batch: Any = SimpleNamespace(
            log_prob=log_prob, response_advantages=advantages, behaviour_log_prob=rollout.behaviour_log_prob, tokens=rollout.tokens,
            reference_log_prob=rollout.reference_log_prob, mask=rollout.mask_float,
        )  # fmt: skip
        kind = name if name in ("dapo", "dr_grpo") else "grpo"
        level = "sequence" if name == "sequence" else "token"
        return trl.grpo(batch, loss_type=kind, use_bias_correction_kl=name == "corrected", importance_sampling_level=level)

    same(loss, rollout, scalar)
