"""Tensors that are changed in place after the call: what the gradients make of it."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from twins import (
    BACKENDS,
    IEEE,
    LENGTHS,
    assert_same,
    each_backend,
    each_cell,
    everything,
    gradients,
    objective,
    problem,
    tensors,
    twins,
)

pytestmark = IEEE


def masked(y):
    y[..., 2:] = 0


IN_PLACE = {
    "mul_": lambda y: y.mul_(2),
    "relu_": torch.relu_,
    "masked_fill_": lambda y: y.masked_fill_(torch.ones_like(y, dtype=torch.bool), 0.5),
    "y += x": lambda y: y.add_(torch.full_like(y, 0.5)),
    "y[mask] = 0": masked,
    "zero_": lambda y: y.zero_(),
    "inplace module": nn.LeakyReLU(0.1, inplace=True),
}


@each_cell
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("T", [6, 20])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
def test_results_changed_in_place(cell, change, T, batch_first, backend):
    """Output and states, before backward: torch.nn's gradients on a CPU."""
    config = {"num_layers": 2, "batch_first": batch_first, "dtype": torch.float32}
    theirs, ours = twins(cell, backend=backend, **config)
    x, hx = problem(ours, T=T)

    def call(module, x, hx):
        results = tensors(module(x, hx))
        for y in results if module is ours or cell != "lstm" else [r.clone() for r in results]:
            change(y)
        return results

    def as_torch_would(module, x, hx):  # oneDNN's LSTM refuses the change: of a copy
        results = [y.clone() for y in tensors(module(x, hx))]
        for y in results:
            change(y)
        return results

    expected = everything(theirs, x, hx, as_torch_would if cell == "lstm" else call)
    assert_same(everything(ours, x, hx, call), expected)


@each_cell
@pytest.mark.parametrize("how", ["lengths", "packed", "unbatched", "bidirectional"])
def test_results_of_other_calls_changed_in_place(cell, how):
    _, ours = twins(cell, bidirectional=how == "bidirectional")
    x, hx = problem(ours)

    def call(module, x, hx, copy=True):
        if how == "packed":
            results = module(pack_padded_sequence(x, torch.tensor([6, 4, 1])), hx)
        elif how == "unbatched":
            results = module(x[:, 0])
        else:
            results = module(x, hx, **({"lengths": LENGTHS} if how == "lengths" else {}))
        results = [y.clone() if copy else y for y in tensors(results)]
        for y in results:
            y.mul_(2).add_(1)
        return results

    in_place = everything(ours, x, hx, lambda *a: call(*a, copy=False))
    assert_same(in_place, everything(ours, x, hx, call))


@each_backend
@each_cell
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_results_are_detached_in_place(cell, batch_first, grad, backend):
    """Truncated back-propagation through time, as it is often written."""
    if (cell, backend, batch_first, grad) == ("lstm", "auto", True, False):
        pytest.skip("PyTorch's own operator returns a view here, in torch.nn.LSTM too")
    _, ours = twins(cell, backend=backend, batch_first=batch_first)
    x, hx = problem(ours)
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            output, hx = ours(x, hx)
        if grad:
            output.sum().backward()
        for y in (output, *tensors(hx)):
            assert not y.detach_().requires_grad


@pytest.mark.parametrize("backend", [BACKENDS[2]])
@each_cell
def test_the_kernels_say_that_their_output_was_changed(cell, backend):
    _, ours = twins(cell, backend=backend)
    x, hx = problem(ours)
    output, _ = ours(x, hx)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_backend
@each_cell
def test_weights_changed_between_the_passes_raise(cell, backend):
    """As in torch.nn: never a gradient of other weights than those that ran."""
    for module in twins(cell, backend=backend):
        x, hx = problem(module)
        loss = objective(module(x, hx))
        with torch.no_grad():
            module.weight_hh_l0.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_backend
@each_cell
@pytest.mark.parametrize("wanted", ["x", "x and hx", "all but weight_ih"])
def test_input_changed_in_place_where_no_gradient_reads_it(cell, wanted, backend):
    """As in torch.nn: with W_ih frozen only a second derivative needs it, and that one raises."""
    if (cell, backend) == ("lstm", "auto"):
        pytest.skip("oneDNN's LSTM keeps its input, in torch.nn.LSTM too")
    _, ours = twins(cell, backend=backend, bidirectional=True)
    for name, p in ours.named_parameters():
        p.requires_grad_(wanted == "all but weight_ih" and not name.startswith("weight_ih"))
    leaf, hx = problem(ours, T=20 if backend == "auto" else 4)
    if wanted == "x":
        hx = tuple(s.detach() for s in hx) if cell == "lstm" else hx.detach()
    found = []
    for change in (False, True):
        leaf.grad = None
        ours.zero_grad()
        x = leaf * 1
        results = ours(x, hx)
        if change:
            x.add_(1)
        objective(results).backward()
        found.append(gradients(ours, leaf))
    assert_same(*reversed(found))
    x = leaf * 1
    results = ours(x, hx)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(objective(results), leaf, create_graph=True)


@each_backend
@each_cell
def test_input_changed_in_place_where_a_gradient_reads_it(cell, backend):
    for module in twins(cell, backend=backend):
        leaf, hx = problem(module)
        x = leaf * 1
        results = module(x, hx)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            objective(results).backward()
