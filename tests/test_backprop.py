"""Parameter-space gradients by hooks against `torch.func` and against the table of logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import gradlab as gl
from gradlab.moments import Gradients, gradients
from gradlab.per_sample import backprop, layers, tape
from gradlab.per_sample.replay import Replay
from gradlab.policies import LanguageModel
from gradlab.policies.transformer import Transformer
from gradlab.rollout import Rollout

NAMES = ["k2-loss", "k3-loss", "k1-reward-to-go", "k2-loss-sequence", "k3-loss-prefix", "full-both", "mse-loss"]
MANY = [name for name, estimator in gl.ESTIMATORS.items() if not estimator.grouped]


def network(seed: int, vocab: int = 6, width: int = 8) -> Transformer:
    model = Transformer(vocab, 10, width, 2, 2).double()
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.from_numpy(0.4 * rng.standard_normal(tuple(weight.shape)) + (weight.dim() == 1)))
    return model


def model(seed: int, **fields: object) -> LanguageModel:
    given = {"actions": [0, 2, 3, 5], "eos": 1, "tolerance": 1.0, **fields}
    return LanguageModel(network(seed), [(1, 2), (3,), (0, 4)], 3, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scenario() -> gl.Scenario:
    return gl.Scenario(model(0), model(1), model(2))


def my_loss(rollout: Rollout) -> Tensor:
    return (rollout.log_ratio.exp() * rollout.mask_float).sum(-1)


def oracle(policy: LanguageModel, batch: Gradients) -> Tensor:
    """Every sample's gradient in full, `[n, e, p]`, by `vmap(grad)` of the inner product of logits and cotangent."""
    rollout, seeds = batch.rollout, []
    p = rollout.logits.softmax(-1)
    score = nn.functional.one_hot(rollout.tokens, p.shape[-1]) - p
    for e in range(len(batch.score)):
        seed = batch.score[e][..., None] * score
        for losses, direct, slope in batch.direct:
            if e in losses:
                seed = seed + direct[losses.index(e)][..., None] * slope[rollout.contexts]
        seeds.append(seed + batch.cotangents.get(e, torch.zeros_like(seed)))
    weights = {name: weight.detach() for name, weight in getattr(policy, "_swapped", policy.weights).items()}
    found = torch.zeros(len(rollout.tokens), len(seeds), len(policy.parameters), dtype=torch.float64)
    for rows, ids in policy.sequences(rollout.prompts, rollout.tokens):

        def surrogate(weights: dict[str, Tensor], row: Tensor, seed: Tensor) -> Tensor:
            raw = functional_call(policy.model, weights, (row[None],))
            return (policy.shaped(raw[0, -rollout.tokens.shape[1] :]) * seed).sum()

        for e, seed in enumerate(seeds):
            each = vmap(grad(surrogate), (None, 0, 0))(weights, ids, seed[rows])
            found[rows, e] = torch.cat([part.flatten(1) for part in each.values()], 1)
    return found


@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "recorded"])
@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:4], NAMES, MANY], ids=["one", "by estimator", "mixed behind", "by token"])
@pytest.mark.parametrize("trainable", [None, ["blocks.1.qkv.weight", "norm.bias", "token.weight", "blocks.0.up.bias"]])
def test_totals_norms_and_inner_products_are_those_of_vmap_grad(scenario, names, trainable, replayed, monkeypatch):
    monkeypatch.setattr(tape, "replayable", lambda policy: replayed)
    policy = model(0, trainable=trainable)
    batch = gradients([gl.ESTIMATORS[name] for name in names], Rollout.enumerated(scenario))
    weight, full = batch.rollout.weight, oracle(policy, batch)
    full = full.detach()
    size = float(full.square().sum(-1).max())
    found = backprop.pullback(policy, batch, weight, pairs=True)
    torch.testing.assert_close(found.total, torch.einsum("n,nep->ep", weight, full), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.inner, torch.einsum("nep,nfp->nef", full, full), rtol=1e-10, atol=1e-10 * size)
    alone = backprop.pullback(policy, batch, weight)
    torch.testing.assert_close(alone.square, full.square().sum(-1), rtol=1e-10, atol=1e-10 * size)
    assert alone.inner is None


class Twisted(Transformer):
    """The same layers, put together in another way."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 0.5


def test_only_the_network_whose_way_back_is_written_is_replayed(scenario):
    twisted = network(0)
    twisted.__class__ = Twisted
    policy = LanguageModel(twisted, scenario.policy.prompts, 3, actions=[0, 2, 3, 5], eos=1, tolerance=1.0)
    assert tape.replayable(scenario.policy)
    assert not tape.replayable(policy)
    batch = gradients([gl.ESTIMATORS[name] for name in NAMES], Rollout.enumerated(gl.Scenario(policy, scenario.reference)))
    found, full = backprop.pullback(policy, batch, batch.rollout.weight), oracle(policy, batch)
    torch.testing.assert_close(found.square, full.square().sum(-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("length", [1, 4])
def test_a_replay_has_the_logits_of_the_network_and_the_cotangents_of_autograd(layers, length):
    """Every layer's cotangents, of the tail and of the stem, for three seeds batched."""
    rng = np.random.default_rng(0)
    made = Transformer(5, 8, 12, layers, 3).double()
    made.norm.eps = made.blocks[0].norm1.eps = 0.1
    ids = torch.from_numpy(rng.integers(5, size=(7, 6)))
    outputs: dict[str, Tensor] = {}
    for name, layer in made.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding | nn.LayerNorm):
            layer.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
    logits = made(ids)[:, -length:]
    played = Replay(made, dict(made.named_parameters()), ids, length)
    torch.testing.assert_close(played.logits, logits.detach(), rtol=1e-12, atol=1e-12)
    seeds, heard = torch.from_numpy(rng.standard_normal((7, length, 3, 5))), {}
    played.backward_body(
        played.backward_head(seeds, lambda a, b: heard.update(dict.fromkeys(a, b.clone()))),
        lambda a, b: heard.update(dict.fromkeys(a, b.clone())),
    )
    assert set(heard) == set(outputs)
    for k in range(3):
        expected = torch.autograd.grad(logits, list(outputs.values()), seeds[:, :, k], retain_graph=True)
        for name, each in zip(outputs, expected, strict=True):
            s = heard[name].shape[1]
            torch.testing.assert_close(heard[name][:, :, k], each[:, -s:], rtol=1e-10, atol=1e-12)
            assert not each[:, :-s].any()


def test_callables_and_parameters_that_were_swapped_in(scenario):
    policy = scenario.policy.with_parameters(scenario.behaviour.parameters)
    moved = gl.Scenario(policy, scenario.reference)
    batch = gradients([my_loss, gl.ESTIMATORS["k3-loss"]], Rollout.enumerated(moved))
    found, full = backprop.pullback(policy, batch, batch.rollout.weight), oracle(policy, batch)
    torch.testing.assert_close(found.total, torch.einsum("n,nep->ep", batch.rollout.weight, full), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.square, full.square().sum(-1), rtol=1e-10, atol=1e-10)
    assert (found.total - backprop.pullback(scenario.policy, batch, batch.rollout.weight).total).norm() > 1e-2


def test_units_add_gradients_before_norms_are_taken(scenario):
    rng = np.random.default_rng(0)
    drawn = scenario.sampler.sample(24, rng, group=4)
    weight = torch.full((24,), 1 / 24, dtype=torch.float64)
    rollout = Rollout.from_responses(scenario, drawn, weight)
    batch = gradients([gl.ESTIMATORS[name] for name in NAMES], rollout)
    full = oracle(scenario.policy, batch).view(6, 4, len(NAMES), -1).sum(1)
    found = backprop.pullback(scenario.policy, batch, weight, unit=4)
    torch.testing.assert_close(found.square, full.square().sum(-1), rtol=1e-10, atol=1e-10)


def test_chunks_do_not_matter(scenario, monkeypatch):
    batch = gradients([gl.ESTIMATORS[name] for name in NAMES], Rollout.enumerated(scenario))
    whole = backprop.pullback(scenario.policy, batch, batch.rollout.weight)
    monkeypatch.setattr(backprop, "PASS_BYTES", 400_000)
    assert backprop.units_per_pass(scenario.policy, 7, 3) < 20
    parts = backprop.pullback(scenario.policy, batch, batch.rollout.weight)
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.square, whole.square, rtol=1e-12, atol=1e-12)


def test_a_table_of_logits_leads_to_the_same_means(scenario):
    """The mean gradient once more: that of the table, pulled back through the table as a function of the parameters."""
    batch = gradients([gl.ESTIMATORS[name] for name in MANY], Rollout.enumerated(scenario))
    found = backprop.pullback(scenario.policy, batch, batch.rollout.weight).total
    theta = scenario.policy.parameters.clone().requires_grad_(True)
    table = scenario.policy.with_parameters(theta).table.flatten()
    for mean, row in zip(found, batch.mean(batch.rollout.weight), strict=True):
        (expected,) = torch.autograd.grad(table @ row, theta, retain_graph=True)
        torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-10)


def test_listed_responses_have_two_routes(scenario):
    """Per response, and through the Gram matrix of the logits along distinct sequences."""
    batch = gradients([gl.ESTIMATORS[name] for name in MANY], Rollout.enumerated(scenario))
    found = backprop.pullback(scenario.policy, batch, batch.rollout.weight)
    size = float(found.square.max())
    squares = backprop.squared_norms(scenario.policy, batch)
    torch.testing.assert_close(squares, found.square, rtol=1e-10, atol=1e-12 * size)
    means = backprop.mean_gradients(scenario.policy, batch.mean(batch.rollout.weight))
    torch.testing.assert_close(means, found.total, rtol=1e-10, atol=1e-10)


def test_the_gram_matrix_is_that_of_the_jacobian(scenario):
    policy = scenario.policy
    theta = policy.parameters.clone().requires_grad_(True)
    table = policy.with_parameters(theta).table
    # The last sequence of the second prompt: its root, the last child, and the last child of that.
    rows = policy.nodes + torch.tensor([0, 4, 20])
    logits = table[rows].flatten()
    jacobian = torch.stack([torch.autograd.grad(logit, theta, retain_graph=True)[0] for logit in logits])
    found = backprop.logit_gram(policy)
    assert found.shape == (3 * 16, 12, 12)
    torch.testing.assert_close(found[2 * 16 - 1], jacobian @ jacobian.T, rtol=1e-10, atol=1e-10)


class Llama(nn.Module):
    """What the layers of a Llama are made of: RMSNorm, linear layers without bias, a gate."""

    class RMSNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def __init__(self, vocab: int = 6, width: int = 8) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocab, width), Llama.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 12, bias=False), nn.Linear(width, 12, bias=False)
        self.down, self.head = nn.Linear(12, width, bias=False), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).cumsum(1)
        y = self.norm(x)
        return self.head(x + self.down(nn.functional.silu(self.gate(y)) * self.up(y)))


def llama(seed: int, **fields: object) -> LanguageModel:
    made, rng = Llama().double(), np.random.default_rng(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.from_numpy(rng.standard_normal(tuple(weight.shape))))
    return LanguageModel(made, [(1, 2)], 3, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_what_an_rms_norm_multiplies_its_weight_with_is_what_torch_computes(dtype, eps):
    """Inputs as small as the constant under the root, which torch takes from the precision where it is not given."""
    constant = torch.finfo(dtype).eps if eps is None else eps
    inputs = constant**0.5 * torch.randn(3, 4, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    norm = torch.nn.RMSNorm(8, eps=eps, dtype=dtype)
    torch.testing.assert_close(layers.weight_inputs(norm, inputs), norm(inputs))


def test_rms_norms_and_frozen_layers():
    scenario = gl.Scenario(llama(0, trainable=["norm.weight", "gate.weight", "down.weight"]), llama(1))
    batch = gradients([gl.ESTIMATORS[name] for name in NAMES], Rollout.enumerated(scenario))
    found, full = backprop.pullback(scenario.policy, batch, batch.rollout.weight), oracle(scenario.policy, batch)
    torch.testing.assert_close(found.square, full.square().sum(-1), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(found.total, torch.einsum("n,nep->ep", batch.rollout.weight, full), rtol=1e-10, atol=1e-10)


def test_long_sequences_take_the_gradients_themselves():
    wide = LanguageModel(network(0), [(1, 2)], 8)
    moved = gl.Scenario(wide, LanguageModel(network(1), [(1, 2)], 8))
    weight = torch.full((6,), 1 / 6, dtype=torch.float64)
    rollout = Rollout.from_responses(moved, wide.sample(6, np.random.default_rng(0)), weight)
    long = gradients([gl.ESTIMATORS["k3-loss"]], rollout)
    found, full = backprop.pullback(wide, long, rollout.weight, unit=6), oracle(wide, long).sum(0)
    torch.testing.assert_close(found.square[0], full.square().sum(-1), rtol=1e-10, atol=1e-10)


def test_what_cannot_be_pulled_back_is_refused(scenario):
    batch = gradients([gl.ESTIMATORS["k3-loss"]], Rollout.enumerated(scenario))
    tied = network(0)
    tied.head.weight = tied.token.weight
    with pytest.raises(ValueError, match="belongs to two layers"):
        layers.trainable_layers(LanguageModel(tied, [(1,)], 2))
    with pytest.raises(ValueError, match="per-sample gradients are known for"):
        layers.trainable_layers(
            LanguageModel(nn.Sequential(nn.Embedding(6, 4), nn.GRU(4, 6, batch_first=True), First()), [(1,)], 2)
        )
    without = Rollout.from_logits(
        *(getattr(batch.rollout, k) for k in ("tokens", "mask", "weight", "logits", "reference_logits"))
    )
    with pytest.raises(ValueError, match="prompts"):
        backprop.pullback(scenario.policy, gradients([gl.ESTIMATORS["k3-loss"]], without), without.weight)

    class Silent(LanguageModel):
        def network(self, features: Tensor) -> Tensor:
            with torch.no_grad():
                return super().network(features)

    policy = scenario.policy
    silent = Silent(policy.model, policy.prompts, 3, actions=policy.actions, eos=1, tolerance=1.0)
    with pytest.raises(ValueError, match="without recording"):
        backprop.pullback(silent, batch, batch.rollout.weight)


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; on a CPU there is nothing to move")
def test_on_a_gpu_the_same_moments(scenario):
    def moved(seed: int) -> LanguageModel:
        return LanguageModel(network(seed).cuda(), scenario.policy.prompts, 3, actions=[0, 2, 3, 5], eos=1, tolerance=1.0)

    batch = gradients([gl.ESTIMATORS[name] for name in NAMES], Rollout.enumerated(scenario))
    there = gradients([gl.ESTIMATORS[name] for name in NAMES], Rollout.enumerated(gl.Scenario(moved(0), moved(1), moved(2))))
    here = backprop.pullback(scenario.policy, batch, batch.rollout.weight, pairs=True)
    found = backprop.pullback(moved(0), there, there.rollout.weight, pairs=True)
    torch.testing.assert_close(found.total, here.total, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.inner, here.inner, rtol=1e-9, atol=1e-12)
