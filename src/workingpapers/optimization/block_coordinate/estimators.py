"""Estimators in scikit-learn's conventions."""

from __future__ import annotations

import warnings
from typing import Any, Literal, Self

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.extmath import safe_sparse_dot
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from workingpapers.common.validation import check_choice, check_integer, check_number
from workingpapers.optimization.block_coordinate.linear import LeastSquares, LinearLoss, Logistic, Softmax
from workingpapers.optimization.block_coordinate.losses import Vector
from workingpapers.optimization.block_coordinate.partition import Partition
from workingpapers.optimization.block_coordinate.quadratic import SparseQuadratic
from workingpapers.optimization.block_coordinate.selection import Selection
from workingpapers.optimization.block_coordinate.solver import BlockCoordinateDescent
from workingpapers.optimization.block_coordinate.updates import Update
from workingpapers.optimization.result import OptimizationResult

_SMOOTH_BLOCK = 500  # of block_size="auto" without l1: one Newton step for all where there are no more coefficients


class _LinearModel(BaseEstimator):
    """What regression and classification share: penalties, the intercept, the descent."""

    def _check_parameters(self) -> None:
        check_number("alpha", self.alpha, at_least=0.0)
        check_number("l1_ratio", self.l1_ratio, at_least=0.0, at_most=1.0)
        check_number("tol", self.tol, at_least=0.0)

    def _design(self, X: Any, signed_intercept: bool) -> tuple[Any, Vector]:
        """X with columns for the intercept, centred where it is dense; and the means taken off."""
        rows, features = X.shape
        means = np.zeros(features)
        if not self.fit_intercept:
            return X, means
        signs = np.ones((1, 1)) if signed_intercept else np.array([[1.0, -1.0]])  # u - v with u, v >= 0
        columns = np.ones((rows, 1)) @ signs
        if sp.issparse(X):
            return sp.hstack([X, columns], format="csc"), means
        means = X.mean(axis=0)
        return np.hstack([X - means, columns]), means

    def _weights(self, shape: tuple[int, int], columns: int, classes: int) -> tuple[Vector, Vector]:
        """l1 and l2 of the sum over samples, 0 for the intercept."""
        rows, features = shape
        penalised = np.repeat(np.arange(columns) < features, classes) * (rows * self.alpha)
        return penalised * self.l1_ratio, penalised * (1.0 - self.l1_ratio)

    def _descend(self, loss: LinearLoss, *, gap_tol: float | None) -> Vector:
        start = loss.state(np.zeros(loss.n))
        size = self.block_size
        if size == "auto" and loss.smooth:
            size = min(loss.n, _SMOOTH_BLOCK)
        elif size != "auto":
            size = min(check_integer("block_size", size, at_least=1), loss.n)
        descent = BlockCoordinateDescent(
            loss,
            size,
            partition=self.partition,
            selection=self.selection,
            update=self.update or ("newton" if loss.smooth else "pn"),
            max_iter=self.max_iter,
            tol=0.0 if gap_tol is not None else self.tol * float(np.abs(start.residual()).max()),
            gap_tol=gap_tol,
            random_state=self.random_state,
        )
        self.result_ = _quiet(descent)
        self.n_iter_ = self.result_.n_iterations
        solution: Vector = self.result_.x
        return solution

    def _intercept(self, x: Float[np.ndarray, "columns c"], means: Vector) -> Float[np.ndarray, " c"]:
        features = len(means)
        if not self.fit_intercept:
            return np.zeros(x.shape[1])
        value = x[features] - (x[features + 1] if len(x) > features + 1 else 0.0)
        intercept: np.ndarray = value - means @ x[:features]
        return intercept


def _quiet(descent: BlockCoordinateDescent, x0: Vector | None = None) -> OptimizationResult:
    """The descent's result; not reaching the tolerance is scikit-learn's ConvergenceWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = descent.minimize(x0)
    if not result.converged:
        warnings.warn(result.message, ConvergenceWarning, stacklevel=4)
    return result


class BCDRegressor(RegressorMixin, _LinearModel):
    """Linear regression with l1 and l2 penalties, by block coordinate descent.

    Minimises |y - X w - c|^2 / (2 m) + alpha (l1_ratio |w|_1 + (1 - l1_ratio) |w|^2 / 2), the objective of
    scikit-learn's `ElasticNet`, by default that of its `Lasso`. Blocks are working sets then, and the descent stops on
    the duality gap.

    Parameters
    ----------
    alpha : at least 0.
    l1_ratio : from 0 (ridge) to 1 (lasso).
    positive : whether w >= 0.
    fit_intercept : whether c is fitted, without penalty.
    block_size, partition, selection, update : as in `BlockCoordinateDescent`, for experts.
    max_iter : at least 1.
    tol : at least 0; stop when the duality gap is at most tol |y - mean|^2 / (2 m), or where there is no l1, when the
        largest entry of the (projected) gradient is at most tol times that at w = 0.
    random_state : seed or generator, for random rules.

    Attributes
    ----------
    coef_ : (n_features,).
    intercept_ : c.
    n_iter_ : iterations, one block each.
    result_ : the `OptimizationResult`; its objective is m times the above.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        l1_ratio: float = 1.0,
        positive: bool = False,
        fit_intercept: bool = True,
        block_size: int | Literal["auto"] = "auto",
        partition: Partition = "variable",
        selection: Selection | None = None,
        update: Update | None = None,
        max_iter: int = 1000,
        tol: float = 1e-4,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.positive = positive
        self.fit_intercept = fit_intercept
        self.block_size = block_size
        self.partition = partition
        self.selection = selection
        self.update = update
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Fit the coefficients.

        Parameters
        ----------
        X : (m, n_features), dense or sparse, finite.
        y : (m,).

        Warns
        -----
        ConvergenceWarning : the tolerance was not reached.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, accept_sparse="csc", dtype=float, y_numeric=True)
        A, means = self._design(X, signed_intercept=not self.positive)
        l1, l2 = self._weights(X.shape, A.shape[1], classes=1)
        loss = LeastSquares(A, y, l1=l1, l2=l2, nonnegative=self.positive)
        spread = float(np.square(y - y.mean() if self.fit_intercept else y).sum())
        gap_tol = 0.5 * self.tol * spread if loss.knows_gap else 0.0
        x = self._descend(loss, gap_tol=gap_tol if gap_tol > 0.0 else None)
        self.coef_ = x[: X.shape[1]]
        self.intercept_ = float(self._intercept(x[:, None], means)[0])
        return self

    def predict(self, X: Any) -> Float[np.ndarray, " m"]:
        """X w + c, for X of shape (m, n_features)."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=float, reset=False)
        predicted: Float[np.ndarray, " m"] = safe_sparse_dot(X, self.coef_) + self.intercept_
        return predicted

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class BCDClassifier(ClassifierMixin, _LinearModel):
    """Logistic regression, binary or multinomial, with l1 and l2 penalties, by block coordinate descent.

    Minimises the mean logistic (softmax) loss + alpha (l1_ratio |W|_1 + (1 - l1_ratio) |W|_F^2 / 2). With alpha = 0 and
    classes that a plane separates there is no minimiser; the coefficients then grow until `tol` or `max_iter` stops.

    Parameters
    ----------
    alpha : at least 0. scikit-learn's `LogisticRegression(C)` has alpha = 1 / (C m).
    l1_ratio : from 0 to 1.
    fit_intercept : whether intercepts are fitted, without penalty.
    block_size, partition, selection, update : as in `BlockCoordinateDescent`, for experts.
    max_iter : at least 1.
    tol : at least 0; stop when the largest entry of the prox-gradient residual is at most this times that at W = 0.
    random_state : seed or generator, for random rules.

    Attributes
    ----------
    classes_ : the labels.
    coef_ : (1, n_features) for two classes, of the second against the first; else (n_classes, n_features).
    intercept_ : (1,) or (n_classes,).
    n_iter_ : iterations, one block each.
    result_ : the `OptimizationResult`; its objective is m times the above.
    """

    def __init__(
        self,
        alpha: float = 1e-4,
        *,
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        block_size: int | Literal["auto"] = "auto",
        partition: Partition = "variable",
        selection: Selection | None = None,
        update: Update | None = None,
        max_iter: int = 1000,
        tol: float = 1e-4,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.block_size = block_size
        self.partition = partition
        self.selection = selection
        self.update = update
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Fit the coefficients.

        Parameters
        ----------
        X : (m, n_features), dense or sparse, finite.
        y : (m,), labels of at least two classes.

        Warns
        -----
        ConvergenceWarning : the tolerance was not reached.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, accept_sparse="csc", dtype=float)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        count = len(self.classes_)
        if count < 2:
            raise ValueError(f"y must have at least two classes, got {count} class: {self.classes_[0]!r}")
        columns = 1 if count == 2 else count
        A, means = self._design(X, signed_intercept=True)
        l1, l2 = self._weights(X.shape, A.shape[1], classes=columns)
        if count == 2:
            loss: LinearLoss = Logistic(A, 2.0 * labels - 1.0, l1=l1, l2=l2)
        else:
            loss = Softmax(A, labels, count, l1=l1, l2=l2)
        x = self._descend(loss, gap_tol=None).reshape(-1, columns)
        self.coef_ = x[: X.shape[1]].T.copy()
        self.intercept_ = self._intercept(x, means)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """X coef_^T + intercept_: (m,) for two classes, positive for the second; else (m, n_classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=float, reset=False)
        scores: np.ndarray = safe_sparse_dot(X, self.coef_.T) + self.intercept_
        return scores.ravel() if len(self.classes_) == 2 else scores

    def predict_proba(self, X: Any) -> Float[np.ndarray, "m c"]:
        """The probabilities of the classes, (m, n_classes)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            scores = np.column_stack([-0.5 * scores, 0.5 * scores])
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row of X."""
        scores = self.decision_function(X)
        places = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        return np.asarray(self.classes_[places])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class LabelPropagationBCD(ClassifierMixin, BaseEstimator):
    """Semi-supervised labels on a graph: each unlabelled node is the mean of its neighbours.

    Minimises sum_ij w_ij (y_i - y_j)^2 / 4 over the unlabelled nodes, one class after the other, with labelled nodes
    fixed at 0 and 1 (the harmonic solution). It is a sparse quadratic, and blocks are forests of the graph that message
    passing solves exactly. Nodes that no path joins to a label get the shares of the classes among the labels.

    Parameters
    ----------
    n_neighbors : at least 1, for affinity "knn": i and j are joined, with weight 1, where either is among the nearest
        of the other.
    affinity : "knn", or "precomputed": X is the symmetric (m, m) array or sparse matrix of weights, at least 0.
    selection : a forest rule of `BlockCoordinateDescent`.
    max_iter : at least 1, for each class.
    tol : at least 0; stop when no node differs from the mean of its neighbours by more than this, in the mean over
        weights of the largest degree.
    random_state : seed or generator, for "random_tree".

    Attributes
    ----------
    classes_ : the labels.
    label_distributions_ : (m, n_classes), rows add up to 1.
    transduction_ : (m,), the most likely class of each node.
    n_iter_ : iterations, of the class that took most.
    """

    def __init__(
        self,
        n_neighbors: int = 7,
        *,
        affinity: Literal["knn", "precomputed"] = "knn",
        selection: Literal["greedy_tree", "greedy_tree_scaled", "random_tree", "tree", "red_black"] = "greedy_tree",
        max_iter: int = 1000,
        tol: float = 1e-3,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.affinity = affinity
        self.selection = selection
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Label the nodes.

        Parameters
        ----------
        X : (m, n_features), dense or sparse, or weights where they are precomputed.
        y : (m,), labels, with the number -1 for what has none.

        Warns
        -----
        ConvergenceWarning : the tolerance was not reached.
        """
        check_integer("n_neighbors", self.n_neighbors, at_least=1)
        check_choice("affinity", self.affinity, ("knn", "precomputed"))
        check_number("tol", self.tol, at_least=0.0)
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=float, ensure_min_samples=2)
        check_classification_targets(y)
        labelled = y != -1 if y.dtype.kind in "iuf" else np.full(len(y), True)
        if not labelled.any():
            raise ValueError("y must label at least one node, all of it is -1")
        self.classes_, places = np.unique(y[labelled], return_inverse=True)
        W = self._graph(X)
        shares = np.eye(len(self.classes_))[places]
        self.label_distributions_ = np.tile(shares.mean(axis=0), (len(y), 1))
        self.label_distributions_[labelled] = shares
        self.n_iter_ = 1  # also where there is nothing to solve
        self._propagate(W, labelled)
        self.transduction_ = self.classes_[self.label_distributions_.argmax(axis=1)]
        return self

    def _graph(self, X: Any) -> sp.csr_array:
        if self.affinity == "precomputed":
            W = sp.csr_array(X)
            if W.shape[0] != W.shape[1] or abs(W - W.T).max() > 0 or (W.data < 0).any():
                raise ValueError("X must be a symmetric matrix of weights that are at least 0")
            W = W.copy()
            W.setdiag(0.0)
            W.eliminate_zeros()
            return W
        neighbors = min(self.n_neighbors, X.shape[0] - 1)
        self._index = NearestNeighbors(n_neighbors=neighbors).fit(X)
        W = sp.csr_array(self._index.kneighbors_graph())  # without the points themselves
        return sp.csr_array(W.maximum(W.T))

    def _propagate(self, W: sp.csr_array, labelled: np.ndarray) -> None:
        _, component = sp.csgraph.connected_components(W, directed=False)
        unknown = ~labelled & np.isin(component, component[labelled])
        if not unknown.any():
            return
        degrees = np.asarray(W.sum(axis=1)).ravel()
        rows = W[unknown]
        loss_matrix = sp.csr_array(sp.diags_array(degrees[unknown]) - rows[:, unknown])
        known = rows[:, labelled] @ self.label_distributions_[labelled]
        classes = len(self.classes_)
        found = np.empty((int(unknown.sum()), classes))
        for k in range(1, classes):
            descent = BlockCoordinateDescent(
                SparseQuadratic(loss_matrix, known[:, k]),
                selection=self.selection,
                max_iter=self.max_iter,
                tol=self.tol * float(degrees.max()),
                random_state=self.random_state,
            )
            result = _quiet(descent)
            found[:, k] = np.clip(result.x, 0.0, 1.0)
            self.n_iter_ = max(self.n_iter_, result.n_iterations)
        found[:, 0] = np.maximum(1.0 - found[:, 1:].sum(axis=1), 0.0)  # the classes' solutions add up to 1
        self.label_distributions_[unknown] = found / found.sum(axis=1, keepdims=True)

    def predict_proba(self, X: Any) -> Float[np.ndarray, "q c"]:
        """The mean distribution of the nearest fitted nodes, weighted by the affinity.

        Parameters
        ----------
        X : (q, n_features), or (q, m) weights to the fitted nodes where they are precomputed.
        """
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=float, reset=False)
        weights = sp.csr_array(X) if self.affinity == "precomputed" else sp.csr_array(self._index.kneighbors_graph(X))
        totals = np.asarray(weights.sum(axis=1)).ravel()
        means = (weights @ self.label_distributions_) / np.where(totals > 0.0, totals, 1.0)[:, None]
        means[totals == 0.0] = self.label_distributions_.mean(axis=0)
        return np.asarray(means / means.sum(axis=1, keepdims=True))

    def predict(self, X: Any) -> np.ndarray:
        """The most likely class of each row of X, as in `predict_proba`."""
        places = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[places])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self.affinity == "knn"
        tags.input_tags.pairwise = self.affinity == "precomputed"
        return tags
