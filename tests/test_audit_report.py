"""`gradlab audit` as a user meets it: the table, JSON, the page, exit codes and one-line errors; and assertions for test suites."""

from __future__ import annotations

import json
import re
import sys
import warnings
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

import gradlab as gl
from gradlab import cli
from gradlab.audit import report
from gradlab.plots import PAGE, stylesheet
from gradlab.testing import assert_descends

pytest_plugins = ["pytester"]

LOSSES = """
import torch

def k2(log_probs, ref_log_probs, mask):
    return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()

def k3(log_probs, ref_log_probs, mask):
    x = log_probs - ref_log_probs
    return ((torch.expm1(-x) + x) * mask).sum(-1).mean()

def unmasked(log_probs, ref_log_probs):
    return (0.5 * (log_probs - ref_log_probs) ** 2).sum(-1).mean()

def broken(log_probs, ref_log_probs, mask):
    return helper(log_probs)

def helper(log_probs):
    return log_probs @ log_probs

def needs_setting(log_probs, ref_log_probs, mask, kind):
    return {"k2": k2, "k3": k3}[kind](log_probs, ref_log_probs, mask)

def obscure(a, b, mask):
    return k3(a, b, mask)

def returns_float(log_probs, mask):
    return float((log_probs * mask).detach().sum())

def rewards(log_probs, ref_log_probs):
    return ref_log_probs - log_probs
"""


@pytest.fixture
def losses(tmp_path):
    path = tmp_path / "losses.py"
    path.write_text(LOSSES)
    return path


def run(monkeypatch, *arguments):
    """Exit code of `gradlab audit ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["gradlab", "audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_one_loss_is_told_in_words_with_every_probe(monkeypatch, capsys, losses):
    assert run(monkeypatch, f"{losses}:k3") == 0
    out = capsys.readouterr().out
    assert "on-policy, the expected gradient equals the gradient of the forward KL with frozen prefixes, relative error" in out
    assert "off-policy, it equals the gradient of no known objective" in out
    assert "response by response it is k3-loss" in out
    for name in ("gradient", "reference", "clamps", "asymmetry", "bfloat16"):
        assert re.search(rf"│ {name} ", out)
    assert out.count("FAIL") == 2  # weight, asymmetry


@pytest.mark.parametrize("jobs", [1, 2])
def test_several_losses_have_a_line_each(monkeypatch, capsys, losses, jobs):
    assert run(monkeypatch, f"{losses}:k2", f"{losses}:k3", "--jobs", jobs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("│")[1:4] for line in lines if re.match(r"│ k[23] ", line)] == [
        [" k2            ", " reverse_kl_frozen_prefix ", "     1 "], [" k3            ", " forward_kl_frozen_prefix ", "     1 "],
    ]  # fmt: skip


def test_the_size_of_the_group_is_the_users(monkeypatch, capsys, losses):
    assert run(monkeypatch, f"{losses}:k2", "--group", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["group"] == 3


def test_json_says_what_the_library_says(monkeypatch, capsys, losses):
    assert run(monkeypatch, f"{losses}:k3", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    audited = gl.audit(_module(losses).k3)
    assert found["on_policy"]["combination"] == audited.on_policy.combination
    assert found["off_policy"]["scale"] is None
    assert found["form"] == "k3-loss"
    assert [probe["name"] for probe in found["probes"]] == [probe.name for probe in audited.probes]
    assert found["curve"]["coefficient"] == list(audited.curve["coefficient"])


def _module(path):
    names: dict[str, object] = {}
    exec(path.read_text(), names)
    return type("losses", (), {key: staticmethod(item) for key, item in names.items() if callable(item)})


@pytest.mark.parametrize(
    ("name", "expect", "options", "code", "says"),
    [
        ("k2", "reverse_kl_frozen_prefix", (), 0, ""),
        ("k2", "reverse_kl", (), 1, "k2 does not descend reverse_kl on-policy: its expected gradient equals the gradient of the reverse"),
        ("k2", "reverse_kl_frozen_prefix", ("--off-policy",), 1, "off-policy: .*; weight: no importance weight"),
        ("unmasked", "reverse_kl_frozen_prefix", (), 1, "padded positions get a gradient"),
        ("k2", "revers_kl", (), 2, "unknown target 'revers_kl'; did you mean 'reverse_kl'"),
        ("needs_setting", "forward_kl_frozen_prefix", ("--set", "kind=k3"), 0, ""),
        ("obscure", "forward_kl_frozen_prefix", ("--bind", "a=log_prob", "--bind", "b=reference_log_prob"), 0, ""),
        ("rewards", "reverse_kl", ("--returns", "rewards"), 0, ""),
    ],
)  # fmt: skip
def test_what_is_expected_decides_the_exit_code(monkeypatch, capsys, losses, name, expect, options, code, says):
    assert run(monkeypatch, f"{losses}:{name}", "--expect", expect, *options) == code
    err = capsys.readouterr().err
    assert re.search(says, err)
    assert len(err.splitlines()) == (1 if code else 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{losses}:k4",), "gradlab: no function 'k4' in .*; did you mean k3 or k2"),
        (
            ("{losses}:needs_setting",),
            r"gradlab: cannot bind needs_setting\(log_probs, ref_log_probs, mask, kind\): cannot tell",
        ),
        (("{losses}:returns_float",), "gradlab: returns_float is not differentiable: it returned float"),
        ((), "gradlab: say what to audit: package.module:function"),
        (("trrl",), "gradlab: unknown framework 'trrl'; did you mean 'trl'"),
        (("{losses}:k3", "--bind", "kind"), "gradlab: --bind takes NAME=VALUE, got 'kind'"),
        (("{losses}:k3", "--only", "nothing"), "gradlab: nothing to audit: no configuration is named like 'nothing'"),
        (("{losses}:k3", "--installed"), "gradlab: say what to audit"),
        (
            ("{losses}:k3", "--group", "9"),
            "gradlab: groups of 9 responses cannot be enumerated: k3 would be .* the largest group is 5",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, losses, arguments, says):
    assert run(monkeypatch, *(argument.format(losses=losses) for argument in arguments)) == 2
    err = capsys.readouterr().err
    assert re.match(says, err)
    assert len(err.splitlines()) == 1


def test_what_cannot_be_audited_does_not_take_the_others_along(monkeypatch, capsys, losses):
    raising = losses.parent / "raising.py"
    raising.write_text(
        "from gradlab.audit import Subject\n"
        "def loss(batch):\n    raise RuntimeError('another version')\n"
        "SUBJECT = Subject('an old framework', loss)\n"
    )
    assert run(monkeypatch, f"{losses}:k2", f"{raising}:SUBJECT") == 2
    captured = capsys.readouterr()
    assert "reverse_kl_frozen_prefix" in captured.out
    assert "1 of 2 could not be audited: an old framework raised RuntimeError: another version" in captured.err


def test_a_loss_that_raises_shows_the_users_traceback_only(monkeypatch, capsys, losses):
    assert run(monkeypatch, f"{losses}:broken") == 2
    err = capsys.readouterr().err
    assert "return helper(log_probs)" in err
    assert "return log_probs @ log_probs" in err
    assert err.count('  File "') == 2
    assert err.splitlines()[-1].startswith("gradlab: broken raised RuntimeError: ")


def test_the_page_stands_alone_and_shows_every_configuration(monkeypatch, capsys, losses, tmp_path):
    folder = tmp_path / "out"
    assert run(monkeypatch, f"{losses}:k2", f"{losses}:unmasked", "-o", folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["audit.csv", "audit.html", "audit.json"]
    page = (folder / "audit.html").read_text()
    HTMLParser().feed(page)
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert page.count("<details") == 2
    assert "the mask is not applied" in page
    table = pd.read_csv(folder / "audit.csv")
    assert list(table["subject"]) == ["k2", "k2", "unmasked", "unmasked"]
    before = page
    assert run(monkeypatch, f"{losses}:k2", f"{losses}:unmasked", "-o", folder) == 0
    assert (folder / "audit.html").read_text() == before


def test_a_page_escapes_what_users_call_their_losses(tmp_path):
    def loss(log_probs, ref_log_probs, mask):
        return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()

    page = report.write([gl.audit(loss, name="<script>alert(1)</script> [red]")], tmp_path).read_text()
    assert "<script>" not in page
    report.show([gl.audit(loss, name="[red]mine[/]")])


def test_heat_and_curves_carry_what_was_audited():
    def loss(log_probs, ref_log_probs, mask):
        return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()

    audited = gl.audit(loss)
    heat = report.heat([audited])
    assert list(heat[heat["equal"]]["target"]) == ["reverse_kl_frozen_prefix"]
    assert set(heat[heat["equal"]]["policy"]) == {"on"}
    assert heat[heat["equal"]]["cosine"].to_list() == pytest.approx([1.0], rel=1e-12)
    curves = report.curves([audited])
    assert curves["coefficient"].to_list() == pytest.approx(curves["log_ratio"].to_list(), abs=1e-12)


# ---- figures ------------------------------------------------------------------------------------------------------------


def curves_frame() -> pd.DataFrame:
    x = np.linspace(-40, 40, 33)
    pulls = {"a": x, "b": x, "c": np.where(x > 20, np.nan, -np.expm1(-x)), **{f"d{k}": k * np.sign(x) for k in range(9)}}
    return pd.concat(
        [pd.DataFrame({"subject": n, "log_ratio": x, "coefficient": y}) for n, y in pulls.items()], ignore_index=True
    )


def heat_frame() -> pd.DataFrame:
    rows = [
        (subject, policy, target, value, value == 1)
        for policy in ("on", "off")
        for subject, values in (("a", (1.0, -0.2)), ("b", (np.nan, np.nan)), ("a rather long name " * 5, (0.5, 1.0)))
        for target, value in zip(("reverse_kl", "forward_kl_frozen_prefix"), values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["subject", "policy", "target", "cosine", "equal"])


def test_curves_that_agree_share_a_line_and_the_rest_is_counted():
    figure = gl.plots.pulls(curves_frame())
    whole, close = figure.axes
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[1] == "a and 1 more"
    assert len(whole.lines) == 1 + 8
    assert "3 further curves not shown" in close.get_title(loc="left")
    (gap,) = [line for line in whole.lines if line.get_label() == "c"]
    assert np.isnan(gap.get_ydata()).sum() == 8


def test_equal_cells_are_framed_and_missing_ones_blank():
    figure = gl.plots.matches(heat_frame())
    on, off, *_ = figure.axes
    for ax in (on, off):
        assert [(patch.get_x(), patch.get_y()) for patch in ax.patches] == [(-0.5, -0.5), (0.5, 1.5)]
        shown = np.ma.filled(ax.images[0].get_array(), np.nan)
        assert np.array_equal(shown, [[1, -0.2], [np.nan, np.nan], [0.5, 1]], equal_nan=True)


@pytest.mark.parametrize(("draw", "make"), [(gl.plots.pulls, curves_frame), (gl.plots.matches, heat_frame)])
def test_figures_are_pure_legible_and_print_sized(draw, make):
    frame = make()
    before, settings = frame.copy(deep=True), dict(mpl.rcParams)
    figure = draw(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert dict(mpl.rcParams) == settings
    with stylesheet(), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    assert figure.get_figwidth() == PAGE
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 7


# ---- for other people's test suites -------------------------------------------------------------------------------------


def good(log_probs, ref_log_probs, mask):
    return (0.5 * (log_probs - ref_log_probs) ** 2 * mask).sum(-1).mean()


def clamped(log_probs, ref_log_probs, mask):
    return (torch.clamp(0.5 * (log_probs - ref_log_probs) ** 2, max=60) * mask).sum(-1).mean()


def test_assert_descends_passes_and_fails_with_what_is_there():
    assert assert_descends(good, "reverse_kl_frozen_prefix") is None
    with pytest.raises(AssertionError) as caught:
        assert_descends(good, "reverse_kl")
    message = str(caught.value)
    assert "good does not descend reverse_kl on-policy" in message
    assert "on-policy it equals the gradient of the reverse KL with frozen prefixes" in message
    assert "response by response it is k2-loss" in message
    assert "worst probe: weight: no importance weight" in message
    with pytest.raises(AssertionError, match="off-policy"):
        assert_descends(good, "reverse_kl_frozen_prefix", off_policy=True)


def test_assert_descends_can_ask_for_probes():
    assert_descends(good, "reverse_kl_frozen_prefix", passes=("clamps", "padding"))
    assert_descends(clamped, "reverse_kl_frozen_prefix")
    with pytest.raises(AssertionError, match=r"clamped fails the probe clamps: the gradient is 0 for ℓ below -10\.95"):
        assert_descends(clamped, "reverse_kl_frozen_prefix", passes=("clamps",))
    with pytest.raises(ValueError, match="unknown probe 'clamp'; did you mean 'clamps'"):
        assert_descends(clamped, "reverse_kl_frozen_prefix", passes=("clamp",))
    with pytest.raises(ValueError, match="unknown target"):
        assert_descends(clamped, "kl")


def test_the_fixture_works_in_a_project_of_its_own(pytester):
    pytester.makeconftest('pytest_plugins = ["gradlab.pytest_plugin"]')
    pytester.makepyfile(
        losses=LOSSES,
        test_kl="""
        import losses

        def test_good(assert_descends):
            assert_descends(losses.k2, "reverse_kl_frozen_prefix")

        def test_bad(assert_descends):
            assert_descends(losses.k3, "reverse_kl_frozen_prefix")
        """,
    )
    result = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*k3 does not descend reverse_kl_frozen_prefix on-policy*"])
