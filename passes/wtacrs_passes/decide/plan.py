"""The plan: what is sampled, what is stored and how, and why. Plain data; the rewrites carry it out."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

from torch import fx

from ..analyse.annotations import NormState, TokenMask
from ..analyse.products import InputGradient, Product
from ..maths.encodings import Table
from ..policy import Precision, Sampling

Encoding: TypeAlias = Literal["exact", "rows", "int8", "int6", "int4", "table", "bits", "recompute"]
"""How a residual reaches the backward pass.

``exact``: as the partitioner likes; ``rows``: k rows; ``int8``, ``int6``, ``int4``: integers; ``table``: few bits of a
tabulated function; ``bits``: packed booleans; ``recompute``: not stored, computed from what is.
"""


@dataclasses.dataclass(frozen=True)
class Site:
    """One residual together with the weight-gradient products that share a draw of its rows.

    Attributes:
        products: at least one; all read the same X.
        sampling: how rows are chosen.
        placement: where rows are chosen.
        encoding: how X reaches the backward pass: ``rows``, or ``exact``, which leaves it to the partitioner
            and to :attr:`Plan.residuals`.
        kept: k, an int or ``SymInt``.
        mask: what is known about rows without a gradient, where rows are chosen in the forward pass.
        state: remembered gradient norms, likewise.
    """

    products: tuple[Product, ...]
    sampling: Sampling
    placement: Literal["forward", "backward"]
    encoding: Encoding
    kept: Any
    mask: TokenMask | None = None
    state: NormState | None = None

    @property
    def rows(self) -> Any:
        """The number of rows N."""
        return self.products[0].rows


@dataclasses.dataclass(frozen=True)
class Stored:
    """One residual and how the backward pass comes by it.

    Attributes:
        node: the residual.
        encoding: how it is stored.
        source: what is encoded: `node`, or for a ``table`` what `node` is a function of.
        table: the tabulated function.
        module: path of the module that computes it.
        stochastic: integers are rounded at random.
        shares: each row sums to one, and does so again once it is decoded.
        reason: why it is not stored in fewer bits, or may be made again.
        place: where its codes wait, see :mod:`maths.offload`; empty: on the device.
    """

    node: fx.Node
    encoding: Encoding
    source: fx.Node
    table: Table | None = None
    module: str = ""
    stochastic: bool = False
    shares: bool = False
    reason: str = ""
    place: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to a joint graph.

    Attributes:
        sites: what is sampled.
        exact: products of all rows, with the reason.
        precisions: how each product is multiplied that is to be in fewer bits, see `Sampling.product`; with the reason
            where it is not.
        input_precisions: the same for gradients of inputs, see `Sampling.product_dx`.
        observed: products of all rows whose noise is measured for a budget, together as they would share a draw.
        residuals: how everything else that the backward pass reads is stored.
        made_of_inputs: what cheap operations make of inputs that stay as they are.
        offloaded: what there is to say about residuals that leave the device.
        centered: backward passes of attention that read a stored output, and centred keys where anything is rounded.
    """

    sites: tuple[Site, ...] = ()
    exact: tuple[tuple[Product, str], ...] = ()
    precisions: tuple[tuple[Product, Precision, str], ...] = ()
    input_precisions: tuple[tuple[InputGradient, Precision, str], ...] = ()
    observed: tuple[Site, ...] = ()
    residuals: tuple[Stored, ...] = ()
    offloaded: str = ""
    made_of_inputs: frozenset[fx.Node] = frozenset()
    centered: frozenset[fx.Node] = frozenset()
