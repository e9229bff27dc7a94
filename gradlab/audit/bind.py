"""Binding: which argument of a function is which tensor of a batch, told from the names in common use."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gradlab._common.lazy import callable_module
from gradlab._common.names import check_name
from gradlab.audit import jax_loss, trial
from gradlab.audit.batch import Batch, Bound, Subject
from gradlab.audit.call import LossError
from gradlab.audit.load import version
from gradlab.audit.results import RETURNS, AmbiguousError, picked, reduced
from gradlab.audit.roles import CONFIGURATION, OF_THE_POLICY, OF_THE_TASK, ROLES, of_padding, plain, role_of, uncertain
from gradlab.audit.user_batch import UserBatch, built, nested

#: Names of arguments that are a configuration as a whole.
_CONFIGURATIONS = r"^(self|config|cfg|conf|args|options|hparams|trainingargs|actorconfig)$"
#: What an argument is passed as: what it is called, and how it is made.
Form = tuple[str, Callable[[Any], Any]]
_AS_IT_IS: Form = ("", lambda x: x)


def bind(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    roles: Mapping[str, str] | None = None,
    settings: Mapping[str, object] | None = None,
    returns: str = "loss",
    result: str | int | None = None,
    vocab: int | None = None,
    temperature: float | None = None,
) -> Subject:
    """Make a `Subject` of any function by its argument names; `roles` and `settings` decide what names cannot.

    A mask is passed as numbers, or as booleans or integers where the function wants those; advantages `[B, T]`, `[B]` or `[B, 1]`,
    in the form in which one response's do not reach another. One argument that is a batch is a mapping whose fields are found by
    their names; a dataclass is built. A setting `config.beta` is an attribute of a configuration `config`.
    result: which of several results is the loss, by key or place; left out, `loss`, `total_loss` or the only one with a gradient.
    Per-token values `[B, T]` are summed over live tokens and averaged over responses, values `[B]` averaged; `configuration` says
    so. vocab: tokens of the policies; left out, 3, or one more than the k of a top-k. temperature: what the sampler divides logits
    by; left out, the function's own argument of that name, or 1. `binding` says what each argument was given, and why.
    Raises `ValueError` for unknown roles, arguments that cannot be bound (with the signature and the names understood), for what is
    ambiguous (with the line to type) and a function without the policy's log-probabilities, `LossError` when it raises.
    """
    check_name("kind of result", returns, RETURNS)
    function = getattr(function, "_torchdynamo_orig_callable", function)  # compiling for tiny batches would take minutes
    label = name or str(getattr(function, "__name__", type(function).__name__))
    flat = dict(settings or {})
    if jax_loss.is_jax(function):
        function = jax_loss.JaxLoss(function, every=result is not None)
    call = _Call.of(function, label, dict(roles or {}), nested(flat), returns, result)
    tokens = trial.vocabulary(call.plain_value, label) if vocab is None else vocab
    own = call.temperature()
    home = type(function) if isinstance(function, torch.nn.Module) else function
    package, number = version(str(getattr(home, "__module__", "") or ""))
    try:
        subject = _fitting(call, tokens)
    except LossError as error:
        call = dataclasses.replace(call, function=jax_loss.instead(call.function, label, error, result is not None))
        subject = _fitting(call, tokens)
    configuration = {**flat, **({} if returns == "loss" else {"returns": returns}), **subject.configuration}
    sampled = own if temperature is None else temperature
    at = (Bound("temperature", f"{sampled:g}", "the data are sampled at it"),) if sampled != 1 else ()
    if lifted := getattr(home, "__lifted__", ""):
        at = (*at, Bound("file", "lifted", lifted))
    if isinstance(call.function, jax_loss.JaxLoss):
        at = (*at, Bound("arrays", "JAX's", "the function computes with them; gradients are by jax.vjp"))
    return dataclasses.replace(
        subject,
        package=package,
        version=number,
        function=f"{getattr(home, '__module__', '')}.{getattr(home, '__qualname__', label)}".lstrip("."),
        configuration=configuration,
        binding=(*call.told, *subject.binding, *at),
        vocab=tokens,
        temperature=sampled,
    )


def _fitting(call: _Call, vocab: int | None) -> Subject:
    """The loss with its arguments in the first forms that fit, else in the first that it takes."""
    taken: list[Subject] = []
    problems: list[Exception] = []
    for forms in call.forms():
        try:
            subject, misfit = call.subject(forms, vocab)
        except AmbiguousError:
            raise
        except Exception as error:
            problems.append(error)
            continue
        if not misfit:
            return subject
        taken.append(subject)
    if taken:
        return taken[0]
    told = _likeliest(problems)
    raise LossError.of(Subject(call.label, lambda batch: batch.mask), told) from told


def _likeliest(problems: Sequence[Exception]) -> Exception:
    """The error of the function itself: the one that most forms of its arguments led to; of several the first.

    A mask or an advantage in a form that is not wanted fails in its own way; what is wrong in the function fails whatever it is given.
    """
    counts = Counter((type(problem), str(problem)) for problem in problems)
    return max(problems, key=lambda problem: counts[type(problem), str(problem)])


@dataclasses.dataclass(frozen=True)
class _Call:
    """A function with what its arguments are given: roles, settings, and dataclasses that are built of a batch."""

    function: Callable[..., Any]
    label: str
    parameters: Mapping[str, inspect.Parameter]
    bound: dict[str, str]
    told: tuple[Bound, ...]
    settings: dict[str, Any]
    built: Mapping[str, type]
    returns: str
    chosen: str | int | None

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        label: str,
        roles: dict[str, str],
        settings: dict[str, Any],
        returns: str,
        chosen: str | int | None,
    ) -> _Call:
        signed = function.forward if isinstance(function, torch.nn.Module) else function
        try:
            signature = inspect.signature(signed)
        except (TypeError, ValueError):
            raise ValueError(f"{label} has no signature to bind by; wrap it: def loss(batch): return {label}(…)") from None
        kinds = _dataclasses(signed, signature)
        bound, told = _bound(signed, signature, label, roles, settings, kinds, returns)
        return cls(function, label, signature.parameters, bound, tuple(told), settings, kinds, returns, chosen)

    def temperature(self) -> float:
        """The function's own temperature, by a setting or its default; 1 without one."""
        parameter = self.parameters.get("temperature")
        default = None if parameter is None else parameter.default
        given = self.settings.get("temperature", default)
        return float(given) if isinstance(given, int | float) and given > 0 else 1.0

    def forms(self) -> list[dict[str, Form]]:
        """The forms in which masks, advantages, rewards and labels are offered, the commonest first."""
        offered = {key: _forms(key, role) for key, role in self.bound.items()}
        some = {key: forms for key, forms in offered.items() if len(forms) > 1}
        return [dict(zip(some, choice, strict=True)) for choice in itertools.product(*some.values())]

    def value(self, batch: Batch, forms: Mapping[str, Form], read: dict[str, str]) -> Any:
        """What the function returns for a batch; `read` collects which of its fields were read as what."""
        given: dict[str, Any] = {}
        for key, role in self.bound.items():
            if key not in self.parameters and "." in key:
                continue  # a field of a batch
            if role not in ("batch", "micro_batches"):
                given[key] = forms.get(key, _AS_IT_IS)[1](ROLES[role](batch))
                continue
            user = UserBatch.of(batch, read, {name.rpartition(".")[2]: r for name, r in self.bound.items()})
            parts = [user.rows([i]) for i in range(len(batch.mask))] if role == "micro_batches" else [user]
            made = [built(self.built[key], part) for part in parts] if key in self.built else parts
            given[key] = made if role == "micro_batches" else made[0]
        arguments = {**given, **self.settings}
        positional = [k for k, p in self.parameters.items() if p.kind is p.POSITIONAL_ONLY and k in arguments]
        named = {k: v for k, v in arguments.items() if k not in positional}
        return trial.distributed(lambda: self.function(*(arguments[k] for k in positional), **named))

    def plain_value(self, batch: Batch) -> Any:
        """The result in whatever forms of the arguments the function takes first."""
        problem: Exception | None = None
        for forms in self.forms():
            try:
                return self.value(batch, forms, {})
            except Exception as error:
                problem = error
        assert problem is not None
        raise problem

    def subject(self, forms: Mapping[str, Form], vocab: int | None) -> tuple[Subject, bool]:
        """The loss with its arguments in these forms, and whether they cannot be meant. Raises what the function raises."""
        read: dict[str, str] = {}
        batch = trial.batch_of(vocab)
        with torch.enable_grad():
            result = self.value(batch, forms, read)
            pick, which = picked(result, self.chosen, self.label)
            loss, reduction = reduced(pick(result), batch, self.returns)
        told = [Bound(key, role, "a field of the batch, by its name") for key, role in read.items()]
        told += [
            Bound(key, form[0], "the form in which it is taken", form[0] == "1 where padded")
            for key, form in forms.items()
            if form[0]
        ]
        if self.chosen is not None:
            told.append(Bound("result", which, "given"))
        elif which not in ("", "loss", "0"):
            told.append(Bound("result", which, "the total, or the only one with a gradient", guessed=True))

        def value(batch: Batch) -> Any:
            return reduced(pick(self.value(batch, forms, {})), batch, self.returns)[0]

        misfit = False
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            padding_mask = any(of_padding(key) for key, role in self.bound.items() if role == "mask")
            misfit = trial.misfit(value, batch, self.bound.values(), padding_mask)
        configuration = {"reduced": reduction} if reduction else {}
        return Subject(self.label, value, configuration=configuration, binding=tuple(told)), misfit


def _forms(name: str, role: str) -> list[Form]:
    if role == "mask":
        forms: list[Form] = [_AS_IT_IS, ("", lambda x: x.bool())]
        inverted: list[Form] = [("1 where padded", lambda x: 1 - x), ("1 where padded", lambda x: ~x.bool())]
        # Integers last: ~1 is −2.
        return [*forms, *(inverted if of_padding(name) else []), ("", lambda x: x.long())]
    if role == "advantages":
        return [("[B, T]", lambda x: x), ("[B]", lambda x: x[:, 0]), ("[B, 1]", lambda x: x[:, :1])]
    if role == "rewards":
        return [("[B]", lambda x: x), ("[B, 1]", lambda x: x[:, None])]
    if role == "labels":
        return [("−100 where padded", lambda x: x), ("any token where padded", lambda x: x.clamp(min=0))]
    return [_AS_IT_IS]


def _bound(
    function: Callable[..., Any],
    signature: inspect.Signature,
    label: str,
    roles: dict[str, str],
    settings: dict[str, Any],
    kinds: Mapping[str, type],
    returns: str,
) -> tuple[dict[str, str], list[Bound]]:
    """Argument → role for every argument that gets something of the batch; and what each was given, and why."""
    parameters = signature.parameters
    catch_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    batches = [
        k
        for k, p in parameters.items()
        if k in kinds or p.annotation in (Batch, "Batch") or role_of(k) in ("batch", "micro_batches")
    ]
    for given in (*roles, *settings):
        if given not in parameters and not catch_all and not (given in roles and batches):
            check_name(f"argument of {label}", given, parameters)
    for role in roles.values():
        check_name("role", role, ROLES)
    bound = {key: role for key, role in roles.items() if key in parameters or catch_all}
    bound |= {f"{batches[0]}.{key}": role for key, role in roles.items() if key not in bound and batches}
    told = [Bound(key, role, "given") for key, role in roles.items()]
    told += [Bound(key, _shown(value), "set") for key, value in settings.items()]
    unbound: list[str] = []
    for key, parameter in parameters.items():
        if key in roles or key in settings or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required, role_of_key = parameter.default is parameter.empty, _role(key, parameter, kinds)
        # What is off by default stays off: a tensor is bound where it is required or optional, a number where it is required.
        optional = parameter.default is None and role_of_key not in CONFIGURATION
        if role_of_key is not None and role_of_key not in bound.values() and (required or optional):
            bound[key] = role_of_key
            sure = parameter.annotation in (Batch, "Batch") or key in kinds
            told.append(Bound(key, role_of_key, "by its annotation" if sure else "by its name"))
        elif required:
            unbound.append(key)
        else:
            told.append(Bound(key, _shown(parameter.default), "its default"))
    _check_pairs(label, parameters)
    _check_bound(function, signature, label, bound, unbound)
    _check_old(label, bound, roles, returns)
    return bound, told


def _role(key: str, parameter: inspect.Parameter, kinds: Mapping[str, type]) -> str | None:
    several = "list" in str(parameter.annotation).lower() and "batch" in plain(key)
    if parameter.annotation in (Batch, "Batch") or (key in kinds and not several):
        return "batch"
    return "micro_batches" if several else role_of(key)


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _check_pairs(label: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    pairs = {word: [name for name in parameters if word in name.lower()] for word in ("chosen", "rejected")}
    if all(pairs.values()):
        raise ValueError(
            f"{label} compares pairs of responses, {pairs['chosen'][0]} with {pairs['rejected'][0]}: preference losses (DPO, IPO, …) are "
            "out of scope, for their data are pairs that somebody labelled and not draws of a policy, so that there is no expected "
            "gradient over responses to name"
        )


def _check_bound(
    function: Callable[..., Any], signature: inspect.Signature, label: str, bound: Mapping[str, str], unbound: Sequence[str]
) -> None:
    if not unbound and set(OF_THE_POLICY) & set(bound.values()):
        return
    missing = (
        f"cannot tell what {', '.join(unbound)} is"
        if unbound
        else "nothing of the policy, such as log_probs, among the arguments"
    )
    configured = [key for key in unbound if re.search(_CONFIGURATIONS, plain(key))]
    read = [f"--set {path}=VALUE" for key in configured for path in _attributes(function, key)]
    asked = f" It reads {', '.join(read[:6])}{', …' if len(read) > 6 else ''}." if read else ""
    raise ValueError(
        f"cannot bind {label}{signature}: {missing}. Say it with --bind NAME=ROLE or --set NAME=VALUE (roles: "
        f"{', '.join(ROLES)}), or wrap it: def loss(batch): return {label}(batch.log_prob, …).{asked} Understood: "
        f"{', '.join(f'{key}={role}' for key, role in bound.items()) or 'none of the names'}"
    )


def _check_old(label: str, bound: Mapping[str, str], roles: Mapping[str, str], returns: str) -> None:
    """Raise `ValueError` where log-probabilities that are called old may be the sampler's or the reference's."""
    of_reference = any(role.startswith("reference") or role in ("log_ratio", "batch") for role in bound.values())
    of_task = bool(set(OF_THE_TASK) & set(bound.values())) and returns == "loss"
    for key, role in bound.items():
        if role.startswith("behaviour") and key not in roles and uncertain(key) and not of_reference and not of_task:
            other = role.replace("behaviour", "reference")
            raise ValueError(
                f"{key} of {label} may be the sampler's or those of a frozen reference: no other argument is the reference's, and none is "
                f"an advantage; say it with --bind {key}={other} or --bind {key}={role}"
            )


def _attributes(function: Callable[..., Any], name: str) -> list[str]:
    """Which attributes and items of an argument a function reads, `name.kl.coef`, from its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return []
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        path: list[str] = []
        while isinstance(node, ast.Attribute) or (
            isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
        ):
            path.insert(0, node.attr if isinstance(node, ast.Attribute) else node.slice.value)  # type: ignore[attr-defined]
            node = node.value
        if isinstance(node, ast.Name) and node.id == name and path and path[-1] != "get":
            found[".".join([name, *path])] = None
    return [path for path in found if not any(other.startswith(f"{path}.") for other in found)]


def _dataclasses(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, type]:
    """Arguments that are a dataclass of the user's made of tensors, or a list of them, by their annotations."""
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # names that are only there for type checkers
        hints = {}
    found = {}
    for key, parameter in signature.parameters.items():
        hint = hints.get(key, parameter.annotation)
        hint = getattr(function, "__globals__", {}).get(hint, hint) if isinstance(hint, str) else hint
        inner = [hint, *typing.get_args(hint)]
        kind = next((item for item in inner if isinstance(item, type) and dataclasses.is_dataclass(item)), None)
        if kind is not None and kind is not Batch and any(role_of(item.name) for item in dataclasses.fields(kind)):
            found[key] = kind
    return found


called = callable_module(__name__, bind)
