"""Prove that rows of gradients are zero: padding behind a masked pooling, ignored labels behind a loss.

An abstract interpretation of the tangent part of the joint graph. A row is all of a tensor but its last
dimension. Known of each gradient is a set of conditions, primal tensors with one element a row: where that
element is zero or false, the row is zero. Conditions start at ``where(condition, gradient, 0)`` and at
products with a mask, and pass through whatever treats each row by itself: pointwise operations, sums over the
last dimension, products with a weight. Attention mixes rows and ends them. A NaN or Inf times a mask is no
zero; it reaches the weight's gradient by another way (`sample_rows`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from ..graph.operations import ADDITIONS, CASTS, COPIES, RESHAPES, VIEWS, aten, content_of, is_zero
from ..graph.torch_api import same_shape

Conditions = frozenset[fx.Node]

_NO_CONDITIONS: Conditions = frozenset()
_LIKE_ITS_OPERAND = {aten.neg.default, aten.mul.Scalar, aten.div.Scalar} | CASTS | COPIES
_MAY_KEEP_ROWS = RESHAPES | {aten.expand.default}
_TRANSPOSITIONS = {aten.permute.default, aten.t.default, aten.transpose.int}  # other rows in another order
_OF_A_MASK = (VIEWS - _TRANSPOSITIONS) | CASTS | COPIES


def zero_rows(graph: fx.Graph, tangent: set[fx.Node]) -> dict[fx.Node, Conditions]:
    """Return the conditions under which rows of each gradient are zero; nothing where none is known.

    Args:
        tangent: everything computed from tangents.
    """
    found: dict[fx.Node, Conditions] = {}
    for node in graph.nodes:
        if node in tangent and node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            conditions = _conditions(node, tangent, found)
            if conditions:
                found[node] = conditions
    return found


def _conditions(node: fx.Node, tangent: set[fx.Node], found: dict[fx.Node, Conditions]) -> Conditions:
    def known(operand: Any) -> Conditions:
        return found.get(operand, _NO_CONDITIONS) if _same_rows(operand, node) else _NO_CONDITIONS

    target, args = node.target, node.args
    if target is aten.where.self:
        kept = known(args[1]) & known(args[2])
        return kept | known(args[1]) | _mask(args[0], node) if is_zero(args[2]) else kept
    if target is aten.mul.Tensor:
        operands = [known(arg) if arg in tangent else _mask(arg, node) for arg in args]
        return frozenset().union(*operands)
    if target is aten.div.Tensor or target in _LIKE_ITS_OPERAND:
        return known(args[0])
    if target in ADDITIONS:
        return known(args[0]) & known(args[1])
    if target in _MAY_KEEP_ROWS:
        return found.get(args[0], _NO_CONDITIONS) if _keeps_rows(node) else _NO_CONDITIONS  # type: ignore[arg-type]
    if target is aten.sum.dim_IntList:
        dims = [dim % args[0].meta["val"].dim() for dim in args[1]]  # type: ignore[union-attr]
        last_alone = dims == [node.meta["val"].dim() - 1] and len(args) > 2 and args[2]
        return known(args[0]) if last_alone else _NO_CONDITIONS
    if target is aten.mm.default and args[1] not in tangent:
        return known(args[0])
    return _NO_CONDITIONS


def _same_rows(operand: Any, node: fx.Node) -> bool:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    result = node.meta["val"]
    return isinstance(value, Tensor) and value.dim() > 1 and same_shape(value.shape[:-1], result.shape[:-1])


def _keeps_rows(node: fx.Node) -> bool:
    """Tell whether a view splits or merges rows alone, or an expansion repeats elements within them."""
    source, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if source.dim() < 2 or result.dim() < 2:
        return False
    if node.target is aten.expand.default:
        return same_shape(source.shape[:-1], result.shape[:-1])
    return same_shape(source.shape[-1:], result.shape[-1:])


def _mask(operand: Any, node: fx.Node) -> Conditions:
    """Return the primal tensors, one whole number or boolean for each row of `node`, that make it zero."""
    if not isinstance(operand, fx.Node) or not _same_rows(operand, node):
        return _NO_CONDITIONS
    if operand.target is aten.mul.Tensor:
        return frozenset().union(*(_mask(factor, node) for factor in operand.args))
    if operand.meta["val"].shape[-1] != 1:
        return _NO_CONDITIONS
    source = content_of(operand, _OF_A_MASK)
    value = source.meta["val"]
    whole = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
    return (
        frozenset({source})
        if whole and same_shape([value.numel()], [operand.meta["val"].numel()])
        else _NO_CONDITIONS
    )
