"""One joint graph on its way through the passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from torch import fx

from .graph.cones import needed_for, tangent_cone
from .graph.names import NamedInput, outputs_with_descriptors
from .graph.operations import is_again
from .policy import Policy

if TYPE_CHECKING:
    from .analyse.annotations import Annotations
    from .analyse.products import Analysis
    from .decide.plan import Plan
    from .rewrite.chunk_losses import ChunkedLoss
    from .rewrite.encode_residuals import EncodedResidual
    from .rewrite.sample_rows import SampledSite

Partitioned: TypeAlias = tuple[fx.GraphModule, fx.GraphModule]
Partitioner: TypeAlias = Callable[[fx.GraphModule, int], Partitioned]
"""``(joint graph, number of forward outputs) -> (forward graph, backward graph)``"""


@dataclasses.dataclass
class Joint:
    """A joint graph, what is known about it, what was decided and what was built.

    A pass is a function of this; it edits `gm` in place, or adds to what is known or decided.

    Attributes:
        gm: the joint graph.
        policy: what the user asked for.
        names: parameters, buffers and masks among the inputs, by position.
        num_fwd_outputs: how many outputs belong to the forward graph.
        partitioner: PyTorch's, as Inductor would call it.
        annotations: what the graph says about its rows.
        analysis: its weight-gradient products.
        plan: what is sampled, and what is stored how, with the reasons.
        products: the node that computes each product of the analysis now, by its own.
        losses: the losses over a vocabulary that are computed in chunks.
        whole_losses: heads of those that are not, with the reason.
        sites: the sampled sites that were built.
        residuals: the encoded residuals that were built.
        observed: what tells the backward pass whose step it is, where noise is measured.
        parts: forward and backward graph; None before the partition.
    """

    gm: fx.GraphModule
    policy: Policy
    names: Mapping[int, NamedInput]
    num_fwd_outputs: int
    partitioner: Partitioner
    annotations: Annotations
    analysis: Analysis
    plan: Plan
    products: dict[fx.Node, fx.Node] = dataclasses.field(default_factory=dict)
    losses: list[ChunkedLoss] = dataclasses.field(default_factory=list)
    whole_losses: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    sites: list[SampledSite] = dataclasses.field(default_factory=list)
    residuals: list[EncodedResidual] = dataclasses.field(default_factory=list)
    observed: list[fx.Node] = dataclasses.field(default_factory=list)
    parts: Partitioned | None = None

    @property
    def graph(self) -> fx.Graph:
        """The joint graph as it is now."""
        return self.gm.graph

    def tangent(self) -> set[fx.Node]:
        """Return everything that is computed from tangents."""
        return tangent_cone(self.graph)

    def forward(self) -> set[fx.Node]:
        """Return what the outputs of the forward pass are computed from, and them."""
        tangent = self.tangent()
        outputs = (value for value, _ in outputs_with_descriptors(self.graph) if isinstance(value, fx.Node))
        return needed_for([node for node in outputs if node not in tangent], lambda arg, user: False)

    def backward(self) -> set[fx.Node]:
        """Return what the backward pass computes: :meth:`tangent`, and what checkpoints compute again."""
        again = {node for node in self.graph.nodes if is_again(node)}
        return self.tangent() | again

    def replace(self, new: Mapping[fx.Node, fx.Node]) -> None:
        """Let what was built name the new nodes wherever it names the old ones."""
        for site in self.sites:
            site.stored = [new.get(node, node) for node in site.stored]
            site.rows = new.get(site.rows, site.rows)
        for residual in self.residuals:
            residual.codes = tuple(new.get(node, node) for node in residual.codes)
