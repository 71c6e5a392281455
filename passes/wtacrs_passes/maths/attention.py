"""Gradients of attention from rounded operands.

Rounded queries and keys make other logits, by some spread, and with an exact log-sum-exp probabilities ``p`` that do
not sum to one; nor does ``ds_i = p_ij (dp_ij - o_i . do_i)`` sum to zero, so that the keys' mean, which may be much
larger than what is left of them, would enter ``dq_i = sum_j ds_ij k_j``. As ``softmax(q k^T)`` does not change when one
vector is taken from all keys, the backward pass reads the keys less their mean. Where the spread is large the attention
is computed again from the rounded operands, and its probabilities sum to one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .encodings import levels

MOST_SPREAD = 0.25
"""Deviation of a logit by rounding up to which a stored output and log-sum-exp serve."""
_BITS = 8  # of queries and keys

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


def center_keys(
    query: Tensor, key: Tensor, logsumexp: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys less their mean, the log-sum-exps that give the same probabilities with them, and the spread.

    Args:
        query: [..., heads, queries, features]; key: [..., heads, keys, features], or each of its heads for as many of
            the query's that follow each other (grouped queries); rounded to 8 bits.
        logsumexp: [..., heads, queries], float32, natural logarithms of ``sum_j exp(scale q_i . k_j)``.
        scale: ``1 / sqrt(features)`` where it is None.

    Returns:
        the spread: a scalar, float32, at least the standard deviation of any logit by rounding.
    """
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    wide, keys = query.float(), key.float()
    mean = keys.mean(-2, keepdim=True)
    heads = key.shape[-3]
    grouped: Tensor = wide.unflatten(-3, (heads, query.shape[-3] // heads))  # type: ignore[no-untyped-call]
    shift = (grouped * mean.unsqueeze(-3)).sum(-1).flatten(-3, -2) * factor
    of_queries, of_keys = (x.square().sum(-1).amax() for x in (wide, keys))
    peak, peak_of_keys = (x.abs().amax().square() for x in (wide, keys))
    # A rounding error is uniform in a step, peak / 127.
    variance = (peak * of_keys + peak_of_keys * of_queries) / (12 * levels(_BITS) ** 2)
    return (keys - mean).to(key.dtype), logsumexp - shift.to(logsumexp.dtype), variance.sqrt() * factor


def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    centered: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    spread: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Gradients:
    """Return the gradients of query, key and value on a CPU.

    Args:
        centered, logsumexp, spread: of :func:`center_keys`; the others as of PyTorch's function.
    """
    if spread.item() <= MOST_SPREAD:
        key = centered
    else:
        output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    return _backward(gradient, query, key, value, output, logsumexp, dropout_p, is_causal, attn_mask, scale)


def attention_backward_fake(*operands: Any) -> Gradients:
    """Return empty tensors like those of :func:`attention_backward`."""
    gradient, query, key, _, value, output, logsumexp, _, *rest = operands
    return _backward(gradient, query, key, value, output, logsumexp, *rest)


def _backward(*operands: Any) -> Gradients:
    *positional, attn_mask, scale = operands
    function = aten._scaled_dot_product_flash_attention_for_cpu_backward
    found: Gradients = function(*positional, attn_mask=attn_mask, scale=scale)
    return found
