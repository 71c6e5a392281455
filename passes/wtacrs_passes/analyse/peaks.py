"""Predict from the two graphs of a training step how much it holds at once, before code is generated.

A loop that Inductor writes takes memory only where something other than loops reads what it computes, or the
graph returns it; else it is computed where it is read. What takes memory does so until it is read last. The order
is the better of two that Inductor tries as well: that of the graph, and the greedy one of least memory
(`torch._inductor.memory.topological_sort_lpmf`).

Sizes that are symbolic count as those of the example inputs.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from ..graph.cones import is_tangent
from ..graph.edit import bytes_of_example, output_of
from ..graph.names import module_path, outputs_with_descriptors
from ..graph.operations import VIEWS, is_loop, is_view, reduces
from ..graph.torch_api import invoke_subgraph, trace_operations
from ..maths import ops
from ..maths.chunks import function_of
from ..maths.low_precision import columns_at_once
from ..report import Peak

_READS = 4
"""Inductor computes a value again for each of its readers as long as that reads no more buffers than these."""


@dataclasses.dataclass(frozen=True)
class Waiting:
    """What waits for the backward pass beside parameters, buffers and inputs.

    Attributes:
        read: the inputs of the backward pass that live until it has read them, with their bytes, each once.
        returned: bytes of what the program returns: who called it has it still.
    """

    read: Mapping[fx.Node, int]
    returned: int

    @property
    def names(self) -> frozenset[str]:
        """The names of what is read."""
        return frozenset(node.name for node in self.read)


def waiting(
    forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int, is_part: bool
) -> Waiting:
    """Return what waits for the backward pass.

    Where a program returns its loss, its other results stay with the caller. Others go into what computes the loss, as
    what a part of a step returns does into the next one.
    """
    memory = _Memory(forward.graph)
    outputs = [value for value, _ in outputs_with_descriptors(forward.graph)]
    buffers = [memory.buffer(value) if isinstance(value, fx.Node) else None for value in outputs]
    results = {
        buffer: value
        for buffer in buffers[:num_fwd_outputs]
        if buffer is not None and isinstance(value := buffer.meta.get("val"), Tensor)
    }
    returns_loss = any(value.dim() == 0 and value.is_floating_point() for value in results.values())
    returned = {buffer for buffer in results if returns_loss and not is_part and buffer.op != "placeholder"}
    saved = {
        value.name: buffer
        for value, buffer in zip(outputs, buffers, strict=True)
        if isinstance(value, fx.Node)
    }
    read: dict[fx.Node, int] = {}
    seen: set[fx.Node] = set(returned)
    for node in backward.graph.find_nodes(op="placeholder"):
        source = saved.get(node.name)
        is_held = source is not None and source.op != "placeholder" and source not in seen
        if is_held or is_tangent(node):
            read[node] = bytes_of_example(node)
        if source is not None:
            seen.add(source)
    return Waiting(read, sum(map(bytes_of_example, returned)))


def predict_peak(forward: fx.GraphModule, backward: fx.GraphModule, wait: Waiting) -> Peak:
    """Return the larger of the peaks of the forward and of the backward pass."""
    before = _Memory(forward.graph).least_peak({}, "forward")
    after = _Memory(backward.graph).least_peak(wait.read, "backward")
    after = dataclasses.replace(after, size=after.size + wait.returned)
    return max(before, after, key=lambda peak: peak.size)


def _is_alias(node: fx.Node) -> bool:
    """Tell whether a node is another view of what its first operand holds."""
    viewed = node.op == "call_function" and bool(node.args) and isinstance(node.args[0], fx.Node)
    return viewed and node.target is not operator.getitem and (node.target in VIEWS or is_view(node))


class _Memory:
    """What of a graph takes memory, and when.

    Attributes:
        reads: what is computed at once -> the buffers that this reads.
        kept: the buffers that the graph returns.
        reduced: the buffers that a reduction reads. It shares a loop with what reads them last, which then cannot write
            there.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.kept = {self.buffer(node) for node in output_of(graph).all_input_nodes}
        self.reads: dict[fx.Node, dict[fx.Node, None]] = {}
        inlined: dict[fx.Node, dict[fx.Node, None]] = {}
        for node in graph.nodes:
            if (
                node.op != "call_function"
                or _is_alias(node)
                or node.target in (operator.getitem, ops.receive)
            ):
                continue
            reads: dict[fx.Node, None] = {}
            for argument in node.all_input_nodes:
                source = self.buffer(argument)
                reads.update(inlined.get(source, {source: None}))
            if self._is_inlined(node, len(reads)):
                inlined[node] = reads
            else:
                self.reads[node] = reads
        self.reduced = {
            buffer
            for step, reads in self.reads.items()
            if is_loop(step) and reduces(step)
            for buffer in reads
        }

    def buffer(self, node: fx.Node) -> fx.Node:
        """Return what a node is a view of."""
        while _is_alias(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _is_inlined(self, node: fx.Node, reads: int) -> bool:
        if node in self.kept or not is_loop(node) or reduces(node):
            return False
        readers = list(_readers(node))
        return all(is_loop(reader) for reader in readers) and (len(readers) <= 1 or reads <= _READS)

    def least_peak(self, held: Mapping[fx.Node, int], part: str) -> Peak:
        """Return the peak in the better of two orders, where `held` is there at the start."""
        results = {step: _results(step) for step in self.reads}
        sizes = {
            buffer: bytes_of_example(buffer) for buffers in results.values() for buffer in buffers
        } | dict(held)
        workspace = {step: _workspace(step) for step in self.reads}
        orders = (list(self.reads), self._greedy_order(held, results, sizes))
        return min(
            (self._peak(order, held, part, results, sizes, workspace) for order in orders),
            key=lambda peak: peak.size,
        )

    def _peak(
        self,
        order: Sequence[fx.Node],
        held: Mapping[fx.Node, int],
        part: str,
        results: Mapping[fx.Node, Sequence[fx.Node]],
        sizes: Mapping[fx.Node, int],
        workspace: Mapping[fx.Node, int],
    ) -> Peak:
        left = self._readers_left(sizes)
        live = sum(held.values())
        peak = Peak(live, part, "", "")
        for step in order:
            size = sum(sizes[buffer] for buffer in results[step])
            read = [buffer for buffer in self.reads[step] if buffer in left]  # inputs live anyway
            for buffer in read:
                left[buffer] -= 1
            freed = [buffer for buffer in read if not left[buffer]]
            in_place = is_loop(step) and any(
                sizes[buffer] == size and buffer not in self.reduced for buffer in freed
            )
            during = live + (0 if in_place else size) + workspace[step]
            if during > peak.size:
                peak = Peak(during, part, module_path(step) or "", str(step.target))
            unread = [buffer for buffer in results[step] if not left[buffer]]
            live += size - sum(sizes[buffer] for buffer in (*freed, *unread))
        return peak

    def _readers_left(self, sizes: Iterable[fx.Node]) -> dict[fx.Node, int]:
        """Return how many steps read each buffer; what the graph returns is read once more."""
        left = {buffer: int(buffer in self.kept) for buffer in sizes}
        for reads in self.reads.values():
            for buffer in reads:
                if buffer in left:
                    left[buffer] += 1
        return left

    def _greedy_order(
        self,
        held: Mapping[fx.Node, int],
        results: Mapping[fx.Node, Sequence[fx.Node]],
        sizes: Mapping[fx.Node, int],
    ) -> list[fx.Node]:
        """Return the steps so that each takes no more than was taken before, and frees most, as far as that goes."""
        left = self._readers_left(sizes)
        place = {step: number for number, step in enumerate(self.reads)}
        size = {step: sum(sizes[buffer] for buffer in buffers) for step, buffers in results.items()}
        makes = {buffer: step for step, buffers in results.items() for buffer in buffers}
        readers: dict[fx.Node, list[fx.Node]] = {buffer: [] for buffer in left}
        waits: dict[fx.Node, int] = {}
        gain = {step: -size[step] for step in self.reads}
        for step, reads in self.reads.items():
            waits[step] = sum(buffer in makes for buffer in reads)
            for buffer in reads:
                if buffer in left:
                    readers[buffer].append(step)
                    gain[step] += sizes[buffer] if left[buffer] == 1 else 0
        live = highest = sum(held.values())
        ready, order = [step for step, count in waits.items() if not count], list[fx.Node]()
        while ready:
            gap = highest - live
            step = min(ready, key=lambda s: (size[s] if size[s] > gap else 0, -gain[s], place[s]))
            ready.remove(step)
            order.append(step)
            highest = max(highest, live + size[step])
            live -= gain[step]
            for buffer in self.reads[step]:
                if buffer not in left:
                    continue
                left[buffer] -= 1
                if left[buffer] == 1:
                    for reader in readers[buffer]:
                        gain[reader] += sizes[buffer]  # of the last one; the others are done
            for buffer in results[step]:
                for reader in readers[buffer]:
                    waits[reader] -= 1
                    if not waits[reader]:
                        ready.append(reader)
        return order


def _results(step: fx.Node) -> list[fx.Node]:
    """Return the buffers that a step computes: itself, or those of its several results that are read."""
    if isinstance(step.meta.get("val"), Tensor):
        return [step]
    return [user for user in step.users if user.target is operator.getitem]


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    """Yield what reads a node or a view of it."""
    for user in node.users:
        if _is_alias(user):
            yield from _readers(user)
        elif user.op != "output":
            yield user


def workspace(target: Any, args: Sequence[Any]) -> int:
    """Return the bytes that an operation needs beside its results: for one chunk; for codes."""
    if target in (ops.multiply_codes, ops.multiply_groups):
        m, n = args[0].shape[1], args[2].shape[1]
        return 4 * int(min(m, columns_at_once(n))) * int(n)
    if target is not ops.in_chunks:
        return 0
    body, _, rowwise, shared, chunk = args[:5]
    values = [x[:chunk] for x in rowwise] + list(shared)
    graph = trace_operations(lambda *xs: tuple(function_of(body)(chunk, *xs)), values)
    return _Memory(graph).least_peak({}, "").size


def _workspace(node: fx.Node) -> int:
    """Return the same of a node, or what a region holds."""
    if node.target is invoke_subgraph:
        body = getattr(node.graph.owning_module, str(node.args[0].target))  # type: ignore[union-attr]
        return max(
            0, _Memory(body.graph).least_peak({}, "").size - sum(map(bytes_of_example, _results(node)))
        )
    if node.target not in (ops.multiply_codes, ops.multiply_groups, ops.in_chunks):
        return 0
    return workspace(node.target, fx.map_arg(node.args, lambda arg: arg.meta["val"]))
