from __future__ import annotations

import pytest
import torch
from conftest import RowsOnly, Transformer
from torch import nn

import wtacrs_fx
from wtacrs_fx import NoTangentsError

TOKENS = torch.randint(50, (4, 32))


def test_capture_on_meta_allocates_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 16384), nn.GELU(), nn.Linear(16384, 4096))
        report = wtacrs_fx.explain(model, torch.empty(64, 512, 4096), policy=wtacrs_fx.Policy(ratio=0.3))
    assert report.saved_bytes_before >= 2**32  # bytes: could not have been computed here
    assert report.sites[0].rows == 64 * 512
    assert report.sites[0].kept == 9831


def test_a_loss_on_meta_is_seen_as_on_cpu() -> None:
    reports = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model, tokens = Transformer(dropout=0.1), torch.zeros(4, 32, dtype=torch.long)
        reports.append(wtacrs_fx.explain(model, tokens, policy=RowsOnly()))
    assert len(reports[0].sampled) == 7 and reports[0] == reports[1]
    assert next(model.parameters()).is_meta  # the model itself stays as it was


def test_capture_names_parameters_as_the_model_does() -> None:
    joint = wtacrs_fx.capture(Transformer(), TOKENS)
    names = {static.name for static in joint.meta["wtacrs_static_inputs"]}
    assert names == {name for name, _ in Transformer().named_parameters()}


@pytest.mark.parametrize("how", ["frozen", "no_grad"])
def test_a_graph_without_tangents_is_refused(how: str) -> None:
    model = nn.Linear(4, 4).requires_grad_(how != "frozen")
    with pytest.raises(NoTangentsError, match="no output of Linear requires grad"):
        with torch.set_grad_enabled(how != "no_grad"):
            wtacrs_fx.capture(model, torch.randn(64, 4))


def test_transform_refuses_a_forward_graph() -> None:
    with pytest.raises(NoTangentsError, match="without tangents; capture it"):
        wtacrs_fx.transform(torch.fx.symbolic_trace(nn.Linear(4, 4)), RowsOnly())


def test_errors_of_the_model_are_shown_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape|size"):
        wtacrs_fx.capture(nn.Linear(4, 4), torch.randn(64, 5))


def test_explain_does_not_run_or_change_the_model() -> None:
    model = Transformer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    wtacrs_fx.explain(model, TOKENS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_explain_reports_every_weight_gradient() -> None:
    report = wtacrs_fx.explain(Transformer(), TOKENS, policy=RowsOnly(min_rows=4, exclude=("head",)))
    by_parameter = {site.parameter: site for site in report.sites}
    assert set(by_parameter) == {n for n, p in Transformer().named_parameters() if p.dim() == 2}
    assert by_parameter["head.weight"].reason == "excluded by the policy"
    down = by_parameter["layers.0.down.weight"]
    assert (down.module, down.rows, down.kept) == ("layers.0.down", 128, 39)
    # The output of GELU is recomputed at the kept rows: four units of [128, 32] float32 are no longer stored.
    assert (down.placement, down.encoding, down.bytes_before) == ("backward", "recompute", 4 * 128 * 32 * 4)
    assert down.bytes_after == 128 * 4  # the norms of the rows
    assert report.saved_bytes_after < 0.75 * report.saved_bytes_before
