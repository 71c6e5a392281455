import subprocess
from pathlib import Path

import pytest

from wtacrs_fx.tools import circumstances


def test_the_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("no checkout")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    assert git.stdout.startswith(circumstances.commit().removesuffix("+dirty"))


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circumstances, "_ROOT", tmp_path)
    assert circumstances.commit.__wrapped__() == "unknown"


def test_processor() -> None:
    assert circumstances.processor("cpu")
