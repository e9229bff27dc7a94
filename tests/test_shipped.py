"""The table of what frameworks ship: kinds, settings and curves as functions of audits, and analysis 12 on real packages."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import test_adapters
import torch
from analysis_runs import Run, run

import gradlab as gl
from gradlab.audit import adapters, candidates, shipped
from gradlab.audit.batch import Batch, Subject
from gradlab.ledger.shipped import CLAIMS
from gradlab.study.resume import Requirements

SCRIPT = Path(gl.__file__).parent.parent / "analyses" / "12_as_shipped.py"


def subject(name: str, kernel: str, scale: float = 1.0, clamp: float = math.inf) -> Subject:
    """A loss of a made-up framework: k2, k3 or the corrected k3, summed over each response."""

    def loss(batch: Batch) -> torch.Tensor:
        ratio = batch.log_prob - batch.reference_log_prob
        values = {"k1": ratio, "k2": ratio**2 / 2, "k3": (-ratio).exp() - 1 + ratio}[kernel[:2]].clamp(max=clamp)
        if kernel.endswith("corrected"):
            values = values * (batch.log_prob - batch.behaviour_log_prob).exp()
        return scale * (values * batch.mask).sum(-1).mean()

    return Subject(name, loss, "made_up", "1.0", "made_up.loss", {"kernel": kernel})


@pytest.fixture(scope="module")
def audited():
    given = [
        subject("one k3", "k3"), subject("one k2", "k2"), subject("one half k2", "k2", 0.5), subject("two k3 corrected", "k3-corrected"),
        subject("two k3 clamped", "k3", clamp=10.0), subject("two k1", "k1"),
    ]  # fmt: skip
    return shipped.audits(given)


def test_settings_are_derived_from_the_verdicts(audited):
    found = shipped.settings(shipped.configurations(audited)).set_index(["framework", "target", "policy"])
    frozen = "reverse_kl_frozen_prefix"
    assert found.loc[("one", frozen, "on"), "subject"] == "one k2"  # the first of two
    assert found.loc[("one", frozen, "on"), "others"] == 1
    assert found.loc[("one", frozen, "off"), "subject"] == ""
    assert found.loc[("two", frozen, "off"), "subject"] == "two k3 corrected"
    assert found.loc[("two", frozen, "off"), "scope"] == "everywhere"
    assert (found.xs("reverse_kl", level="target")["subject"] == "").all()
    assert found.loc[("one", frozen, "on"), "configuration"] == "kernel=k2"
    assert set(found["configurations"]) == {3}


def test_a_limited_setting_is_named_only_where_there_is_no_other():
    limited, whole = subject("x k2 clamped", "k2", clamp=10.0), subject("x the same without a clamp", "k2")
    alone = shipped.settings(shipped.configurations(shipped.audits([limited])))
    row = alone[(alone["target"] == "reverse_kl_frozen_prefix") & (alone["policy"] == "on")].iloc[0]
    assert (row["subject"], row["scope"]) == ("x k2 clamped", "not far")
    both = shipped.settings(shipped.configurations(shipped.audits([limited, whole])))
    row = both[(both["target"] == "reverse_kl_frozen_prefix") & (both["policy"] == "on")].iloc[0]
    assert (row["subject"], row["scope"]) == ("x the same without a clamp", "everywhere")


def test_kinds_put_equal_verdicts_together_whatever_their_scale(audited):
    frame, directions = shipped.configurations(audited), shipped.directions(audited)
    kind = frame.set_index("subject")["kind"]
    assert set(kind["one half k2"]) == set(kind["one k2"]) == {"one k2"}
    assert kind["two k3 clamped"].iloc[0] != kind["one k3"].iloc[0]
    kinds = shipped.by_kind(frame, directions)
    assert kinds["kind"].nunique() == 5
    row = kinds[(kinds["kind"] == "one k2") & (kinds["policy"] == "on")].set_index("target")
    assert (row["n_one"] == 2).all()
    assert (row["n_two"] == 0).all()
    assert row.loc["reverse_kl_frozen_prefix", "match"] == "everywhere"
    assert row.loc["reverse_kl_frozen_prefix", "degrees"] < 1e-5
    assert row.loc["forward_kl", "match"] == ""
    clamped = kinds[(kinds["kind"] == "two k3 clamped") & (kinds["policy"] == "on")].set_index("target")
    assert clamped.loc["forward_kl_frozen_prefix", "match"] == "limited"
    assert kinds["kind"].iloc[0] in ("one k2", "two k3 corrected")  # what descends the reverse KL comes first


def test_losses_without_a_gradient_in_the_mean_have_no_direction(audited):
    directions = shipped.directions(audited).set_index(["subject", "policy", "target"])
    assert not directions.loc[("two k1", "on", "reverse_kl"), "moving"]
    assert math.isnan(directions.loc[("two k1", "on", "reverse_kl"), "degrees"])
    assert directions.loc[("two k1", "off", "reverse_kl"), "moving"]


def test_equal_curves_share_a_line_and_others_do_not(audited):
    curves = shipped.curves(audited)
    names = list(dict.fromkeys(shipped.distinct(curves)["subject"]))
    assert names[0] == "one k2 and 1 more"  # k2, and k3 times the ratio, which pulls one token alike
    assert sorted(names[1:]) == ["one half k2", "one k3", "two k1", "two k3 clamped"]


def test_the_pictures_are_made_of_frames_alone(audited):
    frame = shipped.configurations(audited)
    kinds, settings = shipped.by_kind(frame, shipped.directions(audited)), shipped.settings(frame)
    before = kinds.copy(), settings.copy()
    assert len(gl.plots.shipped_kinds(kinds).axes) == 4
    texts = [text.get_text() for text in gl.plots.shipped_settings(settings).axes[0].texts]
    assert sum("no configuration" in text for text in texts) == int((settings["subject"] == "").sum())
    assert any("k3 corrected" in text for text in texts)
    pd.testing.assert_frame_equal(kinds, before[0])
    pd.testing.assert_frame_equal(settings, before[1])


def test_the_same_frame_for_any_number_of_jobs():
    given = [subject("one k2", "k2"), subject("two k3 corrected", "k3-corrected")]
    one, two = (shipped.configurations(shipped.audits(given, jobs)) for jobs in (1, 2))
    pd.testing.assert_frame_equal(one, two)


# ---- the committed verdicts, in other worlds and without the engine ---------------------------------------------------------

TABLE = pd.read_csv(SCRIPT.parent.parent / "figures" / "12_configurations.csv", keep_default_na=False)
SHIPPED = {s.name: s for s in adapters.subjects()}


def residual(found: torch.Tensor, target: torch.Tensor) -> float:
    """What is left of a gradient beside its part along another, of either sign, relative to itself."""
    return float((found - (found @ target) / (target @ target) * target).norm() / found.norm())


@pytest.mark.parametrize(
    ("name", "policy", "verdict"), TABLE[["subject", "policy", "verdict"]].itertuples(index=False, name=None)
)
def test_committed_verdicts_hold_in_other_worlds(name, policy, verdict):
    """Expected gradients by the slow enumeration of test_adapters, on policies that no audit has seen."""
    if name not in SHIPPED or SHIPPED[name].version != TABLE.set_index("subject").loc[name, "version"].iloc[0]:
        pytest.skip(f"{name} is not installed in the version of the table; {Requirements.of(SCRIPT).install}")
    target, _, scope = verdict.removesuffix("]").partition(" [")
    if " " in target or scope not in ("", "equal lengths"):
        pytest.skip("a combination, or only within the reach of a clamp")
    subject, off = SHIPPED[name], policy == "off"
    policies = gl.Tree.random(3, 3, 40, eos=0) if not scope else gl.Tree.random(3, 2, 40)
    case = gl.Scenario(policies, policies.perturbed(kl=0.2, seed=41), policies.perturbed(kl=0.05, seed=42) if off else None)
    found = test_adapters.expected(subject.loss, case, subject.group or 1)
    if target == "zero":
        assert float(found.norm()) < 1e-6
    elif target == "none":
        known = {known: residual(found, gl.exact.gradient(known, case)) for known in gl.TARGETS if known != "zero"}
        assert min(known.values()) > 1e-3, known
    else:
        wanted = candidates.CANDIDATES[target.removeprefix("−")]
        parameters = case.policy.parameters.clone().requires_grad_(True)
        value = wanted.objective(case.policy.with_parameters(parameters), case.reference, case.sampler)
        gradient = torch.autograd.grad(value, parameters)[0]
        assert residual(found, gradient) < (1e-5 if test_adapters.tolerance(name) > 1e-9 else 1e-7)
        assert (float(found @ gradient) < 0) == target.startswith("−")


# ---- the analysis, with the real packages --------------------------------------------------------------------------------


def test_every_framework_of_the_analysis_is_required():
    assert len(Requirements.of(SCRIPT).versions) == len(adapters.ADAPTERS)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    missing = Requirements.of(SCRIPT).missing
    if missing:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("shipped")
    return folder, run(SCRIPT.stem, folder).names["verdicts"].set_index(["id", "scope"])


def test_claims_about_shipped_code_are_settled(results):
    _, verdicts = results
    assert len(verdicts) == len(CLAIMS)
    assert set(verdicts["verdict"]) == {"HOLDS", "FAILS"}
    expected = {
        "open-off-policy": {"HOLDS"}, "k3-forward.frozen": {"HOLDS"}, "k2-unbiased": {"FAILS"}, "k1-reward": {"HOLDS"},
        "k1-reward.off-policy": {"FAILS"}, "detached-baseline": {"HOLDS"}, "rho-k3": {"FAILS"}, "rho-k3.frozen": {"HOLDS", "FAILS"},
        "off-policy-fix.frozen": {"FAILS"}, "k3-plus": {"FAILS"}, "k3-plus.frozen": {"HOLDS", "FAILS"}, "length": {"FAILS"},
        "clamp.direction": {"FAILS"},
    }  # fmt: skip
    assert {name: set(part["verdict"]) for name, part in verdicts.groupby("id")} == expected
    # Every configuration that a claim names was audited: none was left out by a change of its name.
    subjects = {name for claim in CLAIMS for c in claim.where if c.column == "subject" for name in c.among or ()}
    assert subjects <= {s.name for s in adapters.subjects()}


def test_captions_carry_versions_and_settings(results):
    folder, _ = results
    kinds, settings = ((folder / f"12_{name}.md").read_text(encoding="utf-8") for name in ("kinds", "settings"))
    for framework in ("trl", "verl", "openrlhf", "torchrl", "liger", "trinity"):
        version = pd.read_csv(folder / "12_configurations.csv").set_index("framework").loc[framework, "version"].iloc[0]
        assert f"{framework} {version}" in kinds
    assert "`trl rloo` (normalize_advantages=False)" in settings
    assert "Off-policy:\n\n* no configuration of any framework" in settings
    Run({}, folder).check_captions()
    for name in ("12_kinds", "12_settings", "12_pulls"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
