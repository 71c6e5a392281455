"""Gather what a gradient is multiplied with into one coefficient.

Before, with t a gradient and a, b, c computed from primals::

    dx = mul(mul(mul(t, a), b), c)                # three residuals
    dz = add(mul(t, a), mul(mul(t, u), b))

After::

    dx = mul(t, mul(mul(a, b), c))                # one residual, or a function of one tensor
    dz = mul(t, add(a, mul(u, b)))

Only elementwise operations that are linear in one gradient are gathered, and only where nothing else reads
the gradients in between. The result differs from the original by rounding. No factor is moved past a mask:
``where(c, t, 0) * a`` is zero where t is Inf and c false, ``t * where(c, a, 0)`` is not.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, fx

from ..decide.modes import modes
from ..graph.cones import depends_on
from ..graph.edit import Editor
from ..graph.operations import ADDITIONS, DIVISIONS, MULTIPLICATIONS, aten, makes_sparse
from ..graph.torch_api import hint, same_shape
from ..joint import Joint

_ON_NUMBERS: dict[Any, Callable[..., float]] = {
    **dict.fromkeys(MULTIPLICATIONS, operator.mul),
    **dict.fromkeys(DIVISIONS, operator.truediv),
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.neg.default: operator.neg,
}
_BY_TENSOR: dict[Any, Any] = {aten.mul.Scalar: aten.mul.Tensor, aten.div.Scalar: aten.div.Tensor}

Operand: TypeAlias = Any
"""A node, a number, or None for the gradient itself."""


@dataclasses.dataclass(frozen=True)
class _Form:
    """A gradient as a multiple of `base`: the nodes in between, and what they read but for constants."""

    base: fx.Node
    nodes: frozenset[fx.Node]
    primals: frozenset[fx.Node]


def reassociate(joint: Joint) -> None:
    """Gather the coefficients of gradients where any of them may be encoded."""
    if any(mode.lossy for mode in modes(joint.policy)) and not makes_sparse(joint.graph):
        gather_coefficients(joint.graph, joint.tangent())


def gather_coefficients(graph: fx.Graph, tangent: set[fx.Node]) -> None:
    """Rewrite chains of elementwise operations on gradients in place."""
    forms: dict[fx.Node, _Form] = {}
    for node in graph.nodes:
        if node in tangent and node.op == "call_function":
            form = _form(node, tangent, forms)
            if form is not None:
                forms[node] = form
    editor = Editor(graph)
    gathered: set[fx.Node] = set()
    moved: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        form = forms.get(node)
        if form is None or node in gathered or len(form.primals) < 2:
            continue
        if any(user not in form.nodes for inner in form.nodes - {node} for user in inner.users):
            continue  # another operation reads a gradient in between
        gathered |= form.nodes
        with editor.before(node):
            coefficient = _Coefficient(editor, form)(node)
            scaled = editor.call(aten.mul.Tensor, form.base, coefficient)
        node.replace_all_uses_with(scaled)
        if scaled.meta["val"].stride() != node.meta["val"].stride():
            moved.add(scaled)
        scaled.meta = {**node.meta, "val": scaled.meta["val"]}
        tangent.add(scaled)
    for node in depends_on(graph, moved):
        if node.target is aten.view.default:
            node.target = aten.reshape.default  # views were traced for other strides
    graph.eliminate_dead_code()


def _form(node: fx.Node, tangent: set[fx.Node], forms: dict[fx.Node, _Form]) -> _Form | None:
    """Return a node as a multiple of one gradient, or None where it is not."""
    if not _is_linear(node, tangent):
        return None
    gradients = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in tangent]
    primals = {arg for arg in node.args if isinstance(arg, fx.Node) and arg not in tangent}
    if not all(_alike(arg, node) for arg in gradients) or not all(_fits(arg, node) for arg in primals):
        return None
    parts = [forms.get(arg) or _Form(arg, frozenset(), frozenset()) for arg in gradients]
    if len({part.base for part in parts}) != 1:
        return None
    return _Form(
        parts[0].base,
        frozenset({node}.union(*(part.nodes for part in parts))),
        frozenset({p for p in primals if p.all_input_nodes}.union(*(part.primals for part in parts))),
    )


def _is_linear(node: fx.Node, tangent: set[fx.Node]) -> bool:
    sides = [isinstance(arg, fx.Node) and arg in tangent for arg in node.args]
    if node.target in MULTIPLICATIONS:
        return sum(sides) == 1
    if node.target in DIVISIONS:
        return sides[0] and not sides[1] and not node.kwargs
    if node.target in ADDITIONS:
        return all(sides) and not node.kwargs
    if node.target is aten.where.self:
        return not sides[0] and all(sides[1:])
    return node.target is aten.neg.default


def _alike(left: fx.Node, right: fx.Node) -> bool:
    a, b = left.meta["val"], right.meta["val"]
    return same_shape(a.shape, b.shape) and bool(a.dtype == b.dtype)


def _fits(primal: fx.Node, node: fx.Node) -> bool:
    """Tell whether a primal may become part of a coefficient: of full size, a condition, or a constant."""
    value, result = primal.meta["val"], node.meta["val"]
    if not isinstance(value, Tensor):
        return True
    if hint(value.numel()) == 1:
        return not primal.all_input_nodes
    condition = node.target is aten.where.self and primal is node.args[0]
    return same_shape(value.shape, result.shape) and bool(condition or value.dtype == result.dtype)


class _Coefficient:
    """Write the coefficient of a gradient: the same operations with 1 in place of the gradient."""

    def __init__(self, editor: Editor, form: _Form) -> None:
        self.editor, self.form = editor, form
        self.known: dict[fx.Node, Operand] = {form.base: None}

    def __call__(self, node: fx.Node) -> fx.Node:
        coefficient = self._of(node)
        assert isinstance(coefficient, fx.Node)
        return coefficient

    def _of(self, node: fx.Node) -> Operand:
        if node not in self.known:
            self.known[node] = self._write(node)
        return self.known[node]

    def _write(self, node: fx.Node) -> Operand:
        inside = self.form.nodes | {self.form.base}
        args = [self._of(a) if isinstance(a, fx.Node) and a in inside else a for a in node.args]
        if node.target in MULTIPLICATIONS and None in args:
            [factor] = [arg for arg in args if arg is not None]
            return factor
        args = [1.0 if arg is None else arg for arg in args]
        if node.target is aten.where.self:
            args = [self._full(node, arg) for arg in args]
        if not any(isinstance(arg, fx.Node) for arg in args):
            numbers: list[Any] = args
            return _ON_NUMBERS[node.target](*numbers)
        return self.editor.call(*self._call(node, args))

    def _call(self, node: fx.Node, args: list[Operand]) -> tuple[Any, ...]:
        left = args[0]
        if not isinstance(left, fx.Node) and node.target is not aten.neg.default:
            args = [self._full(node, left), *args[1:]]
        return (_BY_TENSOR.get(node.target, node.target), *args)

    def _full(self, node: fx.Node, value: Operand) -> fx.Node:
        if isinstance(value, fx.Node):
            return value
        dtype, device = node.meta["val"].dtype, node.meta["val"].device
        return self.editor.call(aten.full.default, [], value, dtype=dtype, device=device, pin_memory=False)
