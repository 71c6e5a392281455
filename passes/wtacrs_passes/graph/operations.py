"""Tables and predicates of operations: what a node does, whatever graph it stands in."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Set
from typing import Any

import torch
import torch.nn.attention.varlen  # its operations
from torch import fx
from torch.utils import _pytree as pytree

from ..maths import ops
from .torch_api import CheckpointPolicy, inductor_prims, py_sym_types

aten = torch.ops.aten
prims = torch.ops.prims

TRANSPOSES = {aten.permute.default, aten.t.default, aten.transpose.int}
"""Views that exchange dimensions."""
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
"""Views that keep the order of the elements."""
VIEWS = (
    RESHAPES
    | TRANSPOSES
    | {
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.unsqueeze.default,
        aten.alias.default,
        aten.detach.default,
    }
)
COPIES = {aten.clone.default, aten.contiguous.default}
CASTS = {prims.convert_element_type.default, aten._to_copy.default}
FORMS = VIEWS | COPIES | CASTS
"""Operations whose result holds what their operand holds."""
EXPANSIONS = VIEWS | CASTS | {aten.expand.default}
"""Operations whose result repeats what their operand holds, in any shape."""


def _between_ranks(*names: str) -> set[Any]:
    """Return those of the functional collectives that this PyTorch has."""
    found = (getattr(torch.ops._c10d_functional, name, None) for name in names)
    return {operation.default for operation in found if operation is not None}


EXCHANGES = _between_ranks("wait_tensor", "all_gather_into_tensor", "all_to_all_single", "broadcast")
"""Collectives whose results hold elements of the operands of all ranks."""
_REDUCTIONS = _between_ranks("all_reduce", "reduce_scatter_tensor")
"""Collectives that put together elements of all ranks, by what comes second."""

GATHERS = {aten.expand.default, aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.gather.default,
           ops.gather_rows}  # fmt: skip
FILLS: dict[Any, int] = {aten.full.default: 1, aten.scalar_tensor.default: 0}
"""Constants, with the position of the value among the arguments."""
_LOOPS = {aten.cat.default, aten.embedding.default, *FILLS}

ADDITIONS = {aten.add.Tensor, aten.sub.Tensor}
"""Sums and differences of two tensors, element by element."""
MULTIPLICATIONS = {aten.mul.Tensor, aten.mul.Scalar}
"""Products with a tensor or a number, element by element."""
DIVISIONS = {aten.div.Tensor, aten.div.Scalar}
"""Quotients by a tensor or a number, element by element."""
SUMS = {aten.sum.dim_IntList, aten.sum.default}
"""Reductions by addition."""
GEMMS = {aten.mm.default, aten.bmm.default}
"""Products of two matrices, or of two batches of them, and nothing else."""
GROUPED = {aten._grouped_mm.default, ops.grouped_mm}
"""Products of rows in groups: with a matrix for each group, or of rows of two matrices; ends of groups come third."""

SEEDS = {inductor_prims.seed, inductor_prims.seeds}
"""What asks the generator of random numbers: another answer each time."""
RANDOM = SEEDS | {inductor_prims.random, inductor_prims.randint}

FLEX, FLEX_BACKWARD = torch.ops.higher_order.flex_attention, torch.ops.higher_order.flex_attention_backward
"""Attention with a function of scores, and of positions that are masked: sub-graphs among its operands."""

ATTENTION = {
    FLEX,
    torch.ops.torch_attn._varlen_attn,
    aten._flash_attention_forward,
    aten._efficient_attention_forward,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}
ATTENTION_BACKWARD = {
    FLEX_BACKWARD,
    torch.ops.torch_attn._varlen_attn_backward.default,
    aten._flash_attention_backward.default,
    aten._efficient_attention_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
}
TAKES_ANY_LOG_SUM_EXP = {aten._scaled_dot_product_flash_attention_for_cpu_backward.default}
"""Of these, those that can be given another log-sum-exp: natural logarithms, [batch, heads, queries]."""
MIXING = ATTENTION | {
    aten.mm,
    aten.bmm,
    aten.addmm,
    aten.baddbmm,
    aten.convolution,
    aten._grouped_mm,
    aten._scaled_mm,
    torch.ops.wtacrs.grouped_mm,
    aten.embedding,
    aten.native_layer_norm,
    aten.native_group_norm,
    aten.avg_pool2d,
    aten._adaptive_avg_pool2d,
    aten.arange,
    prims.iota,
    aten.one_hot,
    aten.mean,
    aten.sum,
    aten.var,
    aten.var_mean,
    aten.logsumexp,
    aten.any,
    aten.all,
    aten.argmax,
    aten.argmin,
    aten.searchsorted,
    aten.bucketize,
    aten.histc,
    aten.bincount,
    aten.nonzero,
    aten.masked_select,
    aten.index_put,
    aten._unsafe_index,
    aten._unsafe_index_put,
    aten.scatter,
    aten.scatter_add,
    aten.index_add,
    aten.index_select,
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional,
    aten.native_dropout,
    aten._embedding_bag,
    aten.max_pool2d_with_indices,
    inductor_prims._low_memory_max_pool_with_offsets.overloadpacket,
    aten.max_pool3d_with_indices,
    aten.avg_pool3d,
    aten._adaptive_avg_pool3d,
    aten.adaptive_max_pool2d,
    aten.upsample_nearest2d,
    aten.upsample_bilinear2d,
    aten.upsample_bicubic2d,
    aten.reflection_pad1d,
    aten.reflection_pad2d,
    aten.replication_pad2d,
    aten.grid_sampler_2d,
    aten.im2col,
    aten.col2im,
    aten.pixel_shuffle,
    aten.roll,
    aten.repeat,
    aten.tril,
    aten.triu,
    aten.diagonal,
    aten.as_strided,
    aten._fft_r2c,
    aten._fft_c2c,
    aten._fft_c2r,
    prims.rev,
}
"""Operations each of whose results is a sum over many operands, or an index: of one order of size."""
WEIGHTS_IN_FEW_BITS = {
    "bitsandbytes.dequantize_4bit",
    "bitsandbytes.dequantize_blockwise",
    "bitsandbytes.int8_vectorwise_dequant",
}
"""Names of other packages' operations that make weights whole."""
OF_OTHERS = WEIGHTS_IN_FEW_BITS | {
    "bitsandbytes.gemm_4bit",
    "bitsandbytes.int8_scaled_mm",
    "bitsandbytes.int8_mixed_scaled_mm",
}
"""Names of other packages' operations that are alike: products with such weights as well."""

PARTS = {aten.split, aten.split_with_sizes, aten.unbind, aten.chunk}
"""Operations whose results are parts of the operand."""
SELECTIONS = PARTS | {
    aten.sort,
    aten.topk,
    aten.max,
    aten.min,
    aten.kthvalue,
    aten.median,
    aten.mode,
}
"""Operations with several results, whose elements are elements of the operand."""

IS_PRODUCT = "wtacrs_product"
"""Key of ``node.meta`` on results in chunks that are products of matrices: of no other size than what they multiply."""
IS_TAME = "wtacrs_tame"
"""Key of ``node.meta`` on calls of a region that return nothing of another order of size than what they read."""

IS_AMPLIFIED, IS_MASKED, IS_FROM_DATA = "wtacrs_amplified", "wtacrs_masked", "wtacrs_from_data"
"""Keys of ``node.meta`` on inputs of a region: what `Readers` knows of them where it is called.

On its output node: the positions of the gradients that are amplified or masked there.
"""

IS_AGAIN = "wtacrs_again"
"""Key of ``node.meta`` on what the backward pass computes again as a checkpoint says."""

NOISE_OF = "wtacrs_noise"
"""Key of ``node.meta`` on random numbers that a rewrite draws: whose they are, see `lower_noise`."""


def is_pointwise(node: fx.Node) -> bool:
    """Tell whether a node computes each element from one element of each input."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and not is_random(node)


def is_mixing(node: fx.Node) -> bool:
    """Tell whether each result of a node is a sum over many operands, a weight, or an index: of one order of size."""
    return packet(node.target) in MIXING or str(packet(node.target)) in OF_OTHERS


def sums_over_ranks(node: fx.Node) -> bool:
    """Tell whether a node is the sum, or mean, of a tensor over ranks."""
    return node.target in _REDUCTIONS and node.args[1] in ("sum", "avg")


def is_largest_of_ranks(node: fx.Node) -> bool:
    """Tell whether a node is the largest, or least, of each element over ranks."""
    return node.target in _REDUCTIONS and node.args[1] in ("max", "min")


def is_random(node: fx.Node) -> bool:
    """Tell whether two equal calls of the node may return different values."""
    tags = getattr(node.target, "tags", ())
    return node.target in RANDOM or torch.Tag.nondeterministic_seeded in tags


def drops(attention: fx.Node) -> bool:
    """Tell whether an attention has dropout."""
    if attention.target is FLEX:
        return False
    schema = attention.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    if "dropout_p" not in names:
        return False
    position = names.index("dropout_p")
    given = (
        attention.args[position] if position < len(attention.args) else attention.kwargs.get("dropout_p", 0.0)
    )
    return bool(given != 0.0)


def makes_sparse(graph: fx.Graph) -> bool:
    """Tell whether a graph makes a sparse tensor: Inductor does not see that it still holds its values' memory."""
    values = (node.meta.get("val") for node in graph.nodes)
    return any(isinstance(value, torch.Tensor) and value.layout is not torch.strided for value in values)


def is_tagged(node: fx.Node) -> bool:
    """Tell whether a checkpoint says that the backward pass computes a node again."""
    return node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def is_again(node: fx.Node) -> bool:
    """Tell whether the backward pass computes a node again because a checkpoint says so."""
    return bool(node.meta.get(IS_AGAIN))


def is_checkpointed(graph: fx.Graph) -> bool:
    """Tell whether checkpoints say what the partitioner lets the backward pass compute again."""
    return any(map(is_tagged, graph.nodes))


def packet(target: Any) -> Any:
    """Return an operation without its overload."""
    return getattr(target, "overloadpacket", target)


def mutates(node: fx.Node) -> bool:
    """Tell whether a node writes to an operand, or may: what is no operator of PyTorch's."""
    schema = getattr(node.target, "_schema", None)
    return not isinstance(node.target, torch._ops.OpOverload) or bool(schema and schema.is_mutable)


def written_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands that a node which :func:`mutates` writes to, or may."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes
    values = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    values |= node.kwargs
    named = [
        values.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    return [value for value in pytree.tree_leaves(named) if isinstance(value, fx.Node)]


def is_view(node: fx.Node) -> bool:
    """Tell whether a node's result shares memory with an operand, or may."""
    return bool(getattr(node.target, "is_view", True))


def is_recomputable(node: fx.Node) -> bool:
    """Tell whether Inductor computes the node again in a fused kernel at the cost of reading its inputs."""
    return is_pointwise(node) or node.target in FORMS | GATHERS or (node.target is operator.getitem)


def is_loop(node: fx.Node) -> bool:
    """Tell whether Inductor writes the loop that computes the node, and so may fuse it with others."""
    return reduces(node) or is_recomputable(node) or node.target in _LOOPS


def reduces(node: fx.Node) -> bool:
    """Tell whether a node computes each element from many elements of its operand."""
    return getattr(torch.Tag, "reduction", None) in getattr(node.target, "tags", ())


def is_derivable(node: fx.Node) -> bool:
    """Tell whether the node's operands suffice to compute it again: not so for one of several results."""
    return is_recomputable(node) and node.target is not operator.getitem


def is_zero(value: Any) -> bool:
    """Tell whether an argument, a number or a constant tensor, is zero."""
    if isinstance(value, fx.Node):
        return value.target in FILLS and is_zero(value.args[FILLS[value.target]])
    return isinstance(value, int | float) and value == 0


def content_of(node: fx.Node, forms: Set[Any] = FORMS) -> fx.Node:
    """Return what a view, copy or cast is a form of."""
    while node.target in forms and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def same_content(node: fx.Node) -> set[fx.Node]:
    """Return the nodes that hold what `node` holds: what it is a view, copy or cast of, and those of that."""
    source = content_of(node)
    found, stack = {source}, [source]
    while stack:
        for user in stack.pop().users:
            if user.target in FORMS and user not in found:
                found.add(user)
                stack.append(user)
    return found


def is_symbolic(value: Any) -> bool:
    """Tell whether a value is a symbolic number."""
    return isinstance(value, py_sym_types)


def tensor_operands(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the inputs of a node whose values are tensors (or tuples of them)."""
    for arg in node.all_input_nodes:
        value = arg.meta.get("val")
        if isinstance(value, torch.Tensor | tuple | list):
            yield arg
