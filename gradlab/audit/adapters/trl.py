"""TRL: GRPO's k3 in the loss, RLOO's k1 in the reward, and the divergence of GKD over the vocabulary.

The trainers' own methods are called on a stand-in that holds what they read and answers for the model.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gradlab.audit.adapters import grpo as grpo_types
from gradlab.audit.batch import Batch, Subject

PACKAGE = "trl"
INSTALL = "pip install trl==1.16.0"


def subjects() -> list[Subject]:
    """All loss types of GRPO by correction; RLOO; GKD at its three directions. TRL ≥ 1.9.2."""
    from trl import GRPOTrainer

    shipped, function = version("trl"), "trl.GRPOTrainer._compute_loss"
    source = inspect.getsource(GRPOTrainer._compute_loss)
    found = list(grpo_types.configurations("trl", grpo, "trl", shipped, function, source))
    for normalised in (False, True):
        options: dict[str, Any] = {"normalize_advantages": normalised}
        name = "trl rloo" + (" normalised" if normalised else "")
        function = "trl.RLOOTrainer._generate_and_score_completions, _compute_loss"
        found.append(Subject(name, partial(rloo, **options), "trl", shipped, function, options, group=2))
    function = "trl.experimental.gkd.GKDTrainer.generalized_jsd_loss"
    for beta in (0.0, 0.5, 1.0):
        options = {"beta": beta, "temperature": 1.0}
        found.append(Subject(f"trl gkd beta={beta:g}", partial(gkd, **options), "trl", shipped, function, options))
        options = {**options, "large_batch": True}
        name = f"trl gkd beta={beta:g} large-batch"
        found.append(Subject(name, partial(gkd, **options), "trl", shipped, function, options))
    return found


def grpo(
    batch: Batch,
    *,
    loss_type: str,
    use_bias_correction_kl: bool,
    importance_sampling_level: str,
    large_batch: bool = False,
) -> Tensor:
    """`GRPOTrainer._compute_loss` with `beta=1`: a scalar.

    `max_completion_length`, the constant that `dr_grpo` divides by, is 1. `num_items_in_batch`, which `dapo`, `cispo` and
    `vespo` divide by, is the number of tokens of the generation batch: those of this batch, or with `large_batch` one per
    response, a constant in proportion to what it tends to as batches grow.
    """
    from trl import GRPOTrainer

    me = SimpleNamespace(
        args=SimpleNamespace(
            use_bias_correction_kl=use_bias_correction_kl,
            delta=None,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
        beta=1.0,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        max_completion_length=1,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        get_gamma_weights=getattr(GRPOTrainer, "get_gamma_weights", None),
        **_trainer(lambda *_: batch.log_prob),
    )
    inputs = {
        **_responses(batch),
        "advantages": batch.response_advantages,
        "old_per_token_logps": batch.behaviour_log_prob,
        "ref_per_token_logps": batch.reference_log_prob,
        "num_items_in_batch": torch.tensor(len(batch.mask)) if large_batch else batch.mask.sum(),
    }
    loss: Tensor = GRPOTrainer._compute_loss(me, None, inputs)
    return loss


def rloo(batch: Batch, *, normalize_advantages: bool) -> Tensor:
    """`RLOOTrainer`, from scoring two responses to one prompt (k1, summed, in the reward) to the loss, with `beta=1`."""
    from trl import RLOOTrainer

    model, reference = SimpleNamespace(is_gradient_checkpointing=False, training=True), SimpleNamespace()
    answers = {id(model): batch.behaviour_log_prob, id(reference): batch.reference_log_prob}
    completions = [row[:length].tolist() for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)]
    size = len(completions)
    me = SimpleNamespace(
        args=SimpleNamespace(
            per_device_train_batch_size=size, gradient_checkpointing_kwargs=None, report_to=[], ds3_gather_for_generation=True
        ),
        beta=1.0,
        ref_model=reference,
        num_generations=size,
        num_generations_eval=size,
        normalize_advantages=normalize_advantages,
        reward_weights=torch.ones(1, dtype=batch.log_prob.dtype),
        reward_clip_range=None,
        reward_func_names=["none"],
        mask_truncated_completions=False,
        pad_to_multiple_of=None,
        eos_token_ids=[],
        log_multimodal=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),  # up to 1.9
        _generate=lambda prompts: ([[0]] * size, completions, [""] * size),
        _calculate_rewards=lambda *_: batch.rewards[:, None],
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        **_trainer(lambda asked, *_: answers[id(asked)] if asked is not None else batch.log_prob, model),
    )
    scored = RLOOTrainer._generate_and_score_completions(me, [{"prompt": ""}] * size)
    loss: Tensor = RLOOTrainer._compute_loss(me, None, scored)
    return loss


def gkd(batch: Batch, *, beta: float, temperature: float, large_batch: bool = False) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss` between the policy (student) and the reference (teacher): a scalar.

    `beta` 0 is KL(teacher ‖ student), 1 KL(student ‖ teacher). `large_batch` as in `grpo`.
    """
    from trl.experimental.gkd import GKDTrainer

    labels = torch.where(batch.mask.bool(), batch.tokens, -100)
    normaliser = {"num_items_in_batch": len(labels)} if large_batch else {}
    loss: Tensor = GKDTrainer.generalized_jsd_loss(
        batch.logits, batch.reference_logits, labels, beta, temperature, **normaliser
    )
    return loss


def _trainer(log_probs: Any, model: Any = None) -> dict[str, Any]:
    """What both trainers read besides their options; `log_probs(model, …)` answers for the models, cut to the asked length."""
    accelerator = SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        reduce=lambda x, reduction="sum": x,
        gather=lambda x: x,
    )

    def answer(asked: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any) -> Any:
        kept = log_probs(asked)[:, :logits_to_keep]
        return kept, torch.zeros_like(kept), None

    return {
        "accelerator": accelerator,
        "model": model or SimpleNamespace(training=True),
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "top_entropy_quantile": 1.0,
        "current_gradient_accumulation_steps": 1,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": answer,
    }


def _responses(batch: Batch) -> dict[str, Tensor]:
    prompt = torch.ones(len(batch.tokens), 1, dtype=torch.long)
    mask = batch.mask.long()
    return {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": batch.tokens, "completion_mask": mask}
