"""Decide what the backward pass reads and in which encoding it is stored: a minimum cut.

The network holds the residuals and what they can be computed from again. Cutting a node means storing it;
its capacity is its size in the smallest encoding that the policy allows. A node that pointwise operations
derive from others needs no storage once those are cut. So several readers of one tensor share one stored
source, and a source is stored where that is cheapest: the pre-activation instead of the activation and its
derivative, the normalised input instead of its scaled copies. Products of matrices are derived likewise where the
policy says so, as that takes time: the gates of a layer from its norm, whose input is stored.

Three questions are asked of a value: do all of its readers tolerate an error (`Readers`), is it of one order of
size in each row (`Ranges`), and may it be derived from something that has an error (`functions`). A no means that
it is stored as it is, with the reason.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from ..graph.names import module_path
from ..graph.operations import FILLS, VIEWS, content_of, is_checkpointed, makes_sparse
from ..joint import Joint
from ..maths.encodings import INTEGER_BITS
from .choices import Choices
from .derivations import Derivations
from .exactness import Exactness
from .facts import Facts
from .modes import modes
from .network import minimum_cut
from .offload import choose_offloaded
from .plan import Plan, Stored


def plan_storage(joint: Joint) -> None:
    """Choose which residuals are stored, and how, at the fewest bytes; and which are derived from those.

    What is to be stored as it is remains the partitioner's choice: it may find something as good.
    """
    stores = any(mode.masks for mode in modes(joint.policy)) or joint.policy.recompute_products
    if stores and not makes_sparse(joint.graph) and not is_checkpointed(joint.graph):
        joint.plan = choose_storage(joint)


def choose_storage(joint: Joint) -> Plan:
    """Return the plan with how each residual is stored, what is derived from those, and what is made of inputs."""
    facts = Facts(joint)
    exactness = Exactness(facts)
    derivations = Derivations(facts, exactness)
    choices = Choices(facts, exactness, derivations)
    cut, near = minimum_cut(derivations.operands, facts.residuals, choices.capacity, facts.order)
    chosen = [_stored(node, facts, exactness, choices) for node in cut]
    encoded = {item.node for item in chosen if item.encoding != "exact"}
    stored = set(cut)
    for node in near:  # in graph order
        if node in stored:
            continue
        is_repeated = node in facts.repeated
        if is_repeated or any(operand in encoded for operand in derivations.operands[node] or ()):
            encoded.add(node)
            if choices(node)[0] != "exact" or is_repeated or node in facts.again:
                chosen.append(Stored(node, "recompute", node, module=module_path(node) or ""))
    chosen, offloaded = choose_offloaded(joint, chosen)
    planned = {item.node for item in chosen}
    again = [node for node in facts.readers.of if node in facts.made and node not in planned]
    twice = set(facts.again.values())
    return dataclasses.replace(
        joint.plan,
        residuals=(*chosen, *map(_made, filter(_takes_memory, again))),
        offloaded=offloaded,
        made_of_inputs=facts.made,
        centered=frozenset(backward for backward, call in facts.attention.items() if call not in twice),
    )


def _takes_memory(node: fx.Node) -> bool:
    """Tell whether a node is more than a view of an input or of a constant."""
    source = content_of(node, VIEWS)
    return source.op != "placeholder" and source.target not in FILLS


def _made(node: fx.Node) -> Stored:
    return Stored(node, "recompute", node, module=module_path(node) or "", reason="made of inputs")


def _stored(node: fx.Node, facts: Facts, exactness: Exactness, choices: Choices) -> Stored:
    encoding, table = choices(node)
    source = facts.roots[node] if table else node
    assert source is not None
    module = module_path(node) or ""
    sampling = facts.policy.sampling(module)
    asked = sampling is not None and sampling.rounding == "stochastic"
    at_random = encoding in INTEGER_BITS and (asked or node in facts.estimates)
    shares = encoding in INTEGER_BITS and not at_random and facts.ranges.sums_to_one(node)
    return Stored(node, encoding, source, table, module, at_random, shares, exactness.reason(node))
