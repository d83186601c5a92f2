"""The small tables: shapes and counts are what their docstrings say."""

import numpy as np
import pytest

from workingpapers.data import descriptions, iris, wine


@pytest.mark.parametrize(
    ("loader", "shape", "counts"), [(iris, (150, 4), [50, 50, 50]), (wine, (178, 13), [59, 71, 48])]
)
def test_columns_and_classes(loader, shape, counts):
    data = loader()
    assert data["columns"].shape == shape
    assert np.isfinite(data["columns"]).all()
    assert (data["columns"] > 0).all()
    assert np.bincount(data["labels"]).tolist() == counts


def test_one_iris_is_separated_by_its_petals_alone():
    data = iris()
    petal_length = data["columns"][:, 2]
    assert petal_length[data["labels"] == 0].max() < petal_length[data["labels"] != 0].min()


def test_the_text_is_english_in_27_letters():
    data = descriptions()
    text = "".join(data.extra["alphabet"][code] for code in data["codes"])
    assert 10_000 < len(text) < 20_000
    assert "  " not in text
    assert "fisher s paper is a classic in the field" in text
    assert text.count("e") > 5 * text.count("k")
