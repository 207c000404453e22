"""First and second derivatives against finite differences, in float64."""

import pytest
import torch
from cases import Case, in_layout, problem
from torch.autograd import gradcheck, gradgradcheck

import rnn

CASES = [
    Case("rnn_tanh", T=4, B=3, H=3),
    Case("rnn_tanh", T=1, B=1, H=1),
    Case("rnn_relu", T=4, B=3, H=3, reverse=True),
    Case("rnn_tanh", T=5, B=4, H=2, directions=2, ragged=True),
    Case("rnn_tanh", T=3, B=4, H=2, ragged=True, reverse=True, layout="batch_major"),
]


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives(case, check, nan_filled):
    p = problem(case)
    leaves = [in_layout(p.x_gates, case.layout), p.h0.clone(), p.weight_hh.clone()]

    def f(x_gates, h0, weight_hh):
        return rnn.recurrence(
            x_gates, h0, weight_hh, cell=case.cell, lengths=p.lengths, reverse=case.reverse
        )

    assert check(f, [x.requires_grad_() for x in leaves])


def test_second_derivative_of_the_kernels():
    """The kernels give the first derivative, PyTorch's operations the second."""
    p = problem(Case("rnn_tanh", T=4, B=3, H=5)).to(torch.float32)
    seconds = []
    for backend in ("triton", "torch"):
        x_gates, weight_hh = p.x_gates.clone().requires_grad_(), p.weight_hh[0].requires_grad_()
        output, _ = rnn.recurrence(x_gates, p.h0[0], weight_hh, cell="rnn_tanh", backend=backend)
        (first,) = torch.autograd.grad(output.square().sum(), x_gates, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), weight_hh)[0])
    torch.testing.assert_close(*seconds, rtol=2e-2, atol=2e-2)


def test_functional_transforms():
    p = problem(Case("rnn_tanh", T=4, B=3, H=5))

    def loss(x_gates):
        return rnn.recurrence(x_gates, p.h0[0], p.weight_hh[0], cell="rnn_tanh")[0].sum()

    x_gates = p.x_gates.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x_gates), x_gates)
    torch.testing.assert_close(torch.func.grad(loss)(p.x_gates), want)
