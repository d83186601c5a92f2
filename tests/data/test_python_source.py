"""The corpus is the standard library: whole files, once each, in an order that does not change."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from workingpapers.data import DataNotInstalled, python_source


@pytest.fixture(scope="module")
def corpus():
    try:
        return python_source()
    except DataNotInstalled:
        pytest.skip("this Python has no sources")


@pytest.mark.parametrize("part", ["train", "validation"])
def test_each_part_is_its_files_in_order(corpus, part):
    root = Path(sysconfig.get_path("stdlib"))
    files = corpus.extra[f"{part}_files"]
    assert files == sorted(files)
    assert corpus[part].dtype == np.uint8
    assert corpus[part].tobytes() == b"".join((root / file).read_bytes() for file in files)


def test_no_file_is_in_both_parts_and_none_is_a_test(corpus):
    train, validation = (set(corpus.extra[f"{part}_files"]) for part in ("train", "validation"))
    assert not train & validation
    assert len(train) + len(validation) > 300
    assert 8 < len(train) / len(validation) < 10
    assert {"argparse.py", "json/decoder.py"} <= train | validation
    assert not any("test" in Path(file).parts or "site-packages" in file for file in train | validation)


def test_it_is_english_and_python(corpus):
    assert len(corpus["train"]) > 5_000_000
    counts = np.bincount(corpus["train"], minlength=256)
    assert counts.argmax() == ord(" ")
    assert counts[32:127].sum() + counts[10] > 0.99 * counts.sum()


def test_two_calls_agree(corpus):
    assert np.array_equal(python_source()["validation"], corpus["validation"])
