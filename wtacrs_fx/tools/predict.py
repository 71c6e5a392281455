"""What training would store, before anything is allocated: models by name, traced on the meta device.

Models of one and of two layers are traced; more follow, as layers are alike (``bench/scaling.py`` compares
that with runs). With a memory budget of 0.5 they are only nearly so: Inductor then decides tensor by tensor
over the whole model.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from wtacrs_passes.policy import Policy
from wtacrs_passes.report import Report

from ..capture import explain
from .progress import Progress, silent

INDUCTOR, CHECKPOINTING, WTACRS = "inductor", "checkpointing", "wtacrs"
BUDGETS = {f"inductor, budget {budget}": budget for budget in (0.9, 0.5)}
"""Ways of training with Inductor's ``activation_memory_budget``."""
LORA, LORA_WTACRS = "LoRA", "LoRA, wtacrs"
LORA_RANK = 8
CARDS = (24, 40, 80)  # GB
_EXACT = Policy(ratio=1.0, residuals="exact")
_MOMENTS = 2 * 4  # bytes of a parameter: AdamW's, in float32
_HUB_SECONDS = 5
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
    def through(cls, fewer: float, more: float, layers: tuple[int, int] = (1, 2)) -> Line:
        """Return the line through the bytes of so many layers, the second one more than the first."""
        layer = float(more - fewer)
        return cls(float(fewer - layers[0] * layer), layer)


def saved_lines(
    make_model: MakeModel, policy: Policy, layers: tuple[int, int] = (1, 2)
) -> tuple[dict[str, Line], Report, Report]:
    """Return the bytes that cross from forward to backward by depth, with and without a policy.

    Args:
        make_model: number of layers -> model and inputs, on the meta device.
        layers: of the two models, the second one more than the first.

    Returns:
        the lines of ``inductor`` and ``wtacrs``; the reports of both models.
    """
    fewer, more = (explain(model, **inputs, policy=policy) for model, inputs in map(make_model, layers))
    before = Line.through(fewer.saved_bytes_before, more.saved_bytes_before, layers)
    after = Line.through(fewer.saved_bytes_after, more.saved_bytes_after, layers)
    return {INDUCTOR: before, WTACRS: after}, fewer, more


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
        state: way of training -> bytes of weights, gradients and AdamW's moments.
        per_token, per_pair: coefficients of what wtacrs saves, in bytes: ``batch (per_token length + per_pair
            length ** 2)``; None where the model's inputs are its own.
        report: the sites of a model of two layers; of the whole model where it came from a factory.
    """

    name: str
    layers: int
    parameters: int
    batch: int
    length: int
    itemsize: int
    saved: dict[str, float]
    state: dict[str, float]
    report: Report
    per_token: float | None = None
    per_pair: float | None = None

    def largest_batch(self, way: str, gigabytes: float) -> int:
        """Return the largest batch whose state and saved activations fit."""
        return largest_batch(gigabytes, self.state[way], self.saved[way] / self.batch)

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
            "bytes_per_token": self.per_token,
            "bytes_per_pair_of_tokens": self.per_pair,
            "largest_batch": {
                way: {f"{card} GB": self.largest_batch(way, card) for card in CARDS} for way in self.saved
            },
            "report": self.report.to_dict(),
        }


def predict(
    name: str,
    batch: int,
    length: int,
    dtype: torch.dtype,
    policy: Policy,
    progress: Progress = silent,
) -> Prediction:
    """Predict what training a model would store.

    Args:
        name: of a model of transformers: a folder with a ``config.json``, such a file, a type of models, or a name
            on the Hub, weights are not read; or ``module:factory``, where ``factory(batch, length)`` returns a model
            and its keyword arguments, and is called on the meta device.
        batch, length: of the token ids; dtype: of weights and activations.
        progress: is told how many ways of training have been traced.

    Raises:
        ModelError: no such configuration or factory, or one that this cannot build from token ids.
    """
    if _names_factory(name):
        return _predict_factory(name, batch, length, policy, progress)
    config = configuration(name)
    depth = int(config.num_hidden_layers)
    adapts = find_spec("peft") is not None
    advance = _counter(progress, 2 + len(BUDGETS) + adapts)
    models = {layers: named_model(config, layers, batch, length, dtype) for layers in (1, 2)}
    lines, _, report = saved_lines(models.__getitem__, policy)
    advance()
    saved = {INDUCTOR: lines[INDUCTOR](depth)}
    for way, budget in BUDGETS.items():
        with functorch_config.patch(activation_memory_budget=budget):
            saved[way] = saved_lines(models.__getitem__, _EXACT)[0][INDUCTOR](depth)
        advance()
    wider = copy.deepcopy(config)
    if getattr(config, "max_position_embeddings", None):
        wider.max_position_embeddings = max(config.max_position_embeddings, 2 * length)
    longer, *_ = saved_lines(lambda layers: named_model(wider, layers, batch, 2 * length, dtype), policy)
    advance()
    one, two = (count_parameters(model) for model, _ in models.values())
    parameters = round(Line.through(one, two)(depth))
    inputs_of_layers = depth * batch * length * int(config.hidden_size) * dtype.itemsize
    saved |= {CHECKPOINTING: lines[INDUCTOR](1) + inputs_of_layers, WTACRS: lines[WTACRS](depth)}
    state = dict.fromkeys(saved, state_bytes(parameters, dtype.itemsize))
    if adapts:
        adapted = {layers: named_model(config, layers, batch, length, dtype, lora=True) for layers in (1, 2)}
        one, two = (count_parameters(model, trained=True) for model, _ in adapted.values())
        trained = round(Line.through(one, two)(depth))
        lines, *_ = saved_lines(adapted.__getitem__, policy)
        saved |= {LORA: lines[INDUCTOR](depth), LORA_WTACRS: lines[WTACRS](depth)}
        bytes_ = parameters * dtype.itemsize + state_bytes(trained, dtype.itemsize)
        state |= {LORA: bytes_, LORA_WTACRS: bytes_}
        advance()
    # b (t l + p l^2) through the bytes of two lengths.
    short, long = saved[WTACRS] / batch, longer[WTACRS](depth) / batch
    pair = max(0.0, (long - 2 * short) / (2 * length**2))
    token = short / length - pair * length
    return Prediction(
        name, depth, parameters, batch, length, dtype.itemsize, saved, state, report, token, pair
    )


def _predict_factory(name: str, batch: int, length: int, policy: Policy, progress: Progress) -> Prediction:
    with torch.device("meta"):
        model, inputs = _made(name, batch, length)
    advance = _counter(progress, 1 + len(BUDGETS))
    report = explain(model, **inputs, policy=policy)
    advance()
    saved = {INDUCTOR: float(report.saved_bytes_before)}
    for way, budget in BUDGETS.items():
        with functorch_config.patch(activation_memory_budget=budget):
            saved[way] = float(explain(model, **inputs, policy=_EXACT).saved_bytes_before)
        advance()
    saved[WTACRS] = float(report.saved_bytes_after)
    itemsize = next(model.parameters()).element_size()
    trained = count_parameters(model, trained=True)
    fixed = count_parameters(model) - trained
    state = dict.fromkeys(saved, fixed * itemsize + state_bytes(trained, itemsize))
    return Prediction(name, 1, fixed + trained, batch, length, itemsize, saved, state, report)


def build(
    name: str, layers: int, batch: int, length: int, dtype: torch.dtype, device: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model that returns a loss, with random weights, and inputs.

    The model is that of the first layers of a configuration, or a factory's.

    Args:
        name: as for :func:`predict`; the other arguments as well.

    Raises:
        ModelError: as :func:`predict`.
    """
    if _names_factory(name):
        with torch.device(device):
            return _made(name, batch, length)
    model, inputs = named_model(configuration(name), layers, batch, length, dtype, device=device)
    return (Loss(model) if "labels" in inputs else model), inputs


def call_factory(name: str, *args: int) -> tuple[nn.Module, Any]:
    """Return the model and the data that ``module:factory`` makes; the working directory is searched too.

    Raises:
        ModelError: no such module or function, or one that does not take `args` or returns something else.
    """
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{name!r} names no function ({error}); write it as module:factory") from error
    if not callable(factory):
        raise ModelError(f"{name!r} is a {type(factory).__name__}; name a function that returns a model")
    try:
        inspect.signature(factory).bind(*args)
    except TypeError as error:
        wanted = "(batch, length)" if args else "()"
        raise ModelError(f"{name!r} is called as factory{wanted} here, but: {error}") from error
    made = factory(*args)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ModelError(f"{name!r} must return a model and its data, a tuple, got a {type(made).__name__}")
    return made


def _names_factory(name: str) -> bool:
    return ":" in name and not Path(name).exists()


def _made(name: str, batch: int, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = call_factory(name, batch, length)
    if not isinstance(inputs, dict):
        raise ModelError(
            f"{name!r} must return a model and a dict of its arguments, got a {type(inputs).__name__} of them"
        )
    return model, inputs


def _counter(progress: Progress, total: int) -> Callable[[], None]:
    """Tell that nothing is done yet; return what tells that one thing more is."""
    done = itertools.count()

    def advance() -> None:
        progress("tracing models", next(done), total)

    advance()
    return advance


def count_parameters(model: nn.Module, trained: bool = False) -> int:
    """Return how many numbers the parameters hold, of all or of those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def configuration(name: str) -> Any:
    """Return the configuration of a model of transformers; of several parts that of its text.

    Args:
        name: of a folder or a file; of a type of models, such as ``llama``, for the sizes that its configuration has
            by default, and the loss that such models are trained by; or on the Hub.

    Raises:
        ModelError: there is no such configuration, or the Hub cannot be asked.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        raise ModelError("models by name need transformers; pip install transformers") from error
    is_type = name in CONFIG_MAPPING and not Path(name).exists()
    try:
        config = AutoConfig.for_model(name) if is_type else _load_configuration(name)
    except (OSError, ValueError, KeyError) as error:
        kind = "has no configuration that transformers knows" if Path(name).exists() else "was not found"
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name!r} {kind} ({reason}); give a folder with a config.json, such a file, a type of models such as "
            "llama, or a name on the Hub"
        ) from error
    config = copy.deepcopy(getattr(config, "text_config", config))
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ModelError(f"{name!r} is no stack of layers (no num_hidden_layers); use wtacrs_fx.explain")
    if is_type:
        config.architectures = _architectures(config.model_type)
    return config


def _load_configuration(name: str) -> Any:
    """Return a configuration from the disk, or else from the Hub, where that answers: else it is tried for long."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError:
        if Path(name).exists() or (fault := _fault_of_hub()) is None:
            return AutoConfig.from_pretrained(name)
    raise OSError(f"it is not in the local cache, and the Hub cannot be reached: {fault}")


def _fault_of_hub() -> str | None:
    """Return why the Hub cannot be asked now; None if it can."""
    hub = importlib.import_module("huggingface_hub")
    endpoint = hub.constants.ENDPOINT
    try:
        hub.utils.get_session().head(endpoint, timeout=_HUB_SECONDS)
    except Exception as error:  # of whichever library the Hub's client uses
        return f"{endpoint}: {error}"
    return None


def _architectures(model_type: str) -> list[str] | None:
    """Return the class of a type of models that has a loss of its own."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for names in (
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ):
        if model_type in names:
            return [names[model_type]]
    return None


class _MeanSquare(nn.Module):
    """Give a model without a loss one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids)[0]
        return hidden.float().square().mean()


class Loss(nn.Module):
    """A model of transformers whose forward is its training objective."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of token ids and labels, both [batch, length]: a scalar."""
        loss: Tensor = self.model(input_ids=input_ids, labels=labels).loss
        return loss


def _check_length(model: nn.Module, config: Any, length: int) -> None:
    """Raise where a model has an embedding for each position, and too few of them: meta tensors would not."""
    positions = getattr(config, "max_position_embeddings", None) or length
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if length > positions and not {positions, positions + 2}.isdisjoint(tables):  # OPT's have two more
        raise ModelError(
            f"length must be at most {positions}, as many positions {type(config).__name__} has, got {length}"
        )


def _with_lora(model: nn.Module) -> nn.Module:
    """Return a model with adapters on all linear layers but the head."""
    peft = importlib.import_module("peft")
    adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=LORA_RANK, target_modules="all-linear"))
    return adapted


def named_model(
    config: Any,
    layers: int,
    batch: int,
    length: int,
    dtype: torch.dtype,
    lora: bool = False,
    device: str = "meta",
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model of so many layers in training mode, with random weights, and inputs."""
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
    has_loss = head.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration"))
    with torch.device(device):
        ids = torch.randint(int(config.vocab_size), (batch, length))
        try:
            model = (
                getattr(transformers, head)(config)
                if has_loss
                else transformers.AutoModel.from_config(config)
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{head or type(config).__name__} cannot be built from token ids: {error}"
            ) from error
        _check_length(model, config, length)
        if getattr(model, "loss_type", "") is None:
            model.loss_type = "ForCausalLM"  # the default, of which some models warn in their forward
        model = _with_lora(model) if lora else model
    if has_loss:
        return model.to(dtype).train(), {"input_ids": ids, "labels": ids}
    return _MeanSquare(model).to(dtype).train(), {"input_ids": ids}
