"""The command line as a user meets it: exit codes, one-line errors, and results that are whole or absent."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import gradlab as gl
from gradlab._common import files
from gradlab.cli import main, reproduce
from gradlab.study import gallery

SCRIPT = """# %% [markdown]
# # Does a planted analysis run?
import pandas as pd
import gradlab as gl
study = gl.report.study(__file__)
study.save_frame("{number}_numbers", pd.DataFrame({{"seed": [study.seed], "quick": [study.quick]}}))
{last}
"""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `gradlab ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["gradlab", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return int(stop.value.code or 0)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two planted analyses in place of the real ones."""
    folder = tmp_path / "analyses"
    folder.mkdir()
    for number in ("01", "02"):
        (folder / f"{number}_planted.py").write_text(SCRIPT.format(number=number, last=""), encoding="utf-8")
    monkeypatch.setattr(reproduce, "analyses", lambda: {path.stem: path for path in sorted(folder.glob("*.py"))})
    return folder


def test_measure_prints_what_the_library_measures(monkeypatch, capsys, tmp_path):
    file = tmp_path / "frame.csv"
    options = (
        "--family",
        "bandit",
        "--vocab",
        5,
        "--kl",
        0.7,
        "-e",
        "k3-loss",
        "-t",
        "reverse_kl",
        "-t",
        "forward_kl",
        "-o",
        file,
    )
    assert run(monkeypatch, "measure", *options) == 0
    frame = pd.read_csv(file)
    policy = gl.Bandit.random(5, seed=0)
    scenario = gl.Scenario(policy, policy.perturbed(kl=0.7, seed=1))
    expected = gl.measure("k3-loss", scenario, target=["reverse_kl", "forward_kl"])
    assert frame.bias.to_list() == pytest.approx(expected.bias.to_list(), rel=1e-12, abs=1e-14)
    assert frame.bias[0] > 0.01 > 1e-12 > frame.bias[1]
    assert "k3-loss" in capsys.readouterr().out


def test_train_prints_and_writes_what_the_library_trains(monkeypatch, capsys, tmp_path):
    file = tmp_path / "runs.csv"
    shape = {"steps": 2, "batch": 16, "group": 4, "look": 1, "watch": 16}
    options = [part for name, value in shape.items() for part in (f"--{name}", value)]
    assert run(monkeypatch, "train", "-e", "k2-loss", "-b", 0.3, "--seeds", 2, *options, "-o", file) == 0
    policy = gl.policies.small("names", precision=torch.float64)
    recipe = gl.training.Recipe(rate=5e-4, steps=2, batch=16, group=4, eval_every=1, eval_responses=16)
    expected = gl.train(policy, gl.training.task_reward("names", policy), "k2-loss", 0.3, recipe=recipe, seeds=2)
    frame = pd.read_csv(file)
    assert list(frame["estimator"]) == ["none"] * 6 + ["k2-loss"] * 6
    assert frame["kl"].to_list() == pytest.approx(expected["kl"].to_list(), rel=1e-12)
    printed = capsys.readouterr().out
    assert "KL over k2-loss" in printed
    assert "means over 2 seeds" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("measure", "-e", "k3-los"), "did you mean 'k3-loss'"),
        (("measure", "-t", "reverse"), "did you mean 'reverse_kl'"),
        (("measure", "-n", "0"), "samples must be a positive whole number, got 0"),
        (("measure", "-n", "-5"), "samples must be a positive whole number, got -5"),
        (("measure", "--eos", "9"), "eos must be a token id between 0 and 3"),
        (("measure", "--family", "forest"), "forest"),
        (("measure", "--vocab", "30", "--length", "12"), "dynamic programming"),
        (("list", "nothing"), "nothing"),
        (("claims", "--only", "k3-biassed"), "did you mean 'k3-biased'"),
        (("claims", "k3-biassed"), "did you mean 'k3-biased'"),
        (("claims", "-o", "/nope"), "there is no folder /nope"),
        (("claims", "-o", str(Path(__file__).parent)), "holds none of the frames that settle claims"),
        (("reproduce", "--only", "07_nothing_like_it"), "unknown analysis"),
        (("reproduce", "--quik"), "--quik"),
        (("train", "-e", "k4-loss"), "unknown estimator 'k4-loss'"),
        (("train", "--batch", "10"), "groups of at least 2"),
        (("train", "--coefficient", "nan"), "from 0 on"),
        (("train", "--task", "poetry"), "poetry"),
        (("train", "--clip", "0.3"), "with --epochs 1 there are none"),
        (("train", "--steps", "0"), "steps must be a positive whole number, got 0"),
        (("train", "--rate", "nan"), "rate must be a positive number, got nan"),
        (("train", "--seeds", "0"), "seeds must be a positive whole number, got 0"),
        (("train", "--jobs", "0"), "got 0"),
        (("measure", "--kl", "inf"), "finite kl"),
        (("measure", "--kl", "nan"), "--kl"),
        (("measure", "--lag", "-1"), "--lag"),
        (("measure", "-n", "1.5"), "--samples"),
        (("measure", "--jobs", "0"), "jobs must be a number of worker processes, or -1 for one per core, got 0"),
        (("measure", "--scenarios", "0"), "--scenarios"),
        (("measure", "--seed", "-1"), "--seed"),
        (("measure", "--vocab", "1"), "--vocab"),
        (("measure", "--family", "markov", "--vocab", "100000"), "100001 × 100000 logits takes more than"),
        (("measure", "--family", "markov", "--length", "20", "-n", str(10**12)), "is more than the"),
        (("measure", "-o", "/nope/x.csv"), "there is no folder /nope"),
        (("measure", "k2-loss"), "unexpected extra argument"),
        (("audit",), "say what to audit"),
        (("audit", "triel"), "did you mean 'trl'"),
        (("audit", "trl", "--installed"), "say what to audit"),
        (("audit", "trl", "--bind", "a=log_prob"), "--bind: this is about the arguments of a function of yours"),
        (("audit", "--installed", "--set", "a=1", "--returns", "rewards"), "--set, --returns: this is about"),
        (("audit", "a.py:f", "--off-policy"), "give the target with --expect"),
        (("audit", "a.py:f", "--expect", "reverse"), "did you mean 'reverse_kl'"),
        (("audit", "a.py:f", "--jobs", "0"), "jobs must be a number of worker processes"),
        (("audit", "a.py:f", "--group", "0"), "--group"),
        (("audit", "a.py:f", "--returns", "los"), "--returns"),
        (("audit", "a.py:f", "--bind", "a"), "--bind takes NAME=VALUE, got 'a'"),
        (("audit", "a.py:f"), "no file a.py"),
        (("audit", "nowhere.at_all:f"), "cannot import nowhere"),
        (("reproduce", "--jobs", "0"), "jobs must be a number of worker processes"),
        (("reproduce", "--seed", "-1"), "--seed"),
        (("reproduce", "--check", "--force"), "--force is for a run without it"),
        (("reproduce", "--check", "--only", "03", "-o", "/nope"), "and there are none"),
        (("list", "claims", "targets"), "unexpected extra argument"),
        (("nothing",), "No such command"),
    ],
)
def test_a_mistake_is_explained_and_exits_with_2(monkeypatch, capsys, arguments, said):
    assert run(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


AUDITED = "def f(logprob, ref_logprob): return (logprob - ref_logprob).sum()\ndef g(what): return what.sum()\nnumber = 3\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("f", "--top-p", "2"), "top_p is the probability of the nucleus"),
        (("f", "--group", "100"), "groups of 100 responses cannot be enumerated"),
        (("f", "--only", "zzz"), "no configuration is named like 'zzz'"),
        (("f", "--bind", "what=log_prob"), "unknown argument of f 'what'; known: logprob, ref_logprob"),
        (("f", "--bind", "logprob=los"), "unknown role 'los'"),
        (("f", "--set", "what=1"), "unknown argument of f 'what'"),
        (("g",), "cannot tell what what is"),
        (("number",), "is int, not a function"),
        (("h",), "no function 'h'"),
    ],
)
def test_a_mistake_about_a_loss_of_ones_own_is_explained(monkeypatch, capsys, tmp_path, arguments, said):
    (tmp_path / "own.py").write_text(AUDITED)
    name, *options = arguments
    assert run(monkeypatch, "audit", f"{tmp_path / 'own.py'}:{name}", *options) == 2
    assert said in capsys.readouterr().err


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"gradlab {gl.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("measure", "--family", "bandit", "--length", 3), "a bandit has no --length; --family bandit takes --vocab"),
        (("measure", "--family", "bandit", "--eos", 1), "a bandit has no --eos"),
        (("measure", "--family", "gaussian", "--vocab", 3), "a gaussian has no --vocab; --family gaussian takes none of"),
    ],
)
def test_a_size_that_a_family_does_not_have_is_refused(monkeypatch, capsys, arguments, said):
    assert run(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("family", ["bandit", "tree", "markov", "gaussian"])
def test_every_family_is_measured_with_the_sizes_it_has(monkeypatch, capsys, family):
    assert run(monkeypatch, "measure", "-e", "k2-loss", "--family", family) == 0
    assert "kl=0.3" in capsys.readouterr().out


@pytest.mark.parametrize("command", [("measure", "-e", "k2-loss"), ("train", "-e", "k2-loss")])
def test_a_file_into_a_folder_that_is_not_there_is_refused_before_any_work(monkeypatch, capsys, tmp_path, command):
    monkeypatch.setattr("gradlab.measure.measure", None)
    monkeypatch.setattr("gradlab.training.train", None)
    assert run(monkeypatch, *command, "-o", tmp_path / "none" / "x.csv") == 2
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert run(monkeypatch, *command, "-o", tmp_path) == 2
    assert "it is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (("-e", "k2-loss", "--kl", 0), ["– in 1 of 1 rows: the target's gradient is 0"]),
        (("-e", "k2-loss", "-n", 1), ["– in 1 of 1 rows: so few responses show no spread"]),
        (("-e", "k1-loss", "-e", "k2-loss"), ["– in 1 of 2 rows: no cosine: the mean gradient is 0"]),
        (("-e", "k2-loss", "-n", 1000), ["– in 1 of 1 rows: no crossover: the bias is not significantly different from 0"]),
        (("-e", "k2-loss"), []),
    ],
)
def test_a_dash_has_a_reason(monkeypatch, capsys, options, reasons):
    assert run(monkeypatch, "measure", "--family", "bandit", *options) == 0
    printed = capsys.readouterr().out.splitlines()
    told = [line for line in printed if line.startswith("– in")]
    assert [line.startswith(reason) for line, reason in zip(told, reasons, strict=True)] == [True] * len(reasons)
    cells = [cell.strip() for line in printed if line.startswith("│") for cell in line.split("│")]
    assert any(cell.startswith("–") for cell in cells) == bool(reasons)


def test_a_file_without_a_function_is_answered_with_those_it_defines(monkeypatch, capsys, tmp_path):
    file = tmp_path / "losses.py"
    file.write_text("raise SystemExit  # is not run\ndef k3_loss(logprob): ...\ndef _help(): ...\ndef kl(logprob): ...\n")
    assert run(monkeypatch, "audit", file) == 2
    assert f"{file}:FUNCTION with one of k3_loss, kl" in capsys.readouterr().err
    file.write_text("x = 1\n")
    assert run(monkeypatch, "audit", file) == 2
    assert "it defines no function" in capsys.readouterr().err
    assert run(monkeypatch, "audit", tmp_path / "none.py") == 2
    assert "there is no file" in capsys.readouterr().err
    assert run(monkeypatch, "audit", "package.losses") == 2
    assert "package.losses:FUNCTION" in capsys.readouterr().err


def test_an_audit_that_could_not_be_written_is_not_run(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("gradlab.audit.run.audit", None)
    (tmp_path / "losses.py").write_text("def k3_loss(logprob, ref_logprob): return (ref_logprob - logprob).exp().sum()\n")
    assert run(monkeypatch, "audit", f"{tmp_path / 'losses.py'}:k3_loss", "-o", tmp_path / "file" / "page") == 2
    assert "cannot write to the output folder" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["estimators", "losses", "targets", "kernels", "claims", "analyses"])
def test_list_names_everything_there_is(monkeypatch, capsys, what):
    assert run(monkeypatch, "list", what) == 0
    printed = capsys.readouterr().out
    names = {
        "estimators": gl.ESTIMATORS,
        "losses": gl.LOSSES,
        "targets": [*gl.TARGETS, *gl.OBJECTIVES],
        "kernels": ["k1", "k2", "k3", "full", "mse"],
        "claims": ["value-k1", "E[k1] = KL(π‖ref)", "k3-biased"],
        "analyses": main.analyses(),
    }[what]
    assert all(name in printed for name in names)


def test_the_ledger_fits_a_screen_and_a_claim_is_told_in_full(monkeypatch, capsys):
    figures = Path(__file__).parents[1] / "figures"
    assert run(monkeypatch, "claims", "-o", figures) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60  # what a terminal over the height of a screen shows
    assert [line.split()[0] for line in lines[1:-1]] == list(dict.fromkeys(c.topic for c in gl.claims.CLAIMS))
    assert lines[-1].startswith(f"{len(gl.claims.CLAIMS)} verdicts: ")

    assert run(monkeypatch, "claims", "-o", figures, "k2-loss", "--only", "clamp.direction") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "k2 as loss is equivalent to k1 in reward" in said  # as it is published
    assert "k2 as loss has the gradient of k1 in reward, sample by sample" in said  # as it is tested
    assert "every error = 0 ± 1e-12" in said
    assert "clamp.direction" in said
    assert "the coefficient as it is" not in said

    assert run(monkeypatch, "claims", "-o", figures, "--csv", "clamp") == 0
    assert capsys.readouterr().out.count("\n") == 1 + sum(c.topic == "clamp" for c in gl.claims.CLAIMS)


def test_every_command_has_help_with_an_example_or_a_sentence(monkeypatch, capsys):
    for command in ("reproduce", "claims", "measure", "train", "list"):
        assert run(monkeypatch, command, "--help") == 0
        assert len(capsys.readouterr().out) > 400


def test_reproduce_makes_results_once_and_again_when_something_changed(monkeypatch, capsys, tmp_path, scripts):
    output = tmp_path / "figures"
    assert run(monkeypatch, "reproduce", "--output", output, "--seed", 3) == 0
    first = pd.read_csv(output / "01_numbers.csv")
    assert first.seed.tolist() == [3]
    assert (output / "index.html").is_file()
    assert (output / "claims.csv").is_file()
    capsys.readouterr()

    assert run(monkeypatch, "reproduce", "--output", output, "--seed", 3) == 0
    assert capsys.readouterr().out.count("unchanged, made again by --force: 01_planted, 02_planted") == 1

    (output / "02_numbers.csv").write_text("spoilt\n", encoding="utf-8")
    assert run(monkeypatch, "reproduce", "--output", output, "--seed", 3) == 0
    assert capsys.readouterr().out.count("unchanged, made again by --force: 01_planted\n") == 1
    assert pd.read_csv(output / "02_numbers.csv").seed.tolist() == [3]

    assert run(monkeypatch, "reproduce", "--output", output, "--seed", 4) == 0
    assert "made again by --force" not in capsys.readouterr().out
    assert pd.read_csv(output / "01_numbers.csv").seed.tolist() == [4]


def test_an_interrupted_run_keeps_what_is_finished(monkeypatch, capsys, tmp_path, scripts):
    broken = SCRIPT.format(number="02", last="raise KeyboardInterrupt")
    (scripts / "02_planted.py").write_text(broken.replace("study.save_frame", "None and study.save_frame"), encoding="utf-8")
    output = tmp_path / "figures"
    assert run(monkeypatch, "reproduce", "--output", output) == 130
    assert "interrupted; finished and kept: 01_planted" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == [".reproduced", "01_frames.json", "01_numbers.csv"]

    (scripts / "02_planted.py").write_text(SCRIPT.format(number="02", last=""), encoding="utf-8")
    assert run(monkeypatch, "reproduce", "--output", output) == 0
    assert capsys.readouterr().out.count("unchanged, made again by --force: 01_planted\n") == 1
    assert (output / "02_numbers.csv").is_file()


def test_several_analyses_at_a_time_leave_the_same_bytes_and_a_failure_is_told(monkeypatch, capsys, tmp_path, scripts):
    for jobs in (1, 2):
        assert run(monkeypatch, "reproduce", "--jobs", jobs, "--output", tmp_path / str(jobs)) == 0
    for name in ("01_numbers.csv", "02_numbers.csv", "claims.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    (scripts / "02_planted.py").write_text("raise RuntimeError('planted')", encoding="utf-8")
    assert run(monkeypatch, "reproduce", "--jobs", 2, "--output", tmp_path / "3") == 2
    assert "02_planted failed" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "frame.csv"
    target.write_text("old", encoding="utf-8")

    def interrupted() -> None:
        with files.atomic_write(target) as part:
            part.write_text("half of the n", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["frame.csv"]


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(monkeypatch, capsys, tmp_path, scripts):
    (tmp_path / "file").touch()
    assert run(monkeypatch, "reproduce", "--output", tmp_path / "file" / "figures") == 2
    assert "cannot write to the output folder" in capsys.readouterr().err
    if os.geteuid() != 0:  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert run(monkeypatch, "reproduce", "--output", locked / "figures") == 2


def test_the_gallery_shows_every_figure_with_its_caption_and_data(tmp_path):
    study = gl.report.Study("01_planted", output=tmp_path, quick=True)
    settled = gl.claims.verify({})
    own = settled.iloc[:1].assign(figure="01_picture", verdict="FAILS", scope="one <case>")
    caption, notes = "A caption with `code` & <signs>.", "* A note."
    study.save_figure("01_picture", Figure(figsize=(2, 1)), pd.DataFrame({"x": [1.5]}), caption, notes, own)
    overview = gallery.write(tmp_path, settled, {"01_planted": "Is <this> escaped?"}).read_text(encoding="utf-8")
    page, claims = ((tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in ("01_planted", "claims"))
    for text in (overview, page):
        assert "Is &lt;this&gt; escaped?" in text
        assert 'href="01_picture.csv"' in text
        assert 'src="01_picture.png"' in text
    assert 'href="01_planted.html#01_picture"' in overview
    assert "A caption with <code>code</code> &amp; &lt;signs&gt;." in page
    under, beside = page.split("<figcaption>")[1].split("</figcaption>")
    assert "A note." not in under
    for told in ("<li>A note.</li>", '<span class="verdict FAILS">FAILS</span> (one &lt;case&gt;)', "Made by"):
        assert told in beside
    assert claims.count('data-verdict="OPEN"') == len(settled)
    assert "http" not in (overview + page + claims).replace("https://arxiv.org", "")


def test_whole_losses_are_measured_with_their_group_and_coefficient(monkeypatch, capsys, tmp_path):
    path = tmp_path / "found.csv"
    options = ["--loss", "grpo", "--loss", "rloo", "--beta", ".1", "--group", "4", "--vocab", "3", "--length", "2", "-o", path]
    assert run(monkeypatch, "measure", *options) == 0
    found = pd.read_csv(path)
    assert list(found.estimator) == ["grpo", "rloo"]
    assert list(found.target) == ["regularised"] * 2
    assert found.bias[0] > 0.1
    assert found.bias[1] == 0
    assert run(monkeypatch, "measure", "--group", "4") == 2
    assert "name one with --loss" in capsys.readouterr().err
    assert run(monkeypatch, "measure", "--loss", "grop") == 2
    assert "unknown loss 'grop'; did you mean 'grpo'" in capsys.readouterr().err


def test_the_utility_of_a_loss_is_told_with_what_it_needs(monkeypatch, capsys):
    assert run(monkeypatch, "utility", "grpo", "--group", "8") == 0
    printed = capsys.readouterr().out
    assert "2 arcsin √p" in printed
    assert f"{gl.utility('group_std', group=8).slope(0.5):.4f}" in printed
    assert "divided by its length" in printed
    assert run(monkeypatch, "utility", "reinforce++") == 0
    assert "no utility" in capsys.readouterr().out
    assert run(monkeypatch, "utility", "pass_at_k", "--group", "8", "--k", "2") == 0
    assert "pass@2" in capsys.readouterr().out
    assert run(monkeypatch, "utility", "group_sdt") == 2
    assert "did you mean 'group_std'" in capsys.readouterr().err
