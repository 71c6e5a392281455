"""Attention over samples of other lengths, packed into one: PyTorch's operations, which have kernels on GPUs alone.

Here they have some of plain operations, of the same definition. No code is generated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from aot import REFERENCE, Variants, distance, small_tensors, wrong_bytes
from conftest import adds_up
from torch import Tensor, nn
from torch.nn.attention import varlen

from wtacrs_fx import Policy

LENGTHS, HEADS, D = (40, 8, 64, 16), 4, 128
ENDS = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
POLICIES = {
    "exact": Policy(ratio=1.0, residuals="exact"),
    "balanced": Policy(ratio=1.0),
    "small": Policy(ratio=1.0, residuals="small"),
}


def logits(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Return [heads, queries, keys] of one sample's [tokens, heads, d]."""
    found = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    later = torch.ones(found.shape[1:], dtype=torch.bool).triu(1)
    return found.masked_fill(later, -torch.inf) if causal else found


def forward(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _ends: Tensor, _most: int, _most_keys: int,
    causal: bool = False, scale: float | None = None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, sums = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for low, high in itertools.pairwise(ends.tolist()):
        each = logits(q[low:high].float(), k[low:high].float(), causal, scale)
        sums[:, low:high] = each.logsumexp(-1)
        out[low:high] = torch.einsum("hqk,khd->qhd", each.softmax(-1), v[low:high].float()).to(q.dtype)
    return out, sums, torch.zeros(2, dtype=torch.uint64)


def backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, ends: Tensor, _ends: Tensor,
    _most: int, _most_keys: int, causal: bool, _state: Tensor, scale: float | None = None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Read the output and the log-sum-exp that are given, as Flash Attention does (Dao et al. 2022, algorithm 4)."""
    found = tuple(torch.empty_like(x) for x in (q, k, v))
    for low, high in itertools.pairwise(ends.tolist()):
        dy, q1, k1, v1, y = (x[low:high].float() for x in (gradient, q, k, v, out))
        shares = (logits(q1, k1, causal, scale) - sums[:, low:high, None]).exp()
        of_shares = torch.einsum("qhd,khd->hqk", dy, v1) - (dy * y).sum(-1).T[..., None]
        of_logits = shares * of_shares * (q.shape[-1] ** -0.5 if scale is None else scale)
        parts = (
            torch.einsum("hqk,khd->qhd", of_logits, k1),
            torch.einsum("hqk,qhd->khd", of_logits, q1),
            torch.einsum("hqk,qhd->khd", shares, dy),
        )
        for whole, part in zip(found, parts, strict=True):
            whole[low:high] = part
    return found


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", forward, "CPU", allow_override=True)
        library.impl("_varlen_attn_backward", backward, "CPU", allow_override=True)
        yield


class Packed(nn.Module):
    """Two layers over packed samples: [tokens, D] to a scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(D) for _ in range(2))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        for qkv, out, norm in zip(self.qkv, self.out, self.norms, strict=True):
            q, k, v = qkv(norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
            most = max(LENGTHS)
            attended = varlen.varlen_attn(q, k, v, ends, ends, most, most, window_size=(-1, 0))
            x = x + out(attended.flatten(-2))
        return x.float().sin().mean()


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operands_are_stored_in_few_bits(dtype: torch.dtype) -> None:
    model, x = Packed().to(dtype), torch.randn(sum(LENGTHS), D).to(dtype)
    variants = Variants(POLICIES)
    call = torch.compile(model, backend=variants, fullgraph=True)
    found = {}
    with small_tensors():
        for variants.active in (REFERENCE, *POLICIES):
            found[variants.active] = gradients(model, call(x, ENDS))
    [graph] = variants.graphs
    assert not wrong_bytes(graph)
    assert found["exact"].equal(found[REFERENCE])
    limits: Sequence[tuple[str, float, float]] = (("balanced", 2e-3, 0.4), ("small", 3e-2, 0.4))
    for name, error, share in limits:
        assert 0 < distance(found[name], found[REFERENCE]) < error
        report = graph.partitions[name].report
        assert report is not None and adds_up(report)
        share *= 1 if dtype is torch.float32 else 1.6
        assert report.saved_bytes_after < share * report.saved_bytes_before
