"""Checkpoints and encodings together: what is kept is encoded, what is computed again is made of the decoded value."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from aot import REFERENCE, Graph, Variants, distance, small_tensors
from conftest import is_unbiased, slopes
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import wtacrs_fx
import wtacrs_passes.pipeline as pipeline
from wtacrs_fx import Policy
from wtacrs_passes.graph.operations import SEEDS
from wtacrs_passes.joint import Joint
from wtacrs_passes.maths.encodings import dequantise, quantise
from wtacrs_passes.rewrite import recompute_checkpointed as rewrite
from wtacrs_passes.rewrite.recompute_checkpointed import REGION

D, TOKENS = 128, 32
EXACTLY = Policy(ratio=1.0, residuals="exact")
ENCODED = Policy(ratio=1.0, product="exact")


class Block(nn.Module):
    """[batch, tokens, D] to the same: attention and a gated product, normalised before each."""

    def __init__(self, attention_dropout: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(D) for _ in range(2))
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate, self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.attention_dropout, self.dropout = attention_dropout, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, dropout_p=self.attention_dropout, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(-2)))
        h = self.norms[1](x)
        return x + self.dropout(self.down(nn.functional.silu(self.gate(h)) * self.up(h)))


Call = Callable[[nn.Module, Tensor], Tensor]


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(block, x, use_reentrant=False)
    return result


class Stack(nn.Module):
    """[batch, tokens, D] to a scalar; `call` runs each of two blocks."""

    def __init__(self, call: Call = checkpointed, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.call = nn.ModuleList(Block(**options) for _ in range(2)), call
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.call(block, x)
        return self.last(x).sin().sum()


def inputs() -> Tensor:
    return torch.randn(2, TOKENS, D, generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module, call: Callable[..., Tensor], x: Tensor, autocast: bool = False) -> Tensor:
    """Return the whole gradient of a step as one vector, with random numbers that are always the same."""
    model.zero_grad()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = call(x)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def partitions(
    model: nn.Module, policies: dict[str, Policy], autocast: bool = False
) -> tuple[Graph, dict[str, Tensor]]:
    """Return a model's graph in several partitions, and the gradient by each."""
    variants = Variants(policies)
    with small_tensors():
        compiled = torch.compile(model, backend=variants)
        found = {}
        for variants.active in (REFERENCE, *policies):
            found[variants.active] = gradient(model, compiled, inputs(), autocast)
    return variants.graphs[0], found


MODES = {
    mode: Policy(ratio=1.0, product="exact", residuals=mode)
    for mode in ("exact", "fine", "balanced", "small")
}


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_checkpoint_keeps_is_encoded(autocast: bool) -> None:
    graph, found = partitions(Stack(), MODES, autocast)
    saved = {name: part.saved_bytes for name, part in graph.partitions.items()}
    assert saved["exact"] == saved[REFERENCE] and torch.equal(found["exact"], found[REFERENCE])
    share = 0.75 if autocast else 0.4  # 8.25 bits of 16, or of 32
    assert saved["small"] <= saved["balanced"] <= saved["fine"] < share * saved[REFERENCE]
    for mode in ("fine", "balanced", "small"):
        assert 0 < distance(found[mode], found[REFERENCE]) < 0.01
    stored = {
        site.module for site in graph.partitions["balanced"].report.residuals if site.encoding == "int8"
    }
    assert stored == {"first", "blocks.0"}  # inputs of blocks, and nothing inside of them
    full, _ = partitions(Stack(lambda block, x: block(x)), {"balanced": MODES["balanced"]}, autocast)
    assert saved["balanced"] < 0.4 * full.partitions["balanced"].saved_bytes


class _FromRounded(torch.autograd.Function):
    """A block whose gradient is that of the block at its input in 8 bits."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        [x] = ctx.saved_tensors
        near = dequantise(*quantise(x, bits=8), bits=8, features=D, dtype=x.dtype).requires_grad_()
        parameters = list(ctx.block.parameters())
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.block(near), [near, *parameters], dy)


def test_a_region_is_consistent_in_itself() -> None:
    """Its gradient is that of its function at the decoded input: not a mixture of exact and rounded values.

    What `last` reads stays exact, and so does what that is made of: the input of the second block.
    """
    model = Stack()
    _, found = partitions(model, {"encoded": Policy(ratio=1.0, product="exact", exclude=("last",))})
    by_hand = Stack()
    by_hand.call = lambda block, x: (
        _FromRounded.apply(block, x, *block.parameters()) if block is by_hand.blocks[0] else block(x)
    )
    wanted = gradient(by_hand, by_hand, inputs())
    assert distance(found["encoded"], found[REFERENCE]) > 1e-7
    assert distance(found["encoded"], wanted) < 1e-10  # float32: a relative error of 1e-5
    size = sum(parameter.numel() for parameter in model.last.parameters())
    assert torch.equal(found["encoded"][-size:], found[REFERENCE][-size:])


def tag_seeds(joint: Joint) -> None:
    """Do as torch 2.14: checkpoints tag what asks the generator, too."""
    for node in joint.graph.nodes:
        if node.target in SEEDS:
            [region] = {user.meta[REGION] for user in node.users}
            node.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, REGION: region}


@pytest.mark.parametrize("policy", [EXACTLY, ENCODED], ids=["exact", "encoded"])
def test_dropout_is_the_same_when_it_is_computed_again(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other masks in the backward pass slopes are off by a quarter; with codes by 0.005."""
    monkeypatch.setattr(pipeline, "PASSES", (tag_seeds, *pipeline.PASSES))
    torch.manual_seed(0)
    model, x = Stack(dropout=0.5), inputs()
    model.blocks = model.blocks[:1]
    backend = wtacrs_fx.backend(policy)
    compiled = torch.compile(model, backend=backend)
    with torch._inductor.config.patch(force_disable_caches=True):
        found, wanted = slopes(model, lambda: compiled(x))
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    [report] = backend.reports
    assert (report.saved_bytes_after < report.saved_bytes_before) == (policy is ENCODED)


def test_other_masks_in_the_backward_pass_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PASSES", (tag_seeds, *pipeline.PASSES))
    monkeypatch.setattr(rewrite, "SEEDS", frozenset())  # as if they were any other value
    model = Stack(dropout=0.5)
    model.blocks = model.blocks[:1]
    compiled = torch.compile(model, backend=wtacrs_fx.backend(ENCODED))
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        pytest.raises(Exception, match="the backward pass would draw other random numbers"),
    ):
        compiled(inputs())


def test_a_selective_policy_keeps_what_it_says() -> None:
    """Products are kept, encoded; attention and what is elementwise is computed again."""

    def save_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, save_products)

    def call(block: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return result

    graph, found = partitions(Stack(call), {"balanced": ENCODED})
    whole, _ = partitions(Stack(), {"balanced": ENCODED})
    part = graph.partitions["balanced"]
    assert part.saved_bytes > 2 * whole.partitions["balanced"].saved_bytes
    assert part.saved_bytes < 0.4 * graph.partitions[REFERENCE].saved_bytes
    assert distance(found["balanced"], found[REFERENCE]) < 0.01


def test_regions_within_regions_and_a_whole_model_as_one() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(checkpointed(self.inner, x))

    model = Stack()
    model.blocks[1] = Pair()
    _, found = partitions(model, {"balanced": ENCODED})
    assert 0 < distance(found["balanced"], found[REFERENCE]) < 0.01

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.block = nn.Embedding(50, D), Block()

        def forward(self, x: Tensor) -> Tensor:
            tokens = (x[..., 0] * 10).long() % 50
            return checkpointed(nn.Sequential(self.embedding, self.block), tokens).square().mean()

    graph, found = partitions(Whole(), {"balanced": ENCODED})
    assert distance(found["balanced"], found[REFERENCE]) < 0.01
    assert graph.partitions["balanced"].saved_bytes <= graph.partitions[REFERENCE].saved_bytes


def test_rows_are_sampled_in_checkpointed_regions() -> None:
    model = Stack()
    model.blocks = model.blocks[:1]
    with small_tensors():
        variants = Variants({"all": ENCODED, "rows": Policy(ratio=0.3, min_rows=8)})
        compiled = torch.compile(model, backend=variants)
        variants.active = "all"
        wanted = gradient(model, compiled, inputs())
        variants.active = "rows"
        samples = []
        for seed in range(200):
            model.zero_grad()
            torch.manual_seed(seed)
            compiled(inputs()).backward()
            samples.append(model.blocks[0].down.weight.grad.flatten())
    report = variants.graphs[0].partitions["rows"].report
    assert {site.placement for site in report.sampled} == {"backward"} and len(report.sampled) >= 6
    model.zero_grad()
    model.blocks[0].down.weight.grad = None
    names = [name for name, _ in model.named_parameters()]
    sizes = [parameter.numel() for parameter in model.parameters()]
    exact = dict(zip(names, wanted.split(sizes), strict=True))["blocks.0.down.weight"]
    draws = torch.stack(samples)
    assert draws.std(0).max() > 0
    assert is_unbiased(draws, exact)


def test_what_may_differ_is_left_to_pytorch() -> None:
    class Random(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.poisson(x.detach().abs()))

    model = Stack()
    model.blocks[1] = Random()
    with pytest.warns(UserWarning, match="the model's checkpoints compute aten.poisson again"):
        report = wtacrs_fx.explain(model, inputs(), policy=ENCODED)
    assert not [site for site in report.residuals if site.encoding.startswith("int")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wtacrs_fx.explain(model, inputs(), policy=EXACTLY)  # nothing would be encoded


def test_logits_of_a_checkpointed_head_are_not_kept() -> None:
    class Headed(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(D, 8 * D)

        def forward(self, x: Tensor) -> Tensor:
            logits = checkpointed(self.head, self.first(x))
            return nn.functional.cross_entropy(logits.flatten(0, 1), x[..., 0].flatten().long().clamp(min=0))

    graph, found = partitions(Headed(), {"balanced": ENCODED})
    assert graph.partitions["balanced"].saved_bytes < 0.6 * graph.partitions[REFERENCE].saved_bytes
    assert distance(found["balanced"], found[REFERENCE]) < 0.01


@pytest.mark.sweep(0.34)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.abs() + 1e-3).log(),
        lambda x: 1 / (x.abs() + 1e-3),
        lambda x: x.abs().add(1e-4).sqrt(),
        lambda x: x / x.roll(1, -1).abs().add(1e-3),
        lambda x: (4 * x).exp() * 1e-3,
    ],
    ids=["log", "quotient", "root", "of two", "exponential"],
)
def test_what_is_steep_at_zero_is_computed_from_exact_values(function: Callable[[Tensor], Tensor]) -> None:
    """An element that rounding makes zero would have a gradient of another order, or none that is finite."""

    class Steep(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(function(x))

    model = Stack()
    model.blocks[1] = Steep()
    graph, found = partitions(model, {"small": MODES["small"]})
    assert distance(found["small"], found[REFERENCE]) < 0.01
    encodings = {site.module: site.encoding for site in graph.partitions["small"].report.residuals}
    assert encodings["blocks.0"] == "exact"
    assert encodings["first"].startswith("int")  # another region's input


def test_a_router_is_left_to_pytorch() -> None:
    """It takes experts by their scores, and might take another one where they are nearly alike."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.experts = nn.Linear(D, 4), nn.Linear(D, 4 * D)

        def forward(self, x: Tensor) -> Tensor:
            weights, chosen = self.score(x).softmax(-1).topk(2)
            outputs = self.experts(x).unflatten(-1, (4, D))
            taken = outputs.gather(-2, chosen.unsqueeze(-1).expand(-1, -1, -1, D))
            return x + (weights.unsqueeze(-1) * taken).sum(-2)

    model = Stack()
    model.blocks[1] = Routed()
    with pytest.warns(UserWarning, match=r"checkpoints compute aten\.\w+ again"):
        _, found = partitions(model, {"balanced": ENCODED})
    assert torch.equal(found["balanced"], found[REFERENCE])
