import csv
from pathlib import Path

import pytest
import torch
from encoder import needs_packages, tiny_encoder
from rich.console import Console
from typer.testing import CliRunner

from wtacrs_fx.cli import app
from wtacrs_fx.tools import demo


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
        data = tmp_path / "texts.tsv"
        data.write_text("a\tone\nb\ttwo\n")
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
    data = tmp_path / "texts.tsv"
    data.write_text("".join(f"{'ab'[i % 2]}\tw{i} w{i + 1}\n" for i in range(20)))

    settings = demo.Settings(str(folder), data, steps=2, batch=8, length=16, out=tmp_path / "out")
    rows = demo.run(settings, Console(quiet=True))

    assert [row.variant for row in rows] == ["eager", "Inductor", "Inductor at 0.9", "wtacrs 0.3"]
    eager, inductor, budget, wtacrs = rows
    assert eager.saved_mib > inductor.saved_mib > budget.saved_mib
    assert wtacrs.saved_mib < inductor.saved_mib
    assert all(0 <= row.accuracy <= 1 and row.peak_mib > 0 and row.seconds_p50 > 0 for row in rows)
    assert (tmp_path / "out" / "demo.png").exists()
    lines = list(csv.DictReader((tmp_path / "out" / "demo.csv").open()))
    assert [float(line["saved_mib"]) for line in lines] == [row.saved_mib for row in rows]
    assert lines[0]["seed"] == "0" and lines[0]["torch"] == torch.__version__
    assert all(line["commit"] and line["device"] for line in lines)
