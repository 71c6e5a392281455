"""The order of the passes over a joint graph, and the identity of what they do."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx

from .account import make_report
from .analyse.annotations import Annotations, erase_markers, take_annotations
from .analyse.layers import layers_of, products_of, repeated_layers
from .analyse.peaks import Waiting, predict_peak, waiting
from .analyse.products import Analysis, find_products
from .analyse.work import computed_again, multiplications
from .decide.facts import number_of_products
from .decide.plan import Plan
from .decide.precision import plan_precision
from .decide.rows import plan_rows
from .decide.storage import plan_storage
from .decide.target import target_of
from .graph.cones import has_tangents, tangent_cone
from .graph.edit import bytes_of_example, copy_joint
from .graph.names import NamedInput, hands_on_gradients
from .graph.operations import VIEWS, content_of
from .graph.torch_api import (
    CustomPartitionerFn,
    collector_at_rest,
    min_cut_rematerialization_partition,
    run_joint_graph_passes,
    trace_structured,
    without_code,
)
from .joint import Joint, Partitioned, Partitioner
from .lower.compile_calls import compile_calls
from .lower.lower_noise import lower_noise
from .lower.scatter_into_sums import scatter_into_sums
from .lower.spell_operations import spell_operations
from .lower.write_once import write_once
from .maths import ops
from .partition import partition, saved_tensors
from .policy import Policy
from .received import hand_on, receive_activations
from .regions import (
    counted_in_region,
    counted_outside,
    enter_region,
    leave_region,
    region_of,
    saved_in_region,
    see_through_regions,
    verify_calls,
    with_regions,
)
from .report import MIB, Peak, Report, compared_peaks, format_bytes
from .rewrite.checkpoint_layers import checkpoint_layers, number_of_halves
from .rewrite.chunk_losses import chunk_losses
from .rewrite.encode_residuals import encode_residuals
from .rewrite.merge_equal import merge_equal
from .rewrite.observe_noise import observe_noise
from .rewrite.reassociate import reassociate
from .rewrite.recompute_checkpointed import recompute_checkpointed
from .rewrite.round_products import round_products
from .rewrite.route_gradients import route_gradients
from .rewrite.sample_rows import sample_rows
from .rewrite.slice_before_heads import slice_before_heads
from .rewrite.spell_experts import spell_experts

Pass = Callable[[Joint], None]

PASSES: tuple[Pass, ...] = (
    merge_equal,
    take_annotations,
    slice_before_heads,
    chunk_losses,
    spell_experts,
    route_gradients,
    find_products,
    plan_rows,
    sample_rows,
    reassociate,
    checkpoint_layers,
    recompute_checkpointed,
    plan_storage,
    encode_residuals,
    observe_noise,
    plan_precision,
    round_products,
    spell_operations,
    scatter_into_sums,
    lower_noise,
    compile_calls,
    partition,
    write_once,
)
"""What happens to a joint graph, in this order. `transform` ends before `lower_noise`."""

REWRITES = PASSES[: PASSES.index(lower_noise)]


class NoTangentsError(ValueError):
    """A graph without a backward part was given where a joint graph is needed."""


def run(
    passes: Sequence[Pass],
    gm: fx.GraphModule,
    policy: Policy,
    table: Sequence[NamedInput],
    num_fwd_outputs: int,
    partitioner: Partitioner,
) -> Joint:
    """Run passes over a joint graph, in place, and return what became of it.

    Each pass leaves a graph that is linted, shown to ``TORCH_TRACE`` and, where the environment names a folder
    in ``WTACRS_DUMP``, written there.
    """
    _refuse_inference(gm)
    names = {known.index: known for known in table}
    empty = Annotations(), Analysis((), (), {}, set()), Plan()
    joint = Joint(gm, policy, names, num_fwd_outputs, partitioner, *empty)
    dump = _Dump()
    dump("joint", joint)
    for step in passes:
        step(joint)
        joint.graph.lint()
        dump(step.__name__, joint)
    gm.recompile()
    return joint


def _refuse_inference(gm: fx.GraphModule) -> None:
    if not has_tangents(gm.graph):
        raise NoTangentsError(
            "a joint forward-backward graph is needed, got one without tangents; capture it from a model "
            "whose output requires grad, outside torch.no_grad() and torch.inference_mode()"
        )


class _Dump:
    """Show graphs to ``TORCH_TRACE`` and write them to a new folder under ``WTACRS_DUMP``."""

    def __init__(self) -> None:
        root = os.environ.get("WTACRS_DUMP")
        self._folder = _new_folder(pathlib.Path(root)) if root else None
        self._count = itertools.count()

    def __call__(self, name: str, joint: Joint) -> None:
        number = next(self._count)

        @functools.cache
        def text() -> str:
            return "\n\n".join(_readable(part, title) for title, part in _graphs(joint))

        trace_structured(
            "artifact", lambda: {"name": f"wtacrs_{number:02}_{name}", "encoding": "string"}, payload_fn=text
        )
        if self._folder is not None:
            (self._folder / f"{number:02}_{name}.txt").write_text(text())


def _new_folder(root: pathlib.Path) -> pathlib.Path:
    """Make and return the first folder ``graph_0``, ``graph_1``, ... that is not there, whoever asks as well."""
    for number in itertools.count():
        with contextlib.suppress(FileExistsError):
            (root / f"graph_{number}").mkdir(parents=True)
            return root / f"graph_{number}"
    raise AssertionError


def _graphs(joint: Joint) -> Iterator[tuple[str, fx.GraphModule]]:
    if joint.parts is None:
        yield "joint", joint.gm
    else:
        yield from zip(("forward", "backward"), joint.parts, strict=True)


def _readable(gm: fx.GraphModule, title: str) -> str:
    module = fx.GraphModule(gm, gm.graph, title)
    text: str = module.print_readable(print_output=False, include_stride=True, include_device=True)
    return text


def rewrite_and_partition(
    gm: fx.GraphModule,
    policy: Policy,
    table: Sequence[NamedInput],
    num_fwd_outputs: int,
    partitioner: Partitioner,
    target: int | None = None,
) -> Rewritten:
    """Rewrite a copy of a joint graph and partition it; report the bytes beside those without the rewrite.

    Args:
        target: bytes that the predicted peak is held to; None: `Policy.memory`.

    Where the policy would raise the peak, less of it is done: see `_milder`. Where it has a target for the peak that is
    not reached, more: see `_within`.
    """
    _refuse_inference(gm)
    names = {known.index: known for known in table}
    is_region = region_of(gm) is not None  # what that receives is put in, and taken out, by `regions`
    with without_code(), collector_at_rest():
        if not is_region:
            receive_activations(gm.graph, names)
        plain = copy_joint(gm)
        erase_markers(plain.graph)
        is_part = is_region or hands_on_gradients(gm.graph, names)
        before = _measure(partitioner(plain, num_fwd_outputs), num_fwd_outputs, is_part)

        def attempt(policy: Policy) -> _Attempt:
            refused: list[str] = []
            for name, milder in _milder(policy):
                joint = run(PASSES, copy_joint(gm), milder, table, num_fwd_outputs, partitioner)
                after = before if joint.parts is None else _measure(joint.parts, num_fwd_outputs, is_part)
                if joint.losses or not name or not _raises_peak(before, after, is_part):
                    break
                refused.append(f"{name}: {compared_peaks(before.peak, after.peak)}")
            return _Attempt(policy, milder, joint, after, tuple(refused))

        tangent = tangent_cone(gm.graph)
        products = products_of(layers_of(gm.graph, tangent))
        steps = _Steps(len(repeated_layers(gm.graph, tangent)), len(products))
        asked = target_of(policy, gm.graph)
        target = target or asked
        done = _within(policy, target, attempt, steps)
    joint, after = done.joint, done.after
    saved_before = [node for node in before.saved if not counted_in_region(node)]
    saved_after = [node for node in after.saved if not (is_region and counted_outside(node))]
    report = make_report(joint, saved_before, saved_after, before.peak, after.peak, done.refused)
    notes = (
        *(_asked(policy, asked, target, after.peak, is_part) if asked and target else ()),
        *_recomputed(done.policy, steps),
        *((joint.plan.offloaded,) if joint.plan.offloaded else ()),
    )
    forward, backward = after.parts
    report = dataclasses.replace(
        report,
        notes=notes,
        memory=asked,
        planned_for=target,
        work=multiplications(forward.graph.nodes),
        work_again=multiplications(computed_again(backward.graph)),
    )
    if not is_region:
        for part in after.parts:
            hand_on(part)
    return Rewritten(after.parts, report, done.policy, after.waiting, done.asked != policy)


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """What became of a graph with the policy that was asked for, and the one that is left as that raises the peak."""

    asked: Policy
    policy: Policy
    joint: Joint
    after: _Measured
    refused: tuple[str, ...]


_SMALL_CHUNKS = 2**23
"""Bytes of the logits of a chunk where memory is what matters: 128 rows of 16,384 words."""


def _within(
    policy: Policy, target: int | None, attempt: Callable[[Policy], _Attempt], steps: _Steps
) -> _Attempt:
    """Return what is done within a target for the peak, or nearest to it.

    In the order of what is lost for the bytes: time, as few products and then halves of layers as it takes are computed
    again; the error of ``residuals="small"``; products of fewer rows, of losses in smaller chunks. More computed again
    does not always lower the peak, as beside it lies what it is computed from: a part is tried, then more.
    """
    done, at = attempt(policy), 0
    if target is None:
        return done
    again, stops = steps.again(policy)
    fewer = 0
    for stop in stops:
        if _size(done) <= target:
            break
        one = attempt(policy.everywhere(**again[stop]))
        fewer = fewer if _size(one) <= target else stop
        done, at = min((done, at), (one, stop), key=lambda found: _size(found[0]))
    for fields in ({"residuals": "small"}, {"chunk_bytes": _SMALL_CHUNKS}):
        if _size(done) > target:
            done, fewer = min(done, attempt(done.asked.everywhere(**fields)), key=_size), -1
    while _size(done) <= target and at - fewer > 1:
        middle = (fewer + at) // 2
        one = attempt(done.asked.everywhere(**again[middle]))
        if _size(one) <= target:
            done, at = one, middle
        else:
            fewer = middle
    return done


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What of a graph may be computed again: so many layers that are alike, and products of matrices in them."""

    layers: int
    products: int

    def again(self, policy: Policy) -> tuple[list[dict[str, float]], list[int]]:
        """Return what to ask for, from what a policy says to everything, and where to look first."""
        products = number_of_products(policy.recompute_products, self.products)
        halves = number_of_halves(policy.recompute, self.layers)
        shares = [
            {"recompute_products": n / max(self.products, 1), "recompute": policy.recompute}
            for n in range(products, self.products + 1)
        ]
        few, many = len(shares) - 1, 2 * self.layers - halves
        shares += [
            {**shares[-1], "recompute": min(n / (2 * self.layers), 1.0)}
            for n in range(halves + 1, 2 * self.layers + 1)
        ]
        stops = {few // 2, few, *(few - (-many * quarter // 4) for quarter in range(1, 5))}
        return shares, sorted(stops - {0})


def _asked(policy: Policy, asked: int, target: int, peak: Peak, is_part: bool) -> tuple[str, ...]:
    """Say what of the memory that was asked for is predicted."""
    size = format_bytes(asked)
    size = f"{policy.memory} leaves {size}" if policy.is_of_device else f"{size} asked"
    reached = "" if peak.size <= target else f", not reached {peak}"
    alone = "; other graphs of the step have a peak of their own" if is_part else ""
    predicted = format_bytes(peak.size)
    return (f"memory: {size}, {predicted} predicted{reached}{alone}",)


def _size(done: _Attempt) -> int:
    return done.after.peak.size


def _recomputed(policy: Policy, steps: _Steps) -> tuple[str, ...]:
    """Say how many layers, and how many products of layers, the backward pass computes again."""
    again = []
    if policy.recompute:
        halves = number_of_halves(policy.recompute, steps.layers)
        again.append(f"{halves / 2:g} of {steps.layers} layers that are alike")
    if policy.recompute_products and steps.products:
        products = number_of_products(policy.recompute_products, steps.products)
        again.append(
            f"{products} of {steps.products} products in layers that are alike, as far as it reads them"
        )
    return tuple(f"computed again in the backward pass: {each}" for each in again)


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A partitioned graph, what became of it, and what of the policy was done.

    Attributes:
        is_tighter: more than the policy says was done for a target for the peak.
    """

    parts: Partitioned
    report: Report
    policy: Policy
    waiting: Waiting
    is_tighter: bool


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A partition with the tensors that it saves and its predicted peak."""

    parts: Partitioned
    saved: list[fx.Node]
    waiting: Waiting
    peak: Peak

    @property
    def saved_bytes(self) -> int:
        """Their bytes, with the sizes of the example inputs where those are symbolic."""
        return sum(map(bytes_of_example, self.saved))


def _measure(parts: Partitioned, num_fwd_outputs: int, is_part: bool) -> _Measured:
    crossing = saved_tensors(parts[0], num_fwd_outputs)
    saved = [node for node in crossing if not _is_view_of_input(node) and not saved_in_region(node)]
    saved = [node for node in saved if node.target is not ops.observed_step]
    wait = waiting(*parts, num_fwd_outputs, is_part)
    return _Measured(parts, saved, wait, predict_peak(*parts, wait))


def _milder(policy: Policy) -> Iterator[tuple[str, Policy]]:
    """Yield the policy and what is left of it when less and less is done, with the name of what is given up next.

    Nothing is given up where a loss is computed in chunks: all logits at once would be back.
    """
    for name in ("product_dx", "product"):
        if policy.rounds(name):
            yield f"{name} {getattr(policy, name) or 'auto'!r}", policy
            policy = policy.everywhere(**{name: "exact"})
    yield f"residuals {policy.residuals!r}", policy
    yield "sampled rows", policy.everywhere(residuals="exact")
    yield "", policy.everywhere(residuals="exact", ratio=1.0)


_ALLOCATION = 2 * MIB
"""Bytes that allocators take at once: a peak that is higher by less is not."""


def _raises_peak(before: _Measured, after: _Measured, is_part: bool) -> bool:
    """Tell whether a step would need more memory than without the rewrite.

    Where a graph is one of several of a step, what another one saves waits meanwhile, and that is taken to shrink as
    much as what this one saves.
    """
    shrunk = before.saved_bytes - after.saved_bytes if is_part else 0
    return after.peak.size - max(shrunk, 0) > before.peak.size + _ALLOCATION


def _is_view_of_input(node: fx.Node) -> bool:
    """Tell whether saving the node takes no memory, as the input lives anyway."""
    return content_of(node, VIEWS).op == "placeholder"


class WtacrsPartitioner(CustomPartitionerFn):
    """Inductor's hook: called with each joint graph after Inductor's own passes over it.

    Args:
        policy: what the user asked for.
        table: parameters and buffers among the inputs.
        receive: called with the report of each partitioned graph.
        target: bytes that the predicted peak is held to; None: `Policy.memory`.

    Attributes:
        waiting: of the last graph, the names of what its backward pass reads and nobody else, and the bytes that the
            program returns: no graph, as Inductor copies its configuration.
        is_tighter: see `Rewritten`, of the last graph.
    """

    waiting: tuple[frozenset[str], int] | None = None
    is_tighter = False

    def __init__(
        self,
        policy: Policy,
        table: tuple[NamedInput, ...],
        receive: Callable[[Report], None],
        target: int | None = None,
    ) -> None:
        self.policy = policy
        self.table = table
        self.receive = receive
        self.target = target

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Return the forward and the backward graph of the rewritten `gm`."""
        num_fwd_outputs: int = kwargs.pop("num_fwd_outputs")

        def partitioner(graph: fx.GraphModule, outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
            return min_cut_rematerialization_partition(graph, joint_inputs, num_fwd_outputs=outputs, **kwargs)

        if not has_tangents(gm.graph):
            erase_markers(gm.graph)
            return partitioner(gm, num_fwd_outputs)  # nothing is trained here
        names = {known.index: known for known in self.table}
        region = region_of(gm)
        if region is not None:
            kwargs["static_lifetime_input_indices"] = enter_region(gm, region, self.policy, names)
        see_through_regions(gm)
        rewritten = rewrite_and_partition(
            gm, self.policy, self.table, num_fwd_outputs, partitioner, self.target
        )
        verify_calls(gm, rewritten.parts)
        report = with_regions(rewritten.report, gm, names)
        if region is not None:
            leave_region(rewritten.parts, region, report)
        else:
            self.receive(report)
        self.waiting = rewritten.waiting.names, rewritten.waiting.returned
        self.is_tighter = rewritten.is_tighter
        return rewritten.parts

    def after_inductor(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Return what Inductor would: the graph goes through its own passes first."""
        return self(run_joint_graph_passes(gm), joint_inputs, **kwargs)

    def uuid(self) -> Any:
        """Identify the source of the passes, the whole policy and the parameters: the key of the caches."""
        return (source_hash(), repr(self.policy), repr(self.table), self.target)


@functools.cache
def source_hash() -> str:
    """Return a hash of the source of this package."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
