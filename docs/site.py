"""The site: pages of the repository, wherever they lie, with their links led from one to another.

mkdocs build --strict      # mkdocs.yml names this file among its hooks
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "bench/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Pages outside of docs: path in the repository -> on the site."""
LINK = re.compile(r"(\]\()([^()\s:#]+)((?:#[^()\s]*)?\))")
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def _places() -> dict[str, str]:
    """Return path in the repository -> on the site."""
    pictures = (path for path in (ROOT / "bench" / "results").iterdir() if path.suffix in (".png", ".svg"))
    pages = (path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".py"))
    return {
        **ELSEWHERE,
        **{f"bench/results/{path.name}": f"results/{path.name}" for path in pictures},
        **{path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs").as_posix() for path in pages},
    }


PLACES = _places()
SOURCES = {place: source for source, place in PLACES.items()}


def on_files(files: Files, config: Any) -> Files:
    """Add what lies elsewhere."""
    for source, place in PLACES.items():
        if not source.startswith("docs/"):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links in text from places in the repository to places on the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES[here])

    def lead(link: re.Match[str]) -> str:
        place = PLACES.get(posixpath.normpath(posixpath.join(folder, link[2])))
        return (
            link[0]
            if place is None
            else f"{link[1]}{posixpath.relpath(place, posixpath.dirname(here) or '.')}{link[3]}"
        )

    parts, end = [], 0
    for block in BLOCK.finditer(markdown):
        parts += [LINK.sub(lead, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(lead, markdown[end:])])
