"""`wtacrs check` and `wtacrs doctor`: what is right is called right, what is wrong is found."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import wtacrs_passes.pipeline as pipeline
from wtacrs_fx.cli import app
from wtacrs_fx.tools import doctor
from wtacrs_fx.tools.check import compare_gradients, compile_all
from wtacrs_passes.joint import Joint
from wtacrs_passes.maths import ops


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()  # as in a process of its own


class Model(nn.Module):
    """[96, 32] to a scalar."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(32, 128), nn.Linear(128, 32), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(nn.functional.gelu(self.up(x)))).sin().square().mean()


def make(batch: int, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A factory, as a user writes one."""
    torch.manual_seed(0)
    return Model(), {"x": torch.randn(batch * length, 32)}


def test_a_model_that_gains(capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(
        app, ["check", "test_check:make", "--batch", "4", "--length", "128", "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])
    kinds = [finding["kind"] for finding in found["findings"]]
    assert "wrong" not in kinds and found["verdict"] in ("good", "poor")
    texts = " ".join(finding["text"] for finding in found["findings"])
    assert "to the last bit" in texts and "unbiased: t =" in texts
    assert found["figures"]["wtacrs"]["saved"] < 0.6 * found["figures"]["inductor"]["saved"]


def test_a_program_that_draws_random_numbers_is_not_tested_for_bias() -> None:
    steps = compile_all(Model(dropout=0.2), {"x": torch.randn(256, 32)}, names=["sampled"])
    findings = compare_gradients(steps)
    assert not any(finding.kind == "wrong" for finding in findings)
    assert any("was not tested" in finding.text for finding in findings)


def scale_of_one(joint: Joint) -> None:
    """Leave out what makes sampled rows unbiased."""
    for node in joint.graph.find_nodes(op="call_function", target=ops.gather_rows):
        node.args = node.args[:2]


def doubled_scales(joint: Joint) -> None:
    """Decode residuals to twice what they were."""
    for residual in joint.residuals:
        if residual.stored.encoding.startswith("int"):
            scale = min(residual.codes, key=lambda node: node.meta["val"].numel())
            with joint.graph.inserting_after(scale):
                new = joint.graph.call_function(torch.ops.aten.mul.Tensor, (scale, 2.0))
            new.meta = dict(scale.meta)
            scale.replace_all_uses_with(new, lambda user, new=new: user is not new)


@pytest.mark.sweep(0.34)
@pytest.mark.parametrize(
    ("fault", "after", "name", "says"),
    [
        (scale_of_one, "sample_rows", "sampled", "unbiased"),
        (doubled_scales, "encode_residuals", "rounded", "rounding residuals"),
    ],
)
def test_what_is_wrong_is_found(
    fault: Callable[[Joint], None], after: str, name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    for step in pipeline.PASSES:
        passes += [step, fault] if step.__name__ == after else [step]
    monkeypatch.setattr(pipeline, "PASSES", tuple(passes))
    with torch._inductor.config.patch(force_disable_caches=True):
        found = compare_gradients(compile_all(Model(), {"x": torch.randn(512, 32)}, names=[name]))
    wrong = [finding.text for finding in found if finding.kind == "wrong"]
    assert any(says in text for text in wrong), found


def test_gradients_that_should_be_inductors_and_are_not_are_found() -> None:
    steps = compile_all(Model(), {"x": torch.randn(512, 32)}, names=["exact"])
    with torch.no_grad():
        steps["exact"].model.up.bias += 0.1
    texts = {finding.text: finding.kind for finding in compare_gradients(steps)}
    assert any(kind == "wrong" and "gradients differ" in text for text, kind in texts.items())


def test_the_doctor_finds_this_machine_well() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    lines = {line["name"]: line for line in json.loads(result.output.splitlines()[-1])}
    assert {
        "python",
        "torch",
        "C++ compiler",
        "caches",
        "backend",
        "a small model, cpu",
        "products, cpu",
    } <= lines.keys()
    assert "is fastest" in lines["products, cpu"]["found"]


def test_the_doctor_finds_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(doctor, "_compiles", lambda device: 1 / 0)
    monkeypatch.setattr(doctor, "_products", lambda device: doctor.Line("", ""))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    wrong = [line for line in result.output.splitlines() if line.startswith("NOT")]
    assert len(wrong) == 2 and "no-such-compiler is not found" in wrong[0] and "ZeroDivisionError" in wrong[1]
