"""The cells of rnn.gallery: derived, and right on every backend."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from cases import (
    Case,
    assert_close_to_float64,
    check,
    differentiate,
    leaves_of,
    problem,
    split_leaves,
)

import rnn
from rnn.cells import CELLS

NAMES = ["mgu", "leaky_integrator", "peephole_lstm", "coupled_lstm", "slstm", "spiking"]
SHAPES = [
    Case("", T=1, B=1, H=1),
    Case("", T=3, B=5, H=33, reverse=True, layout="batch_major"),
    Case("", T=3, B=5, H=17, ragged=True, directions=2),
]


@pytest.fixture(params=NAMES)
def cell(request, gallery):
    return getattr(gallery, request.param)


def test_all_are_here(gallery):
    assert [cell.function.__name__ for cell in gallery.GALLERY] == NAMES
    assert list(rnn.modules.GALLERY) == NAMES
    assert [rnn.modules.cell_named(name) for name in NAMES] == list(gallery.GALLERY)
    known = "slstm.*, got 'elman'"
    with pytest.raises(ValueError, match=known):
        rnn.modules.cell_named("elman")


def by_loop(case: Case, p) -> dict:
    """The user's function in a plain loop, one row of the batch after the other."""
    cell, leaves = CELLS[case.cell], leaves_of(case, p)
    x_gates, state0, weight_hh, params = split_leaves(case, leaves)
    G, D, inner = cell.gates, case.directions, cell.inner_bias
    outputs = torch.zeros(case.T, case.B, D, case.H, dtype=x_gates.dtype)
    ends = [s.clone() for s in state0]
    for d in range(D):
        biases, own = params[: len(inner)], params[len(inner) :]
        own = {name: x[d] for (name, _), x in zip(cell.own_params, own, strict=True)}
        for b in range(case.B):
            state = tuple(s[d, b] for s in state0)
            steps = range(case.T if p.lengths is None else int(p.lengths[b]))
            for t in reversed(steps) if case.reverse != bool(d) else steps:
                x = x_gates[t, b].chunk(D)[d].chunk(G)
                h = list((weight_hh[d] @ state[0]).chunk(G))
                for k, bias in zip(inner, biases):
                    h[k] = h[k] + bias[d]
                state = cell.function(x, tuple(h), state, own)
                outputs[t, b, d] = state[0]
            for end, s in zip(ends, state):
                end[d, b] = s
    return differentiate(p, outputs.flatten(2), tuple(ends), leaves)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_the_equation_is_the_users_function(cell, shape):
    case = shape._replace(cell=cell.name)
    p = problem(case)
    expected = by_loop(case, p)
    assert_close_to_float64(case, expected, torch.float64)
    assert any(x.abs().sum() > 0 for name, x in expected.items() if name.startswith("d_"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_path(cell, shape, dtype, nan_filled):
    check(shape._replace(cell=cell.name), dtype, "torch", "cpu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, at rows that do not exist
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[1], torch.float16)],
    ids=str,
)
def test_kernels(cell, shape, dtype, checked, nan_filled):
    pytest.importorskip("triton")
    from launched import DEVICE, planned, run

    case = shape._replace(cell=cell.name)
    p = problem(case).to(dtype, DEVICE)
    assert_close_to_float64(case, run(case, p, planned(case, dtype)), dtype)


def test_bytes(gallery):
    """Numbers that a layer keeps for each (t, b, h), beside its output."""
    kept = {cell.function.__name__: cell.stored for cell in gallery.GALLERY}
    assert kept == {
        "mgu": 3,
        "leaky_integrator": 2,
        "peephole_lstm": 5,
        "coupled_lstm": 4,
        "slstm": 7,
        "spiking": 1,
    }


COMPILED = [
    ("sm_80", "slstm", 64, "bfloat16"),
    ("sm_80", "mgu", 128, "tf32"),
    ("sm_80", "peephole_lstm", 64, "bfloat16"),
    ("sm_80", "spiking", 256, "bfloat16"),
    ("sm_90", "slstm", 64, "bfloat16"),
    ("sm_90", "peephole_lstm", 512, "bfloat16"),
]


def rows_of_all() -> list:
    """In a process of its own, where kernels are compiled."""
    from bench.compiled import Job, rows_of

    return [rows_of(Job(*which)) for which in COMPILED]


def test_no_spills(monkeypatch):
    """On either engine, also with four states."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(rows_of_all).result()
    for (target, *_), rows in zip(COMPILED, found, strict=True):
        for row in rows:
            assert row["engine"] == {"sm_80": "portable", "sm_90": "Hopper"}[target]
            assert (row["verdict"], row["spill_B"]) == ("resident", 0)


def test_recurrent_trains_own_params(gallery):
    """The generic module on a derived cell: every parameter gets a gradient and moves."""
    torch.manual_seed(0)
    model = rnn.Recurrent(gallery.spiking, 4, 16, num_layers=2, bidirectional=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert torch.equal(before["leak_l1_reverse"], torch.zeros(16))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    output, _ = model(3 * torch.randn(6, 5, 4))
    (output.mean() - 0.5).square().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
