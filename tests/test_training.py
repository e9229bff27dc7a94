"""Training runs against loops written out with autograd, and what is said of them against hand calculation."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from analysis_runs import Run, run
from scipy import stats
from torch import Tensor

import gradlab as gl
from gradlab import training
from gradlab._common.frames import DIGITS
from gradlab.policies import Responses, small
from gradlab.questions import training as runs
from gradlab.training import Recipe

QUICK = Recipe(steps=3, batch=8, group=4, rate=0.05, eval_every=1, eval_responses=8)


def second(rollout: gl.Rollout) -> Tensor:
    return (rollout.tokens[:, 0] == 1).double()


def my_loss(rollout: gl.Rollout) -> Tensor:
    return (0.5 * rollout.log_ratio.square() * rollout.mask_float).sum(-1)


@pytest.fixture(scope="module")
def tree() -> gl.Tree:
    return gl.Tree.random(vocab=3, length=3, seed=0, eos=2)


def by_hand(start: gl.Tree, recipe: Recipe, name: str | None, beta: float, seed: int, number: int) -> list[float]:
    """KL after every batch: sampling as in the package, everything else by autograd on the logits."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(13, number, 0)))
    table = start.table.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([table], lr=recipe.rate)
    found = []
    for _ in range(recipe.steps):
        old = start.with_parameters(table.detach().flatten().clone())
        drawn = old.sample(recipe.batch, rng)
        tokens, mask = drawn.tokens, drawn.mask
        rows = old.contexts(tokens)

        def log_prob(logits: Tensor, rows: Tensor = rows, tokens: Tensor = tokens, mask: Tensor = mask) -> Tensor:
            return logits.log_softmax(-1)[rows, tokens] * mask

        reward = (tokens[:, 0] == 1).double()
        advantage = torch.tensor([
            reward[i] - np.mean([float(reward[j]) for j in range(recipe.batch) if j != i and j // recipe.group == i // recipe.group])
            for i in range(recipe.batch)
        ])  # fmt: skip
        before, ref = log_prob(old.table), log_prob(start.table)
        for _ in range(recipe.epochs):
            now = log_prob(table)
            ratio = (now - before).exp()
            ell = now - ref
            gain = advantage[:, None] * mask
            if name == "k1-reward":
                gain = gain - beta * (before - ref)
            loss = -torch.minimum(ratio * gain, ratio.clamp(1 - recipe.clip, 1 + recipe.clip) * gain).sum(-1)
            if name == "k2-loss":
                loss = loss + beta * (0.5 * ell.square() * mask).sum(-1)
            if name == "k3-loss":
                loss = loss + beta * (((-ell).exp() - 1 + ell) * mask).sum(-1)
            optimiser.zero_grad()
            loss.mean().backward()
            optimiser.step()
        found.append(gl.Scenario(start.with_parameters(table.detach().flatten()), start).kl())
    return found


@pytest.mark.parametrize("epochs", [1, 4])
@pytest.mark.parametrize("name", ["none", "k1-reward", "k2-loss", "k3-loss"])
def test_a_run_is_that_of_a_loop_with_autograd(tree, name, epochs):
    recipe = Recipe(steps=4, batch=8, group=4, epochs=epochs, rate=0.2, clip=0.1, eval_every=1, eval_responses=8)
    frame = gl.train(tree, second, ["k1-reward", "k2-loss", "k3-loss"], 0.3, recipe=recipe, seeds=2, seed=5)
    run = frame[(frame["estimator"] == name) & (frame["seed"] == 1) & (frame["step"] > 0)]
    expected = by_hand(tree, recipe, None if name == "none" else name, 0.3, 5, 1)
    np.testing.assert_allclose(run["kl"], expected, rtol=1e-9)
    assert run["kl"].max() > 0.05  # it went somewhere


@pytest.mark.parametrize(
    "policy",
    [gl.Tree.random(3, 3, 0, eos=2), gl.Markov.random(4, 5, 0), gl.Gaussian(0.0, 1.0)],
    ids=["tree", "chain", "Gaussian"],
)
def test_a_users_loss_is_trained_like_the_estimator_it_is(policy):
    """Gradient by gradient: Adam makes much of what is nothing but rounding in one of them."""
    rollout = gl.Rollout.from_sampler(gl.Scenario(policy, policy.perturbed(kl=0.3, seed=1)), 12, np.random.default_rng(0))
    advantages = torch.linspace(-1, 1, 12, dtype=torch.float64)
    one, two = (training._gradients(rollout, advantages, loss, 0.3, None, 0.2) for loss in (my_loss, gl.ESTIMATORS["k2-loss"]))
    torch.testing.assert_close(one.mean(rollout.weight), two.mean(rollout.weight), rtol=1e-12, atol=1e-14)
    frame = gl.train(
        policy, lambda rollout: (rollout.tokens[:, 0] > 0.5).double(), {"mine": my_loss}, 0.3, recipe=QUICK, seeds=1
    )
    assert set(frame["estimator"]) == {"none", "mine"}


@pytest.mark.parametrize("names", [["full-both", "k1-reward-to-go"], ["k3-both", "k1-reward-to-go"]])
def test_the_same_kernel_in_loss_and_reward_is_trained_towards_the_optimum(tree, names):
    """Both are unbiased for the same target, so with enough responses they arrive at the same place."""
    recipe = Recipe(steps=60, batch=512, group=512, epochs=2, rate=0.05, eval_every=60, eval_responses=512)
    frame = gl.train(tree, second, names, 0.5, recipe=recipe, seeds=1)
    ends = frame[frame["step"] == 60].set_index("estimator")["kl"]
    assert ends["none"] > 1.5 * ends[names[0]]
    assert ends[names[0]] == pytest.approx(ends[names[1]], rel=0.1)


@pytest.mark.parametrize("name", ["none", "k2-loss"])
def test_traces_are_those_of_one_gradient_per_group(tree, name):
    """`G tr Cov` of group means: each group's gradient by autograd, their covariance by numpy."""
    reference = tree.perturbed(kl=0.4, seed=3)
    recipe = Recipe(steps=1, batch=8, group=4, eval_every=1, eval_responses=40)
    frame = gl.train(tree, second, "k2-loss", 0.7, reference=reference, recipe=recipe, seeds=1)
    drawn = tree.sample(40, np.random.default_rng(np.random.SeedSequence(0, spawn_key=(13, 0, 1))))
    tokens, mask = drawn.tokens, drawn.mask
    rows, reward = tree.contexts(tokens), (tokens[:, 0] == 1).double().view(10, 4)
    advantage = (reward - (reward.sum(1, keepdim=True) - reward) / 3).flatten()
    ref = reference.table.log_softmax(-1)[rows, tokens] * mask
    table = tree.table.clone().requires_grad_(True)
    means = []
    for group in range(10):
        part = slice(4 * group, 4 * group + 4)
        now = table.log_softmax(-1)[rows[part], tokens[part]] * mask[part]
        loss = -(advantage[part, None] * now) + (0.7 * 0.5 * (now - ref[part]).square() if name == "k2-loss" else 0.0)
        means.append(torch.autograd.grad(loss.sum(-1).mean(), table)[0].flatten().numpy())
    expected = 4 * np.cov(np.array(means).T).trace()
    row = frame[(frame["estimator"] == name) & (frame["step"] == 0)].iloc[0]
    assert row["trace_cov"] == pytest.approx(expected, rel=1e-10)


def test_traces_in_parameters_are_those_of_the_tables_chain_rule():
    """A network's traces from group gradients by autograd in its own parameters."""
    policy, reference = (small("names", stage, length=3, precision=torch.float64) for stage in ("few", "reference"))
    recipe = Recipe(steps=1, batch=8, group=4, eval_every=1, eval_responses=16, rate=1e-6)

    def starts_with_m(rollout: gl.Rollout) -> Tensor:
        return (rollout.tokens[:, 0] == 13).double()

    frame = gl.train(policy, starts_with_m, "k3-loss", 0.7, reference=reference, recipe=recipe, seeds=1)
    answers = policy.sample(16, np.random.default_rng(np.random.SeedSequence(0, spawn_key=(13, 0, 1))), 4)
    ((_, ids),) = policy.sequences(answers.prompts, answers.tokens)
    tokens, mask = answers.tokens, answers.mask
    ref = reference.model(ids)[:, -3:].log_softmax(-1).gather(-1, tokens[..., None])[..., 0].detach()
    means = []
    for part in torch.arange(16).view(4, 4):
        now = policy.model(ids[part])[:, -3:].log_softmax(-1).gather(-1, tokens[part][..., None])[..., 0]
        reward = (tokens[part, 0] == 13).double()
        ell, advantage = now - ref[part], reward - (reward.sum() - reward) / 3
        loss = ((-advantage[:, None] * now + 0.7 * ((-ell).exp() - 1 + ell)) * mask[part]).sum(-1).mean()
        means.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.model.parameters()))]))
    stacked = torch.stack(means)
    expected = 4 * float((stacked - stacked.mean(0)).square().sum()) / 3
    row = frame[(frame["estimator"] == "k3-loss") & (frame["step"] == 0)].iloc[0]
    assert row["trace_cov"] == pytest.approx(expected, rel=1e-9)


def test_looking_changes_nothing(tree):
    """Looks draw from a stream of their own."""
    more, less = (gl.train(tree, second, "k2-loss", 0.7, recipe=Recipe(steps=4, batch=8, group=4, eval_every=k, eval_responses=n), seeds=1)
                  for k, n in ((1, 80), (4, 8)))  # fmt: skip
    assert more[more["step"] == 4]["kl"].to_list() == less[less["step"] == 4]["kl"].to_list()


def test_a_run_of_a_language_model_is_that_of_a_loop_with_autograd():
    policy = small("names", length=3, precision=torch.float64)
    recipe = Recipe(steps=2, batch=16, group=4, epochs=2, rate=1e-3, eval_every=1, eval_responses=16)

    def starts_with_m(rollout: gl.Rollout) -> Tensor:
        return (rollout.tokens[:, 0] == 13).double()

    frame = gl.train(policy, starts_with_m, "k3-loss", 0.3, recipe=recipe, seeds=1, seed=2)
    model, rng = copy.deepcopy(policy.model), np.random.default_rng(np.random.SeedSequence(2, spawn_key=(13, 0, 0)))
    looking = np.random.default_rng(np.random.SeedSequence(2, spawn_key=(13, 0, 1)))
    optimiser, trained = torch.optim.Adam(model.parameters(), lr=1e-3), policy.changed(model=model)

    def log_probs(network: torch.nn.Module, answers: Responses) -> Tensor:
        ((_, ids),) = policy.sequences(answers.prompts, answers.tokens)
        return network(ids)[:, -3:].log_softmax(-1), answers.tokens, answers.mask

    def chosen(network: torch.nn.Module, answers: Responses) -> Tensor:
        every, tokens, mask = log_probs(network, answers)
        return every.gather(-1, tokens[..., None])[..., 0] * mask

    for step in range(3):
        answers = trained.sample(16, looking, 4)
        with torch.no_grad():
            now, ref = log_probs(model, answers)[0], log_probs(policy.model, answers)[0]
            kl = (((now.exp() * (now - ref)).sum(-1)) * answers.mask).sum(-1).mean()
        row = frame[(frame["estimator"] == "k3-loss") & (frame["step"] == step)].iloc[0]
        assert row["kl"] == pytest.approx(float(kl), rel=1e-6, abs=1e-14)
        answers = trained.sample(16, rng, 4)
        reward = (answers.tokens[:, 0] == 13).double().view(4, 4)
        advantage = (reward - (reward.sum(1, keepdim=True) - reward) / 3).flatten()
        with torch.no_grad():
            before, ref = chosen(model, answers), chosen(policy.model, answers)
        for _ in range(2):
            now = chosen(model, answers)
            ratio, gain, ell = (now - before).exp(), advantage[:, None], now - ref
            loss = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain) * answers.mask + 0.3 * ((-ell).exp() - 1 + ell)
            optimiser.zero_grad()
            loss.sum(-1).mean().backward()
            optimiser.step()
    assert row["kl"] > 1e-3


def test_k1_in_the_reward_is_k2_as_loss_sample_by_sample():
    policy = small("names", length=4)
    recipe = Recipe(steps=3, batch=16, group=4, rate=1e-3, eval_every=1, eval_responses=16)
    frame = gl.train(policy, training.task_reward("names", policy), ["k1-reward", "k2-loss"], 0.3, recipe=recipe, seeds=1)
    one, two = (frame[frame["estimator"] == name]["kl"].to_numpy() for name in ("k1-reward", "k2-loss"))
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_the_same_bytes_for_any_number_of_workers(tree):
    frames = [gl.train(tree, second, ["k2-loss"], 0.1, recipe=QUICK, seeds=2, jobs=jobs) for jobs in (1, 2)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coefficients": -1.0}, "from 0 on"),
        ({"coefficients": []}, "from 0 on"),
        ({"seeds": 0}, "seeds must be a positive whole number"),
        ({"regularisers": "k1-reward-loo"}, "own groups"),
        ({"regularisers": "k2"}, "unknown estimator"),
        ({"reward": lambda rollout: rollout.tokens[:, :1].double()}, "one finite number per response"),
        ({"reward": lambda rollout: torch.full((8,), math.nan)}, "one finite number per response"),
    ],
)
def test_what_cannot_be_trained_is_refused(tree, given, message):
    arguments = {"reward": second, "regularisers": "k2-loss", "coefficients": 0.1, "recipe": QUICK, "seeds": 1, **given}
    with pytest.raises(ValueError, match=message):
        gl.train(tree, **arguments)


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"rate": math.inf}, {"group": 1}, {"batch": 10, "group": 4}, {"epochs": 1.5}, {"eval_every": True}]
)
def test_recipes_that_mean_nothing_are_refused(given):
    with pytest.raises(ValueError, match=r"positive|groups of at least 2"):
        Recipe(**given)


# ---- what is said of runs -----------------------------------------------------------------------------------------------


def made(values: dict[tuple[str, float], tuple[list[float], list[float]]]) -> pd.DataFrame:
    """A frame of runs with these KLs and rewards at the end, one per seed."""
    rows = [
        {"estimator": name, "coefficient": beta, "epochs": 1, "seed": seed, "step": step, "reward": r, "kl": kl, "length": 1.0,
         "trace_cov": 3.0, "trace_cov_none": 2.0}
        for (name, beta), (kls, rewards) in values.items()
        for seed, (kl, r) in enumerate(zip(kls, rewards, strict=True))
        for step in (0, 10)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_quotients_are_paired_by_seed():
    x, y = np.array([2.0, 6.0, 4.0]), np.array([1.0, 2.0, 4.0])
    found = runs.quotient(x, y)
    test = stats.ttest_1samp(np.log(x / y), 0).confidence_interval(0.95)
    assert found == pytest.approx((6 ** (1 / 3), math.exp(test.low), math.exp(test.high)))
    assert np.isnan(runs.quotient([0.0, 1.0], [1.0, 1.0])).all()


def test_pitmans_interval_ends_where_pitmans_test_rejects():
    """At an end of the interval sums and differences of the scaled pairs correlate just significantly."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 9)) + rng.standard_normal(9)
    centre, low, high = runs.spread(2 * x, y)
    assert low < centre < high
    assert centre == pytest.approx(2 * x.std(ddof=1) / y.std(ddof=1))
    for end in (low, high):
        scaled = 2 * x / end
        assert stats.pearsonr(scaled + y, scaled - y).pvalue == pytest.approx(0.05, rel=1e-6)


def test_spread_covers():
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(2000):
        x, y = rng.multivariate_normal([0, 0], [[4.0, 1.2], [1.2, 1.0]], size=6).T
        _, low, high = runs.spread(x, y)
        hits.append(low <= 2 <= high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def test_rewards_are_compared_at_the_same_kl():
    frame = made({
        ("none", 0.0): ([4.0, 4.0], [1.0, 1.0]),
        ("k2-loss", 0.1): ([2.0, 2.0], [0.8, 0.8]),
        ("k3-loss", 0.1): ([1.0, 1.0], [0.3, 0.5]),
        ("k3-loss", 0.03): ([4.0, 4.0], [0.7, 0.9]),
    })  # fmt: skip
    found = runs.compare(frame).set_index(["estimator", "budget", "coefficient"])
    matched = found.loc["k3-loss", runs.MATCHED, 0.1]
    # Half-way between 1 and 4 nats on a logarithmic axis: rewards of 0.5 and 0.7 against 0.8.
    assert matched["reward_over_k2"] == pytest.approx(math.sqrt(0.5 * 0.7) / 0.8)
    assert found.loc["k3-loss", runs.COEFFICIENT, 0.1]["kl_over_k2"] == pytest.approx(0.5)
    assert found.loc["k2-loss", runs.COEFFICIENT, 0.1]["kl_over_none"] == pytest.approx(0.5)
    assert found.loc["k3-loss", runs.COEFFICIENT, 0.03]["noise_over_none"] == pytest.approx(1.5)
    # Where the KL was not reached there is nothing to read.
    far = made({("none", 0.0): ([4.0], [1.0]), ("k2-loss", 0.1): ([9.0], [0.8]), ("k3-loss", 0.1): ([1.0], [0.3])})
    assert runs.MATCHED not in set(runs.compare(far)["budget"])


# ---- analysis 13 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run("13_training", tmp_path_factory.mktemp("analysis_13"))


def test_files_and_captions(ran):
    suffixes = ("png", "pdf", "csv", "md")
    expected = {f"{name}.{suffix}" for name in ("13_runs", "13_training") for suffix in suffixes} | {
        "13_ends.csv",
        "13_pairs.csv",
    }
    assert {path.name for path in ran.folder.iterdir()} == expected | {"13_frames.json"}
    ran.check_captions()
    for name in ("13_runs", "13_training"):
        assert "nan" not in ran.text(name)
        assert "Made by `gradlab reproduce --only 13_training --quick`, seed 0, with gradlab" in ran.text(name)


def test_the_numbers_of_the_analysis_once_more(ran):
    """KL of k3 over that of k2, from the looks themselves, and the caption's digits."""
    looks = ran.names["one"]
    late = looks[(looks["step"] >= 2) & (looks["coefficient"] == 0.1)]
    ends = {name: late[late["estimator"] == name].groupby("seed")["kl"].mean() for name in ("k2-loss", "k3-loss")}
    expected = float(np.exp(np.log(ends["k3-loss"] / ends["k2-loss"]).mean()))
    frame = ran.frame("13_training")
    row = frame[(frame["estimator"] == "k3-loss") & (frame["budget"] == runs.COEFFICIENT) & (frame["data"] == runs.ONE_EPOCH)]
    assert row["kl_over_k2"].item() == pytest.approx(expected, rel=10.0 ** (1 - DIGITS))
    assert f"k3-loss at β = 0.1: {expected:.2f} (" in ran.text("13_training")


@pytest.mark.parametrize(
    ("claim", "estimator", "column", "value", "verdict"),
    [
        ("train-k2-k3", "k3-loss", "kl_over_k2", 2.0, "HOLDS"),
        ("train-k2-k3", "k3-loss", "kl_over_k2", 0.5, "FAILS"),
        ("k1-loss-noise", "k1-loss", "noise_over_none", 0.5, "FAILS"),
        ("train-k1-loss", "k1-loss", "kl_over_none", 3.0, "FAILS"),
    ],
)
def test_a_planted_change_changes_the_verdict(ran, claim, estimator, column, value, verdict):
    frame = ran.frame("13_training")
    rows = frame["estimator"] == estimator
    for end, factor in (("", 1.0), ("_low", 0.99), ("_high", 1.01)):
        frame.loc[rows, f"{column}{end}"] = factor * value
    settled = gl.claims.verify({"13_training": frame}, [claim])
    settled = settled[(settled["id"] == claim) & (settled["frame"] == "13_training") & settled["rule"].str.contains(column)]
    assert list(settled["verdict"]) == [verdict]
