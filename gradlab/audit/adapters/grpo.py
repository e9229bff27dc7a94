"""What TRL's and liger-kernel's GRPO have in common: loss types, and the corrections of the KL for data of another policy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from gradlab.audit.batch import Subject

LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")
#: Name in the report → `use_bias_correction_kl` and `importance_sampling_level`. Without the correction the level is not read.
CORRECTIONS = {"plain": (False, "token"), "corrected": (True, "token"), "corrected-sequence": (True, "sequence")}


def configurations(
    name: str,
    loss: Callable[..., Tensor],
    package: str,
    version: str,
    function: str,
    source: str,
    token_only: Collection[str] = (),
) -> Iterator[Subject]:
    """Every loss type that occurs in the `source` of the function, by correction; `dapo` also in the limit of a large batch.

    token_only: loss types that refuse sequence-level ratios.
    """
    for loss_type in LOSS_TYPES:
        if f'"{loss_type}"' not in source:
            continue  # an older version
        for label, (corrected, level) in CORRECTIONS.items():
            if level == "sequence" and loss_type in token_only:
                continue
            options: dict[str, Any] = {
                "loss_type": loss_type,
                "use_bias_correction_kl": corrected,
                "importance_sampling_level": level,
            }
            called = f"{name} grpo {loss_type} {label}"
            yield Subject(called, partial(loss, **options), package, version, function, options)
            if loss_type == "dapo":
                options = {**options, "large_batch": True}
                yield Subject(f"{called} large-batch", partial(loss, **options), package, version, function, options)
