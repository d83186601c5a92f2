import numpy as np
import pytest

from workingpapers.data import DataNotInstalled, fashion_mnist


@pytest.mark.parametrize(("split", "n"), [("train", 60_000), ("test", 10_000)])
def test_images_and_labels_are_those_that_were_published(split, n):
    try:
        data = fashion_mnist(split)
    except DataNotInstalled:
        pytest.skip("dataset-fashion-mnist is not installed")
    assert data["images"].shape == (n, 28, 28)
    assert np.bincount(data["labels"]).tolist() == [n // 10] * 10
    assert data["images"].max() == 255
    if split == "train":  # the published mean and standard deviation of the training images
        assert data["images"].mean() / 255 == pytest.approx(0.2860, abs=5e-5)
        assert data["images"].std() / 255 == pytest.approx(0.3530, abs=5e-5)
        assert data.extra["classes"][data["labels"][0]] == "ankle boot"
    data["images"][0] = 0  # the arrays are the caller's


def test_another_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        fashion_mnist("validation")
