from __future__ import annotations

import pytest
import torch
from conftest import is_unbiased
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.variance import gram, projection_variance
from wtacrs_passes.maths import estimators
from wtacrs_passes.maths.estimators import (
    CHOOSERS,
    NOISE,
    PROJECTIONS,
    choose_rows,
    combine_rows,
    estimate_product,
    gradient_weights,
    grid,
    inclusion_probabilities,
    random_order,
)

UNBIASED = ["wta-systematic", "wta-crs", "crs"]
ROWS, KEPT, RUNS = 60, 18, 4000


def draw(weights: Tensor, kept: int, estimator: str, runs: int = RUNS) -> tuple[Tensor, Tensor]:
    noise = torch.rand(runs, NOISE)
    return choose_rows(weights.expand(runs, -1), noise, kept, estimator)


def product_samples(x: Tensor, dy: Tensor, weights: Tensor, estimator: str) -> Tensor:
    """Return estimates of x^T dy: [runs, features_in * features_out]."""
    indices, scales = draw(weights, KEPT, estimator)
    return torch.einsum("rki,rko,rk->rio", x[indices], dy[indices], scales).flatten(1)


def operands(kind: str) -> tuple[Tensor, Tensor]:
    x, dy = torch.randn(ROWS, 3), torch.randn(ROWS, 2)
    if kind == "log-normal":
        x = x * torch.randn(ROWS, 1).mul(1.5).exp()
    if kind == "padded":
        dy[ROWS // 2 :] = 0
    if kind == "one winner":
        x[7] *= 1000
    if kind == "coherent":
        x, dy = x + 5, dy + 5
    return x, dy


KINDS = ["flat", "log-normal", "padded", "one winner", "coherent"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", UNBIASED)
@pytest.mark.parametrize("placement", ["forward", "backward"])
def test_unbiased(estimator: str, kind: str, placement: str) -> None:
    x, dy = operands(kind)
    weights = x.norm(dim=1) * (dy.norm(dim=1) if placement == "backward" else 1)
    assert is_unbiased(product_samples(x, dy, weights, estimator), (x.T @ dy).flatten())


def test_the_statistical_test_can_fail() -> None:
    x, dy = operands("log-normal")
    weights = x.norm(dim=1) * dy.norm(dim=1)
    exact = (x.T @ dy).flatten()
    assert not is_unbiased(product_samples(x, dy, weights, "topk"), exact)
    assert not is_unbiased(product_samples(x, dy, weights, "wta-systematic") * 1.02, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_systematic_keeps_distinct_rows_with_the_stated_probabilities(kind: str) -> None:
    x, dy = operands(kind)
    weights = (x.norm(dim=1) * dy.norm(dim=1)).double()
    probability = inclusion_probabilities(weights, KEPT)
    positive = int((weights > 0).sum())
    assert probability.sum().item() == pytest.approx(min(KEPT, positive))
    indices, scales = draw(weights, KEPT, "wta-systematic")
    hits = torch.zeros(RUNS, ROWS).scatter_add(1, indices, (scales > 0).float())
    assert hits.max() == 1  # no row twice
    assert torch.equal(hits.sum(1), torch.full((RUNS,), float(min(KEPT, positive))))
    assert is_unbiased(hits, probability)
    winners = probability == 1
    assert (hits[:, winners] == 1).all()
    torch.testing.assert_close(scales, torch.where(scales > 0, 1 / probability[indices], 0).float())


def test_any_two_rows_may_be_drawn_together() -> None:
    """In a fixed order, neighbours would never be: their covariance would depend on the order of tokens."""
    indices, _ = draw(torch.ones(ROWS), KEPT, "wta-systematic")
    together = torch.zeros(RUNS, ROWS).scatter(1, indices, 1.0)[:, :2].sum(1) == 2
    # The chance is near (k / n)^2 = 0.09; it is zero in a fixed order.
    assert 0.04 < together.float().mean() < 0.16


def test_probabilities_solve_their_equation() -> None:
    weights = torch.tensor([10.0, 5, 1, 1, 1, 1]).double()
    # k = 3: 10 and 5 are taken, one draw is left for four equal rows
    torch.testing.assert_close(
        inclusion_probabilities(weights, 3), torch.tensor([1, 1, 0.25, 0.25, 0.25, 0.25]).double()
    )


def test_systematic_variance_is_below_the_paper_s_draw() -> None:
    for kind in KINDS:
        x, dy = operands(kind)
        weights = x.norm(dim=1) * dy.norm(dim=1)
        exact = (x.T @ dy).flatten()
        ours, paper = (
            (product_samples(x, dy, weights, e) - exact).square().sum(1).mean()
            for e in ("wta-systematic", "wta-crs")
        )
        assert ours <= paper + 1e-9, kind


def test_crs_variance_matches_its_closed_form() -> None:
    x, dy = operands("log-normal")
    weights = x.norm(dim=1) * dy.norm(dim=1)
    exact = (x.T @ dy).flatten()
    errors = (product_samples(x, dy, weights, "crs") - exact).square().sum(1)
    expected = (weights.sum() ** 2 - exact.square().sum()) / KEPT
    spread = errors.std() / RUNS**0.5
    assert abs(errors.mean() - expected) < 4.5 * spread  # two-sided p < 1e-5


@pytest.mark.parametrize("estimator", [*UNBIASED, "topk"])
def test_all_weights_zero_gives_zero(estimator: str) -> None:
    x, dy = torch.zeros(ROWS, 3), torch.randn(ROWS, 2)
    noise = torch.rand(NOISE)
    product = estimate_product(x, dy, KEPT, estimator, torch.zeros(ROWS), noise)
    assert torch.equal(product, torch.zeros(3, 2))


@pytest.mark.parametrize("estimator", UNBIASED)
def test_rows_of_weight_zero_are_never_drawn(estimator: str) -> None:
    weights = torch.rand(ROWS)
    weights[::2] = 0
    indices, scales = draw(weights, KEPT, estimator)
    assert (scales[weights[indices] == 0] == 0).all()


@pytest.mark.parametrize("estimator", [*UNBIASED, "topk"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_reach_the_product(estimator: str, bad: float) -> None:
    for count in (1, KEPT - 1, KEPT, KEPT + 1, ROWS):
        x, dy = operands("flat")
        x[:count, 0] = bad
        weights = x.norm(dim=1) * dy.norm(dim=1)
        product = estimate_product(x, dy, KEPT, estimator, weights, torch.rand(NOISE))
        assert not product[0].isfinite().any(), count
        if estimator == "wta-systematic" and count <= KEPT:
            assert torch.equal(product.isnan(), (x.T @ dy).isnan())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 50),
    share=st.floats(0.01, 1.0),
    estimator=st.sampled_from(sorted(CHOOSERS)),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_any_size(rows: int, share: float, estimator: str, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    kept = max(1, int(rows * share))
    weights = torch.rand(2, rows).double() * scale
    indices, scales = choose_rows(weights, torch.rand(2, NOISE), kept, estimator)
    assert indices.shape == scales.shape == (2, kept)
    assert indices.dtype == torch.int64 and scales.dtype == torch.float32
    assert ((indices >= 0) & (indices < rows)).all()
    assert scales.isfinite().all()
    if kept == rows and estimator == "wta-systematic":
        torch.testing.assert_close(scales, torch.ones_like(scales))
        assert torch.equal(indices.sort(-1).values, torch.arange(rows).expand(2, -1))


def test_extreme_spread_of_weights_keeps_the_tail_unbiased() -> None:
    weights = torch.cat([torch.tensor([1e30, 1e20]), torch.rand(ROWS - 2)]).double()
    probability = inclusion_probabilities(weights, KEPT)
    assert (probability[:2] == 1).all()
    assert probability.sum().item() == pytest.approx(KEPT)


@pytest.mark.parametrize("kind", ["flat", "padded", "coherent"])
@pytest.mark.parametrize("estimator", PROJECTIONS)
def test_combinations_of_rows_are_unbiased_with_the_stated_variance(estimator: str, kind: str) -> None:
    x, dy = operands(kind)
    exact = x.T @ dy
    samples = torch.stack(
        [estimate_product(x, dy, KEPT, estimator, torch.ones(ROWS), torch.rand(2)) for _ in range(RUNS)]
    )
    assert is_unbiased(samples.flatten(1), exact.flatten())
    squares = (samples - exact).square().sum((1, 2)).double()
    norms = torch.stack([x.norm(dim=1), dy.norm(dim=1)])
    variance = projection_variance(gram(x, dy), norms, KEPT, estimator)
    # four standard errors of the mean: a chance of 6e-5 to fail by accident
    assert abs(float(squares.mean()) - variance) < 4 * float(squares.std()) / RUNS**0.5
    other = "rmm-gaussian" if estimator == "rmm-rademacher" else "rmm-rademacher"
    if kind == "padded":
        assert variance != pytest.approx(projection_variance(gram(x, dy), norms, KEPT, other), rel=0.01)


@pytest.mark.parametrize("estimator", PROJECTIONS)
def test_a_projection_depends_on_its_seed_alone(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, identity = torch.tensor([3, 5]), torch.eye(50)
    matrix = combine_rows(identity, seed, 20, estimator)
    again = combine_rows(identity.expand(3, 50, 50), seed, 20, estimator)
    assert all(block.equal(matrix) for block in again)
    monkeypatch.setattr("wtacrs_passes.maths.estimators._ELEMENTS_AT_ONCE", 170)
    assert combine_rows(identity, seed, 20, estimator).equal(matrix)  # in blocks of three rows
    other = combine_rows(identity, torch.tensor([3, 6]), 20, estimator)
    assert not other.equal(matrix)
    # entries of 1000 are uncorrelated: |r| of independent ones exceeds 4 / sqrt(1000) once in 16,000 times
    entries = torch.stack(
        [matrix.flatten(), other.flatten(), matrix.roll(1, 0).flatten(), matrix.roll(1, 1).flatten()]
    )
    correlation = torch.corrcoef(entries) - torch.eye(4)
    assert correlation.abs().max() < 4 / 1000**0.5
    if estimator == "rmm-rademacher":
        assert (matrix * 20**0.5).abs().allclose(torch.ones(()))


@pytest.mark.parametrize("estimator", UNBIASED)
def test_rows_are_scaled_where_nothing_is_taken_for_sure(estimator: str) -> None:
    _, scales = draw(torch.ones(ROWS), KEPT, estimator, runs=50)
    torch.testing.assert_close(scales, torch.full_like(scales, ROWS / KEPT))


@pytest.mark.parametrize("estimator", [*CHOOSERS, *PROJECTIONS])
def test_the_host_reads_nothing(estimator: str) -> None:
    """On the meta device there are no values: whatever reads one raises."""
    weights, noise = torch.ones(2, ROWS, device="meta"), torch.rand(2, NOISE, device="meta")
    if estimator in PROJECTIONS:
        x, seed = torch.ones(ROWS, 3, device="meta"), torch.ones(2, dtype=torch.long, device="meta")
        assert combine_rows(x, seed, KEPT, estimator).shape == (KEPT, 3)
    else:
        indices, scales = choose_rows(weights, noise, KEPT, estimator)
        assert indices.shape == scales.shape == (2, KEPT)
    gradient_weights(torch.ones(ROWS, device="meta"), torch.ones(ROWS, device="meta"), 0.0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60), share=st.floats(0.01, 1.0), spread=st.floats(0, 20), seed=st.integers(0, 1000)
)
def test_probabilities_by_rounds_are_those_by_sorting(
    rows: int, share: float, spread: float, seed: int
) -> None:
    torch.manual_seed(seed)
    kept = max(1, int(rows * share))
    weights = (spread * torch.randn(3, rows, dtype=torch.float64)).exp()
    weights[0, ::3] = 0
    weights[1, : kept // 2] = torch.inf
    rounds, sorting = (
        torch.where(weights > 0, weights * scale(weights, kept), 0.0).nan_to_num(1).clamp(max=1)
        for scale in (estimators._scale_by_rounds, estimators._scale_by_sorting)
    )
    torch.testing.assert_close(rounds, sorting, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 60, 127, 1000])
def test_a_random_order_has_every_place_once(rows: int) -> None:
    order = random_order(rows, torch.randint(2**24, (20, 2)))
    height, width = grid(rows)
    assert rows <= height * width < rows + height
    assert torch.equal(order.sort(-1).values, torch.arange(height * width).expand(20, -1))


@pytest.mark.parametrize(("rows", "places"), [(59, 64), (32, 36), (128, 128)])
def test_a_random_order_prefers_neither_places_nor_neighbours(rows: int, places: int) -> None:
    """Counts of (place, row) and of (row, next row) against equal chances: two chi-square tests.

    Statistics of `places` squared cells, normal to a good approximation: above mean + 5 deviations with p < 1e-6.
    The grids are 8 x 8, 6 x 6 and 8 x 16.
    """
    runs = 20_000
    order = random_order(rows, torch.randint(2**24, (runs, 2)))
    pairs = order[:, :-1] * places + order[:, 1:]
    at = torch.arange(places) * places + order
    for cells, chances in ((at, places), (pairs, places - 1)):
        counts = torch.bincount(cells.flatten(), minlength=places**2).view(places, places).double()
        possible = torch.ones(places, places, dtype=torch.bool)
        if chances == places - 1:
            possible.fill_diagonal_(False)
        expected = cells.numel() / possible.sum()
        statistic = ((counts - expected).square() / expected)[possible].sum()
        degrees = (places - 1) ** 2
        assert statistic < degrees + 5 * (2 * degrees) ** 0.5
