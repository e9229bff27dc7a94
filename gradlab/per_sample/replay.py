"""The small transformer run once, and its derivative applied to many cotangents at a time.

Backward passes of autograd carry one cotangent each and work out the slopes of every non-linearity anew. Here the slopes are kept
and cotangents `[n, s, m, d]` go back `m` at a time: matrix products get as many more rows, and what every layer hears lies as the
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

#: Called for every layer of the backward pass: what each layer of that output multiplies its weight with, by the layer's name,
#: `[n, s, i]`, and the cotangents of the output, `[n, s, m, o]`.
LayerCallback = Callable[[dict[str, Tensor], Tensor], None]


@dataclass(frozen=True)
class NormPass:
    """A layer norm: its inputs normalised, `[n, s, d]`, what they were divided by, inverted, `[n, s, 1]`, and its weight."""

    z: Tensor
    scale: Tensor
    weight: Tensor

    def backward_(self, cotangent: Tensor) -> Tensor:
        """From the cotangents of the output, `[n, s, m, d]`, to those of the input, in their place."""
        n, s, m, d = cotangent.shape
        input_slope = self.scale * self.weight
        along = cotangent.view(n * s, m, d) @ (self.z * input_slope / -d).view(n * s, d, 1)
        mean = (cotangent @ (self.weight / -d)).mul_(self.scale)
        cotangent.mul_(input_slope[:, :, None]).addcmul_(self.z[:, :, None], along.view(n, s, m, 1))
        return cotangent.add_(mean[..., None])


@dataclass(frozen=True)
class AttentionPass:
    """Attention of the last `t` positions: queries and keys, scaled, and values, `[n, h, t or s, d]`; their shares `[n, h, t, s]`."""

    norm: NormPass
    normed: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor

    def backward(self, cotangent: Tensor) -> Tensor:
        """From the cotangents of what was read, `[n, t, m, h·d]`, to those of queries, keys and values, `[n, s, m, 3·h·d]`."""
        n, t, m, width = cotangent.shape
        _, h, s, d = self.k.shape
        q, k, v, p = (x.flatten(0, 1) for x in (self.q, self.k, self.v, self.p))
        head_cotangent = cotangent.view(n, t, m, h, d).permute(0, 3, 1, 2, 4).contiguous().view(n * h, t * m, d)
        attention = p[:, :, None]
        score = (head_cotangent @ v.mT).view(n * h, t, m, s).mul_(attention)
        score.addcmul_(attention, score.sum(-1, keepdim=True), value=-1)
        qkv_cotangent = cotangent.new_empty(n, s, m, 3, h, d)
        qkv_cotangent[:, : s - t, :, 0] = 0
        qkv_cotangent[:, s - t :, :, 0] = (score.view(n * h, t * m, s) @ k).view(n, h, t, m, d).permute(0, 2, 3, 1, 4)
        qkv_cotangent[:, :, :, 1] = (score.view(n * h, t, m * s).mT @ q).view(n, h, m, s, d).permute(0, 3, 2, 1, 4)
        qkv_cotangent[:, :, :, 2] = (p.mT @ head_cotangent.view(n * h, t, m * d)).view(n, h, s, m, d).permute(0, 2, 3, 1, 4)
        return qkv_cotangent.view(n, s, m, 3 * width)


@dataclass(frozen=True)
class FeedForwardPass:
    """The feed-forward layer: its inputs, the slopes of the activation and its outputs, `[n, s, 4·d]`; `read`: what attention read."""

    read: Tensor
    norm: NormPass
    normed: Tensor
    slope: Tensor
    active: Tensor


class Replay:
    """One pass of a `Transformer` with these weights over ids `[n, s]`, played back for cotangents of the last `length` logits."""

    def __init__(self, network: Transformer, weights: dict[str, Tensor], ids: Tensor, length: int) -> None:
        self._network, self._weights = network, {name: weight.detach() for name, weight in weights.items()}
        self._ids, self._steps = ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self._attended: list[AttentionPass] = []
        self._fed: list[FeedForwardPass] = []
        with torch.no_grad():
            x = F.embedding(self._ids, self._parameter("token")) + F.embedding(self._steps, self._parameter("position"))
            for i, block in enumerate(network.blocks):
                last = i == len(network.blocks) - 1
                x = self._forward(f"blocks.{i}", x, block.heads, length if last else ids.shape[1])  # type: ignore[arg-type]
            self._norm, self._normed = self._normalise("norm", x)
            self.logits = self._normed @ self._parameter("head").T

    def _parameter(self, layer: str, kind: str = "weight") -> Tensor:
        return self._weights[f"{layer}.{kind}"]

    def _linear(self, layer: str, x: Tensor) -> Tensor:
        return F.linear(x, self._parameter(layer), self._parameter(layer, "bias"))

    def _normalise(self, layer: str, x: Tensor) -> tuple[NormPass, Tensor]:
        eps: float = self._network.get_submodule(layer).eps  # type: ignore[assignment]
        z, _, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        return NormPass(z, scale, self._parameter(layer)), torch.addcmul(
            self._parameter(layer, "bias"), z, self._parameter(layer)
        )

    def _forward(self, block: str, x: Tensor, heads: int, t: int) -> Tensor:
        n, s, width = x.shape
        norm, normed = self._normalise(f"{block}.norm1", x)
        q, k, v = self._linear(f"{block}.qkv", normed).view(n, s, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = q[:, :, s - t :] * q.shape[-1] ** -0.5, k.contiguous(), v.contiguous()
        causal_mask = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)[s - t :]
        # Not `softmax`, which is slow on rows as short as these.
        score = (q @ k.mT).masked_fill_(causal_mask, -torch.inf)
        p = score.sub_(score.amax(-1, keepdim=True)).exp_()
        p /= p.sum(-1, keepdim=True)
        self._attended.append(AttentionPass(norm, normed, q, k * q.shape[-1] ** -0.5, v, p))
        read = (p @ v).transpose(1, 2).reshape(n, t, width)
        x = x[:, s - t :] + self._linear(f"{block}.out", read)
        norm, normed = self._normalise(f"{block}.norm2", x)
        pre_activation = self._linear(f"{block}.up", normed)
        slope = torch.ops.aten.gelu_backward(torch.ones_like(pre_activation), pre_activation)
        self._fed.append(FeedForwardPass(read, norm, normed, slope, F.gelu(pre_activation)))
        return x + self._linear(f"{block}.down", self._fed[-1].active)

    def backward_head(self, cotangent: Tensor, callback: LayerCallback) -> list[Tensor]:
        """Carry cotangents of the logits, `[n, t, m, v]`, to where positions mix: those of the stream and of what was read there."""
        callback({"head": self._normed}, cotangent)
        return self._backward_feed_forward(
            len(self._fed) - 1, self._backward_norm("norm", self._norm, cotangent @ self._parameter("head"), callback), callback
        )

    def backward_body(self, head_cotangents: list[Tensor], callback: LayerCallback) -> None:
        """Carry what `backward_head` returned to the embeddings."""
        for i in reversed(range(len(self._fed))):
            attended, (stream, read) = self._attended[i], head_cotangents
            cotangent = attended.backward(read)
            callback({f"blocks.{i}.qkv": attended.normed}, cotangent)
            stream_cotangent = self._backward_norm(
                f"blocks.{i}.norm1", attended.norm, cotangent @ self._parameter(f"blocks.{i}.qkv"), callback
            )
            stream_cotangent[:, stream_cotangent.shape[1] - stream.shape[1] :] += stream
            if i:
                head_cotangents = self._backward_feed_forward(i - 1, stream_cotangent, callback)
        callback({"token": self._ids, "position": self._steps}, stream_cotangent)

    def _backward_norm(self, layer: str, norm: NormPass, cotangent: Tensor, callback: LayerCallback) -> Tensor:
        callback({layer: norm.z}, cotangent)
        return norm.backward_(cotangent)

    def _backward_feed_forward(self, i: int, stream: Tensor, callback: LayerCallback) -> list[Tensor]:
        block, fed = f"blocks.{i}", self._fed[i]
        callback({f"{block}.down": fed.active}, stream)
        cotangent = (stream @ self._parameter(f"{block}.down")).mul_(fed.slope[:, :, None])
        callback({f"{block}.up": fed.normed}, cotangent)
        stream = self._backward_norm(f"{block}.norm2", fed.norm, cotangent @ self._parameter(f"{block}.up"), callback).add_(
            stream
        )
        callback({f"{block}.out": fed.read}, stream)
        return [stream, stream @ self._parameter(f"{block}.out")]
