"""From a model and example inputs to its joint graph, and from a joint graph to its rewrite."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx, nn
from wtacrs_passes import torch_api
from wtacrs_passes.joint_graph import copy_joint, is_tangent, outputs_with_descriptors, static_inputs
from wtacrs_passes.pipeline import NoTangentsError, rewrite, rewrite_and_partition
from wtacrs_passes.policy import Policy
from wtacrs_passes.report import Report


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """Return the joint forward-backward graph of ``model(*args, **kwargs)``.

    The graph is AOTAutograd's, with the decompositions of Inductor. Nothing is computed: a model on the
    ``meta`` device and inputs there are enough. It is called with ``(primals, tangents)``, two flat
    lists: parameters, buffers and inputs; one gradient for each differentiable output.

    Raises:
        NoTangentsError: no output of the model requires grad.
    """
    with contextlib.ExitStack() as stack:
        joint = torch_api.aot_export_joint_with_descriptors(
            stack, model, args, kwargs, decompositions=torch_api.select_decompositions()
        )
        graph_module: fx.GraphModule = joint.graph_module
    if not any(is_tangent(node) for node in graph_module.graph.find_nodes(op="placeholder")):
        raise NoTangentsError(
            f"no output of {type(model).__name__} requires grad, so there is no backward graph to capture; "
            f"call it outside torch.no_grad() with trainable parameters"
        )
    return graph_module


def transform(graph_module: fx.GraphModule, policy: Policy | None = None) -> fx.GraphModule:
    """Return a rewritten copy of a joint graph; the input stays as it is.

    The copy has the calling convention of :func:`capture`, runs, and carries its report as
    ``copy.report`` (:class:`Report`).

    Raises:
        NoTangentsError: the graph has no backward part.
    """
    policy = Policy() if policy is None else policy
    rewritten = copy_joint(graph_module)
    rewrite(rewritten, policy, ())
    rewritten.report = _report(graph_module, policy)  # type: ignore[assignment]
    return rewritten


def explain(model: nn.Module, *args: Any, policy: Policy | None = None, **kwargs: Any) -> Report:
    """Tell what the backend would do to ``model(*args, **kwargs)``, without compiling or computing it.

    The joint graph goes through Inductor's own passes, the rewrite and the partition; the bytes are
    those of the tensors that would cross from the forward to the backward graph.

    Raises:
        NoTangentsError: no output of the model requires grad.
    """
    graph_module = capture(model, *args, **kwargs)
    return _report(graph_module, Policy() if policy is None else policy)


def _report(graph_module: fx.GraphModule, policy: Policy) -> Report:
    gm = torch_api.run_joint_graph_passes(copy_joint(graph_module))
    primals = [node for node in gm.graph.find_nodes(op="placeholder") if not is_tangent(node)]
    statics = static_inputs(gm.graph, {})
    indices = [index for index, node in enumerate(primals) if node in statics]
    forward_outputs = sum(not _is_gradient(desc) for _, desc in outputs_with_descriptors(gm.graph))

    def partitioner(graph: fx.GraphModule, outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        return torch_api.min_cut_rematerialization_partition(
            graph, None, num_fwd_outputs=outputs, static_lifetime_input_indices=indices
        )

    return rewrite_and_partition(gm, policy, (), forward_outputs, partitioner)[1]


def _is_gradient(descriptor: Any) -> bool:
    return descriptor is None or bool(descriptor.is_grad())
