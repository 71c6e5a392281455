"""Which residuals the backward pass has at hand anyway."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import fx

from ..analyse.products import Analysis
from ..analyse.scales import PEAKS
from ..graph.cones import is_tangent, needed_for
from ..graph.edit import sympy_size
from ..graph.names import named_inputs, outputs_with_descriptors, static_inputs, written_inputs
from ..graph.operations import (
    ADDITIONS,
    FILLS,
    FORMS,
    WEIGHTS_IN_FEW_BITS,
    aten,
    is_pointwise,
    is_recomputable,
    mutates,
    packet,
    prims,
    tensor_operands,
)
from ..graph.torch_api import hint
from ..joint import Joint

_NEGLIGIBLE = Fraction(1, 16)
"""A value with so small a share of a result's elements is stored without asking what it costs."""

_CHEAP = FORMS | {
    *FILLS, prims.iota.default, aten.expand.default,
    *ADDITIONS, aten.mul.Tensor, aten.where.self,
    aten.eq.Scalar, aten.eq.Tensor, aten.ne.Scalar, aten.ne.Tensor, aten.lt.Scalar, aten.lt.Tensor,
    aten.le.Scalar, aten.le.Tensor, aten.gt.Scalar, aten.gt.Tensor, aten.ge.Scalar, aten.ge.Tensor,
    aten.logical_not.default, aten.logical_and.default, aten.logical_or.default,
    aten.bitwise_not.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor,
}  # fmt: skip
"""Operations that take no more time than to read what they return."""


def made_of_inputs(joint: Joint) -> frozenset[fx.Node]:
    """Return what the backward pass makes of inputs alone.

    What cheap operations make of parameters, and of integers and masks that the model is given: the casts of weights
    under autocast, and masks for attention. Of parameters, what all operations on single elements make, and largest
    magnitudes, as that is little beside the products that read it: weights in steps of a scale. Weights in full that
    other packages hold in few bits. And what the program itself computes for gradients alone.

    Buffers, and what the graph writes to, are left out: the backward pass may find other values in them.
    """
    written, forward = written_inputs(joint.graph), joint.forward()
    parameters = named_inputs(joint.graph, joint.names, ("parameter",))
    statics = static_inputs(joint.graph, joint.names)
    passing = named_inputs(joint.graph, joint.names, ("buffer", "activation"))
    found: set[fx.Node] = set()
    of_parameters: set[fx.Node] = set()
    of_any: set[fx.Node] = set()
    for node in joint.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        if node.op == "placeholder":
            if node in written or is_tangent(node):
                continue
            if node in parameters:
                of_parameters.add(node)
            if node in parameters or (node not in statics and not value.is_floating_point()):
                found.add(node)
            if node not in passing:
                of_any.add(node)
            continue
        operands = list(tensor_operands(node))
        is_cheap, is_simple = node.target in _CHEAP, is_pointwise(node) or node.target in PEAKS
        if operands and (is_cheap or is_simple) and all(arg in of_parameters for arg in operands):
            of_parameters.add(node)
        is_own = getattr(node.target, "namespace", "") == "wtacrs"  # what a rewrite has planned
        is_weight = _is_weight(node) or (is_simple and any(map(_is_weight, operands)))
        is_known = all(arg in of_any or arg in found for arg in operands)
        if operands and is_known and (node not in forward or is_weight) and not is_own and not mutates(node):
            of_any.add(node)
        cheap = is_cheap and all(arg in found for arg in operands)
        if cheap or node in of_parameters or node in of_any:
            found.add(node)
    return frozenset(found)


def _is_weight(node: fx.Node) -> bool:
    """Tell whether a node makes a weight, or its scales, of few bits."""
    return str(packet(node.target)) in WEIGHTS_IN_FEW_BITS


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
