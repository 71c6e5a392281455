"""Adapters of peft: frozen weights cost nothing, LoRA is sampled where it pays, the others stay right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aot import REFERENCE, Variants, distance, small_tensors, wrong_bytes
from conftest import adds_up, is_unbiased
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, Qwen3MoeConfig, Qwen3MoeModel

import wtacrs_fx
from wtacrs_fx import Policy

peft = pytest.importorskip("peft")

TOKENS = torch.randint(100, (4, 32), generator=torch.Generator().manual_seed(0))
LINEARS = ["query", "key", "value", "dense"]
EXACT = Policy(residuals="exact", ratio=1.0)
ROWS = Policy(ratio=0.3, residuals="exact")


class Adapted(nn.Module):
    """A BERT of one layer with adapters: tokens to a scalar."""

    def __init__(self, config: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        bert = BertModel(
            BertConfig(**sizes, intermediate_size=64, hidden_dropout_prob=0, attention_probs_dropout_prob=0),
            add_pooling_layer=False,
        )
        self.model = peft.get_peft_model(bert, config)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)  # zero would leave A without a gradient

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state.sin().sum()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients, and check that only adapters have one."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    call(TOKENS).backward()
    return trained(model)


@pytest.fixture(scope="module")
def lora() -> Adapted:
    return Adapted(peft.LoraConfig(r=4, target_modules=LINEARS))


def test_lora_keeps_nothing_for_frozen_weights(lora: Adapted) -> None:
    report = wtacrs_fx.explain(lora, TOKENS, policy=ROWS)
    prefix = "model.base_model.model.encoder.layer.0."
    assert all(site.module.startswith(prefix) for site in report.sites)  # as named_modules() prints them
    reasons = {site.module.removeprefix(prefix): site.reason for site in report.sites}
    assert len(reasons) == 2 * 6
    assert {reason for name, reason in reasons.items() if "lora_B" in name} == {
        "4 features, fewer than min_features"
    }
    assert not any(reason for name, reason in reasons.items() if "lora_A" in name)
    assert report.saved_bytes_after < 0.8 * report.saved_bytes_before
    balanced = wtacrs_fx.explain(lora, TOKENS, policy=Policy(ratio=0.3))
    assert balanced.saved_bytes_after < 0.45 * balanced.saved_bytes_before
    assert adds_up(report) and adds_up(balanced)


def test_patterns_reach_adapters(lora: Adapted) -> None:
    report = wtacrs_fx.explain(
        lora, TOKENS, policy=Policy(ratio=0.3, residuals="exact", exclude=("*.query.lora_A.*",))
    )
    assert [site.module for site in report.sites if site.reason == "excluded by the policy"] == [
        "model.base_model.model.encoder.layer.0.attention.self.query.lora_A.default"
    ]


def test_lora_gradients_are_unbiased(lora: Adapted) -> None:
    exact = gradients(lora, lora)
    call = torch.compile(lora, backend=wtacrs_fx.backend(ROWS), fullgraph=True)
    runs = [gradients(lora, call) for _ in range(200)]
    for name, expected in exact.items():
        samples = torch.stack([run[name].flatten() for run in runs])
        if "lora_A" in name:
            assert samples.std(0).max() > 0, name
            assert is_unbiased(samples, expected.flatten()), name
        else:
            torch.testing.assert_close(samples[0], expected.flatten(), rtol=1e-4, atol=1e-4)


def test_ia3_is_exact_with_the_reason() -> None:
    model = Adapted(
        peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
    )
    report = wtacrs_fx.explain(model, TOKENS, policy=ROWS)
    assert len(report.sites) == 4 and not report.sampled
    assert all("not by a matrix product over rows" in site.reason for site in report.sites)
    exact = gradients(model, model)
    found = gradients(model, torch.compile(model, backend=wtacrs_fx.backend(ROWS), fullgraph=True))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_dora_compiles() -> None:
    """Dynamo breaks the graph at each layer, with every backend; what is between is compiled."""
    model = Adapted(peft.LoraConfig(r=4, target_modules=["query"], use_dora=True))
    exact = gradients(model, model)
    found = gradients(model, torch.compile(model, backend=wtacrs_fx.backend(EXACT)))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    call = torch.compile(model, backend=wtacrs_fx.backend(ROWS))
    runs = [gradients(model, call) for _ in range(100)]
    for name, expected in exact.items():
        samples = torch.stack([run[name].flatten() for run in runs])
        if samples.std(0).max() > 1e-4:
            assert is_unbiased(samples, expected.flatten()), name
        else:
            torch.testing.assert_close(samples[0], expected.flatten(), rtol=1e-3, atol=1e-3)


def quantised(model: nn.Module) -> nn.Module:
    """Return a model whose linears are frozen, in the NF4 of bitsandbytes, as transformers loads one for QLoRA."""
    bnb = pytest.importorskip("bitsandbytes")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                four = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )  # fmt: skip
                four.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, four.to("cpu"))
    return model


class Decoder(nn.Module):
    """A Llama of one layer in bfloat16 with adapters: tokens to a scalar."""

    def __init__(self, config: object, bits: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1, "vocab_size": 100}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaModel(LlamaConfig(**sizes, use_cache=False)).bfloat16()
        self.model = peft.get_peft_model(quantised(model) if bits == 4 else model, config)
        trained_from_noise(self.model)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).last_hidden_state.float().sin().mean()


def trained_from_noise(model: nn.Module) -> None:
    """Let no adapter be zero at the start, so that all of them have a gradient."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("_B" in name or "lambda" in name):
            nn.init.normal_(parameter, std=0.1)


CONFIGS: dict[str, Callable[[], object]] = {
    "LoRA": lambda: peft.LoraConfig(r=8, target_modules="all-linear"),
    "rsLoRA": lambda: peft.LoraConfig(r=8, target_modules="all-linear", use_rslora=True),
    "LoRA with dropout": lambda: peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1),
    "LoRA of the embedding": lambda: peft.LoraConfig(
        r=8, target_modules=["embed_tokens", "q_proj", "down_proj"]
    ),
    "VeRA": lambda: peft.VeraConfig(r=16, target_modules=["q_proj", "o_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=8, task_type="FEATURE_EXTRACTION"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=8, task_type="FEATURE_EXTRACTION"),
}


@pytest.mark.sweep(0.34)
@pytest.mark.parametrize(("name", "bits"), [*((name, 16) for name in CONFIGS), ("LoRA", 4)])
def test_adapters_of_a_decoder_in_16_bits_and_on_weights_in_4(name: str, bits: int) -> None:
    model, tokens = Decoder(CONFIGS[name](), bits), torch.randint(100, (4, 64))
    policies = {"exact": EXACT, "balanced": Policy(ratio=1.0)}
    variants = Variants(policies)
    call = torch.compile(model, backend=variants)
    found = {}
    with small_tensors():
        for variants.active in (REFERENCE, *policies):
            torch.manual_seed(0)
            call(tokens).backward()
            found[variants.active] = torch.cat([each.flatten().float() for each in trained(model).values()])
    [graph] = variants.graphs
    assert not wrong_bytes(graph)
    assert found["exact"].equal(found[REFERENCE])
    assert distance(found["balanced"], found[REFERENCE]) < 0.02
    report = graph.partitions["balanced"].report
    assert report is not None and adds_up(report)
    assert report.saved_bytes_after < 0.45 * report.saved_bytes_before
    # Weights in few bits are made whole in the backward pass again, not stored.
    assert not any("dequantize" in each.operation and each.bytes_after for each in report.residuals)


class Experts(nn.Module):
    """A mixture of eight experts in bfloat16, with adapters on the experts' weights: tokens to a scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8}
        model = Qwen3MoeModel(
            Qwen3MoeConfig(**sizes, moe_intermediate_size=32, num_experts_per_tok=2, use_cache=False)
        )
        weights = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(r=8, target_modules=["q_proj"], target_parameters=weights)
        self.model = peft.get_peft_model(model.bfloat16(), config)
        trained_from_noise(self.model)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).last_hidden_state.float().sin().mean()


def two_at_once() -> nn.Module:
    """Adapters that are trained together, on weights into which a third one was merged."""
    model = Decoder(peft.LoraConfig(r=4, target_modules=["q_proj"]), 16)
    model.model = peft.get_peft_model(
        model.model.merge_and_unload(), peft.LoraConfig(r=8, target_modules=["q_proj", "o_proj"])
    )
    model.model.add_adapter("second", peft.LoraConfig(r=16, target_modules=["v_proj", "o_proj"]))
    model.model.base_model.set_adapter(["default", "second"])
    trained_from_noise(model.model)
    return model


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("make", [Experts, two_at_once])
def test_adapters_in_one_graph_or_several(make: Callable[[], nn.Module]) -> None:
    """Dynamo breaks the graph at each set of experts with adapters."""
    model, tokens, policies = (
        make(),
        torch.randint(100, (4, 64)),
        {"exact": EXACT, "balanced": Policy(ratio=1.0)},
    )
    variants = Variants(policies)
    call = torch.compile(model, backend=variants)
    found = {}
    with small_tensors():
        for variants.active in (REFERENCE, *policies):
            call(tokens).backward()
            found[variants.active] = torch.cat([each.flatten().float() for each in trained(model).values()])
    assert not any(wrong_bytes(graph) for graph in variants.graphs)
    assert found["exact"].equal(found[REFERENCE])
    assert distance(found["balanced"], found[REFERENCE]) < 0.02
    reports = [graph.partitions["balanced"].report for graph in variants.graphs]
    assert all(report is not None and adds_up(report) for report in reports)
    after, before = (
        sum(getattr(report, f"saved_bytes_{when}") for report in reports) for when in ("after", "before")
    )
    assert after < 0.6 * before
