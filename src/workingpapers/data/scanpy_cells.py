"""Single cells that the package scanpy carries; read with h5py, without importing scanpy."""

from __future__ import annotations

from workingpapers.common.validation import require
from workingpapers.data.source import Dataset, packaged_file

_FILE = "scanpy/datasets/10x_pbmc68k_reduced.h5ad"


def blood_cells() -> Dataset:
    """700 human blood cells of ten types.

    `expression` (700, 765), scaled log-counts of 765 variable genes; `components` (700, 50), its principal components,
    largest variance first; `labels` (700,), indices into `extra["types"]`; `extra["genes"]`, 765 names.

    Raises
    ------
    DataNotInstalled : scanpy is absent.
    ImportError : h5py is absent.
    ValueError : the file holds something else.
    """
    path = packaged_file("scanpy", _FILE, version="1.11.5")
    with require("h5py", extra="data").File(path) as file:
        expression = file["X"][:].astype(float)
        components = file["obsm"]["X_pca"].astype(float)
        labels = file["obs"]["bulk_labels"].astype(int)
        types = [name.decode() for name in file["uns/bulk_labels_categories"][:]]
        genes = [name.decode() for name in file["var"]["index"]]
    if expression.shape != (700, 765) or components.shape != (700, 50) or labels.shape != (700,) or len(types) != 10:
        raise ValueError(f"{path} should hold 700 cells of 10 types, 765 genes and 50 components")
    return Dataset(
        "blood cells",
        {"expression": expression, "components": components, "labels": labels},
        "Peripheral blood mononuclear cells of a healthy donor, a subset of the 68,000 of 10x Genomics.",
        "10x Genomics, CC BY 4.0",
        f"scanpy, {_FILE}",
        {"types": types, "genes": genes},
    )
