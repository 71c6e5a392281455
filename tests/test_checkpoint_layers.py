"""Layers that the policy has computed again, by share or as many as a target for the peak takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Transformer, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wtacrs_fx
from wtacrs_fx import Policy, PolicyError
from wtacrs_passes.analyse.layers import repeated_layers
from wtacrs_passes.graph.cones import tangent_cone

LAYERS = 4
ENCODED = {"ratio": 1.0, "product": "exact"}
EXACTLY = {"ratio": 1.0, "product": "exact", "residuals": "exact"}


@pytest.fixture(scope="module")
def model() -> tuple[Transformer, Tensor]:
    torch.manual_seed(0)
    return Transformer(d=64, layers=LAYERS), torch.randint(50, (8, 64))


def explained(model: tuple[nn.Module, Tensor], **policy: Any) -> wtacrs_fx.Report:
    return wtacrs_fx.explain(*model, policy=Policy(**policy))


def train(
    model: tuple[nn.Module, Tensor], backend: Any, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the gradients of one step; the same random numbers for all backends."""
    torch._dynamo.reset()
    network, tokens = copy.deepcopy(model[0]), model[1]
    if dtype is torch.float16:
        network = network.half()
    call = torch.compile(network, backend=backend)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = call(tokens)
    loss.backward()
    return gradients(network)


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the squared error of all gradients, beside their squares."""
    error = sum(float((found[name] - exact[name]).double().square().sum()) for name in exact)
    return error / sum(float(each.double().square().sum()) for each in exact.values())


def test_layers_are_found_by_their_modules(model: tuple[Transformer, Tensor]) -> None:
    gm = wtacrs_fx.capture(*model)
    layers = repeated_layers(gm.graph, tangent_cone(gm.graph))
    assert len(layers) == LAYERS
    assert len({len(layer) for layer in layers}) == 1
    stacks = [node.meta.get("nn_module_stack") for node in layers[2]]
    assert all("2" in str(stack) for stack in stacks if stack)


def test_a_model_without_layers_has_none() -> None:
    one = nn.Sequential(nn.Linear(64, 64), nn.GELU()), torch.randn(32, 64)
    report = explained(one, **ENCODED, recompute=1.0)
    assert report.notes == ("computed again in the backward pass: 0 of 0 layers that are alike",)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_more_layers_again_store_less_and_peak_lower(model: tuple[Transformer, Tensor], ratio: float) -> None:
    policy = {**ENCODED, "ratio": ratio}
    reports = [explained(model, **policy, recompute=share) for share in (0.0, 0.5, 0.75, 1.0)]
    saved = [report.saved_bytes_after for report in reports]
    peaks = [report.peak_after.size for report in reports]
    assert saved == sorted(saved, reverse=True) and peaks == sorted(peaks, reverse=True)
    assert saved[-1] < 0.6 * saved[0]
    assert reports[1].notes == ("computed again in the backward pass: 2 of 4 layers that are alike",)


PRECISIONS = {"float32": None, "autocast": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_of_layers_computed_again(model: tuple[Transformer, Tensor], precision: str) -> None:
    dtype = PRECISIONS[precision]
    exact = train(model, "inductor", dtype)
    found = train(model, wtacrs_fx.backend(Policy(**ENCODED, recompute=1.0)), dtype)
    assert 0 < distance(found, exact) < 5e-3  # inputs of layers in 8 bits


def test_exact_residuals_leave_gradients_as_they_are(model: tuple[Transformer, Tensor]) -> None:
    exact = train(model, "inductor")
    found = train(model, wtacrs_fx.backend(Policy(**EXACTLY, recompute=0.5)))
    assert distance(found, exact) < 1e-10
    plain, fewer = (explained(model, **EXACTLY, recompute=share) for share in (0.0, 1.0))
    assert fewer.saved_bytes_after < 0.7 * plain.saved_bytes_after


def test_dropout_is_the_same_again() -> None:
    torch.manual_seed(0)
    model = Transformer(d=64, layers=LAYERS, dropout=0.3), torch.randint(50, (8, 64))
    exact = train(model, wtacrs_fx.backend(Policy(**EXACTLY)))
    found = train(model, wtacrs_fx.backend(Policy(**ENCODED, recompute=1.0)))
    assert distance(found, exact) < 5e-3  # other masks are off by the gradient's own size
    torch.manual_seed(2)


def test_checkpoints_of_the_program_are_as_it_says() -> None:
    class Checkpointed(Transformer):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            x = checkpoint(self.layers[0], x, use_reentrant=False)
            return self.head(self.layers[1](x)).square().mean()

    model = Checkpointed(d=64, layers=2), torch.randint(50, (8, 64))
    plain, asked = (explained(model, **ENCODED, recompute=share) for share in (0.0, 1.0))
    assert asked.saved_bytes_after == plain.saved_bytes_after


def test_a_target_takes_as_few_layers_as_it_can(model: tuple[Transformer, Tensor]) -> None:
    peaks = [explained(model, **ENCODED, recompute=n / LAYERS).peak_after.size for n in range(LAYERS + 1)]
    for layers in (0, 1, 3):
        report = explained(model, **ENCODED, memory=peaks[layers])
        assert report.peak_after.size == peaks[layers]
        first, *rest = report.notes
        assert first.startswith("memory: ") and "not reached" not in first
        assert bool(rest) == bool(layers) and all(f"{layers} of {LAYERS}" in note for note in rest)


def test_then_residuals_are_stored_in_fewer_bits(model: tuple[Transformer, Tensor]) -> None:
    every = explained(model, **ENCODED, recompute=1.0).peak_after.size
    small = explained(model, **{**ENCODED, "residuals": "small"}, recompute=1.0).peak_after.size
    assert small < every
    report = explained(model, **ENCODED, memory=(small + every) // 2)
    assert report.peak_after.size <= (small + every) // 2


def test_what_cannot_be_reached_is_said_and_trained(model: tuple[Transformer, Tensor]) -> None:
    backend = wtacrs_fx.backend(Policy(**ENCODED, memory="1KiB"))
    exact, found = train(model, "inductor"), train(model, backend)
    [report] = backend.reports
    assert report.notes[0].startswith("memory: 1.0 KiB asked") and "not reached in the" in report.notes[0]
    assert report.notes[0] in str(report)
    assert distance(found, exact) < 0.1  # of 4 bits
    assert wtacrs_fx.Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("memory", [0, -1, "14", "14 gib", "GiB", 1.5, True])
def test_a_target_that_is_none(memory: Any) -> None:
    with pytest.raises(
        PolicyError, match="memory must be a whole number of bytes, or a text such as '14GiB'"
    ):
        Policy(memory=memory)


@pytest.mark.parametrize("share", [-0.1, 1.1, "all", True, float("nan")])
def test_a_share_that_is_none(share: Any) -> None:
    with pytest.raises(PolicyError, match="recompute must be a share of the layers"):
        Policy(recompute=share)


def test_texts_of_bytes() -> None:
    assert Policy(memory="1.5GiB").memory_bytes == 3 * 2**29
    assert Policy(memory="2 MB").memory_bytes == 2_000_000
    assert Policy(memory=7).memory_bytes == 7 and Policy().memory_bytes is None
