"""A network whose trainable parameters are one vector, as gradients of policies are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradlab.policies.arithmetic import portable
from gradlab.policies.trunk import Trunk

N = TypeVar("N", bound="Parameterised")


@dataclass(frozen=True, eq=False)
class Parameterised:
    """Common ground of networks as policies: some of `model`'s parameters are in play, in place of its own if others are given.

    model: maps ids `[b, s]` (or the activations of `trunk`) to logits `[b, s, ids]`, as a tensor or in a `.logits` attribute.
    trainable: names of its parameters that gradients are taken with respect to, in this order; `None` is all of them.
    Raises `ValueError` for unknown names, and for none at all.
    """

    model: nn.Module
    _: KW_ONLY
    trainable: Sequence[str] | None = None
    trunk: Trunk | None = None
    #: Cached properties that other parameters make void.
    derived: ClassVar[tuple[str, ...]] = ("parameters",)

    def __post_init__(self) -> None:
        known = dict(self.model.named_parameters())
        unknown = [name for name in self.trainable or () if name not in known]
        if unknown or not (known if self.trainable is None else self.trainable):
            raise ValueError(
                f"trainable names parameters of the network; unknown {unknown or 'nothing given'}, known: {list(known)}"
            )

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trainable parameters by name, in order."""
        known = dict(self.model.named_parameters())
        return {name: known[name] for name in (known if self.trainable is None else self.trainable)}

    @property
    def current(self) -> dict[str, Tensor]:
        """All parameters of the network by name, those of `with_parameters` in place of its own."""
        return {**dict(self.model.named_parameters()), **getattr(self, "_swapped", {})}

    @cached_property
    def parameters(self) -> Tensor:
        """The trainable parameters as one vector `[p]`, in the network's precision, on the CPU wherever the network is."""
        return torch.cat([weight.detach().flatten() for weight in self.weights.values()]).cpu()

    @property
    def device(self) -> torch.device:
        """Where the network is. Ids go there and logits come back: everything that is not the network is on the CPU."""
        return next(self.model.parameters()).device

    def with_parameters(self: N, parameters: Tensor) -> N:
        """The same policy with other trainable parameters `[p]`; a differentiable vector stays differentiable."""
        clone = copy.copy(self)
        for cached in self.derived:
            clone.__dict__.pop(cached, None)
        parts = torch.split(parameters, [weight.numel() for weight in self.weights.values()])
        swapped = {name: part.view_as(w).to(w.device) for part, (name, w) in zip(parts, self.weights.items(), strict=True)}
        object.__setattr__(clone, "_swapped", swapped)
        clone.__dict__["parameters"] = parameters
        return clone

    def changed(self: N, **fields: Any) -> N:
        """The same policy with other fields, such as `temperature=0.7` or `model=other`: how behaviour policies are made.

        Parameters given by `with_parameters` stay.
        """
        clone = replace(self, **fields)
        return clone.with_parameters(self.parameters) if hasattr(self, "_swapped") else clone

    def features(self, ids: Tensor) -> Tensor:
        """What `model` reads for ids `[b, s]`: the ids, or the activations of the trunk."""
        return ids.to(self.device) if self.trunk is None else self.trunk(ids.to(self.device))

    def network(self, features: Tensor, *cache: Any) -> Tensor:
        """Raw logits `[b, s, ids]` of the network, with the parameters of `with_parameters` if they were given.

        A network that keeps keys and values reads on where `cache` is.
        """
        swapped = getattr(self, "_swapped", None)
        with portable(next(self.model.parameters()).dtype):
            output = (
                self.model(features, *cache) if swapped is None else functional_call(self.model, swapped, (features, *cache))
            )
        return output if isinstance(output, Tensor) else output.logits
