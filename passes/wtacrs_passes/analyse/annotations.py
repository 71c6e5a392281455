"""What is known about rows before the backward pass: token masks and remembered gradient norms.

Both enter the joint graph through markers, operations without a result (``ops.token_mask`` and
``ops.norm_state``), or as an input that a model calls ``attention_mask``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, fx

from ..graph.edit import sympy_size
from ..graph.names import NamedInput, named_inputs, static_inputs
from ..graph.operations import CASTS, COPIES, RESHAPES, aten, content_of
from ..joint import Joint
from ..maths import ops

MASK_NAMES = ("attention_mask",)
"""Names of inputs ``[batch, positions]`` that are zero for padding. (What is called a padding mask is true for it.)"""
KNOWN, FRESH = "wtacrs_known", "wtacrs_fresh"
"""Names of the buffers of a layer whose gradient norms are tracked."""

_SUPPOSED = 1 / 64
_FLATTENED = RESHAPES | COPIES | CASTS


@dataclasses.dataclass(frozen=True)
class TokenMask:
    """Rows without a gradient.

    Attributes:
        node: one element a row, zero for such rows.
        name: as the report calls it.
        origin: ``declared`` by the user: the backward pass verifies it. ``proven`` from the graph: see
            `zero_rows`. ``supposed`` from its name: the rows' weight is a 64th of what it would be, so that
            the estimate is unbiased if the guess is wrong; the weight is zero in the other cases.
    """

    node: fx.Node
    name: str
    origin: Literal["declared", "proven", "supposed"]

    @property
    def factor(self) -> float:
        """What the weights of masked rows are multiplied by."""
        return _SUPPOSED if self.origin == "supposed" else 0.0


@dataclasses.dataclass(frozen=True)
class NormState:
    """The remembered norms ``||dy_i||`` of one layer.

    Attributes:
        x: the layer's input, ``[batch, positions, features]``.
        known: placeholder of the norms of an earlier step, ``[capacity, seq_len]``.
        fresh: placeholder that takes those of this step.
    """

    x: fx.Node
    known: fx.Node
    fresh: fx.Node


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What a graph says about its rows; states by path of the layer."""

    masks: tuple[TokenMask, ...] = ()
    states: Mapping[str, NormState] = dataclasses.field(default_factory=dict)

    def mask(self, x: fx.Node, rows: Any, zero: Iterable[fx.Node]) -> TokenMask | None:
        """Return what is known best about the rows of a residual: declared, then proven, then supposed.

        Args:
            zero: of the gradient that meets `x`, from `zero_rows`.
        """
        leading = _leading_sizes(x)
        found = [mask for mask in self.masks if _describes(mask.node, leading, rows)]
        names = {mask.node: mask.name for mask in self.masks}
        found += [
            TokenMask(node, _name(node, names), "proven")
            for node in sorted(zero, key=lambda node: node.name)
            if sympy_size(node.meta["val"].numel()) == sympy_size(rows)
        ]
        order = ("declared", "proven", "supposed")
        return min(found, key=lambda mask: order.index(mask.origin), default=None)


def erase_markers(graph: fx.Graph) -> None:
    """Take all markers out of a graph."""
    for target in (ops.token_mask, ops.norm_state):
        for node in graph.find_nodes(op="call_function", target=target):
            graph.erase_node(node)


def take_annotations(joint: Joint) -> None:
    """Note what the markers and the names of a joint graph's inputs say, and erase the markers."""
    joint.annotations = annotations_of(joint.graph, joint.names)
    erase_markers(joint.graph)


def annotations_of(graph: fx.Graph, table: Mapping[int, NamedInput]) -> Annotations:
    """Return what the markers and the names of a joint graph's inputs say."""
    buffers = static_inputs(graph, table)
    masks = [
        TokenMask(node.args[0], "token_mask", "declared")
        for node in graph.find_nodes(op="call_function", target=ops.token_mask)
    ]
    masks += [TokenMask(node, name, "supposed") for node, name in _named_masks(graph, table)]
    states = {}
    for node in graph.find_nodes(op="call_function", target=ops.norm_state):
        x, known, fresh = node.args
        if known in buffers and fresh in buffers:
            states[buffers[known].name.removesuffix(KNOWN).rstrip(".")] = NormState(x, known, fresh)
    return Annotations(tuple(masks), states)


def _named_masks(graph: fx.Graph, table: Mapping[int, NamedInput]) -> list[tuple[fx.Node, str]]:
    found = []
    for node, known in named_inputs(graph, table, ("mask",)).items():
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
            found.append((node, known.name))
    return found


def _name(condition: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """Return how the report calls a condition; what a loss compares with -100 are labels."""
    if condition.target is aten.ne.Scalar:
        source, value = content_of(condition.args[0]), condition.args[1]  # type: ignore[arg-type]
        name = "labels" if value == -100 else source.name
        return f"{names.get(source, name)} != {value}"
    return names.get(condition, condition.name)


def _describes(mask: fx.Node, leading: tuple[Any, ...] | None, rows: Any) -> bool:
    value = mask.meta["val"]
    if leading is None:
        return bool(sympy_size(value.numel()) == sympy_size(rows))
    return leading == tuple(value.shape)


def _leading_sizes(x: fx.Node) -> tuple[Any, ...] | None:
    """Return [batch, positions] of the tensor that the rows of X are flattened from, if it is in sight."""
    node = x
    while node.target in _FLATTENED and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        value = node.meta["val"]
        if value.dim() == 3:
            return tuple(value.shape[:2])
    return None
