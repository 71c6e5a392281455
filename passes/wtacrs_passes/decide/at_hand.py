"""Which residuals the backward pass has at hand anyway."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import fx

from ..analyse.products import Analysis
from ..graph.cones import needed_for
from ..graph.edit import sympy_size
from ..graph.names import outputs_with_descriptors
from ..graph.operations import FORMS, is_recomputable, tensor_operands
from ..graph.torch_api import hint

_NEGLIGIBLE = Fraction(1, 16)
"""A value with so small a share of a result's elements is stored without asking what it costs."""


def available_in_backward(analysis: Analysis, graph: fx.Graph, sampled: set[fx.Node]) -> set[int]:
    """Return the value numbers of residuals that the backward pass has at hand anyway.

    A value is at hand if it is an input, or if something that the backward pass computes reads it (other
    than a product in `sampled`, for its X). Where such a reader is computed from primals alone, at no fewer
    bytes than it reads (the derivative of an activation function), its operands are stored rather than
    itself; smaller ones (masks, statistics) are stored themselves. What pointwise operations and views
    recompute from values at hand, and from statistics of a few bytes a row, is at hand as well.
    """
    numbers, tangent = analysis.numbers, analysis.tangent
    forward = needed_for([n for n in _outputs(graph) if n not in tangent], lambda arg, user: False)
    backward = needed_for(
        [n for n in _outputs(graph) if n in tangent],
        lambda arg, user: arg not in tangent and user in sampled,
    )
    at_hand = {numbers[node] for node in graph.find_nodes(op="placeholder")}
    for node in backward & tangent:
        if node not in sampled:
            at_hand.update(numbers[arg] for arg in tensor_operands(node) if arg not in tangent)
    primal = [n for n in graph.nodes if n.op == "call_function" and n not in tangent]
    for node in reversed(primal):
        serves_operands = node.target in FORMS if node in forward else node in backward
        if numbers[node] in at_hand and serves_operands and _keeps_bytes(node):
            at_hand.update(numbers[arg] for arg in tensor_operands(node))
    for node in primal:
        operands = list(tensor_operands(node))
        if not operands or not is_recomputable(node):
            continue
        if all(numbers[arg] in at_hand or _is_negligible(arg, node) for arg in operands):
            at_hand.add(numbers[node])
    return at_hand


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    return [value for value, _ in outputs_with_descriptors(graph) if isinstance(value, fx.Node)]


def _keeps_bytes(node: fx.Node) -> bool:
    """Tell whether storing the operands of a recomputable node costs no more than storing its result."""
    if not is_recomputable(node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    operands = [arg.meta["val"] for arg in tensor_operands(node)]
    sizes = [value.element_size() for value in operands if isinstance(value, torch.Tensor)]
    return bool(node.meta["val"].element_size() >= max(sizes, default=0))


def _is_negligible(operand: fx.Node, node: fx.Node) -> bool:
    """Tell whether an operand has so few elements, beside the result, that storing it costs nothing."""
    value, result = operand.meta.get("val"), node.meta.get("val")
    if (
        not isinstance(value, torch.Tensor)
        or not isinstance(result, torch.Tensor)
        or hint(result.numel()) == 0
    ):
        return False
    share = sympy_size(value.numel()) / sympy_size(result.numel())
    return bool(share.is_number and share <= _NEGLIGIBLE)
