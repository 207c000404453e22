"""W_hh in several blocks: the same results, whatever the order in which the blocks run."""

import pytest
import torch
from cases import Case, problem
from test_recurrence import assert_close_to_float64, run

import rnn
from rnn import functional
from rnn.functional import kernels
from rnn.kernels import faults
from rnn.kernels.plan import Limits, plan_slices

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter's processes stand in for a GPU's blocks"
)

LIMITS = Limits("interpreted blocks", 227 * 1024, 132, True, False, "mma")


@pytest.fixture
def concurrent(monkeypatch):
    """A function that sets the number of slices and how the programs run."""
    from concurrent_programs import Concurrent

    forward, reverse = kernels.forward_kernel, kernels.reverse_kernel

    def use(slices: int, patience: int = 1 << 30, **how) -> None:
        def plan(*shape_and_limits):
            found = plan_slices(slices, 16, *shape_and_limits[:-1], LIMITS)
            assert found is not None and found.slices == slices
            return found

        monkeypatch.setattr("rnn.kernels.plan.MIN_BLOCK_S", 16)
        monkeypatch.setattr(functional, "plan", plan)
        monkeypatch.setattr(kernels, "PATIENCE", patience)
        monkeypatch.setattr(kernels, "forward_kernel", Concurrent(forward, **how))
        monkeypatch.setattr(kernels, "reverse_kernel", Concurrent(reverse, **how))

    return use


CASES = [
    (2, Case("rnn_tanh", T=1, B=1, H=17)),
    (2, Case("rnn_tanh", T=5, B=16, H=32)),
    (2, Case("rnn_relu", T=3, B=5, H=32, directions=2)),
    (4, Case("rnn_relu", T=4, B=8, H=64, reverse=True)),
    (4, Case("rnn_tanh", T=4, B=5, H=50, ragged=True, directions=2)),
    (2, Case("rnn_tanh", T=3, B=17, H=33, layout="batch_major")),
    (8, Case("rnn_tanh", T=3, B=3, H=128)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tf32", [False], indirect=True, ids=["ieee"])
@pytest.mark.parametrize(("slices", "case"), CASES, ids=str)
def test_slices(slices, case, dtype, tf32, concurrent, nan_filled):
    concurrent(slices)
    assert_close_to_float64(case, dtype, "triton", "cpu")


def test_more_tiles_than_fit_go_in_several_launches(concurrent, monkeypatch, nan_filled):
    monkeypatch.setitem(globals(), "LIMITS", LIMITS._replace(sms=4))
    concurrent(2)
    case = Case("rnn_tanh", T=2, B=36, H=32)
    assert len(functional.plan(1, 32, 36, 1, torch.float16, True, None).grids()) == 2
    assert_close_to_float64(case, torch.float16, "triton", "cpu")


def test_the_same_bits_whatever_the_delays(concurrent):
    case = Case("rnn_tanh", T=3, B=3, H=32, ragged=True)
    p = problem(case).to(torch.float32)
    concurrent(2)
    want = run(case, p, "triton")
    concurrent(2, delays=0.003)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(case, p, "triton"), want))


def forward(T=3, B=3, H=32):
    p = problem(Case("rnn_tanh", T=T, B=B, H=H)).to(torch.float32)
    return rnn.recurrence(p.x_gates, p.h0[0], p.weight_hh[0], cell="rnn_tanh", backend="triton")


def assert_fault(output, h_n, H=32):
    """The results are NaN, and the next call, that once, says whose they were."""
    assert h_n.isnan().any() and output[1:].isnan().any()
    with pytest.raises(RuntimeError, match=r"gave up waiting.*forward pass of rnn_tanh of T=3"):
        forward(H=H)
    faults.raise_reported(torch.device("cpu"))


def test_a_block_that_never_signals(concurrent):
    concurrent(2, patience=50, without=((0, 1, 0),), seconds=20.0)
    output, h_n = forward()
    assert output[1:, :, :16].isnan().all()
    assert_fault(output, h_n)


@pytest.mark.parametrize("value", [1, 7, -3])
def test_flags_that_were_not_zeroed(value, concurrent, monkeypatch):
    zeros = torch.Tensor.new_zeros
    monkeypatch.setattr(
        torch.Tensor, "new_zeros", lambda self, *size, **k: zeros(self, *size, **k) + value
    )
    concurrent(2, patience=50, seconds=20.0)
    output, h_n = forward()
    monkeypatch.setattr(torch.Tensor, "new_zeros", zeros)
    assert_fault(output, h_n)


def test_a_wrong_number_of_slices(concurrent, monkeypatch):
    concurrent(4, patience=50, seconds=20.0)
    two = kernels.forward_kernel

    class Half:
        def __getitem__(self, grid):
            return two[(grid[0], grid[1] // 2, grid[2])]

    monkeypatch.setattr(kernels, "forward_kernel", Half())
    output, h_n = forward(H=64)
    assert_fault(output, h_n, H=64)
