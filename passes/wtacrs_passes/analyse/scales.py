"""Scales of programs that train in 8 bits: a tensor is divided by a function of its largest magnitude, and rounded.

    scale = 448 / amax(abs(x)); codes = clamp(x * scale).to(float8)
    product = _scaled_mm(codes, other_codes, ...) / (scale * other_scale)

With a scale for each row or column the quotient is left to the program. (Micikevicius et al. 2022, arXiv 2209.05433.)
"""

from __future__ import annotations

from collections.abc import Container

from torch import fx

from ..graph.operations import (
    EXPANSIONS,
    FORMS,
    MULTIPLICATIONS,
    aten,
    content_of,
    is_pointwise,
    tensor_operands,
)

PEAKS = {aten.amax.default, aten.max.default}
_SHAPED = EXPANSIONS | {aten.repeat.default}
_CODES = FORMS | {aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default}


class Scales:
    """What is computed, element by element, from the largest magnitudes of tensors alone.

    Args:
        tangent: what is computed from gradients.
    """

    def __init__(self, graph: fx.Graph, tangent: Container[fx.Node]) -> None:
        self._sources: dict[fx.Node, fx.Node | None] = {}  # what a scale is of, if it is of one tensor
        self._mixed: set[fx.Node] = set()  # of gradients and of others
        self._tangent = tangent
        for node in graph.nodes:
            operands = list(tensor_operands(node))
            if node.target in PEAKS and operands[0].target is aten.abs.default:
                self._sources[node] = content_of(operands[0].args[0])  # type: ignore[arg-type]
            elif not operands or not all(arg in self._sources for arg in operands):
                continue
            elif is_pointwise(node) or node.target in _SHAPED:
                sources = {self._sources[arg] for arg in operands}
                self._sources[node] = sources.pop() if len(sources) == 1 else None
            others = any(arg in self._mixed or arg not in tangent for arg in operands)
            if node in self._sources and node in tangent and others:
                self._mixed.add(node)

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
            if self._sources.get(scale) is content_of(x):
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
