"""Run every benchmark, each in a process of its own, then print the tables; `--quick` as for each of them."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = (
    ["synthetic_variance"],
    ["gradient_variance"],
    ["compile_time"],
    ["memory_time"],
    ["memory_time", "--dtype", "bfloat16", "--rounds", "0"],
)


def run(name: str, *options: str) -> None:
    subprocess.run([sys.executable, "-m", f"bench.{name}", *options], check=True)


if __name__ == "__main__":
    for name, *options in BENCHMARKS:
        run(name, *options, *sys.argv[1:])
    run("tables")
