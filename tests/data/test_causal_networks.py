"""The causal networks: what the packages say about them holds of what is loaded."""

import numpy as np
import pytest

from workingpapers.causality import sample_linear_sem, topological_order
from workingpapers.data import DataNotInstalled, gaussian_network, sachs


def loaded(loader, *arguments):
    try:
        return loader(*arguments)
    except DataNotInstalled as missing:
        pytest.skip(str(missing))


def test_sachs_has_eleven_proteins_and_eighteen_relations():
    data = loaded(sachs)
    assert data["columns"].shape == (7466, 11)
    assert (data["columns"] > 0).all()
    assert data["adjacency"].sum() == 18
    names = data.extra["names"]
    assert data["adjacency"][names.index("praf"), names.index("pmek")] == 1


@pytest.mark.parametrize(
    ("name", "nodes", "edges"),
    [("ecoli70", 46, 70), ("arth150", 107, 150), ("magic-niab", 44, 66), ("magic-irri", 64, 102)],
)
def test_gaussian_networks_are_weighted_dags(name, nodes, edges):
    network = loaded(gaussian_network, name)
    W = network["weights"]
    assert W.shape == (nodes, nodes)
    assert np.count_nonzero(W) == edges
    assert topological_order(W) is not None
    assert (network["noise_std"] > 0).all()
    assert len(network.extra["names"]) == nodes


def test_data_drawn_from_a_network_have_its_means():
    network = loaded(gaussian_network, "ecoli70")
    W, intercepts = network["weights"], network["intercepts"]
    X = sample_linear_sem(W, network["noise_std"], 4000, intercepts=intercepts, random_state=0)
    means = np.linalg.solve((np.eye(len(W)) - W).T, intercepts)
    assert (np.abs(X.mean(axis=0) - means) < 5 * X.std(axis=0) / np.sqrt(4000)).all()


def test_an_unknown_network_is_named():
    with pytest.raises(ValueError, match=r"name must be one of 'ecoli70'.* got 'asia'"):
        gaussian_network("asia")
