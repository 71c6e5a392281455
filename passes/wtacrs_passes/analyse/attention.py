"""Which attention may be computed again from rounded queries, keys and values."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..graph.cones import depends_on
from ..graph.operations import (
    ADDITIONS,
    CASTS,
    FLEX,
    MULTIPLICATIONS,
    VIEWS,
    aten,
    drops,
)

_SMOOTH = ADDITIONS | MULTIPLICATIONS | VIEWS | CASTS | {
    aten.add.Scalar, aten.sub.Scalar, aten.neg.default, aten.abs.default, aten.relu.default, aten.sigmoid.default,
    aten.tanh.default, aten.where.self, aten.maximum.default, aten.minimum.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.div.Scalar,
}  # fmt: skip
"""Functions of a score whose result changes little more than it does."""


def is_made_again(attention: fx.Node) -> bool:
    """Tell whether an attention is the same when it is computed again, and near it for operands near these."""
    return _is_smooth(attention) if attention.target is FLEX else not drops(attention)


def _is_smooth(attention: fx.Node) -> bool:
    """Tell whether the function of scores of a ``flex_attention`` makes no small error a large one."""
    function: Any = attention.args[3]
    body: fx.Graph = getattr(attention.graph.owning_module, function.target).graph
    score = body.find_nodes(op="placeholder")[0]
    of_score = depends_on(body, {score}) - {score}
    return all(node.target in _SMOOTH or _divides_by_number(node) for node in of_score)


def _divides_by_number(node: fx.Node) -> bool:
    return node.target is aten.div.Tensor and isinstance(node.args[1], int | float)
