"""The work of a graph: multiplications of matrices, convolutions and attention, by PyTorch's formulas.

Not those of a loss in chunks, which are never done again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from ..graph.cones import tangent_cone
from ..graph.operations import ATTENTION, aten, packet
from ..graph.torch_api import hint

_ALIKE = {aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention}
"""Operations without a formula, with one of the same operands that has one."""
_OF_HEADS = {operation for operation in ATTENTION if "_scaled_dot_product" in str(operation)}
"""Attention of queries, keys and values [batch, heads, tokens, d]."""


def multiplications(nodes: Iterable[fx.Node]) -> int:
    """Return how many numbers operations multiply, with the sizes of the example inputs."""
    return sum(map(_multiplications, nodes))


def computed_again(backward: fx.Graph) -> list[fx.Node]:
    """Return what a backward graph computes from no gradient."""
    tangent = tangent_cone(backward)
    return [node for node in backward.nodes if node.op == "call_function" and node not in tangent]


def _multiplications(node: fx.Node) -> int:
    operation = packet(node.target)
    formula = flop_registry.get(_ALIKE.get(operation, operation))
    if formula is None:
        return 0
    given: Any = fx.map_arg((node.args, node.kwargs), lambda arg: _sizes(arg.meta.get("val")))
    args, kwargs = given
    if operation in _OF_HEADS:  # the formula of torch 2.11 knows no heads that share keys and values
        query, *shared = args[:3]
        args = (query, *(x.new_empty(*query.shape[:-2], *x.shape[-2:]) for x in shared), *args[3:])
    return int(formula(*args, **kwargs, out_val=_sizes(node.meta["val"]))) // 2


def _sizes(value: Any) -> Any:
    """Return a tensor on the meta device of a value's sizes; what is none as it is."""
    if isinstance(value, torch.Tensor):
        return torch.empty([hint(size) for size in value.shape], device="meta")
    return value
