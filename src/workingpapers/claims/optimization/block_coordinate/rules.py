"""Rules, partitions and updates on least squares, logistic regression and softmax: data A, B, C and a real one."""

from __future__ import annotations

from typing import Any

import numpy as np

from workingpapers.claims.optimization.block_coordinate.problems import (
    FIGURES,
    LAST,
    PAPER,
    curve,
    descend,
    loss_of,
)
from workingpapers.desk.claim import (
    Cell,
    Row,
    always,
    bars,
    claim,
    line,
    lower,
    scales,
    seeds,
)

RULES: dict[str, dict[str, Any]] = {
    "random, Hb": {"selection": "random"},
    "GS, Hb": {"selection": "gs"},
    "GSD, Hb": {"selection": "gsd"},
    "GSD Gershgorin, Hb": {"selection": "gsd", "gsd_bound": "gershgorin"},
    "IHT, Hb": {"selection": "iht"},
    "random, Lb": {"selection": "random", "update": "lb"},
    "cyclic, Lb": {"selection": "cyclic", "update": "lb"},
    "Lipschitz, Lb": {"selection": "lipschitz", "update": "lb"},
    "GS, Lb": {"selection": "gs", "update": "lb"},
    "GSD, Lb": {"selection": "gsd", "update": "lb"},
    "IHT, Lb": {"selection": "iht", "update": "lb", "iht_safeguard": False},
    "Sort, random, Lb": {"partition": "sort", "selection": "random", "update": "lb"},
    "Sort, random, Hb": {"partition": "sort", "selection": "random"},
    "Sort, cyclic, Lb": {"partition": "sort", "selection": "cyclic", "update": "lb"},
    "Sort, cyclic, Hb": {"partition": "sort", "selection": "cyclic"},
    "Sort, GS, Lb": {"partition": "sort", "selection": "gs", "update": "lb"},
    "Sort, GSL, Lb": {"partition": "sort", "selection": "gsl", "update": "lb"},
    "Sort, GS, Hb": {"partition": "sort", "selection": "gs"},
    "Sort, GSL, Hb": {"partition": "sort", "selection": "gsl"},
    "Sort, GSD, Hb": {"partition": "sort", "selection": "gsd"},
    "Sort, GSQ, Hb": {"partition": "sort", "selection": "gsq"},
    "Order, GSL, Lb": {"partition": "order", "selection": "gsl", "update": "lb"},
    "Avg, GSL, Lb": {"partition": "avg", "selection": "gsl", "update": "lb"},
    "Order, GS, Lb": {"partition": "order", "selection": "gs", "update": "lb"},
    "Order, GS, LA": {"partition": "order", "selection": "gs", "update": "la"},
    "GSD, Newton": {"selection": "gsd", "update": "newton"},
}
SIZES: dict[str, Any] = {
    "rows": scales(smoke=[200], laptop=[1000]),
    "columns": scales(smoke=[1000], laptop=[10_000]),
    "iterations": scales(smoke=[100], laptop=[500]),
    "seed": seeds(smoke=5, laptop=5, paper=10),
}


def of_a_rule(cell: Cell) -> list[Row]:
    loss = loss_of(str(cell.values.get("data", "A")), cell.rows, cell.columns, cell.seed)
    options = {"block_size": cell.values.get("block_size", 5), **RULES[cell.method]}
    with cell.timed():
        found = descend(loss, options, cell.iterations, cell.seed)
    start = float(found.history.fun[0])
    monotone = bool((np.diff(found.history.fun) <= 1e-9 * start).all())
    return [{**row, "monotone": monotone} for row in curve(found, 0.0, start)]


@claim(
    paper=PAPER,
    says="On least squares (A) with blocks of 5 and matrix updates the greedy rule that divides by the curvature (GSD) "
    "is ahead of the one that looks at the gradient alone (GS), and that ahead of random blocks; f never grows.",
    published=FIGURES,
    grid={**SIZES, "method": ["random, Hb", "GS, Hb", "GSD, Hb", "GSD Gershgorin, Hb"]},
    expect=[
        lower("gap", "GSD, Hb", than=["GS, Hb", "random, Hb"], factor=1.0, where=LAST),
        lower("gap", "GS, Hb", than="random, Hb", factor=1.0, where=LAST),
        always("monotone"),
    ],
    plot=line(x="iteration", y="gap", by="method", log="y"),
)
def curvature_in_the_rule(cell: Cell) -> list[Row]:
    return of_a_rule(cell)


@claim(
    paper=PAPER,
    says="With gradient updates (Lb) the order is the same: GSD ahead of GS, GS ahead of random, cyclic and Lipschitz "
    "sampling.",
    published=FIGURES,
    grid={**SIZES, "method": ["random, Lb", "cyclic, Lb", "Lipschitz, Lb", "GS, Lb", "GSD, Lb"]},
    expect=[
        lower("gap", "GSD, Lb", than="GS, Lb", factor=1.0, where=LAST),
        lower("gap", "GS, Lb", than=["random, Lb", "cyclic, Lb", "Lipschitz, Lb"], factor=1.0, where=LAST),
    ],
    plot=line(x="iteration", y="gap", by="method", log="y"),
)
def gradient_updates(cell: Cell) -> list[Row]:
    return of_a_rule(cell)


@claim(
    paper=PAPER,
    says="With matrix updates the approximate quadratic rule (IHT) makes the most progress per iteration.",
    published=FIGURES,
    grid={
        **SIZES,
        "iterations": scales(smoke=[100], laptop=[150], paper=[500]),
        "method": ["GSD, Hb", "IHT, Hb"],
    },
    expect=[lower("gap", "IHT, Hb", than="GSD, Hb", factor=1.0, where=LAST)],
    plot=line(x="iteration", y="gap", by="method", log="y"),
)
def quadratic_rule_by_iterations(cell: Cell) -> list[Row]:
    return of_a_rule(cell)


@claim(
    paper=PAPER,
    says="The quadratic rule (IHT) reaches a hundredth of f(0) in less time than GSD, too.",
    published="the paper counts iterations; each of IHT's costs ten products with A^T A more",
    grid={
        **SIZES,
        "iterations": scales(smoke=[60], laptop=[120], paper=[500]),
        "method": ["GSD, Hb", "IHT, Hb"],
    },
    expect=[lower("seconds_to_target", "IHT, Hb", than="GSD, Hb", factor=1.0)],
    plot=bars(x="method", y="seconds_to_target"),
)
def quadratic_rule_by_time(cell: Cell) -> Row:
    loss = loss_of("A", cell.rows, cell.columns, cell.seed)
    found = descend(loss, {"block_size": 5, **RULES[cell.method]}, cell.iterations, cell.seed)
    reached = np.flatnonzero(found.history.fun <= 1e-2 * found.history.fun[0])
    return {"seconds_to_target": float(found.history.time[reached[0]]) if len(reached) else float("inf")}


@claim(
    paper=PAPER,
    says="Blocks that may vary beat the best fixed partition (Sort), for GS and for GSD, with matrix updates.",
    published=FIGURES,
    grid={**SIZES, "method": ["GS, Hb", "GSD, Hb", "Sort, GS, Hb", "Sort, GSL, Hb", "Sort, GSD, Hb", "Sort, GSQ, Hb"]},
    expect=[
        lower("gap", "GS, Hb", than="Sort, GS, Hb", factor=1.0, where=LAST),
        lower("gap", "GSD, Hb", than=["Sort, GSD, Hb", "Sort, GSL, Hb", "Sort, GSQ, Hb"], factor=1.0, where=LAST),
        lower("gap", "Sort, GSL, Hb", than="Sort, GS, Hb", factor=1.0, where=LAST),
    ],
    plot=line(x="iteration", y="gap", by="method", log="y"),
)
def variable_blocks(cell: Cell) -> list[Row]:
    return of_a_rule(cell)


@claim(
    paper=PAPER,
    says="On fixed blocks with matrix updates the quadratic rule GSQ makes more progress than GS, GSL and GSD.",
    published=FIGURES,
    grid={**SIZES, "method": ["Sort, GS, Hb", "Sort, GSL, Hb", "Sort, GSD, Hb", "Sort, GSQ, Hb"]},
    expect=[
        lower("gap", "Sort, GSQ, Hb", than=["Sort, GS, Hb", "Sort, GSL, Hb", "Sort, GSD, Hb"], factor=1.0, where=LAST)
    ],
    plot=line(x="iteration", y="gap", by="method", log="y"),
)
def quadratic_rule_on_fixed_blocks(cell: Cell) -> list[Row]:
    return of_a_rule(cell)


@claim(
    paper=PAPER,
    says="Of the fixed partitions the one sorted by Lipschitz constants is the best, with GSL and gradient updates.",
    published="Figure 10: Sort below Order and Avg; no numbers",
    grid={**SIZES, "method": ["Sort, GSL, Lb", "Order, GSL, Lb", "Avg, GSL, Lb"]},
    expect=[lower("gap", "Sort, GSL, Lb", than=["Order, GSL, Lb", "Avg, GSL, Lb"], factor=1.0, where=LAST)],
    plot=line(x="iteration", y="gap", by="method", log="y"),
)
def sorted_partition(cell: Cell) -> list[Row]:
    return of_a_rule(cell)


@claim(
    paper=PAPER,
    says="On logistic regression (B) and softmax (C) GSD with variable blocks is ahead of GS and of random blocks, and "
    "Newton steps with a line search are ahead of the fixed matrix.",
    published="Figures 4, 8, 11 and 12; no numbers",
    grid={
        "data": ["B", "C"],
        "rows": scales(smoke=[200], laptop=[1000]),
        "columns": scales(smoke=[1000, 100], laptop=[10_000, 1000]),
        "iterations": scales(smoke=[60], laptop=[300], paper=[500]),
        "seed": seeds(smoke=5, laptop=5, paper=10),
        "method": ["random, Hb", "GS, Hb", "GSD, Hb", "GSD, Newton"],
    },
    only=lambda cell: (cell.data == "C") == (cell.columns <= cell.rows),
    expect=[
        lower("gap", "GSD, Hb", than=["GS, Hb", "random, Hb"], factor=1.0, where=LAST, each="data"),
        lower("gap", "GSD, Newton", than="GSD, Hb", factor=1.0, where=LAST, each="data"),
        always("monotone"),
    ],
    plot=line(x="iteration", y="gap", by="method", log="y", each="data"),
)
def other_losses(cell: Cell) -> list[Row]:
    return of_a_rule(cell)


@claim(
    paper=PAPER,
    says="On logistic regression with 495 strongly correlated products of real measurements (Wisconsin breast tumours) "
    "GSD with blocks of 2 and of 5 is ahead of GS and of random blocks, and Newton steps of the fixed matrix.",
    published="no such data in the paper",
    grid={
        "data": ["tumours"],
        "rows": [0],
        "columns": [0],
        "block_size": [2, 5],
        "iterations": scales(smoke=[60], laptop=[1000]),
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["random, Hb", "GS, Hb", "GSD, Hb", "GSD, Newton"],
    },
    expect=[
        lower("gap", "GSD, Hb", than=["GS, Hb", "random, Hb"], factor=1.0, where=LAST, each="block_size"),
        lower("gap", "GSD, Newton", than="GSD, Hb", factor=1.0, where=LAST, each="block_size"),
    ],
    plot=line(x="iteration", y="gap", by="method", log="y"),
)
def real_measurements(cell: Cell) -> list[Row]:
    return of_a_rule(cell)


@claim(
    paper=PAPER,
    says="Lipschitz constants estimated on the way (LA) make more progress than fixed ones (Lb), on A and B.",
    published="Figure 9: LA below Lb, with a partition in the given order; no numbers",
    grid={"data": ["A", "B"], **SIZES, "method": ["Order, GS, Lb", "Order, GS, LA"]},
    expect=[lower("gap", "Order, GS, LA", than="Order, GS, Lb", factor=1.0, where=LAST, each="data")],
    plot=line(x="iteration", y="gap", by="method", log="y", each="data"),
)
def estimated_constants(cell: Cell) -> list[Row]:
    return of_a_rule(cell)


@claim(
    paper=PAPER,
    says="Greedy beats random and cyclic with blocks of 50 of 1000 coordinates, too: GS on sorted blocks.",
    published=f"{FIGURES}; there a block of 50 is a two-hundredth of the coordinates, here a twentieth",
    grid={
        "rows": [200],
        "columns": [1000],
        "iterations": [100],
        "block_size": [50],
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["Sort, GS, Lb", "Sort, random, Lb", "Sort, cyclic, Lb"],
    },
    expect=[lower("gap", "Sort, GS, Lb", than=["Sort, random, Lb", "Sort, cyclic, Lb"], factor=1.0, where=LAST)],
    plot=line(x="iteration", y="gap", by="method", log="y"),
)
def greedy_with_large_blocks(cell: Cell) -> list[Row]:
    return of_a_rule(cell)


@claim(
    paper=PAPER,
    says="Hard-thresholded blocks (IHT) need matrix updates: with gradient updates they can stall, and GSD is ahead.",
    published="not in the paper, which uses IHT with matrix updates only",
    grid={
        "rows": [200],
        "columns": [1000],
        "iterations": [100],
        "seed": seeds(smoke=5, laptop=8, paper=10),
        "method": ["IHT, Lb", "GSD, Lb"],
    },
    expect=[
        lower("gap", "GSD, Lb", than="IHT, Lb", factor=1.0, where=LAST),
    ],
    plot=line(x="iteration", y="gap", by="method", log="y"),
)
def thresholded_blocks_need_matrix_updates(cell: Cell) -> list[Row]:
    return of_a_rule(cell)
