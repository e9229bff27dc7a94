"""The small transformer run once, and its derivative applied to many cotangents at a time.

Backward passes of autograd carry one cotangent each and work out the slopes of every non-linearity anew. Here the slopes are kept
and cotangents `[n, s, m, d]` travel `m` abreast: matrix products get as many more rows, and what every layer hears lies as the
products of `gradlab.per_sample.layers` want it. Behind the last attention no position reads another, so gradients of all tokens
of a response go back together there, and only the positions that emit the response are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradlab.policies.transformer import Transformer

#: Called for every layer on the way back: what each layer of that output multiplies its weight with, by the layer's name,
#: `[n, s, i]`, and the cotangents of the output, `[n, s, m, o]`.
Hear = Callable[[dict[str, Tensor], Tensor], None]


@dataclass(frozen=True)
class Normed:
    """A layer norm: its inputs normalised, `[n, s, d]`, what they were divided by, inverted, `[n, s, 1]`, and its weight."""

    z: Tensor
    scale: Tensor
    weight: Tensor

    def back_(self, cotangent: Tensor) -> Tensor:
        """From the cotangents of the output, `[n, s, m, d]`, to those of the input, in their place."""
        n, s, m, d = cotangent.shape
        inward = self.scale * self.weight
        along = cotangent.view(n * s, m, d) @ (self.z * inward / -d).view(n * s, d, 1)
        mean = (cotangent @ (self.weight / -d)).mul_(self.scale)
        cotangent.mul_(inward[:, :, None]).addcmul_(self.z[:, :, None], along.view(n, s, m, 1))
        return cotangent.add_(mean[..., None])


@dataclass(frozen=True)
class Attended:
    """Attention of the last `t` positions: queries and keys, scaled, and values, `[n, h, t or s, d]`; their shares `[n, h, t, s]`."""

    norm: Normed
    normed: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor

    def back(self, cotangent: Tensor) -> Tensor:
        """From the cotangents of what was read, `[n, t, m, h·d]`, to those of queries, keys and values, `[n, s, m, 3·h·d]`."""
        n, t, m, width = cotangent.shape
        _, h, s, d = self.k.shape
        q, k, v, p = (x.flatten(0, 1) for x in (self.q, self.k, self.v, self.p))
        read = cotangent.view(n, t, m, h, d).permute(0, 3, 1, 2, 4).contiguous().view(n * h, t * m, d)
        share = p[:, :, None]
        score = (read @ v.mT).view(n * h, t, m, s).mul_(share)
        score.addcmul_(share, score.sum(-1, keepdim=True), value=-1)
        found = cotangent.new_empty(n, s, m, 3, h, d)
        found[:, : s - t, :, 0] = 0
        found[:, s - t :, :, 0] = (score.view(n * h, t * m, s) @ k).view(n, h, t, m, d).permute(0, 2, 3, 1, 4)
        found[:, :, :, 1] = (score.view(n * h, t, m * s).mT @ q).view(n, h, m, s, d).permute(0, 3, 2, 1, 4)
        found[:, :, :, 2] = (p.mT @ read.view(n * h, t, m * d)).view(n, h, s, m, d).permute(0, 2, 3, 1, 4)
        return found.view(n, s, m, 3 * width)


@dataclass(frozen=True)
class Fed:
    """The feed-forward layer: its inputs, the slopes of the activation and its outputs, `[n, s, 4·d]`; `read`: what attention read."""

    read: Tensor
    norm: Normed
    normed: Tensor
    slope: Tensor
    active: Tensor


class Replay:
    """One pass of a `Transformer` with these weights over ids `[n, s]`, played back for cotangents of the last `length` logits."""

    def __init__(self, network: Transformer, weights: dict[str, Tensor], ids: Tensor, length: int) -> None:
        self._network, self._weights = network, {name: weight.detach() for name, weight in weights.items()}
        self._ids, self._steps = ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self._attended: list[Attended] = []
        self._fed: list[Fed] = []
        with torch.no_grad():
            x = F.embedding(self._ids, self._of("token")) + F.embedding(self._steps, self._of("position"))
            for i, block in enumerate(network.blocks):
                last = i == len(network.blocks) - 1
                x = self._forward(f"blocks.{i}", x, block.heads, length if last else ids.shape[1])  # type: ignore[arg-type]
            self._norm, self._normed = self._normalise("norm", x)
            self.logits = self._normed @ self._of("head").T

    def _of(self, layer: str, kind: str = "weight") -> Tensor:
        return self._weights[f"{layer}.{kind}"]

    def _linear(self, layer: str, x: Tensor) -> Tensor:
        return F.linear(x, self._of(layer), self._of(layer, "bias"))

    def _normalise(self, layer: str, x: Tensor) -> tuple[Normed, Tensor]:
        eps: float = self._network.get_submodule(layer).eps  # type: ignore[assignment]
        z, _, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        return Normed(z, scale, self._of(layer)), torch.addcmul(self._of(layer, "bias"), z, self._of(layer))

    def _forward(self, block: str, x: Tensor, heads: int, t: int) -> Tensor:
        n, s, width = x.shape
        norm, normed = self._normalise(f"{block}.norm1", x)
        q, k, v = self._linear(f"{block}.qkv", normed).view(n, s, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = q[:, :, s - t :] * q.shape[-1] ** -0.5, k.contiguous(), v.contiguous()
        later = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)[s - t :]
        # Not `softmax`, which is slow on rows as short as these.
        score = (q @ k.mT).masked_fill_(later, -torch.inf)
        p = score.sub_(score.amax(-1, keepdim=True)).exp_()
        p /= p.sum(-1, keepdim=True)
        self._attended.append(Attended(norm, normed, q, k * q.shape[-1] ** -0.5, v, p))
        read = (p @ v).transpose(1, 2).reshape(n, t, width)
        x = x[:, s - t :] + self._linear(f"{block}.out", read)
        norm, normed = self._normalise(f"{block}.norm2", x)
        before = self._linear(f"{block}.up", normed)
        slope = torch.ops.aten.gelu_backward(torch.ones_like(before), before)
        self._fed.append(Fed(read, norm, normed, slope, F.gelu(before)))
        return x + self._linear(f"{block}.down", self._fed[-1].active)

    def tail(self, cotangent: Tensor, hear: Hear) -> list[Tensor]:
        """Carry cotangents of the logits, `[n, t, m, v]`, to where positions mix: those of the stream and of what was read there."""
        hear({"head": self._normed}, cotangent)
        return self._through_feed(
            len(self._fed) - 1, self._through_norm("norm", self._norm, cotangent @ self._of("head"), hear), hear
        )

    def stem(self, ends: list[Tensor], hear: Hear) -> None:
        """Carry what `tail` returned to the embeddings."""
        for i in reversed(range(len(self._fed))):
            attended, (stream, read) = self._attended[i], ends
            cotangent = attended.back(read)
            hear({f"blocks.{i}.qkv": attended.normed}, cotangent)
            through = self._through_norm(f"blocks.{i}.norm1", attended.norm, cotangent @ self._of(f"blocks.{i}.qkv"), hear)
            through[:, through.shape[1] - stream.shape[1] :] += stream
            if i:
                ends = self._through_feed(i - 1, through, hear)
        hear({"token": self._ids, "position": self._steps}, through)

    def _through_norm(self, layer: str, norm: Normed, cotangent: Tensor, hear: Hear) -> Tensor:
        hear({layer: norm.z}, cotangent)
        return norm.back_(cotangent)

    def _through_feed(self, i: int, stream: Tensor, hear: Hear) -> list[Tensor]:
        block, fed = f"blocks.{i}", self._fed[i]
        hear({f"{block}.down": fed.active}, stream)
        cotangent = (stream @ self._of(f"{block}.down")).mul_(fed.slope[:, :, None])
        hear({f"{block}.up": fed.normed}, cotangent)
        stream = self._through_norm(f"{block}.norm2", fed.norm, cotangent @ self._of(f"{block}.up"), hear).add_(stream)
        hear({f"{block}.out": fed.read}, stream)
        return [stream, stream @ self._of(f"{block}.out")]
