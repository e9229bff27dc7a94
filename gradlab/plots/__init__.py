"""Figures: pure functions from a frame to a `matplotlib.figure.Figure`; they compute nothing and touch no global state.

Colour = estimator (hue by kernel, lightness by placement), marker = credit and weight, line style = via, truth = black line.
"""

from gradlab.plots.asymmetry import dropped_sides, restoring, sides, tail_indices
from gradlab.plots.audit import audited_curves, matches
from gradlab.plots.bandits import field, objectives, tokens
from gradlab.plots.choice import estimator_choice
from gradlab.plots.clips import clips
from gradlab.plots.coefficients import coefficients
from gradlab.plots.combined import clipped_kl, kl_weights
from gradlab.plots.compositions import compositions, weighted, winners
from gradlab.plots.corrections import chain_corrections, rollout_corrections
from gradlab.plots.distance import batches, catalogue, crossovers, distances, ratios, slopes
from gradlab.plots.figures import FIGURES, Drawing
from gradlab.plots.fixed_points import ascents, fixed_points, weaker
from gradlab.plots.language import engine_noise, language_models, side_shares
from gradlab.plots.metrics import logged
from gradlab.plots.off_policy import lags, truncation, worth
from gradlab.plots.records import run_estimators, run_kl, run_steps, run_weights
from gradlab.plots.sequences import baselines, credit, gap, growth, normalisers, shifted
from gradlab.plots.shipped import shipped_kinds, shipped_settings
from gradlab.plots.smollm2 import engines, named_tokens, stages, token_ratios
from gradlab.plots.style import COLUMN, HUES, PAGE, VIA, Figure, Style, style_of, styled, stylesheet
from gradlab.plots.tails import chi2, rare_token, running, variance_map
from gradlab.plots.training import training_compared, training_runs
from gradlab.plots.values import crossover, gradients, schulman

__all__ = [
    "COLUMN",
    "FIGURES",
    "HUES",
    "PAGE",
    "VIA",
    "Drawing",
    "Figure",
    "Style",
    "ascents",
    "audited_curves",
    "baselines",
    "batches",
    "catalogue",
    "chain_corrections",
    "chi2",
    "clipped_kl",
    "clips",
    "coefficients",
    "compositions",
    "credit",
    "crossover",
    "crossovers",
    "distances",
    "dropped_sides",
    "engine_noise",
    "engines",
    "estimator_choice",
    "field",
    "fixed_points",
    "gap",
    "gradients",
    "growth",
    "kl_weights",
    "lags",
    "language_models",
    "logged",
    "matches",
    "named_tokens",
    "normalisers",
    "objectives",
    "rare_token",
    "ratios",
    "restoring",
    "rollout_corrections",
    "run_estimators",
    "run_kl",
    "run_steps",
    "run_weights",
    "running",
    "schulman",
    "shifted",
    "shipped_kinds",
    "shipped_settings",
    "side_shares",
    "sides",
    "slopes",
    "stages",
    "style_of",
    "styled",
    "stylesheet",
    "tail_indices",
    "token_ratios",
    "tokens",
    "training_compared",
    "training_runs",
    "truncation",
    "variance_map",
    "weaker",
    "weighted",
    "winners",
    "worth",
]
