"""What training well-known models would store, from their published sizes alone: nothing is allocated.

    python -m bench.well_known                          # about 10 minutes
    python -m bench.well_known --model "Llama 3 8B"
    python -m bench.well_known --quick                  # one small model: does it run? keeps no rows

Each model has the sizes of its configuration on the Hub and its own loss, under autocast: weights, gradients and
AdamW's moments in float32, products in bfloat16. Two and three layers are traced on the meta device; more follow, as
layers are alike. Bytes are those that cross from the forward to the backward pass. The largest batch is what fits
beside weights, gradients and moments, without fragments and what is held for a moment: of two ways it is the
comparison that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn

from bench.harness import BASELINE, BUDGET, Row, circumstances, record
from bench.models import Autocast
from wtacrs_fx import Policy
from wtacrs_fx.tools.predict import (
    INDUCTOR,
    WTACRS,
    Line,
    count_parameters,
    largest_batch,
    saved_lines,
    state_bytes,
)
from wtacrs_passes.report import MIB

LAYERS = (2, 3)
CARDS = (24, 80)  # GB
AGAIN = f"{BUDGET}, products again"
POLICIES = {BUDGET: Policy(), AGAIN: Policy(recompute_products=1.0)}
Inputs = dict[str, Tensor]


class Objective(nn.Module):
    """A model of transformers whose forward is the loss that it is trained by."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the loss of a model's own inputs and labels: a scalar."""
        loss: Tensor = self.model(**inputs).loss
        return loss


def of_tokens(config: Any, length: int) -> Inputs:
    ids = torch.randint(config.vocab_size, (1, length))
    return {"input_ids": ids, "labels": ids}


def of_pixels(config: Any, length: int) -> Inputs:
    return {
        "pixel_values": torch.rand(length, 3, config.image_size, config.image_size),
        "labels": torch.zeros(length, dtype=torch.long),
    }


def of_sound(config: Any, length: int) -> Inputs:
    frames = 2 * config.max_source_positions
    return {
        "input_features": torch.rand(1, config.num_mel_bins, frames),
        "labels": torch.randint(config.vocab_size, (1, length)),
    }


@dataclass(frozen=True)
class Known:
    """A published model: its class, the numbers of its configuration, its depth, and a sample."""

    architecture: str
    config: str
    depth: int
    sizes: dict[str, Any]
    length: int
    inputs: Callable[[Any, int], Inputs] = of_tokens
    depths: tuple[str, ...] = ("num_hidden_layers",)
    unit: str = "tokens"

    def make(self, layers: int) -> tuple[nn.Module, Inputs]:
        """Return a model of so many layers, under autocast, and a sample, on the meta device."""
        sizes = {**self.sizes, **dict.fromkeys(self.depths, layers)}
        config = getattr(transformers, self.config)(**sizes, use_cache=False)
        with torch.device("meta"):
            model = getattr(transformers, self.architecture)(config).train()
            inputs = self.inputs(config, self.length)
        return Autocast(Objective(model), "cpu"), inputs


def llama(hidden: int, inner: int, heads: int, keys: int, words: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": keys, "vocab_size": words, **others,
    }  # fmt: skip


BERT_LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
MODELS = {
    "Llama 3.2 1B": Known(
        "LlamaForCausalLM", "LlamaConfig", 16,
        llama(2048, 8192, 32, 8, 128_256, tie_word_embeddings=True, max_position_embeddings=131_072), 2048,
    ),
    "Llama 3 8B": Known(
        "LlamaForCausalLM", "LlamaConfig", 32, llama(4096, 14_336, 32, 8, 128_256, max_position_embeddings=8192), 2048
    ),
    "Qwen3 4B": Known(
        "Qwen3ForCausalLM", "Qwen3Config", 36,
        llama(2560, 9728, 32, 8, 151_936, head_dim=128, tie_word_embeddings=True), 2048,
    ),
    "Gemma 2 2B": Known(
        "Gemma2ForCausalLM", "Gemma2Config", 26, llama(2304, 9216, 8, 4, 256_000, head_dim=256), 2048
    ),
    "Mixtral 8x7B": Known("MixtralForCausalLM", "MixtralConfig", 32, llama(4096, 14_336, 32, 8, 32_000), 2048),
    "BERT-Large": Known("BertForMaskedLM", "BertConfig", 24, {**BERT_LARGE, "vocab_size": 30_522}, 512),
    "ModernBERT-large": Known(
        "ModernBertForMaskedLM", "ModernBertConfig", 28,
        {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 2624, "vocab_size": 50_368}, 1024,
    ),
    "T5-Large": Known(
        "T5ForConditionalGeneration", "T5Config", 24,
        {
            "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_heads": 16, "vocab_size": 32_128,
            "decoder_start_token_id": 0,
        },
        512, depths=("num_layers", "num_decoder_layers"),
    ),
    "ViT-L/16": Known(
        "ViTForImageClassification", "ViTConfig", 24, {**BERT_LARGE, "image_size": 224, "num_labels": 1000}, 4,
        of_pixels, unit="images",
    ),
    "Whisper large-v3": Known(
        "WhisperForConditionalGeneration", "WhisperConfig", 32,
        {
            "d_model": 1280, "encoder_attention_heads": 20, "decoder_attention_heads": 20, "encoder_ffn_dim": 5120,
            "decoder_ffn_dim": 5120, "vocab_size": 51_866, "num_mel_bins": 128,
        },
        448, of_sound, ("encoder_layers", "decoder_layers"),
    ),
}  # fmt: skip
QUICK = Known(
    "BertForMaskedLM", "BertConfig", 4, {"hidden_size": 64, "num_attention_heads": 2, "vocab_size": 600}, 64
)


def predicted(known: Known) -> dict[str, Line]:
    """Return the saved bytes of a sample by depth, for each way of training."""
    models = {layers: known.make(layers) for layers in LAYERS}
    found = {way: saved_lines(models.__getitem__, policy, LAYERS)[0] for way, policy in POLICIES.items()}
    return {BASELINE: found[BUDGET][INDUCTOR], **{way: lines[WTACRS] for way, lines in found.items()}}


def rows(name: str, known: Known) -> list[Row]:
    """Return bytes of a sample and largest batches of a model."""
    one, two = (count_parameters(known.make(layers)[0]) for layers in LAYERS)
    parameters = round(Line.through(one, two, LAYERS)(known.depth))
    state = state_bytes(parameters, torch.float32.itemsize)
    shapes = f"parameters={parameters / 1e9:.2f}e9 layers={known.depth} {known.unit}={known.length}"
    found, lines = [], predicted(known)
    for way, line in lines.items():
        size = line(known.depth)
        metrics = [("saved", size / MIB, "MiB", size / lines[BASELINE](known.depth))]
        metrics += [
            (f"largest batch, {card} GB", largest_batch(card, state, size), "1", None) for card in CARDS
        ]
        found += [
            Row(
                "well_known", name, way, metric, float(value), unit, ratio, shapes=shapes, dtype="autocast",
                **circumstances(),
            )
            for metric, value, unit, ratio in metrics
        ]  # fmt: skip
    return found


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; all by default.")] = None,
    quick: Annotated[bool, typer.Option(help="One small model; keep no rows.")] = False,
) -> None:
    """Predict what training the models would store; append rows to bench/results."""
    for name in ["quick"] if quick else model or MODELS:
        record(rows(name, QUICK if quick else MODELS[name]), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
