"""Decide what the backward pass reads and in which encoding it is stored: a minimum cut.

The network holds the residuals and what they can be computed from again. Cutting a node means storing it;
its capacity is its size in the smallest encoding that the policy allows. A node that pointwise operations
derive from others needs no storage once those are cut. So several readers of one tensor share one stored
source, and a source is stored where that is cheapest: the pre-activation instead of the activation and its
derivative, the normalised input instead of its scaled copies.

Three questions are asked of a value: do all of its readers tolerate an error (`Readers`), is it of one order of
size in each row (`Ranges`), and may it be derived from something that has an error (`functions`). A no means that
it is stored as it is, with the reason.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

from ..analyse.functions import Shape, is_float, shape, unary_function, unary_roots
from ..analyse.ranges import Ranges, is_opaque
from ..analyse.readers import Readers
from ..graph.names import module_path, static_inputs
from ..graph.operations import (
    ATTENTION,
    ATTENTION_BACKWARD,
    CASTS,
    COPIES,
    GATHERS,
    VIEWS,
    aten,
    content_of,
    is_derivable,
    is_random,
    makes_sparse,
    packet,
    same_content,
    tensor_operands,
)
from ..graph.torch_api import CheckpointPolicy, hint, real_tensors
from ..joint import Joint
from ..maths.encodings import Table, encoded_bits
from ..maths.tables import serves, tabulate
from ..policy import Policy
from .modes import MODES, Mode, modes
from .network import minimum_cut
from .plan import Encoding, Stored

_SUMS_AND_PRODUCTS = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.neg.default,
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.where.self, aten.cat.default,
    aten.maximum.default, aten.minimum.default,
}  # fmt: skip
_REDUCTIONS = {
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.var.correction,
    aten.logsumexp.default, torch.ops.wtacrs.row_norms.default,
}  # fmt: skip
_FORMS = VIEWS | COPIES

_SHRINKS = 8  # a statistic is at least so many times smaller than what it is reduced from
_SMALLEST = 16  # elements in the last dimension of what is worth encoding


def plan_storage(joint: Joint) -> None:
    """Choose which residuals are stored, and how, at the fewest bytes; and which are derived from those.

    What is to be stored as it is remains the partitioner's choice: it may find something as good.
    """
    if not any(mode.masks for mode in modes(joint.policy)) or makes_sparse(joint.graph):
        return
    if _is_checkpointed(joint.graph):
        warnings.warn(
            "the model uses checkpointing, so residuals are stored and computed again as that says, and none "
            "is encoded; to have them encoded instead, and nothing computed twice, turn checkpointing off",
            stacklevel=2,
        )
        return
    joint.plan = joint.plan.storing(choose_storage(joint))


def _is_checkpointed(graph: fx.Graph) -> bool:
    """Tell whether the user has said what is computed again; then what is stored is not ours to choose."""
    again = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
    return any(node.meta.get("recompute") in again for node in graph.nodes)


def choose_storage(joint: Joint) -> tuple[Stored, ...]:
    """Return how each residual is stored."""
    pinned = {node for site in joint.sites for node in site.stored}
    with real_tensors():  # functions of the graph are evaluated while it is compiled under fake tensors
        storage = _Storage(joint, pinned)
        return storage.plan()


class _Storage:
    """The residuals of one graph, what they can be derived from, and in how few bits."""

    def __init__(self, joint: Joint, pinned: set[fx.Node]) -> None:
        graph = joint.graph
        self.policy: Policy = joint.policy
        self.pinned = pinned
        self.tangent = joint.tangent()
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.roots = unary_roots(graph)
        statics = static_inputs(graph, joint.names)
        self.ranges = Ranges(graph, self.tangent, self.roots, statics)
        self.readers = Readers(graph, self.tangent, self.ranges, statics)
        self.residuals = [node for node in self.readers.of if not self._at_hand(node)]
        self.attention = self._attention(graph)
        self.statistics = _statistics(graph)
        self.shapes: dict[fx.Node, Shape] = {}
        self.refusals = self._refusals()
        self.known = self._known(graph)
        self.choices: dict[fx.Node, tuple[Encoding, Table | None]] = {}
        self.operands = self._derivations()
        self.sparse = self._sparse()
        self.logits = self._logits()
        self.differences = self._differences()
        self.nonlinear = {
            content_of(self.roots[node] or node) for node in self.operands if self._shape(node) == "smooth"
        }

    def plan(self) -> tuple[Stored, ...]:
        """Return what is stored, and what is derived from something encoded."""
        cut, near = minimum_cut(self.operands, self.residuals, self._capacity, self.order)
        chosen = [self._stored(node) for node in cut]
        encoded = {item.node for item in chosen if item.encoding != "exact"}
        for node in near:  # in graph order
            if node not in cut and any(operand in encoded for operand in self.operands[node] or ()):
                encoded.add(node)
                if self._choice(node)[0] != "exact" or node in self.attention:
                    chosen.append(Stored(node, "recompute", node, module=module_path(node) or ""))
        return tuple(chosen)

    def _stored(self, node: fx.Node) -> Stored:
        """Return how a cut node is stored."""
        encoding, table = self._choice(node)
        source = self.roots[node] if table else node
        assert source is not None
        module = module_path(node) or ""
        sampling = self.policy.sampling(module)
        at_random = sampling is not None and sampling.rounding == "stochastic"
        return Stored(
            node, encoding, source, table, module,
            stochastic=encoding in ("int8", "int4") and at_random, reason=self._reason(node),
        )  # fmt: skip

    def _reason(self, node: fx.Node) -> str:
        if node in self.ranges.outlying:
            return "may hold a sentinel, such as the score of a masked token"
        if node in self.ranges.wild:
            return "its elements may be of any size beside each other"
        return self.refusals.get(node, "")

    def _mode(self, module: str | None) -> Mode:
        sampling = self.policy.sampling(module or "")
        return MODES[sampling.residuals if sampling else "exact"]

    def _at_hand(self, node: fx.Node) -> bool:
        """Tell whether a node needs no storage: an input, a constant, or stored for a site."""
        constant = not node.all_input_nodes and not is_random(node)
        return constant or node in self.pinned or self.roots[node] is None

    def _sparse(self) -> set[fx.Node]:
        """Return what meets gradients that are zero but for few elements, or is a source of it.

        The data choose these elements, so they are none of those that a table or 4 bits are right for in the mean.
        """
        return self._with_sources(node for node in self.residuals if not self.readers.are_dense(node))

    def _logits(self) -> set[fx.Node]:
        """Return queries and keys that attention computes its logits from again: exponentials enlarge an error."""
        calls = self.attention.values()
        return self._with_sources(arg for call in calls for arg in call.args[:2] if isinstance(arg, fx.Node))

    def _differences(self) -> set[fx.Node]:
        """Return what is subtracted from each other: little may be left of it but an error."""
        found = []
        for node, operands in self.operands.items():
            if node.target is aten.sub.Tensor and operands:
                rounded = [arg for arg in operands if arg not in self.known]
                found += rounded if len(rounded) > 1 else []
        return self._with_sources(found)

    def _with_sources(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return nodes and what they are views, casts or functions of."""
        found: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += [content_of(node, _FORMS | CASTS | GATHERS), self.roots[node] or node]
        return found

    def _attention(self, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
        """Return outputs and log-sum-exps that the backward pass computes again, with the attention.

        Probabilities made from rounded queries and keys and an exact log-sum-exp do not sum to one, and what
        cancels in their gradient does not: so both come from the rounded operands.
        """
        found: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node.target not in ATTENTION_BACKWARD:
                continue
            results = [content_of(arg, VIEWS) for arg in node.all_input_nodes]
            made = {
                result: result.all_input_nodes[0] for result in results if result.target is operator.getitem
            }
            again = {
                out: call for out, call in made.items()
                if packet(call.target) in ATTENTION and out.args[1] in (0, 1)
                and not _drops(call) and self._mode(module_path(node)).lossy
            }  # fmt: skip
            if len(again) == 2 and len(set(again.values())) == 1:
                found.update(again)
        return found

    def _refusals(self) -> dict[fx.Node, str]:
        """Return what must be stored exactly, with the reason."""
        found: dict[fx.Node, str] = {}
        for node in self.residuals:
            excluded = [
                reader for reader in self.readers.of[node]
                if not self._mode(module_path(reader) or module_path(node)).lossy
            ]  # fmt: skip
            reason = "excluded by the policy" if excluded else self.readers.refusal(node)
            reason = reason or self._refusal_of_attention(node)
            reason = reason or self._refusal_of_opaque(node)
            if not reason and self.ranges.amplifies(node):
                reason = "its elements may be of any size beside each other"
            if reason:
                self._refuse(node, reason, found)
        return found

    def _refusal_of_attention(self, node: fx.Node) -> str:
        calls = [reader for reader in self.readers.of[node] if reader.target in ATTENTION_BACKWARD]
        again = all(
            any(content_of(arg, VIEWS) in self.attention for arg in call.all_input_nodes) for call in calls
        )
        return "" if again else "attention with dropout, which cannot be computed again"

    def _refusal_of_opaque(self, node: fx.Node) -> str:
        """Refuse what an inverse or a factorisation reads: its gradient cancels to the last bit, or does not."""
        users = {user for form in same_content(node) for user in form.users}
        opaque = [user for user in users if user not in self.tangent and is_opaque(user)]
        return f"read by {packet(opaque[0].target)}, whose gradient may cancel" if opaque else ""

    def _refuse(self, node: fx.Node, reason: str, found: dict[fx.Node, str]) -> None:
        """Refuse a node and, through functions of one tensor and views, what it is derived from."""
        stack = [node]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found[node] = reason
            root = self.roots[node]
            if root is not None and root is not node:
                stack.append(root)
            if is_derivable(node) and (
                reason == "excluded by the policy" or node.target in _FORMS | GATHERS | CASTS
            ):
                stack += tensor_operands(node)

    def _known(self, graph: fx.Graph) -> set[fx.Node]:
        """Return what the backward pass has to the last bit: inputs, statistics, integers, booleans.

        And what is computed from those alone.
        """
        known: set[fx.Node] = set()
        for node in graph.nodes:
            if (
                self._at_hand(node)
                or node in self.statistics
                or node in self.refusals
                or not is_float(node)
                or (is_derivable(node) and all(operand in known for operand in tensor_operands(node)))
            ):
                known.add(node)
        return known

    def _derivations(self) -> dict[fx.Node, tuple[fx.Node, ...] | None]:
        """Return every node of the network with what it is derived from; None where it must be stored."""
        found: dict[fx.Node, tuple[fx.Node, ...] | None] = {}
        stack = list(self.residuals)
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
        if node in self.attention:
            return tuple(tensor_operands(self.attention[node]))
        if not is_derivable(node):
            return None
        operands, root = tuple(tensor_operands(node)), self.roots[node]
        if all(operand in self.known for operand in operands):
            return operands
        if root is not None and root in self.known:
            return (root,)
        if node not in self.refusals and node not in self.ranges.wild and self._shape(node) != "steep":
            return (root,) if root is not None else None
        if node in self.refusals or node in self.ranges.wild:
            return None  # it is needed to the last bit
        if node.target in _FORMS | GATHERS:
            return operands
        if node.target in CASTS and is_float(node) and is_float(operands[0]):
            return operands
        if root is not None and root is not node:
            return None  # a steep function
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and any(map(self._is_statistic, operands)):
            return None  # less its mean, little may be left of a value but its error
        if node.target in _SUMS_AND_PRODUCTS:
            return operands
        if node.target is aten.div.Tensor and len(operands) == 2 and operands[-1] in self.known:
            return None if self.ranges.amplifies_by_division(operands[-1]) else operands
        return None

    def _is_statistic(self, node: fx.Node) -> bool:
        source = content_of(node, VIEWS | CASTS | {aten.expand.default})
        return node in self.statistics and source not in self.pinned and not self._at_hand(node)

    def _is_function(self, node: fx.Node) -> bool:
        """Tell whether a node is a function of one other tensor, element by element, in real numbers."""
        root = self.roots[node]
        return root is not None and root is not node and is_float(root) and is_float(node)

    def _shape(self, node: fx.Node) -> Shape:
        """Tell how a node depends on its root; ``steep`` where it is no function of real numbers."""
        if node not in self.shapes:
            self.shapes[node] = shape(self._function(node)) if self._is_function(node) else "steep"
        return self.shapes[node]

    def _function(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        root = self.roots[node]
        assert root is not None
        return unary_function(node, root)

    def _capacity(self, node: fx.Node) -> int | None:
        """Return thousandths of a byte, and among equals the less exact encoding at a little more."""
        forms = node.target in _FORMS or node.target is aten.expand.default
        if (forms or node in self.attention) and self.operands[node] is not None:
            return None  # what it is a form of is stored
        encoding, table = self._choice(node)
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return 0
        features = value.shape[-1] if value.dim() else 1
        bits = encoded_bits(encoding, features, value.element_size(), table.bits if table else 0)
        return int(hint(value.numel()) * bits * 125) + (encoding != "exact")

    def _choice(self, node: fx.Node) -> tuple[Encoding, Table | None]:
        """Return the smallest encoding that the policy allows for a node."""
        if node not in self.choices:
            self.choices[node] = self._smallest(node)
        return self.choices[node]

    def _smallest(self, node: fx.Node) -> tuple[Encoding, Table | None]:
        value = node.meta.get("val")
        mode = self._mode(module_path(node))
        if not mode.masks or not isinstance(value, Tensor) or value.dim() < 2 or node in self.statistics:
            return "exact", None
        if isinstance(value.shape[-1], int) and value.shape[-1] < _SMALLEST:
            return "exact", None
        if value.dtype == torch.bool:
            return "bits", None
        wide = is_float(node) and value.element_size() in (2, 4)
        if not wide or not mode.lossy or node in self.known:
            return "exact", None  # what is needed to the last bit may be computed from it
        if node in self.ranges.wild or node in self.ranges.outlying:
            return "exact", None
        if node in self.sparse | self.logits | self.differences:
            return "int8", None
        if node in self.nonlinear and self.ranges.is_bounded(node):
            return "int8", None  # its function may vanish at the ends: (1 - y^2) of a tanh
        table = self._table(node, mode)
        if table is not None:
            return "table", table
        return (mode.sources if node in self.nonlinear else mode.integers), None

    def _table(self, node: fx.Node, mode: Mode) -> Table | None:
        """Return the table of a node that only scales tangents and is a bounded function of one tensor."""
        readers = self.readers.of.get(node, ())
        if not self._is_function(node) or not readers:
            return None
        if any(t.target is not aten.mul.Tensor or t.args[0] is t.args[1] for t in readers):
            return None
        table = tabulate(self._function(node), mode.table_bits)
        return table if table is not None and serves(self._function(node), table) else None


def _drops(attention: fx.Node) -> bool:
    """Tell whether an attention has dropout."""
    schema = attention.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    position = names.index("dropout_p")
    given = (
        attention.args[position] if position < len(attention.args) else attention.kwargs.get("dropout_p", 0.0)
    )
    return bool(given != 0.0)


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
        if small:
            found.add(node)
    return found


def _elements(value: object) -> int:
    return hint(value.numel()) if isinstance(value, Tensor) else 0
