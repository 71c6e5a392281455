"""Small models, one compiled function for each policy, and the statistical test of unbiasedness."""

from __future__ import annotations

import copy
import functools
import os
import random
import statistics
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for torch: threads that spin starve others

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which Inductor does

os.environ["WTACRS_STRICT"] = "1"  # what goes wrong in the backend is raised
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # fail at once where a test names a model that is not there

import wtacrs_fx
from wtacrs_fx import Policy
from wtacrs_fx.capture import STATIC_INPUTS, count_forward_outputs
from wtacrs_passes.graph import torch_api
from wtacrs_passes.joint import Joint
from wtacrs_passes.pipeline import Pass, run

RowsOnly = functools.partial(Policy, ratio=0.3, residuals="exact", min_features=1)
"""A policy that samples rows and stores everything else as Inductor would."""

torch.set_num_threads(2)
torch._dynamo.config.recompile_limit = 64


class Block(nn.Module):
    """A pre-norm transformer block: [batch, tokens, d] to the same."""

    def __init__(self, d: int = 32, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(attention), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), self.dropout, self.training)


class Transformer(nn.Module):
    """Tokens [batch, tokens] to a scalar loss."""

    def __init__(self, d: int = 32, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, d)
        self.layers = nn.ModuleList(Block(d, dropout=dropout) for _ in range(layers))
        self.head = nn.Linear(d, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(1, 1).flatten())


def seed_of_run(variable: str) -> int:
    """Return the seed that a variable of the environment gives, or one for all workers: they collect the same tests."""
    if given := os.environ.get(variable):
        return int(given)
    return random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(2**32)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the cases of a test marked ``sweep(share)`` keep that share, at random; all where they are asked for by name.

    Tests marked ``sweep(share, group)`` are cases of one.

    ``make sweeps`` runs all of them; ``WTACRS_SWEEPS_SEED`` repeats a choice.
    """
    if os.environ.get("WTACRS_SWEEPS") == "all" or any("::" in argument for argument in config.args):
        return
    cases: dict[object, list[pytest.Item]] = {}
    for item in items:
        if marker := item.get_closest_marker("sweep"):
            cases.setdefault(marker.args[1:] or item.nodeid.partition("[")[0], []).append(item)
    dropped: set[pytest.Item] = set()
    for name, those in cases.items():
        share = those[0].get_closest_marker("sweep").args[0]
        count = max(1, round(share * len(those)))
        kept = random.Random(f"{seed_of_run(SWEEPS_SEED)} {name}").sample(those, count)
        dropped.update(item for item in those if item not in kept)
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=list(dropped))


SWEEPS_SEED = "WTACRS_SWEEPS_SEED"


def pytest_report_header() -> str:
    return f"{SWEEPS_SEED}={seed_of_run(SWEEPS_SEED)}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the squared error of all gradients, beside their squares."""
    error = sum(float((found[name] - exact[name]).double().square().sum()) for name in exact)
    return error / sum(float(each.double().square().sum()) for each in exact.values())


def step(model: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    """Run one forward and backward pass; return the gradients."""
    model.zero_grad()
    call(*inputs).backward()
    return gradients(model)


def slopes(model: nn.Module, loss: Callable[[], Tensor], steps: int = 6) -> tuple[Tensor, Tensor]:
    """Return the slope of a loss along random directions, by its gradient and by differences.

    The loss draws the same random numbers each time, so that its dropout is the same.
    """

    def seeded() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return loss()

    parameters = dict(model.named_parameters())
    model.zero_grad()
    seeded().backward()
    found, wanted = [], []
    for _ in range(steps):
        direction = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
        found.append(sum((parameters[name].grad * d).sum() for name, d in direction.items()))
        ends = []
        for step in (1e-3, -2e-3, 1e-3):  # and back
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter += step * direction[name]
            ends.append(seeded().detach())
        wanted.append((ends[0] - ends[1]) / 2e-3)
    return torch.stack(found), torch.stack(wanted)


def run_passes(gm: fx.GraphModule, *passes: Pass, policy: Policy | None = None) -> Joint:
    """Run passes over a captured graph, in place; none of them partitions it."""
    table = gm.meta.get(STATIC_INPUTS, ())
    outputs = count_forward_outputs(gm.graph)
    return run(passes, gm, policy or Policy(ratio=0.3), table, outputs, torch_api.default_partition)


def adds_up(report: wtacrs_fx.Report) -> bool:
    """Tell whether the lines of a report account for every byte of its totals, once."""
    lines = (*report.sites, *report.residuals)
    totals = report.saved_bytes_before, report.saved_bytes_after
    return totals == (sum(line.bytes_before for line in lines), sum(line.bytes_after for line in lines))


def centring_errors(device: str) -> tuple[float, float]:
    """Return the squared error of dW over 50 steps, without centring and with it.

    Rows of X in bfloat16 lie around a mean that is five times their spread.
    """
    torch.manual_seed(0)
    x = (5 + torch.randn(512, 64)).to(device, torch.bfloat16)
    layer = nn.Linear(64, 64, bias=False).to(device, torch.bfloat16)
    layer(x).sin().sum().backward()
    exact, errors = layer.weight.grad.float(), []
    for center in (False, True):
        policy = RowsOnly(ratio=0.25, min_rows=8, center=center)
        call = torch.compile(lambda x: layer(x).sin().sum(), backend=wtacrs_fx.backend(policy))
        error = 0.0
        for _ in range(50):
            layer.zero_grad()
            call(x).backward()
            error += (layer.weight.grad.float() - exact).square().sum().item()
        errors.append(error)
    plain, centred = errors
    return plain, centred


@pytest.fixture(scope="session")
def transformer() -> tuple[Transformer, Tensor]:
    """A model without dropout and its batch of 4 x 32 tokens."""
    torch.manual_seed(0)
    return Transformer(), torch.randint(50, (4, 32))


@pytest.fixture(scope="session")
def compiled(transformer: tuple[Transformer, Tensor]) -> Callable[[Policy | str], tuple]:
    """Compile the transformer once for each policy: ``(model, compiled, tokens, report)``."""
    model, tokens = transformer

    @functools.cache
    def compile_with(policy: Policy | str) -> tuple:
        mine = copy.deepcopy(model)
        backend = wtacrs_fx.backend(policy) if isinstance(policy, Policy) else policy
        call = torch.compile(mine, backend=backend)
        step(mine, call, tokens)
        report = wtacrs_fx.reports()[-1] if isinstance(policy, Policy) else None
        return mine, call, tokens, report

    return compile_with


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


ALPHA = 1e-4
"""Significance of each statistical test: the chance that it fails although nothing is biased."""


def z_scores(samples: Tensor, exact: Tensor, directions: int = 16) -> Tensor:
    """Return the z scores of the sample mean against `exact` along random directions.

    Args:
        samples: [runs, n]; exact: [n].
    """
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (exact.numel(), directions), generator=generator).double() * 2 - 1
    error = (samples.double() - exact.double()) @ signs
    return error.mean(0) / (error.std(0) / len(samples) ** 0.5).clamp(min=1e-30)


def is_unbiased(samples: Tensor, exact: Tensor) -> bool:
    """Test the mean of `samples` [runs, n] against `exact` [n] at significance ALPHA (Bonferroni)."""
    scores = z_scores(samples, exact)
    limit = statistics.NormalDist().inv_cdf(1 - ALPHA / (2 * len(scores)))
    return bool(scores.abs().max() < limit)
