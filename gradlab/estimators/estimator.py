"""Estimators of the gradient of a KL regulariser: kernel × placement × credit × weight × normaliser.

An `Estimator` is a recipe. Called on a rollout it gives the per-sample surrogate loss `[n]` whose gradient is the estimator
(sampling is never differentiated), written here as the field writes it, with `detach` where the field detaches.
`gradlab.estimators.estimator.coefficients` holds the same gradients in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from gradlab.estimators import kernels, rules
from gradlab.estimators.kernels import KERNELS, VOCABULARY_KERNELS
from gradlab.rollout import Readings, Rollout

ZERO = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Estimator:
    """A KL gradient estimator; `estimator(rollout)` is its per-sample surrogate loss `[n]`.

    With `W_t` the weight and `k` the kernel of the log-ratio `ℓ_t` (`S = Σ_t ℓ_t`), and `sg` stop-gradient:

    | placement | credit | surrogate |
    |---|---|---|
    | `loss` | `token` | `Σ_t W_t k(ℓ_t)` |
    | `loss` | `sequence` | `W k(S)` |
    | `reward` | `token` | `Σ_t W_t sg(k(ℓ_t)) log π_t` |
    | `reward` | `to_go` | `Σ_t W_t sg(Σ_{u≥t} k(ℓ_u)) log π_t` |
    | `reward` | `return` | `Σ_t W_t sg(Σ_u k(ℓ_u)) log π_t` |
    | `reward` | `sequence` | `W sg(k(S)) Σ_t log π_t` |
    | `loss+reward` | any | the `reward` row with that credit plus the `loss` row |
    | `straight_through` | `token` | value of `kernel`, gradient of `gradient_kernel` |

    kernel: `k1 k2 k3 abs k3_swapped mse_sampled`, or over the whole vocabulary `full`, `mse`. A vocabulary kernel at `t` is
        known before `y_t` is drawn: its `prefix` weight is `w_{<t} = Π_{u<t} ρ_u` and stays with its own term, and its
        `to_go` credit sums strictly later steps. `full`, `loss+reward`, `to_go`, `prefix` is complete Rao–Blackwell.
    weight: `none` 1 · `token` `ρ_t` · `prefix` `Π_{u≤t} ρ_u` · `sequence` `Π_u ρ_u`, with `ρ = π/μ`; detached unless
        `differentiate_weight`; `truncate=C` makes it `min(W, C)`, with zero gradient where that binds. In `reward` a
        differentiated weight is taken literally: it also multiplies `log π`, which is rarely what is meant.
    clip: PPO's `−min(W A, clip(W, 1−ε, 1+ε) A)` with `A = −sg(coefficient)` on `reward`; the ratio is differentiated.
    normalise: `sum` · `mean` 1/L per response · `token_mean` 1/E_μ[L], the limit of
        one mean over all tokens of a large batch · `fixed` 1/T.
    clamp_log_ratio, clamp_value: bounds on `ℓ` before and on `k` after, as shipped code has them; with `straight_through`
        they bound the value only.
    baseline: on `reward`, subtract `kl` (`KL_t` of the step), `group_mean` or `leave_one_out` (mean over the `group`
        responses to one prompt, with or without the response itself; credits `return` and `sequence`).

    Complete Rao–Blackwell is unbiased for the reverse KL of responses: `KL(π ‖ ref) = E_μ Σ_t w_{<t} KL_t`, since `w_{<t}` is the
    density of prefixes, and `∇w_{<t} = w_{<t} Σ_{u<t} ∇log π_u`, so `∇KL = E_μ Σ_t w_{<t} [∇KL_t + KL_t Σ_{u<t} ∇log π_u]`.

    Raises `ValueError` for an unknown name (with the nearest ones) and for a combination that means nothing.
    Sources: arXiv 2510.01555 (placements), 2504.10637 (Rao–Blackwell), 2512.02556 §3.1 (weighted k3), 1707.06347 (clip).

    >>> estimator = gl.Estimator("k2", placement="loss", credit="sequence")
    >>> rollout = gl.Rollout.enumerated(gl.Scenario(gl.Bandit([0, 0]), gl.Bandit([0, 1])))
    >>> bool((estimator(rollout) - rollout.log_ratio[:, 0] ** 2 / 2).abs().max() < 1e-12)
    True
    >>> gl.Estimator("full", placement="loss+reward", credit="to_go", weight="prefix") == gl.ESTIMATORS["full-both-prefix"]
    True
    """

    kernel: str
    placement: Literal["loss", "reward", "loss+reward", "straight_through"] = "loss"
    credit: Literal["token", "to_go", "return", "sequence"] = "token"
    weight: Literal["none", "token", "prefix", "sequence"] = "none"
    differentiate_weight: bool = False
    truncate: float | None = None
    clip: float | None = None
    normalise: Literal["sum", "mean", "token_mean", "fixed"] = "sum"
    clamp_log_ratio: float | None = None
    clamp_value: float | None = None
    gradient_kernel: str | None = None
    baseline: Literal["kl", "group_mean", "leave_one_out"] | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        rules.check(self)

    @property
    def on_vocabulary(self) -> bool:
        """Whether the kernel sums over the whole vocabulary."""
        return self.kernel in VOCABULARY_KERNELS

    @property
    def effective_gradient_kernel(self) -> str:
        """The kernel whose derivative reaches the parameters: `gradient_kernel` in `straight_through`, else `kernel`."""
        if self.placement != "straight_through":
            return self.kernel
        return self.gradient_kernel or "k2"

    @property
    def grouped(self) -> bool:
        """Whether the estimator compares responses of one prompt with each other."""
        return self.baseline in ("group_mean", "leave_one_out")

    @property
    def group_size(self) -> int:
        """How many responses to one prompt the estimator takes together: its group, or 1."""
        return self.group or 1

    @property
    def name(self) -> str:
        """A compact name made of the fields that differ from their defaults, such as `k1-reward-to_go-sequence-weight`."""
        parts = [self.kernel, self.placement]
        for item in fields(self)[2:]:
            value = getattr(self, item.name)
            if value != item.default and item.name != "differentiate_weight":
                # Credits and weights share names, so a weight says that it is one, and whether it is differentiated.
                weight = f"{'differentiated-' if self.differentiate_weight else ''}{value}-weight"
                parts.append({"credit": f"{value}", "weight": weight}.get(item.name, f"{item.name}={value}"))
        return "-".join(parts)

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return the per-sample surrogate loss `[n]`, differentiable in the rollout's policy logits."""
        if rollout.table.requires_grad:
            rollout = rollout.without_cache()
        if self.placement == "reward":
            loss = _reward(self, rollout)
        elif self.placement == "loss+reward":
            loss = _loss(self, rollout) + _reward(self, rollout)
        else:
            loss = _loss(self, rollout)
        return loss * scale(self, rollout)


def scale(estimator: Estimator, rollout: Readings) -> Tensor:
    """The normaliser of every response, `[n]` or a scalar."""
    return normaliser(estimator.normalise, rollout)


def normaliser(name: str, rollout: Readings) -> Tensor:
    """What every response is multiplied by, `[n]` or a scalar, for `sum`, `mean`, `token_mean` or `fixed`."""
    if name == "mean":
        return 1 / rollout.lengths
    if name == "token_mean":
        return torch.tensor(1 / rollout.mean_length, dtype=torch.float64)
    return torch.tensor(1.0 if name == "sum" else 1 / rollout.length, dtype=torch.float64)


def kernel_values(estimator: Estimator, rollout: Readings) -> Tensor:
    """The kernel at every live token, `[n, t]`; a whole-response kernel of credit `sequence` is `[n, 1]`."""
    if estimator.on_vocabulary:
        return rollout.divergence(estimator.kernel)
    return _kernel(estimator, rollout, estimator.kernel, (estimator.clamp_log_ratio, estimator.clamp_value))


def _kernel(estimator: Estimator, rollout: Readings, kernel: str, bounds: tuple[float | None, float | None]) -> Tensor:
    # Behind the end of a response ℓ = 0, where every kernel vanishes.
    key = ("kernel", kernel, estimator.credit == "sequence", bounds)
    return rollout.cached(key, lambda: kernels.value(kernel, *kernel_arguments(estimator, rollout, kernel), *bounds))


def log_ratio(estimator: Estimator, rollout: Readings) -> Tensor:
    """`ℓ` as the kernel reads it: per token `[n, t]`, or of the whole response `[n, 1]`."""
    return rollout.log_ratio.sum(-1, keepdim=True) if estimator.credit == "sequence" else rollout.log_ratio


def kernel_arguments(estimator: Estimator, rollout: Readings, kernel: str) -> tuple[Tensor, Tensor]:
    """`ℓ` and `log ref` of a kernel, 0 where it reads no `ref`."""
    x = log_ratio(estimator, rollout)
    if not KERNELS[kernel].times_reference:
        return x, ZERO.expand_as(x)
    log_ref = rollout.reference_log_prob
    return x, log_ref.sum(-1, keepdim=True) if estimator.credit == "sequence" else log_ref


def raw_weights(estimator: Estimator, rollout: Readings) -> Tensor:
    """Importance weights before truncation, `[n, t]` (or `[n, 1]` for `none`, `sequence` and credit `sequence`)."""

    def compute() -> Tensor:
        if estimator.weight == "none":
            return torch.ones(len(rollout.mask), 1, dtype=torch.float64)
        steps = rollout.log_weight
        if estimator.weight == "sequence":
            return steps.sum(-1, keepdim=True).exp()
        if estimator.weight == "token":
            return steps.exp()
        return (rollout.earlier_log_weight if estimator.on_vocabulary else rollout.earlier_log_weight + steps).exp()

    return rollout.cached(("weight", estimator.weight, estimator.on_vocabulary), compute)


def weights(estimator: Estimator, rollout: Readings) -> Tensor:
    """Importance weights `W_t` as the surrogate uses them: truncated, and detached unless they are differentiated."""
    w = raw_weights(estimator, rollout)
    if estimator.truncate is not None:
        # clamp passes the gradient up to and including the bound, so on-policy (W = 1) a bound of 1 does not bind.
        w = w.clamp(max=estimator.truncate)
    return w.detach() if w.requires_grad and not estimator.differentiate_weight and estimator.clip is None else w


def _loss(estimator: Estimator, rollout: Readings) -> Tensor:
    values = kernel_values(estimator, rollout)
    if estimator.placement == "straight_through":
        gradient_values = _kernel(estimator, rollout, estimator.effective_gradient_kernel, (None, None))
        values = gradient_values + (values - gradient_values).detach()
    return (weights(estimator, rollout) * values).sum(-1)


def _reward(estimator: Estimator, rollout: Readings) -> Tensor:
    coefficients, w = reward_coefficients(estimator, rollout).detach(), weights(estimator, rollout)
    log_prob = rollout.log_prob.sum(-1, keepdim=True) if estimator.credit == "sequence" else rollout.log_prob
    if estimator.clip is not None:
        advantage = -coefficients if estimator.credit == "sequence" else -torch.where(rollout.mask, coefficients, 0.0)
        bounded = w.clamp(1 - estimator.clip, 1 + estimator.clip)
        return -torch.minimum(w * advantage, bounded * advantage).sum(-1)
    if estimator.on_vocabulary and estimator.weight == "prefix":
        return (coefficients * log_prob).sum(-1)  # the weight already sits with its own term
    return (w * coefficients * log_prob).sum(-1)


def reward_coefficients(estimator: Estimator, rollout: Readings) -> Tensor:
    """What multiplies `W_t log π_t` in `reward`: kernel values with credit and baseline applied, `[n, t]` or `[n, 1]`.

    The weight of a vocabulary kernel with `prefix` is included. Raises `ValueError` for a group baseline on a rollout that
    is not sampled or whose size is not a multiple of the group.
    """
    values = kernel_values(estimator, rollout)
    if estimator.on_vocabulary and estimator.weight == "prefix":
        values = weights(estimator, rollout) * values
    if estimator.credit == "to_go":
        later = to_go(values)
        values = later - values if estimator.on_vocabulary else later
    elif estimator.credit == "return":
        values = values.sum(-1, keepdim=True).expand_as(values)
    if estimator.baseline == "kl":
        values = values - rollout.divergence("full")
    elif estimator.grouped:
        values = values - _group_baseline(estimator, rollout, values)
    return values


def to_go(values: Tensor) -> Tensor:
    """`Σ_{u≥t} values_u`, `[n, t]`."""
    return values if values.shape[-1] == 1 else values.flip(-1).cumsum(-1).flip(-1)


def _group_baseline(estimator: Estimator, rollout: Readings, values: Tensor) -> Tensor:
    size = estimator.group_size
    if not rollout.sampled or len(values) % size:
        raise ValueError(
            f"{estimator.baseline} compares the {size} responses to one prompt: it needs a sampled rollout of a multiple of "
            f"{size} responses, got {'a weighted' if not rollout.sampled else 'a sampled'} one of {len(values)}; for exact "
            "moments use gl.exact.moments, which averages over groups in closed form"
        )
    groups = values.view(-1, size, values.shape[-1])
    total = groups.sum(1, keepdim=True)
    mean = total / size if estimator.baseline == "group_mean" else (total - groups) / (size - 1)
    return mean.expand_as(groups).reshape(values.shape)
