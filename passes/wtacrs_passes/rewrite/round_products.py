"""Multiply the factors of gradients in fewer bits than the program does.

Before, with A and B ``[rows, features]``, one of them X and the other one dY, drawn rows of them or all::

    dW = mm(permute(A), B)

After, with random numbers where it rounds at random::

    codes_a, scales_a = round_columns(A, rand(rows), rand(features), "int8")   # once for all that read A, after dY
    codes_b, scales_b = round_columns(B, rand(rows), rand(features), "int8")
    dW = multiply_codes(codes_a, scales_a, codes_b, scales_b)

``dX = mm(dY, W)`` becomes the product of the codes of ``permute(dY)``, with a scale for each row of dY, and of W. These
are of this product alone: where one weight serves two layers, one error in both would not be zero in the mean.

On a CPU these stay calls, and the rounding is compiled once for all layers; elsewhere they are written out, and
Inductor fuses the rounding with what computes the factors. (Gradients in 8 bits, rounded at random: Chen et al. 2020,
arXiv 2010.14298.)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..decide.precision import AT_RANDOM
from ..graph.cones import tangent_cone
from ..graph.edit import Editor
from ..graph.operations import GROUPED
from ..joint import Joint
from ..maths import experts, low_precision, ops
from .sample_rows import factor_of_rows


def round_products(joint: Joint) -> None:
    """Rewrite the products that the plan has a precision for."""
    editor = Editor(joint.graph)
    editor.tag = "must_be_in_backward"  # where X is there: its codes are no residual
    rounded: dict[tuple[fx.Node, str, fx.Node | None], Codes] = {}
    products = {node: product for product, node in joint.products.items()}
    tangent = tangent_cone(joint.graph)
    wanted = {joint.products[item.node]: way for item, way, reason in joint.plan.precisions if not reason}
    wanted |= {item.node: way for item, way, reason in joint.plan.input_precisions if not reason}
    for node in [node for node in joint.graph.nodes if node in wanted]:
        precision = wanted[node]
        with editor.before(node):
            factors = [factor_of_rows(editor, node, side) for side in (0, 1)]
            offsets = node.args[2] if node.target in GROUPED else None
            if precision == "bfloat16":
                function = low_precision.multiply if offsets is None else experts.multiply
                constants = {"draws": (), "product": precision} if offsets is None else {"offsets": offsets}
                [new] = editor.trace(function, *factors, **constants)
            else:
                shared = rounded if node in products else {}
                dy = next(
                    f for f in factors if not tangent.isdisjoint((f, *f.all_input_nodes))
                )  # or its transpose
                codes = [_codes(editor, factor, precision, offsets, shared, dy) for factor in factors]
                new = _multiply(editor, codes[0], codes[1], offsets, node.meta["val"].dtype)
        editor.put(node, new)
        if node in products:
            joint.products[products[node]] = new
        joint.graph.erase_node(node)
    joint.graph.eliminate_dead_code()


Codes = tuple[fx.Node, ...]
"""Codes and scales."""


def _codes(
    editor: Editor,
    factor: fx.Node,
    precision: str,
    offsets: fx.Node | None,
    rounded: dict[tuple[fx.Node, str, fx.Node | None], Codes],
    dy: fx.Node,
) -> Codes:
    """Return a factor in fewer bits: rounded before its first reader, for all of them, when its gradient is there."""
    key = factor, precision, offsets
    if key not in rounded:
        after = None if factor is dy else dy
        rounded[key] = round_factor(editor, factor, precision, "backward", offsets, after)
    return rounded[key]


def round_factor(
    editor: Editor,
    factor: fx.Node,
    precision: str,
    owner: str,
    offsets: fx.Node | None = None,
    after: fx.Node | None = None,
) -> Codes:
    """Insert the rounding of a factor, with random numbers of an owner as of :meth:`Editor.noise`.

    Args:
        offsets: the ends of groups of rows, which have scales of their own.
        after: what is waited for. Inductor would round what is stored as soon as there is memory for it.
    """
    draws: list[fx.Node | None] = [None, None]
    if precision in AT_RANDOM:
        device = factor.meta["val"].device
        draws = [editor.noise([editor.size(factor, dim)], device, owner) for dim in (0, 1)]
    if offsets is not None:
        both = editor.call(ops.round_groups, factor, *draws, offsets, precision, after, False)
        return tuple(editor.call(operator.getitem, both, i) for i in (0, 1))
    if factor.meta["val"].device.type == "cpu":
        both = editor.call(ops.round_columns, factor, *draws, precision, after, False)
        return tuple(editor.call(operator.getitem, both, i) for i in (0, 1))
    named = dict(zip(("of_rows", "of_columns"), draws, strict=True))
    return editor.trace(low_precision.round_columns, factor, **named, product=precision)


def _multiply(editor: Editor, a: Codes, b: Codes, offsets: fx.Node | None, dtype: torch.dtype) -> fx.Node:
    if offsets is not None:
        return editor.call(ops.multiply_groups, *a, *b, offsets, dtype, False)
    if a[0].meta["val"].device.type == "cpu":
        return editor.call(ops.multiply_codes, *a, *b, dtype, False)
    [product] = editor.trace(low_precision.multiply_codes, *a, *b, dtype=dtype)
    return product
