from __future__ import annotations

import json

import sympy

from wtacrs_passes.report import Report, SiteReport, format_bytes

BATCH, LENGTH = sympy.symbols("s0 s1", integer=True, positive=True)
ROWS = BATCH * LENGTH
KEPT = sympy.Min(ROWS, sympy.Max(32, (3 * ROWS + 9) // 10))
STATIC = SiteReport(
    "layers.0.up", "layers.0.up.weight", 128, 39, "crs", "forward", "||x||", "rows", 16384, 4992
)
DYNAMIC = SiteReport(
    "head", "head.weight", ROWS, KEPT, "crs", "forward", "||x||", "rows", 64 * ROWS, 64 * KEPT
)
LEFT = SiteReport("embed", "embed.weight", 0, 0, "", "", "", "exact", 0, 0, "gradient computed by embedding")


def test_table_is_aligned_and_totals_are_stated() -> None:
    text = str(Report((STATIC, LEFT), 2**20, 2**19))
    lines = text.splitlines()
    assert lines[0].index("rows") == lines[1].index("128")
    assert lines[-2] == "saved for backward: 1.0 MiB -> 512.0 KiB (0.50 of Inductor's)"
    assert lines[-1] == "1 of 2 weight gradients sampled"
    assert "gradient computed by embedding" in text


def test_symbolic_sizes_are_formulas() -> None:
    report = Report((DYNAMIC,), 64 * ROWS, 64 * KEPT)
    assert "s0*s1" in str(report)
    json.dumps(report.to_dict())
    back = Report.from_dict(report.to_dict()).sites[0]
    values = dict(zip(sorted(back.kept.free_symbols, key=str), (4, 32), strict=True))
    assert back.kept.subs(values) == 39


def test_round_trip() -> None:
    report = Report((STATIC, LEFT), 2**20, 2**19, from_cache=True)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert "code from the cache" in str(report)


def test_an_empty_report_is_printed() -> None:
    assert "0 of 0 weight gradients sampled" in str(Report((), 0, 0))


def test_bytes_have_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * 2**30)] == ["0 B", "1023 B", "1.0 KiB", "3.0 GiB"]
    assert format_bytes(64 * ROWS) == "64*s0*s1 B"
