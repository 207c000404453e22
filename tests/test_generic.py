"""rnn.Recurrent: any cell as a module, on every backend, against a plain loop in float64."""

import copy

import pytest
import torch
from cases import EACH_CELL, check
from own_cells import (  # noqa: F401
    CALLS,
    DEEP,
    DOUBLE,
    LEAKY,
    LENGTHS,
    PEEPHOLE,
    H,
    I,
    each_backend,
    each_cell,
    each_own,
    given,
    in_the_tables,
    loop,
    module,
    packed,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jvp, vmap
from twins import IEEE, assert_same, everything, tensors

import rnn
from rnn.cells import CELLS, Cell
from rnn.in_place import IN_PLACE

pytestmark = IEEE


def in_float64(of, x, hx):
    """The same module, input and states in float64, as leaves."""
    twin = copy.deepcopy(of).double()
    x, *hx = (t.detach().double().requires_grad_() for t in (x, *tensors(hx)))
    return twin, x, tuple(hx) if len(hx) > 1 else hx[0]


def assert_like_the_loop(of, call, T=6, B=3):
    """Results and all gradients, to rounding of the dtype."""
    x, hx = given(of, T, B)
    by_call = packed if call == "packed" else lambda m, x, hx: m(x, hx, **CALLS[call])
    got = everything(of, x, hx, by_call)
    expected = everything(*in_float64(of, x, hx), lambda m, x, hx: loop(m, x, hx, **CALLS[call]))
    assert len(got) == len(expected)
    if of.weight_hh_l0.dtype == torch.float64:
        assert_same(got, expected)
    else:
        assert_same({n: g.double() for n, g in got.items()}, expected, 1e-5)


# Against the loop.


@each_own
@pytest.mark.parametrize("case", EACH_CELL, ids=str)
def test_the_function_on_the_torch_backend(cell, case, nan_filled):
    check(case._replace(cell=cell.name), torch.float64, "torch", "cpu")


@each_own
@pytest.mark.parametrize("case", [case for case in EACH_CELL if case.B < 7], ids=str)
def test_the_function_in_the_kernels(cell, case, nan_filled):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(case._replace(cell=cell.name), torch.float32, "triton", device)


@each_cell
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("config", [{}, DEEP, {"bias": False}], ids=["plain", "deep", "no-bias"])
def test_module_on_the_torch_backend(cell, config, call, nan_filled):
    assert_like_the_loop(module(cell, **config, **DOUBLE), call)


@pytest.mark.parametrize("cell, call", [(PEEPHOLE, call) for call in CALLS] + [(LEAKY, "packed")])
def test_module_in_the_kernels(cell, call, nan_filled):
    assert_like_the_loop(module(cell, bidirectional=True, backend="triton"), call)


def test_two_layers_in_the_kernels(nan_filled):
    assert_like_the_loop(module(PEEPHOLE, **DEEP, backend="triton"), "padded", T=2)


@each_own
@each_backend
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 33), (3, 1, 17)], ids=str)
def test_odd_sizes(cell, backend, sizes):
    T, B, hidden = sizes
    assert_like_the_loop(module(cell, hidden, bidirectional=True, backend=backend), "padded", T, B)


@each_own
def test_without_hx_without_a_batch_and_batch_first(cell):
    of = module(cell, **DEEP, **DOUBLE, batch_first=True)
    x, _ = given(of)
    output, state = of(x)
    expected = loop(of, x.transpose(0, 1))
    assert_same((output.transpose(0, 1), state), expected)
    alone, state_alone = of(x[1])
    assert_same(alone, output[1], 1e-12)
    assert_same(state_alone, [s[:, 1] for s in tensors(state)], 1e-12)


@pytest.mark.parametrize("name", sorted(IN_PLACE))
@pytest.mark.parametrize("case", EACH_CELL, ids=str)
def test_cells_without_a_form_in_place(name, case, monkeypatch, nan_filled):
    """The built-in cells by their step and VJP alone."""
    monkeypatch.delitem(IN_PLACE, name)
    check(case._replace(cell=name), torch.float64, "torch", "cpu")


def test_states_that_only_change_places(monkeypatch):
    """Their gradients are each other's: none is written over before it is read."""

    def step(x_gates, h_gates, state, params):
        h = torch.tanh(x_gates[0] + h_gates[0] + state[1])
        return (h, state[2], state[1]), ()

    def step_vjp(d_state, state_prev, state, saved, params):
        d = d_state[0] * (1 - state[0] * state[0])
        return (d,), (d,), (None, d_state[2] + d, d_state[1]), ()

    cell = Cell("exchange", 1, 3, 0, step, step_vjp)
    monkeypatch.setitem(CELLS, "exchange", cell)
    of = module(cell, bidirectional=True, **DOUBLE)
    assert_like_the_loop(of, "lengths")
    of.backend = "triton"
    with pytest.raises(RuntimeError, match="the cell exchange has no tiles"):
        of(given(of)[0])


@each_own
@each_backend
def test_the_same_bits_from_run_to_run(cell, backend):
    of = module(cell, bidirectional=True, backend=backend)
    x, hx = given(of, T=3)
    first, second = (
        everything(of, x, hx, lambda m, *a: m(*a, lengths=LENGTHS // 2)) for _ in range(2)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm"])
def test_built_in_cells_give_the_built_in_modules(name):
    torch.manual_seed(0)
    generic = rnn.Recurrent(CELLS[name], I, H, **DEEP)
    torch.manual_seed(0)
    own = rnn.modules.MODULES[name](I, H, **DEEP)
    x, hx = given(own)
    a, b = everything(generic, x, hx), everything(own, x, hx)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# Derivatives of other forms.


def function_of_all(of, T=3, B=2):
    names = [n for n, _ in of.named_parameters()]
    x, hx = given(of, T, B)
    states = len(tensors(hx))
    leaves = (x, *tensors(hx), *(p.detach().clone().requires_grad_() for p in of.parameters()))

    def f(x, *rest):
        state = rest[0] if states == 1 else rest[:states]
        named = dict(zip(names, rest[states:]))
        kwargs = {"lengths": torch.tensor([1, T])}
        return tuple(tensors(functional_call(of, named, (x, state), kwargs)))

    return f, leaves


@each_own
def test_first_and_second_derivatives(cell):
    f, leaves = function_of_all(module(cell, 1, bidirectional=True, **DOUBLE))
    assert gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
    f, leaves = function_of_all(module(cell, 1, **DOUBLE), T=2)
    assert gradgradcheck(f, leaves)


@each_own
def test_second_derivative_of_the_kernels(cell):
    seconds = []
    for backend in ("triton", "torch"):
        of = module(cell, backend=backend)
        x, hx = given(of, T=3)
        (first,) = torch.autograd.grad(of(x, hx)[0].square().sum(), x, create_graph=True)
        first.square().sum().backward()
        seconds.append({n: p.grad for n, p in of.named_parameters() if p.grad is not None})
    assert_same(*seconds, 1e-3)


@each_own
def test_vmap_and_jvp(cell):
    of = module(cell, 3, **DOUBLE)
    x, _ = given(of, B=4)
    many = torch.stack((x, 2 * x))
    with torch.no_grad():
        assert_same(vmap(lambda x: of(x)[0])(many), torch.stack([of(x)[0] for x in many]))
    p = {n: w.detach() for n, w in of.named_parameters()}
    tangent = {n: torch.ones_like(w) for n, w in p.items()}
    _, slope = jvp(lambda w: functional_call(of, w, (x,))[0], (p,), (tangent,))
    step = 1e-6
    ends = [
        functional_call(of, {n: w + sign * step for n, w in p.items()}, (x,))[0] for sign in (1, -1)
    ]
    assert_same(slope, (ends[0] - ends[1]) / (2 * step), 1e-7)
