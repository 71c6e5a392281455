"""How sensitive a gradient is to the residuals of each module being rounded, and the bits that follow from that."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
from collections import ChainMap
from collections.abc import Container, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn

from wtacrs_passes.decide.storage import plan_storage
from wtacrs_passes.graph import torch_api
from wtacrs_passes.graph.cones import depends_on, is_tangent
from wtacrs_passes.graph.edit import bytes_of_example, copy_joint
from wtacrs_passes.graph.names import NamedInput, outputs_with_descriptors, written_inputs
from wtacrs_passes.graph.operations import aten
from wtacrs_passes.joint import Joint, Partitioned
from wtacrs_passes.pipeline import REWRITES, NoTangentsError, run
from wtacrs_passes.policy import Policy, Residuals, Rule
from wtacrs_passes.report import align, format_bytes
from wtacrs_passes.rewrite.encode_residuals import encode_residuals

from .backend import lifted_inputs
from .capture import count_forward_outputs, plain_partitioner, refuse_regions
from .diagnose import DiagnosisError, call_arguments

MODES: tuple[Residuals, ...] = ("small", "balanced", "fine")
"""Values of `Policy.residuals` between which bits are chosen, fewest first."""


@dataclasses.dataclass(frozen=True)
class ModuleSensitivity:
    """The residuals that one module computes.

    Attributes:
        module: its path; empty for what the model itself computes, which no rule can name.
        errors: for each of :data:`MODES` ``||g' - g||^2 / ||g||^2`` of the whole gradient g, where only these residuals
            are rounded.
        sizes: the bytes that they are stored in.
    """

    module: str
    errors: tuple[float, ...]
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The modules of a model whose residuals may be rounded; ``print`` shows a table."""

    modules: tuple[ModuleSensitivity, ...]
    base: Policy

    def __str__(self) -> str:
        header = ("module", *(f"{mode}: {column}" for mode in MODES for column in ("error", "bytes")))
        lines = [(x.module or "(model)", *_cells(x.errors, x.sizes)) for x in self.modules]
        errors, sizes = (_sums(values) for values in self._columns())
        return "\n".join([*align([header, *lines, ("sum", *_cells(errors, sizes))])])

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings."""
        return {"modes": list(MODES), "modules": [dataclasses.asdict(module) for module in self.modules]}

    def policy(self, *, error: float | None = None, max_bytes: float | None = None) -> Policy:
        """Return the policy with `residuals` for each module.

        The errors of modules are taken to add up, as independent ones do.

        Args:
            error: the fewest bytes at which all errors together are at most this share of the gradient's square.
            max_bytes: the least error at which all residuals together take at most so many bytes.

        Raises:
            DiagnosisError: not exactly one of both, or one that no choice of bits reaches.
        """
        if (error is None) == (max_bytes is None):
            raise DiagnosisError(
                "give either error or max_bytes, got " + ("none" if error is None else "both")
            )
        errors, sizes = map(self._possible, self._columns())
        bounded, priced = (errors, sizes) if max_bytes is None else (sizes, errors)
        bound = error if max_bytes is None else max_bytes
        assert bound is not None
        least = sum(min(values) for values in bounded)
        if least > bound:
            name, unit = ("error", "") if max_bytes is None else ("max_bytes", " bytes")
            raise DiagnosisError(
                f"{name} must be at least {least:.3g}{unit}, as the {'finest' if max_bytes is None else 'smallest'} "
                f"codes take, got {bound:g}; exclude modules that must be exact by a Rule with residuals='exact'"
            )
        chosen = _cheapest(bounded, priced, bound)
        modes = {x.module: MODES[i] for x, i in zip(self.modules, chosen, strict=True) if x.module}
        new = tuple(_rule(self.base, *item) for item in modes.items() if item[1] != _mode(self.base, item[0]))
        return dataclasses.replace(self.base, rules=(*new, *self.base.rules))

    def expected(self, policy: Policy) -> tuple[float, int]:
        """Return the error and the bytes that a policy of :meth:`policy` has by these figures."""
        which = [MODES.index(_mode(policy, x.module)) for x in self.modules]
        error = sum(x.errors[i] for x, i in zip(self.modules, which, strict=True))
        return error, sum(x.sizes[i] for x, i in zip(self.modules, which, strict=True))

    def _possible(self, column: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
        """Return figures of each module by what can be chosen: what no rule can name is as the policy says."""

        def as_it_is(values: tuple[float, ...]) -> tuple[float, ...]:
            return (values[MODES.index(_mode(self.base, ""))],) * len(MODES)

        return [
            values if x.module else as_it_is(values) for x, values in zip(self.modules, column, strict=True)
        ]

    def _columns(self) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
        return [x.errors for x in self.modules], [x.sizes for x in self.modules]


def sensitivity(
    model: nn.Module, batch: Mapping[str, Any] | Sequence[Any], policy: Policy | None = None
) -> Sensitivity:
    """Measure what rounding the residuals of each module does to the whole gradient of one batch.

    The joint graph is rewritten as for :data:`MODES` and run operation by operation, once for each module with its
    residuals rounded and all others exact: only what is computed from them in the backward pass is computed again.
    The idea is that of GACT (Liu et al. 2022, section 4), which measures it by repeated steps. Takes the memory of all
    intermediate values of a step, and the time of some backward passes for each layer; nothing is trained.

    Args:
        model: its forward returns the loss, a scalar, alone or first.
        batch: the keyword or positional arguments of a call.
        policy: which modules may be rounded; those that a rule stores exactly stay so.

    Raises:
        DiagnosisError: the model returns no scalar, no residual may be rounded, or the gradient is not finite.
        NoTangentsError: the loss does not require grad.
    """
    policy = Policy() if policy is None else policy
    traced = _trace(model, batch)
    found: dict[str, dict[str, tuple[float, int]]] = {}
    with torch.no_grad(), torch.autocast(traced.device.type, enabled=False):
        for mode in MODES:
            for module, figures in _measure(traced, _with_mode(policy, mode)).items():
                found.setdefault(module, {})[mode] = figures
    if not found:
        raise DiagnosisError(
            "no residual of the model may be rounded; see explain for the reasons, and the policy's include, exclude "
            "and rules"
        )
    nothing = 0.0, 0  # of a module of which a mode stores none, as the output of attention computed again
    by_mode = {module: [each.get(mode, nothing) for mode in MODES] for module, each in found.items()}
    modules = (
        ModuleSensitivity(module, tuple(e for e, _ in each), tuple(size for _, size in each))
        for module, each in by_mode.items()
    )
    return Sensitivity(tuple(modules), policy)


@dataclasses.dataclass
class _Traced:
    """A joint graph with the values of its primals."""

    gm: fx.GraphModule
    table: tuple[NamedInput, ...]
    primals: list[Any] = dataclasses.field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return next((x.device for x in self.primals if isinstance(x, Tensor)), torch.device("cpu"))


class _Stop(Exception):
    """Leaves a compiled model once the values of its primals are there."""


def _trace(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any]) -> _Traced:
    found: list[_Traced] = []

    def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
        def receive(*primals: Any) -> Any:
            if found:
                found[0].primals = list(primals)
            raise _Stop

        return make_boxed_func(receive)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        table = lifted_inputs(gm)

        def partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> Partitioned:
            refuse_regions(joint)
            found.append(_Traced(copy_joint(joint), table))
            return torch_api.default_partition(joint, joint_inputs, **options)

        return torch_api.trace_joint(gm, inputs, partition, compiler)

    args, kwargs = call_arguments(batch)

    def call(*args: Any, **kwargs: Any) -> Any:  # of its own, so that nothing compiled for the model is used
        return model(*args, **kwargs)

    with contextlib.suppress(_Stop):
        torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    if not found:
        raise NoTangentsError(
            f"the loss of {type(model).__name__} does not require grad, so that there is no gradient to measure; call "
            "it outside torch.no_grad() with trainable parameters"
        )
    return found[0]


def _with_mode(policy: Policy, mode: Residuals) -> Policy:
    """Return the policy with one mode wherever residuals may be rounded, and nothing else that changes gradients."""

    def of(rule: Rule) -> Rule:
        overrides = dict(rule.overrides)
        if overrides.get("residuals") in MODES:
            overrides["residuals"] = mode
        return Rule(rule.pattern, **overrides)

    own = mode if policy.residuals in MODES else policy.residuals
    policy = dataclasses.replace(policy, rules=tuple(map(of, policy.rules)), residuals=own)
    return policy.everywhere(ratio=1.0, product="exact", product_dx="exact", center=False, attention=False)


def _mode(policy: Policy, module: str) -> Residuals:
    sampling = policy.sampling(module)
    assert sampling is not None
    return sampling.residuals


def _rule(policy: Policy, module: str, mode: Residuals) -> Rule:
    """Return a rule for one module that keeps what the policy's own rules say about it."""
    asked = policy.asked(module)
    assert asked is not None
    own = {k: v for k, v in dataclasses.asdict(asked).items() if v != getattr(policy, k)}
    return Rule(glob.escape(module), **{**own, "residuals": mode})


class _Operations(fx.Interpreter):
    """Runs single nodes; a view copies where strides forbid it, as in Inductor."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation."""
        return super().call_function(
            aten.reshape.default if target is aten.view.default else target, args, kwargs
        )

    def compute(
        self,
        nodes: Iterable[fx.Node],
        values: MutableMapping[fx.Node, Any],
        keep: Container[fx.Node],
        given: Mapping[fx.Node, Any] | None = None,
    ) -> None:
        """Add the values of nodes, in graph order, to those that are known, and drop what is not read again.

        Args:
            keep: values that are not dropped.
            given: values of nodes that are not computed.
        """
        order, given = list(nodes), given or {}
        last = {operand: node for node in order for operand in node.all_input_nodes}
        self.env = values  # type: ignore[assignment]
        for node in order:
            values[node] = given[node] if node in given else self.run_node(node)
            for operand in node.all_input_nodes:
                if last[operand] is node and operand not in keep:
                    values.pop(operand, None)


def _measure(traced: _Traced, policy: Policy) -> dict[str, tuple[float, int]]:
    """Return the error of the gradient, and the bytes, for the residuals of each module that are encoded with loss."""
    joint = _planned(traced, policy)
    graph, operations = joint.graph, _Operations(joint.gm)
    values = _inputs(graph, traced.primals)
    outputs = outputs_with_descriptors(graph)
    gradients = {value for value, about in outputs if isinstance(value, fx.Node) and about.is_grad()}
    backward = joint.backward()
    forward = [node for node in _computed(graph) if node not in backward]
    operations.compute(forward, values, keep={*forward, *values})
    encode_residuals(joint)
    exactly: dict[fx.Node, Any] = {}
    roots: dict[str, set[fx.Node]] = {}
    sizes: dict[str, int] = {}
    for residual in joint.residuals:
        if residual.decoded is None or residual.stored.encoding == "bits":
            continue
        exactly[residual.decoded], module = values[residual.stored.node], residual.stored.module
        roots.setdefault(module, set()).add(residual.decoded)
        sizes[module] = sizes.get(module, 0) + sum(map(bytes_of_example, residual.codes))
    after_all = depends_on(graph, set(exactly))
    keep = gradients.union(*(node.all_input_nodes for node in graph.nodes if node in after_all))
    rest = [node for node in _computed(graph) if node not in values]
    needed = keep.union(*(node.all_input_nodes for node in rest))
    for node in set(values) - needed:
        del values[node]
    operations.compute(rest, values, keep, exactly)
    square = sum(_square(values[node]) for node in gradients)
    if not 0 < square < torch.inf:
        raise DiagnosisError(f"the gradient must be finite and not zero, its square is {square:g}")
    found = {}
    for module, decoded in roots.items():
        cone = depends_on(graph, decoded)
        changed: MutableMapping[fx.Node, Any] = ChainMap({}, values)
        operations.compute((node for node in graph.nodes if node in cone), changed, gradients)
        error = sum(_square(changed[node] - values[node]) for node in gradients if node in cone)
        found[module] = error / square, sizes[module]
    return found


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square())


def _planned(traced: _Traced, policy: Policy) -> Joint:
    """Return a copy of the joint graph with the plan of how residuals are stored, before that is done."""
    gm = torch_api.run_joint_graph_passes(copy_joint(traced.gm))
    partitioner = plain_partitioner(gm, traced.table)
    passes = REWRITES[: REWRITES.index(plan_storage) + 1]
    return run(passes, gm, policy, traced.table, count_forward_outputs(gm.graph), partitioner)


def _inputs(graph: fx.Graph, primals: Sequence[Any]) -> dict[fx.Node, Any]:
    """Return the values of a joint graph's inputs: one for the gradient of the loss, zero for those of others."""
    inputs = graph.find_nodes(op="placeholder")
    tangents = [node for node in inputs if is_tangent(node)]
    others = [node for node in inputs if not is_tangent(node)]
    loss = next((node for node in tangents if node.meta["val"].numel() == 1), None)
    if loss is None:
        raise DiagnosisError(
            "the model must return its loss, a scalar, or an object or tuple that holds it first, got tensors of "
            f"{[tuple(node.meta['val'].shape) for node in tangents]}"
        )
    values = dict(zip(others, primals, strict=True))
    for node in written_inputs(graph):  # buffers of the model stay as they are
        values[node] = values[node].clone()
    device = next((x.device for x in primals if isinstance(x, Tensor)), None)
    for node in tangents:
        example = node.meta["val"]
        fill = torch.ones if node is loss else torch.zeros
        values[node] = fill(example.shape, dtype=example.dtype, device=device)
    return values


def _computed(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _cheapest(
    bounded: Sequence[tuple[float, ...]], priced: Sequence[tuple[float, ...]], bound: float
) -> list[int]:
    """Choose one of several for each module: the least sum of prices with a sum of the others of at most `bound`.

    By a price of what is bounded (Lagrange), then what still fits, most gain first.
    """
    scales = [sum(map(max, values)) or 1.0 for values in (bounded, priced)]

    def at(weight: float) -> list[int]:
        return [
            min(range(len(a)), key=lambda i: weight * a[i] / scales[0] + b[i] / scales[1])
            for a, b in zip(bounded, priced, strict=True)
        ]

    def total(chosen: Sequence[int]) -> float:
        return sum(values[i] for values, i in zip(bounded, chosen, strict=True))

    low, high = -60.0, 60.0  # log2 of the weight
    for _ in range(60):
        weight = (low + high) / 2
        low, high = (weight, high) if total(at(2.0**weight)) > bound else (low, weight)
    chosen = at(2.0**high)
    if total(chosen) > bound:
        chosen = [min(range(len(values)), key=values.__getitem__) for values in bounded]
    gains = sorted(
        (
            (priced[m][i] - priced[m][chosen[m]], m, i)
            for m in range(len(chosen))
            for i in range(len(priced[m]))
        ),
    )
    for gain, module, index in gains:
        moved = [*chosen[:module], index, *chosen[module + 1 :]]
        if gain < 0 and priced[module][index] < priced[module][chosen[module]] and total(moved) <= bound:
            chosen = moved
    return chosen


def _sums(columns: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*columns, strict=True)))


def _cells(errors: Sequence[float], sizes: Sequence[float]) -> list[str]:
    pairs = zip(errors, sizes, strict=True)
    return [cell for error, size in pairs for cell in (f"{error:.2g}", format_bytes(round(size)))]
