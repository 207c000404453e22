"""Weights that are computed from others: weight norm, pruning, parametrizations."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from twins import I, assert_same, each_cell, everything, problem, tensors, twins

DEEP = {"num_layers": 2, "bidirectional": True}
X = torch.randn(6, 3, I)


def weight_drop(module):
    weight = module.weight_hh_l0
    del module._parameters["weight_hh_l0"]
    module.register_parameter("raw", nn.Parameter(weight.detach()))
    kept = (torch.arange(weight.numel()).view(weight.shape) % 2).to(weight)
    module.register_forward_pre_hook(lambda m, _: setattr(m, "weight_hh_l0", m.raw * kept))


class Double(nn.Module):
    def forward(self, weight):
        return weight.double()


COMPUTED = {
    "weight_norm": lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
    "parametrizations.weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.eval(), "weight_hh_l0"),
    "prune": lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=0.5),
    "weight drop": weight_drop,
}


@each_cell
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_computed_weights(cell, compute, backend):
    results = []
    for module in twins(cell, backend=backend):
        x, hx = problem(module)
        torch.manual_seed(1)
        compute(module)
        results.append(everything(module, x, hx))
    assert_same(*reversed(results))


@each_cell
@pytest.mark.parametrize("when", ["after a training call", "after to()"])
def test_a_copy_of_a_module_with_computed_weights(cell, when):
    """In torch.nn the computed weights, which are in a list beside the parameters, forbid it."""
    ours = twins(cell)[1]
    parametrizations.weight_norm(ours, "weight_hh_l0")
    if when == "after to()":
        ours.double().float()
    else:
        ours(X)[0].sum().backward()
    deep = copy.deepcopy(ours)
    assert_same(deep(X), ours(X))
    with torch.no_grad():
        deep.parametrizations.weight_hh_l0.original0.zero_()
    assert not torch.allclose(deep(X)[0], ours(X)[0])


@each_cell
def test_a_parametrization_that_changes_the_dtype(cell):
    """Parameters in float32 that are computed with in float64."""
    results = []
    for module in twins(cell):
        x, hx = problem(module)
        for name, _ in [*module.named_parameters()]:
            parametrize.register_parametrization(module, name, Double(), unsafe=True)

        def call(module, x, hx):
            state = tuple(s.double() for s in tensors(hx))
            return module(x.double(), state if len(state) > 1 else state[0])

        results.append(everything(module, x, hx, call))
    assert_same(*reversed(results))


@each_cell
def test_functional_call_with_weights_of_another_dtype(cell):
    theirs, ours = twins(cell, **DEEP)
    double = {n: p.detach().double() for n, p in ours.named_parameters()}
    expected = functional_call(theirs, double, (X.double(),))
    assert_same(functional_call(ours, double, (X.double(),)), expected)
    assert_same(ours(X), theirs(X))
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 must be torch\.float32"):
        functional_call(ours, {"weight_hh_l0": double["weight_hh_l0"]}, (X,))
