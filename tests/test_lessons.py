"""The lessons: they run, right answers are told from wrong ones, and their pages show what they print."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from typer.testing import CliRunner

import gradlab as gl
from gradlab.cli.main import app
from gradlab.lessons import Reply, lessons

ROOT = Path(gl.__file__).parents[1]
PAGES = ROOT / "docs" / "lessons"
LESSONS = lessons()


def cells(script: Path) -> list[tuple[str, str]]:
    """Kind and content of every cell of a percent script."""
    parts = re.split(r"^# %%(.*)\n", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = []
    for kind, content in zip(parts[::2], parts[1::2], strict=True):
        text = content.strip("\n")
        found.append(("text", re.sub(r"^# ?", "", text, flags=re.MULTILINE)) if "markdown" in kind else ("code", text))
    return found


@pytest.mark.parametrize("number", LESSONS)
def test_a_lesson_runs_and_its_page_shows_what_it_prints(number, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    lesson = LESSONS[number]
    runpy.run_path(str(lesson.path))
    page = (PAGES / f"{lesson.name}.md").read_text(encoding="utf-8")
    shown = "\n".join(
        line[4:] for line in re.sub(r"```python\n.*?```", "", page, flags=re.DOTALL).splitlines() if line[:4] == "    "
    )
    again = f"render it again: python scripts/render_lessons.py {number}"
    for ours, theirs in zip(capsys.readouterr().out.split(), shown.split(), strict=True):
        try:
            assert float(ours) == pytest.approx(float(theirs), rel=2e-3, abs=2e-4, nan_ok=True), again
        except ValueError:
            assert ours == theirs, again


@pytest.mark.parametrize("number", LESSONS)
def test_a_page_has_the_cells_of_its_script(number):
    lesson = LESSONS[number]
    page = (PAGES / f"{lesson.name}.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    assert code == [content for kind, content in cells(lesson.path) if kind == "code"]
    for kind, content in cells(lesson.path):
        assert kind == "code" or content.removeprefix(f"# {lesson.title}").strip() in page
    pictures = re.findall(r"!\[.+?\]\((.*?)\)", page)
    assert len(pictures) == 1, "a lesson has one figure"
    assert (PAGES / pictures[0]).is_file()


@pytest.mark.parametrize("number", LESSONS)
def test_a_lesson_asks_before_it_runs_has_two_exercises_and_says_what_to_read(number):
    lesson = LESSONS[number]
    assert next(iter(lesson.exercises)) == "guess"
    assert len(lesson.exercises) == 3
    text = lesson.path.read_text(encoding="utf-8")
    shown = re.search(r"lesson\.show|gl\.audit", text)
    assert shown is not None
    assert text.index("guess = None") < shown.start()
    for name, check in lesson.exercises.items():
        assert f'lesson.check("{name}", {name})' in text
        assert (check.__doc__ or "").strip().endswith((".", "?", "%."))
    assert "# ## To read" in text


@pytest.mark.parametrize(("number", "exercise"), [(n, e) for n, item in LESSONS.items() for e in item.exercises])
def test_no_answer_and_nonsense_are_told_what_is_wanted(number, exercise, capsys):
    told = LESSONS[number].check(exercise, None)
    assert not told.right
    assert capsys.readouterr().out.startswith("Not yet. There is no answer yet. ")
    for nonsense in ("nothing like it", -3.5, [], object()):
        told = LESSONS[number].check(exercise, nonsense)
        assert isinstance(told, Reply)
        assert not told.right


def test_there_is_no_other_lesson_nor_exercise():
    with pytest.raises(ValueError, match="there is no lesson 9; there are 1"):
        gl.lesson(9)
    with pytest.raises(ValueError, match="unknown exercise 'overtake'; did you mean 'overtakes'"):
        gl.lesson(1).check("overtake", 1)


# ---- answers ------------------------------------------------------------------------------------------------------------


def check(number: int, exercise: str, right: object, *wrong: tuple[object, str]) -> None:
    """A right answer is taken, and each wrong one is given the hint that is for it."""
    lesson = LESSONS[number]
    assert lesson.check(exercise, right).right, lesson.check(exercise, right)
    for answer, hint in wrong:
        told = lesson.check(exercise, answer)
        assert not told.right, answer
        assert hint in told.text, told


def test_value_or_gradient():
    check(1, "guess", "k2", ("k1", "its expected gradient is 0"), ("k3", "though its value is unbiased"))
    # Var k1 = m², Var k3 = e^{m²} − 1 − m²: equal where e^x = 1 + 2x, at a KL of x/2.
    meet = optimize.brentq(lambda x: math.expm1(x) - 2 * x, 0.5, 2) / 2
    check(
        1, "overtakes", meet, (math.sqrt(2 * meet), "distance m of the means"), (0.3, "times that of k1"), (1.0, "times that")
    )
    policy, reference = np.array([0.01, 0.20, 0.79]), np.array([0.70, 0.01, 0.29])

    def kl(p):
        return float(p @ np.log(p / reference))

    moved = policy * np.exp(-0.1 * (policy - reference))  # the expected gradient of k3 as loss is π − ref
    assert kl(moved / moved.sum()) > kl(policy)
    check(
        1,
        "raises",
        (policy, reference),
        (([0.2, 0.3, 0.5], [0.5, 0.3, 0.2]), "lowers the KL"),
        (([1, 2, 3], [1, 2, 3]), "add up to 1"),
    )


# ---- notebooks ----------------------------------------------------------------------------------------------------------


def test_the_lessons_are_listed():
    told = CliRunner().invoke(app, ["lesson"]).output
    for lesson in LESSONS.values():
        assert f"{lesson.number}  {lesson.title}" in told


def test_a_lesson_becomes_a_notebook_and_answers_are_not_written_over(tmp_path):
    pytest.importorskip("jupytext")
    path = tmp_path / "one.ipynb"
    options = ["lesson", "1", "--no-open", "--output", str(path)]
    assert CliRunner().invoke(app, options).exit_code == 0
    notebook = json.loads(path.read_text(encoding="utf-8"))
    found = [({"markdown": "text"}.get(c["cell_type"], "code"), "".join(c["source"])) for c in notebook["cells"]]
    assert found == cells(LESSONS[1].path)
    path.write_text("answers")
    assert CliRunner().invoke(app, options).exit_code == 0
    assert path.read_text() == "answers"
    assert isinstance(
        CliRunner().invoke(app, ["lesson", "1", "--no-open", "-o", str(tmp_path / "none" / "a.ipynb")]).exception, ValueError
    )
