"""The kernels alone, through their launchers: every cell, any shape, any place in memory."""

import dataclasses
import mmap
import tempfile

import pytest
import torch
from cases import Case, assert_close_to_float64, in_layout, problem

pytest.importorskip("triton")

import triton
from launched import DEVICE, planned, run, run_forward, sorted_lengths

from rnn.cells import CELLS
from rnn.kernels import launch
from rnn.kernels.cells import CELLS as TILE_CELLS
from rnn.kernels.layout import Inputs
from rnn.kernels.limits import KernelUnavailable

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
    how = dataclasses.replace(planned(case, torch.float32), block_b=8, tiles=3)
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
