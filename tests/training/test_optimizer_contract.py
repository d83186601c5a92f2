"""The contract that all optimisers of the library keep, checked against torch's own and against ones that break it."""

import pytest
import torch
from torch.optim import SGD, AdamW

from optimizer_contract import check_optimizer
from workingpapers.training import OrthoGrad


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=1e-2), lambda p: SGD(p, lr=1e-2, momentum=0.9)])
def test_torch_keeps_it(make):
    check_optimizer(make, refuses_sparse=isinstance(make([torch.ones(1)]), AdamW))


def test_orthograd_keeps_it():
    check_optimizer(lambda p: OrthoGrad(p, AdamW, lr=1e-2))


class Forgetful(AdamW):
    def load_state_dict(self, state):
        super().load_state_dict(state | {"state": {}})


class GradientlessClosure(SGD):
    def step(self, closure=None):
        with torch.no_grad():
            loss = closure() if closure else None
        super().step()
        return loss


class Restless(SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.1)
        return loss


@pytest.mark.parametrize("broken", [Forgetful, GradientlessClosure, Restless])
def test_optimisers_that_break_it_are_found(broken):
    with pytest.raises((AssertionError, RuntimeError)):
        check_optimizer(lambda p: broken(p, lr=1e-2), refuses_sparse=False)
