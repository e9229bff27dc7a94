"""What moved between two folders of results, told from rounding."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from gradlab.study import check


def frame(**columns):
    n = max(len(values) for values in columns.values())
    return pd.DataFrame({"via": ["exact"] * n} | columns)


@pytest.mark.parametrize(
    ("before", "after", "columns"),
    [
        (frame(bias=[0.5]), frame(bias=[0.5 + 1e-8]), []),
        (frame(bias=[0.5]), frame(bias=[0.5 + 1e-5]), ["bias"]),
        (frame(bias=[3e-16]), frame(bias=[5e-13]), []),
        (frame(bias=[0.0]), frame(bias=[1e-11]), ["bias"]),
        (frame(probability=[1e-30]), frame(probability=[2e-30]), ["probability"]),
        (frame(crossover=[1e25]), frame(crossover=[np.inf]), []),
        (frame(crossover=[1e9]), frame(crossover=[np.inf]), ["crossover"]),
        (frame(bias=[np.nan]), frame(bias=[np.nan]), []),
        (frame(bias=[np.nan]), frame(bias=[0.0]), ["bias"]),
        (frame(name=["k1", None]), frame(name=["k1", None]), []),
        (frame(name=["k1", "k2"]), frame(name=["k1", "k3"]), ["name"]),
        (frame(bias=[0.0, 1.0]), frame(bias=[0.0]), ["(rows)"]),
        (frame(bias=[0.0]), frame(noise=[0.0]), ["(columns)"]),
    ],
)
def test_what_moved_is_told_from_rounding(before, after, columns):
    assert [found[0] for found in check.moved(before, after)] == columns


def test_a_draw_that_falls_to_another_token_is_no_move_and_another_estimator_is():
    """k3's mean from 1,000 draws of which one changes, against k3 a tenth of an interval off."""
    rng = np.random.default_rng(1)
    draws = rng.standard_exponential(1000)
    moved = np.append(draws[1:], draws[0] + 3)

    def row(values):
        centre, half = values.mean(), 1.96 * values.std() / np.sqrt(len(values))
        return pd.DataFrame({"via": ["sampled"], "bias": [centre], "bias_low": [centre - half], "bias_high": [centre + half]})

    assert check.moved(row(draws), row(moved)) == []
    assert [found[0] for found in check.moved(row(draws), row(1.02 * draws))] == ["bias", "bias_low", "bias_high"]


def test_numbers_of_single_precision_have_a_tolerance_of_their_own():
    one, two = frame(lag=[1.758e-4], kl=[2.7754]), frame(lag=[1.765e-4], kl=[2.7756])
    assert check.moved(one, two, "10_growth") == []
    assert [found[0] for found in check.moved(one, two, "04_bands")] == ["lag", "kl"]
