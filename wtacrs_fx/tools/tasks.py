"""What the demo trains: an encoder that tells texts apart, or a language model, whole or by adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .classification import Classifier, Collate, accuracy, load_encoder
from .language import CausalLoss, add_lora, blocks_of, load_language_model, mean_loss
from .texts import InputError, draw_batches, load_running_text, load_texts, split

Batch = dict[str, Tensor]
_EVALUATION_BATCH = 50
_HELD_OUT_BLOCKS = 16
_RANK = 8


@dataclass(frozen=True)
class Merit:
    """What a training is judged by: its name, its unit, and what it is multiplied by to be in that unit."""

    title: str
    unit: str
    scale: float = 1.0


@dataclass(frozen=True)
class Task:
    """A training: a model whose forward is, or begins with, the loss, batches, and what is looked at in the end.

    Attributes:
        about: of model and data, in a line.
        size: of a step, in words.
        measure: takes a trained model, and returns its merit.
    """

    about: str
    size: str
    model: nn.Module
    batches: list[Batch]
    merit: Merit
    measure: Callable[[nn.Module], float]
    learning_rate: float


@dataclass(frozen=True)
class Sizes:
    """Of a training: steps, samples a step, tokens a sample."""

    steps: int
    batch: int
    length: int


DEFAULTS = {"encoder": Sizes(32, 16, 128), "language-model": Sizes(12, 4, 512), "lora": Sizes(12, 4, 512)}
"""Tasks, and what fits into some minutes on 2 cores."""


def make_task(
    name: str, model: str | None, data: Path | None, sizes: Sizes, seed: int, device: torch.device
) -> Task:
    """Return one of :data:`DEFAULTS`.

    Args:
        model: folder or Hub id; None is the packaged one.
        data: of an encoder lines label<TAB>text, of a language model any text; None is the packaged BBC news.

    Raises:
        InputError: a name that is none of them, or what cannot be read.
    """
    if name not in DEFAULTS:
        raise InputError(f"--task must be one of {', '.join(DEFAULTS)}, got {name!r}")
    make = _encoder if name == "encoder" else partial(_language_model, rank=_RANK if name == "lora" else 0)
    return make(model, data, sizes, seed, device)


def _encoder(model: str | None, data: Path | None, sizes: Sizes, seed: int, device: torch.device) -> Task:
    texts, labels, names = load_texts(data)
    tokenizer, encoder = load_encoder(model)
    torch.manual_seed(seed)
    classifier = Classifier(encoder, len(names)).to(device).train()
    train, held_out = split(len(texts), seed)
    collate = Collate(tokenizer, texts, labels, sizes.length, device)
    tests = [collate(held_out[i : i + _EVALUATION_BATCH]) for i in range(0, len(held_out), _EVALUATION_BATCH)]
    return Task(
        f"{len(texts)} texts of {len(names)} classes, {len(held_out)} held out",
        f"{sizes.batch} texts x {sizes.length} tokens",
        classifier,
        [collate(chosen) for chosen in draw_batches(train, sizes.steps, sizes.batch, seed)],
        Merit("accuracy", "% held out", 100),
        partial(accuracy, batches=tests),
        2e-4,
    )


def _language_model(
    model: str | None, data: Path | None, sizes: Sizes, seed: int, device: torch.device, rank: int
) -> Task:
    tokenizer, network = load_language_model(model)
    blocks = blocks_of(tokenizer, load_running_text(data), sizes.length)
    held_out = min(_HELD_OUT_BLOCKS, len(blocks) // 2) // sizes.batch * sizes.batch
    if not held_out:
        raise InputError(
            f"the text must have at least {2 * sizes.batch} blocks of {sizes.length} tokens, got {len(blocks)}; give "
            f"more with --data, or a smaller --batch or --length"
        )
    torch.manual_seed(seed)
    if rank:
        add_lora(network, rank)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    blocks = blocks[order].to(device)
    tests = torch.split(blocks[:held_out], sizes.batch)
    train = range(held_out, len(blocks))
    drawn = draw_batches(train, sizes.steps, sizes.batch, seed)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Task(
        f"{type(network).__name__}, {trained / 1e6:.1f} million trained parameters, {len(train)} blocks of text",
        f"{sizes.batch} x {sizes.length} tokens, autocast",
        CausalLoss(network, autocast=True).to(device).train(),
        [{"input_ids": blocks[chosen]} for chosen in drawn],
        Merit("loss", "nats held out"),
        partial(mean_loss, batches=tests),
        4e-4 if rank else 2e-5,
    )
