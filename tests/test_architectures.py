"""Many families of transformers in four precisions: the same gradients without rounding, near ones with it.

An ordinary run takes a few families at random; ``WTACRS_SEED`` repeats a choice.
``WTACRS_ARCHITECTURES`` is ``all``, or names with commas between.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping

import pytest
import torch
from aot import REFERENCE, Variants, distance, small_tensors, wrong_bytes
from conftest import is_unbiased, seed_of_run
from families import FAMILIES, Inputs, make
from torch import Tensor, nn

import wtacrs_fx
from wtacrs_fx import Policy

FEW, RUNS = 3, 64
SLOW = {
    *("autoformer", "data2vec-audio", "funnel", "led", "levit", "mobilenet_v2", "mobilevit", "prophetnet"),
    *("qwen3_next", "recurrent_gemma", "rwkv", "speech_to_text", "switch_transformers"),
}
"""Families that take more than 10 seconds each; an ordinary run leaves them out."""

SEEDED = ("reformer",)
"""Families that seed the generator in each step, which then draws the same rows."""

GENERATED = ("bert", "gpt2", "vit")
"""Families whose code is generated, which takes many times as long."""

ROUNDED = 0.02
"""Largest squared error of all gradients together, relative to their square, that rounding may cause."""

POLICIES = {
    "exact": Policy(ratio=1.0, residuals="exact"),
    "lossless": Policy(ratio=1.0, residuals="lossless"),
    "balanced": Policy(ratio=1.0),
    "sampled": Policy(ratio=0.3, min_rows=8),
    "exact, products again": Policy(ratio=1.0, residuals="exact", recompute_products=1.0),
    "balanced, products again": Policy(ratio=1.0, recompute_products=1.0),
}
ROWS = {"rows": Policy(ratio=0.3, min_rows=8, residuals="exact")}

SCALE = 2.0**10  # of the loss in float16; a scaler finds such a one within a few steps


class Precision:
    """How a model is trained: the type of its weights, that of its products, the scale of its loss."""

    def __init__(self, weights: torch.dtype, products: torch.dtype | None = None, scale: float = 1.0) -> None:
        self.weights, self.products, self.scale = weights, products, scale

    def convert(self, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
        """Return copies with floating-point values in the type of the weights."""
        inputs = {k: v.to(self.weights) if v.is_floating_point() else v for k, v in inputs.items()}
        return copy.deepcopy(model).to(self.weights), inputs

    def gradients(self, model: nn.Module, call: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        """Run a step; return the gradients of all parameters, one after the other."""
        model.zero_grad()
        autocast = torch.autocast("cpu", self.products) if self.products else contextlib.nullcontext()
        with autocast:
            loss = call(**inputs)
        scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, enabled=self.scale != 1)
        scaler.scale(loss).backward()
        scaler.unscale_(torch.optim.SGD(model.parameters()))
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return torch.cat([gradient.flatten().float() for gradient in found])


PRECISIONS = {
    "float32": Precision(torch.float32),
    "bfloat16": Precision(torch.bfloat16),
    "autocast": Precision(torch.float32, torch.bfloat16),
    "float16": Precision(torch.float32, torch.float16, SCALE),
}


def _cases(names: Iterable[str], few: int) -> list[tuple[str, str]]:
    """Return the families that were asked for in each precision, or a few pairs at random."""
    if ASKED not in ("", "all"):
        names = ASKED.split(",")
    cases = [(name, precision) for name in names for precision in PRECISIONS]
    quick = [case for case in cases if case[0] not in SLOW]
    return cases if ASKED else random.Random(SEED).sample(quick, few)


ASKED = os.environ.get("WTACRS_ARCHITECTURES", "")
SEED = seed_of_run("WTACRS_SEED")
CASES = _cases(FAMILIES, FEW)
NAMES = list(dict.fromkeys(name for name, _ in CASES))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    print(f"WTACRS_SEED={SEED}")
    with small_tensors():
        yield


def _eager(name: str, precision: Precision) -> tuple[nn.Module, Inputs, Tensor]:
    """Return a model and inputs in a precision, and eager's gradients; skip what eager cannot run."""
    model, inputs = precision.convert(*make(name))
    torch.manual_seed(0)
    try:
        eager = precision.gradients(model, model, inputs)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"eager: {error}")
    if not eager.isfinite().all():
        pytest.skip("eager: its gradients are not finite")
    return model, inputs, eager


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_gradients_and_bytes(name: str, precision: str) -> None:
    model, inputs, eager = _eager(name, PRECISIONS[precision])
    full = _eager(name, PRECISIONS["float32"])[2]
    variants = Variants(POLICIES)
    call = torch.compile(model, backend=variants, dynamic=False)
    found = _all_gradients(variants, lambda: PRECISIONS[precision].gradients(model, call, inputs))
    reference = found[REFERENCE]
    rounding = distance(reference, full)
    own = distance(eager, full)
    assert rounding < 1e-5 + 16 * own  # squares: PyTorch's compiled code rounds up to four times as much
    problems = _errors(found, ROUNDED + 4 * rounding)
    for index, graph in enumerate(variants.graphs):
        problems += [f"graph {index}, {problem}" for problem in wrong_bytes(graph)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("name", "precision"), _cases(FAMILIES if ASKED else GENERATED, 1))
def test_symbolic_sizes(name: str, precision: str) -> None:
    model, inputs, eager = _eager(name, PRECISIONS[precision])
    own = distance(eager, _eager(name, PRECISIONS["float32"])[2])
    variants = Variants(POLICIES)
    call = torch.compile(model, backend=variants, dynamic=True)
    twice = {key: torch.cat([value, value]) if value.dim() else value for key, value in inputs.items()}
    for batch in (inputs, twice):
        variants.active = REFERENCE
        try:
            torch.manual_seed(0)
            PRECISIONS[precision].gradients(model, call, batch)
        except Exception as error:  # eager has no such batch, or PyTorch's own partition fails
            pytest.skip(f"without a policy: {error}")
        found = _all_gradients(
            variants, lambda batch=batch: PRECISIONS[precision].gradients(model, call, batch)
        )
        problems = _errors(found, ROUNDED + 4 * own)
        assert not problems, "\n".join(problems)


def _all_gradients(variants: Variants, step: Callable[[], Tensor]) -> dict[str, Tensor | Exception]:
    """Return the gradients of each variant, or why there are none."""
    found: dict[str, Tensor | Exception] = {}
    torch.manual_seed(0)
    first = step()
    for name in (REFERENCE, *variants.policies):
        torch.manual_seed(0)
        variants.active = name
        try:
            found[name] = step()
        except Exception as error:  # all variants are to be heard of
            found[name] = error
    assert _same(first, found[REFERENCE])
    return found


def _errors(found: Mapping[str, Tensor | Exception], bound: float) -> list[str]:
    """Compare the gradients of each policy with those of the reference."""
    reference, problems = found[REFERENCE], []
    for name, gradients in found.items():
        if isinstance(gradients, Exception):
            problems.append(f"{name}: {type(gradients).__name__}: {gradients}")
        elif reference.isfinite().all() and not gradients.isfinite().all():
            problems.append(f"{name}: {(~gradients.isfinite()).sum()} gradients are not finite")
        elif name.startswith(("exact", "lossless")) and not _same(gradients, reference):
            problems.append(f"{name}: differs by {distance(gradients, reference):.3g}")
        elif name.startswith("balanced") and not distance(gradients, reference) <= bound:
            problems.append(f"{name}: error {distance(gradients, reference):.3g} > {bound:.3g}")
    return problems


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30)))


@pytest.mark.parametrize("name", NAMES if ASKED else NAMES[:1])
def test_sampled_rows_are_unbiased(name: str) -> None:
    precision = PRECISIONS["float32"]
    model, inputs, _ = _eager(name, precision)
    variants = Variants(ROWS)
    call = torch.compile(model, backend=variants, dynamic=False)
    exact = precision.gradients(model, call, inputs)
    variants.active = "rows"
    sites = [site for graph in variants.graphs for site in graph.partitions["rows"].report.sampled]
    runs = torch.stack([precision.gradients(model, call, inputs) for _ in range(RUNS if sites else 1)])
    if not sites:
        assert torch.equal(runs[0], exact)
        return
    where = [each for each in _slices(model) if not torch.equal(runs[0, each], runs[1, each])]
    if not where and name in SEEDED:
        pytest.skip("draws the same numbers in each step")
    scales = [
        exact[each].double().norm() for each in where
    ]  # so that each counts, however small its gradient is
    assert where and all(scales)
    runs, exact = (
        [values[..., each].double() / scale for each, scale in zip(where, scales, strict=True)]
        for values in (runs, exact)
    )
    assert is_unbiased(torch.cat(runs, -1), torch.cat(exact))
    along = torch.stack(
        [a @ b for a, b in zip(runs, exact, strict=True)], -1
    )  # least noise: a wrong scale shows
    assert is_unbiased(along, torch.ones(len(where)))


def _slices(model: nn.Module) -> Iterator[slice]:
    """Yield where the gradient of each parameter is."""
    start = 0
    for parameter in model.parameters():
        yield slice(start, start + parameter.numel())
        start += parameter.numel()


@pytest.mark.parametrize(("name", "precision"), _cases(GENERATED, 1))
def test_generated_code(name: str, precision: str) -> None:
    model, inputs, eager = _eager(name, PRECISIONS[precision])
    found = {}
    for policy in (None, POLICIES["exact"], POLICIES["balanced"]):
        backend = "inductor" if policy is None else wtacrs_fx.backend(policy)
        torch._dynamo.reset()
        torch.manual_seed(0)
        call = torch.compile(model, backend=backend, dynamic=False)
        found[policy] = PRECISIONS[precision].gradients(model, call, inputs)
    reference, exact, balanced = found.values()
    assert torch.equal(exact, reference)
    assert distance(balanced, reference) <= ROUNDED + 4 * distance(reference, eager)
