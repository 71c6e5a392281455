"""A real ``Trainer`` with wtacrs: accumulation, mixed precision, evaluation, checkpoint and resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import RowsOnly
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from wtacrs_fx import Policy, Rule
from wtacrs_fx.integrations.transformers import IntegrationError, enable

SAMPLES, TOKENS, BATCH = 64, 16, 8


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=TOKENS,
            attention_probs_dropout_prob=0.0,
        )
    )


def dataset() -> list[dict[str, Tensor]]:
    """Texts that start with a token for their class."""
    numbers = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 50, (SAMPLES, TOKENS), generator=numbers)
    labels = torch.arange(SAMPLES) % 2
    tokens[:, 0] = labels
    mask = torch.ones(TOKENS, dtype=torch.long)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, label in zip(tokens, labels, strict=True)
    ]


def trainer(folder: Path, network: nn.Module | None = None, **arguments: object) -> Trainer:
    return Trainer(
        model() if network is None else network,
        TrainingArguments(
            folder,
            **{
                "per_device_train_batch_size": BATCH,
                "gradient_accumulation_steps": 2,
                "bf16": True,
                "use_cpu": not torch.cuda.is_available(),
                "learning_rate": 5e-3,
                "max_steps": 12,
                "logging_steps": 4,
                "eval_strategy": "steps",
                "eval_steps": 6,
                "save_steps": 6,
                "report_to": [],
                "disable_tqdm": True,
                **arguments,
            },
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Return a trainer after 12 steps, with a checkpoint at the 6th."""
    one = trainer(tmp_path_factory.mktemp("trained"))
    enable(one, Policy(ratio=0.3, min_rows=8), diagnose_steps=8)
    one.train()
    return one


def test_training_learns_and_logs_what_it_saves(trained: Trainer) -> None:
    logs = [entry for entry in trained.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    assert logs[-1]["wtacrs/saved_ratio"] < 0.5
    assert logs[-1]["wtacrs/saved_mib"] > 0 and logs[-1]["wtacrs/peak_mib"] > 0
    assert "wtacrs/added_variance" not in logs[0] and 0 < logs[-1]["wtacrs/added_variance"] < 10
    evaluations = [entry for entry in trained.state.log_history if "eval_loss" in entry]
    assert evaluations[-1]["eval_loss"] < 0.5 and "wtacrs/saved_mib" not in evaluations[-1]


def test_parameter_names_and_checkpoints_stay(trained: Trainer) -> None:
    assert set(trained.model.state_dict()) == set(model().state_dict())
    loaded = BertForSequenceClassification.from_pretrained(f"{trained.args.output_dir}/checkpoint-6")
    assert loaded.config.num_hidden_layers == 1


@pytest.mark.sweep(0.34, "trainers")
def test_gradient_checkpointing_stores_less_than_it_does_alone(tmp_path: Path) -> None:
    """Layers are computed again from inputs in 8 bits; the graph stays whole and the log has its bytes."""
    torch._dynamo.reset()  # else sizes that differ from those of other tests are symbols, and no numbers in the log
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=256,
        )
    )
    one = trainer(
        tmp_path,
        network,
        max_steps=4,
        logging_steps=1,
        gradient_checkpointing=True,
        eval_strategy="no",
        save_strategy="no",
    )
    one.train_dataset = [{**sample, "labels": sample["input_ids"]} for sample in dataset()]
    enable(one, Policy(ratio=1.0))
    one.train()
    logs = [entry for entry in one.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert logs[-1]["wtacrs/saved_ratio"] < 0.5  # of PyTorch's checkpoints


def test_a_checkpoint_holds_what_a_noise_budget_has_led_to(trained: Trainer) -> None:
    path = Path(trained.args.output_dir, "checkpoint-6", "wtacrs_decided.json")
    assert json.loads(path.read_text()) == []
    callback = enable(model())
    decided = (Rule("bert.*.query", ratio=0.5, product="exact"), Rule("b[[]0]", ratio=0.3, product="auto"))
    callback.backend.decided = decided
    at_6 = SimpleNamespace(global_step=6, is_world_process_zero=True)
    callback.on_save(trained.args, at_6, None)
    resumed = enable(model())
    resumed.on_train_begin(trained.args, SimpleNamespace(global_step=0), None)
    assert resumed.backend.policy == Policy()
    resumed.on_train_begin(trained.args, at_6, None)
    assert resumed.backend.policy == Policy(decided=decided) and resumed.backend.decided == decided
    path.write_text("[]")


@pytest.mark.sweep(0.34, "trainers")
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    """Same batches, dropout and draws: the checkpoint holds the state of the random number generators."""
    weights = []
    for resume in (False, True):
        one = trainer(tmp_path, bf16=False, eval_strategy="no")
        enable(one, RowsOnly(min_rows=8))
        one.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-6" if resume else None)
        weights.append(one.model.bert.encoder.layer[0].output.dense.weight.detach().clone())
    torch.testing.assert_close(*weights)


class Recorder(TrainerCallback):
    """A user's callback that comes after the one of wtacrs."""

    seen: list[dict[str, float]]

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        self.seen.append(logs)


def test_callbacks_of_the_user_see_the_figures(tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=1, logging_steps=1, eval_strategy="no", save_strategy="no")
    user = Recorder()
    user.seen = []
    one.add_callback(user)
    enable(one, Policy(ratio=0.3, min_rows=8))
    one.train()
    assert "wtacrs/saved_ratio" in user.seen[0]


@pytest.mark.sweep(0.34, "trainers")
def test_a_smaller_last_batch_leaves_numbers_in_the_checkpoint(tmp_path: Path) -> None:
    """It is compiled for any batch, whose report is in symbols; the state of a trainer is JSON."""
    one = trainer(
        tmp_path, max_steps=-1, num_train_epochs=2, eval_strategy="no", save_steps=1, logging_steps=1
    )
    one.train_dataset = dataset()[: 2 * BATCH + 3]
    callback = enable(one, Policy(ratio=0.3, min_rows=8))
    one.train()
    assert not isinstance(callback.backend.reports[-1].saved_bytes_after, int)
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [entry["wtacrs/saved_mib"] for entry in history] == [history[0]["wtacrs/saved_mib"]] * 4


@pytest.mark.sweep(0.34, "trainers")
def test_a_model_without_a_trainer() -> None:
    network = model()
    callback = enable(network, Policy(ratio=0.3, min_rows=8))
    batch = {name: torch.stack([sample[name] for sample in dataset()[:BATCH]]) for name in dataset()[0]}
    network(**batch).loss.backward()
    [report] = callback.backend.reports
    assert report.saved_bytes_after < 0.5 * report.saved_bytes_before


@pytest.mark.sweep(0.34, "trainers")
def test_a_language_model_trains_without_its_logits(tmp_path: Path) -> None:
    """Loss and gradients are made for a few tokens at a time; evaluation returns logits as ever."""
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
    }
    network = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=32, tie_word_embeddings=True, **sizes))
    one = trainer(tmp_path, network, max_steps=4, logging_steps=1, eval_steps=4, save_strategy="no")
    one.train_dataset = one.eval_dataset = [
        {"input_ids": sample["input_ids"], "labels": sample["input_ids"]} for sample in dataset()
    ]
    callback = enable(one, Policy(ratio=0.3, min_rows=8, chunk_bytes=32 * 512 * 4))
    one.train()
    logs = one.state.log_history
    assert logs[3]["loss"] < logs[0]["loss"] and logs[4]["eval_loss"] > 0
    losses = [loss for report in callback.backend.reports for loss in report.losses]
    assert {(loss.module, loss.words, loss.chunk, loss.reason) for loss in losses} == {
        ("lm_head", 512, 32, "")
    }
    ids = dataset()[0]["input_ids"].unsqueeze(0)
    assert one.model.eval()(input_ids=ids, labels=ids).logits.shape == (1, TOKENS, 512)


@pytest.mark.sweep(0.34, "trainers")
def test_a_trainer_with_a_loss_of_its_own_keeps_the_logits(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
            return model(**inputs).logits.square().mean()

    one = trainer(tmp_path)
    one.__class__ = Own
    enable(one, Policy(ratio=0.3, min_rows=8))
    batch = {name: torch.stack([sample[name] for sample in dataset()[:BATCH]]) for name in dataset()[0]}
    assert one.compute_loss(one.model.train(), batch).isfinite()


def test_what_cannot_be_enabled(tmp_path: Path) -> None:
    with pytest.raises(IntegrationError, match=r"needs a transformers.Trainer or an nn.Module, got a str"):
        enable("bert")
    network = model()
    enable(network)
    with pytest.raises(IntegrationError, match="compiled already"):
        enable(network)
    with pytest.raises(IntegrationError, match="leave torch_compile"):
        enable(trainer(tmp_path, torch_compile=True))
