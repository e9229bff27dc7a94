"""What docs/objective.md shows, run as it stands."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from gradlab.cli import main

TEXT = (Path(__file__).parent.parent / "docs" / "objective.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def test_its_python_runs_and_its_names_are_right():
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "objective.md", "exec"), names)
        for expression, shown in re.findall(r"^(gl\.utility\(.*\)\.name|grpo\.name)  # '(.*?)'", block, re.MULTILINE):
            assert eval(expression, names) == shown
    frame = names["frame"]
    assert list(frame.estimator) == ["grpo", "rloo", "dr-grpo"]
    assert frame.bias[1] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_run(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert not stop.value.code
    assert capsys.readouterr().out.strip()
