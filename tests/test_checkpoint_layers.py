"""Layers that the policy has computed again, by share or as many as a target for the peak takes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import psutil
import pytest
import torch
from aot import REFERENCE, Variants, small_tensors
from conftest import Transformer, distance, gradients
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import wtacrs_fx
from wtacrs_fx import Policy, PolicyError, Report
from wtacrs_fx.backend import _Attempt, _compile_within, _counted
from wtacrs_passes.analyse.layers import first_half, products_of, repeated_layers
from wtacrs_passes.decide import target
from wtacrs_passes.decide.target import bytes_at_hand, with_what_is_free
from wtacrs_passes.graph.cones import tangent_cone
from wtacrs_passes.policy import Residuals
from wtacrs_passes.report import Peak

LAYERS = 3
PRODUCTS = 18
ENCODED = {"ratio": 1.0, "product": "exact"}
EXACTLY = {"ratio": 1.0, "product": "exact", "residuals": "exact"}


@pytest.fixture(scope="module")
def model() -> tuple[Transformer, Tensor]:
    torch.manual_seed(0)
    return Transformer(d=32, layers=LAYERS), torch.randint(50, (16, 128))


def explained(model: tuple[nn.Module, Tensor], **policy: Any) -> wtacrs_fx.Report:
    """Explain a model, once for each policy but those that ask what is free."""
    chosen = Policy(**policy)
    key = model, chosen
    if chosen.memory == "auto" or key not in _EXPLAINED:
        _EXPLAINED[key] = wtacrs_fx.explain(*model, policy=chosen)
    return _EXPLAINED[key]


_EXPLAINED: dict[tuple[tuple[nn.Module, Tensor], Policy], wtacrs_fx.Report] = {}


def train(
    model: tuple[nn.Module, Tensor], policy: Policy, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of one step, exact and with a policy, for the same random numbers; no code is generated."""
    variants, found = Variants({"policy": policy}), []
    network = copy.deepcopy(model[0])
    if dtype is torch.float16:
        network = network.half()
    with small_tensors():
        call = torch.compile(network, backend=variants)
        for variants.active in (REFERENCE, "policy"):
            network.zero_grad()
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = call(model[1])
            loss.backward()
            found.append(gradients(network))
    return found[0], found[1]


def test_layers_are_found_by_their_modules(model: tuple[Transformer, Tensor]) -> None:
    gm = wtacrs_fx.capture(*model)
    layers = repeated_layers(gm.graph, tangent_cone(gm.graph))
    assert len(layers) == LAYERS
    assert len({len(layer) for layer in layers}) == 1
    stacks = [node.meta.get("nn_module_stack") for node in layers[2]]
    assert all("2" in str(stack) for stack in stacks if stack)


def test_a_model_without_layers_has_none() -> None:
    one = nn.Sequential(nn.Linear(64, 64), nn.GELU()), torch.randn(32, 64)
    report = explained(one, **ENCODED, recompute=1.0)
    assert report.notes == ("computed again in the backward pass: 0 of 0 layers that are alike",)


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_more_layers_again_store_less_and_peak_lower(model: tuple[Transformer, Tensor], ratio: float) -> None:
    policy = {**EXACTLY, "ratio": ratio}
    reports = [explained(model, **policy, recompute=share) for share in (0.0, 0.6, 1.0)]
    saved = [report.saved_bytes_after for report in reports]
    peaks = [report.peak_after.size for report in reports]
    assert saved == sorted(saved, reverse=True) and peaks[0] > peaks[1] >= max(peaks[2:])
    assert saved[-1] < 0.6 * saved[0]
    assert reports[1].notes == ("computed again in the backward pass: 2 of 3 layers that are alike",)


def test_a_layer_is_divided_at_its_residual_stream(model: tuple[Transformer, Tensor]) -> None:
    gm = wtacrs_fx.capture(*model)
    for layer in repeated_layers(gm.graph, tangent_cone(gm.graph)):
        half = first_half(layer)
        others = set(layer) - set(half)
        handed_on = {node for node in half if node.users.keys() & others}
        assert {tuple(node.meta["val"].shape) for node in handed_on} == {(16, 128, 32)}
        assert len(handed_on) <= 2  # and a view of it
        assert 0.2 < len(half) / len(layer) < 0.8


def test_half_a_layer_again_stores_less(model: tuple[Transformer, Tensor]) -> None:
    reports = [
        explained(model, **EXACTLY, recompute=halves / (2 * LAYERS)) for halves in range(2 * LAYERS + 1)
    ]
    saved = [report.saved_bytes_after for report in reports]
    assert all(more > fewer for more, fewer in itertools.pairwise(saved))
    assert "0.5 of 3 layers" in reports[1].notes[0] and "2.5 of 3 layers" in reports[5].notes[0]


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_half_a_layer_again(dropout: float) -> None:
    model = Transformer(d=64, layers=2, dropout=dropout), torch.randint(50, (8, 64))
    exact, found = train(model, Policy(**EXACTLY, recompute=0.25))
    assert distance(found, exact) < 1e-10
    exact, found = train(model, Policy(**ENCODED, recompute=0.75), torch.bfloat16)
    assert 0 < distance(found, exact) < 5e-3


SMALL = Transformer(d=64, layers=2), torch.randint(50, (4, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_layers_computed_again(dtype: torch.dtype) -> None:
    exact, found = train(SMALL, Policy(**ENCODED, recompute=1.0), dtype)
    assert 0 < distance(found, exact) < 5e-3  # inputs of layers in 8 bits


def test_exact_residuals_leave_gradients_as_they_are(model: tuple[Transformer, Tensor]) -> None:
    exact, found = train(SMALL, Policy(**EXACTLY, recompute=0.5))
    assert distance(found, exact) < 1e-10
    plain, fewer = (explained(model, **EXACTLY, recompute=share) for share in (0.0, 1.0))
    assert fewer.saved_bytes_after < 0.7 * plain.saved_bytes_after


def test_dropout_is_the_same_again() -> None:
    model = Transformer(d=64, layers=2, dropout=0.3), torch.randint(50, (8, 64))
    exact, found = train(model, Policy(**ENCODED, recompute=1.0))
    assert distance(found, exact) < 5e-3  # other masks are off by the gradient's own size


class Routed(nn.Module):
    """The two largest of its features pass: of nearly equal ones others may, where they are computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.router, self.down = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        values, places = self.router(x).softmax(-1).topk(2)
        gates = torch.zeros_like(x, dtype=values.dtype).scatter(-1, places, values)
        return x + self.down(nn.functional.gelu(self.up(x)) * gates)


def test_what_a_router_takes_is_stored() -> None:
    model = nn.Sequential(*(Routed() for _ in range(3)), Squared()), torch.randn(512, 64)
    for policy in (EXACTLY, ENCODED):
        exact, found = train(model, Policy(**policy, recompute=1.0))
        assert distance(found, exact) < (1e-10 if policy is EXACTLY else 5e-3)


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


@pytest.mark.parametrize("policy", [{"recompute": 1.0}, {"memory": "1MiB"}])
def test_marked_layers_are_none_to_choose_from(policy: dict[str, Any]) -> None:
    model = Transformer(d=64, layers=3)
    wtacrs_fx.mark_layers(model)
    report = explained((model, torch.randint(50, (8, 64))), **ENCODED, **policy)
    assert not policy.get("recompute") or report.notes[-1].endswith("0 of 0 layers that are alike")


class Fused(nn.Module):
    """Queries, keys and values are parts of one product."""

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).split(x.shape[-1], -1)
        heads = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(*heads)
        return x + self.out(y.transpose(1, 2).flatten(2))


def test_parts_of_a_product_are_computed_again() -> None:
    model = nn.Sequential(*(Fused() for _ in range(3)), Squared()), torch.randn(4, 64, 64)
    for policy in (EXACTLY, ENCODED):
        plain, again = (explained(model, **policy, recompute_products=n) for n in (0.0, 1.0))
        assert again.saved_bytes_after < 0.6 * plain.saved_bytes_after
        assert again.work_again == 3 * 256 * 64 * 192
        exact, found = train(model, Policy(**policy, recompute_products=1.0))
        assert distance(found, exact) < (1e-12 if policy is EXACTLY else 1e-3)


def test_checkpoints_of_the_program_are_as_it_says() -> None:
    class Checkpointed(Transformer):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            x = checkpoint(self.layers[0], x, use_reentrant=False)
            return self.head(self.layers[1](x)).square().mean()

    model = Checkpointed(d=64, layers=2), torch.randint(50, (8, 64))
    plain, asked = (explained(model, **ENCODED, recompute=share) for share in (0.0, 1.0))
    assert asked.saved_bytes_after == plain.saved_bytes_after


@pytest.mark.sweep(0.34, "targets")
def test_a_target_takes_as_few_products_as_it_can(model: tuple[Transformer, Tensor]) -> None:
    counts = (0, 8, PRODUCTS)
    peaks = [explained(model, **EXACTLY, recompute_products=n / PRODUCTS).peak_after.size for n in counts]
    assert peaks == sorted(peaks, reverse=True)
    for count, peak in zip(counts, peaks, strict=True):
        report = explained(model, **EXACTLY, memory=peak)
        assert report.peak_after.size <= peak
        first, *rest = report.notes
        assert first.startswith("memory: ") and "not reached" not in first
        taken = [int(note.split(":")[1].split()[0]) for note in rest]
        assert len(taken) == bool(count) and all(few <= count for few in taken)


@pytest.mark.sweep(0.34, "targets")
def test_then_layers_are_computed_again(model: tuple[Transformer, Tensor]) -> None:
    shares = ({"recompute_products": 1.0}, {"recompute_products": 1.0, "recompute": 1.0})
    few, fewer = (explained(model, **EXACTLY, **share).peak_after.size for share in shares)
    assert fewer < few
    report = explained(model, **EXACTLY, memory=(few + fewer) // 2)
    assert report.peak_after.size <= (few + fewer) // 2
    assert f"of {LAYERS} layers" in report.notes[1] and f"{PRODUCTS} of {PRODUCTS}" in report.notes[2]


@pytest.mark.sweep(0.34, "targets")
def test_then_residuals_are_stored_in_fewer_bits(model: tuple[Transformer, Tensor]) -> None:
    every = explained(model, **EXACTLY, recompute=1.0).peak_after.size
    small = explained(model, **{**EXACTLY, "residuals": "small"}, recompute=1.0).peak_after.size
    assert small < every
    report = explained(model, **EXACTLY, memory=small)
    assert report.peak_after.size <= small and any(r.encoding == "int4" for r in report.residuals)


def test_encoded_layers_store_less_again(model: tuple[Transformer, Tensor]) -> None:
    plain, again = (explained(model, **ENCODED, recompute=share) for share in (0.0, 1.0))
    assert again.saved_bytes_after < 0.3 * plain.saved_bytes_after


@pytest.mark.sweep(0.34)
@pytest.mark.parametrize("residuals", ["exact", "balanced", "small"])
def test_products_again_store_less_and_peak_lower(
    model: tuple[Transformer, Tensor], residuals: Residuals
) -> None:
    policy = {**ENCODED, "residuals": residuals}
    reports = [explained(model, **policy, recompute_products=share) for share in (0.0, 0.5, 1.0)]
    saved = [report.saved_bytes_after for report in reports]
    assert saved[1] < 0.75 * saved[0] and saved[2] < 0.45 * saved[0]
    assert max(report.peak_after.size for report in reports[1:]) < reports[0].peak_after.size
    assert "9 of 18 products" in reports[1].notes[0] and "18 of 18 products" in reports[2].notes[0]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_exact_products_again_give_the_same_gradients(share: float) -> None:
    exact, found = train(SMALL, Policy(**EXACTLY, recompute_products=share))
    assert all(torch.equal(found[name], exact[name]) for name in exact)


@pytest.mark.sweep(0.34)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_products_again_err_less_than_their_codes(dtype: torch.dtype | None, dropout: float) -> None:
    """Made of a norm in 8 bits they have its error; stored they have that of 6 bits, 15 times as much variance."""
    model = Transformer(d=64, layers=2, dropout=dropout), torch.randint(50, (8, 64))
    errors = []
    for share in (0.0, 1.0):
        exact, found = train(model, Policy(**ENCODED, recompute_products=share), dtype)
        errors.append(distance(found, exact))
    assert 0 < errors[1] < 0.5 * errors[0]


def test_products_of_the_fewest_multiplications_for_a_byte_come_first(
    model: tuple[Transformer, Tensor],
) -> None:
    gm = wtacrs_fx.capture(*model)
    layers = repeated_layers(gm.graph, tangent_cone(gm.graph))
    lengths = [_length(product) for product in products_of(layers)]
    assert lengths == sorted(lengths) and set(lengths) == {32, 128}
    first = [node for node in layers[0] if node in products_of(layers)]
    assert products_of(layers)[: len(first) - 1] == [node for node in first if _length(node) == 32]


def _length(product: fx.Node) -> int:
    first, _ = (arg for arg in product.all_input_nodes if arg.meta["val"].dim() == 2)
    return int(first.meta["val"].shape[1])


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("norm_first", [True, False])
def test_products_again_begin_in_their_own_layer(norm_first: bool) -> None:
    """Else the backward pass would compute the whole model again before it begins."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=norm_first)
    stack = nn.Sequential(*(copy.deepcopy(layer) for _ in range(4)), Squared()), torch.randn(8, 64, 64)
    report = explained(stack, **ENCODED, recompute_products=1.0)
    stored = {
        r.module.split(".")[0] for r in report.residuals if r.encoding in ("int8", "int6") and r.bytes_after
    }
    assert stored >= {"0", "1", "2", "3"}
    exact, found = train(stack, Policy(**ENCODED, recompute_products=1.0))
    assert 0 < distance(found, exact) < 5e-3


def test_convolutions_again() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 16, 1), nn.SiLU())

    model = nn.Sequential(*(block() for _ in range(3)), Squared()), torch.randn(4, 16, 32, 32)
    for policy in (EXACTLY, ENCODED):
        plain, again = (explained(model, **policy, recompute_products=share) for share in (0.0, 1.0))
        assert again.saved_bytes_after < 0.7 * plain.saved_bytes_after and not plain.work_again
        assert again.work_again / again.work == pytest.approx(0.9)  # of each block the first one
        exact, found = train(model, Policy(**policy, recompute_products=1.0))
        assert distance(found, exact) < (1e-12 if policy is EXACTLY else 5e-3)


@pytest.mark.sweep(0.34, "targets")
def test_what_cannot_be_reached_is_said(model: tuple[Transformer, Tensor]) -> None:
    report = explained(model, **ENCODED, memory="1KiB")
    assert report.notes[0].startswith("memory: 1.0 KiB asked") and "not reached in the" in report.notes[0]
    assert report.notes[0] in str(report)
    assert wtacrs_fx.Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("memory", [0, -1, "14", "14 gib", "GiB", 1.5, True, "device:", "all", "device:auto"])
def test_a_target_that_is_none(memory: Any) -> None:
    with pytest.raises(
        PolicyError, match="memory must be a whole number of bytes, or a text such as '14GiB'"
    ):
        Policy(memory=memory)


@pytest.mark.parametrize("share", [-0.1, 1.1, "all", True, float("nan")])
def test_a_share_that_is_none(share: Any) -> None:
    with pytest.raises(PolicyError, match="recompute must be a share of the layers"):
        Policy(recompute=share)
    with pytest.raises(PolicyError, match="recompute_products must be a share of the products"):
        Policy(recompute_products=share)


def test_texts_of_bytes() -> None:
    assert Policy(memory="1.5GiB").memory_bytes == 3 * 2**29
    assert Policy(memory="2 MB").memory_bytes == 2_000_000
    assert Policy(memory=7).memory_bytes == 7 and Policy().memory_bytes is None


class Planned:
    """Plans as a graph with 100 possible peaks does, whose code holds `off` times what is predicted."""

    is_tighter = True

    def __init__(self, off: float, asked: int) -> None:
        self.off, self.asked, self.targets = off, asked, list[int | None]()

    def __call__(self, target: int | None) -> _Attempt:
        self.targets.append(target)
        target = target or self.asked
        predicted = max(size for size in range(1000, 101000, 1000) if size <= max(target, 1000))
        peak = round(self.off * predicted)
        report = Report(
            (), 0, 0, peak_after=Peak(predicted, "backward", "", ""), memory=self.asked, planned_for=target
        )
        return _Attempt(len, [_counted(report, peak)], peak, self.is_tighter)

    def plan(self, known: Report | None = None) -> Report:
        return _compile_within(self, known).received[-1]


@pytest.mark.parametrize("off", [0.6, 0.8, 1.0, 1.2, 1.7])
def test_a_prediction_that_is_off_is_planned_again(off: float) -> None:
    compiler = Planned(off, 50_500)
    report = compiler.plan()
    assert report.peak_of_code is not None
    assert 0.95 * 50_500 <= report.peak_of_code <= 50_500
    assert len(compiler.targets) == (1 if off == 1.0 else 2)
    compiler.targets.clear()
    assert compiler.plan(report) == report
    assert compiler.targets == [report.planned_for]  # another process compiles once


def test_a_target_that_asks_for_nothing_is_planned_once() -> None:
    compiler = Planned(0.6, 50_500)
    compiler.is_tighter = False
    assert compiler.plan().peak_of_code == 30_000
    assert len(compiler.targets) == 1


def test_what_no_plan_reaches_is_said() -> None:
    report = Planned(1.5, 1_000).plan()
    assert report.peak_of_code == 1_500 and "500 B too much" in report.notes[-1]


def test_code_that_cannot_be_counted_leaves_the_prediction() -> None:
    report = Report((), 0, 0, notes=("memory",), memory=1000)
    assert "not known" in _counted(report, None).notes[-1]
    assert _counted(Report((), 0, 0), None).notes == ()


@pytest.mark.sweep(0.34, "targets")
def test_all_that_a_device_holds(model: tuple[Transformer, Tensor]) -> None:
    """Parameters and tokens, gradients with the peak, and two moments."""
    weights = 4 * sum(x.numel() for x in model[0].parameters())
    inputs = weights + 8 * model[1].numel()
    for size in (2**30, 2**25):
        report = explained(model, **EXACTLY, memory=f"device:{size}B")
        assert report.memory == size - inputs - 2 * weights
        assert report.notes[0].startswith(f"memory: device:{size}B leaves ")
    assert explained(model, **EXACTLY, memory="device:1KiB").memory == 1


def test_what_is_free(model: tuple[Transformer, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        psutil.Process().memory_info().rss
        < bytes_at_hand(torch.device("cpu"))
        < psutil.virtual_memory().total
    )
    monkeypatch.setattr(target, "bytes_at_hand", lambda device: 2**25 + 12345)
    found = with_what_is_free(Policy(memory="auto"), model)
    size = found.memory_bytes
    assert size is not None and found.is_of_device and 0.9 * 2**25 < size <= 0.95 * (2**25 + 12345)
    monkeypatch.setattr(target, "bytes_at_hand", lambda device: 2**25 + 99999)
    assert with_what_is_free(Policy(memory="auto"), model) == found  # a little more is the same plan
    assert explained(model, **EXACTLY, memory="auto").notes[0].startswith(f"memory: device:{size}B leaves ")
