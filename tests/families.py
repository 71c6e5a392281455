"""Tiny models of many families of transformers, from their configurations alone, with inputs and a loss.

Each is wide and long enough for every encoding: 64 features, 4 x 32 tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

BATCH, TOKENS, VOCABULARY, CLASSES = 4, 32, 100, 10

Inputs = dict[str, Tensor]

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Fields that most configurations have, or map to their own."""

UNCOUNTED = {k: v for k, v in TEXT.items() if k not in ("num_hidden_layers", "max_position_embeddings")}
"""For configurations that refuse a number of layers or a length."""

DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "head_dim": 32}

SEQUENCES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}

T5: dict[str, Any] = {
    **TEXT,
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 128,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}

IMAGE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}

STAGES: dict[str, Any] = {"image_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2}

WINDOWS: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 32,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}

AUDIO: dict[str, Any] = {
    **TEXT,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "do_stable_layer_norm": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "use_weighted_layer_sum": False,
}


def _tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, TOKENS))


def _labelled_tokens() -> Inputs:
    tokens = _tokens()
    return {"input_ids": tokens, "labels": tokens}


def _padded_tokens() -> Inputs:
    tokens = _tokens()
    mask = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [20], [25], [9]])).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(mask > 0, -100)}


def _two_sequences() -> Inputs:
    return {"input_ids": _tokens(), "labels": _tokens()}


def _images(size: int = 32) -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, size, size), "labels": _classes()}


def _waves() -> Inputs:
    return {"input_values": torch.randn(BATCH, 1600), "labels": _classes()}


def _spectra(name: str, *shape: int, **labels: Any) -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(BATCH, *shape), **{k: make() for k, make in labels.items()}}


def _classes() -> Tensor:
    return torch.randint(CLASSES, (BATCH,))


def _past_series() -> Inputs:
    return {"past_values": torch.randn(BATCH, 64, 4), "future_values": torch.randn(BATCH, 8, 4)}


def _probabilistic_series() -> Inputs:
    past = 32 + 7
    return {
        "past_values": torch.randn(BATCH, past),
        "past_time_features": torch.randn(BATCH, past, 2),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": torch.randn(BATCH, 32),
        "future_time_features": torch.randn(BATCH, 32, 2),
    }


def _pairs() -> Inputs:
    return {"input_ids": _tokens(), "pixel_values": torch.randn(BATCH, 3, 32, 32)}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A head, what it is called with, and whether it returns a loss."""

    head: str
    inputs: Callable[[], Inputs]


CAUSAL = Kind("AutoModelForCausalLM", _labelled_tokens)
CAUSAL_PADDED = Kind("AutoModelForCausalLM", _padded_tokens)
MASKED = Kind("AutoModelForMaskedLM", _labelled_tokens)
MASKED_PADDED = Kind("AutoModelForMaskedLM", _padded_tokens)
PLAIN = Kind("AutoModel", lambda: {"input_ids": _tokens()})
TRANSLATION = Kind("AutoModelForSeq2SeqLM", _two_sequences)
IMAGES = Kind("AutoModelForImageClassification", _images)
IMAGE_FEATURES = Kind("AutoModel", lambda: {"pixel_values": torch.randn(BATCH, 3, 32, 32)})
WAVES = Kind("AutoModelForAudioClassification", _waves)
SPEECH = Kind("AutoModelForSpeechSeq2Seq", _spectra("input_features", 16, 64, labels=_tokens))
SPEECH_FRAMES = Kind("AutoModelForSpeechSeq2Seq", _spectra("input_features", 64, 16, labels=_tokens))
SPECTRA = Kind("AutoModelForAudioClassification", _spectra("input_values", 64, 16, labels=_classes))
FRAMES = Kind("AutoModelForAudioClassification", _spectra("input_features", 48, 16, labels=_classes))
PATCHTST = Kind("PatchTSTForPrediction", _past_series)
PATCHTSMIXER = Kind("PatchTSMixerForPrediction", _past_series)
SERIES = Kind("TimeSeriesTransformerForPrediction", _probabilistic_series)
INFORMER = Kind("InformerForPrediction", _probabilistic_series)
AUTOFORMER = Kind("AutoformerForPrediction", _probabilistic_series)
DEIT = Kind("DeiTForImageClassification", _images)
LEVIT = Kind("LevitForImageClassification", lambda: _images(128))
PAIRS = Kind("AutoModel", _pairs)


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of transformers at tiny size."""

    kind: Kind
    config: Mapping[str, Any]
    type: str = ""


def _family(kind: Kind, base: Mapping[str, Any], type: str = "", **overrides: Any) -> Family:
    return Family(kind, {**base, **overrides}, type)


_STATE_SPACE: dict[str, Any] = {"state_size": 16, "expand": 2, "use_mambapy": False, "time_step_rank": 8}
_SERIES: dict[str, Any] = {
    "prediction_length": 32,
    "context_length": 32,
    "lags_sequence": [1, 7],
    "num_time_features": 2,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_PATCHES: dict[str, Any] = {
    "num_input_channels": 4,
    "context_length": 64,
    "prediction_length": 8,
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 64,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 128,
}

FAMILIES: dict[str, Family] = {
    # decoders
    "llama": _family(CAUSAL_PADDED, DECODER),
    "gpt2": _family(CAUSAL, TEXT),
    "gpt_neo": _family(CAUSAL, TEXT, attention_types=[[["global"], 1]], num_layers=1, num_heads=2),
    "gpt_neox": _family(CAUSAL, TEXT),
    "gptj": _family(CAUSAL, TEXT, rotary_dim=16),
    "gpt_bigcode": _family(CAUSAL, TEXT),
    "codegen": _family(CAUSAL, TEXT, num_attention_heads=4, rotary_dim=8),
    "opt": _family(CAUSAL_PADDED, TEXT, ffn_dim=128, word_embed_proj_dim=64),
    "bloom": _family(CAUSAL_PADDED, TEXT),
    "falcon": _family(CAUSAL, TEXT),
    "mpt": _family(CAUSAL, TEXT, max_seq_len=64, n_layers=1, n_heads=2, d_model=64),
    "mistral": _family(CAUSAL, DECODER, sliding_window=16),
    "qwen2": _family(CAUSAL, DECODER),
    "qwen3": _family(CAUSAL_PADDED, DECODER),
    "gemma": _family(CAUSAL, DECODER),
    "gemma2": _family(CAUSAL, DECODER, sliding_window=16),
    "gemma3_text": _family(CAUSAL, DECODER, sliding_window=16),
    "phi": _family(CAUSAL, TEXT),
    "phi3": _family(CAUSAL, DECODER, original_max_position_embeddings=64),
    "stablelm": _family(CAUSAL, DECODER),
    "starcoder2": _family(CAUSAL, DECODER),
    "olmo": _family(CAUSAL, DECODER, clip_qkv=4.0),
    "olmo2": _family(CAUSAL, DECODER),
    "cohere": _family(CAUSAL, DECODER, use_qk_norm=True),
    "glm4": _family(CAUSAL, DECODER),
    "granite": _family(CAUSAL, DECODER),
    "nemotron": _family(CAUSAL, DECODER),
    "persimmon": _family(CAUSAL, TEXT),
    "smollm3": _family(CAUSAL, DECODER),
    "exaone4": _family(CAUSAL, DECODER, sliding_window=16),
    "diffllama": _family(CAUSAL, TEXT, num_key_value_heads=2),
    "deepseek_v3": _family(
        CAUSAL,
        TEXT,
        num_key_value_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    # mixtures of experts
    "mixtral": _family(CAUSAL, {**DECODER, **EXPERTS}),
    "qwen2_moe": _family(CAUSAL, {**DECODER, **EXPERTS}, shared_expert_intermediate_size=64),
    "qwen3_moe": _family(CAUSAL, {**DECODER, **EXPERTS}),
    "olmoe": _family(CAUSAL, {**DECODER, **EXPERTS}),
    "phimoe": _family(CAUSAL, {**DECODER, **EXPERTS}),
    "granitemoe": _family(CAUSAL, {**DECODER, **EXPERTS}),
    "gpt_oss": _family(CAUSAL, {**DECODER, **EXPERTS}, sliding_window=16),
    # state spaces and recurrences
    "mamba": _family(CAUSAL, {**TEXT, **_STATE_SPACE}),
    "mamba2": _family(CAUSAL, {**TEXT, **_STATE_SPACE}, num_heads=4, head_dim=32, n_groups=1, chunk_size=16),
    "falcon_mamba": _family(CAUSAL, {**TEXT, **_STATE_SPACE}),
    "rwkv": _family(CAUSAL, TEXT, num_hidden_layers=2, attention_hidden_size=64, context_length=64),
    "recurrent_gemma": _family(CAUSAL, DECODER, lru_width=64, attention_window_size=16, num_hidden_layers=3),
    "bamba": _family(
        CAUSAL,
        DECODER,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=16,
        num_hidden_layers=2,
        attn_layer_indices=[1],
    ),
    "lfm2": _family(CAUSAL, DECODER, num_hidden_layers=2, layer_types=["conv", "full_attention"]),
    "qwen3_next": _family(
        CAUSAL,
        {**DECODER, **EXPERTS},
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        shared_expert_intermediate_size=64,
    ),
    # encoders
    "bert": _family(MASKED_PADDED, TEXT),
    "roberta": _family(MASKED, TEXT, max_position_embeddings=80),
    "xlm-roberta": _family(MASKED_PADDED, TEXT, max_position_embeddings=80),
    "electra": _family(MASKED, TEXT, embedding_size=64),
    "deberta": _family(
        MASKED_PADDED, TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16
    ),
    "deberta-v2": _family(
        MASKED_PADDED,
        TEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        share_att_key=True,
    ),
    "albert": _family(MASKED, TEXT, embedding_size=64),
    "distilbert": _family(MASKED_PADDED, TEXT, hidden_dim=128),
    "mpnet": _family(MASKED, TEXT),
    "modernbert": _family(
        MASKED_PADDED, TEXT, num_hidden_layers=2, local_attention=16, cls_token_id=1, sep_token_id=2
    ),
    "mobilebert": _family(MASKED, TEXT, embedding_size=64, intra_bottleneck_size=64, true_hidden_size=64),
    "convbert": _family(MASKED, TEXT, embedding_size=64),
    "squeezebert": _family(MASKED, TEXT, embedding_size=64),
    "fnet": _family(MASKED, TEXT),
    "nystromformer": _family(MASKED, TEXT, segment_means_seq_len=32, num_landmarks=32),
    "roformer": _family(MASKED, TEXT, embedding_size=64),
    "esm": _family(MASKED, TEXT, position_embedding_type="rotary", mask_token_id=3, token_dropout=False),
    "funnel": _family(
        MASKED,
        UNCOUNTED,
        d_model=64,
        n_head=2,
        d_head=32,
        d_inner=128,
        initializer_std=0.02,
        block_sizes=[1, 1],
        num_decoder_layers=1,
    ),
    "xlnet": _family(PLAIN, UNCOUNTED, d_model=64, n_head=2, d_inner=128, n_layer=1),
    "longformer": _family(MASKED, TEXT, attention_window=[16], max_position_embeddings=80),
    "big_bird": _family(MASKED, TEXT, attention_type="original_full"),
    "reformer": _family(
        MASKED,
        TEXT,
        is_decoder=False,
        attn_layers=["local"],
        attention_head_size=32,
        feed_forward_size=128,
        axial_pos_shape=[4, 8],
        axial_pos_embds_dim=[32, 32],
        local_attn_chunk_length=16,
        hash_seed=0,
    ),
    # encoders and decoders
    "t5": _family(TRANSLATION, T5),
    "mt5": _family(TRANSLATION, T5),
    "switch_transformers": _family(
        TRANSLATION, T5, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    ),
    "bart": _family(TRANSLATION, SEQUENCES),
    "pegasus": _family(TRANSLATION, SEQUENCES),
    "mbart": _family(TRANSLATION, SEQUENCES),
    "blenderbot": _family(TRANSLATION, SEQUENCES),
    "m2m_100": _family(TRANSLATION, SEQUENCES),
    "led": _family(TRANSLATION, SEQUENCES, attention_window=[16], max_encoder_position_embeddings=64),
    "prophetnet": _family(
        TRANSLATION,
        UNCOUNTED,
        max_position_embeddings=64,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        ngram=2,
        num_buckets=8,
        relative_max_distance=16,
    ),
    # images
    "vit": _family(IMAGES, IMAGE),
    "deit": _family(DEIT, IMAGE),
    "beit": _family(IMAGES, IMAGE, use_relative_position_bias=True),
    "dinov2": _family(IMAGES, IMAGE, use_swiglu_ffn=True),
    "swin": _family(IMAGES, WINDOWS),
    "swinv2": _family(IMAGES, WINDOWS),
    "vit_msn": _family(IMAGES, IMAGE),
    "siglip_vision_model": _family(IMAGE_FEATURES, IMAGE),
    "clip": _family(
        PAIRS,
        {"projection_dim": 64},
        text_config={**TEXT, "eos_token_id": 2},
        vision_config=IMAGE,
    ),
    "levit": _family(
        LEVIT,
        {},
        image_size=128,
        hidden_sizes=[64, 64, 64],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[16, 16, 16],
        patch_size=16,
    ),
    "pvt": _family(
        IMAGES,
        {},
        image_size=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        num_encoder_blocks=2,
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        sequence_reduction_ratios=[2, 1],
        patch_sizes=[4, 2],
        strides=[2, 2],
    ),
    "poolformer": _family(
        IMAGES,
        {},
        hidden_sizes=[32, 64],
        depths=[1, 1],
        num_encoder_blocks=2,
        patch_sizes=[3, 3],
        strides=[2, 2],
        padding=[1, 1],
    ),
    "focalnet": _family(
        IMAGES, WINDOWS, hidden_sizes=[32, 64], focal_levels=[2, 2], focal_windows=[3, 3], num_channels=3
    ),
    # convolutions
    "convnext": _family(IMAGES, STAGES, patch_size=2),
    "convnextv2": _family(IMAGES, STAGES, patch_size=2),
    "resnet": _family(IMAGES, STAGES, embedding_size=32, layer_type="bottleneck"),
    "regnet": _family(IMAGES, STAGES, embedding_size=32, groups_width=16),
    "mobilenet_v2": _family(IMAGES, {"image_size": 32, "depth_multiplier": 0.35}),
    "efficientnet": _family(
        IMAGES,
        {},
        image_size=32,
        width_coefficient=1.0,
        hidden_dim=1280,
        depth_coefficient=1.0,
        kernel_sizes=[3, 3],
        in_channels=[32, 32],
        out_channels=[32, 64],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 2],
        depthwise_padding=[],
    ),
    "mobilevit": _family(
        IMAGES,
        {"image_size": 64, "patch_size": 2},
        hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[16, 16, 24, 32, 48, 64, 64],
        num_attention_heads=2,
    ),
    # sound
    "wav2vec2": _family(WAVES, AUDIO),
    "hubert": _family(WAVES, AUDIO),
    "wavlm": _family(WAVES, AUDIO),
    "data2vec-audio": _family(WAVES, AUDIO),
    "wav2vec2-conformer": _family(WAVES, AUDIO),
    "wav2vec2-bert": _family(FRAMES, AUDIO, feature_projection_input_dim=16),
    "sew": _family(WAVES, AUDIO, squeeze_factor=2),
    "whisper": _family(SPEECH, SEQUENCES, num_mel_bins=16, max_source_positions=32, max_target_positions=64),
    "speech_to_text": _family(
        SPEECH_FRAMES,
        SEQUENCES,
        input_feat_per_channel=16,
        conv_channels=64,
        max_source_positions=64,
        max_target_positions=64,
    ),
    "audio-spectrogram-transformer": _family(
        SPECTRA, IMAGE, patch_size=4, frequency_stride=4, time_stride=4, max_length=64, num_mel_bins=16
    ),
    # time series
    "patchtst": _family(PATCHTST, _PATCHES),
    "patchtsmixer": _family(PATCHTSMIXER, _PATCHES),
    "time_series_transformer": _family(SERIES, _SERIES),
    "informer": _family(INFORMER, _SERIES, sampling_factor=100),
    "autoformer": _family(AUTOFORMER, _SERIES, label_length=8, moving_average=5),
}


class WithLoss(nn.Module):
    """A model whose output is its loss, or the square of its first output's distance to a fixed target."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        output = self.model(**inputs)
        loss = getattr(output, "loss", None)
        return _to_target(output) if loss is None else loss


def _to_target(output: Any) -> Tensor:
    main = next(value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point())
    target = torch.linspace(-1, 1, main.shape[-1], device=main.device)
    return (main.float() - target).square().mean()


def make(name: str) -> tuple[nn.Module, Inputs]:
    """Return a model of the family that returns a loss, in training mode without dropout, and its inputs."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.type or name, **family.config, num_labels=CLASSES)
    without_noise(config)
    head = getattr(transformers, family.kind.head)
    model = head.from_config(config) if hasattr(head, "from_config") else head(config)
    _leave_zero(model)
    return WithLoss(model).train(), family.kind.inputs()


def _leave_zero(model: nn.Module) -> None:
    """Change parameters that start as zeros: a normalised row of zeros has a gradient like no trained one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def without_noise(config: Any) -> None:
    """Turn off dropout, stochastic depth and jitter in a configuration and the ones inside."""
    for field, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            without_noise(value)
        elif isinstance(value, float) and any(word in field for word in ("drop", "jitter", "mask_time_prob")):
            setattr(config, field, 0.0)
