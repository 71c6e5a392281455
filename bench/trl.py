"""Training steps of TRL's ``SFTTrainer`` and of transformers' ``Trainer`` with gradient checkpointing, as they come.

    python -m bench.trl                # about 8 minutes on 2 cores
    python -m bench.trl --quick        # tiny sizes: does it run? keeps no rows

A model of Qwen3's shape under autocast, on tokens without padding. Compared are the trainer without a compiler, with
Inductor (``model.compile()``), and with wtacrs (``enable(trainer)``), each after two steps of its own training. A step
is the trainer's ``training_step``: forward and backward pass; the three take turns.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import datasets
import torch
import typer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from bench.harness import BASELINE, BUDGET, MIB, Row, circumstances, record, summarise
from wtacrs_fx.integrations.transformers import enable
from wtacrs_fx.tools import measure
from wtacrs_fx.tools.steps import interleave, many_variants
from wtacrs_passes.maths.observer import SETTLED

VARIANTS = ("eager", BASELINE, BUDGET)
TRAINERS = ("SFTTrainer", "Trainer")


@dataclass(frozen=True)
class Size:
    """Of the model and of a step."""

    layers: int = 6
    d: int = 512
    words: int = 16_384
    batch: int = 4
    length: int = 512

    def __str__(self) -> str:
        return f"layers={self.layers} d={self.d} words={self.words} batch={self.batch} length={self.length}"


def samples(words: int, length: int) -> Iterator[dict[str, list[int]]]:
    numbers = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(2, words, (length,), generator=numbers).tolist()
        yield {"input_ids": ids, "labels": ids}


def make(kind: str, variant: str, size: Size) -> Any:
    """Return a trainer that has trained for two steps."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size.words, hidden_size=size.d, intermediate_size=3 * size.d, num_hidden_layers=size.layers,
        num_attention_heads=size.d // 64, num_key_value_heads=max(1, size.d // 128), head_dim=64,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": 2, "per_device_train_batch_size": size.batch, "bf16": True,
        "use_cpu": not torch.cuda.is_available(), "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "gradient_checkpointing": True, "logging_steps": 1,
    }  # fmt: skip
    data = datasets.IterableDataset.from_generator(
        samples, gen_kwargs={"words": size.words, "length": size.length}
    )
    if kind == "Trainer":
        trainer: Any = Trainer(model, TrainingArguments(**options), train_dataset=data)
    else:
        trl = importlib.import_module("trl")
        words = {"[PAD]": 0, "[EOS]": 1, **{f"w{i}": i for i in range(2, size.words)}}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="[PAD]")),
            pad_token="[PAD]",
            eos_token="[EOS]",
        )
        arguments = trl.SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    if variant == BASELINE:
        trainer.model.compile(backend="inductor")
    elif variant == BUDGET:
        enable(trainer)
    trainer.train()
    return trainer


def rows(kind: str, size: Size, rounds: int) -> list[Row]:
    """Return peak and time of a step of each variant."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with many_variants():
        trainers = {variant: make(kind, variant, size) for variant in VARIANTS}

        def step(variant: str) -> None:
            trainer = trainers[variant]
            trainer.model.zero_grad(set_to_none=True)
            trainer.training_step(trainer.model, inputs[variant])

        inputs = {
            variant: trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            for variant, trainer in trainers.items()
        }
        steps = {variant: partial(step, variant) for variant in VARIANTS}
        for _ in range(SETTLED):  # a noise budget is measured, and the code compiled with what follows
            for one in steps.values():
                one()
        peaks = {variant: measure.peak_bytes(one, device) for variant, one in steps.items()}
        seconds = interleave(
            {variant: partial(measure.step_seconds, one, device) for variant, one in steps.items()}, rounds
        )
    found = []
    for variant in VARIANTS:
        figures = [
            ("peak", "MiB", {"value": peaks[variant] / MIB, "ratio": peaks[variant] / peaks[BASELINE]}),
            ("step time", "s", summarise(seconds[variant], seconds[BASELINE])),
        ]
        found += [
            Row(
                "trl",
                kind,
                variant,
                metric,
                unit=unit,
                shapes=str(size),
                dtype="autocast",
                **values,
                **circumstances(),
            )
            for metric, unit, values in figures
        ]
    torch._dynamo.reset()
    return found


def main(
    rounds: int = 7,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, one round; keep no rows.")] = False,
) -> None:
    """Measure both trainers; append rows to bench/results."""
    for kind in TRAINERS:
        found = rows(kind, Size(2, 128, 512, 2, 64) if quick else Size(), 1 if quick else rounds)
        record(found, keep=not quick)


if __name__ == "__main__":
    typer.run(main)
