import numpy as np
import pytest

from workingpapers.data import DataNotInstalled, blood_cells


def test_the_components_are_those_of_the_expression():
    pytest.importorskip("h5py")
    try:
        cells = blood_cells()
    except DataNotInstalled:
        pytest.skip("scanpy is not installed")
    assert len(cells.extra["types"]) == 10
    assert len(cells.extra["genes"]) == cells["expression"].shape[1]
    assert np.bincount(cells["labels"])[cells.extra["types"].index("Dendritic")] == 240
    # the components were computed on more cells than these, hence not exactly those of the expression here
    leading = np.linalg.svd(cells["expression"] - cells["expression"].mean(0), full_matrices=False)[0][:, 0]
    assert abs(np.corrcoef(leading, cells["components"][:, 0])[0, 1]) > 0.98
