"""Memory of training by optimizer, adapter and task, with Inductor and with wtacrs: what adds up.

    pip install --no-deps galore-torch bitsandbytes peft accelerate
    python -m bench.optimizers

The packaged MiniLM on sentences of the news, each method trained from the same weights on the same batches.
Weights, gradients and optimizer state are the bytes of tensors after the last step; saved are the tensors
that autograd keeps between forward and backward. Storages are counted whole, each once: galore-torch keeps
the square matrix of which its projection is a few rows.

Optimizers: AdamW; AdamW with its moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861); GaLore (Zhao
et al. 2024, arXiv 2403.03507) on the linears of the layers. Adapters, all on attention and MLP, with AdamW:
LoRA (Hu et al. 2022, arXiv 2106.09685), and after two papers `LoTR` and `KernelSparse` below. Further, after papers:
`NagGS` and `Proximal`, optimizers; adaptation to a small batch at the time of a test, by the entropy of predictions;
and a recursive network in the place of the encoder, `BeamTree`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, NamedTuple

import bitsandbytes
import torch
import typer
from galore_torch import GaLoreAdamW
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gradient_variance import Batch, Loss, load, sampled_linears
from bench.harness import BASELINE, MIB, VARIANTS, Row, circumstances, record
from wtacrs_fx.tools.steps import Step, saved_bytes

VARIANTS_SHOWN = (BASELINE, "wtacrs 0.3 balanced")
RANK = 8
GALORE = {"rank": 32, "update_proj_gap": 200, "scale": 4.0, "proj_type": "std"}
KEPT = 0.1  # share of the entries of a sparse update


def shorten(model: Loss, layers: int) -> None:
    """Keep only the first layers of the encoder."""
    stack = model.classifier.encoder.encoder
    stack.layer = stack.layer[:layers]


# Tasks


class Entropy(nn.Module):
    """The mean entropy of a classifier's predictions, to be made small (Wang et al. 2021, Tent, arXiv 2006.10726)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, **batch: Tensor) -> Tensor:
        """Return the loss: a scalar. Labels are not looked at."""
        logits = self.classifier(**batch)[1].float()
        return torch.distributions.Categorical(logits=logits, validate_args=False).entropy().mean()


class Merge(nn.Module):
    """Two vectors to one, gated: [..., 2 d] to [..., d]."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(2 * d, 4 * d), nn.Linear(4 * d, 4 * d), nn.LayerNorm(d)

    def forward(self, pairs: Tensor) -> Tensor:
        left, right = pairs.chunk(2, -1)
        keep, take, gate, new = self.down(F.gelu(self.up(pairs))).chunk(4, -1)
        return self.norm(keep.sigmoid() * left + take.sigmoid() * right + gate.sigmoid() * new)


class Hidden(NamedTuple):
    """What a classifier reads of an encoder."""

    last_hidden_state: Tensor


class BeamTree(nn.Module):
    """A recursive network that merges neighbours until one vector is left; the best orders of merging are kept.

    After Ray Chowdhury and Caragea 2023, Beam tree recursive cells, arXiv 2305.19999, of a fixed number of leaves, each
    the mean of some tokens.

    Args:
        words: an embedding of words, [words, d]; leaves, beams: their numbers.
    """

    def __init__(self, words: nn.Embedding, leaves: int, beams: int) -> None:
        super().__init__()
        d = words.embedding_dim
        self.words, self.leaves, self.beams = words, leaves, beams
        self.merge, self.score = Merge(d), nn.Linear(d, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Hidden:
        """Return one vector of each sample, at each of its tokens: [batch, length, d]."""
        mask = attention_mask.unsqueeze(-1).to(self.words.weight.dtype)
        batch, length = input_ids.shape
        size = -(-length // self.leaves)
        x = F.pad(self.words(input_ids) * mask, (0, 0, 0, size * self.leaves - length))
        nodes = x.unflatten(1, (self.leaves, size)).mean(2).unsqueeze(1).expand(-1, self.beams, -1, -1)
        # At first all beams are alike: one of them counts.
        scores = torch.full((batch, self.beams), -1e4, device=x.device)
        scores = torch.cat([torch.zeros_like(scores[:, :1]), scores[:, 1:]], 1)
        for left in range(self.leaves, 1, -1):
            parents = self.merge(torch.cat([nodes[:, :, :-1], nodes[:, :, 1:]], -1))
            choices = self.score(parents).squeeze(-1).log_softmax(-1)
            total, best = (scores.unsqueeze(-1) + choices).flatten(1).topk(self.beams)
            beam, place = best // (left - 1), best % (left - 1)
            scores = total

            def of_beam(values: Tensor, beam: Tensor = beam) -> Tensor:
                return values.gather(1, beam[..., None, None].expand(-1, -1, *values.shape[2:]))

            nodes, parents = of_beam(nodes), of_beam(parents)
            at = torch.arange(left - 1, device=x.device).expand(batch, self.beams, -1) - place.unsqueeze(-1)
            at = at.unsqueeze(-1)
            nodes = torch.where(at < 0, nodes[:, :, :-1], torch.where(at == 0, parents, nodes[:, :, 1:]))
        root = (nodes.squeeze(2) * scores.softmax(1).unsqueeze(-1)).sum(1, keepdim=True)
        return Hidden(root.expand(-1, length, -1))


# Adapters


class LoTR(nn.Module):
    """Low tensor rank (Bershatsky et al. 2024, arXiv 2402.01376): dW_l = B G_l^T A^T.

    A and B are shared by all layers, the core G_l is a layer's own.
    """

    def __init__(self, linear: nn.Linear, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.linear, self.a, self.b = linear, a, b
        self.core = nn.Parameter(torch.zeros(a.shape[1], b.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.a @ self.core @ self.b.T


class KernelSparse(nn.Module):
    """A sparse update from a kernel of two small factors, after SNELL (Shen et al. 2024, arXiv 2411.01800).

    dW_ij = k(b_i, a_j) where that is among the largest, else 0. The kernel here is tanh of the inner product.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(linear.in_features, rank) / rank**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        update = torch.tanh(self.b @ self.a.T)
        size = update.detach().abs()
        least = size.flatten().kthvalue(int((1 - KEPT) * size.numel())).values
        return F.linear(x, self.linear.weight + update * (size >= least), self.linear.bias)


def _freeze(model: Loss) -> None:
    model.classifier.encoder.requires_grad_(False)  # the head is trained in full


def full(model: Loss) -> Loss:
    """Train every weight."""
    return model


def norms(model: Loss) -> nn.Module:
    """Train the norms alone, by the entropy of predictions."""
    for part in model.modules():
        part.requires_grad_(isinstance(part, nn.LayerNorm))
    return Entropy(model.classifier)


def tree(model: Loss) -> Loss:
    """Let a recursive network stand in the place of the layers."""
    encoder = BeamTree(model.classifier.encoder.embeddings.word_embeddings, leaves=8, beams=3)
    model.classifier.encoder = encoder
    return model


def lora(model: Loss) -> Loss:
    """Add a LoRA to every linear of the layers."""
    _freeze(model)
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=list(sampled_linears(model))), model)
    model.classifier.head.requires_grad_(True)
    return model


def lotr(model: Loss) -> Loss:
    """Add a LoTR to every linear of the layers; those of one kind share their factors."""
    _freeze(model)
    shared: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, linear in sampled_linears(model).items():
        kind = name.split(".layer.")[1].partition(".")[2]
        if kind not in shared:
            factors = (torch.empty(n, RANK) for n in (linear.in_features, linear.out_features))
            a, b = (nn.Parameter(nn.init.orthogonal_(factor)) for factor in factors)
            shared[kind] = a, b
        model.set_submodule(name, LoTR(linear, *shared[kind]))
    return model


def kernel_sparse(model: Loss) -> Loss:
    """Add a sparse update to every linear of the layers."""
    _freeze(model)
    for name, linear in sampled_linears(model).items():
        model.set_submodule(name, KernelSparse(linear, RANK))
    return model


# Optimizers


class NagGS(torch.optim.Optimizer):
    """Nesterov's flow in semi-implicit steps (Leplat et al. 2022, NAG-GS, arXiv 2209.14937, algorithm 1).

    Its state is one tensor a weight, v, beside a number gamma: half of AdamW's.

    Args:
        lr: the step alpha; mu: how fast gamma and v are drawn to where they end; gamma: where it begins.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, mu: float = 1.0, gamma: float = 1.0
    ) -> None:
        super().__init__(params, {"lr": lr, "mu": mu, "gamma": gamma})

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Take a step from the gradients that `closure` leaves; return what it returns."""
        loss = closure()
        for group in self.param_groups:
            alpha, mu = group["lr"], group["mu"]
            a = alpha / (1 + alpha)
            group["gamma"] = gamma = (1 - a) * group["gamma"] + a * mu
            b = alpha * mu / (alpha * mu + gamma)
            for x in group["params"]:
                if x.grad is not None:
                    v = self.state[x].setdefault("v", x.clone())
                    v.lerp_(x, b).sub_(x.grad, alpha=b / mu)
                    x.lerp_(v, a)
        return loss


class Proximal(torch.optim.Optimizer):
    """Steps ``argmin f(x) + ||x - x_k||^2 / (2 lr)`` on a batch, each by a few of gradient descent.

    Each inner step is a forward and a backward pass of its own. (Asi and Duchi 2019, Stochastic (approximate) proximal
    point methods, arXiv 1810.05633.)
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, steps: int = 3) -> None:
        super().__init__(params, {"lr": lr, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Take a step; return the loss before it."""
        losses = []
        for group in self.param_groups:
            anchors = [x.clone() for x in group["params"]]
            for _ in range(group["steps"]):
                losses.append(closure())
                for x, anchor in zip(group["params"], anchors, strict=True):
                    if x.grad is not None:
                        x.lerp_(anchor, 0.5).sub_(
                            x.grad, alpha=group["lr"] / 2
                        )  # half of the way to its minimum
        return losses[0]


def nag_gs(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return NAG-GS with a gamma that stays."""
    return NagGS(_trained(model), rate)


def proximal(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return proximal steps of three inner ones."""
    return Proximal(_trained(model), rate)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return PyTorch's AdamW."""
    return torch.optim.AdamW(_trained(model), lr=rate)


def adamw_8_bits(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW with moments of 8 bits for all tensors of 4096 elements or more."""
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(_trained(model), lr=rate)
    return optimizer


def galore(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW on projected gradients of the linears of the layers, and on the others as they are."""
    projected = [linear.weight for linear in sampled_linears(model).values()]
    chosen = {id(weight) for weight in projected}
    others = [parameter for parameter in _trained(model) if id(parameter) not in chosen]
    groups = [{"params": projected, **GALORE}, {"params": others}]
    return GaLoreAdamW(groups, lr=rate, no_deprecation_warning=True)


@dataclass(frozen=True)
class Method:
    """One line of the table: what is trained, and how."""

    adapt: Callable[[Loss], nn.Module]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    rate: float
    batch: int | None = None  # samples of each batch that are taken; all by default


METHODS = {
    "AdamW": Method(full, adamw, 2e-4),
    "AdamW, 8 bits": Method(full, adamw_8_bits, 2e-4),
    "GaLore": Method(full, galore, 2e-4),
    "LoRA": Method(lora, adamw, 2e-3),
    "LoTR": Method(lotr, adamw, 5e-3),
    "sparse kernel": Method(kernel_sparse, adamw, 2e-3),
    "NAG-GS": Method(full, nag_gs, 2e-2),
    "proximal steps": Method(full, proximal, 5e-2),
    "entropy at test time": Method(norms, adamw, 1e-3, batch=8),
    "beam tree": Method(tree, adamw, 1e-3),
}


# Measuring


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return what an optimizer keeps from step to step, the projections of GaLore included."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    values += [getattr(value, "ortho_matrix", None) for value in values]
    return [value for value in values if isinstance(value, Tensor)]


def train(step: Step, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> list[float]:
    """Train one step a batch; return the losses, and leave the last gradients in the model."""
    losses = []
    for step.inputs in batches:

        @torch.enable_grad()  # type: ignore[untyped-decorator]
        def closure() -> float:
            step.model.zero_grad()
            loss = step.forward()
            loss.backward()
            return loss.item()

        losses.append(optimizer.step(closure))
    return losses


def measure(name: str, model: Loss, batches: Sequence[Batch], shapes: str, seed: int) -> list[Row]:
    """Train one method with Inductor and with wtacrs; return bytes, and losses early and late."""
    method, rows, baseline = METHODS[name], [], {}
    model = deepcopy(model).train()
    torch.manual_seed(seed)
    adapted = method.adapt(model)
    batches = [{key: value[: method.batch] for key, value in batch.items()} for batch in batches]
    for variant in VARIANTS_SHOWN:
        torch.manual_seed(seed)
        step = Step(adapted, batches[0], VARIANTS[variant]())
        optimizer = method.optimizer(step.model, method.rate)
        losses = train(step, optimizer, batches)
        grads = [parameter.grad for parameter in step.model.parameters() if parameter.grad is not None]
        found = {
            "weights": tensor_bytes(step.model.parameters()) / MIB,
            "gradients": tensor_bytes(grads) / MIB,
            "optimizer state": tensor_bytes(state_tensors(optimizer)) / MIB,
            "saved": saved_bytes(step) / MIB,
        }
        found["all"] = sum(found.values())
        step.check()
        window = max(1, len(losses) // 5)
        ends = {
            "first loss": statistics.mean(losses[:window]),
            "last loss": statistics.mean(losses[-window:]),
        }
        baseline = baseline or found
        figures = [(metric, value, "MiB", value / baseline[metric]) for metric, value in found.items()]
        figures += [(metric, value, "nats", None) for metric, value in ends.items()]
        rows += [
            Row(
                "optimizers", name, variant, metric, value, unit, ratio, shapes=shapes, seed=seed,
                **circumstances(),
            )
            for metric, value, unit, ratio in figures
        ]  # fmt: skip
    torch._dynamo.reset()
    return rows


def main(
    method: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(METHODS)}; all by default.")
    ] = None,
    batch: int = 32,
    length: int = 48,
    steps: int = 50,
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Two methods, two layers, three steps; keep no rows.")] = False,
) -> None:
    """Train with every optimizer and adapter; append rows to bench/results."""
    model, drawn = load(batch, length, seed)
    names = method or list(METHODS)
    if quick:
        names, steps = method or ["GaLore", "LoTR"], 3
        shorten(model, 2)
    batches = list(islice(drawn, steps))
    for name in names:
        samples = METHODS[name].batch or batch
        record(
            measure(name, model, batches, f"batch={samples} length={length} steps={steps}", seed), not quick
        )


if __name__ == "__main__":
    typer.run(main)
