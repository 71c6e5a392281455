"""Gradients of attention from rounded operands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_passes.maths.attention import center_keys
from wtacrs_passes.maths.encodings import dequantise, quantise

Gradients = tuple[Tensor, Tensor, Tensor]
aten = torch.ops.aten


def rounded(x: Tensor, bits: int = 8) -> Tensor:
    return dequantise(*quantise(x, bits=bits), bits=bits, features=x.shape[-1], dtype=x.dtype)


def operands(mean: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys that share a direction, values and a gradient: [2, 3, 24, 16]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(2, 3, 24, 16, generator=generator) for _ in range(4))
    return q.to(dtype), (k + mean).to(dtype), v.to(dtype), gradient.to(dtype)


def backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None
) -> Gradients:
    function = aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: Gradients = function(gradient, q, k, v, out, lse, 0.0, True, scale=scale)
    return found


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("queries", [1, 2])
def test_centred_keys_have_the_same_gradients(scale: float | None, queries: int) -> None:
    q, k, v, gradient = operands(mean=1.0)
    q, gradient = (torch.cat([x, x.flip(1)], 1) if queries == 2 else x for x in (q, gradient))  # for each key
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    wanted = backward(gradient, q, k, v, out, lse, scale)
    centred, shifted, _ = center_keys(q, k, lse, scale)
    assert float(centred.mean(-2).abs().max()) < 1e-6
    for new, old in zip(backward(gradient, q, centred, v, out, shifted, scale), wanted, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_let_the_mean_of_the_keys_enter(dtype: torch.dtype) -> None:
    """With a mean of eight, uncentred keys make the error of dq a hundred times larger."""
    q, k, v, gradient = operands(8.0, dtype)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    exact = operands(8.0, torch.float32)
    of_exact = aten._scaled_dot_product_flash_attention_for_cpu(*exact[:3], 0.0, True)
    wanted = backward(exact[3], *exact[:3], *of_exact, None)[0]

    def error(key: Tensor, logsumexp: Tensor) -> float:
        found = backward(gradient, rounded(q), key, rounded(v), rounded(out), logsumexp, None)[0]
        return float((found.float() - wanted).square().sum() / wanted.square().sum())

    centred = error(*center_keys(rounded(q), rounded(k), lse)[:2])
    assert centred < 0.02
    assert error(rounded(k), lse) > 10 * centred


@pytest.mark.parametrize("size", [0.5, 1.0, 8.0])
def test_the_spread_bounds_the_deviation_of_logits(size: float) -> None:
    q, k, *_ = operands(1.0)
    q, k = q * size, k * size
    _, _, spread = center_keys(rounded(q), rounded(k), torch.zeros(2, 3, 24))
    deviation = (rounded(q) @ rounded(k).mT - q @ k.mT) / 4
    assert (
        float(deviation.square().mean().sqrt()) <= float(spread) < 6 * float(deviation.square().mean().sqrt())
    )


@pytest.mark.parametrize(("size", "again"), [(1.0, False), (8.0, True), (torch.nan, True)])
def test_attention_is_computed_again_where_rounding_moves_logits_far(size: float, again: bool) -> None:
    q, k, v, gradient = operands(0.0)
    q, k = q * size, k * size
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    q, k, v = map(rounded, (q, k, v))
    centred, shifted, spread = center_keys(q, k, lse)
    options = (0.0, True, None, None)
    found = torch.ops.wtacrs.attention_backward(gradient, q, k, centred, v, out, shifted, spread, *options)
    of_rounded = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    wanted = backward(gradient, q, k, v, *of_rounded, None)
    same = [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)]
    assert all(same) == (again and size == size)
    if size == size:
        for a, b in zip(found, wanted, strict=True):
            assert float((a - b).square().sum()) < 0.01 * float(b.square().sum())
    else:
        assert not bool(found[0].isfinite().any())


class Attention(nn.Module):
    """Attention whose keys have a large common part, with fewer heads of keys than of queries."""

    def __init__(self, heads_of_keys: int) -> None:
        super().__init__()
        self.sizes = [64, 16 * heads_of_keys, 16 * heads_of_keys]
        self.qkv, self.out = nn.Linear(64, sum(self.sizes)), nn.Linear(64, 64)
        with torch.no_grad():
            self.qkv.bias[64 : 64 + self.sizes[1]] = 8.0

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in parts)
        grouped = q.shape[1] != k.shape[1]
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(heads.transpose(1, 2).flatten(-2)).square().mean()


@pytest.mark.parametrize("heads_of_keys", [4, 2])
def test_a_compiled_attention_reads_a_stored_output_and_centred_keys(heads_of_keys: int) -> None:
    torch.manual_seed(0)
    model, x = Attention(heads_of_keys), torch.randn(4, 32, 64)
    model(x).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    backend = wtacrs_fx.backend(Policy(ratio=1.0))
    torch.compile(model, backend=backend)(x).backward()
    [report] = backend.reports
    assert "_scaled_dot_product_flash_attention_for_cpu" not in {
        item.operation for item in report.residuals if item.encoding == "recompute"
    }
    for name, parameter in model.named_parameters():
        found, exact = (g[:64] if "qkv" in name else g for g in (parameter.grad, wanted[name]))
        assert float((found - exact).square().sum() / exact.square().sum()) < 0.01, name
