"""What the user asked for: a frozen, hashable, validated value."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
import os
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Literal, get_args

import torch

Estimator = Literal["wta-systematic", "wta-crs", "crs", "topk", "rmm-rademacher", "rmm-gaussian"]
Placement = Literal["auto", "forward", "backward"]
Residuals = Literal["exact", "lossless", "fine", "balanced", "small"]
Rounding = Literal["nearest", "stochastic"]
Precision = Literal["exact", "bfloat16", "int8", "float8"]
PrecisionChoice = Literal["auto", "exact", "bfloat16", "int8", "float8"]


class PolicyError(ValueError):
    """A policy that cannot be carried out; the message states rule, value and remedy."""


def nearest(name: object, valid: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the valid name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.4)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _check_choice(field: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise PolicyError(f"{field} must be one of {', '.join(valid)}, got {value!r}{nearest(value, valid)}")


_OF_DEVICE = "device:"
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(field: str, value: object) -> int:
    """Return a number of bytes, or that of a text.

    >>> parse_bytes("memory", "1.5 GiB"), parse_bytes("memory", 10)
    (1610612736, 10)

    Raises:
        PolicyError: neither, or less than one byte.
    """
    found = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value)
        unit = _UNITS.get(match[2]) if match else None
        found = int(float(match[1]) * unit) if match and unit else None
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise PolicyError(
            f"{field} must be a whole number of bytes, or a text such as '14GiB' (units: {', '.join(_UNITS)}), "
            f"got {value!r}"
        )
    return found


def _check_patterns(field: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise PolicyError(f"{field} must be a tuple of module patterns, got {value!r}; write ({value!r},)")
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise PolicyError(
                f"{field} must hold non-empty fnmatch patterns over module paths, got {pattern!r}"
            )
    return patterns


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """What is asked of the weight gradients of a module.

    Args:
        ratio: share of the rows that are kept, in (0, 1]; 1.0 leaves the product exact, bit for bit. None: what `noise`
            allows.
        noise: the most variance that sampling and rounding may add to a weight gradient, as a share of the variance
            that the minibatch gives it, where no ratio is given. Until that is measured, in the first steps, all rows
            are taken; then the fastest ratio that stays below it.
        min_rows: lower bound on the rows kept; a product with no more rows than this stays exact.
        min_features: a product of an input with fewer features than this stays exact: its input is small
            beside what choosing rows of its output's gradient costs. (B of a LoRA is such a one.)
        estimator: ``wta-systematic``, ``wta-crs`` (Liu et al. 2023), ``crs`` (Drineas et al. 2006):
            unbiased; ``topk``: biased; ``rmm-rademacher``, ``rmm-gaussian`` (Bershatsky et al. 2022): k
            random combinations of all rows, unbiased, at more work than the exact product.
        placement: ``forward`` draws from ``||x_i||`` in the forward pass, ``backward`` from
            ``||x_i|| ||dy_i||`` in the backward pass; ``auto`` draws in the backward pass wherever
            the full residual is at hand there anyway.
        residuals: how everything but the sampled rows is stored; ``exact``: as Inductor would;
            ``lossless``: booleans packed, gradients as Inductor's; ``fine``: 8 bits, 4 for bounded coefficients;
            ``balanced``: 6 bits, 8 for what is sensitive, 3 for coefficients; ``small``: 4 bits, 2 for coefficients.
        rounding: of residuals stored as integers; ``stochastic`` makes their error zero in the mean.
        center: subtract the mean row before sampling and add its exact product: less noise where rows have a
            common direction, as in language models.
        attention: sample the gradients of products of two activations as well: ``QK^T`` and ``PV`` where they
            are written as ``matmul`` or ``bmm``. Their error reaches the layers below; it is unbiased there.
        product: bits of the two factors of a weight gradient, of all rows or of the sampled ones: ``exact``, as the
            program has them; ``int8`` and ``float8``, rounded at random, unbiased; ``bfloat16``, rounded to the
            nearest; ``auto``: of ``exact``, ``bfloat16`` and ``int8`` what is fastest for it on the device, by
            measured rates. Errors as in `maths.low_precision`. None: ``exact`` with a ratio, else ``auto`` as far as
            `noise` allows.
        product_dx: the same for gradients of inputs, ``dX = dY W``, with a scale for each row of dY and each column of
            W. Their noise reaches the layers below, where it adds up with depth; in the mean it is zero there as well.
            None: that of `product` for the head of a loss in chunks, where it is added once, if codes of the weight
            take no more memory than the logits of a chunk; else ``exact``.

    Raises:
        PolicyError: a value outside its range.
    """

    ratio: float | None = None
    noise: float = 0.05
    min_rows: int = 32
    min_features: int = 32
    estimator: Estimator = "wta-systematic"
    placement: Placement = "auto"
    residuals: Residuals = "balanced"
    rounding: Rounding = "nearest"
    center: bool = False
    attention: bool = False
    product: PrecisionChoice | None = None
    product_dx: PrecisionChoice | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None:
            if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float):
                raise PolicyError(f"ratio must be a number in (0, 1], or None, got {self.ratio!r}")
            if not (math.isfinite(self.ratio) and 0 < self.ratio <= 1):
                raise PolicyError(
                    f"ratio must be in (0, 1], got {self.ratio}; use 1.0 for exact gradients, "
                    f"with residuals='exact' to the last bit"
                )
        if isinstance(self.noise, bool) or not isinstance(self.noise, int | float) or not self.noise > 0:
            raise PolicyError(
                f"noise must be a number above 0, a share of the minibatch's variance, got {self.noise!r}; "
                f"use ratio=1.0 for none"
            )
        for name, unit in (("min_rows", "rows"), ("min_features", "features")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PolicyError(f"{name} must be a whole number of {unit}, at least 1, got {value!r}")
        for name in ("center", "attention"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _check_choice("estimator", self.estimator, get_args(Estimator))
        _check_choice("placement", self.placement, get_args(Placement))
        _check_choice("residuals", self.residuals, get_args(Residuals))
        _check_choice("rounding", self.rounding, get_args(Rounding))
        for name in ("product", "product_dx"):
            if (value := getattr(self, name)) is not None:
                _check_choice(name, value, get_args(PrecisionChoice))

    def _check_budget(self) -> None:
        """Refuse what no noise budget can be kept with."""
        for name, value, needed in (
            ("estimator", self.estimator, ("wta-systematic",)),
            ("placement", self.placement, ("auto", "backward")),
        ):
            if self.ratio is None and value not in needed:
                raise PolicyError(
                    f"a noise budget is kept with {name}={needed[-1]!r} alone, as the noise of other draws is not "
                    f"measured, got {value!r}; give a ratio"
                )


_OPTIONS = tuple(field.name for field in dataclasses.fields(SamplingOptions))


@dataclasses.dataclass(frozen=True)
class Sampling(SamplingOptions):
    """How the weight gradients of a module are computed: what was asked for, and what its noise budget has led to."""

    ratio: float = 1.0
    product: PrecisionChoice = "exact"
    product_dx: PrecisionChoice = "exact"

    @property
    def share(self) -> Fraction:
        """The ratio as the decimal fraction that was written: 0.3 is 3/10."""
        return Fraction(repr(float(self.ratio)))

    def kept(self, rows: Any) -> Any:
        """Return k = min(rows, max(min_rows, ceil(ratio rows))); `rows` is an int or a ``SymInt``."""
        wanted = (rows * self.share.numerator + self.share.denominator - 1) // self.share.denominator
        wanted = torch.sym_max(self.min_rows, wanted)  # type: ignore[no-untyped-call]
        return torch.sym_min(rows, wanted)  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True, init=False)
class Rule:
    """Override fields of the policy for the modules that a pattern matches.

    Args:
        pattern: fnmatch pattern over module paths as ``named_modules()`` prints them.
        overrides: any of ratio, noise, min_rows, min_features, estimator, placement, residuals, rounding, center,
            attention, product, product_dx.
    """

    pattern: str
    overrides: tuple[tuple[str, Any], ...]

    def __init__(self, pattern: str, **overrides: Any) -> None:
        _check_patterns("Rule pattern", (pattern,))
        valid = _OPTIONS
        for name in overrides:
            if name not in valid:
                raise PolicyError(
                    f"Rule({pattern!r}) can override {', '.join(valid)}, got {name!r}{nearest(name, valid)}"
                )
        SamplingOptions(**overrides)  # the values are checked where they are written
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "overrides", tuple(sorted(overrides.items())))

    def __repr__(self) -> str:
        overrides = "".join(f", {name}={value!r}" for name, value in self.overrides)
        return f"Rule({self.pattern!r}{overrides})"


@dataclasses.dataclass(frozen=True)
class Policy(SamplingOptions):
    """The user's policy: :class:`SamplingOptions` for every module, and where they apply.

    Args:
        include: fnmatch patterns over module paths; only these are sampled.
        exclude: fnmatch patterns over module paths that stay exact; wins over `include`.
        rules: :class:`Rule` overrides; the first that matches a module wins.
        decided: what noise budgets have led to so far: rules for modules that have no ratio else.
        chunk_bytes: a loss over a vocabulary is computed, with its gradients, for so many rows at a time that their
            logits in float32 take no more bytes than this; 0, or `residuals` ``exact`` or ``lossless``: for all rows at
            once. None: 64 MiB, on a GPU at least as much as the gradient of the head's weight in float32, half of it
            where rows are sampled, as its products of fewer rows wait for memory. Gradients of a loss in chunks are
            those of the whole up to rounding, before rows are sampled.
        recompute: share of the layers that are alike whose values the backward pass computes again, in [0, 1]: what
            checkpointing the first of them does. A checkpoint of the program's own is as it says.
        recompute_products: share of the products of matrices in layers that are alike which the backward pass may
            compute again from what else it reads, in [0, 1]: those of the fewest multiplications for a byte first, and
            of them those of the first layers.
        memory: the most bytes that a step may hold at once beside parameters, buffers, inputs and the state of an
            optimizer, gradients included: a number, or a text such as ``14GiB``. ``device:24GiB``: with all of those,
            and the state of AdamW; ``auto``: of what is free on the device. As long as they are more, products of
            layers, then halves of layers, are computed again, as many as it takes; then residuals are stored as with
            ``small``; then losses are computed in smaller chunks. None: no target.
        offload: where encoded residuals wait for the backward pass: ``host``, pinned memory beside a CUDA device;
            ``disk:<folder>``, a file, of a model on the CPU. As many as go there while the forward pass computes.

    Example:
        >>> policy = Policy(ratio=0.1, exclude=("lm_head",), rules=(Rule("*.attention.*", ratio=0.3),))
        >>> policy.sampling("encoder.layer.0.attention.query").ratio
        0.3
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    chunk_bytes: int | None = None
    decided: tuple[Rule, ...] = ()
    recompute: float = 0.0
    recompute_products: float = 0.0
    memory: int | str | None = None
    offload: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "include", _check_patterns("include", self.include))
        object.__setattr__(self, "exclude", _check_patterns("exclude", self.exclude))
        if isinstance(self.rules, Rule):
            raise PolicyError(f"rules must be a tuple of Rule, got {self.rules!r}; write ({self.rules!r},)")
        object.__setattr__(self, "rules", tuple(self.rules))
        size = self.chunk_bytes
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
            raise PolicyError(
                f"chunk_bytes must be a whole number of bytes, 0 for no chunks or None, got {size!r}"
            )
        for name, parts in (("recompute", "layers"), ("recompute_products", "products in layers")):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise PolicyError(f"{name} must be a share of the {parts} in [0, 1], got {share!r}")
        if self.memory not in (None, "auto"):
            parse_bytes("memory", self._memory)
        self._check_offload()
        object.__setattr__(self, "decided", tuple(self.decided))
        for name in ("rules", "decided"):
            for rule in getattr(self, name):
                if not isinstance(rule, Rule):
                    raise PolicyError(f"{name} must be a tuple of Rule, got {rule!r}")
        for fields in self._variants():
            fields._check_budget()

    def _check_offload(self) -> None:
        place = self.offload
        folder = place.removeprefix("disk:") if isinstance(place, str) and place.startswith("disk:") else ""
        if place not in (None, "host") and not folder:
            raise PolicyError(f"offload must be 'host', 'disk:<folder>' or None, got {place!r}")
        if folder and not os.path.isdir(folder):
            raise PolicyError(f"the folder of offload must exist, got {folder!r}; make it")
        if folder:
            object.__setattr__(self, "offload", f"disk:{os.path.abspath(folder)}")

    def sampling(self, module: str) -> Sampling | None:
        """Return how the products of `module` (a path) are sampled, or None where they stay exact."""
        asked = self.asked(module)
        if asked is None:
            return None
        fields = {name: getattr(asked, name) for name in _OPTIONS} | {
            "product_dx": asked.product_dx or "exact"
        }
        if asked.ratio is not None:
            return Sampling(**{**fields, "product": asked.product or "exact"})
        fields.update(ratio=1.0, product="auto", placement="backward")
        found = _first_match(module, self.decided)
        fields.update(found.overrides if found else ())
        return Sampling(**{**fields, "product": asked.product or fields["product"]})

    def asked(self, module: str) -> SamplingOptions | None:
        """Return what is asked for of `module` (a path), apart from `decided`; None where it is excluded."""
        if matches_any(module, self.exclude) or not matches_any(module, self.include):
            return None
        return _overridden(self._everywhere(), _first_match(module, self.rules))

    def has_budget(self, module: str) -> bool:
        """Tell whether the products of `module` (a path) are as exact as a noise budget asks."""
        asked = self.asked(module)
        return asked is not None and asked.ratio is None

    @property
    def has_budgets(self) -> bool:
        """Tell whether any module has a noise budget."""
        return any(fields.ratio is None for fields in self._variants())

    def unmeasured(self) -> Policy:
        """Return the policy where no noise can be measured: with all rows where it has a budget."""

        def settled(rule: Rule) -> Rule:
            overrides = dict(rule.overrides)
            if overrides.get("ratio", 1.0) is None:
                overrides["ratio"] = 1.0
            elif "ratio" in overrides and self.ratio is None:
                overrides.setdefault("product", self.product or "exact")
            return Rule(rule.pattern, **overrides)

        settled_rules = tuple(map(settled, self.rules))
        if self.ratio is not None:
            return dataclasses.replace(self, rules=settled_rules)
        return dataclasses.replace(self, rules=settled_rules, ratio=1.0, product=self.product or "auto")

    @property
    def memory_bytes(self) -> int | None:
        """What `memory` says, in bytes; None as well where that is not known before there is a device."""
        return None if self.memory in (None, "auto") else parse_bytes("memory", self._memory)

    @property
    def is_of_device(self) -> bool:
        """Tell whether `memory` is all that the device holds."""
        return isinstance(self.memory, str) and self.memory.startswith(_OF_DEVICE)

    @property
    def _memory(self) -> int | str | None:
        return self.memory.removeprefix(_OF_DEVICE) if isinstance(self.memory, str) else self.memory

    def _everywhere(self) -> SamplingOptions:
        return SamplingOptions(**{name: getattr(self, name) for name in _OPTIONS})

    def _variants(self) -> list[SamplingOptions]:
        """Return what is asked for where no rule matches, and where each does."""
        return [self._everywhere(), *(_overridden(self._everywhere(), rule) for rule in self.rules)]

    def everywhere(self, **fields: Any) -> Policy:
        """Return the policy with these options for all modules, whatever its rules say."""

        def others(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
            return tuple(
                Rule(rule.pattern, **{k: v for k, v in rule.overrides if k not in fields}) for rule in rules
            )

        return dataclasses.replace(self, rules=others(self.rules), decided=others(self.decided), **fields)

    def rounds(self, name: str) -> bool:
        """Tell whether products of any module may be in another precision than the program's.

        Args:
            name: ``product`` or ``product_dx``.
        """
        by_itself = "auto" if name == "product" else "exact"
        return any(
            (getattr(options, name) or ("exact" if options.ratio is not None else by_itself)) != "exact"
            for options in self._variants()
        )

    def samples_attention(self, module: str) -> bool:
        """Tell whether products of two activations of `module` (a path) are sampled."""
        sampling = self.sampling(module)
        return sampling is not None and sampling.attention

    def unmatched(self, modules: Iterable[str]) -> tuple[str, ...]:
        """Return the patterns that match none of `modules` (paths)."""
        paths = list(modules)
        patterns = [*self.include, *self.exclude, *(rule.pattern for rule in self.rules)]
        return tuple(p for p in patterns if p != "*" and not any(fnmatch.fnmatchcase(m, p) for m in paths))


def _first_match(module: str, rules: Iterable[Rule]) -> Rule | None:
    return next((rule for rule in rules if fnmatch.fnmatchcase(module, rule.pattern)), None)


def _overridden(options: SamplingOptions, rule: Rule | None) -> SamplingOptions:
    return options if rule is None else dataclasses.replace(options, **dict(rule.overrides))


def matches_any(module: str, patterns: Iterable[str]) -> bool:
    """Tell whether a module path matches one of the fnmatch patterns."""
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)
