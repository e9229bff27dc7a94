"""Records: built from what people have, in memory or in files, and read back as they were."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from dumps import run
from hypothesis import given, settings
from hypothesis import strategies as st

import gradlab as gl
from gradlab._common.streams import generator
from gradlab.records import COLUMNS, Records, parquet
from gradlab.rollout import Rollout

pa = pytest.importorskip("pyarrow")


def read(path) -> Records:
    return Records(lambda: parquet.blocks([path], parquet.columns_of([path])[0]), parquet.columns_of([path])[0])


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    assert list(a.columns) == list(b.columns)
    for name in a.columns:
        for x, y in zip(a[name], b[name], strict=True):
            assert (x is None) == (y is None)
            if x is not None and COLUMNS[str(name)].kind == "text":
                assert np.array_equal(x, y)
            elif x is not None and np.size(x) + np.size(y):
                assert np.array_equal(np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind == "f")


numbers = st.floats(-50, 0, allow_nan=False)
texts = st.text(max_size=3)


@st.composite
def columns(draw):
    """Ragged columns of a few responses, in lists, arrays or tensors, any of them null."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    n = len(lengths)

    def ragged(item):
        return [draw(st.lists(item, min_size=k, max_size=k)) for k in lengths]

    found = {"logprob": ragged(numbers)}
    if draw(st.booleans()):
        kind = draw(st.sampled_from([np.float64, np.float32, np.float16]))
        found["ref_logprob"] = [np.array(row, dtype=kind) for row in ragged(numbers)]
    if draw(st.booleans()):
        rows = [torch.tensor(row) for row in ragged(numbers)]
        found["behaviour_logprob"] = [None if draw(st.booleans()) else row for row in rows]
    optional = {
        "mask": lambda: ragged(st.booleans()), "token_id": lambda: ragged(st.integers(0, 10**6)), "token": lambda: ragged(texts),
        "reward": lambda: draw(st.lists(numbers, min_size=n, max_size=n)), "step": lambda: draw(st.integers(0, 9)),
        "advantage": lambda: draw(st.sampled_from([ragged(numbers), [float(i) for i in range(n)]])),
        "group_id": lambda: [str(i // 2) for i in range(n)], "top_p": lambda: 0.9,
        "top_logprob": lambda: [[[draw(numbers)] * 2 for _ in range(k)] for k in lengths],
    }  # fmt: skip
    return found | {name: make() for name, make in optional.items() if draw(st.booleans())}, lengths


@settings(deadline=None, max_examples=150)
@given(columns())
def test_columns_come_back_from_a_file_as_they_went_in(tmp_path_factory, drawn):
    given_columns, lengths = drawn
    records = Records.from_arrays(**given_columns)
    (block,) = records
    assert block.lengths.tolist() == [
        0
        if all(rows[i] is None for rows in given_columns.values() if isinstance(rows, list) and len(rows) == len(lengths))
        else k
        for i, k in enumerate(lengths)
    ]
    null = {name for name, rows in given_columns.items() if isinstance(rows, list) and all(row is None for row in rows)}
    assert set(given_columns) - null <= set(records.columns)
    path = records.write(tmp_path_factory.mktemp("records") / "some.parquet", rows=2)
    again = read(path)
    assert set(again.columns) == set(records.columns)
    same(again.frame(), records.frame())
    same(Records.from_frame(records.frame()).frame(), records.frame())
    assert pa.parquet.ParquetFile(path).metadata.num_row_groups == (len(lengths) + 1) // 2


@settings(deadline=None, max_examples=50)
@given(columns())
def test_a_table_of_tokens_is_a_table_of_responses(tmp_path_factory, drawn):
    given_columns, lengths = drawn
    given_columns = {
        name: rows
        for name, rows in given_columns.items()
        if name not in ("top_logprob", "mask")
        and not any(row is None for row in np.atleast_1d(np.array(rows, dtype=object)).ravel())
    }
    records = Records.from_arrays(**given_columns, response_id=[str(i) for i in range(len(lengths))])
    frame = records.tokens().drop(columns=["response", "position"])
    if not len(frame):
        with pytest.raises(ValueError, match="no rows"):
            Records.from_frame(frame)
        return
    again = Records.from_frame(frame).tokens()
    pd.testing.assert_frame_equal(again.drop(columns="response"), records.tokens().drop(columns="response"), check_dtype=False)
    path = tmp_path_factory.mktemp("records") / "tokens.parquet"
    frame.to_parquet(path, index=False)
    whole, parquet.TOKENS = parquet.TOKENS, 2  # a response goes on from one batch of rows to the next
    try:
        read_again = read(path).tokens()
    finally:
        parquet.TOKENS = whole
    pd.testing.assert_frame_equal(
        read_again.drop(columns="response"), records.tokens().drop(columns="response"), check_dtype=False
    )


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_every_precision_keep_their_numbers(kind):
    x = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).to(kind)
    (block,) = Records.from_arrays(logprob=x.requires_grad_(), mask=torch.tensor([[1, 1, 0, 0]] * 3))
    assert block["logprob"].tolist() == x.double().flatten().tolist()
    assert block.mask.dtype == bool
    assert block.live.tolist() == [2, 2, 2]


def test_places_sums_and_parts_against_loops():
    rng = np.random.default_rng(0)
    lengths = [3, 0, 5, 1]
    rows = [-rng.random(k) for k in lengths]
    masks = [rng.random(k) < 0.6 for k in lengths]
    (block,) = Records.from_arrays(logprob=rows, mask=masks, step=[1, 1, 2, 2])
    assert block.place.tolist() == [int(mask[:i].sum()) for mask in masks for i in range(len(mask))]
    assert block.sums(block["logprob"] * block.mask) == pytest.approx(
        [row[mask].sum() for row, mask in zip(rows, masks, strict=True)]
    )
    assert block.padded("logprob", 7.0).tolist() == [[*row.tolist(), *[7.0] * (5 - len(row))] for row in rows]
    part = block.take(np.array([2, 0]))
    assert part["logprob"].tolist() == [*rows[2], *rows[0]]
    assert part["step"].tolist() == [2, 1]
    records = Records.of([block])
    assert [len(x) for x in records.where(step=2)] == [2]
    assert records.where(step=[1, 2]).tokens()["logprob"].tolist() == records.tokens()["logprob"].tolist()


def test_a_rollout_of_our_own_is_a_table_of_records():
    policy = gl.policies.small("names", "some")
    scenario = gl.Scenario(policy, gl.policies.small("names"))
    rollout = Rollout.from_sampler(scenario, 32, generator(0))
    tokens = Records.from_rollout(rollout, step=4).tokens()
    assert (tokens["logprob"] - tokens["ref_logprob"]).to_numpy() == pytest.approx(rollout.log_ratio[rollout.mask].numpy())
    assert set(tokens["step"]) == {4}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ref_logprb": [[0.0]]}, "unknown column 'ref_logprb'; did you mean 'ref_logprob'"),
        ({"mask": [[1]]}, "give at least one of logprob"),
        ({"logprob": [[-1.0, -1.0]], "mask": [[1]]}, "mask has 1 positions in response 0, where logprob has 2"),
        ({"logprob": [[-1.0], [-1.0]], "mask": [[1]]}, "one entry for each response"),
        ({"logprob": np.zeros(3)}, r"logprob is \[n, t\], or one sequence per response; got an array of shape \[3\]"),
        ({"logprob": [-1.0, -2.0]}, "one number for a whole response"),
        ({"logprob": "abc"}, "got str"),
        ({"logprob": [["a"]]}, "logprob of response 0 is no sequence of real values"),
        ({"logprob": [[-1.0]], "token_id": [[0.5]]}, "token_id of response 0 is no sequence of whole values: it holds 0.5"),
        ({"logprob": [[-1.0]], "reward": [1.0, 2.0]}, r"reward has one entry for each of the 1 responses, got shape \[2\]"),
        ({"logprob": [[-1.0]], "step": ["a"]}, "step holds whole numbers"),
        ({"logprob": [[[-1.0]]]}, r"it has shape \[1, 1\]"),
    ],
)
def test_bad_columns_are_refused_with_a_reason(columns, message):
    with pytest.raises(ValueError, match=message):
        Records.from_arrays(**columns)


def test_frames_without_what_is_needed_are_refused():
    with pytest.raises(ValueError, match="the frame has none of logprob"):
        Records.from_frame(pd.DataFrame({"kl": [1.0]}))
    with pytest.raises(ValueError, match="give a column response_id"):
        Records.from_frame(pd.DataFrame({"logprob": [-1.0]}))
    with pytest.raises(ValueError, match="unknown column 'reward'; known: step"):
        Records.from_arrays(logprob=[[-1.0]], step=1).where(reward=1.0)


def test_a_damaged_file_says_so(tmp_path):
    path = Records.from_arrays(**run("names", 64)).write(tmp_path / "run.parquet", rows=16)
    content = path.read_bytes()
    for size in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="no whole parquet file"):
            read(path)
    path.write_bytes(content[:300] + bytes(200) + content[500:])
    with pytest.raises(ValueError, match="is damaged"):
        read(path).frame()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.parquet"]
