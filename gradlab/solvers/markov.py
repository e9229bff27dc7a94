"""Exact results on `Markov` chains by dynamic programming: nothing sampled, nothing enumerated, linear in the length.

A surrogate *decomposes over time* when it is a linear recursion: scalar states `c` of the response so far (1, the weight
`w = Π ρ`, sums of kernels …) that every token maps linearly, `c ← C(s_t, y_t) c`. Gradients follow by the product rule,

    X ← C X + (C' c) ⊗ φ_t + (C° c) ⊗ δ_t,      φ_t = ∇log π(y_t|s_t) the score,   δ_t = ∇D(s_t) of a vocabulary kernel,

with `C'`, `C°` the derivatives of `C` along them; what a surrogate detaches has derivative 0. On a chain `C` is a table over
(row, token), so the moments of a whole response close: pasts `E[c cᵀ]` run forward over the last token, a response is collected
where it ends, with its own normaliser, and `gradlab.solvers.visits` sums the squared gradient over pairs of visits to one row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from gradlab import targets
from gradlab._common.names import check_name
from gradlab.estimators.estimator import Estimator
from gradlab.moments import Loss, Moments, of_group
from gradlab.policies import Markov
from gradlab.policies.families import CATEGORICAL
from gradlab.rollout import Rollout
from gradlab.scenario import Scenario, is_of
from gradlab.solvers.recursions import (
    INITIALLY_ONE,
    NOTHING,
    ONE,
    Recursion,
    Rows,
    Step,
    kernel_step,
    recursion,
    whole_kernel,
    why_not_decomposable,
)
from gradlab.solvers.visits import Injection, Walk

METHOD = "dynamic programming"
#: `moments` is refused where its arrays `[v, v]` would need more than this.
MEMORY_BYTES = 2**32
#: Arrays `[v, v]` that list every step, before any recursion.
STEP_ARRAYS = 40
INSTEAD = "estimate it from samples (samples=…), or enumerate a short chain as gl.Tree"


# ------------------------------------------------------------------------------------------------------ public functions


def moments(estimator: Loss, scenario: Scenario) -> Moments:
    """Exact mean gradient `[p]` and covariance trace of an estimator, on Markov chains of any length.

    Covered is every `Estimator` — all kernels, placements, credits, weights (detached or differentiated), normalisers, clamps
    and baselines, complete Rao–Blackwell and group baselines included — except
    * `truncate` with weight `prefix` or `sequence` (with `token` it is local),
    * `clip`, unless weight and credit are both `token`,
    * credit `sequence` with kernel `abs` or a clamp.
    Those are not linear in anything that a step can update. With `v` tokens and length `T` the work is `v³ T`, and `v² T²` where
    a credit looks ahead; memory is 50 (`k2` as loss) to 600 (weighted `k3` of whole responses) arrays `[v, v]` of doubles, `.5 MB`
    each at 256 tokens, and up to 4,500 where a reward of such a weight is differentiated, which is also the slowest. Raises
    `ValueError` for what is not covered, for policies that are not `Markov`, where memory would exceed `MEMORY_BYTES`, and when
    a moment overflows.
    """
    _chains(scenario)
    reason = why_not_decomposable(estimator)
    if reason is not None or not isinstance(estimator, Estimator):
        raise ValueError(f"{reason}; {INSTEAD}")
    with torch.no_grad():
        solved = _solve(estimator, scenario)
        solved = replace(solved, mean=scenario.policy.balanced(solved.mean))
    if not (isfinite(solved.trace_cov) and bool(torch.isfinite(solved.mean).all())):
        raise ValueError(f"the moments of {estimator.name} are not finite: the policies are so far apart that they overflow")
    return solved


def decomposes(loss: Loss) -> bool:
    """Whether `moments` has a dynamic program for this loss."""
    return why_not_decomposable(loss) is None


def value_moments(kernel: str, scenario: Scenario, credit: str = "token") -> tuple[float, float]:
    """Mean and variance under the sampler of `Σ_t k(ℓ_t)` (credit `token`) or `k(S)` (`sequence`), on chains of any length.

    Raises `ValueError` for an unknown name, and for a whole-response kernel that is no running sum (`abs`, vocabulary).
    """
    policy, _, sampler = _chains(scenario)
    check_name("credit", credit, ("token", "sequence"))
    estimator = Estimator(kernel, credit="sequence" if credit == "sequence" else "token")
    reason = why_not_decomposable(estimator)
    if reason is not None:
        raise ValueError(f"{reason}; {INSTEAD}")
    with torch.no_grad():
        at = _steps(scenario)
        rows = whole_kernel(kernel, at, "u") if credit == "sequence" else {"k": {"k": ONE, "1": kernel_step(estimator, at)}}
        cc = _scalar_moments({"1": {"1": ONE}, **rows}, ["1", "k"], _emission(sampler), policy)
    return float(cc[0, 1]), max(float(cc[1, 1] - cc[0, 1].square()), 0.0)


def objective(target: str, scenario: Scenario) -> float:
    """The value of a target (`gl.TARGETS`) on Markov chains, in nats where it is a divergence."""
    with torch.no_grad():
        return float(_objective(target, *_chains(scenario)))


def target_gradient(target: str, scenario: Scenario) -> Tensor:
    """Gradient `[p]` of a target (`gl.TARGETS`) with respect to the policy's logits, initial row first.

    `reverse_kl` is the policy gradient theorem in closed form; the others differentiate a recursion linear in the length.
    """
    policy, reference, sampler = _chains(scenario)
    if target == "reverse_kl":
        return _reverse_kl_gradient(policy, reference)
    with torch.enable_grad():
        leaf = policy.parameters.detach().requires_grad_(True)
        (derivative,) = torch.autograd.grad(_objective(target, policy.with_parameters(leaf), reference, sampler), leaf)
    return policy.balanced(derivative)


# ------------------------------------------------------------------------------------------------------- the forward pass


def _solve(e: Estimator, scenario: Scenario) -> Moments:
    """Run the estimator's recursion and read its moments off the ends."""
    policy, _, sampler = _chains(scenario)
    _check_memory(STEP_ARRAYS, policy.vocab, e)
    at = _steps(scenario)
    program = recursion(e, at)
    c, x = _needed(program)
    walk = _walk(e, scenario, at, program.rows, c, x)
    _check_memory(STEP_ARRAYS + walk.arrays, policy.vocab, e)
    one, g = _selector(c, "1"), _selector(x, *program.surrogate)
    if program.score_sum is None:
        mean, square = walk.mean(g, one), walk.square(torch.outer(g, g)[None])
        return Moments(mean, max(float(square[0] - mean @ mean), 0.0), method=METHOD)
    # A centred coefficient a, score sum s and g = a s.
    cc = _scalar_moments(program.rows, c, _emission(sampler), policy)
    a, s = _selector(c, program.coefficient), _selector(x, program.score_sum)
    average = one @ cc @ a
    a, g = a - average * one, g - average * s
    centre, mean, second, spread = walk.mean(s, one), walk.mean(g, one), walk.mean(g, a), a @ cc @ a
    square_g, square_s = walk.square(torch.stack([torch.outer(g, g), torch.outer(s, s)]))
    m22 = square_g - 2 * second @ centre + spread * (centre @ centre)
    zeta1 = (m22 - mean @ mean) / 4
    zeta2 = (m22 + spread * (square_s - centre @ centre)) / 2
    return of_group(e, mean, zeta1, zeta2, METHOD)


def _check_memory(arrays: int, vocab: int, e: Estimator) -> None:
    """Raise `ValueError` where so many arrays `[v, v]` are more than `MEMORY_BYTES`."""
    if 8 * arrays * vocab**2 > MEMORY_BYTES:
        raise ValueError(
            f"the moments of {e.name} on a chain of {vocab} tokens hold at least {arrays} arrays [{vocab}, {vocab}], "
            f"{8 * arrays * vocab**2 / 2**30:.2g} GiB, more than the {MEMORY_BYTES / 2**30:.2g} GiB allowed; take a smaller vocabulary, or "
            "estimate them from samples (samples=…)"
        )


def _needed(program: Recursion) -> tuple[list[str], list[str]]:
    """The states whose values are read, 1 first, and those whose gradients move."""
    rows, outputs = program.rows, [*program.surrogate, *([program.score_sum] if program.score_sum else [])]
    differentiated = {
        state for state in rows if any(step.has_gradient for old in _dependencies([state], rows) for step in rows[old].values())
    }
    x = [state for state in _dependencies(outputs, rows) if state in differentiated or state in outputs]
    sources = [old for state in x for old, step in rows[state].items() if step.has_gradient]
    return _dependencies(["1", program.coefficient, *sources], rows), x


def _walk(e: Estimator, scenario: Scenario, at: Rollout, rows: Rows, c: list[str], x: list[str]) -> Walk:
    """The recursion between the states `c`, and between the gradients of the states `x`."""
    policy, _, sampler = _chains(scenario)
    pi = at.table.softmax(-1)
    score = Injection(_matrices(rows, x, c, 1, pi), 1.0, -pi, CATEGORICAL.score_norms(at.table))  # onehot(y) − π
    injected = [score]
    if e.on_vocabulary:
        slope = at.family.slope(e.kernel, at.table, at.reference_table)
        norm = slope.square().sum(-1, keepdim=True).expand_as(slope)
        injected.append(Injection(_matrices(rows, x, c, 2, pi), 0.0, slope, norm))
    lengths = torch.arange(1, policy.length + 1).to(pi.dtype)
    constant = {"sum": 1.0, "fixed": 1 / policy.length, "token_mean": 1 / float(sampler.occupancy().sum())}
    if policy.eos is None:
        lengths[:] = policy.length
    scale = torch.full_like(lengths, constant[e.normalise]) if e.normalise in constant else 1 / lengths
    uncoupled = all(set(rows[state]) & set(x) == {state} and rows[state][state].equals(ONE) for state in x)
    settled = uncoupled and (policy.eos is None or e.normalise in constant)
    between_c, between_x = (_matrices(rows, states, states, 0, pi) for states in (c, x))
    start = _selector(c, *(state for state in c if state in INITIALLY_ONE))
    return Walk(_emission(sampler), between_c, between_x, tuple(injected), start, scale, policy.eos, settled)


def _scalar_moments(rows: Rows, states: list[str], mu: Tensor, policy: Markov) -> Tensor:
    """`E[c cᵀ]` of whole responses for `c = (*states, …)` under the emissions `mu` `[r, v]`; differentiable."""
    c = _dependencies(states, rows)
    table, cc, ended = _matrices(rows, c, c, 0, mu), _start(c)[None], torch.zeros(len(c), len(c), dtype=mu.dtype)
    for t in range(1, policy.length + 1):
        part = slice(0, 1) if t == 1 else slice(1, None)
        cc = (mu[part, :, None, None] * (table[part] @ cc[:, None] @ table[part].mT)).sum(0)
        if policy.eos is not None and t < policy.length:
            ended = ended + cc[policy.eos]
    return ended + cc.sum(0)


def _dependencies(states: Iterable[str], rows: Rows) -> list[str]:
    """The states and all that they are updated from."""
    states_needed = list(dict.fromkeys(states))
    for state in states_needed:  # grows while it is read
        states_needed += [
            old for old, step in rows[state].items() if old not in states_needed and any(part.any() for part in step.parts)
        ]
    return states_needed


def _matrices(rows: Rows, new: list[str], old: list[str], part: int, like: Tensor) -> Tensor:
    """`C`, `C'` or `C°` (part 0, 1, 2) between the given states, `[r, v, new, old]`."""
    entries = [torch.stack([rows[a].get(b, NOTHING).parts[part].expand_as(like) for b in old], -1) for a in new]
    return torch.stack(entries, -2)


def _start(states: list[str]) -> Tensor:
    """`c cᵀ` before the first token."""
    c = torch.tensor([float(state in INITIALLY_ONE) for state in states], dtype=torch.float64)
    return torch.outer(c, c)


def _selector(states: list[str], *chosen: str) -> Tensor:
    """The combination of states that adds up the chosen ones."""
    return torch.tensor([float(chosen.count(state)) for state in states], dtype=torch.float64)


def _emission(policy: Markov) -> Tensor:
    """Probabilities `[r, v]` of the next token, 0 after the end of a response."""
    return policy.table.softmax(-1) * _emits(policy)


def _emits(policy: Markov) -> Tensor:
    """1 for rows that emit, 0 for the row after the end token, `[r, 1]`."""
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
    if not is_of(scenario, Markov):
        kind = type(scenario.policy).__name__
        raise ValueError(f"dynamic programming needs gl.Markov policies, got {kind}; a {kind} is solved by enumeration")
    return scenario.policy, scenario.reference, scenario.sampler


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
        gap = CATEGORICAL.gaps(policy.table, reference.table)
        rows = {"u": {"u": Step(ref)}, "d": {"d": Step(pi), "u": Step(gap)}}
        return 0.5 * _scalar_moments(rows, ["d"], _emits(policy).expand_as(pi), policy)[0, 0]
    return targets.TARGETS.named(target).objective(policy, reference, sampler)


def _inverse_length(policy: Markov) -> Tensor:
    """`E[1/L] = 1/T + Σ_t P(L = t) (1/t − 1/T)`, from the probability of ending at every step."""
    total = 1 / policy.length + 0 * policy.table.sum()
    if policy.eos is None:
        return total
    p = _emission(policy)
    state = p[0]
    for t in range(1, policy.length):
        total = total + state[policy.eos] * (1 / t - 1 / policy.length)
        state = state @ p[1:]
    return total


def _reverse_kl_gradient(policy: Markov, reference: Markov) -> Tensor:
    """`∇KL(π‖ref)`, whose row `s` is `Σ_t d_t(s) π(y|s) (ℓ(s, y) + V_{t+1}(y) − V_t(s))`.

    `d_t` is the chance of emitting token `t` from row `s` and `V_t` the KL still to come; the sum over `t` is one matrix product.
    """
    p, log_ratio = _emission(policy), CATEGORICAL.log_ratios(policy.table, reference.table)
    kl, transition = CATEGORICAL.reverse_kl(policy.table, reference.table) * _emits(policy)[:, 0], p[1:]
    visits, kl_to_go = p.new_zeros(policy.length, policy.vocab), p.new_zeros(policy.length, policy.vocab)
    visits[0] = p[0]
    for t in range(1, policy.length):  # visits[t − 2] is d_t and to_come[t − 2] is V_t, both over the token before
        visits[t] = visits[t - 1] @ transition
        kl_to_go[-1 - t] = torch.addmv(kl[1:], transition, kl_to_go[-t])
    later = visits[:-1].sum(0)[:, None] * log_ratio[1:] + visits[:-1].T @ kl_to_go[1:]
    weighted = p * torch.cat([(log_ratio[0] + kl_to_go[0])[None], later])
    return CATEGORICAL.along_scores(weighted, policy.table).flatten()
