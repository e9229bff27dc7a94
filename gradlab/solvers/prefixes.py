"""Exact moments on trees by sums over prefixes: of most estimators no response is listed.

The steps of a response emit from different rows, so their gradients are orthogonal, and the mean gradient and `E‖g‖²` need no more
than two moments of the coefficient of every prefix and next token, over the responses that go on from there. Mostly it has the form

    a_t = h(y) (α_t + β_t Σ_{u>t} f_u),

with `h` of the whole response (`1/L`, `Π ρ`, `k(S)` …), and `α`, `β`, `f` of a prefix and its next token. A pass up the tree sums
`μ h` and `μ h²` over the responses behind every token, and carries mean and variance of what is still to come. Time and memory
grow with the number of parameters, not with that of responses times their length. What has another form is listed, in parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from gradlab.estimators.coefficients import ahead, coefficients
from gradlab.estimators.estimator import Estimator, kernel_values, scale, weights
from gradlab.moments import CANCELLED, Moments, check_finite, group_statistics, of_group
from gradlab.policies import Bandit, Tree
from gradlab.policies.families import CATEGORICAL
from gradlab.policies.softmax import rows
from gradlab.scenario import Scenario

#: What has a row of logits for every prefix.
Prefixed = Scenario[Bandit] | Scenario[Tree]
#: Doubles of an array over estimators, prefixes and tokens: those of small trees are worked on together.
TOGETHER = 2**17
#: Tokens of responses that are listed at a time.
LISTED = 2**16


def moments(estimators: Sequence[Estimator], scenario: Prefixed, method: str) -> tuple[list[Moments], list[int]]:
    """Exact moments on a `Tree` or `Bandit`, and which of them lost digits: their traces are small differences of large numbers.

    Estimators that compare responses are averaged over all groups.
    """
    paths = Paths(scenario)
    alone = {e: _alone(estimator) for e, estimator in enumerate(estimators) if estimator.grouped}
    before = list(dict.fromkeys(alone.values()))
    single = [e for e in range(len(estimators)) if e not in alone]
    single.sort(key=lambda e: _kind(estimators[e], paths))  # so that those done together are alike; what is listed comes last
    made: list[Callable[[], Form | Totals]] = [
        partial(paths.product, estimator, power) for estimator in before for power in range(3)
    ]
    made += [partial(paths.form, estimators[e]) for e in single]
    means, squares, norms = list[Tensor](), list[float](), list[float]()
    size = max(1, TOGETHER // paths.mass.numel())
    for start in range(0, len(made), size):
        mean, square = paths.sums([make() for make in made[start : start + size]])
        means += mean.unbind()
        squares += square
        norms += mean.square().sum(-1).tolist()
    traces = [max(square - norm, 0.0) for square, norm in zip(squares, norms, strict=True)]
    grouped = 3 * len(before)
    moments_by_estimator = {e: Moments(means[i], traces[i], method=method) for i, e in enumerate(single, grouped)}
    for i, estimator in zip(range(0, grouped, 3), before, strict=True):
        of_sums = torch.tensor(squares[i : i + 2], dtype=torch.float64)
        statistics = group_statistics(means[i : i + 3], of_sums, paths.spread(estimator))
        moments_by_estimator |= {e: of_group(estimators[e], *statistics, method) for e in alone if alone[e] == estimator}
    ordered = [moments_by_estimator[e] for e in range(len(estimators))]
    check_finite(estimators, ordered)
    return ordered, [e for i, e in enumerate(single, grouped) if traces[i] < CANCELLED * norms[i]]


@lru_cache(maxsize=256)
def _alone(e: Estimator) -> Estimator:
    """An estimator that compares responses, before its baseline."""
    return replace(e, baseline=None, group=None)


def _has_form(e: Estimator) -> bool:
    """Whether an estimator's coefficients have the form above."""
    if e.credit == "sequence":
        return True
    if e.clip is not None:
        return (e.weight, e.credit) == ("token", "token")
    if e.differentiate_weight:
        in_reward = e.placement in ("reward", "loss+reward")
        return (e.weight, e.credit) == ("token", "token") if in_reward else e.weight != "sequence"
    return e.credit != "return" or (e.placement == "reward" and e.baseline is None)


def _kind(e: Estimator, paths: Paths) -> int:
    """0 where the form has a factor of the whole response, 1 where it has none, 2 where there is no form."""
    by_length = e.normalise == "mean" and paths.eos is not None
    of_response = e.credit in ("return", "sequence") or e.weight == "sequence" or by_length
    return 2 if not _has_form(e) else 0 if of_response else 1


def _local(e: Estimator) -> Estimator:
    """An estimator without what belongs to whole responses: normaliser and weight `sequence`."""
    weighs = e.weight == "sequence" and e.credit != "sequence"
    return _stripped(e, weighs) if weighs or e.normalise != "sum" else e


@lru_cache(maxsize=256)
def _stripped(e: Estimator, weighs: bool) -> Estimator:
    return replace(e, normalise="sum", weight="none", truncate=None) if weighs else replace(e, normalise="sum")


@dataclass(frozen=True, eq=False)
class Form:
    """The numbers of a surrogate's recursion over prefixes and tokens.

    `[n, 1]`: `α`, and what later steps add, `(β, f)`; `h` at the ends of responses `[m, 1]`, where it is not 1; and `[n, 1]` the
    coefficient on the gradient of a vocabulary kernel.
    """

    own: Tensor
    whole: Tensor | None = None
    later: tuple[Tensor, Tensor] | None = None
    direct: Tensor | None = None
    kernel: str = ""


@dataclass(frozen=True, eq=False)
class Totals:
    """`E[a]` and `E[a²]` of coefficients on the scores, at every prefix and token, `[e, n]`, and those of other coefficients."""

    first: Tensor
    second: Tensor
    direct: Sequence[Direct] = ()


@dataclass(frozen=True, eq=False)
class Direct:
    """Of the estimators `of` with coefficients `b` on the gradient of a vocabulary kernel: `E[b]`, `E[ab]` and `E[b²]`, `[k, n]`."""

    of: Tensor
    kernel: str
    once: Tensor
    crossed: Tensor
    twice: Tensor


@dataclass(frozen=True, eq=False)
class View:
    """What estimators read (`gradlab.rollout.Readings`) through a function from prefixes and tokens `[n]` to responses `[m, t]`."""

    paths: Paths
    read: Callable[[Tensor], Tensor]
    mask: Tensor
    unpadded: bool = True
    sampled: bool = False
    _cache: dict[Hashable, Tensor] = field(default_factory=dict)

    @cached_property
    def log_prob(self) -> Tensor:
        return self.read(self.paths.log_prob)

    @cached_property
    def reference_log_prob(self) -> Tensor:
        return self.read(self.paths.reference_log_prob)

    @cached_property
    def log_ratio(self) -> Tensor:
        return self.read(self.paths.log_ratio)

    @cached_property
    def log_weight(self) -> Tensor:
        return self.read(self.paths.log_weight)

    @cached_property
    def earlier_log_weight(self) -> Tensor:
        return self.read(self.paths.earlier_log_weight)

    def divergence(self, kernel: str) -> Tensor:
        return self.cached(kernel, lambda: self.read(self.paths.divergence(kernel)))

    @cached_property
    def mask_float(self) -> Tensor:
        return self.mask.double()

    @cached_property
    def lengths(self) -> Tensor:
        return self.read(torch.ones_like(self.paths.mass)).sum(-1)

    @property
    def length(self) -> int:
        return self.paths.length

    @property
    def mean_length(self) -> float:
        return float(self.paths.mass.sum())

    def cached(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        if self.paths.large:
            return compute()
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


class Paths:
    """The prefixes of a tree `[r]` with their next tokens `[n = r·v]`, breadth-first: token `i` leads to prefix `i + 1`."""

    def __init__(self, scenario: Prefixed) -> None:
        policy, reference, sampler = scenario.policy, scenario.reference, scenario.sampler
        self.table, self.reference = _lasting(policy.table), _lasting(reference.table)
        self.behaviour = self.table if sampler is policy else _lasting(sampler.table)
        self.large = policy.table.numel() > TOGETHER  # what estimators share would take more memory than their results
        self.length, self.eos, self.vocab = policy.length, policy.eos, policy.vocab
        self.sizes = [self.vocab ** (t + 1) for t in range(self.length)]  # of tokens after prefixes of every length
        # What lies after an end token may hold anything.
        self.possible = None if self.eos is None else policy.with_parameters(0 * policy.parameters).occupancy() > 0
        self.mass = self.so_far(self._masked(rows(self.behaviour).p), torch.Tensor.mul_)
        all_of_them = torch.ones(len(self.mass), 1, dtype=torch.bool)
        self.steps = View(self, lambda values: values[:, None], all_of_them)
        self.responses = View(self, self._total, all_of_them[self.ends])
        self._centred: dict[Estimator, Tensor] = {}
        self._slopes: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    # ---- what the policies say of every prefix and token ----------------------------------------------------------------------

    def _masked(self, table: Tensor) -> Tensor:
        """Values `[r, v]` as `[n]`, 0 after the end of a response."""
        return (table if self.possible is None else torch.where(self.possible[:, None], table, 0.0)).flatten()

    @cached_property
    def ones(self) -> Tensor:
        return torch.ones_like(self.mass)[:, None]

    @cached_property
    def log_prob(self) -> Tensor:
        return self._masked(rows(self.table).log_p)

    @cached_property
    def reference_log_prob(self) -> Tensor:
        return self._masked(rows(self.reference).log_p)

    @cached_property
    def log_ratio(self) -> Tensor:
        return self._masked(CATEGORICAL.log_ratios(self.table, self.reference))

    @cached_property
    def log_weight(self) -> Tensor:
        on_policy = self.behaviour is self.table
        return torch.zeros_like(self.mass) if on_policy else -self._masked(CATEGORICAL.log_ratios(self.behaviour, self.table))

    @cached_property
    def log_weight_so_far(self) -> Tensor:
        return self.so_far(self.log_weight)

    @cached_property
    def earlier_log_weight(self) -> Tensor:
        so_far = self.log_weight_so_far
        return torch.cat([so_far.new_zeros(1), so_far[: len(self.table) - 1]]).repeat_interleave(self.vocab)

    def divergence(self, kernel: str) -> Tensor:
        """A vocabulary kernel at every prefix, `[n]`."""
        of_rows = CATEGORICAL.reverse_kl if kernel == "full" else CATEGORICAL.mse
        return self._masked(of_rows(self.table, self.reference)[:, None].expand_as(self.table))

    @cached_property
    def _norm(self) -> Tensor:
        """`‖∇log π‖²`, `[n]`."""
        return CATEGORICAL.score_norms(self.table).flatten()

    def _slope(self, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of a vocabulary kernel `[r, v]`, its inner products with the scores `[n]`, and its squared norms `[r]`."""
        if kernel not in self._slopes:
            slope = CATEGORICAL.slope(kernel, self.table, self.reference)
            self._slopes[kernel] = slope, CATEGORICAL.score_dots(self.table, slope).flatten(), slope.square().sum(-1)
        return self._slopes[kernel]

    # ---- passes over the tree -------------------------------------------------------------------------------------------------

    @cached_property
    def ends(self) -> slice | Tensor:
        """The tokens that end a response, `[m]` of `[n]`."""
        last = slice(len(self.mass) - self.sizes[-1], len(self.mass))
        if self.possible is None:
            return last
        ending = (torch.arange(self.vocab) - (self.eos or 0)).eq(0).repeat(len(self.table))
        ending[last] = True
        tokens: Tensor = (ending & self.possible.repeat_interleave(self.vocab)).nonzero()[:, 0]
        return tokens

    def _by_length(self, values: Tensor) -> list[Tensor]:
        """Values `[…, n]` as views of those of every length of the prefix."""
        return list(values.split_with_sizes(self.sizes, -1))

    def so_far(self, values: Tensor, join: Callable[[Tensor, Tensor], Tensor] = torch.Tensor.add_) -> Tensor:
        """Sums (or products) of `values` `[n]` along the path to every token, itself included, `[n]`."""
        sums = values.clone()
        before, *levels = self._by_length(sums)
        for level in levels:
            join(level.view(-1, self.vocab), before[:, None])
            before = level
        return sums

    def _total(self, values: Tensor) -> Tensor:
        """Sums of `values` `[n]` over every response, `[m, 1]`."""
        sums = self.log_weight_so_far if values is self.log_weight else self.so_far(values)
        return sums[self.ends, None]

    def behind(self, whole: Tensor) -> Tensor:
        """Sums of `whole` `[k, m]`, weighted by the probabilities of responses, over those that have a prefix and token, `[k, n]`."""
        sums = whole.new_zeros(len(whole), len(self.mass))
        sums[:, self.ends] = whole * self.mass[self.ends]
        *levels, last = self._by_length(sums)
        for level in reversed(levels):
            level += last.view(*level.shape, self.vocab).sum(-1)
            last = level
        return sums

    def to_come(self, mass: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the sum of `values` over the tokens that follow one, for the masses behind tokens: all `[k, n]`."""
        by_row = mass.view(len(mass), -1, self.vocab)
        rest = by_row.sum(-1, keepdim=True)
        share = torch.where(rest > 0, by_row / rest, 0.0).flatten(1)
        *above, last = zip(self._by_length(share), self._by_length(values), strict=True)
        means, variances = [torch.zeros_like(last[1])], [torch.zeros_like(last[1])]
        for chance, mean in [last, *reversed(above)][: self.length - 1]:
            chance, mean = (each.view(len(mass), -1, self.vocab) for each in (chance, mean + means[-1]))
            centre = (chance * mean).sum(-1)
            apart = (mean - centre[..., None]).square_().add_(variances[-1].view_as(mean))
            means, variances = [*means, centre], [*variances, apart.mul_(chance).sum(-1)]
        return torch.cat(means[::-1], -1), torch.cat(variances[::-1], -1)

    # ---- estimators -----------------------------------------------------------------------------------------------------------

    def form(self, e: Estimator) -> Form | Totals:
        """The form of an estimator that compares no responses, or what a listing sums up to where it has none."""
        if not _has_form(e):
            return self._listed(e)
        if e.credit == "sequence":
            return self._normalised(e, Form(self.ones, coefficients(_local(e), self.responses).score))
        if e.credit == "return":
            total, value = self._score_sum(e), self._value(e)
            return replace(total, whole=value if total.whole is None else value * total.whole)
        local = _local(e)
        parts, later = coefficients(local, self.steps), ahead(local, self.steps)
        whole = weights(e, self.responses) if e.weight == "sequence" else None
        return self._normalised(e, Form(parts.score, whole, later, parts.direct, "" if parts.direct is None else e.kernel))

    def _normalised(self, e: Estimator, form: Form) -> Form:
        if e.normalise == "sum":
            return form
        if e.normalise == "mean" and self.eos is not None:
            share = scale(e, self.responses)[:, None]
            return replace(form, whole=share if form.whole is None else share * form.whole)
        factor = 1 / self.length if e.normalise == "mean" else float(scale(e, self.steps))
        later, direct = form.later, form.direct
        return replace(
            form,
            own=factor * form.own,
            later=None if later is None else (factor * later[0], later[1]),
            direct=None if direct is None else factor * direct,
        )

    def _value(self, e: Estimator) -> Tensor:
        """The kernel of every response, of credits `return` and `sequence`, `[m, 1]`."""
        if e.credit == "sequence":
            return kernel_values(e, self.responses)
        weighs = e.on_vocabulary and e.weight == "prefix"

        def total() -> Tensor:
            values = kernel_values(e, self.steps)
            return self._total((weights(e, self.steps) * values if weighs else values).flatten())

        key = e.kernel, e.clamp_log_ratio, e.clamp_value, weighs and e.truncate
        return self.responses.cached(("return", key), total)

    def _score_sum(self, e: Estimator) -> Form:
        """What multiplies the kernel of a response in a reward: `Σ_t W_t log π_t` and the normaliser."""
        whole = weights(e, self.responses) if e.weight == "sequence" else None
        within = e.weight == "token" or (e.weight == "prefix" and not e.on_vocabulary)
        return self._normalised(e, Form(weights(e, self.steps) if within else self.ones, whole))

    def product(self, e: Estimator, power: int) -> Form:
        """`a^power s` of an estimator before its baseline: `s` its score sum, `a` the kernel of the response less its mean."""
        score, a = self._score_sum(e), self._apart(e) ** power
        return replace(score, whole=a if score.whole is None else score.whole * a)

    def spread(self, e: Estimator) -> Tensor:
        """Variance of the kernel of a response."""
        return (self.mass[self.ends] @ self._apart(e).square())[0]

    def _apart(self, e: Estimator) -> Tensor:
        if e not in self._centred:
            values, mass = self._value(e), self.mass[self.ends]
            self._centred[e] = values - mass @ values
        return self._centred[e]

    # ---- sums -----------------------------------------------------------------------------------------------------------------

    def sums(self, made: Sequence[Form | Totals]) -> tuple[Tensor, list[float]]:
        """Mean gradients `[e, p]` and mean squared norms of forms, and after them of what was listed."""
        forms = [each for each in made if isinstance(each, Form)]
        parts = [self._summed(forms)] if forms else []
        totals = _joined([*parts, *(each for each in made if isinstance(each, Totals))])
        shape = self.table.shape
        means = CATEGORICAL.along_scores(totals.first.view(-1, *shape), self.table)
        squares = totals.second @ self._norm
        for part in totals.direct:
            slope, along, size = self._slope(part.kernel)
            once, twice = (each.view(-1, *shape).sum(-1) for each in (part.once, part.twice))
            means.index_add_(0, part.of, once[..., None] * slope)
            squares.index_add_(0, part.of, 2 * (part.crossed @ along) + twice @ size)
        return means.flatten(1), squares.tolist()

    def _summed(self, forms: Sequence[Form]) -> Totals:
        near = far = own = _stacked([form.own for form in forms])
        wholes = [power for form in forms if form.whole is not None for power in (form.whole, form.whole.square())]
        behind = iter(self.behind(_stacked(wholes)) if wholes else ())
        masses = [(self.mass, self.mass) if form.whole is None else (next(behind), next(behind)) for form in forms]
        once, twice = (_stacked([pair[side] for pair in masses]) if wholes else self.mass[None] for side in (0, 1))
        later = [(e, *form.later) for e, form in enumerate(forms) if form.later is not None]
        extra: Tensor | None = None
        if later:
            at, factor = torch.tensor([e for e, _, _ in later]), _stacked([beta for _, beta, _ in later])
            mean, variance = self._ahead([(masses[e][side], f) for side in (0, 1) for e, _, f in later])
            near = own.index_add(0, at, factor * mean[: len(later)])
            far = own.index_add(0, at, factor * mean[len(later) :]) if wholes else near
            extra = (twice[at] if wholes else twice) * factor.square() * variance[len(later) :]
        first = once * near
        crossed = twice * far if wholes else first
        second = crossed * far if extra is None else (crossed * far).index_add_(0, at, extra)
        direct = []
        for kernel in sorted({form.kernel for form in forms if form.direct is not None}):
            of = [e for e, form in enumerate(forms) if form.kernel == kernel]
            b = _stacked([each for e in of if (each := forms[e].direct) is not None])
            near_mass, far_mass = (each[of] if wholes else each for each in (once, twice))
            direct.append(Direct(torch.tensor(of), kernel, near_mass * b, crossed[of] * b, far_mass * b.square()))
        return Totals(first, second, direct)

    def _ahead(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """`to_come` of pairs of masses and values, of which some are the same."""
        keys = [(mass.data_ptr(), values.data_ptr()) for mass, values in pairs]
        different = dict(zip(keys, pairs, strict=True))
        places = [list(different).index(key) for key in keys]
        masses, values = zip(*different.values(), strict=True)
        mean, variance = self.to_come(_stacked(masses), _stacked(values))
        return mean[places], variance[places]

    def _listed(self, e: Estimator) -> Totals:
        """The totals of an estimator over responses that are listed, some of them at a time."""
        kinds = 5 if e.on_vocabulary and e.placement != "reward" else 2
        sums = torch.zeros(kinds, len(self.mass), dtype=torch.float64)
        ends = torch.arange(len(self.mass))[self.ends]
        for part in torch.tensor_split(ends, -(-len(ends) * self.length // LISTED)):
            view, places = self._listing(part)
            listed = coefficients(e, view)
            a, b = listed.score, listed.direct
            terms = [a, a.square(), *(() if b is None else (b, a * b, b.square()))]
            sums.index_add_(1, places.flatten(), (torch.stack(terms) * (self.mass[part, None] * view.mask_float)).flatten(1))
        direct = [Direct(torch.zeros(1, dtype=torch.long), e.kernel, *sums[2:, None])] if kinds == 5 else []
        return Totals(sums[:1], sums[1:2], direct)

    def _listing(self, ends: Tensor) -> tuple[View, Tensor]:
        """The responses with the given ends, and the place of each of their tokens `[m, T]`; shorter ones stand at the right."""
        path = [ends]
        for _ in range(self.length - 1):
            path.append((path[-1] // self.vocab - 1).clamp(min=-1))
        places = torch.stack(path[::-1], -1)
        mask = places >= 0
        if self.eos is None:
            return View(self, lambda values: values[places], mask), places
        places = places.clamp(min=0)
        return View(self, lambda values: torch.where(mask, values[places], 0.0), mask, unpadded=False), places


def _lasting(table: Tensor) -> Tensor:
    """The table, with what is kept of it; of a large one nothing should stay behind."""
    return table if table.numel() <= TOGETHER else table.detach()


def _joined(parts: Sequence[Totals]) -> Totals:
    """The totals of the estimators of all parts."""
    if len(parts) == 1:
        return parts[0]
    first, second = (torch.cat([getattr(part, name) for part in parts]) for name in ("first", "second"))
    starts = itertools.accumulate((len(part.first) for part in parts), initial=0)
    direct = [replace(each, of=start + each.of) for part, start in zip(parts, starts, strict=False) for each in part.direct]
    return Totals(first, second, direct)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """`values` `[n]` or `[n, 1]` as one `[k, n]`, without a copy where there is one."""
    return values[0].view(1, -1) if len(values) == 1 else torch.stack(list(values)).view(len(values), -1)
