"""Remember the gradient norms of rows from one epoch to the next, for rows chosen in the forward pass.

The best weights for choosing rows are ``||x_i|| ||dy_i||``, and dY is not known in the forward pass. What is
known is ``||dy_i||`` of the same token when its sample was last seen (Liu et al. 2023, section 3.3)::

    tracker = wtacrs_fx.track_gradient_norms(model, num_samples=len(data), seq_len=128)
    for sample_ids, batch in loader:
        with tracker.batch(sample_ids):
            model(**batch).loss.backward()

A marker in each tracked layer tells the compiler which buffers to read and write; the norms themselves stay
in main memory, and only those of the current batch travel.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.distributed
from torch import Tensor, nn

from wtacrs_passes.analyse.annotations import FRESH, KNOWN
from wtacrs_passes.maths import ops
from wtacrs_passes.report import format_bytes

NAME = "wtacrs_gradient_norms"
"""Attribute of the model that holds its tracker, and the start of its records' names in a ``state_dict``."""

_LOG = logging.getLogger("wtacrs_fx")
_IGNORED = "_ddp_params_and_buffers_to_ignore"  # what DistributedDataParallel leaves alone
_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
_RESOLUTIONS = ("token", "position")
_STEPS_PER_OCTAVE, _SMALLEST_EXPONENT = 4, -50  # of the 8-bit form: 2 ** -50 to 2 ** 13 in steps of 19 %
_PATIENCE = 3  # steps without a record before the user is warned
_MOMENTUM = 0.9  # of the running mean by position


class GradientNormError(ValueError):
    """A tracker that cannot be made or used as asked; the message states rule, value and remedy."""


def track_gradient_norms(
    model: nn.Module,
    num_samples: int,
    seq_len: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    resolution: str = "token",
    bucket: int = 1,
    max_bytes: int | None = None,
    persistent: bool = True,
) -> GradientNorms:
    """Attach a memory of gradient norms to a model, before it is compiled.

    It serves the sites whose rows are chosen in the forward pass (``Policy(ratio=0.3, placement="forward")``, or
    ``"auto"`` where the input of a linear is not at hand in the backward pass). Linears that share an input
    share one record. The records are part of the model's ``state_dict``, and are restored with it, though
    the tracker is no child of the model. DistributedDataParallel is told to leave them alone.

    Args:
        model: the module that will be compiled; its trainable linears are tracked.
        num_samples: samples of the training set, numbered from zero.
        seq_len: tokens of the longest sample.
        dtype: of a record: float32, bfloat16, or uint8 (a logarithm in 8 bits, within 10 %).
        resolution: ``"token"``: one norm for each sample and position; ``"position"``: a running mean over
            samples for each position, for training sets that are never seen twice.
        bucket: neighbouring positions that share a norm.
        max_bytes: largest size of all records; by default half of the free main memory.
        persistent: put the records into the ``state_dict``.

    Raises:
        GradientNormError: a value outside its range, or records that may not fit.
    """
    return GradientNorms(model, num_samples, seq_len, dtype, resolution, bucket, max_bytes, persistent)


class GradientNorms:
    """The memory of gradient norms; made by :func:`track_gradient_norms`.

    Attributes:
        layers: paths of the tracked linears.
        records: path of a layer -> ``[num_samples + 1, buckets]``, in main memory; only of layers that record
            (one of several that share an input). The last row is a running mean over samples, which
            stands in for what was not seen yet; by position it is the only one.
    """

    def __init__(
        self,
        model: nn.Module,
        num_samples: int,
        seq_len: int,
        dtype: torch.dtype,
        resolution: str,
        bucket: int,
        max_bytes: int | None,
        persistent: bool,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("seq_len", seq_len), ("bucket", bucket)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise GradientNormError(f"{name} must be a whole number, at least 1, got {value!r}")
        if dtype not in _DTYPES:
            raise GradientNormError(
                f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype!r}; float16 has too small "
                f"a range for gradients"
            )
        if resolution not in _RESOLUTIONS:
            raise GradientNormError(f"resolution must be 'token' or 'position', got {resolution!r}")
        if hasattr(model, NAME):
            raise GradientNormError("the model is tracked already; call its tracker's remove() first")
        self.num_samples = num_samples if resolution == "token" else 0
        self.seq_len, self.dtype, self.resolution, self.bucket = seq_len, dtype, resolution, bucket
        self.persistent = persistent
        self._samples = num_samples
        modules = {path: module for path, module in model.named_modules() if _is_tracked(module)}
        if not modules:
            raise GradientNormError(f"{type(model).__name__} has no trainable linear layer to track")
        self.layers = tuple(modules)
        self._linears, self._model = tuple(modules.values()), model
        self.records: dict[str, Tensor] = {}
        self._check_size(max_bytes)
        self._handles = [
            module.register_forward_pre_hook(_mark, with_kwargs=True) for module in self._linears
        ]
        self._handles.append(model._register_state_dict_hook(self._save))  # type: ignore[no-untyped-call]
        self._handles.append(model._register_load_state_dict_pre_hook(self._load))  # type: ignore[no-untyped-call]
        setattr(model, NAME, self)  # not a child: containers call their children
        self._ignored_before = list(getattr(model, _IGNORED, ()))
        staging = [f"{path}.{buffer}".lstrip(".") for path in self.layers for buffer in (KNOWN, FRESH)]
        setattr(model, _IGNORED, [*self._ignored_before, *staging])
        self._known = self._fresh = torch.zeros(0, 0, 0)
        self._staged: tuple[Tensor, Tensor | None] | None = None
        self._pending: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
        self._empty_blocks = 0
        self._stage(1, torch.device("cpu"))

    # Size

    @property
    def bytes_per_layer(self) -> int:
        """Bytes of one layer's record."""
        return math.prod(self._shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all records so far: after the first step, of those that will ever be."""
        self._settle()
        return len(self.records) * self.bytes_per_layer

    def _check_size(self, max_bytes: int | None) -> None:
        most = len(self.layers) * self.bytes_per_layer
        limit = psutil.virtual_memory().available // 2 if max_bytes is None else max_bytes
        size = (
            f"{len(self.layers)} linears x ({self.num_samples} samples + 1 mean) x "
            f"{math.ceil(self.seq_len / self.bucket)} norms x {self.dtype.itemsize} B = {format_bytes(most)}"
        )
        if most > limit:
            raise GradientNormError(
                f"gradient norms may take {size}, the limit is {format_bytes(limit)}; use a larger bucket, "
                f"dtype=torch.uint8, resolution='position', or raise max_bytes"
            )
        _LOG.info("gradient norms will take at most %s; linears that share an input share a record", size)

    # A step

    @contextmanager
    def batch(self, sample_ids: Sequence[int] | Tensor) -> Iterator[None]:
        """Give a training step the norms of its samples, and remember those that its backward pass finds.

        Forward and backward pass of one batch belong inside; with gradient accumulation each micro-batch has
        its own block. What is not finite, or not reached by a backward pass, leaves the record as it is.

        Args:
            sample_ids: [batch], whole numbers below ``num_samples``, in the order of the batch.

        Raises:
            GradientNormError: a number outside the range, or one that occurs twice.
        """
        ids = self._checked(sample_ids)
        self._settle()
        self._stage(len(ids), next(self._linears[0].parameters()).device)
        batch = len(ids)
        staged = self._read(ids)
        if staged is not None:
            self._known[:, :batch].copy_(staged, non_blocking=True)
        self._fresh[:, :batch].zero_()
        try:
            yield
        finally:
            self._known[:, :batch].zero_()  # a step outside such a block knows nothing
        self._fetch(ids)

    def prefetch(self, sample_ids: Sequence[int] | Tensor) -> None:
        """Read the norms of a coming batch from main memory now, for instance while a step is running."""
        ids = self._checked(sample_ids)
        self._settle()
        self._staged = None
        self._staged = ids, self._read(ids)

    def remove(self) -> None:
        """Detach the tracker from the model; its records are lost."""
        for handle in self._handles:
            handle.remove()
        for module in self._linears:
            for name in (KNOWN, FRESH):
                module._buffers.pop(name, None)
                module._non_persistent_buffers_set.discard(name)
        setattr(self._model, _IGNORED, self._ignored_before)
        delattr(self._model, NAME)

    def _checked(self, sample_ids: Sequence[int] | Tensor) -> Tensor:
        ids = torch.as_tensor(sample_ids).cpu()
        if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool or not len(ids):
            raise GradientNormError(f"sample_ids must be whole numbers [batch], got {sample_ids!r}")
        ids = ids.long()
        wrong = ids[(ids < 0) | (ids >= self._samples)]
        if len(wrong):
            raise GradientNormError(
                f"sample_ids must be at least 0 and below num_samples={self._samples}, got {wrong[0].item()}"
            )
        twice = ids[(ids == ids[:, None]).sum(0) > 1].tolist()
        if self.resolution == "token" and twice:
            raise GradientNormError(f"sample_ids must differ within a batch, got {twice[0]} twice")
        return ids

    def _stage(self, batch: int, device: torch.device) -> None:
        """Let every layer have its part of ``[layers, capacity, seq_len]`` on the device, twice."""
        capacity = self._known.shape[1]
        first = getattr(self._linears[0], KNOWN, None)
        in_place = isinstance(first, Tensor) and first.data_ptr() == self._known.data_ptr()
        if batch <= capacity and in_place and self._known.device == device:
            return
        shape = (len(self._linears), max(batch, capacity), self.seq_len)
        self._known, self._fresh = (torch.zeros(shape, device=device) for _ in range(2))
        for i, module in enumerate(self._linears):
            module.register_buffer(KNOWN, self._known[i], persistent=False)
            module.register_buffer(FRESH, self._fresh[i], persistent=False)

    # Records

    def _read(self, ids: Tensor) -> Tensor | None:
        """Return the norms of samples, zero where there is none: [layers, batch, seq_len]; None at first."""
        if self._staged is not None and self._staged[0].equal(ids):
            staged, self._staged = self._staged[1], None
            return staged
        if not self.records:
            return None
        pinned = self._known.is_cuda
        found = torch.zeros(len(self.layers), len(ids), self.seq_len, pin_memory=pinned)
        for i, path in enumerate(self.layers):
            record = self.records.get(path)
            if record is not None:
                values = _recalled(record, ids if self.num_samples else ids[:0])
                found[i] = values.repeat_interleave(self.bucket, -1)[:, : self.seq_len]
        return found

    def _fetch(self, ids: Tensor) -> None:
        """Send the norms of a step to main memory, without waiting for the device."""
        fresh = self._fresh[:, : len(ids)]
        if not fresh.is_cuda:
            self._write(ids, fresh)
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        pinned = torch.empty(fresh.shape, pin_memory=True).copy_(fresh, non_blocking=True)
        event.record()
        self._pending = ids, pinned, event

    def _settle(self) -> None:
        """Keep what the last step has sent."""
        if self._pending is not None:
            ids, fresh, event = self._pending
            self._pending = None
            event.synchronize()
            self._write(ids, fresh)

    def _write(self, ids: Tensor, fresh: Tensor) -> None:
        """Keep the norms that were recorded: [layers, batch, seq_len], zero where none was."""
        if self._staged is not None and (
            self.resolution == "position" or bool(torch.isin(ids, self._staged[0]).any())
        ):
            self._staged = None
        recorded = fresh.flatten(1).any(-1).nonzero().flatten().tolist()
        self._empty_blocks = 0 if recorded or self.records else self._empty_blocks + 1
        if self._empty_blocks == _PATIENCE:
            warnings.warn(
                f"{_PATIENCE} training steps have recorded no gradient norms: the tracker serves rows chosen "
                f"in the forward pass, see the column 'weights' of wtacrs_fx.reports()[-1]; use "
                f"Policy(ratio=0.3, placement='forward'), or remove the tracker",
                stacklevel=2,
            )
        values, seen = _pooled(fresh[recorded], self.bucket)
        means, ever = _mean_over_samples(values, seen)
        codes = _encoded(values, self.dtype)
        for i, layer in enumerate(recorded):
            record = self._record(self.layers[layer])
            old = _decoded(record[-1])
            mean = torch.where(old > 0, _MOMENTUM * old + (1 - _MOMENTUM) * means[i], means[i])
            record[-1] = torch.where(ever[i], _encoded(mean, self.dtype), record[-1])
            if self.num_samples:
                record[ids] = torch.where(seen[i], codes[i], record[ids])

    @property
    def _shape(self) -> tuple[int, int]:
        return self.num_samples + 1, math.ceil(self.seq_len / self.bucket)

    def _record(self, path: str) -> Tensor:
        """Return the record of a layer, a new one where it has none."""
        if path not in self.records:
            self.records[path] = torch.zeros(self._shape, dtype=self.dtype, device="cpu")
        return self.records[path]

    def synchronise(self, group: Any = None) -> None:
        """Give every rank what any rank has recorded, as samples move between ranks from epoch to epoch.

        All ranks call it at the same point, for instance after each epoch. Where several ranks know a norm it
        becomes their mean.
        """
        self._settle()
        paths: list[set[str]] = [set() for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather_object(paths, set(self.records), group)
        for path in sorted(set().union(*paths)):
            record = self._record(path)
            total = _decoded(record).to(self._known.device)
            count = (total > 0).float()
            torch.distributed.all_reduce(total, group=group)
            torch.distributed.all_reduce(count, group=group)
            record.copy_(_encoded((total / count.clamp(min=1)).cpu(), self.dtype))
        self._staged = None

    def _save(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Put the records into a ``state_dict``."""
        self._settle()
        if self.persistent:
            state_dict.update({f"{prefix}{NAME}.{path}": record for path, record in self.records.items()})

    def _load(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the records out of a ``state_dict``."""
        start = f"{prefix}{NAME}."
        for name in [name for name in state_dict if name.startswith(start)]:
            value, path = state_dict.pop(name), name.removeprefix(start)
            if tuple(value.shape) != self._shape or value.dtype != self.dtype:
                raise GradientNormError(
                    f"the record of {path} in the checkpoint is {tuple(value.shape)} {value.dtype}, this "
                    f"tracker has {self._shape} {self.dtype}; make the tracker as it was made then"
                )
            self._record(path).copy_(value)
        self._staged = self._pending = None


def token_mask(mask: Tensor) -> None:
    """Declare, within a model's forward, that rows have no gradient: padding, ignored labels.

    Linears whose input is ``[batch, positions, features]`` and whose rows are chosen in the forward pass
    never draw such a row. The backward pass verifies that their gradients are zero. A model that cannot be
    edited takes a hook::

        model.register_forward_pre_hook(
            lambda module, args, kwargs: wtacrs_fx.token_mask(kwargs["attention_mask"]), with_kwargs=True
        )

    Without it, an input called ``attention_mask`` lowers the weight of masked rows to a 64th: the estimate is
    then unbiased even if those rows have gradients.

    Args:
        mask: [batch, positions], zero for rows without a gradient.

    Raises:
        ValueError: a mask of another rank.
    """
    if mask.dim() != 2:
        raise ValueError(f"a token mask is [batch, positions], got one of shape {list(mask.shape)}")
    ops.token_mask(mask)


def _is_tracked(module: nn.Module) -> bool:
    """Tell whether a module multiplies rows by a trainable matrix: Linear, and what is like it."""
    weight = getattr(module, "weight", None)
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # transformers' GPT-2
    return linear and isinstance(weight, Tensor) and weight.requires_grad and weight.dim() == 2


def _mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    if torch.is_grad_enabled() and x.dim() == 3:
        ops.norm_state(x, getattr(module, KNOWN), getattr(module, FRESH))


def _pooled(norms: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
    """Return the root mean square of each bucket that was recorded in full or in part, and which were.

    A norm that is not finite counts as not recorded.
    """
    padded = torch.nn.functional.pad(norms, (0, -norms.shape[-1] % bucket))
    padded = padded.reshape(*norms.shape[:-1], padded.shape[-1] // bucket, bucket)
    seen = (padded > 0) & padded.isfinite()
    squares = torch.where(seen, padded, 0.0).square().sum(-1)
    return (squares / seen.sum(-1).clamp(min=1)).sqrt(), seen.any(-1)


def _mean_over_samples(values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root mean square over the samples with a gradient at a position: [..., buckets]."""
    seen = seen & (values > ops.SMALLEST_NORM)
    squares = torch.where(seen, values, 0.0).square().sum(-2)
    return (squares / seen.sum(-2).clamp(min=1)).sqrt(), seen.any(-2)


def _recalled(record: Tensor, ids: Tensor) -> Tensor:
    """Return the norms of samples, or the running mean by position where there is none: [batch, buckets].

    Without samples, the mean alone: [1, buckets].
    """
    mean = _decoded(record[-1:])
    if not len(ids):
        return mean
    values = _decoded(record[ids])
    return torch.where(values > 0, values, mean)


def _encoded(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return norms as they are kept; zero stays zero: not seen."""
    if dtype != torch.uint8:
        return norms.to(dtype)
    codes = (norms.clamp(min=1e-38).log2() - _SMALLEST_EXPONENT) * _STEPS_PER_OCTAVE
    return torch.where(norms > 0, codes.round().clamp(0, 254) + 1, 0.0).to(torch.uint8)


def _decoded(record: Tensor) -> Tensor:
    """Invert :func:`_encoded`, float32."""
    if record.dtype != torch.uint8:
        return record.float()
    exponents = (record.float() - 1) / _STEPS_PER_OCTAVE + _SMALLEST_EXPONENT
    return torch.where(record > 0, exponents.exp2(), 0.0)
