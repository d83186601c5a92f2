"""Film ratings that the package recbole carries; read without importing it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workingpapers.data.source import Dataset, packaged_file

_FOLDER = "recbole/dataset_example/ml-100k"


def movielens_100k() -> Dataset:
    """100,000 ratings of 1,682 films by 943 people, September 1997 to April 1998; everyone rated at least 20 films.

    `users`, `films` and `ratings`, each (100000,): indices from 0 and stars from 1 to 5; `seconds` (100000,), when,
    since 1970; `extra["titles"]`, 1,682 names.

    Raises
    ------
    DataNotInstalled : recbole is absent.
    ValueError : the files hold something else.
    """
    path = packaged_file("recbole", f"{_FOLDER}/ml-100k.inter", version="1.2.1")
    names = packaged_file("recbole", f"{_FOLDER}/ml-100k.item", version="1.2.1")
    table = pd.read_csv(path, sep="\t")
    table.columns = [column.partition(":")[0] for column in table.columns]
    films = pd.read_csv(names, sep="\t", dtype=str, keep_default_na=False)
    titles = [""] * len(films)
    for number, title in zip(films.iloc[:, 0], films.iloc[:, 1], strict=True):
        titles[int(number) - 1] = title
    users, places = table["user_id"].to_numpy(np.int64) - 1, table["item_id"].to_numpy(np.int64) - 1
    if table.shape != (100_000, 4) or users.max() != 942 or places.max() != 1681 or len(titles) != 1682:
        raise ValueError(f"{path} should hold 100,000 ratings by 943 users of 1,682 films")
    return Dataset(
        "MovieLens 100k",
        {
            "users": users,
            "films": places,
            "ratings": table["rating"].to_numpy(float),
            "seconds": table["timestamp"].to_numpy(np.int64),
        },
        "Film ratings collected by GroupLens Research at the University of Minnesota.",
        "GroupLens: research use, no redistribution; read only",
        f"recbole 1.2.1, {_FOLDER}",
        {"titles": titles},
    )
