"""Roles: what an argument of a loss can be, how it is read off a batch, and which names people give it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from gradlab.audit.batch import Batch

#: What an argument can be, and how it is read off a batch.
ROLES: dict[str, Callable[[Batch], Any]] = {
    "log_prob": lambda b: b.log_prob,
    "reference_log_prob": lambda b: b.reference_log_prob,
    "behaviour_log_prob": lambda b: b.behaviour_log_prob,
    "logits": lambda b: b.logits,
    "reference_logits": lambda b: b.reference_logits,
    "behaviour_logits": lambda b: b.behaviour_logits,
    "log_probs_of_vocabulary": lambda b: b.logits.log_softmax(-1),
    "reference_log_probs_of_vocabulary": lambda b: b.reference_logits.log_softmax(-1),
    "log_ratio": lambda b: b.log_prob - b.reference_log_prob,
    "importance_ratio": lambda b: (b.log_prob - b.behaviour_log_prob).exp(),
    "mask": lambda b: b.mask,
    "inverted_mask": lambda b: 1 - b.mask,
    "tokens": lambda b: b.tokens,
    "labels": lambda b: torch.where(b.mask.bool(), b.tokens, -100),
    "advantages": lambda b: b.advantages,
    "rewards": lambda b: b.rewards,
    "token_rewards": lambda b: b.token_rewards,
    "returns": lambda b: b.rewards[:, None].expand_as(b.mask),
    "values": lambda b: torch.zeros_like(b.reference_log_prob),
    "lengths": lambda b: b.lengths,
    "tokens_in_batch": lambda b: b.mask.sum(),
    "max_length": lambda b: b.mask.shape[1],
    "batch": lambda b: b,
    "micro_batches": lambda b: [b.rows([i]) for i in range(len(b.mask))],
    "coefficient": lambda b: 1.0,
}
#: Roles that are configuration: a default, if there is one, stays.
CONFIGURATION = ("coefficient", "max_length", "tokens_in_batch")
#: Roles that say something of the policy; a loss needs one of them.
OF_THE_POLICY = ("log_prob", "logits", "log_probs_of_vocabulary", "log_ratio", "importance_ratio", "batch", "micro_batches")
#: Roles of the task.
OF_THE_TASK = ("advantages", "rewards", "token_rewards", "returns", "batch", "micro_batches")
#: Patterns of names, underscores left out, in order; the first that matches decides. In log-probabilities and logits the
#: prefix or suffix says whose they are.
_WHOSE = (
    (r"ref|base|sft|init|anchor|teacher|prior", "reference_"),
    (r"old|behaviou?r|sampl|rollout|infer|generat|prev|vllm|mu(?=log)|actorold|proximal", "behaviour_"),
)
#: Whose they are where nothing else says it: a trainer's old weights, or a frozen model that is called old.
_UNCERTAIN = r"old|prev"
_PATTERNS = (
    (r"^((micro|mini)batches|batches)$", "micro_batches"),
    (r"^((micro|mini)?batch|data|inputs?|samples?|experiences?|tensordict|td|rollouts?|modelinputs)$", "batch"),
    (r"log(prob|p|its?p?r?ob)?s?ratios?|^logrs?$|^logratios?$", "log_ratio"),
    (r"logits?", "logits"),
    (r"logp|logprob|loglikelihood|^(pi|policy|new|ref|teacher|old|rollout|sampler)?lps?$|logπ|^logps?$", "log_prob"),
    (r"^(is|importance|iw|rho|ratio)(weights?|ratios?|sampling(weights?|ratios?))?s?$", "importance_ratio"),
    (r"masks?$|^masks?", "mask"),
    (r"^adv|advantages?$", "advantages"),
    (r"^token(level)?(rewards?|scores?)$", "token_rewards"),
    (r"^(rewards?|scores?)$", "rewards"),
    (r"returns?$", "returns"),
    (r"^(old|token|state)?values?$|^vpreds?$", "values"),
    (r"^labels?$", "labels"),
    (r"^(inputids|completionids?|responseids?|tokens?(ids?)?|actions?|responses?|targetids?|sequences?)$", "tokens"),
    (r"^(response|completion|sequence|seq)?(lengths?|lens?)$", "lengths"),
    (r"^(num|n)(items|tokens|actions)|batchnumtokens|globaltokens|totaltokens", "tokens_in_batch"),
    (r"^max(completion|response|seq|sequence|token)?s?(length|len|tokens?)$|loss(scale)?factor", "max_length"),
    (r"^(kl|ref|loss|penalty)*(loss|penalty|ctl|reg)?(coeff?s?|beta|weight|lambda|scale)$", "coefficient"),
)  # fmt: skip


def plain(name: str) -> str:
    """A name without underscores and digits, in small letters."""
    return re.sub(r"[^a-zα-ω]", "", name.lower())


def role_of(name: str) -> str | None:
    """The role that an argument of this name has, or `None` when the name is not understood."""
    said = plain(name)
    for pattern, role in _PATTERNS:
        if re.search(pattern, said):
            if role in ("log_prob", "logits"):
                return next((who for words, who in _WHOSE if re.search(words, said)), "") + role
            return str(role)
    return None


def uncertain(name: str) -> bool:
    """Whether a name says only that log-probabilities are old: of the sampler, or of a frozen reference."""
    said = plain(name)
    words = _WHOSE[1][0].replace("old|", "").replace("prev|", "").replace("actorold|", "")
    return bool(re.search(_UNCERTAIN, said)) and not re.search(words, said)


def of_padding(name: str) -> bool:
    """Whether a mask of this name may mark what is left out and not what is live."""
    return re.search(r"pad|ignor|invalid|exclu|drop", plain(name)) is not None
