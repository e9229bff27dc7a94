"""Which tokens carry the gradient of a language model, by name: what every token of every prefix brings, in parameter space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gradlab import exact
from gradlab.coefficients import coefficients
from gradlab.estimators import Estimator
from gradlab.measure import by_name
from gradlab.policies import LanguageModel
from gradlab.provenance import versions
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario

COLUMNS: dict[str, str] = {
    "scenario": "label of the scenario",
    "prompt": "number of the prompt",
    "prefix": "what was said before, in words",
    "token": "the token, in words",
    "side": "over-sampled (ℓ > 0) or under-sampled",
    "probability": "how often the token is drawn there in a response, under the sampler",
    "policy": "π(y|s)",
    "reference": "ref(y|s)",
    "log_ratio": "ℓ = log π − log ref, nats",
    "estimator": "catalogue or composed name",
    "coefficient": "mean coefficient on the token's score when it is drawn",
    "expected": "share of the expected gradient along the true one, signed; the shares of all tokens sum to 1",
    "second": "share of Σ_t E a_t² ‖∇log π_t‖², the second moment without what steps of one response share",
}


def tokens(estimators: Sequence[Estimator | str], scenario: Scenario) -> pd.DataFrame:
    """What each token of each prefix brings to the gradient, exact: one row per prompt, prefix, token and estimator.

    With `J` the Jacobian of the policy's logits, a token's score is `Jᵀ(onehot(y) − π)`; expected gradients are measured along the
    gradient of the reverse KL of responses. Tokens that are never drawn, behind an end token or outside a nucleus, are left out.
    Raises `ValueError` unless the policy is a language model whose responses can be listed, and for estimators that are not sums
    over sampled tokens (vocabulary kernels, group baselines).
    """
    policy = scenario.policy
    if not isinstance(policy, LanguageModel):
        raise ValueError(f"tokens are named by a language model; gl.asymmetry serves a {type(policy).__name__}")
    named = by_name(list(estimators))
    for name, estimator in named.items():
        if not isinstance(estimator, Estimator) or estimator.on_vocabulary or estimator.grouped:
            raise ValueError(f"{name} is not a sum over sampled tokens: use kernels of the sampled token and no group baseline")
    rollout = Rollout.enumerated(scenario)
    direction, length = geometry(policy, exact.gradient("reverse_kl", scenario))
    log_p, log_ref = rollout.table.log_softmax(-1), rollout.reference_table.log_softmax(-1)
    p, rows, v = log_p.exp(), *log_p.shape
    along = direction - (p * direction).sum(-1, keepdim=True)
    places = (rollout.contexts * v + rollout.tokens)[rollout.mask]
    weight = rollout.weight[:, None].expand_as(rollout.log_prob)[rollout.mask]

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(rows * v, dtype=torch.float64).index_add_(0, places, values).view(rows, v)

    drawn = summed(weight)
    kept = drawn > 0
    context, token = (part.numpy() for part in kept.nonzero().unbind(-1))
    words = [str(k) for k in range(v)] if policy.words is None else list(policy.words)
    common = {
        "scenario": scenario.label,
        "prompt": context // policy.nodes,
        "prefix": [_prefix(int(row) % policy.nodes, v, words) for row in context],
        "token": [words[k] for k in token],
        "side": np.where((log_p - log_ref)[kept].numpy() > 0, "over-sampled", "under-sampled"),
        "probability": drawn[kept].numpy(),
        "policy": p[kept].numpy(),
        "reference": log_ref.exp()[kept].numpy(),
        "log_ratio": (log_p - log_ref)[kept].numpy(),
    }
    parts = []
    for name, estimator in named.items():
        assert isinstance(estimator, Estimator)
        a = coefficients(estimator, rollout).score[rollout.mask]
        mean, square = summed(weight * a), summed(weight * a.square())
        expected, second = mean * along, square * length
        shares = {"expected": expected / expected.sum(), "second": second / second.sum(), "coefficient": mean / drawn}
        parts.append(pd.DataFrame({**common, "estimator": name, **{key: item[kept].numpy() for key, item in shares.items()}}))
    frame = pd.concat(parts, ignore_index=True)[list(COLUMNS)]
    frame.attrs.update(versions())
    return frame


def geometry(policy: LanguageModel, direction: Tensor) -> tuple[Tensor, Tensor]:
    """`J·direction` `[rows, v]` for a direction `[p]` of parameter space, and `‖∇log π(y|s)‖²` `[rows, v]` there.

    One backward pass per logit, of which the Jacobian of one row is held at a time.
    """
    with torch.enable_grad():
        theta = policy.parameters.detach().clone().requires_grad_(True)
        table = policy.with_parameters(theta).table
        logits = [row.unbind() for row in table.unbind()]
    p, along, lengths = table.detach().softmax(-1), torch.zeros_like(table), torch.zeros_like(table)
    with torch.no_grad():
        for row in range(len(logits)):
            jacobian = torch.stack([torch.autograd.grad(logit, theta, retain_graph=True)[0] for logit in logits[row]])
            jacobian = jacobian.double()
            along[row] = jacobian @ direction
            scores = torch.eye(len(p[row]), dtype=torch.float64) - p[row]
            lengths[row] = ((scores @ (jacobian @ jacobian.T)) * scores).sum(-1)
    return along, lengths


def _prefix(node: int, vocab: int, words: Sequence[str]) -> str:
    """The words on the way to a node of a breadth-first tree, whose children of node `i` start at `i·v + 1`."""
    said: list[str] = []
    while node:
        node, token = divmod(node - 1, vocab)
        said.append(words[token])
    return "".join(reversed(said))
