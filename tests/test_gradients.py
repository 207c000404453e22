"""First and second derivatives against finite differences, in float64."""

import pytest
import torch
from cases import Case, forward, leaves_of, problem
from torch.autograd import gradcheck, gradgradcheck

from rnn.cells import CELLS

EACH_CELL = [
    Case("", T=3, B=2, H=3),
    Case("", T=1, B=1, H=1),
    Case("", T=3, B=3, H=2, directions=2, ragged=True),
    Case("", T=3, B=3, H=2, ragged=True, reverse=True, layout="batch_major"),
]
CASES = [case._replace(cell=cell) for cell in CELLS for case in EACH_CELL]


def function(case: Case, p, backend: str = "torch"):
    def f(*leaves):
        output, state_n = forward(case, p, list(leaves), backend)
        return output, *state_n

    return f


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives(case, check, nan_filled):
    p = problem(case)
    assert check(function(case, p), leaves_of(case, p), check_batched_grad=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_and_its_vjp(case):
    """Each pair of rnn/cells.py, the one against autograd through the other."""
    cell = CELLS[case.cell]
    generator = torch.Generator().manual_seed(0)

    def tensors(n: int, *shape: int) -> tuple:
        return tuple(
            torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
            for _ in range(n)
        )

    x_gates, h_gates = tensors(cell.gates, 3, 4), tensors(cell.gates, 3, 4)
    prev, params = tensors(cell.states, 3, 4), tensors(len(cell.params), 4)
    state, saved = cell.step(x_gates, h_gates, prev, params)
    assert len(state) == cell.states and len(saved) == cell.saved
    d_state = tuple(torch.randn_like(s) for s in state)
    inputs = (*x_gates, *h_gates, *prev, *params)
    expected = torch.autograd.grad(state, inputs, d_state, allow_unused=True)
    d_x, d_h, d_prev, d_params = cell.step_vjp(d_state, prev, state, saved, params)
    assert [k for k in range(cell.gates) if d_x[k] is not d_h[k]] == list(cell.split)
    for want, got in zip(expected, (*d_x, *d_h, *d_prev, *(d.sum(0) for d in d_params))):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivative_of_the_kernels(cell):
    """The kernels give the first derivative, PyTorch's operations the second."""
    case = Case(cell, T=4, B=3, H=5)
    p = problem(case).to(torch.float32)
    seconds = []
    for backend in ("triton", "torch"):
        leaves = leaves_of(case, p)
        output = function(case, p, backend)(*leaves)[0]
        (first,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), leaves)[0])
    torch.testing.assert_close(*seconds, rtol=2e-2, atol=2e-2)
