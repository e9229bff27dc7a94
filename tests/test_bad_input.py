"""Bad input over the public functions is a `ValueError` with a reason, and what is one or many may come in any collection."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import gradlab as gl
from gradlab.policies import behaviour
from gradlab.questions import distance, log_ratios, tails
from gradlab.rollout import Rollout

BANDIT = gl.Bandit([0.0, 1.0])
SCENARIO = gl.Scenario(BANDIT, gl.Bandit([0.0, 0.0]))
GAUSSIANS = gl.Scenario(gl.Gaussian(0, 1), gl.Gaussian(0.1, 1))
K2, K3 = gl.ESTIMATORS["k2-loss"], gl.ESTIMATORS["k3-loss"]
WORLD = gl.ascent.World("w", BANDIT, torch.tensor([0.0, 1.0]))
RECIPE = gl.training.Recipe(steps=2, batch=8, group=4, eval_responses=8, eval_every=1)


def second(rollout: Rollout) -> torch.Tensor:
    return (rollout.tokens[:, 0] == 1).double()


def trained(**given: object) -> pd.DataFrame:
    return gl.train(**{"policy": BANDIT, "reward": second, "regularisers": "k2-loss", "recipe": RECIPE, "seeds": 1} | given)


def rollout(weight: list[float], dtype: torch.dtype = torch.float64) -> Rollout:
    tokens, logits = torch.tensor([[0], [1]]), torch.zeros(2, 1, 2, dtype=torch.float64)
    return Rollout.from_logits(tokens, tokens >= 0, torch.tensor(weight, dtype=dtype), logits, logits)


#: What draws, as a function of its seed.
DRAWING = {
    "measure": lambda seed: gl.measure("k2-loss", SCENARIO, samples=100, seed=seed),
    "exact": lambda seed: gl.measure("k2-loss", SCENARIO, seed=seed),
    "moments": lambda seed: gl.montecarlo.moments(K2, SCENARIO, 100, seed),
    "replicates": lambda seed: gl.montecarlo.replicates(K2, SCENARIO, 100, 3, seed),
    "components": lambda seed: gl.components("k2-loss", SCENARIO, samples=100, seed=seed),
    "values": lambda seed: gl.values("k2", SCENARIO, samples=100, seed=seed),
    "train": lambda seed: trained(seed=seed),
    "bandit": lambda seed: gl.Bandit.random(3, seed),
    "tree": lambda seed: gl.Tree.random(2, 2, seed),
    "markov": lambda seed: gl.Markov.random(2, 4, seed),
    "perturbed": lambda seed: BANDIT.perturbed(kl=0.1, seed=seed),
    "gaussian": lambda seed: gl.Gaussian(0, 1).perturbed(scale=0.1, seed=seed),
}


@pytest.mark.parametrize("seed", [None, 1.5, -1, "1", True])
@pytest.mark.parametrize("name", DRAWING)
def test_a_seed_is_a_whole_number(name, seed):
    with pytest.raises(ValueError, match=f"seed must be a whole number from 0 on, got {seed!r}"):
        DRAWING[name](seed)


REFUSED = {
    "target None": (lambda: gl.measure("k2-loss", SCENARIO, target=None), "unknown target None"),
    "target 3": (lambda: gl.measure("k2-loss", SCENARIO, target=3), "unknown target 3"),
    "gradient": (lambda: gl.exact.gradient(None, SCENARIO), "unknown target None"),
    "gradient of a policy": (lambda: gl.exact.gradient("reverse_kl", BANDIT), r"a scenario is gl\.Scenario.*got Bandit"),
    "objective of a policy": (lambda: gl.exact.objective("reverse_kl", BANDIT), "got Bandit"),
    "moments of a policy": (lambda: gl.exact.moments(K2, BANDIT), "got Bandit"),
    "samples of a policy": (lambda: gl.montecarlo.moments(K2, BANDIT), "got Bandit"),
    "components of a policy": (lambda: gl.components("k2-loss", BANDIT), "got Bandit"),
    "measure of a policy": (lambda: gl.measure("k2-loss", [BANDIT]), "got Bandit"),
    "no estimator": (lambda: gl.measure(None, SCENARIO), "an estimator is .*got None"),
    "moments by name": (lambda: gl.exact.moments("k2-loss", SCENARIO), r"gl\.ESTIMATORS\['k2-loss'\] looks"),
    "moments of nothing": (lambda: gl.exact.moments(None, SCENARIO), "got None"),
    "samples 1.5": (lambda: gl.measure("k2-loss", SCENARIO, samples=1.5), r"samples must be a positive whole number, got 1\.5"),
    "level 1.5": (lambda: gl.measure("k2-loss", SCENARIO, samples=100, level=1.5), "level must lie strictly between 0 and 1"),
    "level None": (lambda: gl.measure("k2-loss", SCENARIO, samples=100, level=None), "level must lie strictly .* got None"),
    **{
        f"level of {name}": (call, "level must lie strictly between 0 and 1, got 1.5")
        for name, call in {
            "exact measure": lambda: gl.measure("k2-loss", SCENARIO, level=1.5),
            "looks": lambda: gl.measure("k2-loss", SCENARIO, samples=64, level=1.5, anytime=True),
            "exact components": lambda: gl.components("k2-loss", SCENARIO, level=1.5),
            "exact values": lambda: gl.values("k2", SCENARIO, level=1.5),
            "exact asymmetry": lambda: gl.asymmetry.measure("k2-loss", SCENARIO, level=1.5),
            "errors": lambda: distance.sampled_rmse("k2-loss", [SCENARIO], [16], level=1.5),
            "masses": lambda: log_ratios.masses(SCENARIO, [(-1, 1)], level=1.5),
            "histogram": lambda: log_ratios.histogram(SCENARIO, [0], level=1.5),
            "bounds": lambda: log_ratios.bounds(np.ones((9, 1)), np.ones(9), 1, np.ones(1), 1.5),
            "a lost mass": lambda: behaviour.missing_support_probability(None, None, level=1.5),
            "extremes": lambda: gl.language.extremes(SCENARIO, level=1.5),
            "a binomial": lambda: gl.language.clopper_pearson(1, 9, 1.5),
            "quotients": lambda: gl.runs.quotient([1.0, 2.0], [2.0, 1.0], 1.5),
            "spreads": lambda: gl.runs.spread([1.0, 2.0, 3.0], [2.0, 1.0, 1.0], 1.5),
            "runs": lambda: gl.runs.compare(pd.DataFrame(), level=1.5),
            "runs of tails": lambda: tails.over_runs(pd.DataFrame(), ["mean"], 1.5),
            "samples of a claim": lambda: gl.claims.samples_needed(gl.claims.CLAIMS[0], 0.0, -1.0, 1.0, 100, 1.5),
            "a power": lambda: gl.intervals.detectable(100, 1.0, level=1.5),
        }.items()
    },
    "verdicts of nothing": (lambda: gl.claims.verify(None), "frames must be a folder, or a mapping .*got None"),
    "verdicts of 3": (lambda: gl.claims.verify(3), "frames must be .*got 3"),
    "claim 3": (lambda: gl.claims.verify({}, only=3), "unknown claim 3"),
    "twins of nothing": (lambda: gl.search.equivalent_estimators(None, SCENARIO), "an estimator is .*got None"),
    "twins in no scenario": (lambda: gl.search.equivalent_estimators({"k2-loss": K2}, None), "a scenario is .*got None"),
    "worlds": (lambda: gl.fixedpoints.measure("k2-loss", None, [0.1]), "each of worlds must be a gl.World, got None"),
    "coefficient of worlds": (
        lambda: gl.fixedpoints.measure("k2-loss", WORLD, "a"),
        "each of coefficients must be a number, got 'a'",
    ),
    "shares of nothing": (lambda: gl.asymmetry.measure("k2-loss", None), "a scenario is .*got None"),
    "seed of shares": (lambda: gl.asymmetry.measure("k2-loss", SCENARIO, seed=1.5), r"seed must be .*got 1\.5"),
    "running in none": (lambda: tails.running("k3", None, [10], 2), "a scenario is .*got None"),
    "running sizes": (lambda: tails.running("k3", GAUSSIANS, 2.5, 2), r"each of sizes must be .*got 2\.5"),
    "running kernel": (lambda: tails.running(3.0, GAUSSIANS, [10], 2), r"unknown kernel 3\.0"),
    "against nothing": (lambda: gl.search.against(None, SCENARIO), "an estimator is .*got None"),
    "against no scenario": (lambda: gl.search.against("k2-loss", None), "a scenario is .*got None"),
    "against goal 3": (lambda: gl.search.against("k2-loss", SCENARIO, 3), "unknown goal 3"),
    "jobs 0": (lambda: gl.measure("k2-loss", SCENARIO, jobs=0), "jobs must be a number of worker processes.*got 0"),
    "jobs 1.5": (lambda: gl.measure("k2-loss", SCENARIO, jobs=1.5), r"jobs must be .*got 1\.5"),
    "kl of a bandit": (lambda: gl.montecarlo.kl(SCENARIO, 100), r"has exact distances: scenario\.kl"),
    "vocab 3.0": (lambda: gl.Tree.random(3.0, 2), r"vocab must be a whole number of at least 2, got 3\.0"),
    "bandit vocab": (lambda: gl.Bandit.random(-1), "vocab must be .*got -1"),
    "markov vocab": (lambda: gl.Markov.random(3.5, 4), r"vocab must be .*got 3\.5"),
    "scale": (lambda: gl.Tree.random(2, 2, scale="a"), "scale must be a number, got 'a'"),
    "mean": (lambda: gl.Gaussian(None, 1), "Gaussian mean must be a number, got None"),
    "std": (lambda: gl.Gaussian(0, "a"), "Gaussian std must be a number, got 'a'"),
    "kl": (lambda: BANDIT.perturbed(kl="a"), "kl must be a number, got 'a'"),
    "kernels": (lambda: gl.values(None, SCENARIO), "unknown kernel None"),
    "resolution": (lambda: gl.simplex(1.5), r"resolution must be a whole number, got 1\.5"),
    "coefficient None": (lambda: trained(coefficients=None), "a coefficient must be a number, got None"),
    "coefficient text": (lambda: trained(coefficients="0.1"), "a coefficient must be a number, got '0.1'"),
    "coefficient negative": (lambda: trained(coefficients=np.array([0.1, -1])), "coefficients must be numbers from 0 on"),
    "seeds": (lambda: trained(seeds=1.5), r"seeds must be a positive whole number, got 1\.5"),
    "reward": (lambda: trained(reward=None), "reward must be a function"),
    "recipe": (lambda: trained(recipe=3), r"recipe must be a gl\.training\.Recipe, got 3"),
    "steps": (lambda: gl.training.Recipe(steps=None), "steps must be a positive whole number, got None"),
    "rate": (lambda: gl.training.Recipe(rate="a"), "rate must be a number, got 'a'"),
    "negative weight": (lambda: rollout([1.5, -0.5]), "weight of a rollout .*none below 0.*got -0.5"),
    "weights of 7": (lambda: rollout([3.0, 4.0]), "1 in all; got 3 at the least and 7 in all"),
    "weights of NaN": (lambda: rollout([np.nan, 0.5]), "1 in all; got nan"),
    "single weights": (lambda: rollout([0.5, 0.5], torch.float32), r"must be float64, got torch\.float32; .*weight\.double"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_a_value_error_with_a_reason(name):
    call, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        call()


def test_weights_that_are_probabilities_are_taken():
    assert rollout([0.25, 0.75]).weight.tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    "given",
    [
        ["k2-loss", "k3-loss"],
        ("k2-loss", "k3-loss"),
        {"k3-loss", "k2-loss"},
        frozenset({"k3-loss", "k2-loss"}),
        {"k2-loss": K2, "k3-loss": K3}.keys(),
        {"k2-loss": K2, "k3-loss": K3}.values(),
        {"k2-loss": K2, "k3-loss": K3},
        np.array(["k2-loss", "k3-loss"]),
        pd.Series(["k2-loss", "k3-loss"]),
        {K3, K2},
    ],
    ids=lambda given: type(given).__name__,
)
def test_estimators_come_in_any_collection_and_a_set_has_one_order(given):
    assert gl.measure(given, SCENARIO)["estimator"].tolist() == ["k2-loss", "k3-loss"]
    assert gl.components(given, SCENARIO)["estimator"].unique().tolist() == ["k2-loss", "k3-loss"]


def test_moments_of_several_are_a_list_whatever_holds_them():
    for given in ([K2, K3], {"a": K2, "b": K3}.values(), (loss for loss in (K2, K3))):
        means = [found.mean for found in gl.exact.moments(given, SCENARIO)]
        alone = [gl.exact.moments(loss, SCENARIO).mean for loss in (K2, K3)]
        torch.testing.assert_close(torch.stack(means), torch.stack(alone), rtol=1e-12, atol=1e-15)
    assert len(gl.montecarlo.moments({"a": K2, "b": K3}.values(), SCENARIO, 100)) == 2


def test_targets_scenarios_and_coefficients_come_in_any_collection():
    frame = gl.measure("k2-loss", {"only": SCENARIO}.values(), target={"reverse_kl", "forward_kl"})
    assert frame["target"].tolist() == ["forward_kl", "reverse_kl"]
    assert trained(coefficients=np.array([0.1, 0.2]))["coefficient"].unique().tolist() == [0.0, 0.1, 0.2]
    assert trained(coefficients=np.float32(0.5))["coefficient"].unique().tolist() == [0.0, 0.5]


def test_a_run_that_diverges_is_marked_and_the_others_are_kept():
    """Steps as large as this leave no support, or no finite parameter, behind; those runs alone are missing."""
    recipe = gl.training.Recipe(steps=4, batch=8, group=4, eval_responses=8, eval_every=1, rate=0.01)

    def huge(rollout: Rollout) -> torch.Tensor:
        return 1e308 * rollout.log_prob.sum(-1)

    frame = trained(regularisers={"k2-loss": K2, "huge": huge}, recipe=recipe, coefficients=[0.1, 100.0])
    apart = trained(regularisers="k2-loss", recipe=recipe, coefficients=[0.1, 100.0])
    lost = frame[frame["diverged"]]
    assert set(zip(lost["estimator"], lost["coefficient"], strict=True)) == {("huge", 100.0)}
    assert lost["step"].tolist() == [1, 2, 3, 4]
    assert lost[["reward", "kl", "trace_cov"]].isna().all(axis=None)
    kept = frame[frame["estimator"] != "huge"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, apart)
    ends = gl.runs.ends(frame).set_index(["estimator", "coefficient"])
    assert ends["kl"].isna().tolist() == [name == ("huge", 100.0) for name in ends.index]
    for rate in (1e4, 1e308):  # no support; not finite
        frame = trained(recipe=gl.training.Recipe(steps=3, batch=8, group=4, eval_responses=8, eval_every=1, rate=rate))
        assert frame.groupby("estimator")["diverged"].agg(list).tolist() == [[False, True, True, True]] * 2
