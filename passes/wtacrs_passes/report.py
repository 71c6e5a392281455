"""What was rewritten, what it saves, what was left exact and why: plain data with a table."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import sympy

from .maths.observer import RATIOS

Size: TypeAlias = int | sympy.Expr
"""A number of rows or bytes; an expression in the symbols of batch and sequence where those are dynamic."""

MIB = 2**20
"""Bytes."""


def simplify(size: Any) -> Size:
    """Return an int where the size is known."""
    size = sympy.sympify(size)
    return int(size) if size.is_Integer else size


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One weight-gradient product, a product of two activations, or a parameter that has none.

    Attributes:
        module: path of the module; parameter: name of its weight; empty in attention.
        rows: N; kept: k.
        estimator, placement: how and where rows are chosen; empty where the product is exact.
        encoding: how X reaches the backward pass: ``exact`` (stored in full), ``recompute`` (derived
            there from what is stored for others) or ``rows`` (k rows are stored); ``chunks``: it does not, the
            product is made with the loss in the forward pass.
        weights: what the rows are chosen by.
        bytes_before: bytes of X among the tensors that Inductor would have saved.
        bytes_after: bytes stored for this product now; a residual that several products share is
            counted at the first.
        reason: why all rows are multiplied; empty where they are sampled.
        product: in which precision, `Sampling.product`; with the reason where it is not as the policy says.
    """

    module: str
    parameter: str
    rows: Size
    kept: Size
    estimator: str
    placement: str
    weights: str
    encoding: str
    bytes_before: Size
    bytes_after: Size
    reason: str = ""
    product: str = "exact"


@dataclasses.dataclass(frozen=True)
class InputGradientReport:
    """A product ``dX = dY W`` for which the policy names a precision.

    Attributes:
        module: path of the module that reads W.
        product: the precision, `Sampling.product_dx`; with the reason where it is not as the policy says.
    """

    module: str
    product: str


@dataclasses.dataclass(frozen=True)
class NoiseReport:
    """The noise of the weight gradients of one site, as a share of the minibatch's variance, and what follows from it.

    Attributes:
        modules: paths of the linears whose rows are drawn together.
        minibatch: variance of the gradient between batches, over its mean square.
        ratio: share of the rows that are drawn; 1.0: all are taken.
        product: ``auto``: in the fastest precision; ``exact``: 8 bits would leave the budget.
        added: what is added at most.
        budget: `Sampling.noise`.
        rounded: what factors in 8 bits add, of all rows.
        drawn: what a draw of each of `maths.observer.RATIOS` adds.
        steps: that were measured.
    """

    modules: tuple[str, ...]
    minibatch: float
    ratio: float
    product: str
    added: float
    budget: float
    rounded: float
    drawn: tuple[float, ...]
    steps: int


@dataclasses.dataclass(frozen=True)
class ResidualReport:
    """One tensor that crosses from the forward to the backward pass, with or without the rewrite.

    What a site reports is not repeated here, so that bytes add up to those of the graph.

    Attributes:
        module: path of the module that computes it; operation: the ATen operation that does, ``input`` of what another
            graph does.
        encoding: how it is stored; ``recompute``: computed from others, or from inputs; ``replaced``: the backward pass
            reads something else.
        bytes_before: its bytes among the tensors that Inductor would have saved; zero where Inductor
            would have saved something else in its place, and where a site has counted them.
        bytes_after: bytes stored now.
        gradient: what the encoding does to gradients: ``exact``, with the reason where it had to be, ``unbiased``
            (stochastic rounding) or ``rounded`` with the bound of an element's error.
    """

    module: str
    operation: str
    encoding: str
    bytes_before: Size
    bytes_after: Size
    gradient: str

    @property
    def is_made_of_inputs(self) -> bool:
        """Tell whether it is no residual, as a cast of a parameter."""
        return self.encoding == "recompute" and self.gradient.startswith("exact")


@dataclasses.dataclass(frozen=True)
class LossReport:
    """A loss over a vocabulary.

    Attributes:
        module: path of the head, whose output are the logits ``[rows, words]``.
        chunk: rows whose logits are made at a time, with their loss and its gradients.
        reason: why the logits of all rows are made at once; empty where they are not.
    """

    module: str
    rows: Size
    words: Size
    chunk: Size
    reason: str = ""

    def __str__(self) -> str:
        logits = f"{self.module}: logits [{self.rows}, {self.words}]"
        return f"{logits} at once: {self.reason}" if self.reason else f"{logits}, {self.chunk} rows at a time"


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most that a step holds at once beside parameters, buffers and inputs, as predicted from its graphs.

    Attributes:
        size: bytes, with the sizes of the example inputs where those are symbolic.
        part: ``forward`` or ``backward``.
        module, operation: what is computed then.
    """

    size: int
    part: str
    module: str
    operation: str

    def __str__(self) -> str:
        place = f" of {self.module}" if self.module else ""
        return f"in the {self.part} pass at {self.operation}{place}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compiled graph became.

    Attributes:
        sites: one entry for each weight-gradient product and each matrix parameter without one.
        saved_bytes_before: bytes of tensors that cross from forward to backward under Inductor's own
            partition, without parameters, buffers and inputs.
        saved_bytes_after: the same after the rewrite.
        from_cache: the code came from a cache of compiled code.
        residuals: one entry for each stored tensor that belongs to no site.
        losses: one entry for each loss over a vocabulary whose logits are larger than `Policy.chunk_bytes`.
        peak_before, peak_after: predicted without and with the rewrite, see `analyse.peaks`.
        refused: what of the policy is not done because it would raise the peak, with the peak.
        notes: what became of a target for the peak, and which layers the backward pass computes again.
        input_gradients: one entry for each for which the policy names a precision.
        noise: one entry for each site with a noise budget, once it was measured.
        peak_of_code: bytes that the generated code holds at once, counted where the policy has a target for the peak.
        memory: bytes that the peak may have by the policy.
        planned_for: bytes that the predicted peak was held to, so that `peak_of_code` is within those.
        work: multiplications of the forward pass, see `analyse.work`; work_again: those that the backward pass does
            again.
    """

    sites: tuple[SiteReport, ...]
    saved_bytes_before: Size
    saved_bytes_after: Size
    from_cache: bool = False
    residuals: tuple[ResidualReport, ...] = ()
    losses: tuple[LossReport, ...] = ()
    peak_before: Peak | None = None
    peak_after: Peak | None = None
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    input_gradients: tuple[InputGradientReport, ...] = ()
    noise: tuple[NoiseReport, ...] = ()
    peak_of_code: int | None = None
    memory: int | None = None
    planned_for: int | None = None
    work: int = 0
    work_again: int = 0

    @property
    def sampled(self) -> tuple[SiteReport, ...]:
        """The sites whose rows are sampled."""
        return tuple(site for site in self.sites if not site.reason)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings; symbolic sizes as strings."""

        def plain(entries: Sequence[SiteReport | ResidualReport | LossReport]) -> list[dict[str, Any]]:
            return [{k: _plain(v) for k, v in dataclasses.asdict(entry).items()} for entry in entries]

        return {
            "sites": plain(self.sites),
            "residuals": plain(self.residuals),
            "losses": plain(self.losses),
            "saved_bytes_before": _plain(self.saved_bytes_before),
            "saved_bytes_after": _plain(self.saved_bytes_after),
            "from_cache": self.from_cache,
            "peak_before": self.peak_before and dataclasses.asdict(self.peak_before),
            "peak_after": self.peak_after and dataclasses.asdict(self.peak_after),
            "refused": list(self.refused),
            "notes": list(self.notes),
            "input_gradients": [dataclasses.asdict(entry) for entry in self.input_gradients],
            "noise": [dataclasses.asdict(entry) for entry in self.noise],
            "peak_of_code": self.peak_of_code,
            "memory": self.memory,
            "planned_for": self.planned_for,
            "work": self.work,
            "work_again": self.work_again,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Invert :meth:`to_dict`."""
        sizes = ("rows", "kept", "bytes_before", "bytes_after", "words", "chunk")

        def parse(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            return [{k: _parse(v) if k in sizes else v for k, v in entry.items()} for entry in entries]

        before, after = (data[key] and Peak(**data[key]) for key in ("peak_before", "peak_after"))
        return cls(
            tuple(SiteReport(**entry) for entry in parse(data["sites"])),
            _parse(data["saved_bytes_before"]),
            _parse(data["saved_bytes_after"]),
            data["from_cache"],
            tuple(ResidualReport(**entry) for entry in parse(data["residuals"])),
            tuple(LossReport(**entry) for entry in parse(data["losses"])),
            before,
            after,
            tuple(data["refused"]),
            tuple(data["notes"]),
            tuple(InputGradientReport(**entry) for entry in data["input_gradients"]),
            tuple(
                NoiseReport(**{**entry, "modules": tuple(entry["modules"]), "drawn": tuple(entry["drawn"])})
                for entry in data["noise"]
            ),
            data["peak_of_code"],
            data["memory"],
            data["planned_for"],
            data["work"],
            data["work_again"],
        )

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        header = (
            "module",
            "parameter",
            "rows",
            "kept",
            "estimator",
            "placement",
            "weights",
            "encoding",
            "before",
            "after",
            "product",
            "",
        )
        lines = [
            (
                site.module,
                site.parameter.rpartition(".")[2],
                str(site.rows),
                str(site.kept),
                site.estimator,
                site.placement,
                site.weights,
                site.encoding,
                format_bytes(site.bytes_before),
                format_bytes(site.bytes_after),
                site.product,
                site.reason,
            )
            for site in self.sites
        ]
        residual_header = ("module", "operation", "encoding", "before", "after", "gradient")
        residual_lines = [
            (
                residual.module,
                residual.operation,
                residual.encoding,
                format_bytes(residual.bytes_before),
                format_bytes(residual.bytes_after),
                residual.gradient,
            )
            for residual in self.residuals
            if not residual.is_made_of_inputs
        ]
        made = [residual for residual in self.residuals if residual.is_made_of_inputs]
        size = format_bytes(simplify(sum((residual.bytes_before for residual in made), sympy.Integer(0))))
        of_inputs = [f"made of inputs again: {len(made)}, {size} -> 0 B"] if made else []
        before, after = self.saved_bytes_before, self.saved_bytes_after
        total = f"saved for backward: {format_bytes(before)} -> {format_bytes(after)}"
        if isinstance(before, int) and isinstance(after, int) and before:
            total += f" ({after / before:.2f} of Inductor's)"
        refused = [f"not done, as it raises the predicted peak: {each}" for each in self.refused]
        lines_of_peak = (
            []
            if self.peak_after is None
            else [f"predicted peak: {compared_peaks(self.peak_before, self.peak_after)}"]
        )
        numbers = collections.Counter(gradient.product for gradient in self.input_gradients)
        inputs = [f"gradients of inputs, {product}: {number}" for product, number in numbers.items()]
        cached = "; code from the cache" if self.from_cache else ""
        count = f"{len(self.sampled)} of {len(self.sites)} weight gradients sampled{cached}"
        tables = [*align([header, *lines])]
        if residual_lines:
            tables += ["", *align([residual_header, *residual_lines])]
        if self.noise:
            tables += ["", *align(list(self._noise_table()))]
        share = (
            f"{self.work_again / self.work:.2f} of the forward pass's multiplications" if self.work else ""
        )
        again = [f"done again in the backward pass: {share}"] if self.work_again else []
        others = [*map(str, self.losses), *inputs, *of_inputs, *refused, *self.notes, *again]
        return "\n".join([*tables, "", *others, total, *lines_of_peak, count])

    def _noise_table(self) -> Iterator[tuple[str, ...]]:
        yield (
            "noise of",
            "minibatch",
            "8 bits",
            *(f"rows {ratio}" for ratio in RATIOS),
            "taken",
            "added",
            "budget",
        )
        for site in self.noise:
            rows = "all rows" if site.ratio == 1.0 else f"rows {site.ratio}"
            yield (
                ", ".join(site.modules),
                *(f"{value:.2g}" for value in (site.minibatch, site.rounded, *site.drawn)),
                f"{rows}, {site.product}",
                f"{site.added:.2g}",
                f"{site.budget:g}",
            )


def compared_peaks(before: Peak | None, after: Peak) -> str:
    """Return both peaks, and what is computed at the second."""
    if before is None:
        return f"{format_bytes(after.size)}, {after}"
    ratio = f"{after.size / before.size:.2f} of Inductor's" if before.size else "Inductor's"
    return f"{format_bytes(before.size)} -> {format_bytes(after.size)} ({ratio}), {after}"


def format_bytes(size: Size) -> str:
    """Return a size as ``12.3 MiB``; a symbolic one as an expression in bytes."""
    if not isinstance(size, int):
        return f"{size} B"
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def align(table: Sequence[Sequence[str]]) -> Iterable[str]:
    """Return the lines of a table, its columns padded to equal widths."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, sympy.Expr) else value


def _parse(value: int | str) -> Size:
    if isinstance(value, int):
        return value
    functions = {"Max": sympy.Max, "Min": sympy.Min}
    parsed = sympy.sympify(value, locals=functions, evaluate=True)
    symbols = {s: sympy.Symbol(s.name, integer=True, positive=True) for s in parsed.free_symbols}
    return simplify(parsed.subs(symbols))
