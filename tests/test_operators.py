"""PyTorch's own operators as a test of gradients: each behind linear layers, under each policy.

The operators, and arguments that they take, come from the database that PyTorch tests itself with. A program
maps ``x [rows, features]`` through one linear layer for each operand into a range, applies the operator, and
sums what comes out with random weights; in half of the programs another linear layer reads it first. The
reference is PyTorch's partition without the rewrite. Nothing is compiled: the two graphs run operation by
operation.

A random share of the operators (7 in 100) is tried, in one case each; ``make operators`` tries all.
What fails, grouped: ``python tests/test_operators.py --only 'softmax|norm' --policy balanced``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import random
import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

pytest.importorskip("expecttest", reason="PyTorch's database of operators imports it")

import torch._inductor.config
from conftest import is_unbiased, seed_of_run
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

from wtacrs_fx import Policy
from wtacrs_passes.pipeline import WtacrsPartitioner

EXCEPTIONS: dict[str, str] = {}
"""Operators whose error may exceed the bound, with the reason: order statistics, and nothing else."""

_sampled = functools.partial(Policy, ratio=0.3, min_rows=8, min_features=1, residuals="exact")

POLICIES = {
    "exact": Policy(ratio=1, residuals="exact"),
    "lossless": Policy(ratio=1, residuals="lossless"),
    "balanced": Policy(ratio=1, residuals="balanced"),
    "small": Policy(ratio=1, residuals="small"),
    "sampled": _sampled(),
    "sampled-backward": _sampled(placement="backward"),
}
BOUNDS = {"exact": 0.0, "lossless": 0.0, "balanced": 0.02, "small": 0.1}
"""Bounds of the squared error of all gradients of parameters beside their squared norm."""

SPANS: dict[str, Callable[[Tensor], Tensor]] = {
    "line": lambda x: x,
    "positive": lambda x: F.softplus(x) + 0.1,
    "unit": torch.sigmoid,
}
"""Ranges of the operands: most functions are defined on one of them."""

FEATURES = 64
SAMPLES = 2  # that are tried of each operator
LOOKED_AT = 6  # among so many
MOST = 3  # operands that are trained
LARGEST = 2**17  # elements of an operand
DRAWN = 1  # case of an operator in the ordinary run
RUNS = 100  # of a program whose mean is tested

SHARE = 0.07
ALL = os.environ.get("WTACRS_OPERATORS") == "all"
SEED = seed_of_run("WTACRS_OPERATORS_SEED")


class Rejected(Exception):
    """A sample that makes no case, with the reason: eager cannot run it, or nothing is trained by it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, by the operator's name and what distinguishes it from others.

    Attributes:
        op: name as PyTorch prints it.
        sample: index among the operator's samples.
        layout: index of the shapes that the operands have.
        span: their range.
        operands: so many of them are outputs of linear layers, the others constants.
        tail: a linear layer reads what comes out, where that is large enough.
    """

    op: str
    sample: int
    layout: int
    span: str
    operands: int
    tail: bool

    def __str__(self) -> str:
        return f"{self.op}-{self.sample}.{self.layout}-{self.span}-{self.operands}{'-tail' * self.tail}"


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an operator: operands by position among the leaves of its arguments."""

    op: OpInfo
    leaves: list[Any]
    tree: Any
    finish: Callable[[Any], Any]

    def __call__(self, operands: Mapping[int, Tensor]) -> list[Tensor]:
        """Return the outputs of floating point; complex numbers as pairs."""
        leaves = [operands.get(position, leaf) for position, leaf in enumerate(self.leaves)]
        args, kwargs = tree_unflatten(leaves, self.tree)
        found = [leaf for leaf in tree_leaves(self.finish(self.op.op(*args, **kwargs))) if _is_float(leaf)]
        return [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in found]


class Program(nn.Module):
    """x [rows, features] -> linear layers -> range -> operator -> (linear layer ->) weighted sum."""

    def __init__(self, call: Call, case: Case, rows: int) -> None:
        super().__init__()
        self.call, self.span = call, SPANS[case.span]
        self.shapes = {i: leaf.shape for i, leaf in enumerate(call.leaves) if _is_float(leaf)}
        self.trained = list(self.shapes)[: case.operands]
        self.layers = nn.ModuleList(_linear(math.ceil(self.shapes[i].numel() / rows)) for i in self.trained)
        for position, leaf in enumerate(call.leaves):
            if isinstance(leaf, Tensor) and position not in self.trained:
                constant = self.span(torch.randn(leaf.shape)) if position in self.shapes else leaf
                self.register_buffer(f"constant_{position}", constant)
        self.tail = None
        outputs = self._outputs(torch.randn(rows, FEATURES))
        if not any(output.requires_grad for output in outputs):
            raise Rejected("no output of floating point with a gradient")
        if case.tail and outputs[0].dim() > 1 and outputs[0].shape[-1] >= 16:
            self.tail = _linear(32, outputs[0].shape[-1])
            outputs[0] = self.tail(outputs[0].float())
        for i, output in enumerate(outputs):
            self.register_buffer(f"weight_{i}", torch.randn(output.shape))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        outputs = self._outputs(x)
        if self.tail is not None:
            outputs[0] = self.tail(outputs[0].float())
        return (sum((y * self.get_buffer(f"weight_{i}")).sum() for i, y in enumerate(outputs)),)

    def _outputs(self, x: Tensor) -> list[Tensor]:
        operands = {position: self.get_buffer(f"constant_{position}") for position in self._constants()}
        for position, layer in zip(self.trained, self.layers, strict=True):
            shape = self.shapes[position]
            flat = layer(x).flatten()
            flat = flat if flat.numel() == shape.numel() else flat[: shape.numel()]
            operands[position] = self.span(flat.view(shape))
        return self.call(operands)

    def _constants(self) -> list[int]:
        return [int(name.split("_")[1]) for name, _ in self.named_buffers() if name.startswith("constant")]


def _linear(outputs: int, inputs: int = FEATURES) -> nn.Linear:
    """Return a layer whose outputs have variance one where its inputs have."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


# Operators and their samples, brought to shapes that are worth sampling and encoding.


@functools.cache
def operators() -> dict[str, OpInfo]:
    """Return the operators that have a gradient, by name."""
    found = [
        op for op in op_db if op.supports_autograd and torch.float32 in op.supported_backward_dtypes("cpu")
    ]
    return {op.formatted_name: op for op in found}


@functools.cache
def _samples(name: str) -> list[SampleInput]:
    torch.manual_seed(0)
    return list(itertools.islice(operators()[name].sample_inputs("cpu", torch.float32), LOOKED_AT))


def _sizes(leaves: Sequence[Any], last_only: bool = False) -> dict[int, int]:
    """Return a larger size for each that the tensors have; 1 stays 1, different ones stay different.

    Args:
        last_only: enlarge only the size that the last dimension of the largest operand has.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    base = 64 if max(tensor.dim() for tensor in tensors) <= 2 else 16
    sizes = sorted({size for tensor in tensors for size in tensor.shape if size > 1})
    if last_only:
        sizes = [size for size in max(filter(_is_float, tensors), key=Tensor.numel).shape[-1:] if size > 1]
    return {size: base + 16 * index for index, size in enumerate(sizes)}


def _tiled(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `tensor` repeated to a shape, so that indices stay valid."""
    if math.prod(shape) > LARGEST:
        raise Rejected("operands too large")
    repeats = [math.ceil(new / max(old, 1)) for old, new in zip(tensor.shape, shape, strict=True)]
    return tensor.repeat(repeats)[tuple(slice(size) for size in shape)].contiguous()


def _layouts() -> list[Callable[[list[Any]], list[Any]]]:
    """Return ways to enlarge the tensors of a sample; the first that the operator takes is used."""

    def enlarged(leaves: list[Any], batch: tuple[int, ...] = (), last_only: bool = False) -> list[Any]:
        sizes = _sizes(leaves, last_only)

        def enlarge(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            shape = [*batch, *(sizes.get(size, size) for size in leaf.shape)]
            return _tiled(leaf[(None,) * len(batch)], shape)

        return [enlarge(leaf) for leaf in leaves]

    def with_arguments(leaves: list[Any]) -> list[Any]:
        sizes = _sizes(leaves)
        return [sizes.get(leaf, leaf) if type(leaf) is int else leaf for leaf in enlarged(leaves)]

    def batched(leaves: list[Any]) -> list[Any]:
        flat = max(leaf.dim() for leaf in leaves if isinstance(leaf, Tensor)) < 2
        return enlarged(leaves, batch=(64 if flat else 8,))

    def filled(*shape: int) -> Callable[[list[Any]], list[Any]]:
        """Give every operand one shape, whatever it had."""
        return lambda leaves: [torch.empty(shape) if _is_float(leaf) else leaf for leaf in leaves]

    last = functools.partial(enlarged, last_only=True)
    return [enlarged, with_arguments, last, batched, filled(64, 64), filled(4, 32, 32), filled(2, 8, 32, 32)]


LAYOUTS = _layouts()


def call_of(name: str, sample: int, layout: int) -> Call:
    """Return the call of an operator with a sample's arguments and enlarged tensors."""
    given = _samples(name)[sample]
    leaves, tree = tree_flatten(((given.input, *given.args), dict(given.kwargs)))
    if not any(map(_is_float, leaves)):
        raise Rejected("no operand of floating point")
    if any(isinstance(leaf, Tensor) and leaf.layout is not torch.strided for leaf in leaves):
        raise Rejected("sparse operands")
    leaves = LAYOUTS[layout](leaves)
    operands = [leaf for leaf in leaves if _is_float(leaf)]
    if any(leaf.is_complex() for leaf in operands):
        raise Rejected("complex operands")
    if not any(leaf.dim() > 1 and leaf.shape[-1] >= 16 and leaf[..., 0].numel() >= 64 for leaf in operands):
        raise Rejected("operands too small to be sampled or encoded")
    return Call(operators()[name], leaves, tree, given.output_process_fn_grad or (lambda output: output))


def build(case: Case) -> tuple[Program, Tensor]:
    """Return the program of a case and its input x [rows, features].

    Raises:
        Rejected: eager cannot run it, or nothing is trained by it.
    """
    call = call_of(case.op, case.sample, case.layout)
    largest = max((leaf for leaf in call.leaves if _is_float(leaf)), key=Tensor.numel)
    rows = next(rows for rows in (256, 128, 64) if rows == 64 or largest.numel() >= 16 * rows)
    torch.manual_seed(zlib.crc32(str(case).encode()))
    try:
        return Program(call, case, rows), torch.randn(rows, FEATURES)
    except Rejected:
        raise
    except Exception as error:
        raise Rejected(f"eager: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:150]}"


def cases_of(name: str) -> tuple[list[Case], list[str]]:
    """Return the cases of an operator, and why samples of it make none."""
    cases: list[Case] = []
    reasons: list[str] = []
    accepted: set[str] = set()
    try:
        count = len(_samples(name))
    except Exception as error:
        return [], [f"samples: {_first_line(error)}"]
    for sample, layout in itertools.product(range(count), range(len(LAYOUTS))):
        if len(accepted) == SAMPLES:
            break
        if cases and cases[-1].sample == sample:
            continue  # it has a layout
        try:
            call = call_of(name, sample, layout)
            if _key(call) not in accepted:
                cases += _cases_of_sample(_trial(name, sample, layout), call, len(accepted))
                accepted.add(_key(call))
        except Rejected as reason:
            reasons.append(str(reason))
    return cases, reasons


def _key(call: Call) -> str:
    return repr([leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in call.leaves])


def _trial(name: str, sample: int, layout: int) -> Case:
    """Return a case that eager can run; most functions are defined in (0, 1).

    Raises:
        Rejected: there is none.
    """
    case = Case(name, sample, layout, "unit", operands=MOST, tail=False)
    try:
        build(case)
    except Rejected as reason:
        if "differentiable" not in str(reason):
            raise
        case = dataclasses.replace(case, operands=1)
        build(case)
    return case


def _cases_of_sample(trial: Case, call: Call, index: int) -> list[Case]:
    """Return the cases of a sample, one for each range.

    The number of trained operands goes round from case to case, and every other case has a tail.
    """
    most = min(trial.operands, sum(map(_is_float, call.leaves)))
    return [
        dataclasses.replace(trial, span=span, operands=most - turn % most, tail=turn % 2 == 1)
        for turn, span in enumerate(SPANS, start=index)
    ]


# Both graphs of every partition, traced once.


class _Partitioned(Exception):
    """Leaves AOTAutograd once all partitions are there."""


Partition = tuple[fx.GraphModule, fx.GraphModule, int]
"""The forward and the backward graph, both on flat tuples, and the number of outputs before what is saved."""


def partitions(
    program: Program, x: Tensor, policies: Mapping[str, Policy]
) -> dict[str, Partition | Exception]:
    """Return what each policy makes of a program, and ``reference``: the partition without the rewrite.

    Raises:
        Exception: PyTorch itself cannot trace or partition the program.
    """
    found: dict[str, Partition | Exception] = {}

    def partition(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        outputs = kwargs["num_fwd_outputs"]
        found["reference"] = (
            *min_cut_rematerialization_partition(copy.deepcopy(gm), inputs, **kwargs),
            outputs,
        )
        for name, policy in policies.items():
            rewritten = WtacrsPartitioner(policy, (), lambda report: None)
            try:
                found[name] = (*rewritten(copy.deepcopy(gm), inputs, **kwargs), outputs)
            except Exception as error:
                found[name] = error
        raise _Partitioned

    # The sites' random numbers stay aten.rand: nothing here lowers what Inductor makes of them.
    with torch._inductor.config.patch(fallback_random=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(_Partitioned):
            aot_module_simplified(
                program,
                (x,),
                fw_compiler=nop,
                bw_compiler=nop,
                partition_fn=partition,
                decompositions=select_decomp_table(),
                keep_inference_input_mutations=True,
            )
    return found


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Fill new memory with NaN, as PyTorch does in this mode."""
    before, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def gradients(parts: Partition, program: Program, x: Tensor, seed: int = 0) -> Tensor:
    """Run both graphs; return the gradients of all parameters as one vector [n] of float64."""
    torch.manual_seed(seed)
    parameters = [p.detach() for p in program.parameters()]
    inputs = [*parameters, *(buffer.clone() for buffer in program.buffers()), x]  # some are written to
    forward, backward, outputs = parts
    with torch.no_grad():
        saved = forward(*_tokens(forward, len(inputs)), *inputs)[outputs:]
        given = [*saved, torch.ones(())]
        found = backward(*given, *_tokens(backward, len(given)))[: len(parameters)]
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs])


def _tokens(gm: fx.GraphModule, given: int) -> list[Tensor]:
    """Return the inputs that a graph has beside those given: tokens that keep its checks in order."""
    return [torch.empty(0)] * (len(gm.graph.find_nodes(op="placeholder")) - given)


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is wrong with one policy on one case.

    Attributes:
        policy: its name.
        kind: ``crash``, ``nan``, ``bits`` or ``error``.
        detail: the exception's first line, or the squared error.
    """

    policy: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.policy}: {self.kind}: {self.detail}"


def squared_error(found: Tensor, exact: Tensor) -> float:
    """Return ``|found - exact|^2 / |exact|^2`` over what is finite in `exact` [n]."""
    finite = exact.isfinite()
    error = (found - exact)[finite].square().sum().item()
    return error / exact[finite].square().sum().item() if error else 0.0


def judge(policy: str, found: Tensor, exact: Tensor, excused: bool = False) -> Failure | None:
    """Compare the gradients [n] under a policy with those of the reference."""
    bound = BOUNDS.get(policy, math.inf)
    if policy not in BOUNDS and not bool(exact.isfinite().all()):
        return None  # products that share a draw share what their rows hold, and more NaN than are drawn
    broken = int((exact.isfinite() & ~found.isfinite()).sum())
    if broken:
        return Failure(policy, "nan", f"{broken} of {exact.numel()} elements")
    error = squared_error(found, exact)
    if bound == 0:
        differ = ~((found == exact) | (found.isnan() & exact.isnan()))
        return Failure(policy, "bits", f"error {error:.2g}") if bool(differ.any()) else None
    if not error <= bound and not excused:
        return Failure(policy, "error", f"{error:.3g}")
    return None


def failures_of(
    case: Case, policies: Mapping[str, Policy] = POLICIES
) -> tuple[list[Failure], dict[str, float]]:
    """Return what is wrong with a case, and the squared error of each policy.

    Raises:
        Rejected: the reference cannot compute it either, or not twice the same.
    """
    program, x = build(case)
    try:
        found = partitions(program, x, policies)
        reference = found.pop("reference")
        assert isinstance(reference, tuple)
        exact = gradients(reference, program, x)
        with deterministic():  # a kernel that reads memory it never wrote finds NaN there
            again = gradients(reference, program, x)
    except Exception as error:
        raise Rejected(f"reference: {_first_line(error)}") from None
    if judge("exact", again, exact):
        raise Rejected("reference: not the same twice")
    failures, errors = [], {}
    for name, parts in found.items():
        try:
            if isinstance(parts, Exception):
                raise parts
            gradient = gradients(parts, program, x)
        except Exception as error:
            failures.append(Failure(name, "crash", _first_line(error)))
            continue
        errors[name] = squared_error(gradient, exact)
        failure = judge(name, gradient, exact, case.op in EXCEPTIONS)
        failures += [failure] if failure else []
    return failures, errors


# The tests


@functools.cache
def drawn_operators() -> list[str]:
    """Return the operators that this run tries, in the order of the database."""
    names = list(operators())
    drawn = set(names if ALL else random.Random(SEED).sample(names, round(len(names) * SHARE)))
    return [name for name in names if name in drawn]


@functools.cache
def drawn_cases() -> tuple[list[Case], dict[str, list[str]]]:
    """Return the cases of this run, and for each operator why samples of it are none.

    Unless all are wanted, a few are drawn of each operator.
    """
    rng = random.Random(SEED)
    cases: list[Case] = []
    reasons: dict[str, list[str]] = {}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in drawn_operators():
            new, reasons[name] = cases_of(name)
            cases += new if ALL else rng.sample(new, min(DRAWN, len(new)))
    # What was imported and built for the collection stays: the garbage collector need not search it again.
    gc.collect()
    gc.freeze()
    return cases, reasons


def _again() -> str:
    return "every operator was tried" if ALL else f"drawn with WTACRS_OPERATORS_SEED={SEED}"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Compute small tensors in one thread: a second one only waits, and long where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Draw the cases when tests are collected, not when this file is imported."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", drawn_cases()[0], ids=str)
    if "some_case" in metafunc.fixturenames:
        metafunc.parametrize("some_case", _some_cases(12), ids=str)


def test_gradients_are_those_of_the_reference(case: Case) -> None:
    other = "sampled" if case.tail else "sampled-backward"  # a few seconds less
    policies = {name: policy for name, policy in POLICIES.items() if ALL or name != other}
    try:
        failures, _ = failures_of(case, policies)
    except Rejected as reason:
        pytest.skip(str(reason))
    assert not failures, "\n".join([str(case), *map(str, failures), _again()])


def _some_cases(count: int) -> list[Case]:
    cases = drawn_cases()[0]
    return random.Random(SEED).sample(cases, min(count, len(cases)))


def test_sampled_gradients_are_unbiased(some_case: Case) -> None:
    case = some_case
    name = "sampled-backward" if case.tail else "sampled"
    try:
        program, x = build(case)
        found = partitions(program, x, {name: POLICIES[name]})
    except Exception as error:
        pytest.skip(f"reference: {_first_line(error)}")
    parts, reference = found[name], found["reference"]
    assert isinstance(parts, tuple) and isinstance(reference, tuple), f"{case}: {parts}; {_again()}"
    exact = gradients(reference, program, x)
    if not exact.isfinite().all() or judge("exact", gradients(reference, program, x, seed=1), exact):
        pytest.skip("the exact gradient is not finite, or random")
    samples = torch.stack([gradients(parts, program, x, seed) for seed in range(RUNS)])
    rounding = max(squared_error(sample, exact) for sample in samples) < 1e-10
    # Along the gradient itself there is little noise: a wrong scale is seen there, anything else elsewhere.
    along = is_unbiased((samples @ exact)[:, None], (exact @ exact)[None])
    assert rounding or (along and is_unbiased(samples, exact)), f"{case}; {_again()}"


def test_most_operators_make_a_case() -> None:
    cases, reasons = drawn_cases()
    tried = {case.op for case in cases}
    without = {name: dict(collections.Counter(why)) for name, why in reasons.items() if name not in tried}
    assert len(tried) >= 0.7 * len(reasons), f"{_again()}; without a case: {without}"


def _case(name: str, span: str) -> Case:
    return next(case for case in cases_of(name)[0] if case.span == span)


def test_the_reference_is_what_eager_computes() -> None:
    program, x = build(_case("nn_functional_gelu", "line"))
    found = partitions(program, x, {})["reference"]
    assert isinstance(found, tuple)
    program(x)[0].backward()
    exact = torch.cat([p.grad.flatten().double() for p in program.parameters()])
    assert squared_error(gradients(found, program, x), exact) < 1e-10


def test_policies_change_what_they_are_meant_to() -> None:
    _, errors = failures_of(_case("nn_functional_gelu", "line"))
    assert errors["exact"] == errors["lossless"] == 0
    assert 0 < errors["balanced"] < errors["small"]
    assert errors["sampled"] > 0 and errors["sampled-backward"] > 0


@pytest.mark.parametrize(
    ("policy", "found", "kind"),
    [
        ("exact", [1.0, 2.0, math.nan], None),
        ("exact", [1.0, 2.0000002, math.nan], "bits"),
        ("lossless", [1.0, 2.0, 3.0], "bits"),
        ("balanced", [1.1, 2.2, 0.0], None),
        ("balanced", [1.2, 2.4, 0.0], "error"),
        ("small", [1.0, math.inf, 0.0], "nan"),
        ("sampled", [9.0, 9.0, 0.0], None),
        ("sampled", [math.nan, 2.0, 0.0], None),
    ],
)
def test_wrong_gradients_are_noticed(policy: str, found: list[float], kind: str | None) -> None:
    exact = torch.tensor([1.0, 2.0, math.nan], dtype=torch.float64)
    failure = judge(policy, torch.tensor(found, dtype=torch.float64), exact)
    assert (failure.kind if failure else None) == kind


# By hand: what fails, grouped


def _names(arguments: argparse.Namespace) -> Iterator[str]:
    pattern = re.compile(arguments.only)
    names = [name for name in operators() if pattern.search(name)]
    share = 1.0 if arguments.only or arguments.all else SHARE
    yield from random.Random(SEED).sample(names, max(1, round(len(names) * share))) if share < 1 else names


def _print_groups(rows: Sequence[dict[str, str]]) -> None:
    """Print the failures by operator and kind, then the crashes by their message without numbers."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = collections.defaultdict(list)
    for row in rows:
        groups[row["op"], row["policy"], row["kind"]].append(row)
    for (op, policy, kind), members in groups.items():
        worst = max(
            (row["detail"] for row in members), key=lambda text: float(text) if kind == "error" else 0
        )
        cases = ", ".join(row["case"].removeprefix(f"{op}-") for row in members)
        print(f"{op:40} {policy:17} {kind:6} {worst}\n{'':4}{cases}")
    crashes = collections.Counter(
        re.sub(r"\d+", "#", row["detail"]) for row in rows if row["kind"] == "crash"
    )
    for message, count in crashes.most_common():
        print(f"{count:5} x {message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression: these operators, all their cases")
    parser.add_argument("--policy", choices=list(POLICIES), action="append", help="these policies only")
    parser.add_argument("--all", action="store_true", help="every operator")
    parser.add_argument("--json", help="write the failures, errors and reasons to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    policies = {name: POLICIES[name] for name in arguments.policy or POLICIES}
    rows: list[dict[str, str]] = []
    reasons: dict[str, list[str]] = {}
    errors: dict[str, dict[str, float]] = {}
    start = time.time()
    for name in _names(arguments):
        cases, reasons[name] = cases_of(name)
        for case in cases:
            try:
                failures, errors[str(case)] = failures_of(case, policies)
            except Rejected as reason:
                reasons[name].append(f"{case}: {reason}")
                continue
            rows += [{"op": name, "case": str(case), **dataclasses.asdict(failure)} for failure in failures]
    _print_groups(rows)
    rejected = collections.Counter(
        re.sub(r"^\S+-\S+: |[\d(].*", "", why) for whys in reasons.values() for why in whys
    )
    for why, count in rejected.most_common(12):
        print(f"{count:5} samples or cases left out: {why}")
    for policy in policies:
        changed = sum(bool(found.get(policy)) for found in errors.values())
        print(f"{policy}: other gradients than the reference in {changed} of {len(errors)} cases")
    bad = len({row["case"] for row in rows})
    seconds = time.time() - start
    print(f"{bad} of {len(errors)} cases fail; {len(reasons)} operators, seed {SEED}, {seconds:.0f} s")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"failures": rows, "errors": errors, "reasons": reasons}, file, indent=1)


if __name__ == "__main__":
    main()
