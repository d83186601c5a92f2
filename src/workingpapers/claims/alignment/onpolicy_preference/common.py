"""What the claims share: the losses, their names, and how a run becomes rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workingpapers.desk.claim import (
    Row,
)

if TYPE_CHECKING:
    from workingpapers.alignment import TunerHistory

PAPER = "onpolicy-preference"

QUERIES, ANSWERS = 2_000, 10
LOSSES: dict[str, dict[str, Any]] = {
    "best of n": {"loss": "best_of_n"},
    "RWR 0.25": {"loss": "rwr", "temperature": 0.25},
    "PPO": {"loss": "ppo"},
    "IPO": {"loss": "ipo", "tau": 10.0},
    "DPO": {"loss": "dpo", "beta": 0.1},
    "RWR 0.02": {"loss": "rwr", "temperature": 0.02},
    "Pref-FT": {"loss": "pref_ft"},
    "REINFORCE": {"loss": "reinforce"},
    "SLiC": {"loss": "slic"},
}
FOUR, SIX = list(LOSSES)[:4], list(LOSSES)[:6]
BUDGETS = ["reward_queries", "gradient_steps", "generated_tokens", "trained_tokens"]
EXCEPTIONS = ("DPO", "RWR 0.02")  # which find the far peak in fixed samples, too
FIGURES = "bandit curves: on-policy sampling ends higher, and sooner, where the peak is far from the reference"

# Best of 0.03, 0.1, 0.3, 1, 3 (and 10, where 3 was the best of these): fresh, fixed.
TABLE_RATES: dict[int, dict[str, tuple[float, float]]] = {
    70: {
        "best of n": (0.1, 1.0),
        "RWR 0.25": (0.1, 1.0),
        "PPO": (0.3, 1.0),
        "IPO": (0.1, 0.3),
        "DPO": (0.1, 3.0),
        "RWR 0.02": (0.1, 1.0),
        "Pref-FT": (1.0, 3.0),
        "REINFORCE": (0.3, 3.0),
        "SLiC": (0.3, 3.0),
    },
    20: {
        "best of n": (1.0, 1.0),
        "RWR 0.25": (0.3, 1.0),
        "PPO": (0.3, 10.0),
        "IPO": (0.3, 3.0),
        "DPO": (0.3, 3.0),
        "RWR 0.02": (1.0, 1.0),
        "Pref-FT": (0.1, 0.3),
        "REINFORCE": (0.3, 3.0),
        "SLiC": (3.0, 10.0),
    },
}


def last(curve: dict[str, np.ndarray]) -> Row:
    """The end of a run."""
    return {column: float(curve[column][-1]) for column in ("reward", "kl", "reverse_kl", "entropy", *BUDGETS)}


def columns(history: TunerHistory) -> dict[str, np.ndarray]:
    """A history as an artifact keeps it."""
    return {name: np.array(column, dtype=float) for name, column in vars(history).items()}
