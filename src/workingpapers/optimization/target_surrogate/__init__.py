"""Training with few gradients of an expensive loss: many cheap steps on a surrogate in the space of the outputs.

For a model whose loss is dear and whose own forward and backward passes are cheap: the loss runs a simulator, asks an
expert or a human, or solves an inner problem. The loss h(theta) = l(f(theta)) is seen only through its gradient in
the outputs (targets) z = f(theta), taken once per outer step. Around z_t the surrogate

    g_t(theta) = l(z_t) + (1/n) sum_i [ <grad l_i(z_ti), f_i(theta) - z_ti> + D(f_i(theta), z_ti) / eta ],

with D half the squared distance, is minimised roughly by m inner steps. When no l_i curves more than L and
eta <= 1/L, g_t lies above h and touches it at theta_t, so that every decrease of g_t is a decrease of h. `eta` is a
step per example in output space: it depends on the loss alone, not on the model, the data or the batch size.

    from workingpapers.optimization.target_surrogate import SSO, oracle_from_loss

    optimizer = SSO(model.parameters(), lr=4.0, inner_steps=20)  # 1/L of the logistic loss
    for x, y in loader:
        optimizer.step(lambda: model(x), oracle_from_loss(torch.nn.BCEWithLogitsLoss(reduction="none"), y))
    print(optimizer.oracle_calls, optimizer.inner_steps_done)

Any callable z -> (value or None, gradient per example) is an oracle, also one that returns NumPy arrays.

1/L is the safe step, not the best one: the surrogate solved exactly then moves a model by short steps, while one step
of gradient descent may be longer. Try 4 and 16 times 1/L as well. On small batches a large m fits each batch: let eta
decay (rule "sqrt" or "exp"). Where the loss costs no more than the model itself, Adam or SGD take less time; where the
loss is known in closed form and the model is linear, use a solver for that problem.

Reference: Lavington, Vaswani, Babanezhad, Schmidt and Le Roux, "Target-based Surrogates for Stochastic Optimization",
ICML 2023 (arXiv 2302.02607). Against the authors' code: the surrogate carries the factor 1/2 of the paper's formula
(their e is our 1 / (2 eta)) and no constant factor of the number of outputs, the oracle is the only part that sees the
loss, and the inner line search shrinks its step by interpolation, which needs about a fifth of their evaluations;
``shrink=(0.9, 0.9)`` is their rule.
"""

from workingpapers.optimization.target_surrogate.armijo import ArmijoGD
from workingpapers.optimization.target_surrogate.oracle import LossOracle, Oracle, oracle_from_loss
from workingpapers.optimization.target_surrogate.sso import SSO
from workingpapers.optimization.target_surrogate.surrogate import weighted_squares

__all__ = ["SSO", "ArmijoGD", "LossOracle", "Oracle", "oracle_from_loss", "weighted_squares"]
