"""Binding and loading: functions as people write them are understood, and what is not understood is said."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

import gradlab as gl
from gradlab.audit import Batch, bind, load
from gradlab.audit.roles import ROLES, role_of


def k3(x):
    return torch.expm1(-x) + x


#: Argument names as training frameworks and their users have them.
NAMES = {
    "log_prob": (
        "log_probs", "logprob", "logprobs", "log_prob", "logp", "logps", "per_token_logps", "new_log_probs", "cur_log_prob",
        "current_logprobs", "policy_log_probs", "action_log_probs", "curr_logprobs", "actor_logprobs", "student_log_probs",
        "new_logps", "token_log_probs", "lp", "pi_lp", "policy_lps",
    ),
    "reference_log_prob": (
        "ref_log_probs", "ref_logprob", "ref_per_token_logps", "reference_logps", "log_probs_base", "base_log_probs",
        "logprobs_reference", "ref_log_prob", "sft_log_probs", "init_logprobs", "teacher_log_probs", "ref_logp",
        "ref_lp", "teacher_lps",
    ),
    "behaviour_log_prob": (
        "old_log_probs", "old_logprob", "old_per_token_logps", "log_probs_old", "behavior_log_prob", "behaviour_logps",
        "sampling_logprobs", "rollout_log_probs", "inference_logprobs", "generation_logprobs", "prev_logprobs", "vllm_logps",
        "mu_logprobs", "old_logp", "sampling_per_token_logps", "old_lp", "rollout_lps",
    ),
    "mask": (
        "mask", "loss_mask", "eos_mask", "response_mask", "completion_mask", "attention_mask", "action_mask", "token_mask",
        "padding_masks",
    ),
    "advantages": ("advantages", "advantage", "adv", "advs"),
    "rewards": ("rewards", "reward", "scores"),
    "token_rewards": ("token_level_rewards", "token_level_scores", "token_rewards"),
    "returns": ("returns", "return"),
    "values": ("values", "old_values", "vpreds"),
    "labels": ("labels", "label"),
    "tokens": ("completion_ids", "input_ids", "response_ids", "tokens", "actions", "responses"),
    "logits": ("logits", "policy_logits", "student_logits"),
    "reference_logits": ("ref_logits", "reference_logits", "teacher_logits"),
    "log_ratio": ("log_ratio", "logratio", "log_ratios", "logr"),
    "importance_ratio": ("ratio", "importance_ratio", "is_weights", "importance_weights", "rho"),
    "coefficient": ("kl_coef", "beta", "kl_coeff", "kl_loss_coef", "kl_beta", "kl_weight", "coef", "kl_penalty_coef"),
    "lengths": ("lengths", "response_lengths", "seq_lens"),
    "tokens_in_batch": ("num_items_in_batch", "num_tokens", "batch_num_tokens"),
    "max_length": ("max_length", "max_completion_length", "max_tokens", "max_seq_len"),
    "batch": ("batch", "data", "micro_batch", "samples", "inputs", "td"),
    "micro_batches": ("micro_batches", "minibatches", "batches"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "role"), [(name, role) for role, names in NAMES.items() for name in names])
def test_names_in_common_use_are_understood(name, role):
    assert role_of(name) == role


@pytest.mark.parametrize(
    "name", ["x", "kl", "kl_estimator", "config", "temperature", "epsilon", "loss_agg_mode", "eps", "tau", "entropy", "help"]
)
def test_names_that_say_nothing_are_not_guessed(name):
    assert role_of(name) is None


def plain(logprob, ref_logprob, loss_mask):
    return (k3(logprob - ref_logprob) * loss_mask).sum(-1).mean()


def keyword_only(*, per_token_logps, ref_per_token_logps, completion_mask, beta, kind="k3", **kwargs):
    return beta * (k3(per_token_logps - ref_per_token_logps) * completion_mask).sum(-1).mean(), {"kl": 0.0}


def positional_only(log_probs, ref_log_probs, mask, /):
    return (k3(log_probs - ref_log_probs) * mask).sum(-1).mean()


def boolean_mask(log_probs, ref_log_probs, response_mask):
    return k3(log_probs - ref_log_probs).masked_fill(~response_mask, 0.0).sum(-1).mean()


def indexed_by_mask(log_probs, ref_log_probs, response_mask):
    return k3(log_probs - ref_log_probs)[response_mask].sum() / len(response_mask)


def per_token(log_probs, ref_log_probs):
    return k3(log_probs - ref_log_probs)


def per_response(log_probs, ref_log_probs, mask):
    return (k3(log_probs - ref_log_probs) * mask).sum(-1)


def mapping(log_probs, ref_log_probs, mask):
    return {"metrics": 1, "kl_loss": (k3(log_probs - ref_log_probs) * mask).sum(-1).mean()}


def attributes(log_probs, ref_log_probs, mask):
    return SimpleNamespace(loss=(k3(log_probs - ref_log_probs) * mask).sum(-1).mean())


def optional(log_probs, ref_log_probs=None, mask=None, kl_coef=1.0):
    return kl_coef * (k3(log_probs - ref_log_probs) * mask).sum(-1).mean()


def ratio_of_logs(log_ratio, mask):
    return (k3(log_ratio) * mask).sum(-1).mean()


def whole_batch(batch):
    return (k3(batch.log_prob - batch.reference_log_prob) * batch.mask).sum(-1).mean()


def annotated(data: Batch):
    return whole_batch(data)


def advantages_by_response(log_probs, old_log_probs, ref_log_probs, mask, advantages):
    assert advantages.shape == (len(mask),)
    ratio = (log_probs - old_log_probs).exp()
    return ((-ratio * advantages[:, None] + k3(log_probs - ref_log_probs)) * mask).sum(-1).mean()


@pytest.mark.parametrize(
    "function",
    [
        plain, keyword_only, positional_only, boolean_mask, indexed_by_mask, per_token, per_response, mapping, attributes, optional,
        ratio_of_logs, whole_batch, annotated, advantages_by_response,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_functions_are_bound_however_they_are_written(function):
    audited = gl.audit(function)
    assert audited.on_policy.combination == {"forward_kl_frozen_prefix": pytest.approx(1.0, rel=1e-12)}
    assert audited.form.name == "k3-loss"
    assert audited.probe("mask").passed
    reduced = audited.subject.configuration.get("reduced")
    expected = {"per_token": "sum over live tokens, mean over responses", "per_response": "mean over responses"}
    assert reduced == expected.get(function.__name__)


def test_compiled_functions_are_called_uncompiled():
    compiled = torch.compile(plain)
    assert gl.audit(compiled, name="compiled").on_policy.descends("forward_kl_frozen_prefix")


def test_roles_and_settings_decide_what_names_cannot():
    def obscure(a, b, kind, scale=1.0):
        return scale * {"k3": k3, "k2": lambda x: x**2 / 2}[kind](a - b)

    roles = {"a": "log_prob", "b": "reference_log_prob"}
    audited = gl.audit(obscure, roles=roles, settings={"kind": "k2", "scale": 3.0})
    assert audited.on_policy.combination == {"reverse_kl_frozen_prefix": pytest.approx(3.0, rel=1e-12)}
    assert audited.subject.configuration["kind"] == "k2"
    swapped = gl.audit(obscure, roles={"b": "log_prob", "a": "reference_log_prob"}, settings={"kind": "k3"})
    assert list(swapped.on_policy.combination) == ["chi2_frozen_prefix"]


def test_a_default_stays_and_a_required_coefficient_is_one():
    def loss(log_probs, ref_log_probs, mask, kl_coef, beta=0.5):
        return kl_coef * beta * (k3(log_probs - ref_log_probs) * mask).sum(-1).mean()

    assert gl.audit(loss).on_policy.scale == pytest.approx(0.5, rel=1e-12)
    assert gl.audit(loss, settings={"beta": 2.0}).on_policy.scale == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize(
    ("returns", "sign", "expected"),
    [("penalty", 1, "reverse_kl"), ("rewards", -1, "reverse_kl"), ("advantages", -1, "reverse_kl_frozen_prefix")],
)
def test_a_kl_in_the_reward_is_followed_to_the_policy(returns, sign, expected):
    def reward(log_probs, ref_log_probs):
        return sign * (log_probs - ref_log_probs)

    audited = gl.audit(reward, returns=returns)
    assert audited.on_policy.combination == {expected: pytest.approx(1.0, rel=1e-12)}
    assert "sg(advantage_t)" in audited.subject.configuration["reduced"]


def test_a_reward_per_response_is_credited_to_all_its_tokens():
    def reward(log_probs, ref_log_probs, mask):
        return -((log_probs - ref_log_probs) * mask).sum(-1)

    assert gl.audit(reward, returns="rewards").on_policy.descends("reverse_kl")


@pytest.mark.parametrize(
    ("function", "options", "says"),
    [
        (lambda x, y: x, {}, r"cannot bind <lambda>\(x, y\): cannot tell what x, y is"),
        (lambda ref_logprob, mask: mask, {}, "nothing of the policy, such as log_probs, among the arguments"),
        (lambda logprob, config: logprob, {}, "cannot tell what config is. Say it with --bind NAME=ROLE or --set NAME=VALUE"),
        (lambda logprob, config: logprob, {}, "Understood: logprob=log_prob"),
        (lambda logprob: logprob, {"roles": {"logprob": "log_probs"}}, "unknown role 'log_probs'; did you mean 'log_prob'"),
        (lambda logprob: logprob, {"roles": {"logprop": "log_prob"}}, "unknown argument .* 'logprop'; did you mean 'logprob'"),
        (lambda logprob: logprob, {"returns": "gradient"}, "unknown kind of result 'gradient'"),
    ],
)
def test_what_cannot_be_bound_shows_the_signature_and_what_is_understood(function, options, says):
    with pytest.raises(ValueError, match=says):
        gl.audit(function, **options)


def test_every_role_reads_something_off_a_batch():
    from gradlab.audit.synthetic import Tokens, responses

    batch, _ = responses(Tokens.at(0.3, -0.2), Tokens.at(0.1), columns=3)
    for role, read in ROLES.items():
        assert read(batch) is not None, role
    assert batch.lengths.tolist() == [2, 1]
    assert batch.advantages.shape == (2, 3)
    assert batch.rewards.shape == (2,)


# ---- loading ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """A package whose `__init__` cannot be imported, around a file with a relative and an absolute import."""
    folder = tmp_path / "heavy" / "losses"
    folder.mkdir(parents=True)
    (tmp_path / "heavy" / "__init__.py").write_text("raise RuntimeError('needs a cluster')")
    (folder / "__init__.py").write_text("import nothing_of_that_name")
    (folder / "kernels.py").write_text("import torch\ndef k3(x):\n    return torch.expm1(-x) + x\n")
    (folder / "kl.py").write_text(
        "from .kernels import k3\nfrom heavy.losses import kernels\nassert kernels.k3 is k3\n"
        "class Losses:\n    @staticmethod\n    def kl(logprob, ref_logprob, mask):\n        return kl_loss(logprob, ref_logprob, mask)\n"
        "def kl_loss(logprob, ref_logprob, mask):\n    return (k3(logprob - ref_logprob) * mask).sum(-1).mean()\n"
    )
    return folder


def test_a_file_leaves_no_module_behind_and_hides_none(tmp_path):
    import json

    (tmp_path / "json.py").write_text("def kl_loss(logprob, ref_logprob):\n    return logprob - ref_logprob\n")
    assert load(f"{tmp_path / 'json.py'}:kl_loss").__name__ == "kl_loss"
    assert sys.modules["json"] is json


@pytest.mark.parametrize("name", ["kl_loss", "Losses.kl"])
def test_a_file_is_run_without_the_package_around_it(package, name):
    before = set(sys.modules)
    audited = gl.audit(load(f"{package / 'kl.py'}:{name}"))
    assert audited.on_policy.descends("forward_kl_frozen_prefix")
    assert not {module for module in set(sys.modules) - before if module.startswith("heavy")}


def test_a_module_is_imported_by_name(monkeypatch, package):
    (package.parent.parent / "light_losses.py").write_text(
        "def kl_loss(logprob, ref_logprob):\n    return logprob - ref_logprob\n"
    )
    monkeypatch.syspath_prepend(package.parent.parent)
    assert load("light_losses:kl_loss").__name__ == "kl_loss"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("{folder}/kl.py:kl_los", "no function 'kl_los' in .*; did you mean kl_loss"),
        ("{folder}/kll.py:kl_loss", "no file .*kll.py; did you mean kl.py"),
        ("no_such_module_here:f", "cannot import no_such_module_here"),
        ("torch.nn.functional:kl_dv", "no function 'kl_dv' in torch.nn.functional; did you mean kl_div"),
        ("kl_loss", "give package.module:function or path/to/file.py:function"),
        ("math:pi", "math:pi is float, not a function"),
    ],
)
def test_what_cannot_be_loaded_says_what_is_near(package, address, says):
    with pytest.raises(ValueError, match=says):
        load(address.format(folder=package))


def test_a_file_that_fails_says_why(tmp_path):
    (tmp_path / "needs.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"running needs.py failed: No module named 'nothing_of_that_name'"):
        load(f"{tmp_path / 'needs.py'}:f")
    with pytest.raises(ValueError, match=r"running breaks.py failed: ZeroDivisionError"):
        load(f"{tmp_path / 'breaks.py'}:f")


def test_what_a_package_is_called_and_its_version_are_recorded():
    subject = bind(torch.nn.functional.l1_loss, roles={"input": "log_prob", "target": "reference_log_prob"})
    assert (subject.package, subject.version) == ("torch", torch.__version__)
    assert subject.function.endswith("l1_loss")


def test_the_error_of_a_function_is_told_and_not_that_of_a_form_it_does_not_take():
    def loss(log_probs, ref_log_probs, mask, advantages):
        kept = log_probs[~mask]  # numbers cannot be inverted: only one form of the mask gets further
        return (log_probs - ref_log_probs).sum() + kept.sum() + "no number"

    with pytest.raises(gl.audit.LossError, match="unsupported operand type"):
        gl.audit.bind(loss)
