"""The noise that is measured in a step agrees with draws, with rounding and with batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wtacrs_passes.maths import estimators, low_precision, ops
from wtacrs_passes.maths.observer import RATIOS, SETTLED, Drawn, Noise, Observer, _signs, measure

ROWS, FEATURES, OUTPUTS = 512, 48, (40, 24)


@pytest.fixture(scope="module")
def site() -> tuple[Tensor, list[Tensor]]:
    """X with a mean and two dY, whose rows matter differently."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(ROWS, FEATURES, generator=generator) * torch.rand(ROWS, 1, generator=generator).exp()
        + 0.3
    )
    return x, [
        torch.randn(ROWS, size, generator=generator) * torch.rand(ROWS, 1, generator=generator) ** 3
        for size in OUTPUTS
    ]


def norms_of(x: Tensor, dys: list[Tensor]) -> list[Tensor]:
    return [ops.row_norms([x]), ops.row_norms(dys)]


def draw(x: Tensor, dys: list[Tensor], ratio: float) -> tuple[Tensor, list[Tensor], Drawn]:
    """Draw rows as a compiled step does."""
    norms = norms_of(x, dys)
    kept = math.ceil(ratio * len(x))
    indices, scales = ops.choose_rows(norms, torch.rand(estimators.NOISE), kept, "wta-systematic")
    return x[indices] * scales[:, None], [dy[indices] for dy in dys], Drawn(norms, indices)


def error(x: Tensor, dys: list[Tensor], found: list[Tensor]) -> float:
    return sum(float((f - x.T @ dy).square().sum()) for dy, f in zip(dys, found, strict=True))


def mean_of_measures(x: Tensor, dys: list[Tensor], times: int, ratio: float | None = None) -> list[float]:
    total: Tensor = torch.zeros(2 + len(RATIOS), dtype=torch.float64)
    for seed in range(times):
        signs = _signs([dy.shape[1] for dy in dys], seed, x.device)
        operands = (x, dys, None) if ratio is None else draw(x, dys, ratio)
        total += torch.stack(measure(*operands[:2], signs, operands[2])[1 : 3 + len(RATIOS)]) / times
    return total.tolist()


@pytest.mark.parametrize("index", range(len(RATIOS)))
def test_the_variance_of_a_ratio_is_that_of_draws(site: tuple[Tensor, list[Tensor]], index: int) -> None:
    torch.manual_seed(1)
    x, dys = site
    draws = 300
    errors = []
    for _ in range(draws):
        rows, drawn, _ = draw(x, dys, RATIOS[index])
        errors.append(error(x, dys, [rows.T @ dy for dy in drawn]))
    spread = torch.tensor(errors)
    standard_error = float(spread.std() / spread.mean()) / draws**0.5
    assert standard_error < 0.02
    # four standard errors of the draws, and what the formula neglects: terms of order 1 / sum c_i
    assert mean_of_measures(x, dys, 20)[2 + index] == pytest.approx(float(spread.mean()), rel=0.1)


def test_drawn_rows_stand_for_all(site: tuple[Tensor, list[Tensor]]) -> None:
    torch.manual_seed(2)
    found, wanted = mean_of_measures(*site, 60, 0.3), mean_of_measures(*site, 20)
    # 60 draws: a standard error of up to 3 %, where few rows decide
    assert found[2:] == pytest.approx(wanted[2:], rel=0.1)
    assert found[1] == pytest.approx(wanted[2 + RATIOS.index(0.3)], rel=0.05)  # of the draw that led to them
    assert wanted[1] == 0


@pytest.mark.parametrize("ratio", [None, 0.3])
def test_the_variance_of_rounding_is_that_of_products_in_8_bits(
    site: tuple[Tensor, list[Tensor]], ratio: float | None
) -> None:
    torch.manual_seed(3)
    x, dys, _ = (*site, None) if ratio is None else draw(*site, ratio)

    def rounded(dy: Tensor) -> Tensor:
        draws = [torch.rand(size) for operand in (x, dy) for size in operand.shape]
        return low_precision.multiply(x, dy, draws, "int8")

    times = 100
    mean = sum(error(x, dys, [rounded(dy) for dy in dys]) for _ in range(times)) / times
    signs = _signs(OUTPUTS, 0, x.device)
    # two thousand elements, nearly independent, a hundred times: a standard error below 1 %
    assert float(measure(x, dys, signs)[1]) == pytest.approx(mean, rel=0.05)


def test_the_variance_of_rounding_rows_that_are_drawn(site: tuple[Tensor, list[Tensor]]) -> None:
    """Rescaled rows of large elements make steps wide: more than the rows of all together, over the ratio."""
    torch.manual_seed(6)
    x, dys = site
    x = x * torch.randn(len(x), 1).exp()
    index, times = RATIOS.index(0.2), 200
    signs = _signs(OUTPUTS, 0, x.device)
    figures = [measure(x, dys, signs, seed=seed) for seed in range(times)]
    predicted = float(torch.stack([each[3 + len(RATIOS) + index] for each in figures]).mean())
    total = 0.0
    for _ in range(times):
        rows, drawn, _ = draw(x, dys, 0.2)
        for dy in drawn:
            draws = [torch.rand(size) for operand in (rows, dy) for size in operand.shape]
            rounded = low_precision.multiply(rows, dy, draws, "int8")
            total += float((rounded - rows.T @ dy).square().sum()) / times
    assert predicted == pytest.approx(total, rel=0.15)  # the standard error of both together is 3 %
    assert predicted > 1.3 * float(figures[0][1]) / 0.2


def test_around_the_mean_a_common_direction_adds_nothing() -> None:
    torch.manual_seed(4)
    x, dy = torch.randn(256, 16) * 0.01 + 1, torch.randn(256, 16)
    signs = _signs([16], 0, x.device)
    plain, centred = (
        torch.stack(measure(x, [dy], signs, None, center)[3 : 3 + len(RATIOS)]) for center in (False, True)
    )
    assert (centred < 1e-3 * plain).all()


def test_a_padded_batch_adds_nothing_once_its_rows_are_kept() -> None:
    torch.manual_seed(5)
    x, dy = torch.randn(200, 8), torch.randn(200, 8)
    dy[:150] = 0
    added = [float(value) for value in measure(x, [dy], _signs([8], 0, x.device))[3 : 3 + len(RATIOS)]]
    assert added[0] > 0 and added[2:] == [0, 0, 0]


def steps(observer: Observer, number: int, mean: float = 0.0) -> None:
    """Take steps over batches of independent rows: G has the variance of their sum."""
    for _ in range(number):
        x, dy = torch.randn(64, 32) + mean, torch.randn(64, 16) + mean
        with observer.forward_pass():
            handle = ops.observed_step()
        ops.observe(handle, x, [dy], [], None, False, "layer")


def test_the_noise_of_the_minibatch_is_that_between_batches() -> None:
    torch.manual_seed(6)
    mean = 0.3
    observer = Observer()
    steps(observer, 24, mean)
    assert observer.is_due
    [noise] = observer.noise()
    variance, square = (1 + mean**2) ** 2 - mean**4, 64 * mean**4
    # Of 32 x 8 sums, in eight pairs: a standard error of some 5 %, as the rows of a batch are shared by all
    assert noise.minibatch == pytest.approx(variance / (variance + square), rel=0.25)
    assert (noise.rows, noise.features, noise.outputs, noise.steps) == (64, 32, (16,), 16)
    assert noise.modules == ("layer",) and noise.drawn == 1.0
    assert list(noise.added) == sorted(noise.added, reverse=True)


def test_the_order_of_backward_passes_does_not_matter() -> None:
    """As with two micro-batches whose losses are added up."""
    found = []
    batches = [(torch.randn(64, 32), torch.randn(64, 16)) for _ in range(24)]
    for swaps in (False, True):
        observer, handles = Observer(), []
        for _ in batches:
            with observer.forward_pass():
                handles.append(ops.observed_step())
        for step in range(24):
            which = step ^ swaps
            ops.observe(handles[which], batches[which][0], [batches[which][1]], [], None, False, "layer")
        found += observer.noise()
    assert found[0].minibatch > 0.5 and found[0].minibatch == pytest.approx(found[1].minibatch)


def test_a_jump_of_the_loss_scale_does_not_matter() -> None:
    torch.manual_seed(8)
    found = []
    batches = [(torch.randn(64, 32), torch.randn(64, 16)) for _ in range(24)]
    for scale in (1.0, 1e15):
        observer = Observer()
        for step, (x, dy) in enumerate(batches):
            with observer.forward_pass():
                handle = ops.observed_step()
            ops.observe(handle, x, [dy * (scale if step == 12 else 1.0)], [], None, False, "layer")
        found += observer.noise()
    assert (found[0].steps, found[1].steps) == (16, 14)
    assert found[0].minibatch == pytest.approx(found[1].minibatch, rel=0.3)
    assert found[0].added == pytest.approx(found[1].added, rel=0.3)


def test_equal_batches_have_no_noise() -> None:
    observer, x, dy = Observer(), torch.randn(64, 32), torch.randn(64, 16)
    for _ in range(24):
        with observer.forward_pass():
            handle = ops.observed_step()
        ops.observe(handle, x, [dy], [], None, False, "layer")
    assert observer.noise()[0].minibatch == 0


def test_a_step_with_an_overflow_is_left_out() -> None:
    torch.manual_seed(7)
    observer = Observer()
    for step in range(24):
        x, dy = torch.randn(64, 32), torch.randn(64, 16)
        if step == 10:
            dy[3, 3] = torch.inf
        with observer.forward_pass():
            handle = ops.observed_step()
        ops.observe(handle, x, [dy], [], None, False, "layer")
    [noise] = observer.noise()
    assert noise.steps == 14  # neither it nor what it was compared with
    assert math.isfinite(noise.minibatch) and all(map(math.isfinite, noise.added))


def test_only_windows_are_measured() -> None:
    due, measured = [], []
    observer = Observer()
    for step in range(3001):
        if observer.is_due:
            due.append(step)
            assert observer.noise() == [] and not observer.is_due
        if observer.measures(step):
            measured.append(step)
            assert observer.measures(step)  # another site of the same step
    assert due == [24, 120, 1000, 2000, 3000]
    windows = [range(8, 24), range(104, 120), *(range(end - 16, end) for end in (1000, 2000, 3000))]
    assert measured == [step for window in windows for step in window]
    assert SETTLED > 24


def test_a_window_that_ends_between_two_forward_passes_is_told_of() -> None:
    observer = Observer()
    for step in range(25):  # as the backward passes of several micro-batches at once
        observer.measures(step)
    assert observer.is_due
    assert not Observer(steps=25).is_due and not Observer(steps=24).is_due


def test_a_layer_that_is_called_twice_has_two_sites() -> None:
    observer, x, dy = Observer(steps=8), torch.randn(64, 32), torch.randn(64, 16)
    for factor in (1.0, 2.0):
        with observer.forward_pass():
            handle = ops.observed_step()
        ops.observe(handle, x, [dy], [], None, False, "layer")
        ops.observe(handle, x, [factor * dy], [], None, False, "layer")
    first, second = observer.noise()
    assert first.minibatch == 0 and second.minibatch > 0
    assert observer.noise() == []  # each measurement is told once


def test_a_step_that_nobody_asks_about_is_not_measured() -> None:
    x, dy = torch.randn(64, 32), torch.randn(64, 16)
    ops.observe(ops.observed_step(), x, [dy], [], None, False, "layer")
    observer = Observer(steps=8)
    with observer.forward_pass():
        handle = ops.observed_step()
    del observer
    ops.observe(handle, x, [dy], [], None, False, "layer")  # its graph is gone


def test_a_gradient_of_zeros_has_no_noise_to_compare_with() -> None:
    observer = Observer(steps=8)
    for _ in range(2):
        with observer.forward_pass():
            handle = ops.observed_step()
        ops.observe(handle, torch.randn(64, 32), [torch.zeros(64, 16)], [], None, False, "layer")
    assert observer.noise() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_figures_are_those_of_float32(
    site: tuple[Tensor, list[Tensor]], dtype: torch.dtype
) -> None:
    x, dys = site
    signs = _signs(OUTPUTS, 0, x.device)
    wide = torch.stack(measure(x, dys, signs)[1:])
    narrow = torch.stack(measure(x.to(dtype), [dy.to(dtype) for dy in dys], signs)[1:])
    assert narrow.tolist() == pytest.approx(wide.tolist(), rel=0.02)


def noise_of(**fields: object) -> Noise:
    """Return a measurement, for other tests."""
    usual: dict[str, object] = {
        "modules": ("a",), "rows": 1000, "features": 64, "outputs": (64,), "dtype": torch.float32,
        "device": torch.device("cpu"), "drawn": 1.0, "added": (0.5, 0.1, 0.05, 0.02, 0.01), "rounded": 0.001,
        "minibatch": 1.0, "steps": 16,
    }  # fmt: skip
    found = {**usual, **fields}
    found.setdefault("rounded_drawn", tuple(found["rounded"] * found["drawn"] / ratio for ratio in RATIOS))
    return Noise(**found)  # type: ignore[arg-type]
