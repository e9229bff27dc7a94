"""Analyses that need packages beyond gradlab's own: declared in the script, skipped without them, made again with new versions."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from gradlab.cli import main, reproduce
from gradlab.study.resume import Requirements

RAN = """# %% [markdown]
# # What is left behind?
import sys
from pathlib import Path
REQUIRES = ["torch", {absent!r}]
INSTALL = "pip install what-is-not-there"
output = Path(sys.argv[sys.argv.index("--output") + 1])
output.mkdir(exist_ok=True)
(output / "99_ran.csv").write_text("ran")
"""


def script(folder: Path, absent: str = "surely-not-installed") -> Path:
    path = folder / "99_needy.py"
    path.write_text(RAN.format(absent=absent), encoding="utf-8")
    return path


@pytest.fixture
def needy(tmp_path, monkeypatch):
    path = script(tmp_path)
    monkeypatch.setattr(reproduce, "analyses", lambda: {path.stem: path})
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["gradlab", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_requirements_are_read_without_running_the_script(tmp_path):
    found = Requirements.of(script(tmp_path))
    assert found.versions == {"torch": version("torch"), "surely-not-installed": None}
    assert found.missing == "it needs surely-not-installed: pip install what-is-not-there"
    assert not (tmp_path / "99_ran.csv").exists()


def test_a_script_that_declares_nothing_needs_nothing(tmp_path):
    path = tmp_path / "98_plain.py"
    path.write_text("value = 1\n", encoding="utf-8")
    assert Requirements.of(path) == Requirements({}, "")
    assert Requirements.of(path).missing == ""


def test_reproduce_skips_what_it_cannot_run_and_leaves_its_results(needy, tmp_path, monkeypatch, capsys):
    output = tmp_path / "figures"
    output.mkdir()
    (output / "99_ran.csv").write_text("as committed", encoding="utf-8")
    assert run(monkeypatch, "reproduce", "--output", output) == 0
    printed = capsys.readouterr().out
    assert "99_needy is skipped" in printed
    assert "pip install what-is-not-there" in printed
    assert (output / "99_ran.csv").read_text(encoding="utf-8") == "as committed"
    assert (output / "index.html").is_file()


def test_asked_for_by_name_it_is_an_error_with_the_install_line(needy, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "reproduce", "--only", "99", "--output", tmp_path / "figures") == 2
    assert "pip install what-is-not-there" in capsys.readouterr().err


def test_with_its_packages_it_runs_once_for_each_of_their_versions(tmp_path, monkeypatch, capsys):
    path = script(tmp_path, absent="numpy")
    monkeypatch.setattr(reproduce, "analyses", lambda: {path.stem: path})
    command = ("reproduce", "--output", tmp_path / "figures")
    assert run(monkeypatch, *command) == 0
    assert (tmp_path / "figures" / "99_ran.csv").read_text(encoding="utf-8") == "ran"
    assert run(monkeypatch, *command) == 0
    assert "unchanged, made again by --force: 99_needy" in capsys.readouterr().out
    monkeypatch.setattr("gradlab.study.resume.version", lambda name: "999")
    assert run(monkeypatch, *command) == 0
    assert "unchanged, made again by --force: 99_needy" not in capsys.readouterr().out
