from pathlib import Path

import pytest
import torch
from encoder import needs_packages, tiny_encoder
from torch import nn

from wtacrs_fx.tools.classification import Classifier, Collate, accuracy, load_encoder
from wtacrs_fx.tools.texts import InputError


class TestEncoder:
    @needs_packages
    def test_packaged_encoder_loads_without_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> None:
            raise AssertionError("the network was used")

        monkeypatch.setattr("socket.getaddrinfo", refuse)
        tokenizer, encoder = load_encoder()
        assert encoder.config.hidden_size == 384
        assert tokenizer("news", padding="max_length", max_length=8)["attention_mask"] == [1] * 3 + [0] * 5

    @needs_packages
    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--model must be a folder with a transformers encoder"):
            load_encoder(str(tmp_path))

    @needs_packages
    def test_padding_does_not_reach_the_logits(self) -> None:
        model = Classifier(tiny_encoder(), classes=3).eval()
        ids = torch.tensor([[5, 6, 7, 0, 0]])
        mask = (ids != 0).long()
        labels = torch.tensor([2])
        loss, logits = model(ids, mask, labels)
        _, unpadded = model(ids[:, :3], mask[:, :3], labels)
        torch.testing.assert_close(logits, unpadded)
        torch.testing.assert_close(loss, -logits.log_softmax(-1)[0, 2])


def test_accuracy_restores_training_mode() -> None:
    class Constant(nn.Module):
        def forward(self, labels: torch.Tensor) -> object:
            return None, torch.tensor([[0.0, 1.0]]).expand(len(labels), 2)

    module = Constant().train()
    labels = torch.tensor([1, 1, 0, 1])
    assert accuracy(module, [{"labels": labels}]) == 0.75
    assert module.training


def test_batches_have_one_length() -> None:
    def tokenizer(texts: list[str], max_length: int, **options: object) -> dict[str, torch.Tensor]:
        assert options == {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        lengths = torch.tensor([len(text) for text in texts]).unsqueeze(-1)
        mask = (torch.arange(max_length) < lengths).long()
        return {"input_ids": 7 * mask, "attention_mask": mask}

    collate = Collate(tokenizer, ["a", "abc", "abcdef"], [0, 1, 1], 4, torch.device("cpu"))
    batch = collate([2, 0])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["input_ids"].tolist() == [[7, 7, 7, 7], [7, 0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
