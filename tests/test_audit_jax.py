"""Losses of JAX arrays: the same verdicts and gradients as their twins in torch; and what is said of numpy."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
import torch

import gradlab as gl
from gradlab.audit import bind, jax_loss, trial

HERE = importlib.util.find_spec("jax") is not None
needs_jax = pytest.mark.skipif(not HERE, reason="jax is not here; install the extra jax")
if HERE:
    import jax
    import jax.numpy as jnp
else:
    jax = jnp = SimpleNamespace()


def whole(per_token_logps, ref_per_token_logps, old_per_token_logps, advantages, completion_mask, beta=0.1, eps=0.2):
    ratio = jnp.exp(per_token_logps - old_per_token_logps)
    a = advantages[:, None]
    policy = -jnp.minimum(ratio * a, jnp.clip(ratio, 1 - eps, 1 + eps) * a)
    d = ref_per_token_logps - per_token_logps
    kl = jnp.exp(d) - d - 1
    loss = ((policy + beta * kl) * completion_mask).sum() / per_token_logps.shape[0]
    return loss, {"kl": (kl * completion_mask).sum() / completion_mask.sum(), "tokens": completion_mask.sum(), "name": 1}


def whole_in_torch(per_token_logps, ref_per_token_logps, old_per_token_logps, advantages, completion_mask, beta=0.1, eps=0.2):
    ratio = torch.exp(per_token_logps - old_per_token_logps)
    a = advantages[:, None]
    policy = -torch.minimum(ratio * a, torch.clip(ratio, 1 - eps, 1 + eps) * a)
    d = ref_per_token_logps - per_token_logps
    kl = torch.exp(d) - d - 1
    return ((policy + beta * kl) * completion_mask).sum() / per_token_logps.shape[0]


def of_a_batch(batch, beta=1.0):
    d = batch["logps"] - batch.ref_logps
    return beta * jnp.sum(0.5 * d**2 * batch["mask"]) / d.shape[0]


def branching(logps, ref_logps, mask):
    d = jnp.where(mask > 0, logps - ref_logps, 0.0)
    return (0.5 * d**2).sum() / len(d) if d.sum() < 1e9 else d.sum()


def helped(logps, ref_logps, mask):
    return _square(logps - ref_logps, mask)


def _square(d, mask):
    return jnp.sum(0.5 * d**2 * mask) / d.shape[0]


def no_import_of_its_own(per_token_logps, ref_per_token_logps):
    return 0.5 * (per_token_logps.astype("float32") - ref_per_token_logps.astype("float32")) ** 2


def in_numpy(logps, ref_logps, mask):
    return np.sum(np.exp(logps - ref_logps) * mask)


def in_numpy_by_arrays(logps, ref_logps, mask):
    return np.sum((np.asarray(logps.astype("float64")) - np.asarray(ref_logps)) * np.asarray(mask))


def gradient(subject):
    """Gradient of a subject at the trial batch, with respect to the log-probabilities."""
    found = trial.batch_of(2)
    log_prob = found.log_prob.detach().requires_grad_(True)
    loss = subject.loss(gl.audit.Batch(**{**vars(found), "log_prob": log_prob}))
    return loss, torch.autograd.grad(loss, log_prob)[0]


@needs_jax
def test_values_and_gradients_are_those_of_the_twin_in_torch():
    (value, slope), (expected, slope_expected) = gradient(bind(whole)), gradient(bind(whole_in_torch))
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-13)
    assert float((slope - slope_expected).norm()) < 1e-13 * float(slope_expected.norm())


@needs_jax
def test_the_second_of_two_results_carries_no_gradient_unless_it_is_chosen():
    assert gradient(bind(whole))[0].requires_grad
    assert "result" not in [bound.argument for bound in bind(whole).binding]
    d = trial.batch_of(2)
    found = jax_loss.JaxLoss(whole)(*(x.clone().requires_grad_(True) for x in (d.log_prob.detach(), d.reference_log_prob)),
                                    d.behaviour_log_prob, d.advantages[:, 0], d.mask)  # fmt: skip
    assert not found[1]["kl"].requires_grad
    assert found[1]["name"] == 1


@needs_jax
@pytest.mark.parametrize("function", [of_a_batch, branching, helped], ids=lambda f: f.__name__)
def test_functions_are_audited_however_they_are_written(function):
    audited = gl.audit(function, quick=True)
    assert audited.on_policy.combination == pytest.approx({"reverse_kl_frozen_prefix": 1})
    assert audited.on_policy.error < 1e-11  # in double precision
    assert audited.subject.binding[-1].argument == "arrays"


@needs_jax
def test_a_jitted_function_is_one_of_arrays_and_goes_to_another_process():
    subject = bind(jax.jit(helped))
    copied = cloudpickle.loads(cloudpickle.dumps(subject))
    assert gradient(copied)[0].detach().equal(gradient(subject)[0].detach())


@needs_jax
def test_a_method_of_arrays_tells_that_a_function_is_of_jax_and_its_precision_is_its_own():
    audited = gl.audit(no_import_of_its_own, quick=True)
    assert list(audited.on_policy.combination) == ["reverse_kl_frozen_prefix"]
    assert audited.precision.name == "float32"


@needs_jax
def test_torch_is_not_taken_for_jax():
    assert jax_loss.is_jax(helped)
    assert jax_loss.is_jax(jax.jit(helped))
    assert not jax_loss.is_jax(whole_in_torch)
    assert not jax_loss.is_jax(in_numpy)


@pytest.mark.parametrize("function", [in_numpy, pytest.param(in_numpy_by_arrays, marks=needs_jax)])
def test_numpy_gets_its_one_line(function):
    with pytest.raises(ValueError, match=rf"^{function.__name__} computes in numpy, which keeps no gradients, .*jax.numpy"):
        gl.audit(function)


def test_where_jax_is_not_installed_the_line_to_install_it_is_told(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "jax" else find(name, *rest))
    with pytest.raises(
        ValueError, match=r"uses .astype, which arrays of JAX and numpy have; .*pip install 'gradlab-kl\[jax\]'"
    ):
        gl.audit(no_import_of_its_own)
