"""A recorder for running jobs: every step is appended as a file of its own, so that a job that is killed loses one step at most."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gradlab._common.files import ensure_writable
from gradlab._common.names import check_whole
from gradlab.records import parquet
from gradlab.records.block import plain
from gradlab.records.formats import digest
from gradlab.records.readers import read_rollouts
from gradlab.records.table import Records

#: Files of one step, in the order of steps, ranks and calls.
NAME = "step-{step:09d}-rank-{rank}-{part:04d}.parquet"


class Recorder:
    """Append what a training loop has of its rollouts to a folder of parquet files that `gl.read_rollouts` reads.

        recorder = gl.Recorder("rollouts", run="my-run")
        for step, batch in enumerate(loop):
            recorder.add(step=step, token_id=batch.ids, mask=batch.mask, logprob=batch.logp, ref_logprob=batch.ref_logp)

    folder: made if need be. run: a name for the run. rank: of this process, where several write to one folder. every: steps
    of which one is written. A file is there whole or not at all; a step that a restarted job runs again is replaced.
    Raises `ValueError` where pyarrow is missing, and for a folder that cannot be written to.

    >>> import tempfile, gradlab as gl
    >>> folder = tempfile.mkdtemp()
    >>> recorder = gl.Recorder(folder, run="mine")
    >>> for step in range(3):
    ...     _ = recorder.add(step=step, logprob=[[-1.0, -0.5]], ref_logprob=[[-1.2, -0.4]])
    >>> len(recorder.read().tokens())
    6
    """

    def __init__(self, folder: str | Path, run: str | None = None, rank: int = 0, every: int = 1) -> None:
        check_whole("rank", rank, least=0)
        check_whole("every", every)
        parquet.arrow()
        self.folder, self.run, self.rank, self.every = ensure_writable(Path(folder)), run, rank, every
        self._parts: dict[int, int] = {}

    def add(self, *, step: int, **columns: Any) -> Path | None:
        """Write one batch: columns as `gl.Records.from_arrays` takes them, tensors on any device. Returns the file, or `None`.

        Raises `ValueError` as `gl.Records.from_arrays` does, and for a step that is no whole number.
        """
        check_whole("step", step, least=0)
        if step % self.every:
            return None
        given = {key: value for key, value in columns.items() if value is not None}
        return self.write(Records.from_arrays(**given | {"step": step} | ({} if self.run is None else {"run": self.run})), step)

    def verl(self, batch: Any, step: int) -> Path | None:
        """Write verl's `DataProto` as its trainer has it before the actor's update, e.g. in a subclass's `_update_actor`."""
        if step % self.every:
            return None
        return self.write(Records.from_dump(batch, "verl", step), step)

    def write(self, records: Records, step: int) -> Path:
        """Write records as a part of a step."""
        if step not in self._parts:  # what an earlier process wrote of this step is of before it was run again
            for old in self.folder.glob(NAME.replace("{part:04d}", "*").format(step=step, rank=self.rank)):
                old.unlink()
        part = self._parts[step] = self._parts.get(step, -1) + 1
        return records.write(self.folder / NAME.format(step=step, rank=self.rank, part=part))

    def read(self) -> Records:
        """What was written so far."""
        return read_rollouts(self.folder)

    def attach(self, trainer: Any) -> Any:
        """Record every loss of a TRL `GRPOTrainer`: ids, masks, advantages and the log-probabilities of all policies it has.

        The trainer's own `_compute_loss` is called as it is; the log-probabilities of the policy are those it has just computed.
        Returns a `transformers.TrainerCallback` that is already added, and detaches at the end of training. Written for TRL 1.16.
        Raises `ValueError` for a trainer that computes its loss otherwise.
        """
        return _attached(self, trainer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing is left to write: every step is on the disk."""


def _attached(recorder: Recorder, trainer: Any) -> Any:
    for name in ("_compute_loss", "_get_per_token_logps_and_entropies", "add_callback"):
        if not callable(getattr(trainer, name, None)):
            raise ValueError(
                f"{type(trainer).__name__} has no {name}, as TRL 1.16's GRPOTrainer has: call recorder.add in the loop"
            )
    from transformers import TrainerCallback

    scores, loss = trainer._get_per_token_logps_and_entropies, trainer._compute_loss
    latest: list[Any] = []

    @wraps(scores)
    def scored(*args: Any, **kwargs: Any) -> Any:
        found = scores(*args, **kwargs)
        latest[:] = [found[0]]
        return found

    @wraps(loss)
    def computed(model: Any, inputs: Any) -> Any:
        latest.clear()
        found = loss(model, inputs)
        if trainer.model.training and latest:
            _add(recorder, trainer, inputs, latest[0])
        return found

    class Detach(TrainerCallback):  # type: ignore[misc]
        """Give the trainer its own methods back."""

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Detach the recorder."""
            trainer._get_per_token_logps_and_entropies, trainer._compute_loss = scores, loss

    trainer._get_per_token_logps_and_entropies, trainer._compute_loss = scored, computed
    callback = Detach()
    trainer.add_callback(callback)
    return callback


def _add(recorder: Recorder, trainer: Any, inputs: Any, log_prob: Any) -> None:
    advantages, mask = plain(inputs["advantages"]), plain(inputs["completion_mask"]) != 0
    if inputs.get("tool_mask") is not None:
        mask &= plain(inputs["tool_mask"]) != 0
    asked, there = plain(inputs["prompt_ids"]), plain(inputs["prompt_mask"]) != 0
    prompts = [digest(row[kept]) for row, kept in zip(asked, there, strict=True)]
    width = mask.shape[1]
    recorder.add(
        step=int(trainer.state.global_step), token_id=inputs["completion_ids"], mask=mask, logprob=log_prob[:, -width:],
        old_logprob=inputs.get("old_per_token_logps"), ref_logprob=inputs.get("ref_per_token_logps"),
        behaviour_logprob=inputs.get("sampling_per_token_logps"), advantage=advantages, prompt_id=prompts, group_id=prompts,
        temperature=float(trainer.temperature),
    )  # fmt: skip
