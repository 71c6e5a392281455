"""What training would store, before anything is allocated: models by name, traced on the meta device.

Models of one and of two layers are traced; more follow, as layers are alike (``bench/scaling.py`` compares
that with runs).
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from wtacrs_passes.policy import Policy
from wtacrs_passes.report import Report

from .capture import explain

INDUCTOR, BUDGET, CHECKPOINTING, WTACRS = "inductor", "inductor, budget 0.9", "checkpointing", "wtacrs"
CARDS = (24, 40, 80)  # GB
_MOMENTS = 2 * 4  # bytes of a parameter: AdamW's, in float32
MakeModel = Callable[[int], tuple[nn.Module, dict[str, Tensor]]]


class ModelError(ValueError):
    """A model that cannot be found or built as asked; the message states rule, value and remedy."""


@dataclass(frozen=True)
class Line:
    """Bytes as a function of depth: those around the layers, and those of one layer."""

    around: float
    layer: float

    def __call__(self, layers: int) -> float:
        """Return the bytes of so many layers."""
        return self.around + layers * self.layer

    @classmethod
    def through(cls, one: float, two: float) -> Line:
        """Return the line through the bytes of one and of two layers."""
        return cls(float(2 * one - two), float(two - one))


def saved_lines(make_model: MakeModel, policy: Policy) -> tuple[dict[str, Line], Report]:
    """Return the bytes that cross from forward to backward by depth, with and without a policy.

    Args:
        make_model: number of layers -> model and inputs, on the meta device.

    Returns:
        the lines of ``inductor`` and ``wtacrs``; the report of two layers.
    """
    one, two = (explain(model, **inputs, policy=policy) for model, inputs in map(make_model, (1, 2)))
    before = Line.through(one.saved_bytes_before, two.saved_bytes_before)
    return {INDUCTOR: before, WTACRS: Line.through(one.saved_bytes_after, two.saved_bytes_after)}, two


def state_bytes(parameters: float, itemsize: int) -> float:
    """Return the bytes of weights and gradients, of `itemsize` each, and of AdamW's moments in float32."""
    return parameters * (2 * itemsize + _MOMENTS)


def largest_batch(gigabytes: float, state: float, sample: float) -> int:
    """Return how many samples, each with so many bytes of saved activations, fit beside the state."""
    return max(0, math.floor((gigabytes * 1e9 - state) / sample))


@dataclass(frozen=True)
class Prediction:
    """What a training step of a model would hold.

    Attributes:
        name: of the model; layers: its depth; parameters: how many.
        batch, length: of the inputs; itemsize: bytes of a weight.
        saved: way of training -> bytes of saved activations.
        report: the sites of a model of two layers.
    """

    name: str
    layers: int
    parameters: int
    batch: int
    length: int
    itemsize: int
    saved: dict[str, float]
    report: Report

    @property
    def state(self) -> int:
        """Bytes of weights, gradients and AdamW's moments."""
        return round(state_bytes(self.parameters, self.itemsize))

    def largest_batch(self, way: str, gigabytes: float) -> int:
        """Return the largest batch whose state and saved activations fit."""
        return largest_batch(gigabytes, self.state, self.saved[way] / self.batch)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings."""
        return {
            "model": self.name,
            "layers": self.layers,
            "parameters": self.parameters,
            "batch": self.batch,
            "length": self.length,
            "state_bytes": self.state,
            "saved_bytes": self.saved,
            "largest_batch": {
                way: {f"{card} GB": self.largest_batch(way, card) for card in CARDS} for way in self.saved
            },
            "report_of_two_layers": self.report.to_dict(),
        }


def predict(name: str, batch: int, length: int, dtype: torch.dtype, policy: Policy) -> Prediction:
    """Predict what training a model of transformers would store.

    Args:
        name: a folder with a ``config.json``, such a file, or a name on the Hub; weights are not read.
        batch, length: of the token ids; dtype: of weights and activations.

    Raises:
        ModelError: no configuration, or one that this cannot build from token ids.
    """
    config = _configuration(name)
    depth = int(config.num_hidden_layers)
    models = {layers: _model(config, layers, batch, length, dtype) for layers in (1, 2)}
    lines, report = saved_lines(models.__getitem__, policy)
    with functorch_config.patch(activation_memory_budget=0.9):
        budget, _ = saved_lines(models.__getitem__, Policy(ratio=1.0, residuals="exact"))
    one, two = (sum(parameter.numel() for parameter in model.parameters()) for model, _ in models.values())
    inputs_of_layers = depth * batch * length * int(config.hidden_size) * dtype.itemsize
    saved = {
        INDUCTOR: lines[INDUCTOR](depth),
        BUDGET: budget[INDUCTOR](depth),
        CHECKPOINTING: lines[INDUCTOR](1) + inputs_of_layers,
        WTACRS: lines[WTACRS](depth),
    }
    parameters = round(Line.through(one, two)(depth))
    return Prediction(name, depth, parameters, batch, length, dtype.itemsize, saved, report)


def _configuration(name: str) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ModelError("models by name need transformers; pip install transformers") from error
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        kind = "has no configuration that transformers knows" if Path(name).exists() else "was not found"
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name!r} {kind} ({reason}); give a folder with a config.json, such a file, or a name on the Hub"
        ) from error
    config = copy.deepcopy(getattr(config, "text_config", config))
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ModelError(f"{name!r} is no stack of layers (no num_hidden_layers); use wtacrs_fx.explain")
    return config


class _MeanSquare(nn.Module):
    """Give a model without a loss one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids)[0]
        return hidden.float().square().mean()


def _model(
    config: Any, layers: int, batch: int, length: int, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model of so many layers in training mode, and inputs, on the meta device."""
    transformers = importlib.import_module("transformers")
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    config.use_cache = False
    if getattr(config, "num_decoder_layers", None):
        config.num_decoder_layers = layers
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    head = names[0] if names else ""
    with torch.device("meta"):
        ids = torch.zeros(batch, length, dtype=torch.long)
        try:
            if head.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")):
                model = getattr(transformers, head)(config)
                if getattr(model, "loss_type", "") is None:
                    model.loss_type = "ForCausalLM"  # the default, of which some models warn in their forward
                return model.to(dtype).train(), {"input_ids": ids, "labels": ids}
            bare = transformers.AutoModel.from_config(config)
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{head or type(config).__name__} cannot be built from token ids: {error}"
            ) from error
        return _MeanSquare(bare).to(dtype).train(), {"input_ids": ids}
