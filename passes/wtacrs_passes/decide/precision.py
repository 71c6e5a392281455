"""Decide which weight-gradient products are multiplied in fewer bits than the program has."""

from __future__ import annotations

import dataclasses

import torch

from ..analyse.products import Product
from ..graph.operations import aten, makes_sparse
from ..joint import Joint
from ..policy import Sampling
from .rows import reason_by_size

AT_RANDOM = {"int8"}
"""Precisions to which factors are rounded at random."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EIGHTS, _FEWEST = 8, 16
"""What libraries for GPUs multiply in 8 bits: sizes that eight divides, more than sixteen rows of the result."""
_FLOAT8_CAPABILITY = (8, 9)


def plan_precision(joint: Joint) -> None:
    """Choose the precision of every weight-gradient product for which the policy names another than the program's."""
    sparse = "the graph makes a sparse tensor" if makes_sparse(joint.graph) else ""
    planned = []
    for product in joint.analysis.products:
        sampling = joint.policy.sampling(product.module)
        if sampling is not None and sampling.product != "exact":
            reason = sparse or reason_for_full_precision(product, sampling)
            planned.append((product, sampling.product, reason))
    joint.plan = dataclasses.replace(joint.plan, precisions=tuple(planned))


def reason_for_full_precision(product: Product, sampling: Sampling) -> str:
    """Return why a product is multiplied in the precision that the program has; an empty string where it is not."""
    value = product.node.meta["val"]
    if product.node.target is not aten.mm.default:
        return "a batch of products"
    if value.dtype not in _FLOATS:
        return f"{value.dtype} has no such product"
    if sampling.product == "bfloat16" and value.dtype != torch.float32:
        return f"{value.dtype} has 16 bits already"
    if (reason := reason_by_size(product)) is not None:
        return reason
    if not all(isinstance(size, int) for size in value.shape):
        return "features of any number"
    if (fewest := min(value.shape)) < sampling.min_features:
        return f"{fewest} features, fewer than min_features"
    return "" if value.device.type == "cpu" else _reason_on_gpu(value, sampling)


def _reason_on_gpu(value: torch.Tensor, sampling: Sampling) -> str:
    if sampling.product == "bfloat16":
        return ""
    if any(size % _EIGHTS for size in value.shape) or value.shape[0] <= _FEWEST:
        return f"{tuple(value.shape)}: on a GPU sizes that {_EIGHTS} divides, more than {_FEWEST}, are needed"
    if sampling.product == "float8" and value.device.type == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(value.device)
        if (major, minor) < _FLOAT8_CAPABILITY:
            return f"a GPU of compute capability {major}.{minor} has no float8, which needs 8.9"
    return ""
