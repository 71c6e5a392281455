"""The backend on a CUDA device: the same promises, and that nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import RowsOnly, Transformer, centring_errors, is_unbiased, step
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_passes.maths import estimators
from wtacrs_passes.maths.estimators import CHOOSERS, NOISE, choose_rows, combine_rows

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=["forward", "backward"])
def on_cuda(request: pytest.FixtureRequest) -> tuple[Transformer, Callable, Tensor]:
    torch.manual_seed(0)
    model, tokens = Transformer().cuda(), torch.randint(50, (4, 32), device="cuda")
    policy = RowsOnly(min_rows=8, placement=request.param)
    return model, torch.compile(model, backend=wtacrs_fx.backend(policy)), tokens


def test_gradients_are_unbiased(on_cuda: tuple) -> None:
    model, call, tokens = on_cuda
    exact = step(model, model, tokens)
    runs = [step(model, call, tokens) for _ in range(300)]
    for name in ("layers.0.q.weight", "layers.0.down.weight", "head.weight"):
        samples = torch.stack([run[name].flatten() for run in runs]).cpu()
        assert is_unbiased(samples, exact[name].flatten().cpu()), name


def test_a_step_never_waits_for_the_device(on_cuda: tuple) -> None:
    model, call, tokens = on_cuda
    step(model, call, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, call, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("residuals", ["balanced", "small"])
def test_encoded_residuals_keep_gradients_close(residuals: str) -> None:
    model, tokens = Transformer().cuda().bfloat16(), torch.randint(50, (4, 32), device="cuda")
    exact = step(model, torch.compile(model, backend="inductor"), tokens)
    policy = Policy(residuals=residuals, ratio=1.0)
    found = step(model, torch.compile(model, backend=wtacrs_fx.backend(policy)), tokens)
    error = sum((found[n].float() - exact[n].float()).square().sum() for n in exact)
    assert error < 0.1 * sum(gradient.float().square().sum() for gradient in exact.values())
    report = wtacrs_fx.reports()[-1]
    assert report.saved_bytes_after < 0.45 * report.saved_bytes_before


@pytest.mark.parametrize("estimator", CHOOSERS)
def test_the_chooser_agrees_with_the_cpu(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "_shuffled", estimators.random_order)  # the order of GPUs
    weights, noise = torch.rand(3, 500), torch.rand(3, NOISE)
    expected = choose_rows(weights, noise, 100, estimator)
    found = choose_rows(weights.cuda(), noise.cuda(), 100, estimator)
    if estimator == "topk":
        expected, found = (tuple(t.sort(-1).values for t in pair) for pair in (expected, found))
    torch.testing.assert_close(found[0].cpu(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1])


def test_cuda_graphs_draw_anew_in_each_replay() -> None:
    model, tokens = Transformer().cuda(), torch.randint(50, (4, 32), device="cuda")
    call = torch.compile(model, backend=wtacrs_fx.backend(RowsOnly(min_rows=8), mode="reduce-overhead"))
    exact = step(model, model, tokens)["head.weight"].flatten().cpu()
    for _ in range(3):
        step(model, call, tokens)
    runs = torch.stack([step(model, call, tokens)["head.weight"].flatten().cpu() for _ in range(200)])
    assert is_unbiased(runs, exact)
    assert runs.std(0).max() > 0


def test_max_autotune_keeps_gradients_unbiased() -> None:
    model, tokens = Transformer().cuda(), torch.randint(50, (4, 32), device="cuda")
    call = torch.compile(model, backend=wtacrs_fx.backend(RowsOnly(min_rows=8), mode="max-autotune"))
    exact = step(model, model, tokens)["head.weight"].flatten().cpu()
    runs = torch.stack([step(model, call, tokens)["head.weight"].flatten().cpu() for _ in range(200)])
    assert is_unbiased(runs, exact)


def test_centred_rows_in_bfloat16() -> None:
    """Rows around a large mean: with the exact product of the mean, an eighth of the noise is left on CPU."""
    plain, centred = centring_errors("cuda")
    assert centred < 0.3 * plain


def test_norms_are_remembered_without_waiting() -> None:
    model, tokens = Transformer().cuda(), torch.randint(50, (4, 32), device="cuda")
    tracker = wtacrs_fx.track_gradient_norms(model, num_samples=10, seq_len=32)
    policy = RowsOnly(min_rows=8, placement="forward")
    call = torch.compile(model, backend=wtacrs_fx.backend(policy))
    exact = step(model, model, tokens)["head.weight"].flatten().cpu()
    runs = []
    for turn in range(200):
        if turn == 2:
            torch.cuda.set_sync_debug_mode("error")
        with tracker.batch([1, 5, 2, 9]):
            step(model, call, tokens)
        torch.cuda.set_sync_debug_mode("default")
        runs.append(model.head.weight.grad.flatten().cpu())
    assert tracker.nbytes and all(record.device.type == "cpu" for record in tracker.records.values())
    assert is_unbiased(torch.stack(runs[2:]), exact)


@pytest.mark.parametrize("estimator", ["rmm-rademacher", "rmm-gaussian"])
def test_combinations_of_rows_agree_with_the_cpu(estimator: str) -> None:
    x, seed = torch.randn(100, 8), torch.tensor([3, 5])
    expected = combine_rows(x, seed, 40, estimator)
    torch.testing.assert_close(combine_rows(x.cuda(), seed.cuda(), 40, estimator).cpu(), expected)


class Head(nn.Module):
    """Rows [tokens, 32] to the mean cross entropy over 4096 words."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 4096, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(F.gelu(self.body(x))).float(), labels)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-3), (torch.float32, 1e-10)])
def test_a_loss_in_chunks(dtype: torch.dtype, bound: float) -> None:
    """Of 20 chunks, the last of which is short: sums of products in the library's own accumulation."""
    torch.manual_seed(0)
    model = Head().cuda().to(dtype)
    x = torch.randn(600, 32, device="cuda", dtype=dtype)
    labels = torch.randint(4096, (600,), device="cuda")
    exact = step(model, model, x, labels)
    runs = {}
    for ratio, count in ((1.0, 1), (0.5, 300)):
        policy = Policy(ratio=ratio, min_rows=4, min_features=1, include=("head",), chunk_bytes=2**19)
        call = torch.compile(model, backend=wtacrs_fx.backend(policy))
        runs[ratio] = [step(model, call, x, labels) for _ in range(count)]
        assert wtacrs_fx.reports()[-1].losses[0].chunk == 32
    for name, gradient in exact.items():
        error = (runs[1.0][0][name].float() - gradient.float()).square().sum()
        assert error < bound * gradient.float().square().sum(), name
    samples = torch.stack([run["head.weight"].flatten() for run in runs[0.5]]).float().cpu()
    assert is_unbiased(samples, exact["head.weight"].flatten().float().cpu())


def test_a_loss_in_chunks_in_8_bits() -> None:
    """Of 19 chunks; both gradients from one rounding, unbiased."""
    torch.manual_seed(0)
    model = Head().cuda()
    x = torch.randn(608, 32, device="cuda")
    labels = torch.randint(4096, (608,), device="cuda")
    exact = step(model, model, x, labels)
    policy = Policy(ratio=1.0, include=("head",), chunk_bytes=2**19, product="int8")
    backend = wtacrs_fx.backend(policy)
    call = torch.compile(model, backend=backend)
    runs = [step(model, call, x, labels) for _ in range(300)]
    assert [one.product for one in backend.reports[0].input_gradients] == ["int8"]
    for name in ("head.weight", "body.weight"):
        samples = torch.stack([run[name].flatten() for run in runs]).float().cpu()
        wanted = exact[name].flatten().float().cpu()
        assert float((samples - wanted).square().mean(0).sum() / wanted.square().sum()) < 0.02, name
        assert is_unbiased(samples, wanted), name


def test_attention_reads_what_is_written_for_several_readers() -> None:
    """In 16 bits, with rotary positions: queries once got a layout that cuDNN refuses."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=2048, intermediate_size=256, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaModel(config).cuda().bfloat16()
    tokens = torch.randint(64, (8, 1024), device="cuda")
    compiled = torch.compile(model, backend=wtacrs_fx.backend())
    compiled(tokens).last_hidden_state.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_residuals_wait_in_pinned_memory() -> None:
    model, tokens = Transformer(d=256, layers=3).cuda(), torch.randint(50, (8, 256), device="cuda")
    found, held = [], []
    for place in (None, "host"):
        policy = Policy(ratio=1.0, product="exact", offload=place)
        call = torch.compile(model, backend=wtacrs_fx.backend(policy))
        found.append(step(model, call, tokens))
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = call(tokens)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
    assert held[1] < 0.5 * held[0]
