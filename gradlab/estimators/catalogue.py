"""The catalogue: named estimators with what their expected gradient is declared to be, tested against the exact oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gradlab._common.registry import Registry
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.losses import LOSSES
from gradlab.estimators.policy_loss import PolicyLoss

#: An expected gradient written as a combination of target gradients, e.g. `{"reverse_kl": 1, "forward_kl": -1}`.
Combination = dict[str, float]


@dataclass(frozen=True)
class Entry:
    """A named estimator, what it descends on-policy and off-policy (`None`: no target of gradlab), and where it is from.

    `colour` is one of the user's for figures, such as `"#332288"`; without it the composition says which.
    """

    name: str
    estimator: Estimator
    on_policy: Combination | None
    off_policy: Combination | None
    source: str
    colour: str | None = None


_P = "arXiv 2510.01555"
_TANG = "Tang & Munos, arXiv 2506.09477"
_SHAH = "Shah et al., arXiv 2512.21852"
_REVERSE, _REVERSE_FROZEN = {"reverse_kl": 1.0}, {"reverse_kl_frozen_prefix": 1.0}
_FORWARD, _FORWARD_FROZEN = {"forward_kl": 1.0}, {"forward_kl_frozen_prefix": 1.0}
_ZERO = {"zero": 1.0}


def _entry(
    name: str, on: Combination | None, off: Combination | None, source: str, kernel: str, *args: Any, **kwargs: Any
) -> Entry:
    return Entry(name, Estimator(kernel, *args, **kwargs), on, off, source)


_CORRECTED: dict[str, Any] = {"differentiate_weight": True}

_OWN = {
    entry.name: entry
    for entry in (
        # In the loss, per token: what most frameworks call kl_loss.
        _entry("k1-loss", _ZERO, None, f"{_P} §5; {_TANG}", "k1"),
        _entry("k2-loss", _REVERSE_FROZEN, None, f"{_P} Theorem 5.1", "k2"),
        _entry("k3-loss", _FORWARD_FROZEN, None, "GRPO, arXiv 2402.03300", "k3"),
        _entry("abs-loss", None, None, "verl.trainer.ppo.core_algos.kl_penalty, 'abs'", "abs"),
        _entry("k3-swapped-loss", {"chi2_frozen_prefix": 1.0}, None, "k3 with the ratio upside down", "k3_swapped"),
        _entry("k3-plus", _REVERSE_FROZEN, None, "verl kl_penalty 'k3+'", "k3", "straight_through"),
        _entry("full-loss", _REVERSE_FROZEN, _REVERSE_FROZEN, "arXiv 2504.10637", "full"),
        _entry("mse-loss", {"mse_frozen_prefix": 1.0}, {"mse_frozen_prefix": 1.0}, f"{_P}, bounded alternatives", "mse"),
        _entry("mse-sampled-loss", {"mse_frozen_prefix": 1.0}, None, f"{_P}, bounded alternatives", "mse_sampled"),
        _entry("k1-loss-mean", {"inverse_length": 1.0}, None, "k1 as loss, one mean per response", "k1", normalise="mean"),
        # In the loss, whole response.
        _entry("k2-loss-sequence", _REVERSE, None, f"{_P} Theorem 5.1", "k2", credit="sequence"),
        _entry("k3-loss-sequence", _FORWARD, None, _TANG, "k3", credit="sequence"),
        # In the reward.
        _entry("k1-reward", _REVERSE_FROZEN, None, "Ouyang et al., arXiv 2203.02155, discount 0", "k1", "reward"),
        _entry("k1-reward-to-go", _REVERSE, None, f"{_P}; Ouyang et al., arXiv 2203.02155", "k1", "reward", "to_go"),
        _entry("k1-reward-return", _REVERSE, None, "TRL RLOOTrainer, before its baseline", "k1", "reward", "return"),
        _entry(
            "k1-reward-loo", _REVERSE, None, "RLOO, arXiv 2402.14740", "k1", "reward", "return",
            baseline="leave_one_out", group=4,
        ),
        _entry(
            "k1-reward-group", {"reverse_kl": 0.75}, None, "group mean of GRPO, arXiv 2402.03300", "k1", "reward", "return",
            baseline="group_mean", group=4,
        ),
        _entry("k1-reward-kl-baseline", _REVERSE, None, "−KL_t as control variate", "k1", "reward", "to_go", baseline="kl"),
        _entry(
            "k3-reward-to-go", {"reverse_kl": 1.0, "forward_kl_frozen_prefix": -1.0}, None, _SHAH, "k3", "reward", "to_go"
        ),
        _entry("k3-both", _REVERSE, None, _SHAH, "k3", "loss+reward", "to_go"),
        # Rao–Blackwell over the vocabulary.
        _entry("full-both", _REVERSE, None, "arXiv 2504.10637, complete", "full", "loss+reward", "to_go"),
        # Importance-weighted.
        _entry(
            "k3-loss-token", _REVERSE_FROZEN, _REVERSE_FROZEN, "arXiv 2512.02556 §3.1; TRL", "k3", weight="token", **_CORRECTED
        ),
        _entry("k2-loss-token-detached", _REVERSE_FROZEN, _REVERSE_FROZEN, f"{_P} Eq. 69", "k2", weight="token"),
        _entry("k2-loss-token", None, None, "NeMo-RL, slime: differentiated ρ·k2", "k2", weight="token", **_CORRECTED),
        _entry("k1-loss-prefix", _REVERSE, _REVERSE, "derived", "k1", weight="prefix", **_CORRECTED),
        _entry("k3-loss-prefix", _REVERSE, _REVERSE, "derived", "k3", weight="prefix", **_CORRECTED),
        _entry(
            "k3-loss-sequence-weight", _REVERSE, _REVERSE, "derived", "k3", "loss", "sequence", "sequence", **_CORRECTED
        ),
        _entry(
            "k1-reward-sequence-weight", _REVERSE, _REVERSE, "RPG, arXiv 2505.17508", "k1", "reward", "to_go", "sequence"
        ),
        _entry(
            "k1-reward-clipped", _REVERSE, None, "PPO, arXiv 1707.06347", "k1", "reward", "to_go", "token", clip=0.2
        ),
        _entry("full-both-prefix", _REVERSE, _REVERSE, "derived; arXiv 2504.10637", "full", "loss+reward", "to_go", "prefix"),
    )
}  # fmt: skip

#: Short names → estimators with what is declared of them, in a fixed order: the order of tables and the key of the colours.
CATALOGUE: Registry[Entry] = Registry("estimator", _OWN)


class _Estimators(Mapping[str, Estimator]):
    """The estimators of the catalogue by name."""

    def __getitem__(self, name: str) -> Estimator:
        return CATALOGUE[name].estimator

    def __iter__(self) -> Iterator[str]:
        return iter(CATALOGUE)

    def __len__(self) -> int:
        return len(CATALOGUE)


#: Short names → estimators, in the order of the catalogue.
ESTIMATORS: Mapping[str, Estimator] = _Estimators()


def name_of(estimator: Any) -> str:
    """Catalogue name of an estimator or a whole loss, the composed name of any other one, or the name of a callable."""
    composed = isinstance(estimator, Estimator | PolicyLoss)
    for names in (ESTIMATORS, LOSSES) if composed else ():
        for name, known in names.items():
            if known == estimator:
                return name
    return str(estimator.name) if composed else str(getattr(estimator, "__name__", type(estimator).__name__))
