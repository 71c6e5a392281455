"""Account for every byte that crosses to the backward pass: from a partitioned joint graph to its report."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence, Set

import sympy
from torch import fx

from .analyse.products import Product
from .decide.plan import Plan, Site, Stored
from .graph.edit import bytes_of_example, nbytes, sympy_size
from .graph.names import module_path
from .graph.operations import same_content
from .joint import Joint
from .maths import ops
from .maths.encodings import INTEGER_BITS, levels
from .partition import rows_names
from .report import InputGradientReport, LossReport, Peak, Report, ResidualReport, SiteReport, simplify
from .rewrite.chunk_losses import ChunkedLoss
from .rewrite.encode_residuals import EncodedResidual


def make_report(
    joint: Joint,
    before: Sequence[fx.Node],
    after: Sequence[fx.Node],
    peak_before: Peak,
    peak_after: Peak,
    refused: Sequence[str],
) -> Report:
    """Gather what became of each weight gradient and of each stored tensor.

    Args:
        before: the tensors saved without the rewrite; `after`: with it.
        peak_before, peak_after: predicted without and with it.
        refused: what of the policy is not done, with the reason.
    """
    analysis, plan, sites, residuals = joint.analysis, joint.plan, joint.sites, joint.residuals
    ledger = _Ledger(before, after)
    found: dict[fx.Node, SiteReport] = {}
    encoded = {residual.stored.node.name for residual in residuals if residual.codes}
    for sampled in sites:
        rows = rows_names(sampled)
        stores_rows = ledger.saves(rows) or bool(rows & encoded)
        stored = ledger.take_after(rows.union(node.name for node in sampled.stored))
        site = sampled.site
        for product in site.products:
            encoding = "rows" if stores_rows else ledger.encoding(product)
            size_before, size_after = ledger.take(product)
            found[product.node] = SiteReport(
                module=product.module,
                parameter=product.parameter,
                rows=simplify(sympy_size(product.rows)),
                kept=simplify(sympy_size(site.kept)),
                estimator=site.sampling.estimator,
                placement=site.placement,
                weights=_chosen_by(site),
                encoding=encoding,
                bytes_before=simplify(size_before),
                bytes_after=simplify(size_after + stored),
            )
            stored = sympy.Integer(0)
    for product, reason in plan.exact:
        size_before, size_after = ledger.take(product)
        rows_ = simplify(sympy_size(product.rows))
        found[product.node] = SiteReport(
            product.module, product.parameter, rows_, rows_, "", "", "", ledger.encoding(product),
            simplify(size_before), simplify(size_after), reason,
        )  # fmt: skip
    for product, precision, reason in plan.precisions:
        found[product.node] = dataclasses.replace(found[product.node], product=_shown(precision, reason))
    inputs = tuple(
        InputGradientReport(gradient.module, _shown(precision, reason))
        for gradient, precision, reason in plan.input_precisions
    )
    inputs += tuple(
        InputGradientReport(module, _shown(precision, reason))
        for loss in joint.losses
        for module, precision, reason in loss.inputs
    )
    reports = [found[product.node] for product in analysis.products]
    for loss in joint.losses:
        reports += _made_with(loss, ledger)
    made = {report.parameter for report in reports}
    for name, reason in analysis.unsampled:
        if name in made:
            continue
        reports.append(SiteReport(name.rpartition(".")[0], name, 0, 0, "", "", "", "exact", 0, 0, reason))
    others = tuple(_residual_reports(residuals, plan, ledger))
    total_before, total_after = (simplify(sum(map(_size, s), sympy.Integer(0))) for s in (before, after))
    losses = tuple(_loss_reports(joint))
    return Report(
        tuple(reports), total_before, total_after, residuals=others, losses=losses,
        peak_before=peak_before, peak_after=peak_after, refused=tuple(refused),
        input_gradients=inputs,
    )  # fmt: skip


def _shown(precision: str, reason: str) -> str:
    return f"exact: {reason}" if reason else precision


def _made_with(loss: ChunkedLoss, ledger: _Ledger) -> Iterator[SiteReport]:
    """Report the weight-gradient products that are made with a loss."""
    for product, names, reason in loss.products:
        rows, how = simplify(sympy_size(product.rows)), None if reason else loss.sampling
        kept, estimator, placement, weights = rows, "", "", ""
        if how is not None:
            kept = simplify(sympy_size(loss.kept))
            estimator, placement, weights = how.estimator, "forward", "||x|| ||dy||"
        before, after = ledger.take_before(product.stored_names), ledger.take_after(names)
        yield SiteReport(
            product.module, product.parameter, rows, kept, estimator, placement, weights, "chunks",
            simplify(before), simplify(after), reason, loss.precision,
        )  # fmt: skip


def _loss_reports(joint: Joint) -> Iterator[LossReport]:
    for loss in joint.losses:
        rows = simplify(sympy_size(loss.rows))
        yield LossReport(loss.module, rows, loss.words, loss.chunk)
    for head, reason in joint.whole_losses.items():
        rows, words = (simplify(sympy_size(size)) for size in head.meta["val"].shape)
        yield LossReport(module_path(head) or "", rows, words, rows, reason)


def _chosen_by(site: Site) -> str:
    """Return what the rows of a site are chosen by."""
    if site.placement == "backward":
        return "||x|| ||dy||"
    weights = "||x|| remembered ||dy||" if site.state else "||x||"
    if site.mask is None:
        return weights
    return f"{weights}, {_fraction(site.mask.factor)} unless {site.mask.name}"


def _fraction(factor: float) -> str:
    return f"1/{1 / factor:g}" if factor else "zero"


def _effect(stored: Stored) -> str:
    """Return what an encoding does to gradients."""
    if stored.table is not None:
        return f"rounded to {len(stored.table.values)} values, integral of error^2 {stored.table.error:.2g}"
    if stored.encoding in INTEGER_BITS:
        largest = levels(INTEGER_BITS[stored.encoding])
        if stored.stochastic:
            return f"unbiased, error < group peak / {largest}"
        rounded = f"rounded, error <= group peak / {2 * largest}"
        return f"{rounded}, then scaled to sum to one" if stored.shares else rounded
    if stored.encoding == "recompute":
        return f"exact: {stored.reason}" if stored.reason else "as what it is derived from"
    return "exact"


def _residual_reports(
    residuals: Sequence[EncodedResidual], plan: Plan, ledger: _Ledger
) -> Iterable[ResidualReport]:
    for residual in residuals:
        stored = residual.stored
        size_before = ledger.take_before(residual.stored_names)
        if stored.encoding == "recompute" and not size_before:
            continue  # Inductor would not have saved it either, or it is the X of a site
        yield ResidualReport(
            stored.module, _operation(stored.node), stored.encoding, simplify(size_before),
            simplify(ledger.take_after(code.name for code in residual.codes)), _effect(stored),
        )  # fmt: skip
    exact = {
        form.name: f"exact: {item.reason}"
        for item in plan.residuals if item.encoding == "exact" and item.reason
        for form in same_content(item.node)
    }  # fmt: skip
    for node in ledger.left():
        module = module_path(node) or ""
        size_before, size_after = ledger.take_before([node.name]), ledger.take_after([node.name])
        encoding, gradient = "exact", exact.get(node.name, "exact")
        if not size_after:
            encoding, gradient = "replaced", "as what is read instead"
        yield ResidualReport(
            module, _operation(node), encoding, simplify(size_before), simplify(size_after), gradient
        )


def _operation(node: fx.Node) -> str:
    return "input" if node.target is ops.receive else str(node.target)


class _Ledger:
    """The bytes of the saved tensors, before and after; each is taken once."""

    def __init__(self, before: Sequence[fx.Node], after: Sequence[fx.Node]) -> None:
        self._before, self._after = ({node.name: node for node in saved} for saved in (before, after))
        self._names = frozenset(self._after)

    def encoding(self, product: Product) -> str:
        """Tell whether X is stored in full or recomputed from what is stored for others."""
        return "exact" if self.saves(product.stored_names) else "recompute"

    def saves(self, names: Set[str]) -> bool:
        """Tell whether one of these nodes is saved."""
        return bool(names & self._names)

    def take(self, product: Product) -> tuple[sympy.Expr, sympy.Expr]:
        """Return the bytes of X before and after."""
        return self.take_before(product.stored_names), self.take_after(product.stored_names)

    def take_before(self, names: Iterable[str]) -> sympy.Expr:
        """Return the bytes that Inductor would save of these nodes."""
        return _take(self._before, names)

    def take_after(self, names: Iterable[str]) -> sympy.Expr:
        """Return the bytes that are saved of these nodes."""
        return _take(self._after, names)

    def left(self) -> list[fx.Node]:
        """Return what has not been taken."""
        return list((self._after | self._before).values())


def _take(saved: dict[str, fx.Node], names: Iterable[str]) -> sympy.Expr:
    found = [saved.pop(name) for name in names if name in saved]
    return sum(map(_size, found), sympy.Integer(0))


def _size(node: fx.Node) -> sympy.Expr:
    """Return the bytes of a saved tensor; of the state of a generator, which checkpoints of PyTorch save, a number."""
    source = node.args[0] if node.target is operator.getitem else None
    is_state = isinstance(source, fx.Node) and "rng_state" in str(source.target)
    return sympy.Integer(bytes_of_example(node)) if is_state else nbytes(node.meta["val"])
