"""Exact results on `Markov` chains by dynamic programming: nothing sampled, nothing enumerated, linear in the length.

A surrogate *decomposes over time* when it is a linear recursion: scalar states `c` of the response so far (1, the weight
`w = Π ρ`, sums of kernels …) that every token maps linearly, `c ← C(s_t, y_t) c`. Gradients follow by the product rule,

    X ← C X + (C' c) ⊗ φ_t + (C° c) ⊗ δ_t,      φ_t = ∇log π(y_t|s_t) the score,   δ_t = ∇D(s_t) of a vocabulary kernel,

with `C'`, `C°` the derivatives of `C` along them; what a surrogate detaches has derivative 0. On a chain `C` is a table over
(row, token), so with the last token as state the second moments close, each averaged over the token drawn:

    E[c cᵀ]  ← C E[c cᵀ] Cᵀ
    E[c ⊗ X] ← C E[c ⊗ X] Cᵀ + C E[c cᵀ] C'ᵀ ⊗ φ
    E[X Xᵀ]  ← C E[X Xᵀ] Cᵀ + C E[(X·φ) cᵀ] C'ᵀ + (…)ᵀ + ‖φ‖² C' E[c cᵀ] C'ᵀ     (traced over parameters; likewise δ).

The recursion runs forward: a response is collected where it ends, with its own normaliser, and a forward moment is a sum
over pasts without subtractions. `φ` and `δ` fill one table row, so only moving `E[c ⊗ X]` costs `v² p` a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import torch
from torch import Tensor

from gradlab import targets
from gradlab.estimators import Estimator
from gradlab.moments import Loss, Moments, of_group
from gradlab.names import check_name
from gradlab.policies import Markov
from gradlab.recursions import NOTHING, ONE, UNITS, Recursion, Rows, Step, kernel_step, obstacle, recursion, whole_kernel
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario

METHOD = "dynamic programming"
INSTEAD = "estimate it from samples (samples=…), or enumerate a short chain as gl.Tree"


# ------------------------------------------------------------------------------------------------------ public functions


def moments(estimator: Loss, scenario: Scenario) -> Moments:
    """Exact mean gradient `[p]` and covariance trace of an estimator, on Markov chains of any length.

    Covered is every `Estimator` — all kernels, placements, credits, weights (detached or differentiated), normalisers, clamps
    and baselines, complete Rao–Blackwell and group baselines included — except
    * `truncate` with weight `prefix` or `sequence` (with `token` it is local),
    * `clip`, unless weight and credit are both `token`,
    * credit `sequence` with kernel `abs` or a clamp.
    Those are not linear in anything that a step can update. Raises `ValueError` for them, for any other callable, for
    policies that are not `Markov`, and when a moment overflows.
    """
    _chains(scenario)
    hindrance = obstacle(estimator)
    if hindrance is not None or not isinstance(estimator, Estimator):
        raise ValueError(f"{hindrance}; {INSTEAD}")
    with torch.no_grad():
        found = _solve(estimator, scenario)
    if not (isfinite(found.trace_cov) and bool(torch.isfinite(found.mean).all())):
        raise ValueError(f"the moments of {estimator.name} are not finite: the policies are so far apart that they overflow")
    return found


def decomposes(loss: Loss) -> bool:
    """Whether `moments` has a dynamic program for this loss."""
    return obstacle(loss) is None


def value_moments(kernel: str, scenario: Scenario, credit: str = "token") -> tuple[float, float]:
    """Mean and variance under the sampler of `Σ_t k(ℓ_t)` (credit `token`) or `k(S)` (`sequence`), on chains of any length.

    Raises `ValueError` for an unknown name, and for a whole-response kernel that is no running sum (`abs`, vocabulary).
    """
    policy, _, sampler = _chains(scenario)
    check_name("credit", credit, ("token", "sequence"))
    estimator = Estimator(kernel, credit="sequence" if credit == "sequence" else "token")
    hindrance = obstacle(estimator)
    if hindrance is not None:
        raise ValueError(f"{hindrance}; {INSTEAD}")
    with torch.no_grad():
        at = _steps(scenario)
        rows = whole_kernel(kernel, at, "u") if credit == "sequence" else {"k": {"k": ONE, "1": kernel_step(estimator, at)}}
        cc = _scalar_moments({"1": {"1": ONE}, **rows}, ["1", "k"], _emission(sampler), policy)
    return float(cc[0, 1]), max(float(cc[1, 1] - cc[0, 1].square()), 0.0)


def objective(target: str, scenario: Scenario) -> float:
    """The value of a target (`gl.TARGETS`) on Markov chains, in nats where it is a divergence."""
    with torch.no_grad():
        return float(_objective(target, *_chains(scenario)))


def gradient(target: str, scenario: Scenario) -> Tensor:
    """Gradient `[p]` of a target (`gl.TARGETS`) with respect to the policy's logits, initial row first.

    `reverse_kl` is the policy gradient theorem in closed form; the others differentiate a recursion linear in the length.
    """
    policy, reference, sampler = _chains(scenario)
    if target == "reverse_kl":
        return _reverse_kl_gradient(policy, reference)
    with torch.enable_grad():
        leaf = policy.parameters.detach().requires_grad_(True)
        (found,) = torch.autograd.grad(_objective(target, policy.with_parameters(leaf), reference, sampler), leaf)
    return found


# ------------------------------------------------------------------------------------------------------- the forward pass


def _solve(e: Estimator, scenario: Scenario) -> Moments:
    """Run the estimator's recursion and read its moments off the ends."""
    at = _steps(scenario)
    program = recursion(e, at)
    c, x = _needed(program)
    cc, cx, xx = _forward(_Transition(e, scenario, at, program.rows, c, x), e, scenario)
    g = _pick(x, *program.surrogate)
    if program.score_sum is None:
        mean = g @ cx[0]
        return Moments(mean, max(float(g @ xx @ g - mean @ mean), 0.0), method=METHOD)
    # A centred coefficient a, score sum s and g = a s.
    a, s = _pick(c, program.coefficient), _pick(x, program.score_sum)
    average = a @ cc[0]
    a, g = a - average * _pick(c, "1"), g - average * s
    centre, mean, second, spread = s @ cx[0], g @ cx[0], a @ (g @ cx), a @ cc @ a
    m22 = g @ xx @ g - 2 * second @ centre + spread * (centre @ centre)
    zeta1 = (m22 - mean @ mean) / 4
    zeta2 = (m22 + spread * (s @ xx @ s - centre @ centre)) / 2
    return of_group(e, mean, zeta1, zeta2, METHOD)


def _needed(program: Recursion) -> tuple[list[str], list[str]]:
    """The states whose values are read, 1 first, and those whose gradients move."""
    rows, outputs = program.rows, [*program.surrogate, *([program.score_sum] if program.score_sum else [])]
    moving = {state for state in rows if any(step.pulls for old in _reach([state], rows) for step in rows[old].values())}
    x = [state for state in _reach(outputs, rows) if state in moving or state in outputs]
    pulled = [old for state in x for old, step in rows[state].items() if step.pulls]
    return _reach(["1", program.coefficient, *pulled], rows), x


def _forward(transition: _Transition, e: Estimator, scenario: Scenario) -> list[Tensor]:
    """`E[c cᵀ]` `[k, k]`, `E[c ⊗ X]` `[k, m, p]`, `E[X Xᵀ]` `[m, m]` of whole responses, `X` with its normaliser."""
    policy, _, sampler = _chains(scenario)
    scales = {"sum": 1.0, "fixed": 1 / policy.length, "token_mean": 1 / float(sampler.occupancy().sum())}
    state = transition.start
    totals = [torch.zeros_like(moment[0]) for moment in state]
    for t in range(1, policy.length + 1):
        state = transition(state, slice(0, 1) if t == 1 else slice(1, None))
        if t == policy.length or policy.eos is not None:
            scale = scales.get(e.normalise, 1 / t)
            for power, (total, moment) in enumerate(zip(totals, state, strict=True)):
                total.add_(moment.sum(0) if t == policy.length else moment[policy.eos], alpha=scale**power)
    return totals


#: `E[c cᵀ]` `[row, k, k]`, `E[c ⊗ X]` `[row, k, m, p]` and `E[X Xᵀ]` `[row, m, m]` of responses about to emit from a row.
Joint = tuple[Tensor, Tensor, Tensor]


class _Transition:
    """One step of the forward recursion. Its arrays run over (row, token) `[r, v]`, matrices between states come last."""

    def __init__(self, e: Estimator, scenario: Scenario, at: Rollout, rows: Rows, c: list[str], x: list[str]) -> None:
        (r, v), pi = at.table.shape, at.table.softmax(-1)
        self.start = _start(c)[None], pi.new_zeros(1, len(c), len(x), r * v), pi.new_zeros(1, len(x), len(x))
        self.mu = _emission(_chains(scenario)[2])[..., None, None]
        self.c, self.x = (_matrices(rows, states, states, 0, pi) for states in (c, x))
        #: What C' and C° inject, and the direction in the row it goes, `[r, y, v]`: φ = onehot(y) − π, and δ.
        self.injected = [(_matrices(rows, x, c, 1, pi), torch.eye(v, dtype=pi.dtype) - pi[:, None])]
        if e.on_vocabulary:
            slope = at.family.slope(e.kernel, at.table, at.reference_table)
            self.injected.append((_matrices(rows, x, c, 2, pi), slope[:, None].expand(r, v, v)))
        self.products = [
            (inject, other, (along * beside).sum(-1)[..., None, None])
            for inject, along in self.injected
            for other, beside in self.injected
        ]
        self.moves = [
            (i, j, k, m, (self.mu[..., 0, 0] * self.c[..., i, k] * self.x[..., j, m]).T.contiguous())
            for i, k in self.c.flatten(0, 1).any(0).nonzero().tolist()
            for j, m in self.x.flatten(0, 1).any(0).nonzero().tolist()
        ]

    def __call__(self, state: Joint, part: slice) -> Joint:
        """Draw a token from each of the rows `part`, which `state` covers; the last token is the next row."""
        cc, cx, xx = state
        mu, c, x, (r, v) = self.mu[part], self.c[part], self.x[part], self.mu.shape[:2]
        moved = cx.new_zeros(v, *cx.shape[1:])
        for i, j, k, m, move in self.moves:
            moved[:, i, j].addmm_(move[:, part], cx[:, k, m])
        rows = moved.view(*moved.shape[:3], r, v)[:, :, :, part]
        own = cx.view(*cx.shape[:3], r, v)[:, :, :, part].diagonal(dim1=0, dim2=3).permute(3, 2, 0, 1)  # [r, v, k, m]
        before, square = c @ cc[:, None], x @ xx[:, None] @ x.mT
        for inject, along in self.injected:
            flow = mu * (before @ inject[part].mT)  # [r, v, k, m]
            rows += flow.permute(1, 2, 3, 0)[..., None] * along[part].transpose(0, 1)[:, None, None]
            cross = x @ (along[part] @ own.flatten(2)).view(own.shape).mT @ inject[part].mT
            square = square + cross + cross.mT
        for inject, other, product in self.products:
            square = square + product[part] * (inject[part] @ cc[:, None] @ other[part].mT)
        return (mu * (before @ c.mT)).sum(0), moved, (mu * square).sum(0)


def _scalar_moments(rows: Rows, states: list[str], mu: Tensor, policy: Markov) -> Tensor:
    """`E[c cᵀ]` of whole responses for `c = (*states, …)` under the emissions `mu` `[r, v]`; differentiable."""
    c = _reach(states, rows)
    table, cc, ended = _matrices(rows, c, c, 0, mu), _start(c)[None], torch.zeros(len(c), len(c), dtype=mu.dtype)
    for t in range(1, policy.length + 1):
        part = slice(0, 1) if t == 1 else slice(1, None)
        cc = (mu[part, :, None, None] * (table[part] @ cc[:, None] @ table[part].mT)).sum(0)
        if policy.eos is not None and t < policy.length:
            ended = ended + cc[policy.eos]
    return ended + cc.sum(0)


def _reach(states: Iterable[str], rows: Rows) -> list[str]:
    """The states and all that they are updated from."""
    found = list(dict.fromkeys(states))
    for state in found:  # grows while it is read
        found += [old for old, step in rows[state].items() if old not in found and any(part.any() for part in step.parts)]
    return found


def _matrices(rows: Rows, new: list[str], old: list[str], part: int, like: Tensor) -> Tensor:
    """`C`, `C'` or `C°` (part 0, 1, 2) between the given states, `[r, v, new, old]`."""
    entries = [torch.stack([rows[a].get(b, NOTHING).parts[part].expand_as(like) for b in old], -1) for a in new]
    return torch.stack(entries, -2)


def _start(states: list[str]) -> Tensor:
    """`c cᵀ` before the first token."""
    c = torch.tensor([float(state in UNITS) for state in states], dtype=torch.float64)
    return torch.outer(c, c)


def _pick(states: list[str], *chosen: str) -> Tensor:
    """The combination of states that adds up the chosen ones."""
    return torch.tensor([float(chosen.count(state)) for state in states], dtype=torch.float64)


def _emission(policy: Markov) -> Tensor:
    """Probabilities `[r, v]` of the next token, 0 behind the end of a response."""
    return policy.table.softmax(-1) * _open(policy)


def _open(policy: Markov) -> Tensor:
    """1 for rows that emit, 0 for the row behind the end token, `[r, 1]`."""
    rows = torch.arange(len(policy.table))
    return (rows != (-1 if policy.eos is None else 1 + policy.eos)).to(policy.table.dtype)[:, None]


def _steps(scenario: Scenario) -> Rollout:
    """Every (row, token) as a response of one token, row-major."""
    policy, reference, sampler = _chains(scenario)
    r, v = policy.table.shape
    tokens, contexts = torch.arange(v).repeat(r)[:, None], torch.arange(r).repeat_interleave(v)[:, None]
    weight, mask = torch.full((r * v,), 1 / (r * v), dtype=torch.float64), torch.ones_like(tokens, dtype=torch.bool)
    return Rollout(tokens, mask, weight, contexts, policy.table, reference.table, sampler.table, policy.length)


def _chains(scenario: Scenario) -> tuple[Markov, Markov, Markov]:
    """Policy, reference and sampler. Raises `ValueError` if they are not `Markov`."""
    policy, reference, sampler = scenario.policy, scenario.reference, scenario.sampler
    if not (isinstance(policy, Markov) and isinstance(reference, Markov) and isinstance(sampler, Markov)):
        kind = type(policy).__name__
        raise ValueError(f"dynamic programming needs gl.Markov policies, got {kind}; a {kind} is solved by enumeration")
    return policy, reference, sampler


# -------------------------------------------------------------------------------------------------------------- the targets


def _objective(target: str, policy: Markov, reference: Markov, sampler: Markov) -> Tensor:
    """A target's value, differentiable in the policy's table: where its definition enumerates responses, a recursion."""
    if target == "inverse_length":
        return _inverse_length(policy)
    if target == "k2_value":
        rows = whole_kernel("k2", _steps(Scenario(policy, reference)), "1")
        return _scalar_moments(rows, ["1", "k"], _emission(policy), policy)[0, 1]
    if target == "mse":  # d = π(y) − ref(y) so far, squared and summed over responses: no difference of large sums
        pi, ref = policy.table.softmax(-1), reference.table.softmax(-1)
        rows = {"u": {"u": Step(ref)}, "d": {"d": Step(pi), "u": Step(pi - ref)}}
        return 0.5 * _scalar_moments(rows, ["d"], _open(policy).expand_as(pi), policy)[0, 0]
    return targets.target(target).objective(policy, reference, sampler)


def _inverse_length(policy: Markov) -> Tensor:
    """`E[1/L]`, from the probability of ending at every step."""
    if policy.eos is None:
        return 1 / policy.length + 0 * policy.table.sum()
    p, total = _emission(policy), 0 * policy.table.sum()
    state = p[0]
    for t in range(1, policy.length):
        total = total + state[policy.eos] / t
        state = state @ p[1:]
    return total + state.sum() / policy.length


def _reverse_kl_gradient(policy: Markov, reference: Markov) -> Tensor:
    """Row `s` of `∇KL(π‖ref)` is `Σ_t d_t(s) π(y|s) (ℓ(s, y) + V_{t+1}(y) − V_t(s))`, with `d_t` the chance of emitting token
    `t` from row `s` and `V_t` the KL still to come; the sum over `t` is one matrix product."""
    pi, p = policy.table.softmax(-1), _emission(policy)
    log_ratio = policy.table.log_softmax(-1) - reference.table.log_softmax(-1)
    kl, move = (p * log_ratio).sum(-1), p[1:]
    visits, to_come = p.new_zeros(policy.length, policy.vocab), p.new_zeros(policy.length, policy.vocab)
    visits[0] = p[0]
    for t in range(1, policy.length):  # visits[t − 2] is d_t and to_come[t − 2] is V_t, both over the token before
        visits[t] = visits[t - 1] @ move
        to_come[-1 - t] = torch.addmv(kl[1:], move, to_come[-t])
    later = visits[:-1].sum(0)[:, None] * log_ratio[1:] + visits[:-1].T @ to_come[1:]
    taken = p * torch.cat([(log_ratio[0] + to_come[0])[None], later])
    return (taken - pi * taken.sum(-1, keepdim=True)).flatten()
