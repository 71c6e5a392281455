"""The joint graph: primal and tangent cones, parameter gradients, edits that keep ``meta`` right."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from functools import partial
from typing import Any, Literal

import sympy
import torch
from torch import fx

from .torch_api import detect_fake_mode, inductor_prims, make_graph_module, py_sym_types, trace_operations

aten = torch.ops.aten
prims = torch.ops.prims

VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.t.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.alias.default,
    aten.detach.default,
}
COPIES = {aten.clone.default, aten.contiguous.default}
CASTS = {prims.convert_element_type.default, aten._to_copy.default}
GATHERS = {aten.expand.default, aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.gather.default}
FILLS: dict[Any, int] = {aten.full.default: 1, aten.scalar_tensor.default: 0}
"""Constants, with the position of the value among the arguments."""
_LOOPS = {aten.cat.default, aten.embedding.default, *FILLS}
RANDOM = {inductor_prims.seed, inductor_prims.seeds, inductor_prims.random, inductor_prims.randint}


@dataclasses.dataclass(frozen=True)
class NamedInput:
    """An input of a compiled graph that the rewrite knows by name.

    Args:
        index: position among the flat inputs.
        name: path as ``named_parameters()`` prints it; of a mask its argument's name.
        kind: a parameter or buffer of the model, or a mask of tokens.
    """

    index: int
    name: str
    kind: Literal["parameter", "buffer", "mask"]


def is_tangent(node: fx.Node) -> bool:
    """Tell whether a node is an incoming gradient."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def has_tangents(graph: fx.Graph) -> bool:
    """Tell whether a graph has a backward part."""
    return any(is_tangent(node) for node in graph.find_nodes(op="placeholder"))


def is_pointwise(node: fx.Node) -> bool:
    """Tell whether a node computes each element from one element of each input."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and not is_random(node)


def is_random(node: fx.Node) -> bool:
    """Tell whether two equal calls of the node may return different values."""
    tags = getattr(node.target, "tags", ())
    return node.target in RANDOM or torch.Tag.nondeterministic_seeded in tags


def is_recomputable(node: fx.Node) -> bool:
    """Tell whether Inductor computes the node again in a fused kernel at the cost of reading its inputs."""
    return (
        is_pointwise(node)
        or node.target in VIEWS | COPIES | CASTS | GATHERS
        or (node.target is operator.getitem)
    )


def is_loop(node: fx.Node) -> bool:
    """Tell whether Inductor writes the loop that computes the node, and so may fuse it with others."""
    reduces = getattr(torch.Tag, "reduction", None) in getattr(node.target, "tags", ())
    return reduces or is_recomputable(node) or node.target in _LOOPS


def is_derivable(node: fx.Node) -> bool:
    """Tell whether the node's operands suffice to compute it again: not so for one of several results."""
    return is_recomputable(node) and node.target is not operator.getitem


def content_of(node: fx.Node, forms: Set[Any] = VIEWS | COPIES | CASTS) -> fx.Node:
    """Return what a view, copy or cast is a form of."""
    while node.target in forms and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def output_of(graph: fx.Graph) -> fx.Node:
    """Return the output node."""
    output: fx.Node = graph.find_nodes(op="output")[0]
    return output


def outputs_with_descriptors(graph: fx.Graph) -> list[tuple[Any, Any]]:
    """Return each output value (a node or None) with its AOTAutograd descriptor (or None)."""
    output = output_of(graph)
    values = torch.utils._pytree.arg_tree_leaves(*output.args)
    descriptors = list(output.meta.get("desc") or [None] * len(values))
    return list(zip(values, descriptors, strict=True))


def named_inputs(
    graph: fx.Graph, table: Mapping[int, NamedInput], kinds: Container[str]
) -> dict[fx.Node, NamedInput]:
    """Return the placeholders of a joint graph that have a name, of some kinds.

    Args:
        table: names by position, for graphs that Dynamo lifted parameters and buffers into.
    """
    found = {}
    for node in graph.find_nodes(op="placeholder"):
        known = _named_input(node.meta.get("desc"), table)
        if known is not None and known.kind in kinds:
            found[node] = known
    return found


def static_inputs(graph: fx.Graph, table: Mapping[int, NamedInput]) -> dict[fx.Node, NamedInput]:
    """Return the placeholders of a joint graph that are parameters or buffers."""
    return named_inputs(graph, table, ("parameter", "buffer"))


def _named_input(descriptor: Any, table: Mapping[int, NamedInput]) -> NamedInput | None:
    while hasattr(descriptor, "base"):  # inner tensor of a subclass, e.g. a DTensor's local shard
        descriptor = descriptor.base
    if hasattr(descriptor, "idx"):
        return table.get(descriptor.idx)
    if descriptor is not None and hasattr(descriptor, "target"):
        return NamedInput(-1, descriptor.target, "parameter" if descriptor.is_param() else "buffer")
    return None


def parameter_gradients(graph: fx.Graph, table: Mapping[int, NamedInput]) -> dict[fx.Node, str]:
    """Return the outputs that are gradients of parameters, with the parameters' names."""
    gradients = {}
    for value, descriptor in outputs_with_descriptors(graph):
        while hasattr(descriptor, "base"):
            descriptor = descriptor.base
        if not isinstance(value, fx.Node) or not hasattr(descriptor, "grad_of"):
            continue
        if not isinstance(value.meta.get("val"), torch.Tensor):
            continue  # an inner value of a subclass that is no tensor, such as the mesh of a DTensor
        known = _named_input(descriptor.grad_of, table)
        if known is not None and known.kind == "parameter":
            gradients[value] = known.name
    return gradients


def copy_joint(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose graph can be edited; sub-modules and constants are shared."""
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    output = graph.output(graph.graph_copy(gm.graph, {}))
    output.meta = copy.copy(output_of(gm.graph).meta)
    graph.set_codegen(copy.copy(gm.graph._codegen))
    copied = make_graph_module(gm, graph, class_name=type(gm).__name__)
    copied.meta = dict(gm.meta)
    return copied


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


def value_numbers(graph: fx.Graph) -> dict[fx.Node, int]:
    """Number the nodes so that equal numbers mean equal values (hash consing of pure operations)."""
    numbers: dict[fx.Node, int] = {}
    known: dict[Any, int] = {}
    for node in graph.nodes:
        key: Any = node
        if node.op == "call_function" and not is_random(node) and not _mutates(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), partial(_number, numbers))
            key = (node.target, repr(args), repr(kwargs))
        elif node.op == "get_attr":
            key = node.target
        numbers[node] = known.setdefault(key, len(known))
    return numbers


def merge_equal(graph: fx.Graph) -> None:
    """Let equal values be computed once, so that what reads them reads one node."""
    first: dict[int, fx.Node] = {}
    for node, number in value_numbers(graph).items():
        if first.setdefault(number, node) is not node:
            node.replace_all_uses_with(first[number])
            graph.erase_node(node)


def same_content(node: fx.Node) -> set[fx.Node]:
    """Return the nodes that hold what `node` holds: what it is a view, copy or cast of, and those of that."""
    source = content_of(node)
    found, stack = {source}, [source]
    while stack:
        for user in stack.pop().users:
            if user.target in VIEWS | COPIES | CASTS and user not in found:
                found.add(user)
                stack.append(user)
    return found


def _number(numbers: Mapping[fx.Node, int], arg: fx.Node) -> str:
    """Return a value number that cannot be taken for an integer argument."""
    return f"%{numbers[arg]}"


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return not isinstance(node.target, torch._ops.OpOverload) or bool(schema and schema.is_mutable)


def module_path(node: fx.Node) -> str | None:
    """Return the path of the module whose forward or backward the node belongs to."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(list(stack.values())[-1][0])
    return path_from_source(path)


def path_from_source(source: str) -> str:
    """Turn Dynamo's name of a module or parameter into a path as ``named_modules()`` prints it.

    >>> path_from_source("L['self']._modules['layers']._modules['0']._parameters['weight']")
    'layers.0.weight'
    >>> path_from_source("L['self'].layers.0")
    'layers.0'
    >>> path_from_source("L['self'].__dict__['_modules']['inner']._modules['0']")
    'inner.0'
    """
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", source)
    path = re.sub(r"__dict__\['(_modules|_parameters|_buffers)'\]", r"\1", path)
    path = re.sub(r"_(modules|parameters|buffers)\['([^']*)'\]", r"\2", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    return path.replace("._orig_mod", "").removeprefix("_orig_mod.").strip(".")


def last_name(source: str) -> str:
    """Return the name of an argument or item that Dynamo found by a source.

    >>> last_name("L['kwargs']['attention_mask']"), last_name("L['batch'].mask")
    ('attention_mask', 'mask')
    """
    return re.split(r"[.\[]", source)[-1].strip("[]'\"")


def nbytes(value: Any) -> sympy.Expr:
    """Return the size of a tensor in bytes; symbolic where a size is."""
    if not isinstance(value, torch.Tensor):
        return sympy.Integer(0)
    return sympy_size(value.numel()) * value.element_size()


def sympy_size(size: Any) -> sympy.Expr:
    """Return an int or ``SymInt`` as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class Editor:
    """Insert operations before a node of a joint graph; the only place that writes ``meta``.

    Each new node gets a ``meta["val"]`` computed under the graph's own fake mode.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        values = [node.meta.get("val") for node in graph.nodes]
        self.mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
        self._traces: dict[Any, fx.Graph] = {}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert ``target(*args, **kwargs)`` at the current insertion point."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        if self.mode is None:
            node.meta["val"] = target(*values[0], **values[1])
        else:
            with self.mode:
                node.meta["val"] = target(*values[0], **values[1])
        return node

    def trace(self, function: Callable[..., Any], *nodes: fx.Node, **constants: Any) -> tuple[fx.Node, ...]:
        """Insert the operations of ``function(*nodes, **constants)``, plain torch; return its results.

        Layers of one model ask for the same thing again and again: what was traced once for tensors of a
        kind is repeated.
        """
        values = [node.meta["val"] for node in nodes]
        sizes = [size for value in values for size in (*value.shape, *value.stride())]
        kinds = [(value.dtype, value.device) for value in values]
        key = (function, *constants.items(), *kinds, *sizes)
        repeatable = not any(is_symbolic(part) for part in (*sizes, *constants.values()))
        traced = self._traces.get(key) if repeatable else None
        if traced is None:
            with self.mode or contextlib.nullcontext():
                traced = trace_operations(partial(function, **constants), values)
            if repeatable:
                self._traces[key] = traced
        new = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
        for node in traced.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), new.__getitem__)
                new[node] = self.call(node.target, *args, **kwargs)
        return tuple(new[node] for node in torch.utils._pytree.arg_tree_leaves(*output_of(traced).args))

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


def is_symbolic(value: Any) -> bool:
    """Tell whether a value is a symbolic number."""
    return isinstance(value, py_sym_types)


def tensor_operands(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the inputs of a node whose values are tensors (or tuples of them)."""
    for arg in node.all_input_nodes:
        if not is_symbolic(arg.meta.get("val")):
            yield arg
