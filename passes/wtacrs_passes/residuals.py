"""Analysis of a joint graph: its weight-gradient products, and which residuals the backward has anyway."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from . import joint_graph as jg
from .joint_graph import NamedInput, aten

PRODUCTS = {aten.mm.default, aten.bmm.default}

_STATISTIC = Fraction(1, 16)
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.sum.dim_IntList, aten.sum.default}
_MULTIPLICATIONS = {aten.mul.Tensor, aten.mul.Scalar} | PRODUCTS
_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar}
_LINEAR = jg.VIEWS | jg.COPIES | jg.CASTS | _SUMS | {aten.expand.default, aten.slice.Tensor, aten.select.int}


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight-gradient product ``X^T dY`` (or its transpose), or a like product of two activations.

    Attributes:
        node: the ``mm`` or ``bmm``.
        tangent_side: which operand is dY, 0 or 1; the other one is X.
        parameter: name of the parameter whose gradient it is part of; empty in attention.
        module: path of the module that reads the parameter there.
        x: X, ``[..., rows, features]``, or its transpose where `node` reads it that way.
        residual: equal for products that share X.
        stored_names: names of the nodes that hold X if they are saved: X, its views, copies and casts.
        rows: the number of rows, an int or ``SymInt``.
    """

    node: fx.Node
    tangent_side: int
    parameter: str
    module: str
    x: fx.Node
    residual: int
    stored_names: frozenset[str]
    rows: Any


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What the planner needs to know about a joint graph.

    Attributes:
        products: the weight-gradient products, in graph order.
        unsampled: parameters without such a product, with the reason.
        numbers: value numbers of all nodes.
        tangent: everything computed from tangents.
    """

    products: tuple[Product, ...]
    unsampled: tuple[tuple[str, str], ...]
    numbers: dict[fx.Node, int]
    tangent: set[fx.Node]


def rows_first(product: fx.Node, side: int) -> tuple[fx.Node, bool]:
    """Return an operand of a product as ``[..., rows, features]`` and whether it must be transposed.

    A transposing ``permute`` is looked through; otherwise the caller transposes the operand.
    """
    operand = product.args[side]
    assert isinstance(operand, fx.Node)
    if side == 1:
        return operand, False
    if operand.target is aten.permute.default:
        source, dims = operand.args[0], [d % len(operand.args[1]) for d in operand.args[1]]  # type: ignore
        if dims == [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]:
            assert isinstance(source, fx.Node)
            return source, False
    return operand, True


def analyse(graph: fx.Graph, table: Mapping[int, NamedInput], attention: Callable[[str], bool]) -> Analysis:
    """Find the weight-gradient products of a joint graph.

    Args:
        attention: whether the products of two activations of a module count as well.
    """
    tangent = jg.tangent_cone(graph)
    statics = jg.static_inputs(graph, table)
    inputs = {n for n in graph.find_nodes(op="placeholder") if n not in statics and not jg.is_tangent(n)}
    activation = jg.depends_on(graph, {n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)})
    gradients = jg.parameter_gradients(graph, table)
    numbers = jg.value_numbers(graph)
    names = _names_by_number(numbers)

    def constant(operand: Any) -> bool:
        return operand not in activation and operand not in tangent

    products, covered = [], set()
    for node in graph.nodes:
        sides = [arg in tangent for arg in node.args]
        if node.target not in PRODUCTS or sum(sides) != 1:
            continue
        if node.args[sides.index(False)] not in activation:
            continue  # a product with a weight: the gradient of an activation
        reached = _reaches(node, gradients, constant)
        if reached:
            products.append(_product(node, sides.index(True), reached[0], numbers, names))
            covered.update(reached)
        elif attention(jg.module_path(node) or ""):
            products.append(_product(node, sides.index(True), "", numbers, names))
    unsampled = tuple(
        (name, _reason_without_product(node))
        for node, name in gradients.items()
        if name not in covered and node.meta["val"].dim() > 1
    )
    return Analysis(tuple(products), unsampled, numbers, tangent)


def _product(
    node: fx.Node, side: int, parameter: str, numbers: dict[fx.Node, int], names: dict[int, set[str]]
) -> Product:
    x, transpose = rows_first(node, 1 - side)
    forms = jg.same_content(x)
    left = node.args[0]
    assert isinstance(left, fx.Node)
    return Product(
        node=node,
        tangent_side=side,
        parameter=parameter,
        module=jg.module_path(node) or parameter.rpartition(".")[0],
        x=x,
        residual=-numbers[x] - 1 if transpose else numbers[x],
        stored_names=frozenset(name for form in forms for name in names[numbers[form]]),
        rows=left.meta["val"].shape[-1],
    )


def _names_by_number(numbers: dict[fx.Node, int]) -> dict[int, set[str]]:
    names: dict[int, set[str]] = {}
    for node, number in numbers.items():
        names.setdefault(number, set()).add(node.name)
    return names


def _reaches(
    product: fx.Node, gradients: Mapping[fx.Node, str], constant: Callable[[Any], bool]
) -> list[str]:
    """Return the parameters whose gradients are linear in a product, if it reaches nothing else.

    What reaches the gradient of an input, or meets another activation on its way, is the gradient of an
    activation itself: its error would spread to other layers.
    """
    reached: list[str] = []
    stack, seen = [product], {product}
    while stack:
        node = stack.pop()
        if node in gradients:
            reached.append(gradients[node])
        for user in node.users:
            if user.op == "output":
                if node not in gradients:
                    return []
                continue
            if user in seen:
                continue
            if user.target not in _LINEAR and not _scales(user, node, constant):
                return []
            seen.add(user)
            stack.append(user)
    return sorted(reached)


def _scales(user: fx.Node, node: fx.Node, constant: Callable[[Any], bool]) -> bool:
    """Tell whether `user` multiplies or divides `node` by something that only parameters determine."""
    if user.target in _QUOTIENTS:
        return user.args[0] is node and constant(user.args[1])
    if user.target in _MULTIPLICATIONS:
        left, right = user.args[:2]
        return constant(right) if left is node else constant(left)
    return False


def _reason_without_product(gradient: fx.Node) -> str:
    node = gradient
    while node.target in _LINEAR | {operator.getitem} and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return f"gradient computed by {node.target}, not by a matrix product over rows"


def available_in_backward(analysis: Analysis, graph: fx.Graph, sampled: set[fx.Node]) -> set[int]:
    """Return the value numbers of residuals that the backward pass has at hand anyway.

    A value is at hand if it is an input, or if something that the backward pass computes reads it (other
    than a product in `sampled`, for its X). Where such a reader is computed from primals alone, at no fewer
    bytes than it reads (the derivative of an activation function), its operands are stored rather than
    itself; smaller ones (masks, statistics) are stored themselves. What pointwise operations and views
    recompute from values at hand, and from statistics of a few bytes a row, is at hand as well.
    """
    numbers, tangent = analysis.numbers, analysis.tangent
    forward = jg.needed_for([n for n in _outputs(graph) if n not in tangent], lambda arg, user: False)
    backward = jg.needed_for(
        [n for n in _outputs(graph) if n in tangent],
        lambda arg, user: arg not in tangent and user in sampled,
    )
    at_hand = {numbers[node] for node in graph.find_nodes(op="placeholder")}
    for node in backward & tangent:
        if node not in sampled:
            at_hand.update(numbers[arg] for arg in jg.tensor_operands(node) if arg not in tangent)
    primal = [n for n in graph.nodes if n.op == "call_function" and n not in tangent]
    for node in reversed(primal):
        serves_operands = (
            node.target in jg.VIEWS | jg.COPIES | jg.CASTS if node in forward else node in backward
        )
        if numbers[node] in at_hand and serves_operands and _keeps_bytes(node):
            at_hand.update(numbers[arg] for arg in jg.tensor_operands(node))
    for node in primal:
        operands = list(jg.tensor_operands(node))
        if not operands or not jg.is_recomputable(node):
            continue
        if all(numbers[arg] in at_hand or _is_statistic(arg, node) for arg in operands):
            at_hand.add(numbers[node])
    return at_hand


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    return [value for value, _ in jg.outputs_with_descriptors(graph) if isinstance(value, fx.Node)]


def _keeps_bytes(node: fx.Node) -> bool:
    """Tell whether storing the operands of a recomputable node costs no more than storing its result."""
    if not jg.is_recomputable(node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    operands = [arg.meta["val"] for arg in jg.tensor_operands(node)]
    sizes = [value.element_size() for value in operands if isinstance(value, torch.Tensor)]
    return bool(node.meta["val"].element_size() >= max(sizes, default=0))


def _is_statistic(operand: fx.Node, node: fx.Node) -> bool:
    """Tell whether an operand has so few elements, beside the result, that storing it costs nothing."""
    value, result = operand.meta.get("val"), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor) or result.numel() == 0:
        return False
    share = jg.sympy_size(value.numel()) / jg.sympy_size(result.numel())
    return bool(share.is_number and share <= _STATISTIC)
