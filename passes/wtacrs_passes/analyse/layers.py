"""Layers that are alike: what of a forward pass repeats, and which of its products may be computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence, Set
from itertools import accumulate
from typing import Any

from torch import fx

from ..graph.edit import bytes_of_example
from ..graph.names import path_from_source
from ..graph.operations import VIEWS, aten, is_again, is_derivable, tensor_operands
from ..graph.torch_api import invoke_subgraph
from ..maths import ops
from .work import multiplications


def repeated_layers(graph: fx.Graph, tangent: Set[fx.Node]) -> list[list[fx.Node]]:
    """Return the operations of the forward pass by layer, in graph order.

    A layer is the outermost module that stands in a list with others of its class (``layers.0``, ``layers.1``). An
    operation without a module, as a pattern of Inductor leaves it, belongs to the layer that alone reads it. One that
    is marked (`wtacrs_fx.mark_layers`) is a call of another graph, and none here.

    Args:
        tangent: what is computed from tangents.
    """
    forward = [n for n in graph.nodes if n.op == "call_function" and n not in tangent and not is_again(n)]
    stacks = {node: _stack(node.meta.get("nn_module_stack") or {}) for node in forward}
    members = {entry for stack in stacks.values() for entry in stack if _number(entry[0])}
    alike = Counter((path.rpartition(".")[0], kind) for path, kind in members)
    of: dict[fx.Node, str] = {}
    for node, stack in stacks.items():
        for path, kind in stack:
            if _number(path) and alike[path.rpartition(".")[0], kind] > 1:
                of[node] = path
                break
    for node in reversed(forward):
        if not stacks[node] and node not in of:
            readers = {of.get(user) for user in node.users if user not in tangent}
            layer = readers.pop() if len(readers) == 1 else None
            if layer is not None:
                of[node] = layer
    layers: dict[str, list[fx.Node]] = {}
    for node in forward:
        if node in of:
            layers.setdefault(of[node], []).append(node)
    return [layer for layer in layers.values() if all(node.target is not invoke_subgraph for node in layer)]


def layers_of(graph: fx.Graph, tangent: Set[fx.Node]) -> list[list[fx.Node]]:
    """Return the layers that are alike, or the one that a graph is: where another one hands it an activation."""
    layers = repeated_layers(graph, tangent)
    if layers or not graph.find_nodes(op="call_function", target=ops.receive):
        return layers
    return [[n for n in graph.nodes if n.op == "call_function" and n not in tangent and not is_again(n)]]


_MIDDLE = 0.2, 0.8
"""A half computes between these shares of a layer's bytes."""


def first_half(layer: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the first operations of a layer, up to where the fewest bytes are handed on: mostly a residual stream.

    Empty where a layer cannot be divided.

    >>> graph = fx.Graph()
    >>> first_half([graph.call_function(abs, (1,))])
    []
    """
    place = {node: i for i, node in enumerate(layer)}
    sizes = [0 if node.target in VIEWS else bytes_of_example(node) for node in layer]
    last = [0] * len(layer)
    for i in reversed(range(len(layer))):
        uses = [place[user] for user in layer[i].users if user in place]
        last[i] = max((last[use] if layer[use].target in VIEWS else use for use in uses), default=i)
    handed = [0] * (len(layer) + 1)  # before operation i: bytes that it or a later one reads
    for i, until in enumerate(last):
        for between in range(i + 1, until + 1):
            handed[between] += sizes[i]
    made = list(accumulate(sizes, initial=0))
    low, high = (share * made[-1] for share in _MIDDLE)
    places = [i for i in range(1, len(layer)) if low <= made[i] <= high]
    if not places:
        return []
    return list(layer[: min(places, key=lambda i: (handed[i], abs(made[i] - made[-1] / 2)))])


_WITH_WEIGHTS = {aten.mm.default, aten.addmm.default, aten.convolution.default}
"""Products of a value and a weight. What those of attention are made of takes more bytes than they do."""


def products_of(layers: Iterable[Sequence[fx.Node]]) -> list[fx.Node]:
    """Return the products with weights: those of the fewest multiplications for a byte first, else as they come."""
    products = (node for layer in layers for node in layer if node.target in _WITH_WEIGHTS)
    return sorted(products, key=lambda node: multiplications([node]) / max(bytes_of_example(node), 1))


def sums_handed_on(
    layers: Iterable[Sequence[fx.Node]],
    products: Container[fx.Node],
    forward: Container[fx.Node],
    roots: Mapping[fx.Node, fx.Node | None],
) -> set[fx.Node]:
    """Return what layers make of products and hand on, before what they do to it alone: a norm, an activation.

    Products computed again from these begin in no other layer.

    Args:
        products: those that may be computed again.
        forward: what the outputs of the forward pass are computed from.
        roots: see :func:`analyse.functions.unary_roots`.
    """
    found: set[fx.Node] = set()
    for layer in layers:
        members, made = set(layer), set[fx.Node]()
        for node in layer:
            if node in products or any(arg in made for arg in node.all_input_nodes):
                made.add(node)
            others = (user in forward or user.op == "output" for user in node.users.keys() - members)
            if node in made and any(others):
                found.add(_source(node, members, roots))
    return found


_SMALL = 8
"""What has so many times fewer bytes than what is computed from it is a statistic of a norm, or a weight."""


def _source(node: fx.Node, layer: Set[fx.Node], roots: Mapping[fx.Node, fx.Node | None]) -> fx.Node:
    """Return what in a layer a node is computed from, as far as that is one tensor of about its size."""
    while is_derivable(node):
        size = bytes_of_example(node)
        large = {
            roots[arg] or arg
            for arg in tensor_operands(node)
            if arg in layer and _SMALL * bytes_of_example(arg) > size
        }
        source = large.pop() if len(large) == 1 else node
        if source is node or source not in layer:
            break
        node = source
    return node


def _stack(modules: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return path and class of the modules that an operation is in, from the outermost."""
    return [(path_from_source(str(source)), kind) for source, kind in modules.values()]


def _number(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()
