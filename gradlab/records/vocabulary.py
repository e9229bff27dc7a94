"""Where lists of the likeliest tokens were recorded: the KL over the vocabulary, and gradients that are exact at every prefix.

What is not in a list of `K` stands in one bucket, so that a prefix is a distribution over `K + 1` outcomes. Its KL is a coarse-grained
one: at most that of the whole vocabulary, and equal to it where the list is complete. An estimator of a token's log-ratio puts the
coefficient `c(v) = ∂k/∂ log π` on outcome `v`: its expected gradient in the prefix's logits is `π (c − Σ π c)`, and its covariance has
the trace `Σ_v π_v c_v² (1 − 2 π_v + Σ π²) − ‖mean‖²`. The gradient of the prefix's KL is that of `c = ℓ`.

Source: derived here; forms of a KL over the k likeliest tokens as in gradlab's documentation of distillation losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from gradlab._common.names import check_probability
from gradlab.estimators import kernels
from gradlab.records.block import Block
from gradlab.records.means import mean
from gradlab.records.table import Records
from gradlab.records.totals import clusters

Array = npt.NDArray[Any]

NEEDED = ("top_logprob", "top_ref_logprob")
#: Mass that a complete list may lack by rounding.
COMPLETE = 1e-6
#: Kernels whose gradients are compared.
KERNELS = ("k1", "k2", "k3", "k3_swapped", "abs")


def kl_frame(records: Records, level: float = 0.95) -> pd.DataFrame:
    """KL at the recorded prefixes by every form of a list, nats per token: `form, value, low, high, reliable`, and the lists' `mass`.

    `raw` is `Σ_K π log(π/ref)`, `generalised` adds `ref − π`, `renormalised` is the KL of the two on `K`, `tail` has one bucket for
    the rest; `k1` is that of the drawn tokens alone. Raises `ValueError` without lists of policy and reference.

    >>> import numpy as np
    >>> top, ref = np.log([[[0.7, 0.3]]]), np.log([[[0.5, 0.5]]])
    >>> records = gl.Records.from_arrays(logprob=[[np.log(0.7)]], ref_logprob=[[np.log(0.5)]], top_logprob=top, top_ref_logprob=ref)
    >>> gl.records.vocabulary.kl_frame(records).set_index("form")["value"].round(4)["tail"]  # .7 log 1.4 + .3 log .6
    np.float64(0.0823)
    """
    check_probability("level", level)
    sums: dict[str, list[Array]] = {}
    mass, count = 0.0, 0
    for block, first, p, r, live in _lists(records):
        ratio = np.where(p > 0, np.log(np.maximum(p, 1e-300) / np.maximum(r, 1e-300)), 0.0)
        whole_p, whole_r = p.sum(-1), r.sum(-1)
        raw = (p * ratio).sum(-1)
        rest_p, rest_r = np.maximum(1 - whole_p, 0), np.maximum(1 - whole_r, 1e-300)
        tail = np.where(rest_p > COMPLETE, rest_p * np.log(np.maximum(rest_p, 1e-300) / rest_r), 0.0)
        values = {
            "raw": raw, "generalised": raw - whole_p + whole_r, "renormalised": raw / whole_p - np.log(whole_p / whole_r),
            "tail": raw + tail,
        }  # fmt: skip
        if {"logprob", "ref_logprob"} <= set(block.columns):
            values["k1"] = (block["logprob"] - block["ref_logprob"])[live]
        mass, count = mass + float(whole_p.sum()), count + len(p)
        flat = np.zeros(len(live))
        for name, value in values.items():
            flat[live] = value
            sums.setdefault(name, []).append(block.sums(flat))
        sums.setdefault(" length", []).append(block.sums(live))
        sums.setdefault(" cluster", []).append(clusters(block, first))
    columns = {name: np.concatenate(parts) for name, parts in sums.items()}
    rows = []
    for name in (name for name in columns if not name.startswith(" ")):
        found = mean(columns[name], columns[" length"], columns[" cluster"], level, positive=name in ("generalised", "tail"))
        rows.append({"form": name, "value": found.value, "low": found.low, "high": found.high, "reliable": found.reliable})
    return pd.DataFrame(rows).assign(mass=mass / count)


def gradient_frame(records: Records) -> pd.DataFrame:
    """What per-token losses do at the recorded prefixes, exact at each: `estimator, bias, cosine, noise, prefixes`.

    As in `gl.measure`, against the gradient of the reverse KL with frozen prefixes, where every prefix has logits of its own and all
    recorded ones count alike. Raises `ValueError` without lists of policy and reference, and where they are equal everywhere.

    >>> import numpy as np
    >>> top, ref = np.log([[[0.7, 0.3]]]), np.log([[[0.5, 0.5]]])
    >>> records = gl.Records.from_arrays(logprob=[[np.log(0.7)]], top_logprob=top, top_ref_logprob=ref)
    >>> gl.records.vocabulary.gradient_frame(records).set_index("estimator")["bias"].round(4)["k2-loss"]
    np.float64(0.0)
    """
    totals = {name: np.zeros(4) for name in KERNELS}
    truth, prefixes = 0.0, 0
    for _, _, p, r, _ in _lists(records):
        rest = [np.maximum(1 - x.sum(-1, keepdims=True), 0) for x in (p, r)]
        p, r = (np.concatenate([x, np.where(rest[0] > COMPLETE, y, 0)], -1) for x, y in zip((p, r), rest, strict=True))
        held = p > 0
        log_r = torch.from_numpy(np.log(np.maximum(r, 1e-300)))
        ratio = torch.from_numpy(np.where(held, np.log(np.maximum(p, 1e-300)), log_r.numpy())) - log_r
        along = _expected(p, ratio.numpy())
        truth += float((along**2).sum())
        prefixes += len(p)
        norm = 1 - 2 * p + (p**2).sum(-1, keepdims=True)
        for name in KERNELS:
            c = kernels.derivative(name, ratio, log_r, None, None).numpy()
            g = _expected(p, c)
            totals[name] += ((g - along) ** 2).sum(), (g * along).sum(), (g**2).sum(), (p * c**2 * norm).sum() - (g**2).sum()
    if not truth > 0:
        raise ValueError(
            "policy and reference are equal at every recorded prefix: there is no gradient of a KL to compare with"
        )
    rows = [
        {
            "estimator": f"{name.replace('_', '-')}-loss", "bias": (apart / truth) ** 0.5,
            "cosine": inner / (square * truth) ** 0.5 if square > 1e-24 * truth else np.nan, "noise": trace / truth, "prefixes": prefixes,
        }
        for name, (apart, inner, square, trace) in totals.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _expected(p: Array, c: Array) -> Array:
    """`E c (onehot − π)` at every prefix, `[n, k]`."""
    return np.asarray(p * (c - (p * c).sum(-1, keepdims=True)))


def _lists(records: Records) -> Iterator[tuple[Block, Array, Array, Array, Array]]:
    """Blocks with the numbers of their responses, probabilities `[m, k]` of policy and reference, and the tokens that have them."""
    missing = [name for name in NEEDED if name not in records.columns]
    if missing:
        raise ValueError(
            f"the records lack {' and '.join(missing)}, lists of the likeliest tokens; they hold {', '.join(records.columns)}"
        )
    some = False
    for block in records:
        if not set(NEEDED) <= set(block.columns):
            continue
        live = block.mask & np.isfinite(block["top_logprob"][:, :1]).all(-1)
        kept = block.sums(live) > 0
        if not kept.any():
            continue
        first, chosen = block.first + np.flatnonzero(kept), block.take(kept)
        live = live[kept[block.owner]]
        p, r = (np.exp(np.nan_to_num(chosen[name][live], nan=-np.inf)) for name in NEEDED)
        some = True
        yield chosen, first, p, r, live
    if not some:
        raise ValueError("no token that counts has a list of likeliest tokens")


__all__ = ["gradient_frame", "kl_frame"]
