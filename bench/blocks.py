"""Layers compiled one by one, as with regional compilation and FSDP2, beside the whole model as one graph.

    python -m bench.blocks                        # autocast, 4 layers, 49,152 words, 8 x 512 tokens
    python -m bench.blocks --rounds 0             # memory and compile time alone
    python -m bench.blocks --quick                # tiny sizes: does it run? keeps no rows

Ratios are to Inductor's with the whole model as one graph. Compile time: the first step, without caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import wtacrs_fx
from bench.harness import BASELINE, Row, compare, record, to_rows
from bench.models import PRECISIONS, TINY, WORDS, Shape, make_language_model
from wtacrs_fx import Policy
from wtacrs_fx.tools.steps import Step, inductor

POLICY = Policy(ratio=1.0)
"""All rows, without measurements that compile a graph again."""


def layers_of(model: nn.Module) -> Iterable[nn.Module]:
    """Return the decoder layers of a language model."""
    return [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]


class Parts(nn.Module):
    """Wrap a language model of transformers so that its loss is a graph of its own, which returns no logits."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.body, self.lm_head, self.autocast = model.model, model.lm_head, autocast

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy of the next token: a scalar."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            hidden = self.body(input_ids, use_cache=False).last_hidden_state
            logits = self.lm_head(hidden).float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


VARIANTS = {
    BASELINE: (inductor, None),
    "inductor, layers one by one": (inductor, layers_of),
    "wtacrs, all rows": (lambda: wtacrs_fx.backend(POLICY), None),
    "wtacrs, all rows, layers one by one": (lambda: wtacrs_fx.backend(POLICY), layers_of),
}


def measure(shape: Shape, precision: str, rounds: int) -> list[Row]:
    """Return saved bytes, peak, compile time and, with rounds, step time of each variant."""
    steps = {}
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model, inputs = make_language_model("llama-lm", shape, dtype)
    model = Parts(model.model, precision == "autocast")
    for variant, (compiler, layers) in VARIANTS.items():
        steps[variant] = Step(model, inputs, compiler(), layers)
    found = compare(steps, rounds)
    for variant, figures in found.items():
        seconds = steps[variant].first_call_seconds
        ratio = seconds / steps[BASELINE].first_call_seconds
        figures.append(("first step", "s", {"value": seconds, "ratio": ratio}))
    return to_rows("blocks", "llama-lm", shape, precision, found)


def main(
    layers: int = 4,
    d: int = 576,
    heads: int = 9,
    batch: int = 8,
    seq: int = 512,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "autocast",
    rounds: Annotated[int, typer.Option(help="Timed steps of each variant; 0 for memory alone.")] = 5,
    quick: Annotated[bool, typer.Option(help="Tiny sizes and two rounds; keep no rows.")] = False,
) -> None:
    """Measure a language model with its loss, compiled both ways; append rows to bench/results."""
    shape = TINY if quick else Shape(layers, d, heads, batch, seq, WORDS["llama-lm"])
    with torch._inductor.config.patch(force_disable_caches=True):
        record(measure(shape, precision, 2 if quick else rounds), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
