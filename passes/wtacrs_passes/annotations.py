"""What is known about rows before the backward pass: token masks and remembered gradient norms.

Both enter the joint graph through markers, operations without a result (``ops.token_mask`` and
``ops.norm_state``), or as an input that a model calls ``attention_mask``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from . import joint_graph as jg
from . import ops
from .joint_graph import NamedInput, aten

MASK_NAMES = ("attention_mask", "padding_mask")
"""Names of inputs ``[batch, positions]`` that are zero for padding."""
KNOWN, FRESH = "wtacrs_known", "wtacrs_fresh"
"""Names of the buffers of a layer whose gradient norms are tracked."""

_SUPPOSED = 1 / 64
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default} | jg.COPIES | jg.CASTS


@dataclasses.dataclass(frozen=True)
class TokenMask:
    """Rows without a gradient.

    Attributes:
        node: ``[batch, positions]``, zero for such rows.
        name: as the report calls it.
        certain: the user says so: the rows have weight zero, and the backward pass verifies it. Otherwise
            their weight is a 64th of what it would be: the estimate is unbiased if the guess is wrong.
    """

    node: fx.Node
    name: str
    certain: bool

    @property
    def factor(self) -> float:
        """What the weights of masked rows are multiplied by."""
        return 0.0 if self.certain else _SUPPOSED


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

    def mask(self, x: fx.Node, rows: Any) -> TokenMask | None:
        """Return the mask of a residual's rows; the user's own before a guessed one."""
        leading = _leading_sizes(x)
        for mask in self.masks:
            sizes = tuple(mask.node.meta["val"].shape)
            if leading == sizes or (leading is None and _product(sizes) == jg.sympy_size(rows)):
                return mask
        return None


def erase_markers(graph: fx.Graph) -> None:
    """Take all markers out of a graph."""
    for target in (ops.token_mask, ops.norm_state):
        for node in graph.find_nodes(op="call_function", target=target):
            graph.erase_node(node)


def take_annotations(graph: fx.Graph, table: Mapping[int, NamedInput]) -> Annotations:
    """Return what the markers and the names of a joint graph's inputs say, and erase the markers."""
    buffers = jg.static_inputs(graph, table)
    masks = [
        TokenMask(node.args[0], "token_mask", certain=True)
        for node in graph.find_nodes(op="call_function", target=ops.token_mask)
    ]
    masks += [TokenMask(node, name, certain=False) for node, name in _named_masks(graph, table)]
    states = {}
    for node in graph.find_nodes(op="call_function", target=ops.norm_state):
        x, known, fresh = node.args
        if known in buffers and fresh in buffers:
            states[buffers[known].name.removesuffix(KNOWN).rstrip(".")] = NormState(x, known, fresh)
    erase_markers(graph)
    return Annotations(tuple(masks), states)


def _named_masks(graph: fx.Graph, table: Mapping[int, NamedInput]) -> list[tuple[fx.Node, str]]:
    found = []
    for node, known in jg.named_inputs(graph, table, ("mask",)).items():
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
            found.append((node, known.name))
    return found


def _leading_sizes(x: fx.Node) -> tuple[Any, ...] | None:
    """Return [batch, positions] of the tensor that the rows of X are flattened from, if it is in sight."""
    node = x
    while node.target in _RESHAPES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        value = node.meta["val"]
        if value.dim() == 3:
            return tuple(value.shape[:2])
    return None


def _product(sizes: tuple[Any, ...]) -> Any:
    total = jg.sympy_size(1)
    for size in sizes:
        total = total * jg.sympy_size(size)
    return total
