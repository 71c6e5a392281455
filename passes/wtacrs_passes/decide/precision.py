"""Decide which products of the backward pass are multiplied in fewer bits than the program has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from ..analyse.products import InputGradient, Product, input_gradients
from ..graph.operations import aten, makes_sparse
from ..graph.torch_api import hint
from ..joint import Joint
from ..policy import Precision, PrecisionChoice, Sampling
from ..rates import seconds
from .rows import reason_by_size

AT_RANDOM = {"int8", "float8"}
"""Precisions to which factors are rounded at random."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EIGHTS, _FEWEST = 8, 16
"""What libraries for GPUs multiply in 8 bits: sizes that eight divides, more than sixteen rows of the result."""
_FLOAT8_CAPABILITY = (8, 9)
FASTER: dict[torch.dtype, tuple[Precision, ...]] = {
    torch.float32: ("bfloat16", "int8"),
    torch.bfloat16: ("int8",),
    torch.float16: ("int8",),
}
"""What may be faster than the program's own precision, with an error that is known to be small in every sum."""
WORTH = 0.9
"""Of the time of the exact product, what one in fewer bits takes at most where the choice is ours."""


_P = TypeVar("_P", Product, InputGradient)


def plan_precision(joint: Joint) -> None:
    """Choose the precision of every product for which the policy names another than the program's."""
    if not (joint.policy.rounds("product") or joint.policy.rounds("product_dx")):
        return
    sparse = "the graph makes a sparse tensor" if makes_sparse(joint.graph) else ""

    def choose(
        products: Iterable[_P], wanted_by: Callable[[Sampling], PrecisionChoice]
    ) -> Iterator[tuple[_P, Precision, str]]:
        for product in products:
            sampling = joint.policy.sampling(product.module)
            if sampling is None or wanted_by(sampling) == "exact":
                continue
            if sparse:
                yield product, "exact", sparse
                continue
            precision, reason = choose_precision(product, sampling, wanted_by(sampling))
            yield product, precision, reason

    joint.plan = dataclasses.replace(
        joint.plan,
        precisions=tuple(choose(joint.analysis.products, lambda sampling: sampling.product)),
        input_precisions=tuple(
            choose(input_gradients(joint.graph, joint.names), lambda sampling: sampling.product_dx)
        ),
    )


def choose_precision(
    product: Product | InputGradient, sampling: Sampling, wanted: PrecisionChoice
) -> tuple[Precision, str]:
    """Return the precision of a product, and where it is ``exact`` why."""
    if wanted == "auto":
        return _fastest(product, sampling)
    reason = _reason_for_exact(product, sampling, wanted)
    return ("exact" if reason else wanted), reason


def _fastest(product: Product | InputGradient, sampling: Sampling) -> tuple[Precision, str]:
    """Return the fastest precision of :data:`FASTER`."""
    value = product.node.meta["val"]
    choices = FASTER.get(value.dtype, ("int8",))
    reasons = {precision: _reason_for_exact(product, sampling, precision) for precision in choices}
    possible = [precision for precision in choices if not reasons[precision]]
    if not possible:
        return "exact", reasons["int8"]
    if value.device.type == "meta" or (value.is_cuda and not torch.cuda.is_available()):
        return "exact", f"no {value.device.type} device to measure rates of"
    m, n = value.shape
    rows = hint(sampling.kept(product.rows) if isinstance(product, Product) else product.rows)
    rates = seconds(["exact", *possible], rows, m, n, value.dtype, value.device)
    best = min(possible, key=rates.__getitem__)
    share = rates[best] / rates["exact"]
    return (best, "") if share <= WORTH else ("exact", f"{best} takes {share:.2f} of its time")


def _reason_for_exact(product: Product | InputGradient, sampling: Sampling, precision: Precision) -> str:
    """Return why a product is multiplied in the precision that the program has; an empty string where it need not."""
    value = product.node.meta["val"]
    if product.node.target is not aten.mm.default:
        return "a batch of products"
    if value.dtype not in _FLOATS:
        return f"{value.dtype} has no such product"
    if precision == "bfloat16" and value.dtype != torch.float32:
        return f"{value.dtype} has 16 bits already"
    if (reason := reason_by_size(product)) is not None:
        return reason
    if not all(isinstance(size, int) for size in value.shape):
        return "features of any number"
    sizes = value.shape if isinstance(product, Product) else (*value.shape, product.rows)
    if (fewest := min(sizes)) < sampling.min_features:
        return f"{fewest} features, fewer than min_features"
    return "" if value.device.type == "cpu" else _reason_on_gpu(value, precision)


def _reason_on_gpu(value: torch.Tensor, precision: Precision) -> str:
    if precision == "bfloat16":
        return ""
    if any(size % _EIGHTS for size in value.shape) or value.shape[0] <= _FEWEST:
        return f"{tuple(value.shape)}: on a GPU sizes that {_EIGHTS} divides, more than {_FEWEST}, are needed"
    if precision == "float8" and value.device.type == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(value.device)
        if (major, minor) < _FLOAT8_CAPABILITY:
            return f"a GPU of compute capability {major}.{minor} has no float8, which needs 8.9"
    return ""
