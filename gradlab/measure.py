"""measure: scenarios × estimators × targets → one tidy frame of bias, direction and noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from gradlab import intervals, reliability, targets
from gradlab._common.arguments import checked
from gradlab._common.lazy import callable_module
from gradlab._common.names import check_jobs, check_name, check_probability, check_seed, several
from gradlab._common.parallel import spread
from gradlab._common.provenance import versions
from gradlab.estimators.catalogue import ESTIMATORS, name_of
from gradlab.estimators.estimator import Estimator
from gradlab.estimators.losses import LOSSES
from gradlab.estimators.policy_loss import PolicyLoss
from gradlab.moments import Loss, Moments
from gradlab.objectives import ScenarioTarget, given, parameters_of
from gradlab.scenario import Scenario, check_scenario
from gradlab.solvers import exact, montecarlo
from gradlab.sums import Sums

Array = npt.NDArray[np.float64]

#: Batch sizes at which the root mean squared error is tabulated.
BATCH_SIZES = (1, 16, 64, 256, 1024, 4096)
#: A gradient smaller than this share of its own scale is rounding, not a direction.
ZERO_TOLERANCE = 1e-12
#: A relative bias smaller than this, or than so many units in the last place of the policy's precision, is rounding: exactly, 0.
NO_BIAS, UNITS = 1e2 * ZERO_TOLERANCE, 1e2
#: Doubles of batch means that are compared with their targets at a time.
BLOCK_NUMBERS = 2**20

#: Estimators whose expectation is the gradient of a target, on- and off-policy: they stand in where it cannot be computed.
UNBIASED = {"reverse_kl": "full-both-prefix", "reverse_kl_frozen_prefix": "full-loss", "mse_frozen_prefix": "mse-loss"}

#: What compares an estimator with its target.
_COMPARISONS = [f"{key}{end}" for key in ("bias", "cosine") for end in ("", "_low", "_high")]

#: Responses at the first look of a run that is doubled, see `at_look`.
FIRST_LOOK = 64

#: What is looked at first stands at both ends, which is what `print` shows of a frame that is wider than the screen.
COLUMNS: dict[str, str] = {
    "estimator": "catalogue name, composed name, or the name of the function",
    "target": "objective the mean gradient is compared with",
    "bias": "‖E g − ∇‖ / ‖∇‖ (sampled: root of an unbiased U-statistic, floored at 0); missing for a zero target",
    "scenario": "label of the scenario",
    "family": "kind of policy",
    "vocab": "number of tokens v (missing for a Gaussian)",
    "length": "largest number of tokens T",
    "off_policy": "whether the data come from another policy",
    "via": "exact or sampled",
    "method": "enumeration, quadrature, dynamic programming; counted or drawn samples",
    "samples": "number of responses (missing when exact)",
    "kl": "KL(policy ‖ reference) of whole responses, nats",
    "lag": "KL(behaviour ‖ policy) of whole responses, nats; 0 on-policy",
    "gradient_norm": "‖E g‖, nats per unit of parameter (sampled: root of an unbiased U-statistic, floored at 0)",
    "target_norm": "‖∇‖ of the target, nats per unit of parameter",
    "bias_low": "lower end of the interval of bias (sampled only)",
    "bias_high": "upper end of the interval of bias (sampled only)",
    "cosine_low": "lower end of the interval of cosine (sampled only)",
    "cosine_high": "upper end of the interval of cosine (sampled only)",
    "noise_low": "lower end of the interval of noise (sampled only)",
    "noise_high": "upper end of the interval of noise (sampled only)",
    "trace_cov": "tr Cov(g) of a single response, squared units of the gradient",
    **{f"rmse_at_{n}": f"√(bias² + noise/{n}), relative root mean squared error of a batch of {n}" for n in BATCH_SIZES},
    "crossover_low": "lower end of the interval of crossover, from those of noise and bias (sampled only)",
    "crossover_high": "upper end of the interval of crossover; inf where bias is not told from 0 (sampled only)",
    "reliable": "whether the sample is large enough for its intervals to hold; where not, ends that are not known are open "
    "(sampled only, see gradlab.reliability)",
    "unseen": "share of E‖g − E g‖² expected on gradients larger than any that so many responses show; missing where the gradient's "
    "law is not known (sampled only)",
    "cosine": "cosine between E g and ∇; missing when either is zero or not significantly different from zero",
    "noise": "tr Cov(g) / ‖∇‖² of a single response",
    "crossover": "batch size at which squared bias equals variance, noise / bias²; inf when unbiased but for rounding (missing "
    "where a sample's bias is floored at 0)",
}


def measure(
    estimators: Loss | str | Iterable[Loss | str] | Mapping[str, Loss],
    scenarios: Scenario | Iterable[Scenario],
    target: str | Iterable[str] = "reverse_kl",
    samples: int | None = None,
    seed: int = 0,
    jobs: int = 1,
    level: float = 0.95,
    anytime: bool = False,
    *,
    beta: float | None = None,
    k: int | None = None,
    utility: Any = None,
) -> pd.DataFrame:
    """Compare the expected gradient of every estimator with a target, in every scenario.

    estimators: `Estimator`s, `PolicyLoss`es, names of either, or callables from a rollout to losses `[n]`; a mapping names them.
    samples: `None` for exact moments, or the number of responses to draw. seed: entropy of every draw.
    A language model has its parameters' gradients compared. Where its responses cannot be listed the target's gradient is
    estimated too, by an unbiased estimator (`UNBIASED`) from the same draws, and so is the `kl`: bias, cosine and noise, with
    intervals that allow for it, are about the difference of the two.
    jobs: worker processes over scenarios (joblib; inside `joblib.parallel_config(backend=…)` that backend is used, see
    `gradlab._common.parallel`). The result has the same bytes for any number of workers. level: of the intervals. anytime:
    intervals of bias, cosine and noise that hold at every look at once when a run is doubled until one likes what one sees, see
    `at_look`. beta, k, utility: of the targets `regularised`, `pass_at_k` and `utility`, see `gl.OBJECTIVES`; a
    `PolicyLoss` is compared with `regularised` at its own `beta` where none is given.
    Where so few responses carry a gradient that a sample of this size cannot know its mean or its noise, as the policies' whole
    distributions tell, `reliable` is False and the intervals that are not known are open: 0 to `inf`, a cosine −1 to 1.

    Returns one row per scenario × estimator × target with the columns of `COLUMNS`; `frame.attrs` holds seed and versions.
    Raises `ValueError` for unknown names, no scenarios or estimators, samples that are not positive, a level outside (0, 1), and
    for `anytime` with samples that are no number of doublings of 64.

    >>> policy = gl.Tree.random(vocab=4, length=3, seed=0)
    >>> scenario = gl.Scenario(policy, reference=policy.perturbed(kl=0.3, seed=1))
    >>> frame = gl.measure(["k3-loss", "k3-loss-sequence", "full-both"], scenario, target=["reverse_kl", "forward_kl"])
    >>> frame.pivot(index="estimator", columns="target", values="bias").round(3).loc["k3-loss-sequence"].to_dict()
    {'forward_kl': 0.0, 'reverse_kl': 0.266}
    """
    losses = by_name(estimators)
    scenarios = several(scenarios)
    names = several(target)
    offered = {"beta": beta, "k": k, "utility": utility}
    parameters = {name: value for name, value in offered.items() if value is not None}
    _check_parameters(names, parameters, losses.values())
    if not losses or not scenarios or not names:
        raise ValueError(f"nothing to measure: {len(losses)} estimators, {len(scenarios)} scenarios, {len(names)} targets")
    check_seed(seed)
    check_jobs(jobs)
    check_probability("level", level)
    if samples is not None:
        montecarlo.check_samples(samples)
    looked = at_look(level, samples) if anytime else level
    for scenario in scenarios:
        check_scenario(scenario)
        if samples is not None:
            montecarlo.check_reach(samples, scenario, losses.values())
    tasks = (
        joblib.delayed(_rows)(losses, scenario, names, samples, seed, index, looked, parameters)
        for index, scenario in enumerate(tqdm(scenarios, desc="measure", unit="scenario", disable=None, delay=2))
    )
    rows = spread(tasks, jobs)
    frame = pd.DataFrame([row for part in rows for row in part], columns=list(COLUMNS))
    frame["samples"] = frame["samples"].astype("Int64")
    frame["vocab"] = frame["vocab"].astype("Int64")
    frame["reliable"] = frame["reliable"].astype("boolean")
    frame.attrs.update(seed=seed, level=level, **versions())
    return frame


def _check_parameters(names: Sequence[str], parameters: Mapping[str, Any], losses: Iterable[Loss]) -> None:
    """Raise `ValueError` for unknown targets, for parameters they need that are not given, and for others that none of them has."""
    known = [targets.target(name) for name in names]
    for each in known:
        if isinstance(each, ScenarioTarget):
            own = {} if not all(isinstance(loss, PolicyLoss) for loss in losses) else {"beta": 0.0}
            given(each, parameters_of(each, own | dict(parameters)))
    if foreign := [
        name for name in parameters if not any(parameters_of(each, parameters).get(name) is not None for each in known)
    ]:
        raise ValueError(f"none of the targets {', '.join(names)} has a parameter {foreign[0]!r}")


@checked
def at_look(level: float, samples: int | None) -> float:
    """The level of the intervals at one of endlessly many looks, at 64, 128, 256, … responses, so that all hold with `level`.

    Look `k`, from 0 on, may fail with probability `(1 − level) / ((k + 1)(k + 2))`, and these sum to `1 − level` (union bound): it does
    not matter how the runs of two looks depend on each other, nor why one stops. Raises `ValueError` for other numbers.

    >>> [round(gl.measure.at_look(0.95, samples), 4) for samples in (64, 128, 256)]
    [0.975, 0.9917, 0.9958]
    """
    looks = 0 if samples is None or samples < FIRST_LOOK else (samples // FIRST_LOOK).bit_length()
    if looks == 0 or samples != FIRST_LOOK * 2 ** (looks - 1):
        raise ValueError(
            f"anytime intervals are for runs of {FIRST_LOOK}, {2 * FIRST_LOOK}, {4 * FIRST_LOOK}, … responses, each twice the one before, "
            f"so that there are few looks to allow for; got samples={samples}"
        )
    return 1 - (1 - level) / (looks * (looks + 1))


def by_name(estimators: Loss | str | Iterable[Loss | str] | Mapping[str, Loss]) -> dict[str, Loss]:
    """Estimators under the names they have in frames. Raises `ValueError` for none, unknown names, two losses of one name.

    >>> list(gl.measure.by_name(["k2-loss", gl.Estimator("k3", normalise="mean")]))
    ['k2-loss', 'k3-loss-normalise=mean']
    """
    named: dict[str, Loss] = {}
    if isinstance(estimators, Mapping):
        named = {str(name): _loss(item) for name, item in estimators.items()}
    else:
        items: list[Loss | str] = several(estimators)
        for item in items:
            item = _loss(item)
            if named.setdefault(name_of(item), item) != item:
                raise ValueError(
                    f"two different losses are called {name_of(item)!r}; name them with a mapping, {{name: loss, …}}"
                )
    if not named:
        raise ValueError(f"no estimators were given, got {estimators!r}")
    return named


def _loss(item: Loss | str) -> Loss:
    if isinstance(item, str):
        check_name("estimator", item, [*ESTIMATORS, *LOSSES])
        return ESTIMATORS[item] if item in ESTIMATORS else LOSSES[item]
    if not callable(item):
        raise ValueError(f"an estimator is a gl.Estimator, a catalogue name or a function of a rollout, got {item!r}")
    return item


def _rows(
    losses: dict[str, Loss],
    scenario: Scenario,
    names: list[str],
    samples: int | None,
    seed: int,
    index: int,
    level: float,
    parameters: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """All rows of one scenario; runs in a worker, on one thread so that sums have one order."""
    with one_thread():
        if samples is None:
            moments_by_run = exact.moments(list(losses.values()), scenario)
        else:
            betas = [_beta(loss, parameters) for loss in losses.values()]
            target_estimators = {} if scenario.policy.tabulated else {name: _unbiased_estimator(name, betas) for name in names}
            all_losses = [*losses.values(), *target_estimators.values()]
            moments_by_run = montecarlo.moments(all_losses, scenario, samples, seed, stream=(index,))
            reliabilities = reliability.reliability(all_losses, moments_by_run, scenario, seed)
        # Where responses are too many to list, those that were drawn for the moments tell the distances, too.
        apart = None if scenario.policy.tabulated else moments_by_run[0].distances
        kl, lag = (scenario.kl(), scenario.lag()) if apart is None else apart
        common = {
            "scenario": scenario.label,
            "family": scenario.family,
            "vocab": int(scenario.policy.vocab) or None,
            "length": scenario.policy.length,
            "off_policy": scenario.behaviour is not None,
            "kl": kl,
            "lag": lag,
        }
        if not scenario.policy.tabulated:
            rows = [
                [_against_sampled_target(run, truth, level) for truth in moments_by_run[len(losses) :]]
                for run in moments_by_run[: len(losses)]
            ]
        else:
            unbiased = max(NO_BIAS, UNITS * torch.finfo(scenario.policy.parameters.dtype).eps)
            rows = [[] for _ in losses]
            for beta in dict.fromkeys(_beta(loss, parameters) for loss in losses.values()):
                chosen = [e for e, loss in enumerate(losses.values()) if _beta(loss, parameters) == beta]
                truths = [_truth(name, scenario, {**parameters, "beta": beta}) for name in names]
                runs = [moments_by_run[e] for e in chosen]
                if samples is None:
                    found = [[_exact(run, truth, unbiased) for truth in truths] for run in runs]
                else:
                    found = _sampled(runs, truths, level)
                for e, part in zip(chosen, found, strict=True):
                    rows[e] = part
        finished = []
        for e, (label, loss) in enumerate(losses.items()):
            for g, (name, row) in enumerate(zip(names, rows[e], strict=True)):
                if not scenario.policy.tabulated and _is_target_estimator(loss, target_estimators[name], scenario):
                    # That it equals itself says nothing about its bias.
                    row |= dict.fromkeys(_COMPARISONS, float("nan"))
                if samples is not None:
                    row_reliability = (
                        reliabilities[e]
                        if scenario.policy.tabulated
                        else reliabilities[e].against(reliabilities[len(losses) + g])
                    )
                    row = reliability.with_open_ends(row, row_reliability)
                finished.append({**common, "estimator": label, "target": name, **_errors(row)})
    return finished


def _beta(loss: Loss, parameters: Mapping[str, Any]) -> float | None:
    """The coefficient of the KL in the objective that a loss is compared with: as given, or its own."""
    own: float | None = loss.beta if isinstance(loss, PolicyLoss) else None
    return float(parameters["beta"]) if "beta" in parameters else own


def _truth(name: str, scenario: Scenario, parameters: Mapping[str, Any]) -> Tensor:
    return exact.gradient(name, scenario, **parameters_of(targets.target(name), parameters))


def _unbiased_estimator(target: str, betas: Sequence[float | None] = ()) -> Loss:
    weighted = PolicyLoss("reward", ratio="sequence", bypass=True)
    if target == "reward":
        return weighted
    if target == "regularised":
        if len(set(betas)) != 1 or betas[0] is None:
            raise ValueError(
                f"the losses have different coefficients {sorted({b for b in betas if b is not None})}; give beta="
            )
        return replace(weighted, regulariser=ESTIMATORS[UNBIASED["reverse_kl"]], beta=betas[0])
    if target not in UNBIASED:
        raise ValueError(
            f"the responses of this language model cannot be listed, and no estimator of gradlab is unbiased for {target!r}; "
            f"possible targets: {', '.join([*UNBIASED, 'reward', 'regularised'])}, or restrict actions, length or prompts"
        )
    return ESTIMATORS[UNBIASED[target]]


def _is_target_estimator(loss: Loss, target: Loss, scenario: Scenario) -> bool:
    """Whether a loss is the very estimator that stands in for the target's gradient; on-policy a detached weight is 1."""

    def plain(e: Loss) -> Loss:
        if not isinstance(e, Estimator) or e.differentiate_weight or e.clip or e.truncate or scenario.behaviour is not None:
            return e
        return replace(e, weight="none")

    return plain(loss) == plain(target)


def _exact(moments: Moments, gradient: Tensor, unbiased: float) -> dict[str, Any]:
    """A row's exact columns; a relative bias of at most `unbiased` is rounding, and is 0."""
    size, norm = float(gradient.norm()), float(moments.mean.norm())
    finite_trace = moments.trace_cov if np.isfinite(moments.trace_cov) else 0.0
    scale = (finite_trace + norm**2) ** 0.5
    zero_mean, zero_target = norm <= ZERO_TOLERANCE * scale or norm == 0, size <= ZERO_TOLERANCE
    nan, gap = float("nan"), float((moments.mean - gradient).norm())
    gap = 0.0 if gap <= unbiased * size else gap
    return {
        "via": "exact",
        "method": moments.method,
        "samples": None,
        "gradient_norm": norm,
        "target_norm": size,
        "bias": nan if zero_target else gap / size,
        "cosine": nan if zero_mean or zero_target else float(moments.mean @ gradient) / (norm * size),
        "noise": nan if zero_target else moments.trace_cov / size**2,
        "trace_cov": moments.trace_cov,
    }


def _sampled(moments: Sequence[Moments], truths: Sequence[Tensor], level: float) -> list[list[dict[str, Any]]]:
    """One row per run and target; runs of one shape are compared with all targets at once."""
    rows: list[list[dict[str, Any]]] = [[] for _ in moments]
    targets = np.stack([truth.numpy() for truth in truths])
    size = np.linalg.norm(targets, axis=-1)
    targets[size <= ZERO_TOLERANCE] = 0  # nothing is relative to it
    relative_size = np.where(size > ZERO_TOLERANCE, size, np.nan)
    for same_shape in _blocks(moments):
        runs = [moments[e] for e in same_shape]
        mean, samples = np.stack([run.mean.numpy() for run in runs]), np.array([[run.samples] for run in runs])
        trace = np.array([[run.trace_cov] for run in runs])
        # ‖mean − t‖² − tr Σ̂/n is the U-statistic over pairs of different samples: unbiased for the squared distance.
        distance, norm = (
            np.sqrt(np.maximum(squared - trace / samples, 0))
            for squared in (np.square(mean[:, None] - targets).sum(-1), np.square(mean).sum(-1, keepdims=True))
        )
        columns = {"bias": distance / relative_size, "noise": trace / relative_size**2}
        for key, interval in _intervals(runs, targets, level).items():
            columns.setdefault(key, interval.estimate)
            # Estimates use every sample, intervals the batches: with very few samples one can fall outside the other.
            columns[f"{key}_low"] = np.fmin(interval.low, columns[key])
            columns[f"{key}_high"] = np.fmax(interval.high, columns[key])
        for i, e in enumerate(same_shape):
            common = {
                "via": "sampled",
                "method": runs[i].method,
                "samples": runs[i].samples,
                "gradient_norm": float(norm[i, 0]),
                "trace_cov": runs[i].trace_cov,
            }
            rows[e] = [
                common | {"target_norm": float(size[g])} | {key: float(column[i, g]) for key, column in columns.items()}
                for g in range(len(targets))
            ]
    return rows


def _blocks(moments: Sequence[Moments]) -> list[list[int]]:
    """Indices of runs whose batches are alike, as many together as a few megabytes of batch means hold."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for e, run in enumerate(moments):
        # Runs on a wide table are compared by the cells that they have in common, and are never held in full.
        cells = run.batches.cells if isinstance(run.batches, Sums) and run.batches.scattered else None
        batches = 1 if cells is not None else len(run.batch_means)
        alike.setdefault((batches * run.mean.numel(), id(cells), run.batch_traces is None), []).append(e)
    return [
        list(part)
        for (numbers, *_), every in alike.items()
        for part in np.array_split(every, -(-len(every) * numbers // BLOCK_NUMBERS))
        if len(part)
    ]


def _intervals(runs: Sequence[Moments], targets: Array, level: float) -> dict[str, intervals.Interval]:
    """Intervals `[e, g]` of bias, cosine and noise."""
    scattered = [run.batches for run in runs if isinstance(run.batches, Sums) and run.batches.scattered]
    means = [] if scattered else [run.batch_means.numpy() for run in runs]
    if (scattered[0].shape[0] if scattered else len(means[0])) < intervals.MINIMUM_BATCHES:
        # Too few to say anything: the widest intervals there are, around what has no estimate.
        no_estimate = np.where(targets.any(-1), 0.0, np.nan) + np.zeros((len(runs), 1))
        widest = {"bias": (0.0, np.inf), "cosine": (-1.0, 1.0), "noise": (0.0, np.inf)}
        return {
            key: intervals.Interval(no_estimate * np.nan, no_estimate + low, no_estimate + high)
            for key, (low, high) in widest.items()
        }
    batches = intervals.Scattered.sums(scattered) if scattered else intervals.Batches.of(np.stack(means)[:, None])
    traces = [run.batch_traces.numpy() for run in runs if run.batch_traces is not None]
    return {
        "bias": intervals.bias(batches, targets, level),
        "cosine": intervals.cosine(batches, targets, level),
        "noise": intervals.noise(batches, np.stack(traces)[:, None] if traces else None, targets, level),
    }


def _against_sampled_target(moments: Moments, target: Moments, level: float) -> dict[str, Any]:
    """As `_sampled`, where the target's gradient is estimated from the same draws.

    Squared bias is the U-statistic of the draws' differences, the target's norm one of its own; their intervals, each at half
    the error, bound the quotient (Bonferroni). The cosine's interval is a delete-one-batch jackknife.
    """
    if len(moments.batch_means) < intervals.MINIMUM_BATCHES:
        raise ValueError(f"{moments.samples} responses are too few where the target is estimated, too; take at least 128")
    run, truth = (intervals.Batches.of(each.batch_means.numpy()) for each in (moments, target))
    difference = intervals.Batches(run.mean - truth.mean, run.deviations - truth.deviations)
    origin, half = np.zeros(len(run.mean)), (1 + level) / 2
    gap, size = intervals.squared_distance(difference, origin, half), intervals.squared_distance(truth, origin, half)
    norm = float(intervals.squared_distance(run, origin, level).estimate)
    traces = moments.batch_traces
    # Noise of an estimate of the zero vector plus one: the trace in units of the squared norm is put in afterwards.
    trace = intervals.noise(run, None if traces is None else traces.numpy(), _unit(origin), half)
    row: dict[str, Any] = {
        "via": "sampled",
        "method": f"{moments.method}, target estimated",
        "samples": moments.samples,
        "gradient_norm": float(np.sqrt(max(norm, 0.0))),
        "target_norm": float(np.sqrt(max(float(size.estimate), 0.0))),
        "trace_cov": moments.trace_cov,
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        for key, part in (("bias", gap), ("noise", trace)):
            estimate = np.maximum(part.estimate, 0) / np.float64(size.estimate) if size.estimate > 0 else np.float64(np.nan)
            low, high = np.maximum(part.low, 0) / size.high, np.float64(part.high) / np.maximum(size.low, 0)
            estimate_low_high = np.array([estimate, low, high])
            row[key], row[f"{key}_low"], row[f"{key}_high"] = (
                float(x) for x in (np.sqrt(estimate_low_high) if key == "bias" else estimate_low_high)
            )
    row["noise"] = moments.trace_cov / row["target_norm"] ** 2 if row["target_norm"] else float("nan")
    cosine = intervals.cosine_of_means(run, truth, level)
    row["cosine"], row["cosine_low"], row["cosine_high"] = (float(x) for x in (cosine.estimate, cosine.low, cosine.high))
    return row


def _unit(origin: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    unit = origin.copy()
    unit[0] = 1.0
    return unit


def _errors(row: dict[str, Any]) -> dict[str, Any]:
    bias, noise = row["bias"], row["noise"]
    rmse = {f"rmse_at_{n}": float(np.sqrt(bias**2 + noise / n)) for n in BATCH_SIZES}
    if row["via"] == "exact":
        crossover = float("inf") if bias == 0 else noise / bias**2 if np.isfinite(bias) else float("nan")
        return row | rmse | {"crossover": crossover}
    # On the log scale the ends are sums of those of two intervals, whose errors never add up to more. No sample shows that a bias
    # is 0: where its estimate, or its lower end, is 0 but for rounding there is nothing to divide by, and no upper end.
    nan, inf = float("nan"), float("inf")
    lowest, highest = row.get("bias_low", nan), row.get("bias_high", nan)
    ends = {
        "crossover": noise / bias**2 if bias > NO_BIAS else nan,
        "crossover_low": row.get("noise_low", nan) / highest**2 if highest > 0 else nan,
        "crossover_high": inf if lowest <= NO_BIAS else row.get("noise_high", nan) / lowest**2,
    }
    return row | rmse | ends


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: small tensors are faster so, and sums come out the same wherever they run.

    >>> import torch
    >>> with gl.measure.one_thread():
    ...     torch.get_num_threads()
    1
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


called = callable_module(__name__, measure)
