"""Audits in other people's CI: baselines, JUnit reports, versions compared, the action and the hook."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import gradlab as gl
from gradlab.audit import versions
from gradlab.cli import main

ROOT = Path(__file__).parent.parent
LOSSES = """
def k2(log_probs, ref_log_probs, mask):
    return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()

def leak(log_probs, ref_log_probs, mask):
    return (0.5 * (log_probs - ref_log_probs) ** 2).sum(-1).mean()
"""


def k2(log_probs, ref_log_probs, mask):
    return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()


def clamped(log_probs, ref_log_probs, mask):
    return (0.5 * (log_probs - ref_log_probs).clamp(-6, 6) ** 2 * mask).sum(-1).mean()


@pytest.fixture
def losses(tmp_path):
    path = tmp_path / "losses.py"
    path.write_text(LOSSES)
    return path


def run(monkeypatch, command, *arguments):
    """Exit code of `gradlab COMMAND ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["gradlab", command, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return int(stop.value.code or 0)


def rows(found):
    return found.set_index("what")[["before", "after"]].apply(tuple, axis=1).to_dict()


def test_the_same_loss_has_not_changed_and_rounding_is_no_change():
    def rounded(log_probs, ref_log_probs, mask):
        return k2(log_probs, ref_log_probs, mask) * (1 + 1e-6)

    before = gl.audit(k2)
    assert len(gl.audit.changes(before, gl.audit(rounded, name="k2"))) == 0


def test_changes_are_those_that_were_made():
    def scaled(log_probs, ref_log_probs, mask):
        return 0.3 * k2(log_probs, ref_log_probs, mask)

    def other(log_probs, ref_log_probs, mask, beta=1.0):
        return clamped(log_probs, ref_log_probs, mask)

    before = gl.audit(k2)
    found = rows(gl.audit.changes(before, gl.audit(scaled, name="k2")))
    assert found["KL part on-policy"] == ("reverse_kl_frozen_prefix", "reverse_kl_frozen_prefix, scale 0.3")
    assert found["coefficient of a token at ℓ = -0.125"] == ("-0.125", "-0.0375")
    found = rows(gl.audit.changes(before, gl.audit(other, name="k2")))
    assert "KL part on-policy" not in found or "far" in found["KL part on-policy"][1]
    assert found["probe clamps (KL part)"][0].startswith("pass: no clamp")
    assert "FAIL: the gradient is 0 for ℓ below -6 and ℓ above 6" in found["probe clamps (KL part)"][1]
    assert found["argument beta"] == ("not there", "1.0")
    (coefficient,) = [key for key in found if key.startswith("coefficient")]
    assert 6 <= abs(float(coefficient.rpartition(" ")[2])) <= 6.5
    assert found[coefficient][1] == "0"


def test_a_loss_that_comes_or_goes_is_a_change_and_twins_are_told_apart(tmp_path):
    kept = [json.loads(gl.audit.report.to_json([gl.audit(f, name="kl", quick=True)]))[0] for f in (k2, clamped)]
    assert kept[0]["function"] != kept[1]["function"]
    assert len(gl.audit.changes(kept, kept[::-1])) == 0
    found = gl.audit.changes(kept[:1], [*kept[:1], {**kept[1], "subject": "new"}])
    assert found.values.tolist() == [["new", "subject", "not audited", "audited"]]
    assert gl.audit.changes(kept[:1], []).values.tolist() == [["kl", "subject", "audited", "not audited"]]


def test_a_gradient_of_no_objective_is_compared_by_its_cosine():
    def half(log_probs, ref_log_probs, mask, power=1.0):
        return ((log_probs - ref_log_probs).abs() ** power * mask).sum(-1).mean()

    one, two = (gl.audit(half, name="odd", settings={"power": p}, quick=True) for p in (3.0, 4.0))
    found = rows(gl.audit.changes(one, two))
    assert "none, closest" in found["KL part off-policy"][0]
    assert one.off_policy.cosine != pytest.approx(two.off_policy.cosine, abs=2e-3)


def test_a_baseline_fails_on_change_only(monkeypatch, capsys, losses, tmp_path):
    assert run(monkeypatch, "audit", f"{losses}:k2", "--quick", "--json") == 0
    baseline = tmp_path / "audit.json"
    baseline.write_text(capsys.readouterr().out)
    assert run(monkeypatch, "audit", f"{losses}:k2", "--quick", "--baseline", baseline) == 0
    losses.write_text(LOSSES.replace("0.5", "-0.5"))
    assert run(monkeypatch, "audit", f"{losses}:k2", "--quick", "--baseline", baseline) == 1
    assert "gradlab: k2: KL part on-policy was reverse_kl_frozen_prefix, is −reverse_kl_frozen_prefix, scale -1" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no file .*; write one with gradlab audit … --json > "),
        ("no json", "is no JSON"),
        ('[{"subject": 1}]', "holds no audits"),
    ],
)
def test_what_is_no_baseline_is_refused_before_any_audit(monkeypatch, capsys, losses, tmp_path, text, says):
    path = tmp_path / "audit.json"
    if text is not None:
        path.write_text(text)
    assert run(monkeypatch, "audit", f"{losses}:k2", "--baseline", path) == 2
    err = capsys.readouterr().err
    assert re.search(says, err)
    assert len(err.splitlines()) == 1


def test_a_report_of_tests_holds_verdicts_failures_and_errors(monkeypatch, capsys, losses, tmp_path):
    losses.write_text(LOSSES + "\ndef broken(log_probs, mask):\n    return float(log_probs.sum())\n")
    path = tmp_path / "report.xml"
    options = ("--expect", "reverse_kl_frozen_prefix", "--passes", "mask", "--junit", path)
    assert run(monkeypatch, "audit", *(f"{losses}:{name}" for name in ("k2", "leak", "broken")), *options) == 2
    assert "leak fails the probe mask: padded positions get a gradient" in capsys.readouterr().err
    (suite,) = ET.parse(path).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    k2, leak, broken = suite
    assert k2.find("failure") is None
    assert {p.get("name"): p.get("value") for p in k2.iter("property")}["on-policy"] == "reverse_kl_frozen_prefix"
    assert "FAIL weight: no importance weight" in str(k2.findtext("system-out"))
    assert len(str(leak.findtext("failure")).splitlines()) == 2
    assert "not differentiable" in str(broken.find("error").get("message"))


def test_a_probe_that_is_not_there_is_refused(monkeypatch, capsys, losses):
    assert run(monkeypatch, "audit", f"{losses}:k2", "--passes", "masks") == 2
    assert "unknown probe 'masks'; did you mean 'mask'" in capsys.readouterr().err


def test_two_folders_drift(monkeypatch, capsys, tmp_path):
    for name, text in (("before", LOSSES), ("after", LOSSES.replace("0.5", "0.25"))):
        (tmp_path / name / "src" / "mine").mkdir(parents=True)
        (tmp_path / name / "src" / "mine" / "__init__.py").write_text("")
        (tmp_path / name / "src" / "mine" / "losses.py").write_text(text)
    options = ("mine.losses:k2", "--", "--quick")
    assert run(monkeypatch, "drift", tmp_path / "before", tmp_path / "after", *options) == 1
    assert "reverse_kl_frozen_prefix, scale 0.5" in capsys.readouterr().out


def test_two_files_drift_as_they_are(monkeypatch, capsys, tmp_path):
    for name, loss in (("a.json", k2), ("b.json", clamped)):
        (tmp_path / name).write_text(gl.audit.report.to_json([gl.audit(loss, name="kl")]))
    assert run(monkeypatch, "drift", tmp_path / "a.json", tmp_path / "b.json", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert {"probe clamps (KL part)"} <= {row["what"] for row in found}
    assert run(monkeypatch, "drift", tmp_path / "a.json", tmp_path / "a.json") == 0
    assert "nothing changed in 1 audit" in capsys.readouterr().out


def test_a_version_that_cannot_be_installed_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"cannot install 'trl==0.0.0', nor is it a folder or a file audit.json: .*trl==0.0.0"):
        versions.audits("trl==0.0.0")


def test_what_cannot_be_compared_says_why(monkeypatch, capsys, tmp_path):
    for arguments, says in (
        ((tmp_path, tmp_path), "say what to audit in"),
        (("somebody==1.0", "somebody==1.1"), "there is no adapter for 'somebody==1.0'"),
    ):
        assert run(monkeypatch, "drift", *arguments) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("requirement", "name"),
    [("trl==1.9.2", "trl"), ("liger_kernel>=0.8", "liger"), ("trinity-rft", "trinity"), ("tinker-cookbook==0.6.1", "tinker")],
)
def test_a_framework_is_known_by_its_distribution(requirement, name):
    assert versions.framework(requirement) == [name]


def test_the_action_passes_on_what_it_is_given(losses, tmp_path):
    yaml = pytest.importorskip("yaml")
    if shutil.which("bash") is None:
        pytest.skip("bash is not here")
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    step = action["runs"]["steps"][-1]
    folder = tmp_path / "bin"
    folder.mkdir()
    gradlab = folder / "gradlab"
    gradlab.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from gradlab.cli import main; main.main()" "$@"\n')
    gradlab.chmod(0o755)
    given = {key: str(item.get("default", "")) for key, item in action["inputs"].items()}
    given |= {"losses": f"{losses}:k2\n{losses}:leak\n", "arguments": "--quick", "junit": str(tmp_path / "report.xml")}
    given |= {"expect": "reverse_kl_frozen_prefix"}
    environment = {}
    for key, value in step["env"].items():
        name = value.removeprefix("${{ inputs.").removesuffix(" }}")
        environment[key] = given.pop(name)
    assert set(given) == {"install", "python-version"}  # those of the steps before
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]],
        env={**os.environ, **environment, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(ET.parse(tmp_path / "report.xml").getroot()[0]) == 2


def test_the_hook_calls_a_command_that_is_there():
    yaml = pytest.importorskip("yaml")
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["entry"].split() == ["gradlab", "audit"]
    assert "audit" in {command.name for command in main.app.registered_commands}
    assert hook["language"] == "python"
    assert not hook["pass_filenames"]
