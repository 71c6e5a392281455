"""Write the products of experts as PyTorch would, where a program calls functions of its own for them.

transformers has two operations for experts in other types than bfloat16, the second one of which nothing is known::

    y = grouped_mm_fallback(x, w, offsets)
    dx, dw = grouped_mm_fallback_backward(x, w, offsets, dy)

After, with the same sums::

    y = grouped_mm(x, w, offsets)
    dx = grouped_mm(dy, permute(w), offsets); dw = grouped_mm(permute(x), dy, offsets)

Then `sample_rows` and `round_products` find the gradient of the weights, and `encode_residuals` a reader that it knows.
Where all must stay as it is, bit for bit, these operations do.
"""

from __future__ import annotations

import operator

from torch import fx

from ..decide.modes import MODES
from ..graph.edit import Editor
from ..graph.names import module_path
from ..graph.operations import aten
from ..joint import Joint
from ..maths import ops
from ..policy import Policy

_FORWARD, _BACKWARD = (f"transformers.grouped_mm_fallback{which}.default" for which in ("", "_backward"))


def spell_experts(joint: Joint) -> None:
    """Replace both operations in modules that the policy does anything to."""
    editor = Editor(joint.graph)
    calls = list(joint.graph.find_nodes(op="call_function", target=operator.getitem))
    for node in [node for node in joint.graph.nodes if node.op == "call_function"]:
        if str(node.target) == _FORWARD and _is_changed(joint.policy, node):
            with editor.before(node):
                editor.put(node, editor.call(ops.grouped_mm, *_operands(node)))
        elif str(node.target) == _BACKWARD and _is_changed(joint.policy, node):
            x, weight, offsets, gradient = _operands(node)
            for part in [user for user in calls if user.args[0] is node]:
                with editor.before(part):
                    if part.args[1] == 0:
                        new = editor.call(ops.grouped_mm, gradient, _transpose(editor, weight), offsets)
                    else:
                        new = _gradient_of_weight(editor, x, weight, offsets, gradient)
                    editor.put(part, new)
    joint.graph.eliminate_dead_code()


def _gradient_of_weight(
    editor: Editor, x: fx.Node, weight: fx.Node, offsets: fx.Node, gradient: fx.Node
) -> fx.Node:
    """Return the gradient with the strides of the weight, so that the parameter's is contiguous if the parameter is."""
    if weight.meta["val"].stride(-1) == 1:
        return editor.call(ops.grouped_mm, _transpose(editor, x), gradient, offsets)
    transposed = editor.call(ops.grouped_mm, _transpose(editor, gradient), x, offsets)
    return _transpose(editor, transposed)


def _is_changed(policy: Policy, node: fx.Node) -> bool:
    sampling = policy.sampling(module_path(node) or "")
    if sampling is None:
        return False
    return sampling.ratio < 1.0 or sampling.product != "exact" or MODES[sampling.residuals].lossy


def _operands(node: fx.Node) -> list[fx.Node]:
    return [*node.args, *node.kwargs.values()]  # type: ignore[list-item]


def _transpose(editor: Editor, node: fx.Node) -> fx.Node:
    """Return a matrix, or each of several, transposed; a permutation is looked through."""
    rank = node.meta["val"].dim()
    order = [*range(rank - 2), rank - 1, rank - 2]
    if node.target is aten.permute.default and list(node.args[1]) == order:  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    return editor.call(aten.permute.default, node, order)
