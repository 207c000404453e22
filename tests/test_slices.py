"""W_hh in several blocks: the same results, whatever the order in which the blocks run."""

import dataclasses

import pytest
import torch
from cases import Case, assert_close_to_float64, problem

pytest.importorskip("triton")

from launched import from_bits, planned, run, sorted_lengths

from rnn.cells import CELLS
from rnn.kernels import faults, launch
from rnn.kernels.layout import Inputs
from rnn.kernels.limits import Layer, Limits, Plan
from rnn.kernels.plan import plan_slices

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter's processes stand in for a GPU's blocks"
)

LIMITS = Limits("interpreted blocks", 227 * 1024, 132, True, False, "mma")


def sliced(case: Case, block_s: int, dtype=torch.float32, tf32=False, limits=LIMITS) -> Plan:
    cell = CELLS[case.cell]
    numbers = cell.gates, cell.states, cell.stored, len(cell.params)
    layer = Layer(*numbers, case.H, case.B, case.directions, dtype, tf32)
    found = plan_slices(layer, limits, block_s, 16) or plan_slices(layer, limits, block_s, 8)
    assert found is not None and found.slices == -(-case.H // block_s) > 1
    return found


@pytest.fixture
def concurrent(monkeypatch):
    """A function that sets how the programs run; returns the two kernels."""
    from concurrent_programs import Concurrent

    forward, backward = launch.forward_kernel, launch.backward_kernel

    def use(patience: int = 1 << 30, **how):
        monkeypatch.setattr(launch, "PATIENCE", patience)
        kernels = Concurrent(forward, **how), Concurrent(backward, **how)
        monkeypatch.setattr(launch, "forward_kernel", kernels[0])
        monkeypatch.setattr(launch, "backward_kernel", kernels[1])
        return kernels

    return use


CASES = [  # units of a slice, case
    (16, Case("rnn_tanh", T=1, B=1, H=17)),
    (32, Case("rnn_tanh", T=4, B=16, H=96)),
    (16, Case("rnn_relu", T=3, B=5, H=48, directions=2)),
    (16, Case("rnn_tanh", T=3, B=17, H=33, layout="batch_major")),
    (16, Case("gru", T=3, B=5, H=48, directions=2)),
    (16, Case("gru", T=4, B=4, H=20, ragged=True, reverse=True)),
    (32, Case("gru", T=3, B=3, H=64)),
    (16, Case("lstm", T=4, B=4, H=33, ragged=True, directions=2)),
    (16, Case("lstm", T=3, B=18, H=48, reverse=True)),
    (32, Case("lstm", T=3, B=3, H=96, layout="batch_major")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("block_s", "case"), CASES, ids=str)
def test_slices(block_s, case, dtype, concurrent, nan_filled):
    concurrent()
    p = problem(case).to(dtype)
    assert_close_to_float64(case, run(case, p, sliced(case, block_s, dtype)), dtype)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_packed_rows(cell, concurrent, nan_filled):
    case = Case(cell, T=4, B=19, H=33, directions=2, ragged=True)
    concurrent()
    p = sorted_lengths(problem(case)).to(torch.float32)
    how = sliced(case, 16)
    padded = run(case, p, how)
    for name, x in run(case, p, how, packed=True).items():
        assert torch.equal(x, padded[name]), name


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_regularisers(cell, concurrent, nan_filled):
    """What a block hands on of h is masked, and each takes its own part of what it keeps."""
    case = Case(cell, T=4, B=5, H=33, directions=2, ragged=True)
    p = problem(case).to(torch.float32)
    chance = torch.full((2, case.B, case.H), 0.6)
    keep = torch.full((case.T, case.B, 2 * CELLS[cell].states * case.H), 0.3)
    said = {"h_mask": chance.bernoulli() / 0.6, "keep": keep.bernoulli(), "grad_clip": 0.5}
    want = run(case, p, planned(case, torch.float32), **said)
    concurrent()
    for name, x in run(case, p, sliced(case, 16), **said).items():
        torch.testing.assert_close(x, want[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("block_s", [16, 32])
def test_low_and_stacked_slices_agree(block_s, concurrent):
    """Whether gates are stacked and sums cut into pieces is the plan's to choose."""
    for cell in ("gru", "lstm"):
        case = Case(cell, T=3, B=3, H=64)
        concurrent()
        p, how = problem(case).to(torch.float32), sliced(case, block_s)
        for stacked in (True, False):
            for pieces in (1, 2):
                other = dataclasses.replace(
                    how, stacked=stacked, pieces=pieces, pieces_backward=pieces
                )
                assert_close_to_float64(case, run(case, p, other), torch.float32)


def test_more_tiles_than_fit_go_in_several_launches(concurrent, nan_filled):
    concurrent()
    case = Case("gru", T=2, B=36, H=32)
    how = sliced(case, 16, torch.float16, limits=LIMITS._replace(sms=4))
    assert len(how.grids()) == 2
    p = problem(case).to(torch.float16)
    assert_close_to_float64(case, run(case, p, how), torch.float16)


def test_the_same_bits_whatever_the_delays(concurrent):
    case = Case("lstm", T=3, B=3, H=32, ragged=True)
    p, how = problem(case).to(torch.float32), sliced(case, 16)
    concurrent()
    want = run(case, p, how)
    concurrent(delays=0.003)
    for _ in range(10):
        got = run(case, p, how)
        assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "ieee"])
def test_nan_reaches_the_other_slices(tf32, concurrent):
    """With the bits that a GPU gives it."""
    concurrent()
    case = Case("rnn_relu", T=3, B=2, H=32)
    p = problem(case).to(torch.float32)
    p.x_gates[0, 0, 3] = from_bits(0x7FFFFFFF)[0]
    inputs = Inputs(p.x_gates, p.state0, p.weight_hh)
    how = sliced(case, 16, tf32=tf32)
    output, state_n, _ = launch.forward(how, CELLS[case.cell], inputs, save=False)
    assert output[1:, 0].isnan().all() and state_n[0][0, 0].isnan().all()
    assert not output[:, 1].isnan().any()


# Blocks that wait in vain


def forward(H=32, T=3):
    case = Case("rnn_tanh", T=T, B=3, H=H)
    p = problem(case).to(torch.float32)
    inputs = Inputs(p.x_gates, p.state0, p.weight_hh)
    return launch.forward(sliced(case, 16), CELLS[case.cell], inputs, save=False)[:2]


def assert_fault(output, state_n):
    """The results are NaN, and the next look, that once, says whose they were."""
    assert state_n[0].isnan().any() and output[1:].isnan().any()
    with pytest.raises(RuntimeError, match=r"gave up waiting.*forward pass of rnn_tanh of T="):
        faults.raise_reported(torch.device("cpu"))
    faults.raise_reported(torch.device("cpu"))


def test_a_block_that_never_signals(concurrent):
    concurrent(patience=50, without=((0, 1, 0),), seconds=20.0)
    output, state_n = forward()
    assert output[1:, :, :16].isnan().all()
    assert_fault(output, state_n)


def test_patience_is_paid_once(concurrent):
    """After giving up a block does not wait again at each step."""
    kernel, _ = concurrent(patience=1000, without=((0, 1, 0),), seconds=60.0)
    output, state_n = forward(T=20)
    assert_fault(output, state_n)
    assert kernel.operations.value < 1000 + 3 * 20 + 10


def test_a_block_that_gave_up_once_reports_it_even_if_the_others_come_later(concurrent):
    """Block 0 gives up in the first step, and then waits until block 1 has come after all."""
    concurrent(
        pauses={(0, 1, 0): {1: 1.0}, (0, 0, 0): {53: 2.5}},
        patiences={(0, 0, 0): 50},
        seconds=60.0,
    )
    output, state_n = forward()
    assert_fault(output, state_n)


@pytest.mark.parametrize("value", [1, 7, -3])
def test_flags_that_were_not_zeroed(value, concurrent, monkeypatch):
    zeros = torch.Tensor.new_zeros
    concurrent(patience=50, seconds=20.0)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.Tensor, "new_zeros", lambda self, *size, **k: zeros(self, *size, **k) + value
        )
        output, state_n = forward()
    assert_fault(output, state_n)


def test_a_wrong_number_of_slices(concurrent, monkeypatch):
    concurrent(patience=50, seconds=20.0)
    all_four = launch.forward_kernel

    class Half:
        def __getitem__(self, grid):
            return all_four[(grid[0], grid[1] // 2, grid[2])]

    monkeypatch.setattr(launch, "forward_kernel", Half())
    assert_fault(*forward(H=64))
