"""Add the gradient of an embedding to that of the head it is tied to where this lies, not in a tensor of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..analyse.losses import is_zero, shape_of
from ..decide.modes import MODES
from ..graph.operations import aten
from ..joint import Joint

_ACCUMULATE = {aten.index_put.default: 3, aten._unsafe_masked_index_put_accumulate.default: None}
"""Operations that add rows to a tensor, with the position of the argument that says so, if there is one."""


def scatter_into_sums(joint: Joint) -> None:
    """Turn ``dW + scatter(zeros, rows)`` into ``scatter(dW, rows)``.

    Only with lossy residuals, as the sum is rounded in another order, and in float32, where that is all.
    """
    if not MODES[joint.policy.residuals].lossy:
        return
    for node in joint.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for scatter, other in (node.args[:2], node.args[1::-1]):
            if not node.kwargs and _adds_rows_to_zeros(scatter) and _is_alike(other, node):
                with joint.graph.inserting_before(node):
                    new = joint.graph.call_function(scatter.target, (other, *scatter.args[1:]))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                joint.graph.erase_node(node)
                break
    joint.graph.eliminate_dead_code()


def _adds_rows_to_zeros(node: Any) -> bool:
    """Tell whether a node, read once, is zeros with rows added."""
    if not isinstance(node, fx.Node) or node.target not in _ACCUMULATE or len(node.users) != 1:
        return False
    flag = _ACCUMULATE[node.target]
    accumulates = flag is None or (len(node.args) > flag and node.args[flag] is True)
    return accumulates and is_zero(node.args[0]) and node.meta["val"].dtype == torch.float32


def _is_alike(other: Any, node: fx.Node) -> bool:
    """Tell whether an operand has the shape and type of a sum, and nothing else reads it."""
    if not isinstance(other, fx.Node) or shape_of(other) != shape_of(node) or len(other.users) != 1:
        return False
    return other.op == "call_function" and bool(other.meta["val"].dtype == node.meta["val"].dtype)
