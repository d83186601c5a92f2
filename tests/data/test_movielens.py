import numpy as np
import pytest

from workingpapers.data import DataNotInstalled, movielens_100k


def test_ratings_are_those_that_were_published():
    try:
        data = movielens_100k()
    except DataNotInstalled:
        pytest.skip("recbole is not installed")
    assert np.bincount(data["ratings"].astype(int)).tolist() == [0, 6110, 11370, 27145, 34174, 21201]
    assert np.bincount(data["users"]).min() == 20
    assert len(set(zip(data["users"].tolist(), data["films"].tolist(), strict=True))) == 100_000
    assert np.bincount(data["films"]).argmax() == 49
    assert data.extra["titles"][49] == "Star Wars"
    assert "read only" in data.licence
