"""Random small programs: the same gradients without rounding, near ones with it.

``WTACRS_PROGRAMS`` is how many; where it is given, Hypothesis makes a failing one small.
"""

from __future__ import annotations

import copy
import os
import unittest.mock

import torch
from aot import Variants, distance, small_tensors, wrong_bytes
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from programs import OPERATIONS, Machine, Program, Step, gradients
from torch import Tensor

from wtacrs_fx import Policy
from wtacrs_passes.decide.modes import MODES, Mode

PROGRAMS = int(os.environ.get("WTACRS_PROGRAMS", "12"))
QUICK = (Phase.explicit, Phase.reuse, Phase.generate)
"""Of an ordinary run: to make a failing program small takes minutes."""

ROUNDED = 0.02
"""Largest squared error of all gradients together, relative to their square, that one rounded residual may cause.

More is no fault by itself: a program may read a residual where it is smallest, whose peak is what bounds the error.
Such an error comes from rounding if finer steps make it smaller by their square.
"""

WORST = 1.0
"""The same whatever finer steps do: an error as large as the gradient."""

FINER = 32
"""Half of what four bits more of a table do where a program reads it in a flat tail alone, 65; over its range 256;
four more of integers: 329.
"""

NOISE = 1e-6
"""The same of the reference in float32: a gradient that cancels to its rounding has nothing to compare."""

POLICIES = {
    "exact": Policy(ratio=1.0, residuals="exact"),
    "lossless": Policy(ratio=1.0, residuals="lossless"),
    "balanced": Policy(ratio=1.0),
}

_index = st.integers(0, 3)
PROGRAM = st.builds(
    Program,
    rows=st.sampled_from((64, 73, 96)),
    features=st.sampled_from((32, 48, 64)),
    steps=st.lists(
        st.builds(Step, st.sampled_from(list(OPERATIONS)), _index, _index), min_size=1, max_size=7
    ).map(tuple),
    outputs=st.integers(1, 2),
    backward=st.sampled_from(("once", "retained", "accumulated")),
    input_gradient=st.booleans(),
)


@settings(
    max_examples=PROGRAMS,
    phases=tuple(Phase) if "WTACRS_PROGRAMS" in os.environ else QUICK,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(PROGRAM)
def test_gradients_of_a_program(program: Program) -> None:
    with small_tensors():
        problems = find_problems(program)
    assume(problems is not None)
    assert not problems, "\n".join(problems)


def find_problems(program: Program) -> list[str] | None:
    """Return what is wrong with each policy; None where the reference itself is only noise."""
    torch.manual_seed(0)
    machine = Machine(program)
    twin = copy.deepcopy(machine).double()
    full = gradients(program, twin, twin)
    variants = Variants(POLICIES)
    call = torch.compile(machine, backend=variants, dynamic=False)
    reference = gradients(program, machine, call)
    if not distance(reference, full) < NOISE:
        return None

    def with_finer_steps() -> Tensor:
        finer = Variants({"finer": Policy(ratio=1.0, residuals="small")})
        finer.active = "finer"
        with unittest.mock.patch.dict(MODES, small=Mode("int8", "int8", 7)):
            return gradients(program, machine, torch.compile(machine, backend=finer, dynamic=False))

    assert torch.equal(reference, gradients(program, machine, call))
    problems = []
    for name in POLICIES:
        variants.active = name
        try:
            found = gradients(program, machine, call)
            bound = _bound(variants, name)
            problem = _error(found, reference, bound)
            if problem and bound and distance(found, reference) < WORST:
                problem = _error(with_finer_steps(), reference, distance(found, reference) / FINER)
        except Exception as error:  # all policies are to be heard of
            problem = f"{type(error).__name__}: {error}"
        problems += [f"{name}: {problem}"] if problem else []
    return problems + [problem for graph in variants.graphs for problem in wrong_bytes(graph)]


def _bound(variants: Variants, name: str) -> float:
    """Return what the error may be: of several residuals in few bits, each has its own, and they add up."""
    if name != "balanced":
        return 0.0
    reports = [graph.partitions[name].report for graph in variants.graphs]
    rounded = [
        r for report in reports if report for r in report.residuals if r.encoding in ("int6", "int4", "table")
    ]
    return ROUNDED * max(1, len(rounded))


def _error(found: Tensor, reference: Tensor, bound: float) -> str:
    """Compare the gradients of a policy with those of the reference, which are finite."""
    if not found.isfinite().all():
        return f"{(~found.isfinite()).sum()} gradients are not finite"
    error = distance(found, reference)
    return f"error {error:.3g} > {bound:.3g}" if error > bound else ""
