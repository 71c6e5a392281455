"""Layers that are alike: what of a forward pass repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from typing import Any

from torch import fx

from ..graph.names import path_from_source
from ..graph.operations import is_again


def repeated_layers(graph: fx.Graph, tangent: Set[fx.Node]) -> list[list[fx.Node]]:
    """Return the operations of the forward pass by layer, in graph order.

    A layer is the outermost module that stands in a list with others of its class (``layers.0``, ``layers.1``). An
    operation without a module, as a pattern of Inductor leaves it, belongs to the layer that alone reads it.

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
    return list(layers.values())


def _stack(modules: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return path and class of the modules that an operation is in, from the outermost."""
    return [(path_from_source(str(source)), kind) for source, kind in modules.values()]


def _number(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()
