"""Losses over a vocabulary, computed for a few rows at a time: as the whole, smaller, or left alone with the reason."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aot import REFERENCE, Graph, Variants, distance, small_tensors, wrong_bytes
from conftest import gradients, is_unbiased, seed_of_run
from torch import Tensor, nn
from torch.nn import functional as F

import wtacrs_fx
from wtacrs_fx import Policy, Rule
from wtacrs_passes.decide import precision
from wtacrs_passes.maths import chunks, low_precision
from wtacrs_passes.rewrite import chunk_losses

BATCH, TOKENS, D, WORDS = 3, 20, 16, 200
CHUNK_BYTES = 16 * 4 * WORDS
"""16 rows of 60: three whole chunks and a rest."""

CHUNKED = Policy(ratio=1.0, include=("head",), chunk_bytes=CHUNK_BYTES)
"""What is below the head is stored as it is."""
SAMPLED = Policy(ratio=0.5, min_rows=2, min_features=1, include=("head",), chunk_bytes=CHUNK_BYTES)


def _labels() -> Tensor:
    labels = torch.randint(WORDS, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    labels[0, :7] = -100
    return labels


X = torch.randn(BATCH, TOKENS, D, generator=torch.Generator().manual_seed(1))
LABELS = _labels()


class Words(nn.Module):
    """Tokens' states and labels to the loss that a subclass computes of the logits."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, WORDS, bias=bias)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.logits(x).float(), labels)


class Biased(Words):
    def __init__(self) -> None:
        super().__init__(bias=True)


class SoftCap(Words):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(torch.tanh(logits / 3) * 3, labels)


class Sum(Biased):
    """As Trainer divides: by the number of labels of all batches that are accumulated."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 130


class Smoothing(Words):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


class MeanOverWords(Words):
    """The mean over a row is none over the rows: its value once was divided by the words twice."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) - 0.1 * torch.log_softmax(logits, -1).mean(-1).sum()


class ZLoss(Words):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) + 0.01 * logits.logsumexp(-1).square().mean()


class Weighted(Words):
    """A weight for each word, and one for each token."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        weight = torch.linspace(0.5, 2, WORDS)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, reduction="none")
        return (losses * torch.linspace(0, 1, losses.numel())).mean()


class Focal(Words):
    """A loss whose gradient is not the softmax less one."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return ((1 - torch.exp(-losses)).square() * losses).mean()


class Binary(Biased):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels.clamp(min=0), WORDS).float())


class OneHot(Words):
    """Targets written out: an ignored label is a row of zeros."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = torch.where(labels.unsqueeze(-1) == torch.arange(WORDS), 1.0, 0.0)
        weights = torch.linspace(1, 2, BATCH * TOKENS).view(BATCH, TOKENS, 1)
        asked = (targets * weights).sum(-1, keepdim=True)
        return (logits * asked / WORDS - targets * logits.log_softmax(-1)).sum() / 53


class Distilled(Words):
    """A second head is the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(D, WORDS).requires_grad_(False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        student, teacher = self.logits(x).float().log_softmax(-1), self.teacher(x).float().softmax(-1)
        return F.kl_div(student.flatten(0, 1), teacher.flatten(0, 1), reduction="batchmean")


class Tied(Words):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, D)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x + self.embedding(labels.clamp(min=0)), labels)


class Masked(Words):
    """A masked language model: only the tokens that are asked for reach the head."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x[:, ::2]).float().flatten(0, 1), labels[:, ::2].flatten())


class Shifted(Words):
    """Each token predicts the next: the last token's logits are thrown away."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, WORDS), labels[..., 1:].reshape(-1))


class ShiftedSoftCap(Biased):
    """Of two functions of the logits before the slice, the gradient of one reads values of all rows."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        row_scales = torch.linspace(1, 2, BATCH * TOKENS).view(BATCH, TOKENS, 1)
        logits = torch.tanh(logits / 3) * 3 * row_scales
        logp = logits[:, 2:-3].log_softmax(-1)
        return -logp.gather(-1, labels[:, 5:].clamp(min=0).unsqueeze(-1)).mean()


class FlatSlice(Words):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x.flatten(0, 1)).float()[5:], labels.flatten()[5:])


LOSSES = (
    Words, Biased, SoftCap, Sum, Smoothing, MeanOverWords, ZLoss, Weighted, Focal, Binary, OneHot, Distilled, Tied,
    Masked, Shifted, ShiftedSoftCap, FlatSlice,
)  # fmt: skip


class Logits(Words):
    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x).float()
        return self.loss(logits, labels), logits


class TokenLosses(Words):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).float().flatten(0, 1), labels.flatten(), reduction="none")


class OverRows(Words):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits - logits.mean((0, 1), keepdim=True), labels)


class Dropped(Words):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(F.dropout(logits, 0.1), labels)


class Penalised(Words):
    """The gradient of the second loss is multiplied with the first."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.mean().exp() + losses.std()


class TwoSlices(Words):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return sum(
            super(TwoSlices, self).loss(logits[:, at], labels[:, at]) for at in (slice(9), slice(7, None))
        )


class SumOfAllRowsBesideASlice(Words):
    """Its sum, and the sum of the gradients, are over the rows as those of the slice are."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits[:, :-1], labels[:, 1:]) + 1e-3 * logits.square().sum()


class AllRowsBesideASlice(Words):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits[:, :-1], labels[:, 1:]) + 1e-3 * logits.square().mean()


class Pulled(torch.autograd.Function):
    """Logits whose gradient pulls them to zero, in all rows, as losses that balance experts are added."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return gradient + 1e-3 * logits


class PulledBeforeASlice(Words):
    """The gradients of the rows that no slice reads are not zeros."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(Pulled.apply(logits)[:, :-1], labels[:, 1:])


REFUSED = (
    (PulledBeforeASlice, "slice.Tensor does not treat each row by itself"),
    (TwoSlices, "slice.Tensor does not treat each row by itself"),
    (SumOfAllRowsBesideASlice, "slice.Tensor does not treat each row by itself"),
    (AllRowsBesideASlice, "slice.Tensor does not treat each row by itself"),
    (Logits, "the program returns the logits"),
    (TokenLosses, "more than one number comes in"),
    (OverRows, "does not treat each row by itself"),
    (Dropped, "does not treat each row by itself"),
)


@pytest.fixture(autouse=True)
def no_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chunks, "compiled_function_of", chunks.function_of)
    with small_tensors():
        yield


def train(
    model: nn.Module, autocast: bool = False, scale: float = 1.0, x: Tensor = X
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of `scale` times its sum."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x, LABELS)
    loss = loss[0] if isinstance(loss, tuple) else loss
    (scale * loss).sum().backward()
    return loss.detach(), gradients(model)


def run(model: nn.Module, policy: Policy, **options: object) -> tuple[Tensor, dict[str, Tensor], Graph]:
    variants = Variants({"ours": policy})
    variants.active = "ours"
    compiled = torch.compile(copy.deepcopy(model), backend=variants, fullgraph=True)
    loss, found = train(compiled, **options)  # type: ignore[arg-type]
    return loss, {name.removeprefix("_orig_mod."): value for name, value in found.items()}, variants.graphs[0]


def largest(graph: Graph, name: str) -> int:
    """Return the elements of the largest value that a partition computes."""
    parts = graph.partitions[name].forward, graph.partitions[name].backward
    values = [
        node.meta.get("val") for part in parts for node in part.graph.nodes if node.op == "call_function"
    ]
    return max(value.numel() for value in values if isinstance(value, Tensor))


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_are_those_of_the_whole(kind: type[Words], precision: str) -> None:
    model = kind()
    autocast = precision == "autocast"
    wanted, exact = train(copy.deepcopy(model), scale=3.0)
    _, eager = train(copy.deepcopy(model), autocast, scale=3.0)
    loss, found, graph = run(model, CHUNKED, autocast=autocast, scale=3.0)
    torch.testing.assert_close(loss, wanted, rtol=0.01 if autocast else 1e-5, atol=0)
    for name, gradient in exact.items():
        rounding = distance(eager[name], gradient)
        assert distance(found[name], gradient) < 1e-10 + 4 * rounding, name
    report = graph.partitions["ours"].report
    assert report is not None
    assert [loss.reason for loss in report.losses] == [""]
    assert largest(graph, REFERENCE) >= len(X[:, ::2].flatten(0, 1)) * WORDS
    assert largest(graph, "ours") <= WORDS * D  # the head's weight
    assert "rows at a time" in str(report)


class AtRandom(Words):
    """A head and a loss that are put together at random, of what language models use."""

    def __init__(self, seed: int) -> None:
        random = Random(seed)
        super().__init__(bias=random.random() < 0.3)
        self.steps = random.sample(["scale", "cap", "shift", "temperature", "mask"], random.randrange(4))
        self.terms = random.sample(
            ["entropy", "smoothed", "z", "focal", "probability"], random.randrange(1, 4)
        )
        self.reduction = random.choice(["mean", "sum", "tokens", "weighted", "batch"])
        self.shape = random.choice(["flat", "whole"])
        self.shift = nn.Parameter(torch.linspace(-1, 1, WORDS))
        self.sliced = random.choice(["", "first", "last"])
        self.temperature = nn.Parameter(torch.linspace(0.5, 2, BATCH * TOKENS).view(BATCH, TOKENS, 1))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.where(labels % 7 != 3, -100)
        if self.sliced:
            labels = labels[:, 1:]
        if self.sliced == "first":
            logits = logits[:, :-1]
        for step in self.steps:
            if step == "scale":
                logits = logits / 3
            elif step == "cap":
                logits = 5 * torch.tanh(logits / 5)
            elif step == "shift":
                logits = logits + self.shift
            elif step == "temperature":
                logits = logits * self.temperature[:, : logits.shape[1]]
            else:
                logits = logits.masked_fill(torch.arange(WORDS) % 7 == 3, -30.0)
        if self.sliced == "last":
            logits = logits[:, :-1]
        if self.shape == "flat":
            logits, labels = logits.flatten(0, 1), labels.flatten()
        known = labels >= 0
        logp = torch.log_softmax(logits, -1)
        chosen = logp.gather(-1, labels.clamp(0).unsqueeze(-1)).squeeze(-1)
        losses = torch.zeros_like(chosen)
        for term in self.terms:
            if term == "entropy":
                losses = losses - chosen
            elif term == "smoothed":
                losses = losses - 0.1 * logp.mean(-1)
            elif term == "z":
                losses = losses + 1e-2 * torch.logsumexp(logits, -1).square()
            elif term == "focal":
                losses = losses - (1 - chosen.exp()) ** 2 * chosen
            else:
                losses = losses + (logp.exp() * logp).sum(-1)
        losses = losses * known
        if self.reduction == "mean":
            return losses.mean()
        if self.reduction == "tokens":
            return losses.sum() / known.sum()
        if self.reduction == "weighted":
            return (losses * torch.linspace(0, 1, losses.numel()).view(losses.shape)).sum()
        return losses.view(BATCH, -1).sum(1).mean() if self.reduction == "batch" else losses.sum()


FIRST = seed_of_run("WTACRS_LOSSES_SEED")
COUNT = int(os.environ.get("WTACRS_LOSSES", "5"))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_losses_made_at_random(seed: int) -> None:
    """Chunked or not, and then with a reason, gradients are those of eager; in autocast up to its rounding."""
    model, autocast = AtRandom(seed), seed % 2 == 1
    wanted, exact = train(copy.deepcopy(model), scale=3.0)
    _, eager = train(copy.deepcopy(model), autocast, scale=3.0)
    loss, found, graph = run(model, CHUNKED, autocast=autocast, scale=3.0)
    report = graph.partitions["ours"].report
    assert report is not None and len(report.losses) == 1
    if report.losses[0].reason:  # then logits are residuals as others are, and may wait in 8 bits
        loss, found, _ = run(
            model, dataclasses.replace(CHUNKED, residuals="exact"), autocast=autocast, scale=3.0
        )
    torch.testing.assert_close(loss, wanted, rtol=0.02 if autocast else 1e-4, atol=1e-4)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        rounding = distance(eager[name], gradient)
        assert distance(found[name], gradient) < 1e-9 + 8 * rounding, (name, model.steps, model.terms)


@pytest.mark.parametrize(("kind", "reason"), REFUSED)
def test_what_stays_whole_says_why(kind: type[Words], reason: str) -> None:
    model = kind()
    torch.manual_seed(0)
    _, exact = train(copy.deepcopy(model))
    torch.manual_seed(0)
    _, found, graph = run(model, CHUNKED)
    report = graph.partitions["ours"].report
    assert report is not None
    assert [reason in loss.reason for loss in report.losses] == [True], report.losses
    if kind is not Dropped:
        for name, gradient in exact.items():
            assert distance(found[name], gradient) < 0.001, name


def test_the_gradient_of_a_tied_embedding_is_added_to_the_heads() -> None:
    _, _, graph = run(Tied(), CHUNKED)
    backward = graph.partitions["ours"].backward.graph
    zeros = [node for node in backward.nodes if node.target is torch.ops.aten.full.default]
    assert not [node for node in zeros if tuple(node.meta["val"].shape) == (WORDS, D)]


class Scattered(nn.Module):
    """Rows that are added to zeros, and those to something larger or in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, D))
        self.table = nn.Parameter(torch.randn(4, 6, D))

    def forward(self, index: Tensor) -> Tensor:
        few = torch.zeros(6, D).index_put((index,), self.w, accumulate=True)
        return ((self.table * 2 + few) * torch.linspace(-1, 1, 6 * D).view(6, D)).sum()


def test_rows_that_are_added_to_a_larger_tensor() -> None:
    model, index = Scattered(), torch.tensor([1, 5, 1, 0])
    variants = Variants({"ours": CHUNKED})
    variants.active = "ours"
    compiled = torch.compile(copy.deepcopy(model), backend=variants, fullgraph=True)
    wanted, found = model(index), compiled(index)
    torch.testing.assert_close(found, wanted)
    wanted.backward()
    found.backward()
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_a_buffer_that_is_written_to_after_the_loss() -> None:
    class Drifting(Words):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.linspace(-1, 1, WORDS))

        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            loss = super().loss(logits + self.shift, labels)
            self.shift.mul_(-3)
            return loss

    model = Drifting()
    wanted, exact = train(copy.deepcopy(model))
    loss, found, _ = run(model, CHUNKED)
    torch.testing.assert_close(loss, wanted)
    for name, gradient in exact.items():
        assert distance(found[name], gradient) < 0.001, name


def test_whole_numbers_are_summed_as_such() -> None:
    body = "def body(rows, x):\n    return (x.sum(0),)\n"
    x = torch.tensor([2**40 + 1, 2, 3, 4])
    (total,) = chunks.in_chunks(body, ["sum"], [x], [], 1, None, [], "", False, "exact", [], False)
    assert total.item() == x.sum().item()


def test_a_gradient_that_is_not_linear_stays_whole() -> None:
    model = Penalised()
    _, exact = train(copy.deepcopy(model))
    _, found, _ = run(model, CHUNKED)
    for name, gradient in exact.items():
        assert distance(found[name], gradient) < 0.001, name


@pytest.mark.parametrize("policy", [Policy(ratio=1.0, chunk_bytes=0), Policy(ratio=1.0, chunk_bytes=2**20)])
def test_logits_that_are_small_enough_stay_whole(policy: Policy) -> None:
    _, _, graph = run(Words(), policy)
    report = graph.partitions["ours"].report
    assert report is not None
    assert report.losses == ()
    assert largest(graph, "ours") >= BATCH * TOKENS * WORDS


def test_to_the_last_bit_where_the_policy_says_so() -> None:
    policy = Policy(ratio=1.0, residuals="exact", chunk_bytes=CHUNK_BYTES)
    variants = Variants({"ours": policy})
    compiled = torch.compile(Words(), backend=variants, fullgraph=True)
    wanted = train(compiled)
    variants.active = "ours"
    found = train(compiled)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_float16_stays_whole() -> None:
    variants = Variants({"ours": CHUNKED})
    variants.active = "ours"
    compiled = torch.compile(Words().half(), backend=variants, fullgraph=True)
    compiled(X.half(), LABELS).mul(1024).backward()
    report = variants.graphs[0].partitions["ours"].report
    assert report is not None
    assert "loss scale" in report.losses[0].reason


def test_as_many_rows_as_words() -> None:
    class Square(Biased):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(D, BATCH * TOKENS * 2)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.loss(self.logits(torch.cat([x, x])), torch.cat([labels, labels]) % 7)

    model = Square()
    _, exact = train(copy.deepcopy(model))
    _, found, graph = run(model, dataclasses.replace(CHUNKED, chunk_bytes=2**10))
    report = graph.partitions["ours"].report
    assert report is not None
    assert "as many rows as words" in report.losses[0].reason
    for name, gradient in exact.items():
        assert distance(found[name], gradient) < 0.001, name


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("estimator", ["wta-systematic", "crs", "rmm-rademacher"])
def test_sampled_rows_are_unbiased(estimator: str, center: bool) -> None:
    model = Words()
    _, exact = train(copy.deepcopy(model))
    policy = dataclasses.replace(SAMPLED, estimator=estimator, center=center)  # type: ignore[arg-type]
    variants = Variants({"ours": policy})
    variants.active = "ours"
    compiled = torch.compile(model, backend=variants, fullgraph=True)
    torch.manual_seed(0)
    samples = torch.stack([train(compiled)[1]["_orig_mod.head.weight"][::8].flatten() for _ in range(400)])
    wanted = exact["head.weight"][::8].flatten()
    assert samples.std(0).max() > 0.01 * wanted.abs().max()
    assert is_unbiased(samples, wanted)
    report = variants.graphs[0].partitions["ours"].report
    assert report is not None
    (site,) = [site for site in report.sites if site.module == "head"]
    assert (site.encoding, site.kept, site.reason) == ("chunks", 3 * 8 + 6, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_products_in_8_bits_are_unbiased(ratio: float, dtype: torch.dtype) -> None:
    model = Words()
    policy = dataclasses.replace(SAMPLED, ratio=ratio, center=ratio < 1, product="int8")
    variants = Variants({"ours": policy})
    variants.active = "ours"
    compiled = torch.compile(model.to(dtype), backend=variants, fullgraph=True)
    _, exact = train(copy.deepcopy(model), x=X.to(dtype))
    torch.manual_seed(0)
    samples = [train(compiled, x=X.to(dtype))[1]["_orig_mod.head.weight"][::8].flatten() for _ in range(400)]
    wanted = exact["head.weight"][::8].flatten().double()
    error = torch.stack(samples).double() - wanted
    assert 0 < float(error.square().mean(0).sum() / wanted.square().sum()) < (0.004 if ratio == 1 else 1)
    if dtype == torch.float32:  # in bfloat16 the exact one is rounded as well
        assert is_unbiased(error, torch.zeros_like(wanted))
    report = variants.graphs[0].partitions["ours"].report
    assert report is not None
    (site,) = [site for site in report.sites if site.module == "head"]
    assert (site.encoding, site.product) == ("chunks", "int8")


@pytest.mark.parametrize("fault", ["", "rounded down"])
def test_gradients_of_inputs_in_8_bits_are_unbiased(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer below sees their noise: its variance is below the bound, a share of 2 / 127 of each row's own."""
    model = Words()
    if fault:  # all elements of a row of dlogits but one are positive
        round_whole = low_precision.round_whole
        monkeypatch.setattr(low_precision, "round_whole", lambda x, r, c: round_whole(x, r * 0, c * 0))
    policy = dataclasses.replace(CHUNKED, product_dx="int8", min_features=1)
    variants = Variants({"ours": policy})
    variants.active = "ours"
    compiled = torch.compile(copy.deepcopy(model), backend=variants, fullgraph=True)
    _, exact = train(model)
    torch.manual_seed(0)
    samples = torch.stack(
        [train(compiled)[1]["_orig_mod.body.weight"].flatten() for _ in range(400)]
    ).double()
    wanted = exact["body.weight"].flatten().double()
    error = samples - wanted
    assert 0 < float(error.square().mean(0).sum() / wanted.square().sum()) < (1 if fault else 0.01)
    assert is_unbiased(error, torch.zeros_like(wanted)) == (not fault)
    report = variants.graphs[0].partitions["ours"].report
    assert report is not None
    assert [(one.module, one.product) for one in report.input_gradients] == [("head", "int8")]
    (site,) = [site for site in report.sites if site.module == "head"]
    assert site.product == "exact"


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"product": "int8"}, ["int8"]),
        ({"product": "int8", "product_dx": "exact"}, []),
        ({"product": "bfloat16"}, ["bfloat16"]),
        ({"product_dx": "float8"}, ["exact: a loss in chunks has no such product"]),
        ({"product": "int8", "min_features": 32}, ["exact: 16 features, fewer than min_features"]),
        (
            {"product": "int8", "chunk_bytes": 4 * WORDS * 2},
            ["exact: codes of the weight would take more memory than the logits of a chunk"],
        ),
        ({"product_dx": "int8", "chunk_bytes": 4 * WORDS * 2}, ["int8"]),
    ],
)
def test_the_precision_of_gradients_of_inputs(fields: dict[str, Any], shown: list[str]) -> None:
    model = Words()
    _, exact = train(copy.deepcopy(model))
    _, found, graph = run(model, dataclasses.replace(CHUNKED, **{"min_features": 1, **fields}))
    report = graph.partitions["ours"].report
    assert report is not None
    assert [one.product for one in report.input_gradients] == shown
    bound = {"int8": 0.01, "bfloat16": 0.0001}.get("".join(shown), 0.0 if not shown else 1e-12)
    assert distance(found["body.weight"], exact["body.weight"]) <= max(bound, 1e-12)


@pytest.mark.parametrize(
    ("of_dw", "of_dx", "shown"), [(1.2, 0.5, "int8"), (1.2, 1.2, "exact"), (0.5, 1.2, "int8")]
)
def test_both_products_of_a_head_share_what_is_rounded(
    of_dw: float, of_dx: float, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where dX is faster in 8 bits its codes of dlogits are there for dW as well."""

    def seconds(precisions: Any, rows: int, *sizes: Any) -> dict[str, float]:
        return dict.fromkeys(precisions, of_dx if rows == WORDS else of_dw) | {"exact": 1.0}

    monkeypatch.setattr(precision, "seconds", seconds)
    model = Words().bfloat16()
    policy = dataclasses.replace(CHUNKED, min_features=1, product="auto")
    variants = Variants({"ours": policy})
    variants.active = "ours"
    with small_tensors():
        train(torch.compile(model, backend=variants, fullgraph=True), x=X.bfloat16())
    report = variants.graphs[0].partitions["ours"].report
    assert report is not None
    (site,) = [site for site in report.sites if site.module == "head"]
    assert site.product.startswith(shown)
    assert [one.product.partition(":")[0] for one in report.input_gradients] == [
        "int8" if of_dx < 1 else "exact"
    ]


def test_rows_of_different_chunks_are_rounded_independently() -> None:
    """60 rows half-way between two steps, 15 in each chunk: variances of as many coins add up, not those of 15."""
    a, b = torch.full((64, 32), 0.5), torch.full((64, 8), 127.0)
    a[::16] = 127.0
    body = "def body(rows, a, b):\n    return (a, b)\n"

    def run() -> Tensor:
        draws = [torch.rand(2, 64), torch.rand(32 + 8)]
        (total,) = chunks.in_chunks(
            body, ["product"], [a, b], [], 16, None, [], "", False, "int8", draws, False
        )
        return total[:, 0]

    samples = torch.stack([run() for _ in range(500)])
    # The variance of 500 samples has a standard deviation of 0.063 of itself, that of 32 columns a sixth of this.
    assert abs(float(samples.var(0).mean()) / (60 * 127**2 / 4) - 1) < 0.1


def test_a_product_that_reaches_other_gradients_is_not_rounded() -> None:
    class Scaled(Words):
        """Two heads; what the second one multiplies with depends on the layer below."""

        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.randn(WORDS, D) / 8)

        def logits(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.body(x))
            return F.linear(hidden, self.other * hidden.mean()) + self.head(hidden)

    model = Scaled()
    _, exact = train(copy.deepcopy(model))
    _, found, graph = run(model, dataclasses.replace(CHUNKED, include=("*",), min_features=1, product="int8"))
    report = graph.partitions["ours"].report
    assert report is not None
    assert [loss.reason for loss in report.losses] == [""]
    (site,) = [site for site in report.sites if site.module == "head"]
    assert site.product == "exact: made with a product whose error would reach other gradients"
    for name in ("other", "head.weight"):
        assert distance(found[name], exact[name]) < 1e-6, name


@pytest.mark.parametrize(("rule", "encoding"), [("balanced", "int8"), ("small", "int8"), ("exact", "exact")])
def test_an_estimate_waits_in_8_bits(rule: str, encoding: str) -> None:
    policy = dataclasses.replace(SAMPLED, rules=(Rule("head", residuals=rule),))
    _, _, graph = run(Words(), policy)
    report = graph.partitions["ours"].report
    assert report is not None
    made = [one for one in report.residuals if one.module == "head" and "getitem" in one.operation]
    assert ("unbiased, error < group peak / 127" in [one.gradient for one in made]) == (encoding == "int8")
    (site,) = [site for site in report.sites if site.module == "head"]
    assert site.bytes_after == (0 if encoding == "int8" else 4 * WORDS * D)


class Gated(Words):
    """What is stored below the head is read by products with its gradients alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(6))

    def logits(self, x: Tensor) -> Tensor:
        for i in (0, 3):
            gate, up, down = self.body[i : i + 3]
            x = x + down(F.silu(gate(x)) * up(x))
        return self.head(F.rms_norm(x, (D,)))


def test_what_is_below_is_stored_as_without_chunks() -> None:
    """A gradient that was made with the loss once passed for one of an inverse: nothing read with it was encoded."""

    def stored(chunk_bytes: int) -> dict[str, set[str]]:
        policy = Policy(ratio=0.5, min_rows=2, min_features=1, rules=(), chunk_bytes=chunk_bytes)
        _, _, graph = run(Gated(), policy)
        report = graph.partitions["ours"].report
        assert report is not None and bool(report.losses) == bool(chunk_bytes)
        found: dict[str, set[str]] = {}
        for residual in report.residuals:
            if residual.module.startswith("body") and residual.bytes_after > 1000:
                found.setdefault(residual.module, set()).add(residual.encoding)
        return found

    assert stored(CHUNK_BYTES) == stored(0)


def test_other_gradients_do_not_depend_on_the_draw() -> None:
    model = Words()
    _, exact = train(copy.deepcopy(model))
    _, found, _ = run(model, SAMPLED)
    assert distance(found["head.weight"], exact["head.weight"]) > 1e-4
    assert distance(found["body.weight"], exact["body.weight"]) < 0.001


def test_the_report_adds_up() -> None:
    _, _, graph = run(Tied(), SAMPLED)
    graph.partitions[REFERENCE].saved_bytes = graph.partitions["ours"].report.saved_bytes_before  # type: ignore
    assert wrong_bytes(graph) == []
    report = graph.partitions["ours"].report
    assert report is not None
    assert wtacrs_fx.Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_gradients(scale: float) -> None:
    _, found, _ = run(Words(), SAMPLED, scale=scale)
    assert not any(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize(
    ("kind", "precision"), [(Words, "float32"), (Words, "autocast"), (Shifted, "autocast")]
)
def test_generated_code_for_any_number_of_rows(
    kind: type[Words], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the function of a chunk is compiled
    model, backend = kind(), wtacrs_fx.backend(CHUNKED)
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True, dynamic=True)
    for batch in (3, 5, 2):
        x, labels = torch.randn(batch, 30, D), torch.randint(WORDS, (batch, 30))
        for each in (model, compiled):
            each.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                loss = each(x, labels)
            loss.backward()
        for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert distance(q.grad, p.grad) < (1e-4 if precision == "autocast" else 1e-10), name
    (report,) = backend.reports
    assert report.losses[0].reason == ""


def test_gradients_that_are_accumulated() -> None:
    model = Words()
    variants = Variants({"ours": CHUNKED})
    variants.active = "ours"
    compiled = torch.compile(copy.deepcopy(model), backend=variants, fullgraph=True)
    for each in (model, compiled):
        first, second = each(X, LABELS), each(X.flip(0), LABELS)  # two forward passes before a backward pass
        (second - 2 * first).backward()
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert distance(q.grad, p.grad) < 0.001, name


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ((("int8", ""), ("int8", "")), ("int8", "")),
        ((("int8", ""), ("exact", "too small")), ("exact", "too small")),
        (
            (("int8", ""), ("bfloat16", "")),
            ("exact", "made with another product that is multiplied in another precision"),
        ),
    ],
)
def test_products_of_one_loss_have_one_precision(
    chosen: tuple[tuple[str, str], ...], found: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = iter(chosen)
    monkeypatch.setattr(chunk_losses, "choose_precision", lambda *_: next(choices))
    results = [SimpleNamespace(node=name, kind="product") for name in "ab"]
    products = {name: SimpleNamespace(module=name) for name in "ab"}
    policy = Policy(ratio=1.0, product="auto")
    assert chunk_losses._precision(SimpleNamespace(results=results), products, policy, False) == found  # type: ignore[arg-type]
