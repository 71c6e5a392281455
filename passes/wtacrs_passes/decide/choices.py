"""In how few bits a residual may be stored."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx

from ..analyse.functions import Unary, is_float, rounding_error
from ..graph.names import module_path
from ..graph.operations import aten, content_of, is_again
from ..graph.torch_api import hint, real_tensors
from ..maths.encodings import INTEGER_BITS, Table, encoded_bits, packs_well
from ..maths.tables import serves, tabulate
from .derivations import Derivations
from .exactness import Exactness
from .facts import Facts
from .modes import Mode
from .plan import Encoding

_ROUNDED = 0.02
"""The largest squared error of a function, beside its squared values, that rounding its source may cause."""

_SMALLEST = 16  # elements in the last dimension of what is worth encoding


class Choices:
    """The smallest encoding of each node that the policy, its readers and its values allow."""

    def __init__(self, facts: Facts, exactness: Exactness, derivations: Derivations) -> None:
        self.facts, self._exactness, self._derivations = facts, exactness, derivations
        self._chosen: dict[fx.Node, tuple[Encoding, Table | None]] = {}
        # What meets gradients that are zero but for few elements: the data choose these, so they are none of those
        # that a table or 4 bits are right for in the mean.
        self._sparse = facts.with_sources(n for n in facts.residuals if not facts.readers.are_dense(n))
        self._of_attention = self._logits_and_outputs()
        self._subtracted = self._differences()
        self._kept = self._of_checkpoints()
        self._functions: dict[fx.Node, list[fx.Node]] = {}
        for node in derivations.operands:
            if derivations.shape(node) == "smooth":
                self._functions.setdefault(content_of(facts.roots[node] or node), []).append(node)

    def __call__(self, node: fx.Node) -> tuple[Encoding, Table | None]:
        """Return the encoding of a node, with its table."""
        if node not in self._chosen:
            self._chosen[node] = self._smallest(node)
        return self._chosen[node]

    def capacity(self, node: fx.Node) -> int | None:
        """Return thousandths of a byte, and among equals the less exact encoding at a little more; None for forms."""
        if self._derivations.is_form(node) or self._is_sparse_function(node):
            return None
        encoding, table = self(node)
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return 0
        features = value.shape[-1] if value.dim() else 1
        bits = encoded_bits(encoding, features, value.element_size(), table.bits if table else 0)
        return int(hint(value.numel()) * bits * 125) + (encoding != "exact")

    def _is_sparse_function(self, node: fx.Node) -> bool:
        """Tell whether few elements of a function are read: its small values have no bits, its source's have."""
        derived = self._derivations.operands[node] is not None and self._derivations.shape(node) == "smooth"
        return node in self._sparse and derived and self(node)[0] != "exact"

    def _logits_and_outputs(self) -> set[fx.Node]:
        """Return queries and keys of attention, as exponentials enlarge an error, and outputs that are stored.

        These stand for the mean gradient of a row of probabilities, of which little is left when it is taken out.
        """
        calls = self.facts.attention.values()
        outputs = (user for call in calls for user in call.users if user.args[1] == 0)
        return self.facts.with_sources(
            [
                *(arg for call in calls for arg in call.args[:2] if isinstance(arg, fx.Node)),
                *(output for output in outputs if output not in self.facts.again),
            ]
        )

    def _differences(self) -> set[fx.Node]:
        """Return what is subtracted from each other: little may be left of it but an error."""
        found = []
        for node, operands in self._derivations.operands.items():
            if node.target is aten.sub.Tensor and operands:
                rounded = [arg for arg in operands if arg not in self._exactness.known]
                found += rounded if len(rounded) > 1 else []
        return self.facts.with_sources(found)

    def _of_checkpoints(self) -> set[fx.Node]:
        """Return what regions and products are computed from again, and what that is derived from."""
        readers = self.facts.readers.of
        stack = [node for node in readers if any(is_again(reader) for reader in readers[node])]
        stack += [x for product in self.facts.repeated for x in self._derivations.operands.get(product) or ()]
        found: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += self._derivations.operands.get(node) or ()
        return found

    def _smallest(self, node: fx.Node) -> tuple[Encoding, Table | None]:
        value = node.meta.get("val")
        mode = self.facts.mode(module_path(node))
        if (
            not mode.masks
            or not isinstance(value, Tensor)
            or value.dim() < 2
            or node in self.facts.statistics
        ):
            return "exact", None
        if isinstance(value.shape[-1], int) and value.shape[-1] < _SMALLEST:
            return "exact", None
        if value.dtype == torch.bool:
            return "bits", None
        wide = is_float(node) and value.element_size() in (2, 4)
        if not wide or not mode.lossy or node in self._exactness.known:
            return "exact", None  # what is needed to the last bit may be computed from it
        if node in self.facts.ranges.wild or node in self.facts.ranges.outlying:
            return "exact", None
        if node in self.facts.estimates:
            return "int8", None
        if node in self._sparse or node in self._of_attention or node in self._subtracted:
            return "int8", None
        if node in self._functions and self.facts.ranges.is_bounded(node):
            return "int8", None  # its function may vanish at the ends: (1 - y^2) of a tanh
        if node in self._kept:
            return self._packed(mode.checkpoints, node), None
        table = self._table(node, mode)
        if table is not None:
            return "table", table
        integers = self._of_source(node, mode) if node in self._functions else mode.integers
        return self._packed(integers, node), None

    def _of_source(self, node: fx.Node, mode: Mode) -> Encoding:
        """Return the integers of a node of which nonlinear functions are read: more bits for a sharp bend."""
        bits = INTEGER_BITS[mode.sources]
        functions = (self.facts.function(each) for each in self._functions[node])
        bends = any(rounding_error(function, bits) > _ROUNDED for function in functions)
        return "int8" if bends else mode.sources

    def _packed(self, encoding: Encoding, node: fx.Node) -> Encoding:
        """Return an encoding, or 8 bits where its codes would not be packed fast."""
        features = node.meta["val"].shape[-1]
        return encoding if encoding != "int6" or packs_well(features, 6) else "int8"

    def _table(self, node: fx.Node, mode: Mode) -> Table | None:
        """Return the table of a node that only scales tangents and is a bounded function of one tensor."""
        readers = self.facts.readers.of.get(node, ())
        if not self.facts.is_function(node) or not readers:
            return None
        if any(t.target is not aten.mul.Tensor or t.args[0] is t.args[1] for t in readers):
            return None
        return _table(self.facts.function(node), mode.table_bits)


@functools.lru_cache
@real_tensors()
def _table(function: Unary, bits: int) -> Table | None:
    table = tabulate(function, bits)
    return table if table is not None and serves(function, table) else None
