"""Small real tables that scikit-learn carries."""

from __future__ import annotations

import numpy as np
from sklearn import datasets

from workingpapers.data.source import Dataset

_SOURCE = "scikit-learn, sklearn.datasets"


def diabetes() -> Dataset:
    """442 patients: `columns` (442, 10), centred and scaled to unit norm; `response` (442,), disease progression."""
    columns, response = datasets.load_diabetes(return_X_y=True)
    return Dataset(
        "diabetes",
        {"columns": columns, "response": response},
        "Ten baseline variables of 442 diabetes patients and a measure of progression after one year.",
        "public, from Efron et al., Least Angle Regression (2004)",
        _SOURCE,
    )


def digits() -> Dataset:
    """1,797 handwritten digits: `images` (1797, 64), grey values scaled to [0, 1]; `labels` (1797,), 0 to 9."""
    images, labels = datasets.load_digits(return_X_y=True)
    return Dataset(
        "digits",
        {"images": np.asarray(images) / 16.0, "labels": labels},
        "8 x 8 images of handwritten digits, the test half of the UCI optical recognition set.",
        "UCI, CC BY 4.0",
        _SOURCE,
    )


def breast_cancer() -> Dataset:
    """569 tumours: `columns` (569, 30), raw measurements; `labels` (569,), 0 malignant and 1 benign."""
    columns, labels = datasets.load_breast_cancer(return_X_y=True)
    return Dataset(
        "breast cancer",
        {"columns": columns, "labels": labels},
        "Thirty measurements of cell nuclei of 569 breast tumours, Wisconsin.",
        "UCI, CC BY 4.0",
        _SOURCE,
    )
