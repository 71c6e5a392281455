"""Where figures come from: the code and the processor. No path, no host name."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

_ROOT = Path(__file__).parents[2]
_NO_CODE = (":!bench/results", ":!README.md", ":!docs")


@cache
def commit() -> str:
    """Return the abbreviated commit, with ``+dirty`` if any code differs from it; ``unknown`` outside a checkout."""
    if not (_ROOT / ".git").exists():
        return "unknown"  # installed from a wheel
    found = _git("rev-parse", "--short=12", "--verify", "HEAD")
    return (found or "uncommitted") + (
        "+dirty" if _git("status", "--porcelain", "--", ".", *_NO_CODE) else ""
    )


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False).stdout.strip()


def processor(device: str) -> str:
    """Return the name of the GPU (``none`` where there is none) or of the CPU.

    Args:
        device: ``cuda`` or ``cpu``.
    """
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
