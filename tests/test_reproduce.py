"""`gradlab reproduce` as a command that runs long: one at a time in a folder, no orphans, one line at the end, and --check."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from gradlab._common import frames
from gradlab._common.files import locked
from gradlab.cli import main, reproduce
from gradlab.study import resume

SCRIPT = """# # Does a planted analysis run?
import pandas as pd
import gradlab as gl
study = gl.report.study(__file__)
study.save_frame("{number}_numbers", pd.DataFrame({{"via": ["exact"], "bias": [{bias}]}}))
"""
#: An analysis that says who it is and works for longer than any test.
LONG = """import os, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output") + 1])
(folder / (Path(__file__).stem + ".pid")).write_text(str(os.getpid()))
time.sleep(120)
"""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `gradlab reproduce ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["gradlab", "reproduce", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return int(stop.value.code or 0)


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Two planted analyses in place of the real ones."""
    folder = tmp_path / "analyses"
    folder.mkdir()
    for number in ("01", "02"):
        (folder / f"{number}_planted.py").write_text(SCRIPT.format(number=number, bias=0.5), encoding="utf-8")
    monkeypatch.setattr(reproduce, "analyses", lambda: {path.stem: path for path in sorted(folder.glob("*.py"))})
    return folder


def test_it_ends_with_one_line_and_says_little_when_nothing_ran(monkeypatch, capsys, tmp_path, scripts):
    output = tmp_path / "figures"
    assert run(monkeypatch, "--output", output) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(" s")
    assert "verdicts; 2 analyses measured, 0 unchanged; " in last
    claims = pd.read_csv(output / "claims.csv")
    claims.loc[0, "verdict"] = "HOLDS"  # as if an earlier run had settled it
    claims.to_csv(output / "claims.csv", index=False)
    (scripts / "02_planted.py").write_text(SCRIPT.format(number="02", bias=0.25), encoding="utf-8")
    assert run(monkeypatch, "--output", output) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{claims['id'][0]} ({claims['scope'][0]}, {claims['frame'][0]}): HOLDS → OPEN" in lines
    assert f"{len(claims)} verdicts, 1 changed; 1 analysis measured, 1 unchanged; " in lines[-1]
    assert run(monkeypatch, "--output", output) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 4
    assert "0 changed; 0 analyses measured, 2 unchanged; " in lines[-1]


def test_a_folder_is_written_by_one_command_at_a_time(monkeypatch, capsys, tmp_path, scripts):
    output = tmp_path / "figures"
    code = (
        f"import sys, time; from pathlib import Path; from gradlab._common.files import locked; sys.argv = ['gradlab', 'reproduce']\n"
        f"with locked(Path({str(output)!r})):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert run(monkeypatch, "--output", output) == 2
        said = capsys.readouterr().err
        assert f"{output} is being written by process {other.pid} on {platform.node()} (`gradlab reproduce`, since 20" in said
        assert run(monkeypatch, "--output", tmp_path / "elsewhere") == 0
        other.kill()
    assert run(monkeypatch, "--output", output) == 0  # the system has let go


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_analyses_end_with_a_command_that_is_killed(tmp_path):
    folder, output = tmp_path / "analyses", tmp_path / "figures"
    folder.mkdir()
    for number in ("01", "02"):
        (folder / f"{number}_long.py").write_text(LONG, encoding="utf-8")
    code = f"""
import sys
from pathlib import Path
from gradlab.cli import main, reproduce
reproduce.analyses = lambda: {{path.stem: path for path in sorted(Path({str(folder)!r}).glob("*.py"))}}
sys.argv = ["gradlab", "reproduce", "--jobs", "2", "--output", {str(output)!r}]
main.main()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    files = [output / f"{number}_long.pid" for number in ("01", "02")]
    _wait(lambda: all(path.is_file() and path.read_text() for path in files))
    workers = [int(path.read_text()) for path in files]
    assert all(map(_alive, workers))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait(lambda: not any(map(_alive, workers)))
    with locked(output):
        pass  # nobody holds it


def _wait(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def _alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("record", ["[1, 2]", "3", '{"results": 4, "fingerprint": "x"}', '{"results": null}', "{", '"text"'])
def test_a_record_of_another_form_is_none(monkeypatch, tmp_path, scripts, record):
    output = tmp_path / "figures"
    assert run(monkeypatch, "--output", output) == 0
    (output / ".reproduced" / "01_planted.json").write_text(record, encoding="utf-8")
    assert run(monkeypatch, "--output", output) == 0
    assert "fingerprint" in json.loads((output / ".reproduced" / "01_planted.json").read_text())


@pytest.mark.parametrize("jobs", [1, 2])
def test_check_measures_anew_and_tells_what_moved(monkeypatch, capsys, tmp_path, scripts, jobs):
    output = tmp_path / "figures"
    assert run(monkeypatch, "--output", output) == 0
    kept = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    capsys.readouterr()
    assert run(monkeypatch, "--output", output, "--check", "--jobs", jobs) == 0
    printed = capsys.readouterr().out
    assert "01_planted is the same within rounding" in printed
    assert "verdicts, 0 changed; 2 analyses measured, 0 moved; " in printed.splitlines()[-1]

    moved = pd.DataFrame({"via": ["exact"], "bias": [0.5 + 1e-4]})
    frames.save(output, "02_numbers", moved, {"quick": False, "seed": 0})
    assert run(monkeypatch, "--output", output, "--check") == 1
    printed = capsys.readouterr().out
    assert "02_planted moved" in printed
    assert "0.5001" in printed
    assert "2 analyses measured, 1 moved; " in printed.splitlines()[-1]
    assert run(monkeypatch, "--output", output, "--check", "--only", "1") == 0
    assert "1 analysis measured, 0 moved; " in capsys.readouterr().out
    assert kept["01_numbers.csv"] == (output / "01_numbers.csv").read_bytes()


def test_check_refuses_what_was_made_with_other_options(monkeypatch, capsys, tmp_path, scripts):
    output = tmp_path / "figures"
    assert run(monkeypatch, "--output", output, "--seed", 3) == 0
    assert run(monkeypatch, "--output", output, "--check") == 2
    assert "made with --seed 0, and those there were made with --seed 3" in capsys.readouterr().err
    assert run(monkeypatch, "--output", output, "--check", "--quick", "--seed", 3) == 2
    assert run(monkeypatch, "--output", tmp_path / "empty", "--check") == 2
    assert "there are none" in capsys.readouterr().err
    assert not (tmp_path / "empty").exists()


def test_a_line_a_minute_where_no_bar_can_be_drawn(monkeypatch, capsys, tmp_path, scripts):
    monkeypatch.setattr(reproduce, "PULSE", 0.2)
    slow = SCRIPT.format(number="02", bias=0.5) + "import time\ntime.sleep(1.5)\n"
    (scripts / "02_planted.py").write_text(slow, encoding="utf-8")
    assert run(monkeypatch, "--output", tmp_path / "figures") == 0
    assert "s: 1 of 2 done, at work on 02_planted" in capsys.readouterr().out


def test_the_longest_analyses_are_real_ones():
    numbers = [name[:2] for name in reproduce.analyses()]
    assert set(reproduce.LONGEST) <= set(numbers)


@pytest.mark.parametrize("jobs", [1, 2])
def test_only_code_that_an_analysis_imports_makes_it_run_again(monkeypatch, capsys, tmp_path, scripts, jobs):
    output, script = tmp_path / "figures", scripts / "01_planted.py"
    assert run(monkeypatch, "--output", output, "--jobs", jobs) == 0
    record = json.loads((output / ".reproduced" / "01_planted.json").read_text())
    assert {"study/report.py", "ledger/verify.py", "gradlab.mplstyle"} <= set(record["fingerprint"]["code"])
    if jobs == 2:  # alone an analysis shares its process with whatever was imported before it
        assert not any(name.startswith(("audit/", "questions/")) for name in record["fingerprint"]["code"])

    def measured() -> str:
        assert run(monkeypatch, "--output", output, "--jobs", jobs) == 0
        return capsys.readouterr().out.splitlines()[-1]

    source = script.read_text()
    script.write_text(f'"""A docstring."""\n# A comment.\n{source}\n\n')
    assert "0 analyses measured, 2 unchanged" in measured()
    script.write_text(source.replace("0.5", "0.25"))
    assert "1 analysis measured, 1 unchanged" in measured()


def test_a_hash_of_code_sees_code_alone(tmp_path):
    file = tmp_path / "module.py"

    def after(text: str) -> str:
        file.write_text(text)
        return resume.code_hash(file)

    first = after('def f(x):\n    """Add one."""\n    return x + 1\n')
    assert after("def f(x):  # one more\n\n    return (x + 1)\n") == first
    assert after("def f(x):\n    return x + 2\n") != first
    assert after('def f(x):\n    text = """Add one."""\n    return x + 1\n') != first
