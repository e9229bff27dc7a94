"""Adapters, with the real packages: every configuration's gradient against a formula of its own, and against estimators.

A framework that is not installed is skipped, with the line that installs it.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import gradlab as gl
from gradlab.audit import adapters
from gradlab.audit.batch import Batch, Subject

MISSING = adapters.missing()
#: Code that casts to float32 is held to float32's precision.
SINGLE = ("openrlhf", "tinker", "trinity reward")


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name in MISSING, reason=f"{name} is not installed; to test it: {MISSING.get(name)}")


FRAMEWORKS = [pytest.param(name, marks=needs(name)) for name in adapters.ADAPTERS]
SUBJECTS = {subject.name: subject for subject in adapters.subjects()}


def tolerance(name: str) -> float:
    return 1e-6 if name.startswith(SINGLE) else 1e-12


# ---- batches and expected gradients, without the engine ------------------------------------------------------------------


def scenario(off: bool, kl: float = 0.3, seed: int = 0) -> gl.Scenario:
    policy = gl.Tree.random(3, 3, seed, eos=0)
    return gl.Scenario(policy, policy.perturbed(kl=kl, seed=seed + 1), policy.perturbed(kl=0.2, seed=seed + 2) if off else None)


def batch_of(rollout: gl.Rollout, rows: list[int], padding: int = 2) -> Batch:
    """Responses as a padded batch, with garbage in every padded position."""
    noise = torch.Generator().manual_seed(7)
    live = rollout.mask[rows]

    def padded(logits: Tensor) -> Tensor:
        n, t, v = logits.shape
        garbage = torch.randn(n, t + padding, v, generator=noise, dtype=torch.float64)
        return torch.cat([torch.where(live[..., None], logits, garbage[:, :t]), garbage[:, t:]], 1)

    policy = padded(rollout.logits[rows].detach()).requires_grad_(True)
    reference, behaviour = padded(rollout.reference_logits[rows]), padded(rollout.behaviour_logits[rows].detach())
    empty = torch.zeros(len(rows), padding, dtype=torch.long)
    tokens, mask = torch.cat([rollout.tokens[rows], empty], 1), torch.cat([live, empty.bool()], 1)

    def chosen(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    return Batch(
        chosen(policy), chosen(reference), chosen(behaviour), mask.double(), tokens, policy, reference, behaviour
    )  # fmt: skip


def slope(loss: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """Gradient with respect to the batch's logits."""
    (found,) = torch.autograd.grad(loss(batch), batch.logits, retain_graph=True)
    return found


def expected(loss: Callable[[Batch], Tensor], case: gl.Scenario, group: int) -> Tensor:
    """Expected gradient over all groups of responses, `[p]`."""
    rollout = gl.Rollout.enumerated(case)
    total = torch.zeros_like(rollout.table)
    for rows in itertools.product(range(len(rollout.weight)), repeat=group):
        chosen = list(rows)
        found = slope(loss, batch_of(rollout, chosen))[:, : rollout.tokens.shape[1]]
        live = rollout.mask[chosen]
        total.index_add_(0, rollout.contexts[chosen][live], found[live] * rollout.weight[chosen].prod())
    return total.flatten()


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---- what every configuration should be, written out ---------------------------------------------------------------------


def kernel(name: str, ratio: Tensor) -> Tensor:
    forms = {"k1": lambda x: x, "k2": lambda x: x**2 / 2, "k3": lambda x: (-x).exp() - 1 + x, "abs": torch.abs}
    return forms[name](ratio)


def verl_kernel(name: str, ratio: Tensor) -> Tensor:
    if name.endswith("+"):
        return kernel("k2", ratio)  # as far as the gradient goes
    name = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(name, name)
    return kernel(name, ratio.clamp(-20, 20)).clamp(-10, 10) if name == "k3" else kernel(name, ratio)


def reduced(values: Tensor, mask: Tensor, how: str, guard: float = 0.0) -> Tensor:
    """`guard` is what some packages add to a length before they divide by it."""
    sums, lengths = torch.where(mask.bool(), values, 0.0).sum(-1), mask.sum(-1)
    return {
        "token-mean": sums.sum() / (lengths.sum() + guard),
        "token-mean large-batch": sums.mean(),
        "token-sum": sums.sum(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-mean": (sums / (lengths + guard)).mean(),
        "seq-mean-token-sum-norm": sums.mean() / (mask.shape[1] + guard),
    }[how]


def grpo_formula(subject: Subject, batch: Batch) -> Tensor:
    """k3 times the ratio, differentiated, per token or the geometric mean of the response."""
    options, mask = subject.configuration, batch.mask
    lag = batch.log_prob - batch.behaviour_log_prob
    values = kernel("k3", batch.log_prob - batch.reference_log_prob)
    if options["use_bias_correction_kl"]:
        mean = torch.where(mask.bool(), lag, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        values = values * (lag if options["importance_sampling_level"] == "token" else mean).exp()
    how = {
        "dapo": "token-mean", "cispo": "token-mean", "vespo": "token-mean", "bnpo": "token-mean",
        "grpo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean",
        "dr_grpo": "seq-mean-token-sum", "luspo": "seq-mean-token-sum",
    }[str(options["loss_type"])]  # fmt: skip
    if subject.package == "liger_kernel" and options["loss_type"] == "luspo":
        return (values * mask.sum(-1, keepdim=True)).sum() / values.numel()  # padding included: see the test of it below
    return reduced(values, mask, how + (" large-batch" if options.get("large_batch") else ""))


def in_reward(batch: Batch, penalty: Tensor, level: str, how: str) -> Tensor:
    """PPO's clipped surrogate of advantages `−penalty` `[B, T]`; verl's and OpenRLHF's dual clip does not bind at 3."""
    lag = torch.where(batch.mask.bool(), batch.log_prob - batch.behaviour_log_prob, 0.0)
    ratio = (lag if level == "token" else lag.sum(-1, keepdim=True)).exp()
    surrogate = torch.minimum(ratio * -penalty, ratio.clamp(0.8, 1.2) * -penalty)
    if level == "sequence":
        return -surrogate[:, 0].mean()
    return -reduced(surrogate, batch.mask, how)


def penalties(batch: Batch, name: str) -> Tensor:
    """A kernel of behaviour against reference, the policy that sampled, `[B, T]`."""
    return torch.where(batch.mask.bool(), verl_kernel(name, batch.behaviour_log_prob - batch.reference_log_prob), 0.0)


def whitened(values: Tensor, mask: Tensor, unbiased: bool) -> Tensor:
    """Standardised over live tokens; `unbiased` as verl does it, with what it adds to counts and variances."""
    live, guard = values[mask.bool()], 1e-8 if unbiased else 0.0
    mean = live.sum() / (len(live) + guard)
    variance = (live - mean).square().sum() / (len(live) + guard)
    if unbiased:
        variance = variance * len(live) / (len(live) - 1) + guard
    return (values - mean) * variance.rsqrt()


def to_go(values: Tensor) -> Tensor:
    return values.flip(-1).cumsum(-1).flip(-1)


def formula(subject: Subject) -> Callable[[Batch], Tensor]:
    framework, kind, *_ = subject.name.split()
    options = subject.configuration

    def trl_reward(batch: Batch) -> Tensor:
        total = penalties(batch, "kl").sum(-1)
        centred = total - (total.sum() - total) / (len(total) - 1)
        if options["normalize_advantages"]:
            centred = (centred - centred.mean()) / (centred.std() + 1e-4)
        return in_reward(batch, centred[:, None], "sequence", "")

    def trl_gkd(batch: Batch) -> Tensor:
        student, teacher = batch.logits.log_softmax(-1), batch.reference_logits.log_softmax(-1)
        beta = float(options["beta"])  # type: ignore[arg-type]
        mixture = ((1 - beta) * student.exp() + beta * teacher.exp()).log()

        def kl(p: Tensor, q: Tensor) -> Tensor:
            return (p.exp() * (p - q)).sum(-1)

        values = {0.0: kl(teacher, student), 1.0: kl(student, teacher)}.get(
            beta, beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
        )
        return reduced(values, batch.mask, "token-mean" + (" large-batch" if options.get("large_batch") else ""))

    def verl_loss(batch: Batch) -> Tensor:
        name = str(options.get("kl_penalty") or options["kl_loss_type"])
        how = f"{options['loss_agg_mode']}{' large-batch' if options.get('large_batch') else ''}"
        guard = 1e-8 if how == "seq-mean-token-mean" else 0.0
        return reduced(verl_kernel(name, batch.log_prob - batch.reference_log_prob), batch.mask, how, guard)

    def verl_reward(batch: Batch) -> Tensor:
        values = penalties(batch, str(options["kl_penalty"]))
        total = values.sum(-1)
        if options["adv_estimator"] == "rloo":
            penalty = (total - (total.sum() - total) / (len(total) - 1))[:, None]
        elif options["adv_estimator"] == "grpo":
            penalty = (total - total.mean())[:, None]
            if options["norm_adv_by_std_in_grpo"]:
                penalty = penalty / (total.std() + 1e-6)
        else:
            penalty = whitened(to_go(values), batch.mask, unbiased=True)
        how = f"{options['loss_agg_mode']}{' large-batch' if options.get('large_batch') else ''}"
        return in_reward(batch, penalty, "token", how)

    def openrlhf_how() -> str:
        if not options["token_level_loss"]:
            return "seq-mean-token-mean"
        return "token-mean" + (" large-batch" if options.get("large_batch") else "")

    def openrlhf_loss(batch: Batch) -> Tensor:
        ratio = batch.log_prob - batch.reference_log_prob
        if options["unbiased_gradient"]:
            weight = (batch.log_prob - batch.behaviour_log_prob).exp().clamp(max=10).detach()
            return reduced(weight * kernel("k2", ratio), batch.mask, openrlhf_how())
        name = str(options["kl_estimator"])
        values = kernel(name, ratio.clamp(min=-10) if name == "k3" else ratio).clamp(-10, 10)
        return reduced(values, batch.mask, openrlhf_how())

    def openrlhf_reward(batch: Batch) -> Tensor:
        ratio = batch.behaviour_log_prob - batch.reference_log_prob
        values = torch.where(batch.mask.bool(), kernel(str(options["kl_estimator"]), ratio).clamp(-10, 10), 0.0)
        penalty = to_go(values)
        if options["advantage_estimator"] == "reinforce_baseline":
            penalty = whitened(penalty, batch.mask, unbiased=False)
        return in_reward(batch, penalty, "token", openrlhf_how())

    def torchrl_grpo(batch: Batch) -> Tensor:
        # One mean over every position, padding included: see the test of it below.
        return reduced(kernel("k3", batch.log_prob - batch.reference_log_prob), batch.mask, "seq-mean-token-sum-norm")

    def torchrl_distillation(batch: Batch) -> Tensor:
        ratio = batch.log_prob - batch.reference_log_prob
        values = kernel("k3", ratio if options["kl_direction"] == "reverse" else -ratio)
        return reduced(
            values, batch.mask, "seq-mean-token-mean" if options["normalize_by_seq_length"] else "seq-mean-token-sum"
        )

    def trinity_loss(batch: Batch) -> Tensor:
        name, ratio = str(options["kl_loss_fn"]), batch.log_prob - batch.reference_log_prob
        if name == "none":
            return 0 * batch.log_prob.sum()
        if name == "corrected_k3":
            values = (batch.log_prob - batch.behaviour_log_prob).exp().clamp(0, 2) * kernel("k3", ratio)
        else:
            values = verl_kernel(name, ratio) if name == "low_var_kl" else kernel(name, ratio)
        how = str(options["loss_agg_mode"])
        # Here the fixed normaliser does not come with a mean over responses.
        return reduced(values, batch.mask, how, 1e-8) * (len(ratio) if how == "seq-mean-token-sum-norm" else 1)

    def trinity_reward(batch: Batch) -> Tensor:
        name = str(options["kl_penalty_fn"])
        values = torch.where(batch.mask.bool(), kernel(name, batch.behaviour_log_prob - batch.reference_log_prob), 0.0)
        total, single = values.sum(-1), values.sum(-1).float()  # the statistics of a group are in float32
        penalty = {
            "rloo": ((total - single.mean()) * len(total) / (len(total) - 1))[:, None],
            "grpo_verl": ((total - single.mean()) / (single.std() + 1e-6))[:, None],
            "reinforceplusplus": whitened(to_go(values), batch.mask, unbiased=True),
        }[str(options["advantage_fn"])]
        return in_reward(batch, penalty, "token", str(options["loss_agg_mode"]))

    def torchrl_reward(batch: Batch) -> Tensor:
        values = penalties(batch, "k1")
        if options["trajectory_return"] == "sum":
            total = values.sum(-1)
            penalty = ((total - total.mean()) / total.std().clamp(min=1e-6))[:, None]
        else:
            live = values[batch.mask.bool()]
            penalty = torch.where(batch.mask.bool(), (values - live.mean()) / live.std().clamp(min=1e-6), 0.0)
        return in_reward(batch, penalty, "token", "token-mean")

    def tinker_reward(batch: Batch) -> Tensor:
        values = penalties(batch, "kl")
        penalty = torch.where(batch.mask.bool(), values - values.sum() / batch.mask.sum(), 0.0)
        if options["kl_discount_factor"]:
            penalty = to_go(penalty)
        ratio = (batch.log_prob - batch.behaviour_log_prob).exp()
        return (torch.where(batch.mask.bool(), ratio, 0.0) * penalty).sum()

    return {
        ("trl", "grpo"): lambda batch: grpo_formula(subject, batch),
        ("trl", "rloo"): trl_reward,
        ("trl", "gkd"): trl_gkd,
        ("verl", "loss"): verl_loss,
        ("verl", "actor"): verl_loss,
        ("verl", "reward"): verl_reward,
        ("openrlhf", "loss"): openrlhf_loss,
        ("openrlhf", "reward"): openrlhf_reward,
        ("torchrl", "distillation"): torchrl_distillation,
        ("torchrl", "reward"): torchrl_reward,
        ("trinity", "reward"): trinity_reward,
        ("liger", "grpo"): lambda batch: grpo_formula(subject, batch),
        ("tinker", "reward"): tinker_reward,
    }.get((framework, kind), {"torchrl": torchrl_grpo, "trinity": trinity_loss}.get(framework, verl_loss))


def cases(subject: Subject) -> Iterator[Batch]:
    """On- and off-policy, near the reference and so far from it that clamps bind, one response and several."""
    for off, kl in itertools.product((False, True), (0.3, 6.0)):
        rollout = gl.Rollout.enumerated(scenario(off, kl))
        for rows in ([0, 9], [4, 1], [8, 8]) if subject.group == 2 else ([0], [8], [9, 0, 1]):
            yield batch_of(rollout, rows)


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_configuration_has_the_gradient_of_its_formula(name):
    subject, largest = SUBJECTS[name], 0.0
    by_hand = formula(subject)
    for batch in cases(subject):
        found, wanted = slope(subject.loss, batch), slope(by_hand, batch)
        error, size = float((found - wanted).norm()), float(wanted.norm())
        assert error <= tolerance(name) * max(size, 1e-3), f"{error} of {size}"
        largest = max(largest, size)
    assert (largest == 0) == (name == "trinity none token-mean")


#: Configurations that are an estimator of gradlab: name → (estimator, objective it descends on-policy or None, its factor).
K1_LOO = gl.Estimator("k1", "reward", "return", baseline="leave_one_out", group=2)
TWINS: dict[str, tuple[gl.Estimator, str | None, float]] = {
    "trl grpo dr_grpo plain": (gl.ESTIMATORS["k3-loss"], "forward_kl_frozen_prefix", 1),
    "trl grpo dr_grpo corrected": (gl.ESTIMATORS["k3-loss-token"], "reverse_kl_frozen_prefix", 1),
    "trl grpo dapo corrected large-batch": (gl.ESTIMATORS["k3-loss-token"], "reverse_kl_frozen_prefix", 1),
    "trl grpo grpo plain": (gl.Estimator("k3", normalise="mean"), None, 1),
    "trl rloo": (K1_LOO, "reverse_kl", 1),
    "trl gkd beta=1 large-batch": (gl.ESTIMATORS["full-loss"], "reverse_kl_frozen_prefix", 1),
    "verl loss k1 token-mean": (gl.ESTIMATORS["k1-loss-mean"], "inverse_length", 1),
    "verl loss k2 seq-mean-token-sum": (gl.ESTIMATORS["k2-loss"], "reverse_kl_frozen_prefix", 1),
    "verl loss k3+ seq-mean-token-sum": (gl.ESTIMATORS["k3-plus"], "reverse_kl_frozen_prefix", 1),
    "verl loss low_var_kl seq-mean-token-sum": (
        gl.Estimator("k3", clamp_log_ratio=20.0, clamp_value=10.0), "forward_kl_frozen_prefix", 1,
    ),
    "verl actor k2 seq-mean-token-sum": (gl.ESTIMATORS["k2-loss"], "reverse_kl_frozen_prefix", 1),
    "verl reward kl rloo seq-mean-token-sum": (K1_LOO, "reverse_kl", 1),
    "verl reward kl rloo token-mean large-batch": (K1_LOO, "reverse_kl", 1),
    "verl reward kl grpo seq-mean-token-sum": (
        gl.Estimator("k1", "reward", "return", baseline="group_mean", group=2), "reverse_kl", 0.5,
    ),
    "openrlhf loss k2 plain token-mean large-batch": (gl.ESTIMATORS["k2-loss"], "reverse_kl_frozen_prefix", 1),
    "openrlhf loss k3 unbiased token-mean large-batch": (gl.ESTIMATORS["k2-loss-token-detached"], "reverse_kl_frozen_prefix", 1),
    "openrlhf reward k1 rloo token-mean large-batch": (gl.ESTIMATORS["k1-reward-to-go"], "reverse_kl", 1),
    "torchrl distillation reverse sum": (gl.ESTIMATORS["k3-loss"], "forward_kl_frozen_prefix", 1),
    "torchrl distillation forward sum": (gl.ESTIMATORS["k3-swapped-loss"], "chi2_frozen_prefix", 1),
    "liger grpo dr_grpo corrected": (gl.ESTIMATORS["k3-loss-token"], "reverse_kl_frozen_prefix", 1),
    "liger grpo sapo plain": (gl.Estimator("k3", normalise="mean"), None, 1),
    "trinity reward k1 rloo seq-mean-token-sum": (K1_LOO, "reverse_kl", 1),
    "trinity k2 seq-mean-token-sum": (gl.ESTIMATORS["k2-loss"], "reverse_kl_frozen_prefix", 1),
    "trinity corrected_k3 seq-mean-token-sum": (
        gl.Estimator("k3", weight="token", differentiate_weight=True, truncate=2.0), "reverse_kl_frozen_prefix", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("off", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name.split()[0])) for name in TWINS])
def test_expected_gradients_are_those_of_estimators(name, off):
    """By enumerating the framework's own loss, and by the closed form of the estimator that it should be."""
    estimator, target, factor = TWINS[name]
    subject, case = SUBJECTS[name], scenario(off)
    if off and subject.group == 2:
        pytest.skip("off-policy the reward is a function of the sampler, and the ratio is clipped: checked by its formula")
    found = expected(subject.loss, case, subject.group or 1)
    assert distance(found, gl.exact.moments(estimator, case).mean) < tolerance(name)
    if not off and target is not None:
        assert distance(found, factor * gl.exact.gradient(target, case)) < tolerance(name)


@needs("verl")
def test_the_positive_control_is_reached_to_machine_precision():
    """verl, KL in the reward, leave-one-out, whole responses: the sequence reverse KL."""
    case = scenario(off=False, seed=11)
    found = expected(SUBJECTS["verl reward kl rloo seq-mean-token-sum"].loss, case, 2)
    assert distance(found, gl.exact.gradient("reverse_kl", case)) < 1e-14


@needs("trl")
@pytest.mark.parametrize(
    ("label", "target", "other"),
    [("corrected", "reverse_kl_frozen_prefix", "reverse_kl"), ("plain", "forward_kl_frozen_prefix", "forward_kl")],
)
def test_what_the_correction_of_trl_changes(label, target, other):
    case = scenario(off=False, seed=5)
    found = expected(SUBJECTS[f"trl grpo dr_grpo {label}"].loss, case, 1)
    assert distance(found, gl.exact.gradient(target, case)) < 1e-14
    assert distance(found, gl.exact.gradient(other, case)) > 0.01


@needs("trl")
def test_a_comparison_with_the_wrong_estimator_fails():
    found = expected(SUBJECTS["trl grpo dr_grpo plain"].loss, scenario(off=True), 1)
    for wrong in ("k2-loss", "k3-loss-token", "k3-swapped-loss"):
        assert distance(found, gl.exact.moments(gl.ESTIMATORS[wrong], scenario(off=True)).mean) > 0.01


# ---- what only real packages do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "leaks"),
    [
        pytest.param("liger grpo luspo plain", True, marks=needs("liger")),
        pytest.param("trl grpo luspo plain", False, marks=needs("trl")),
        pytest.param("torchrl GRPOLoss kl_to_ref", False, marks=needs("torchrl")),
    ],
)
def test_padded_positions_get_no_gradient_except_in_one_package(name, leaks):
    """liger-kernel 0.8.5 leaves the mask out of `luspo`, whose counterpart in TRL has it."""
    batch = batch_of(gl.Rollout.enumerated(scenario(off=False)), [8])
    found = slope(SUBJECTS[name].loss, batch)
    assert bool((found[batch.mask == 0] != 0).any()) == leaks
    assert bool((found[batch.mask == 1] != 0).any())


@needs("torchrl")
def test_padding_weakens_the_regulariser_of_torchrl():
    """It is one mean over all positions: twice the padding, and each token counts for less."""
    rollout = gl.Rollout.enumerated(scenario(off=False))
    loss = SUBJECTS["torchrl GRPOLoss kl_to_ref"].loss
    near, far = (batch_of(rollout, [9], padding) for padding in (1, 5))
    ratio = slope(loss, near)[:, :3] / slope(loss, far)[:, :3]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 8 / 4))


# ---- the registry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_subjects_say_what_was_called(name):
    module = importlib.import_module(f"gradlab.audit.adapters.{name}")
    found = adapters.subjects([name])
    assert found
    assert name in adapters.installed()
    for subject in found:
        assert subject.name.split()[0] == name
        assert subject.package == module.PACKAGE
        assert re.match(r"\d+\.\d+", subject.version)
        assert subject.function.split(".")[0] == module.PACKAGE
        assert subject.configuration
    assert len({subject.name for subject in found}) == len(found)
    # Names are stable, and different configurations have different ones.
    assert [subject.name for subject in adapters.subjects([name])] == [subject.name for subject in found]
    assert len({(s.function, *map(str, s.configuration.items())) for s in found}) == len(found)


def test_all_that_is_installed_is_listed_in_a_fixed_order():
    order = list(dict.fromkeys(name.split()[0] for name in SUBJECTS))
    assert order == adapters.installed() == [name for name in adapters.ADAPTERS if name not in MISSING]
    assert set(MISSING).isdisjoint(order)


def test_an_unknown_framework_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="trl"):
        adapters.subjects(["trll"])


@pytest.mark.parametrize("name", adapters.ADAPTERS)
def test_an_absent_framework_says_how_to_install_it(name, monkeypatch):
    module = importlib.import_module(f"gradlab.audit.adapters.{name}")
    monkeypatch.setattr(module, "PACKAGE", "surely_not_installed")
    assert adapters.missing()[name] == module.INSTALL
    assert name not in adapters.installed()
    assert module.INSTALL.startswith("pip install ")
    with pytest.raises(ValueError, match=re.escape(module.INSTALL)):
        adapters.subjects([name])
    assert not [s for s in adapters.subjects([n for n in adapters.installed() if n == "trinity"]) if s.package == name]


def _compared(source: str, variable: str) -> set[str]:
    """Strings that a variable is compared with in a source."""
    found = re.findall(rf"{variable} == (\"\w[^\"]*\")|{variable} in ([\[(][^\])]*[\])])", source)
    return {word for pair in found for part in pair for word in re.findall(r'"([^"]+)"', part)}


@needs("trl")
def test_no_loss_type_of_trl_is_left_out():
    from trl import GRPOTrainer

    shipped = _compared(inspect.getsource(GRPOTrainer._compute_loss), "self.loss_type")
    assert shipped == {name.split()[2] for name in SUBJECTS if name.startswith("trl grpo")}


@needs("liger")
def test_no_loss_type_of_liger_is_left_out():
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    shipped = _compared(inspect.getsource(LigerFusedLinearGRPOFunction.ppo_loss_fn), "loss_type")
    assert shipped == {name.split()[2] for name in SUBJECTS if name.startswith("liger grpo")}


@needs("verl")
def test_no_penalty_and_no_aggregation_of_verl_is_left_out():
    from verl.trainer.ppo import core_algos

    penalties = _compared(inspect.getsource(core_algos.kl_penalty_forward), "kl_penalty") - {"full"}  # not implemented there
    audited = {str(s.configuration["kl_penalty"]) for s in SUBJECTS.values() if s.name.startswith("verl loss")}
    assert penalties == {name for name in audited if not name.endswith("+")}
    modes = _compared(inspect.getsource(core_algos.agg_loss), "loss_agg_mode")
    assert modes == {str(s.configuration["loss_agg_mode"]) for s in SUBJECTS.values() if s.name.startswith("verl loss")}


@needs("trinity")
def test_no_kl_function_of_trinity_is_left_out():
    from trinity.algorithm.kl_fn import KL_FN

    assert set(KL_FN._default_mapping) == {name.split()[1] for name in SUBJECTS if name.startswith("trinity")} - {"reward"}


@needs("openrlhf")
def test_openrlhf_leaves_no_empty_packages_behind():
    """Its modules are imported without the packages around them; what was there before is there afterwards."""
    import sys

    adapters.subjects(["openrlhf"])[0].loss(batch_of(gl.Rollout.enumerated(scenario(off=False)), [0]))
    assert not [name for name in sys.modules if name.split(".")[0] in ("openrlhf", "deepspeed")]
