"""Gradients of attention from rounded operands."""

from __future__ import annotations

import math

from torch import Tensor


def center_keys(
    query: Tensor, key: Tensor, logsumexp: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return keys less their mean, and the log-sum-exps that give the same probabilities with them.

    ``softmax(q k^T)`` does not change when one vector is taken from all keys. The backward pass of attention makes
    ``dq_i = sum_j ds_ij k_j`` with ``ds_ij = p_ij (dp_ij - o_i . do_i)``. From operands that do not belong together to
    the last bit, rounded queries beside an exact log-sum-exp or output, ``ds_i`` does not sum to zero, so that the
    keys' mean, which may be much larger than what is left of them, would enter.

    Args:
        query: [..., heads, queries, features]; key: [..., heads, keys, features]; as the backward pass reads them.
        logsumexp: [..., heads, queries], float32, natural logarithms of ``sum_j exp(scale q_i . k_j)``.
        scale: ``1 / sqrt(features)`` where it is None.
    """
    mean = key.float().mean(-2, keepdim=True)
    shift = (query.float() * mean).sum(-1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    return (key.float() - mean).to(key.dtype), logsumexp - shift.to(logsumexp.dtype)
