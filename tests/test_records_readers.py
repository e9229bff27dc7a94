"""Dumps in the form in which each framework writes them, read back; damaged and cut files; the recorder, killed."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from dumps import run

import gradlab as gl
from gradlab.records import Records, check, parquet

pytest.importorskip("pyarrow")
GROUP = 8


def sequences(n: int = 32, prompt: int = 4):
    """Responses of the small model behind prompts of different lengths: full ids, masks and columns over prompt and response."""
    c, rng = run("names", n), np.random.default_rng(0)
    for i in range(n):
        length = int(c["mask"][i].sum())
        front = [20 + i // GROUP] * (2 + (i // GROUP) % prompt)
        columns = {name: c[name][i, :length].tolist() for name in ("token_id", "logprob", "ref_logprob", "behaviour_logprob")}
        yield front, columns, float(rng.random()), float(rng.standard_normal())


def nemo_rl(folder: Path, step: int) -> Path:
    """As `log_batched_dict_as_jsonl` leaves it: rows padded to the longest, every field in a list of one."""
    rows = list(sequences())
    width = max(len(front) + len(c["token_id"]) for front, c, *_ in rows)
    path = folder / f"train_data_step{step}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i, (front, c, reward, advantage) in enumerate(rows):
            k, t = len(front), len(c["token_id"])
            pad = [0] * (width - k - t)
            line = {
                "content": ["…"], "rewards": [reward], "input_lengths": [k + t], "token_ids": [front + c["token_id"] + pad],
                "token_loss_mask": [[0] * k + [1] * t + pad], "sample_loss_mask": [1.0], "advantages": [[advantage] * width],
                "generation_logprobs": [[0.0] * k + c["behaviour_logprob"] + pad], "prev_logprobs": [[-1.0] * k + c["logprob"] + pad],
            }  # fmt: skip
            file.write(json.dumps(line | {"idx": i}) + "\n")
    return path


def prime_rl(folder: Path, step: int, stable: bool = True) -> Path:
    target = folder / "token_exports" / f"step_{step}"
    target.mkdir(parents=True)
    for rank in range(2):
        with (target / f"rank_{rank}.jsonl").open("w", encoding="utf-8") as file:
            for i, (front, c, _, advantage) in enumerate(list(sequences())[rank::2]):
                k, t = len(front), len(c["token_id"])
                line = {
                    "schema_version": 1, "step": step, "rank": rank, "micro_step": 0, "micro_sequence_idx": i, "export_sequence_idx": i,
                    "env_name": "names", "token_ids": front + c["token_id"], "position_ids": list(range(k + t)),
                    "loss_mask": [False] * k + [True] * t, "advantages": [advantage] * (k + t),
                    "inference_logprobs": [0.0] * k + c["behaviour_logprob"], "trainer_logprobs": [-1.0] * k + c["logprob"],
                    "entropy": [0.5] * (k + t), "mismatch_kl": [None] * (k + t), "is_masked": [False] * (k + t - 1) + [True],
                    "rl_weights": [None] * (k + t),
                }  # fmt: skip
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
    if stable:
        (target / "STABLE").touch()
    return target


def slime(folder: Path, step: int, train: bool = False) -> Path:
    samples = []
    for i, (front, c, reward, advantage) in enumerate(sequences()):
        t = len(c["token_id"])
        sample = {"tokens": front + c["token_id"], "rollout_log_probs": c["behaviour_logprob"]}
        if train:
            numbers = {"log_probs": c["logprob"], "ref_log_probs": c["ref_logprob"], "advantages": [advantage] * t}
            sample |= {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
            sample |= {
                "response_lengths": t,
                "loss_masks": torch.ones(t, dtype=torch.int),
                "rewards": reward,
                "sample_index": i,
            }
        else:
            sample |= {"response_length": t, "loss_mask": None, "reward": reward, "group_index": i // GROUP, "index": i}
            sample |= {"status": "completed", "prompt": "…", "metadata": {}, "remove_sample": False}
        samples.append(sample)
    path = folder / f"{step}.pt"
    torch.save({"rollout_id": step, "samples": samples} | ({"format_version": 2} if train else {}), path)
    return path


def skyrl(folder: Path, step: int) -> Path:
    """A pickle of a `TrainingInputBatch`, whose module is there only while it is written."""
    rows = list(sequences())
    width, whole = max(len(c["token_id"]) for _, c, *_ in rows), max(len(f) + len(c["token_id"]) for f, c, *_ in rows)

    def left(values, size=width):
        return torch.tensor([[0] * (size - len(row)) + row for row in values])

    columns = [c for _, c, *_ in rows]
    tensors = {
        "sequences": left([front + c["token_id"] for front, c, *_ in rows], whole),
        "loss_mask": left([[1.0] * len(c["token_id"]) for c in columns]),
        "action_log_probs": left([c["logprob"] for c in columns]),
        "base_action_log_probs": left([c["ref_logprob"] for c in columns]),
        "rollout_logprobs": left([c["behaviour_logprob"] for c in columns]),
        "advantages": left([[a] * len(c["token_id"]) for _, c, _, a in rows]).bfloat16(),
        "rewards": left([[0.0] * (len(c["token_id"]) - 1) + [r] for _, c, r, _ in rows]),
        "values": None,
    }

    def stored(value):
        if value is None:
            return None
        if value.dtype == torch.bfloat16:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            return {"format": "torch", "data": buffer.getvalue()}
        array = value.numpy()
        return {"format": "numpy", "data": array.tobytes(), "shape": array.shape, "dtype": str(array.dtype)}

    module = types.ModuleType("skyrl.backends.skyrl_train.training_batch")

    def _rebuild_tensor_batch(cls, state):
        raise AssertionError("SkyRL's own code is not called")

    class TrainingInputBatch(dict):
        def __reduce__(self):
            state = {
                "batch_dict": {k: stored(v) for k, v in self.items()},
                "batch_size": len(rows),
                "device": torch.device("cpu"),
            }
            return (
                _rebuild_tensor_batch,
                (type(self), state | {"metadata": {"uids": [str(i // GROUP) for i in range(len(rows))]}}),
            )

    for item in (_rebuild_tensor_batch, TrainingInputBatch):
        item.__module__, item.__qualname__ = module.__name__, item.__name__
        setattr(module, item.__name__, item)
    packages = ["skyrl", "skyrl.backends", "skyrl.backends.skyrl_train"]
    sys.modules.update({name: types.ModuleType(name) for name in packages} | {module.__name__: module})
    try:
        path = folder / f"global_step_{step}_training_input.pkl"
        path.write_bytes(pickle.dumps(TrainingInputBatch(tensors)))
    finally:
        for name in (*packages, module.__name__):
            del sys.modules[name]
    return path


WRITERS = {
    "nemo-rl": (nemo_rl, {"old_logprob": "logprob"}),
    "prime-rl": (prime_rl, {"logprob": "logprob"}),
    "slime": (slime, {}),
    "slime train": (
        lambda folder, step: slime(folder, step, train=True),
        {"old_logprob": "logprob", "ref_logprob": "ref_logprob"},
    ),
    "skyrl": (skyrl, {"old_logprob": "logprob", "ref_logprob": "ref_logprob"}),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_what_a_framework_writes_is_read_as_it_was(tmp_path, name, whole):
    writer, names = WRITERS[name]
    written = [writer(tmp_path, step) for step in (9, 10)]
    path = tmp_path if whole else (written[1] / "rank_0.jsonl" if written[1].is_dir() else written[1])
    records = gl.read_rollouts(path, allow_pickle=name == "skyrl")
    assert records.format == name.split()[0]
    expected = list(sequences())
    order = [*range(0, 32, 2), *range(1, 32, 2)] if name == "prime-rl" else list(range(32))
    order = order if whole else order[: 16 if name == "prime-rl" else 32]
    assert sorted(set(records.tokens()["step"])) == ([9, 10] if whole else [10])
    tokens = records.where(step=10).tokens()
    for ours, theirs in {**names, "behaviour_logprob": "behaviour_logprob", "token_id": "token_id"}.items():
        wanted = [x for i in order for x in expected[i][1][theirs]]
        assert tokens[ours].tolist() == pytest.approx(wanted, rel=1e-6), ours
    frame = records.where(step=10).frame()
    if "reward" in frame:
        assert frame["reward"].tolist() == pytest.approx([expected[i][2] for i in order], rel=1e-6)
    if name != "slime":
        advantages = np.repeat([expected[i][3] for i in order], [len(expected[i][1]["token_id"]) for i in order])
        assert tokens["advantage"].to_numpy() == pytest.approx(advantages, rel=1e-2)
    groups = frame["group_id" if "group_id" in frame else "prompt_id"].tolist()
    assert len(set(groups)) == 4
    assert all(
        groups[i] == groups[j] for i in range(len(order)) for j in range(len(order)) if order[i] // GROUP == order[j] // GROUP
    )
    assert check(records) == [], [finding.sentence for finding in check(records)]


def test_what_the_run_itself_removed_is_read(tmp_path):
    prime_rl(tmp_path, 1)
    tokens = gl.read_rollouts(tmp_path).tokens()
    assert tokens.groupby("response")["removed"].agg(["sum", "last"]).drop_duplicates().values.tolist() == [[1, True]]
    assert set(tokens["entropy"]) == {0.5}


def test_a_step_that_is_being_written_is_left_out(tmp_path):
    prime_rl(tmp_path, 1)
    prime_rl(tmp_path, 2, stable=False)
    with pytest.warns(UserWarning, match="step_2"):
        assert set(gl.read_rollouts(tmp_path).tokens()["step"]) == {1}


@pytest.mark.parametrize("name", ["nemo-rl", "prime-rl"])
def test_a_line_that_was_cut_is_left_out_and_one_that_is_damaged_is_an_error(tmp_path, name):
    path = WRITERS[name][0](tmp_path, 1)
    path = path / "rank_0.jsonl" if path.is_dir() else path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-40])
    with pytest.warns(UserWarning, match="was cut"):
        assert len(gl.read_rollouts(path).frame()) == len(lines) - 1
    path.write_bytes(b"".join([*lines[:2], lines[2][:50] + b"\n", *lines[3:]]))
    with pytest.raises(ValueError, match=r"line 3 of .* is no JSON"):
        gl.read_rollouts(path).frame()
    path.write_bytes(b"".join([lines[0], b'{"token_ids": [1]}\n', *lines[1:]]))
    with pytest.raises(ValueError, match=f"line 2 of .* is no record of {name}"):
        gl.read_rollouts(path).frame()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no log-probabilities"):
        gl.read_rollouts(path)


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("harm",))


def test_a_pickle_is_not_read_without_consent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"samples": [{"tokens": Harmful()}]}, tmp_path / "1.pt")
    (tmp_path / "global_step_1_training_input.pkl").write_bytes(pickle.dumps(Harmful()))
    for file in ("1.pt", "global_step_1_training_input.pkl"):
        with pytest.raises(ValueError, match="may run any program"):
            gl.read_rollouts(tmp_path / file)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["slime", "skyrl"])
def test_damaged_pickles_say_so(tmp_path, name):
    path = WRITERS[name][0](tmp_path, 1)
    content = path.read_bytes()
    for size in (10, len(content) // 2):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="is damaged"):
            gl.read_rollouts(path, allow_pickle=name == "skyrl")


def test_a_loaded_dump_is_converted_where_it_was_written(tmp_path):
    payload = torch.load(slime(tmp_path, 3), weights_only=True)
    records = Records.from_dump(payload, "slime")
    assert set(records.tokens()["step"]) == {3}
    again = gl.read_rollouts(records.write(tmp_path / "converted.parquet"))
    assert again.tokens()["behaviour_logprob"].tolist() == records.tokens()["behaviour_logprob"].tolist()
    with pytest.raises(ValueError, match="no dump of slime: KeyError"):
        Records.from_dump({"samples": [{"a": 1}]}, "slime")
    with pytest.raises(ValueError, match="unknown format 'slim'; did you mean 'slime'"):
        Records.from_dump(payload, "slim")


def test_dumps_of_text_and_what_is_none_say_what_they_lack(tmp_path):
    (tmp_path / "1.jsonl").write_text(json.dumps({"input": "a", "output": "b", "score": 1.0, "gts": None, "step": 1}) + "\n")
    with pytest.raises(ValueError, match="verl's dump of text and rewards"):
        gl.read_rollouts(tmp_path / "1.jsonl")
    Path(tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"no dump that gradlab knows is in .*, which holds nothing"):
        gl.read_rollouts(tmp_path / "a")
    with pytest.raises(ValueError, match="there is no "):
        gl.read_rollouts(tmp_path / "b")
    with pytest.raises(ValueError, match="unknown format 'nemo'; did you mean 'nemo-rl'"):
        gl.read_rollouts(tmp_path, format="nemo")
    import pandas as pd

    pd.DataFrame({"step": [1], "prompt": ["a"], "completion": ["b"], "advantage": [0.0]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="TRL's dump of text and rewards"):
        gl.read_rollouts(tmp_path / "c.parquet")


# ---- the recorder -----------------------------------------------------------------------------------------------------------


def test_the_recorder_appends_and_a_step_that_is_run_again_is_replaced(tmp_path):
    recorder = gl.Recorder(tmp_path / "out", run="first", every=2)
    for step in range(5):
        for part in range(2):
            path = recorder.add(step=step, logprob=torch.full((3, 2), -1.0 - part).bfloat16(), mask=[[1, 1], [1, 0], [1, 1]])
            assert (path is None) == (step % 2 == 1)
    assert recorder.read().frame().groupby("step").size().to_dict() == {0: 6, 2: 6, 4: 6}
    again = gl.Recorder(tmp_path / "out", run="second")
    other = gl.Recorder(tmp_path / "out", run="second", rank=1)
    again.add(step=4, logprob=[[-0.5]])
    other.add(step=4, logprob=[[-0.25]])
    frame = again.read().frame()
    assert frame[frame["step"] == 4]["run"].tolist() == ["second", "second"]
    assert frame[frame["step"] == 2]["run"].tolist() == ["first"] * 6
    with pytest.raises(ValueError, match="step must be"):
        again.add(step=-1, logprob=[[-1.0]])


JOB = """
import sys, numpy as np, gradlab as gl
recorder = gl.Recorder(sys.argv[1])
x = -np.random.default_rng(0).random((256, 200))
for step in range(10_000):
    recorder.add(step=step, logprob=x, ref_logprob=x - 0.1, token_id=np.ones(x.shape, dtype=int))
    print(step, flush=True)
"""


def test_a_killed_job_loses_the_step_it_was_writing_and_no_other(tmp_path):
    job = subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    for _ in range(12):
        job.stdout.readline()
    time.sleep(0.013)
    job.send_signal(signal.SIGKILL)
    done = [int(line) for line in job.stdout.read().split()]
    job.wait()
    steps = sorted(set(gl.read_rollouts(tmp_path / "out").tokens()["step"]))
    assert steps == list(range(len(steps)))
    assert len(steps) >= max([11, *done]) + 1
    assert all(len(x) == 256 for x in gl.read_rollouts(tmp_path / "out"))


def test_without_pyarrow_the_line_that_installs_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install 'gradlab-kl\\[records\\]'"):
        gl.Recorder(tmp_path)
    assert "records" in parquet.INSTALL


def test_verl_batches_are_recorded(tmp_path):
    c = run("names", 32)
    names = {
        "responses": "token_id",
        "response_mask": "mask",
        "old_log_probs": "logprob",
        "rollout_log_probs": "behaviour_logprob",
    }
    batch = {theirs: torch.from_numpy(np.asarray(c[ours])) for theirs, ours in names.items()}
    batch["token_level_scores"] = torch.zeros(32, 10)
    proto = types.SimpleNamespace(
        batch=batch, non_tensor_batch={"uid": np.array([str(i // GROUP) for i in range(32)], dtype=object)}
    )
    recorder = gl.Recorder(tmp_path)
    recorder.verl(proto, step=3)
    tokens = recorder.read().tokens()
    assert tokens["old_logprob"].tolist() == c["logprob"][c["mask"]].tolist()
    assert check(recorder.read()) == []
