"""The recorder on a real TRL trainer: what it records is what the trainer's loss was computed from."""

from __future__ import annotations

import pytest
import torch

import gradlab as gl

pytest.importorskip("pyarrow")
pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

WORDS = ["<s>", "</s>", *"abcdefgh"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one layer and its tokenizer, saved."""
    target = tmp_path_factory.mktemp("tiny")
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(target)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(target)
    return target


def test_a_trainer_is_recorded_while_it_trains(folder, tmp_path):
    from datasets import Dataset

    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "trained"), per_device_train_batch_size=8, num_generations=4, max_completion_length=6, max_steps=3,
        beta=0.1, learning_rate=0.05, temperature=0.9, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", seed=1,
        disable_tqdm=True, num_iterations=2, use_bias_correction_kl=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=str(folder), args=config, train_dataset=Dataset.from_dict({"prompt": ["a b", "c d e", "f"]}),
        reward_funcs=lambda completions, **_: [float(text.count("a")) for text in completions],
    )  # fmt: skip
    recorder = gl.Recorder(tmp_path / "rollouts", run="tiny")
    recorder.attach(trainer)
    own = trainer._compute_loss
    trainer.train()
    assert trainer._compute_loss is not own, "detached at the end"
    records = recorder.read()
    tokens = records.tokens()
    assert sorted(set(tokens["step"])) == [0, 1, 2]
    assert {"logprob", "old_logprob", "ref_logprob", "advantage", "group_id", "temperature"} <= set(records.columns)
    assert set(tokens["temperature"]) == {0.9}
    assert len(records.frame()) == 24
    assert records.frame().groupby("step")["group_id"].nunique().tolist() == [2, 2, 2]
    # The first loss is computed with the weights of the reference, which drew the responses as well.
    first = tokens[tokens["step"] == 0]
    assert first["logprob"].to_numpy() == pytest.approx(first["ref_logprob"].to_numpy(), abs=1e-5)
    # The KL that the trainer logged is the mean of k3 over the tokens that were recorded.
    ratio = torch.tensor((tokens["logprob"] - tokens["ref_logprob"]).to_numpy())
    k3 = tokens.assign(k3=(torch.expm1(-ratio) + ratio).numpy()).groupby("step")["k3"].mean()
    logged = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert k3.to_numpy() == pytest.approx(logged, rel=1e-3, abs=1e-6)
    assert k3.iloc[-1] > 1e-4


def test_a_trainer_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"object has no _compute_loss, as TRL 1.16's GRPOTrainer has: call recorder.add"):
        gl.Recorder(tmp_path).attach(object())
