"""Behaviour policies over a language model of this package: no extra is needed. tests/test_pretrained.py has the rest."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

import gradlab as gl
from gradlab.policies import LanguageModel, behaviour
from gradlab.policies.transformer import Transformer


@pytest.fixture(scope="module")
def reference():
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    net = Transformer(7, 8, width=16, layers=1, heads=2).double()
    torch.random.set_rng_state(state)
    return LanguageModel(net, [[1, 2], [3]], 2, eos=0)


@pytest.fixture(scope="module")
def policy(reference):
    noise = torch.randn(len(reference.parameters), generator=torch.Generator().manual_seed(0)).double()
    return reference.with_parameters(reference.parameters + 0.1 * noise)


def test_low_precision_rounds_the_trained_weights(policy, reference):
    low = behaviour.low_precision(policy)
    apart = float((low.table.log_softmax(-1) - policy.table.log_softmax(-1)).abs().max())
    assert 1e-4 < apart < 0.2, "bfloat16 has eight bits"
    assert float((policy.table - reference.table).abs().max()) > 10 * apart, (
        "the trained weights, not the network's, are rounded"
    )
    assert next(policy.model.parameters()).dtype == torch.float64, "the policy's own network stays as it was"
    by_hand = Transformer(7, 8, width=16, layers=1, heads=2)
    by_hand.load_state_dict(policy.model.state_dict())
    sizes = [weight.numel() for weight in policy.weights.values()]
    parts = torch.split(policy.parameters, sizes)
    with torch.no_grad():
        for (name, weight), part in zip(policy.weights.items(), parts, strict=True):
            dict(by_hand.named_parameters())[name].copy_(part.view_as(weight))
        first = by_hand.to(torch.bfloat16)(torch.tensor([[3]]))[0, -1].double()
    torch.testing.assert_close(low.table[low.nodes], first, rtol=2**-7, atol=2**-7)  # a processor may round sums on the way


def test_engines_make_scenarios(policy, reference):
    names = ["k1-reward-to-go", "k1-reward-sequence-weight"]
    for engine in (
        behaviour.tempered(policy, 0.8),
        behaviour.low_precision(policy),
        behaviour.stale(policy, reference.parameters),
    ):
        scenario = gl.Scenario(policy, reference, engine)
        plain, weighted = gl.measure(names, scenario)["bias"]
        assert scenario.lag() > 0
        assert plain > 1e-5
        assert weighted < 1e-9


def test_a_nucleus_costs_what_it_leaves_out(policy, reference):
    cut = behaviour.nucleus(policy, 0.8)
    lost = behaviour.missing_support_probability(policy, cut)
    assert lost.low == lost.value == lost.high
    assert 0.01 < lost.value < 0.5
    sampled = behaviour.missing_support_probability(policy, cut, samples=640)
    assert sampled.low < lost.value < sampled.high
    narrow = behaviour.missing_support_probability(policy, cut, samples=640, level=0.5)
    z = [stats.norm.ppf(0.5 + level / 2) for level in (0.5, 0.95)]
    assert (narrow.high - narrow.low) / (sampled.high - sampled.low) == pytest.approx(z[0] / z[1], rel=1e-9)
    assert gl.measure("k1-reward-sequence-weight", gl.Scenario(policy, reference, cut))["bias"].iloc[0] > 1e-3
    assert behaviour.missing_support_probability(policy, behaviour.nucleus(policy, 1.0)).value == 0
