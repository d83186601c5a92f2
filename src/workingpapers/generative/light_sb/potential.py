"""The Gaussian-mixture potential of a light Schrödinger bridge, and its consequences in closed form, on tensors."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workingpapers.common.validation import check_choice, check_finite, check_number

Covariance = Literal["diag", "full"]


class LightSBPotential(nn.Module):
    """The potential v(y) = sum_k alpha_k N(y | r_k, epsilon S_k) with all that follows from it; for custom loops.

    Nothing here centres or scales the data: c(x) grows like exp(x' S x / (2 epsilon)), so training wants x and y with
    means near 0 and standard deviations near 1, by one scale for all features. `LightSB` takes care of it.

    Parameters
    ----------
    means : initial r_k, (components, d); usually rows of the target sample. Their dtype and device are the module's.
    epsilon : above 0.
    covariance : "diag", or "full" for S_k = L_k L_k' with L_k lower triangular.
    init_scale : S_k starts as this multiple of the identity.

    Attributes
    ----------
    raw_log_weights : epsilon log alpha_k, (components,); scaled so that an Adam step moves log alpha_k by lr / epsilon.
        All alpha_k may be multiplied by one constant without changing plan, drift or objective.
    means : r_k, (components, d).
    log_scales : "diag": log S_k, (components, d). "full": (components, d, d), below the diagonal the entries of L_k,
        on it the logarithms of their squares; what is above is ignored.
    """

    def __init__(
        self,
        means: Float[Tensor, "components d"],
        *,
        epsilon: float,
        covariance: Covariance = "diag",
        init_scale: float = 0.1,
    ) -> None:
        super().__init__()
        if not isinstance(means, Tensor) or means.ndim != 2 or not means.is_floating_point() or means.numel() == 0:
            raise ValueError("means must be a floating-point tensor of shape (components, d)")
        check_finite("means", means)
        check_choice("covariance", covariance, ("diag", "full"))
        self.epsilon = check_number("epsilon", epsilon, above=0)
        self.covariance = covariance
        components, d = means.shape
        log_scale = math.log(check_number("init_scale", init_scale, above=0))
        self.raw_log_weights = nn.Parameter(means.new_full((components,), -self.epsilon * math.log(components)))
        self.means = nn.Parameter(means.detach().clone())
        diagonal = means.new_full((components, d), log_scale)
        self.log_scales = nn.Parameter(diagonal if covariance == "diag" else torch.diag_embed(diagonal))

    @property
    def log_weights(self) -> Float[Tensor, " components"]:
        """log alpha_k, not normalised."""
        return self.raw_log_weights / self.epsilon

    @property
    def scales(self) -> Float[Tensor, "components d"] | Float[Tensor, "components d d"]:
        """S_k: its diagonal, or the matrix."""
        if self.covariance == "diag":
            return self.log_scales.exp()
        factor = self._factor()
        return factor @ factor.mT

    def _factor(self) -> Float[Tensor, "components d d"]:
        """L_k with S_k = L_k L_k'."""
        return self.log_scales.tril(-1) + torch.diag_embed((_diagonal(self.log_scales) / 2).exp())

    def _squares(self, x: Tensor) -> Tensor:
        """x_i^2, or all products x_i x_j: (n, d) or (n, d^2)."""
        return x * x if self.covariance == "diag" else _outer(x, x).flatten(1)

    def _logits(self, x: Tensor, squares: Tensor, constant: Tensor, matrices: Tensor, vectors: Tensor) -> Tensor:
        """constant_k + (x' matrices_k x + 2 vectors_k' x) / (2 epsilon), as (n, components), by two matrix products.

        It is linear in (x_i x_j, x_i), so that an array of shape (n, components, d) is never built.
        """
        linear = torch.addmm(constant, x, vectors.T, alpha=1 / self.epsilon)
        return torch.addmm(linear, squares, matrices.flatten(1).T, alpha=0.5 / self.epsilon)

    def _precision(self) -> tuple[Tensor, Tensor, Tensor]:
        """S_k^{-1}, S_k^{-1} r_k and log(alpha_k N(0 | r_k, epsilon S_k))."""
        if self.covariance == "diag":
            inverse, log_det = torch.exp(-self.log_scales), self.log_scales.sum(1)
        else:
            inverse, log_det = torch.cholesky_inverse(self._factor()), _diagonal(self.log_scales).sum(1)
        pull = _product(inverse, self.means)
        quadratic = (self.means * pull).sum(1) / self.epsilon
        constant = self.means.shape[1] * math.log(2 * math.pi * self.epsilon)
        return inverse, pull, self.log_weights - 0.5 * (log_det + quadratic + constant)

    def _plan_logits(self, x: Tensor) -> Float[Tensor, "n components"]:
        return self._logits(x, self._squares(x), self.log_weights, self.scales, self.means)

    def log_normaliser(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """log c(x), differentiable in x and the parameters."""
        return self._plan_logits(x).logsumexp(1)

    def log_potential(self, y: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """log v(y), differentiable in y and the parameters."""
        inverse, pull, constant = self._precision()
        return self._logits(y, self._squares(y), constant, -inverse, pull).logsumexp(1)

    def objective(self, x0: Float[Tensor, "n d"], x1: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
        """L = mean log c(x0) - mean log v(x1): the KL divergence from the bridge up to a constant."""
        return self.log_normaliser(x0).mean() - self.log_potential(x1).mean()

    @torch.no_grad()
    def accumulate_gradient(self, x0: Float[Tensor, "n d"], x1: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
        """Return `objective(x0, x1)` and add its gradient to every `.grad`, as `backward` would, in less time.

        The logits are linear in (x x', x), so that the gradient needs only the moments E p_k, E p_k x and E p_k x x'
        of the two batches, p_k being a point's posterior weights: two matrix products a batch.
        """
        epsilon, means = self.epsilon, self.means
        inverse, pull, constant = self._precision()
        factor = None if self.covariance == "diag" else self._factor()
        scales = self.log_scales.exp() if factor is None else factor @ factor.mT
        log_c, mass0, first0, second0 = self._moments(x0, self.log_weights, scales, means)
        log_v, mass1, first1, second1 = self._moments(x1, constant, -inverse, pull)
        gradient_raw = (mass0 - mass1)[:, 0] / epsilon

        residual = first1 - mass1 * means  # E p_k (y - r_k)
        gradient_means = (first0 - _product(inverse, residual)) / epsilon
        if factor is None:
            # d log c / d log S = S x^2 / (2 epsilon),   d log N / d log S = (y - r)^2 / (2 epsilon S) - 1/2
            spread = second1 - means * (first1 + residual)  # E p_k (y - r_k)^2
            gradient_scales = (scales * second0 - inverse * spread) / (2 * epsilon) + mass1 / 2
        else:
            # d log c / dL = x x' L / epsilon,   d log N / dL = S^{-1} (y - r)(y - r)' L^{-T} / epsilon - L^{-T}
            spread = second1.view_as(factor) - _outer(means, first1) - _outer(residual, means)
            stretched = torch.linalg.solve_triangular(factor, spread @ inverse, upper=False).mT
            gradient_scales = ((second0.view_as(factor) @ factor - stretched) / epsilon).tril_()
            # L_ii = exp(a_ii / 2), and the diagonal of L^{-T} is 1 / L_ii
            diagonal = _diagonal(gradient_scales)
            diagonal.copy_((diagonal * _diagonal(factor) + mass1) / 2)

        gradients = (gradient_raw, gradient_means, gradient_scales)
        for parameter, gradient in zip((self.raw_log_weights, means, self.log_scales), gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return log_c - log_v

    def _moments(self, x: Tensor, constant: Tensor, matrices: Tensor, vectors: Tensor) -> tuple[Tensor, ...]:
        """Mean of logsumexp_k(logits), and E p_k, E p_k x and E p_k x x' over the batch for p = softmax_k(logits)."""
        squares = self._squares(x)
        logits = self._logits(x, squares, constant, matrices, vectors)
        largest = logits.amax(1, keepdim=True)
        p = (logits - largest).exp_()
        total = p.sum(1, keepdim=True)
        p = (p / (total * len(x))).T
        return (largest + total.log()).mean(), p.sum(1, keepdim=True), p @ x, p @ squares

    def _mix(self, logits: Tensor, vectors: Tensor, matrices: Tensor, x: Tensor) -> Float[Tensor, "n d"]:
        """sum_k w_k (vectors_k + matrices_k x) with w = softmax_k(logits)."""
        weights = logits.softmax(1)
        matrix = (weights @ matrices.flatten(1)).view(len(x), *matrices.shape[1:])
        return weights @ vectors + _product(matrix, x)

    def log_plan(self, y: Float[Tensor, "n d"], x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """log plan(y | x) of each pair of rows: <x, y> / epsilon + log v(y) - log c(x)."""
        return (x * y).sum(1) / self.epsilon + self.log_potential(y) - self.log_normaliser(x)

    @torch.no_grad()
    def sample(self, x: Float[Tensor, "n d"], generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        """One exact draw of y from plan(y | x) for each row."""
        component = self._plan_logits(x).softmax(1).multinomial(1, generator=generator)[:, 0]
        noise = math.sqrt(self.epsilon) * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        if self.covariance == "diag":
            scales = self.scales[component]
            return self.means[component] + scales * x + scales.sqrt() * noise
        factor, moved = self._factor(), torch.empty_like(x)
        for k in range(len(factor)):
            rows = component == k
            moved[rows] = (x[rows] @ factor[k] + noise[rows]) @ factor[k].T  # L (L' x + noise)
        return self.means[component] + moved

    @torch.no_grad()
    def conditional_mean(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """E[y | x]."""
        return self._mix(self._plan_logits(x), self.means, self.scales, x)

    @torch.no_grad()
    def conditional_moments(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d d"]]:
        """E[y | x] and Cov[y | x]."""
        weights, scales = self._plan_logits(x).softmax(1), self.scales
        if self.covariance == "diag":
            centres = self.means + scales * x[:, None, :]
            within = torch.diag_embed(weights @ scales)
        else:
            centres = self.means + torch.einsum("kij,nj->nki", scales, x)
            within = (weights @ scales.flatten(1)).view(len(x), *scales.shape[1:])
        mean = (weights[:, None, :] @ centres)[:, 0]
        spread = weights.sqrt()[:, :, None] * (centres - mean[:, None, :])
        return mean, self.epsilon * within + spread.mT @ spread

    @torch.no_grad()
    def drift(self, x: Float[Tensor, "n d"], t: float | Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """g(x, t), at one time or at a time for each row, 0 <= t < 1.

        One time costs two matrix products; times of their own need arrays of shape (n, components, d).
        """
        return self._drift(x, t, *self._spectrum())

    def _spectrum(self) -> tuple[Float[Tensor, "components d"], Tensor | None]:
        """Eigenvalues of the S_k, and their eigenvectors unless S_k is diagonal."""
        if self.covariance == "diag":
            return self.scales, None
        eigenvalues, vectors = torch.linalg.eigh(self.scales)
        return eigenvalues, vectors

    def _drift(self, x: Tensor, t: float | Tensor, eigenvalues: Tensor, basis: Tensor | None) -> Tensor:
        """sum_k w_k(x, t) M_k^{-1} (r_k + (S_k - I) x), computed in the eigenvectors of S_k, where M_k is diagonal."""
        means = self.means if basis is None else _product(basis.mT, self.means)
        if isinstance(t, Tensor) and t.ndim == 1:
            t = t[:, None, None]
            x = x[:, None, :] if basis is None else torch.einsum("nd,kde->nke", x, basis)
            m = 1 + t * (eigenvalues - 1)
            step = (means + (eigenvalues - 1) * x) / m
            quadratic = (x * (step + means / m) - t * means**2 / m).sum(2)
            weights = (self.log_weights - 0.5 * m.log().sum(2) + quadratic / (2 * self.epsilon)).softmax(1)
            step = weights[:, :, None] * step
            return step.sum(1) if basis is None else torch.einsum("nke,kde->nd", step, basis)

        # one M_k for all rows: exponent and step are again quadratic and affine in x with coefficients of k alone
        m = 1 + t * (eigenvalues - 1)
        slope, offset = (eigenvalues - 1) / m, means / m
        constant = self.log_weights - 0.5 * m.log().sum(1) - t * (means * offset).sum(1) / (2 * self.epsilon)
        if basis is not None:
            slope, offset = (basis * slope[:, None, :]) @ basis.mT, _product(basis, offset)
        return self._mix(self._logits(x, self._squares(x), constant, slope, offset), offset, slope, x)

    @torch.no_grad()
    def sample_at(
        self, x: Float[Tensor, "n d"], t: float | Float[Tensor, " n"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n d"]:
        """The bridge's state at time 0 <= t <= 1, one exact draw for each row of x at time 0."""
        time = (
            t[:, None] if isinstance(t, Tensor) and t.ndim == 1 else torch.as_tensor(t, dtype=x.dtype, device=x.device)
        )
        y = self.sample(x, generator)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return (1 - time) * x + time * y + (self.epsilon * time * (1 - time)).sqrt() * noise

    @torch.no_grad()
    def trajectory(
        self, x: Float[Tensor, "n d"], n_steps: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n times d"]:
        """Paths of dX = g(X, t) dt + sqrt(epsilon) dW by Euler-Maruyama, at the times 0, 1/n_steps, ..., 1."""
        spectrum, path = self._spectrum(), [x]
        for step in range(n_steps):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            drift = self._drift(path[-1], step / n_steps, *spectrum)
            path.append(path[-1] + drift / n_steps + math.sqrt(self.epsilon / n_steps) * noise)
        return torch.stack(path, dim=1)

    @torch.no_grad()
    def in_units(
        self, origin0: Float[Tensor, " d"], origin1: Float[Tensor, " d"], unit: float, epsilon: float
    ) -> LightSBPotential:
        """The same plan for (x - origin0) / unit and (y - origin1) / unit, with `epsilon` in the new units.

        It is the same for the present epsilon / unit^2; for another one r_k, S_k and epsilon log alpha_k are kept.
        """
        shift = _product(self.scales, origin0.expand_as(self.means))
        moved = LightSBPotential((self.means + shift - origin1) / unit, epsilon=epsilon, covariance=self.covariance)
        moved.raw_log_weights.copy_((self.raw_log_weights + (self.means + shift / 2) @ origin0) / unit**2)
        moved.log_scales.copy_(self.log_scales)
        return moved


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[:, :, None] * right[:, None, :]


def _product(matrices: Tensor, vectors: Tensor) -> Tensor:
    """matrices_i vectors_i for each i; diagonal matrices are given by their diagonals."""
    return matrices * vectors if matrices.ndim == 2 else (matrices @ vectors[:, :, None])[:, :, 0]
