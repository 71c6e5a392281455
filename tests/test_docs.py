"""The pages: their code runs, their links lead somewhere, and the API page has every public name."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wtacrs_fx

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text()]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
API = (ROOT / "docs" / "api.md").read_text()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = HEADING.findall(BLOCK.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def signature(name: str) -> str:
    """A public name with its parameters; annotations without the quotes of strings."""
    if isinstance(public := getattr(wtacrs_fx, name), type) and issubclass(public, Exception):
        return name
    return name + re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(public)))


def summary(name: str) -> str:
    """The first paragraph of a docstring as markdown."""
    first = inspect.getdoc(getattr(wtacrs_fx, name)).split("\n\n")[0]
    return " ".join(re.sub(r":\w+:|`(?=`)", "", first).split())


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()  # shapes of another page make no size symbolic here
    text, names = page.read_text(), {}
    for block in BLOCK.finditer(text):
        if block[1] == "python":
            above = "\n" * text.count("\n", 0, block.start(2))  # so that errors name the line of the page
            exec(compile(above + block[2], str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link:
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every page is in the site's index, every link and anchor leads somewhere there as well."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    home = (tmp_path / "index.html").read_text()
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', home)
    assert pictures and all((tmp_path / picture).is_file() for picture in pictures if "://" not in picture)
    assert "<table>" in home and 'href="measurements.html"' in home


@pytest.mark.parametrize("name", wtacrs_fx.__all__)
def test_a_public_name_is_described(name: str) -> None:
    [section] = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", API, re.DOTALL | re.MULTILINE)
    described, public = " ".join(section.split()), getattr(wtacrs_fx, name)
    assert f"```text {signature(name)} ```" in described
    assert summary(name) in described
    if isinstance(public, type):
        assert [member for member in vars(public) if member[0] != "_" and f"`{member}" not in section] == []
