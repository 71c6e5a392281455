"""The ``torch.compile`` backend; registered by the entry point ``torch_dynamo_backends``."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import fx

from wtacrs_passes.analyse.annotations import MASK_NAMES
from wtacrs_passes.decide.target import with_what_is_free
from wtacrs_passes.decide.ways import decide, rules
from wtacrs_passes.files import write_at_once
from wtacrs_passes.graph import torch_api
from wtacrs_passes.graph.edit import copy_joint
from wtacrs_passes.graph.names import NamedInput, last_name, path_from_source
from wtacrs_passes.lower.allocations import peak_of_code
from wtacrs_passes.lower.fusion import without_waiting
from wtacrs_passes.maths.observer import Observer
from wtacrs_passes.maths.offload import OffloadError
from wtacrs_passes.pipeline import WtacrsPartitioner, source_hash
from wtacrs_passes.policy import Policy, PolicyError, Rule, nearest
from wtacrs_passes.regions import calls_regions, describe_regions
from wtacrs_passes.report import Report, format_bytes

from .options import inductor_config, policy_from_options

_REPORTS: list[Report] = []


class PatternWarning(UserWarning):
    """A pattern of the policy has matched no module in any graph compiled with it so far."""


class FallbackWarning(UserWarning):
    """A graph was compiled by Inductor alone, as an error of this backend stood in the way."""


STRICT = "WTACRS_STRICT"
"""Variable of the environment; 1: an error of this backend is raised, where nothing else is said."""


def reports() -> list[Report]:
    """Return a report for each training graph that this process compiled with the backend, in order.

    Graphs whose code came from Inductor's caches are included, with ``from_cache=True``.
    """
    return list(_REPORTS)


class Backend:
    """A backend object with its own policy, for ``torch.compile(model, backend=...)``.

    Args:
        policy: what is sampled, and how.
        mode: as in ``torch.compile``.
        inductor_options: configuration of Inductor.
        strict: raise what goes wrong in this backend. Else the graph is compiled by Inductor alone, as if the policy
            said nothing, with a :class:`FallbackWarning` and a note in its report. None: as :data:`STRICT` says.

    Attributes:
        reports: of the training graphs that this object compiled, in order.
        decided: what the noise budgets of all its graphs have led to so far: ``Policy.decided`` of a resumed run.

    Raises:
        PolicyError: an option that Inductor does not know, or one that this backend sets itself.
    """

    def __init__(
        self,
        policy: Policy,
        mode: str | None,
        inductor_options: Mapping[str, Any],
        strict: bool | None = None,
    ) -> None:
        if not isinstance(policy, Policy):
            raise PolicyError(f"policy must be a wtacrs_fx.Policy, got {policy!r}")
        self.policy = policy
        self.config = inductor_config(mode, inductor_options)
        if policy.offload == "host" and self.config.get("triton.cudagraphs"):
            raise PolicyError(
                "CUDA graphs cannot wait for the host, got offload='host' with them; leave one out"
            )
        self.strict = os.environ.get(STRICT, "0") != "0" if strict is None else strict
        self.reports: list[Report] = []
        self.decided = policy.decided
        self._again: dict[_Identity, _Progress] = {}
        self._free: int | str | None = None
        self._unmatched = set(policy.unmatched(()))
        self._failures: set[str] = set()
        self.__name__ = "wtacrs"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Callable[..., Any]:
        """Compile a Dynamo graph with Inductor and the rewritten joint graph."""
        if mode or options:
            raise PolicyError(
                f"a backend object has its options already, got mode={mode!r}, options={options!r}; "
                f"give them to wtacrs_fx.backend(policy, ...) or use backend='wtacrs'"
            )
        if self.strict:
            return self._compile_graph(gm, example_inputs, name)
        plain = copy_joint(gm)
        try:
            return self._compile_graph(gm, example_inputs, name)
        except _NOT_OURS:
            raise
        except Exception as error:
            return self._fall_back(plain, example_inputs, name, error)

    def _fall_back(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], name: str | None, error: Exception
    ) -> Callable[..., Any]:
        """Compile a graph with Inductor alone; what is wrong with the program is raised by that as well."""
        compiled = torch_api.compile_fx(gm, example_inputs, self.config, name, lambda choices: choices)
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"[:_LONGEST_REASON]
        if _is_training(example_inputs):
            note = f"compiled by Inductor alone, as this backend failed: {reason}"
            report = Report((), 0, 0, notes=(note,))
            _REPORTS.append(report)
            self.reports.append(report)
        if reason not in self._failures:
            self._failures.add(reason)
            warnings.warn(
                f"a graph is compiled by Inductor alone, as the wtacrs backend failed: {reason}. Its gradients are "
                f"Inductor's, and it saves as many bytes. Please report it; strict=True or {STRICT}=1 raises the error",
                FallbackWarning,
                stacklevel=2,
            )
        return compiled

    def _compile_graph(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], name: str | None
    ) -> Callable[..., Any]:
        table = lifted_inputs(gm)
        measures = _is_training(example_inputs) and self.policy.has_budgets and self._can_measure(gm)
        code, policy, progress = torch_api.code_in_compilation(), self.policy.unmeasured(), _Progress()
        if measures:
            identity = _identity(gm, code)
            progress = self._again.pop(identity, _Progress(self.policy.decided))
            policy = dataclasses.replace(self.policy, decided=progress.decided)
        policy = self._with_memory(policy, example_inputs)
        path = _report_path(gm, example_inputs, self.config, policy, table)
        trains = _is_training(example_inputs)
        if trains and policy.memory is not None:

            def compile_once(target: int | None) -> _Attempt:
                return self._compile(policy, copy_joint(gm), example_inputs, name, table, target)

            attempt = _compile_within(compile_once, _read(path))
        else:
            attempt = self._compile(policy, gm, example_inputs, name, table)
        compiled, received = attempt.compiled, attempt.received
        if trains and not received and not path.exists():
            # The code came from a cache and its report is gone, or was of an equal graph with other names. The passes
            # say it again; no code is generated.
            partitioner = WtacrsPartitioner(policy, table, received.append)
            with describe_regions():
                torch_api.trace_joint(gm, example_inputs, partitioner.after_inductor)
            received = [dataclasses.replace(report, from_cache=True) for report in received]
        report = _keep(path, received) if trains else None
        if report is not None:
            _REPORTS.append(report)
            self.reports.append(report)
            self._warn_unmatched(report)
            if measures:
                return _Measured(self, compiled, report, policy, code, identity, progress)
        return compiled

    def _with_memory(self, policy: Policy, example_inputs: Sequence[Any]) -> Policy:
        """Return a policy whose target is a number; what is free counts when the first graph is compiled."""
        if policy.memory == "auto":
            self._free = self._free or with_what_is_free(policy, example_inputs).memory
            policy = dataclasses.replace(policy, memory=self._free)
        return policy

    def _compile(
        self,
        policy: Policy,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        name: str | None,
        table: tuple[NamedInput, ...],
        target: int | None = None,
    ) -> _Attempt:
        """Compile a graph once; `target` as in `WtacrsPartitioner`."""
        received: list[Report] = []
        partitioner = WtacrsPartitioner(policy, table, received.append, target)
        config = {**self.config, "custom_partitioner_fn": partitioner}
        if calls_regions(gm):
            config["allow_buffer_reuse"] = False  # Inductor would reuse what a region has returned as well
        codes = dict[str, str]() if policy.memory and _is_training(example_inputs) else None
        with describe_regions():
            compiled = torch_api.compile_fx(gm, example_inputs, config, name, without_waiting, codes)
        peak = _peak_of_codes(codes or {}, partitioner.waiting)
        reports = [_counted(report, peak) for report in received]
        return _Attempt(compiled, reports, peak, partitioner.is_tighter)

    def _can_measure(self, gm: fx.GraphModule) -> bool:
        """Tell whether operations of a graph can count steps on the host, and belong to one layer each."""
        return not (self.config.get("triton.cudagraphs") or calls_regions(gm))

    def _warn_unmatched(self, report: Report) -> None:
        named = {site.module for site in report.sites} | {one.module for one in report.residuals}
        modules = sorted(named - {""})
        self._unmatched &= set(self.policy.unmatched(modules))
        for pattern in sorted(self._unmatched):
            warnings.warn(
                f"the pattern {pattern!r} of the policy matches no module with a weight gradient or residual"
                f"{nearest(pattern, modules)} (modules of this graph: {', '.join(modules)})",
                PatternWarning,
                stacklevel=2,
            )


_NOT_OURS = (PolicyError, OffloadError, Warning, torch_api.TorchDynamoException)
"""What the user is to be told, and what PyTorch tells itself, such as to begin anew."""
_LONGEST_REASON = 300


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """A compiled graph.

    Attributes:
        received: the reports of its partitions.
        peak: the bytes that its code holds, where they are known.
        is_tighter: more than the policy says was done for its target.
    """

    compiled: Callable[..., Any]
    received: list[Report]
    peak: int | None
    is_tighter: bool


_MOST_PLANS, _MOST_UNTIL_IT_FITS = 3, 5
"""Times that a graph is compiled for a target, and where none of those is within it."""
_MARGIN = 0.97
"""Of the next target, once more for each plan that is not within it: the ratio to the code differs between plans."""
_NEAR = 0.95
"""A peak of this much of the target is not worth another compilation."""


def _peak_of_codes(codes: Mapping[str, str], waiting: tuple[frozenset[str], int] | None) -> int | None:
    """Return the larger of the peaks of both passes; None where one is not known."""
    if waiting is None or codes.keys() != {"forward", "backward"}:
        return None
    before = peak_of_code(codes["forward"], frozenset())
    names, returned = waiting
    after = peak_of_code(codes["backward"], names)
    return None if before is None or after is None else max(before, after + returned)


def _compile_within(compile_once: Callable[[int | None], _Attempt], known: Report | None) -> _Attempt:
    """Compile a graph until its code holds no more than the policy's target, and little less where it can.

    A plan rests on a prediction. Where the code shows that this is off, the next one is held to another target, as far
    from the policy's as the prediction was from the code.

    Args:
        compile_once: compiles it with its predicted peak held to so many bytes; None: to the policy's.
        known: the report of an earlier process.
    """
    target = known.planned_for if known is not None else None
    best = compile_once(target)
    if target is not None or best.peak is None or not best.received:
        return best  # as before; or nothing is trained here; or the code cannot be told
    asked = best.received[-1].memory
    assert asked is not None
    attempt, fits, fails = best, 0, 2 * asked  # the largest target known to do, the smallest known not to
    for number in range(1, _MOST_UNTIL_IT_FITS):
        report, peak = attempt.received[-1], attempt.peak
        assert report.peak_after is not None and report.planned_for is not None
        if peak is None or _NEAR * asked <= peak <= asked or (peak <= asked and not attempt.is_tighter):
            break
        predicted = report.peak_after.size
        if peak <= asked:
            fits = max(fits, report.planned_for, predicted)
        else:
            fails = min(fails, report.planned_for, predicted)
        if number >= _MOST_PLANS and fits:
            break
        margin = 1.0 if fits else _MARGIN ** (number - 1)
        target = round(margin * predicted * asked / peak)
        target = target if fits < target < fails else (fits + fails) // 2
        if not fits < target < fails:
            break
        attempt = compile_once(target)
        best = attempt if _is_better(attempt, best, asked) else best
    return best


def _is_better(one: _Attempt, other: _Attempt, asked: int) -> bool:
    """Tell whether an attempt is within the target, or nearer to it: what is nearest to it takes the least time."""
    if one.peak is None or other.peak is None:
        return False
    if (one.peak <= asked) != (other.peak <= asked):
        return one.peak <= asked
    return one.peak > other.peak if one.peak <= asked else one.peak < other.peak


def _counted(report: Report, peak: int | None) -> Report:
    """Return a report that says what the code holds."""
    if report.memory is None:
        return report
    if peak is None:
        unknown = "what the generated code holds is not known: it is no Python, or has operations without a meta kernel"
        return dataclasses.replace(report, notes=(*report.notes, unknown))
    missed = "" if peak <= report.memory else f", {format_bytes(peak - report.memory)} too much"
    counted = f"the generated code holds {format_bytes(peak)} at most{missed}"
    return dataclasses.replace(report, notes=(*report.notes, counted), peak_of_code=peak)


_MOST_COMPILED = 4
"""Times that a graph is compiled, with what its measurements have led to: PyTorch gives up after eight."""


_Identity = tuple[Any, tuple[Any, ...]]


def _identity(gm: fx.GraphModule, code: Any) -> _Identity:
    """Return what tells a graph from another: its code and its parameters' shapes; models alike share a graph."""
    arguments = (node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder"))
    values = (getattr(argument, "example", None) for argument in arguments)
    shapes = (tuple(value.shape) for value in values if isinstance(value, torch.nn.Parameter))
    return code and code[0], tuple(shapes)


@dataclasses.dataclass(frozen=True)
class _Progress:
    """What is known of a graph that is compiled again: what was decided, steps so far, times it was compiled before."""

    decided: tuple[Rule, ...] = ()
    steps: int = 0
    times: int = 0


class _Measured:
    """A compiled graph whose noise is measured: it is compiled again where its budget asks for another way."""

    def __init__(
        self,
        owner: Backend,
        compiled: Callable[..., Any],
        report: Report,
        policy: Policy,
        code: Any,
        identity: _Identity,
        progress: _Progress,
    ) -> None:
        self._owner, self._compiled, self._report, self._policy = owner, compiled, report, policy
        self._code, self._identity, self._progress = code, identity, progress
        self._observer = Observer(progress.steps)

    def __call__(self, *args: Any) -> Any:
        if self._observer.is_due:
            self._decide()
        with self._observer.forward_pass():
            return self._compiled(*args)

    def _decide(self) -> None:
        """Choose ways by what was measured; the code is compiled again when it is called next."""
        ways = decide(self._observer.noise(), self._policy)
        if not ways:
            return
        new = dataclasses.replace(self._report, noise=tuple(way.report() for way in ways))
        for kept in (_REPORTS, self._owner.reports):
            kept[:] = [new if report is self._report else report for report in kept]
        self._report = new
        decided, times = rules(ways, self._policy), self._progress.times + 1
        if set(decided) == set(self._policy.decided) or times == _MOST_COMPILED:
            return
        if torch_api.compile_again(self._code, "wtacrs: the noise measured leads to other ways"):
            self._owner._again[self._identity] = _Progress(decided, self._observer.steps + 1, times)
            modules = {module for way in ways for module in way.noise.modules}
            patterns = {glob.escape(module) for module in modules}
            others = [rule for rule in self._owner.decided if rule.pattern not in patterns]
            self._owner.decided = (*others, *(rule for rule in decided if rule.pattern in patterns))


def backend(
    policy: Policy | None = None,
    *,
    mode: str | None = None,
    strict: bool | None = None,
    **inductor_options: Any,
) -> Backend:
    """Return a backend object for ``torch.compile(model, backend=...)``.

    Args:
        policy: what is sampled, and how; ``Policy()`` where it is None.
        mode: as in ``torch.compile``: ``"max-autotune"``, ``"reduce-overhead"``, ...
        strict: raise what goes wrong in this backend, where the graph would be compiled by Inductor alone, with a
            :class:`FallbackWarning`; None: as ``WTACRS_STRICT`` in the environment says.
        inductor_options: configuration of Inductor, such as ``max_autotune=True``.

    Raises:
        PolicyError: an option that Inductor does not know, or one that this backend sets itself.
    """
    return Backend(Policy() if policy is None else policy, mode, inductor_options, strict)


def wtacrs(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Compile for ``torch.compile(model, backend="wtacrs", mode=..., options={"wtacrs.ratio": 0.3, ...})``.

    Options whose keys start with ``wtacrs.`` are fields of :class:`Policy`, ``wtacrs.policy`` is a whole
    one, ``wtacrs.strict`` as of :func:`backend`; the others are Inductor's.

    Raises:
        PolicyError: an unknown option or a value outside its range.
    """
    key = (mode, repr(sorted((options or {}).items())))
    if key not in _BACKENDS:
        own = dict(options or {})
        strict = own.pop("wtacrs.strict", None)
        policy, rest = policy_from_options(own)
        _BACKENDS[key] = Backend(policy, mode, rest, strict)
    return _BACKENDS[key](gm, example_inputs, name=name)


_BACKENDS: dict[tuple[str | None, str], Backend] = {}


def lifted_inputs(gm: fx.GraphModule) -> tuple[NamedInput, ...]:
    """Return the parameters and buffers that Dynamo lifted into the inputs of a graph, token masks and activations."""
    found = []
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        argument = node.meta.get("grapharg")
        source = getattr(argument, "source", None)
        if source is None:
            if _is_computed(node.meta.get("example_value")):  # of another part of a graph that was split
                found.append(NamedInput(index, node.name, "activation"))
            continue
        name = source.name() if callable(source.name) else source.name
        if isinstance(argument.example, torch.nn.Parameter) or _is_weight(name, argument.example):
            found.append(NamedInput(index, path_from_source(name), "parameter"))
        elif "_buffers[" in name or "['_buffers'][" in name:
            found.append(NamedInput(index, path_from_source(name), "buffer"))
        elif (mask := last_name(name)) in MASK_NAMES:
            found.append(NamedInput(index, mask, "mask"))
        elif _is_local(name) and _is_computed(argument.example):
            found.append(NamedInput(index, last_name(name), "activation"))
    return tuple(found)


def _is_weight(source: str, example: object) -> bool:
    """Tell whether a tensor is one that a function is called with in the place of a model's parameter.

    ``torch.func.functional_call`` takes them in a dictionary, by their names.
    """
    is_item = re.fullmatch(r"L\['(?!kwargs')[^']*'\]\['[^']*'\]", source) is not None
    return is_item and isinstance(example, torch.Tensor) and example.is_leaf and example.requires_grad


def _is_local(source: str) -> bool:
    """Tell whether a tensor is an argument, a variable, an item of one, or part of what a call returned.

    What other objects hold lives as long as they do.

    >>> [_is_local(f"L{name}") for name in ("['x']", "['args'][0]", "['kwargs']['mask']", "['states'][2]")]
    [True, True, True, True]
    >>> _is_local("L['___stack1'].last_hidden_state")
    True
    >>> [_is_local(f"L{name}") for name in ("['self'].weight", "['self']._modules['0']", "['batch'].x", "['p']['w']")]
    [False, False, False, False]
    """
    return _LOCAL.fullmatch(source) is not None


_LOCAL = re.compile(
    r"L\['[^']*'\](\[\d+\])*|L\['kwargs'\]\['[^']*'\]|L\['___stack\d+'\]([.]\w+|\[\d+\]|\['[^']*'\])*"
)

_LARGEST = 1e4
"""Masks hold numbers of this size, or larger ones, for scores that are not to count."""


def _is_computed(example: object) -> bool:
    """Tell whether a tensor is a result with a gradient, and as far as is known one of no sentinels.

    Nobody but what reads it saves it; a leaf is its maker's.
    """
    if not isinstance(example, torch.Tensor) or example.is_leaf or not example.is_floating_point():
        return False
    if isinstance(example, torch_api.FakeTensor) or not example.numel():
        return True
    return bool(example.detach().abs().amax() < _LARGEST)


def _is_training(example_inputs: Sequence[Any]) -> bool:
    tensors = (x for x in example_inputs if isinstance(x, torch.Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _keep(path: pathlib.Path, received: Sequence[Report]) -> Report | None:
    """Write a report beside Inductor's caches, or read what an earlier process wrote there.

    A graph that trains nothing is kept as ``null``.
    """
    if received or not path.exists():
        report = received[-1] if received else None
        write_at_once(path, json.dumps(report.to_dict() if report else None))
        return report
    return _read(path)


def _read(path: pathlib.Path) -> Report | None:
    """Return what an earlier process wrote there; None where there is nothing."""
    data = json.loads(path.read_text()) if path.exists() else None
    return Report.from_dict({**data, "from_cache": True}) if data else None


def _report_path(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Mapping[str, Any],
    policy: Policy,
    table: Sequence[NamedInput],
) -> pathlib.Path:
    fakes = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    values = [x if fake is None else fake for x, fake in zip(example_inputs, fakes, strict=True)]
    inputs = [  # sizes that vary are symbols here, so that another batch finds the same report
        (tuple(x.shape), x.dtype, x.stride(), x.device, x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in values
    ]
    parts = (
        [module.code for _, module in gm.named_modules() if isinstance(module, fx.GraphModule)],
        inputs,
        sorted(config.items()),
        policy,
        table,
        source_hash(),
        torch.__version__,
        torch._functorch.config.get_hash(),
        torch._inductor.config.get_hash(),
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        torch.are_deterministic_algorithms_enabled(),
    )
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    return pathlib.Path(torch_api.cache_dir()) / "wtacrs_reports" / f"{key}.json"
