from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._functorch import config as functorch_config
from transformers import (
    AutoConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    T5Config,
)
from typer.testing import CliRunner

import wtacrs_fx
import wtacrs_fx.tools.predict as prediction
from wtacrs_fx import Policy, cli
from wtacrs_fx.cli import app
from wtacrs_fx.tools.predict import (
    BUDGETS,
    CHECKPOINTING,
    INDUCTOR,
    LORA,
    LORA_WTACRS,
    WTACRS,
    Line,
    Loss,
    ModelError,
    Prediction,
    build,
    configuration,
    named_model,
    predict,
)

SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SMALL, intermediate_size=176, architectures=["LlamaForCausalLM"], use_cache=False)
OTHERS = {
    "bert without a head": BertConfig(**SMALL, intermediate_size=256),
    "gpt2": GPT2Config(vocab_size=64, n_embd=64, n_layer=4, n_head=2, architectures=["GPT2LMHeadModel"]),
    "t5": T5Config(
        vocab_size=64, d_model=64, d_kv=32, d_ff=256, num_layers=4, num_heads=2,
        architectures=["T5ForConditionalGeneration"],
    ),
}  # fmt: skip


OPTIONS = ("--batch", "2", "--length", "64", "--dtype", "float32", "--ratio", "0.5")


def saved(config: PreTrainedConfig, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Prediction, dict[str, Any]]:
    """Return a model's folder, what the command predicts of it, and what it prints."""
    folder, found = saved(LLAMA, tmp_path_factory.mktemp("llama")), []

    def keep(*arguments: Any) -> Prediction:
        found.append(predict(*arguments))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "predict", keep)
        data = invoke("explain", str(Path(folder, "config.json")), *OPTIONS)
    return folder, found[0], data


@pytest.fixture(scope="module")
def llama(shown: tuple[str, Prediction, dict[str, Any]]) -> tuple[str, Prediction]:
    return shown[:2]


def test_what_is_predicted_is_what_the_whole_model_would_save(llama: tuple[str, Prediction]) -> None:
    found = llama[1]
    with torch.device("meta"):
        model, ids = LlamaForCausalLM(LLAMA), torch.zeros(2, 64, dtype=torch.long)
    report = wtacrs_fx.explain(model, input_ids=ids, labels=ids, policy=Policy(ratio=0.5))
    assert found.saved[INDUCTOR] == report.saved_bytes_before
    assert found.saved[WTACRS] == report.saved_bytes_after
    for way, bound in {"inductor, budget 0.9": 1e-9, "inductor, budget 0.5": 0.05}.items():
        with functorch_config.patch(activation_memory_budget=BUDGETS[way]):
            exact = Policy(ratio=1.0, residuals="exact")
            whole = wtacrs_fx.explain(model, input_ids=ids, labels=ids, policy=exact)
        assert found.saved[way] == pytest.approx(whole.saved_bytes_before, rel=bound)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.layers == 3
    assert found.saved[CHECKPOINTING] < found.saved[INDUCTOR]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("llama", "LlamaForCausalLM"),
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
        ("vit", None),
    ],
)
def test_a_type_of_models_has_its_own_sizes_and_loss(name: str, head: str | None) -> None:
    config = configuration(name)
    wanted = type(config)(architectures=head and [head])
    assert config.to_diff_dict() == wanted.to_diff_dict()


def test_a_folder_with_the_name_of_a_type_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(LLAMA, tmp_path / "llama")
    assert configuration("llama").hidden_size == LLAMA.hidden_size


def test_a_hub_out_of_reach_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    start = time.perf_counter()
    with pytest.raises(ModelError, match=r"not in the local cache, and the Hub cannot be reached.*127"):
        configuration("no-such-model-here")
    assert time.perf_counter() - start < 5


@pytest.fixture
def two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predict Inductor and wtacrs alone, at one length; all else takes three times as long."""
    lines, known = prediction.saved_lines, {}

    def once(make_model: prediction.MakeModel, policy: Policy) -> Any:
        if policy not in known:
            known[policy] = lines(make_model, policy)
        return known[policy]

    monkeypatch.setattr(prediction, "saved_lines", once)
    monkeypatch.setattr(prediction, "BUDGETS", {})
    monkeypatch.setattr(prediction, "find_spec", lambda name: None)


@pytest.mark.sweep(0.34)
@pytest.mark.usefixtures("two_ways")
@pytest.mark.parametrize("name", OTHERS)
def test_models_with_and_without_a_loss(name: str, tmp_path: Path) -> None:
    found = predict(saved(OTHERS[name], tmp_path), 2, 64, torch.bfloat16, Policy(ratio=0.3))
    assert 0 < found.saved[WTACRS] < found.saved[INDUCTOR]
    assert len(found.report.sampled) > 4


def test_batches_fit_their_card() -> None:
    found = Prediction("m", 2, 10**9, 4, 8, 2, {WTACRS: 4e9}, {WTACRS: 12e9}, wtacrs_fx.Report((), 0, 0))
    assert found.largest_batch(WTACRS, 24) == 12
    assert found.largest_batch(WTACRS, 10) == 0
    assert Line.through(5, 7)(10) == 23


def test_the_command_prints_json(shown: tuple[str, Prediction, dict[str, Any]]) -> None:
    _, found, data = shown
    assert data["saved_bytes"] == found.saved
    assert data["largest_batch"][WTACRS]["24 GB"] == found.largest_batch(WTACRS, 24)


def test_a_prediction_is_printed_as_a_table(
    llama: tuple[str, Prediction], capsys: pytest.CaptureFixture[str]
) -> None:
    cli._print_prediction(llama[1], "float32")
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in shown and "80 GB" in shown and "LoRA, wtacrs" in shown
    assert "batch x length x (" in shown


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


def test_adapters_hold_less_state_and_save_less(llama: tuple[str, Prediction]) -> None:
    found = llama[1]
    assert found.saved[LORA_WTACRS] < 0.5 * found.saved[LORA]
    weights = 4 * found.parameters
    assert weights < found.state[LORA] == found.state[LORA_WTACRS] < 0.7 * found.state[WTACRS]


@pytest.mark.sweep(0.5, "predictions")
@pytest.mark.usefixtures("two_ways")
def test_the_formula_holds_for_other_batches_and_lengths(llama: tuple[str, Prediction]) -> None:
    found = llama[1]
    assert found.per_token is not None and found.per_pair is not None
    other = predict(llama[0], 3, 160, torch.float32, Policy(ratio=0.5))
    formula = 3 * (found.per_token * 160 + found.per_pair * 160**2)
    assert formula == pytest.approx(other.saved[WTACRS], rel=0.02)


def test_no_more_tokens_than_positions(tmp_path: Path) -> None:
    """Learned positions end; those that are computed go on."""
    gpt2 = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2, architectures=["GPT2LMHeadModel"]
    )
    folder = saved(gpt2, tmp_path / "gpt2")
    build(folder, 1, 2, 32, torch.float32, "meta")
    with pytest.raises(ModelError, match="^length must be at most 32, as many positions GPT2Config has"):
        build(folder, 1, 2, 33, torch.float32, "meta")
    llama = LlamaConfig(**SMALL, max_position_embeddings=32, architectures=["LlamaForCausalLM"])
    build(saved(llama, tmp_path / "llama"), 1, 2, 64, torch.float32, "meta")


FACTORIES = """
import torch
from transformers import BertConfig, BertModel

class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bert = BertModel(BertConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1,
                                         num_attention_heads=2, intermediate_size=256))

    def forward(self, input_ids):
        return self.bert(input_ids=input_ids)[0].square().mean()

def make(batch, length):
    return Loss(), {"input_ids": torch.zeros(batch, length, dtype=torch.long)}

class Perceptron(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))

    def forward(self, x):
        return self.layers(x).square().mean()

def small(batch, length):
    return Perceptron(), {"x": torch.randn(batch, length, 64)}

def data():
    return Loss(), [{"input_ids": torch.randint(64, (4, 32))} for _ in range(2)]

def pair(batch, length):
    return 3

def items(batch, length):
    return Loss(), [batch]

def wrong(batch, length):
    return Loss(), {"input_ids": torch.zeros(batch, 1000, dtype=torch.long)}

nothing = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module in the working directory that no other test has imported."""
    name = f"factories_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *sys.path])
    return name


def invoke(*arguments: str) -> dict[str, Any]:
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


def test_a_factory_is_explained_without_memory(factories: str) -> None:
    found = invoke("explain", f"{factories}:make", "--batch", "1000000", "--length", "128")
    assert found["saved_bytes"][WTACRS] < 0.5 * found["saved_bytes"][INDUCTOR]
    assert found["saved_bytes"][INDUCTOR] > 1e11


def test_steps_of_a_factory_are_measured(factories: str) -> None:
    found = invoke("bench", f"{factories}:small", "--batch", "16", "--rounds", "2", "--device", "cpu")
    assert found["wtacrs 0.3"]["saved_bytes"] < 0.5 * found["inductor"]["saved_bytes"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in found.values())
    cli._print_comparison(found, "title")


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_models_are_built_with_a_loss(name: str, tmp_path: Path) -> None:
    config = LLAMA if name == "llama" else OTHERS[name]
    model, inputs = build(saved(config, tmp_path), 1, 2, 16, torch.float32, "cpu")
    model(**inputs).backward()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_factory_of_batches_is_diagnosed(factories: str) -> None:
    found = invoke("diagnose", f"{factories}:data", "--plot", "noise.png")
    assert found["batches"] == 2 and found["layers"][0]["added"] > 0
    assert Path("noise.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("{}:none", "write it as module:factory"),
        ("{}:nothing", "is a int; name a function"),
        ("{}:data", "is called as factory(batch, length) here, but: too many positional arguments"),
        ("{}:pair", "must return a model and its data, a tuple, got a int"),
        ("{}:items", "must return a model and a dict of its arguments, got a list of them"),
        ("{}:wrong", "expand a dimension of length 512 -> 1000"),
    ],
)
def test_what_names_no_factory(name: str, message: str, factories: str) -> None:
    shown = CliRunner().invoke(app, ["explain", name.format(factories)])
    assert shown.exit_code == 2 and message in " ".join(shown.output.split())


@pytest.mark.sweep(0.5, "predictions")
def test_the_largest_batch_by_layers_computed_again(llama: tuple[str, Prediction], tmp_path: Path) -> None:
    picture = tmp_path / "fits.png"
    found = invoke("explain", llama[0], "--length", "64", "--memory", "64MiB", "--plot", str(picture))
    inductor, *ours = found["points"]
    saved, work = [point["saved"] for point in ours], [point["work"] for point in ours]
    assert saved == sorted(saved, reverse=True) and work == sorted(work) and work[0] == 1 < work[-1] < 4 / 3
    assert ours[-1]["batch"] > ours[0]["batch"] > inductor["batch"]
    assert picture.stat().st_size > 10_000
    config = AutoConfig.from_pretrained(llama[0])
    model, inputs = named_model(config, config.num_hidden_layers, 1, 64, torch.bfloat16)
    policy = Policy(ratio=0.3, recompute=1.0)
    whole = wtacrs_fx.explain(Loss(model), policy=policy, **inputs)
    assert ours[-1]["saved"] == pytest.approx(whole.saved_bytes_after, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "24"], "--memory must be a whole number of bytes, or a text such as '14GiB'"),
        (["--memory", "24 gigs"], "--memory must be"),
    ],
)
def test_memory_that_is_none(llama: tuple[str, Prediction], arguments: list[str], message: str) -> None:
    shown = CliRunner().invoke(app, ["explain", llama[0], *arguments])
    assert shown.exit_code == 2 and message in shown.output
