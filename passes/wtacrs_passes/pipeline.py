"""The order of the passes over a joint graph, and the identity of what they do.

merge equal values -> take annotations -> analyse -> plan -> sample rows -> reassociate -> choose storage
-> encode residuals -> lower noise -> [pin, min-cut, unpin, verify] -> write once
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor.config
from torch import fx

from . import joint_graph as jg
from . import ops
from .annotations import erase_markers, take_annotations
from .encode_residuals import EncodedResidual, encode_residuals
from .joint_graph import NamedInput
from .partition import Partition, Partitioner, lower_noise, partition, saved_tensors, write_once
from .plan import Plan, make_plan
from .policy import Policy
from .reassociate import reassociate
from .report import Report, make_report
from .residuals import Analysis, analyse
from .sample_rows import SampledSite, sample_rows
from .storage import choose_storage, modes
from .torch_api import (
    CheckpointPolicy,
    CustomPartitionerFn,
    lower_in_place,
    min_cut_rematerialization_partition,
    without_code,
)


class NoTangentsError(ValueError):
    """A graph without a backward part was given where a joint graph is needed."""


@dataclasses.dataclass
class Rewritten:
    """What :func:`rewrite` found, decided and built."""

    analysis: Analysis
    plan: Plan
    sites: list[SampledSite]
    residuals: list[EncodedResidual]


def rewrite(gm: fx.GraphModule, policy: Policy, table: Sequence[NamedInput]) -> Rewritten:
    """Analyse, plan and rewrite a joint graph in place."""
    if not jg.has_tangents(gm.graph):
        raise NoTangentsError(
            "a joint forward-backward graph is needed, got one without tangents; capture it from a model "
            "whose output requires grad, outside torch.no_grad() and torch.inference_mode()"
        )
    graph = gm.graph
    jg.merge_equal(graph)
    names = {known.index: known for known in table}
    annotations = take_annotations(graph, names)
    analysis = analyse(graph, names, policy.samples_attention)
    plan = make_plan(analysis, graph, policy, annotations)
    sites = sample_rows(graph, plan)
    encodes = any(mode.masks for mode in modes(policy))
    if encodes and _is_checkpointed(graph):
        warnings.warn(
            "the model uses checkpointing, so residuals are stored and computed again as that says, and none "
            "is encoded; to have them encoded instead, and nothing computed twice, turn checkpointing off",
            stacklevel=2,
        )
        encodes = False
    residuals = _encode(graph, policy, sites) if encodes else []
    graph.lint()
    gm.recompile()
    return Rewritten(analysis, plan, sites, residuals)


def _encode(graph: fx.Graph, policy: Policy, sites: Sequence[SampledSite]) -> list[EncodedResidual]:
    tangent = jg.tangent_cone(graph)
    if any(mode.lossy for mode in modes(policy)):
        reassociate(graph, tangent)
    pinned = [node for site in sites for node in site.stored]
    storage = choose_storage(graph, tangent, policy, pinned)
    return encode_residuals(graph, tangent, storage, pinned)


def _is_checkpointed(graph: fx.Graph) -> bool:
    """Tell whether the user has said what is computed again; then what is stored is not ours to choose."""
    again = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
    return any(node.meta.get("recompute") in again for node in graph.nodes)


def rewrite_and_partition(
    gm: fx.GraphModule,
    policy: Policy,
    table: Sequence[NamedInput],
    num_fwd_outputs: int,
    partitioner: Partitioner,
    lower: Callable[[fx.Graph], None] | None = lower_noise,
) -> tuple[Partition, Report]:
    """Rewrite a copy of a joint graph and partition it; report the bytes beside those without the rewrite."""
    with without_code():
        plain = jg.copy_joint(gm)
        erase_markers(plain.graph)
        before = Partition(*partitioner(plain, num_fwd_outputs))
        gm = jg.copy_joint(gm)
        rewritten = rewrite(gm, policy, table)
        if not rewritten.sites and not rewritten.residuals:
            after = before
        else:
            if lower is not None:
                lower(gm.graph)
            after = partition(gm, rewritten.sites, rewritten.residuals, num_fwd_outputs, partitioner)
    saved = [
        [node for node in saved_tensors(p.forward, num_fwd_outputs) if not _is_view_of_input(node)]
        for p in (before, after)
    ]
    return after, make_report(
        rewritten.analysis, rewritten.plan, rewritten.sites, rewritten.residuals, *saved
    )


def _is_view_of_input(node: fx.Node) -> bool:
    """Tell whether saving the node takes no memory, as the input lives anyway."""
    return jg.content_of(node, jg.VIEWS).op == "placeholder"


class WtacrsPartitioner(CustomPartitionerFn):
    """Inductor's hook: called with each joint graph after Inductor's own passes over it.

    Args:
        policy: what the user asked for.
        table: parameters and buffers among the inputs.
        receive: called with the report of each partitioned graph.
    """

    def __init__(
        self, policy: Policy, table: tuple[NamedInput, ...], receive: Callable[[Report], None]
    ) -> None:
        self.policy = policy
        self.table = table
        self.receive = receive

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Return the forward and the backward graph of the rewritten `gm`."""
        num_fwd_outputs: int = kwargs.pop("num_fwd_outputs")

        def partitioner(graph: fx.GraphModule, outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
            return min_cut_rematerialization_partition(graph, joint_inputs, num_fwd_outputs=outputs, **kwargs)

        if not jg.has_tangents(gm.graph):
            erase_markers(gm.graph)
            return partitioner(gm, num_fwd_outputs)  # nothing is trained here
        lower = None if torch._inductor.config.fallback_random else lower_noise
        after, report = rewrite_and_partition(
            gm, self.policy, self.table, num_fwd_outputs, partitioner, lower
        )
        self.receive(report)
        lower_in_place(ops.write)
        write_once(after)
        return after.forward, after.backward

    def uuid(self) -> Any:
        """Identify the source of the passes, the whole policy and the parameters: the key of the caches."""
        return (source_hash(), repr(self.policy), repr(self.table))


@functools.cache
def source_hash() -> str:
    """Return a hash of the source of this package."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
