"""The kernels' arithmetic: NaN and infinity, tf32, tanh and sigmoid."""

import pytest
import torch
from cases import Case, by_equation, problem, worst

pytest.importorskip("triton")

import triton
import triton.language as tl
from launched import DEVICE, FMA_ROUNDS_TWICE, from_bits, planned, run

from rnn.cells import CELLS
from rnn.kernels import launch
from rnn.kernels.cells import CELLS as TILES
from rnn.kernels.cells import gru_step_vjp, sigmoid, tanh
from rnn.kernels.layout import Inputs
from rnn.kernels.products import round_tf32

NANS = [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "ieee"])
@pytest.mark.parametrize("bits", NANS, ids=hex)
@pytest.mark.parametrize("place", ["x_gates", "state0", "weight_hh"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_nan_stays_one(cell, place, bits, tf32):
    case = Case(cell, T=2, B=2, H=16)
    p = problem(case).to(torch.float32)
    nan = from_bits(bits)[0]
    if place == "x_gates":
        p.x_gates[0, 0, 3] = nan
    elif place == "state0":
        p.state0[0][0, 0, 3] = nan
    else:
        p.weight_hh[0, 2, 3] = nan
    p = p.to(torch.float32, DEVICE)
    inputs = Inputs(p.x_gates, p.state0, p.weight_hh, p.params)
    output, state_n, _ = launch.forward(
        planned(case, torch.float32, tf32), CELLS[cell], inputs, save=False
    )
    want = by_equation(case, p.to(torch.float32, "cpu"))
    assert torch.equal(output.isnan().cpu(), want["output"].isnan())
    assert want["output"].isnan().any() and state_n[0].isnan().any()


def test_relu_passes_the_gradient_of_a_nan():
    """As PyTorch does: its slope is 0 up to 0, and 1 elsewhere."""
    case = Case("rnn_relu", T=1, B=2, H=16)
    p = problem(case).to(torch.float32)
    p.x_gates[0, 0, 3] = float("nan")
    want = by_equation(case, p)["d_x_gates"]
    p = p.to(torch.float32, DEVICE)
    got = run(case, p, planned(case, torch.float32))["d_x_gates"].cpu()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert want[0, 0, 3] != 0


@pytest.mark.parametrize("cell", CELLS)
def test_the_gradient_of_a_row_without_steps_reaches_no_other(cell):
    case = Case(cell, T=3, B=4, H=5, ragged=True)
    p = problem(case).to(torch.float32, DEVICE)
    how = planned(case, torch.float32)
    want = run(case, p, how)
    for d in p.d_state_n:
        d[:, 0] = float("nan")  # of row 0, which has no steps
    got = run(case, p, how)
    for name, x in want.items():
        if name.startswith("d_state0"):
            assert got[name][:, 0].isnan().all() and torch.equal(got[name][:, 1:], x[:, 1:])
        else:
            assert torch.equal(got[name], x), name


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "ieee"])
@pytest.mark.parametrize("place", ["state0", "weight_hh"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu"])
def test_infinity_is_what_float32_makes_of_it(cell, place, tf32):
    """tanh of it is +-1; infinity times zero, and minus infinity, are NaN as they are there."""
    case = Case(cell, T=2, B=3, H=16)
    p = problem(case).to(torch.float32)
    if place == "state0":
        p.state0[0][0, 0, 3], p.state0[0][0, 1, 4] = float("inf"), -float("inf")
    else:
        p.weight_hh[0, 2, 3], p.weight_hh[0, 5, 1] = float("inf"), -float("inf")
    want = by_equation(case, p)["output"]
    p = p.to(torch.float32, DEVICE)
    inputs = Inputs(p.x_gates, p.state0, p.weight_hh, p.params)
    how = planned(case, torch.float32, tf32)
    output = launch.forward(how, CELLS[cell], inputs, save=False)[0].cpu()
    torch.testing.assert_close(output, want, rtol=1e-2, atol=1e-2, equal_nan=True)
    saturated = want.isinf() | (want.abs() == 1)
    assert saturated.any() and torch.equal(output[saturated], want[saturated])


@triton.jit
def apply_kernel(x_ptr, y_ptr, N: tl.constexpr, FUNCTION: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + at, FUNCTION(tl.load(x_ptr + at)))


@triton.jit
def exact_tanh(x):
    return tanh(x, False)


@triton.jit
def exact_sigmoid(x):
    return sigmoid(x, False)


def apply(function, x):
    x = torch.nn.functional.pad(x, (0, -x.numel() % 1024)).to(DEVICE)
    y = torch.empty_like(x)
    apply_kernel[(x.numel() // 1024,)](x, y, N=1024, FUNCTION=function)
    return y.cpu()


EDGES = from_bits(
    *NANS, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7FF000, 0x7F7FEFFF, 0, 0x80000000
)


def test_rounding_to_tf32():
    """To the nearest, on the host as in the kernels; NaN and infinity stay, and nothing finite
    becomes infinite."""
    random = torch.randint(-(2**31), 2**31, (4096 - len(EDGES),)).to(torch.int32)
    x = torch.cat([EDGES, random.view(torch.float32)])
    host = launch.tf32_parts(x.view(1, 64, 64), 2)
    for rounded in (apply(round_tf32, x), host[0].flatten()):
        assert torch.equal(rounded.isnan(), x.isnan())
        assert torch.equal(rounded.isinf(), x.isinf())
        assert (rounded.view(torch.int32) & 0x1FFF == 0).all()
        assert (rounded[x.isnan()].view(torch.int32) & 0x400000 != 0).all()
        normal = x.isfinite() & (x.abs() > 1e-30) & (x.abs() < 3.4e38)
        error = (rounded.double() - x.double()).abs() / x.double().abs()
        assert error[normal].max() <= 2**-11
        assert error[x.isfinite() & (x.abs() >= 3.4e38)].max() <= 2**-10
    finite = x.isfinite()
    assert torch.equal(host.double().sum(0).flatten()[finite], x.double()[finite])


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_relative_accuracy_at_every_magnitude(name):
    if FMA_ROUNDS_TWICE and name == "sigmoid":
        pytest.skip(FMA_ROUNDS_TWICE)
    magnitudes = torch.logspace(-37, 38, 20_000)
    near = torch.linspace(-30, 30, 30_000)
    x = torch.cat([magnitudes, -magnitudes, near, EDGES])
    x64 = x.double()
    if name == "tanh":
        got, want = apply(exact_tanh, x)[: len(x)], torch.tanh(x64)
    else:
        got = apply(exact_sigmoid, x)[: len(x)]
        want = torch.where(x64 < 0, torch.exp(x64.clamp(max=0)), 1) / (1 + torch.exp(-x64.abs()))
    assert torch.equal(got.isnan(), x.isnan())
    normal = x.isfinite() & (want.abs() > 1.2e-38)
    error = ((got.double() - want) / want).abs()
    assert error[normal & (x > -30)].max() < 3e-7
    assert error[normal].max() < 4e-6  # the interpreter has no fused multiply-add
    infinite = x.isinf()
    assert torch.equal(got[infinite].double(), want[infinite])


def test_a_small_change_of_gru_is_not_rounded_away():
    """A leaky unit, z near 1, moves by less in a step than float16 resolves."""
    H, T = 16, 400
    x_gates = torch.zeros(T, 1, 3 * H, dtype=torch.float16, device=DEVICE)
    x_gates[..., H : 2 * H], x_gates[..., 2 * H :] = 9.0, 5.0  # z = 0.9999, n = 1
    state0 = torch.full((1, 1, H), 0.5, dtype=torch.float16, device=DEVICE)
    zero = x_gates.new_zeros(1, 3 * H, H)
    inputs = Inputs(x_gates, (state0,), zero, (x_gates.new_zeros(1, H),))
    how = planned(Case("gru", T, 1, H), torch.float16)
    output, _, _ = launch.forward(how, CELLS["gru"], inputs, save=False)
    z = torch.sigmoid(torch.tensor(9.0, dtype=torch.float64))
    want = 1 - 0.5 * z**T
    assert abs(float(output[-1, 0, 0]) - float(want)) < 1e-3


@pytest.mark.parametrize("cell", CELLS)
def test_tf32_rounds_and_does_not_cut(cell):
    """Cut off, the products of positive numbers would all be too small."""
    case = Case(cell, T=1, B=16, H=64)
    p = problem(case)
    p = p._replace(
        weight_hh=p.weight_hh.abs() * (1 + 2**-11), state0=tuple(s.abs() for s in p.state0)
    )
    torch.manual_seed(0)
    p = p._replace(weight_hh=torch.rand_like(p.weight_hh) / 32, x_gates=p.x_gates * 0 - 1)
    p = p._replace(state0=tuple(torch.rand_like(s) for s in p.state0)).to(torch.float32, DEVICE)
    inputs = Inputs(p.x_gates, p.state0, p.weight_hh, p.params)
    output = launch.forward(planned(case, torch.float32, True), CELLS[cell], inputs, False)[0]
    want = by_equation(case, p.to(torch.float64, "cpu"))["output"]
    bias = float((output.cpu().double() - want).mean())
    assert abs(bias) < 3e-6 and worst(output, want) < 2**-10


def test_infinity_does_not_reach_units_that_do_not_exist():
    """H is padded to a power of two; 0 times infinity, in the padding, would be NaN, and spread."""
    case = Case("rnn_relu", T=4, B=2, H=17)
    p = problem(case).to(torch.float32)
    p.weight_hh.abs_()
    p.x_gates[0, 0, 3] = float("inf")
    p.d_output[3, 1, 5] = float("inf")
    want = by_equation(case, p)
    p = p.to(torch.float32, DEVICE)
    got = run(case, p, planned(case, torch.float32))
    assert want["output"][1:, 0].isinf().all()
    for name in ("output", "d_x_gates"):
        assert torch.equal(got[name].isnan().cpu(), want[name].isnan()), name
        assert torch.equal(got[name].isinf().cpu(), want[name].isinf()), name


@triton.jit
def gru_step_vjp_nan_at_zero(d_state, state_prev, state, saved, params, APPROXIMATE: tl.constexpr):
    """That of the GRU, with a gradient of its param that is NaN where all that is read is 0."""
    d_x_gates, d_h_gates, d_prev, d_params = gru_step_vjp(
        d_state, state_prev, state, saved, params, APPROXIMATE
    )
    return d_x_gates, d_h_gates, d_prev, (d_params[0] * (saved[3] / saved[3]),)


def test_a_nan_of_rows_that_do_not_exist_reaches_no_param(monkeypatch):
    """Tiles are filled up with rows of zeros, of which a cell may make anything."""
    case = Case("gru", T=3, B=5, H=17)
    p = problem(case).to(torch.float32, DEVICE)
    want = run(case, p, planned(case, torch.float32))["d_params[0]"]
    toy = TILES["gru"]._replace(step_vjp=gru_step_vjp_nan_at_zero)
    monkeypatch.setitem(TILES, "gru", toy)
    got = run(case, p, planned(case, torch.float32))["d_params[0]"]
    assert torch.equal(got, want)
