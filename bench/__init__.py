"""Benchmarks of wtacrs_fx: one harness, one short file for each benchmark, rows of evidence in `results/`."""
