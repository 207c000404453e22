"""Every backend computes the same recurrence: values, last states and every gradient."""

import pytest
import torch
from cases import (
    CASES,
    Case,
    check,
    differentiate,
    forward,
    leaves_of,
    problem,
    run,
    split_leaves,
    worst,
)

import rnn
from rnn import torch_path
from rnn.cells import CELLS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
SMALL = {cell: Case(cell, T=4, B=3, H=5, directions=2, ragged=True) for cell in CELLS}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_backend(case, dtype, nan_filled):
    check(case, dtype, "torch", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tf32", [False], indirect=True, ids=["ieee"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case, dtype, tf32, nan_filled):
    check(case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("tf32", [True], indirect=True, ids=["tf32"])
@pytest.mark.parametrize("case", [c for c in CASES if c.H >= 16 and c.T < 9], ids=str)
def test_kernels_in_tf32(case, tf32, nan_filled):
    check(case, torch.float32, "triton", DEVICE, floor=case.T * 2.0**-9)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, Case("lstm", T=50, B=37, H=256)], ids=str)
def test_kernels_in_bfloat16(case, nan_filled):
    check(case, torch.bfloat16, "triton", "cuda")


@pytest.mark.parametrize("cell", CELLS)
def test_packed_weights_give_the_same(cell, nan_filled, monkeypatch):
    """The path through oneDNN, which small cases do not take."""
    monkeypatch.setattr(torch_path, "on_intel", lambda: False)
    case = Case(cell, T=3, B=5, H=512, directions=2, ragged=True)
    weight = problem(case).to(torch.float32).weight_hh[0]
    if not torch_path.can_pack(weight, case.B):
        pytest.skip("this build of PyTorch cannot pack weights")
    check(case, torch.float32, "torch", "cpu")


def test_every_cell_has_its_tiles_and_its_form_in_place():
    from rnn.in_place import IN_PLACE
    from rnn.kernels.cells import CELLS as TILES

    assert CELLS.keys() == IN_PLACE.keys() == TILES.keys()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tf32", [False], indirect=True, ids=["ieee"])
def test_one_gradient_from_one_result(cell, backend, tf32, nan_filled):
    """Each gradient comes out alone, whichever result it is asked through."""
    case = SMALL[cell]
    p = problem(case).to(torch.float32)
    S = len(p.state0)
    for into in range(1 + S):
        d = [p.d_output, *p.d_state_n]
        zeroed = [x if k == into else torch.zeros_like(x) for k, x in enumerate(d)]
        expected = run(case, p._replace(d_output=zeroed[0], d_state_n=tuple(zeroed[1:])), "torch")
        expected = list(expected.values())[1 + S :]
        for wanted in range(len(expected)):
            leaves = [x.requires_grad_(k == wanted) for k, x in enumerate(leaves_of(case, p))]
            x_gates, state0, weight_hh, params = split_leaves(case, leaves)
            output, state_n = rnn.recurrence(
                x_gates,
                state0[0] if S == 1 else state0,
                weight_hh,
                params,
                cell=cell,
                lengths=p.lengths,
                backend=backend,
            )
            results = [output, *(state_n if S > 1 else (state_n,))]
            results[into].backward(d[into])
            assert worst(leaves[wanted].grad, expected[wanted]) < 1e-5
            assert all(x.grad is None for k, x in enumerate(leaves) if k != wanted)


@pytest.mark.parametrize("name", CELLS)
def test_tiles_say_what_the_step_and_its_vjp_read(name):
    """Without reads_h, h would be rounded at each step; without recalls, gradients be wrong."""
    from rnn.kernels.cells import CELLS as TILES

    cell, tiles = CELLS[name], TILES[name]

    def tensors(count: int) -> tuple:
        return tuple(torch.randn(2, 3) for _ in range(count))

    x, h, state, params = map(tensors, (cell.gates, cell.gates, cell.states, len(cell.params)))
    state[0].requires_grad_()
    new, saved = cell.step(x, h, state, params)
    assert tiles.reads_h == new[0].requires_grad
    before = tuple(torch.full_like(s, torch.nan) for s in state)
    told = cell.step_vjp(tensors(cell.states), before, new, saved, params)
    read = any(t is not None and t.isnan().any() for results in told for t in results)
    assert tiles.recalls == bool(read)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_recorded_without_grad(cell, backend):
    p = problem(SMALL[cell]).to(torch.float32)
    state0 = p.state0 if len(p.state0) > 1 else p.state0[0]
    weight_hh = p.weight_hh.requires_grad_()
    with torch.no_grad():
        output, _ = rnn.recurrence(
            p.x_gates, state0, weight_hh, p.params, cell=cell, backend=backend
        )
    assert output.grad_fn is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_is_never_read(cell, backend, poison, nan_filled):
    """Whatever lies past the end of a row, NaN included, reaches neither result nor gradient."""
    case = SMALL[cell]
    p = problem(case).to(torch.float32)
    past_the_end = (torch.arange(case.T)[:, None] >= p.lengths)[:, :, None]
    dirty = p._replace(
        x_gates=p.x_gates.masked_fill(past_the_end, poison),
        d_output=p.d_output.masked_fill(past_the_end, poison),
    )
    clean, got = run(case, p, backend), run(case, dirty, backend)
    for name in clean:
        assert torch.equal(clean[name], got[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_state_of_nan_stays_in_its_row(cell, backend, nan_filled):
    """A row without steps keeps its state, be it NaN, and no gradient of the weights sees it."""
    case = SMALL[cell]
    p = problem(case).to(torch.float32)
    dirty = p._replace(
        state0=tuple(s.index_fill(1, torch.tensor(0), float("nan")) for s in p.state0)
    )
    clean, got = run(case, p, backend), run(case, dirty, backend)
    assert got["state_n[0]"][:, 0].isnan().all()
    for name in ("output", "d_x_gates", "d_weight_hh"):
        assert torch.equal(clean[name], got[name]), name


@pytest.mark.parametrize("tf32", [False], indirect=True, ids=["ieee"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_non_contiguous_lengths_and_states(cell, backend, tf32, nan_filled):
    """Every other element of a buffer whose rest would give other results."""
    case = SMALL[cell]
    p = problem(case).to(torch.float32)
    expected = run(case, p, backend)

    def spread(x, other):
        buffer = torch.full((*x.shape, 2), other, dtype=x.dtype)
        buffer[..., 0] = x
        return buffer[..., 0]

    leaves = [spread(x, 9.0).detach().requires_grad_() for x in leaves_of(case, p)]
    apart = p._replace(
        lengths=spread(p.lengths, case.T),
        d_output=spread(p.d_output, 9.0),
        d_state_n=tuple(spread(d, 9.0) for d in p.d_state_n),
    )
    got = differentiate(apart, *forward(case, apart, leaves, backend), leaves)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=1e-6, msg=name)


NANS = {"quiet": 0x7FC00000, "of a GPU": 0x7FFFFFFF, "negative": 0xFFFFFFFF - 2**32}


@pytest.mark.parametrize("tf32", [False, True], indirect=True, ids=["ieee", "tf32"])
@pytest.mark.parametrize("bits", NANS.values(), ids=NANS)
@pytest.mark.parametrize("where", ["x_gates", "h0", "weight_hh"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_nan_of_any_bits_comes_out(cell, where, bits, tf32):
    """At the very places where PyTorch has it."""
    nan = torch.tensor([bits]).to(torch.int32).view(torch.float32)
    p = problem(Case(cell, T=3, B=2, H=16)).to(torch.float32)
    if where == "x_gates":
        p.x_gates[1, 0, 3] = nan
    elif where == "h0":
        p.state0[0][0, 0, 3] = nan
    else:
        p.weight_hh[0, 2, 3] = nan
    case = Case(cell, T=3, B=2, H=16)
    expected, got = run(case, p, "torch"), run(case, p, "triton")
    for name in ("output", "state_n[0]", "d_x_gates"):
        assert torch.equal(got[name].isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("tf32", [False, True], indirect=True, ids=["ieee", "tf32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("where", ["x_gates", "h0", "weight_hh"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm"])
def test_infinity_saturates(cell, where, sign, backend, tf32):
    """An infinite term gives what float32 arithmetic gives, and never a NaN of our making."""
    case = Case(cell, T=2, B=1, H=16)
    p = problem(case).to(torch.float32)
    p = p._replace(weight_hh=p.weight_hh.abs(), state0=tuple(s.abs() + 0.5 for s in p.state0))
    if where == "x_gates":
        p.x_gates[0, 0, 3] = sign * float("inf")
    elif where == "h0":
        p.state0[0][0, 0, 3] = sign * float("inf")
    else:
        p.weight_hh[0, 2, 3] = sign * float("inf")
    from rnn import reference

    output, _ = reference.recurrence(cell, p.x_gates, p.state0, p.weight_hh, p.params)
    got = run(case, p, backend)["output"]
    assert torch.equal(got.isnan(), output.isnan()) and torch.equal(got.isinf(), output.isinf())
    finite = output.isfinite()
    torch.testing.assert_close(got[finite], output[finite], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tf32", [False], indirect=True, ids=["ieee"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("cell", CELLS)
def test_small_signals_keep_their_relative_accuracy(cell, size, backend, tf32):
    case = Case(cell, T=3, B=32, H=64)
    p = problem(case)
    p = p._replace(x_gates=p.x_gates * size, state0=tuple(s * size for s in p.state0))
    got = run(case, p.to(torch.float32), backend)["output"].double()
    if p.params:
        p = p.to(torch.float32).to(torch.float64)
    expected = run(case, p, "torch")["output"]
    assert float((got - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_inputs_are_left_as_they_were(cell, backend):
    case = SMALL[cell]
    p = problem(case).to(torch.float32)
    tensors = [p.x_gates, *p.state0, p.weight_hh, *p.params, p.lengths, p.d_output, *p.d_state_n]
    before = [x.clone() for x in tensors]
    run(case, p, backend)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before))


@pytest.mark.parametrize("cell", CELLS)
def test_expanded_gradient(cell):
    """output.sum() hands back a gradient with strides of zero."""
    case = SMALL[cell]
    p = problem(case).to(torch.float32)
    p = p._replace(d_output=torch.ones(()).expand_as(p.d_output))
    triton, torch_path = run(case, p, "triton"), run(case, p, "torch")
    for name, x in torch_path.items():
        torch.testing.assert_close(triton[name], x, rtol=0, atol=1e-2, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_from_run_to_run(cell, backend):
    case = Case(cell, T=5, B=37, H=17, directions=2, ragged=True)
    p = problem(case).to(torch.float32)
    first, second = run(case, p, backend), run(case, p, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
