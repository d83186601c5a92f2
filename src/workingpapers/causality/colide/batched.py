"""The stages of CoLiDE in torch, for many data sets at once: every step acts on a batch of matrices, on CPU or GPU.

The iterations are those of `kernels.minimise_stage`. The domain is tested by the sign of the inverse's entries, as the
authors do, because batched elimination without pivoting is not available on every device. Data sets whose stage has
ended leave the batch; those whose stage failed are run again together, each with its own step length and s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workingpapers.causality.colide.base import MAX_RESTARTS, Descent, Schedule, what_went_wrong
from workingpapers.causality.colide.kernels import (
    CONVERGED,
    EQUAL,
    LEFT_DOMAIN,
    OUT_OF_ITERATIONS,
    STEP_VANISHED,
    Matrix,
    Vector,
)

_BETA1, _BETA2, _EPSILON = 0.99, 0.999, 1e-8


def descend_together(
    covariances: Sequence[Matrix],
    starts: Sequence[Vector],
    floors: Sequence[float],
    kind: int,
    lam: float,
    schedule: Schedule,
    device: str | None,
) -> list[Descent]:
    """What `base.descend` does, for covariances of one size, side by side."""
    C = torch.tensor(np.stack(covariances), dtype=torch.float64, device=device)
    sigma = torch.tensor(np.stack(starts), dtype=torch.float64, device=device)
    floor = torch.tensor(floors, dtype=torch.float64, device=device)
    W = torch.zeros_like(C)
    count = len(C)
    n_iter, restarts, messages = [0] * count, [0] * count, [""] * count
    paths: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    sets = list(range(count))  # those with no failed stage
    for stage in range(schedule.stages):
        mu, limit = schedule.mu * schedule.mu_factor**stage, schedule.limit(stage)
        todo, s, lr = sets, schedule.s[stage], schedule.lr
        for attempt in range(MAX_RESTARTS + 1):
            if not todo:
                break
            run = _Run.start(W[todo], sigma[todo], C[todo], floor[todo], kind, lam, mu, s, lr)
            results = run.minimise(limit, schedule.tol, schedule.checkpoint)
            failed = []
            for k, result in zip(todo, results, strict=True):
                n_iter[k] += result.iterations
                messages[k] = what_went_wrong(result.ended, stage + 1, limit, schedule.tol)
                if result.ended == LEFT_DOMAIN:
                    failed.append(k)
                    restarts[k] += attempt < MAX_RESTARTS
                else:
                    W[k], sigma[k] = result.W, result.sigma
                    paths[k] += [(objective, stage + 1) for objective in result.path]
            todo, s, lr = failed, s + 0.1, lr / 2.0
        sets = [k for k in sets if k not in todo]
    return [
        Descent(
            W[k].cpu().numpy(),
            sigma[k].cpu().numpy(),
            n_iter[k],
            restarts[k],
            np.array([objective for objective, _ in paths[k]]),
            np.array([stage for _, stage in paths[k]], dtype=int),
            messages[k],
        )
        for k in range(count)
    ]


@dataclass
class _Result:
    """How a stage ended for one data set."""

    W: Float[Tensor, "d d"]
    sigma: Float[Tensor, " d"]
    ended: int
    iterations: int
    path: list[float]


@dataclass
class _Run:
    """A stage in progress: one entry along the first axis of every tensor per data set that has not ended."""

    W: Float[Tensor, "sets d d"]
    sigma: Float[Tensor, "sets d"]
    C: Float[Tensor, "sets d d"]
    floor: Float[Tensor, " sets"]
    lr: Float[Tensor, " sets"]
    previous: Float[Tensor, " sets"]  # objective at the last checkpoint
    first: Float[Tensor, "sets d d"]
    second: Float[Tensor, "sets d d"]
    step: Float[Tensor, "sets d d"]
    CW: Float[Tensor, "sets d d"]
    variances: Float[Tensor, "sets d"]
    inverse: Float[Tensor, "sets d d"]
    inside: Bool[Tensor, " sets"]
    which: Int[Tensor, " sets"]  # place in the batch that was started
    kind: int
    lam: float
    mu: float
    s: float

    @classmethod
    def start(
        cls,
        W: Float[Tensor, "sets d d"],
        sigma: Float[Tensor, "sets d"],
        C: Float[Tensor, "sets d d"],
        floor: Float[Tensor, " sets"],
        kind: int,
        lam: float,
        mu: float,
        s: float,
        lr: float,
    ) -> _Run:
        CW, variances = _residual_variances(W, C)
        inverse, inside = _inverse(W, s)
        zeros, steps = torch.zeros_like(W), torch.full_like(floor, lr)
        previous, which = torch.full_like(floor, 1e16), torch.arange(len(W), device=W.device)
        state = (zeros, zeros.clone(), zeros.clone(), CW, variances, inverse, inside, which)
        return cls(W.clone(), sigma.clone(), C, floor, steps, previous, *state, kind, lam, mu, s)

    def minimise(self, max_iter: int, tol: float, checkpoint: int) -> list[_Result]:
        """One result per data set, in the order in which they were started."""
        results: dict[int, _Result] = {}
        paths: list[list[float]] = [[] for _ in self.which]

        def finish(done: Bool[Tensor, " sets"], ended: int, iteration: int) -> None:
            for k in torch.nonzero(done).flatten().tolist():
                place = int(self.which[k])
                results[place] = _Result(self.W[k], self.sigma[k], ended, iteration, paths[place])
            for field in fields(self):
                value = getattr(self, field.name)
                if isinstance(value, Tensor):
                    setattr(self, field.name, value[~done])

        if not self.inside.all():
            finish(~self.inside, LEFT_DOMAIN, 0)
        for iteration in range(1, max_iter + 1):
            if not len(self.which):
                break
            self._step(iteration)
            if not self.inside.all():
                if self.s <= 0.9:
                    finish(~self.inside, LEFT_DOMAIN, iteration)
                else:
                    vanished = self._shorten_steps()
                    if vanished.any():
                        finish(vanished, STEP_VANISHED, iteration)
            if iteration % checkpoint == 0 or iteration == max_iter:
                objective = self._objective()
                for place, value in zip(self.which.tolist(), objective.tolist(), strict=True):
                    paths[place].append(value)
                settled = (self.previous - objective).abs() <= tol * self.previous.abs()
                self.previous = objective
                if settled.any():
                    finish(settled, CONVERGED, iteration)
        finish(torch.ones_like(self.inside), OUT_OF_ITERATIONS, max_iter)
        return [results[place] for place in range(len(paths))]

    def _step(self, iteration: int) -> None:
        """One Adam step on W, then sigma in closed form."""
        # -mu C (I - W) diag(sigma)^-1 + mu lam sign(W) + 2 W o (sI - W o W)^-T
        score = (self.CW - self.C) / self.sigma[:, None, :] + self.lam * self.W.sign()
        gradient = self.mu * score + 2.0 * self.W * self.inverse.mT
        self.first.mul_(_BETA1).add_(gradient, alpha=1.0 - _BETA1)
        self.second.mul_(_BETA2).addcmul_(gradient, gradient, value=1.0 - _BETA2)
        unbias1, unbias2 = 1.0 / (1.0 - _BETA1**iteration), 1.0 / (1.0 - _BETA2**iteration)
        self.step = unbias1 * self.first / ((unbias2 * self.second).sqrt() + _EPSILON)
        self.W -= self.lr[:, None, None] * self.step
        self._refresh()

    def _refresh(self) -> None:
        """Bring what depends on W up to date."""
        self.CW, self.variances = _residual_variances(self.W, self.C)
        variances = self.variances
        if self.kind == EQUAL:  # sigma = max(sqrt(tr((I - W)' C (I - W)) / d), sigma_0)
            variances = variances.mean(dim=1, keepdim=True).expand_as(variances)
        self.sigma = variances.sqrt().maximum(self.floor[:, None])  # NV: [(I - W)' C (I - W)]_ii in place of the mean
        self.inverse, self.inside = _inverse(self.W, self.s)

    def _shorten_steps(self) -> Bool[Tensor, " sets"]:
        """Undo and halve the last steps that left the domain until none does; return which steps vanished."""
        vanished = torch.zeros_like(self.inside)
        while True:
            outside = ~self.inside & ~vanished
            if not outside.any():
                return vanished
            self.W[outside] += self.lr[outside, None, None] * self.step[outside]
            self.lr[outside] *= 0.5
            vanished |= outside & (self.lr <= 1e-16)
            again = outside & ~vanished
            self.W[again] -= self.lr[again, None, None] * self.step[again]
            self._refresh()

    def _objective(self) -> Float[Tensor, " sets"]:
        d = self.W.shape[-1]
        score = 0.5 * (self.variances / self.sigma + self.sigma).sum(dim=1) + self.lam * self.W.abs().sum(dim=(1, 2))
        logdet = torch.linalg.slogdet(_domain_matrix(self.W, self.s)).logabsdet
        objective: Tensor = self.mu * score + d * float(np.log(self.s)) - logdet
        return objective


def _domain_matrix(W: Float[Tensor, "sets d d"], s: float) -> Float[Tensor, "sets d d"]:
    matrix: Tensor = -W * W
    matrix.diagonal(dim1=1, dim2=2).add_(s)
    return matrix


def _inverse(W: Float[Tensor, "sets d d"], s: float) -> tuple[Float[Tensor, "sets d d"], Bool[Tensor, " sets"]]:
    """(sI - W o W)^-1 and whether it is entrywise non-negative, that is, W in the domain of h_s."""
    inverse, failed = torch.linalg.inv_ex(_domain_matrix(W, s))
    inside = (failed == 0) & (inverse >= -1e-6).flatten(1).all(dim=1)
    return inverse, inside


def _residual_variances(
    W: Float[Tensor, "sets d d"], C: Float[Tensor, "sets d d"]
) -> tuple[Float[Tensor, "sets d d"], Float[Tensor, "sets d"]]:
    """C W, and diag((I - W)' C (I - W))."""
    CW = C @ W
    variances = (C - CW).diagonal(dim1=1, dim2=2) - (W * (C - CW)).sum(dim=1)
    return CW, variances.clamp(min=0.0)
