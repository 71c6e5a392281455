"""The residuals of a joint graph, and what is known about them before anything is decided."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

from torch import Tensor, fx

from ..analyse.attention import is_made_again
from ..analyse.functions import Unary, is_float, unary_function, unary_roots
from ..analyse.layers import layers_of, products_of, sums_handed_on
from ..analyse.ranges import Ranges
from ..analyse.readers import Readers
from ..graph.names import module_path, static_inputs
from ..graph.operations import (
    ATTENTION,
    ATTENTION_BACKWARD,
    FORMS,
    GATHERS,
    PARTS,
    TAKES_ANY_LOG_SUM_EXP,
    VIEWS,
    aten,
    content_of,
    is_again,
    is_derivable,
    is_random,
    packet,
    tensor_operands,
)
from ..graph.torch_api import hint
from ..joint import Joint
from ..maths import ops
from .at_hand import made_of_inputs
from .modes import MODES, Mode

_REDUCTIONS = {
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.var.correction,
    aten.logsumexp.default, aten.max.default, ops.row_norms,
}  # fmt: skip

_SHRINKS = 8  # a statistic is at least so many times smaller than what it is reduced from


class Facts:
    """What a graph says about its residuals.

    Attributes:
        order: positions in the graph.
        pinned: what is stored for the sites anyway, and gradients that are made with a loss.
        estimates: weight gradients that are made with a loss from sampled rows.
        tangent: everything computed from tangents.
        roots: of `unary_roots`; `ranges`, `readers`: see there.
        residuals: what the backward pass reads and does not have at hand.
        made: what the backward pass makes of inputs.
        attention: backward passes of attention whose operands may be rounded, with the attention.
        again: outputs and log-sum-exps that the backward pass computes again, with the attention; those of the others
            are stored.
        statistics: what is small beside what it summarises.
        repeated: products of matrices that the backward pass may compute again, and parts of them.
        handed_on: what is stored of a layer with such products, so that none begins in another layer.
        is_part: the graph is one of several of a step: a layer's, or of a region that is called for each.
    """

    def __init__(self, joint: Joint) -> None:
        graph, statics = joint.graph, static_inputs(joint.graph, joint.names)
        self.policy = joint.policy
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.pinned = {node for site in joint.sites for node in site.stored}
        self.pinned.update(node for loss in joint.losses for node in loss.stored)
        self.estimates = {node for loss in joint.losses for node in loss.estimates}
        self.tangent = joint.tangent()
        self.made = made_of_inputs(joint)
        self.roots = unary_roots(graph)
        self.ranges = Ranges(graph, self.tangent, self.roots, statics)
        self.readers = Readers(graph, self.tangent, self.ranges, statics)
        self.residuals = [node for node in self.readers.of if not self.is_at_hand(node)]
        self.attention, self.again = self._attention(graph)
        self.statistics = _statistics(graph)
        self.repeated, self.handed_on = _repeated(joint, self.roots)
        self.is_part = bool(graph.find_nodes(op="call_function", target=ops.receive))

    def is_at_hand(self, node: fx.Node) -> bool:
        """Tell whether a node needs no storage: an input, a constant, stored for a site, or computed again."""
        if is_again(node):
            return True
        constant = not any(tensor_operands(node)) and not is_random(node)
        return constant or node in self.pinned or node in self.made or self.roots[node] is None

    def mode(self, module: str | None) -> Mode:
        """Return what the policy allows for a module (a path)."""
        sampling = self.policy.sampling(module or "")
        return MODES[sampling.residuals if sampling else "exact"]

    def is_function(self, node: fx.Node) -> bool:
        """Tell whether a node is a function of one other tensor, element by element, in real numbers."""
        root = self.roots[node]
        return root is not None and root is not node and is_float(root) and is_float(node)

    def function(self, node: fx.Node) -> Unary:
        """Return the function from its root to a node."""
        root = self.roots[node]
        assert root is not None
        return unary_function(node, root)

    def with_sources(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return nodes and what they are views, casts or functions of."""
        found: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += [content_of(node, FORMS | GATHERS), self.roots[node] or node]
        return found

    def _attention(self, graph: fx.Graph) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
        """Return what the attributes `attention` and `again` hold.

        Probabilities made from rounded queries and keys and an exact log-sum-exp do not sum to one, and what
        cancels in their gradient does not. Both come from the rounded operands, or the keys are centred (see
        :func:`maths.attention.center_keys`) and the output is stored.
        """
        attention: dict[fx.Node, fx.Node] = {}
        again: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node.target not in ATTENTION_BACKWARD:
                continue
            results = [content_of(arg, VIEWS) for arg in node.all_input_nodes]
            made = {
                result: result.all_input_nodes[0] for result in results if result.target is operator.getitem
            }
            mode = self.mode(module_path(node))
            of_call = {
                out: call for out, call in made.items()
                if packet(call.target) in ATTENTION and out.args[1] in (0, 1)
                and is_made_again(call) and mode.lossy
            }  # fmt: skip
            if len(of_call) == 2 and len(set(of_call.values())) == 1:
                attention[node] = next(iter(of_call.values()))
                if mode.attends_twice or node.target not in TAKES_ANY_LOG_SUM_EXP:
                    again.update(of_call)
        return attention, again


def _repeated(
    joint: Joint, roots: Mapping[fx.Node, fx.Node | None]
) -> tuple[frozenset[fx.Node], frozenset[fx.Node]]:
    """Return what the attributes `repeated` and `handed_on` hold."""
    if not joint.policy.recompute_products:
        return frozenset(), frozenset()
    layers = layers_of(joint.graph, joint.tangent())
    products = products_of(layers)
    repeated = frozenset(products[: number_of_products(joint.policy.recompute_products, len(products))])
    parts = {
        n for n in joint.graph.find_nodes(op="call_function", target=operator.getitem) if whole(n) in repeated
    }
    return repeated | parts, frozenset(sums_handed_on(layers, repeated, joint.forward(), roots))


def whole(node: fx.Node) -> fx.Node:
    """Return what a node is one of the parts of; else the node.

    >>> graph = fx.Graph()
    >>> product = graph.placeholder("product")
    >>> parts = graph.call_function(aten.split.Tensor, (product, 2))
    >>> whole(graph.call_function(operator.getitem, (parts, 1)))
    product
    """
    several = node.args[0] if node.target is operator.getitem else None
    if isinstance(several, fx.Node) and packet(several.target) in PARTS:
        return content_of(several.all_input_nodes[0], VIEWS)
    return node


def number_of_products(share: float, products: int) -> int:
    """Return how many of so many products a share of them is."""
    return round(share * products)


def _statistics(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes with few elements beside what they summarise: norms, means, log-sum-exps."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        operands = [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Tensor)]
        if node.target is operator.getitem:
            parent = node.args[0]
            assert isinstance(parent, fx.Node)
            siblings = [v for v in parent.meta["val"] if isinstance(v, Tensor)]
            read = [arg.meta["val"] for arg in tensor_operands(parent)]
            small = _elements(value) * _SHRINKS <= max(map(_elements, [*siblings, *read]))
        elif node.target in _REDUCTIONS:
            small = _elements(value) * _SHRINKS <= max(_elements(arg.meta["val"]) for arg in operands)
        else:  # what is computed from statistics and is no larger
            sizes = [_elements(arg.meta["val"]) for arg in operands if arg in found]
            small = is_derivable(node) and bool(sizes) and _elements(value) <= max(sizes)
            # A sum of results of eight experts is small beside these, but not the residual stream that it is added to.
            others = (arg for arg in operands if arg not in found and arg.op != "placeholder")
            small = small and not any(_elements(arg.meta["val"]) >= _elements(value) for arg in others)
        if small:
            found.add(node)
    return found


def _elements(value: object) -> int:
    return hint(value.numel()) if isinstance(value, Tensor) else 0
