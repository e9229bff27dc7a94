"""Language models as policies: rollouts, targets and measures against loops over responses, and what ships with the package."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from make_checkpoints import initial, reinforce, stream, sums, supervised
from test_backprop import model, network, scenario  # noqa: F401  (a fixture)
from torch import Tensor, nn

import gradlab as gl
from gradlab import intervals
from gradlab.policies import LanguageModel, Responses, decoding, small
from gradlab.policies.actions import inverse_cdf_sample
from gradlab.policies.small import STAGES, TASKS, pairs
from gradlab.policies.transformer import Cache
from gradlab.policies.trunk import Trunk
from gradlab.questions import language
from gradlab.rollout import Rollout
from gradlab.solvers import montecarlo

measure_module = __import__("sys").modules["gradlab.measure"]


def by_hand(policy: LanguageModel, theta: Tensor | None = None) -> dict[tuple[int, tuple[int, ...]], Tensor]:
    """Log-probability of every response to every prompt, by a loop over prefixes and one pass of the bare network each."""
    at = policy if theta is None else policy.with_parameters(theta)
    found: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def grow(prompt: int, said: tuple[int, ...], log_prob: Tensor) -> None:
        if len(said) == policy.length or (said and said[-1] == policy.eos):
            found[prompt, said] = log_prob
            return
        ids = torch.tensor([[*policy.prompts[prompt], *(policy.actions[k] for k in said)]])
        log_p = at.network(ids)[0, -1, list(policy.actions)].double().log_softmax(-1)
        for k in range(len(policy.actions)):
            grow(prompt, (*said, k), log_prob + log_p[k])

    for prompt in range(len(policy.prompts)):
        grow(prompt, (), torch.zeros((), dtype=torch.float64))
    return found


def test_listed_responses_are_those_of_a_loop(scenario):  # noqa: F811
    rollout = Rollout.enumerated(scenario)
    mine = {
        (int(x), tuple(y[m].tolist())): (float(w), float(ratio))
        for x, y, m, w, ratio in zip(
            rollout.prompts, rollout.tokens, rollout.mask, rollout.weight, rollout.log_ratio.sum(-1), strict=True
        )
    }
    pi, ref, mu = (by_hand(policy) for policy in (scenario.policy, scenario.reference, scenario.behaviour))
    assert mine.keys() == pi.keys()
    for key, (weight, ratio) in mine.items():
        assert weight == pytest.approx(float(mu[key].exp()) / 3, rel=1e-12)
        assert ratio == pytest.approx(float(pi[key] - ref[key]), abs=1e-12)
    assert scenario.kl() == pytest.approx(sum(float(pi[k].exp() * (pi[k] - ref[k])) for k in pi) / 3, rel=1e-12)
    assert scenario.lag() == pytest.approx(sum(float(mu[k].exp() * (mu[k] - pi[k])) for k in pi) / 3, rel=1e-12)


def test_targets_are_those_of_their_definitions(scenario):  # noqa: F811
    theta = scenario.policy.parameters.clone().requires_grad_(True)
    pi = by_hand(scenario.policy, theta)
    ref = {key: value.detach() for key, value in by_hand(scenario.reference).items()}
    values = {
        "reverse_kl": sum(pi[k].exp() * (pi[k] - ref[k]) for k in pi) / 3,
        "forward_kl": sum(ref[k].exp() * (ref[k] - pi[k]) for k in pi) / 3,
        "mse": sum(0.5 * (pi[k].exp() - ref[k].exp()).square() for k in pi) / 3,
        "inverse_length": sum(pi[k].exp() / len(k[1]) for k in pi) / 3,
    }
    for name, value in values.items():
        (expected,) = torch.autograd.grad(value, theta, retain_graph=True)
        assert (gl.exact.gradient(name, scenario) - expected).norm() < 1e-12 * max(1, float(expected.norm())), name


def test_exact_measures_agree_with_the_declared_targets(scenario):  # noqa: F811
    """Every catalogue entry descends what it declares, in the parameters of a network just as on a table."""
    on = scenario.on_policy()
    for moved in (on, scenario):
        for name, entry in gl.CATALOGUE.items():
            declared = entry.on_policy if moved is on else entry.off_policy
            if declared is None:
                continue
            mean = gl.exact.moments(entry.estimator, moved).mean
            truth = sum(c * gl.exact.gradient(target, moved) for target, c in declared.items())
            assert (mean - truth).norm() < 1e-10 * max(1, float(mean.norm())), name


def test_group_baselines_over_several_prompts_by_brute_force():
    policy = LanguageModel(network(0, vocab=3), [(1, 2), (0,)], 1)
    case = gl.Scenario(policy, LanguageModel(network(1, vocab=3), [(1, 2), (0,)], 1))
    found = gl.exact.moments(gl.Estimator("k1", "reward", "return", baseline="leave_one_out", group=2), case)
    mean, second = torch.zeros_like(found.mean), 0.0
    for x in range(2):
        theta = policy.parameters.clone().requires_grad_(True)
        log_p = policy.with_parameters(theta).table[x].log_softmax(-1)
        scores = [torch.autograd.grad(term, theta, retain_graph=True)[0] for term in log_p]
        ratio = (log_p - case.reference.table[x].log_softmax(-1)).detach()
        for i in range(3):
            for j in range(3):
                g = ((ratio[i] - ratio[j]) * scores[i] + (ratio[j] - ratio[i]) * scores[j]) / 2
                weight = float((log_p[i] + log_p[j]).exp()) / 2
                mean, second = mean + weight * g, second + weight * float(g.square().sum())
    assert (found.mean - mean).norm() < 1e-12
    assert found.trace_cov == pytest.approx(2 * (second - float(mean.square().sum())), rel=1e-10)


def test_sampling_follows_the_distribution(scenario):  # noqa: F811
    n = 20_000
    drawn = scenario.behaviour.sample(n, np.random.default_rng(1))
    prompts, tokens, mask = drawn.prompts, drawn.tokens, drawn.mask
    mu = by_hand(scenario.behaviour)
    counts: dict[tuple[int, tuple[int, ...]], int] = {}
    for x, y, m in zip(prompts.tolist(), tokens, mask, strict=True):
        key = x, tuple(y[m].tolist())
        counts[key] = counts.get(key, 0) + 1
    chi2 = sum((counts.get(k, 0) - n * float(p.exp()) / 3) ** 2 / (n * float(p.exp()) / 3) for k, p in mu.items())
    assert chi2 < len(mu) + 4 * math.sqrt(2 * len(mu))
    assert bool((tokens[~mask] == scenario.behaviour.eos).all())
    again = scenario.behaviour.sample(n, np.random.default_rng(1))
    assert torch.equal(again.tokens, tokens)


class Reread(LanguageModel):
    """Overrides the network, so that every prefix is read anew."""

    def network(self, features, *cache):
        return super().network(features)


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 2.0}, {"top_p": 0.8}, {"actions": (0, 2, 3), "eos": 1, "tolerance": 1.0}]
)
@pytest.mark.parametrize("swapped", [False, True])
def test_kept_keys_and_values_draw_the_tokens_of_prefixes_read_anew(fields, swapped, monkeypatch):
    """Prompts of different lengths, responses that end, in several blocks."""
    monkeypatch.setattr(decoding, "TOGETHER", 64)
    given = {"eos": 2, "temperature": 4.0, **fields}
    kept, anew = (of(network(0, vocab=4), [(1, 2), (0,), (3, 1)], 4, **given) for of in (LanguageModel, Reread))
    assert kept.own_network
    assert not anew.own_network
    if swapped:
        moved = kept.parameters + 0.3
        kept, anew = kept.with_parameters(moved), anew.with_parameters(moved)
    drawn, expected = (policy.sample(600, np.random.default_rng(3)) for policy in (kept, anew))
    assert torch.equal(drawn.tokens, expected.tokens)
    assert torch.equal(drawn.prompts, expected.prompts)
    assert len(drawn.tokens.unique(dim=0)) > 20
    assert 0 < int(drawn.mask.sum()) < drawn.mask.numel()


def test_a_cache_reads_on_where_it_is():
    model = network(0, vocab=4)
    ids = torch.tensor([[1, 2, 0, 3], [3, 0, 1, 1]])
    cache = Cache()
    steps = [model(part, cache) for part in (ids[:, :2], ids[:, 2:3], ids[:, 3:])]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids), rtol=1e-12, atol=1e-13)
    cache.select(torch.tensor([1]))
    assert cache.length == 4
    with pytest.raises(ValueError, match="are more than the context of"):
        model(ids[:1].repeat(1, 20), cache)


def test_draws_at_the_edges_are_possible_tokens():
    logits = torch.tensor([[0.0, -1e9, 1.0, -1e9], [0.0, 0.0, 0.0, -1e9]], dtype=torch.float64)
    assert inverse_cdf_sample(logits, torch.tensor([1 - 1e-16, 0.0]).double()).tolist() == [2, 0]
    assert inverse_cdf_sample(logits, torch.tensor([0.9999999, 0.9999999]).double()).tolist() == [2, 2]


def test_temperature_and_nucleus(scenario):  # noqa: F811
    policy = scenario.policy
    prompts, tokens = torch.tensor([0, 1]), torch.tensor([[0, 2, 1], [3, 3, 3]])
    plain = policy.logits(prompts, tokens)
    torch.testing.assert_close(policy.changed(temperature=2.0).logits(prompts, tokens), plain / 2)
    cut = policy.changed(top_p=0.6).logits(prompts, tokens).softmax(-1)
    for p, q in zip(plain.softmax(-1).flatten(0, 1), cut.flatten(0, 1), strict=True):
        kept, mass = [], 0.0
        for k in p.argsort(descending=True).tolist():
            if mass < 0.6:
                kept.append(k)
                mass += float(p[k])
        expected = torch.zeros_like(p)
        expected[kept] = p[kept] / mass
        torch.testing.assert_close(q, expected)


def test_sampled_moments_cover_the_exact_ones(scenario):  # noqa: F811
    names = ["k1-loss", "k2-loss", "full-both-prefix", "k1-reward-loo"]
    exact = gl.measure(names, scenario).set_index("estimator")
    sampled = gl.measure(names, scenario, samples=4096, seed=3, level=0.999).set_index("estimator")
    assert set(sampled["method"]) == {"drawn"}
    for name in names:
        for column in ("bias", "noise"):
            low, high = sampled.loc[name, [f"{column}_low", f"{column}_high"]]
            assert low <= exact.loc[name, column] + 1e-9, (name, column)
            assert high >= exact.loc[name, column] - 1e-9, (name, column)
            assert high - low < max(exact.loc[name, column], 0.4)


def test_where_the_truth_is_estimated_the_intervals_cover_it(scenario, monkeypatch):  # noqa: F811
    names = ["k2-loss", "full-loss", "k1-reward-sequence-weight"]
    exact = gl.measure(names, scenario).set_index("estimator")
    monkeypatch.setattr(LanguageModel, "tabulated", False)
    found = gl.measure([*names, "full-both-prefix"], scenario, samples=4096, seed=2, level=0.999).set_index("estimator")
    assert found["method"].eq("drawn, target estimated").all()
    assert math.isnan(found.loc["full-both-prefix", "bias"])  # the stand-in for the target says nothing about itself
    for name in names:
        for column in ("bias", "cosine", "noise"):
            low, high = found.loc[name, [f"{column}_low", f"{column}_high"]]
            assert low - 1e-9 <= exact.loc[name, column] <= high + 1e-9, (name, column)
    assert found["kl"].iloc[0] == pytest.approx(scenario.kl(), rel=0.1)
    assert found["lag"].iloc[0] == pytest.approx(scenario.lag(), rel=0.1)
    with pytest.raises(ValueError, match="no estimator of gradlab is unbiased for 'forward_kl'"):
        gl.measure("k2-loss", scenario, "forward_kl", samples=256)


def test_no_answer_hangs_on_the_last_bit_of_a_sampled_mean(scenario, monkeypatch):  # noqa: F811
    """As another processor would: every sampled mean one unit in the last place off, each its own way."""
    monkeypatch.setattr(LanguageModel, "tabulated", False)
    names = ["k1-loss", "k2-loss", "k3-loss-prefix", "k1-reward-to-go", "full-both", "full-loss", "full-both-prefix"]
    worlds = [scenario, scenario.on_policy()]

    def found() -> pd.DataFrame:
        return gl.measure(names, worlds, ["reverse_kl", "reverse_kl_frozen_prefix"], samples=512, seed=2)

    plain, original = found(), montecarlo.moments

    def nudged(*arguments, **options):
        rng = np.random.default_rng(0)

        def off(values):
            towards = torch.from_numpy(rng.choice([-np.inf, np.inf], values.shape))
            return torch.nextafter(values, towards.to(values))

        parts = original(*arguments, **options)
        return [replace(m, mean=off(m.mean), batches=off(m.batch_means)) for m in parts]

    monkeypatch.setattr(montecarlo, "moments", nudged)
    again = found()
    itself = plain[plain["bias"].isna()][["off_policy", "estimator", "target"]].to_numpy().tolist()
    assert sorted(itself) == [
        [False, "full-both", "reverse_kl"],
        [False, "full-both-prefix", "reverse_kl"],
        [False, "full-loss", "reverse_kl_frozen_prefix"],
        [True, "full-both-prefix", "reverse_kl"],
        [True, "full-loss", "reverse_kl_frozen_prefix"],
    ]
    assert not plain["trace_cov"].equals(again["trace_cov"]) or not plain["bias"].equals(again["bias"])
    pd.testing.assert_frame_equal(plain, again, rtol=1e-6, atol=1e-12)


def test_the_cosine_of_two_estimated_means_is_covered():
    rng, misses = np.random.default_rng(0), 0
    m, t = np.array([1.0, 0.5, 0.0, 0.2]), np.array([0.6, 0.9, 0.3, 0.0])
    truth = m @ t / np.linalg.norm(m) / np.linalg.norm(t)
    for _ in range(300):
        shared = rng.standard_normal((32, 4))
        x, y = m + shared + 0.5 * rng.standard_normal((32, 4)), t + shared + 0.5 * rng.standard_normal((32, 4))
        found = intervals.cosine_of_means(x / 1.0, y / 1.0)
        misses += not found.low <= truth <= found.high
    assert misses / 300 < 0.1
    with pytest.raises(ValueError, match="one shape"):
        intervals.cosine_of_means(x, y[:16])


def test_estimates_of_the_kl_are_right(scenario):  # noqa: F811
    assert montecarlo.kl(scenario, 8192) == pytest.approx(scenario.kl(), rel=0.05)
    assert montecarlo.lag(scenario, 8192) == pytest.approx(scenario.lag(), rel=0.05)
    assert montecarlo.lag(scenario.on_policy(), 64) == 0
    # The responses that moments are made of tell the same, and one pass gives both.
    for each, lag in ((scenario, scenario.lag()), (scenario.on_policy(), 0.0)):
        found = montecarlo.moments(gl.ESTIMATORS["k2-loss"], each, 8192, seed=3)
        assert found.distances == pytest.approx((each.kl(), lag), rel=0.05)


def test_a_trunk_keeps_what_it_has_seen_and_no_more_than_it_may():
    class Counting(nn.Module):
        calls = 0

        def forward(self, ids: Tensor) -> Tensor:
            Counting.calls += len(ids)
            return ids[..., None].float()

    trunk = Trunk(Counting(), capacity=3 * 4 * 4)
    ids = torch.arange(12).view(3, 4)
    assert torch.equal(trunk(ids), ids[..., None].float())
    assert torch.equal(trunk(torch.cat([ids, ids])), torch.cat([ids, ids])[..., None].float())
    assert Counting.calls == 3
    more = ids + 100
    assert torch.equal(trunk(more), more[..., None].float())
    trunk(ids)
    assert Counting.calls == 9  # the first three were pushed out


def test_bad_input_is_refused():
    net = network(0)
    bad: list[tuple[dict[str, object], str]] = [
        ({"prompts": []}, "at least one"),
        ({"prompts": [()]}, "none of them empty"),
        ({"length": 0}, "positive whole number"),
        ({"context": 4, "prompts": [(1, 2, 3)]}, "make 5 ids .* takes 4"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"trainable": ["nothing.weight"]}, r"unknown \['nothing.weight'\]"),
        ({"actions": [0, 9]}, "ids below 6"),
        ({"prompts": [(7,)]}, "ids from 7 to 7"),
        ({"eos": 6}, "position among"),
        ({"words": ["a"]}, "name each of the 6"),
    ]
    for fields, message in bad:
        given = {"prompts": [(1, 2)], "length": 3} | fields
        with pytest.raises(ValueError, match=message):
            LanguageModel(net, **given)  # type: ignore[arg-type]
    broken = network(0)
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        LanguageModel(broken, [(1,)], 2)
    with pytest.warns(UserWarning, match=r"leaves out up to \d+\.\d% of the first step's probability") as told:
        LanguageModel(net, [(1,)], 2, actions=[0, 1])
    assert told[0].filename == __file__  # where the policy was made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LanguageModel(net, [(1,)], 2, actions=[0, 1], tolerance=1.0)
    with pytest.raises(ValueError, match="does not share the policy's support"):
        gl.Scenario(model(0), model(1, actions=[0, 1, 2, 3]))
    with pytest.raises(ValueError, match="sample it"):
        LanguageModel(net, [(1,)], 8).enumerate()


def test_what_needs_a_table_of_parameters_says_so(scenario):  # noqa: F811
    with pytest.raises(ValueError, match="too large a covariance matrix"):
        gl.exact.covariance(gl.ESTIMATORS["k2-loss"], scenario)
    with pytest.raises(ValueError, match="no names worth reading"):
        gl.components("k2-loss", scenario, samples=256)
    with pytest.raises(ValueError, match="shares are exact sums over tokens"):
        gl.asymmetry.measure("k2-loss", scenario)


def test_workers_give_the_same_bytes(scenario):  # noqa: F811
    scenarios = [scenario, scenario.on_policy()]
    one, two = (gl.measure(["k2-loss", "k3-loss"], scenarios, samples=256, seed=1, jobs=jobs) for jobs in (1, 2))
    assert one.to_csv() == two.to_csv()


# ---- what ships with the package ----------------------------------------------------------------------------------------


def held_out(count: int) -> list[str]:
    return [f"{a:02d}+{b:02d}=" for a, b in np.random.default_rng(0).permutation(pairs(held_out=True))[:count]]


def test_shipped_stages_are_real_training_at_growing_reward():
    rng = np.random.default_rng(0)
    for task, prompts in (("addition", held_out(500)), ("names", None)):
        rewards = {}
        for stage in STAGES:
            policy = small(task, stage, prompts)
            assert 90_000 < len(policy.parameters) < 120_000
            rewards[stage] = float(TASKS[task].reward(policy, policy.sample(1000, rng)).mean())
        assert rewards["many"] > rewards["reference"] + 0.08
        assert rewards["few"] < rewards["many"]
        assert 0.05 < rewards["reference"] < 0.8  # headroom
    short = {stage: small("names", stage, length=2) for stage in STAGES}
    kls = [float(short[stage].kl(short["reference"])) for stage in STAGES]
    assert kls[0] == 0
    assert 0 < kls[1] < kls[2] < kls[3]


def test_shipped_models_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="unknown task 'additon'; did you mean 'addition'"):
        small("additon")
    with pytest.raises(ValueError, match="unknown stage"):
        small("names", "best")
    with pytest.raises(ValueError, match=r"does not know \['x'\]"):
        small("addition", prompts=["1x+22="])


def test_rewards_are_verified():
    policy = small("addition", prompts=["12+34=", "99+99="])
    task, tokens = TASKS["addition"], torch.tensor([[0, 4, 6], [1, 9, 8], [0, 4, 5], [10, 9, 8]])
    assert task.reward(policy, Responses(tokens, tokens >= 0, torch.tensor([0, 1, 0, 1]))).tolist() == [1, 1, 0, 0]
    names = small("names")
    tokens = torch.tensor([[names.words.index(c) for c in word.ljust(10, ".")] for word in ("anna", "john")])
    mask = torch.arange(10) < 5
    assert TASKS["names"].reward(names, Responses.without_prompt(tokens, mask.expand(2, -1))).tolist() == [1, 0]


def test_training_is_deterministic_and_learns():
    states = []
    for _ in range(2):
        net, rng = initial(TASKS["addition"], stream(0, 0)), stream(0, 1)
        with torch.no_grad():
            ids, mask = TASKS["addition"].examples(sums(np.random.default_rng(5), 200))
            before = nn.functional.cross_entropy(net(ids[:, :-1])[mask], ids[:, 1:][mask])
        supervised(TASKS["addition"], net, lambda n, rng=rng: sums(rng, n), 6)
        with torch.no_grad():
            after = nn.functional.cross_entropy(net(ids[:, :-1])[mask], ids[:, 1:][mask])
        assert after < before
        policy = TASKS["addition"].policy(net, held_out(8))
        seen: list[int] = []
        reinforce(policy, partial(TASKS["addition"].reward, policy), stream(0, 2), 2, seen.append)
        assert seen == [1, 2]
        states.append(torch.cat([weight.detach().flatten() for weight in net.parameters()]))
    assert torch.equal(*states)
    assert len(set(pairs(held_out=True)) & set(pairs(held_out=False))) == 0


# ---- questions ----------------------------------------------------------------------------------------------------------


def test_parts_of_tokens_add_up_and_are_named(scenario):  # noqa: F811
    on = scenario.on_policy()
    frame = language.parts(["k2-loss", "k3-loss"], on)
    u = gl.exact.gradient("reverse_kl", on)
    for name, part in frame.groupby("estimator"):
        mean = gl.exact.moments(gl.ESTIMATORS[name], on).mean
        assert part["expected"].sum() == pytest.approx(float(mean @ u / u.norm()), rel=1e-10)
    k3 = language.sides(frame).set_index("estimator").loc["k3-loss"]
    assert k3["under_mass"] == pytest.approx(0.5, abs=1e-10)  # E[1 − δ] = 0
    theta = on.policy.parameters.clone().requires_grad_(True)
    rollout = Rollout.enumerated(on)
    log_p = on.policy.with_parameters(theta).logits(rollout.prompts, rollout.tokens).log_softmax(-1)
    live = torch.nonzero(rollout.mask)
    for row in (0, 17, 60):
        i, t = live[row].tolist()
        (score,) = torch.autograd.grad(log_p[i, t, rollout.tokens[i, t]], theta, retain_graph=True)
        a, w = float(rollout.log_ratio[i, t]), float(rollout.weight[i])
        got = frame[frame["estimator"] == "k2-loss"].iloc[row]
        assert got["second"] == pytest.approx(w * a * a * float(score.square().sum()), rel=1e-8)
        assert got["expected"] == pytest.approx(w * a * float(score @ u / u.norm()), rel=1e-8, abs=1e-14)
        assert got["token"] == f"<{[0, 2, 3, 5][int(rollout.tokens[i, t])]}>"
    named = language.tokens(frame, 3)
    assert named.groupby("estimator").size().eq(3).all()
    assert named.groupby("estimator")["second_share"].apply(lambda s: s.is_monotonic_decreasing).all()
    drawn = language.parts(["k3-loss"], on, samples=64)
    assert drawn["weight"].max() == pytest.approx(1 / 64)


def test_extremes_count_responses(scenario):  # noqa: F811
    on = scenario.on_policy()
    frame = language.extremes(on, factor=2.0).set_index("side")
    rollout = Rollout.enumerated(on)
    for side, sign in (("δ → 0", 1), ("δ → ∞", -1)):
        held = [
            float(w) for w, ratios, m in zip(rollout.weight, rollout.log_ratio, rollout.mask, strict=True)
            if any(sign * float(x) > math.log(2) for x in ratios[m])
        ]  # fmt: skip
        assert frame.loc[side, "responses"] == pytest.approx(sum(held), rel=1e-12)
        assert 0 < frame.loc[side, "responses"] < 1
    sampled = language.extremes(on, samples=2000, seed=1, factor=2.0).set_index("side")
    for side in frame.index:
        assert sampled.loc[side, "responses_low"] <= frame.loc[side, "responses"] <= sampled.loc[side, "responses_high"]
    low, high = language.clopper_pearson(0, 50)
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 50)))


def test_a_scenario_without_a_name_is_measured_where_its_responses_cannot_be_listed():
    late, start = (gl.policies.small("names", stage) for stage in ("some", "reference"))
    sums = gl.Scenario(late, start, start)
    assert sums.label == "languagemodel v=27 T=10 eos=0 off-policy"
    row = gl.measure("k2-loss", gl.Scenario(late, start), samples=64).iloc[0]
    assert row["scenario"] == "languagemodel v=27 T=10 eos=0"
    assert row["kl"] > 0
