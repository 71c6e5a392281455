"""Adapters of peft: frozen weights cost nothing, LoRA is sampled where it pays, the others stay right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import adds_up, is_unbiased
from torch import Tensor, nn
from transformers import BertConfig, BertModel

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
