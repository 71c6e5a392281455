"""Add the gradient of an embedding to that of the head it is tied to where this lies, not in a tensor of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..decide.modes import MODES
from ..graph.operations import aten, is_zero
from ..graph.torch_api import same_shape
from ..joint import Joint

_ACCUMULATE = {aten.index_put.default: 3, aten._unsafe_masked_index_put_accumulate.default: None}
"""Operations that add rows to a tensor, with the position of the argument that says so, if there is one."""


def scatter_into_sums(joint: Joint) -> None:
    """Turn ``dW + scatter(zeros, rows)`` into ``scatter(dW, rows)``.

    Only gradients, with lossy residuals, as the sum is rounded in another order, and in float32, where that is all.
    """
    if not MODES[joint.policy.residuals].lossy:
        return
    tangent = joint.tangent()
    for node in joint.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if node not in tangent:
            continue
        for scatter, other in (node.args[:2], node.args[1::-1]):
            if (
                not node.kwargs
                and _adds_rows_to_zeros(scatter)
                and all(_is_alike(side, node) for side in node.args)
            ):
                with joint.graph.inserting_before(node):
                    new = joint.graph.call_function(scatter.target, (other, *scatter.args[1:]))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                joint.graph.erase_node(node)
                break
    joint.graph.eliminate_dead_code()


def _adds_rows_to_zeros(node: Any) -> bool:
    """Tell whether a node is zeros with rows added."""
    if not isinstance(node, fx.Node) or node.target not in _ACCUMULATE:
        return False
    flag = _ACCUMULATE[node.target]
    accumulates = flag is None or (len(node.args) > flag and node.args[flag] is True)
    return accumulates and is_zero(node.args[0]) and node.meta["val"].dtype == torch.float32


def _is_alike(operand: Any, node: fx.Node) -> bool:
    """Tell whether an operand has the shape and type of a sum, and nothing else reads it."""
    if not isinstance(operand, fx.Node) or operand.op != "call_function" or len(operand.users) != 1:
        return False
    value, total = operand.meta["val"], node.meta["val"]
    return value.dtype == total.dtype and same_shape(value.shape, total.shape)
