"""What every `torch.optim.Optimizer` of the library keeps, checked on one small network.

from optimizer_contract import check_optimizer

def test_contract():
    check_optimizer(lambda params: Frugal(params, lr=1e-2))
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


def check_optimizer(
    make: Make,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16),
    steps: int = 6,
    needs_closure: bool = False,
    refuses_sparse: bool = True,
    learning_rate: bool = True,
) -> None:
    """Check what torch's own optimisers promise.

    Parameters
    ----------
    make : maps an iterable of parameters, or of groups of them, to the optimiser; the same one every time.
    dtypes : of the parameters, each of which must be trained to a lower loss.
    steps : of every run.
    needs_closure : the optimiser has no step without a closure.
    refuses_sparse : sparse gradients raise RuntimeError.
    learning_rate : every group has "lr", and an "lr" of 0 in a group leaves its parameters where they are.
    """
    _same_start_same_end(make, steps, needs_closure)
    _continues_from_its_state(make, steps, needs_closure)
    _closure_has_gradients(make)
    _skips_what_has_no_gradient(make)
    _takes_groups(make, needs_closure, learning_rate)
    for dtype in dtypes:
        _descends(make, dtype, steps)
    if refuses_sparse:
        _refuses_sparse(make)


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    targets = torch.stack([inputs[:, 0] * inputs[:, 1], inputs[:, 2], inputs.sum(1)], dim=1)
    return (model(inputs.to(dtype)) - targets.to(dtype)).square().mean()


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: Iterable[int], *, closure: bool) -> None:
    for step in steps:

        def evaluate(step: int = step) -> torch.Tensor:
            optimiser.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if closure:
            optimiser.step(evaluate)
        else:
            evaluate()
            optimiser.step()


def _equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _same_start_same_end(make: Make, steps: int, closure: bool) -> None:
    one, other = network(), network()
    for model in (one, other):
        train(model, make(model.parameters()), range(steps), closure=closure)
    assert _equal(one, other), "two runs from one start differ"
    assert not _equal(one, network()), "nothing was trained"


def _continues_from_its_state(make: Make, steps: int, closure: bool) -> None:
    """Saved to a file in the middle and loaded into a fresh optimiser, training ends at the same bits."""
    for stop in range(1, steps):
        whole, first = network(), network()
        train(whole, make(whole.parameters()), range(steps), closure=closure)
        optimiser = make(first.parameters())
        train(first, optimiser, range(stop), closure=closure)
        file = io.BytesIO()
        torch.save(optimiser.state_dict(), file)
        file.seek(0)
        second = copy.deepcopy(first)
        resumed = make(second.parameters())
        resumed.load_state_dict(torch.load(file))
        train(second, resumed, range(stop, steps), closure=closure)
        assert _equal(whole, second), f"resumed after {stop} steps, training ends elsewhere"
        copied = copy.deepcopy(first)
        again = make(copied.parameters())
        again.load_state_dict(optimiser.state_dict())
        train(copied, again, range(stop, steps), closure=closure)
        assert _equal(whole, copied), "a state that was not copied continues elsewhere"


def _closure_has_gradients(make: Make) -> None:
    """`step` is called without gradients by torch; the closure runs with them, and its loss is returned."""
    model = network()
    optimiser = make(model.parameters())

    def evaluate() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimiser.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    expected = float(loss_of(model, 0).detach())
    with torch.no_grad():
        returned = optimiser.step(evaluate)
    assert float(returned.detach()) == expected
    assert not any(parameter.grad_fn for parameter in model.parameters())


def _skips_what_has_no_gradient(make: Make) -> None:
    model = network()
    before = copy.deepcopy(model[2])
    model[2].requires_grad_(False)
    optimiser = make(model.parameters())

    def evaluate() -> torch.Tensor:
        optimiser.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    optimiser.step(evaluate)
    assert _equal(model[2], before), "a parameter without gradient was moved"


def _takes_groups(make: Make, closure: bool, learning_rate: bool) -> None:
    model = network()
    groups: list[dict[str, Any]] = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    if learning_rate:
        groups[0]["lr"] = 0.0
    optimiser = make(groups)
    optimiser.add_param_group({"params": list(model[4].parameters())})
    assert len(optimiser.param_groups) == 3
    if learning_rate:
        assert optimiser.param_groups[0]["lr"] == 0.0 != optimiser.param_groups[2]["lr"]
    before = copy.deepcopy(model)
    train(model, optimiser, range(2), closure=closure)
    if learning_rate:
        assert _equal(model[0], before[0]), "a group at lr 0 was moved"
    assert not _equal(model[2], before[2])
    assert not _equal(model[4], before[4]), "the added group was not trained"
    with pytest.raises(ValueError):  # noqa: PT011 - torch's own words
        optimiser.add_param_group({"params": list(model[4].parameters())})


def _descends(make: Make, dtype: torch.dtype, steps: int) -> None:
    model = network(dtype)
    optimiser = make(model.parameters())
    before = float(loss_of(model, 0).detach())

    def evaluate() -> torch.Tensor:
        optimiser.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    for _ in range(4 * steps):
        optimiser.step(evaluate)
    after = float(loss_of(model, 0).detach())
    assert after < before, f"in {dtype} the loss went from {before} to {after}"
    assert all(parameter.dtype == dtype and parameter.isfinite().all() for parameter in model.parameters())


def _refuses_sparse(make: Make) -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimiser = make(table.parameters())

    def evaluate() -> torch.Tensor:
        optimiser.zero_grad()
        loss = table(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="sparse"):
        optimiser.step(evaluate)
