"""Decide which rows are sampled, and where: one site for each residual that products share."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from ..analyse.annotations import Annotations
from ..analyse.products import Analysis, InputGradient, Product, rows_first
from ..analyse.zero_rows import zero_rows
from ..graph.operations import aten, makes_sparse
from ..graph.torch_api import is_unbacked
from ..joint import Joint
from ..maths.estimators import PROJECTIONS
from ..maths.observer import RATIOS
from ..policy import Policy, Sampling
from .at_hand import available_in_backward
from .modes import MODES
from .plan import Encoding, Plan, Site

BY_BUDGET = "all rows, by the noise budget"
"""Why the rows of a product are not sampled whose noise is measured."""


def plan_rows(joint: Joint) -> None:
    """Choose sampling and placement for every weight-gradient product."""
    joint.plan = make_plan(joint.analysis, joint.graph, joint.policy, joint.annotations)


def make_plan(analysis: Analysis, graph: fx.Graph, policy: Policy, annotations: Annotations) -> Plan:
    """Return the sites, and the products that stay exact, of a joint graph."""
    wanted: list[tuple[Product, Sampling]] = []
    observed: list[tuple[Product, Sampling]] = []
    exact: list[tuple[Product, str]] = []
    sparse = (
        "the graph makes a sparse tensor, whose memory Inductor may use again"
        if makes_sparse(graph)
        else None
    )
    for product in analysis.products:
        sampling = policy.sampling(product.module)
        if sampling is not None and product.offsets is not None:
            sampling = dataclasses.replace(sampling, center=False)  # each group has a mean of its own
        reason = sparse or reason_for_exact(product, sampling)
        if reason is None:
            assert sampling is not None
            wanted.append((product, sampling))
            continue
        if policy.has_budget(product.module) and not sparse and is_matrix_product(product):
            assert sampling is not None
            if reason_for_exact(product, dataclasses.replace(sampling, ratio=RATIOS[0])) is None:
                observed.append((product, sampling))
                reason = BY_BUDGET
        exact.append((product, reason))
    return Plan(
        _sites(wanted, analysis, graph, annotations),
        tuple(exact),
        observed=_sites(observed, analysis, graph, annotations),
    )


def _sites(
    wanted: Sequence[tuple[Product, Sampling]], analysis: Analysis, graph: fx.Graph, annotations: Annotations
) -> tuple[Site, ...]:
    """Return where and how products are sampled, together where they share a draw."""
    at_hand = available_in_backward(analysis, graph, {product.node for product, _ in wanted})
    sites: list[Site] = []
    order = {product.node: i for i, product in enumerate(analysis.products)}
    zero = zero_rows(graph, analysis.tangent)
    calls = Counter(product.module for product in analysis.products)
    for product, sampling in wanted:
        available = analysis.numbers[product.x] in at_hand or MODES[sampling.residuals].lossy
        placement = sampling.placement
        if placement == "auto":
            placement = "backward" if available else "forward"
        encoding: Encoding = "rows" if placement == "forward" and not available else "exact"
        site = Site((product,), sampling, placement, encoding, sampling.kept(product.rows))
        if placement == "forward" and product.x.meta["val"].dim() == 2 and product.offsets is None:
            gradient, transposed = rows_first(product.node, product.tangent_side)
            known = zero.get(gradient, ()) if not transposed else ()
            mask = annotations.mask(product.x, product.rows, known)
            state = annotations.states.get(product.module) if calls[product.module] == 1 else None
            site = dataclasses.replace(site, mask=mask, state=state)
        shared = next((i for i, other in enumerate(sites) if _share_a_draw(other, site, order)), None)
        if shared is None:
            sites.append(site)
        else:
            sites[shared] = dataclasses.replace(sites[shared], products=(*sites[shared].products, product))
    return tuple(sites)


def is_matrix_product(product: Product) -> bool:
    """Tell whether a product is one of two matrices, the only kind whose noise is measured."""
    return product.node.target is aten.mm.default


def reason_for_exact(product: Product, sampling: Sampling | None) -> str | None:
    """Return why the rows of a product are not sampled; None where they are."""
    if sampling is None:
        return "excluded by the policy"
    if sampling.ratio == 1.0:
        return "ratio 1.0"
    if product.node.meta["val"].is_complex() or product.x.meta["val"].is_complex():
        return "complex numbers"
    if (reason := reason_by_size(product)) is not None:
        return reason
    if product.offsets is not None and sampling.estimator in PROJECTIONS:
        return "combinations of rows would mix those of several experts"
    features = product.node.meta["val"].shape[-1 - product.tangent_side]  # of X: the side that is not dY's
    if isinstance(features, int) and features < sampling.min_features:
        return f"{features} features, fewer than min_features"
    rows = product.rows
    if isinstance(rows, torch.SymInt):
        return None  # k is bounded by the rows at run time
    if sampling.kept(rows) >= rows:
        return f"{rows} rows, no more than min_rows or ceil(ratio rows)"
    return None


def reason_by_size(product: Product | InputGradient) -> str | None:
    """Return why a product is left as it is whatever the policy says, because of its sizes; None where it is not."""
    if is_unbacked(product.rows):
        return "as many rows as the data says, unknown when it is compiled"
    shapes = (*product.node.meta["val"].shape, *product.x.meta["val"].shape)
    if any(isinstance(size, int) and size == 0 for size in shapes):
        return "nothing to multiply"
    return None


def _share_a_draw(site: Site, other: Site, order: dict[fx.Node, int]) -> bool:
    """Tell whether two sites read one residual and may be merged.

    A draw in the backward pass waits for the gradients of all its products. It is shared by products
    that follow each other (q, k, v; gate and up), not by those of different layers, whose gradients
    would have to be held until the last.
    """
    last, first = site.products[-1], other.products[0]
    same = last.residual == first.residual and site.sampling == other.sampling
    same &= last.offsets is first.offsets
    adjacent = order[first.node] == order[last.node] + 1
    # A row that is proven to have no gradient in one product may have one in another.
    return same and site.mask == other.mask and (site.placement == "forward" or adjacent)
