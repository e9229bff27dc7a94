"""The shapes that public annotations tell are those of the tensors, checked at run time by jaxtyping and beartype."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("jaxtyping")
pytest.importorskip("beartype")

#: Modules whose annotations are checked, and what goes through them: every kind of policy, exact and sampled, on- and off-policy.
CHECKED = ["rollout", "moments", "solvers.exact", "policies.responses", "policies.tabular", "policies.gaussian"]
EVERYTHING = f"""
from jaxtyping import install_import_hook
with install_import_hook({[f"gradlab.{name}" for name in CHECKED]}, "beartype.beartype"):
    import gradlab as gl
    from gradlab import rollout, moments
    from gradlab.solvers import exact
import numpy as np, torch

policies = [gl.Bandit.random(5), gl.Tree.random(3, 3, eos=0), gl.Markov.random(3, 4), gl.Gaussian(0.1, 0.9),
            gl.policies.small("names", length=2)]
for policy in policies:
    network = isinstance(policy, gl.policies.LanguageModel)
    other = gl.policies.small("names", "few", length=2) if network else policy.perturbed(scale=0.05, seed=1)
    names = ["k2-loss", "k3-loss", "full-both"] + ([] if isinstance(policy, gl.Markov) else ["k1-reward-loo"])
    estimators = [gl.ESTIMATORS[name] for name in names]
    for scenario in (gl.Scenario(policy, other), gl.Scenario(policy, other, other)):
        found = gl.exact.moments(estimators, scenario)
        assert [m.mean.shape for m in found] == [policy.parameters.shape] * len(names)
        assert gl.exact.gradient("reverse_kl", scenario).shape == policy.parameters.shape
        gl.montecarlo.moments(estimators, scenario, samples=64)
        drawn = gl.Rollout.from_sampler(scenario, 8, np.random.default_rng(0))
        for name in ("logits", "reference_logits", "behaviour_logits", "log_prob", "log_ratio", "log_weight", "lengths"):
            getattr(drawn, name)
    if not network:
        gl.exact.covariance(estimators[0], scenario)
"""
WRONG = "gl.policies.Responses(torch.zeros(3, 2), torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, dtype=torch.long))"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_annotations_tell_the_shapes():
    found = run(EVERYTHING)
    assert found.returncode == 0, found.stderr[-3000:]


def test_a_wrong_shape_would_be_seen():
    found = run(EVERYTHING.split("policies = [")[0] + WRONG)
    assert found.returncode == 1
    assert "TypeCheckError" in found.stderr
