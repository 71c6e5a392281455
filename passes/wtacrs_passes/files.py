"""Files that several processes write and read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_at_once(path: Path, text: str) -> None:
    """Write a file, and its folder: another process sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
