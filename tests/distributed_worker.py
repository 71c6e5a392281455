"""What each rank of test_distributed.py runs: ``torchrun distributed_worker.py CASE FOLDER``."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import RowsOnly, Transformer, z_scores
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_fx.tools.measure import saved_bytes

RUNS = 100
GROUP = 128  # gradients that share a peak in the quantising hook
POLICIES = {"sampled": RowsOnly(ratio=0.3), "exact": Policy(ratio=1.0, residuals="exact")}


class MLP(nn.Module):
    """[batch, positions, d] to a scalar loss."""

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.gelu(self.up(x)))).square().mean()


def transformer(layers: int = 2) -> tuple[Transformer, Tensor]:
    """The same model and the same 8 x 32 tokens on every rank."""
    torch.manual_seed(0)
    return Transformer(64, layers), torch.randint(50, (8, 32))


def shard(batch: Tensor) -> Tensor:
    """The part of a global batch that is this rank's."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def gradient(model: nn.Module, call: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """One forward and backward pass; all gradients as one vector."""
    model.zero_grad()
    call(batch).backward()
    found = [p.grad for p in model.parameters()]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in found])


def seeded(seed: int, model: nn.Module, call: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    torch.manual_seed(seed)
    return gradient(model, call, batch)


def samples(model: nn.Module, call: Callable[[Tensor], Tensor], batch: Tensor, seed: int) -> Tensor:
    """Gradients of RUNS steps: [RUNS, n]."""
    torch.manual_seed(seed)
    return torch.stack([gradient(model, call, batch) for _ in range(RUNS)])


def of_all_ranks(tensor: Tensor) -> Tensor:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return torch.stack(found)


def plans() -> list[dict[str, Any]]:
    return [{**report.to_dict(), "from_cache": None} for report in wtacrs_fx.reports()]


def predicted_bytes() -> int:
    return sum(report.saved_bytes_after for report in wtacrs_fx.reports())


def quantise_hook(bits: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients of a few bits: round to nearest, with a peak for each group."""
    top = 2 ** (bits - 1) - 1
    flat = bucket.buffer()
    groups = F.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    peaks = groups.abs().amax(1, keepdim=True).clamp(min=1e-30)
    codes = (groups / peaks * top).round().to(torch.int8)
    decoded = of_all_ranks(codes).float() / top * of_all_ranks(peaks)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(decoded.mean(0).flatten()[: len(flat)])
    return future


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    before = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1024  # else no bucket may be smaller than 1 MiB
    yield
    dist._DEFAULT_FIRST_BUCKET_BYTES = before


def ddp() -> dict[str, Any]:
    """Buckets, each a graph of its own; draws; saved bytes; compressed gradients."""
    model, tokens = transformer(1)
    exact = gradient(model, model, tokens)
    half = gradient(model, model, shard(tokens))
    backend = wtacrs_fx.backend(RowsOnly(ratio=0.3))
    mine = shard(tokens)
    found: dict[str, Any] = {"exact": exact}
    with small_buckets():
        parallel = DistributedDataParallel(model, bucket_cap_mb=0.1)
        compiled = torch.compile(parallel, backend=backend)
        average = seeded(dist.get_rank(), model, compiled, mine)
        found["plans"] = plans()
        drawn = samples(model, compiled, mine, 100 + dist.get_rank())
        found["z"], found["z_of_half"] = z_scores(drawn, exact), z_scores(drawn, half)

        with parallel.no_sync():
            local = seeded(dist.get_rank(), model, compiled, mine)
            found["same_seed"] = seeded(7, model, compiled, tokens[:4])
            found["own_seed"] = seeded(7 + dist.get_rank(), model, compiled, tokens[:4])
            directions = torch.randn(16, len(exact), generator=torch.Generator().manual_seed(1))
            found["projected"] = samples(model, compiled, tokens[:4], 100 + dist.get_rank()) @ directions.T
            known = [*model.parameters(), *model.buffers(), mine]
            found["bytes"] = saved_bytes(lambda: compiled(mine), known), predicted_bytes()
        found["graphs"] = len(wtacrs_fx.reports())

        found["average"], found["local"] = average, local
        hooks = {
            "fp16": fp16_compress_hook,
            "int8": lambda _, bucket: quantise_hook(8, bucket),
            "int4": lambda _, bucket: quantise_hook(4, bucket),
        }
        found["hooks"] = {}
        for name, hook in hooks.items():
            del parallel, compiled
            parallel = DistributedDataParallel(model, bucket_cap_mb=0.1)
            parallel.register_comm_hook(None, hook)
            compiled = torch.compile(parallel, backend=backend)
            found["hooks"][name] = seeded(dist.get_rank(), model, compiled, mine)
        found["losses"] = {name: train("ddp", name, range(6)) for name in POLICIES}
    return found


def uneven() -> dict[str, Any]:
    """Batches of 4 and 6 samples; rows chosen in the forward pass by remembered norms."""
    torch.manual_seed(0)
    model = MLP()
    batches = torch.randn(10, 32, 64).split([4, 6])
    ids = torch.arange(10).split([4, 6])[dist.get_rank()]
    exact = torch.stack([gradient(model, model, batch) for batch in batches]).mean(0)
    tracker = wtacrs_fx.track_gradient_norms(model, num_samples=10, seq_len=32)
    with small_buckets():
        parallel = DistributedDataParallel(model, bucket_cap_mb=0.06)
        backend = wtacrs_fx.backend(RowsOnly(ratio=0.3, placement="forward"))
        compiled = torch.compile(parallel, backend=backend)
        torch.manual_seed(100 + dist.get_rank())
        drawn = []
        for _ in range(RUNS):
            with tracker.batch(ids):
                drawn.append(gradient(model, compiled, batches[dist.get_rank()]))
    sites = [site for report in wtacrs_fx.reports() for site in report.sites]
    found: dict[str, Any] = {"z": z_scores(torch.stack(drawn), exact), "rows": [site.rows for site in sites]}
    found["weights"] = {site.module: site.weights for site in sites}
    before = {path: record[:-1].ne(0).any(1) for path, record in tracker.records.items()}
    tracker.synchronise()
    after = {path: record[:-1].ne(0).any(1) for path, record in tracker.records.items()}
    found["norms"] = before, after
    return found


def reducer() -> dict[str, Any]:
    """One graph; the gradients are reduced in the backward pass that compiled autograd traces."""
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(8, 32, 64)
    exact = gradient(model, model, x)
    torch._dynamo.config.optimize_ddp = "python_reducer"
    torch._dynamo.config.compiled_autograd = True
    parallel = DistributedDataParallel(model)

    def step(batch: Tensor) -> None:
        parallel(batch).backward()

    compiled = torch.compile(step, backend=wtacrs_fx.backend(RowsOnly(ratio=0.3)))
    torch.manual_seed(100 + dist.get_rank())
    drawn = []
    for _ in range(RUNS):
        model.zero_grad()
        compiled(shard(x))
        drawn.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    counts = torch._dynamo.utils.counters["compiled_autograd"]
    return {"z": z_scores(torch.stack(drawn), exact), "plans": plans(), "captures": counts["captures"]}


def shard_blocks(model: Transformer, policy: Policy) -> nn.Module:
    """Shard and compile block by block."""
    for layer in model.layers:
        fully_shard(layer)
        layer.compile(backend=wtacrs_fx.backend(policy))
    fully_shard(model)
    return model


def replicate(model: Transformer, policy: Policy) -> nn.Module:
    """Compile bucket by bucket."""
    parallel = DistributedDataParallel(model, bucket_cap_mb=0.1)
    return torch.compile(parallel, backend=wtacrs_fx.backend(policy))


PARALLEL = {"ddp": replicate, "fsdp": shard_blocks}


def fsdp() -> dict[str, Any]:
    """Sampled blocks, their draws and bytes; then a training of six steps, saved after three."""
    reference, tokens = transformer()
    exact = gradient(reference, reference, tokens)
    model, _ = transformer()
    shard_blocks(model, POLICIES["sampled"])
    found: dict[str, Any] = {
        "z": z_scores(samples(model, model, shard(tokens), 100 + dist.get_rank()), exact),
        "plans": plans(),
    }

    layer = model.layers[0]
    layer.unshard()
    x = torch.randn(4, 32, 64, requires_grad=True) * 1  # as it is in the model: not kept by who made it
    measured = saved_bytes(lambda: layer(x).sum(), [*layer.parameters()])
    found["bytes"] = measured, wtacrs_fx.reports()[0].saved_bytes_after
    found["graphs"] = len(wtacrs_fx.reports())
    found["losses"] = {name: train("fsdp", name, range(6)) for name in POLICIES}
    found["checkpointed"] = checkpointed(tokens, exact)
    return found


def checkpointed(tokens: Tensor, exact: Tensor) -> list[tuple[float, int]]:
    """Return squared errors of the gradient, beside its square, and bytes of a block, without and with checkpoints."""
    found = []
    for wrap in (lambda layer: layer, checkpoint_wrapper):
        model, _ = transformer()
        model.layers = nn.ModuleList(map(wrap, model.layers))
        shard_blocks(model, Policy(ratio=1.0, product="exact"))
        gradients = gradient(model, model, shard(tokens))
        error = float((gradients - exact).square().sum() / exact.square().sum())
        found.append((error, wtacrs_fx.reports()[-1].saved_bytes_after))
    return found


def resume() -> dict[str, Any]:
    """The last three steps of each training, in new processes."""
    with small_buckets():
        return {kind: {name: train(kind, name, range(3, 6)) for name in POLICIES} for kind in PARALLEL}


def train(kind: str, name: str, steps: range) -> list[float]:
    """Train from scratch, or from the checkpoint before the first step; return the losses of this rank."""
    folder = Path(sys.argv[2]) / f"{kind}-{name}"
    model, tokens = transformer(1)
    call = PARALLEL[kind](model, POLICIES[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(dist.get_rank())
    losses = []
    for step in steps:
        if step == 3:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            generator = folder.with_suffix(f".{dist.get_rank()}")
            if steps.start == 0:
                dcp.save(state, checkpoint_id=folder)
                torch.save(torch.get_rng_state(), generator)
            else:
                dcp.load(state, checkpoint_id=folder)
                set_state_dict(
                    model,
                    optimizer,
                    model_state_dict=state["model"],
                    optim_state_dict=state["optimizer"],
                )
                torch.set_rng_state(torch.load(generator))
        loss = call(shard(tokens))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tensor() -> dict[str, Any]:
    """A column-wise and a row-wise linear; the head is left whole on every rank."""
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(4, 32, 64)
    exact = gradient(model, model, x)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    compiled = torch.compile(model, backend=wtacrs_fx.backend(RowsOnly(ratio=0.3)))
    found: dict[str, Any] = {"z": z_scores(samples(model, compiled, x, 100), exact), "plans": plans()}
    for name, seed in {"same_seed": 7, "own_seed": 7 + dist.get_rank()}.items():
        seeded(seed, model, compiled, x)
        found[name] = model.head.weight.grad
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    found["bytes"] = saved_bytes(lambda: compiled(x), [*weights, x]), predicted_bytes()
    return found


def titan() -> dict[str, Any]:
    """As torchtitan trains: a block in float8, parallel in tensors, sharded and compiled.

    Not checkpointed as well: Inductor fails at that together with parallel tensors (torch 2.13).
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_tensor_parallel import Float8ColwiseParallel, Float8RowwiseParallel

    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    found: dict[str, Any] = {}  # losses
    for name, backend in {"inductor": "inductor", "ours": wtacrs_fx.backend(Policy(ratio=1.0))}.items():
        model, tokens = transformer(1)
        for layer in model.layers:
            convert_to_float8_training(layer, config=Float8LinearConfig(emulate=True))
            plan = {"up": Float8ColwiseParallel(), "down": Float8RowwiseParallel()}
            parallelize_module(layer, mesh["tensor"], plan)
            layer.compile(backend=backend)
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found[name] = losses
    [report] = wtacrs_fx.reports()
    return {**found, "bytes": (report.saved_bytes_before, report.saved_bytes_after)}


def main() -> None:
    case, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    torch.set_num_threads(1)
    found = CASES[case](*sys.argv[3:])
    torch.save(found, folder / f"{case}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a DistributedDataParallel that outlives its process group may wait for ever


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "ddp": ddp,
    "uneven": uneven,
    "reducer": reducer,
    "fsdp": fsdp,
    "resume": resume,
    "tensor": tensor,
    "titan": titan,
}

if __name__ == "__main__":
    main()
