"""Every backend computes the same recurrence: values, final state and every gradient."""

import pytest
import torch
from cases import CASES, NAMES, Case, eager, in_layout, problem, worst

import rnn
from rnn import reference
from rnn.functional import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Beyond twice the error of torch's own arithmetic in that dtype; tf32 has no twin on a CPU, so
# its floor is the rounding itself: 2^-11 of each factor, over a sum of terms below one.
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def run(case: Case, p, backend: str) -> tuple:
    leaves = [in_layout(p.x_gates, case.layout), p.h0.clone(), p.weight_hh.clone()]
    if case.directions == 1:
        leaves[1:] = [leaves[1][0], leaves[2][0]]
    leaves = [x.detach().requires_grad_() for x in leaves]
    output, h_n = rnn.recurrence(
        *leaves, cell=case.cell, lengths=p.lengths, reverse=case.reverse, backend=backend
    )
    d_h_n = p.d_h_n if case.directions == 2 else p.d_h_n[0]
    gradients = torch.autograd.grad([output, h_n], leaves, [p.d_output, d_h_n])
    return output, h_n, *gradients


def assert_close_to_float64(case: Case, dtype: torch.dtype, backend: str, device: str, floor=None):
    exact = problem(case)
    p = exact.to(dtype, device)
    want = eager(case, exact)
    torchs = eager(case, p)
    got = run(case, p, backend)
    for name, x, y, z in zip(NAMES, got, torchs, want):
        y, z = y.reshape(x.shape), z.reshape(x.shape)
        assert x.dtype == dtype
        scale = max(1.0, float(z.abs().max()))
        error, bound = worst(x, z), 2 * worst(y, z) + (floor or FLOOR[dtype]) * scale
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_backend(case, dtype, nan_filled):
    assert_close_to_float64(case, dtype, "torch", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tf32", [False], indirect=True, ids=["ieee"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case, dtype, tf32, nan_filled):
    assert_close_to_float64(case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("tf32", [True], indirect=True, ids=["tf32"])
@pytest.mark.parametrize("case", [c for c in CASES if c.H >= 16], ids=str)
def test_kernels_in_tf32(case, tf32, nan_filled):
    assert_close_to_float64(case, torch.float32, "triton", DEVICE, floor=case.T * 2.0**-9)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, Case("rnn_tanh", T=50, B=37, H=256)], ids=str)
def test_kernels_in_bfloat16(case, nan_filled):
    assert_close_to_float64(case, torch.bfloat16, "triton", "cuda")


def test_packed_weights_give_the_same(nan_filled):
    """The path through oneDNN, which small cases do not take."""
    case = Case("rnn_tanh", T=3, B=5, H=512, directions=2, ragged=True)
    weight = problem(case).to(torch.float32).weight_hh[0]
    if not reference.can_pack(weight, case.B):
        pytest.skip("this build of PyTorch cannot pack weights")
    assert_close_to_float64(case, torch.float32, "torch", "cpu")


def test_backends_know_the_same_cells():
    from rnn.kernels.cells import CELLS

    assert {n: c.gates for n, c in CELLS.items()} == {
        n: c.gates for n, c in reference.CELLS.items()
    }


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("wanted", ["x_gates", "h0", "weight_hh"])
@pytest.mark.parametrize("into", ["output", "h_n"])
@pytest.mark.parametrize("tf32", [False], indirect=True, ids=["ieee"])
def test_one_gradient_from_one_result(backend, wanted, into, tf32, nan_filled):
    """Each gradient comes out alone, whichever result it is asked through."""
    case = Case("rnn_tanh", T=4, B=3, H=17, directions=2, ragged=True)
    p = problem(case).to(torch.float32)
    tensors = {"x_gates": p.x_gates, "h0": p.h0, "weight_hh": p.weight_hh}
    zero = {"output": p._replace(d_h_n=p.d_h_n * 0), "h_n": p._replace(d_output=p.d_output * 0)}
    want = dict(zip(tensors, eager(case, zero[into])[2:]))[wanted]
    tensors = {n: x.clone().requires_grad_(n == wanted) for n, x in tensors.items()}
    output, h_n = rnn.recurrence(**tensors, cell=case.cell, lengths=p.lengths, backend=backend)
    result, d_result = (output, p.d_output) if into == "output" else (h_n, p.d_h_n)
    result.backward(d_result)
    assert worst(tensors[wanted].grad, want) < 1e-5
    assert all(tensors[n].grad is None for n in tensors if n != wanted)


def test_no_gate_gradients_are_written_where_none_is_needed(monkeypatch):
    asked = []
    launch = kernels.reverse

    def spy(*args):
        asked.append(args[-2:])
        return launch(*args)

    monkeypatch.setattr(kernels, "reverse", spy)
    p = problem(Case("rnn_tanh", T=3, B=2, H=4)).to(torch.float32)
    h0 = p.h0.clone().requires_grad_()
    h_n = rnn.recurrence(p.x_gates, h0, p.weight_hh, cell="rnn_tanh", backend="triton")[1]
    h_n.sum().backward()
    assert asked == [(False, True)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_recorded_without_grad(backend):
    p = problem(Case("rnn_tanh", T=3, B=2, H=4)).to(torch.float32)
    weight_hh = p.weight_hh.requires_grad_()
    with torch.no_grad():
        output, h_n = rnn.recurrence(p.x_gates, p.h0, weight_hh, cell="rnn_tanh", backend=backend)
    assert output.grad_fn is None and h_n.grad_fn is None


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_padding_is_never_read(backend, nan_filled):
    """Whatever lies behind the end of a row, NaN included, reaches neither result nor gradient."""
    case = Case("rnn_relu", T=6, B=4, H=5, directions=2, ragged=True)
    p = problem(case).to(torch.float32)
    behind = (torch.arange(case.T)[:, None] >= p.lengths)[:, :, None]
    dirty = p._replace(
        x_gates=p.x_gates.masked_fill(behind, float("nan")),
        d_output=p.d_output.masked_fill(behind, float("nan")),
    )
    for clean, got in zip(run(case, p, backend), run(case, dirty, backend)):
        assert torch.equal(clean, got)


@pytest.mark.parametrize("tf32", [False], indirect=True, ids=["ieee"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_non_contiguous_lengths_and_states(backend, tf32, nan_filled):
    """Every other element of a buffer whose rest would give other results."""
    case = Case("rnn_tanh", T=5, B=4, H=6, directions=2, ragged=True)
    p = problem(case).to(torch.float32)
    want = run(case, p, backend)

    def spread(x, other):
        buffer = torch.full((*x.shape, 2), other, dtype=x.dtype)
        buffer[..., 0] = x
        return buffer[..., 0]

    apart = p._replace(
        lengths=spread(p.lengths, case.T),
        h0=spread(p.h0, 9.0),
        weight_hh=spread(p.weight_hh, 9.0),
        d_output=spread(p.d_output, 9.0),
        d_h_n=spread(p.d_h_n, 9.0),
    )
    leaves = [x.detach().requires_grad_() for x in apart[:3]]
    output, h_n = rnn.recurrence(*leaves, cell=case.cell, lengths=apart.lengths, backend=backend)
    gradients = torch.autograd.grad([output, h_n], leaves, [apart.d_output, apart.d_h_n])
    for name, x, y in zip(NAMES, (output, h_n, *gradients), want):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu"])
def test_nan_and_infinity_go_through(backend, cell):
    """A NaN in a row stays a NaN, in that row alone; tanh of +-infinity is +-1."""
    x_gates = torch.zeros(3, 3, 4)
    x_gates[1, 0, 0] = float("nan")
    x_gates[2, 1] = -200.0
    output, h_n = rnn.recurrence(
        x_gates, torch.zeros(3, 4), torch.eye(4), cell=cell, backend=backend
    )
    assert output[:, 0].isnan().any() and h_n[0, 0].isnan()
    assert torch.equal(h_n[1], torch.full((4,), -1.0 if cell == "rnn_tanh" else 0.0))
    assert not output[:, 1:].isnan().any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inputs_are_left_as_they_were(backend):
    case = Case("rnn_tanh", T=4, B=3, H=5, directions=2, ragged=True)
    p = problem(case).to(torch.float32)
    before = [x.clone() for x in p]
    run(case, p, backend)
    assert all(torch.equal(x, y) for x, y in zip(p, before))


def test_expanded_gradient():
    """output.sum() hands back a gradient with strides of zero."""
    p = problem(Case("rnn_tanh", T=4, B=3, H=5)).to(torch.float32)
    gradients = []
    for backend in ("torch", "triton"):
        x_gates = p.x_gates.clone().requires_grad_()
        rnn.recurrence(x_gates, p.h0[0], p.weight_hh[0], cell="rnn_tanh", backend=backend)[
            0
        ].sum().backward()
        gradients.append(x_gates.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=5e-3)
