"""Rollouts: what they refuse, their weights, independence of samples, and padding that never matters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from worlds import SHAPES, scenario

import gradlab as gl
from gradlab import Rollout
from gradlab.moments import cotangent, gradients

SURE = 1e-4  # a statistical test that fails, fails at this significance

E = gl.Estimator
#: The catalogue, and one estimator for everything in which the end of a response could be handled wrongly.
SINGLE = {name: e for name, e in gl.ESTIMATORS.items() if not e.grouped} | {
    "k2 mean": E("k2", normalise="mean"),
    "k3 token mean": E("k3", "reward", "to_go", normalise="token_mean"),
    "k1 fixed": E("k1", "reward", "return", normalise="fixed"),
    "mse return": E("mse", "reward", "return", weight="sequence"),
    "full to-go, mean": E("full", "reward", "to_go", weight="prefix", normalise="mean"),
    "abs truncated": E("abs", weight="prefix", differentiate_weight=True, truncate=1.1),
    "k3 sequence clipped": E("k3", "reward", "sequence", weight="sequence", clip=0.1),
    "k3 clamped": E("k3", "loss+reward", "to_go", clamp_log_ratio=0.5, clamp_value=0.4),
    "mse sampled sequence": E("mse_sampled", credit="sequence", weight="sequence", differentiate_weight=True),
}
GROUPED = {name: e for name, e in gl.ESTIMATORS.items() if e.grouped}


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(20251003, spawn_key=key))


def parts(rollout: Rollout) -> dict[str, Any]:
    """What `from_logits` needs to make the rollout again."""
    return {
        "tokens": rollout.tokens,
        "mask": rollout.mask,
        "weight": rollout.weight,
        "logits": rollout.logits,
        "reference_logits": rollout.reference_logits,
        "behaviour_logits": rollout.behaviour_logits,
        "expected_length": rollout.mean_length,
    }


# ── Construction ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("off_policy", [False, True], ids=["on", "off"])
def test_from_logits_is_the_same_rollout(shape, off_policy):
    world = scenario(shape, off_policy)
    listed = Rollout.enumerated(world)
    given = parts(listed) | ({} if off_policy else {"behaviour_logits": None})  # None: data from the policy itself
    rebuilt = Rollout.from_logits(**given)
    for estimator in SINGLE.values():
        torch.testing.assert_close(estimator(rebuilt), estimator(listed), rtol=1e-13, atol=1e-15)
    for name in ("log_prob", "reference_log_prob", "behaviour_log_prob", "log_ratio", "log_weight", "lengths"):
        torch.testing.assert_close(getattr(rebuilt, name), getattr(listed, name), rtol=1e-14, atol=1e-15)
    assert bool((rebuilt.log_weight == 0).all()) != off_policy


def broken(**changes: Any) -> dict[str, Any]:
    given = parts(Rollout.enumerated(scenario("eos", off_policy=True)))
    return {name: changes[name](item) if name in changes else item for name, item in given.items()}


def spoilt(value: float) -> Any:
    def spoil(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[2, 1, 0] = value
        return logits

    return spoil


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": lambda m: m & (torch.arange(len(m)) != 3)[:, None]}, "response 3 has no live token in its mask"),
        ({"mask": lambda m: m[:, :2]}, r"mask \[n, t\] and weight \[n\], got \[\d+, 3\], \[\d+, 2\]"),
        ({"weight": lambda w: w[1:]}, r"mask \[n, t\] and weight \[n\], got"),
        ({"weight": lambda w: w[:, None]}, r"weight \[n\], got"),
        ({"tokens": lambda t: t[:, :2]}, r"logits must be \[n, t, v\] with \[n, t\] = \[\d+, 2\]"),
        ({"tokens": lambda t: t + 1}, "a live token has id 3, outside the vocabulary of 3"),
        ({"tokens": lambda t: t - 1}, "a live token has id -1, outside the vocabulary"),
        ({"logits": lambda x: x[:, :, 0]}, r"logits must be \[n, t, v\].*got \[\d+, 3\]"),
        ({"reference_logits": lambda x: x[:-1]}, r"reference_logits must be \[n, t, v\]"),
        ({"behaviour_logits": lambda x: x[:, 1:]}, r"behaviour_logits must be \[n, t, v\]"),
        ({"reference_logits": lambda x: x[..., :2]}, "policy, reference and behaviour need logits of one shape"),
        ({"logits": spoilt(math.nan)}, "the table of a rollout holds NaN or infinite logits"),
        ({"reference_logits": spoilt(math.inf)}, "the reference_table of a rollout holds NaN or infinite"),
        ({"behaviour_logits": spoilt(-math.inf)}, "the behaviour_table of a rollout holds NaN or infinite"),
    ],
)
def test_inconsistent_input_is_refused(changes, message):
    Rollout.from_logits(**broken())
    with pytest.raises(ValueError, match=message):
        Rollout.from_logits(**broken(**changes))


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="samples must be a positive number, got 0"):
        Rollout.from_sampler(scenario("tree"), 0, generator(0))


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [*SHAPES, "gaussian"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on", "off"])
def test_weights_are_the_samplers_probabilities(shape, off_policy):
    world = scenario(shape, off_policy)
    listed = Rollout.enumerated(world)
    assert math.fsum(listed.weight.tolist()) == pytest.approx(1, abs=1e-13)
    assert not listed.weight.requires_grad
    if shape != "gaussian":
        torch.testing.assert_close(listed.weight, listed.behaviour_log_prob.sum(-1).exp(), rtol=1e-13, atol=0)
    drawn = Rollout.from_sampler(world, 1000, generator(0))
    assert (drawn.weight == 1 / 1000).all()
    expected = float(world.sampler.occupancy().sum())  # E_μ[L], exact for both
    assert listed.mean_length == pytest.approx(expected, rel=1e-13)
    assert drawn.mean_length == pytest.approx(expected, rel=1e-13)


def test_counted_weights_have_the_mean_and_covariance_of_draws():
    """z-tests at 5 standard errors over every entry: they see means off by 0.1 % of √p and covariances off by 4 %."""
    listed, samples, replicates = Rollout.enumerated(scenario("tree", off_policy=True)), 50, 40_000
    counted, p = listed.multinomial_weights(samples, replicates, generator(1)).numpy(), listed.weight.numpy()
    assert counted.shape == (replicates, len(p))
    np.testing.assert_allclose(counted * samples, np.rint(counted * samples), atol=1e-9)
    np.testing.assert_allclose(counted.sum(-1), 1, rtol=1e-12)
    expected = (np.diag(p) - np.outer(p, p)) / samples
    z = (counted.mean(0) - p) / np.sqrt(np.diag(expected) / replicates)
    assert np.abs(z).max() < 5
    # The covariance's own covariance, from the fourth moments of the counts.
    centred = counted - p
    products = np.einsum("ri,rj->rij", centred, centred)
    errors = products.std(0) / math.sqrt(replicates)
    assert (np.abs(products.mean(0) - expected) / errors).max() < 5
    # Counts of a tenth more draws, or of a sampler 1 % off, would be told apart.
    assert (np.abs(products.mean(0) - expected / 1.1) / errors).max() > 5
    shifted = counted.mean(0) - p * np.where(np.arange(len(p)) % 2, 0.99, 1.01)
    assert np.abs(shifted / np.sqrt(np.diag(expected) / replicates)).max() > 5


def test_drawn_and_counted_frequencies_agree():
    """χ² at 1e-4, with power 0.99 against a χ²-distance of 0.03 (root mean squared relative error of the frequencies)."""
    world, samples = scenario("eos", off_policy=True), 100_000
    listed, drawn = Rollout.enumerated(world), Rollout.from_sampler(world, samples, generator(2))
    place = 4 ** torch.arange(3)
    codes = (torch.where(listed.mask, listed.tokens + 1, 0) @ place).tolist()
    found = np.bincount((torch.where(drawn.mask, drawn.tokens + 1, 0) @ place).numpy(), minlength=64)
    expected = samples * listed.weight.numpy()
    assert found.sum() == found[codes].sum() == samples
    assert expected.min() > 10
    for observed in (found[codes], samples * listed.multinomial_weights(samples, 1, generator(3))[0].numpy()):
        assert stats.chisquare(observed, expected).pvalue > SURE
    df = len(codes) - 1
    assert special.chndtr(special.chdtri(df, SURE), df, samples * 0.03**2) < 0.01


# ── Independence of samples ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*SINGLE, *GROUPED])
def test_samples_do_not_mix(name):
    """The cotangent of the summed loss is, response by response, that of the response's own loss."""
    estimator = (SINGLE | GROUPED)[name]
    rollout = Rollout.from_sampler(scenario("eos", off_policy=True), 8, generator(4))
    together = cotangent(estimator, rollout)
    for i in range(8):
        leaf = rollout.differentiable()
        (alone,) = torch.autograd.grad(estimator(leaf)[i], leaf.table)
        alone = alone.view(together.shape)
        torch.testing.assert_close(alone[i], together[i], rtol=1e-12, atol=1e-15)
        assert not alone[torch.arange(8) != i].any()
    assert together.flatten(1).norm(dim=-1).max() > 1e-3


def test_differentiable_leaves_the_rollout_alone():
    rollout = Rollout.enumerated(scenario("tree", off_policy=True))
    before = rollout.log_prob.clone()
    leaf = rollout.differentiable()
    for name in ("log_prob", "reference_log_prob", "behaviour_log_prob"):
        torch.testing.assert_close(getattr(leaf, name).detach(), getattr(rollout, name), rtol=1e-14, atol=1e-15)
    assert leaf.table.requires_grad
    assert not leaf.reference_table.requires_grad
    assert not leaf.behaviour_table.requires_grad
    assert leaf.table.shape == (rollout.tokens.numel(), rollout.table.shape[1])
    with torch.no_grad():
        leaf.table.add_(1.0)
    torch.testing.assert_close(rollout.log_prob, before, rtol=0, atol=0)
    assert not rollout.table.requires_grad


# ── Padding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def closed_form(estimator: gl.Estimator, rollout: Rollout) -> tuple[torch.Tensor, ...]:
    """Mean gradient and mean square, without autograd."""
    with torch.no_grad():
        batch = gradients([estimator], rollout)
        return batch.mean(rollout.weight), batch.square(rollout.weight), batch.score


@pytest.mark.parametrize("sampled", [False, True], ids=["enumerated", "drawn"])
@pytest.mark.parametrize("padding", [0, 2, -100])
def test_padding_never_matters(padding, sampled):
    world = scenario("eos", off_policy=True)
    rollout = Rollout.from_sampler(world, 40, generator(5)) if sampled else Rollout.enumerated(world)
    mask, given, noise = rollout.mask, parts(rollout), generator(6)
    assert 0.05 < float((~mask).double().mean()) < 0.9
    changed = given | {"tokens": torch.where(mask, rollout.tokens, padding), "mask": mask.long()}
    for name in ("logits", "reference_logits", "behaviour_logits"):
        garbage = torch.from_numpy(30 * noise.standard_normal(given[name].shape))
        changed[name] = torch.where(mask[..., None], given[name], garbage)
    clean, padded = Rollout.from_logits(**given), Rollout.from_logits(**changed)
    for name, estimator in (SINGLE | (GROUPED if sampled else {})).items():
        loss = estimator(clean)
        torch.testing.assert_close(estimator(padded), loss, rtol=1e-12, atol=1e-13)
        assert float(loss.norm()) > 0, name
        for of_padded, of_clean in zip(*(closed_form(estimator, r) for r in (padded, clean)), strict=True):
            torch.testing.assert_close(of_padded, of_clean, rtol=1e-12, atol=1e-13)
        gradient = cotangent(estimator, padded)
        torch.testing.assert_close(gradient, cotangent(estimator, clean), rtol=1e-12, atol=1e-13)
        assert not gradient[~mask].any(), name
        # also without the mask that `cotangent` puts on top
        leaf = padded.differentiable()
        (raw,) = torch.autograd.grad(estimator(leaf).sum(), leaf.table)
        assert not raw.view(gradient.shape)[~mask].any(), name
        # a live position does matter
        live = Rollout.from_logits(**given | {"logits": given["logits"] + torch.eye(3)[1] * mask[..., None]})
        assert float((estimator(live) - loss).norm()) > 1e-6 * float(loss.norm()), name
