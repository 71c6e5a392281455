"""Saved bytes and peak memory of small steps, counted by hand, in float32."""

import time

import pytest
import torch
from torch import nn

from wtacrs_fx.tools.measure import peak_bytes, percentiles, saved_bytes, step_seconds

ROWS, WIDTH = 32, 64
HIDDEN_BYTES = 4 * ROWS * WIDTH
CPU = torch.device("cpu")


def perceptron() -> tuple[nn.Sequential, torch.Tensor]:
    """Return two layers with a sigmoid between them, and their input."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, WIDTH)), torch.randn(
        ROWS, WIDTH
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_saved_bytes(compiled: bool) -> None:
    model, x = perceptron()
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    saved = saved_bytes(lambda: forward(x).sum(), [*model.parameters(), x])
    assert saved == HIDDEN_BYTES  # the sigmoid's result: its own derivative and the next input


def test_saved_bytes_counts_what_is_not_excluded() -> None:
    model, x = perceptron()
    saved = saved_bytes(lambda: model(x).sum(), model.parameters())
    assert saved == 2 * HIDDEN_BYTES  # and the input


def test_saved_bytes_leaves_gradients() -> None:
    model, x = perceptron()
    saved_bytes(lambda: model(x).sum(), [])
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_peak_bytes() -> None:
    def step() -> None:
        first = torch.empty(1000)  # 4000 bytes
        second = torch.empty(500)
        del first
        third = torch.empty(250)
        del second, third

    step()
    assert peak_bytes(step, CPU) == 6000


def test_peak_bytes_of_an_idle_step() -> None:
    assert peak_bytes(lambda: None, CPU) == 0


def test_saved_bytes_without_memory() -> None:
    model, x = perceptron()
    model, x = model.to("meta"), x.to("meta")
    assert saved_bytes(lambda: model(x).sum(), [*model.parameters(), x]) == HIDDEN_BYTES


def test_step_seconds_are_those_of_the_step() -> None:
    assert step_seconds(lambda: time.sleep(0.05), CPU) >= 0.05


def test_percentiles() -> None:
    assert percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == (2.0, 3.5, 5.0)
    assert percentiles([1.0]) == (1.0, 1.0, 1.0)
