import csv
from pathlib import Path

import pytest
import torch
from encoder import needs_packages, tiny_encoder
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from wtacrs_fx.cli import app
from wtacrs_fx.tools import demo, tasks
from wtacrs_fx.tools.texts import InputError


class TestCommand:
    def test_help_lists_the_options(self) -> None:
        result = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"})
        assert result.exit_code == 0
        for option in (
            "--task",
            "--model",
            "--data",
            "--steps",
            "--batch",
            "--length",
            "--ratio",
            "--seed",
            "--out",
            "--json",
        ):
            assert option in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--task", "encoder", "--data", "/nowhere/none.tsv"], "/nowhere/none.tsv, which is no file"),
            (["--task", "poetry"], "--task must be one of encoder, language-model, lora, got 'poetry'"),
            (["--steps", "1"], "Invalid value for '--steps'"),
            (["--batch", "none"], "Invalid value for '--batch'"),
        ],
    )
    def test_bad_input_exits_with_2(self, arguments: list[str], message: str) -> None:
        result = CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 2
        assert message in result.output
        assert "Traceback" not in result.output

    @needs_packages
    def test_bad_ratio_exits_with_2(self, tmp_path: Path) -> None:
        data = tmp_path / "texts.tsv"
        data.write_text("a\tone\nb\ttwo\n")
        result = CliRunner().invoke(app, ["demo", "--task", "encoder", "--ratio", "1.5", "--data", str(data)])
        assert result.exit_code == 2
        assert "ratio must be in (0, 1], got 1.5" in result.output


@needs_packages
def test_end_to_end_on_own_model_and_data(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(30))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    folder = tmp_path / "model"
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    tiny_encoder().save_pretrained(folder)  # type: ignore[operator]
    data = tmp_path / "texts.tsv"
    data.write_text("".join(f"{'ab'[i % 2]}\tw{i} w{i + 1}\n" for i in range(20)))

    settings = demo.Settings("encoder", str(folder), data, steps=2, batch=8, length=16, out=tmp_path / "out")
    rows = demo.run(settings, Console(quiet=True))

    assert [row.variant for row in rows] == ["eager", "Inductor", "Inductor at 0.9", "wtacrs 0.3"]
    eager, inductor, budget, wtacrs = rows
    assert eager.saved_mib > inductor.saved_mib > budget.saved_mib
    assert wtacrs.saved_mib < inductor.saved_mib
    assert all(0 <= row.merit <= 1 and row.peak_mib > 0 and row.seconds_p50 > 0 for row in rows)
    assert (tmp_path / "out" / "demo.png").exists()
    lines = list(csv.DictReader((tmp_path / "out" / "demo.csv").open()))
    assert [float(line["saved_mib"]) for line in lines] == [row.saved_mib for row in rows]
    assert lines[0]["seed"] == "0" and lines[0]["torch"] == torch.__version__
    assert all(line["commit"] and line["device"] for line in lines)


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("task", ["language-model", "lora"])
def test_a_language_model_of_ones_own(task: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, 2048)}}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder, data = str(tmp_path / "model"), tmp_path / "text.txt"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
        )
    ).save_pretrained(folder)
    data.write_text(" ".join(f"w{1 + i * i % 2000}" for i in range(2000)))

    settings = demo.Settings(task, folder, data, steps=3, batch=2, length=64, out=tmp_path / "out")
    inductor, wtacrs = demo.run(settings, Console(quiet=True))

    assert (inductor.variant, wtacrs.variant) == ("Inductor", "wtacrs")
    assert wtacrs.saved_mib < 0.5 * inductor.saved_mib
    assert wtacrs.merit == pytest.approx(inductor.merit, rel=0.01)
    assert (tmp_path / "out" / "demo.png").exists()


def test_a_text_that_is_too_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "text.txt"
    data.write_text("word " * 100)
    monkeypatch.setattr(tasks, "load_language_model", lambda model: (_Letters(), nn.Linear(1, 1)))
    with pytest.raises(InputError, match="at least 8 blocks of 512 tokens, got 0"):
        demo.run(demo.Settings(data=data), Console(quiet=True))


class _Letters:
    """A tokenizer of words."""

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(1, len(text.split()), dtype=torch.long)}
