"""Transformers with random weights in the shapes of BERT, GPT-2, Llama, T5 and ViT. Nothing is downloaded.

The encoders end in hidden states, of a small vocabulary; the language models in the loss that they are trained by,
over a real one.

BERT and GPT-2 have dropout 0.1 everywhere but on the attention probabilities: with it, CPUs have no fused
attention and every variant, Inductor included, would keep the scores. T5 stands for models that do keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

VOCABULARY = 1024
"""Words of the encoders, whose embeddings are not what is measured."""
WORDS = {
    "llama-lm": 49_152, "llama-3.2-lm": 128_256, "bert-lm": 30_522, "t5-lm": 32_128, "head": 128_256,
    "olmoe-lm": 50_304,
}  # fmt: skip
"""Words of the language models: SmolLM2's, Llama 3.2's, BERT's, T5's, Llama 3.2's again, and OLMoE's."""
PATCH = 16


@dataclass(frozen=True)
class Shape:
    """Size of a model and of its batch; `heads` divides `d`."""

    layers: int = 3
    d: int = 768
    heads: int = 12
    batch: int = 16
    seq: int = 128
    words: int | None = None  # of a language model; its own where nothing is said

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in asdict(self).items() if size is not None)


TINY = Shape(layers=2, d=64, heads=2, batch=4, seq=32)
REGIME = Shape(layers=4, d=576, heads=9, batch=8, seq=512)
"""The case of README's first table: the width of SmolLM2-135M."""


class DistanceToTarget(nn.Module):
    """Wrap an encoder so that its forward is the whole training objective: one graph, one scalar."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, target: Tensor, **inputs: Tensor) -> Tensor:
        """Return the mean squared distance of the hidden states to `target`: [batch, tokens, d]."""
        return F.mse_loss(self.encoder(**inputs).last_hidden_state, target)


class Head(nn.Module):
    """The end of a language model: hidden states times the weight of the last norm, to a loss."""

    def __init__(self, d: int, words: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(d))
        self.lm_head = nn.Linear(d, words, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy of `labels` [batch, tokens] from `hidden` [batch, tokens, d]: a scalar."""
        logits = self.lm_head(hidden * self.norm).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Loss(nn.Module):
    """Wrap a language model so that its forward is its loss alone; the logits are not returned."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the mean cross entropy: a scalar."""
        loss: Tensor = self.model(**inputs).loss
        return loss


class Autocast(nn.Module):
    """Wrap a model so that its products are bfloat16 and its weights stay float32."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device_type = model, torch.device(device).type

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return what the model does."""
        with torch.autocast(self.device_type, torch.bfloat16):
            loss: Tensor = self.model(**inputs)
        return loss


PRECISIONS = ("float32", "bfloat16", "autocast")


def build(
    name: str, shape: Shape, precision: str = "float32", device: str = "cpu", seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build an encoder or a language model in training mode, in one of :data:`PRECISIONS`, and a random batch.

    `model(**inputs)` is a scalar loss.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    make_one = make_language_model if name in WORDS else make
    model, inputs = make_one(name, shape, dtype, device, seed)
    return (Autocast(model, device) if precision == "autocast" else model), inputs


def make_language_model(
    name: str, shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a language model in training mode and a random batch: `model(**inputs)` is its loss.

    A masked one is asked for 15 words in a hundred; others for every word.
    """
    torch.manual_seed(seed)
    words = shape.words or WORDS[name]
    tokens = torch.randint(words, (shape.batch, shape.seq))
    if name == "head":
        hidden = torch.randn(*tokens.shape, shape.d, dtype=dtype)
        return Head(shape.d, words).to(device, dtype), {
            "hidden": hidden.to(device),
            "labels": tokens.to(device),
        }
    model = Loss(LANGUAGE_MODELS[name](shape, words)).to(device, dtype).train()
    asked = (
        torch.rand(tokens.shape) < 0.15 if name == "bert-lm" else torch.ones_like(tokens, dtype=torch.bool)
    )
    inputs = {"input_ids": tokens, "labels": tokens.where(asked, -100)}
    return model, {key: value.to(device) for key, value in inputs.items()}


def make(
    name: str, shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build encoder `name` in training mode and a random batch: `model(**inputs)` is a scalar loss.

    `inputs["target"]` is one [batch, tokens, d] tensor: the unit in which saved activations are counted.
    """
    torch.manual_seed(seed)
    model = DistanceToTarget(MODELS[name](shape)).to(device, dtype).train()
    if name == "vit":
        tokens = shape.seq + 1  # the class token
        inputs = {"pixel_values": torch.randn(shape.batch, 3, *_image_size(shape.seq), dtype=dtype)}
    else:
        tokens = shape.seq
        inputs = {"input_ids": torch.randint(VOCABULARY, (shape.batch, shape.seq))}
    inputs["target"] = torch.randn(shape.batch, tokens, shape.d, dtype=dtype)
    return model, {key: value.to(device) for key, value in inputs.items()}


def _image_size(patches: int) -> tuple[int, int]:
    """Return height and width in pixels of the squarest image that has exactly `patches` patches."""
    rows = next(n for n in range(isqrt(patches), 0, -1) if patches % n == 0)
    return rows * PATCH, patches // rows * PATCH


def _bert_config(shape: Shape, words: int) -> BertConfig:
    return BertConfig(
        vocab_size=words,
        hidden_size=shape.d,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.d,
        max_position_embeddings=max(shape.seq, 512),
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )


def _llama_config(shape: Shape, words: int, width: int, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=words,
        hidden_size=shape.d,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=width,
        max_position_embeddings=max(shape.seq, 512),
        use_cache=False,
        attn_implementation="sdpa",
        **options,
    )


def _t5_config(shape: Shape, words: int, **options: Any) -> T5Config:
    return T5Config(
        vocab_size=words,
        d_model=shape.d,
        d_kv=shape.d // shape.heads,
        d_ff=4 * shape.d,
        num_layers=shape.layers,
        num_heads=shape.heads,
        use_cache=False,
        attn_implementation="eager",
        **options,
    )


def _bert(shape: Shape) -> PreTrainedModel:
    """Post-norm encoder, GELU of width 4d, dropout 0.1 but in the fused attention."""
    return BertModel(_bert_config(shape, VOCABULARY), add_pooling_layer=False)


def _gpt2(shape: Shape) -> PreTrainedModel:
    """Pre-norm decoder on Conv1D, approximated GELU of width 4d, dropout 0.1 but in the fused attention."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=shape.d,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_positions=max(shape.seq, 512),
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return GPT2Model(config)


def _llama(shape: Shape) -> PreTrainedModel:
    """Pre-norm decoder, RMSNorm, SwiGLU of width 2.75d, rotary positions, no dropout, fused attention."""
    return LlamaModel(_llama_config(shape, VOCABULARY, 11 * shape.d // 4))


def _t5(shape: Shape) -> PreTrainedModel:
    """Pre-norm encoder, RMSNorm, ReLU of width 4d, dropout 0.1, attention scores in memory."""
    return T5EncoderModel(_t5_config(shape, VOCABULARY))


def _vit(shape: Shape) -> PreTrainedModel:
    """Pre-norm encoder of image patches, GELU of width 4d, no dropout, fused attention."""
    config = ViTConfig(
        hidden_size=shape.d,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.d,
        image_size=_image_size(shape.seq),
        patch_size=PATCH,
        attn_implementation="sdpa",
    )
    return ViTModel(config, add_pooling_layer=False)


MODELS: dict[str, Callable[[Shape], PreTrainedModel]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
    "vit": _vit,
}


def _llama_lm(shape: Shape, words: int) -> PreTrainedModel:
    """Llama with a third of the heads for keys and values where that is a number, and a tied head."""
    groups = shape.heads // 3 if shape.heads % 3 == 0 else shape.heads
    options = {"num_key_value_heads": groups, "tie_word_embeddings": True}
    return LlamaForCausalLM(_llama_config(shape, words, 8 * shape.d // 3, **options))


def _llama_3_2_lm(shape: Shape, words: int) -> PreTrainedModel:
    """Llama 3.2 with its tied head."""
    options = {"num_key_value_heads": max(1, shape.heads // 4), "tie_word_embeddings": True}
    return LlamaForCausalLM(_llama_config(shape, words, 4 * shape.d, **options))


def _bert_lm(shape: Shape, words: int) -> PreTrainedModel:
    """BERT with its masked-language head, tied."""
    return BertForMaskedLM(_bert_config(shape, words))


def _t5_lm(shape: Shape, words: int) -> PreTrainedModel:
    """T5 with encoder, decoder and tied head."""
    return T5ForConditionalGeneration(_t5_config(shape, words, decoder_start_token_id=0))


def _olmoe_lm(shape: Shape, words: int) -> PreTrainedModel:
    """OLMoE: a mixture of 64 experts of half the width in every layer, eight of them for a token; a head of its own."""
    config = OlmoeConfig(
        vocab_size=words,
        hidden_size=shape.d,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.d // 2,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=max(shape.seq, 512),
        use_cache=False,
        attn_implementation="sdpa",
    )
    config._experts_implementation = "grouped_mm"
    return OlmoeForCausalLM(config)


LANGUAGE_MODELS: dict[str, Callable[[Shape, int], PreTrainedModel]] = {
    "llama-lm": _llama_lm,
    "llama-3.2-lm": _llama_3_2_lm,
    "bert-lm": _bert_lm,
    "t5-lm": _t5_lm,
    "olmoe-lm": _olmoe_lm,
}
