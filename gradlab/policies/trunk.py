"""The frozen lower part of a network: what gradients never reach is computed once per sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradlab.policies.arithmetic import portable


class Trunk:
    """The frozen lower part of a network, with the activations of the sequences it has seen kept in memory.

    `module` maps ids `[b, s]` to activations `[b, s, d]`. The cache holds up to `capacity` bytes, oldest out first; policies that
    share the trunk share it. What is cached never carries gradients.
    """

    def __init__(self, module: nn.Module, capacity: int = 2**28) -> None:
        self.module, self.capacity, self._bytes = module, capacity, 0
        self._kept: dict[bytes, Tensor] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        keys = [row.tobytes() for row in ids.cpu().numpy()]
        missing = {key: i for i, key in enumerate(keys) if key not in self._kept}
        computed = {}
        if missing:
            precision = next((weight.dtype for weight in self.module.parameters()), torch.float64)
            with torch.no_grad(), portable(precision):
                fresh = self.module(ids[list(missing.values())])
            computed = dict(zip(missing, fresh, strict=True))
        out = torch.stack([computed[key] if key in computed else self._kept[key] for key in keys])
        for key, row in computed.items():
            self._kept[key] = row.clone()
            self._bytes += row.numel() * row.element_size()
        while self._bytes > self.capacity:
            row = self._kept.pop(next(iter(self._kept)))
            self._bytes -= row.numel() * row.element_size()
        return out
