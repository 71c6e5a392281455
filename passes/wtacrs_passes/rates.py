"""What decisions rest on that is measured once, then kept in a file: how long a product takes in each precision on a
device, how fast a folder takes bytes.

Of a large product a part is measured: of more columns the rounding of the factors is a smaller share, and of more rows
what is done to the result, so that one in fewer bits is no slower than it seems.

Where other processes take the processors meanwhile, as when data are loaded, each part of a product that several
threads share waits for the last of them. That is seen by how often this process was put aside (`getrusage`); such rates
serve this process and are not kept.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch._inductor.config
from torch import Tensor

from .files import write_at_once
from .graph.torch_api import cache_dir, real_tensors
from .maths import ops
from .maths.estimators import NOISE
from .maths.low_precision import multiply, round_columns
from .maths.offload import measure_writing

Rates = dict[str, float]
"""Seconds by precision; of a folder, bytes per second."""

DRAWING = "drawing"
"""Among the precisions: the draw of half of the rows of both factors, without a product."""
ROUNDING = "rounding"
"""Among the precisions: the rounding of b to 8 bits, which products that share it do once."""
_MOST_ROWS, _MOST_COLUMNS = 4096, 2048
_ROUNDS, _ATTEMPTS = 5, 3


def seconds(
    precisions: Sequence[str], rows: int, m: int, n: int, dtype: torch.dtype, device: torch.device
) -> Rates:
    """Return how long ``a^T b`` takes in each precision, with the rounding; of large factors a part is measured.

    Kept for the process and, unless Inductor's caches are off, in ``wtacrs_rates.json`` in their folder; measured
    anew where Inductor is to autotune. A rate that was given stays, so that one program leads to one plan: precisions
    that are asked for later are measured beside the exact product, and scaled to what that took before.

    Args:
        precisions: of a [rows, m] and b [rows, n]: ``exact``, in `dtype`, or as of :func:`low_precision.multiply`;
            :data:`DRAWING`; :data:`ROUNDING`.
    """
    rows = min(rows, _MOST_ROWS)
    rows -= rows % (1 << max(0, rows.bit_length() - 2))  # 512, 768, 1024, ...: what is alike has one rate
    m, n = (min(size, _MOST_COLUMNS) for size in (m, n))
    key = f"{dtype} {rows} x {m} x {n}"
    known = _of_process(_machine(device)).setdefault(key, {})
    if missing := [precision for precision in precisions if precision not in known]:
        asked = ["exact", *(one for one in missing if one != "exact")]
        found, is_calm = _measure(asked, (rows, m, n), dtype, device)
        scale = known.get("exact", found["exact"]) / found["exact"]
        known.update({precision: scale * time for precision, time in found.items() if precision not in known})
        if is_calm:
            _keep(_machine(device), key, known)
    return {precision: known[precision] for precision in precisions}


def bytes_per_second(folder: str) -> float:
    """Return how fast a folder takes bytes; kept as :func:`seconds` are."""
    known = _of_process(folder)
    if "writing" not in known:
        with real_tensors():
            known["writing"] = {"bytes per second": measure_writing(folder)}
        _keep(folder, "writing", known["writing"])
    return known["writing"]["bytes per second"]


@functools.cache
def _of_process(place: str) -> dict[str, Rates]:
    """Return what is known of a machine or a folder, to be added to."""
    known: dict[str, Rates] = {}
    if not _is_without_file() and not torch._inductor.config.max_autotune:
        known.update(_read().get(place, {}))
    return known


def _machine(device: torch.device) -> str:
    """Return what rates depend on beside the product."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _is_without_file() -> bool:
    return bool(torch._inductor.config.force_disable_caches)


def _file() -> Path:
    return Path(cache_dir(), "wtacrs_rates.json")


def _read() -> dict[str, dict[str, Rates]]:
    """Return what the file holds; nothing where there is none, or none that can be read."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(place: str, key: str, rates: Rates) -> None:
    """Add to the file; another process that writes meanwhile may lose its rates, never the file."""
    if _is_without_file():
        return
    table = _read()
    table.setdefault(place, {})[key] = rates
    with contextlib.suppress(OSError):
        write_at_once(_file(), json.dumps(table, indent=1))


def _measure(
    precisions: Sequence[str], sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Rates, bool]:
    """Return rates, and whether nothing else took the processors: where it did, of the calmest of some attempts."""
    attempts: list[tuple[int, Rates]] = []
    while len(attempts) < _ATTEMPTS:
        attempts.append(_attempt(precisions, sizes, dtype, device))
        if device.type != "cpu" or attempts[-1][0] <= _ROUNDS * len(precisions):
            return attempts[-1][1], True
    return min(attempts, key=lambda attempt: attempt[0])[1], False


def _attempt(
    precisions: Sequence[str], sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[int, Rates]:
    """Return medians of interleaved calls, and how often a thread of this process was put aside meanwhile.

    Random numbers are of a generator of their own.
    """
    with real_tensors(), torch.no_grad():
        generator = torch.Generator(device).manual_seed(0)
        make = functools.partial(torch.rand, generator=generator, device=device)
        rows, *columns = sizes
        a, b = (make(rows, number).to(dtype) for number in columns)
        draws = [make(size) for x in (a, b) for size in x.shape]
        calls = {precision: _call(precision, a, b, draws) for precision in precisions}
        for call in calls.values():  # what is compiled is compiled now
            _time(call, device)
        before = _times_put_aside()
        found: dict[str, list[float]] = {precision: [] for precision in precisions}
        for _ in range(_ROUNDS):
            for precision, call in calls.items():
                found[precision].append(_time(call, device))
        aside = _times_put_aside() - before
    return aside, {precision: statistics.median(times) for precision, times in found.items()}


def _times_put_aside() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _call(precision: str, a: Tensor, b: Tensor, draws: Sequence[Tensor]) -> Callable[[], Tensor]:
    if precision == "exact":
        return lambda: a.T @ b
    if precision == DRAWING:
        return lambda: _draw(a, b, draws[0])
    if precision == ROUNDING:
        return lambda: round_columns(b, draws[2], draws[3], "int8", compiled=True)[0]
    return lambda: multiply(a, b, draws, precision, compiled=True)


def _draw(a: Tensor, b: Tensor, draws: Tensor) -> Tensor:
    norms = [ops.row_norms([x]) for x in (a, b)]
    noise = draws.repeat(NOISE)[:NOISE]
    indices, scales = ops.choose_rows(norms, noise, max(1, len(a) // 2), "wta-systematic")
    ops.gather_rows(a, indices, scales)
    drawn: Tensor = ops.gather_rows(b, indices)
    return drawn


def _time(call: Callable[[], Tensor], device: torch.device) -> float:
    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    start = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - start
