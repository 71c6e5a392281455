"""Rewrite the backward pass to read decoded residuals.

Before::

    u = addmm(bias, x, w)
    dx = mul(t, function(u))                      # any number of readers

After, with encoding ``int4`` of u (the first two lines run in the forward pass)::

    u = addmm(bias, x, w)
    codes, peaks = quantise(u)                    # stored instead of u
    dx = mul(t, function(dequantise(codes, peaks)))

What lies between a stored residual and its readers is computed again from the decoded value. Attention that reads a
stored output reads centred keys.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import Any

from torch import Tensor, fx

from ..decide.plan import Stored
from ..graph.cones import build
from ..graph.edit import Editor, bytes_of_example
from ..graph.operations import is_derivable, is_loop, same_content, tensor_operands
from ..joint import Joint
from ..maths import encodings, ops
from ..maths.attention import center_keys

ROUNDING = "rounding"
"""Owner in ``meta[NOISE_OF]`` of the random numbers of stochastic rounding."""


@dataclasses.dataclass
class EncodedResidual:
    """A carried-out encoding: the nodes that the partitioner pins and the verifier looks for.

    Attributes:
        codes: what crosses from forward to backward; nothing for what is derived.
        decoded: what the backward pass reads in its place; None for what is derived, or if nothing reads it.
        stored_names: names of the nodes that hold the full residual if they are saved.
    """

    stored: Stored
    codes: tuple[fx.Node, ...]
    decoded: fx.Node | None
    stored_names: frozenset[str]


def encode_residuals(joint: Joint) -> None:
    """Store what the plan says, encoded, and let the backward pass read what is decoded."""
    changed = [item for item in joint.plan.residuals if item.encoding != "exact"]
    if not changed:
        return
    graph, backward = joint.graph, joint.backward()
    editor = Editor(graph)
    names = {item.node: frozenset(form.name for form in same_content(item.node)) for item in changed}
    items = {item.node: item for item in changed if item.encoding != "recompute"}
    encoded = {node: _put_away(editor, item, _encode(editor, item, backward)) for node, item in items.items()}
    as_they_are = {item.node for item in joint.plan.residuals if item.encoding == "exact"}
    as_they_are.update(node for site in joint.sites for node in site.stored)
    again = {item.node for item in changed if item.encoding == "recompute"}
    decoders = {
        node: partial(_decode, editor, items[node], codes, _features(editor, node))
        for node, codes in encoded.items()
    }
    rebuild = _Rebuild(editor, decoders, as_they_are, again, joint.plan.made_of_inputs)
    editor.tag = "must_be_in_backward"  # what is decoded is no residual
    for node in list(graph.nodes):
        if node in backward and node.op == "call_function":
            before = node.args
            with editor.before(node):
                for operand in list(tensor_operands(node)):
                    if operand not in backward:
                        node.replace_input_with(operand, rebuild(operand))
                if node in joint.plan.centered and before != node.args:
                    _center_keys(editor, node)
    graph.eliminate_dead_code()
    joint.residuals = [
        EncodedResidual(item, encoded.get(item.node, ()), rebuild.decoded.get(item.node), names[item.node])
        for item in changed
    ]


def _encode(editor: Editor, item: Stored, backward: set[fx.Node]) -> tuple[fx.Node, ...]:
    """Encode once the loops after the residual are done: some of what they read needs no memory then."""
    source, last = item.source, item.node
    while is_loop(last.next) and last.next not in backward:
        last = last.next
    with editor.after(last):
        if item.encoding == "bits":
            return editor.trace(encodings.pack_mask, source)
        if item.table is not None:
            return editor.trace(encodings.encode_table, source, table=item.table)
        bits = encodings.INTEGER_BITS[item.encoding]
        if not item.stochastic:
            return editor.trace(encodings.quantise, source, bits=bits)
        *rows, features = (editor.size(source, dim) for dim in range(source.meta["val"].dim()))
        noises = (
            editor.noise(size, source.meta["val"].device, ROUNDING) for size in ([*rows, 1], [features])
        )
        return editor.trace(encodings.quantise, source, *noises, bits=bits)


def _put_away(editor: Editor, item: Stored, codes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Return tickets in the place of the codes that leave the device; what is small stays."""
    if not item.place:
        return codes
    largest = max(codes, key=bytes_of_example)
    with editor.after(largest):
        ticket = editor.call(ops.put_away, largest, item.place)
    return tuple(ticket if code is largest else code for code in codes)


def _bring_back(editor: Editor, item: Stored, stored: fx.Node) -> fx.Node:
    """Return codes, wherever they have waited."""
    if stored.target is not ops.put_away:
        return stored
    codes = stored.all_input_nodes[0].meta["val"]
    return editor.call(ops.bring_back, stored, list(codes.shape), codes.dtype, codes.device, item.place)


def _center_keys(editor: Editor, attention: fx.Node) -> None:
    """Let a backward pass of attention read centred keys where rounding moves logits little."""
    gradient, query, key, value, output, logsumexp, *rest = attention.args
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(logsumexp, fx.Node)
    mask, scale = (attention.kwargs.get(name) for name in ("attn_mask", "scale"))
    centered, shifted, spread = editor.trace(center_keys, query, key, logsumexp, scale=scale)
    attention.args = (gradient, query, key, centered, value, output, shifted, spread, *rest, mask, scale)
    attention.kwargs, attention.target = {}, ops.attention_backward


def _features(editor: Editor, node: fx.Node) -> Any:
    """Return the size of the last dimension: an int, or a node of the forward pass where it is symbolic."""
    with editor.after(node):
        return editor.size(node, node.meta["val"].dim() - 1)


def _decode(editor: Editor, item: Stored, stored: tuple[fx.Node, ...], features: Any) -> fx.Node:
    dtype = item.node.meta["val"].dtype
    stored = tuple(_bring_back(editor, item, each) for each in stored)
    if item.encoding == "bits":
        [decoded] = editor.trace(encodings.unpack_mask, *stored, n=features)
    elif item.table is not None:
        [decoded] = editor.trace(
            encodings.decode_table, *stored, table=item.table, features=features, dtype=dtype
        )
    else:
        bits = encodings.INTEGER_BITS[item.encoding]
        dequantise = encodings.dequantise_shares if item.shares else encodings.dequantise
        [decoded] = editor.trace(dequantise, *stored, bits=bits, features=features, dtype=dtype)
    return decoded


class _Rebuild:
    """Compute a residual from decoded ones, each node once, before the first operation that reads it.

    Attributes:
        decoded: of what is stored encoded, as far as it is read.
        products: of matrices, which are computed again even from what is stored as it is.
    """

    def __init__(
        self,
        editor: Editor,
        decoders: Mapping[fx.Node, Callable[[], fx.Node]],
        as_they_are: set[fx.Node],
        again: set[fx.Node],
        of_inputs: Set[fx.Node],
    ) -> None:
        self.editor, self.decoders = editor, decoders
        self.built = {node: node for node in as_they_are}
        self.decoded: dict[fx.Node, fx.Node] = {}
        whole = {node for node in again if not is_derivable(node)}
        several = {node for node in whole if node.target is operator.getitem}
        self.products = whole - several
        self.again = whole.union(*(node.all_input_nodes for node in several))
        self.of_inputs = of_inputs

    def __call__(self, node: fx.Node) -> fx.Node:
        return build(node, self._operands, self.built, self._build)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """Return what a node is computed from again; nothing where it is stored or cannot be."""
        again = (
            node in self.again
            or node in self.of_inputs
            or (is_derivable(node) and isinstance(node.meta.get("val"), Tensor))
        )
        return node.all_input_nodes if again and node not in self.decoders else []

    def _build(self, node: fx.Node) -> fx.Node:
        if node in self.decoders:
            self.decoded[node] = self.decoders[node]()
            return self.decoded[node]
        rebuilt = {operand: self.built[operand] for operand in self._operands(node)}
        is_made = node.op == "call_function" and (node in self.of_inputs or node in self.products)
        if not is_made and all(new is old for old, new in rebuilt.items()):
            return node
        return self.editor.repeat(node, rebuilt)
