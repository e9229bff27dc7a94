"""What frameworks call the columns of the canonical table: one function for each, from what they write to `Block`.

| format | written by | log-probabilities of |
|---|---|---|
| `nemo-rl` | `train_data_step{N}.jsonl`, always, outside gym runs | engine, and trainer's weights when the batch was made |
| `prime-rl` | `trainer.enable_token_export`, `token_exports/step_{N}/rank_{r}.jsonl` | engine, policy |
| `slime` | `--save-debug-rollout-data`, `--save-debug-train-data`, also of miles | engine, old policy, reference, teacher |
| `skyrl` | `trainer.dump_data_batch=true`, `global_step_{N}_training_input.pkl` | engine, old policy, reference |
| `verl` | `batch.batch` of its trainer | engine, old policy, reference |

Read from the frameworks' own code: NeMo-RL 2026-08 `nemo_rl/algorithms/grpo.py`, prime-rl 2026-08 `trainer/rl/token_export.py`,
slime 2026-08 `observability/{rollout,train}_data_utils.py`, SkyRL 2026-08 `training_batch.py`, verl 0.9.1 `trainer/ppo/ray_trainer.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradlab.records.block import Block, plain
from gradlab.records.schema import COLUMNS, POLICIES

Array = npt.NDArray[Any]
Row = dict[str, Any]


def gathered(rows: Sequence[Row]) -> Block:
    """A block from one dictionary of canonical columns per response; a column that one of them lacks is null there."""
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    whole = [name for name in names if COLUMNS[name].kind == "whole" and COLUMNS[name].per == "response"]
    partial = [name for name in whole if any(row.get(name) is None for row in rows)]
    columns = {name: [row.get(name) for row in rows] for name in names if name not in partial}
    if not any(name in POLICIES for name in columns):
        raise ValueError(f"these rows hold no log-probabilities: none of {', '.join(POLICIES)}")
    return Block.of(columns)


def nemo_rl(line: Mapping[str, Any], step: int | None) -> Row:
    """A line of NeMo-RL's `train_data_step{N}.jsonl`: every field stands in a list of one, and is as long as the batch's longest."""
    line = {key: _single(value) for key, value in line.items()}
    tokens = np.asarray(line["token_ids"])
    numbers = {
        "old_logprob": line.get("prev_logprobs"), "behaviour_logprob": line.get("generation_logprobs"),
        "advantage": line.get("advantages"), "mask": line["token_loss_mask"],
    }  # fmt: skip
    given = {name: _numbers(row) for name, row in numbers.items() if row is not None}
    # Rows end where the sequence does, unless something was written behind it.
    end = int(line.get("input_lengths") or len(tokens))
    end = max([end, *(int(np.flatnonzero(np.nan_to_num(row, nan=1.0))[-1]) + 1 for row in given.values() if np.any(row))])
    row: Row = {name: values[:end] if np.ndim(values) else values for name, values in given.items()}
    row["token_id"] = tokens[:end]
    row["mask"] = (row["mask"] != 0) & bool(line.get("sample_loss_mask", 1))
    return row | {"reward": line.get("rewards"), "step": step, "prompt_id": _prompt(row["token_id"], row["mask"])}


def prime_rl(line: Mapping[str, Any], step: int | None) -> Row:
    """A line of prime-rl's token export: a whole sequence, its prompt outside of `loss_mask`."""
    if line.get("schema_version") != 1:
        raise ValueError(f"prime-rl's token export has schema_version 1 here, got {line.get('schema_version')!r}")
    names = {
        "token_id": "token_ids", "mask": "loss_mask", "advantage": "advantages", "entropy": "entropy", "logprob": "trainer_logprobs",
        "behaviour_logprob": "inference_logprobs", "ref_logprob": "ref_logprobs", "removed": "is_masked",
    }  # fmt: skip
    row = {ours: line[theirs] for ours, theirs in names.items() if line.get(theirs) is not None}
    for name in ("advantage", "entropy", "removed", "ref_logprob"):
        if name in row and all(item is None for item in row[name]):
            del row[name]
    row = {name: values if name in ("token_id", "mask", "removed") else _numbers(values) for name, values in row.items()}
    step = line.get("step", step)
    where = "-".join(str(line.get(key)) for key in ("rank", "export_sequence_idx"))
    prompt = _prompt(np.asarray(row["token_id"]), np.asarray(row["mask"]) != 0)
    return row | {"step": step, "prompt_id": prompt, "response_id": None if "None" in where else f"{step}-{where}"}


def slime(sample: Mapping[str, Any], step: int | None) -> Row:
    """A sample of slime's or miles' rollout dump, or of their training dump: log-probabilities cover the response only."""
    n = int(_first(sample, "response_length", "response_lengths"))
    tokens = np.asarray(plain(_first(sample, "tokens", "token_ids")))
    mask = _first(sample, "loss_mask", "loss_masks", missing=None)
    mask = np.ones(n, dtype=bool) if mask is None else np.asarray(plain(mask)) != 0
    names = {
        "old_logprob": ("log_probs",), "behaviour_logprob": ("rollout_log_probs",), "ref_logprob": ("ref_log_probs",),
        "teacher_logprob": ("teacher_log_probs",), "advantage": ("advantages",), "entropy": ("entropy",),
    }  # fmt: skip
    row: Row = {name: _first(sample, *keys, missing=None) for name, keys in names.items()}
    row = {name: _numbers(values) for name, values in row.items() if values is not None}
    reward = _first(sample, "reward", "rewards", missing=None)
    group = _first(sample, "group_index", missing=None)
    index = _first(sample, "index", "sample_index", missing=None)
    return row | {
        "token_id": tokens[len(tokens) - n :], "mask": mask & (not sample.get("remove_sample")), "step": step,
        "reward": reward if isinstance(reward, int | float) else None, "group_id": group, "prompt_id": digest(tokens[: len(tokens) - n]),
        "response_id": None if index is None else f"{step}-{index}",
    }  # fmt: skip


def skyrl(batch: Mapping[str, Any], step: int | None) -> Block:
    """SkyRL's training batch: `[n, t]`, padded on the left, responses only."""
    names = {
        "mask": "loss_mask", "logprob": "action_log_probs", "ref_logprob": "base_action_log_probs", "advantage": "advantages",
        "behaviour_logprob": "rollout_logprobs",
    }  # fmt: skip
    found: Row = {ours: plain(batch[theirs]) for ours, theirs in names.items() if batch.get(theirs) is not None}
    # What it calls the action's is that of the weights that made the batch.
    found["old_logprob"] = found.pop("logprob")
    width = found["old_logprob"].shape[1]
    found["token_id"] = plain(batch["sequences"])[:, -width:]
    if batch.get("rewards") is not None:
        found["reward"] = plain(batch["rewards"]).reshape(len(found["token_id"]), -1).sum(-1)
    metadata = getattr(batch, "metadata", None) or batch.get("metadata") or {}
    if metadata.get("uids") is not None and len(metadata["uids"]) == len(found["token_id"]):
        found["group_id"] = list(metadata["uids"])
    return Block.of(found | ({} if step is None else {"step": step}))


def verl(batch: Any, step: int | None) -> Block:
    """The `DataProto` of verl (or its `batch`), as the trainer has it before the actor's update: `[n, t]`, right-padded responses."""
    tensors = getattr(batch, "batch", batch)
    extra = getattr(batch, "non_tensor_batch", {})
    names = {
        "token_id": "responses", "mask": "response_mask", "old_logprob": "old_log_probs", "ref_logprob": "ref_log_prob",
        "behaviour_logprob": "rollout_log_probs", "advantage": "advantages",
    }  # fmt: skip
    there = set(tensors.keys())
    found: Row = {ours: plain(tensors[theirs]) for ours, theirs in names.items() if theirs in there}
    if "token_level_scores" in there:
        found["reward"] = plain(tensors["token_level_scores"]).sum(-1)
    if "uid" in extra:
        found["group_id"] = [str(uid) for uid in extra["uid"]]
    return Block.of(found | ({} if step is None else {"step": step}))


#: Formats whose files hold one response after the other, and those that hold a batch.
ROWS: dict[str, Callable[[Mapping[str, Any], int | None], Row]] = {"nemo-rl": nemo_rl, "prime-rl": prime_rl, "slime": slime}
BATCHES: dict[str, Callable[[Any, int | None], Block]] = {"skyrl": skyrl, "verl": verl}


def of_dump(payload: Any, format: str, step: int | None) -> Block:
    """What a framework's file holds, once it is loaded, as a block. Raises `ValueError` for a payload that is not of that format."""
    try:
        if format in BATCHES:
            return BATCHES[format](payload, step)
        samples: Iterable[Any] = payload["samples"] if isinstance(payload, Mapping) and "samples" in payload else payload
        step = payload.get("rollout_id", step) if isinstance(payload, Mapping) else step
        return gathered([ROWS[format](sample, step if isinstance(step, int) else None) for sample in samples])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"this is no dump of {format}: {type(error).__name__}: {error}") from None


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _numbers(values: Any) -> Array:
    """Numbers as an array, with NaN for null; one number stays one."""
    array = np.asarray(plain(values))
    if array.dtype == object:
        array = np.array([np.nan if item is None else item for item in array.tolist()])
    return array.astype(np.float64)


def _first(sample: Mapping[str, Any], *keys: str, missing: Any = KeyError) -> Any:
    for key in keys:
        if sample.get(key) is not None:
            return sample[key]
    if missing is KeyError:
        raise KeyError(keys[0])
    return missing


def digest(tokens: Array) -> str:
    """A name for a sequence of ids."""
    return hashlib.blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=8).hexdigest()


def _prompt(tokens: Array, mask: Array) -> str | None:
    """A name for what stands before the first token that counts."""
    first = int(mask.argmax()) if mask.any() else 0
    return digest(tokens[:first]) if first else None
