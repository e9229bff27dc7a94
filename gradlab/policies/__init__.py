"""Policies: parameters, a map from prefixes to per-step distributions, sampling, and enumeration where it is finite."""

from typing import Any

import torch

from gradlab._common.registry import Registry
from gradlab._common.streams import generator
from gradlab.policies.gaussian import Gaussian
from gradlab.policies.language import LanguageModel
from gradlab.policies.responses import Responses
from gradlab.policies.small import small
from gradlab.policies.tabular import Bandit, Markov, Tabular, Tree

Policy = Tabular | Gaussian | LanguageModel

#: Kinds of policy that can be made at random, by the name of the family in frames.
POLICIES: Registry[Any] = Registry("family", {"bandit": Bandit, "tree": Tree, "markov": Markov, "gaussian": Gaussian})

__all__ = [
    "POLICIES",
    "Bandit",
    "Gaussian",
    "LanguageModel",
    "Markov",
    "Policy",
    "Responses",
    "Tabular",
    "Tree",
    "check_policy_class",
    "small",
]


def check_policy_class(kind: type) -> None:
    """Raise `ValueError` unless a class of policies does what gradlab relies on, tried on one that its `random` makes.

    It is a `Tabular` with `contexts` (the row of logits that emits each token), `occupancy` (how often a row is visited) and a
    classmethod `random(…, seed)`. Tried are the shapes, that occupancy is the expected number of visits over all responses, and
    that `with_parameters` gives the policy back.

    >>> gl.policies.check_policy_class(gl.Tree)
    """
    if not isinstance(kind, type):
        raise ValueError(f"a class of policies is a gl.policies.Tabular, got {kind!r}")
    name = kind.__name__
    if not issubclass(kind, Tabular):
        raise ValueError(
            f"a class of policies is a gl.policies.Tabular with contexts, occupancy and random, got {name}; a network that reads "
            "prompts needs no class: gl.policies.LanguageModel takes it as it is"
        )
    if not callable(getattr(kind, "random", None)):
        raise ValueError(f"{name} needs a classmethod random(…, seed) that makes one, as gl.Tree.random does")
    try:
        policy = kind.random(seed=0)  # type: ignore[attr-defined]
        clone = policy.with_parameters(policy.parameters)
        drawn = policy.sample(8, generator(0, "check")).tokens
        occupancy = policy.occupancy()
        listed = policy.enumerate()
        tokens, mask = listed.tokens, listed.mask
        contexts = policy.contexts(tokens)
        log_prob = torch.where(mask, policy.family.log_prob(policy.table, contexts, tokens), 0.0)
    except Exception as error:
        raise ValueError(f"{name} cannot be used as a policy: {type(error).__name__}: {error}") from error
    weight = log_prob.sum(-1).exp()
    visits = torch.zeros(len(policy.table), dtype=torch.float64)
    visits.index_add_(0, contexts[mask], weight[:, None].expand_as(tokens)[mask])
    if drawn.shape != (8, policy.length) or contexts.shape != tokens.shape:
        raise ValueError(
            f"{name}.sample and contexts give tokens [n, {policy.length}], got {list(drawn.shape)}, {list(contexts.shape)}"
        )
    if not torch.allclose(clone.table, policy.table):
        raise ValueError(f"{name}.with_parameters(parameters) must give the same policy back, and its table differs")
    if (
        abs(float(weight.sum()) - 1) > 1e-9
        or occupancy.shape != visits.shape
        or not torch.allclose(occupancy, visits, atol=1e-9)
    ):
        raise ValueError(
            f"{name}.occupancy() is not how often the rows of its table are visited: over all responses it is "
            f"{[round(x, 4) for x in visits.tolist()[:6]]}, given {[round(x, 4) for x in occupancy.tolist()[:6]]}"
        )
    if not policy.revisits and any(
        len(set(row)) < len(row) for row in (r[m].tolist() for r, m in zip(contexts, mask, strict=True))
    ):
        raise ValueError(f"a response of {name} emits from one row more than once: set the class attribute revisits = True")
