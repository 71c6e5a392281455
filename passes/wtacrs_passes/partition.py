"""Partition a rewritten joint graph: pin what the sites store, min-cut, unpin, verify.

Nodes that only the backward pass needs belong to neither side for PyTorch's min-cut: it would save the
rows and draw their indices again in the backward pass. So the stored nodes of each site are made outputs
of the forward graph while min-cut runs, and are taken out again afterwards.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import fx

from . import ops
from .encode_residuals import ROUNDING, EncodedResidual
from .joint_graph import (
    VIEWS,
    Editor,
    aten,
    copy_joint,
    is_loop,
    is_recomputable,
    output_of,
    outputs_with_descriptors,
)
from .sample_rows import NOISE, SampledSite
from .torch_api import CheckpointPolicy, inductor_prims

Partitioned = tuple[fx.GraphModule, fx.GraphModule]
Partitioner = Callable[[fx.GraphModule, int], Partitioned]
"""``(joint graph, number of forward outputs) -> (forward graph, backward graph)``"""


_SITES_PER_TENSOR = 32  # bounds how long the random numbers of a deep model are held


class PartitionError(RuntimeError):
    """A partition on which gradients would be wrong or bytes would not be saved."""


def lower_noise(graph: fx.Graph) -> None:
    """Turn the sites' ``aten.rand`` into slices of few random tensors, each with a seed of Inductor's.

    Before, for each site::

        noise = rand([3])

    After, for all sites of one placement and shape::

        noises = random([sites, 3], lookup_seed(seeds, index), "rand")
        noise = select(noises, 0, site)

    One tensor is one kernel to compile and to launch. The seeds extend the tensor that Inductor has made
    for dropout: a second one of equal count would be merged with it by common-subexpression elimination.
    """
    groups: dict[Any, list[list[fx.Node]]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.rand.default):
        if NOISE in node.meta:
            value = node.meta["val"]
            chunks = groups.setdefault((node.meta[NOISE], value.device, str(value.shape)), [[]])
            limit = 1 if node.meta[NOISE] == ROUNDING else _SITES_PER_TENSOR
            if len(chunks[-1]) == limit:
                chunks.append([])
            chunks[-1].append(node)
    by_device: dict[torch.device, list[list[fx.Node]]] = {}
    for (_, device, _), chunks in groups.items():
        by_device.setdefault(device, []).extend(chunks)
    editor = Editor(graph)
    for device, chunks in by_device.items():
        seeds, first = _extend_seeds(editor, device, len(chunks))
        for index, nodes in enumerate(chunks, start=first):
            with editor.before(nodes[0]):
                seed = editor.call(inductor_prims.lookup_seed, seeds, index)
                size = [len(nodes), *nodes[0].args[0]]  # type: ignore[misc]
                noises = editor.call(inductor_prims.random, size, seed, "rand")
            for site, node in enumerate(nodes):
                with editor.before(node):
                    node.replace_all_uses_with(editor.call(aten.select.int, noises, 0, site))
                graph.erase_node(node)


def _extend_seeds(editor: Editor, device: torch.device, count: int) -> tuple[fx.Node, int]:
    """Return a tensor of Inductor's seeds with `count` new ones, and the index of the first of these."""
    graph = editor.graph
    seeds = graph.find_nodes(op="call_function", target=inductor_prims.seeds)
    old = next((node for node in seeds if node.args[1] == device), None)
    first: int = old.args[0] if old else 0
    with editor.before(next(n for n in graph.nodes if n.op != "placeholder")):
        extended = editor.call(inductor_prims.seeds, first + count, device)
    if old:
        old.replace_all_uses_with(extended)
        graph.erase_node(old)
    return extended, first


@dataclasses.dataclass(frozen=True)
class Partition:
    """The two graphs, and what was encoded."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    residuals: tuple[EncodedResidual, ...] = ()


def partition(
    gm: fx.GraphModule,
    sites: Sequence[SampledSite],
    residuals: Sequence[EncodedResidual],
    num_fwd_outputs: int,
    partitioner: Partitioner,
) -> Partition:
    """Partition `gm` so that every site and residual keeps its promise; `gm` stays as it is.

    A site whose full residual is saved for another reader anyway does not store its rows as well.

    Raises:
        PartitionError: rows would be drawn twice, or an encoded residual is still saved.
    """
    codes = [node for residual in residuals for node in residual.codes]
    stores_rows = [site.site.encoding == "rows" for site in sites]
    while True:
        pins = [n for site, rows in zip(sites, stores_rows, strict=True) for n in pinned_nodes(site, rows)]
        pins = list(dict.fromkeys([*pins, *codes]))
        forward, backward = _partition_pinned(gm, pins, num_fwd_outputs, partitioner)
        saved = {node.name for node in saved_tensors(forward, num_fwd_outputs)}
        redundant = [
            i
            for i, site in enumerate(sites)
            if stores_rows[i] and (site.stored_names & saved or not _draws_in(forward, site))
        ]
        if not redundant:
            break
        for i in redundant:
            stores_rows[i] = False
    for site, rows in zip(sites, stores_rows, strict=True):
        _verify(site, rows, forward, backward, saved)
    for residual in residuals:
        _verify_encoded(residual, saved)
    return Partition(forward, backward, tuple(residuals))


def write_once(parts: Partition) -> None:
    """Let Inductor write an encoded value that is read again after the next product of matrices.

    It was written when it was a residual. Now each reader would compute it again, a residual stream from all
    the terms that were added to it, and those would have to stay in memory.
    """
    editor = Editor(parts.forward.graph)
    by_name = {node.name: node for node in parts.forward.graph.nodes}
    for residual in parts.residuals:
        value = by_name.get(residual.stored.source.name)
        if value is None or not is_recomputable(value):
            continue
        fused = {value}
        following = value.next
        while is_loop(following):
            fused.add(following)
            following = following.next
        if set(value.users) - fused:
            with editor.after(value):
                written = editor.call(ops.write, value)
            value.replace_all_uses_with(written, lambda user, written=written: user is not written)
    parts.forward.recompile()


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


def _verify(
    site: SampledSite,
    stores_rows: bool,
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    saved: set[str],
) -> None:
    modules = ", ".join(product.module for product in site.site.products)
    if _draws_in(forward, site) and _draws_in(backward, site):
        raise PartitionError(
            f"the rows of {modules} would be drawn again in the backward pass, so their gradient would be "
            f"wrong; exclude these modules from the policy and report this graph"
        )
    if stores_rows and not rows_names(site) & saved:
        raise PartitionError(
            f"the sampled rows of {modules} are not saved for the backward pass; exclude these modules "
            f"from the policy and report this graph"
        )


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


def _draws_in(gm: fx.GraphModule, site: SampledSite) -> bool:
    """Tell whether a graph draws the rows of `site`."""
    return any(node.op == "call_function" and node.name == site.draw.name for node in gm.graph.nodes)


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
