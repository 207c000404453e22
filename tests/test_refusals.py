"""rnn.cell: what it refuses, and how it says so."""

import re

import pytest
import torch
import torch.nn.functional as F

import rnn
from rnn.cells import CELLS

pytestmark = pytest.mark.usefixtures("derived")


def choose(x, h_gates, state, params):
    if (x[0] > 0).all():
        return (h_gates[0],)
    return (x[0],)


def branch(x, h_gates, state, params):
    u = x[0] + h_gates[0]
    return (u if u[0, 0] > 0 else -u,)


def number(x, h_gates, state, params):
    return (x[0] * float(h_gates[0].detach()[0, 0]),)


def softmax(x, h_gates, state, params):
    u = x[0] + h_gates[0]
    return (torch.softmax(u, -1),)


def product(x, h_gates, state, params):
    return (x[0] @ h_gates[0].t() @ x[0],)


def mean(x, h_gates, state, params):
    return (x[0] - h_gates[0].mean(),)


def part(x, h_gates, state, params):
    return (x[0][:, :1] + h_gates[0],)


def dropout(x, h_gates, state, params):
    return (F.dropout(x[0] + h_gates[0], 0.5),)


def noise(x, h_gates, state, params):
    return (x[0] + h_gates[0] + torch.randn_like(x[0]),)


def in_place(x, h_gates, state, params):
    return ((x[0] + h_gates[0]).mul_(2),)


def unknown(x, h_gates, state, params):
    return (torch.atan(x[0] + h_gates[0]),)


def power(x, h_gates, state, params):
    return ((x[0] + h_gates[0]).abs() ** 0.3,)


def cast(x, h_gates, state, params):
    return ((x[0] + h_gates[0]).float(),)


def third_gate(x, h_gates, state, params):
    return (x[0] + h_gates[2],)


def no_param(x, h_gates, state, params):
    return (x[0] + h_gates[0] * params["leak"],)


def one_more_gate(x, h_gates, state, params):
    return (x[1] + h_gates[1] + 0 * state[0],)


def constant(x, h_gates, state, params):
    return ((x[0] > h_gates[0]).to(x[0].dtype),)


def size(x, h_gates, state, params):
    return ((x[0] + h_gates[0]) / x[0].size(1),)


WEIGHT = torch.nn.Parameter(torch.tensor(0.5))


def from_elsewhere(x, h_gates, state, params):
    return ((x[0] + h_gates[0]) * WEIGHT,)


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, d):
        return d


def own_derivative(x, h_gates, state, params):
    return (Identity.apply(x[0] + h_gates[0]),)


def hidden(x, h_gates, state, params):
    with torch.no_grad():
        scale = torch.sigmoid(x[0])
    return (scale * (x[0] + h_gates[0]),)


@pytest.mark.parametrize(
    ("step", "gates", "why"),
    [
        (choose, 1, r"aten\.all\.default .*not among.*: if \(x\[0\] > 0\)\.all\(\):"),
        (branch, 1, r"aten\.select\.int .*not among.*: return \(u if u"),
        (number, 1, r"aten\.select\.int .*not among"),
        (softmax, 1, r"aten\._softmax\.default .*not among.*: return \(torch\.softmax\(u, -1\),\)"),
        (product, 1, r"aten\.t\.default .*not among"),
        (mean, 1, r"aten\.mean\.default .*not among"),
        (part, 1, r"aten\.slice\.Tensor .*not among"),
        (dropout, 1, r"aten\.\S+ (draws random numbers|writes in place)"),
        (noise, 1, r"aten\.randn_like\.default draws random numbers"),
        (in_place, 1, r"aten\.mul_\.Tensor writes in place.*\.mul_\(2\)"),
        (unknown, 1, r"aten\.atan\.default .*not among the pointwise operators"),
        (power, 1, r"aten\.pow\.Tensor_Scalar: its exponent must be"),
        (cast, 1, r"the new state\[0\] must be \(2, 3\) of float64.* got .*float32"),
        (third_gate, 2, r"gates=2, states=1.*: return \(x\[0\] \+ h_gates\[2\],\)"),
        (no_param, 1, r"KeyError\('leak'\).*params \[\]"),
        (one_more_gate, 2, r"gate 0 of 2 is not used"),
        (constant, 1, r"no gradient reaches"),
        (size, 1, r"something else for another size"),
        (from_elsewhere, 1, r"reads a tensor from elsewhere: name it in params.*\* WEIGHT"),
        (own_derivative, 1, r"gradient is not that of its operations.*straight_through"),
        (hidden, 1, r"gradient is not that of its operations"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refused(step, gates, why):
    """At the decorator, with the operator's name and the line of the function."""
    before = dict(CELLS)
    with pytest.raises(ValueError, match=why) as error:
        rnn.cell(gates=gates)(step)
    assert f"{step.__name__} cannot be a cell: " in str(error.value)
    line = int(re.search(rf"\({re.escape(__file__)}:(\d+)", str(error.value))[1])
    code = step.__code__  # its first line stands for a fault that is none of one operation
    assert line in [code.co_firstlineno, *(n for _, _, n in code.co_lines())]
    assert CELLS == before


@pytest.mark.parametrize(
    ("result", "error", "why"),
    [
        (lambda x: x, TypeError, "must return a tuple of tensors, got tensor"),
        (lambda x: (x, x), TypeError, r"must return the 1 new state\(s\), got 2"),
        (lambda x: (1.0,), TypeError, "must return a tuple of tensors"),
        (lambda x: (x > 0,), ValueError, "of float64 as the arguments, got .* of torch.bool"),
        (lambda x: (torch.ones(()) + 0 * 1,), ValueError, r"the new state\[0\] must be \(2, 3\)"),
    ],
)
def test_a_wrong_result(result, error, why):
    def step(x, h_gates, state, params):
        return result(x[0] + h_gates[0])

    with pytest.raises(error, match=why):
        rnn.cell(gates=1)(step)


def taken(x, h_gates, state, params):
    return (torch.tanh(x[0] + h_gates[0]),)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="one gate and one state at least, got 0 and 1"):
        rnn.cell(gates=0)
    with pytest.raises(ValueError, match="must be an identifier, got 'a b'"):
        rnn.cell(gates=1, params={"a b": 1.0})
    with pytest.raises(TypeError, match="made of a Python function, got <built-in"):
        rnn.cell(gates=1)(torch.tanh)
    with pytest.raises(TypeError, match=r"a cell that rnn\.cell made"):
        rnn.source(CELLS["gru"])
    with pytest.raises(ValueError, match="language must be one of"):
        rnn.source(rnn.cell(gates=1)(taken), "cuda")
