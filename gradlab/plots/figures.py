"""The figures by name: which frames each is drawn from, and how. `gl.figure` draws one again from the frames of a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from gradlab._common import frames as files
from gradlab._common.registry import Registry
from gradlab.plots.asymmetry import dropped_sides, restoring, sides, tail_indices
from gradlab.plots.audit import audited_curves
from gradlab.plots.bandits import field, objectives, tokens
from gradlab.plots.canvas import Figure
from gradlab.plots.choice import estimator_choice
from gradlab.plots.clips import clips
from gradlab.plots.coefficients import coefficients
from gradlab.plots.combined import clipped_kl, kl_weights
from gradlab.plots.compositions import compositions, weighted, winners
from gradlab.plots.corrections import chain_corrections, rollout_corrections
from gradlab.plots.distance import batches, catalogue, crossovers, distances, ratios, slopes
from gradlab.plots.fixed_points import ascents, fixed_points, weaker
from gradlab.plots.language import engine_noise, language_models, side_shares
from gradlab.plots.metrics import logged
from gradlab.plots.off_policy import lags, truncation, worth
from gradlab.plots.sequences import baselines, credit, gap, growth, normalisers, shifted
from gradlab.plots.shipped import shipped_kinds, shipped_settings
from gradlab.plots.smollm2 import engines, named_tokens, stages, token_ratios
from gradlab.plots.style import restyled
from gradlab.plots.tails import chi2, rare_token, running, variance_map
from gradlab.plots.training import training_compared, training_runs
from gradlab.plots.values import crossover, gradients, schulman

REVERSE = "reverse_kl"


@dataclass(frozen=True)
class Drawing:
    """A figure: the names of the frames that it is drawn from, and the function of these frames that draws it.

    >>> gl.plots.FIGURES["05_tails"].frames
    ('05_tails', '05_hill')
    """

    draw: Callable[..., Figure]
    frames: tuple[str, ...]


def figure(
    name: str,
    *frames: pd.DataFrame,
    folder: str | Path = "figures",
    width: float | None = None,
    style: str | Path | None = None,
    palette: str | Sequence[str] | None = None,
) -> Figure:
    """Draw a figure of the analyses, from the frames in a folder, or from frames that are given; nothing is measured.

    width: inches; panels are arranged to fit, type keeps its size. `None`: the figure's own, a page (6.9) or a column (3.3).
    style: a matplotlib style sheet that is read after gradlab's own: a file, or a name such as `"slides"` (gradlab's, for a
    projector) or `"ggplot"`. palette: colours of the kernels k1, k2, k3, full, …, in this order: a list, or a name that seaborn knows.
    Raises `ValueError` for an unknown figure, style or palette, for frames that are missing, damaged or of another number, and for a
    width of less than two inches.

    >>> float(gl.figure("08_one", width=3.3).get_figwidth())
    3.3
    """
    from gradlab._common.names import check_name

    check_name("figure", name, FIGURES)
    drawing = FIGURES[name]
    if frames and len(frames) != len(drawing.frames):
        raise ValueError(f"{name} is drawn from {', '.join(drawing.frames)}, in this order; {len(frames)} given")
    given = frames or [_load(Path(folder), frame) for frame in drawing.frames]
    with restyled(width, style, palette):
        return drawing.draw(*given)


def _load(folder: Path, name: str) -> pd.DataFrame:
    if not (folder / f"{name}.csv").is_file():
        number = name.split("_")[0]
        raise ValueError(f"there is no {name}.csv in {folder}; make it: gradlab reproduce --only {number} --output {folder}")
    return files.load(folder, name)


# ---- what is selected from the frames ---------------------------------------------------------------------------------

#: Estimators whose bias, and whose noise, are shown against the distance.
BIAS = ["k3-loss", "k3-loss-sequence", "k2-loss", "k3-reward-to-go", "abs-loss"]
NOISE = ["k1-loss", "k2-loss", "k3-loss", "k3-loss-sequence", "k1-reward-to-go", "full-both"]
#: Standard deviations that arXiv 2510.01555, App. I, reports.
REPORTED = {"k1": 0.691, "k3": 8.82}
#: Estimators off-policy, by weight.
GROUPS = [
    ("no weight", ["k1-loss", "k2-loss", "k3-loss", "full-loss", "k1-reward-to-go", "full-both"]),
    ("token weight", ["k2-loss, token weight", "k2-loss, differentiated token weight", "k3-loss, differentiated token weight",
                      "k1-reward-to-go, token weight", "k1-reward-to-go, token weight, clip 0.2", "full-both, token weight"]),
    ("prefix weight", ["k2-loss, prefix weight", "k3-loss, differentiated prefix weight", "k3-both, prefix weight",
                       "k1-reward-to-go, prefix weight", "full-both, prefix weight"]),
    ("sequence weight", ["k3-both, sequence weight", "k1-reward-to-go, sequence weight",
                         "k1-reward-sequence, sequence weight, clip 0.2", "full-both, sequence weight"]),
]  # fmt: skip
#: Estimators whose weights are truncated.
BASES = ["full-both, prefix weight", "k3-loss, differentiated prefix weight", "k1-reward-to-go, sequence weight",
         "k2-loss, token weight"]  # fmt: skip
#: Estimators on language models, with data from the policy and from another engine.
ON = ["k1-loss", "k2-loss", "k3-loss", "full-loss", "k2-loss-sequence", "k1-reward-to-go", "k3-both", "full-both"]
OFF = ["k2-loss", "k3-loss", "full-loss", "full-both", "k1-reward-to-go", "k3-loss-token", "k1-reward-sequence-weight",
       "full-both-prefix"]  # fmt: skip
#: Estimators followed over the stages of training.
LINES = ["k2-loss", "k3-loss", "k3-loss-sequence", "k1-reward-to-go", "k3-reward-to-go", "full-loss", "full-both"]
#: The least noisy estimator off-policy, which others are compared with.
BEST = "full-both-prefix"


def _distances(bands: pd.DataFrame) -> Figure:
    return distances(bands[bands["target"] == REVERSE], BIAS, NOISE)


def _rao_blackwell(frame: pd.DataFrame) -> Figure:
    # In a bandit no noise is left.
    return ratios(frame[frame["family"] != "bandit"], "noise_ratio", "noise / noise of sampling")


def _chi2(frame: pd.DataFrame, laws: pd.DataFrame) -> Figure:
    return chi2(frame[frame["group"].isin(["random bandits", "random trees"])], laws)


def _compositions(frame: pd.DataFrame) -> Figure:
    return compositions(frame, [name for name in map(str, frame) if name.startswith("noise_")])


def _trees(frame: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    return fixed_points(frame, curves[curves["world"].isin(frame["world"])])


def _catalogue(frame: pd.DataFrame) -> Figure:
    return language_models(frame[frame["target"] == REVERSE], ON)


def _tokens(frame: pd.DataFrame, sides: pd.DataFrame) -> Figure:
    return named_tokens(frame, sides.assign(second=sides["under_second"]))


def _engine_noise(engines: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    kept = engines["unbiased"] & engines["off_policy"] & engines["full_support"] & (engines["target"] == REVERSE)
    return engine_noise(engines[kept & (engines["estimator"] != BEST)], growth)


def _stages(frame: pd.DataFrame) -> Figure:
    names = set(frame["estimator"])
    return stages(frame, [name for name in LINES if name in names])


def _carried(frame: pd.DataFrame, sides: pd.DataFrame) -> Figure:
    shares = {"expected_share": "expected", "second_share": "second", "under_second": "second"}
    middle = list(dict.fromkeys(frame["scenario"]))[frame["steps"].nunique() // 2]
    shown = frame[frame["scenario"] == middle].drop(columns=["expected", "second"]).rename(columns=shares)
    return named_tokens(shown, sides.rename(columns=shares))


def _alone(draw: Callable[..., Figure], name: str, **options: Any) -> Drawing:
    return Drawing((lambda frame: draw(frame, **options)) if options else draw, (name,))


_OWN = {
    "01_schulman": _alone(schulman, "01_schulman"),
    "01_crossover": _alone(crossover, "01_crossover"),
    "01_gradients": _alone(gradients, "01_gradients"),
    "02_coefficients": _alone(coefficients, "02_coefficients"),
    "03_tokens": _alone(tokens, "03_tokens"),
    "03_objectives": _alone(objectives, "03_objectives"),
    "03_field": _alone(field, "03_field"),
    "04_bands": _alone(_distances, "04_bands"),
    "04_catalogue": _alone(catalogue, "04_catalogue"),
    "04_slopes": _alone(slopes, "04_slopes"),
    "04_batches": _alone(batches, "04_batches"),
    "04_crossover": _alone(crossovers, "04_crossover"),
    "04_weaker": _alone(ratios, "04_weaker", statistic="norm_ratio", label="‖E g‖ of k3 / of k2"),
    "04_rao_blackwell": _alone(_rao_blackwell, "04_rao_blackwell"),
    "05_dropped": _alone(dropped_sides, "05_dropped"),
    "05_bands": _alone(sides, "05_bands"),
    "05_tails": Drawing(tail_indices, ("05_tails", "05_hill")),
    "05_restoring": Drawing(restoring, ("05_paths", "05_restoring")),
    "06_running": Drawing(lambda frame, shares: running(frame, shares, REPORTED), ("06_running", "06_shares")),
    "06_variance": _alone(variance_map, "06_variance", border=0.5**0.5),
    "06_dropped": _alone(rare_token, "06_dropped"),
    "06_chi2": Drawing(_chi2, ("06_chi2", "06_two_tokens")),
    "07_objectives": _alone(objectives, "07_objectives"),
    "07_credit": _alone(credit, "07_credit"),
    "07_gap": _alone(gap, "07_gap"),
    "07_growth": Drawing(growth, ("07_growth", "07_exponents")),
    "07_baselines": _alone(baselines, "07_baselines"),
    "07_normalisers": _alone(normalisers, "07_normalisers"),
    "07_noise": _alone(shifted, "07_noise"),
    "08_lag": _alone(lags, "08_lag", groups=GROUPS),
    "08_truncation": _alone(truncation, "08_truncation", bases=BASES),
    "08_published": _alone(lambda frame: weighted(frame[frame["off_policy"]]), "08_published"),
    "08_compositions": _alone(_compositions, "08_compositions"),
    "08_one": _alone(credit, "08_one"),
    "08_growth": _alone(worth, "08_growth"),
    "08_winners": _alone(winners, "08_winners"),
    "09_paths": Drawing(ascents, ("09_paths", "09_optima")),
    "09_trees": Drawing(_trees, ("09_trees", "09_curves")),
    "09_weaker": _alone(weaker, "09_weaker"),
    "10_catalogue": _alone(_catalogue, "10_catalogue"),
    "10_ratios": _alone(token_ratios, "10_ratios"),
    "10_sides": _alone(side_shares, "10_sides"),
    "10_tokens": Drawing(_tokens, ("10_tokens", "10_sides")),
    "10_engines": Drawing(lambda frame, words: engines(frame[frame["estimator"].isin(OFF)], words),
                          ("10_engines", "10_log_weights")),
    "10_growth": Drawing(_engine_noise, ("10_engines", "10_growth")),
    "11_exact": _alone(credit, "11_exact"),
    "11_catalogue": _alone(_stages, "11_catalogue"),
    "11_ratios": _alone(lambda frame: token_ratios(frame[frame["kind"] == "bin"]), "11_ratios"),
    "11_tokens": Drawing(_carried, ("11_tokens", "11_sides")),
    "11_mismatch": Drawing(engines, ("11_mismatch", "11_engine")),
    "12_kinds": _alone(shipped_kinds, "12_kinds"),
    "12_settings": _alone(shipped_settings, "12_settings"),
    "12_pulls": _alone(audited_curves, "12_pulls"),
    "13_runs": _alone(training_runs, "13_runs"),
    "13_training": Drawing(training_compared, ("13_training", "13_ends")),
    "14_weight": _alone(kl_weights, "14_weight"),
    "14_lag": _alone(clipped_kl, "14_lag"),
    "15_choice": _alone(estimator_choice, "15_choice"),
    "16_metrics": _alone(logged, "16_metrics"),
    "18_clips": Drawing(clips, ("18_clips", "18_sides")),
    "19_corrections": Drawing(rollout_corrections, ("19_corrections", "19_best", "19_bounds")),
    "19_chains": _alone(chain_corrections, "19_chains"),
}  # fmt: skip

#: Every figure of the analyses by its name; what is registered stands behind gradlab's own.
FIGURES: Registry[Drawing] = Registry("figure", _OWN)
