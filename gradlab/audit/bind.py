"""Binding: which argument of a function is which tensor of a batch, told from the names in common use."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradlab._common.lazy import callable_module
from gradlab._common.names import check_name
from gradlab.audit.batch import Batch, Subject
from gradlab.audit.call import LossError
from gradlab.audit.load import version
from gradlab.audit.synthetic import Tokens, responses

#: What an argument can be, and how it is read off a batch.
ROLES: dict[str, Callable[[Batch], Any]] = {
    "log_prob": lambda b: b.log_prob,
    "reference_log_prob": lambda b: b.reference_log_prob,
    "behaviour_log_prob": lambda b: b.behaviour_log_prob,
    "logits": lambda b: b.logits,
    "reference_logits": lambda b: b.reference_logits,
    "behaviour_logits": lambda b: b.behaviour_logits,
    "log_ratio": lambda b: b.log_prob - b.reference_log_prob,
    "importance_ratio": lambda b: (b.log_prob - b.behaviour_log_prob).exp(),
    "mask": lambda b: b.mask,
    "tokens": lambda b: b.tokens,
    "advantages": lambda b: b.advantages,
    "rewards": lambda b: b.rewards,
    "lengths": lambda b: b.lengths,
    "tokens_in_batch": lambda b: b.mask.sum(),
    "max_length": lambda b: b.mask.shape[1],
    "batch": lambda b: b,
    "coefficient": lambda b: 1.0,
}
#: Roles that are configuration: a default, if there is one, stays.
CONFIGURATION = ("coefficient", "max_length", "tokens_in_batch")
#: Ways to read the result of a function: what it is, or what of the reward it is.
RETURNS = ("loss", "penalty", "rewards", "advantages")
#: Patterns of names, underscores left out, in order; the first that matches decides. In log-probabilities and logits the
#: prefix or suffix says whose they are.
_WHOSE = (
    (r"ref|base|sft|init|anchor|teacher|prior", "reference_"),
    (r"old|behaviou?r|sampl|rollout|infer|generat|prev|vllm|mu(?=log)|actorold|proximal", "behaviour_"),
)
_PATTERNS = (
    (r"^batch$", "batch"),
    (r"log(prob|p|its?p?r?ob)?s?ratios?|^logrs?$|^logratios?$", "log_ratio"),
    (r"logits?", "logits"),
    (r"logp|logprob|loglikelihood|^lp$|logπ|^logps?$", "log_prob"),
    (r"^(is|importance|iw|rho|ratio)(weights?|ratios?|sampling(weights?|ratios?))?s?$", "importance_ratio"),
    (r"mask$|^masks?", "mask"),
    (r"^adv|advantages?$", "advantages"),
    (r"^(token(level)?)?(rewards?|scores?)$|returns?$", "rewards"),
    (r"^(inputids|completionids?|responseids?|tokens?(ids?)?|actions?|labels?|responses?|targetids?|sequences?)$", "tokens"),
    (r"^(response|completion|sequence|seq)?(lengths?|lens?)$", "lengths"),
    (r"^(num|n)(items|tokens|actions)|batchnumtokens|globaltokens|totaltokens", "tokens_in_batch"),
    (r"^max(completion|response|seq|sequence|token)?s?(length|len|tokens?)$|loss(scale)?factor", "max_length"),
    (r"^(kl|ref|loss|penalty)*(loss|penalty|ctl|reg)?(coeff?s?|beta|weight|lambda|scale)$", "coefficient"),
)  # fmt: skip


def role_of(name: str) -> str | None:
    """The role that an argument of this name has, or `None` when the name is not understood."""
    plain = re.sub(r"[^a-zα-ω]", "", name.lower())
    for pattern, role in _PATTERNS:
        if re.search(pattern, plain):
            if role in ("log_prob", "logits"):
                return next((who for words, who in _WHOSE if re.search(words, plain)), "") + role
            return str(role)
    return None


def bind(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    roles: Mapping[str, str] | None = None,
    settings: Mapping[str, object] | None = None,
    returns: str = "loss",
) -> Subject:
    """Make a `Subject` of any function by its argument names; `roles` and `settings` decide what names cannot.

    A mask is passed as numbers, or as booleans or integers where the function wants those. Of a tuple the first tensor is
    the loss, of a mapping or an object `loss`. Per-token values `[B, T]` are summed over live tokens and averaged over
    responses, values `[B]` averaged; `configuration` says so. Raises `ValueError` for unknown roles, arguments that cannot be
    bound (with the signature and the names understood) and a function without the policy's log-probabilities, `LossError`
    when it raises.
    """
    check_name("kind of result", returns, RETURNS)
    roles, settings = dict(roles or {}), dict(settings or {})
    function = getattr(function, "_torchdynamo_orig_callable", function)  # compiling for tiny batches would take minutes
    label = name or str(getattr(function, "__name__", type(function).__name__))
    bound = _bound(function, label, roles, settings)
    package, number = version(str(getattr(function, "__module__", "") or ""))
    configuration = {**settings, **({} if returns == "loss" else {"returns": returns})}
    where = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', label)}".lstrip(".")
    trial, _ = responses(Tokens.at(0.3, -0.2, 0.1), Tokens.at(0.1, 0.4), columns=4)
    problems: list[Exception] = []
    for convert in _conversions(bound.values()):

        def value(batch: Batch, convert: Mapping[str, Callable[[Any], Any]] = convert) -> Any:
            given = {key: convert.get(role, lambda x: x)(ROLES[role](batch)) for key, role in bound.items()}
            return _call(function, {**given, **settings})

        try:
            with torch.enable_grad():
                reduction = _reduced(value(trial), trial, returns)[1]
        except Exception as error:
            problems.append(error)
            continue

        def loss(batch: Batch, value: Callable[[Batch], Any] = value) -> Any:
            return _reduced(value(batch), batch, returns)[0]

        if reduction:
            configuration["reduced"] = reduction
        return Subject(label, loss, package, number, where, configuration)
    told = _likeliest(problems)
    raise LossError.of(Subject(label, lambda batch: batch.mask), told) from told


def _likeliest(problems: Sequence[Exception]) -> Exception:
    """The error of the function itself: the one that most forms of its arguments led to; of several the first.

    A mask or an advantage in a form that is not wanted fails in its own way; what is wrong in the function fails whatever it is given.
    """
    counts = Counter((type(problem), str(problem)) for problem in problems)
    return max(problems, key=lambda problem: counts[type(problem), str(problem)])


def _bound(function: Callable[..., Any], label: str, roles: dict[str, str], settings: dict[str, object]) -> dict[str, str]:
    """Argument → role for every argument that gets a tensor."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ValueError(f"{label} has no signature to bind by; wrap it: def loss(batch): return {label}(…)") from None
    parameters = signature.parameters
    catch_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for given in (*roles, *settings):
        if given not in parameters and not catch_all:
            check_name(f"argument of {label}", given, parameters)
    for role in roles.values():
        check_name("role", role, ROLES)
    bound, unbound = dict(roles), []
    for key, parameter in parameters.items():
        if key in roles or key in settings or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        role_of_key: str | None = "batch" if parameter.annotation in (Batch, "Batch") else role_of(key)
        required = parameter.default is parameter.empty
        # What is off by default stays off: a tensor is bound where it is required or optional, a number where it is required.
        optional = parameter.default is None and role_of_key not in CONFIGURATION
        if role_of_key is not None and role_of_key not in bound.values() and (required or optional):
            bound[key] = role_of_key
        elif required:
            unbound.append(key)
    if unbound or not {"log_prob", "logits", "log_ratio", "importance_ratio", "batch"} & set(bound.values()):
        missing = (
            f"cannot tell what {', '.join(unbound)} is"
            if unbound
            else "nothing of the policy, such as log_probs, among the arguments"
        )
        raise ValueError(
            f"cannot bind {label}{signature}: {missing}. Say it with --bind NAME=ROLE or --set NAME=VALUE (roles: "
            f"{', '.join(ROLES)}), or wrap it: def loss(batch): return {label}(batch.log_prob, …). Understood: "
            f"{', '.join(f'{key}={role}' for key, role in bound.items()) or 'none of the names'}"
        )
    return bound


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call by name, except what can only be given by position."""
    positional = [
        key for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.POSITIONAL_ONLY and key in arguments
    ]  # fmt: skip
    return function(*(arguments[key] for key in positional), **{k: v for k, v in arguments.items() if k not in positional})


def _conversions(roles: Iterable[str]) -> list[dict[str, Callable[[Any], Any]]]:
    """The forms in which masks and advantages are offered, the commonest first."""
    used = set(roles)
    masks: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: x.bool(), lambda x: x.long()]
    shapes: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: x[:, 0], lambda x: x[:, :1]]
    rewards: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: x[:, None]]
    choices = itertools.product(
        masks if "mask" in used else masks[:1],
        shapes if "advantages" in used else shapes[:1],
        rewards if "rewards" in used else rewards[:1],
    )
    return [{"mask": mask, "advantages": shape, "rewards": reward} for mask, shape, reward in choices]


def _reduced(result: Any, batch: Batch, returns: str) -> tuple[Any, str]:
    """The scalar that an optimiser would minimise, and how it came about."""
    result_tensor = _tensor(result)
    if not isinstance(result_tensor, Tensor):
        return result_tensor, ""
    if returns != "loss":
        return _policy_loss(result_tensor, batch, returns)
    if result_tensor.shape == batch.mask.shape:
        return (torch.where(batch.mask.bool(), result_tensor, 0.0)).sum(-1).mean(), "sum over live tokens, mean over responses"
    if result_tensor.dim() == 1 and result_tensor.shape == batch.mask.shape[:1] and len(result_tensor) > 1:
        return result_tensor.mean(), "mean over responses"
    return result_tensor, ""


def _policy_loss(values: Tensor, batch: Batch, returns: str) -> tuple[Tensor, str]:
    """`−Σ_t sg(A_t) log π_t`, mean over responses, with `A` as returned or as the sum of the rewards that follow."""
    mask = batch.mask.bool()
    per_token = values if values.shape == batch.mask.shape else values.reshape(-1, 1).expand_as(batch.mask)
    if returns == "advantages" or values.shape != batch.mask.shape:
        advantage = -per_token if returns == "penalty" else per_token
    else:
        reward = torch.where(mask, -per_token if returns == "penalty" else per_token, 0.0)
        advantage = reward.flip(-1).cumsum(-1).flip(-1)
    loss = -torch.where(mask, advantage.detach() * batch.log_prob, 0.0).sum(-1).mean()
    return loss, "−Σ_t sg(advantage_t) log π_t, mean over responses" + ("" if returns == "advantages" else ", rewards to go")


def _tensor(result: Any) -> Any:
    """The loss in what a function returns: itself, the first tensor of a tuple, or `loss` of a mapping or an object."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        key = next((k for k in ("loss", "kl_loss", *result) if k in result and isinstance(result[k], Tensor)), None)
        return result if key is None else result[key]
    if isinstance(result, tuple | list):
        return next((item for item in result if isinstance(item, Tensor)), result)
    return getattr(result, "loss", result)


called = callable_module(__name__, bind)
