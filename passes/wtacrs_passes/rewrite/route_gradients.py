"""Compute the gradients of routing weights from what experts read, so that nothing stores what they return.

Before, with y [rows, features] of experts, w [rows, 1] the weights that a router gives their rows, and dz the gradient
of ``z = y w``::

    y = grouped_mm(h, W, offsets)
    dw = sum(dz y, -1)
    dh = grouped_mm(dz w, W^T, offsets)

After, as ``sum(dz y) = sum(h (dz W^T))``, with h, which the gradient of W reads anyway::

    g = grouped_mm(dz, W^T, offsets)
    dw = sum(h g, -1)
    dh = g w

The same sums in another order: only where residuals may be rounded. Not in float16, where g may leave the range of
numbers that its product with a small w is in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import fx

from ..decide.modes import MODES
from ..graph.cones import tangent_cone
from ..graph.edit import Editor, sort_by_place
from ..graph.names import module_path
from ..graph.operations import CASTS, GROUPED, MULTIPLICATIONS, aten, content_of
from ..joint import Joint


@dataclasses.dataclass(frozen=True)
class _Routed:
    """The gradients of one call of experts: y, dz, w, and the nodes dw and dh."""

    y: fx.Node
    dz: fx.Node
    w: fx.Node
    dw: fx.Node
    dh: fx.Node


def route_gradients(joint: Joint) -> None:
    """Rewrite the gradients of routing weights wherever y would be stored for them alone."""
    tangent = tangent_cone(joint.graph)
    found = [each for node in joint.graph.nodes for each in _routed(node, tangent) if _may_round(joint, each)]
    if not found:
        return
    places = {node: place for place, node in enumerate(joint.graph.nodes)}
    editor = Editor(joint.graph)
    for each in found:
        with editor.before(min(each.dw, each.dh, key=places.__getitem__)):
            h, _, offsets = each.y.args
            weight = each.dh.args[1]
            assert isinstance(h, fx.Node) and callable(each.dh.target)
            g = editor.call(each.dh.target, editor.cast_like(each.dz, h), weight, offsets)
            product = editor.call(aten.mul.Tensor, editor.widen(h), editor.widen(g))
            dw = editor.call(aten.sum.dim_IntList, product, [-1], True)
            dh = editor.call(aten.mul.Tensor, editor.widen(g), editor.widen(each.w))
            editor.put(each.dw, editor.cast_like(dw, each.dw))
            editor.put(each.dh, editor.cast_like(dh, each.dh))
            g.meta = {**each.dh.meta, "val": g.meta["val"]}
    sort_by_place(joint.graph, {node: place for place, node in enumerate(joint.graph.nodes)})
    joint.graph.eliminate_dead_code()


def _may_round(joint: Joint, routed: _Routed) -> bool:
    sampling = joint.policy.sampling(module_path(routed.y) or "")
    return (
        sampling is not None
        and MODES[sampling.residuals].lossy
        and routed.y.meta["val"].dtype != torch.float16
    )


def _routed(dw: fx.Node, tangent: set[fx.Node]) -> Iterator[_Routed]:
    """Yield what a node is part of if it is a ``dw``."""
    if (
        dw.target is not aten.sum.dim_IntList
        or dw not in tangent
        or list(dw.args[1:]) not in ([[-1], True], [[1], True])
    ):
        return
    product = dw.args[0]
    assert isinstance(product, fx.Node)
    if product.target not in MULTIPLICATIONS or len(product.users) > 1:
        return
    for dz, y in (product.args[:2], product.args[1::-1]):
        if not isinstance(dz, fx.Node) or not isinstance(y, fx.Node) or dz not in tangent or y in tangent:
            continue
        y = content_of(y, CASTS)
        if y.target not in GROUPED or y.meta["val"].dim() != 2 or _backward_readers(y, tangent) != {product}:
            continue
        for scaled in (user for user in dz.users if user.target in MULTIPLICATIONS and user is not product):
            w = scaled.args[1] if scaled.args[0] is dz else scaled.args[0]
            if not isinstance(w, fx.Node) or w in tangent or w.meta["val"].shape != dw.meta["val"].shape:
                continue
            for dh in (user for form in _casts(scaled) for user in form.users):
                if dh.target is y.target and content_of(dh.args[0], CASTS) is scaled and _inverts(dh, y):  # type: ignore[arg-type]
                    yield _Routed(y, dz, w, dw, dh)
                    return


def _backward_readers(y: fx.Node, tangent: set[fx.Node]) -> set[fx.Node]:
    return {user for form in _casts(y) for user in form.users if user in tangent}


def _casts(node: fx.Node) -> list[fx.Node]:
    """Return a node and its casts."""
    return [node, *(user for user in node.users if user.target in CASTS)]


def _inverts(dh: fx.Node, y: fx.Node) -> bool:
    """Tell whether a product is with the transposed matrices of another, of the same rows."""
    (weight, order), (other, others) = (_permuted(each.args[1]) for each in (dh, y))  # type: ignore[arg-type]
    return dh.args[2] is y.args[2] and weight is other and order == [others[0], others[2], others[1]]


def _permuted(node: fx.Node) -> tuple[fx.Node, list[int]]:
    """Return what a batch of matrices is a permutation of, and the order of its dimensions."""
    order = [0, 1, 2]
    while node.target is aten.permute.default:
        dims = [int(dim) % 3 for dim in node.args[1]]  # type: ignore[union-attr,arg-type]
        order = [dims[i] for i in order]
        node = node.args[0]  # type: ignore[assignment]
    return node, order
