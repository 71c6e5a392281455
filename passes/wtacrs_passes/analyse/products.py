"""Find the weight-gradient products of a joint graph."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from ..graph.cones import depends_on, is_tangent, tangent_cone, value_numbers
from ..graph.names import (
    NamedInput,
    module_path,
    parameter_gradients,
    static_inputs,
)
from ..graph.operations import (
    ADDITIONS,
    DIVISIONS,
    FORMS,
    GEMMS,
    GROUPED,
    MULTIPLICATIONS,
    SUMS,
    aten,
    same_content,
)
from ..joint import Joint

_LINEAR = FORMS | ADDITIONS | SUMS | {
    aten.neg.default, aten.expand.default, aten.slice.Tensor, aten.select.int,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight-gradient product ``X^T dY`` (or its transpose), or a like product of two activations.

    Attributes:
        node: the ``mm``, ``bmm`` or ``_grouped_mm``.
        tangent_side: which operand is dY, 0 or 1; the other one is X.
        parameter: name of the parameter whose gradient it is part of; empty in attention.
        module: path of the module that reads the parameter there.
        x: X, ``[..., rows, features]``, or its transpose where `node` reads it that way.
        residual: equal for products that share X.
        stored_names: names of the nodes that hold X if they are saved: X, its views, copies and casts.
        rows: the number of rows, an int or ``SymInt``.
        offsets: where rows are in groups, each with a weight of its own, the ends of these; see `maths.experts`.
    """

    node: fx.Node
    tangent_side: int
    parameter: str
    module: str
    x: fx.Node
    residual: int
    stored_names: frozenset[str]
    rows: Any
    offsets: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class InputGradient:
    """A product ``dX = dY W``.

    Attributes:
        node: the ``mm``, ``bmm`` or ``_grouped_mm``.
        module: path of the module that reads the weight there.
        x: W, as `node` reads it.
        rows: the number of features that are summed over.
    """

    node: fx.Node
    module: str
    x: fx.Node
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


def find_products(joint: Joint) -> None:
    """Find the weight-gradient products; where the policy says so, those of two activations as well."""
    joint.analysis = analyse(joint.graph, joint.names, joint.policy.samples_attention)
    joint.products = {product.node: product.node for product in joint.analysis.products}


def analyse(graph: fx.Graph, table: Mapping[int, NamedInput], attention: Callable[[str], bool]) -> Analysis:
    """Return the weight-gradient products of a joint graph.

    Args:
        attention: whether the products of two activations of a module count as well.
    """
    tangent = tangent_cone(graph)
    activation = _activations(graph, table)
    gradients = parameter_gradients(graph, table)
    numbers = value_numbers(graph)
    names = _names_by_number(numbers)

    def constant(operand: Any) -> bool:
        return operand not in activation and operand not in tangent

    products, covered = [], set()
    for node, side in _products_of_tangents(graph, tangent):
        if node.args[1 - side] not in activation:
            continue  # a product with a weight: the gradient of an activation
        reached = _reaches(node, gradients, constant)
        if reached:
            products.append(_make_product(node, side, reached[0], numbers, names))
            covered.update(reached)
        elif node.target in GEMMS and attention(module_path(node) or ""):
            products.append(_make_product(node, side, "", numbers, names))
    unsampled = tuple(
        (name, _reason_without_product(node))
        for node, name in gradients.items()
        if name not in covered and node.meta["val"].dim() > 1
    )
    return Analysis(tuple(products), unsampled, numbers, tangent)


def input_gradients(graph: fx.Graph, table: Mapping[int, NamedInput]) -> list[InputGradient]:
    """Return the products of what is computed from tangents with what parameters alone determine."""
    tangent, activation = tangent_cone(graph), _activations(graph, table)
    found = []
    for node, side in _products_of_tangents(graph, tangent):
        weight = node.args[1 - side]
        if weight not in activation:
            rows = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
            found.append(InputGradient(node, module_path(node) or "", weight, rows))  # type: ignore[arg-type]
    return found


def _products_of_tangents(graph: fx.Graph, tangent: set[fx.Node]) -> Iterator[tuple[fx.Node, int]]:
    """Yield the products of two operands of which one is computed from tangents, with its side."""
    for node in graph.nodes:
        if node.target in GEMMS | GROUPED:
            sides = [arg in tangent for arg in node.args[:2]]
            if sum(sides) == 1:
                yield node, sides.index(True)


def _activations(graph: fx.Graph, table: Mapping[int, NamedInput]) -> set[fx.Node]:
    """Return everything that is computed from tensors that the model is given."""
    statics = static_inputs(graph, table)
    inputs = {n for n in graph.find_nodes(op="placeholder") if n not in statics and not is_tangent(n)}
    return depends_on(graph, {n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)})


def _make_product(
    node: fx.Node, side: int, parameter: str, numbers: dict[fx.Node, int], names: dict[int, set[str]]
) -> Product:
    x, transpose = rows_first(node, 1 - side)
    forms = same_content(x)
    left = node.args[0]
    assert isinstance(left, fx.Node)
    return Product(
        node=node,
        tangent_side=side,
        parameter=parameter,
        module=module_path(node) or parameter.rpartition(".")[0],
        x=x,
        residual=-numbers[x] - 1 if transpose else numbers[x],
        stored_names=frozenset(name for form in forms for name in names[numbers[form]]),
        rows=left.meta["val"].shape[-1],
        offsets=node.args[2] if node.target in GROUPED else None,  # type: ignore[arg-type]
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
    if user.target in DIVISIONS:
        return user.args[0] is node and constant(user.args[1])
    if user.target in MULTIPLICATIONS | GEMMS:
        left, right = user.args[:2]
        return constant(right) if left is node else constant(left)
    return False


def _reason_without_product(gradient: fx.Node) -> str:
    node = gradient
    while node.target in _LINEAR | {operator.getitem} and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return f"gradient computed by {node.target}, not by a matrix product over rows"
