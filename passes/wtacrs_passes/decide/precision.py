"""Decide which products of the backward pass are multiplied in fewer bits than the program has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import fx

from ..analyse.products import InputGradient, Product, input_gradients
from ..graph.operations import aten, makes_sparse
from ..graph.torch_api import hint
from ..joint import Joint
from ..policy import Precision, PrecisionChoice, Sampling
from ..rates import ROUNDING, Rates, seconds
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
        products: Sequence[_P],
        wanted_by: Callable[[Sampling], PrecisionChoice],
        key: Callable[[_P, Sampling], object],
    ) -> tuple[tuple[_P, Precision, str], ...]:
        asked: list[tuple[_P, Sampling]] = [
            (product, sampling)
            for product in products
            if (sampling := joint.policy.sampling(product.module)) is not None
            and wanted_by(sampling) != "exact"
        ]
        if sparse:
            return tuple((product, "exact", sparse) for product, _ in asked)
        groups: dict[tuple[PrecisionChoice, object], list[tuple[_P, Sampling]]] = {}
        for item in asked:
            groups.setdefault((wanted_by(item[1]), key(*item)), []).append(item)
        found: dict[fx.Node, tuple[Precision, str]] = {}
        for (wanted, _), group in groups.items():
            for (product, _), choice in zip(group, choose_precisions(group, wanted), strict=True):
                found[product.node] = choice
        chosen = ((product, found[product.node]) for product, _ in asked)
        return tuple((product, precision, reason) for product, (precision, reason) in chosen)

    joint.plan = dataclasses.replace(
        joint.plan,
        precisions=choose(
            joint.analysis.products,
            lambda sampling: sampling.product,
            lambda product, sampling: (product.residual, str(sampling.kept(product.rows))),
        ),
        input_precisions=choose(
            list(input_gradients(joint.graph, joint.names)),
            lambda sampling: sampling.product_dx,
            lambda product, _: product.node,
        ),
    )


def choose_precision(
    product: Product | InputGradient, sampling: Sampling, wanted: PrecisionChoice
) -> tuple[Precision, str]:
    """Return the precision of a product, and where it is ``exact`` why."""
    [found] = choose_precisions([(product, sampling)], wanted)
    return found


def choose_precisions(
    group: Sequence[tuple[Product | InputGradient, Sampling]], wanted: PrecisionChoice
) -> list[tuple[Precision, str]]:
    """Return the precision of each of some products that read the same rows of one X, and where it is ``exact`` why."""
    if wanted != "auto":
        reasons = [_reason_for_exact(product, sampling, wanted) for product, sampling in group]
        return [("exact" if reason else wanted, reason) for reason in reasons]
    possible = [_possible(product, sampling) for product, sampling in group]
    in_8_bits = sum("int8" in choices for choices, _ in possible)
    rates = [
        _rates(product, sampling, choices, shares=in_8_bits > 1) if choices else {"exact": 0.0}
        for (product, sampling), (choices, _) in zip(group, possible, strict=True)
    ]
    return [
        (best, "" if best != "exact" else reason or why)
        for (best, why), (_, reason) in zip(fastest(rates), possible, strict=True)
    ]


def _possible(product: Product | InputGradient, sampling: Sampling) -> tuple[list[Precision], str]:
    """Return which of :data:`FASTER` a product may have, and where it is none why."""
    value = product.node.meta["val"]
    choices = FASTER.get(value.dtype, ("int8",))
    reasons = {precision: _reason_for_exact(product, sampling, precision) for precision in choices}
    possible = [precision for precision in choices if not reasons[precision]]
    if not possible:
        return [], reasons["int8"]
    if value.device.type == "meta" or (value.is_cuda and not torch.cuda.is_available()):
        return [], f"no {value.device.type} device to measure rates of"
    return possible, ""


def _rates(
    product: Product | InputGradient, sampling: Sampling, choices: Sequence[Precision], shares: bool
) -> Rates:
    value = product.node.meta["val"]
    m, n = value.shape[-2:]
    if isinstance(product, Product) and product.tangent_side == 1:
        m, n = n, m  # X is the second factor of what is measured
    rows = hint(sampling.kept(product.rows) if isinstance(product, Product) else product.rows)
    if value.dim() == 3:
        rows = max(1, rows // value.shape[0])  # of one group
    asked = ["exact", *choices, *[ROUNDING] * shares]
    return seconds(asked, rows, m, n, value.dtype, value.device)


def fastest(rates: Sequence[Rates]) -> list[tuple[Precision, str]]:
    """Return the fastest precision of each of some products with the same X, and where it is ``exact`` why.

    In 8 bits, X is rounded once for all of them.

    Args:
        rates: seconds of each product in the precisions that it may have; of several in 8 bits, with
            :data:`rates.ROUNDING` as well.
    """
    best: list[Precision] = ["bfloat16" if _is_worth(each, "bfloat16") else "exact" for each in rates]
    own = {i: each["int8"] - each.get(ROUNDING, 0.0) for i, each in enumerate(rates) if "int8" in each}
    share = {i: time / rates[i][best[i]] for i, time in own.items()}
    candidates = sorted((i for i in share if share[i] <= WORTH), key=share.__getitem__)
    for count in range(len(candidates), 0, -1):
        chosen = candidates[:count]
        total = sum(own[i] for i in chosen) + rates[chosen[0]].get(ROUNDING, 0.0)
        if total <= WORTH * sum(rates[i][best[i]] for i in chosen):
            for i in chosen:
                best[i] = "int8"
            break
    reasons = []
    for i, each in enumerate(rates):
        others = {precision: time for precision, time in each.items() if precision not in ("exact", ROUNDING)}
        if i in own:
            others["int8"] = own[i] + each.get(ROUNDING, 0.0) / len(own)
        least = min(others, key=others.__getitem__, default="")
        reasons.append(f"{least} takes {others[least] / each['exact']:.2f} of its time" if least else "")
    return [(each, reason if each == "exact" else "") for each, reason in zip(best, reasons, strict=True)]


def _is_worth(rates: Rates, precision: Precision) -> bool:
    return precision in rates and rates[precision] <= WORTH * rates["exact"]


def _reason_for_exact(product: Product | InputGradient, sampling: Sampling, precision: Precision) -> str:
    """Return why a product is multiplied in the precision that the program has; an empty string where it need not."""
    value = product.node.meta["val"]
    in_groups = isinstance(product, Product) and product.offsets is not None
    if product.node.target is not aten.mm.default and not in_groups:
        return "a batch of products"
    if in_groups and value.device.type != "cpu" and precision != "bfloat16":
        return f"no product of groups in 8 bits on {value.device.type}"
    if value.dtype not in _FLOATS:
        return f"{value.dtype} has no such product"
    if precision == "bfloat16" and value.dtype != torch.float32:
        return f"{value.dtype} has 16 bits already"
    if (reason := reason_by_size(product)) is not None:
        return reason
    if not all(isinstance(size, int) for size in value.shape):
        return "features of any number"
    features = value.shape[-2:]
    sizes = features if isinstance(product, Product) else (*features, product.rows)
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
