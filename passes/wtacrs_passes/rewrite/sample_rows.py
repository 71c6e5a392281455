"""Rewrite weight-gradient products to read k sampled, rescaled rows.

Before::

    dW = mm(permute(dY), X)

After, with placement ``forward`` (the first three lines run in the forward pass)::

    weights = norm(X)
    indices, scales = choose_rows([weights], rand(...), k)
    rows = index(X, indices) * scales                         # stored instead of X
    dW = mm(permute(index(dY, indices) + 0 * sum(dY)), rows)

After, with placement ``backward`` (only the first line runs in the forward pass)::

    norm_x = norm(X)
    indices, scales = choose_rows([norm_x, norm(dY)], rand(...), k)
    dW = mm(permute(index(dY, indices)), index(X, indices) * scales)

Centred, every X is X less a row c, its mean, and ``c^T sum(dY)`` is one row more of the product::

    dW = mm(permute(cat(index(dY, indices), sum(dY))), cat((index(X, indices) - c) * scales, c))

Rows in groups, those of experts, are drawn among all of them, and sorted::

    indices, scales, offsets = sort_rows(*choose_rows(...), offsets)
    dW = grouped_mm(permute(index(dY, indices)), index(X, indices) * scales, offsets)

The estimators of :data:`PROJECTIONS` replace indices and scales by a matrix S that is made again where it
is needed: ``dW = mm(permute(combine_rows(dY, seed)), combine_rows(X, seed))``.

In the forward placement ``gradient_weights(known norms, token mask)`` is a second factor of the weights
where either is known; the backward pass then records the norms of dY and verifies the mask.

Products that share X share the draw; their weights are ``||x_i|| sqrt(sum_j ||dy_ij||^2)``.
In the forward placement ``0 * sum(dY)`` carries NaN and Inf of rows that were not drawn into dW. (In the
backward placement such rows have infinite weights.)

In float16 a scale may take a row of X out of the range of numbers; what would, goes into dY instead.

``row_norms``, ``gather_rows`` and ``append_row`` are abstract here; `spell_operations` writes them for the
device.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from ..analyse.products import Product, rows_first
from ..decide.plan import Site
from ..graph.edit import Editor, sort_by_place
from ..graph.operations import aten, prims
from ..joint import Joint
from ..maths import estimators, experts, ops
from ..maths.estimators import PROJECTIONS

_HALF_SUM = 64.0
"""What a mean row is multiplied with in float16, and the sum of dY divided by: the sum may be large."""


@dataclasses.dataclass
class SampledSite:
    """A carried-out site: the nodes that the partitioner pins and the verifier looks for.

    Attributes:
        draw: the ``choose_rows`` node, or the seed of random combinations; computed in one pass only.
        stored: nodes that must cross from forward to backward.
        rows: the gathered, centred and rescaled rows of X; among `stored` where the encoding is ``rows``.
        stored_names: names of the nodes that hold the full X if they are saved.
    """

    site: Site
    draw: fx.Node
    stored: list[fx.Node]
    rows: fx.Node
    stored_names: frozenset[str]


def sample_rows(joint: Joint) -> None:
    """Build the sites of the plan."""
    if not joint.plan.sites:
        return
    editor = Editor(joint.graph)
    joint.sites = [
        (_combine_site if site.sampling.estimator in PROJECTIONS else _sample_site)(
            editor, site, joint.products
        )
        for site in joint.plan.sites
    ]
    sort_by_place(joint.graph, {node: place for place, node in enumerate(joint.graph.nodes)})
    joint.graph.eliminate_dead_code()


def _sample_site(editor: Editor, site: Site, products: dict[fx.Node, fx.Node]) -> SampledSite:
    last = site.products[-1].node
    stored: list[fx.Node] = []
    with editor.after(_source(site)):
        x = _operand(editor, site.products[0], tangent=False)
        center = _mean_row(editor, x) if site.sampling.center else None
        norms = _norms(editor, site, [x], center)
        if site.placement == "forward":
            weights = [_known_weights(editor, site, norms)] if site.mask or site.state else []
            draw = _draw(editor, site, x, norms, [norms, *weights])
            rows = _rows(editor, x, center, draw)
            stored += draw.stored
        else:
            stored.append(norms)
    if center is not None:
        stored.append(center)
    with editor.before(last):
        dys = [_operand(editor, product, tangent=True) for product in site.products]
        if site.placement == "backward":
            draw = _draw(editor, site, x, norms, [norms, _norms(editor, site, dys)])
            rows = _rows(editor, x, center, draw)
        zero = _observe(editor, site, dys)
        for product, dy in zip(site.products, dys, strict=True):
            scales = () if draw.scales_dy is None else (draw.scales_dy,)
            drawn = editor.call(ops.gather_rows, dy, draw.indices, *scales)
            if center is not None:
                drawn = _append(
                    editor, drawn, _scale_half(editor, _total(editor, dy, zero), 1 / _HALF_SUM, dy)
                )
            elif site.placement == "forward":
                drawn = _carry(editor, drawn, _total(editor, _of_groups(editor, site, dy), None), zero)
            offsets = () if draw.offsets is None else (draw.offsets,)
            products[product.node] = editor.put(
                product.node, _multiply(editor, product, rows, drawn, *offsets)
            )
    if site.encoding == "rows":
        stored.append(rows)
    return SampledSite(site, draw.node, stored, rows, site.products[0].stored_names)


def _norms(editor: Editor, site: Site, operands: list[fx.Node], center: fx.Node | None = None) -> fx.Node:
    """Return the norms of rows, ``[..., rows]``; zero for those of no group."""
    norms = editor.call(ops.row_norms, operands, center)
    offsets = site.products[0].offsets
    return norms if offsets is None else editor.call(ops.in_groups, norms, offsets)


def _of_groups(editor: Editor, site: Site, dy: fx.Node) -> fx.Node:
    """Return dY, with zeros in rows of no group."""
    offsets = site.products[0].offsets
    return dy if offsets is None else editor.trace(experts.without_others, dy, offsets)[0]


def _rows(editor: Editor, x: fx.Node, center: fx.Node | None, draw: _Draw) -> fx.Node:
    """Return the drawn rows of X less `center`, rescaled; `center` is the last of them."""
    rows = editor.call(ops.gather_rows, x, draw.indices, draw.scales_x, center)
    return rows if center is None else _append(editor, rows, _scale_half(editor, center, _HALF_SUM, x))


def _scale_half(editor: Editor, row: fx.Node, factor: float, like: fx.Node) -> fx.Node:
    """Multiply one of the two factors of the mean row's product, in float16 alone."""
    half = like.meta["val"].dtype == torch.float16
    return editor.call(aten.mul.Tensor, row, factor) if half else row


def _combine_site(editor: Editor, site: Site, products: dict[fx.Node, fx.Node]) -> SampledSite:
    """Replace products by those of random combinations of rows, from the same random numbers."""
    with editor.after(_source(site)):
        x = _operand(editor, site.products[0], tangent=False)
        center = _mean_row(editor, x) if site.sampling.center else None
        kept, estimator = _kept(editor, site, editor.size(x, -2)), site.sampling.estimator
        noise = editor.call(aten.mul.Tensor, editor.noise([2], x.meta["val"].device, site.placement), 2**24)
        seed = editor.call(prims.convert_element_type.default, noise, torch.int64)
        rows = editor.call(ops.combine_rows, _subtract(editor, x, center), seed, kept, estimator)
        rows = rows if center is None else _append(editor, rows, _scale_half(editor, center, _HALF_SUM, x))
    stored = [seed]  # made again in the backward pass it would be another one
    if center is not None:
        stored.append(center)
    if site.encoding == "rows":
        stored.append(rows)
    with editor.before(site.products[-1].node):
        for product in site.products:
            dy = _operand(editor, product, tangent=True)
            combined = editor.call(ops.combine_rows, dy, seed, kept, estimator)
            if center is not None:
                combined = _append(
                    editor, combined, _scale_half(editor, _total(editor, dy, None), 1 / _HALF_SUM, dy)
                )
            products[product.node] = editor.put(product.node, _multiply(editor, product, rows, combined))
    return SampledSite(site, seed, stored, rows, site.products[0].stored_names)


def _source(site: Site) -> fx.Node:
    """Return the node in the forward pass that X is, or is a transpose of."""
    product = site.products[0]
    return rows_first(product.node, 1 - product.tangent_side)[0]


def _operand(editor: Editor, product: Product, tangent: bool) -> fx.Node:
    side = product.tangent_side if tangent else 1 - product.tangent_side
    return factor_of_rows(editor, product.node, side)


def factor_of_rows(editor: Editor, node: fx.Node, side: int) -> fx.Node:
    """Return an operand of a product over rows as ``[..., rows, features]``."""
    factor, transposed = rows_first(node, side)
    return _transpose(editor, factor) if transposed else factor


def _transpose(editor: Editor, node: fx.Node) -> fx.Node:
    dims = list(range(node.meta["val"].dim()))
    return editor.call(aten.permute.default, node, [*dims[:-2], dims[-1], dims[-2]])


def _known_weights(editor: Editor, site: Site, norms: fx.Node) -> fx.Node:
    """Return what is known about ``||dy_i||`` in the forward pass: ``[rows]``."""
    known, positions = (site.state.known, _positions(editor, site)) if site.state else (None, 1)
    mask, factor = (site.mask.node, site.mask.factor) if site.mask else (None, 1.0)
    return editor.call(ops.gradient_weights, norms, known, mask, factor, positions)


def _observe(editor: Editor, site: Site, dys: list[fx.Node]) -> fx.Node | None:
    """Remember the norms of dY for the next time, and verify the mask; return the zero of the check."""
    declared = site.mask is not None and site.mask.origin == "declared"
    if site.state is None and not declared:
        return None
    norms = editor.call(ops.row_norms, dys)
    if site.state is not None:
        record = editor.call(ops.record_norms, site.state.fresh, norms, _positions(editor, site))
        record.meta["partitioner_tag"] = (
            "is_backward"  # else the partitioner takes a mutation for the forward's
        )
    return editor.call(ops.require_zero, norms, site.mask.node) if declared and site.mask else None


def _positions(editor: Editor, site: Site) -> Any:
    """Return the tokens of a sample: an int, or a node where it is symbolic."""
    assert site.state is not None
    return editor.size(site.state.x, 1)


def _mean_row(editor: Editor, x: fx.Node) -> fx.Node:
    """Return the mean of the rows, rounded to the dtype of X: ``[..., 1, features]``."""
    return editor.cast_like(editor.call(aten.mean.dim, editor.widen(x), [-2], True), x)


def _subtract(editor: Editor, x: fx.Node, center: fx.Node | None) -> fx.Node:
    if center is None:
        return x
    difference = editor.call(aten.sub.Tensor, editor.widen(x), editor.widen(center))
    return editor.cast_like(difference, x)


def _total(editor: Editor, dy: fx.Node, zero: fx.Node | None) -> fx.Node:
    """Return the sum of all rows of dY: ``[..., 1, features]``.

    Args:
        zero: the result of a check, which has to be read for the check to be made.
    """
    # As autograd writes the gradient of a bias, so that both are one sum.
    total = editor.call(aten.sum.dim_IntList, editor.widen(dy), [dy.meta["val"].dim() - 2], True)
    return total if zero is None else editor.call(aten.add.Tensor, total, zero)


def _carry(editor: Editor, drawn: fx.Node, total: fx.Node, zero: fx.Node | None) -> fx.Node:
    """Let NaN and Inf of any row reach the drawn rows of dY."""
    nothing = editor.call(aten.mul.Tensor, total, 0.0 if zero is None else zero)
    return editor.cast_like(editor.call(aten.add.Tensor, editor.widen(drawn), nothing), drawn)


def _append(editor: Editor, rows: fx.Node, row: fx.Node) -> fx.Node:
    return editor.call(ops.append_row, rows, editor.cast_like(row, rows))


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Drawn rows: indices and scales ``[..., kept]``; no `scales_dy` where X takes them whole; ends of groups."""

    node: fx.Node
    indices: fx.Node
    scales_x: fx.Node
    scales_dy: fx.Node | None
    offsets: fx.Node | None

    @property
    def stored(self) -> list[fx.Node]:
        """What the backward pass needs of a draw in the forward pass."""
        return [n for n in (self.indices, self.scales_x, self.scales_dy, self.offsets) if n is not None]


def _draw(editor: Editor, site: Site, x: fx.Node, norms_x: fx.Node, weights: list[fx.Node]) -> _Draw:
    value = norms_x.meta["val"]
    batch = [editor.size(norms_x, d) for d in range(value.dim() - 1)]
    kept = _kept(editor, site, editor.size(norms_x, -1))
    noise = editor.noise([*batch, estimators.NOISE], value.device, site.placement)
    draw = editor.call(ops.choose_rows, weights, noise, kept, site.sampling.estimator)
    indices, scales = (editor.call(operator.getitem, draw, i) for i in range(2))
    offsets = site.products[0].offsets
    if offsets is not None:
        drawn = editor.call(ops.sort_rows, indices, scales, offsets)
        indices, scales, offsets = (editor.call(operator.getitem, drawn, i) for i in range(3))
    if x.meta["val"].dtype != torch.float16:
        return _Draw(draw, indices, scales, None, offsets)
    scales_x, scales_dy = editor.trace(estimators.split_scales, scales, norms_x, indices)
    return _Draw(draw, indices, scales_x, scales_dy, offsets)


def _kept(editor: Editor, site: Site, rows: Any) -> Any:
    """Write k = min(rows, max(min_rows, ceil(ratio rows))) into the graph where rows is symbolic."""
    if not isinstance(rows, fx.Node):
        return site.kept
    share = site.sampling.share
    wanted = editor.call(operator.mul, rows, share.numerator)
    wanted = editor.call(operator.add, wanted, share.denominator - 1)
    wanted = editor.call(operator.floordiv, wanted, share.denominator)
    wanted = editor.call(torch.sym_max, wanted, site.sampling.min_rows)
    return editor.call(torch.sym_min, wanted, rows)


def _multiply(editor: Editor, product: Product, x: fx.Node, dy: fx.Node, *offsets: fx.Node) -> fx.Node:
    left, right = (dy, x) if product.tangent_side == 0 else (x, dy)
    target = product.node.target
    assert callable(target)
    return editor.call(target, _transpose(editor, left), right, *offsets)
