from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import wtacrs_fx
from bench import pictures
from wtacrs_fx.tools.measure import memory_timeline
from wtacrs_fx.tools.pictures import draw_gradient


def test_memory_goes_up_and_down() -> None:
    def step() -> None:
        x = torch.ones(1000)
        y = torch.ones(500)
        del x, y

    timeline = memory_timeline(step, torch.device("cpu"))
    assert [held for _, held in timeline] == [0, 4000, 6000, 2000, 0]
    seconds = [moment for moment, _ in timeline]
    assert seconds == sorted(seconds) and seconds[0] == 0


def test_losses_lie_at_the_times_of_one_training(tmp_path: Path) -> None:
    """Each variant's steps count with its median ratio to Inductor's, whatever one of them took."""
    lines = ["variant,seed,step,loss,seconds"]
    for step in range(30):
        lines.append(f"inductor,0,{step},{30 - step},{9.0 if step == 0 else 1.0}")
        lines.append(f'"wtacrs, noise budget",0,{step},{30 - step},{18.0 if step == 0 else 0.5}')
    (tmp_path / "curves.csv").write_text("\n".join(lines))
    figure, axes = plt.subplots()
    pictures.draw_losses(axes, tmp_path / "curves.csv")
    seconds, losses = zip(*(line.get_data() for line in axes.lines), strict=True)
    plt.close(figure)
    assert [line.get_label() for line in axes.lines] == ["Inductor", "wtacrs"]
    assert [each[-1] for each in seconds] == [30.0, 15.0]
    assert np.array_equal(losses[0], losses[1]) and losses[0][-1] == 1.5  # of the last two steps


def test_a_gradient_is_drawn_before_and_after(tmp_path: Path) -> None:
    pictures.gradients(tmp_path)
    before, after = ((tmp_path / f"gradient-{when}.svg").read_text() for when in ("before", "after"))
    assert "wtacrs.choose_rows" in after and "wtacrs" not in before
    assert "gradient of weight" in before


def test_a_parameter_without_a_gradient_is_named(tmp_path: Path) -> None:
    joint = wtacrs_fx.capture(torch.nn.Linear(4, 4), torch.randn(8, 4))
    with pytest.raises(KeyError, match="no gradient of 'bais'; the graph has those of bias, weight"):
        draw_gradient(joint, "bais", tmp_path / "x.svg")
