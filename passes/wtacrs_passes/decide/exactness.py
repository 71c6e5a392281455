"""Which residuals must reach the backward pass to the last bit, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from ..analyse.functions import is_float, shape
from ..analyse.ranges import is_opaque
from ..graph.edit import bytes_of_example
from ..graph.names import module_path
from ..graph.operations import (
    ATTENTION_BACKWARD,
    FLEX_BACKWARD,
    FORMS,
    GATHERS,
    is_again,
    is_derivable,
    is_recomputable,
    packet,
    same_content,
    tensor_operands,
)
from .facts import Facts, whole

_EXCLUDED = "excluded by the policy"
_WIDE = "in float32 it would take more memory than all else that is stored"
_OF_ANY_SIZE = "its elements may be of any size beside each other"


class Exactness:
    """What must be exact.

    Attributes:
        refusals: residuals, and what they are derived from, with the reason.
        known: what the backward pass has to the last bit.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.refusals: dict[fx.Node, str] = {}
        for node in facts.residuals:
            reason = self._refusal(node)
            if reason:
                self._refuse(node, reason)
        if not facts.is_part:  # beside it lies what those of other layers have stored
            for node in self._wide():
                self._refuse(node, _WIDE)
        self.known = self._known()

    def reason(self, node: fx.Node) -> str:
        """Return why a node is stored as it is, if it has to be."""
        if node in self.facts.ranges.outlying:
            return "may hold a sentinel, such as the score of a masked token"
        return _OF_ANY_SIZE if node in self.facts.ranges.wild else self.refusals.get(node, "")

    def _refusal(self, node: fx.Node) -> str:
        readers = self.facts.readers
        modules = [module_path(reader) or module_path(node) for reader in readers.of[node]]
        if not all(self.facts.mode(module).lossy for module in modules):
            return _EXCLUDED
        reason = readers.refusal(node) or self._refusal_of_attention(node) or self._refusal_of_opaque(node)
        reason = reason or self._refusal_of_checkpoints(node)
        return reason or (_OF_ANY_SIZE if self.facts.ranges.amplifies(node) else "")

    def _refusal_of_attention(self, node: fx.Node) -> str:
        calls = [reader for reader in self.facts.readers.of[node] if reader.target in ATTENTION_BACKWARD]
        exact = [call for call in calls if call not in self.facts.attention]
        if any(call.target is FLEX_BACKWARD for call in exact):
            return "attention whose function of scores may make an error a large one"
        return "attention with dropout, which cannot be computed again" if exact else ""

    def _refusal_of_opaque(self, node: fx.Node) -> str:
        """Refuse what an inverse or a factorisation reads: its gradient cancels to the last bit, or does not."""
        users = {user for form in same_content(node) for user in form.users}
        opaque = [user for user in users if user not in self.facts.tangent and is_opaque(user)]
        return f"read by {packet(opaque[0].target)}, whose gradient may cancel" if opaque else ""

    def _refusal_of_checkpoints(self, node: fx.Node) -> str:
        """Refuse what a checkpointed region computes a logarithm, a quotient, ... of, element by element.

        Rounding may make a small element zero. Products of matrices and sums over a row do not see that. And refuse
        what it makes anything of that a module reads whose gradients are to be exact.
        """
        readers = (user for again in _made_again(node, lambda again: True) for user in again.users)
        gradients = (user for user in readers if user in self.facts.tangent)
        if not all(self.facts.mode(module_path(gradient)).lossy for gradient in gradients):
            return _EXCLUDED
        elementwise = _made_again(node, is_recomputable)
        for again in filter(is_float, elementwise):
            if any(user not in elementwise and self._is_steep(again, user) for user in again.users):
                return f"a checkpointed region computes {packet(again.target)} of it"
        return ""

    def _is_steep(self, again: fx.Node, reader: fx.Node) -> bool:
        """Tell whether an error may be enlarged in what an operation reads that sums up, or has a gradient."""
        if again in self.facts.ranges.wild:
            return True
        if self.facts.is_function(again) and shape(self.facts.function(again)) == "steep":
            return True
        return reader in self.facts.tangent and bool(self.facts.readers.reason(again, reader))

    def _refuse(self, node: fx.Node, reason: str) -> None:
        """Refuse a node and what it is derived from: through views, functions of one tensor and parts of one.

        Of a sum of two the other is needed as well: the residual stream does not become exact for one that reads it.
        """
        stack = [node]
        while stack:
            node = stack.pop()
            if node in self.refusals:
                continue
            self.refusals[node] = reason
            root = self.facts.roots[node]
            if root is not None and root is not node:
                stack.append(root)
            if node in self.facts.repeated:
                stack.append(whole(node))
            moves = node.target in FORMS | GATHERS
            sources = [operand for operand in tensor_operands(node) if not self._is_small(operand)]
            if is_derivable(node) and (moves or (reason in (_EXCLUDED, _WIDE) and len(sources) == 1)):
                stack += tensor_operands(node)

    def _is_small(self, node: fx.Node) -> bool:
        return self.facts.is_at_hand(node) or node in self.facts.statistics

    def _wide(self) -> list[fx.Node]:
        """Return residuals in float32 that are made of 16-bit ones, and so large that encoding them makes the peak.

        Such as the exponentials of a head's logits. To be encoded a value is written as it is, beside what it is
        made of, at 4 + 2 + 1 bytes; the partitioner stores 2, and the gradient takes their place. That is less
        as soon as the 4 bytes are more than twice what all other residuals are made of: about what the partitioner
        would store of those, of which encodings leave a fifth.
        """
        leaves = self._leaves(self.facts.residuals)
        total = sum(map(bytes_of_example, leaves))
        return [
            node
            for node in self.facts.residuals
            if is_float(node)
            and node.meta["val"].element_size() == 4
            and bytes_of_example(node) > 2 * (total - bytes_of_example(node) // 2)
            and self._is_made_of_halves(node)
        ]

    def _leaves(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return what cannot be derived and has to be there to make nodes, without what is at hand."""
        stack, seen, leaves = list(nodes), set(nodes), set()
        while stack:
            node = stack.pop()
            if self.facts.is_at_hand(node):
                continue
            if not is_derivable(node):
                leaves.add(node)
                continue
            operands = [operand for operand in tensor_operands(node) if operand not in seen]
            seen.update(operands)
            stack += operands
        return leaves

    def _is_made_of_halves(self, node: fx.Node) -> bool:
        """Tell whether what a value is made of, if it is not much smaller, has 16 bits."""
        large = [leaf for leaf in self._leaves([node]) if 8 * bytes_of_example(leaf) > bytes_of_example(node)]
        return bool(large) and all(leaf.meta["val"].element_size() == 2 for leaf in large)

    def _known(self) -> set[fx.Node]:
        """Return inputs, statistics, integers, booleans, what is refused, and what is computed from those alone."""
        known: set[fx.Node] = set()
        for node in self.facts.order:
            if (
                self.facts.is_at_hand(node)
                or node in self.facts.statistics
                or node in self.refusals
                or not is_float(node)
                or (is_derivable(node) and all(operand in known for operand in tensor_operands(node)))
            ):
                known.add(node)
        return known


def _made_again(node: fx.Node, through: Callable[[fx.Node], bool]) -> dict[fx.Node, None]:
    """Return what checkpoints compute again from a node, by operations of a kind, always in the same order."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if is_again(user) and user not in found and through(user):
                found[user] = None
                stack.append(user)
    return found
