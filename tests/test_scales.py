"""Programs that train in 8 bits: what is a scale, and torchao's float8 with encodings. No code is generated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from aot import REFERENCE, Variants, distance, small_tensors, wrong_bytes
from conftest import run_passes
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_passes.decide.storage import plan_storage

LARGEST = 448.0


class Rounded(torch.autograd.Function):
    """A product with a weight whose gradient is changed on its way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        scale = LARGEST / gradient.abs().amax(0).clamp(min=1e-12)
        if ctx.how == "normalised":
            gradient = gradient * scale
        else:
            codes = (gradient * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            gradient = codes.float() / scale
        if ctx.how == "by another scale":
            gradient = gradient * (LARGEST / x.abs().amax(0))
        return gradient @ weight.T, x.T @ gradient, None


class Two(nn.Module):
    """An activation function of what is computed before, between two products: [64, 32] to a scalar."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = (nn.Parameter(torch.randn(32, 32)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.silu(Rounded.apply(x, self.first, self.how))
        return Rounded.apply(h, self.second, self.how).square().mean()


@pytest.mark.parametrize("how", ["rounded", "by another scale", "normalised"])
def test_a_gradient_in_steps_of_its_own_scale_tolerates_what_it_did(how: str) -> None:
    """One that is left in such steps does not: its small columns are large ones. Nor one times scales of another."""
    joint = wtacrs_fx.capture(Two(how), torch.randn(64, 32))
    plan = run_passes(joint, plan_storage, policy=Policy(ratio=1.0)).plan
    rows = [item for item in plan.residuals if item.node.meta["val"].shape == (64, 32)]
    exact = [item.reason for item in rows if item.encoding == "exact"]
    assert len(exact) == (0 if how == "rounded" else len(rows))


# torchao

float8 = pytest.importorskip("torchao.float8")


class Hidden(nn.Module):
    """A Llama of one layer in bfloat16, its linears in float8: tokens to a scalar."""

    def __init__(self, recipe: str, emulate: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 100}
        model = LlamaModel(LlamaConfig(num_attention_heads=4, use_cache=False, **sizes)).bfloat16()
        config = float8.Float8LinearConfig.from_recipe_name(recipe)
        self.model = float8.convert_to_float8_training(
            model, config=dataclasses.replace(config, emulate=emulate)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).last_hidden_state.float().sin().mean()


POLICIES = {
    "exact": Policy(ratio=1.0, residuals="exact"),
    "balanced": Policy(ratio=1.0),
}


@pytest.mark.sweep(0.34)
@pytest.mark.parametrize(
    ("recipe", "emulate"),
    [("tensorwise", False), ("rowwise", False), ("rowwise", True), ("rowwise_with_gw_hp", False)],
)
def test_activations_of_float8_training_are_stored_in_few_bits(recipe: str, emulate: bool) -> None:
    """torchao keeps them in 16 bits, and rounds them again in the backward pass."""
    model, tokens = Hidden(recipe, emulate), torch.randint(100, (4, 64))
    variants = Variants(POLICIES)
    call = torch.compile(model, backend=variants, fullgraph=True)
    found = {}
    with small_tensors():
        for variants.active in (REFERENCE, *POLICIES):
            model.zero_grad()
            call(tokens).backward()
            found[variants.active] = torch.cat([p.grad.flatten().float() for p in model.parameters()])
    [graph] = variants.graphs
    assert not wrong_bytes(graph)
    assert found["exact"].equal(found[REFERENCE])
    assert 0 < distance(found["balanced"], found[REFERENCE]) < 0.002
    report = graph.partitions["balanced"].report
    assert report is not None
    assert report.saved_bytes_after < 0.52 * report.saved_bytes_before
    assert not any("fp8" in each.operation or "float8" in each.operation for each in report.residuals)
    # Nothing of the size of a weight: those are rounded again.
    tokens_saved = [each.bytes_after for each in report.residuals]
    assert max(tokens_saved) <= 4 * 64 * 256 * 1.1
