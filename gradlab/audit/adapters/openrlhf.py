"""OpenRLHF: its KL estimators as a loss, plain and with the corrected gradient, and k1, k2, k3 in the reward (the default).

The package's `__init__` files import a cluster stack; the modules with the arithmetic are imported without them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from gradlab.audit.batch import Batch, Subject

PACKAGE = "openrlhf"
INSTALL = "pip install --no-deps openrlhf==0.11.2 && pip install ray transformers"

ESTIMATORS = ("k1", "k2", "k3")
#: Reduction in the report → whether tokens are averaged, and over the optimiser's whole, large batch or over this one.
REDUCTIONS = {
    "token-mean": {"token_level_loss": True},
    "token-mean large-batch": {"token_level_loss": True, "large_batch": True},
    "sequence-mean": {"token_level_loss": False},
}


def subjects() -> list[Subject]:
    """Estimators × `unbiased_gradient` × reduction, and the chain from the reward. OpenRLHF ≥ 0.11."""
    shipped = version("openrlhf")
    found = []
    function = "openrlhf.models.utils.compute_approx_kl, openrlhf.models.loss.aggregate_loss"
    for estimator in ESTIMATORS:
        for unbiased in (False, True):
            for reduction, arguments in REDUCTIONS.items():
                options: dict[str, Any] = {"kl_estimator": estimator, "unbiased_gradient": unbiased, **arguments}
                name = f"openrlhf loss {estimator} {'unbiased' if unbiased else 'plain'} {reduction}"
                found.append(Subject(name, partial(as_loss, **options), "openrlhf", shipped, function, options))
    function = (
        "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker.compute_advantages_and_returns; "
        "openrlhf.models.loss.PolicyLoss"
    )
    for estimator, advantage, reduction in (
        ("k1", "rloo", "token-mean large-batch"),
        ("k1", "rloo", "token-mean"),
        ("k3", "rloo", "token-mean large-batch"),
        ("k1", "group_norm", "token-mean large-batch"),
        ("k1", "reinforce_baseline", "token-mean large-batch"),
    ):
        options = {"kl_estimator": estimator, "advantage_estimator": advantage, **REDUCTIONS[reduction]}
        name = f"openrlhf reward {estimator} {advantage} {reduction}"
        found.append(Subject(name, partial(in_reward, **options), "openrlhf", shipped, function, options, group=2))
    return found


def as_loss(
    batch: Batch, *, kl_estimator: str, unbiased_gradient: bool, token_level_loss: bool, large_batch: bool = False
) -> Tensor:
    """`compute_approx_kl` of every token, reduced by `aggregate_loss`: a scalar. Float32 inside.

    `batch_num_tokens`, which a token mean divides by, is the number of tokens of the optimiser's step: those of this batch, or
    with `large_batch` one per response, a constant in proportion to what it tends to as batches grow.
    """
    utils, loss, _ = _modules()
    values = utils.compute_approx_kl(
        batch.log_prob,
        batch.reference_log_prob,
        log_probs_old=batch.behaviour_log_prob,
        kl_estimator=kl_estimator,
        unbiased_gradient=unbiased_gradient,
    )
    tokens = len(batch.mask) if large_batch else None
    total: Tensor = loss.aggregate_loss(values, batch.mask, token_level_loss, batch_num_tokens=tokens)
    return total


def in_reward(
    batch: Batch, *, kl_estimator: str, advantage_estimator: str, token_level_loss: bool, large_batch: bool = False
) -> Tensor:
    """The estimator subtracted from the reward of a group of responses, their returns, and the clipped policy loss.

    `large_batch` as in `as_loss`.
    """
    utils, losses, maker = _modules()
    size = len(batch.tokens)
    advantage = SimpleNamespace(estimator=advantage_estimator, gamma=1.0, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=size, max_new_tokens=None),
        reward=SimpleNamespace(clip_range=None),
    )
    me = SimpleNamespace(
        strategy=SimpleNamespace(args=args),
        kl_ctl=SimpleNamespace(value=1.0),
        advantage_estimator=advantage_estimator,
    )
    me.get_cumulative_returns = partial(maker.RemoteExperienceMaker.get_cumulative_returns, me)
    experience = SimpleNamespace(
        index=list(range(size)),
        rewards=batch.rewards,
        kl=utils.compute_approx_kl(batch.behaviour_log_prob, batch.reference_log_prob, kl_estimator=kl_estimator),
        action_mask=batch.mask.bool(),
        info={},
    )
    maker.RemoteExperienceMaker.compute_advantages_and_returns(me, [experience])
    policy_loss = losses.PolicyLoss(token_level_loss=token_level_loss)
    loss: Tensor = policy_loss(
        batch.log_prob,
        batch.behaviour_log_prob,
        experience.advantages,
        batch.mask,
        batch_num_tokens=size if large_batch else None,
    )[0]
    return loss


@lru_cache(maxsize=1)
def _modules() -> tuple[Any, Any, Any]:
    """`models.utils`, `models.loss` and `trainer.ppo_utils.experience_maker`, imported without the packages around them."""
    with _without_packages():
        utils, loss = (importlib.import_module(f"openrlhf.models.{name}") for name in ("utils", "loss"))
        maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
    return utils, loss, maker


@contextmanager
def _without_packages() -> Iterator[None]:
    """While the block lasts, packages of OpenRLHF are empty, and what starts clusters is a name without content."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    before = {name: module for name, module in sys.modules.items() if _ours(name)}
    for name in before:
        del sys.modules[name]
    try:
        for package in ("", "models", "trainer", "trainer.ppo_utils", "trainer.ray", "utils"):
            empty = ModuleType(f"openrlhf.{package}".rstrip("."))
            empty.__path__ = [str(root.joinpath(*package.split(".")))]
            sys.modules[empty.__name__] = empty
        sys.modules["deepspeed"] = ModuleType("deepspeed")
        launcher = ModuleType("openrlhf.trainer.ray.launcher")
        launcher.RayActorGroup = object  # type: ignore[attr-defined]  # occurs in annotations only
        sys.modules[launcher.__name__] = launcher
        yield
    finally:
        for name in [name for name in sys.modules if _ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _ours(name: str) -> bool:
    return name.split(".")[0] in (PACKAGE, "deepspeed")
