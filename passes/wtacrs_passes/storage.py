"""Decide what the backward pass reads and in which encoding it is stored: a minimum cut.

The network holds the residuals and what they can be computed from again. Cutting a node means storing it;
its capacity is its size in the smallest encoding that the policy allows. A node that pointwise operations
derive from others needs no storage once those are cut. So several readers of one tensor share one stored
source, and a source is stored where that is cheapest: the pre-activation instead of the activation and its
derivative, the normalised input instead of its scaled copies.

A value may be derived from a lossy source only where a small error of the source stays a small error:
through sums, products, and functions of one tensor whose slope is bounded. What is not is stored itself.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal

import networkx
import torch
from torch import Tensor, fx

from . import joint_graph as jg
from .encodings import Table, encoded_bits
from .joint_graph import FILLS, aten
from .policy import Policy
from .tables import tabulate
from .torch_api import real_tensors

Encoding = Literal["exact", "derive", "int8", "int4", "table", "bits"]
Shape = Literal["linear", "smooth", "steep"]

_SUMS_AND_PRODUCTS = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.neg.default,
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.where.self, aten.cat.default,
    aten.maximum.default, aten.minimum.default,
}  # fmt: skip
_REDUCTIONS = {
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.var.correction,
    aten.logsumexp.default, torch.ops.wtacrs.row_norms.default,
}  # fmt: skip
_FORMS = jg.VIEWS | jg.COPIES

_STATISTIC = 8  # a statistic is at least so many times smaller than what it is reduced from
_SMALLEST = 16  # elements in the last dimension of what is worth encoding
_STEEPEST = 4.0  # slope through which the error of a lossy source may pass
_EXTENT = 8.0  # slopes are taken over [-8, 8]


@dataclasses.dataclass(frozen=True)
class Mode:
    """What a value of ``Policy.residuals`` allows.

    Attributes:
        integers: for residuals in general.
        sources: for residuals of which the backward pass reads a nonlinear function.
        table_bits: for coefficients that are a bounded function of one tensor.
        masks: booleans are packed, and what can be derived from something stored is.
    """

    integers: Literal["exact", "int8", "int4"] = "exact"
    sources: Literal["exact", "int8", "int4"] = "exact"
    table_bits: int = 0
    masks: bool = True

    @property
    def lossy(self) -> bool:
        """Whether more than booleans are encoded."""
        return self.integers != "exact"


MODES = {
    "exact": Mode(masks=False),
    "lossless": Mode(),
    "balanced": Mode("int8", "int4", 3),
    "small": Mode("int4", "int4", 2),
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One residual and how the backward pass comes by it.

    Attributes:
        node: the residual.
        encoding: how it is stored; ``derive``: not at all, it is computed from others that are.
        source: what is encoded: `node`, or for a ``table`` what `node` is a function of.
        table: the tabulated function.
        module: path of the module that computes it.
        stochastic: integers are rounded at random.
    """

    node: fx.Node
    encoding: Encoding
    source: fx.Node
    table: Table | None
    module: str
    stochastic: bool


def modes(policy: Policy) -> tuple[Mode, ...]:
    """Return the modes that a policy names, for all modules or for some."""
    names = (policy.residuals, *(dict(rule.overrides).get("residuals", "exact") for rule in policy.rules))
    return tuple(MODES[name] for name in names)


def choose_storage(
    graph: fx.Graph, tangent: set[fx.Node], policy: Policy, pinned: Iterable[fx.Node]
) -> tuple[Stored, ...]:
    """Choose which residuals are stored, and how, at the fewest bytes; and which are derived from those.

    What is to be stored as it is remains the partitioner's choice: it may find something as good.

    Args:
        tangent: everything computed from tangents.
        pinned: what is stored for the sites anyway.
    """
    with real_tensors():  # functions of the graph are evaluated while it is compiled under fake tensors
        network = _Network(graph, tangent, policy, set(pinned))
        return network.storage()


class _Network:
    """The residuals of one graph and what they can be derived from."""

    def __init__(self, graph: fx.Graph, tangent: set[fx.Node], policy: Policy, pinned: set[fx.Node]) -> None:
        self.tangent, self.policy, self.pinned = tangent, policy, pinned
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.roots = unary_roots(graph)
        self.statistics = _statistics(graph)
        self.readers = self._readers(graph)
        self.exact = self._exact()
        self.known = self._known(graph)
        self.shapes: dict[fx.Node, Shape] = {}
        self.choices: dict[fx.Node, tuple[Encoding, Table | None]] = {}
        self.operands = self._derivations()
        self.nonlinear = {
            jg.content_of(self.roots[node] or node) for node in self.operands if self._shape(node) == "smooth"
        }

    def storage(self) -> tuple[Stored, ...]:
        """Return what is stored, and what is derived from something encoded."""
        cut, near = self._cut()
        chosen = [self._stored(node) for node in cut]
        encoded = {item.node for item in chosen if item.encoding != "exact"}
        for node in near:  # in graph order
            if node not in cut and any(operand in encoded for operand in self.operands[node] or ()):
                encoded.add(node)
                if self._choice(node)[0] != "exact":
                    module = jg.module_path(node) or ""
                    chosen.append(Stored(node, "derive", node, None, module, stochastic=False))
        return tuple(chosen)

    def _cut(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the nodes to store and those between them and their readers.

        Both in graph order. Of several cuts of equal size it is the one nearest to the readers.
        """
        network = networkx.DiGraph()
        for node, operands in self.operands.items():
            capacity = self._capacity(node)
            network.add_edge(
                (node, "in"), (node, "out"), **({} if capacity is None else {"capacity": capacity})
            )
            if operands is None:
                network.add_edge("source", (node, "in"))
            for operand in operands or ():
                network.add_edge((operand, "out"), (node, "in"))
        for node in self.readers:
            network.add_edge((node, "out"), "sink")
        if "source" not in network:
            return [], []
        _, (_, near) = networkx.minimum_cut(network, "source", "sink")
        found = sorted((node for node in self.operands if (node, "out") in near), key=self.order.__getitem__)
        return [node for node in found if (node, "in") not in near], found

    def _stored(self, node: fx.Node) -> Stored:
        """Return how a cut node is stored."""
        encoding, table = self._choice(node)
        source = self.roots[node] if table else node
        assert source is not None
        module = jg.module_path(node) or ""
        sampling = self.policy.sampling(module)
        stochastic = (
            encoding in ("int8", "int4") and sampling is not None and sampling.rounding == "stochastic"
        )
        return Stored(node, encoding, source, table, module, stochastic)

    def _mode(self, module: str | None) -> Mode:
        sampling = self.policy.sampling(module or "")
        return MODES[sampling.residuals if sampling else "exact"]

    def _readers(self, graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
        """Return the residuals with the operations on tangents that read them."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if node in self.tangent and node.op == "call_function":
                for operand in jg.tensor_operands(node):
                    if operand not in self.tangent and not self._at_hand(operand):
                        readers.setdefault(operand, []).append(node)
        return readers

    def _at_hand(self, node: fx.Node) -> bool:
        """Tell whether a node needs no storage: an input, a constant, or stored for a site."""
        constant = not node.all_input_nodes and not jg.is_random(node)
        return constant or node in self.pinned or self.roots[node] is None

    def _exact(self) -> set[fx.Node]:
        """Return the residuals that a module outside the policy reads, and what they are computed from."""
        stack = [
            node
            for node, readers in self.readers.items()
            for reader in readers
            if not self._mode(jg.module_path(reader) or jg.module_path(node)).lossy
        ]
        found = set(stack)
        while stack:
            node = stack.pop()
            if jg.is_derivable(node):
                new = set(jg.tensor_operands(node)) - found
                found |= new
                stack += new
        return found

    def _derivations(self) -> dict[fx.Node, tuple[fx.Node, ...] | None]:
        """Return every node of the network with what it is derived from; None where it must be stored."""
        found: dict[fx.Node, tuple[fx.Node, ...] | None] = {}
        stack = list(self.readers)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            operands = self._derivation(node)
            if operands is not None:
                operands = tuple(operand for operand in operands if not self._at_hand(operand))
                stack += operands
            found[node] = operands
        return found

    def _derivation(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        if not jg.is_derivable(node):
            return None
        operands = tuple(jg.tensor_operands(node))
        root = self.roots[node]
        if node.target in _FORMS | jg.GATHERS or all(operand in self.known for operand in operands):
            return operands
        if node.target in jg.CASTS and _is_float(node) and _is_float(operands[0]):
            return operands
        if root is not None and root is not node:
            return (root,) if self._shape(node) in ("linear", "smooth") else None
        if node.target in _SUMS_AND_PRODUCTS:
            return operands
        if node.target is aten.div.Tensor and operands[-1] in self.known and len(operands) == 2:
            return operands
        return None

    def _known(self, graph: fx.Graph) -> set[fx.Node]:
        """Return what the backward pass has to the last bit: inputs, statistics, integers, booleans.

        And what is computed from those alone.
        """
        known: set[fx.Node] = set()
        for node in graph.nodes:
            if (
                self._at_hand(node)
                or node in self.statistics
                or node in self.exact
                or not _is_float(node)
                or (jg.is_derivable(node) and all(operand in known for operand in jg.tensor_operands(node)))
            ):
                known.add(node)
        return known

    def _is_function(self, node: fx.Node) -> bool:
        """Tell whether a node is a function of one other tensor, element by element, in real numbers."""
        root = self.roots[node]
        return root is not None and root is not node and _is_float(root) and _is_float(node)

    def _shape(self, node: fx.Node) -> Shape:
        """Tell how a node depends on its root; ``steep`` where it is no function of real numbers."""
        if node not in self.shapes:
            self.shapes[node] = _shape(self._function(node)) if self._is_function(node) else "steep"
        return self.shapes[node]

    def _function(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        root = self.roots[node]
        assert root is not None
        return unary_function(node, root)

    def _capacity(self, node: fx.Node) -> int | None:
        """Return thousandths of a byte, and among equals the less exact encoding at a little more."""
        if node.target in _FORMS or node.target is aten.expand.default:
            return None  # what it is a form of is stored
        encoding, table = self._choice(node)
        value = node.meta["val"]
        features = value.shape[-1] if value.dim() else 1
        bits = encoded_bits(encoding, features, value.element_size(), table.bits if table else 0)
        return int(hint(value.numel()) * bits * 125) + (encoding != "exact")

    def _choice(self, node: fx.Node) -> tuple[Encoding, Table | None]:
        """Return the smallest encoding that the policy allows for a node."""
        if node not in self.choices:
            self.choices[node] = self._smallest(node)
        return self.choices[node]

    def _smallest(self, node: fx.Node) -> tuple[Encoding, Table | None]:
        value = node.meta["val"]
        mode = self._mode(jg.module_path(node))
        if not mode.masks or value.dim() < 2 or node in self.statistics:
            return "exact", None
        if isinstance(value.shape[-1], int) and value.shape[-1] < _SMALLEST:
            return "exact", None
        if value.dtype == torch.bool:
            return "bits", None
        if not _is_float(node) or not mode.lossy or node in self.exact or value.dtype == torch.float64:
            return "exact", None
        table = self._table(node, mode)
        if table is not None:
            return "table", table
        return (mode.sources if node in self.nonlinear else mode.integers), None

    def _table(self, node: fx.Node, mode: Mode) -> Table | None:
        """Return the table of a node that only scales tangents and is a bounded function of one tensor."""
        readers = self.readers.get(node, ())
        if not self._is_function(node) or not readers:
            return None
        if any(t.target is not aten.mul.Tensor or t.args[0] is t.args[1] for t in readers):
            return None
        return tabulate(self._function(node), mode.table_bits)


def unary_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node | None]:
    """Return for each node the tensor that it is a function of, element by element.

    That is the node itself where it is no pointwise function of a single tensor, None where it is constant.
    """
    roots: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        roots[node] = None if _is_constant(node) else node
        value = node.meta.get("val")
        pointwise = node.op == "call_function" and (jg.is_pointwise(node) or node.target in jg.CASTS)
        if not pointwise or not isinstance(value, Tensor):
            continue
        operands = [(roots[arg], arg) for arg in node.all_input_nodes]
        found = {root for root, _ in operands if root is not None}
        same_shape = all(
            isinstance(arg.meta.get("val"), Tensor) and arg.meta["val"].shape == value.shape
            for root, arg in operands
            if root is not None
        )
        if operands and not found:
            roots[node] = None
        elif len(found) == 1 and same_shape:
            roots[node] = next(iter(found))
    return roots


def _is_constant(node: fx.Node) -> bool:
    """Tell whether a node fills a tensor with a number that is known now: not with a size that varies."""
    return node.target in FILLS and not isinstance(node.args[FILLS[node.target]], fx.Node)


def unary_function(node: fx.Node, root: fx.Node) -> Callable[[Tensor], Tensor]:
    """Return the function from `root` to `node` as traced, in float64 for points ``[n]``."""

    def function(points: Tensor) -> Tensor:
        known: dict[fx.Node, Tensor] = {root: points}

        def value(node: fx.Node) -> Tensor:
            if node not in known:
                known[node] = compute(node)
            return known[node]

        def compute(node: fx.Node) -> Tensor:
            if _is_constant(node):
                dtype = torch.float64 if _is_float(node) else node.meta["val"].dtype
                return torch.full_like(points, node.args[FILLS[node.target]], dtype=dtype)  # type: ignore
            if node.target in jg.CASTS and _is_float(node):
                return value(node.args[0]).double()  # type: ignore[arg-type]
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            assert callable(node.target)
            result: Tensor = node.target(*args, **kwargs)
            return result

        return value(node).double().expand_as(points)

    return function


def hint(size: Any) -> int:
    """Return a size as a number: that of the example inputs where it is symbolic."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _shape(function: Callable[[Tensor], Tensor]) -> Shape:
    """Tell what a function does to a small error of its argument.

    It stays small, absolutely or beside the largest value, where a function is ``linear`` or ``smooth``.
    """
    points = torch.linspace(-_EXTENT, _EXTENT, 2001, dtype=torch.float64) + 1e-5
    values = function(points)
    slopes = values.diff() / points.diff()
    if not bool(values.isfinite().all()):
        return "steep"
    if bool((slopes - slopes[0]).abs().max() <= 1e-6 * slopes[0].abs().clamp(min=1e-6)):
        return "linear"
    steepest = float(slopes.abs().max())
    bounded = steepest <= _STEEPEST or steepest * _EXTENT <= _STEEPEST * float(values.abs().max())
    return "smooth" if bounded else "steep"


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
            read = [arg.meta["val"] for arg in jg.tensor_operands(parent)]
            small = _elements(value) * _STATISTIC <= max(map(_elements, [*siblings, *read]))
        elif node.target in _REDUCTIONS:
            small = _elements(value) * _STATISTIC <= max(_elements(arg.meta["val"]) for arg in operands)
        else:  # what is computed from statistics and is no larger
            sizes = [_elements(arg.meta["val"]) for arg in operands if arg in found]
            small = jg.is_recomputable(node) and bool(sizes) and _elements(value) <= max(sizes)
        if small:
            found.add(node)
    return found


def _elements(value: Any) -> int:
    return hint(value.numel()) if isinstance(value, Tensor) else 0
