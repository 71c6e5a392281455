"""transformers: one line for a ``Trainer``, or for a model in a loop of one's own.

    from wtacrs_fx.integrations.transformers import enable
    enable(trainer)
    trainer.train()

The model is compiled in place (``model.compile``): its class, its parameters' names and its checkpoints stay.
``TrainingArguments(torch_compile_backend="wtacrs")`` is not the way, see ``docs/transformers.md``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from wtacrs_passes.files import write_at_once
from wtacrs_passes.policy import Policy, Rule
from wtacrs_passes.report import MIB

from ..backend import Backend, backend
from ..diagnose import diagnose

_LOG = logging.getLogger(__name__)


class IntegrationError(ValueError):
    """A trainer or model that cannot be compiled with wtacrs; the message states rule, value and remedy."""


def _callback_class() -> Any:
    try:
        return importlib.import_module("transformers").TrainerCallback
    except ImportError as error:
        raise IntegrationError("this integration needs transformers; pip install transformers") from error


class WtacrsCallback(_callback_class()):  # type: ignore[misc]
    """Add what wtacrs does to the logs of a ``Trainer``.

    ==========================  ====================================================================
    ``wtacrs/saved_mib``        activations that the forward pass saves, MiB; the sum of the graphs compiled
                                for fixed shapes
    ``wtacrs/saved_ratio``      the same, to what Inductor would save
    ``wtacrs/peak_mib``         most MiB allocated on the GPU since the last log; on CPU, of the process
    ``wtacrs/added_noise``      with a noise budget, once it was measured: variance that sampling and rounding add
                                to a weight gradient over the minibatch's, the largest of the layers
    ``wtacrs/added_variance``   variance that sampling adds to dW over ||dW||^2, the median of the layers
    ==========================  ====================================================================

    Args:
        compiled: the backend object that compiles the model.
        diagnose_steps: measure the added variance every so many steps, on two batches, in eager mode; None:
            never. The state of the random number generators and the gradients stay as they are.
    """

    def __init__(self, compiled: Backend, diagnose_steps: int | None = None) -> None:
        self.backend = compiled
        self.diagnose_steps = diagnose_steps
        self._variance: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the added variance where its turn has come."""
        if self.diagnose_steps and state.global_step % self.diagnose_steps == 0:
            self._variance = _added_variance(kwargs["model"], kwargs["train_dataloader"], self.backend.policy)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep in the checkpoint what noise budgets have led to."""
        path = _checkpoint(args, state)
        if path.parent.is_dir() and state.is_world_process_zero:
            decided = [[rule.pattern, dict(rule.overrides)] for rule in self.backend.decided]
            write_at_once(path, json.dumps(decided))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start a resumed run with it."""
        path = _checkpoint(args, state)
        if state.global_step and path.is_file():
            decided = tuple(Rule(pattern, **overrides) for pattern, overrides in json.loads(path.read_text()))
            self.backend.decided = decided
            self.backend.policy = dataclasses.replace(self.backend.policy, decided=decided)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Extend the logs, and the history that the trainer keeps of them."""
        if logs is None or "loss" not in logs:
            return  # of an evaluation, or the summary at the end
        figures = self.figures(next(kwargs["model"].parameters()).device)
        logs.update(figures)
        state.log_history[-1].update(figures)

    def figures(self, device: torch.device) -> dict[str, float]:
        """Return what is known now; on CUDA a new peak begins."""
        found: dict[str, float] = {}
        # Of each part of the model the last graph of fixed shapes: bytes in symbols cannot be logged.
        graphs = {
            (
                tuple(site.module for site in report.sites),
                tuple(residual.module for residual in report.residuals),
            ): report
            for report in self.backend.reports
            if isinstance(report.saved_bytes_before, int) and isinstance(report.saved_bytes_after, int)
        }
        if graphs:
            before, after = (
                sum(getattr(report, f"saved_bytes_{when}") for report in graphs.values())
                for when in ("before", "after")
            )
            found |= {"wtacrs/saved_mib": after / MIB, "wtacrs/saved_ratio": after / max(1, before)}
        if device.type == "cuda":
            found["wtacrs/peak_mib"] = torch.cuda.max_memory_allocated(device) / MIB
            torch.cuda.reset_peak_memory_stats(device)
        else:
            found["wtacrs/peak_mib"] = psutil.Process().memory_info().rss / MIB
        added = [site.added for report in graphs.values() for site in report.noise]
        if added:
            found["wtacrs/added_noise"] = max(added)
        if self._variance is not None:
            found["wtacrs/added_variance"] = self._variance
        return found


def enable(
    trainer_or_model: Any,
    policy: Policy | None = None,
    *,
    mode: str | None = None,
    diagnose_steps: int | None = None,
    keep_logits: bool | None = None,
    **inductor_options: Any,
) -> WtacrsCallback:
    """Compile the model of a ``Trainer``, or a model, in place; return the callback that logs.

    ``generate`` runs uncompiled, as its cache has another length for each word.
    A ``Trainer`` gets the callback as well, before all others, so that these see what it adds. Call this
    once, before ``trainer.train()``.

    Args:
        trainer_or_model: a ``transformers.Trainer`` or any ``nn.Module``.
        policy: what is sampled, and how; ``Policy()`` where it is None.
        mode, inductor_options: as in :func:`wtacrs_fx.backend`.
        diagnose_steps: see :class:`WtacrsCallback`.
        keep_logits: False: in training mode the model returns its loss without the logits, so that these are
            never there for all tokens at once; in evaluation mode it returns both. None: so for a ``Trainer``
            that computes its loss as transformers does, and not for others.

    Raises:
        IntegrationError: neither a trainer nor a model, compiled already, or a trainer that compiles itself.
        PolicyError: options that do not exist.
    """
    trainer = None if isinstance(trainer_or_model, nn.Module) else trainer_or_model
    model = trainer_or_model if trainer is None else getattr(trainer, "model", None)
    if not isinstance(model, nn.Module):
        raise IntegrationError(
            f"enable needs a transformers.Trainer or an nn.Module, got a {type(trainer_or_model).__name__}"
        )
    if getattr(getattr(trainer, "args", None), "torch_compile", False):
        raise IntegrationError(
            "the trainer compiles the model itself (TrainingArguments.torch_compile), which would be a "
            "second time; leave torch_compile, torch_compile_backend and torch_compile_mode out"
        )
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise IntegrationError(
            "the model is compiled already; call enable once, on a model that torch.compile has not seen"
        )
    callback = WtacrsCallback(backend(policy, mode=mode, **inductor_options), diagnose_steps)
    if keep_logits is None:
        keep_logits = trainer is None or _reads_logits(trainer)
    if not keep_logits:
        _LOG.info("in training mode the model returns its loss without logits; keep_logits=True keeps them")
        _leave_logits_out(model)
    model.compile(backend=callback.backend)
    _leave_generation_out(model)
    if trainer is not None:
        trainer.add_callback(callback)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
    return callback


def _reads_logits(trainer: Any) -> bool:
    """Tell whether a trainer may compute something of the logits in training: one whose loss is its own."""
    base = importlib.import_module("transformers").Trainer
    return type(trainer).compute_loss is not base.compute_loss


def _leave_logits_out(model: nn.Module) -> None:
    """Let a model return no logits in training mode where it returns a loss."""
    forward = model.forward  # a hook would run after what is compiled has returned

    @functools.wraps(forward)
    def without_logits(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if not model.training or not isinstance(output, dict) or output.get("loss") is None:
            return output
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    model.forward = without_logits


def _leave_generation_out(model: nn.Module) -> None:
    """Let the calls of ``generate`` run uncompiled: the cache grows, so that each word would be compiled anew."""
    compiled: Callable[..., Any] | None = model._compiled_call_impl
    eager: Callable[..., Any] = model._call_impl
    assert compiled is not None

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        generates = kwargs.get("past_key_values") is not None and not torch.is_grad_enabled()
        return (eager if generates else compiled)(*args, **kwargs)

    model._compiled_call_impl = call


def _checkpoint(args: Any, state: Any) -> Path:
    """Return where a trainer's checkpoint of this step has the rules of its noise budgets."""
    return Path(args.output_dir, f"checkpoint-{state.global_step}", "wtacrs_decided.json")


def _added_variance(model: nn.Module, loader: Any, policy: Policy) -> float:
    """Return the median over layers of the added variance on the first two batches of a loader's data."""
    device = next(model.parameters()).device
    compiled, model._compiled_call_impl = model._compiled_call_impl, None  # hooks need the eager model
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            batches = [
                {name: value.to(device) for name, value in batch.items()} for batch in _first_batches(loader)
            ]
            layers = diagnose(model, batches, policy).layers
    finally:
        model._compiled_call_impl = compiled
    return statistics.median(layer.added for layer in layers)


def _first_batches(loader: Any) -> Iterator[Mapping[str, Any]]:
    """Yield two batches, past the loader itself: accelerate follows the state of its iteration."""
    size = getattr(loader, "total_batch_size", None) or getattr(loader, "batch_size", None) or 1
    samples = iter(loader.dataset)
    for _ in range(2):
        yield loader.collate_fn(list(itertools.islice(samples, size)))
