"""Two ranks on CPU: unbiased gradients, independent draws, equal plans, predicted bytes, the same resumed."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aot import small_tensors
from conftest import ALPHA, Transformer
from torch import Tensor

import wtacrs_fx
from wtacrs_fx import Policy

WORKER = Path(__file__).with_name("distributed_worker.py")
TIMEOUT = 240  # seconds; a hang fails

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def launch(case: str, folder: Path) -> list[dict[str, Any]]:
    """Run a case of the worker on two ranks; return what each found."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [*run, str(WORKER), case, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # ends its ranks as well
            output, _ = process.communicate()
            pytest.fail(f"{case} took more than {TIMEOUT} s\n{output}")
    assert process.returncode == 0, output
    return [torch.load(folder / f"{case}-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Launch each case once."""
    folder = tmp_path_factory.mktemp("distributed")
    return functools.cache(lambda case: launch(case, folder))


def limit(tests: int) -> float:
    """The bound of so many standard normal numbers at significance ALPHA (Bonferroni)."""
    return statistics.NormalDist().inv_cdf(1 - ALPHA / (2 * tests))


def is_zero_mean(z: Tensor) -> bool:
    return bool(z.abs().max() < limit(len(z)))


# The mean of 100 steps is the gradient of one process on the whole batch


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize("case", ["ddp", "reducer", "fsdp", "tensor"])
def test_unbiased_and_planned_alike(ranks: Callable, case: str) -> None:
    first, second = ranks(case)
    assert is_zero_mean(first["z"]) and torch.equal(first["z"], second["z"])
    assert first["plans"] and first["plans"] == second["plans"]


def test_the_test_of_the_mean_sees_half_of_the_batch(ranks: Callable) -> None:
    for found in ranks("ddp"):
        assert not is_zero_mean(found["z_of_half"])


def test_buckets_are_graphs_with_names(ranks: Callable) -> None:
    plans = ranks("ddp")[0]["plans"]
    sampled = [{site["module"] for site in plan["sites"] if not site["reason"]} for plan in plans]
    assert len(plans) > 2 and all(sampled)
    assert set().union(*sampled) >= {"layers.0.q", "layers.0.down", "head"}


@pytest.mark.sweep(0.25, "ranks")
def test_compiled_autograd_reduces(ranks: Callable) -> None:
    assert all(found["captures"] and len(found["plans"]) == 1 for found in ranks("reducer"))


@pytest.mark.sweep(0.25, "ranks")
def test_ranks_with_batches_of_different_sizes(ranks: Callable) -> None:
    first, second = ranks("uneven")
    assert set(first["rows"]) == {4 * 32} and set(second["rows"]) == {6 * 32}
    assert is_zero_mean(first["z"])


# Draws


def test_draws_follow_the_seed_of_each_rank(ranks: Callable) -> None:
    first, second = ranks("ddp")
    assert torch.equal(first["same_seed"], second["same_seed"])
    assert not torch.equal(first["own_seed"], second["own_seed"])
    assert torch.equal(first["same_seed"], first["own_seed"])  # a seed repeats a step


def test_draws_of_different_seeds_are_independent(ranks: Callable) -> None:
    """Fisher's z of the correlations along 16 directions; the same data on both ranks."""
    errors = [found["projected"].double() - found["projected"].double().mean(0) for found in ranks("ddp")]
    correlation = (errors[0] * errors[1]).sum(0) / (errors[0].norm(dim=0) * errors[1].norm(dim=0))
    assert is_zero_mean(correlation.atanh() * (len(errors[0]) - 3) ** 0.5)


def test_a_layer_that_tensor_parallelism_leaves_whole_needs_equal_seeds(ranks: Callable) -> None:
    first, second = ranks("tensor")
    assert torch.equal(first["same_seed"], second["same_seed"])
    assert not torch.equal(first["own_seed"], second["own_seed"])


# Compressed gradients


def test_hooks_receive_the_sampled_gradients(ranks: Callable) -> None:
    """Each element is off by no more than the rounding of the hook."""
    first, second = ranks("ddp")
    local = torch.stack([first["local"], second["local"]])
    average = local.mean(0)
    torch.testing.assert_close(first["average"], average)
    peaks = local.abs().amax(1).mean()
    bounds = {
        # 11 bits, of either rank and of their sum; 2^-24 is the smallest number.
        "fp16": 2**-11 * (local.abs().mean(0) + average.abs()) * 1.001 + 2**-23,
        "int8": peaks / (2 * 127),
        "int4": peaks / (2 * 7),
    }
    for name, bound in bounds.items():
        error = (first["hooks"][name] - average).abs()
        assert torch.equal(first["hooks"][name], second["hooks"][name])
        assert error.max() > 0 and (error <= bound).all(), name


# Bytes


def test_saved_bytes_of_a_sharded_block(ranks: Callable) -> None:
    for found in ranks("fsdp"):
        measured, predicted = found["bytes"]
        assert measured == predicted
        assert found["graphs"] == 2


def test_sharded_blocks_in_checkpoint_wrappers(ranks: Callable) -> None:
    """What a block reads is stored in 8 bits, and the block computed again from that."""
    for found in ranks("fsdp"):
        (error, size), (error_again, size_again) = found["checkpointed"]
        assert 0 < error < 1e-3 and 0 < error_again < 1e-3
        assert 0 < size_again < 0.3 * size


def test_saved_bytes_of_buckets(ranks: Callable) -> None:
    """What enters a bucket from another one is counted where it is saved."""
    for found in ranks("ddp"):
        measured, predicted = found["bytes"]
        assert measured == predicted
        assert found["graphs"] == len(found["plans"])


def test_saved_bytes_of_tensor_parallelism(ranks: Callable) -> None:
    for found in ranks("tensor"):
        measured, predicted = found["bytes"]
        assert measured == predicted


def test_what_ranks_exchange_is_encoded_around() -> None:
    """Sums over ranks pass errors on as other sums do: a layer in parts stores as few bytes as a whole one."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        shares = []
        for plan in ({}, {"up": ColwiseParallel(), "down": RowwiseParallel()}):
            model = Transformer(64)
            parallelize_module(model.layers[0], mesh, plan)
            ours = wtacrs_fx.backend(Policy(ratio=1.0))
            with small_tensors():
                torch.compile(model, backend=ours)(torch.randint(50, (4, 32)))
            [report] = ours.reports
            shares.append(report.saved_bytes_after / report.saved_bytes_before)
            assert "int6" in {each.encoding for each in report.residuals if each.module == "layers.0.up"}
    finally:
        torch.distributed.destroy_process_group()
    assert shares[1] < 1.2 * shares[0] < 0.25


@pytest.mark.sweep(0.25, "ranks")
def test_float8_in_parallel_tensors_and_sharded(ranks: Callable) -> None:
    """The scales of float8 are the largest of all ranks."""
    pytest.importorskip("torchao")
    for found in ranks("titan"):
        assert found["inductor"][-1] < 0.8 * found["inductor"][0]
        assert (
            found["ours"] == pytest.approx(found["inductor"], rel=3e-3) and found["ours"] != found["inductor"]
        )
        before, after = found["bytes"]
        assert after < 0.3 * before


# Remembered norms


@pytest.mark.sweep(0.25, "ranks")
def test_norms_are_remembered_in_buckets(ranks: Callable) -> None:
    for rank, found in enumerate(ranks("uneven")):
        assert found["weights"]["up"] == found["weights"]["down"] == "||x|| remembered ||dy||"
        assert found["weights"]["head"].startswith("||x||")  # at the start of a bucket: may be forgotten
        before, after = found["norms"]
        own = (torch.arange(10) >= 4) == bool(rank)
        for path in ("up", "down"):
            assert torch.equal(before[path], own) and after[path].all()


# Checkpoints


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_a_new_launch_resumes_bit_for_bit(ranks: Callable, case: str) -> None:
    """Sampled rows as well: the checkpoint has the state of each rank's generator."""
    trained = ranks("ddp"), ranks("fsdp")  # both leave a checkpoint
    for whole, resumed in zip(trained[case == "fsdp"], ranks("resume"), strict=True):
        for name, losses in whole["losses"].items():
            assert len(set(losses)) == 6 and losses[3:] == resumed[case][name], name
