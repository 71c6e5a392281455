"""What depends on what in a joint graph, and which of its values are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import fx

from .operations import is_random, mutates


def is_tangent(node: fx.Node) -> bool:
    """Tell whether a node is an incoming gradient."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def has_tangents(graph: fx.Graph) -> bool:
    """Tell whether a graph has a backward part."""
    return any(is_tangent(node) for node in graph.find_nodes(op="placeholder"))


def depends_on(graph: fx.Graph, sources: set[fx.Node]) -> set[fx.Node]:
    """Return `sources` and everything computed from them."""
    cone = set(sources)
    for node in graph.nodes:
        if node.op != "output" and any(arg in cone for arg in node.all_input_nodes):
            cone.add(node)
    return cone


def tangent_cone(graph: fx.Graph) -> set[fx.Node]:
    """Return everything computed from tangents."""
    return depends_on(graph, {node for node in graph.find_nodes(op="placeholder") if is_tangent(node)})


def needed_for(outputs: Iterable[fx.Node], skip: Callable[[fx.Node, fx.Node], bool]) -> set[fx.Node]:
    """Return `outputs` and everything they are computed from, without the edges that `skip` names.

    Args:
        skip: ``(argument, user) -> bool``.
    """
    needed = set(outputs)
    stack = list(needed)
    while stack:
        user = stack.pop()
        for arg in user.all_input_nodes:
            if arg not in needed and not skip(arg, user):
                needed.add(arg)
                stack.append(arg)
    return needed


def build(
    node: fx.Node,
    operands: Callable[[fx.Node], Iterable[fx.Node]],
    built: dict[fx.Node, fx.Node],
    make: Callable[[fx.Node], fx.Node],
) -> fx.Node:
    """Return what is made of a node, after what is made of its operands; `built` holds what is made already."""
    stack = [node]
    while stack:  # a loop: chains may be longer than Python's stack
        last = stack[-1]
        missing = [operand for operand in operands(last) if operand not in built]
        if missing and last not in built:
            stack += missing
            continue
        stack.pop()
        if last not in built:
            built[last] = make(last)
    return built[node]


def value_numbers(graph: fx.Graph) -> dict[fx.Node, int]:
    """Number the nodes so that equal numbers mean equal values (hash consing of pure operations)."""
    numbers: dict[fx.Node, int] = {}
    known: dict[Any, int] = {}
    for node in graph.nodes:
        key: Any = node
        if node.op == "call_function" and not is_random(node) and not mutates(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), partial(_number, numbers))
            key = (node.target, repr(args), repr(kwargs))
        elif node.op == "get_attr":
            key = node.target
        numbers[node] = known.setdefault(key, len(known))
    return numbers


def _number(numbers: Mapping[fx.Node, int], arg: fx.Node) -> str:
    """Return a value number that cannot be taken for an integer argument."""
    return f"%{numbers[arg]}"
