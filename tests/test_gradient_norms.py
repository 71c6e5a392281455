"""Remembered gradient norms and token masks: what is recorded, what it does to draws, what it survives."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import RowsOnly, is_unbiased
from torch import Tensor, nn

import wtacrs_fx
from wtacrs_fx import GradientNormError, GradientNorms, track_gradient_norms
from wtacrs_fx.gradient_norms import _decoded, _encoded
from wtacrs_passes.maths import ops
from wtacrs_passes.maths.estimators import DEFENCE, NOISE, choose_rows, gradient_weights

SAMPLES, LENGTH, D = 50, 12, 8
FORWARD = RowsOnly(placement="forward", min_rows=8)


class Encoder(nn.Module):
    """[batch, positions, D] and a mask to a scalar; `left` and `right` share an input.

    Padding has no gradient, and positions differ in how much they have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.left, self.right = nn.Linear(D, D), nn.Linear(D, D)
        self.last = nn.Linear(D, 4)
        self.register_buffer("importance", torch.linspace(-4, 2, LENGTH + 1).exp().unsqueeze(-1))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        y = torch.sin(self.left(h) * self.right(h))
        counted = attention_mask.unsqueeze(-1) * self.importance[: x.shape[1]]
        return (self.last(y) * counted).square().sum()


class Declared(Encoder):
    """The same, with a token mask, which may be wrong."""

    def forward(self, x: Tensor, attention_mask: Tensor, declared: Tensor | None = None) -> Tensor:
        wtacrs_fx.token_mask(attention_mask if declared is None else declared)
        return super().forward(x, attention_mask)


def batch(samples: int = 6, positions: int = 10) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, positions, D)
    lengths = torch.randint(3, positions + 1, (samples, 1))
    return x, (torch.arange(positions) < lengths).long()


def compile_forward(model: nn.Module, **options: object) -> Callable[..., Tensor]:
    return torch.compile(model, backend=wtacrs_fx.backend(FORWARD), fullgraph=True, **options)


def exact_norms(model: Encoder, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the norms of the gradients of each layer's output, jointly where layers share an input."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda layer, args, out, name=name: (
                out.register_hook(lambda dy: found.update({name: dy.norm(dim=-1)})) and None
            )
        )
        for name, layer in model.named_children()
        if isinstance(layer, nn.Linear)
    ]
    Encoder.forward(model, x, mask).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    shared = (found.pop("left").square() + found.pop("right").square()).sqrt()
    return {**found, "left": shared, "right": shared}


@pytest.fixture(scope="module")
def trained() -> tuple[Encoder, GradientNorms, Callable[..., Tensor], Tensor, Tensor, Tensor]:
    """A tracked model after one step; its norms are remembered in float32."""
    torch.manual_seed(0)
    model = Encoder()
    tracker = track_gradient_norms(model, SAMPLES, LENGTH, torch.float32)
    call = compile_forward(model)
    ids, (x, mask) = torch.tensor([4, 49, 0, 7, 21, 3]), batch()
    with tracker.batch(ids):
        call(x, mask).backward()
    model.zero_grad()
    return model, tracker, call, ids, x, mask


# What is recorded


def test_the_norms_of_a_step_are_recorded(trained: tuple) -> None:
    model, tracker, _, ids, x, mask = trained
    expected = exact_norms(model, x, mask)
    assert {"first", "last"} < set(tracker.records) <= set(expected)
    assert len(tracker.records) == 3  # left and right share a record
    for name, record in tracker.records.items():
        torch.testing.assert_close(
            record[ids, :10], expected[name].clamp(min=ops.SMALLEST_NORM), rtol=1e-4, atol=1e-7
        )
        assert not record[ids, 10:].any()  # positions that the batch did not have
        others = [i for i in range(SAMPLES) if i not in ids.tolist()]
        assert not record[others].any()


def test_bytes_are_as_announced(trained: tuple) -> None:
    tracker = trained[1]
    assert tracker.bytes_per_layer == (SAMPLES + 1) * LENGTH * 4
    assert tracker.nbytes == 3 * tracker.bytes_per_layer
    assert tracker.nbytes == sum(record.nbytes for record in tracker.records.values())


def test_the_next_step_reads_them(trained: tuple) -> None:
    _, tracker, _, ids, _, _ = trained
    shuffled = ids[torch.tensor([3, 1, 0])]
    with tracker.batch(shuffled):
        for i, path in enumerate(tracker.layers):
            record = tracker.records.get(path)
            expected = torch.zeros(3, LENGTH) if record is None else record[shuffled]
            assert tracker._linears[i].wtacrs_known[:3].equal(expected)
    assert not tracker._linears[0].wtacrs_known.any()  # outside nothing is known


def test_a_block_without_a_backward_pass_changes_nothing(trained: tuple) -> None:
    _, tracker, call, ids, x, mask = trained
    before = copy.deepcopy(dict(tracker.records))
    with tracker.batch(ids), torch.no_grad():
        call(x, mask)
    with pytest.raises(KeyError), tracker.batch(ids):
        raise KeyError
    assert all(record.equal(before[name]) for name, record in tracker.records.items())


def test_what_is_not_finite_changes_nothing(trained: tuple) -> None:
    model, tracker, call, ids, x, mask = trained
    before = copy.deepcopy(dict(tracker.records))
    broken = x.clone()
    broken[2] = torch.inf
    with tracker.batch(ids):
        call(broken, mask).backward()
    model.zero_grad()
    for name, record in tracker.records.items():
        assert record[ids[2]].equal(before[name][ids[2]])
        assert record.isfinite().all()


def test_two_forward_passes_before_the_backward_passes(trained: tuple) -> None:
    model, tracker, call, ids, x, mask = trained
    with tracker.batch(ids):
        losses = [call(x, mask) for _ in range(2)]
        for loss in losses:
            loss.backward()
    model.zero_grad()


def test_micro_batches_and_a_smaller_last_batch(trained: tuple) -> None:
    """Blocks of different sizes, in any order, accumulate gradients and keep their own samples' norms."""
    model, tracker, call, _, _, _ = trained
    sizes, expected = (4, 5, 2), {}
    for start, size in zip((10, 20, 30), sizes, strict=True):
        x, mask = batch(size)
        expected[start] = exact_norms(model, x, mask)["last"]
        with tracker.batch(range(start, start + size)):
            call(x, mask).backward()
    model.zero_grad()
    for start, size in zip((10, 20, 30), sizes, strict=True):
        record = tracker.records["last"][start : start + size, :10]
        torch.testing.assert_close(record, expected[start].clamp(min=ops.SMALLEST_NORM), rtol=1e-4, atol=1e-7)


def test_batch_sizes_vary_without_compiling_again() -> None:
    model = Encoder()
    tracker = track_gradient_norms(model, SAMPLES, LENGTH)
    compiled: list[int] = []
    inner = wtacrs_fx.backend(FORWARD)
    call = torch.compile(model, backend=lambda *a, **k: compiled.append(1) or inner(*a, **k), dynamic=True)
    with tracker.batch(range(12)):
        pass  # makes room
    for size, positions in ((12, 9), (7, 12), (5, 6)):
        x, mask = batch(size, positions)
        with tracker.batch(range(size)):
            call(x, mask).backward()
        model.zero_grad()
        record = tracker.records["last"][:size, :positions]
        expected = exact_norms(model, x, mask)["last"].clamp(min=ops.SMALLEST_NORM)
        torch.testing.assert_close(record.float(), expected, rtol=2**-8, atol=1e-7)
    assert len(compiled) == 1


def test_a_longer_batch_than_announced_is_an_error(trained: tuple) -> None:
    _, tracker, call, ids, _, _ = trained
    with tracker.batch(ids), pytest.raises(RuntimeError, match=r"seq_len=\.\.\."):
        call(*batch(6, LENGTH + 1))


def test_a_step_outside_a_block_says_what_is_missing() -> None:
    model = Encoder()
    track_gradient_norms(model, SAMPLES, LENGTH)
    with pytest.raises(RuntimeError, match="tracker.batch"):
        compile_forward(model)(*batch())


# What the weights do


def test_gradient_weights() -> None:
    known = torch.tensor([0.0, 2.0, 4.0, 1e-15, torch.inf, 6.0])
    mask = torch.tensor([1, 1, 1, 1, 1, 0])
    mean = (2 + 4) / 3  # over rows that are seen and real
    weights = gradient_weights(known, mask, 0.25)
    expected = [
        mean,
        2 + DEFENCE * mean,
        4 + DEFENCE * mean,
        DEFENCE * mean,
        mean,
        0.25 * (6 + DEFENCE * mean),
    ]
    assert weights.tolist() == pytest.approx(expected)
    assert gradient_weights(torch.zeros(3), torch.tensor([1, 0, 1]), 0.0).tolist() == [1, 0, 1]


@pytest.mark.parametrize("estimator", ["wta-systematic", "wta-crs", "crs"])
def test_unbiased_whatever_is_remembered(estimator: str) -> None:
    """Remembered norms that are zero, wrong or missing must not take a row out of the draw."""
    rows, kept, runs = 60, 18, 4000
    x, dy = torch.randn(rows, 3), torch.randn(rows, 2)
    known = torch.rand(rows).exp()
    known[:20], known[20:30] = ops.SMALLEST_NORM, 0.0
    exact = (x.T @ dy).flatten()

    def samples(weights: Tensor) -> Tensor:
        indices, scales = choose_rows(weights.expand(runs, -1), torch.rand(runs, NOISE), kept, estimator)
        return torch.einsum("rki,rko,rk->rio", x[indices], dy[indices], scales).flatten(1)

    weights = x.norm(dim=1) * gradient_weights(known, torch.ones(rows), 1.0)
    assert is_unbiased(samples(weights), exact)
    assert not is_unbiased(samples(x.norm(dim=1) * known), exact)  # as in the paper's code


def dw_samples(call: Callable[..., Tensor], model: nn.Module, inputs: tuple, runs: int) -> Tensor:
    """Return the gradients of `first` and `last` for independent draws: [runs, n]."""
    found = []
    for _ in range(runs):
        model.zero_grad()
        call(*inputs).backward()
        found.append(torch.cat([model.first.weight.grad.flatten(), model.last.weight.grad.flatten()]))
    model.zero_grad()
    return torch.stack(found)


def exact_dw(model: Encoder, x: Tensor, mask: Tensor) -> Tensor:
    model.zero_grad()
    Encoder.forward(model, x, mask).backward()
    exact = torch.cat([model.first.weight.grad.flatten(), model.last.weight.grad.flatten()])
    model.zero_grad()
    return exact


def test_compiled_gradients_are_unbiased_and_less_noisy(trained: tuple) -> None:
    model, tracker, call, ids, x, mask = trained
    with tracker.batch(ids):
        call(x, mask).backward()  # remember this very batch
    exact = exact_dw(model, x, mask)
    blind = dw_samples(call, model, (x, mask), 400)
    with tracker.batch(ids):
        informed = dw_samples(call, model, (x, mask), 400)
    assert is_unbiased(blind, exact)
    assert is_unbiased(informed, exact)
    noise = [(samples - exact).square().sum(1).mean() for samples in (informed, blind)]
    assert noise[0] < 0.5 * noise[1]


# Masks


@pytest.fixture(scope="module")
def declared() -> tuple[Declared, Callable[..., Tensor], Tensor, Tensor]:
    torch.manual_seed(1)
    model = Declared()
    call = compile_forward(model)
    x, mask = batch()
    mask[:, 0] = 1
    call(x, mask, mask.clone()).backward()
    model.zero_grad()
    return model, call, x, mask


def test_a_declared_mask_is_in_the_report_and_unbiased(declared: tuple) -> None:
    model, call, x, mask = declared
    assert {site.weights for report in wtacrs_fx.reports() for site in report.sampled} >= {
        "||x||, zero unless token_mask"
    }
    exact = exact_dw(model, x, mask)
    samples = torch.stack([dw_samples(lambda *a: call(*a, mask), model, (x, mask), 1)[0] for _ in range(300)])
    assert is_unbiased(samples, exact)


def test_a_wrong_mask_raises(declared: tuple) -> None:
    model, call, x, mask = declared
    wrong = mask.clone()
    wrong[2, 0] = 0
    with pytest.raises(RuntimeError, match="declares to have no gradient has one"):
        call(x, mask, wrong).backward()
    model.zero_grad()


def test_masked_rows_may_overflow(declared: tuple) -> None:
    """Gradients that are Inf or NaN everywhere, as after too large a loss scale, are no wrong mask."""
    model, call, x, mask = declared
    loss = call(x, mask, mask.clone())
    (loss * torch.tensor(torch.nan)).backward()
    assert model.last.weight.grad.isnan().any()
    model.zero_grad()


def test_an_attention_mask_is_found(trained: tuple) -> None:
    weights = {site.weights for report in wtacrs_fx.reports() for site in report.sampled}
    assert "||x|| remembered ||dy||, zero unless attention_mask" in weights


def test_a_mask_of_other_sizes_is_left_alone() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(D, D), nn.Linear(D, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            pooled = (self.inner(x).tanh() * attention_mask.unsqueeze(-1)).sum(1)
            return self.head(pooled.tanh()).square().mean()

    x, mask = batch(20, 6)
    report = wtacrs_fx.explain(Pooled(), x, mask, policy=FORWARD)
    assert {site.module: site.weights for site in report.sites} == {
        "head": "||x||",
        "inner": "||x||, zero unless attention_mask",
    }


def test_a_token_mask_has_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"\[batch, positions\], got one of shape \[3\]"):
        wtacrs_fx.token_mask(torch.ones(3))


def test_markers_do_nothing_in_eager_and_with_inductor() -> None:
    model = Declared()
    tracker = track_gradient_norms(model, SAMPLES, LENGTH)
    x, mask = batch()
    with tracker.batch(range(6)):
        losses = [
            call(x, mask) for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True))
        ]
        for loss in losses:
            loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item())
    assert tracker.nbytes == 0


# Records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_round_trip(dtype: torch.dtype) -> None:
    norms = torch.logspace(-14, 3, 200)
    back = _decoded(_encoded(norms, dtype))
    assert (back / norms - 1).abs().max() <= {
        torch.float32: 0,
        torch.bfloat16: 2**-8,
        torch.uint8: 2**0.125 - 1,
    }[dtype] + 1e-5
    assert not _decoded(_encoded(torch.zeros(3), dtype)).any()  # not seen stays not seen
    seen = _decoded(_encoded(torch.tensor([ops.SMALLEST_NORM, 1e30]), dtype))
    assert 0 < seen[0] <= 2e-15 and seen[1] > 1e3


def recorded(**options: object) -> tuple[GradientNorms, Tensor]:
    """Return a tracker that has recorded norms [3, LENGTH] of the samples 5, 6, 7 of the first layer."""
    tracker = track_gradient_norms(Encoder(), SAMPLES, LENGTH, **options)
    norms = torch.rand(3, LENGTH) + 0.5
    with tracker.batch([5, 6, 7]):
        tracker._linears[0].wtacrs_fresh.copy_(norms)
    return tracker, norms


def test_buckets_keep_the_root_mean_square() -> None:
    tracker, norms = recorded(dtype=torch.float32, bucket=5)
    expected = torch.stack([part.square().mean(1).sqrt() for part in norms.split(5, 1)], 1)
    torch.testing.assert_close(tracker.records["first"][5:8], expected)
    torch.testing.assert_close(
        tracker._read(torch.tensor([6]))[0, 0], expected[1].repeat_interleave(5)[:LENGTH]
    )
    assert tracker.bytes_per_layer == (SAMPLES + 1) * 3 * 4


def test_positions_keep_a_running_mean() -> None:
    tracker, norms = recorded(dtype=torch.float32, resolution="position")
    assert tracker.nbytes == LENGTH * 4
    mean = norms.square().mean(0).sqrt()
    torch.testing.assert_close(tracker._read(torch.tensor([41, 2]))[0], mean.expand(2, -1))
    with tracker.batch([1, 1]):
        tracker._linears[0].wtacrs_fresh[:2] = 1.0
    torch.testing.assert_close(tracker._read(torch.tensor([0]))[0, 0], 0.9 * mean + 0.1)


def test_prefetch() -> None:
    tracker, _ = recorded()
    tracker.prefetch([6, 5])
    expected = tracker._read(torch.tensor([5, 6]))  # another batch does not take it
    staged = tracker._staged
    assert staged is not None
    with tracker.batch([6, 5]):
        assert tracker._staged is None
        assert tracker._linears[0].wtacrs_known[:2].equal(expected[0].flip(0))
    tracker.prefetch([7])
    with tracker.batch([7, 8]):  # records sample 7 anew: what was fetched of it is old
        tracker._linears[0].wtacrs_fresh[:2] = 3.0
    assert tracker._staged is None
    tracker.prefetch([9])
    with tracker.batch([7, 8]):
        tracker._linears[0].wtacrs_fresh[:2] = 4.0
    assert tracker._staged is not None


def test_records_survive_a_checkpoint(tmp_path: Path, trained: tuple) -> None:
    model, tracker, _, ids, _, _ = trained
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    resumed = Encoder()
    again = track_gradient_norms(resumed, SAMPLES, LENGTH, torch.float32)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    assert again.nbytes == tracker.nbytes
    assert again._read(ids).equal(tracker._read(ids))
    other = Encoder()
    track_gradient_norms(other, SAMPLES, LENGTH + 1, torch.float32)
    with pytest.raises(GradientNormError, match="make the tracker as it was made then"):
        other.load_state_dict(model.state_dict())


def test_records_can_stay_out_of_checkpoints() -> None:
    tracker, _ = recorded(persistent=False)
    assert tracker.nbytes
    assert set(tracker._model.state_dict()) == set(Encoder().state_dict())


def test_casts_and_copies_of_the_model() -> None:
    tracker, _ = recorded()
    model = tracker._model.double()
    assert tracker.records["first"].dtype == torch.bfloat16
    with tracker.batch([5, 6, 7]):
        assert model.first.wtacrs_known.dtype == torch.float32
        assert model.first.wtacrs_known.data_ptr() == tracker._known.data_ptr()
    twin = copy.deepcopy(model)
    memory = twin.wtacrs_gradient_norms
    with memory.batch([5, 6, 7]):
        assert twin.first.wtacrs_known.any() and not model.first.wtacrs_known.any()
        twin.first.wtacrs_fresh.fill_(9.0)
    assert (memory.records["first"][5] == 9).all() and (tracker.records["first"][5] != 9).all()
    name = "wtacrs_gradient_norms.first"
    assert (twin.state_dict()[name][5] == 9).all() and (model.state_dict()[name][5] != 9).all()
    twin.load_state_dict(model.state_dict())
    assert memory.records["first"].equal(tracker.records["first"])


def test_a_tracker_that_serves_nothing_says_so() -> None:
    tracker = track_gradient_norms(Encoder(), SAMPLES, LENGTH)
    for _ in range(2):
        with tracker.batch([1]):
            pass
    with (
        pytest.warns(UserWarning, match="recorded no gradient norms.*placement='forward'"),
        tracker.batch([1]),
    ):
        pass


def test_a_removed_tracker_leaves_no_trace() -> None:
    model = Encoder()
    names = set(dict(model.named_buffers())), set(model.state_dict()), set(dict(model.named_modules()))
    tracker = track_gradient_norms(model, SAMPLES, LENGTH)
    tracker.remove()
    assert names == (
        set(dict(model.named_buffers())), set(model.state_dict()), set(dict(model.named_modules()))
    )  # fmt: skip
    assert not any(layer._forward_pre_hooks for layer in model.children())
    track_gradient_norms(model, SAMPLES, LENGTH)


def test_a_sample_that_was_not_seen_has_the_running_mean_of_its_positions() -> None:
    tracker, norms = recorded(dtype=torch.float32)
    assert _decoded(tracker.records["first"][41]).count_nonzero() == 0
    known = tracker._read(torch.tensor([41, 6]))[0]
    torch.testing.assert_close(known[0], norms.square().mean(0).sqrt())
    torch.testing.assert_close(known[1], norms[1])
    with tracker.batch([1, 2]):  # of three positions; the second sample ends after two
        tracker._linears[0].wtacrs_fresh[:2, :3] = torch.tensor([[1.0, 1, 1], [1, 1, ops.SMALLEST_NORM]])
    moved = tracker._read(torch.tensor([41]))[0, 0]
    torch.testing.assert_close(moved[:3], 0.9 * known[0, :3] + 0.1)
    torch.testing.assert_close(moved[3:], known[0, 3:])


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be a whole number, at least 1, got 0"),
        ({"seq_len": 1.5}, "seq_len must be"),
        ({"bucket": 0}, "bucket must be"),
        ({"dtype": torch.float16}, "dtype must be one of .* float16 has too small"),
        ({"resolution": "batch"}, "resolution must be 'token' or 'position', got 'batch'"),
        (
            {"max_bytes": 1000},
            r"4 linears x \(50 samples \+ 1 mean\) x 12 norms x 2 B = 4.8 KiB, the limit is 1000 B; use",
        ),
        ({"num_samples": 10**12}, "resolution='position', or raise max_bytes"),
    ],
)  # fmt: skip
def test_a_tracker_that_cannot_be_made(arguments: dict, message: str) -> None:
    with pytest.raises(GradientNormError, match=message):
        track_gradient_norms(Encoder(), **{"num_samples": SAMPLES, "seq_len": LENGTH, **arguments})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 50], "below num_samples=50, got 50"),
        ([-1], "got -1"),
        ([3, 4, 3], "got 3 twice"),
        ([0.5], "whole numbers"),
        ([], "whole numbers"),
        ([[1]], "whole numbers"),
    ],
)
def test_sample_ids_that_cannot_be_used(ids: list, message: str) -> None:
    tracker = track_gradient_norms(Encoder(), SAMPLES, LENGTH)
    with pytest.raises(GradientNormError, match=message), tracker.batch(ids):
        pass


def test_a_model_that_cannot_be_tracked() -> None:
    model = Encoder()
    track_gradient_norms(model, SAMPLES, LENGTH)
    with pytest.raises(GradientNormError, match="tracked already"):
        track_gradient_norms(model, SAMPLES, LENGTH)
    with pytest.raises(GradientNormError, match="no trainable linear"):
        track_gradient_norms(Encoder().requires_grad_(False), SAMPLES, LENGTH)


# Ranks


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = Encoder()
    tracker = track_gradient_norms(model, SAMPLES, LENGTH, torch.float32)
    # DistributedDataParallel sends the buffers of rank 0 to all: not these.
    parallel = nn.parallel.DistributedDataParallel(model)
    with tracker.batch([rank, 2]):
        model.first.wtacrs_fresh[:2] = rank + 1.0
    if rank == 1:
        with tracker.batch([9]):
            model.last.wtacrs_fresh[:1] = 5.0
    parallel(*batch()).backward()
    assert tracker.records["first"][rank, 0] == rank + 1
    tracker.synchronise()
    first = tracker.records["first"][:3, 0].tolist()
    assert first == [1.0, 2.0, 1.5] and tracker.records["last"][9, 0] == 5, first
    del parallel  # after its process group it may wait for ever
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks_share_their_records(tmp_path: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
