from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, T5Config
from typer.testing import CliRunner

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_fx.cli import app
from wtacrs_fx.predict import CHECKPOINTING, INDUCTOR, WTACRS, Line, Prediction, predict

SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SMALL, intermediate_size=176, architectures=["LlamaForCausalLM"], use_cache=False)
OTHERS = {
    "bert": BertConfig(**SMALL, intermediate_size=256, architectures=["BertForMaskedLM"]),
    "bert without a head": BertConfig(**SMALL, intermediate_size=256),
    "gpt2": GPT2Config(vocab_size=64, n_embd=64, n_layer=4, n_head=2, architectures=["GPT2LMHeadModel"]),
    "t5": T5Config(
        vocab_size=64, d_model=64, d_kv=32, d_ff=256, num_layers=4, num_heads=2,
        architectures=["T5ForConditionalGeneration"],
    ),
}  # fmt: skip


def saved(config: PreTrainedConfig, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Prediction]:
    folder = saved(LLAMA, tmp_path_factory.mktemp("llama"))
    return folder, predict(folder, 2, 64, torch.float32, Policy(ratio=0.5))


def test_what_is_predicted_is_what_the_whole_model_would_save(llama: tuple[str, Prediction]) -> None:
    found = llama[1]
    with torch.device("meta"):
        model, ids = LlamaForCausalLM(LLAMA), torch.zeros(2, 64, dtype=torch.long)
    report = wtacrs_fx.explain(model, input_ids=ids, labels=ids, policy=Policy(ratio=0.5))
    assert found.saved[INDUCTOR] == report.saved_bytes_before
    assert found.saved[WTACRS] == report.saved_bytes_after
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.layers == 4
    assert found.saved[CHECKPOINTING] < found.saved[INDUCTOR]


@pytest.mark.parametrize("name", OTHERS)
def test_models_with_and_without_a_loss(name: str, tmp_path: Path) -> None:
    found = predict(saved(OTHERS[name], tmp_path), 2, 64, torch.bfloat16, Policy())
    assert 0 < found.saved[WTACRS] < found.saved[INDUCTOR]
    assert len(found.report.sampled) > 4


def test_batches_fit_their_card() -> None:
    found = Prediction("m", 2, 10**9, 4, 8, 2, {WTACRS: 4e9}, wtacrs_fx.Report((), 0, 0))
    assert found.state == 12 * 10**9
    assert found.largest_batch(WTACRS, 24) == 12
    assert found.largest_batch(WTACRS, 10) == 0
    assert Line.through(5, 7)(10) == 23


def test_the_command_prints_a_table_or_json(llama: tuple[str, Prediction]) -> None:
    options = ["--batch", "2", "--length", "64", "--dtype", "float32", "--ratio", "0.5"]
    shown = CliRunner().invoke(app, ["explain", llama[0], *options])
    assert shown.exit_code == 0, shown.output
    assert "model.layers.1.mlp.down_proj" in shown.output and "80 GB" in shown.output
    plain = CliRunner().invoke(app, ["explain", str(Path(llama[0], "config.json")), *options, "--json"])
    data = json.loads(plain.stdout)
    assert data["saved_bytes"] == llama[1].saved
    assert data["largest_batch"][WTACRS]["24 GB"] == llama[1].largest_batch(WTACRS, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model-here"], "'no-such-model-here' was not found"),
        (["{folder}", "--dtype", "int8"], "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (["{folder}", "--ratio", "2"], "ratio must be in (0, 1], got 2.0"),
        (["{folder}", "--residuals", "tiny"], "residuals must be one of"),
        (["{empty}"], "give a folder with a config.json"),
    ],
)
def test_errors_without_tracebacks(
    arguments: list[str], message: str, llama: tuple[str, Prediction], tmp_path: Path
) -> None:
    arguments = [argument.format(folder=llama[0], empty=tmp_path) for argument in arguments]
    shown = CliRunner().invoke(app, ["explain", *arguments])
    assert shown.exit_code == 2
    assert "Traceback" not in shown.output and message in shown.output
