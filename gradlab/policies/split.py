"""A transformer cut in two: the frozen blocks below, whose activations are kept, and the blocks that are trained.

The blocks run in the library's own code: the upper part is the same network with a shorter list of blocks, fed activations in
place of embeddings. Networks that do more to embeddings than read them (learned positions, scaling) are found out by comparing
the two parts with the whole on a short sequence.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradlab.policies.arithmetic import faithful
from gradlab.policies.trunk import Trunk

#: Largest difference of logits, relative to their size, between the two parts and the whole: rounding.
AGREEMENT = 1e-4


def decoder(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and list of a network's blocks. Raises `ValueError` where it has no such list."""
    depth = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ValueError(
        f"{type(model).__name__} has no list of {depth} blocks to count trainable ones in; name the parameters instead"
    )


def split(model: Any, trainable: int | Sequence[str] | None) -> tuple[list[str], int]:
    """Names of the trained parameters and the lowest block that holds one (0: nothing can be cut off).

    trainable: names, a number of blocks counted from the top, or `None` for all. Raises `ValueError` for anything else.
    """
    known = [name for name, _ in model.named_parameters()]
    if trainable is None:
        return known, 0
    if isinstance(trainable, int):
        path, blocks = decoder(model)
        if not 1 <= trainable <= len(blocks):
            raise ValueError(f"trainable counts blocks from the top, 1 to {len(blocks)} of them, got {trainable}")
        first = len(blocks) - trainable
        return [name for name in known if (block := _block(name, path)) is not None and block >= first], _cut(model, first)
    unknown = [name for name in trainable if name not in known]
    if unknown or not trainable:
        raise ValueError(
            f"trainable names parameters of the network; unknown {unknown or '(none given)'}, known {known[-12:]} …"
        )
    path, blocks = decoder(model)
    # The final norm and the output layer lie above every block; the embedding lies below.
    embedding = {id(weight) for weight in model.get_input_embeddings().parameters()}
    weights = dict(model.named_parameters())
    if any(id(weights[name]) in embedding for name in trainable):
        return list(trainable), 0
    held = [block for name in trainable if (block := _block(name, path)) is not None]
    return list(trainable), _cut(model, min(held, default=len(blocks) - 1))


def _block(name: str, path: str) -> int | None:
    number = name.removeprefix(f"{path}.").split(".")[0]
    return int(number) if name.startswith(f"{path}.") and number.isdigit() else None


def _cut(model: Any, first: int) -> int:
    """`first`, or 0 with a warning where the network does not survive the cut."""
    if first == 0:
        return 0
    layer_types = set(getattr(model.config, "layer_types", None) or ())
    ids = torch.arange(6)[None] % model.config.vocab_size
    with torch.no_grad(), faithful(next(model.parameters()).dtype):
        full_logits = model(input_ids=ids, use_cache=False).logits
        parts = upper(model, first, full_logits.dtype)(inputs_embeds=lower(model, first)(ids), use_cache=False).logits
    if not bool(torch.isfinite(full_logits.sum())):
        raise ValueError(f"{type(model).__name__} gives NaN or infinite logits; check its weights and its precision")
    relative_gap = float((parts - full_logits).abs().max() / full_logits.abs().max())
    if relative_gap <= AGREEMENT and len(layer_types) <= 1:
        return first
    reason = (
        f"blocks of several kinds {sorted(layer_types)}"
        if len(layer_types) > 1
        else f"logits that differ by {relative_gap:.1g} when cut"
    )
    warnings.warn(f"{type(model).__name__} has {reason}: the frozen trunk is not cached, which is slower", stacklevel=4)
    return 0


def upper(model: Any, first: int, precision: torch.dtype, whole_output: bool = True) -> Any:
    """The network without its lowest `first` blocks, in a precision; in its own, it shares the weights. Names stay the same.

    whole_output: whether its output layer is read as it is; otherwise only a stub of it is copied.
    """
    path, blocks = decoder(model)
    kept = nn.ModuleList()
    for number, block in list(enumerate(blocks))[first:]:
        kept.add_module(str(number), block)
    top = _shallow(model)
    at = top
    *parents, last = path.split(".")
    for parent in parents:
        setattr(at, parent, _shallow(getattr(at, parent)))
        at = getattr(at, parent)
    setattr(at, last, kept)
    if next(model.parameters()).dtype == precision:
        return top
    # What is never read would only take room in the other precision.
    output = top.get_output_embeddings()
    if first:
        top.set_input_embeddings(nn.Embedding(1, 1))
    if not whole_output:
        top.set_output_embeddings(nn.Linear(1, 1, bias=output.bias is not None))
    return copy.deepcopy(top).to(precision)


def _shallow(module: Any) -> Any:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone


class _Lower(nn.Module):
    """Ids `[b, s]` to what block `first` reads, `[b, s, d]`."""

    def __init__(self, model: Any, first: int) -> None:
        super().__init__()
        self.model, self.first = model, first

    def forward(self, ids: Tensor, **kwargs: Any) -> Tensor:
        with faithful(next(self.model.parameters()).dtype):
            output = self.model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True, **kwargs)
        activations: Tensor = output.hidden_states[self.first]
        return activations


def lower(model: Any, first: int) -> nn.Module:
    """The network's lowest `first` blocks, from ids to activations."""
    return _Lower(model, first)


def layout(vocab: int, length: int) -> tuple[Tensor, Tensor]:
    """The trie of all prefixes of `1 … length − 1` tokens, breadth-first: token and parent (−1: the prompt) of each, `[m]`."""
    tokens: list[int] = []
    parents: list[int] = []
    above = [-1]
    for _ in range(1, length):
        start = len(tokens)
        tokens += [token for _ in above for token in range(vocab)]
        parents += [parent for parent in above for _ in range(vocab)]
        above = list(range(start, len(tokens)))
    return torch.tensor(tokens, dtype=torch.long), torch.tensor(parents, dtype=torch.long)


class Packed(Trunk):
    """All prefixes of a prompt's responses in one sequence: the prompt, then the trie, each token attending to its own ancestors.

    actions: ids of the action set `[v]`. The activations that block `first` reads are computed once per prompt and kept, for whole
    trees (`inputs`) and for single sequences of prompt and response (called as a `Trunk`) alike, so that both see the same numbers.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], actions: Sequence[int], length: int, first: int) -> None:
        super().__init__(lower(model, first))
        self.model, self.actions, self.length, self.first = model, list(actions), length, first
        self.prompts = {tuple(int(i) for i in prompt) for prompt in prompts}
        self.tokens, parents = layout(len(self.actions), length)
        self.sees = torch.eye(len(parents), dtype=torch.bool)
        for node, parent in enumerate(parents.tolist()):
            if parent >= 0:
                self.sees[node] |= self.sees[parent]
        self._trees: dict[tuple[int, ...], Tensor] = {}

    def of(self, model: Any) -> Packed:
        """The same for another network."""
        return Packed(model, sorted(self.prompts), self.actions, self.length, self.first)

    def __call__(self, ids: Tensor) -> Tensor:
        """Activations `[b, s, d]` of ids `[b, s]`: read off the trees where all rows are in them, otherwise computed."""
        activations = []
        for row in ids.tolist():
            places = self._places(row)
            if places is None:
                return super().__call__(ids)
            activations.append(self._tree(places[0])[0, places[1]])
        return torch.stack(activations)

    def _places(self, row: Sequence[int]) -> tuple[tuple[int, ...], list[int]] | None:
        """The prompt that a sequence begins with, and the positions of its ids in that prompt's tree."""
        for answer_length in range(min(self.length, len(row))):
            prompt, answer = tuple(row[: len(row) - answer_length]), row[len(row) - answer_length :]
            if prompt in self.prompts and all(i in self.actions for i in answer):
                node, places = -1, list(range(len(prompt)))
                for i in answer:  # the children of node k of a breadth-first trie start at (k + 1) v
                    node = (node + 1) * len(self.actions) + self.actions.index(i)
                    places.append(len(prompt) + node)
                return prompt, places
        return None

    def _kwargs(self, prompt: tuple[int, ...], precision: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
        """Ids `[1, s]` of a prompt's tree, with its attention mask and positions."""
        p, m = len(prompt), len(self.tokens)
        sees = torch.zeros(p + m, p + m, dtype=torch.bool)
        sees[:p, :p] = torch.ones(p, p, dtype=torch.bool).tril()
        sees[p:, :p], sees[p:, p:] = True, self.sees
        mask = torch.zeros(sees.shape, dtype=precision).masked_fill(~sees, torch.finfo(precision).min)
        positions = torch.cat([torch.arange(p), p - 1 + self.sees.sum(-1)])
        ids = torch.tensor([[*prompt, *(self.actions[token] for token in self.tokens.tolist())]])
        return ids, {"attention_mask": mask[None, None], "position_ids": positions[None]}

    def _tree(self, prompt: tuple[int, ...]) -> Tensor:
        if prompt not in self._trees:
            ids, kwargs = self._kwargs(prompt, next(self.model.parameters()).dtype)
            with torch.no_grad():
                self._trees[prompt] = self.module(ids, **kwargs)
        return self._trees[prompt]

    def inputs(self, prompt: Sequence[int], precision: torch.dtype) -> dict[str, Any]:
        """What the upper part reads for one prompt to give logits at its end and at every node, `[1, nodes, …]`."""
        prompt_ids = tuple(int(i) for i in prompt)
        ids, kwargs = self._kwargs(prompt_ids, precision)
        kwargs["logits_to_keep"] = torch.arange(len(prompt_ids) - 1, ids.shape[1])
        return kwargs | ({"inputs_embeds": self._tree(prompt_ids).to(precision)} if self.first else {"input_ids": ids})
