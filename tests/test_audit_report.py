"""`gradlab audit` as a user meets it: the table, JSON, the page, exit codes and one-line errors; and assertions for test suites."""

from __future__ import annotations

import html
import json
import math
import re
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

import gradlab as gl
from gradlab import plots
from gradlab.audit import Audit, bind, report
from gradlab.cli import main
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
        main.main()
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


def test_a_nucleus_is_asked_about_when_it_is_given(monkeypatch, capsys, losses):
    assert run(monkeypatch, f"{losses}:k2", "--top-p", "0.7") == 0
    assert re.search(r"│ nucleus +│ pass │ which log-probabilities", capsys.readouterr().out)
    assert run(monkeypatch, f"{losses}:k2", "--top-p", "2") == 2
    assert "gradlab: top_p is the probability of the nucleus" in capsys.readouterr().err


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


def text_of(markup: str) -> str:
    """What a reader sees of a piece of a page."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", markup)).split())


def table_of(markup: str) -> list[list[str]]:
    """The cells of the rows of a piece of a page."""
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", markup, re.S)]
    return [[text_of(cell) for cell in row] for row in rows if row]


@pytest.fixture(scope="module")
def several() -> list[Audit]:
    """Audits that differ in all that a page shows: on-policy and off-policy, limited, combined, zero, failing, in pairs."""

    def k3_clamped(log_probs, ref_log_probs, mask):
        x = log_probs - ref_log_probs
        return ((torch.expm1(-x) + x).clamp(-10, 10) * mask).sum(-1).mean()

    def token_mean(log_probs, ref_log_probs, mask):
        return ((log_probs - ref_log_probs) * mask).sum() / mask.sum()

    def tripled(log_probs, ref_log_probs, mask):
        x = log_probs - ref_log_probs
        return 3 * ((torch.expm1(-x) + x).float() * mask).sum(-1).mean()

    def detached(log_probs, ref_log_probs, mask):
        return ((log_probs - ref_log_probs).detach() * mask).sum(-1).mean()

    found = [bind(loss) for loss in (k3_clamped, token_mean, tripled, detached)]
    found[2] = replace(found[2], package="made_up", version="1.2", function="made_up.loss", configuration={"kernel": "k3"})
    return [gl.audit(subject) for subject in found]


def test_every_cell_of_the_page_is_what_was_audited(tmp_path, several):
    audits = several
    page = report.write(audits, tmp_path).read_text()
    summary, pieces = page.partition("<h2>The pull")[0], page.split("<details")[1:]
    assert len({a.on_policy.name for a in audits} | {a.off_policy.name for a in audits}) >= 5
    for k, (audited, row, piece) in enumerate(zip(audits, table_of(summary), pieces, strict=True)):
        subject, on, off = audited.subject, audited.on_policy, audited.off_policy
        cosines = audited.cosines[audited.cosines["target"] == "reverse_kl"].set_index("policy")["cosine"]
        shown = ["–" if math.isnan(x) else f"{x:.4g}" for x in (on.scale, cosines["on"], cosines["off"])]
        failed = [probe.name for probe in audited.probes if probe.passed is False]
        name = f"{subject.name} {subject.package} {subject.version}".strip()
        assert row == [name, on.name, shown[0], shown[1], off.name, shown[2], ", ".join(failed) or "none"]
        (anchor,) = re.findall(rf'<a href="#(\w+)">{subject.name}</a>', summary)
        assert piece.startswith(f' id="{anchor}"')
        assert f"<summary>{subject.name}</summary>" in piece
        words = f"On-policy the expected gradient {on.text}. Off-policy it {off.text}. "
        words += f"Response by response it is {audited.form.name} . " if audited.form else ""
        words += f"Computed in {audited.precision.name}, {audited.group} response{'s' * (audited.group > 1)} at a time."
        assert words in text_of(piece), k
        marks = {True: "pass", False: "FAIL", None: "n/a"}
        assert table_of(piece) == [
            [probe.name, marks[probe.passed], " ".join(probe.finding.split()), " ".join(probe.example.split())]
            for probe in audited.probes
        ]
    assert "made_up.loss kernel=k3" in text_of(pieces[2])
    alts = dict(re.findall(r'<img src="([^"]+)" alt="(\w+)', page))
    drawn = {plots.audit.audited_curves(report.curves(audits)): "Coefficient", plots.audit.matches(report.heat(audits)): "Heat"}
    assert alts == {report._picture(figure): alt for figure, alt in drawn.items()}


def test_the_table_and_the_json_hold_both_verdicts_whole(tmp_path, several):
    audits = several
    report.write(audits, tmp_path)
    table = pd.read_csv(tmp_path / "audit.csv").set_index(["subject", "policy"])
    found = {item["subject"]: item for item in json.loads((tmp_path / "audit.json").read_text())}
    for audited in audits:
        for policy, verdict in (("on", audited.on_policy), ("off", audited.off_policy)):
            row, item = table.loc[(audited.subject.name, policy)], found[audited.subject.name][f"{policy}_policy"]
            for column, value in {
                "verdict": verdict.name, "scale": verdict.scale, "error": verdict.error, "scope": verdict.scope,
                "closest": verdict.closest, "cosine_closest": verdict.cosine, "text": verdict.text,
            }.items():  # fmt: skip
                missing = isinstance(value, float) and math.isnan(value)
                assert pd.isna(row[column]) if missing else row[column] == value
                assert item[column] is None if missing else item[column] == value


def test_the_terminal_shows_on_and_off_and_marks_probes_as_they_are(capsys, several):
    audits = several
    report.show(audits)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows: list[list[str]] = []
    for cells in lines:  # a long cell goes on below
        rows = [*rows, cells] if cells[0] else [*rows[:-1], [x + y for x, y in zip(rows[-1], cells, strict=True)]]
    for audited, cells in zip(audits, rows, strict=True):
        assert [cells[1], cells[4]] == [audited.on_policy.name, audited.off_policy.name]
    for audited in audits:
        report.show([audited])
        out = capsys.readouterr().out
        marks = dict(re.findall(r"^│ (\w+) +│ (pass|FAIL|n/a) ", out, re.M))
        assert marks == {probe.name: {True: "pass", False: "FAIL", None: "n/a"}[probe.passed] for probe in audited.probes}


def test_only_what_holds_everywhere_is_framed(several):
    audits = several
    heat = report.heat(audits)
    framed = {(r["subject"], r["policy"], r["target"]) for r in heat[heat["equal"]].to_dict("records")}
    verdicts = {(a.subject.name, p): v for a in audits for p, v in (("on", a.on_policy), ("off", a.off_policy))}
    assert verdicts["k3_clamped", "on"].combination
    assert verdicts["k3_clamped", "on"].scope != "everywhere"  # which is not framed
    assert framed == {("tripled", "on", "forward_kl_frozen_prefix")}


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
    figure = gl.plots.audited_curves(curves_frame())
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


@pytest.mark.parametrize(("draw", "make"), [(gl.plots.audited_curves, curves_frame), (gl.plots.matches, heat_frame)])
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
