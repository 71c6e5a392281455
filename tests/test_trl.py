"""TRL's `SFTTrainer` as it comes: it checkpoints every layer, and computes a loss of its own from the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from wtacrs_fx import Policy
from wtacrs_fx.integrations.transformers import enable

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WORDS, TOKENS, STEPS = 500, 64, 4


def samples() -> Iterator[dict[str, list[int]]]:
    numbers = torch.Generator().manual_seed(0)
    for _ in range(64):
        yield {"input_ids": torch.randint(50, (TOKENS,), generator=numbers).tolist()}


def train(folder: Path, policy: Policy | None) -> list[dict[str, Any]]:
    """Return the logs of a few steps in bfloat16."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    words = {"[PAD]": 0, "[EOS]": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[PAD]")), pad_token="[PAD]", eos_token="[EOS]"
    )
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=WORDS, num_hidden_layers=3, head_dim=16, **sizes))
    arguments = trl.SFTConfig(
        folder,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    assert arguments.gradient_checkpointing
    data = datasets.IterableDataset.from_generator(samples)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    if policy is not None:
        enable(trainer, policy)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.sweep(0.25, "TRL")
def test_the_same_losses_with_fewer_bytes(tmp_path: Path) -> None:
    eager, ours = (train(tmp_path, policy) for policy in (None, Policy(ratio=1.0)))
    losses, expected = ([entry["loss"] for entry in entries] for entries in (ours, eager))
    assert expected[-1] < 0.9 * expected[0]
    assert losses == pytest.approx(expected, rel=3e-3)
    assert ours[-1]["wtacrs/saved_ratio"] < 0.4  # of PyTorch's checkpoints, all graphs together


class Words:
    """Texts of a few words, for a tokenizer that cuts at spaces."""

    def __init__(self, folder: Path) -> None:
        words = {"[PAD]": 0, "[EOS]": 1, **{f"w{i}": i for i in range(2, WORDS)}}
        tokenizer = Tokenizer(WordLevel(words, unk_token="[PAD]"))
        tokenizer.pre_tokenizer = Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]"
        )
        self.options = {
            "output_dir": str(folder), "max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-2, "bf16": True,
            "use_cpu": not torch.cuda.is_available(), "save_strategy": "no", "report_to": [], "disable_tqdm": True,
            "per_device_train_batch_size": 4,
        }  # fmt: skip

    def model(self) -> Qwen3ForCausalLM:
        torch._dynamo.reset()
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        return Qwen3ForCausalLM(Qwen3Config(vocab_size=WORDS, num_hidden_layers=2, head_dim=16, **sizes))

    def logs(self, trainer: Any, policy: Policy | None) -> list[dict[str, Any]]:
        if policy is not None:
            enable(trainer, policy)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]


def pairs() -> Iterator[dict[str, str]]:
    numbers = torch.Generator().manual_seed(0)
    for _ in range(64):
        words = [f"w{i}" for i in (2 + torch.randint(50, (48,), generator=numbers)).tolist()]
        prompt, chosen, rejected = (" ".join(part) for part in (words[:16], words[16:32], words[32:]))
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def losses_and_share(
    folder: Path, make: Callable[[Words], Any], figure: str = "loss"
) -> tuple[dict[str, list[float]], float]:
    """Return a figure of each step without and with this backend, and what it saves of PyTorch's bytes."""
    found = {}
    for name, policy in (("eager", None), ("ours", Policy(ratio=1.0))):
        words = Words(folder)
        found[name] = words.logs(make(words), policy)
    losses = {name: [float(entry[figure]) for entry in entries] for name, entries in found.items()}
    return losses, found["ours"][-1]["wtacrs/saved_ratio"]


@pytest.mark.sweep(0.25, "TRL")
def test_preferences_are_learned_as_without(tmp_path: Path) -> None:
    def make(words: Words) -> Any:
        return trl.DPOTrainer(
            words.model(),
            ref_model=words.model(),
            args=trl.DPOConfig(**words.options),
            train_dataset=datasets.IterableDataset.from_generator(pairs),
            processing_class=words.tokenizer,
        )

    losses, share = losses_and_share(tmp_path, make)
    assert losses["ours"] == pytest.approx(losses["eager"], rel=2e-2)
    assert share < 0.6


@pytest.mark.sweep(0.25, "TRL")
def test_packed_samples_are_learned_as_without(tmp_path: Path) -> None:
    def make(words: Words) -> Any:
        return trl.SFTTrainer(
            words.model(),
            args=trl.SFTConfig(**words.options, packing=True, packing_strategy="wrapped", max_length=96),
            train_dataset=datasets.IterableDataset.from_generator(samples),
            processing_class=words.tokenizer,
        )

    losses, share = losses_and_share(tmp_path, make)
    assert losses["ours"] == pytest.approx(losses["eager"], rel=5e-3)
    assert share < 0.6


def prompts() -> Iterator[dict[str, str]]:
    for sample in pairs():
        yield {"prompt": sample["prompt"]}


@pytest.mark.sweep(0.25, "TRL")
def test_rewards_are_learned_as_without(tmp_path: Path) -> None:
    """GRPO: what is generated is not compiled, word by word; the loss is of the logits of what was generated."""

    def make(words: Words) -> Any:
        def low_words(completions: list[str], **_: Any) -> list[float]:
            return [-float(sum(completion.encode())) for completion in completions]

        options = {**words.options, "max_steps": 2}
        config = trl.GRPOConfig(**options, num_generations=4, max_completion_length=12)
        data = datasets.Dataset.from_list(list(prompts()))
        return trl.GRPOTrainer(
            words.model(), low_words, config, train_dataset=data, processing_class=words.tokenizer
        )

    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    norms, share = losses_and_share(tmp_path, make, "grad_norm")
    assert min(norms["eager"]) > 0  # its loss says nothing: it is zero in the mean
    assert norms["ours"] == pytest.approx(norms["eager"], rel=3e-2)
    assert share < 0.6
    assert counted["unique_graphs"] <= 6, counted  # a layer is checkpointed, with gradients and without
