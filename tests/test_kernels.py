"""The kernels alone, through their launchers: every cell, any shape, any place in memory."""

import dataclasses
import mmap
import tempfile

import pytest
import torch
from cases import Case, Problem, assert_close_to_float64, by_equation, in_layout, problem, worst

from rnn.cells import CELLS

pytest.importorskip("triton")

import triton
import triton.language as tl

from rnn.kernels import launch
from rnn.kernels.cells import CELLS as TILE_CELLS
from rnn.kernels.cells import sigmoid, tanh
from rnn.kernels.layout import Inputs
from rnn.kernels.limits import KernelUnavailable, Layer, Limits, Plan, device_limits
from rnn.kernels.plan import plan
from rnn.kernels.products import round_tf32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = Limits("interpreter", 227 * 1024, 132, False, False, "wgmma", "not here")
GUARD = 64  # elements


class Fences:
    """Tensors with NaN on both sides: what is read of it shows in a result, what is written to it
    is found by check()."""

    def __init__(self):
        self.buffers = []

    def around(self, x):
        if x is None or not x.is_floating_point():
            return x
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        buffer = torch.full((extent + 2 * GUARD,), float("nan"), dtype=x.dtype, device=x.device)
        inside = buffer.as_strided(x.shape, x.stride(), GUARD)
        inside.copy_(x)
        self.buffers.append((buffer, GUARD, GUARD + extent))
        return inside

    def check(self):
        for buffer, start, end in self.buffers:
            assert buffer[:start].isnan().all() and buffer[end:].isnan().all()


def planned(case: Case, dtype: torch.dtype, tf32: bool = False) -> Plan:
    cell = CELLS[case.cell]
    numbers = cell.gates, cell.states, cell.stored, len(cell.params)
    limits = INTERPRETER if DEVICE == "cpu" else device_limits(torch.device(DEVICE))
    found = plan(Layer(*numbers, case.H, case.B, case.directions, dtype, tf32), limits)
    assert isinstance(found, Plan), str(found)
    return found


def pack(x, lengths):
    """(T, B, F) -> the rows that are active, (N, F)."""
    return x[torch.arange(x.size(0), device=x.device)[:, None] < lengths]


def unpack(x, lengths, T):
    active = torch.arange(T, device=x.device)[:, None] < lengths
    padded = x.new_zeros(T, lengths.numel(), x.size(-1))
    padded[active] = x
    return padded


def weight_gradient(case: Case, p: Problem, output, d_h_gates):
    """By its equation, one step and row at a time."""
    d_weight_hh = torch.zeros_like(p.weight_hh)
    for d in range(case.directions):
        h = output.chunk(case.directions, -1)[d]
        d_gates = d_h_gates.chunk(case.directions, -1)[d]
        back = case.reverse != bool(d)
        for t in range(case.T):
            before = t + 1 if back else t - 1
            for b in range(case.B):
                end = case.T if p.lengths is None else int(p.lengths[b])
                if t < end:
                    start = before < 0 or before >= end
                    h_prev = p.state0[0][d, b] if start else h[before, b]
                    d_weight_hh[d] += torch.outer(d_gates[t, b], h_prev)
    return d_weight_hh


def run(
    case: Case, p: Problem, how: Plan, packed: bool = False, relay=lambda x: x
) -> dict[str, torch.Tensor]:
    """All results of both launchers by name, as by_equation gives them. `relay` is what happens
    between the passes to a tensor that the backward pass reads."""
    cell, fences = CELLS[case.cell], Fences()
    x_gates, d_output, offsets = in_layout(p.x_gates, case.layout), p.d_output, None
    if packed:
        x_gates, d_output = pack(x_gates, p.lengths), pack(d_output, p.lengths)
        active = (torch.arange(case.T, device=x_gates.device)[:, None] < p.lengths).sum(1)
        offsets = active.cumsum(0) - active
    inputs = Inputs(
        fences.around(x_gates),
        tuple(fences.around(s) for s in p.state0),
        fences.around(p.weight_hh),
        tuple(fences.around(x) for x in p.params),
        p.lengths,
        offsets,
        case.reverse,
    )
    output, state_n, stored = launch.forward(how, cell, inputs, save=True)
    assert (stored is None) == (cell.stored == 0)
    d_x_gates, d_h_gates, d_state0, d_params = launch.backward(
        how,
        cell,
        inputs._replace(x_gates=None),
        relay(fences.around(output)),
        None if stored is None else relay(fences.around(stored)),
        fences.around(d_output),
        tuple(fences.around(d) for d in p.d_state_n),
        True,
        True,
        True,
    )
    fences.check()
    assert (d_x_gates is d_h_gates) == (not cell.split)
    if packed:
        output, d_x_gates, d_h_gates = (
            unpack(x, p.lengths, case.T) for x in (output, d_x_gates, d_h_gates)
        )
    results = {"output": output}
    results |= {f"state_n[{k}]": s for k, s in enumerate(state_n)}
    results["d_x_gates"] = d_x_gates
    results |= {f"d_state0[{k}]": s for k, s in enumerate(d_state0)}
    results["d_weight_hh"] = weight_gradient(case, p, output, d_h_gates)
    results |= {f"d_params[{k}]": x for k, x in enumerate(d_params)}
    return results


@pytest.fixture
def checked(monkeypatch):
    """No kernel touches an address outside of its tensors."""
    if DEVICE == "cpu":
        from interpreted import Checked

        monkeypatch.setattr(launch, "forward_kernel", Checked(launch.forward_kernel))
        monkeypatch.setattr(launch, "backward_kernel", Checked(launch.backward_kernel))


SHAPES = [
    Case("", T=1, B=1, H=1),
    Case("", T=4, B=19, H=33),
    Case("", T=3, B=5, H=17, directions=2, layout="batch_major"),
    Case("", T=3, B=5, H=16, reverse=True, layout="strided"),
    Case("", T=6, B=9, H=17, ragged=True, directions=2),
    Case("", T=5, B=4, H=20, ragged=True, reverse=True, layout="batch_major"),
]
EACH = [shape._replace(cell=cell) for cell in CELLS for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", EACH, ids=str)
def test_each_cell(case, dtype, checked, nan_filled):
    p = problem(case).to(dtype, DEVICE)
    assert_close_to_float64(case, run(case, p, planned(case, dtype)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EACH, ids=str)
def test_each_cell_in_bfloat16(case, nan_filled):
    p = problem(case).to(torch.bfloat16, DEVICE)
    results = run(case, p, planned(case, torch.bfloat16))
    assert_close_to_float64(case, results, torch.bfloat16)


def sorted_lengths(p: Problem) -> Problem:
    return p._replace(lengths=p.lengths.sort(descending=True)[0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "shape",
    [
        Case("", T=6, B=9, H=17, ragged=True, directions=2),
        Case("", T=5, B=37, H=16, ragged=True, reverse=True),
        Case("", T=2, B=1, H=1, ragged=True),
    ],
    ids=str,
)
def test_packed_rows_give_the_bits_of_padded_rows(cell, shape, checked, nan_filled):
    case = shape._replace(cell=cell)
    p = sorted_lengths(problem(case)).to(torch.float32, DEVICE)
    how = planned(case, torch.float32)
    padded = run(case, p, how)
    for name, x in run(case, p, how, packed=True).items():
        assert torch.equal(x, padded[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_the_states_of_packed_rows_that_end_before_the_others(cell, checked):
    """A batch tile of which no row has a step, and one of which all end early."""
    case = Case(cell, T=5, B=40, H=16, ragged=True)
    p = problem(case)._replace(lengths=torch.tensor([5] * 3 + [2] * 20 + [0] * 17))
    p = p.to(torch.float32, DEVICE)
    results = run(case, p, planned(case, torch.float32), packed=True)
    for k, s in enumerate(p.state0):
        assert torch.equal(results[f"state_n[{k}]"][:, 23:], s[:, 23:])
        assert torch.equal(results[f"d_state0[{k}]"][:, 23:], p.d_state_n[k][:, 23:])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read(cell, reverse, checked, nan_filled):
    """Whatever lies past the end of a row, NaN included, reaches neither result nor gradient."""
    case = Case(cell, T=6, B=4, H=5, directions=2, reverse=reverse, ragged=True)
    p = problem(case).to(torch.float32, DEVICE)
    past = (torch.arange(case.T, device=DEVICE)[:, None] >= p.lengths)[:, :, None]
    dirty = p._replace(
        x_gates=p.x_gates.masked_fill(past, float("nan")),
        d_output=p.d_output.masked_fill(past, float("nan")),
    )

    def spoil(x):  # what comes back between the passes
        return x.masked_fill(past, float("nan"))

    how = planned(case, torch.float32)
    spoiled = run(case, dirty, how, relay=spoil)
    for name, x in run(case, p, how).items():
        assert torch.equal(x, spoiled[name]), name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", ["strided", "offset", "permuted", "expanded rows"])
def test_saved_tensors_may_come_back_in_another_layout(cell, layout, checked, nan_filled):
    case = Case(cell, T=4, B=3, H=8)
    p = problem(case).to(torch.float32, DEVICE)

    def relay(x):
        if layout == "strided":
            return in_layout(x, "strided")
        if layout == "offset":
            T, B, F = x.shape
            room = x.new_full((T, B + 2, F + 3), float("nan"))
            room[:, 1:-1, 2:-1] = x
            return room[:, 1:-1, 2:-1]
        if layout == "permuted":
            return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        return torch.stack([x, x + 9.0], 2)[:, :, 0]

    how = planned(case, torch.float32)
    want, got = run(case, p, how), run(case, p, how, relay=relay)
    assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("cell", CELLS)
def test_one_gradient_at_a_time(cell, checked, nan_filled):
    """Each output alone, and each result's gradient alone: nothing else changes."""
    case = Case(cell, T=3, B=3, H=5, directions=2, ragged=True)
    p = problem(case).to(torch.float32, DEVICE)
    how, this = planned(case, torch.float32), CELLS[cell]
    inputs = Inputs(p.x_gates, p.state0, p.weight_hh, p.params, p.lengths, None, False)
    output, _, stored = launch.forward(how, this, inputs, save=True)

    def backward(d_output, d_state_n, *needs):
        return launch.backward(how, this, inputs, output, stored, d_output, d_state_n, *needs)

    nothing = (None,) * this.states
    d_x, d_h, d_state0, d_params = backward(p.d_output, p.d_state_n, True, True, True)
    only = backward(p.d_output, p.d_state_n, True, False, False)
    assert torch.equal(only[0], d_x) and torch.equal(only[1], d_h) and only[2:] == (None, None)
    only = backward(p.d_output, p.d_state_n, False, True, False)
    assert all(torch.equal(a, b) for a, b in zip(only[2], d_state0))
    assert only[:2] == (None, None) and only[3] is None
    only = backward(p.d_output, p.d_state_n, False, False, True)
    assert all(torch.equal(a, b) for a, b in zip(only[3], d_params)) and only[:3] == (None,) * 3
    into_output = backward(p.d_output, nothing, True, True, True)
    sums = [x.clone() for x in into_output[2]]
    for k in range(this.states):
        alone = tuple(d if j == k else None for j, d in enumerate(p.d_state_n))
        sums = [a + b for a, b in zip(sums, backward(None, alone, True, True, True)[2])]
    for a, b in zip(sums, d_state0):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_stored_where_nothing_is_saved(cell, checked):
    case = Case(cell, T=3, B=3, H=5)
    p = problem(case).to(torch.float32, DEVICE)
    inputs = Inputs(p.x_gates, p.state0, p.weight_hh, p.params)
    how, this = planned(case, torch.float32), CELLS[cell]
    output, state_n, stored = launch.forward(how, this, inputs, save=False)
    saved = launch.forward(how, this, inputs, save=True)
    assert stored is None and torch.equal(output, saved[0])
    assert len({x.untyped_storage().data_ptr() for x in state_n}) == this.states


def test_param_gradients_have_the_same_bits_each_time():
    case = Case("gru", T=3, B=50, H=17)
    p = problem(case).to(torch.float32, DEVICE)
    first, again = (run(case, p, planned(case, torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


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


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "ieee"])
@pytest.mark.parametrize("cell", CELLS)
def test_weights_that_do_not_lie_in_one_piece(cell, tf32, checked):
    for dtype in (torch.float32, torch.float16):
        case = Case(cell, T=3, B=3, H=8)
        p = problem(case).to(dtype, DEVICE)
        spread = p._replace(weight_hh=in_layout(p.weight_hh, "strided"))
        how = planned(case, dtype, tf32)
        want, got = run(case, p, how), run(case, spread, how)
        assert all(torch.equal(got[name], x) for name, x in want.items())


# NaN and infinity

NANS = [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]


def from_bits(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


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


# Places far away


def test_offsets_are_64_bits_wide(checked):
    """More than 2^31 elements from step to step, or row to row, of a tensor mostly nowhere."""
    if DEVICE == "cuda":
        pytest.skip("needs memory that is not there until it is written")
    case = Case("rnn_tanh", T=2, B=9, H=16)
    p = problem(case).to(torch.float16)
    want = run_forward(case, p)
    wide = 2**28 + 16  # elements: eight of them are beyond 2^31
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * (wide * 18 + 64))
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16)
        for strides in ((wide, wide * 2, 1), (wide * 9, wide, 1)):
            x_gates = memory.as_strided((2, 9, 16), strides)
            x_gates.copy_(p.x_gates)
            assert torch.equal(run_forward(case, p._replace(x_gates=x_gates)), want)


def run_forward(case: Case, p: Problem) -> torch.Tensor:
    inputs = Inputs(p.x_gates, p.state0, p.weight_hh, p.params)
    return launch.forward(planned(case, p.x_gates.dtype), CELLS[case.cell], inputs, False)[0]


# Launching


def test_both_tables_know_the_same_cells():
    assert TILE_CELLS.keys() == CELLS.keys()


def test_a_kernel_that_does_not_compile_says_so(monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            def fail(**arguments):
                raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

            return fail

    monkeypatch.setattr(launch, "forward_kernel", Broken())
    case = Case("lstm", T=2, B=1, H=4)
    with pytest.raises(KernelUnavailable, match=r"Triton 3.*forward pass of lstm.*300000") as e:
        run_forward(case, problem(case).to(torch.float32, DEVICE))
    assert isinstance(e.value.__cause__, triton.runtime.errors.OutOfResources)


def test_other_errors_of_a_launch_come_as_they_are(monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise ZeroDivisionError

    monkeypatch.setattr(launch, "forward_kernel", Broken())
    case = Case("lstm", T=2, B=1, H=4)
    with pytest.raises(ZeroDivisionError):
        run_forward(case, problem(case).to(torch.float32, DEVICE))


def test_tiles_of_eight_rows(checked, nan_filled):
    case = Case("gru", T=3, B=19, H=17, ragged=True, directions=2)
    p = problem(case).to(torch.float32, DEVICE)
    how = dataclasses.replace(planned(case, torch.float32), block_b=8, tiles=3, tiles_at_once=3)
    assert_close_to_float64(case, run(case, p, how), torch.float32)


@pytest.mark.parametrize("T", [1, 3, 4, 6])
@pytest.mark.parametrize("rows", ["equal", "padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_several_steps_an_iteration_give_the_bits_of_one(cell, rows, T, checked, nan_filled):
    """Whether T is a multiple of them or not."""
    case = Case(cell, T=T, B=3, H=17, ragged=rows != "equal", reverse=T == 3)
    p = sorted_lengths(problem(case)) if rows == "packed" else problem(case)
    p = p.to(torch.float32, DEVICE)
    one = dataclasses.replace(planned(case, torch.float32), steps=1, steps_backward=1)
    several = dataclasses.replace(one, steps=4, steps_backward=3)
    want = run(case, p, one, packed=rows == "packed")
    for name, x in run(case, p, several, packed=rows == "packed").items():
        assert torch.equal(x, want[name]), name


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
