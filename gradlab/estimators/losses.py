"""Losses of the whole objective that have a name, each with its source and with what it is declared to descend.

Coefficients and bounds are those of the sources, or of their code where the paper gives none; `dataclasses.replace` changes them. What
is declared holds on-policy for responses of one length, up to a positive factor, and is tested against exact gradients: `utility` stands
for `gl.utility` of the loss's advantage, which for a binary reward is what the reward half ascends.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from typing import Any

from gradlab._common.registry import Registry
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.policy_loss import PolicyLoss

#: Responses to one prompt where the source has many.
GROUP = 8

_K1, _K1_RETURN = Estimator("k1"), Estimator("k1", "reward", "return")
_K1_TO_GO, _K2, _K3 = Estimator("k1", "reward", "to_go"), Estimator("k2"), Estimator("k3")
_K3_WEIGHTED = Estimator("k3", weight="token", differentiate_weight=True)
_REWARD, _UTILITY = {"reward": 1.0}, {"utility": 1.0}
_GRPO: dict[str, Any] = {"ratio": "token", "clip": 0.2, "normalise": "mean"}
_P, _SHAZ = "arXiv 2510.01555", "Shao et al., arXiv 2402.03300"


def _loss(
    target: Mapping[str, float] | None, source: str, advantage: str, group: int | None = GROUP, **fields: Any
) -> PolicyLoss:
    return PolicyLoss(advantage, group, target=target, source=source, **fields)


def _kl(of_reward: Mapping[str, float], beta: float, divergence: str = "reverse_kl") -> dict[str, float]:
    return {**of_reward, divergence: beta}


_OWN = {
    "reinforce": _loss(_REWARD, "Williams (1992)", "reward", None),
    "reinforce-kl": _loss(
        _kl(_REWARD, 0.05), "Williams (1992); KL in the reward, arXiv 2203.02155", "reward", None, regulariser=_K1, beta=0.05,
        combine="before",
    ),
    "rloo": _loss(
        _kl(_REWARD, 0.05), "Ahmadian et al., arXiv 2402.14740; coefficient of TRL's RLOO", "leave_one_out", 4, regulariser=_K1, beta=0.05,
        combine="before",
    ),
    "ppo": _loss(
        _kl(_REWARD, 0.02), "PPO with KL in the reward: Schulman et al., arXiv 1707.06347; Ouyang et al., arXiv 2203.02155; no critic",
        "reward", None, ratio="token", clip=0.2, credit="to_go", regulariser=_K1, beta=0.02, combine="before",
    ),
    "ppo-dual-clip": _loss(
        _REWARD, "Ye et al., arXiv 1912.09729", "reward", None, ratio="token", clip=0.2, dual_clip=3.0, credit="to_go"
    ),
    "grpo": _loss(
        _kl(_UTILITY, 0.04, "forward_kl_frozen_prefix"), _SHAZ, "group_std", **_GRPO, regulariser=_K3, beta=0.04
    ),
    "grpo-sample-std": _loss(
        _kl(_UTILITY, 0.04, "forward_kl_frozen_prefix"), f"{_SHAZ}, as TRL computes it (sample std, ε = 1e-4)", "group_std", **_GRPO,
        regulariser=_K3, beta=0.04, std="sample", epsilon=1e-4,
    ),
    "grpo-k2": _loss(
        _kl(_UTILITY, 0.04, "reverse_kl_frozen_prefix"), f"{_P}, k2 in place of k3", "group_std", **_GRPO, regulariser=_K2, beta=0.04
    ),
    "grpo-combined": _loss(
        _kl(_UTILITY, 0.04), f"{_P}, combined: in the advantage, after the group's mean and std", "group_std", **_GRPO,
        regulariser=_K1_RETURN, beta=0.04, combine="after",
    ),
    "grpo-decoupled": _loss(
        _kl(_UTILITY, 0.04), f"{_P}, decoupled: a clipped head of its own", "group_std", **_GRPO, regulariser=_K1_RETURN, beta=0.04,
        combine="head",
    ),
    "dr-grpo": _loss(_REWARD, "Liu et al., arXiv 2503.20783", "mean", ratio="token", clip=0.2, normalise="fixed"),
    "dapo": _loss(
        _UTILITY, "Yu et al., arXiv 2503.14476, without dynamic sampling", "group_std", ratio="token", clip=(0.2, 0.28),
        normalise="token_mean",
    ),
    "gspo": _loss(
        _UTILITY, "Zheng et al., arXiv 2507.18071", "group_std", ratio="geometric", clip=(3e-4, 4e-4), normalise="mean"
    ),
    "gmpo": _loss(
        _UTILITY, "Zhao et al., arXiv 2507.20673, log-ratios within ±0.4", "group_std", ratio="geometric",
        clip=(1 - exp(-0.4), exp(0.4) - 1),
        clip_form="geometric", normalise="mean",
    ),
    "cispo": _loss(
        _UTILITY, "MiniMax-M1, arXiv 2506.13585, no lower bound; upper one of ScaleRL, arXiv 2510.13786", "group_std", ratio="token",
        clip=(1.0, 4.0), clip_form="detached", normalise="token_mean",
    ),
    "reinforce++": _loss(
        _kl(_REWARD, 0.01), "Hu et al., arXiv 2501.03262", "batch_std", None, ratio="token", clip=0.2, credit="to_go",
        regulariser=_K1, beta=0.01,
        combine="before", normalise="token_mean",
    ),
    "reinforce++-baseline": _loss(
        None, "Hu et al., arXiv 2501.03262; k2 in the loss", "mean_batch_std", ratio="token", clip=0.2, regulariser=_K2, beta=0.01,
        normalise="token_mean",
    ),
    "pkpo": _loss({"pass_at_k": 1.0}, "Walder & Karkhanis, arXiv 2505.15201", "pass_at_k", k=4),
    "tis": _loss(
        _UTILITY, "Yao et al., truncated importance sampling (2025); verl's rollout_is, 2", "group_std", **_GRPO, correction="token",
        correction_truncate=2.0,
    ),
    "tis-sequence": _loss(
        _UTILITY, "verl's rollout_is on sequences", "group_std", **_GRPO, correction="sequence", correction_truncate=2.0
    ),
    "icepop": _loss(
        _UTILITY, "Ling team, arXiv 2510.18855, (0.5, 5)", "group_std", **_GRPO, correction="token", correction_mask=(0.5, 5.0)
    ),
    "mis": _loss(
        _UTILITY, "Liu et al., masked importance sampling of sequences (2025), (0, 2)", "group_std", **_GRPO, correction="sequence",
        correction_mask=(0.0, 2.0),
    ),
    "bypass": _loss(_UTILITY, "verl's bypass: the clip is on π/μ", "group_std", **_GRPO, bypass=True),
    "deepseek-v3.2": _loss(
        _kl(_UTILITY, 0.01, "reverse_kl_frozen_prefix"), "DeepSeek-AI, arXiv 2512.02556 §3.1: weighted k3, mask of off-policy sequences",
        "group_std", **_GRPO, regulariser=_K3_WEIGHTED, beta=0.01, negative_mask=0.1,
    ),
}  # fmt: skip

#: Names → losses of the whole objective, in the order of tables; each has its `source` and, declared, its `target`.
LOSSES: Registry[PolicyLoss] = Registry("loss", _OWN)
