"""The descent: choose a block, move it, until the prox-gradient residual is small."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from workingpapers.common.validation import check_choice, check_finite, check_integer, check_number
from workingpapers.optimization.block_coordinate import selection as rules
from workingpapers.optimization.block_coordinate.losses import Block, Loss, Vector
from workingpapers.optimization.block_coordinate.partition import FixedBlocks, Partition, partition
from workingpapers.optimization.block_coordinate.quadratic import SparseQuadratic
from workingpapers.optimization.block_coordinate.selection import Chooser, Selection
from workingpapers.optimization.block_coordinate.updates import SMOOTH_ONLY, Update, updater
from workingpapers.optimization.result import History, OptimizationResult

Callback = Callable[[int, Vector, float], object]

_REFRESH_EVERY = 1000  # iterations
_REFRESH_AFTER = 1e-6  # of the residual at the last refresh: rounding errors are relative to that
_WORKING_SET_ACCURACY = 0.1  # of the block problems: the next block asks for a new solution anyway


class BlockCoordinateDescent:
    """Minimise F(x) = f(x) + sum_i h_i(x_i) one block of coordinates at a time.

    Every iteration chooses a block b and sets x_b <- x_b + d_b; the other coordinates stay. What to choose:

    - Small blocks (block_size / n up to 0.005): selection "gsd", update "hb". Greedy rules see the whole gradient,
      which a sparse A keeps up to date at the cost of the rows that the block touches.
    - "iht" makes somewhat more progress per iteration than "gsd", for ten products with H each: per second it loses
      unless iterations are what counts.
    - l1 or bounds: selection "gsq-nn", update "pn", block_size "auto", which keeps the block as large as the support
      asks and ends in a Newton method on it.
    - A sparse quadratic: selection "greedy_tree", update "bp", which moves more than half of the coordinates at once.
    - Large shares of the coordinates per block and no structure: "random" or "cyclic" do as well.

    Parameters
    ----------
    loss : what to minimise; a `Loss`.
    block_size : from 1 to n; a fixed partition may end with a shorter block. "auto": with l1 or bounds, variable blocks
        of the support and as many other coordinates; else the smaller of n and 100. Forests have the size they have.
    partition : "variable" for any block at every iteration, "sort", "order", "avg" or "sort_gershgorin" for fixed ones
        (see `partition`), or index arrays that hold each coordinate once.
    selection : with g the gradient (with l1 or bounds, the prox-gradient residual) and H_b the curvature bound,

        - "gs": the largest |g_b|.
        - "gsl": the largest |g_b|^2 / L_b, L_b = lambda_max(H_b); with variable blocks it means "gsd".
        - "gsd": the largest sum_{i in b} g_i^2 / D_i.
        - "gsq": the largest g_b^T H_b^+ g_b; with variable blocks it means "iht".
        - "iht": variable blocks that nearly maximise g_b^T H_b^+ g_b, by iterative hard thresholding.
        - "gsq-nn": the largest sum of decreases that the coordinates would make alone; the rule for l1 and bounds.
        - "cyclic", "perm" (a new order each time), "random", "lipschitz" (probabilities as L_b, or as L_i).
        - "greedy_tree" (by |g_i|), "greedy_tree_scaled" (by |g_i| / sqrt(L_i)), "random_tree": a forest of the graph of
          a `SparseQuadratic`; "tree", "red_black": its fixed partitions, in turn.

        By default "gsd", and "gsq-nn" with l1 or bounds.
    update : with which d_b,

        - "lb": -g_b / L_b, followed by the proximal operator.
        - "la": likewise with an estimate of L_b, from 1 upwards by doubling; "gsl" and "gsd" then rank by it.
        - "hb": -H_b^+ g_b.
        - "newton": -alpha (hess_bb f(x))^+ g_b with a line search.
        - "tmp": two-metric projection, with l1 or bounds: Newton off the bound, gradient on it.
        - "pn": proximal Newton, the minimiser of the block's quadratic model and h.
        - "bp": -A_bb^{-1} g_b by message passing, for blocks without cycles of a `SparseQuadratic`.

        By default "hb", "pn" with l1 or bounds, and "bp" for forests.
    gsd_bound : D_i of "gsd", "lipschitz" for block_size L_i, "gershgorin" for sum_j |H_ij|.
    iht_safeguard : let "iht" take the "gsd" block where that promises more.
    max_iter : at least 1.
    tol : at least 0, in units of the gradient; stop when the largest |L_i (x_i - prox_i(x_i - g_i / L_i))| is at most
        this (the largest |g_i| where there are neither bounds nor l1). 0 runs all iterations and does not warn.
    gap_tol : above 0, also stop when the duality gap is at most this; for `LeastSquares` with l1.
    record_blocks : keep the blocks, as "block" in the history.
    callback : called with (iteration, x, fun) after each; a true answer stops. x is read-only and changes later.
    random_state : seed or generator.

    Raises
    ------
    ValueError, TypeError : an argument is out of range, or loss, selection and update do not go together.

    Warns
    -----
    RuntimeWarning : "iht" with "lb": it picks strongly coupled coordinates, whose L_b is large, and can stall.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> A, b = rng.standard_normal((50, 200)), rng.standard_normal(50)
    >>> descent = BlockCoordinateDescent(LeastSquares(A, b, l1=5.0))
    >>> result = descent.minimize()
    >>> result.success, int(np.count_nonzero(result.x)) < 50
    (True, True)
    """

    def __init__(
        self,
        loss: Loss,
        block_size: int | Literal["auto"] = "auto",
        *,
        partition: Partition | Sequence[Block] = "variable",
        selection: Selection | None = None,
        update: Update | None = None,
        gsd_bound: Literal["lipschitz", "gershgorin"] = "lipschitz",
        iht_safeguard: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-6,
        gap_tol: float | None = None,
        record_blocks: bool = False,
        callback: Callback | None = None,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        if not isinstance(loss, Loss):
            raise TypeError(f"loss must be a Loss, got {loss!r}")
        if block_size != "auto":
            check_integer("block_size", block_size, at_least=1, at_most=loss.n)
        self.selection: Selection = selection or ("gsd" if loss.smooth else "gsq-nn")
        self.update: Update = update or _default_update(loss, self.selection)
        check_choice("selection", self.selection, get_args(Selection))
        check_choice("update", self.update, get_args(Update))
        check_choice("gsd_bound", gsd_bound, ("lipschitz", "gershgorin"))
        self.partition = _checked_partition(partition, loss.n)
        check_integer("max_iter", max_iter, at_least=1)
        check_number("tol", tol, at_least=0.0)
        if gap_tol is not None:
            check_number("gap_tol", gap_tol, above=0.0)
            if not loss.knows_gap:
                raise ValueError("gap_tol needs LeastSquares with l1 > 0 for all coordinates, or all but one")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        self._check_combination(loss)
        self.loss = loss
        self.block_size = block_size
        self.gsd_bound = gsd_bound
        self.iht_safeguard = iht_safeguard
        self.max_iter = max_iter
        self.tol = tol
        self.gap_tol = gap_tol
        self.record_blocks = record_blocks
        self.callback = callback
        self.random_state = random_state

    def _check_combination(self, loss: Loss) -> None:
        fixed = not isinstance(self.partition, str) or self.partition != "variable"
        if not loss.smooth:
            if self.selection in rules.SMOOTH_ONLY:
                raise ValueError(f"selection={self.selection!r} is for losses without l1 and bounds, take 'gsq-nn'")
            if self.update in SMOOTH_ONLY:
                raise ValueError(f"update={self.update!r} is for losses without l1 and bounds, take 'pn' or 'tmp'")
        elif self.update == "tmp":
            raise ValueError("update='tmp' is for l1 or bounds, take 'newton'")
        if self.update == "bp" and not isinstance(loss, SparseQuadratic):
            raise TypeError(f"update='bp' is for SparseQuadratic, got {type(loss).__name__}")
        if self.selection in rules.FORESTS:
            if not isinstance(loss, SparseQuadratic):
                raise TypeError(f"selection={self.selection!r} is for SparseQuadratic, got {type(loss).__name__}")
            if fixed:
                raise ValueError(f"selection={self.selection!r} makes its own blocks, partition must be 'variable'")
        elif self.update == "bp" and isinstance(self.partition, str):
            raise ValueError("update='bp' needs forests: a forest selection, or a partition of tree_partition")
        if self.selection == "iht" and fixed:
            raise ValueError("selection='iht' is for variable blocks, take 'gsq' for fixed ones")
        if self.selection in ("iht", "gsq") and not fixed and self.update in ("lb", "la"):
            warnings.warn(
                f"selection={self.selection!r} picks strongly coupled coordinates, with which update={self.update!r} "
                "can stall: take 'hb' or 'newton'",
                RuntimeWarning,
                stacklevel=3,
            )

    def minimize(self, x0: Vector | None = None) -> OptimizationResult:
        """Descend from x0.

        Parameters
        ----------
        x0 : (n,), finite, at least 0 where the loss has bounds; zeros by default. Not modified.

        Returns
        -------
        OptimizationResult
            The history has "fun" (F), "residual" (what `tol` is held against), "time" (seconds since the start),
            "block_size", with `gap_tol` "gap", and with `record_blocks` "block", index arrays.

        Raises
        ------
        ValueError : x0 is not such a vector, or message passing met a cycle or a matrix that is not positive definite.
        FloatingPointError : F stopped being finite; the message names the iteration.

        Warns
        -----
        RuntimeWarning : no tolerance was reached. None is given where `tol` is 0 and there is no `gap_tol`.
        """
        start = time.perf_counter()
        loss = self.loss
        state = loss.state(_checked_start(x0, loss))
        estimates = np.ones(loss.n)
        choose, blocks = self._chooser(estimates)
        growing = self.block_size == "auto" and not loss.smooth
        move = updater(self.update, loss, blocks, estimates, _WORKING_SET_ACCURACY if growing else 0.0)
        patience = 1 if self.selection in rules.GREEDY else 10 * (len(blocks) if blocks is not None else loss.n)
        visible = state.x.view()
        visible.flags.writeable = False

        rows: list[dict[str, Any]] = []
        message, converged, idle, refreshed_at, refreshed_residual = "", False, 0, 0, math.inf
        block: Block = np.empty(0, np.int64)
        for iteration in range(self.max_iter + 1):
            residual = float(np.abs(state.residual()).max())
            refreshed = residual < _REFRESH_AFTER * refreshed_residual or iteration - refreshed_at >= _REFRESH_EVERY
            if iteration and (refreshed or residual <= self.tol or idle >= patience):
                state.refresh()  # so that what stops the descent is not a rounding error
                residual = float(np.abs(state.residual()).max())
            if not iteration or refreshed:
                refreshed_at, refreshed_residual = iteration, residual
            fun = state.fun
            if not math.isfinite(fun):
                raise FloatingPointError(f"the objective is {fun} at iteration {iteration}: is A badly scaled?")
            row: dict[str, Any] = {
                "iteration": iteration,
                "fun": fun,
                "residual": residual,
                "time": time.perf_counter() - start,
            }
            row["block_size"] = len(block)
            if self.gap_tol is not None:
                row["gap"] = loss.duality_gap(state)
            if self.record_blocks:
                row["block"] = block
            rows.append(row)

            if self.gap_tol is not None and row["gap"] <= self.gap_tol:
                message, converged = f"duality gap {row['gap']:.1e} <= gap_tol {self.gap_tol:.1e}", True
            elif residual <= self.tol:
                message, converged = f"residual {residual:.1e} <= tol {self.tol:.1e}", True
            elif idle >= patience:
                message = f"no step decreases the objective any more; residual {residual:.1e} > tol {self.tol:.1e}"
            elif iteration and self.callback is not None and self.callback(iteration, visible, fun):
                message = "the callback asked to stop"
            elif iteration == self.max_iter:
                message = f"max_iter reached; residual {residual:.1e} > tol {self.tol:.1e}"
            if message:
                break
            chosen = choose(state)
            block = chosen.block
            idle = 0 if move(state, chosen) else idle + 1

        message = f"{message} after {iteration} iterations"
        wanted = self.tol > 0.0 or self.gap_tol is not None
        if not converged and wanted and not message.startswith("the callback"):
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return OptimizationResult(
            x=state.x.copy(),
            fun=fun,
            converged=converged,
            message=message,
            n_iterations=iteration,
            history=_history(rows),
        )

    def _chooser(self, estimates: Vector) -> tuple[Chooser, FixedBlocks | None]:
        loss, rng = self.loss, np.random.default_rng(self.random_state)
        size = loss.smallest_block if self.block_size == "auto" else self.block_size
        if self.selection in ("tree", "red_black"):
            assert isinstance(loss, SparseQuadratic)
            fixed = FixedBlocks(rules.forest_partition(self.selection, loss), loss)
            return rules.fixed_chooser(self.selection, fixed, loss.steps, estimated=False, rng=rng), fixed
        if self.selection in rules.FORESTS:
            assert isinstance(loss, SparseQuadratic)
            return rules.forest_chooser(self.selection, loss, rng), None

        estimated = self.update == "la"
        if estimated:
            curvature = estimates
        elif self.selection == "gsd" and self.gsd_bound == "gershgorin":
            curvature = np.where(loss.bound_sums > 0.0, loss.bound_sums, 1.0)
        else:
            curvature = loss.steps  # the factor block_size of a safe D changes no choice
        if self.partition == "variable":
            if self.block_size == "auto" and not loss.smooth and self.selection == "gsq-nn":
                return rules.working_set_chooser(loss, size, loss.largest_block), None
            return rules.variable_chooser(
                self.selection, loss, size, curvature, safeguard=self.iht_safeguard, rng=rng
            ), None
        made = partition(loss, self.partition, size) if isinstance(self.partition, str) else self.partition
        fixed = FixedBlocks(made, loss)
        return rules.fixed_chooser(self.selection, fixed, curvature, estimated=estimated, rng=rng), fixed


def _default_update(loss: Loss, selection: Selection) -> Update:
    if selection in rules.FORESTS:
        return "bp"
    return "hb" if loss.smooth else "pn"


def _checked_partition(given: Any, n: int) -> Partition | list[Block]:
    if isinstance(given, str):
        check_choice("partition", given, get_args(Partition))
        return given  # type: ignore[return-value]
    blocks = [np.asarray(block) for block in given]
    if not all(block.ndim == 1 and len(block) and block.dtype.kind in "iu" for block in blocks):
        raise ValueError("partition must be a name or non-empty vectors of integers")
    if not blocks or not np.array_equal(np.sort(np.concatenate(blocks)), np.arange(n)):
        raise ValueError(f"partition must hold each coordinate from 0 to {n - 1} in exactly one block")
    return [block.astype(np.int64) for block in blocks]


def _checked_start(x0: Any, loss: Loss) -> Vector:
    x = np.zeros(loss.n) if x0 is None else np.array(x0, dtype=float)
    if x.shape != (loss.n,):
        raise ValueError(f"x0 must have shape ({loss.n},), got {x.shape}")
    check_finite("x0", x)
    if loss.nonnegative and (x < 0).any():
        raise ValueError(f"x0 must be at least 0, its smallest entry is {x.min():g}")
    return x


def _history(rows: list[dict[str, Any]]) -> History:
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    if "block" in columns:
        blocks = np.empty(len(rows), object)  # they differ in length
        blocks[:] = columns["block"]
        columns["block"] = blocks
    return History(columns)
