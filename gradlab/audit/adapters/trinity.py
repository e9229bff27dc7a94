"""Trinity-RFT: every registered KL function as a loss, under every aggregation."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

from torch import Tensor

from gradlab.audit.batch import Batch, Subject

PACKAGE = "trinity"
INSTALL = "pip install --no-deps trinity-rft==0.6.0 && pip install ray omegaconf"

FUNCTIONS = ("k1", "k2", "k3", "low_var_kl", "abs", "corrected_k3", "none")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def subjects() -> list[Subject]:
    """KL functions × aggregations. Trinity-RFT ≥ 0.6."""
    shipped, found = version("trinity-rft"), []
    for name in FUNCTIONS:
        # Without a KL there is nothing to aggregate.
        for aggregation in AGGREGATIONS if name != "none" else AGGREGATIONS[:1]:
            options: dict[str, Any] = {"kl_loss_fn": name, "loss_agg_mode": aggregation}
            function = "trinity.algorithm.kl_fn.KL_FN, KLFn.calculate_kl_loss"
            label = f"trinity {name} {aggregation}"
            found.append(Subject(label, partial(as_loss, **options), "trinity", shipped, function, options))
    return found


def as_loss(batch: Batch, *, kl_loss_fn: str, loss_agg_mode: str) -> Tensor:
    """`calculate_kl_loss` of a registered function with `kl_coef=1`, added to a policy loss of advantages 0: a scalar."""
    from trinity.algorithm.kl_fn import KL_FN

    kl = KL_FN.get(kl_loss_fn)(kl_coef=1.0)
    loss: Tensor = kl.calculate_kl_loss(
        batch.log_prob, batch.reference_log_prob, batch.mask, loss_agg_mode, old_logprob=batch.behaviour_log_prob
    )[0]
    # `none` is a constant: there is something to differentiate only in the policy loss that it is added to.
    return loss - (batch.advantages * batch.log_prob).sum()
