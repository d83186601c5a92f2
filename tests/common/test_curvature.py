"""Tests of Hessian and Gauss-Newton products: dense matrices, trees, limits in which the two agree, refusals."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional

from workingpapers.common.curvature import (
    GaussNewtonProduct,
    HessianProduct,
    gauss_newton_vector_product,
    hessian_vector_product,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rugged(x):
    return (x.sin() * x.roll(1)).sum() + x.prod() + (x**4).sum()


def test_products_are_those_of_the_dense_hessian():
    x, v = random(7), random(7, seed=1)
    H = hessian(rugged)(x)
    product = HessianProduct(rugged, x)
    torch.testing.assert_close(torch.stack([product(e) for e in torch.eye(7, dtype=x.dtype)]), H)
    torch.testing.assert_close(hessian_vector_product(rugged, x, v), H @ v)
    torch.testing.assert_close(product.gradient, jacrev(rugged)(x))
    assert product.value == rugged(x)
    assert not product.value.requires_grad
    assert not product.gradient.requires_grad


def test_trees_are_one_long_vector():
    x = {"a": random(2, 3), "b": (random(4, seed=1),)}
    v = {"a": random(2, 3, seed=2), "b": (random(4, seed=3),)}

    def f(tree):
        return rugged(torch.cat([tree["a"].flatten(), tree["b"][0]]))

    flat, direction = (torch.cat([tree["a"].flatten(), tree["b"][0]]) for tree in (x, v))
    product = hessian_vector_product(f, x, v)
    torch.testing.assert_close(torch.cat([product["a"].flatten(), product["b"][0]]), hessian(rugged)(flat) @ direction)
    assert not x["a"].requires_grad


def test_parts_without_curvature_give_zeros():
    x = (random(3), random(2, seed=1), random(4, seed=2))

    def f(tree):
        return (tree[0] ** 3).sum() + 2.0 * tree[1].sum()  # the second linear, the third absent

    product = hessian_vector_product(f, x, x)
    torch.testing.assert_close(product[0], 6 * x[0] ** 2)
    assert product[1].eq(0).all()
    assert product[2].eq(0).all()
    assert all(part.eq(0).all() for part in hessian_vector_product(lambda tree: tree[1].sum(), x, x))
    assert all(part.eq(0).all() for part in hessian_vector_product(lambda tree: torch.ones(()), x, x))


@pytest.fixture(name="classifier")
def _classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = random(12, 4), torch.arange(12) % 3
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return parameters, lambda p: functional_call(model, p, (X,)), lambda z: functional.cross_entropy(z, y)


def test_gauss_newton_is_the_sandwich(classifier):
    parameters, outputs, loss = classifier
    v = {name: random(*value.shape, seed=9) for name, value in parameters.items()}
    z = outputs(parameters)
    J = torch.cat([part.reshape(z.numel(), -1) for part in jacrev(outputs)(parameters).values()], dim=1)
    inner = hessian(lambda flat: loss(flat.reshape(z.shape)))(z.flatten())
    flat = torch.cat([part.flatten() for part in v.values()])
    product = gauss_newton_vector_product(outputs, loss, parameters, v)
    torch.testing.assert_close(torch.cat([part.flatten() for part in product.values()]), J.T @ inner @ J @ flat)


def test_gauss_newton_is_the_hessian_of_a_linear_model_and_not_of_another(classifier):
    A, y, x, v = random(9, 4), torch.arange(9) % 3, random(4, 3, seed=3), random(4, 3, seed=4)

    def loss(z):
        return functional.cross_entropy(z, y)

    torch.testing.assert_close(
        gauss_newton_vector_product(lambda w: A @ w, loss, x, v), hessian_vector_product(lambda w: loss(A @ w), x, v)
    )
    parameters, outputs, loss = classifier
    ones = {name: torch.ones_like(value) for name, value in parameters.items()}
    ours = gauss_newton_vector_product(outputs, loss, parameters, ones)
    full = hessian_vector_product(lambda p: loss(outputs(p)), parameters, ones)
    assert not torch.allclose(ours["0.weight"], full["0.weight"])


def test_gauss_newton_without_parameters_in_the_outputs_is_zero():
    assert (
        gauss_newton_vector_product(lambda x: torch.ones(2), lambda z: (z**2).sum(), random(3), random(3)).eq(0).all()
    )


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="scalar tensor"):
        HessianProduct(lambda x: x, random(2))
    with pytest.raises(ValueError, match="scalar tensor, got float"):
        HessianProduct(lambda x: 1.0, random(2))
    with pytest.raises(ValueError, match="structure and shapes"):
        hessian_vector_product(rugged, random(3), random(4))
    with pytest.raises(ValueError, match="structure and shapes"):
        hessian_vector_product(rugged, random(3), (random(3),))


def test_a_kept_gauss_newton_gives_many_products_and_the_loss(classifier):
    parameters, outputs, loss = classifier
    product = GaussNewtonProduct(outputs, loss, parameters)
    assert product.value == loss(outputs(parameters))
    assert not product.value.requires_grad
    for seed in (1, 2):
        v = {name: random(*value.shape, seed=seed) for name, value in parameters.items()}
        fresh = gauss_newton_vector_product(outputs, loss, parameters, v)
        for name, part in product(v).items():
            torch.testing.assert_close(part, fresh[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="v must have the structure"):
        product({"weight": random(3)})
    with pytest.raises(ValueError, match="scalar"):
        GaussNewtonProduct(outputs, lambda z: z, parameters)
