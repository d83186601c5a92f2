"""Causal graphs with real data or real parameters: protein signalling, and linear-Gaussian networks fitted to data."""

from __future__ import annotations

import json
from typing import Literal, get_args

import numpy as np
import pandas as pd

from workingpapers.data.source import Dataset, packaged_file

GaussianNetwork = Literal["ecoli70", "arth150", "magic-niab", "magic-irri"]

_DESCRIPTIONS: dict[GaussianNetwork, str] = {
    "ecoli70": "Expression of 46 genes of E. coli under stress, 70 relations.",
    "arth150": "Expression of 107 genes of Arabidopsis thaliana over the day, 150 relations.",
    "magic-niab": "Traits and genetic markers of winter wheat, 44 variables, 66 relations.",
    "magic-irri": "Traits and genetic markers of rice, 64 variables, 102 relations.",
}


def sachs() -> Dataset:
    """Protein signalling in single human cells: `columns` (7466, 11), concentrations; `adjacency` (11, 11), 0 or 1.

    adjacency[i, j] = 1 for i -> j in the graph of 18 accepted relations as the package gives it; it has one cycle,
    plcg -> PIP2 -> PIP3 -> plcg. The cells come from observation and from several interventions, not told apart.
    `extra["names"]` are the proteins.
    """
    package, version = "cdt", "0.6.0"
    measurements = pd.read_csv(packaged_file(package, "cdt/data/resources/cyto_full_data.csv", version=version))
    target = packaged_file(package, "cdt/data/resources/cyto_full_target.csv", version=version)
    names = list(measurements.columns)
    adjacency = np.zeros((len(names), len(names)))
    for cause, effect in pd.read_csv(target)[["Cause", "Effect"]].itertuples(index=False):
        adjacency[names.index(cause), names.index(effect)] = 1.0
    return Dataset(
        "sachs",
        {"columns": measurements.to_numpy(dtype=float), "adjacency": adjacency},
        "Flow cytometry of 11 phosphorylated proteins and lipids in 7,466 human immune cells (Sachs et al., 2005).",
        "published research data of unclear licence; read only",
        "cdt 0.6.0, cyto_full_data.csv and cyto_full_target.csv",
        {"names": names},
    )


def gaussian_network(name: GaussianNetwork) -> Dataset:
    """A linear-Gaussian network with parameters fitted to real data: x = intercepts + W' x + z.

    `weights` (d, d), entry (i, j) for i -> j; `noise_std` (d,), standard deviations of z; `intercepts` (d,).
    `extra["names"]` are the variables.

    Parameters
    ----------
    name : "ecoli70", "arth150", "magic-niab" or "magic-irri".
    """
    if name not in get_args(GaussianNetwork):
        raise ValueError(f"name must be one of {', '.join(map(repr, get_args(GaussianNetwork)))}, got {name!r}")
    path = f"pgmpy/utils/example_models/{name}.json"
    network = json.loads(packaged_file("pgmpy", path, version="1.1.2").read_text())
    names = network["nodes"]
    place = {variable: k for k, variable in enumerate(names)}
    weights = np.zeros((len(names), len(names)))
    intercepts, noise_std = np.zeros(len(names)), np.zeros(len(names))
    for effect, distribution in network["cpds"].items():
        coefficients = dict(distribution["coefficients"])
        intercepts[place[effect]] = coefficients.pop("(Intercept)")[0]
        noise_std[place[effect]] = np.sqrt(distribution["variance"][0])
        for cause, (coefficient,) in coefficients.items():
            weights[place[cause], place[effect]] = coefficient
    return Dataset(
        name,
        {"weights": weights, "noise_std": noise_std, "intercepts": intercepts},
        _DESCRIPTIONS[name],
        "bnlearn repository, CC BY-SA 3.0",
        f"pgmpy 1.1.2, {path}",
        {"names": names},
    )
