"""From a model and example inputs to its joint graph, and from a joint graph to its rewrite."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from wtacrs_passes.decide.target import with_what_is_free
from wtacrs_passes.graph import torch_api
from wtacrs_passes.graph.cones import is_tangent
from wtacrs_passes.graph.edit import copy_joint
from wtacrs_passes.graph.names import NamedInput, outputs_with_descriptors, static_inputs
from wtacrs_passes.joint import Partitioned, Partitioner
from wtacrs_passes.pipeline import (
    REWRITES,
    NoTangentsError,
    Rewritten,
    WtacrsPartitioner,
    rewrite_and_partition,
    run,
)
from wtacrs_passes.policy import Policy
from wtacrs_passes.received import hand_on, receive_activations
from wtacrs_passes.regions import describe_regions, region_of
from wtacrs_passes.report import Report

from .backend import lifted_inputs

STATIC_INPUTS = "wtacrs_static_inputs"
"""Key of ``graph_module.meta``: the primals that have a name, by position."""


class _Traced(Exception):
    """Leaves Dynamo once the joint graph is there, before anything is computed."""


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """Return the joint forward-backward graph of ``model(*args, **kwargs)``.

    The graph is the one that ``torch.compile`` makes: Dynamo's trace through AOTAutograd with the
    decompositions of Inductor. Nothing is computed: a model and inputs on the ``meta`` device are enough.
    It is called with ``(primals, tangents)``, two flat lists: parameters, buffers and inputs in the order
    of first use; one gradient for each differentiable output.

    Raises:
        NoTangentsError: no output of the model requires grad.
        torch._dynamo.exc.Unsupported: the model breaks into several graphs.
    """
    captured: list[fx.GraphModule] = []

    def keep_joint(
        table: tuple[NamedInput, ...], gm: fx.GraphModule, inputs: Any, **options: Any
    ) -> Partitioned:
        refuse_regions(gm)
        captured.append(copy_joint(gm))
        captured[0].meta[STATIC_INPUTS] = table
        return torch_api.default_partition(gm, inputs, **options)

    _trace(keep_joint, model, args, kwargs)
    if not captured:
        raise _no_gradient(model)
    return captured[0]


def refuse_regions(gm: fx.GraphModule) -> None:
    """Raise a `ValueError` for the joint graph of a region."""
    if region_of(gm) is not None:
        raise ValueError(
            "the model has regions that are compiled once (mark_layers, torch.compiler.nested_compile_region) and "
            "so no joint graph of its own; capture it without, or ask explain, which knows them"
        )


def _trace(
    partition: Callable[..., Partitioned], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Trace a model as ``torch.compile`` does and hand its joint graph to `partition`, with its named inputs."""

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        with describe_regions():
            torch_api.trace_joint(gm, inputs, functools.partial(partition, lifted_inputs(gm)))
        raise _Traced

    model, args, kwargs = _without_memory(model, *_by_name(model, args, kwargs))

    # A wrapper of its own, so that Dynamo neither reuses nor keeps code compiled for the model.
    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    try:
        torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _Traced):
            raise error.inner_exception from error


def _no_gradient(model: nn.Module) -> NoTangentsError:
    return NoTangentsError(
        f"no output of {type(model).__name__} requires grad, so there is no backward graph to capture; "
        f"call it outside torch.no_grad() with trainable parameters"
    )


def _by_name(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments by the names that the model's forward has for them, as far as it has."""
    signature = inspect.signature(model.forward)
    named = [
        parameter.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        for parameter in signature.parameters.values()
    ]
    count = len(args)
    if not all(named[:count]) or count > len(named):
        return args, kwargs
    names = list(signature.parameters)[:count]
    return (), {**dict(zip(names, args, strict=True)), **kwargs}


def _without_memory(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a model and inputs on the meta device as fake tensors of the CPU; others as they are.

    On meta, Inductor's decomposition of the cross entropy loses the gradient (torch 2.13), and its folding
    takes every value for a constant.
    """
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves((args, kwargs))]
    if not any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors):
        return model, args, kwargs
    twin = copy.deepcopy(model)

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
        empty.requires_grad_(value.requires_grad)
        return empty if value.is_leaf else empty.clone()

    with torch_api.FakeTensorMode(allow_non_fake_inputs=True):
        twin._apply(fake)  # type: ignore[no-untyped-call]
        return twin, tree_map(fake, args), tree_map(fake, kwargs)


def transform(graph_module: fx.GraphModule, policy: Policy | None = None) -> fx.GraphModule:
    """Return a rewritten copy of a joint graph; the input stays as it is.

    The copy has the calling convention of :func:`capture`, runs, and carries its report as
    ``copy.report`` (:class:`Report`).

    Raises:
        NoTangentsError: the graph has no backward part.
    """
    inputs = (node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder"))
    policy = with_what_is_free(policy or Policy(), inputs)
    done = _rewrite(graph_module, policy)
    rewritten = copy_joint(graph_module)
    table = graph_module.meta.get(STATIC_INPUTS, ())
    partitioner = plain_partitioner(rewritten, table)
    receive_activations(rewritten.graph, {known.index: known for known in table})
    run(REWRITES, rewritten, done.policy, table, count_forward_outputs(rewritten.graph), partitioner)
    hand_on(rewritten)
    rewritten.report = done.report  # type: ignore[assignment]
    return rewritten


def explain(model: nn.Module, *args: Any, policy: Policy | None = None, **kwargs: Any) -> Report:
    """Tell what the backend would do to ``model(*args, **kwargs)``, without compiling or computing it.

    The joint graph goes through Inductor's own passes, the rewrite and the partition; the bytes are
    those of the tensors that would cross from the forward to the backward graph.

    Raises:
        NoTangentsError: no output of the model requires grad.
    """
    found: list[Report] = []
    chosen = with_what_is_free(policy or Policy(), (*model.parameters(), *args, *kwargs.values()))

    def rewrite(
        table: tuple[NamedInput, ...], gm: fx.GraphModule, inputs: Any, **options: Any
    ) -> Partitioned:
        partitioner = WtacrsPartitioner(chosen, table, found.append)
        return partitioner.after_inductor(gm, inputs, **options)

    _trace(rewrite, model, args, kwargs)
    if not found:
        raise _no_gradient(model)
    return found[0]


def _rewrite(graph_module: fx.GraphModule, policy: Policy) -> Rewritten:
    gm = torch_api.run_joint_graph_passes(copy_joint(graph_module))
    table = graph_module.meta.get(STATIC_INPUTS, ())
    partitioner = plain_partitioner(gm, table)
    return rewrite_and_partition(gm, policy, table, count_forward_outputs(gm.graph), partitioner)


def plain_partitioner(gm: fx.GraphModule, table: Sequence[NamedInput]) -> Partitioner:
    """Return PyTorch's own partitioner for a joint graph with these named inputs."""
    primals = [node for node in gm.graph.find_nodes(op="placeholder") if not is_tangent(node)]
    statics = static_inputs(gm.graph, {static.index: static for static in table})
    indices = [index for index, node in enumerate(primals) if node in statics]

    def partitioner(graph: fx.GraphModule, outputs: int) -> Partitioned:
        return torch_api.min_cut_rematerialization_partition(
            graph, None, num_fwd_outputs=outputs, static_lifetime_input_indices=indices
        )

    return partitioner


def count_forward_outputs(graph: fx.Graph) -> int:
    """Return how many outputs of a joint graph are no gradients."""
    return sum(not _is_gradient(descriptor) for _, descriptor in outputs_with_descriptors(graph))


def _is_gradient(descriptor: Any) -> bool:
    return descriptor is None or bool(descriptor.is_grad())
