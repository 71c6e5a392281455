"""Multiply the factors of weight gradients in fewer bits than the program does.

Before, with A and B ``[rows, features]``, one of them X and the other one dY, drawn rows of them or all::

    dW = mm(permute(A), B)

After, with random numbers where it rounds at random::

    dW = multiply(A, B, rand(2, rows), rand(features of both), "int8")

On a CPU that stays a call, whose rounding is compiled once for all layers; elsewhere it is written out, and Inductor
fuses the rounding with what computes the factors. (Gradients in 8 bits, rounded at random: Chen et al.
2020, arXiv 2010.14298.)
"""

from __future__ import annotations

from torch import fx

from ..analyse.products import rows_first
from ..decide.precision import AT_RANDOM
from ..graph.edit import Editor
from ..graph.operations import aten
from ..joint import Joint
from ..maths import low_precision, ops


def round_products(joint: Joint) -> None:
    """Rewrite the products that the plan has a precision for."""
    editor = Editor(joint.graph)
    for product, precision, reason in joint.plan.precisions:
        if reason:
            continue
        node = joint.products[product.node]
        with editor.before(node):
            rounded = _multiply(editor, node, precision)
        node.replace_all_uses_with(rounded)
        rounded.meta = {**node.meta, "val": rounded.meta["val"]}
        joint.products[product.node] = rounded
        joint.graph.erase_node(node)
    joint.graph.eliminate_dead_code()


def _multiply(editor: Editor, node: fx.Node, precision: str) -> fx.Node:
    factors = [_factor(editor, node, side) for side in (0, 1)]
    value = node.meta["val"]
    draws: list[fx.Node | None] = [None, None]
    if precision in AT_RANDOM:
        sizes = [2, editor.size(factors[0], 0)], [sum(value.shape)]
        draws = [editor.noise(size, value.device, "backward") for size in sizes]
    if value.device.type == "cpu":
        return editor.call(ops.multiply, *factors, *draws, precision, False)
    of_rows, of_columns = draws
    (written,) = editor.trace(
        low_precision.multiply, *factors, of_rows=of_rows, of_columns=of_columns, product=precision
    )
    return written


def _factor(editor: Editor, node: fx.Node, side: int) -> fx.Node:
    factor, transposed = rows_first(node, side)
    return editor.call(aten.permute.default, factor, [1, 0]) if transposed else factor
