"""Every public function, given what it cannot take: a `ValueError` that says what was given, and neither silence nor a traceback."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gradlab as gl

NAN = float("nan")
BANDIT, GAUSSIAN = gl.Bandit([0.0, 1.0]), gl.Gaussian(0, 1)
TREE, CHAIN = gl.Tree.random(2, 2, eos=0), gl.Markov.random(2, 3, eos=0)
SCENARIO = gl.Scenario(BANDIT, gl.Bandit([0.0, 0.0]), gl.Bandit([0.5, 0.0]))
ON = SCENARIO.on_policy()
TREES, CHAINS = gl.Scenario(TREE, TREE.perturbed(0.5)), gl.Scenario(CHAIN, CHAIN.perturbed(0.5))
GAUSSIANS = gl.Scenario(gl.Gaussian(0, 0.9), GAUSSIAN)
NETWORK = gl.policies.small("names", prompts=["."], length=2, precision=torch.float64)
WORDS = gl.Scenario(NETWORK, gl.policies.small("names", "few", prompts=["."], length=2, precision=torch.float64))
K2 = gl.ESTIMATORS["k2-loss"]
WORLD = gl.ascent.World("w", BANDIT, torch.tensor([0.0, 1.0]))
RECIPE = gl.training.Recipe(steps=2, batch=8, group=4, eval_every=1, eval_responses=8)
REWARDED = gl.Scenario(BANDIT, gl.Bandit([0.0, 0.0]), reward=gl.TableReward(BANDIT, [1.0, 0.0]))
WHOLE = gl.PolicyLoss("mean", 3, regulariser=gl.Estimator("k3"))
MEANS = np.random.default_rng(0).normal(1.0, 1.0, (8, 2))


def reward(rollout: gl.Rollout) -> torch.Tensor:
    return rollout.tokens[:, 0].double()


@cache
def frames(name: str) -> pd.DataFrame:
    """Frames that functions of frames read."""
    return {
        "errors": lambda: gl.measure(["k2-loss", "k3-loss"], SCENARIO).assign(panel="a"),
        "ranked": lambda: gl.off_policy.errors(frames("errors"), [16, 64]),
        "shares": lambda: gl.asymmetry.measure("k2-loss", ON),
        "times": lambda: gl.restoring.times(["k2-loss", "k3-loss"], [0.5, 0.5], 0, [-1.0, 1.0]),
        "runs": lambda: gl.train(BANDIT, reward, ["k2-loss", "k3-loss"], recipe=RECIPE, seeds=2),
        "against": lambda: gl.search.against(["k2-loss"], [ON]),
        "variances": lambda: gl.tails.variances([ON, TREES], "k3-loss").assign(group="a"),
        "running": lambda: gl.tails.running(["k3"], GAUSSIANS, [4, 8], 6),
        "parts": lambda: gl.language.parts(["k2-loss"], WORDS),
        "contributions": lambda: gl.combined.contributions({"a": WHOLE, "b": WHOLE}, [REWARDED], [0.1, 0.2]),
        "removed": lambda: gl.clips.removed({"a": gl.PolicyLoss("mean", 3, ratio="token", clip=0.2)}, [REWARDED]),
        "bounds": lambda: gl.corrections.bounds([gl.corrections.setting("stale", 0.1)], [2, 4]),
        "settled": lambda: gl.claims.verify({}, only=["value-k1"]),
    }[name]()


def call(function: Callable[..., Any], wrong: dict[str, list[Any]] | None = None, **given: Any) -> tuple[Any, Any, Any]:
    """A function, wrong values besides those of the parameters' kinds, and arguments that it takes."""
    return function, wrong or {}, given


MANY = {"estimators": ["k2-loss"], "scenarios": [ON]}
DRAWN = {"samples": 64, "seed": 0}
NOT_POSITIVE: list[Any] = [0, -1]
CLAIM = gl.claims.CLAIMS[0]

#: Function → arguments that it takes; each is replaced, one at a time, by what it cannot take.
CALLS = {
    "lesson": call(gl.lesson, {"number": [0]}, number=1),
    "Bandit": call(gl.Bandit, logits=[0.0, 1.0]),
    "Bandit.random": call(gl.Bandit.random, {"vocab": [0, 1]}, vocab=3, seed=0, scale=1.0),
    "Tree": call(gl.Tree, {"eos": [2]}, logits=[[0.0, 1.0]], eos=1),
    "Tree.random": call(gl.Tree.random, {"vocab": [0, 1], "length": [0]}, vocab=2, length=2, seed=0, eos=0, scale=1.0),
    "Markov": call(gl.Markov, {"length": [0]}, initial=[0.0, 1.0], transition=np.zeros((2, 2)), length=3, eos=0),
    "Markov.random": call(gl.Markov.random, {"vocab": [0, 1], "length": [0]}, vocab=2, length=2, seed=0, eos=0, scale=1.0),
    "Gaussian": call(gl.Gaussian, {"std": NOT_POSITIVE, "mean": [np.inf]}, mean=0.0, std=1.0),
    "perturbed": call(BANDIT.perturbed, {"scale": [-1]}, scale=0.1, seed=0),
    "perturbed to a KL": call(GAUSSIAN.perturbed, {"kl": [-1]}, kl=0.1, seed=0),
    "PolicyLoss": call(
        gl.PolicyLoss,
        {
            "group": [1],
            "ratio": ["no such", 3],
            "advantage": [None, 3, "no such"],
            "regulariser": [3, "k3"],
            "beta": [-1, np.inf],
        },
        group=4,
        beta=0.1,
        advantage="group_std",
        epsilon=1e-4,
        ratio="token",
    ),
    "utility": call(gl.utility, {"group": [1], "epsilon": [-1]}, advantage="group_std", group=4, epsilon=1e-4),
    "TableReward": call(
        gl.TableReward, {"table": [None, "a", [1.0], [NAN, 1.0]], "policy": [GAUSSIAN]}, policy=BANDIT, table=[0.0, 1.0]
    ),
    "Scenario": call(
        gl.Scenario, {"policy": [GAUSSIAN], "reward": [3, "a"]}, policy=BANDIT, reference=BANDIT, behaviour=BANDIT, old=BANDIT
    ),
    "Estimator": call(
        gl.Estimator,
        {"truncate": [*NOT_POSITIVE, NAN, "a"], "group": [4, 1.5]},
        kernel="k2",
        placement="loss",
        credit="token",
        weight="token",
        truncate=2.0,
        normalise="sum",
    ),
    "measure": call(gl.measure, {"samples": [0]}, **MANY, target="reverse_kl", **DRAWN, jobs=1, level=0.9),
    "measure.by_name": call(gl.measure.by_name, estimators=["k2-loss"]),
    "measure.at_look": call(gl.measure.at_look, {"samples": [0, 100, None]}, level=0.9, samples=128),
    "components": call(gl.components, **MANY, target="reverse_kl", **DRAWN, level=0.9),
    "values": call(gl.values, kernels=["k2"], scenarios=[ON], credit="token", **DRAWN, level=0.9),
    "field": call(gl.field, {"step": [np.inf]}, estimators=["k2-loss"], policies=[[0.5, 0.5]], reference=[0.5, 0.5], step=0.1),
    "simplex": call(gl.simplex, {"resolution": [0], "edge": [-1, 0]}, resolution=2, edge=0.25),
    "exact.gradient": call(gl.exact.gradient, target="reverse_kl", scenario=ON),
    "exact.objective": call(gl.exact.objective, target="reverse_kl", scenario=ON),
    "exact.moments": call(gl.exact.moments, estimator=K2, scenario=ON),
    "exact.covariance": call(gl.exact.covariance, estimator=K2, scenario=ON),
    "exact.value_moments": call(gl.exact.value_moments, kernel="k2", scenario=ON, credit="token"),
    "exact.kinks": call(gl.exact.kinks, e=K2, kl=0.1),
    "montecarlo.moments": call(gl.montecarlo.moments, {"samples": [0]}, estimator=K2, scenario=ON, **DRAWN),
    "montecarlo.replicates": call(
        gl.montecarlo.replicates, {"samples": [0], "replicates": [0]}, estimator=K2, scenario=ON, **DRAWN, replicates=2
    ),
    "montecarlo.kl": call(gl.montecarlo.kl, {"samples": [0]}, scenario=WORDS, **DRAWN),
    "montecarlo.lag": call(gl.montecarlo.lag, {"samples": [0]}, scenario=WORDS, **DRAWN),
    "montecarlo.shared": call(gl.montecarlo.shared, {"batches": [0]}, samples=9, batches=2),
    "montecarlo.check_samples": call(gl.montecarlo.check_samples, samples=9),
    "montecarlo.check_reach": call(gl.montecarlo.check_reach, samples=9, scenario=ON, losses=[K2]),
    "train": call(
        gl.train,
        {"coefficients": [-1, np.inf], "seeds": [0], "reward": [None, 3], "recipe": [3, "a"], "reference": [3, SCENARIO]},
        policy=BANDIT,
        reward=reward,
        regularisers=["k2-loss"],
        coefficients=[0.1],
        reference=BANDIT,
        recipe=RECIPE,
        seeds=1,
        seed=0,
        jobs=1,
    ),
    "training.task_reward": call(gl.training.task_reward, task="names", policy=NETWORK),
    "training.Recipe": call(
        gl.training.Recipe,
        dict.fromkeys(("steps", "rate", "clip", "eval_every"), NOT_POSITIVE),
        steps=2,
        batch=8,
        group=4,
        rate=1e-3,
        clip=0.2,
        eval_every=1,
    ),
    "policies.small": call(
        gl.policies.small, {"prompts": [["A"]], "length": [0]}, task="names", stage="few", prompts=["."], length=2
    ),
    "policies.check_policy_class": call(gl.policies.check_policy_class, {"kind": [None, 3, "a", int]}),
    "audit": call(gl.audit, {"loss": [None, 3, "a"]}),
    "audit.frame": call(gl.audit.frame, {"audits": [None, 3, "a", [3]]}),
    "testing.assert_descends": call(gl.testing.assert_descends, {"target": [None, 3, "no such"], "loss": [None, 3]}),
    "register": call(gl.register, {"item": [None, 3, [], "a", {}], "name": [None]}),
    "asymmetry.measure": call(gl.asymmetry.measure, **MANY, target="reverse_kl", **DRAWN, level=0.9),
    "asymmetry.per_token": call(gl.asymmetry.per_token, estimator="k2-loss", scenario=ON, target="reverse_kl"),
    "asymmetry.bands": call(
        gl.asymmetry.bands,
        {"quantiles": [-1, [2.0]]},
        frame="shares",
        by=["estimator"],
        columns=["under_mass"],
        quantiles=[0.5],
    ),
    "ascent.World": call(gl.ascent.World, {"reward": [[1.0]]}, reference=BANDIT, reward=[0.0, 1.0]),
    "ascent.Ascent": call(gl.ascent.Ascent, {"coefficient": [-1, np.inf]}, world=WORLD, estimator=K2, coefficient=0.1),
    "ascent.ascend": call(
        gl.ascent.ascend,
        {"points": [0, 1], "tolerance": NOT_POSITIVE, "coefficient": [-1, np.inf]},
        world=WORLD,
        estimator="k2-loss",
        coefficient=0.5,
        start=BANDIT,
        points=3,
        tolerance=1e-3,
    ),
    "fixedpoints.measure": call(
        gl.fixedpoints.measure,
        {"coefficients": [-1, np.inf]},
        estimators=["k2-loss"],
        worlds=[WORLD],
        coefficients=[0.5],
        jobs=1,
    ),
    "optima.tilted": call(
        gl.optima.tilted,
        {"coefficient": [*NOT_POSITIVE, np.inf], "reference": [[0.2, 0.2], [-1.0, 2.0]]},
        reward=[0.0, 1.0],
        reference=[0.5, 0.5],
        coefficient=0.5,
        divergence="chi2",
    ),
    "optima.optimum": call(
        gl.optima.optimum,
        {"coefficient": [*NOT_POSITIVE, np.inf], "reward": [[1.0]]},
        reference=TREE,
        reward=[0.0, 1.0, 2.0],
        coefficient=0.5,
        divergence="chi2",
        credit="token",
    ),
    "off_policy.at_lag": call(gl.off_policy.at_lag, {"lag": NOT_POSITIVE}, policy=BANDIT, lag=0.1, seed=0),
    "off_policy.effective_sample_size": call(
        gl.off_policy.effective_sample_size, {"truncate": NOT_POSITIVE}, scenario=SCENARIO, truncate=2.0
    ),
    "off_policy.repulsion": call(gl.off_policy.repulsion, {"step": NOT_POSITIVE}, scenarios=[SCENARIO], step=0.1),
    "off_policy.errors": call(gl.off_policy.errors, {"batches": [0]}, frame="errors", batches=[16], by=["panel"]),
    "off_policy.winners": call(gl.off_policy.winners, ranked="ranked", by=["panel"]),
    "off_policy.regrets": call(gl.off_policy.regrets, found="ranked", by=["panel"]),
    "restoring.shifted": call(gl.restoring.shifted, {"token": [2]}, reference=[0.5, 0.5], token=0, shifts=[-1.0]),
    "restoring.times": call(
        gl.restoring.times,
        {"token": [2], "step": NOT_POSITIVE, "limit": [0], "shifts": [[0.0]], "reference": [[0.5, 0.9]]},
        estimators=["k2-loss"],
        reference=[0.5, 0.5],
        token=0,
        shifts=[-1.0],
        step=1.0,
        limit=10,
    ),
    "restoring.paths": call(
        gl.restoring.paths,
        {"token": [2], "step": NOT_POSITIVE, "steps": [0], "points": [0], "shift": [np.inf], "reference": [[0.5, 0.9]]},
        estimators=["k2-loss"],
        reference=[0.5, 0.5],
        token=0,
        shift=-1.0,
        steps=3,
        step=1.0,
        points=3,
    ),
    "restoring.compared": call(gl.restoring.compared, frame="times", baseline="k2-loss"),
    "choice.differences": call(
        gl.choice.differences,
        {"losses": [None, {"a": K2}], "other": ["b"]},
        losses={"a": WHOLE},
        other="a",
        scenarios=[REWARDED],
    ),
    "clips.removed": call(
        gl.clips.removed,
        {"losses": [{}, None, {"a": WHOLE}], "scenarios": [[ON]]},
        losses={"a": gl.PolicyLoss("mean", 3, ratio="token", clip=0.2)},
        scenarios=[REWARDED],
    ),
    "clips.after_steps": call(
        gl.clips.after_steps,
        {"lag": NOT_POSITIVE, "policy": [CHAIN], "direction": [[0.0]]},
        policy=BANDIT,
        direction=torch.ones(len(BANDIT.parameters), dtype=torch.float64) * torch.arange(len(BANDIT.parameters)),
        lag=0.1,
    ),
    "clips.free": call(gl.clips.free, loss=WHOLE),
    "clips.sides": call(gl.clips.sides, frame=frames("removed"), other="a", by=["family"]),
    "corrections.setting": call(gl.corrections.setting, {"kl": NOT_POSITIVE}, mismatch="stale", kl=0.1, seed=0),
    "corrections.counts": call(gl.corrections.counts, {"length": [0], "vocab": [1]}, length=2, vocab=2),
    "corrections.as_loss": call(gl.corrections.as_loss, name="token"),
    "corrections.moments": call(
        gl.corrections.moments,
        {"names": [["prefix"]], "settings": [None, [None]], "lengths": [0, None], "signals": [["no such"]]},
        names=["none"],
        settings=[gl.corrections.setting("stale", 0.1)],
        lengths=[2],
    ),
    "corrections.bounds": call(
        gl.corrections.bounds,
        {"settings": [None, [None]], "lengths": [1, None]},
        settings=[gl.corrections.setting("stale", 0.1)],
        lengths=[2],
    ),
    "corrections.growth": call(gl.corrections.growth, frame=frames("bounds")),
    "combined.contributions": call(
        gl.combined.contributions,
        {"losses": [{}, None, {"a": gl.PolicyLoss("mean", 3)}], "coefficients": [0.0, -1.0, None]},
        losses={"a": WHOLE},
        scenarios=[REWARDED],
        coefficients=[0.1],
    ),
    "combined.exponents": call(gl.combined.exponents, frame=frames("contributions")),
    "combined.flatness": call(gl.combined.flatness, frame=frames("contributions")),
    "combined.against": call(gl.combined.against, frame=frames("contributions"), estimator="a", other="b"),
    "lengths.expected_length": call(gl.lengths.expected_length, policy=TREE),
    "lengths.length_gradient": call(gl.lengths.length_gradient, policy=TREE),
    "lengths.length_distribution": call(gl.lengths.length_distribution, policy=TREE),
    "lengths.batch_factor": call(gl.lengths.batch_factor, {"batch": [0]}, batch=2),
    "lengths.token_mean_of": call(gl.lengths.token_mean_of, {"batch": [0]}, estimator=K2, scenario=TREES, batch=2),
    "lengths.normalisers": call(
        gl.lengths.normalisers,
        {"batches": [0], "step": NOT_POSITIVE},
        estimators={"k2": K2},
        scenarios=[TREES],
        batches=[2],
        step=0.1,
    ),
    "sequences.lazy_chain": call(
        gl.sequences.lazy_chain,
        {"memory": [0.5, np.inf], "vocab": [1], "length": [0]},
        vocab=2,
        length=3,
        memory=2.0,
        seed=0,
        scale=1.0,
    ),
    "sequences.relaxation_time": call(gl.sequences.relaxation_time, policy=CHAIN),
    "sequences.shortened": call(gl.sequences.shortened, {"length": [0], "scenario": [ON]}, scenario=CHAINS, length=2),
    "sequences.expected_gradient": call(gl.sequences.expected_gradient, name="k2-loss", scenario=ON),
    "sequences.gap": call(gl.sequences.gap, {"scenarios": [ON]}, names=["k2-loss"], scenarios=[CHAINS], target="reverse_kl"),
    "sequences.exponents": call(
        gl.sequences.exponents, frame="errors", by=["estimator"], x="bias", y="noise", low=0.0, high=9.0
    ),
    "sequences.compared": call(
        gl.sequences.compared, {"pairs": [["k2-loss"], [("k2-loss",)]]}, pairs=[("k2-loss", "k3-loss")], scenario=TREES, **DRAWN
    ),
    "sequences.with_reward": call(
        gl.sequences.with_reward,
        {
            "rewards": [
                None,
                3,
            ]
        },
        rewards={"r": torch.tensor([0.0, 1.0]).double()},
        scenario=ON,
        coefficients=[0.1],
    ),
    "search.compositions": call(
        lambda **given: list(gl.search.compositions(**given)),
        {name: ["no such", ["no such"], 3] for name in ("kernels", "placements", "credits", "weights", "baselines")},
    ),
    "search.reweighted": call(
        gl.search.reweighted, {"truncate": [*NOT_POSITIVE, "a"]}, name="k2-loss", weight="prefix", truncate=2.0
    ),
    "search.described": call(gl.search.described, estimators={"k2": K2}),
    "search.against": call(gl.search.against, **MANY, goals=["reverse_kl"]),
    "search.worst": call(gl.search.worst, frame="against"),
    "search.equivalent_estimators": call(gl.search.equivalent_estimators, estimators={"k2": K2}, scenario=ON),
    "tails.k3_variance": call(gl.tails.k3_variance, scenario=ON),
    "tails.rare_share": call(gl.tails.rare_share, {"sizes": [1]}, scenario=ON, sizes=[10]),
    "tails.running": call(
        gl.tails.running, {"runs": [0], "sizes": [1]}, kernels=["k3"], scenario=GAUSSIANS, sizes=[4], runs=2, seed=0, jobs=1
    ),
    "tails.over_runs": call(gl.tails.over_runs, frame="running", columns=["mean"], level=0.9),
    "tails.dropped": call(
        gl.tails.dropped,
        {"runs": [0], "sizes": [0]},
        scenario=gl.Scenario(gl.Bandit([0, 0, -3]), gl.Bandit([0, 0, 0])),
        sizes=[10],
        runs=2,
        seed=0,
    ),
    "tails.chi2": call(gl.tails.chi2, scenario=ON),
    "tails.variances": call(gl.tails.variances, scenarios=[ON], estimator="k3-loss"),
    "tails.rank_correlations": call(gl.tails.rank_correlations, frame="variances", by=["group"], columns=["noise"]),
    "tails.hill": call(gl.tails.hill, {"k": [0, 9]}, values=[1.0, 2.0, 3.0], k=2),
    "tails.tail_index": call(gl.tails.tail_index, scenario=GAUSSIANS),
    "runs.ends": call(gl.runs.ends, frame="runs"),
    "runs.pairs": call(gl.runs.pairs, frame="runs", estimator="k2-loss", other="k3-loss"),
    "runs.compare": call(gl.runs.compare, frame="runs", base="k2-loss", level=0.9),
    "runs.quotient": call(gl.runs.quotient, {"x": [None, "a", [1.0]]}, x=[1.0, 2.0], y=[2.0, 1.5], level=0.9),
    "runs.spread": call(gl.runs.spread, {"x": [None, "a", [1.0]]}, x=[1.0, 2.0, 3.0], y=[2.0, 1.5, 0.0], level=0.9),
    "language.rollout_of": call(gl.language.rollout_of, {"samples": [0]}, scenario=WORDS, **DRAWN),
    "language.extremes": call(
        gl.language.extremes,
        {"factor": [*NOT_POSITIVE, 1], "samples": [0], "scenario": [ON]},
        scenario=WORDS,
        **DRAWN,
        factor=2.0,
        level=0.9,
    ),
    "language.clopper_pearson": call(gl.language.clopper_pearson, {"n": [0, 1]}, count=2, n=4, level=0.9),
    "language.parts": call(gl.language.parts, {"samples": [0], "scenario": [ON]}, names=["k2-loss"], scenario=WORDS),
    "language.sides": call(gl.language.sides, frame="parts"),
    "language.tokens": call(gl.language.tokens, {"count": [0]}, frame="parts", count=2, by="mass"),
    "language.words": call(gl.language.words, policy=NETWORK),
    "claims.claim": call(
        gl.claims.claim,
        {"identifier": ["no such"], "relation": ["~", None], "value": [np.inf], "margin": [-1]},
        identifier="value-k1",
        scope="s",
        frame="01_values",
        statistic="bias",
        relation="<",
        value=0.1,
        margin=0.0,
    ),
    "claims.judge": call(gl.claims.judge, claim=CLAIM, low=0.0, high=1.0),
    "claims.ledger": call(gl.claims.ledger, claims=[CLAIM]),
    "claims.load": call(gl.claims.load, {"folder": [None, 3, "/nope"]}, names=["01_values"]),
    "claims.samples_needed": call(
        gl.claims.samples_needed, claim=CLAIM, centre=0.0, low=-1.0, high=1.0, samples=9, level=0.9, power=0.8
    ),
    "claims.settle": call(gl.claims.settle, claim=CLAIM, frame=None),
    "claims.summary": call(gl.claims.summary, settled="settled"),
    "claims.verify": call(
        gl.claims.verify, {"frames": [None, 3, "/nope", {"01_values": 3}], "claims": [3, [3]], "only": ["no such", 3, []]}
    ),
    "report.cell": call(gl.report.cell, frame="against", column="bias"),
    "report.unbiased": call(gl.report.unbiased, frame="errors"),
    "report.verdict_summary": call(gl.report.verdict_summary, settled="settled"),
    "report.show_claims": call(gl.report.show_claims, settled="settled"),
    "report.show_verdicts": call(gl.report.show_verdicts, settled="settled"),
    "intervals.squared_distance": call(gl.intervals.squared_distance, means=MEANS, target=[1.0, 1.0], level=0.9),
    "intervals.bias": call(gl.intervals.bias, means=MEANS, target=[1.0, 1.0], level=0.9),
    "intervals.cosine": call(gl.intervals.cosine, means=MEANS, target=[1.0, 1.0], level=0.9),
    "intervals.cosine_of_means": call(gl.intervals.cosine_of_means, means=MEANS, others=MEANS, level=0.9),
    "intervals.noise": call(
        gl.intervals.noise, {"traces": [-np.ones(8), "a", [1.0]]}, means=MEANS, traces=np.ones(8), target=[1.0, 1.0], level=0.9
    ),
    "intervals.effective_dimension": call(gl.intervals.effective_dimension, means=MEANS),
    "intervals.anytime_mean": call(gl.intervals.anytime_mean, {"start": [0, 1]}, x=[1.0] * 9, level=0.9, start=2),
    "intervals.anytime_squared_distance": call(
        gl.intervals.anytime_squared_distance, {"start": [0, 1]}, means=MEANS, target=[1.0, 1.0], level=0.9, start=2
    ),
    "inspect": call(
        gl.inspect,
        {"records": [None, 3, "a", []]},
        records=gl.Records.from_arrays(logprob=[[-1.0], [-2.0]], ref_logprob=[[-1.5], [-1.5]]),
        level=0.9,
        seed=0,
        jobs=1,
    ),
    "intervals.detectable": call(
        gl.intervals.detectable,
        {"samples": [0, np.inf], "noise": [0, np.inf], "dimension": [0, np.inf], "power": [0.05]},
        samples=9.0,
        noise=1.0,
        dimension=2.0,
        level=0.9,
        power=0.8,
    ),
    "intervals.samples_needed": call(
        gl.intervals.samples_needed,
        {"effect": [0, np.inf], "noise": [0, np.inf]},
        effect=0.1,
        noise=1.0,
        dimension=2.0,
        level=0.9,
        power=0.8,
    ),
}

#: What has tests of its own, or takes what other functions of gradlab return: tensors, rollouts, batches of gradients, paths.
ELSEWHERE = {
    "Kernel",
    "LanguageModel",
    "Moments",
    "Recorder",
    "Records",
    "Rollout",
    "Target",
    "Utility",
    "ascent.FixedPoint",
    "claims.Verdict",
    "exact.ValueMoments",
    "figure",
    "audit.Audit",
    "audit.Batch",
    "audit.Bound",
    "audit.Configured",
    "audit.JaxLoss",
    "audit.Part",
    "audit.Switch",
    "audit.Term",
    "audit.Identification",
    "audit.LossError",
    "audit.Probe",
    "audit.Subject",
    "backprop.ParameterMoments",
    "backprop.balanced_chunk_size",
    "backprop.logit_gram",
    "backprop.mean_gradients",
    "backprop.pullback",
    "backprop.pullback_of",
    "backprop.squared_norms",
    "backprop.units_per_pass",
    "claims.Claim",
    "claims.Condition",
    "corrections.Setting",
    "policies.LanguageModel",
    "policies.Responses",
    "policies.Tabular",
    "exact.enumerated",
    "intervals.Batches",
    "intervals.Interval",
    "intervals.Scattered",
    "language.along",
    "language.score_norms",
    "language.text",
    "measure.one_thread",
    "montecarlo.distances",
    "report.Study",
    "read_rollouts",
    "records.Block",
    "records.Finding",
    "records.Inspection",
    "records.budget",
    "records.check",
    "records.equivalents",
    "records.frontier",
    "report.study",
    "restoring.descent",
    "restoring.odds",
    "runs.Ratio",
}

NOT_NUMBERS: list[Any] = ["a", None, [], {1}, {}.keys(), NAN, 1j, True]
NOT_WHOLE: list[Any] = [*NOT_NUMBERS, 1.5, -1, np.float64(2.5), torch.tensor(2.5)]
NOT_FRAMES: list[Any] = [None, 3, "a", [], {}, pd.DataFrame(), pd.DataFrame({"x": [1.0]})]
NOT_NAMES: list[Any] = [None, 3, NAN, "no such", [], ["no such"], {"no such"}, np.float64(1.0)]
NOT_SCENARIOS: list[Any] = [None, 3, "a", [], [None], {}, BANDIT, NAN]
NOT_ESTIMATORS: list[Any] = [None, 3, 1.5, "no such", [], [None], ["no such"], {}, set(), NAN]
NOT_ARRAYS: list[Any] = [None, "a", [], ["a"], {1.0}, [NAN, 1.0], [None, 1.0]]
NOT_POLICIES: list[Any] = [None, 3, "a", [], SCENARIO]

#: Wrong values by the name of a parameter; lists of things take one thing, too.
WRONG: dict[str, list[Any]] = {
    **dict.fromkeys(("seed", "runs", "steps", "limit", "points", "token", "count", "n", "k", "start", "number"), NOT_WHOLE),
    **dict.fromkeys(
        ("vocab", "length", "eos", "samples", "replicates", "resolution", "batch", "group", "eval_every", "seeds"), NOT_WHOLE
    ),
    **{key: [None, "a", [1.5], [NAN], -1] for key in ("batches",)},
    **{key: [None, "a", [], [1.5], [NAN], -1] for key in ("sizes",)},
    **{key: [None, "a", [], [None], [NAN], ["a"], {}] for key in ("coefficients", "quantiles")},
    **dict.fromkeys(
        ("scale", "step", "edge", "lag", "kl", "std", "mean", "memory", "coefficient", "tolerance", "shift"), NOT_NUMBERS
    ),
    **dict.fromkeys(
        ("rate", "clip", "truncate", "factor", "low", "high", "centre", "effect", "dimension", "value", "margin"), NOT_NUMBERS
    ),
    **{key: [*NOT_NUMBERS, 0, 1, 1.5, -1] for key in ("level", "power")},
    **dict.fromkeys(("scenario",), NOT_SCENARIOS),
    **dict.fromkeys(("scenarios",), NOT_SCENARIOS),
    **dict.fromkeys(("estimator", "estimators", "regularisers", "e", "losses"), NOT_ESTIMATORS),
    **dict.fromkeys(("frame", "found", "ranked", "settled"), NOT_FRAMES),
    **{key: [None, 3, [], ["no such"], "no such"] for key in ("by", "columns")},
    **dict.fromkeys(("x", "y"), NOT_ARRAYS),
    **dict.fromkeys(
        ("column", "task", "stage", "target", "kernel", "placement", "credit", "normalise", "divergence"), NOT_NAMES
    ),
    **dict.fromkeys(("names", "kernels", "goals", "weight", "baseline", "base", "other", "name"), NOT_NAMES),
    **dict.fromkeys(
        ("reward", "reference", "policies", "shifts", "logits", "initial", "transition", "means", "others", "values"),
        NOT_ARRAYS,
    ),
    **dict.fromkeys(("policy",), NOT_POLICIES),
    "jobs": [*NOT_NUMBERS, 1.5, 0],
    "prompts": [3, [], [3]],
    "old": [3, "a", SCENARIO],
    "beta": NOT_NUMBERS,
    "epsilon": NOT_NUMBERS,
    "advantage": [],
    "ratio": [],
    "table": [],
    "behaviour": [3, "a", [], SCENARIO],
    "noise": NOT_NUMBERS,
    "worlds": [None, 3, "a", [], [None], SCENARIO],
    "world": [None, 3, "a", [], SCENARIO],
    "claim": [None, 3, "a"],
    "claims": [3, "a", [3]],
    "pairs": [None, 3, "a", []],
    "rewards": [],
    "scope": [],
    "identifier": [None, 3],
    "relation": [3],
    "statistic": [None, 3],
    "traces": [],
    "records": [],
    "recipe": [],
    "direction": NOT_ARRAYS,
    "mismatch": NOT_NAMES,
    "settings": [],
    "lengths": [],
    "signals": [],
    "loss": [None, 3, "a", K2],
}
#: The same where the name says too little: function and parameter.
BY_CALL: dict[tuple[str, str], list[Any]] = {
    **{(name, "reference"): NOT_POLICIES for name in ("Scenario", "ascent.World", "optima.optimum")},
    ("train", "reference"): [],
    ("train", "reward"): [],
    ("ascent.World", "name"): [],
    **{(name, "start"): [3, "a", [], SCENARIO] for name in ("ascent.ascend",)},
    ("sequences.exponents", "x"): NOT_NAMES,
    ("sequences.exponents", "y"): NOT_NAMES,
    **{
        (name, "target"): NOT_ARRAYS
        for name in ("intervals.squared_distance", "intervals.bias", "intervals.cosine", "intervals.noise")
    },
    **{  # of a row without an interval the ends are NaN
        (f"claims.{name}", what): [value for value in NOT_NUMBERS if value is not NAN]
        for name in ("judge", "samples_needed")
        for what in ("low", "high", "centre")
    },
    **{(f"runs.{name}", side): [None, "a", {1.0}, [1.0]] for name in ("quotient", "spread") for side in "xy"},
    ("intervals.anytime_squared_distance", "target"): NOT_ARRAYS,
    ("intervals.noise", "noise"): [],
    ("intervals.detectable", "samples"): NOT_NUMBERS,
    ("claims.claim", "frame"): [None, 3, "nonsense"],
    ("claims.load", "names"): [None, 3],
    ("language.tokens", "by"): NOT_NAMES,
    ("runs.pairs", "estimator"): NOT_NAMES,
}


def wrong_values(name: str) -> list[tuple[str, Any]]:
    """Every parameter of a call with every value that it cannot take; `None` where the default says that it may be left out."""
    function, more, given = CALLS[name]
    parameters = inspect.signature(function).parameters
    found = []
    for what in dict.fromkeys([*given, *more]):
        kinds = BY_CALL.get((name, what), WRONG[what] if what in given else [])
        form = parameters.get(what)
        optional = form is not None and (form.default is None or "None" in str(form.annotation))
        found += [(what, value) for value in [*kinds, *more.get(what, [])] if not (optional and value is None)]
    return found


def names(said: str, what: str, value: Any) -> bool:
    """Whether a message says what was given: the value, its type, or what it is that it lacks."""
    if isinstance(value, pd.DataFrame):
        return "column" in said or "frame" in said
    parts = value if isinstance(value, list | tuple | set) and value else [value]
    tokens = [repr(value), *(str(part) for part in parts), type(value).__name__, *(type(part).__name__ for part in parts)]
    tokens += (
        [type(value.policy).__name__] if isinstance(value, gl.Scenario) else [value.__name__] if inspect.isclass(value) else []
    )
    tokens += [repr(part) for part in value.values()] if isinstance(value, dict) else []
    empty = isinstance(value, list | set | dict) and not value
    tokens += ["at least one", "no estimator", "none", "0 scenarios", "0 targets", "got []", "[0]", "(0,)"] if empty else []
    tokens += ["finite", "shape"] if isinstance(value, float | list | np.ndarray) else []
    return any(token in said for token in tokens)


@pytest.mark.parametrize("name", [name for name in CALLS if wrong_values(name)])
def test_what_cannot_be_taken_is_a_value_error_that_says_what_was_given(name: str) -> None:
    function, _, given = CALLS[name]
    given = {
        what: frames(item)
        if what in ("frame", "found", "ranked", "settled") and isinstance(item, str) and item in FRAMES
        else item
        for what, item in given.items()
    }
    faults = []
    for what, value in wrong_values(name):
        shown = f"{what}={value!r:.60}"
        try:
            function(**{**given, what: value})
        except ValueError as error:
            if not names(str(error), what, value):
                faults.append(f"{shown}: the message does not say what was given: {error}")
        except TypeError as error:
            missing = re.search("missing .* required", str(error))  # not all arguments of a call have a value that is right
            faults.append(f"{shown}: TypeError: {error}") if not missing else None
        except Exception as error:
            faults.append(f"{shown}: {type(error).__name__}: {error}")
        else:
            faults.append(f"{shown}: taken in silence")
    assert not faults, f"{name}:\n" + "\n".join(faults)


FRAMES = (
    "errors",
    "ranked",
    "shares",
    "times",
    "runs",
    "against",
    "variances",
    "running",
    "parts",
    "settled",
    "contributions",
    "removed",
)


def public() -> set[str]:
    """The public functions and classes of `gradlab` and of the modules that it names."""
    found = set()
    for name in gl.__all__:
        item = getattr(gl, name)
        if not inspect.ismodule(item):
            found |= {name} if callable(item) else set()
            continue
        for part in getattr(item, "__all__", None) or vars(item):
            inner = getattr(item, part)
            own = getattr(inner, "__module__", None) == item.__name__ or part in getattr(item, "__all__", ())
            if own and not part.startswith("_") and (inspect.isfunction(inner) or inspect.isclass(inner)):
                found.add(f"{name}.{part}")
    return found


#: The same functions under a second name.
ALIASES = {
    "audit.audit",
    "components.components",
    "components.values",
    "measure.measure",
    "training.train",
    "policies.Bandit",
    "policies.Gaussian",
    "policies.Markov",
    "policies.Tree",
    "records.Recorder",
    "records.Records",
    "records.inspect",
    "records.read_rollouts",
}


def test_every_public_function_is_tried() -> None:
    """Functions that draw have a test of their own for what they cannot draw, in `test_plots`."""
    drawn = {f"plots.{name}" for name in gl.plots.__all__}
    assert public() - drawn - ALIASES == {name for name in CALLS if name in public()} | ELSEWHERE
