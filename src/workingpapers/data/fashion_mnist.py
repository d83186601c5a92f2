"""Fashion-MNIST, as Debian packages it."""

from __future__ import annotations

import gzip
from typing import Literal

import numpy as np

from workingpapers.common.validation import check_choice
from workingpapers.data.source import Dataset, system_file

_FOLDER = "/usr/share/datasets/fashion-mnist"
_PACKAGE = "dataset-fashion-mnist"
_FILES = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def fashion_mnist(split: Literal["train", "test"] = "train") -> Dataset:
    """Grey images of Zalando's articles in ten balanced classes.

    `images`, uint8 of shape (n, 28, 28), 0 is background; `labels`, uint8 of shape (n,), from 0 to 9;
    `extra["classes"]`, the ten names.

    Parameters
    ----------
    split : "train" for 60,000 images, "test" for the other 10,000.

    Raises
    ------
    DataNotInstalled : the Debian package dataset-fashion-mnist is absent.
    ValueError : split is neither, or the files hold something else.
    """
    check_choice("split", split, tuple(_FILES))
    prefix, n = _FILES[split]
    images = _idx(f"{_FOLDER}/{prefix}-images-idx3-ubyte.gz", (n, 28, 28))
    labels = _idx(f"{_FOLDER}/{prefix}-labels-idx1-ubyte.gz", (n,))
    return Dataset(
        f"Fashion-MNIST, {split}",
        {"images": images, "labels": labels},
        "Product images of an online shop, made as a harder drop-in for the MNIST digits.",
        "MIT",
        f"Debian package {_PACKAGE}",
        {"classes": _CLASSES},
    )


def _idx(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """A gzipped IDX file of bytes: 0, 0, type 8, dimensions, their sizes in big-endian, then the bytes."""
    raw = gzip.decompress(system_file(path, package=_PACKAGE).read_bytes())
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    if not raw.startswith(header) or len(raw) != len(header) + int(np.prod(shape)):
        raise ValueError(f"{path} should hold {'x'.join(map(str, shape))} bytes")
    return np.frombuffer(raw, np.uint8, offset=len(header)).reshape(shape).copy()
