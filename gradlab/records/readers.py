"""`read_rollouts`: from a file or a folder that a run left to `Records`, whatever framework wrote it."""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from gradlab._common.names import check_name
from gradlab.records import formats, parquet
from gradlab.records.block import Block
from gradlab.records.schema import COLUMNS, POLICIES
from gradlab.records.table import Records

FORMATS = ("parquet", "nemo-rl", "prime-rl", "slime", "skyrl")
#: Block, and bytes of text, that are read together from a file of lines.
ROWS, BYTES = 256, 2**26
#: Dumps of text and rewards, by the keys of a line.
TEXTS = {
    "verl": {"input", "output", "score"}, "AReaL": {"task_id", "head_version", "completion"}, "ms-swift": {"completion", "step"},
}  # fmt: skip


def read_rollouts(path: str | Path, format: str | None = None, allow_pickle: bool = False) -> Records:
    """Read rollouts that a training run wrote: a file, or the folder they are in, of any number of steps.

    format: `parquet` (the canonical table, of `gl.Recorder` or `Records.write`), `nemo-rl`, `prime-rl`, `slime` (and miles),
    `skyrl`; without one it is told from names and contents. Files are read a part at a time, each time the records are gone
    through. allow_pickle: let a pickle that holds more than numbers be read, which may run any program that it names: say
    so of files of your own only. What a killed job left of its last line is left out, with a warning.

    Raises `ValueError` for a path that is not there, an unknown format, files that are damaged or hold no log-probabilities, and
    pickles without consent. The formats are told in `gradlab.records.formats`.

    >>> import tempfile, gradlab as gl
    >>> folder = tempfile.mkdtemp()
    >>> _ = gl.Records.from_arrays(logprob=[[-1.0, -0.5]], ref_logprob=[[-1.2, -0.4]]).write(folder + "/run.parquet")
    >>> gl.read_rollouts(folder).columns
    ('mask', 'logprob', 'ref_logprob')
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no {path}")
    if format is not None:
        check_name("format", format, FORMATS)
    known, files = _files(path, format)
    if known == "parquet":
        columns, others = parquet.columns_of(files)
        if not any(name in POLICIES for name in columns):
            _no_log_probabilities(path, set(others))
        return Records(
            lambda: parquet.blocks(files, columns), columns, known, str(path), lambda: parquet.pieces(files, columns)
        )
    if known in ("slime", "skyrl"):
        load = load_pt if known == "slime" else load_pkl
        return _lazily(lambda: (formats.of_dump(load(file, allow_pickle), known, _step(file)) for file in files), known, path)
    return _lazily(lambda: (block for file in files for block in _lines(file, known)), known, path)


def _lazily(blocks: Callable[[], Iterator[Block]], format: str, path: Path) -> Records:
    first = next(iter(blocks()), None)
    if first is None:
        raise ValueError(f"there are no responses in {path}")
    return Records(blocks, tuple(name for name in COLUMNS if name in first), format, str(path))


# ---- which files, of which format ------------------------------------------------------------------------------------------


def _files(path: Path, format: str | None) -> tuple[str, list[Path]]:
    """The format, and the files in the order of their steps. Raises `ValueError` where there are none."""
    if path.is_file():
        return format or _format_of(path), [path]
    patterns = {
        "parquet": ("*.parquet",), "prime-rl": ("step_*/rank_*.jsonl", "token_exports/step_*/rank_*.jsonl", "rank_*.jsonl"),
        "nemo-rl": ("train_data_step*.jsonl", "exp_*/train_data_step*.jsonl"), "slime": ("*.pt", "train_data/*.pt", "rollout_data/*.pt"),
        "skyrl": ("*_training_input.pkl", "dumped_data/*_training_input.pkl"),
    }  # fmt: skip
    for name in [format] if format else FORMATS:
        for pattern in patterns[name]:
            found = [file for file in path.glob(pattern) if not file.name.startswith((".", "eval_"))]
            if name == "prime-rl":
                found = _complete(found)
            if found:
                return name, sorted(found, key=lambda file: (_step(file) or 0, str(file)))
    lines = sorted(path.glob("*.jsonl"))
    if lines:
        return format or _format_of(lines[0]), lines
    inside = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"no dump that gradlab knows is in {path}, which holds {inside}; known are {', '.join(FORMATS)}, and arrays or frames by "
        "gl.Records.from_arrays and from_frame"
    )


def _complete(files: Sequence[Path]) -> list[Path]:
    """Files of steps that every rank has written: prime-rl then leaves a file STABLE beside them."""
    whole = [file for file in files if (file.parent / "STABLE").exists()]
    left = {file.parent.name for file in files} - {file.parent.name for file in whole}
    if whole and left:
        warnings.warn(f"steps that are not complete are left out: {', '.join(sorted(left))} (no file STABLE)", stacklevel=4)
    return whole or list(files)


def _step(file: Path) -> int | None:
    """The step that a file's name, or that of its folder, tells."""
    for text in (file.stem, file.parent.name):
        found = re.findall(r"\d+", text if "rank" not in text else "")
        if found:
            return int(found[-1])
    return None


def _format_of(file: Path) -> str:
    by_name = {".parquet": "parquet", ".pt": "slime", ".pkl": "skyrl", ".pickle": "skyrl"}
    if file.suffix in by_name:
        return by_name[file.suffix]
    if file.suffix not in (".jsonl", ".json"):
        raise ValueError(
            f"{file} is none of .parquet, .jsonl, .pt and .pkl; arrays and frames: gl.Records.from_arrays, from_frame"
        )
    with file.open(encoding="utf-8", errors="replace") as lines:
        keys = set(_parsed(next(iter(lines), "").strip() or "{}", file, 1))
    if "generation_logprobs" in keys:
        return "nemo-rl"
    if "inference_logprobs" in keys:
        return "prime-rl"
    _no_log_probabilities(file, keys)


def _no_log_probabilities(path: Path, keys: set[str]) -> NoReturn:
    writer = next((name for name, some in TEXTS.items() if some <= keys), "TRL" if {"prompt", "completion"} <= keys else None)
    if writer is None and "content" in keys:
        raise ValueError(f"{path} holds text only, as NeMo-RL writes it for distillation and in gym runs; see gl.Recorder")
    if writer is not None:
        raise ValueError(
            f"{path} is {writer}'s dump of text and rewards: it holds no log-probabilities, so nothing can be said of KL or ratios; record "
            "them from the training loop (gl.Recorder), or score the text again and give gl.Records.from_arrays"
        )
    raise ValueError(
        f"{path} holds no log-probabilities that gradlab knows; its fields are {', '.join(sorted(map(str, keys))) or 'none'}"
    )


# ---- lines ------------------------------------------------------------------------------------------------------------------


def _lines(file: Path, format: str) -> Iterator[Block]:
    rows: list[formats.Row] = []
    size, number = 0, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if not line.endswith(b"\n") and not _whole(line):
                warnings.warn(f"the last line of {file} was cut, as of a job that was killed, and is left out", stacklevel=2)
                break
            record = _parsed(line.decode("utf-8", errors="replace"), file, number)
            try:
                rows.append(formats.ROWS[format](record, _step(file)))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise ValueError(f"line {number} of {file} is no record of {format}: {type(error).__name__}: {error}") from None
            size += len(line)
            if len(rows) >= ROWS or size > BYTES:
                yield formats.gathered(rows)
                rows, size = [], 0
    if rows:
        yield formats.gathered(rows)


def _whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parsed(line: str, file: Path, number: int) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {file} is no JSON ({error}): the file is damaged, or of another kind") from None
    if not isinstance(found, dict):
        raise ValueError(f"line {number} of {file} holds no fields, but {type(found).__name__}")
    return found


# ---- pickles ----------------------------------------------------------------------------------------------------------------

_CONSENT = (
    "reading it may run any program that it names, and it need not be of whom it seems. If the file is your own, say "
    "allow_pickle=True (--allow-pickle), or convert it where it was written: gl.Records.from_dump(loaded, {format!r}).write('run.parquet')"
)


def load_pt(file: Path, allow_pickle: bool) -> Any:
    """A file of `torch.save`: numbers, texts and lists of them are read safely, anything else with consent only."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            what = str(error).splitlines()[0].rstrip(".")
            raise ValueError(
                f"{file} is a pickle that holds more than numbers ({what}); {_CONSENT.format(format='slime')}"
            ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged, or no file of torch.save: {str(error).splitlines()[0]}") from None
    return torch.load(file, map_location="cpu", weights_only=False)


def load_pkl(file: Path, allow_pickle: bool) -> Any:
    """SkyRL's pickled batch, with consent: its own classes are read as what they hold, so that SkyRL need not be installed."""
    if not allow_pickle:
        raise ValueError(f"{file} is a pickle; {_CONSENT.format(format='skyrl')}")
    try:
        with file.open("rb") as stream:
            return _Unpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError) as error:
        raise ValueError(f"{file} is damaged, or no pickle of SkyRL's: {type(error).__name__}: {error}") from None


class _Batch(dict[str, Any]):
    """Stands for SkyRL's `TensorBatch`: its tensors, and `metadata`."""

    metadata: Any = None

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.update({key: _tensor(value) for key, value in state["batch_dict"].items()})
        self.metadata = state.get("metadata")


def _rebuilt(_: type, state: Mapping[str, Any]) -> _Batch:
    batch = _Batch()
    batch.__setstate__(state)
    return batch


def _tensor(value: Mapping[str, Any] | None) -> Any:
    if value is None:
        return None
    if value.get("format") == "tensor_list":
        return [_tensor(item) for item in value["items"]]
    if value.get("format") == "torch":
        return torch.load(io.BytesIO(value["data"]), weights_only=True)
    return torch.from_numpy(np.frombuffer(value["data"], dtype=np.dtype(value["dtype"])).reshape(value["shape"]).copy())


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("skyrl", "skyrl_train"):
            return _rebuilt if name == "_rebuild_tensor_batch" else _Batch
        return super().find_class(module, name)
