"""What the README shows, run as it stands."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from gradlab.cli import main

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("gradlab ")
]


def test_the_python_of_the_readme_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    gl, scenario = names["gl"], names["scenario"]
    frame = gl.measure("k3-loss", scenario, target=["reverse_kl", "forward_kl_frozen_prefix"])
    assert frame.bias[0] > 0.05
    assert frame.bias[1] < 1e-12
    mine = gl.measure([names["my_loss"], "k2-loss"], scenario)
    assert mine.bias[0] == pytest.approx(mine.bias[1], rel=1e-10)
    unbiased = gl.exact.moments(names["complete"], names["lagging"]).mean
    assert names["audited"].on_policy.text.startswith("equals the gradient of the forward KL with frozen prefixes near ")
    assert "ℓ below -2.611 and ℓ above 11: the value is clamped, " in names["audited"].probe("clamps").finding
    names["test_my_kl_loss"]()
    assert (unbiased - gl.exact.gradient("reverse_kl", names["lagging"])).norm() < 1e-12


@pytest.mark.parametrize("command", [c for c in COMMANDS if " reproduce" not in c])
def test_the_commands_of_the_readme_run(command, monkeypatch, capsys):
    monkeypatch.chdir(README.parent)
    shorter = (
        shlex.split("--steps 2 --batch 32 --watch 32") if " train " in command else []
    )  # its options are tried, not its size
    monkeypatch.setattr(sys, "argv", shlex.split(command) + shorter)
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert not stop.value.code
    assert capsys.readouterr().out.strip()


def test_the_pictures_of_the_readme_exist_and_its_analyses_are_all_of_them():
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert (README.parent / picture).is_file()
    assert set(re.findall(r"^\* `(\d\d_\w+)`", TEXT, re.MULTILINE)) == set(main.analyses())
