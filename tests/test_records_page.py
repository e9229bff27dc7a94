"""What docs/records.md shows, run as it stands."""

import re
from pathlib import Path

import pytest

import gradlab as gl

pytest.importorskip("pyarrow")
TEXT = (Path(__file__).parent.parent / "docs" / "records.md").read_text(encoding="utf-8")


def test_its_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = {"step": [2, 3], "logprob": [[-1.0], [-2.0]], "ref_logprob": [[-1.5], [-2.5]]}
    names: dict[str, object] = {"path": gl.Records.from_arrays(**steps).write(tmp_path / "run.parquet")}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "records.md", "exec"), names)
        if "check(records)" in block:
            assert names["found"] == []
    assert gl.read_rollouts("step-3.parquet").tokens()["logprob"].tolist() == [-2.0]
    assert len(gl.read_rollouts("rollouts").tokens()) == 3 * 64 * 5
    assert names["found"].frames.keys() >= {"kl", "estimators"}


def test_its_tables_tell_every_column_fault_and_format():
    told = set(re.findall(r"`([\w -]+)`", TEXT))
    assert told >= set(gl.records.COLUMNS)
    from gradlab.records.readers import FORMATS

    assert told >= set(FORMATS)
    assert told >= set(re.findall(r"`([\w ]+)`", gl.records.check.__doc__.split("Faults:")[1].split(".")[0]))


def test_the_page_on_spikes_runs_and_says_whose_it_is(capsys):
    text = (Path(__file__).parent.parent / "docs" / "my_kl_spiked.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "my_kl_spiked.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "at step 6" in printed
    assert "the spike is the estimator's" in printed
    largest = names["found"]["largest"].iloc[0]
    assert (largest["response"], largest["place"]) == (6 * 128 + 3, 1)
    assert largest["share"] > 0.9
    half = names["found"]["estimators"].set_index("estimator")["half"]
    assert half["k3-loss"] == 1
    assert half["k2-loss"] > 100
