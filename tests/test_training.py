"""What users do with recurrent modules while they train: hooks, activation checkpointing,
deterministic algorithms, dropout of weights. rnn's modules do as torch.nn's."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from twins import KINDS, H, I, assert_same, each_cell, everything, problem, tensors, twins

import rnn

DEEP = {"num_layers": 2, "bidirectional": True}
each_backend = pytest.mark.parametrize("backend", ["torch", "auto"])


@each_cell
def test_construction_on_meta_then_to_empty(cell):
    theirs, _ = twins(cell, **DEEP)
    _, kind, told = KINDS[cell]
    ours = kind(I, H, **told, **DEEP, device="meta")
    assert all(p.is_meta for p in ours.parameters())
    ours = ours.to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict())
    x, hx = problem(theirs)
    assert_same(everything(ours, x, hx), everything(theirs, x, hx))


@each_cell
@each_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(cell, backend, use_reentrant):
    _, ours = twins(cell, backend=backend, dropout=0.5, **DEEP)
    x, hx = problem(ours)

    def flat(x, *state):  # the reentrant one sees no gradient through a pair
        output, last = ours(x, state if len(state) > 1 else state[0])
        return output, *tensors(last)

    results = []
    for call in (
        lambda _, x, hx: flat(x, *tensors(hx)),
        lambda _, x, hx: checkpoint(flat, x, *tensors(hx), use_reentrant=use_reentrant),
    ):
        torch.manual_seed(1)  # the dropout is drawn again in the backward pass, and the same
        results.append(everything(ours, x, hx, call))
    assert_same(results[1], results[0])


@each_cell
@each_backend
def test_forward_and_full_backward_hooks(cell, backend):
    """They see the tensors that torch.nn's see."""
    seen = []
    for module in twins(cell, backend=backend, **DEEP):
        calls = {}
        module.register_forward_pre_hook(lambda m, args, c=calls: c.update(args=args))
        module.register_forward_hook(lambda m, args, results, c=calls: c.update(output=results[0]))
        module.register_full_backward_hook(
            lambda m, d_input, d_output, c=calls: c.update(d_input=d_input, d_output=d_output[0])
        )
        x, hx = problem(module)
        everything(module, x, hx)
        seen.append(calls)
    theirs, ours = seen
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for name in theirs:
        assert_same([ours[name]], [theirs[name]])


@each_cell
@each_backend
def test_weights_that_are_not_contiguous_bring_no_warning(cell, backend):
    theirs, ours = twins(cell, backend=backend)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().mT.contiguous().mT)
    x, hx = problem(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = everything(ours, x, hx)
    assert_same(got, everything(theirs, x, hx))


@each_cell
@each_backend
def test_deterministic_algorithms(cell, backend):
    """The same numbers, bit by bit, and no refusal; with a reverse direction and lengths."""
    _, ours = twins(cell, backend=backend, **DEEP)
    x, hx = problem(ours)
    lengths = torch.tensor([6, 0, 2])
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            everything(ours, x, hx, lambda m, x, hx: m(x, hx, lengths=lengths)) for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert_same(everything(ours, x, hx, lambda m, x, hx: m(x, hx, lengths=lengths)), runs[0])


# Dropout of recurrent weights (Merity et al., 2018).


class WeightDrop(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, weight):
        return nn.functional.dropout(weight, self.p, self.training)


def dropped(module, p=0.5, name="weight_hh_l0"):
    parametrize.register_parametrization(module, name, WeightDrop(p))
    return module


@each_cell
@each_backend
def test_weight_dropout_is_torchs_of_one_seed(cell, backend):
    """Results, and the gradient of a weight under its mask; two weights draw in turn."""
    results = []
    for module in twins(cell, backend=backend, num_layers=2):
        x, hx = problem(module)
        dropped(module)
        dropped(module, name="weight_hh_l1")
        torch.manual_seed(1)
        results.append(everything(module, x, hx))
    assert_same(results[1], results[0])
    gradient = results[1]["parametrizations.weight_hh_l0.original"]
    assert 0.2 < (gradient == 0).double().mean() < 0.8


def test_one_mask_of_weights_holds_for_all_steps_of_a_call():
    """The result is that of a plain module with the weight that was drawn."""
    module, plain, drawn = rnn.GRU(I, 64), rnn.GRU(I, 64), []
    plain.load_state_dict(module.state_dict())
    dropped(module)
    module.parametrizations.weight_hh_l0[0].register_forward_hook(lambda *a: drawn.append(a[-1]))
    x, results = torch.randn(20, 2, I), []
    for _ in range(2):
        results.append(module(x)[0])
        with torch.no_grad():
            plain.weight_hh_l0.copy_(drawn[-1])
        assert_same(plain(x)[0], results[-1])
    assert not torch.allclose(*results)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
