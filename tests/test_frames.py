"""Frames as files: the digits written, and how a damaged one is told."""

from __future__ import annotations

import json
from decimal import Context, Decimal

import numpy as np
import pandas as pd
import pytest

from gradlab._common import frames
from gradlab.ledger import CLAIMS, verify

MADE = {"quick": True, "seed": 0}


def test_numbers_have_the_stated_digits_and_other_values_stay():
    values = np.array([1 / 3, -2e-30 / 3, 123456789.123456789, 1e300, np.inf, np.nan, 0.0, 5.0, np.float64(0.1) * 3])
    frame = pd.DataFrame(
        {"probability": values, "name": list("abcdefghi"), "samples": np.arange(9) + 10**15, "sampled": [True] * 9}
    )
    found = frames.rounded(frame)
    context = Context(prec=frames.DIGITS)
    for before, after in zip(values, found["probability"], strict=True):
        assert after == float(context.create_decimal(Decimal(float(before)))) or (np.isnan(before) and np.isnan(after))
    pd.testing.assert_frame_equal(found.drop(columns="probability"), frame.drop(columns="probability"))


def test_one_unit_in_the_last_place_changes_almost_no_written_number():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(100_000)
    one, two = (frames.rounded(pd.DataFrame({"bias": v}))["bias"] for v in (values, np.nextafter(values, np.inf)))
    assert (one != two).mean() < 1e-4
    assert (one - values).abs().max() <= 0.5 * 10.0 ** (1 - frames.DIGITS) * np.abs(values).max()


def test_rounding_noise_is_written_as_0_where_the_scale_is_known():
    frame = pd.DataFrame(
        {name: [-3e-16, 2e-9] for name in ("bias", "cosine", "noise", "rmse_at_64", "probability", "log_ratio")}
    )
    found = frames.rounded(frame)
    assert found.iloc[0].to_list() == [0, 0, 0, 0, -3e-16, -3e-16]
    assert not np.signbit(found["bias"][0])
    assert found.iloc[1].to_list() == [2e-9, 2e-9, 2e-9, 0, 2e-9, 2e-9]  # √1e-12 is rounding of a root
    assert frames.scale("bias_reverse_kl_policy_prefix") == 1  # a bias, whatever it is of


def test_no_margin_of_the_ledger_is_as_fine_as_the_digits_written():
    """Rounding changes a statistic near its threshold by at most a tenth of the margin."""
    for claim in CLAIMS:
        if claim.margin:
            at = abs(claim.value) + claim.margin
            written = max(0.5 * 10.0 ** (1 - frames.DIGITS) * at, frames.NOISE if not claim.value else 0)
            assert written <= claim.margin * (1 + 1e-12) if claim.margin <= 1e-12 else written <= claim.margin / 10, claim.id


def test_a_frame_comes_back_and_its_sidecar_tells_its_rows(tmp_path):
    frame = pd.DataFrame({"x": [1.5, np.inf, np.nan], "name": ["a", "b,\r\nc", None]})
    frames.save(tmp_path, "04_one", frame, MADE)
    frames.save(tmp_path, "04_two", frame.head(1), MADE)
    pd.testing.assert_frame_equal(frames.load(tmp_path, "04_one"), frame)
    known = json.loads((tmp_path / "04_frames.json").read_text(encoding="utf-8"))
    assert known["made"] == MADE
    assert {name: entry["rows"] for name, entry in known["frames"].items()} == {"04_one": 3, "04_two": 1}
    assert frames.made(tmp_path, "04_bias") == MADE
    assert frames.names(tmp_path, "04_bias") == ["04_one", "04_two"]
    # Frames of a run with other options are not told of together with these.
    frames.save(tmp_path, "04_one", frame, MADE | {"quick": False})
    assert frames.names(tmp_path, "04") == ["04_one"]


@pytest.mark.parametrize("damage", ["half", "digit", "empty"])
def test_a_damaged_frame_is_an_error_that_says_how_to_make_it_again(tmp_path, damage):
    frames.save(tmp_path, "01_schulman", pd.DataFrame({"x": np.arange(100) / 7}), MADE)
    path = tmp_path / "01_schulman.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(
        {"half": "".join(lines[:50]), "digit": "".join(lines).replace("7", "8", 1), "empty": ""}[damage], encoding="utf-8"
    )
    with pytest.raises(
        ValueError, match=r"01_schulman\.csv is damaged or was edited.*\(100 rows\).*reproduce --only 01 --force"
    ):
        verify.verify(tmp_path)


def test_line_ends_of_a_checkout_are_no_damage(tmp_path):
    frames.save(tmp_path, "01_schulman", pd.DataFrame({"x": [1.0, 2.0]}), MADE)
    path = tmp_path / "01_schulman.csv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert frames.load(tmp_path, "01_schulman")["x"].to_list() == [1, 2]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '"x"', '{"made": {}, "frames": []}', '{"made": {}, "frames": {"01_x": 3}}', "\0"]
)
def test_a_damaged_sidecar_is_an_error_until_the_analysis_is_made_again(tmp_path, content):
    frame = pd.DataFrame({"x": [1.0]})
    frames.save(tmp_path, "01_schulman", frame, MADE)
    (tmp_path / "01_frames.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"01_frames\.json is damaged"):
        frames.load(tmp_path, "01_schulman")
    frames.save(tmp_path, "01_schulman", frame, MADE)
    pd.testing.assert_frame_equal(frames.load(tmp_path, "01_schulman"), frame)


def test_a_folder_made_by_hand_needs_no_sidecar(tmp_path):
    pd.DataFrame({"x": [1 / 3]}).to_csv(tmp_path / "01_schulman.csv", index=False)
    assert frames.load(tmp_path, "01_schulman")["x"][0] == 1 / 3
    assert frames.made(tmp_path, "01") is None
    (tmp_path / "01_schulman.csv").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a table"):
        frames.load(tmp_path, "01_schulman")
