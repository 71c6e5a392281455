"""The custom operations of the rewritten graph, each with a fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import estimators

_LIBRARY = torch.library.Library("wtacrs", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "choose_rows(Tensor weights, Tensor noise, SymInt kept, str estimator) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _choose_rows(weights: Tensor, noise: Tensor, kept: int, estimator: str) -> tuple[Tensor, Tensor]:
    return estimators.choose_rows(weights, noise, kept, estimator)


def _choose_rows_fake(weights: Tensor, noise: Tensor, kept: int, estimator: str) -> tuple[Tensor, Tensor]:
    shape = (*weights.shape[:-1], kept)
    return (
        weights.new_empty(shape, dtype=torch.int64),
        weights.new_empty(shape, dtype=torch.float32),
    )


_LIBRARY.impl(  # type: ignore[no-untyped-call]
    "choose_rows", _choose_rows, "CompositeExplicitAutograd"
)
torch.library.register_fake("wtacrs::choose_rows", _choose_rows_fake, lib=_LIBRARY)

choose_rows = torch.ops.wtacrs.choose_rows.default
"""``(weights, noise, kept, estimator) -> (indices, scales)``, as :func:`estimators.choose_rows`."""
