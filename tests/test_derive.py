"""rnn.cell: what it makes of a function. What it refuses: test_refusals.py."""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import Case, assert_close_to_float64, problem, worst

import rnn
from rnn.cells import CELLS

pytestmark = pytest.mark.usefixtures("derived")

# ------------------------------------------------------- the built-in cells, derived


def rnn_tanh(x, h_gates, state, params):
    return (torch.tanh(x[0] + h_gates[0]),)


def rnn_relu(x, h_gates, state, params):
    return (torch.relu(x[0] + h_gates[0]),)


def gru(x, h_gates, state, params):
    r = torch.sigmoid(x[0] + h_gates[0])
    z = torch.sigmoid(x[1] + h_gates[1])
    n = torch.tanh(x[2] + r * h_gates[2])
    return ((1 - z) * n + z * state[0],)


def lstm(x, h_gates, state, params):
    i, f, g, o = (a + b for a, b in zip(x, h_gates))
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


FUNCTIONS = {function.__name__: function for function in (rnn_tanh, rnn_relu, gru, lstm)}


def derive(name: str):
    return rnn.cell(gates=CELLS[name].gates, states=CELLS[name].states)(FUNCTIONS[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_by_hand(name):
    """The same numbers, gates and params, and no more to keep."""
    cell, hand = derive(name), CELLS[name]
    assert cell.name != hand.name and CELLS[cell.name] is cell
    assert (cell.inner_bias, cell.split) == (hand.inner_bias, hand.split)
    assert len(cell.params) == len(hand.params)
    assert 1 + cell.stored <= 1.25 * (1 + hand.stored)
    generator = torch.Generator().manual_seed(0)

    def tensors(n: int, *shape: int) -> tuple:
        return tuple(
            torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(n)
        )

    x, h, prev = (tensors(n, 5, 7) for n in (hand.gates, hand.gates, hand.states))
    params, d_state = tensors(len(hand.params), 7), tensors(hand.states, 5, 7)
    results = []
    for c in (cell, hand):
        state, saved = c.step(x, h, prev, params)
        gradients = c.step_vjp(d_state, prev, state, saved, params)
        results.append([*state, *(g for each in gradients for g in each)])
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        assert want is None or worst(got, want) < 1e-14


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tiles_as_by_hand(name, nan_filled):
    pytest.importorskip("triton")
    from launched import DEVICE, planned, run

    from rnn.kernels.cells import CELLS as TILES
    from rnn.kernels.cells import tiles_of

    cell = derive(name)
    assert tiles_of(cell)[2:] == TILES[name][2:]  # what is loaded, and what stays in float32
    case = Case(name, T=5, B=6, H=17, directions=2, ragged=True)
    p = problem(case).to(torch.float32, DEVICE)
    want = run(case, p, planned(case, torch.float32))
    got = run(case._replace(cell=cell.name), p, planned(case, torch.float32))
    assert got.keys() == want.keys()
    for key, x in want.items():
        torch.testing.assert_close(got[key], x, rtol=1e-5, atol=1e-6, msg=key)
    assert_close_to_float64(case, got, torch.float32)


# ------------------------------------------------------------------ every operation of the table


def blend(x, h_gates, state, params):
    """Every operation of the table, and PyTorch's functions that come down to them."""
    u, v = x[0] + h_gates[0], params["a"] * state[0]
    a = F.softplus(u) + F.logsigmoid(v) + F.gelu(u) - F.silu(v) + F.elu(u) + F.mish(v)
    a = a + torch.exp(-u.abs()) + torch.log1p(v**2) + torch.log(1 + u.square()) * 0.25
    a = a + torch.expm1(v.clamp(-1, 1)) + torch.sqrt(1 + u**4) + torch.rsqrt(1 + v.pow(2))
    a = a + (2 + torch.sin(u)).reciprocal() + torch.cos(v) ** 3 + torch.erf(u) + (1 + v * v) ** -1
    a = a + torch.maximum(u, v) - torch.minimum(u, torch.tensor(0.5)) + F.leaky_relu(v)
    always = torch.tensor(0.5) < 1
    inside = ((u > v) & (u <= 2)) | ~(v >= -1) | torch.logical_and(u != 0, v < 3)
    inside = inside & always | torch.logical_not(always)
    a = torch.where(inside, a, torch.sign(u)) + (u == v) + F.hardtanh(u) + F.hardsigmoid(v)
    a = a + torch.lerp(u, v, 0.3) + torch.addcmul(u, v, v, value=-0.5) - torch.relu(v).detach()
    a = a + torch.zeros_like(u).masked_fill(u > 0, 0.125) + F.hardswish(u) + v.new_ones(v.shape)
    return (torch.tanh(a / 4) + torch.sigmoid(a.neg()),)


def test_every_operation():
    cell = rnn.cell(gates=1, params={"a": 1.0})(blend)
    source = rnn.source(cell, "torch") + rnn.source(cell)
    from rnn.operations import OPERATIONS

    names = {op.triton.split("(")[0] for op in OPERATIONS.values() if "(" in op.triton}
    assert not {name for name in names if f"{name}(" not in source}
    case = Case(cell.name, T=3, B=4, H=17)
    p = problem(case)
    new, _ = cell.step((p.x_gates[0],), (p.x_gates[1],), (p.state0[0][0],), (p.params[0][0],))
    own = {"a": p.params[0][0]}
    want = blend((p.x_gates[0],), (p.x_gates[1],), (p.state0[0][0],), own)
    assert worst(new[0], want[0]) < 1e-13
    pytest.importorskip("triton")
    from launched import DEVICE, planned, run

    got = run(case, p.to(torch.float32, DEVICE), planned(case, torch.float32))
    assert_close_to_float64(case, got, torch.float32)


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -100.0, 88.5, 94.083336, 1e-6, -1e-4]
SPECIAL_OF = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "relu": torch.relu,
    "sign": torch.sign,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "maximum": lambda u: torch.maximum(u, 0.5 * u),
    "minimum": lambda u: u.clamp(max=1.0),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("name", SPECIAL_OF)
def test_tiles_of_special_numbers(name):
    """NaN and infinity come out where PyTorch has them; no digits are lost near 0."""
    pytest.importorskip("triton")
    from launched import DEVICE, FMA_ROUNDS_TWICE, run_forward

    if FMA_ROUNDS_TWICE and name.startswith("exp"):
        pytest.skip(FMA_ROUNDS_TWICE)

    def step(x, h_gates, state, params):
        return (SPECIAL_OF[name](x[0]) + 0 * h_gates[0],)

    case = Case(rnn.cell(gates=1)(step).name, T=1, B=1, H=len(SPECIAL))
    p = problem(case).to(torch.float32, DEVICE)
    p.x_gates[0, 0] = torch.tensor(SPECIAL, device=DEVICE)
    want = SPECIAL_OF[name](p.x_gates)
    got = run_forward(case, p)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-38, equal_nan=True)


# ----------------------------------------------------------------------------------- gates, params


def test_how_a_sum_is_written_does_not_matter():
    def step(x, h_gates, state, params):
        return (torch.tanh(0.5 * state[0] + x[0] + h_gates[0]),)

    cell = rnn.cell(gates=1)(step)
    assert (cell.inner_bias, cell.params, cell.split) == ((), (), ())


def test_b_hh_stands_inside_where_the_sum_is_not_all():
    def step(x, h_gates, state, params):
        return (torch.tanh(x[0] + h_gates[0]) + x[1] * params["w"] + 2 * h_gates[1],)

    cell = rnn.cell(gates=2, params={"w": 0.5})(step)
    assert (cell.inner_bias, cell.params, cell.split) == ((1,), ("b_h1", "w"), (1,))
    assert cell.own_params == (("w", 0.5),)


def test_what_the_states_tell_is_not_saved():
    def step(x, h_gates, state, params):
        v = state[1] + x[0] + h_gates[0]
        return torch.tanh(v) * torch.sigmoid(3 * v), v

    cell = rnn.cell(gates=1, states=2)(step)
    assert (cell.saved, cell.reads, cell.recalls) == (0, (1,), False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy: 0 / 0
def test_rows_that_do_not_exist_are_not_summed(nan_filled):
    """In the kernels their states are 0, and the gradient of a param would be NaN there."""
    pytest.importorskip("triton")
    from launched import DEVICE, planned, run

    def step(x, h_gates, state, params):
        return (torch.tanh(x[0] + h_gates[0]) * params["w"] / state[0],)

    case = Case(rnn.cell(gates=1, params={"w": 1.0})(step).name, T=1, B=3, H=17)
    p = problem(case)
    p = p._replace(state0=(p.state0[0].abs() + 1,)).to(torch.float32, DEVICE)
    got = run(case, p, planned(case, torch.float32))
    assert all(x.isfinite().all() for x in got.values())


def test_a_lambda():
    assert rnn.cell(gates=1)(lambda x, h, s, p: (x[0] + h[0],)).name.startswith("cell_")


def test_the_gradient_of_a_step_is_products_alone():
    """All else is computed before it comes, for many steps at once."""
    text = rnn.source(derive("lstm"), "torch").split("def times_slopes")[1].split("def ")[0]
    assert text.count(" * ") == 6 and text.count(" + ") == 1
    assert not re.search(r"torch| - | / ", text)


def test_truths_are_not_saved():
    """Kernels store tiles of numbers."""

    def step(x, h_gates, state, params):
        a, b = x[0] + h_gates[0], x[1] + h_gates[1]
        return (torch.where(a > 0, b, 2 * b),)

    cell = rnn.cell(gates=2)(step)
    ones = torch.ones(2, 3)
    _, saved = cell.step((ones, ones), (ones, ones), (ones,), ())
    assert [x.dtype for x in saved] == [torch.float32]


def test_straight_through_is_exact():
    u = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = (u > 0).to(u.dtype) * 0.1
    spike = rnn.straight_through(value, u / (1 + u.abs()))
    assert torch.equal(spike, value)
    spike.sum().backward()
    torch.testing.assert_close(u.grad, (1 + u.detach().abs()) ** -2)


def test_a_second_derivative_heeds_detach():
    def step(x, h_gates, state, params):
        u = x[0] + h_gates[0]
        return (rnn.straight_through((u > 0).to(u.dtype), torch.tanh(u) * u),)

    cell = rnn.cell(gates=1)(step)
    u = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    zero = torch.zeros_like(u)
    (new,), _ = cell.step((u,), (zero,), (zero,), ())
    want = torch.tanh(u) * u
    for _ in range(2):
        new, want = (torch.autograd.grad(y.sum(), u, create_graph=True)[0] for y in (new, want))
        torch.testing.assert_close(new, want)


# ------------------------------------------------------------------------------- names and files


def test_the_same_function_is_the_same_cell():
    one, again = derive("gru"), derive("gru")
    assert one is again

    def gru(x, h_gates, state, params):  # another function of that name
        return (torch.tanh(x[0] + h_gates[0] + x[1] + h_gates[1] + x[2] + h_gates[2]),)

    other = rnn.cell(gates=3)(gru)
    assert other.name != one.name and CELLS[one.name] is one
    assert other.name.startswith("gru_")


def test_cells_with_other_initial_values_are_others():
    def step(x, h_gates, state, params):
        return (params["a"] * x[0] + h_gates[0],)

    values = [1.0, 2.0, torch.nn.init.zeros_, lambda x: x.fill_(1), lambda x: x.fill_(2)]
    cells = [rnn.cell(gates=1, params={"a": value})(step) for value in values]
    assert len({cell.name for cell in cells}) == len(cells)
    assert [dict(cell.own_params)["a"] for cell in cells] == values


def test_copies_are_the_cell_itself():
    cell = derive("lstm")
    assert copy.deepcopy(cell) is cell and pickle.loads(pickle.dumps(cell)) is cell


def test_the_source_is_short_and_its_file_is_there(derived):
    pytest.importorskip("triton")
    from rnn.kernels.cells import tiles_of

    cell = derive("lstm")
    text = rnn.source(cell)
    assert text.count("@triton.jit") == 2 and len(text.splitlines()) < 40
    assert max(map(len, text.splitlines())) < 120
    tiles_of(cell)
    (file,) = derived.glob(f"{cell.name}_*.py")
    assert file.read_text() == text
    file.write_text("half of")  # as a process leaves it that is killed
    assert cell.tiles().step is not None and file.read_text() == text
    assert not list(derived.glob("*.tmp"))


def test_without_triton():
    """Cells are made, and run in PyTorch."""
    program = """
import sys
sys.modules["triton"] = None
import torch, rnn
@rnn.cell(gates=1)
def step(x, h_gates, state, params):
    return (torch.tanh(x[0] + h_gates[0]),)
rnn.recurrence(torch.zeros(2, 1, 3), torch.zeros(1, 3), torch.zeros(3, 3), cell=step.name)
assert "import triton" in rnn.source(step)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
