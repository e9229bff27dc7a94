"""An audit adapter: what a framework of one function needs for `gradlab audit example`."""

from __future__ import annotations

from torch import Tensor

from gradlab.audit import Batch, Subject

PACKAGE = "gradlab_example"
INSTALL = "pip install gradlab-example"


def kl_loss(batch: Batch) -> Tensor:
    """k2 per token, summed over a response and averaged over responses."""
    log_ratio = batch.log_prob - batch.reference_log_prob
    return (0.5 * log_ratio.square() * batch.mask).sum(-1).mean()


def subjects() -> list[Subject]:
    """The one configuration there is."""
    return [Subject("example kl_loss", kl_loss, PACKAGE, "1.0", f"{PACKAGE}.framework.kl_loss")]
