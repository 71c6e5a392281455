"""Transformers as their authors wrote them: every linear is found, in both placements, in both precisions."""

from __future__ import annotations

import pytest
import torch
from conftest import RowsOnly, adds_up
from torch import nn
from transformers.pytorch_utils import Conv1D

import wtacrs_fx
from bench.models import MODELS, Shape, make

SHAPE = Shape(layers=1, d=64, heads=2, batch=4, seq=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", ["forward", "backward"])
@pytest.mark.parametrize("name", MODELS)
def test_every_linear_is_sampled(name: str, placement: str, dtype: torch.dtype) -> None:
    model, inputs = make(name, SHAPE, dtype=dtype)
    report = wtacrs_fx.explain(model, **inputs, policy=RowsOnly(min_rows=8, placement=placement))
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert {site.module for site in report.sampled} == linears
    assert report.saved_bytes_after < 0.85 * report.saved_bytes_before
    assert adds_up(report)


def test_an_output_projection_behind_materialised_attention_stores_rows() -> None:
    model, inputs = make("t5", SHAPE)
    report = wtacrs_fx.explain(model, **inputs, policy=RowsOnly(min_rows=8))
    [out] = [site for site in report.sites if site.module.endswith("SelfAttention.o")]
    assert (out.placement, out.encoding) == ("forward", "rows")
    assert out.bytes_after < 0.35 * out.bytes_before
    [query] = [site for site in report.sites if site.module.endswith("SelfAttention.q")]
    assert (query.placement, query.encoding) == ("backward", "recompute")
