"""Tools that people train with, each for real: some steps with it and this backend, beside the same steps without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import wtacrs_fx
from wtacrs_fx import Policy

WORDS, STEPS = 300, 5
ALL_ROWS = Policy(ratio=1.0)
Losses = list[float]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, use_cache=False, **sizes))


def batches(number: int = STEPS) -> Iterator[Tensor]:
    """Yield tokens [4, 48], of few words so that a loss falls fast."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        yield torch.randint(20, (4, 48), generator=generator)


def fewer_bytes(reports: list[wtacrs_fx.Report]) -> float:
    """Return the bytes that all graphs save, beside Inductor's; without those of any size."""
    reports = [report for report in reports if isinstance(report.saved_bytes_after, int)]
    return sum(each.saved_bytes_after for each in reports) / sum(each.saved_bytes_before for each in reports)


@pytest.mark.sweep(0.34, "clients")
def test_accelerate_compiles_layers_one_by_one_and_accumulates(model: LlamaForCausalLM) -> None:
    """`accelerate.utils.compile_regions` takes any backend; `Accelerator(dynamo_backend=...)` takes names it knows."""
    accelerate = pytest.importorskip("accelerate")

    def train(backend: Callable[..., object] | None) -> Losses:
        torch.manual_seed(0)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer before
        accelerator = accelerate.Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
        mine = copy.deepcopy(model).train()
        if backend is not None:
            mine = accelerate.utils.compile_regions(mine, backend=backend)
        optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-2)
        mine, optimizer = accelerator.prepare(mine, optimizer)
        losses = []
        for tokens in batches(2 * STEPS):
            with accelerator.accumulate(mine):
                loss = mine(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(mine.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    ours = wtacrs_fx.backend(ALL_ROWS)
    found, expected = train(ours), train(None)
    assert expected[-1] < 0.8 * expected[0]
    assert found == pytest.approx(expected, rel=5e-3)
    assert fewer_bytes(ours.reports) < 0.6


@pytest.mark.sweep(0.34, "clients")
def test_a_scaler_clipping_an_average_of_weights_and_a_compiled_optimizer(model: LlamaForCausalLM) -> None:
    """In float16, with the optimizer's step compiled by the same backend, which has nothing to do there."""

    def train(backend: object | None) -> tuple[Losses, Tensor]:
        torch.manual_seed(0)
        mine = copy.deepcopy(model).train()
        average = torch.optim.swa_utils.AveragedModel(
            mine, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-2, foreach=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        compiles = backend is not None
        call = torch.compile(mine, backend=backend) if compiles else mine
        advance = torch.compile(optimizer.step, backend=backend) if compiles else optimizer.step
        losses = []
        for tokens in batches():
            with torch.autocast("cpu", torch.float16):
                loss = call(input_ids=tokens, labels=tokens).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(mine.parameters(), 1.0, foreach=True)
            assert all(p.grad.isfinite().all() for p in mine.parameters())
            advance()
            scaler.update()
            optimizer.zero_grad()
            average.update_parameters(mine)
            losses.append(float(loss))
        return losses, average.module.lm_head.weight.detach().clone()

    ours = wtacrs_fx.backend(ALL_ROWS)
    (found, mean), (expected, wanted) = train(ours), train(None)
    assert expected[-1] < 0.8 * expected[0]
    assert found == pytest.approx(expected, rel=5e-3)
    assert float((mean - wanted).square().mean()) < 1e-2 * float(
        (wanted - model.lm_head.weight).square().mean()
    )
    assert len(ours.reports) == 1  # the optimizer's graph trains nothing


@pytest.mark.sweep(0.34, "clients")
def test_parameters_that_a_function_is_called_with(model: LlamaForCausalLM) -> None:
    """`torch.func.functional_call`: the parameters are arguments, with the names that the dictionary gives them."""
    parameters = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    tokens = next(batches())

    def loss_of(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(
            model, parameters, kwargs={"input_ids": tokens, "labels": tokens}
        ).loss
        return found

    ours = wtacrs_fx.backend(Policy(ratio=0.3, residuals="exact", exclude=("*layers.0*",)))
    call = torch.compile(loss_of, backend=ours, fullgraph=True)
    exact = torch.autograd.grad(loss_of(parameters, tokens), list(parameters.values()))
    found = torch.autograd.grad(call(parameters, tokens), list(parameters.values()))
    [report] = ours.reports
    sampled = {site.parameter for site in report.sampled}
    assert any("layers.1" in name for name in sampled) and not any("layers.0" in name for name in sampled)
    for name, one, other in zip(parameters, found, exact, strict=True):
        if name not in sampled:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
