"""Small real tables that scikit-learn carries."""

from __future__ import annotations

import re

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


def iris() -> Dataset:
    """150 flowers: `columns` (150, 4), lengths and widths in cm; `labels` (150,), 0 to 2, fifty of each species."""
    columns, labels = datasets.load_iris(return_X_y=True)
    return Dataset(
        "iris",
        {"columns": columns, "labels": labels},
        "Sepals and petals of 150 irises of three species, Anderson and Fisher.",
        "UCI, CC BY 4.0",
        _SOURCE,
    )


def wine() -> Dataset:
    """178 wines: `columns` (178, 13), raw measurements; `labels` (178,), 0 to 2, the grower."""
    columns, labels = datasets.load_wine(return_X_y=True)
    return Dataset(
        "wine",
        {"columns": columns, "labels": labels},
        "Chemical analysis of 178 wines of three growers in one region of Italy.",
        "UCI, CC BY 4.0",
        _SOURCE,
    )


def descriptions() -> Dataset:
    """About 12,000 characters of English: `codes` (n,), indices into `extra["alphabet"]`, a space and a to z.

    The texts in which scikit-learn describes its data sets, in lower case, with whatever is no letter made one space.
    """
    named = (datasets.load_breast_cancer, datasets.load_diabetes, datasets.load_digits, datasets.load_iris)
    text = " ".join(load().DESCR for load in (*named, datasets.load_linnerud, datasets.load_wine))
    alphabet = " abcdefghijklmnopqrstuvwxyz"
    letters = re.sub("[^a-z]+", " ", text.lower())
    return Dataset(
        "descriptions",
        {"codes": np.array([alphabet.index(letter) for letter in letters])},
        "How scikit-learn's documentation describes six small data sets.",
        "BSD-3-Clause",
        _SOURCE,
        {"alphabet": alphabet},
    )
