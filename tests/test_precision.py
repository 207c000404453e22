"""Modes that change how a call is computed: eval, autocast, dtypes, determinism, large layers."""

import pytest
import torch
from twins import (
    BACKENDS,
    DEEP,
    IEEE,
    LENGTHS,
    I,
    assert_same,
    each_backend,
    each_cell,
    everything,
    objective,
    problem,
    tensors,
    twins,
)

from rnn import torch_path

pytestmark = IEEE


@each_backend
@each_cell
def test_backward_in_eval_mode(cell, backend):
    theirs, ours = twins(cell, backend=backend, dropout=0.5, **DEEP)
    x, hx = problem(ours)
    assert_same(everything(ours.eval(), x, hx), everything(theirs.eval(), x, hx))


def under_autocast(module, x, hx, dtype=torch.bfloat16, **kwargs):
    with torch.autocast("cpu", dtype=dtype):
        return module(x, hx, **kwargs)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@each_cell
@pytest.mark.parametrize("given", ["hx", "no-hx"])
def test_autocast(cell, given, backend):
    """bfloat16, as near to float32 as torch.nn's module in bfloat16; gradients in the dtype of the
    parameters."""
    theirs, ours = twins(cell, backend=backend, **DEEP)
    x, hx = problem(ours, T=20, hx=given == "hx")
    exact = everything(theirs, x, hx)
    got = everything(ours, x, hx, under_autocast)
    small = [t.detach().bfloat16().requires_grad_() for t in tensors((x, hx))]
    state = None if given == "no-hx" else small[1] if len(small) == 2 else tuple(small[1:])
    in_bfloat16 = everything(theirs.bfloat16(), small[0], state)
    assert got.keys() == in_bfloat16.keys()
    for name, wanted in exact.items():
        assert got[name].dtype == (torch.bfloat16 if "result" in name else torch.float32)
        if cell == "rnn_relu" and "result" not in name:
            continue  # rounding decides on which side of the kink a unit lies
        error, torch_error = ((r[name].float() - wanted).norm() for r in (got, in_bfloat16))
        assert error <= 2 * torch_error + 2**-7 * wanted.norm(), name


@pytest.mark.parametrize("backend", BACKENDS[:2])  # the interpreter knows no bfloat16
@each_cell
def test_backward_inside_autocast(cell, backend):
    """Autocast around the whole step, as many write it, changes no gradient of ours."""
    _, ours = twins(cell, backend=backend, **DEEP)
    x, hx = problem(ours)
    for forward_inside in (True, False):

        def loss(module, forward_inside=forward_inside):
            with torch.autocast("cpu", torch.bfloat16, enabled=forward_inside):
                results = module(x, hx, lengths=LENGTHS)
            return sum(y.float().square().sum() for y in tensors(results))

        ours.zero_grad()
        loss(ours).backward()
        outside = {n: p.grad.clone() for n, p in ours.named_parameters()}
        ours.zero_grad()
        inside = loss(ours)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside.backward()
        assert_same({n: p.grad for n, p in ours.named_parameters()}, outside)


@each_cell
def test_second_order_inside_autocast(cell):
    _, ours = twins(cell, **DEEP)
    x, hx = problem(ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = ours(x, hx)
        (d_x,) = torch.autograd.grad(output.float().square().sum(), x, create_graph=True)
        d_x.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in ours.parameters())


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_cell
def test_float64_stays_float64_under_autocast(cell, dtype, backend):
    theirs, ours = twins(cell, backend=backend, dtype=torch.float64, **DEEP)
    x, hx = problem(ours)
    expected = everything(theirs, x, hx)
    got = everything(ours, x, hx, lambda m, x, hx: under_autocast(m, x, hx, dtype))
    assert_same(got, expected)


@each_backend
@each_cell
def test_deterministic_algorithms(cell, backend, nan_filled):
    """Nothing is refused, and nothing that was left unwritten is read: it would be NaN."""
    _, ours = twins(cell, backend=backend, **DEEP)
    theirs = twins(cell, **DEEP)[0]
    x, hx = problem(ours, T=20)
    first = everything(ours, x, hx)
    assert_same(first, everything(theirs, x, hx))
    lengths = torch.tensor([20, 0, 3])
    for call in (None, lambda m, x, hx: m(x, hx, lengths=lengths)):
        first, again = everything(ours, x, hx, call), everything(ours, x, hx, call)
        assert all(torch.equal(y, again[n]) and y.isfinite().all() for n, y in first.items())


# W_hh of 512 and more: in float32 it is packed for oneDNN, in other dtypes it is not.


@each_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_large_layers(cell, dtype, batch, monkeypatch):
    monkeypatch.setattr(torch_path, "on_intel", lambda: False)  # so that weights are packed
    theirs, ours = twins(cell, I, 512, dtype=dtype)
    exact = twins(cell, I, 512, dtype=torch.float64)[0]
    exact.load_state_dict({n: p.double() for n, p in ours.state_dict().items()})
    x, hx = problem(ours, T=3, B=batch)
    got, torch_got = everything(ours, x, hx), everything(theirs, x, hx)
    double = [t.detach().double().requires_grad_() for t in tensors((x, hx))]
    wanted = everything(exact, double[0], tuple(double[1:]) if cell == "lstm" else double[1])
    for name, w in wanted.items():
        error, torch_error = ((r[name].double() - w).norm() for r in (got, torch_got))
        assert error <= 2 * torch_error + 512**0.5 * torch.finfo(dtype).eps * w.norm(), name


@each_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_second_order_of_large_layers(cell, dtype):
    _, ours = twins(cell, I, 512, dtype=dtype)
    exact = twins(cell, I, 512, dtype=torch.float64)[0]
    exact.load_state_dict({n: p.double() for n, p in ours.state_dict().items()})
    small = problem(ours, T=2, B=4)
    double = [t.detach().double().requires_grad_() for t in tensors(small)]
    large = double[0], tuple(double[1:]) if cell == "lstm" else double[1]
    results = []
    for module, (x, hx) in ((exact, large), (ours, small)):
        (d_x,) = torch.autograd.grad(objective(module(x, hx)), x, create_graph=True)
        objective(d_x).backward()
        results.append(module.weight_hh_l0.grad.double())
    error = (results[0] - results[1]).norm() / results[0].norm()
    assert error < (1e-12 if dtype == torch.float64 else 1e-5)
