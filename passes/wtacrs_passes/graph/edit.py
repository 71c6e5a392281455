"""Edit a joint graph: copies, new operations with the right ``meta``, sizes."""

from __future__ import annotations

import contextlib
import copy
import heapq
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from .operations import NOISE_OF, aten, is_view, mutates, prims
from .torch_api import detect_fake_mode, fake_like, hint, make_graph_module, trace_operations


def sort_by_place(graph: fx.Graph, places: Mapping[fx.Node, int]) -> None:
    """Sort a graph so that nodes follow their operands, and are else in the order of their places.

    Sums that nothing waits for, the gradients of norms, stay where their operands are in memory anyway; a search in
    depth would leave them for the end.
    """
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    missing = {node: len(node.all_input_nodes) for node in nodes}
    ready = [(places[node], position[node]) for node in nodes if not missing[node]]
    heapq.heapify(ready)
    end, done = output_of(graph), 0
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        if node is not end:
            end.prepend(node)
        done += 1
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, (places[user], position[user]))
    assert done == len(nodes), "the graph has a cycle"


def output_of(graph: fx.Graph) -> fx.Node:
    """Return the output node."""
    output: fx.Node = graph.find_nodes(op="output")[0]
    return output


def copy_joint(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose graph can be edited; sub-modules and constants are shared."""
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    output = graph.output(graph.graph_copy(gm.graph, {}))
    output.meta = copy.copy(output_of(gm.graph).meta)
    graph.set_codegen(copy.copy(gm.graph._codegen))
    copied = make_graph_module(gm, graph, class_name=type(gm).__name__)
    copied.meta = dict(gm.meta)
    return copied


def nbytes(value: Any) -> sympy.Expr:
    """Return the size of a tensor in bytes; symbolic where a size is."""
    if not isinstance(value, torch.Tensor):
        return sympy.Integer(0)
    return sympy_size(value.numel()) * value.element_size()


def bytes_of_example(node: fx.Node) -> int:
    """Return the bytes of a node's tensor with the sizes of the example inputs; zero where it is none, or several."""
    value = node.meta.get("val")
    return hint(value.numel()) * value.element_size() if isinstance(value, torch.Tensor) else 0


def sympy_size(size: Any) -> sympy.Expr:
    """Return an int or ``SymInt`` as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class Editor:
    """Insert operations before a node of a joint graph; the only place that writes ``meta``.

    Each new node gets a ``meta["val"]`` computed under the graph's own fake mode, and the editor's `tag`, which
    tells PyTorch's partitioner where it belongs. Layers of one model ask for the same thing again and again: what
    was computed or traced once for operands of a kind is repeated.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
        self.mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
        self.tag: str | None = None
        self._values: dict[Any, Any] = {}
        self._traces: dict[Any, fx.Graph] = {}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert ``target(*args, **kwargs)`` at the current insertion point."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self._value(node)
        if self.tag is not None:
            node.meta["partitioner_tag"] = self.tag
        return node

    def _value(self, node: fx.Node) -> Any:
        """Return the value of a node, in memory of its own or its operands'."""
        if self.mode is None or mutates(node) or is_view(node):
            return self._compute(node)
        key = node.target, repr(fx.map_arg((node.args, node.kwargs), _kind))
        if key in self._values:
            return _map_tensors(fake_like, self._values[key])
        value = self._values[key] = self._compute(node)
        return value

    def _compute(self, node: fx.Node) -> Any:
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
        with self.mode or contextlib.nullcontext():
            return node.target(*args, **kwargs)

    def cast_like(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """Return `node` in the dtype of `like`."""
        dtype = like.meta["val"].dtype
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(prims.convert_element_type.default, node, dtype)

    def widen(self, node: fx.Node) -> fx.Node:
        """Return `node` in the precision of sums and norms: float32, or float64 where it has it."""
        if node.meta["val"].dtype in (torch.float32, torch.float64):
            return node
        return self.call(prims.convert_element_type.default, node, torch.float32)

    def noise(self, size: list[Any], device: torch.device, owner: str) -> fx.Node:
        """Insert random numbers in [0, 1), float32, of shape `size`; `owner` as :data:`NOISE_OF` says."""
        noise = self.call(aten.rand.default, size, dtype=torch.float32, device=device, pin_memory=False)
        noise.meta[NOISE_OF] = owner
        return noise

    def trace(self, function: Callable[..., Any], *nodes: fx.Node, **named: Any) -> tuple[fx.Node, ...]:
        """Insert the operations of ``function(*nodes, **named)``, plain torch; return its results.

        Args:
            named: constants, or nodes as `nodes`.
        """
        more = {name: value for name, value in named.items() if isinstance(value, fx.Node)}
        constants = {name: value for name, value in named.items() if name not in more}
        inputs = (*nodes, *more.values())
        key = function, repr((list(map(_kind, inputs)), list(more), constants))
        if key not in self._traces:

            def of_values(*values: Any) -> Any:
                rest = dict(zip(more, values[len(nodes) :], strict=True))
                return function(*values[: len(nodes)], **rest, **constants)

            with self.mode or contextlib.nullcontext():
                self._traces[key] = trace_operations(of_values, [node.meta["val"] for node in inputs])
        traced = self._traces[key]
        new = dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True))
        for node in traced.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), new.__getitem__)
                new[node] = self.call(node.target, *args, **kwargs)
        return tuple(new[node] for node in torch.utils._pytree.arg_tree_leaves(*output_of(traced).args))

    def repeat(self, node: fx.Node, new: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Insert a copy of `node` that reads the new nodes in the place of the old ones; it keeps its `meta`."""
        repeated = self.graph.node_copy(node, lambda operand: new.get(operand, operand))
        repeated.meta = {**node.meta, "partitioner_tag": self.tag}
        if repeated.target is aten.view.default:
            repeated.target = aten.reshape.default  # what is computed again may have other strides
        return repeated

    def put(self, old: fx.Node, new: fx.Node) -> fx.Node:
        """Let all that reads `old` read `new`, which gets its `meta`; return `new`."""
        old.replace_all_uses_with(new)
        new.meta = {**old.meta, "val": new.meta["val"]}
        return new

    def size(self, node: fx.Node, dim: int) -> Any:
        """Return a size of `node`: an int, or a node where it is symbolic."""
        size = node.meta["val"].shape[dim]
        return self.call(aten.sym_size.int, node, dim) if isinstance(size, torch.SymInt) else size

    def before(self, node: fx.Node) -> Any:
        """Insert before `node` within a ``with`` block."""
        return self.graph.inserting_before(node)

    def after(self, node: fx.Node) -> Any:
        """Insert after `node` and the inputs, one operation after the other, within a ``with`` block."""
        following = node.next
        while following.op == "placeholder":
            following = following.next
        return self.before(following)


def _kind(node: fx.Node) -> Any:
    """Return what the values of operations on a node depend on: all but where its memory is."""
    return _map_tensors(lambda x: (x.dtype, x.device, x.shape, x.stride()), node.meta["val"])


def _map_tensors(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to a tensor, or to each of several."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return tuple(_map_tensors(function, each) for each in value) if isinstance(value, tuple | list) else value
