"""Run every benchmark, each in a process of its own, then print the tables; `--quick` as for each of them."""

from __future__ import annotations

import shlex
import subprocess
import sys

DEEP = (
    "--model bert --layers 12 --d 512 --heads 8 --seq 256 --rounds 0 "
    "--variant 'inductor budget 0.9' --variant 'wtacrs 0.3 balanced'"
)
SMOLLM2 = "--layers 30 --d 576 --heads 9 --batch 2 --seq 512"
BENCHMARKS = (
    ["synthetic_variance"],
    ["gradient_variance"],
    ["gradient_error"],
    ["gradient_norms"],
    ["paper_tables", "--check"],
    ["compile_time"],
    ["compile_time", *shlex.split(SMOLLM2), "--model", "llama-lm", "--no-warm"],
    ["memory_time"],
    ["memory_time", "--precision", "bfloat16", "--rounds", "0"],
    ["memory_time", *shlex.split(DEEP)],
    ["regime"],
    ["regime", *shlex.split(SMOLLM2)],
    ["regime", *shlex.split(SMOLLM2), "--precision", "float32"],
    ["modern"],
    ["blocks"],
    ["memory_target"],
    ["offload"],
    ["roofline"],
    ["encodings"],
    ["products"],
    ["estimators"],
    ["codes"],
    ["frontier"],
    ["scaling"],
    ["well_known"],
    ["gpu"],
    ["accuracy"],
    ["trainer"],
    ["trl"],
    ["optimizers"],
    ["pictures"],
)


def run(name: str, *options: str) -> None:
    subprocess.run([sys.executable, "-m", f"bench.{name}", *options], check=True)


if __name__ == "__main__":
    for name, *options in BENCHMARKS:
        run(name, *options, *sys.argv[1:])
    run("tables")
