"""The backend end to end: compiled code, its gradients, bytes, caches and errors."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import RowsOnly, Transformer, gradients, is_unbiased, step
from torch import Tensor, nn

import wtacrs_fx
from wtacrs_fx import PatternWarning, Policy, PolicyError, Rule
from wtacrs_fx.tools.measure import saved_bytes

BACKWARD = RowsOnly(min_rows=8, placement="backward")
FORWARD = RowsOnly(min_rows=8, placement="forward")
EXACT = RowsOnly(ratio=1.0)
UNORDERED = "embed.weight"
"""Inductor's threads add up the gradient of an embedding in any order: no two steps agree to the last bit."""


def kept_bytes(model: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Return the bytes that one step really keeps for its backward pass, less parameters and inputs."""
    return saved_bytes(lambda: call(*inputs), [*model.parameters(), *model.buffers(), *inputs])


def test_ratio_one_is_bit_identical_to_inductor(compiled: Callable) -> None:
    ours, theirs = (
        step(model, call, tokens) for model, call, tokens, _ in (compiled(EXACT), compiled("inductor"))
    )
    torch.testing.assert_close(ours.pop(UNORDERED), theirs.pop(UNORDERED))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("policy", [BACKWARD, FORWARD], ids=["backward", "forward"])
def test_gradients_are_unbiased(compiled: Callable, policy: Policy) -> None:
    model, call, tokens, report = compiled(policy)
    exact = step(*compiled("inductor")[:3])
    sampled = {site.parameter for site in report.sampled}
    runs: list[dict[str, Tensor]] = [step(model, call, tokens) for _ in range(300)]
    for name, gradient in exact.items():
        samples = torch.stack([run[name].flatten() for run in runs])
        if name in sampled:
            assert samples.std(0).max() > 0, name
            assert is_unbiased(samples, gradient.flatten()), name
        else:
            torch.testing.assert_close(samples[0], gradient.flatten())


def test_exact_norms_beat_activation_norms(compiled: Callable) -> None:
    exact = step(*compiled("inductor")[:3])

    def variance(policy: Policy) -> float:
        model, call, tokens, report = compiled(policy)
        runs = [step(model, call, tokens) for _ in range(50)]
        names = [site.parameter for site in report.sampled]
        return sum(
            float(
                sum((run[n] - exact[n]).square().sum() for run in runs) / len(runs) / exact[n].square().sum()
            )
            for n in names
        ) / len(names)

    assert variance(BACKWARD) < variance(FORWARD)


@pytest.mark.parametrize("policy", [BACKWARD, FORWARD], ids=["backward", "forward"])
def test_bytes_of_the_report_are_those_kept_at_run_time(compiled: Callable, policy: Policy) -> None:
    model, call, tokens, report = compiled(policy)
    assert kept_bytes(model, call, tokens) == pytest.approx(report.saved_bytes_after, rel=0.02)
    baseline, compiled_baseline, _, _ = compiled("inductor")
    assert kept_bytes(baseline, compiled_baseline, tokens) == pytest.approx(
        report.saved_bytes_before, rel=0.02
    )
    assert report.saved_bytes_after < 0.75 * report.saved_bytes_before


def test_reproducible_under_manual_seed_and_fresh_otherwise(compiled: Callable) -> None:
    model, call, tokens, _ = compiled(BACKWARD)
    torch.manual_seed(3)
    first, second = step(model, call, tokens), step(model, call, tokens)
    torch.manual_seed(3)
    again = step(model, call, tokens)
    names = [name for name in first if name != UNORDERED]
    assert all(torch.equal(first[name], again[name]) for name in names)
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_gradient_accumulation_draws_anew_in_each_micro_batch(compiled: Callable) -> None:
    model, call, tokens, _ = compiled(BACKWARD)
    torch.manual_seed(5)
    parts = [step(model, call, tokens) for _ in range(2)]
    torch.manual_seed(5)
    model.zero_grad()
    for _ in range(2):
        call(tokens).backward()
    total = gradients(model)["head.weight"]
    torch.testing.assert_close(total, parts[0]["head.weight"] + parts[1]["head.weight"])
    assert not torch.equal(parts[0]["head.weight"], parts[1]["head.weight"])


def test_inference_is_untouched(compiled: Callable) -> None:
    model, call, tokens, _ = compiled(BACKWARD)
    before = len(wtacrs_fx.reports())
    with torch.no_grad():
        torch.testing.assert_close(call(tokens), model(tokens))
    assert len(wtacrs_fx.reports()) == before


@pytest.fixture(scope="module")
def dropped() -> tuple[Transformer, Callable, Callable, Tensor]:
    """Two copies of a model with dropout, one compiled by each backend."""
    torch.manual_seed(0)
    model, tokens = Transformer(dropout=0.2), torch.randint(50, (4, 32))
    other = copy.deepcopy(model)
    return (
        model,
        torch.compile(model, backend=wtacrs_fx.backend(BACKWARD)),
        torch.compile(other, backend="inductor"),
        tokens,
    )


def test_dropout_masks_are_those_of_inductor(dropped: tuple) -> None:
    _, ours, theirs, tokens = dropped
    torch.manual_seed(1)
    loss = ours(tokens)
    torch.manual_seed(1)
    assert torch.equal(loss, theirs(tokens))


def test_draws_do_not_depend_on_dropout(dropped: tuple) -> None:
    """Under one dropout mask the draws still vary: no seed is shared (unbiasedness given the mask)."""
    model, ours, theirs, tokens = dropped
    seeds = torch.randint(2**62, (200,))
    errors = []
    for seed in seeds.tolist():
        torch.manual_seed(seed)
        mine = step(model, ours, tokens)["layers.0.up.weight"]
        torch.manual_seed(seed)
        other = theirs._orig_mod
        exact = step(other, theirs, tokens)["layers.0.up.weight"]
        errors.append((mine - exact).flatten())
    assert is_unbiased(torch.stack(errors), torch.zeros_like(errors[0]))


def test_autocast_bfloat16() -> None:
    model, tokens = Transformer(), torch.randint(50, (4, 32))
    other = copy.deepcopy(model)
    call = torch.compile(model, backend=wtacrs_fx.backend(BACKWARD))

    def loss(function: Callable[..., Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(tokens)

    loss(other).backward()
    exact = gradients(other)
    runs = []
    for _ in range(100):
        model.zero_grad()
        loss(call).backward()
        runs.append(gradients(model)["layers.0.up.weight"].flatten())
    assert {s.module for s in wtacrs_fx.reports()[-1].sampled} >= {"layers.0.q", "layers.0.down", "head"}
    mean = torch.stack(runs).mean(0)
    error = (mean - exact["layers.0.up.weight"].flatten()).norm() / mean.norm()
    spread = torch.stack(runs).std(0).norm() / mean.norm() / len(runs) ** 0.5
    # bfloat16 rounds each row to 2^-9; the sum over rows stays below that
    assert error < 4 * spread + 2**-8


@pytest.fixture(scope="module")
def dynamic() -> tuple[Transformer, Callable]:
    model = Transformer()
    return model, torch.compile(model, backend=wtacrs_fx.backend(BACKWARD), dynamic=True)


def test_dynamic_shapes(dynamic: tuple) -> None:
    model, call = dynamic
    other = copy.deepcopy(model)
    before = len(wtacrs_fx.reports())
    for batch, length in [(4, 32), (6, 40), (3, 64)]:
        tokens = torch.randint(50, (batch, length))
        exact = step(other, other, tokens)["layers.0.down.weight"].flatten()
        runs = torch.stack([step(model, call, tokens)["layers.0.down.weight"].flatten() for _ in range(100)])
        assert is_unbiased(runs, exact)
    reports = wtacrs_fx.reports()[before:]
    assert len(reports) == 1  # one graph for all shapes
    site = next(s for s in reports[0].sampled if s.module == "layers.0.down")
    symbols = sorted(site.rows.free_symbols, key=str)
    assert site.rows.subs(dict(zip(symbols, (4, 32), strict=True))) == 128
    assert site.kept.subs(dict(zip(symbols, (4, 32), strict=True))) == 39
    assert str(symbols[0]) in str(reports[0])


def test_dynamic_shapes_with_fewer_rows_than_min_rows_are_exact(dynamic: tuple) -> None:
    model, call = dynamic
    other = copy.deepcopy(model)
    tokens = torch.randint(50, (2, 3))
    exact, ours = step(other, other, tokens), step(model, call, tokens)
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], msg=name)


def test_several_graphs() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            torch._dynamo.graph_break()
            return self.second(x).square().mean()

    model, x = Broken(), torch.randn(128, 16)
    before = len(wtacrs_fx.reports())
    call = torch.compile(model, backend=wtacrs_fx.backend(BACKWARD))
    samples = [step(model, call, x) for _ in range(200)]
    model.zero_grad()
    model(x).backward()
    for name in ("first.weight", "second.weight"):
        assert is_unbiased(
            torch.stack([s[name].flatten() for s in samples]), gradients(model)[name].flatten()
        )
    modules = [{site.module for site in report.sampled} for report in wtacrs_fx.reports()[before:]]
    assert modules == [{"first"}, {"second"}]


def test_options_of_torch_compile() -> None:
    model, x = nn.Linear(32, 32), torch.randn(128, 32)
    options = {
        "wtacrs.ratio": 0.5,
        "wtacrs.estimator": "wta-crs",
        "wtacrs.placement": "forward",
        "epilogue_fusion": True,
    }
    step(model, torch.compile(lambda x: model(x).sum(), backend="wtacrs", options=options), x)
    site = wtacrs_fx.reports()[-1].sites[0]
    assert (site.kept, site.estimator, site.placement) == (64, "wta-crs", "forward")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wtacrs.ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5; use 1.0 for exact gradients"),
        ({"wtacrs.ration": 0.3}, "did you mean 'wtacrs.ratio'"),
        ({"max_autotun": True}, "did you mean 'max_autotune'"),
        ({"custom_partitioner_fn": None}, "set by the wtacrs backend"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    call = torch.compile(nn.Linear(4, 4), backend="wtacrs", options=options)
    with pytest.raises(Exception, match=message):
        call(torch.randn(64, 4))


def test_bad_arguments_of_backend() -> None:
    with pytest.raises(PolicyError, match="did you mean 'max_autotune'"):
        wtacrs_fx.backend(max_autotun=True)
    with pytest.raises(PolicyError, match="did you mean 'max-autotune'"):
        wtacrs_fx.backend(mode="max-autotun")
    with pytest.raises(PolicyError, match="must be a wtacrs_fx.Policy"):
        wtacrs_fx.backend("inductor")  # type: ignore[arg-type]
    with pytest.raises(Exception, match="has its options already"):
        torch.compile(nn.Linear(4, 4), backend=wtacrs_fx.backend(), options={"wtacrs.ratio": 0.1})(
            torch.ones(64, 4)
        )


def test_pattern_that_matches_nothing_warns_by_name() -> None:
    policy = RowsOnly(exclude=("heda",), rules=(Rule("0", ratio=0.5),))
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.warns(PatternWarning, match="'heda'") as caught:
        step(
            model,
            torch.compile(lambda x: model(x).sum(), backend=wtacrs_fx.backend(policy)),
            torch.randn(128, 16),
        )
    assert len(caught) == 1  # the rule did match


def test_default_policy_does_not_warn() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PatternWarning)
        step(
            model, torch.compile(lambda x: model(x).sum(), backend=wtacrs_fx.backend()), torch.randn(128, 16)
        )


CACHED = """
import torch, wtacrs_fx
torch.manual_seed(0)
model, x = torch.nn.Linear(32, 12), torch.randn(128, 32)
for ratio in {ratios}:
    torch._dynamo.reset()
    backend = wtacrs_fx.backend(wtacrs_fx.Policy(ratio=ratio))
    call = torch.compile(lambda x: model(x).square().mean(), backend=backend)
    call(x).backward()
from torch._dynamo.utils import counters
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(*((r.sites[0].kept, r.from_cache) for r in wtacrs_fx.reports()), hits)
"""


def test_reports_of_cached_code(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def run(*ratios: float) -> list[str]:
        environment = {**__import__("os").environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-W", "ignore", "-c", CACHED.format(ratios=ratios)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.split()

    assert run(0.5) == ["(64,", "False)", "0"]
    again = ["(64,", "True)"]
    assert run(0.5, 0.5, 0.3) == [*again, *again, "(39,", "False)", "2"]  # another policy is another key
    for path in tmp_path.glob("wtacrs_reports/*"):
        path.unlink()
    assert run(0.5) == ["(64,", "True)", "1"]  # a lost report is said again, with the code of the cache


def test_activation_checkpointing() -> None:
    """The checkpointed block is recomputed in the backward pass; its rows are drawn once all the same."""

    class Checkpointed(Transformer):
        def forward(self, tokens: Tensor) -> Tensor:
            x = torch.utils.checkpoint.checkpoint(self.layers[0], self.embed(tokens), use_reentrant=False)
            return self.head(x).square().mean()

    model, tokens = Checkpointed(), torch.randint(50, (4, 32))
    model.zero_grad()
    model(tokens).backward()
    exact = gradients(model)
    call = torch.compile(model, backend=wtacrs_fx.backend(FORWARD))
    runs = [step(model, call, tokens) for _ in range(200)]
    for name in ("layers.0.q.weight", "layers.0.up.weight", "head.weight"):
        samples = torch.stack([run[name].flatten() for run in runs])
        assert samples.std(0).max() > 0
        assert is_unbiased(samples, exact[name].flatten()), name


def test_the_report_of_a_graph_compiled_under_autocast_is_another() -> None:
    """The code of both is in Inductor's cache under different keys, and so must the reports be."""
    model, x = torch.nn.Linear(16, 12), torch.randn(128, 16)

    def saved() -> object:
        torch._dynamo.reset()
        torch.compile(torch.nn.Sequential(model, torch.nn.Tanh()), backend=wtacrs_fx.backend(BACKWARD))(x)
        return wtacrs_fx.reports()[-1].saved_bytes_after

    plain = saved()
    with torch.autocast("cpu", torch.bfloat16):
        assert saved() != plain
    assert saved() == plain
