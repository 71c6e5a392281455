"""Regions that are compiled once and called for each layer: ``torch.compiler.nested_compile_region``.

AOTAutograd hands the joint graph of a region to the partitioner before that of the graph which calls it, and says
nothing of what its inputs are. What is known where it is called is written there (`describe_regions`), so that the
passes see in a region what they would see in the layer itself: parameters with their names, and activations that have
no storage yet. What a region saves is then counted for each call (`with_regions`).

Only graphs of torch >= 2.13 say where a region is called; in others its parameters have no names and no rows are drawn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from .analyse.functions import unary_roots
from .analyse.ranges import Ranges, is_opaque
from .analyse.readers import Readers
from .graph.cones import depends_on, is_tangent, tangent_cone
from .graph.edit import Editor, output_of
from .graph.names import NamedInput, module_path, named_input, outputs_with_descriptors
from .graph.operations import IS_AMPLIFIED, IS_FROM_DATA, IS_MASKED, IS_TAME, VIEWS, content_of
from .graph.torch_api import CheckpointPolicy, GradAOTOutput, each_region_called, invoke_subgraph
from .joint import Partitioned
from .maths import ops
from .partition import PartitionError
from .policy import Policy, PolicyError
from .received import hand_on, receive
from .report import Report, Size, simplify

_KEY = "wtacrs_region"
_RECEIVED = "wtacrs_received"


@dataclasses.dataclass(frozen=True)
class Region:
    """What is known about a region from where it is called.

    Attributes:
        calls: for each call what AOTAutograd says of each operand; None of what is computed.
        received: positions of operands that are computed for each call: a layer's input, but not a mask that all
            layers read.
        outputs: number of values that the program gets; those that are saved follow.
        report: of its rewrite, for the first call.
    """

    calls: tuple[tuple[Any, ...], ...]
    received: frozenset[int]
    outputs: int
    report: Report | None = None


def describe_regions() -> contextlib.AbstractContextManager[None]:
    """Let each region that is compiled in this context know from where it is called."""
    return each_region_called(_describe)


def _describe(gm: fx.GraphModule, call: fx.Node, num_fwd_outputs: int) -> None:
    graph = call.graph
    calls = [forward for forward, _ in _pairs(graph) if forward.args[1] == call.args[1]]
    operands = [node.args[2:] for node in calls]
    known = tuple(tuple(_descriptor(operand) for operand in given) for given in operands)
    _mark_tame_calls(graph)
    tangent = tangent_cone(graph)
    ranges = Ranges(graph, tangent, unary_roots(graph), set())
    gradients = [value for value, _ in outputs_with_descriptors(gm.graph)][num_fwd_outputs:]
    received = {
        position
        for position, (gradient, given) in enumerate(zip(gradients, zip(*operands, strict=True), strict=True))
        if gradient is not None and (len(set(given)) > 1 or len(given) == 1)
        and all(isinstance(operand, fx.Node) for operand in given)
        and any(operand.op != "placeholder" for operand in given)
        and not any(operand in ranges.wild or operand in ranges.outlying for operand in given)
    }  # fmt: skip
    gm.meta[_KEY] = Region(known, frozenset(received), num_fwd_outputs)

    readers = Readers(graph, tangent, ranges, set())
    for primal, given in zip(_primals(gm), zip(*operands, strict=True), strict=True):
        primal.meta[IS_FROM_DATA] = any(map(readers.is_from_data, given))
    incoming = [node for node in gm.graph.find_nodes(op="placeholder") if is_tangent(node)]
    amplified, masked = set[int](), set[int]()
    for forward, backward in _pairs(graph):
        if backward is None or forward not in calls:
            continue
        for own, gradient in zip(incoming, backward.args[-len(incoming) :], strict=True):
            if not isinstance(gradient, fx.Node):
                continue
            own.meta[IS_AMPLIFIED] = own.meta.get(IS_AMPLIFIED) or readers.is_amplified(gradient)
            own.meta[IS_MASKED] = own.meta.get(IS_MASKED) or readers.is_masked(gradient)
        items = {num_fwd_outputs + _index(item): item for item in backward.users}
        amplified.update(position for position, item in items.items() if readers.is_amplified_later(item))
        masked.update(position for position, item in items.items() if readers.is_masked_later(item))
    output_of(gm.graph).meta.update({IS_AMPLIFIED: frozenset(amplified), IS_MASKED: frozenset(masked)})


def _primals(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.find_nodes(op="placeholder") if not is_tangent(node)]


def _pairs(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node | None]]:
    """Return the calls of regions in the forward pass, in order, with those in the backward pass."""
    calls = graph.find_nodes(op="call_function", target=invoke_subgraph)
    parts: dict[str, dict[Any, fx.Node]] = {"fw": {}, "bw": {}}
    for call in calls:
        parts.setdefault(str(call.args[1])[:2], {})[call.meta.get("custom", {}).get("call_id", call)] = call
    return [(forward, parts["bw"].get(number)) for number, forward in parts["fw"].items()]


def _mark_tame_calls(graph: fx.Graph) -> None:
    """Mark the calls of regions that keep the sizes of what they read, in the forward and in the backward pass.

    As operands are taken for such as have no element of another order of size, a region says so of its results, and
    that holds for all calls if it does for what is handed to the first.
    """
    tame: dict[Any, bool] = {}
    for forward, backward in _pairs(graph):
        body = _body(forward)
        if body not in tame:
            ranges = Ranges(body.graph, set(), unary_roots(body.graph), set())
            sizes = [n in ranges.wild or n in ranges.outlying for n in output_of(body.graph).all_input_nodes]
            tame[body] = not any(sizes) and not any(map(is_opaque, body.graph.nodes))
        forward.meta[IS_TAME] = tame[body]
        if backward is None:
            continue
        joint = _body(backward)
        if joint not in tame:
            inputs = joint.graph.find_nodes(op="placeholder")
            tangent = depends_on(joint.graph, set(inputs[len(forward.args) - 2 :]))
            ranges = Ranges(joint.graph, tangent, unary_roots(joint.graph), set())
            tame[joint] = Readers(joint.graph, tangent, ranges, set()).is_quiet
        backward.meta[IS_TAME] = tame[joint]


def _body(call: fx.Node) -> fx.GraphModule:
    assert isinstance(call.args[0], fx.Node)
    owner = call.graph.owning_module
    found: fx.GraphModule = getattr(owner, str(call.args[0].target))
    return found


def _descriptor(operand: Any) -> Any:
    is_input = isinstance(operand, fx.Node) and operand.op == "placeholder"
    return operand.meta.get("desc") if is_input else None


def calls_regions(gm: fx.GraphModule) -> bool:
    """Tell whether a graph of Dynamo calls regions."""
    return bool(gm.graph.find_nodes(op="call_function", target=invoke_subgraph))


def region_of(gm: fx.GraphModule) -> Region | None:
    """Return what is known about a graph that is the body of a region."""
    found: Region | None = gm.meta.get(_KEY)
    return found


def enter_region(
    gm: fx.GraphModule, region: Region, policy: Policy, table: Mapping[int, NamedInput]
) -> list[int]:
    """Write into the joint graph of a region what its inputs are; return the positions of parameters and buffers.

    Raises:
        PolicyError: the policy is not the same for all layers that are compiled as one.
    """
    _check_policy(gm, region, policy, table)
    primals = _primals(gm)
    statics, gradients = [], list[Any]()
    for position, (primal, known) in enumerate(zip(primals, zip(*region.calls, strict=True), strict=True)):
        names = [named_input(each, table) for each in known]
        kinds = {name.kind if name is not None else None for name in names}
        one_kind = len(kinds) == 1
        if one_kind:
            primal.meta["desc"] = known[0]
        if one_kind and kinds <= {"parameter", "buffer"}:
            statics.append(position)
        gradients.append(GradAOTOutput(grad_of=known[0]) if kinds == {"parameter"} else None)
    output_of(gm.graph).meta["desc"] = [None] * region.outputs + gradients
    receive(gm.graph, (primals[position] for position in sorted(region.received)))
    return statics


def _check_policy(
    gm: fx.GraphModule, region: Region, policy: Policy, table: Mapping[int, NamedInput]
) -> None:
    modules = {module_path(node) for node in gm.graph.nodes} - {None}
    for number in range(1, len(region.calls)):
        rename = _renaming_of_call(region, number, table)
        for module in modules:
            assert module is not None
            if policy.sampling(module) != policy.sampling(rename(module)):
                raise PolicyError(
                    f"a policy must be the same for all layers that are compiled as one, got different ones for "
                    f"{module} and {rename(module)}; compile the layers one by one, or write patterns that match "
                    f"all of them"
                )


def _renaming_of_call(region: Region, number: int, table: Mapping[int, NamedInput]) -> Callable[[str], str]:
    """Return what turns a path in the first call of a region into that of another."""
    return _renaming(_names(region, 0, table), _names(region, number, table))


def _names(region: Region, number: int, table: Mapping[int, NamedInput]) -> list[str]:
    found = [named_input(each, table) for each in region.calls[number]]
    return [each.name for each in found if each is not None and each.kind != "activation"]


def _renaming(first: Sequence[str], other: Sequence[str]) -> Callable[[str], str]:
    for old, new in zip(first, other, strict=False):
        parts, others = old.split("."), new.split(".")
        place = next(
            (i for i, pair in enumerate(zip(parts, others, strict=False)) if len(set(pair)) > 1), None
        )
        if place is not None:
            before, after = ".".join(parts[: place + 1]), ".".join(others[: place + 1])
            return functools.partial(_moved, before=before, after=after)
    return str


def _moved(path: str, before: str, after: str) -> str:
    return after + path[len(before) :] if f"{path}.".startswith(f"{before}.") else path


def leave_region(parts: Partitioned, region: Region, report: Report) -> None:
    """Let the forward graph of a region return what it received as its caller's; keep its report there."""
    forward, _ = parts
    hand_on(forward)
    forward.meta[_KEY] = dataclasses.replace(region, report=report)


def _calls(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule, Region]]:
    """Yield the calls of regions in a forward pass, with their forward graphs."""
    for call in gm.graph.find_nodes(op="call_function", target=invoke_subgraph):
        region = region_of(_body(call))
        if region is not None and region.report is not None:
            yield call, _body(call), region


def see_through_regions(gm: fx.GraphModule) -> None:
    """Let the backward pass read where they come from those inputs and results of a region that the region saves.

    Inductor does not know that what a region returns may be what it was given, or returns twice: the memory of the one
    would be written to while the other is still needed (torch 2.13).

    A region is not called again in the backward pass, however small a budget of memory is: it would draw other rows.
    """
    editor = Editor(gm.graph)
    for call, body, region in list(_calls(gm)):
        results = [value for value, _ in outputs_with_descriptors(body.graph)]
        inputs = body.graph.find_nodes(op="placeholder")
        items = {_index(item): item for item in call.users}
        for index, item in sorted(items.items()):
            item.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            result = results[index]
            if index < region.outputs or not isinstance(result, fx.Node):
                continue
            source, views = _through_views(result)
            if source.op == "placeholder":
                position = inputs.index(source)
                known = call.args[2 + position]
                assert isinstance(known, fx.Node)
                if position in region.received:
                    known.meta[_RECEIVED] = True
            elif source in results[: region.outputs]:
                number = results.index(source)
                with editor.after(call):
                    known = items.get(number) or editor.call(operator.getitem, call, number)
            else:
                continue
            with editor.before(item):
                for view in reversed(views):
                    assert callable(view.target)
                    known = editor.call(view.target, known, *view.args[1:], **view.kwargs)
            item.replace_all_uses_with(known)
            gm.graph.erase_node(item)
        call.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _through_views(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return what a node is a view of, and the views, the last first; those with symbolic sizes are no views here."""
    views = []
    while node.target in VIEWS and len(node.all_input_nodes) == 1:
        views.append(node)
        node = node.all_input_nodes[0]
    return node, views


def counted_in_region(node: fx.Node) -> bool:
    """Tell whether a node has been counted by a region that receives it, among what Inductor would save."""
    return bool(node.meta.get(_RECEIVED, False))


def counted_outside(node: fx.Node) -> bool:
    """Tell whether what a region saves of what it received is counted where that is computed."""
    return content_of(node, VIEWS).target is ops.receive


def verify_calls(gm: fx.GraphModule, parts: Partitioned) -> None:
    """Raise where a region of a joint graph would be called again in the backward pass.

    Raises:
        PartitionError: so it would draw other rows there.
    """
    _, backward = parts
    again = {node.name for node in backward.graph.find_nodes(op="call_function", target=invoke_subgraph)}
    for call, _, _ in _calls(gm):
        if call.name in again:
            raise PartitionError(
                f"the region {module_path(call) or call.name} would be called again in the backward pass, so that its "
                f"gradients would be wrong; compile without marked layers and report this graph"
            )


def saved_in_region(node: fx.Node) -> bool:
    """Tell whether a node is what a region saves for its backward pass: its own report counts that."""
    call = node.args[0] if node.target is operator.getitem else None
    if not isinstance(call, fx.Node) or call.target is not invoke_subgraph:
        return False
    region = region_of(_body(call))
    return region is not None and _index(node) >= region.outputs


def _index(item: fx.Node) -> int:
    """Return which result of a call this is."""
    assert item.target is operator.getitem and isinstance(item.args[1], int)
    return item.args[1]


def with_regions(report: Report, gm: fx.GraphModule, table: Mapping[int, NamedInput]) -> Report:
    """Return the report of a graph with those of the regions that it calls, once for each call."""
    sites, residuals, losses, inputs = list[Any](), list[Any](), list[Any](), list[Any]()
    refused, notes, work, again = list(report.refused), list(report.notes), report.work, report.work_again
    before, after = report.saved_bytes_before, report.saved_bytes_after
    seen: dict[int, int] = {}
    for _, body, region in _calls(gm):
        assert region.report is not None
        number = seen[id(body)] = seen.get(id(body), -1) + 1
        rename = _renaming_of_call(region, number, table)
        sites += [
            dataclasses.replace(site, module=rename(site.module), parameter=rename(site.parameter))
            for site in region.report.sites
        ]
        residuals += [dataclasses.replace(e, module=rename(e.module)) for e in region.report.residuals]
        losses += [dataclasses.replace(loss, module=rename(loss.module)) for loss in region.report.losses]
        inputs += [dataclasses.replace(e, module=rename(e.module)) for e in region.report.input_gradients]
        refused += [each for each in region.report.refused if each not in refused]
        notes += [each for each in region.report.notes if each not in notes]
        work, again = work + region.report.work, again + region.report.work_again
        before = _add(before, region.report.saved_bytes_before)
        after = _add(after, region.report.saved_bytes_after)
    if not seen:
        return report
    made = {site.parameter for site in sites}
    return dataclasses.replace(
        report,
        sites=(*sites, *(site for site in report.sites if site.parameter not in made)),
        residuals=(*residuals, *report.residuals),
        losses=(*losses, *report.losses),
        refused=tuple(refused),
        notes=tuple(notes),
        work=work,
        work_again=again,
        input_gradients=(*inputs, *report.input_gradients),
        saved_bytes_before=before,
        saved_bytes_after=after,
        peak_before=None,
    )


def _add(a: Size, b: Size) -> Size:
    return simplify(a + b)
