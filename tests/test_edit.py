"""New operations get the value that they would be computed to, and each kind of them is computed once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Transformer
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_passes.graph import edit
from wtacrs_passes.graph.edit import Editor, sort_by_place
from wtacrs_passes.graph.torch_api import FakeTensorMode
from wtacrs_passes.maths import encodings

aten = torch.ops.aten


def inputs(*shapes: tuple[int, int], dynamic: bool = False) -> tuple[Editor, list[fx.Node]]:
    """Return an editor of a graph that has inputs of these shapes, and the inputs; with one symbol for equal rows."""
    graph, mode = fx.Graph(), FakeTensorMode(shape_env=ShapeEnv())
    nodes = [graph.placeholder(f"x_{i}") for i in range(len(shapes))]
    rows = DimDynamic.DUCK if dynamic else DimDynamic.STATIC
    for node, shape in zip(nodes, shapes, strict=True):
        context = StatelessSymbolicContext(dynamic_sizes=[rows, DimDynamic.STATIC])
        source = ConstantSource(node.name)
        node.meta["val"] = mode.from_tensor(torch.zeros(shape), source=source, symbolic_context=context)
        assert isinstance(node.meta["val"].shape[0], torch.SymInt) == dynamic
    return Editor(graph), nodes


def memory(node: fx.Node) -> int:
    return node.meta["val"].untyped_storage()._cdata


def described(node: fx.Node) -> tuple:
    value = node.meta["val"]
    return type(value), value.dtype, value.device, tuple(value.shape), value.stride(), value.fake_mode


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """Return the functions that are traced from now on."""
    found: list[Callable] = []
    trace = edit.trace_operations

    def trace_operations(function: Callable, values: list) -> fx.Graph:
        found.append(function)
        return trace(function, values)

    monkeypatch.setattr(edit, "trace_operations", trace_operations)
    return found


@pytest.mark.parametrize("dynamic", [False, True])
def test_equal_operations_have_equal_values_in_memory_of_their_own(dynamic: bool) -> None:
    editor, operands = inputs((4, 6), (4, 6), dynamic=dynamic)
    first, second = (editor.call(aten.exp.default, operand) for operand in operands)
    assert described(first) == described(second) and memory(first) != memory(second)
    several = [editor.call(aten.topk.default, operand, 2) for operand in operands]
    assert [v.dtype for v in several[1].meta["val"]] == [torch.float32, torch.int64]
    assert several[0].meta["val"][0] is not several[1].meta["val"][0]


def test_a_view_shares_memory_with_its_own_operand() -> None:
    editor, operands = inputs((4, 6), (4, 6))
    views = [editor.call(aten.permute.default, operand, [1, 0]) for operand in operands]
    assert list(map(memory, views)) == list(map(memory, operands))


def test_operands_of_another_kind_are_computed() -> None:
    editor, (x, y) = inputs((4, 6), (4, 7))
    ints = editor.call(aten.zeros_like.default, x, dtype=torch.int64)
    assert editor.call(aten.mul.Tensor, ints, 2).meta["val"].dtype == torch.int64
    assert editor.call(aten.mul.Tensor, ints, 2.0).meta["val"].dtype == torch.float32
    transposed = editor.call(aten.permute.default, x, [1, 0])
    assert editor.call(aten.exp.default, transposed).meta["val"].stride() == (1, 6)
    assert [editor.call(aten.exp.default, n).meta["val"].shape for n in (x, y)] == [(4, 6), (4, 7)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_function_is_traced_once_for_operands_of_a_kind(traces: list[Callable], dynamic: bool) -> None:
    editor, operands = inputs((4, 32), (4, 32), dynamic=dynamic)
    codes = [editor.trace(encodings.quantise, operand, bits=8) for operand in operands]
    assert len(traces) == 1
    editor.trace(encodings.quantise, operands[0], bits=4)
    assert len(traces) == 2
    for first, second in zip(*codes, strict=True):
        assert described(first) == described(second) and memory(first) != memory(second)


def test_deeper_models_trace_no_more_encodings(traces: list[Callable]) -> None:
    counts = []
    for layers in (2, 6):
        traces.clear()
        report = wtacrs_fx.explain(
            Transformer(layers=layers), torch.randint(50, (4, 32)), policy=Policy(ratio=0.3, min_rows=8)
        )
        assert sum(line.encoding in ("int8", "int6", "int4") for line in report.residuals) >= 2 * layers
        counts.append(len(traces))
    assert counts[0] == counts[1] <= 12


def test_what_nothing_waits_for_stays_in_its_place() -> None:
    """What an operand takes along to the end keeps its order: sums of a chain are not left until the chain is over."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    late = graph.call_function(torch.ops.aten.neg.default, (x,))
    node, totals = late, []
    for _ in range(3):
        following = graph.call_function(torch.ops.aten.sin.default, (node,))
        totals.append(graph.call_function(torch.ops.aten.sum.default, (node,)))
        node = following
    graph.output((*totals, node))
    places = {node: place for place, node in enumerate(graph.nodes)}
    next(iter(reversed(graph.nodes))).prepend(late)
    sort_by_place(graph, places)
    graph.lint()
    assert list(graph.nodes) == sorted(places, key=places.__getitem__)
