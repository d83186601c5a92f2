"""Choosing density and scale of an update on a validation set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

from torch import nn

from workingpapers.common.validation import check_choice, check_number
from workingpapers.federated.compeft.adapters import held_parameters, load_parameters
from workingpapers.federated.compeft.sources import Kind, StateDict, StateDictSource
from workingpapers.federated.compeft.ternary import Alpha, TernaryUpdate, check_alpha, ternarise

DENSITIES: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS: tuple[Alpha, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, "stc")


class ComPEFTTuner:
    """Search over densities and scales by forward passes alone.

    Every density is compressed once; every scale is tried in the model on the caller's validation measure. The highest
    score wins, among equals the smaller density, then the alpha nearest 1. Take a score on data that is neither trained
    nor tested on: an alpha chosen on the test set makes the compressed expert look better than it is.

    The default grid is the paper's as far as it is known (the authors' code leaves both free), with 0.75, 1.25 and 1.5
    added, and for each density the scale of sparse ternary compression ("stc", mean kept magnitude): at densities near
    one half the best multiple of sigma lies between the paper's 1 and 2.

    Parameters
    ----------
    densities : shares to try, each in (0, 1].
    alphas : multiples of sigma to try, each above 0, or "stc".

    Attributes
    ----------
    update_ : the best compressed update.
    density_, alpha_ : where it was found; alpha_ is a multiple of sigma, also where "stc" won.
    score_ : its score.
    scores_ : list of one dict for each trial, with density, alpha, scale, nbytes and score.
    """

    def __init__(self, densities: Sequence[float] = DENSITIES, alphas: Sequence[Alpha] = ALPHAS) -> None:
        self.densities = densities
        self.alphas = alphas

    def fit(
        self,
        model: nn.Module,
        state_dict: StateDict,
        evaluate: Callable[[nn.Module], float],
        *,
        base: StateDict | None = None,
        kind: Kind = "lora",
    ) -> ComPEFTTuner:
        """Try the grid.

        Parameters
        ----------
        model : takes the parameters: a PEFT model, or a module whose own state dict has the keys of `state_dict`. Its
            parameters are changed during the search and put back at its end.
        state_dict, base, kind : as in `compress`.
        evaluate : maps the model, with an update loaded, to a finite score on validation data; higher is better.

        Raises
        ------
        ValueError : the grid is empty or out of range, the model lacks a key, or a score is not finite.
        """
        if not len(self.densities) or not len(self.alphas):
            raise ValueError("densities and alphas must hold at least one value each")
        for density in self.densities:
            check_number("densities", density, above=0, at_most=1)
        for alpha in self.alphas:
            check_alpha(alpha)
        check_choice("kind", kind, get_args(Kind))
        source = StateDictSource("state_dict", state_dict)
        origin = None
        if base is not None:
            origin = StateDictSource("base", base)
            source.untie(origin)
        before = held_parameters(model, {key: tuple(tensor.shape) for key, tensor in source.tensors.items()})

        trials: list[tuple[tuple[float, ...], TernaryUpdate, dict[str, Any]]] = []
        try:
            for density in self.densities:
                found = ternarise("state_dict", source, origin, density, kind)
                nbytes = found.update.nbytes()
                for alpha in self.alphas:
                    update = found.scaled(alpha)
                    load_parameters(model, update.to_state_dict(base=base))
                    score = float(evaluate(model))
                    if not math.isfinite(score):
                        raise ValueError(f"evaluate must return a finite score, got {score} at density {density:g}")
                    multiple = found.stc_alpha if alpha == "stc" else float(alpha)
                    row = {"density": density, "alpha": multiple, "scale": update.scale, "nbytes": nbytes}
                    trials.append(((-score, density, abs(multiple - 1)), update, row | {"score": score}))
        finally:
            load_parameters(model, before)

        _, self.update_, best = min(trials, key=lambda trial: trial[0])
        self.density_, self.alpha_, self.score_ = best["density"], best["alpha"], best["score"]
        self.scores_ = [row for _, _, row in trials]
        return self
