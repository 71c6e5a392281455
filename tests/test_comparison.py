import csv
from pathlib import Path

import pytest
from rich.console import Console

from wtacrs_fx.tools.comparison import Row, draw, table, write_csv
from wtacrs_fx.tools.tasks import Merit

ROWS = (
    Row("Inductor at 0.9", 0.96, 400.0, 500.0, 1.2, 1.1, 1.3, 2.0),
    Row("Inductor", 0.96, 200.0, 250.0, 1.0, 0.9, 1.1, 30.0),
    Row("wtacrs", 0.48, 50.0, 75.0, 0.8, 0.7, 0.9, 33.0),
)

ACCURACY = Merit("accuracy", "% held out", 100)


def test_table_shows_ratios_to_inductor() -> None:
    text = "".join(segment.text for segment in Console(width=80).render(table(ROWS, ACCURACY)))
    assert "48.0 (0.50x)" in text
    assert "50.0 (0.25x)" in text
    assert "200 (1.00x)" in text
    assert "0.800 (0.80x)" in text
    assert "…" not in text  # 80 columns are enough


def test_csv_carries_what_repeats_it(tmp_path: Path) -> None:
    write_csv(ROWS, {"seed": 7}, tmp_path / "demo.csv")
    lines = list(csv.DictReader((tmp_path / "demo.csv").open()))
    assert [line["variant"] for line in lines] == ["Inductor at 0.9", "Inductor", "wtacrs"]
    assert lines[2]["saved_mib"] == "50.0"
    assert lines[0]["seed"] == "7"


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(ROWS, ACCURACY, "2 steps", tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
