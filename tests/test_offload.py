"""Residuals that wait in a file: what comes back, what it costs in memory, and what goes wrong with a disk."""

from __future__ import annotations

import copy
import errno
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from aot import small_tensors
from conftest import Transformer, gradients
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import wtacrs_fx
from wtacrs_fx import Policy, PolicyError
from wtacrs_fx.tools import measure
from wtacrs_passes.decide import offload as decide
from wtacrs_passes.graph.cones import is_tangent
from wtacrs_passes.maths import offload
from wtacrs_passes.maths.offload import OffloadError, bring_back, put_away

ENCODED = {"ratio": 1.0, "product": "exact"}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path)
    offload._STORES.clear()


def back(ticket: Tensor, x: Tensor, folder: str) -> Tensor:
    return bring_back(ticket, x.shape, x.dtype, x.device, folder)


def store_of(folder: str) -> Any:
    return offload._store(folder)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 1024), (7, 4096)])
def test_what_comes_back_is_what_was_put_away(
    dtype: torch.dtype, shape: tuple[int, ...], folder: str
) -> None:
    xs = [torch.randint(100, shape).to(dtype) for _ in range(5)]
    tickets = [put_away(x, folder) for x in xs]
    for _ in range(2):  # a graph that is kept is read twice
        for ticket, x in reversed(list(zip(tickets, xs, strict=True))):
            assert torch.equal(back(ticket, x, folder), x)


def test_what_is_returned_is_nobody_elses(folder: str) -> None:
    x = torch.randn(64, 64)
    ticket = put_away(x.T, folder)
    back(ticket, x, folder).zero_()
    assert torch.equal(back(ticket, x, folder), x.T)


def test_room_is_used_again_once_tickets_are_dropped(folder: str) -> None:
    def put() -> list[Tensor]:
        return [put_away(torch.randn(64, 64), folder) for _ in range(8)]

    tickets = put()
    store = store_of(folder)
    for entry in store.entries.values():
        entry.write.result()
    size = store._end
    del tickets
    gc.collect()
    store.sweep()
    assert not store.entries
    tickets = put()
    assert store._end == size and len(store.entries) == len(tickets)


def test_the_file_has_no_name(folder: str) -> None:
    ticket = put_away(torch.randn(64, 64), folder)
    assert os.listdir(folder) == [] and len(ticket) == 1


def test_several_threads(folder: str) -> None:
    def there_and_back(seed: int) -> bool:
        x = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed))
        tickets = [put_away(x + i, folder) for i in range(10)]
        return all(torch.equal(back(tickets[i], x, folder), x + i) for i in reversed(range(10)))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(there_and_back, range(8)))


def test_little_waits_in_memory(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_WAITING", 2**18)
    x = torch.randn(2**14)  # 64 KiB
    tickets = [put_away(x + i, folder) for i in range(64)]
    store = store_of(folder)
    waiting = sum(e.size for e in store.entries.values() if not e.write.done())
    assert waiting <= 2**18 + 2**16
    for i in reversed(range(64)):
        assert torch.equal(back(tickets[i], x, folder), x + i)
        assert sum(e.size for e in store.entries.values() if e.read) <= 2**18


# A disk that fails


def fail(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OffloadError, match="must have room for all that waits .*No space left on device"):
        put_away(torch.randn(64, 64), folder)


@pytest.mark.parametrize("name", ["pwrite", "preadv"])
def test_a_disk_that_fails_later(name: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, name, fail)
    x = torch.randn(64, 64)
    ticket = put_away(x, folder)
    with pytest.raises(OffloadError, match="cannot be written or read .*; give Policy"):
        back(ticket, x, folder)


def test_a_folder_that_is_missing(folder: str) -> None:
    with pytest.raises(OffloadError, match="a folder that can be written to"):
        put_away(torch.randn(4), f"{folder}/missing")
    with pytest.raises(PolicyError, match="the folder of offload must exist"):
        Policy(offload=f"disk:{folder}/missing")


def test_a_folder_that_is_removed_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    x = torch.randn(64, 64)
    ticket = put_away(x, str(folder))
    folder.rmdir()
    assert torch.equal(back(ticket, x, str(folder)), x)


def test_nothing_is_left_of_a_killed_process(folder: str) -> None:
    script = (
        "import os, signal, sys, torch\n"
        "from wtacrs_passes.maths.offload import put_away\n"
        "tickets = [put_away(torch.randn(512, 512), sys.argv[1]) for _ in range(4)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script, folder], env=environment)
    assert done.returncode == -9 and os.listdir(folder) == []


# Compiled


class Model(nn.Module):
    """Tokens to a loss, wide enough that codes are worth the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Transformer(d=128, layers=1, dropout=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens)
        return loss


TOKENS = torch.randint(50, (16, 128), generator=torch.Generator().manual_seed(0))


def test_gradients_are_the_same_bit_for_bit(folder: str) -> None:
    gm = wtacrs_fx.capture(Model(), TOKENS)
    primals, tangents = (
        [torch.randint(50, x.shape) if x.dtype is torch.int64 else torch.randn(x.shape) / 8 for x in group]
        for group in values_of(gm)
    )
    found = []
    for place in (None, f"disk:{folder}"):
        rewritten = wtacrs_fx.transform(gm, Policy(**ENCODED, offload=place))
        torch.manual_seed(1)
        with small_tensors():  # in one thread the embedding's gradient is summed up in one order
            found.append(tree_leaves(rewritten(primals, tangents)))
    assert "wait in disk:" in rewritten.report.notes[0]
    for here, there in zip(*found, strict=True):
        assert here is there is None or torch.equal(here, there)


def values_of(gm: torch.fx.GraphModule) -> tuple[list[Tensor], list[Tensor]]:
    """Return the example values of primals and of tangents."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return tuple([n.meta["val"] for n in nodes if is_tangent(n) is which] for which in (False, True))


def test_a_compiled_step_keeps_less_and_survives_a_full_disk(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model, backend = Model(), wtacrs_fx.backend(Policy(**ENCODED, offload=f"disk:{folder}"))
    call = torch.compile(model, backend=backend)

    def step() -> Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = call(TOKENS)
        return loss

    loss = step()
    loss.backward(retain_graph=True)
    once = copy.deepcopy(gradients(model))
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name])
    del loss
    saved = measure.saved_bytes(step, [*model.parameters(), TOKENS])
    assert backend.reports[-1].saved_bytes_after == saved < 0.2 * backend.reports[-1].saved_bytes_before
    gc.collect()
    store = store_of(folder)
    store.sweep()
    assert not store.entries and os.listdir(folder) == []

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        store._free.clear()
        with pytest.raises(OffloadError, match="it is full"):
            step()
    model.zero_grad()
    step().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, once[name])


def test_only_what_goes_while_the_forward_pass_computes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for rate in (1e2, 1e8, 1e12):
        monkeypatch.setattr(decide, "bytes_per_second", lambda place, rate=rate: rate)
        report = wtacrs_fx.explain(Model(), TOKENS, policy=Policy(**ENCODED, offload=f"disk:{folder}"))
        counts.append(report.saved_bytes_after)
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("place", ["disk:", "disk", "hosts", 3])
def test_a_place_that_is_none(place: Any) -> None:
    with pytest.raises(PolicyError, match="offload must be 'host', 'disk:<folder>' or None"):
        Policy(offload=place)


def test_a_place_that_is_for_another_device() -> None:
    with pytest.raises(PolicyError, match="offload='host' is for residuals on cuda, got a model on cpu"):
        wtacrs_fx.explain(Model(), TOKENS, policy=Policy(**ENCODED, offload="host"))


def test_cuda_graphs_do_not_wait_for_the_host() -> None:
    with pytest.raises(PolicyError, match="CUDA graphs cannot wait for the host"):
        wtacrs_fx.backend(Policy(offload="host"), mode="reduce-overhead")


def test_measuring_a_folder_leaves_no_file_open(folder: str) -> None:
    opened = len(os.listdir("/proc/self/fd"))
    assert offload.measure_writing(folder) > 0
    assert len(os.listdir("/proc/self/fd")) == opened and os.listdir(folder) == []
