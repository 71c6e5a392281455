"""Peaks of generated code, counted without memory, beside those that are measured."""

from __future__ import annotations

import textwrap
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wtacrs_fx
from wtacrs_fx import Policy, backend
from wtacrs_fx.tools.measure import peak_bytes
from wtacrs_passes.lower.allocations import peak_of_code

KIB = 1024
BLOCK = 2**20
"""Bytes of a block of the head's product before it is added to the sum, which are not counted."""


def code(
    body: str, args: str = "x = rand_strided((256, ), (1, ), dtype=torch.float32)", names: str = "x"
) -> str:
    """Return a module like those that Inductor writes; `x` has a KiB."""
    call = textwrap.indent(textwrap.dedent(body).strip(), "        ")
    inputs = textwrap.indent(textwrap.dedent(args).strip(), "    ")
    return (
        f"class Runner:\n    def call(self, args):\n        {names}, = args\n        args.clear()\n{call}\n\n"
        f"def get_args():\n    from torch._dynamo.testing import rand_strided\n{inputs}\n    return [{names}]\n"
    )


def empty(name: str, kib: int) -> str:
    return f"{name} = empty_strided_cpu(({256 * kib}, ), (1, ), torch.float32)"


@pytest.mark.parametrize(
    ("body", "kib"),
    [
        (f"{empty('a', 2)}\n{empty('b', 3)}\nreturn (a, b)", 5),
        (f"{empty('a', 2)}\ndel a\n{empty('b', 3)}\nreturn (b, )", 3),
        (f"{empty('a', 2)}\nb = a; del a  # reuse\ncpp_fused_0(x, b)\n{empty('c', 1)}\nreturn (b, c)", 3),
        (f"{empty('a', 2)}\nb = reinterpret_tensor(a, (256, ), (1, ), 8)\ndel a\n{empty('c', 1)}\nreturn (b, c)", 3),
        (f"{empty('a', 4)}\nextern_kernels.mm(x, x, out=a)\nreturn (a, )", 4),
        (f"{empty('a', 4)}\nb = torch.ops.aten.split.Tensor(a, 256)\nc = b[0].exp()\nreturn (c, )", 5),
        (f"with torch.cuda._DeviceGuard(0):\n    {empty('a', 4)}\n    del a\n    {empty('b', 5)}\n    return (b, )", 5),
        (f"triton_poi_fused_0.run(x, 256, stream=get_raw_stream(0))\n{empty('a', 1)}\nreturn (a, )", 1),
    ],
)  # fmt: skip
def test_what_names_hold_is_counted(body: str, kib: int) -> None:
    assert peak_of_code(code(body), frozenset()) == kib * KIB


def test_inputs_that_wait_are_counted_until_they_are_read() -> None:
    body = f"{empty('a', 2)}\ncpp_fused_0(x, y, a)\ndel x\ndel y\n{empty('b', 1)}\nreturn (a, b)"
    args = "x, y = [rand_strided((256, ), (1, ), dtype=torch.float32) for _ in range(2)]"
    held = [peak_of_code(code(body, args, "x, y"), frozenset(names)) for names in ("", "x", "xy")]
    assert held == [3 * KIB, 3 * KIB, 4 * KIB]  # y is a parameter: it lives anyway


def test_memory_of_inputs_that_are_read_is_not_taken_for_theirs() -> None:
    """The address of a storage that is gone may be that of the next one."""
    names = [f"x{i}" for i in range(64)]
    made = "\n".join(f"del x{i}\n{empty(f'a{i}', 2)}" for i in range(64))
    args = "\n".join(f"{name} = rand_strided((256, ), (1, ), dtype=torch.float32)" for name in names)
    assert peak_of_code(code(f"{made}\nreturn ()", args, ", ".join(names)), frozenset()) == 64 * 2 * KIB


def test_code_that_cannot_be_told() -> None:
    assert peak_of_code("cpp_wrapper_src = r'''int call() {}'''", frozenset()) is None
    assert peak_of_code(code("a = torch.ops.wtacrs.unknown(x)\nreturn (a, )"), frozenset()) is None


class Words(nn.Module):
    """A head with a loss that is computed in chunks, on layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(3))
        )
        self.head = nn.Linear(64, 3000)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = x + F.dropout(layer(x), 0.1)
        return F.cross_entropy(self.head(x).float(), labels)


def test_a_step_holds_what_its_code_says() -> None:
    torch.manual_seed(0)
    model, x, labels = Words(), torch.randn(4096, 64), torch.randint(3000, (4096,))
    compiler = backend(Policy(ratio=0.5, memory=2**40, chunk_bytes=2**21))
    call = torch.compile(model, backend=compiler)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(x, labels)
        loss.backward()

    with patch.object(compiler, "_compile", wraps=compiler._compile) as compiled:
        step()
    assert compiled.call_count == 1  # there is nothing to be done for such a target
    [report] = compiler.reports
    model.zero_grad()
    measured = peak_bytes(step, torch.device("cpu"))
    assert report.peak_of_code is not None
    assert abs(report.peak_of_code - measured) < 0.01 * measured + BLOCK
    assert report.notes[-1].startswith("the generated code holds ") and report.planned_for == 2**40
    assert wtacrs_fx.Report.from_dict(report.to_dict()) == report
