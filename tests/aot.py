"""Several partitions of one joint graph, run operation by operation: what is compiled, without its code.

Dynamo and AOTAutograd trace once. The joint graph is partitioned as PyTorch does it, and by each policy; the
object that compiled it chooses which of them runs.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from conftest import adds_up
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from wtacrs_fx import Policy, Report
from wtacrs_fx.backend import lifted_inputs
from wtacrs_passes.graph.names import outputs_with_descriptors
from wtacrs_passes.pipeline import WtacrsPartitioner

aten = torch.ops.aten

REFERENCE = "reference"
"""The partition that PyTorch makes on its own."""


@dataclasses.dataclass
class Partitioned:
    """One way to run a training graph.

    Attributes:
        forward, backward: the two graphs.
        report: of the rewrite; None for the reference.
        saved_bytes: that the last forward pass kept, without its inputs and views of them.
        sizes: what else the last forward pass left for the backward pass.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    report: Report | None = None
    saved_bytes: int = -1
    sizes: Sequence[Any] = ()


@dataclasses.dataclass
class Graph:
    """A training graph: each of its partitions, or why there is none.

    Attributes:
        outputs: number of values that the forward graph returns to the program.
        sizes: number of symbolic sizes that the reference saves.
    """

    activations: frozenset[int] = frozenset()
    outputs: int = 0
    sizes: int = 0
    partitions: dict[str, Partitioned] = dataclasses.field(default_factory=dict)
    errors: dict[str, Exception] = dataclasses.field(default_factory=dict)


class Variants:
    """A backend for ``torch.compile`` that compiles for the reference and each policy, and runs one of them.

    Args:
        policies: by the name under which they are chosen.

    Attributes:
        active: name of the partition that runs, to be set before the forward pass.
        graphs: the training graphs in the order in which they were traced.
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.policies = policies
        self.active = REFERENCE
        self.graphs: list[Graph] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Trace a Dynamo graph with Inductor's decompositions and partition it in all ways."""
        table = lifted_inputs(gm)
        graph = Graph(frozenset(known.index for known in table if known.kind == "activation"))

        def partition(joint: fx.GraphModule, joint_inputs: Sequence[Any], **options: Any) -> Any:
            graph.outputs = options["num_fwd_outputs"]
            for name, policy in self.policies.items():
                reports: list[Report] = []
                partitioner = WtacrsPartitioner(policy, table, reports.append)
                try:
                    parts = partitioner(_copy(joint), joint_inputs, **options)
                except Exception as error:  # reported where this partition is to run; the others do
                    graph.errors[name] = error
                    continue
                graph.partitions[name] = Partitioned(*map(_as_inductor_views, parts), *reports)
            parts = min_cut_rematerialization_partition(joint, joint_inputs, **options)
            graph.partitions[REFERENCE] = Partitioned(*parts)
            saved = [value for value, _ in outputs_with_descriptors(parts[0].graph)][graph.outputs :]
            graph.sizes = sum(not isinstance(value.meta["val"], Tensor) for value in saved)
            self.graphs.append(graph)
            return parts

        def forward(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            metadata = torch._guards.TracingContext.get().fw_metadata  # of the reference
            metadata.dynamic_saved_tensors_idxs.clear()
            metadata.saved_tensor_is_graph_input = collections.defaultdict(
                bool
            )  # torch 2.14: no tensor is one
            return make_boxed_func(lambda *args: self._forward(graph, args))

        return aot_module_simplified(
            gm,
            inputs,
            fw_compiler=forward,
            bw_compiler=lambda _, inputs: make_boxed_func(lambda *args: self._backward(graph, args)),
            inference_compiler=nop,
            partition_fn=partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )

    def _forward(self, graph: Graph, args: Sequence[Any]) -> Sequence[Any]:
        if self.active in graph.errors:
            raise graph.errors[self.active]
        chosen = graph.partitions[self.active]
        results = chosen.forward(*args)
        outputs, saved = results[: graph.outputs], results[graph.outputs :]
        chosen.saved_bytes = _bytes_beside(
            saved, [x for i, x in enumerate(args) if i not in graph.activations]
        )
        chosen.sizes = [value for value in saved if not isinstance(value, Tensor)]
        tensors = [value for value in saved if isinstance(value, Tensor)]
        return [*outputs, *tensors, *[0] * graph.sizes]  # as many sizes as AOTAutograd saw

    def _backward(self, graph: Graph, args: Sequence[Any]) -> Sequence[Any]:
        chosen = graph.partitions[self.active]
        return chosen.backward(*chosen.sizes, *args[graph.sizes :])


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph; constants are shared, as fake ones cannot be copied."""
    return fx.GraphModule(gm, copy.deepcopy(gm.graph))


def _as_inductor_views(gm: fx.GraphModule) -> fx.GraphModule:
    """Let a view copy where strides forbid it, as Inductor's lowering does."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    gm.recompile()
    return gm


def _bytes_beside(saved: Iterable[Any], inputs: Iterable[Any]) -> int:
    """Return the bytes of tensors, each counted once, that share no memory with an input."""
    held = {value.untyped_storage().data_ptr() for value in inputs if isinstance(value, Tensor)}
    tensors = {id(value): value for value in saved if isinstance(value, Tensor)}
    return sum(t.nbytes for t in tensors.values() if t.untyped_storage().data_ptr() not in held)


@contextlib.contextmanager
def small_tensors() -> Iterator[None]:
    """Compute with one thread, as several cost more than they gain; forget afterwards what was compiled."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch._dynamo.reset()


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the squared distance relative to the square of `wanted`; 0.0 only where they are equal."""
    found, wanted = found.double(), wanted.double()
    difference = (found - wanted).square().sum()
    return (difference / wanted.square().sum().clamp(min=1e-300)).item()


def wrong_bytes(graph: Graph) -> list[str]:
    """Compare what each report says with what the graphs were seen to keep."""
    problems = []
    before = graph.partitions[REFERENCE].saved_bytes
    for name, part in graph.partitions.items():
        if part.report is None or min(before, part.saved_bytes) < 0:  # one of them never ran
            continue
        said = part.report.saved_bytes_before, part.report.saved_bytes_after
        if said != (before, part.saved_bytes):
            problems.append(f"{name}: {said} bytes reported, {(before, part.saved_bytes)} found")
        if not adds_up(part.report):
            problems.append(f"{name}: lines do not add up")
    return problems
