"""`gl.inspect`: what a run's rollouts say of its KL, its estimators, its weights and its engine, as frames and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from gradlab._common.names import check_jobs, check_probability, check_seed
from gradlab.records import checks, frames, sentences, vocabulary
from gradlab.records.survey import survey
from gradlab.records.table import Records
from gradlab.records.totals import add_up


@dataclass(frozen=True, eq=False)
class Inspection:
    """What `inspect` found: `sentences` by subject, `findings` of the checks, what was `withheld` because of them, and `frames`.

    frames: `overview`, `faults`, `kl`, `tokens` (by id), `places`, `largest` (single tokens), `ratios` (histograms), `estimators`,
    `weights`, `corrections`, `engine`, `steps`, `changes`, and of
    lists of likely tokens `vocabulary` and `prefixes`; a frame is missing where its columns are, or cannot be right. The columns that
    need a word are told in `gradlab.records.frames.COLUMNS`.

    >>> found = gl.inspect(gl.Records.from_arrays(logprob=[[-1.0], [-2.0]], ref_logprob=[[-1.5], [-1.5]]))
    >>> found["overview"][["responses", "tokens"]].values.tolist(), "weights" in found.frames
    ([[2, 2]], False)
    """

    source: str
    findings: list[checks.Finding]
    frames: Mapping[str, pd.DataFrame]
    sentences: Mapping[str, list[str]] = field(default_factory=dict)
    withheld: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self.frames:
            raise ValueError(f"these records tell nothing of {name!r}; there is {', '.join(self.frames)}")
        return self.frames[name]


def inspect(records: Records, force: bool = False, level: float = 0.95, seed: int = 0, jobs: int = 1) -> Inspection:
    """Look into records: check them, then say what they hold, from columns that can be right (from all with `force`).

    The policy is `logprob`, or `old_logprob` where that is not there; ratios are to `ref_logprob`, weights to `behaviour_logprob` (or
    `old_logprob`). Intervals take groups of one prompt as independent, at `level`. Goes through the records twice, on `jobs` processes
    (or on the backend of a surrounding `joblib.parallel_config`) where they are parquet or in memory.
    Raises `ValueError` where there are no responses, and for a level outside (0, 1).

    >>> import numpy as np, gradlab as gl
    >>> log_p = np.log(np.random.default_rng(0).uniform(0.2, 0.9, (64, 5)))
    >>> found = gl.inspect(gl.Records.from_arrays(logprob=log_p, ref_logprob=log_p - 0.1))
    >>> found["kl"].query("kernel == 'k1' and per == 'response'")["value"].round(6).tolist()
    [0.5]
    """
    if not isinstance(records, Records):
        raise ValueError(
            f"inspect takes records, as gl.read_rollouts and gl.Records.from_arrays give them; got {type(records).__name__}"
        )
    check_probability("level", level)
    check_seed(seed)
    check_jobs(jobs)
    seen = survey(records, jobs)
    findings = checks.found(seen)
    bad = set() if force else checks.spoiled(findings)
    found = {"overview": frames.overview_frame(records, seen), "faults": checks.frame(findings)}
    usable = [name for name in seen.policies if name not in bad]
    policy = next((name for name in ("logprob", "old_logprob", "behaviour_logprob") if name in usable), None)
    reference = "ref_logprob" if "ref_logprob" in usable else None
    behaviour = next((n for n in ("behaviour_logprob", "old_logprob") if n in usable and n != policy), None)
    told: dict[str, list[str]] = {}
    withheld = _withheld(findings, bad)
    if policy is None or "mask" in bad or not seen.live.any():
        return Inspection(records.source, findings, found, told, withheld)
    lengths = int(seen.live.max()), float(seen.live[seen.live > 0].mean())
    totals = add_up(records, policy, reference, behaviour, lengths, jobs)
    if totals.left_out:
        withheld.append(f"{totals.left_out:,} responses lack a token, or a finite number at one, and are left out")
    if "length" not in totals:
        return Inspection(records.source, findings, found, told, withheld)
    if reference is not None:
        found["kl"] = frames.kl_frame(totals, level)
        found |= frames.token_frames(totals, "token_id" not in bad)
        found["estimators"] = frames.estimators_frame(totals)
        told["KL"] = sentences.of_kl(found, totals)
    if set(vocabulary.NEEDED) <= set(records.columns) and not bad & {"logprob", "ref_logprob", "token_id"}:
        found["vocabulary"] = vocabulary.kl_frame(records, level)
        if found["vocabulary"]["value"].any():  # at the reference there is no gradient to compare with
            found["prefixes"] = vocabulary.gradient_frame(records)
    found["ratios"] = frames.ratios_frame(totals)
    if behaviour is not None:
        found |= {"weights": frames.weights_frame(totals), "corrections": frames.corrections_frame(totals, level, seed)}
        told["weights"] = sentences.of_weights(found, totals)
    found["engine"] = frames.engine_frame(seen, set(usable))
    told["engine"] = sentences.of_engine(found)
    found["steps"] = frames.steps_frame(totals, level)
    if len(found["steps"]) > 1:
        found["changes"] = frames.changes_frame(found["steps"], seed)
        told["steps"] = sentences.of_steps(found)
    return Inspection(records.source, findings, found, {name: some for name, some in told.items() if some}, withheld)


def _withheld(findings: list[checks.Finding], bad: set[str]) -> list[str]:
    """What is not computed, and why."""
    told = []
    for name in sorted(bad):
        fault = next(f.fault for f in findings if f.serious and name in f.columns)
        what = "nothing is computed" if name == "mask" else f"nothing is computed from {name}"
        told.append(f"{what}, because of the fault “{fault}”")
    return told
