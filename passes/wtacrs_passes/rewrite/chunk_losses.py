"""Compute a loss over a vocabulary, and its gradients, for a few rows at a time.

Before, with h ``[rows, features]`` and logits ``[rows, words]``, both passes hold several tensors like the logits::

    logits = mm(h, W^T); losses = f(logits, labels)                       # forward pass
    dlogits = g(logits, labels) * t; dh = mm(dlogits, W); dW = mm(dlogits^T, h)      # backward pass

After::

    losses, dh, dW = in_chunks("h, labels, W -> losses, dh, dW for t = 1", [h, labels], [W])   # forward pass
    dh = dh * t; dW = dW * t                                              # backward pass

Nothing is computed twice. dW is summed in float32; it waits for the backward pass in the dtype that it has there; an
estimate of it, which has noise of its own, in 8 bits, rounded at random so that it stays unbiased. Where the products
are in 8 bits dlogits are rounded once for both, with one scale for a chunk, and W once for all chunks.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..analyse.losses import (
    HEADS,
    INDEXED,
    MEANS,
    REDUCTIONS,
    SAME_ORDER,
    Result,
    WideLoss,
    find_wide_losses,
    is_transpose,
    leading,
    shape_of,
)
from ..analyse.products import InputGradient, Product, analyse
from ..decide.modes import MODES
from ..decide.precision import AT_RANDOM, choose_precision
from ..decide.rows import reason_for_exact
from ..graph.edit import Editor, output_of, sort_by_place
from ..graph.names import module_path
from ..graph.operations import (
    CASTS,
    GEMMS,
    IS_PRODUCT,
    aten,
    content_of,
    is_pointwise,
    is_zero,
    makes_sparse,
    prims,
    same_content,
)
from ..graph.torch_api import statically_known_true
from ..joint import Joint
from ..maths import estimators, low_precision, ops
from ..maths.low_precision import MOST_ROWS
from ..policy import Policy, Precision, Sampling
from .round_products import round_factor

_FEWEST = 16
"""Rows of a chunk, at least: products of fewer read a whole weight for next to nothing."""
_CHUNK_BYTES = 2**26
"""Of the logits of a chunk, where the policy does not say: on a CPU, what a loop over them reads from its caches."""


@dataclasses.dataclass(frozen=True)
class ChunkedLoss:
    """A loss that is computed in chunks.

    Attributes:
        chunk: rows at a time.
        module: path of the head.
        rows: N.
        words: the length of a row of logits.
        sampling: how rows are sampled in the sampled products, if any are.
        products: the weight-gradient products that are made there, with the names of what holds them until the
            backward pass, for a tangent of one, and why they are exact, if they are.
        stored: what waits for the backward pass as it is: gradients that are made there.
        estimates: those of them that are made from sampled rows or rounded at random; the plan says how they are
            stored.
        precision: that of the products, with the reason where it is not what the policy says.
        inputs: modules of the gradients of inputs that are made there and for which the policy names a precision, with
            that precision and why it is exact, if it is.
    """

    chunk: int
    module: str
    rows: Any
    words: int
    sampling: Sampling | None
    products: tuple[tuple[Product, frozenset[str], str], ...]
    stored: tuple[fx.Node, ...]
    estimates: tuple[fx.Node, ...]
    precision: str
    inputs: tuple[tuple[str, Precision, str], ...]

    @property
    def kept(self) -> Any:
        """The rows that are sampled, of all chunks."""
        assert self.sampling is not None
        whole, rest = self.rows // self.chunk, self.rows % self.chunk
        return whole * self.sampling.kept(self.chunk) + self.sampling.kept(rest)


def chunk_losses(joint: Joint) -> None:
    """Rewrite each loss over a vocabulary whose logits are larger than the policy allows."""
    smallest = logits_to_chunk(joint)
    if smallest is None:
        return
    losses, joint.whole_losses = find_wide_losses(joint.graph, smallest)
    if not losses:
        return
    products = {
        product.node: product for product in analyse(joint.graph, joint.names, lambda module: False).products
    }
    editor = Editor(joint.graph)
    places = {node: place for place, node in enumerate(joint.graph.nodes)}
    for loss in losses:
        first = min(places[result.node] for result in loss.results)
        joint.losses.append(_rewrite(editor, loss, products, joint.policy))
        places |= dict.fromkeys((node for node in joint.graph.nodes if node not in places), first)
    sort_by_place(joint.graph, places)
    joint.graph.eliminate_dead_code()


def logits_to_chunk(joint: Joint) -> int | None:
    """Return the bytes above which logits are computed in chunks; None where all are computed at once."""
    size = joint.policy.chunk_bytes
    if size == 0 or not MODES[joint.policy.residuals].lossy or makes_sparse(joint.graph):
        return None  # sums over chunks are rounded in another order; Inductor may use a sparse tensor's memory again
    return _CHUNK_BYTES if size is None else size


def chunk_of(size: int | None, loss: WideLoss, sampled: bool) -> int:
    """Return the rows of a chunk, see `Policy.chunk_bytes`: a power of two, so that most batches divide.

    Args:
        sampled: rows of the weight's gradient are; those of several chunks wait for a common product.
    """
    rows: int = max((_CHUNK_BYTES if size is None else size) // (4 * loss.words), _FEWEST)
    if size is None and loss.head.meta["val"].device.type != "cpu":
        rows = max(rows, loss.features // 2 if sampled else loss.features)
    return 1 << (rows.bit_length() - 1)


def _rewrite(
    editor: Editor, loss: WideLoss, products: Mapping[fx.Node, Product], policy: Policy
) -> ChunkedLoss:
    reasons = {
        result.node: reason_for_exact(products[result.node], policy.sampling(products[result.node].module))
        for result in loss.results
        if result.node in products
    }
    sampled = [node for node, reason in reasons.items() if reason is None]
    sampling = policy.sampling(products[sampled[0]].module) if sampled else None
    chunk = chunk_of(policy.chunk_bytes, loss, bool(sampled))
    inputs = _input_precisions(loss, policy)
    rounded = {node: way for node, (way, _) in inputs.items() if way != "exact"}
    precision, why_not = _precision(loss, products, policy, "int8" in rounded.values())
    for node in sampled:
        if policy.sampling(products[node].module) != sampling:
            reasons[node] = "made with another product that is sampled in another way"
    kinds = {
        result.node: "sampled" if reasons.get(result.node, "") is None else result.kind
        for result in loss.results
    }
    if precision == "int8":
        kinds |= {node: "codes" for node, kind in kinds.items() if kind == "product"}
    body = _Body(loss, kinds, rounded)
    with editor.before(output_of(editor.graph)):
        at_one = _at_one(editor, loss)
        rowwise = [_flat(editor, at_one.get(node, node), loss.rows) for node in loss.rowwise]
        shared = [at_one.get(node, node) for node in loss.shared]
        if body.rounds:
            device = loss.head.meta["val"].device
            rowwise.append(editor.noise([editor.size(loss.head, 0)], device, "forward"))
            shared.append(editor.noise([loss.words], device, "forward"))
        for node, way in rounded.items():
            shared += _weight_in(editor, node, way)
        how = _noise_and_share(editor, loss, chunk, sampling)
        draws = _draws(editor, loss, chunk) if precision in AT_RANDOM else []
        call = editor.call(
            ops.in_chunks,
            body.source,
            list(kinds.values()),
            rowwise,
            shared,
            chunk,
            *how,
            precision,
            draws,
            False,
        )
        made, stored, estimates = [], list[fx.Node](), list[fx.Node]()
        for i, result in enumerate(loss.results):
            part = editor.call(operator.getitem, call, i)
            part.meta[IS_PRODUCT] = result.node.target in GEMMS
            if (stack := loss.head.meta.get("nn_module_stack")) is not None:
                part.meta["nn_module_stack"] = stack
            is_estimate = kinds[result.node] == "sampled" or (
                result.node in products and precision in AT_RANDOM
            )
            if not is_estimate:
                part = editor.cast_like(part, result.node)
            value = editor.call(aten.permute.default, part, [1, 0]) if result.transposed else part
            value = _shaped(editor, _mean(editor, value, result), result.node)
            if result.scaled:
                (estimates if is_estimate else stored).append(part)
                value = editor.call(aten.mul.Tensor, value, loss.tangent)
            value = editor.cast_like(value, result.node)
            value.meta = {**result.node.meta, "val": value.meta["val"]}
            result.node.replace_all_uses_with(value)
            if result.node in products:
                names = frozenset(node.name for node in same_content(part))
                made.append((products[result.node], names, reasons[result.node] or ""))
    module = module_path(loss.head) or ""
    shown = f"exact: {why_not}" if why_not else precision
    return ChunkedLoss(
        chunk, module, loss.rows, loss.words, sampling, tuple(made), tuple(stored), tuple(estimates), shown,
        tuple((module_path(node) or module, *choice) for node, choice in inputs.items()),
    )  # fmt: skip


def _precision(
    loss: WideLoss, products: Mapping[fx.Node, Product], policy: Policy, has_codes: bool
) -> tuple[Precision, str]:
    """Return the precision of the products, and why it is not what the policy says; empty where it is.

    Args:
        has_codes: dlogits are in 8 bits anyway, so that a product of all rows is faster with them.
    """
    made = [products[result.node] for result in loss.results if result.node in products]
    samplings = [policy.sampling(product.module) for product in made]
    wanted = {sampling.product if sampling else "exact" for sampling in samplings}
    if wanted <= {"exact"}:
        return "exact", ""
    if any(result.kind == "product" and result.node not in products for result in loss.results):
        return "exact", "made with a product whose error would reach other gradients"
    apart: tuple[Precision, str] = (
        "exact",
        "made with another product that is multiplied in another precision",
    )
    if len(wanted) > 1:
        return apart
    chosen = [
        choose_precision(p, s, "int8" if has_codes and s.product == "auto" and s.ratio == 1.0 else s.product)
        for p, s in zip(made, samplings, strict=True)
        if s is not None
    ]
    exact = [choice for choice in chosen if choice[0] == "exact"]
    return next(iter(exact), chosen[0] if len(set(chosen)) == 1 else apart)


def _input_precisions(loss: WideLoss, policy: Policy) -> dict[fx.Node, tuple[Precision, str]]:
    """Return the gradients of inputs that the policy wants in fewer bits, with their precision and why it is exact."""
    found: dict[fx.Node, tuple[Precision, str]] = {}
    for node in _input_products(loss):
        module = module_path(node) or module_path(loss.head) or ""
        asked, sampling = policy.asked(module), policy.sampling(module)
        if asked is None or sampling is None:
            continue
        wanted = asked.product_dx or sampling.product
        if wanted == "exact":
            continue
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        if asked.product_dx is None and loss.words * loss.features > (policy.chunk_bytes or _CHUNK_BYTES):
            found[node] = "exact", "codes of the weight would take more memory than the logits of a chunk"
        elif wanted == "float8":
            found[node] = "exact", "a loss in chunks has no such product"
        elif loss.words > MOST_ROWS:
            found[node] = "exact", f"sums of 32 bits hold {MOST_ROWS} products, fewer than words"
        elif loss.head.meta["val"].is_cuda and not statically_known_true(loss.rows % _FEWEST_ON_GPU == 0):
            found[node] = (
                "exact",
                f"{loss.rows} rows: on a GPU a number that {_FEWEST_ON_GPU} divides is needed",
            )
        else:
            found[node] = choose_precision(InputGradient(node, module, weight, loss.words), sampling, wanted)
    return found


_FEWEST_ON_GPU = 32


def _input_products(loss: WideLoss) -> list[fx.Node]:
    """Return the results that are products of rows of what the tangents have made with one matrix."""
    return [
        result.node
        for result in loss.results
        if result.kind == "rows"
        and result.scaled
        and result.node.target is aten.mm.default
        and result.node.args[0] in loss.body
        and result.node.args[1] in loss.shared
    ]


def _weight_in(editor: Editor, product: fx.Node, precision: Precision) -> tuple[fx.Node, ...]:
    """Return the weight of a product in fewer bits: for ``int8`` codes and scales."""
    weight = product.args[1]
    assert isinstance(weight, fx.Node)
    if precision == "int8":
        codes, scales = round_factor(editor, weight, precision, "forward")
        if codes.meta["val"].device.type != "cpu":
            [codes] = editor.trace(low_precision.columns_first, codes)
        return codes, scales
    return (editor.call(prims.convert_element_type.default, weight, torch.bfloat16),)


def _draws(editor: Editor, loss: WideLoss, chunk: int) -> list[fx.Node]:
    """Return the random numbers of rows and columns; a chunk may have its mean row more."""
    rows: Any = editor.size(loss.head, 0)
    if isinstance(rows, fx.Node):
        rows = editor.call(
            operator.add, rows, editor.call(operator.add, editor.call(operator.floordiv, rows, chunk), 1)
        )
    else:
        rows += rows // chunk + 1
    device = loss.head.meta["val"].device
    return [editor.noise(size, device, "forward") for size in ([2, rows], [loss.words + loss.features])]


def _noise_and_share(
    editor: Editor, loss: WideLoss, chunk: int, sampling: Sampling | None
) -> tuple[fx.Node | None, list[int], str, bool]:
    """Return the arguments of ``in_chunks`` that say how rows are sampled."""
    if sampling is None:
        return None, [], "", False
    chunks: Any = editor.size(loss.head, 0)
    if isinstance(chunks, fx.Node):
        chunks = editor.call(operator.floordiv, editor.call(operator.add, chunks, chunk - 1), chunk)
    else:
        chunks = -(-chunks // chunk)
    noise = editor.noise([chunks, estimators.NOISE], loss.head.meta["val"].device, "forward")
    share = sampling.share
    return noise, [share.numerator, share.denominator, sampling.min_rows], sampling.estimator, sampling.center


def _at_one(editor: Editor, loss: WideLoss) -> dict[fx.Node, fx.Node]:
    """Insert what the rows read of the tangent, for a tangent of one."""
    value = loss.tangent.meta["val"]
    new = {loss.tangent: editor.call(aten.full.default, [], 1.0, dtype=value.dtype, device=value.device)}
    for node in loss.prefix:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: new.get(arg, arg))
        new[node] = editor.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
    return new


def _flat(editor: Editor, node: fx.Node, rows: Any) -> fx.Node:
    """Return a tensor with its rows in one dimension."""
    shape = shape_of(node) or ()
    lead = leading(shape, rows)
    assert lead is not None
    if lead == 1:
        return node
    return editor.call(aten.reshape.default, node, [-1, *shape[lead:]])


def _mean(editor: Editor, total: fx.Node, result: Result) -> fx.Node:
    """Divide the sum that stands for a mean over the rows by the number of what is summed."""
    node = result.node
    if node.target not in MEANS or result.kind != "sum":
        return total
    for operand, sign in ((node, 1), (node.args[0], -1)):
        for dim in range(len(shape_of(operand) or ())):  # type: ignore[arg-type]
            size = editor.size(operand, dim)  # type: ignore[arg-type]
            total = editor.call(aten.mul.Tensor if sign > 0 else aten.div.Tensor, total, size)
    return total


def _shaped(editor: Editor, node: fx.Node, like: fx.Node) -> fx.Node:
    """Return a result in the shape that the graph reads it in."""
    value = like.meta["val"]
    if tuple(node.meta["val"].shape) == tuple(value.shape):
        return node
    return editor.call(aten.reshape.default, node, [editor.size(like, d) for d in range(value.dim())])


class _Body:
    """The function of one chunk: the same operations, with one dimension for the rows.

    Args:
        kinds: of the results.
        rounded: gradients of inputs, with the precision in which they are multiplied.

    Attributes:
        source: ``def body(rows, *rowwise, *shared)``, see :func:`chunks.in_chunks`; the last of `shared` are, for each
            of `rounded`, its weight in that precision.
        rounds: something is rounded at random: the last of `rowwise` are random numbers of rows, and behind those of
            `shared` that the loss has, of words.
    """

    def __init__(
        self, loss: WideLoss, kinds: Mapping[fx.Node, str], rounded: Mapping[fx.Node, Precision]
    ) -> None:
        self.loss = loss
        self.rounds = "int8" in rounded.values() or "codes" in kinds.values()
        self.graph = fx.Graph()
        self._tracer = fx.proxy.GraphAppendingTracer(self.graph)
        self.rows = self.graph.placeholder("rows")
        self.new: dict[fx.Node, fx.Node] = {}
        self._codes: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self._draws: list[fx.Node] = []
        for nodes, name in ((loss.rowwise, "of_rows"), (loss.shared, "of_words")):
            for node in nodes:
                self.new[node] = self.graph.placeholder(node.name)
            if self.rounds:
                self._draws.append(self.graph.placeholder(name))
        weights = {
            node: [
                self.graph.placeholder(f"{part}_{i}")
                for part in (("codes", "scales") if way == "int8" else ("weight",))
            ]
            for i, (node, way) in enumerate(rounded.items())
        }
        products = {result.node for result in loss.results if result.kind == "product"}
        for node in loss.body:
            if node in weights:
                self.new[node] = self._rounded(node, weights[node])
            elif node not in products and not is_transpose(node):
                self.new[node] = self._chunk(node)
        outputs: list[fx.Node] = []
        for result in loss.results:
            if kinds[result.node] == "codes":
                outputs += [*self._codes_of(result.factors[0]), self.new[result.factors[1]]]
            elif result.kind == "product":
                outputs += [self.new[factor] for factor in result.factors]
                if kinds[result.node] == "sampled":
                    dtype = torch.promote_types(result.factors[0].meta["val"].dtype, torch.float32)
                    rows: Any = self._proxy(outputs[-2])
                    norms: Any = ops.norms_as_sums([rows], None, dtype)
                    outputs.append(norms.node)
            else:
                outputs.append(self.new[result.node])
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code()
        code = self.graph.python_code("self")
        self.source = code.src.replace("def forward(self, ", "def body(")

    def _codes_of(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Return the codes of what was computed, and their scale."""
        if node not in self._codes:
            codes: Any = low_precision.round_whole(*map(self._proxy, (self.new[node], *self._draws)))
            self._codes[node] = codes[0].node, codes[1].node
        return self._codes[node]

    def _rounded(self, node: fx.Node, weight: Sequence[fx.Node]) -> fx.Node:
        """Return a product with a weight in fewer bits."""
        dtype, factor = node.meta["val"].dtype, node.args[0]
        assert isinstance(factor, fx.Node)
        product: Any
        if len(weight) == 1:
            narrow = self._proxy(self.new[factor]).to(torch.bfloat16)
            product = torch.mm(narrow, self._proxy(weight[0])).to(dtype)
        else:
            codes, scale, codes_of_weight, scales = map(self._proxy, (*self._codes_of(factor), *weight))
            product = low_precision.multiply_rows(codes, scale, codes_of_weight, scales, dtype)
        made: fx.Node = product.node
        return made

    def _proxy(self, node: fx.Node) -> Any:
        """Return what lets plain torch add operations to the graph."""
        return fx.Proxy(node, self._tracer)

    def _lead(self, node: fx.Node) -> int:
        lead = leading(shape_of(node) or (), self.loss.rows)
        assert lead is not None
        return lead

    def _trailing(self, node: fx.Node) -> tuple[Any, ...]:
        return (shape_of(node) or ())[self._lead(node) :]

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _chunk(self, node: fx.Node) -> fx.Node:
        """Return a node of the body that computes rows of `node`."""
        args = [self.new.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
        if node.target in SAME_ORDER:
            return self._call(aten.reshape.default, args[0], [self.rows, *self._trailing(node)])
        if node.target is aten.full.default:
            return self._call(node.target, [self.rows, *self._trailing(node)], args[1], **node.kwargs)
        if node.target is aten.expand.default:
            spread = self._operand(node.args[0], node)  # type: ignore[arg-type]
            return self._call(node.target, spread, [self.rows, *self._trailing(node)])
        if node.target in HEADS or node.target in CASTS:
            return self._call(node.target, *args, **node.kwargs)
        if is_pointwise(node):
            args = [self._operand(arg, node) if isinstance(arg, fx.Node) else arg for arg in node.args]
            return self._call(node.target, *args, **node.kwargs)
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        if node.target in INDEXED:
            dim = self._moved([args[1]], operand)[0]
            return self._call(node.target, args[0], dim, *args[2:], **node.kwargs)
        one_hot = sum_of_one_hot(node)
        if one_hot is not None:
            return self._sum_of_one_hot(node, *one_hot)
        if any(result.node is node and result.kind == "sum" for result in self.loss.results):
            return self._sum(node, operand, args[0])
        assert node.target in REDUCTIONS, node.target
        dims = args[1] if isinstance(args[1], list | tuple) else [args[1]]
        moved = self._moved(dims, operand)
        return self._call(
            node.target,
            args[0],
            moved if isinstance(args[1], list | tuple) else moved[0],
            *args[2:],
            **node.kwargs,
        )

    def _sum_of_one_hot(
        self, node: fx.Node, index: fx.Node, words: int, value: Any, factor: fx.Node
    ) -> fx.Node:
        """Return ``value * factor`` in the rows whose index is a word, zero in others."""
        value = self.new[value] if isinstance(value, fx.Node) else value
        product = self._call(aten.mul.Tensor, self.new[factor], value)
        known = self._call(
            aten.logical_and.default,
            self._call(aten.ge.Scalar, self.new[index], 0),
            self._call(aten.lt.Scalar, self.new[index], words),
        )
        total = self._call(aten.mul.Tensor, product, known)
        return self._call(aten.reshape.default, total, [self.rows, *self._trailing(node)])

    def _moved(self, dims: Sequence[Any], operand: fx.Node) -> list[int]:
        """Return trailing dimensions of an operand as those of its chunk."""
        rank, lead = len(shape_of(operand) or ()), self._lead(operand)
        return [dim % rank - lead + 1 for dim in dims]

    def _sum(self, node: fx.Node, operand: fx.Node, chunk: Any) -> fx.Node:
        """Return the sum over the rows, and over the other dimensions that `node` sums over."""
        rank, lead = len(shape_of(operand) or ()), self._lead(operand)
        dims = (node.args[1:2] or [None])[0] or range(rank)
        moved = [0, *(dim - lead + 1 for dim in sorted(d % rank for d in dims) if dim >= lead)]  # type: ignore
        return self._call(aten.sum.dim_IntList, chunk, moved, **node.kwargs)

    def _operand(self, arg: fx.Node, node: fx.Node) -> fx.Node:
        """Return an operand that is broadcast: its rows, or, where it has none, without their dimensions."""
        new = self.new[arg]
        if not isinstance(arg.meta.get("val"), Tensor) or arg not in self.loss.shared:
            return new
        trailing, shape = self._trailing(node), shape_of(arg) or ()
        if len(shape) <= 1 + len(trailing):
            return new
        return self._call(aten.reshape.default, new, list(shape[len(shape) - len(trailing) :]))


def sum_of_one_hot(node: fx.Node) -> tuple[fx.Node, int, Any, fx.Node] | None:
    """Return `(index, words, value, factor)` where a node is ``sum(one_hot * factor, -1)``.

    The gradient of a log-softmax asks for it. With one factor a row it is ``value * factor`` where the index is a word.
    """
    if node.target is not aten.sum.dim_IntList:
        return None
    product, dims = node.args[:2]
    rank = len(shape_of(product) or ())  # type: ignore[arg-type]
    if product.target is not aten.mul.Tensor or [d % rank for d in dims] != [rank - 1]:  # type: ignore
        return None
    for one_hot, factor in (product.args[:2], product.args[1::-1]):  # type: ignore[union-attr]
        found = _one_hot(one_hot)
        if found is not None and isinstance(factor, fx.Node) and (shape_of(factor) or (0,))[-1] == 1:
            return *found, factor
    return None


def _one_hot(node: Any) -> tuple[fx.Node, int, Any] | None:
    """Return `(index, words, value)` of a tensor that holds `value` at the index of each row, and zeros."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.scatter.value:
        zero, dim, index, value = node.args[:4]
        shape, narrow = shape_of(node) or (), shape_of(index) or (0,)  # type: ignore[arg-type]
        last = dim % len(shape) == len(shape) - 1  # type: ignore[operator]
        return (index, shape[-1], value) if is_zero(zero) and last and narrow[-1] == 1 else None  # type: ignore
    if node.target is not aten.where.self or not is_zero(node.args[2]):
        return None
    equal, value = node.args[:2]
    if equal.target is not aten.eq.Tensor or len(shape_of(value) or ()) > 0:  # type: ignore
        return None
    left, right = (content_of(side, {aten.expand.default}) for side in equal.args)  # type: ignore
    for counter, index in ((left, right), (right, left)):
        words = _counts_to(counter)
        whole = not index.meta["val"].is_floating_point()
        if words is not None and whole and (shape_of(index) or (0,))[-1] == 1:
            return index, words, value
    return None


def _counts_to(node: fx.Node) -> int | None:
    """Return the length of a tensor that is 0, 1, 2, ... along its last dimension, and has no other."""
    source, shape = content_of(node, SAME_ORDER), shape_of(node) or ()
    if source.target is not prims.iota.default or source.kwargs["start"] != 0 or source.kwargs["step"] != 1:
        return None
    length = source.args[0]
    return length if isinstance(length, int) and length > 1 and shape[-1] == length else None
