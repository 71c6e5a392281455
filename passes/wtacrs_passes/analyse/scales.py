"""Scales of programs that train in 8 bits: a tensor is divided by a function of its largest magnitude, and rounded.

    scale = 448 / amax(abs(x)); codes = clamp(x * scale).to(float8)
    product = _scaled_mm(codes, other_codes, ...) / (scale * other_scale)

With a scale for each row or column the quotient is left to the program. (Micikevicius et al. 2022, arXiv 2209.05433.)
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from ..graph.operations import (
    CASTS,
    EXCHANGES,
    EXPANSIONS,
    FORMS,
    MULTIPLICATIONS,
    aten,
    content_of,
    is_largest_of_ranks,
    is_pointwise,
    tensor_operands,
)

PEAKS = {aten.amax.default, aten.max.default}
_SHAPED = EXPANSIONS | EXCHANGES | {aten.repeat.default}
_CODES = FORMS | {aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default}
_IN_8_BITS = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}


class Scales:
    """What is computed, element by element, from the largest magnitudes of tensors that are rounded to 8 bits.

    Other programs may leave a gradient in steps of its largest magnitudes, so that its small columns are large ones.

    Args:
        tangent: what is computed from gradients.
    """

    def __init__(self, graph: fx.Graph, tangent: Container[fx.Node]) -> None:
        self._tangent = tangent
        self._sources: dict[fx.Node, frozenset[fx.Node]] = {}  # what a scale is of
        for node in graph.nodes:
            operands = list(tensor_operands(node))
            if node.target in PEAKS and operands[0].target is aten.abs.default:
                self._sources[node] = frozenset([content_of(operands[0].args[0])])  # type: ignore[arg-type]
            elif not operands or not all(arg in self._sources for arg in operands):
                continue
            elif is_pointwise(node) or node.target in _SHAPED or is_largest_of_ranks(node):
                self._sources[node] = frozenset().union(*(self._sources[arg] for arg in operands))
        steps = [node for node in graph.nodes if node.target in MULTIPLICATIONS and _is_rounded(node)]
        rounded = {content_of(x) for node in steps if (x := self.normalised(node)) is not None}
        self._sources = {node: of for node, of in self._sources.items() if of <= rounded}
        self._mixed = {node for node in self._sources if node in tangent and self._reads_others(node)}

    def _reads_others(self, scale: fx.Node) -> bool:
        """Tell whether a scale of gradients is one of others as well."""
        return any(source not in self._tangent for source in self._sources[scale])

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._sources

    def normalised(self, node: fx.Node) -> fx.Node | None:
        """Return what a node is in steps of its own scale, or was in such steps; None of others."""
        operands = [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]
        if len(operands) < 2 or node.target not in MULTIPLICATIONS | {aten.div.Tensor}:
            return None
        left, right = operands
        if node.target is aten.div.Tensor:
            steps, scale = content_of(left, _CODES), content_of(right, EXPANSIONS)
            taken = {content_of(arg, EXPANSIONS) for arg in steps.all_input_nodes}
            return self.normalised(steps) if scale in taken else None
        for x, scale in ((left, right), (right, left)):
            if self._sources.get(scale) == frozenset([content_of(x)]):
                return x
        return None

    def multiply(self, node: fx.Node) -> bool:
        """Tell whether a gradient is multiplied here by scales that are not its own."""
        return any(map(self._is_of_others, node.all_input_nodes))

    def leave(self, node: fx.Node) -> bool:
        """Tell whether a product of codes is multiplied by what its factors were divided by, or is to be."""
        gradients = [arg for arg in node.all_input_nodes if not self._is_of_others(arg)]
        products = (content_of(arg).target is aten._scaled_mm.default for arg in gradients)
        return bool(gradients) and all(products)

    def _is_of_others(self, node: fx.Node) -> bool:
        return node in self._mixed or (node in self._sources and node not in self._tangent)


def _is_rounded(steps: fx.Node) -> bool:
    """Tell whether a node is put into 8 bits, whatever is cut off before."""
    stack = [steps]
    while stack:
        for user in stack.pop().users:
            if user.target in CASTS and user.meta["val"].dtype in _IN_8_BITS:
                return True
            if user.target in _CODES:
                stack.append(user)
    return False
