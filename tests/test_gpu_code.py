"""Code for GPUs compiles where there is none, without spills, in the shared memory that there is.

`make gpu-code` compiles all kernels of all cases for all capabilities; the ordinary run some of one, by a seed that a
failure prints (``WTACRS_GPU_CODE_SEED`` repeats it).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from conftest import seed_of_run
from gpu_code import CASES, CUOBJDUMP, SHARED, Kernel

SEED = seed_of_run("WTACRS_GPU_CODE_SEED")
EVERY = list(itertools.product(SHARED, CASES))
ALL = os.environ.get("WTACRS_GPU_CODE") == "all"
SEEN = [(90, "bert"), (80, "llama"), (80, "llama, 8 bits"), (80, "products again")]
"""What an ordinary run draws from: all kernels of these were compiled, of the others some."""
DRAWN = EVERY if ALL else random.Random(SEED).sample(SEEN, 1)
MOST = 0 if ALL else 30  # kernels
SLOW_PATH = 64
"""Bytes of a table on the stack with which sines of large numbers are computed; all else there has been spilled."""


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton is not built for NVIDIA")
@pytest.mark.parametrize(("capability", "case"), DRAWN)
def test_kernels_spill_nothing_and_fit_into_shared_memory(capability: int, case: str) -> None:
    """In a process of its own: this one has Triton's interpreter, and no GPU."""
    script = Path(__file__).with_name("gpu_code.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = script.parents[1]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "passes", script.parent)))
    done = subprocess.run(
        [sys.executable, str(script), str(capability), str(MOST), case],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"WTACRS_GPU_CODE_SEED={SEED}: {done.stderr[-4000:]}"
    kernels = [Kernel(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(kernels) > 30  # ours among them
    assert {kernel.case for kernel in kernels} == {"ours", case}
    assert [kernel for kernel in kernels if kernel.local > (SLOW_PATH if "sin" in kernel.name else 0)] == []
    assert [kernel for kernel in kernels if kernel.shared > SHARED[capability] * 1024] == []
