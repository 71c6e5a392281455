"""Measured rates of products: where they are kept, when they are measured anew, what is chosen by them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_passes import rates
from wtacrs_passes.decide import precision

WAYS = ["exact", "int8"]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the caches, and a process that knows nothing."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    rates._of_process.cache_clear()
    yield tmp_path
    rates._of_process.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count measurements, which take no time here; each finds another number."""
    found: list[int] = []

    def measure(precisions: Sequence[str], *_: Any) -> tuple[rates.Rates, bool]:
        found.append(len(found) + 1)
        return dict.fromkeys(precisions, float(found[-1])), True

    monkeypatch.setattr(rates, "_measure", measure)
    return found


def ask(rows: int = 64, m: int = 16, n: int = 24, ways: Sequence[str] = WAYS) -> rates.Rates:
    return rates.seconds(ways, rows, m, n, torch.float32, CPU)


def test_rates_are_times_of_the_real_thing(folder: Path) -> None:
    before = torch.get_rng_state()
    with config.patch(force_disable_caches=True):
        found = ask(ways=["exact", "bfloat16", "int8", rates.ROUNDING])
    assert found.keys() == {"exact", "bfloat16", "int8", rates.ROUNDING}
    assert all(0 < seconds < 10 for seconds in found.values())
    assert torch.equal(torch.get_rng_state(), before)
    assert not (folder / "wtacrs_rates.json").exists()


def test_what_was_measured_is_kept(folder: Path, measured: list[int]) -> None:
    with config.patch(force_disable_caches=False):
        assert ask() == ask() == dict.fromkeys(WAYS, 1.0)
        rates._of_process.cache_clear()  # another process
        assert ask() == dict.fromkeys(WAYS, 1.0)
        assert ask(rows=95) == dict.fromkeys(WAYS, 1.0)
        assert ask(m=32) == dict.fromkeys(WAYS, 2.0)
    assert [file.name for file in folder.iterdir()] == ["wtacrs_rates.json"]


def test_a_rate_that_was_given_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a layer is planned by other figures than the next one, and a second process finds no code in the caches."""
    took = iter(({"exact": 0.7, "int8": 0.6}, {"exact": 0.3, "bfloat16": 0.15, rates.ROUNDING: 0.03}))
    asked = []

    def measure(precisions: Sequence[str], *_: Any) -> tuple[rates.Rates, bool]:
        asked.append(set(precisions))
        return next(took), True

    monkeypatch.setattr(rates, "_measure", measure)
    with config.patch(force_disable_caches=False):
        first = ask(ways=["int8"])
        assert ask(ways=["exact", "int8", "bfloat16", rates.ROUNDING]) == {
            "exact": 0.7, **first, "bfloat16": pytest.approx(0.35), rates.ROUNDING: pytest.approx(0.07),
        }  # fmt: skip
        rates._of_process.cache_clear()  # another process
        assert ask(ways=["int8"]) == first == {"int8": 0.6}
    assert asked == [{"exact", "int8"}, {"exact", "bfloat16", rates.ROUNDING}]


def test_rates_of_a_busy_machine_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three attempts the calmest serves this process; another one measures again."""
    attempts = iter([(90, {"exact": 3.0}), (20, {"exact": 2.0}), (50, {"exact": 4.0}), (0, {"exact": 1.0})])
    monkeypatch.setattr(rates, "_attempt", lambda *_: next(attempts))
    with config.patch(force_disable_caches=False):
        assert ask(ways=["exact"]) == ask(ways=["exact"]) == {"exact": 2.0}
        rates._of_process.cache_clear()  # another process
        assert ask(ways=["exact"]) == {"exact": 1.0}
        rates._of_process.cache_clear()
        assert ask(ways=["exact"]) == {"exact": 1.0}


def test_a_process_that_shares_its_processors_is_put_aside() -> None:
    """What the decision rests on: another process for each processor."""
    threads = len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(threads)]
    try:
        time.sleep(1)  # they start
        aside, _ = rates._attempt(["exact"], (4096, 1024, 2048), torch.float32, CPU)
    finally:
        for other in others:
            other.kill()
    assert aside > rates._ROUNDS


def test_how_fast_a_folder_is_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many residuals as in the process before leave the device: the same code."""
    found = iter((5e8, 6e8, 7e8))
    monkeypatch.setattr(rates, "measure_writing", lambda place: next(found))
    with config.patch(force_disable_caches=False):
        assert rates.bytes_per_second("a") == rates.bytes_per_second("a") == 5e8
        assert rates.bytes_per_second("b") == 6e8
        rates._of_process.cache_clear()  # another process
        assert (rates.bytes_per_second("a"), rates.bytes_per_second("b")) == (5e8, 6e8)
    with config.patch(force_disable_caches=True):
        assert rates.bytes_per_second("c") == 7e8
    assert ask(ways=["exact"]).keys() == {"exact"}


def test_of_large_products_a_part_is_measured(folder: Path, measured: list[int]) -> None:
    assert ask(2**13, 2**14, 2**12) == ask(2**13 + 1, 2**15, 2**13)
    assert len(measured) == 1


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_file_is_written_anew(folder: Path, measured: list[int], text: str) -> None:
    (folder / "wtacrs_rates.json").write_text(text)
    with config.patch(force_disable_caches=False):
        ask()
        rates._of_process.cache_clear()
        ask()
    assert len(measured) == 1


def test_autotuning_measures_anew(folder: Path, measured: list[int]) -> None:
    with config.patch(force_disable_caches=False):
        ask()
        rates._of_process.cache_clear()
        with config.patch(max_autotune=True):
            assert ask() == ask() == dict.fromkeys(WAYS, 2.0)


def given(monkeypatch: pytest.MonkeyPatch, **times: float) -> None:
    monkeypatch.setattr(precision, "seconds", lambda *_: times)


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        ({"exact": 1.0, "bfloat16": 0.5, "int8": 0.4}, "int8"),
        ({"exact": 1.0, "bfloat16": 0.3, "int8": 0.4}, "bfloat16"),
        ({"exact": 1.0, "bfloat16": 0.3, "int8": 0.28}, "bfloat16"),
        ({"exact": 1.0, "bfloat16": 1.2, "int8": 0.95}, "exact: int8 takes 0.95 of its time"),
    ],
)
@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_the_fastest_is_chosen(
    times: dict[str, float], shown: str, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, **times)
    joint = wtacrs_fx.capture(nn.Sequential(nn.Linear(32, 32), nn.Tanh()), torch.randn(64, 32))
    policy = Policy(ratio=ratio, min_rows=4, residuals="exact", product="auto")
    assert [site.product for site in wtacrs_fx.transform(joint, policy).report.sites] == [shown]


def share(times: dict[str, float], rounding: float = 0.4) -> dict[str, float]:
    return {"exact": 1.0, "bfloat16": 1.2, rates.ROUNDING: rounding, **times}


@pytest.mark.parametrize(
    ("products", "wanted"),
    [
        ([{"int8": 0.95}], ["exact"]),
        ([{"int8": 0.95}] * 2, ["int8"] * 2),  # 0.55 each, and 0.4 for both
        ([{"int8": 1.15}] * 2, ["exact"] * 2),  # 1.9 together: not worth it
        ([{"int8": 1.15}] * 3, ["int8"] * 3),
        ([{"int8": 0.95}, {"int8": 0.95}, {"int8": 1.6}], ["int8", "int8", "exact"]),
        ([{"int8": 0.95}, {"int8": 0.95}, {}], ["int8", "int8", "exact"]),  # whose columns are too few
        ([{"int8": 0.95}] * 2 + [{"int8": 0.95, "bfloat16": 0.5}], ["int8", "int8", "bfloat16"]),
    ],
)
def test_products_that_share_a_factor_round_it_once(
    products: list[dict[str, float]], wanted: list[str]
) -> None:
    assert [found for found, _ in precision.fastest([share(times) for times in products])] == wanted


def test_layers_that_read_one_input_choose_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.q, self.k, self.o = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normed = self.norm(x)
            return self.o(torch.tanh(self.q(normed) * self.k(normed)))

    asked: list[list[str]] = []

    def seconds(precisions: list[str], *_: Any) -> dict[str, float]:
        asked.append(precisions)
        return {name: share({"int8": 0.95})[name] for name in precisions}

    monkeypatch.setattr(precision, "seconds", seconds)
    joint = wtacrs_fx.capture(Heads(), torch.randn(64, 32))
    for ratio in (1.0, 0.5):
        report = wtacrs_fx.transform(joint, Policy(ratio=ratio, min_rows=4, product="auto")).report
        shown = {site.module: site.product for site in report.sites}
        assert (shown["q"], shown["k"]) == ("int8", "int8")
        assert shown["o"] == "exact: int8 takes 0.95 of its time"
    assert {rates.ROUNDING in each for each in asked} == {False, True}


def test_what_is_in_16_bits_is_not_measured_in_bfloat16(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(precision, "seconds", lambda *args: asked.append(args) or {"exact": 1.0, "int8": 0.4})
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh()).bfloat16()
    joint = wtacrs_fx.capture(model, torch.randn(64, 32, dtype=torch.bfloat16))
    wtacrs_fx.transform(joint, Policy(ratio=1.0, product="auto"))
    ways, *sizes, dtype, device = asked[0]
    assert (ways, sizes[0], sorted(sizes[1:])) == (["exact", "int8"], 64, [32, 48])
    assert (dtype, device) == (torch.bfloat16, CPU)


def test_of_a_device_that_is_not_here_nothing_is_known() -> None:
    joint = wtacrs_fx.capture(nn.Sequential(nn.Linear(32, 32), nn.Tanh()), torch.randn(64, 32))
    node = joint.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[0]
    node.meta["val"] = torch.empty(32, 32, device="meta")
    product: Any = SimpleNamespace(node=node, x=node, rows=64)
    found = precision.choose_precision(product, Policy(ratio=0.3), "auto")
    assert found == ("exact", "no meta device to measure rates of")
