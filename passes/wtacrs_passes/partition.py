"""Partition a rewritten joint graph: pin what the sites store, min-cut, unpin, verify.

Nodes that only the backward pass needs belong to neither side for PyTorch's min-cut: it would save the
rows and draw their indices again in the backward pass. So the stored nodes of each site are made outputs
of the forward graph while min-cut runs, and are taken out again afterwards.

Nor does min-cut know that an input which the graph writes to, a counter or a running mean, holds another value when
the backward pass reads it. Where it would, what it held is copied first.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence, Set
from typing import Any

import torch
import torch._functorch.config
from torch import fx

from .graph.edit import Editor, copy_joint, output_of
from .graph.names import outputs_with_descriptors, written_inputs
from .graph.operations import SEEDS, VIEWS, aten, content_of, is_checkpointed, mutates
from .graph.torch_api import CheckpointPolicy
from .joint import Joint, Partitioned, Partitioner
from .rewrite.encode_residuals import EncodedResidual
from .rewrite.sample_rows import SampledSite


class PartitionError(RuntimeError):
    """A partition on which gradients would be wrong or bytes would not be saved."""


def partition(joint: Joint) -> None:
    """Partition the joint graph so that every site and residual keeps its promise.

    A site whose full residual is saved for another reader anyway does not store its rows as well.

    Raises:
        PartitionError: rows or other random numbers would be drawn twice, or an encoded residual is still saved.
    """
    is_rounded = any(not reason for *_, reason in joint.plan.precisions + joint.plan.input_precisions)
    is_tagged = bool(joint.policy.recompute) and is_checkpointed(joint.graph)
    is_rewritten = bool(
        joint.losses or joint.sites or joint.residuals or joint.observed or is_rounded or is_tagged
    )
    written = {n.name for n in written_inputs(joint.graph) if isinstance(n.meta.get("val"), torch.Tensor)}
    if not is_rewritten and not written:
        return  # the graph is partitioned as it came
    forward, backward, stores_rows = _partition_sites(joint, ())
    late = written.intersection(_saved_inputs(forward, joint.num_fwd_outputs))
    if late:
        _copy_inputs(joint.graph, late)
        forward, backward, stores_rows = _partition_sites(joint, ())
    elif not is_rewritten:
        return
    saved, exact = _saved_names(forward, joint), []
    if any(residual.stored_names & saved for residual in joint.residuals):
        # The partitioner computes an exact residual from one that is encoded: it is told to store it as planned.
        exact = [item.node for item in joint.plan.residuals if item.encoding == "exact" and item.node.users]
        forward, backward, stores_rows = _partition_sites(joint, exact)
    if _seeds_read(forward) & _seeds_read(backward):
        # Below a memory budget of 1 the partitioner makes random numbers again from other seeds (pytorch#190758).
        drawn = _computed_names(forward)
        exact += [node for node in joint.graph.nodes if node.target in SEEDS and node.name in drawn]
        forward, backward, stores_rows = _partition_sites(joint, exact)
    saved = _saved_names(forward, joint)
    twice = _computed_names(forward) & _computed_names(backward)
    for site, rows in zip(joint.sites, stores_rows, strict=True):
        _verify(site, rows, saved, twice)
    for residual in joint.residuals:
        _verify_encoded(residual, saved)
    if _seeds_read(forward) & _seeds_read(backward):
        raise PartitionError(
            "the backward pass would draw other random numbers than the forward pass did, so gradients would be wrong; "
            "leave out dropout in checkpointed layers, or set torch._functorch.config.activation_memory_budget above "
            "0, and report this graph"
        )
    joint.parts = forward, backward


def _partition_sites(
    joint: Joint, exact: Sequence[fx.Node]
) -> tuple[fx.GraphModule, fx.GraphModule, list[bool]]:
    """Return the two graphs, and which sites store their rows.

    Args:
        exact: what is stored as it is, beside what sites and residuals store.
    """
    encoded = {residual.stored.node for residual in joint.residuals}
    codes = [node for loss in joint.losses for node in (*loss.stored, *loss.estimates) if node not in encoded]
    codes += [node for residual in joint.residuals for node in residual.codes]
    stores_rows = [site.site.encoding == "rows" for site in joint.sites]
    while True:
        pins = [n for s, rows in zip(joint.sites, stores_rows, strict=True) for n in pinned_nodes(s, rows)]
        pins = list(dict.fromkeys([*pins, *codes, *exact, *joint.observed]))
        forward, backward = _partition_pinned(joint.gm, pins, joint.num_fwd_outputs, joint.partitioner)
        saved, computed = _saved_names(forward, joint), _computed_names(forward)
        redundant = [
            i
            for i, site in enumerate(joint.sites)
            if stores_rows[i] and (site.stored_names & saved or site.draw.name not in computed)
        ]
        if not redundant:
            return forward, backward, stores_rows
        for i in redundant:
            stores_rows[i] = False


def _saved_inputs(forward: fx.GraphModule, num_fwd_outputs: int) -> set[str]:
    """Return the names of the inputs that the backward pass reads."""
    values = [value for value, _ in outputs_with_descriptors(forward.graph)][num_fwd_outputs:]
    sources = [content_of(value, VIEWS) for value in values if isinstance(value, fx.Node)]
    return {node.name for node in sources if node.op == "placeholder"}


def _copy_inputs(graph: fx.Graph, names: Set[str]) -> None:
    """Let all but what writes to these inputs read a copy of what they held."""
    editor = Editor(graph)
    for node in graph.find_nodes(op="placeholder"):
        if node.name not in names:
            continue
        with editor.before(next(n for n in graph.nodes if n.op != "placeholder")):
            copy = editor.call(aten.clone.default, node)
        copy.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        node.replace_all_uses_with(copy, lambda user, copy=copy: _only_reads(user) and user is not copy)


def _only_reads(node: fx.Node) -> bool:
    return node.op == "call_function" and not mutates(node)


def _saved_names(forward: fx.GraphModule, joint: Joint) -> set[str]:
    return {node.name for node in saved_tensors(forward, joint.num_fwd_outputs)}


def _computed_names(gm: fx.GraphModule) -> set[str]:
    return {node.name for node in gm.graph.nodes if node.op == "call_function"}


def pinned_nodes(site: SampledSite, stores_rows: bool) -> list[fx.Node]:
    """Return what must cross from forward to backward for the site's gradient to be right."""
    return [node for node in site.stored if stores_rows or node is not site.rows]


def rows_names(site: SampledSite) -> set[str]:
    """Return the names under which the rows may be saved: themselves, or a view of them."""
    names, stack = set(), [site.rows]
    while stack:
        node = stack.pop()
        names.add(node.name)
        stack += [user for user in node.users if user.target in VIEWS]
    return names


def saved_tensors(forward: fx.GraphModule, num_fwd_outputs: int) -> list[fx.Node]:
    """Return the tensors that cross to the backward pass, without the graph's inputs."""
    values = [value for value, _ in outputs_with_descriptors(forward.graph)][num_fwd_outputs:]
    nodes = dict.fromkeys(v for v in values if isinstance(v, fx.Node) and v.op != "placeholder")
    return [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def _verify(site: SampledSite, stores_rows: bool, saved: set[str], twice: set[str]) -> None:
    modules = ", ".join(product.module for product in site.site.products)
    if site.draw.name in twice:
        raise PartitionError(
            f"the rows of {modules} would be drawn again in the backward pass, so their gradient would be "
            f"wrong; exclude these modules from the policy and report this graph"
        )
    if stores_rows and not rows_names(site) & saved:
        raise PartitionError(
            f"the sampled rows of {modules} are not saved for the backward pass; exclude these modules "
            f"from the policy and report this graph"
        )


def _seeds_read(part: fx.GraphModule) -> set[tuple[str, Any]]:
    """Return what is made of seeds that are drawn in this part: device and number of the seed."""
    drawn = [node for node in part.graph.nodes if node.target in SEEDS]  # one for each device
    return {
        (str(node.args[-1]), user.args[-1]) for node in drawn for user in node.users if user.op != "output"
    }


def _verify_encoded(residual: EncodedResidual, saved: set[str]) -> None:
    """Check that the full residual is not saved beside its codes.

    Where the user has lowered Inductor's memory budget, the partitioner may compute products again and save
    other tensors than the plan has in mind; gradients are right either way, and the report lists the bytes.
    """
    full = residual.stored_names & saved
    if full and torch._functorch.config.activation_memory_budget == 1.0:
        stored = residual.stored
        raise PartitionError(
            f"the residual {stored.node.name} of {stored.module or 'the model'} was to be kept as "
            f"{stored.encoding} and is still saved in full ({', '.join(sorted(full))}); use "
            f"residuals='exact' for this module and report this graph"
        )


def _partition_pinned(
    gm: fx.GraphModule, pins: Sequence[fx.Node], num_fwd_outputs: int, partitioner: Partitioner
) -> Partitioned:
    gm_copy = copy_joint(gm)
    by_name = {node.name: node for node in gm_copy.graph.nodes}
    pinned = [by_name[pin.name] for pin in pins]
    for pin in pinned:
        source = pin.args[0] if pin.target is operator.getitem else pin
        assert isinstance(source, fx.Node)
        source.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    _edit_outputs(gm_copy.graph, num_fwd_outputs, insert=pinned)
    with torch._functorch.config.patch(cse=False):  # what is made again in the backward pass is to stay there
        forward, backward = partitioner(gm_copy, num_fwd_outputs + len(pins))
    _edit_outputs(forward.graph, num_fwd_outputs, remove=len(pins))
    forward.graph.eliminate_dead_code()
    forward.graph.lint()
    forward.recompile()
    return forward, backward


def _edit_outputs(graph: fx.Graph, position: int, insert: Sequence[fx.Node] = (), remove: int = 0) -> None:
    """Insert outputs at `position`, or remove so many from there; descriptors and traces follow."""
    output = output_of(graph)
    values = list(torch.utils._pytree.arg_tree_leaves(*output.args))
    output.args = ((*values[:position], *insert, *values[position + remove :]),)
    for key in ("desc", "output_stack_traces"):
        if key in output.meta:
            old = list(output.meta[key])
            output.meta[key] = [*old[:position], *[None] * len(insert), *old[position + remove :]]
