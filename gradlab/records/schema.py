"""The canonical table: the columns that every dump is read into, whatever wrote it.

As parquet it has one row per response, and what is said of tokens stands in lists; the file's metadata says so under
`gradlab.layout`. A table with one row per token is read, too. What a dump does not hold is null, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Version of the schema, and the keys of a file's metadata.
VERSION = "1"
LAYOUT, FORMAT = "gradlab.layout", "gradlab.records"


@dataclass(frozen=True)
class Column:
    """A column of the canonical table: `per` response, token, or token and rank of a list of the likeliest tokens."""

    name: str
    per: Literal["response", "token", "top"]
    kind: Literal["text", "whole", "real", "truth"]
    meaning: str


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("run", "response", "text", "name of the run"),
        Column("step", "response", "whole", "optimiser step, or number of the rollout"),
        Column("prompt_id", "response", "text", "which prompt was answered"),
        Column("response_id", "response", "text", "name of the response, once in a run"),
        Column("group_id", "response", "text", "responses that are compared with each other, usually those to one prompt"),
        Column("reward", "response", "real", "reward of the response"),
        Column("temperature", "response", "real", "temperature of the sampler"),
        Column("top_p", "response", "real", "mass of the sampler's nucleus"),
        Column("top_k", "response", "real", "number of tokens that the sampler was cut to"),
        Column("prompt_length", "response", "whole", "leading positions of the row that are the prompt's"),
        Column("token_id", "token", "whole", "id of the token"),
        Column("token", "token", "text", "text of the token"),
        Column("mask", "token", "truth", "whether the token counts: it is the policy's own, and enters the loss"),
        Column("advantage", "token", "real", "advantage of the token"),
        Column("logprob", "token", "real", "log π, of the policy that is trained, nats"),
        Column("old_logprob", "token", "real", "log π_old, of the trainer's weights when the batch was made"),
        Column("behaviour_logprob", "token", "real", "log μ, as the engine that drew the token reported it"),
        Column("ref_logprob", "token", "real", "log ref, of the reference"),
        Column("teacher_logprob", "token", "real", "of a teacher"),
        Column("entropy", "token", "real", "entropy of the policy at the token's prefix, nats"),
        Column(
            "removed", "token", "truth", "whether the run's own clip, truncation or mask took the token out of the gradient"
        ),
        Column("top_ids", "top", "whole", "ids of the likeliest tokens at the prefix"),
        Column("top_logprob", "top", "real", "log π of these"),
        Column("top_ref_logprob", "top", "real", "log ref of these"),
    )
}

#: Columns that hold log-probabilities of the drawn tokens.
POLICIES = ("logprob", "old_logprob", "behaviour_logprob", "ref_logprob", "teacher_logprob")
#: How each is called in a sentence.
NAMES = {
    "logprob": "the policy",
    "old_logprob": "the trainer's old policy",
    "behaviour_logprob": "the engine",
    "ref_logprob": "the reference",
    "teacher_logprob": "the teacher",
}
