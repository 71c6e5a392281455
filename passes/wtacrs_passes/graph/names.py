"""Names: which inputs and outputs of a joint graph belong to which parameter, buffer or mask."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Mapping
from typing import Any, Literal

import torch
from torch import fx

from .edit import output_of
from .operations import VIEWS, content_of, mutates, written_operands


@dataclasses.dataclass(frozen=True)
class NamedInput:
    """An input of a compiled graph that the rewrite knows by name.

    Args:
        index: position among the flat inputs.
        name: path as ``named_parameters()`` prints it; of a mask or activation its argument's name.
        kind: a parameter or buffer of the model, a mask of tokens, or what another graph of the step computed, which
            lives only as long as this one saves it.
    """

    index: int
    name: str
    kind: Literal["parameter", "buffer", "mask", "activation"]


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
        known = named_input(node.meta.get("desc"), table)
        if known is not None and known.kind in kinds:
            found[node] = known
    return found


def static_inputs(graph: fx.Graph, table: Mapping[int, NamedInput]) -> dict[fx.Node, NamedInput]:
    """Return the placeholders of a joint graph that are parameters or buffers."""
    return named_inputs(graph, table, ("parameter", "buffer"))


def named_input(descriptor: Any, table: Mapping[int, NamedInput]) -> NamedInput | None:
    """Return the name of the input that a descriptor of AOTAutograd is about."""
    while hasattr(descriptor, "base"):  # inner tensor of a subclass, e.g. a DTensor's local shard
        descriptor = descriptor.base
    if hasattr(descriptor, "idx"):
        return table.get(descriptor.idx)
    if descriptor is not None and hasattr(descriptor, "target"):
        return NamedInput(-1, descriptor.target, "parameter" if descriptor.is_param() else "buffer")
    return None


def written_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Return the placeholders whose tensors hold other values once the forward pass is over, or may."""
    inputs = graph.find_nodes(op="placeholder")
    descriptors = (descriptor for _, descriptor in outputs_with_descriptors(graph))
    changed = [each.mutated_input for each in descriptors if hasattr(each, "mutated_input")]
    written = {node for node in inputs if node.meta.get("desc") in changed}
    for node in graph.nodes:
        if node.op == "call_function" and mutates(node):
            written.update(content_of(arg, VIEWS) for arg in written_operands(node))
    return written.intersection(inputs)


def parameter_gradients(graph: fx.Graph, table: Mapping[int, NamedInput]) -> dict[fx.Node, str]:
    """Return the outputs that are gradients of parameters and nothing else, with the parameters' names."""
    gradients: dict[fx.Node, str] = {}
    others: set[fx.Node] = set()  # one value may be the gradient of a parameter and of an input
    for value, descriptor in outputs_with_descriptors(graph):
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            continue  # an inner value of a subclass that is no tensor, such as the mesh of a DTensor
        known = named_input(_differentiated(descriptor), table)
        if known is not None and known.kind == "parameter":
            gradients[value] = known.name
        else:
            others.add(value)
    return {value: name for value, name in gradients.items() if value not in others}


def _differentiated(descriptor: Any) -> Any:
    """Return the descriptor of the input that an output is the gradient of; None of others."""
    while hasattr(descriptor, "base"):  # inner tensor of a subclass
        descriptor = descriptor.base
    return getattr(descriptor, "grad_of", None)


def hands_on_gradients(graph: fx.Graph, table: Mapping[int, NamedInput]) -> bool:
    """Tell whether a gradient is of an input that is no parameter: the graph is one of several of a step."""
    for value, descriptor in outputs_with_descriptors(graph):
        source = _differentiated(descriptor)
        if isinstance(value, fx.Node) and source is not None:
            known = named_input(source, table)
            if known is None or known.kind == "activation":
                return True
    return False


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

    >>> path_from_source("L['self']._modules['layers']._modules['0'].forward.__self__._modules['up']")
    'layers.0.up'

    What leads to the model is left out: a wrapper's argument, a bound method, a closure.

    >>> path_from_source("L['args'][0].layers.0"), path_from_source("L['forward'].__self__.layers.0")
    ('layers.0', 'layers.0')
    >>> path_from_source("getattr(G['m'].layers, '0').mlp"), path_from_source("L['weights']['layers.0.weight']")
    ('layers.0.mlp', 'layers.0.weight')
    """
    path = re.sub(r"getattr\(([^()]*), '([^']*)'\)", r"\1.\2", source).replace(".forward.__self__", "")
    path = re.sub(r"^[LG]\['(args'\]\[\d+\]|[^']*'\])\.?", "", path)
    path = re.sub(r"^.*\b(__self__|cell_contents|__wrapped__|__func__)\b\.?", "", path)
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
