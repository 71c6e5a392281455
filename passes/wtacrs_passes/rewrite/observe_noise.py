"""Let the backward pass measure the noise of weight gradients that have a noise budget.

Before::

    dW = mm(permute(dY), X)

After::

    handle = observed_step()                          # in the forward pass; stored
    observe(handle, X, [dY], [], None, center, modules)
    dW = mm(permute(dY), X)

Products that would share a draw are measured together. Where rows are drawn, drawn rows are given in the place of X and
dY, with the weights that they were drawn by. In a step that is not measured the operation does nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from ..decide.plan import Site
from ..decide.rows import is_matrix_product
from ..graph.edit import Editor
from ..joint import Joint
from ..maths import ops
from .sample_rows import SampledSite, factor_of_rows


def observe_noise(joint: Joint) -> None:
    """Insert the measurements of the plan's observed products, and of sampled sites under a budget."""
    sampled = [built for built in joint.sites if _has_budget(joint, built)]
    if not joint.plan.observed and not sampled:
        return
    editor = Editor(joint.graph)
    places = {node: place for place, node in enumerate(joint.graph.nodes)}
    first = next(node for node in joint.graph.nodes if node.op != "placeholder")
    with editor.before(first):
        handle = editor.call(ops.observed_step)
    joint.observed = [handle]
    for site in joint.plan.observed:
        nodes = [joint.products[product.node] for product in site.products]
        with editor.before(max(nodes, key=places.__getitem__)):
            _observe(editor, site, nodes, handle, [], None)
    for built in sampled:
        norms = list(built.draw.args[0])  # type: ignore[arg-type]
        indices = next(
            user for user in built.draw.users if user.args[1] == 0 and user.target is operator.getitem
        )
        nodes = [joint.products[product.node] for product in built.site.products]
        with editor.before(max(nodes, key=places.__getitem__)):
            _observe(editor, built.site, nodes, handle, norms, indices)


def _has_budget(joint: Joint, built: SampledSite) -> bool:
    products = built.site.products
    return all(is_matrix_product(p) and joint.policy.has_budget(p.module) for p in products)


def _observe(
    editor: Editor,
    site: Site,
    nodes: Sequence[fx.Node],
    handle: fx.Node,
    norms: list[fx.Node],
    indices: fx.Node | None,
) -> None:
    sides = [product.tangent_side for product in site.products]
    x = factor_of_rows(editor, nodes[0], 1 - sides[0])
    dys = [factor_of_rows(editor, node, side) for node, side in zip(nodes, sides, strict=True)]
    modules = "|".join(product.module for product in site.products)
    call = editor.call(ops.observe, handle, x, dys, norms, indices, site.sampling.center, modules)
    call.meta["partitioner_tag"] = "is_backward"  # else the partitioner takes a mutation for the forward's
