"""checkpoint_every=K: less memory, the same gradient."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from twins import (
    IEEE,
    RUNS,
    assert_same,
    each_backend,
    each_cell,
    everything,
    problem,
    tensors,
    twins,
)

import rnn
from rnn.cells import CELLS

pytestmark = IEEE

T, B = 11, 3
LENGTHS = torch.tensor([4, 11, 0])
DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}


def by_lengths(module, x, hx):
    return module(x, hx, lengths=LENGTHS)


def packed(module, x, hx):
    ends = LENGTHS.clamp(min=1)
    return module(pack_padded_sequence(x, ends, module.batch_first, enforce_sorted=False), hx)


def cut(module, x, hx):
    resets = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.3
    return module(x, hx, resets=resets.t() if module.batch_first else resets)


CALLS = {"whole": None, "lengths": by_lengths, "packed": packed, "resets": cut}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


# As without it, whatever K is, on one engine; and on the others with one K.
EVERY = [(K, RUNS[0]) for K in (1, 3, 10, 11, 100)] + [(4, run) for run in RUNS[1:]]


@each_cell
@each_call
@pytest.mark.parametrize(
    ("every", "run"), EVERY, ids=lambda x: str(x) if isinstance(x, int) else f"{x[0]}-{x[1]}"
)
@pytest.mark.parametrize("config", [{}, DEEP], ids=["plain", "deep"])
def test_results_and_gradients(cell, config, call, every, run):
    backend, dtype = run
    _, ours = twins(cell, backend=backend, dtype=dtype, **config)
    x, hx = problem(ours, T, B)
    expected = everything(ours, x, hx, call)
    ours.checkpoint_every = every
    assert_same(everything(ours, x, hx, call), expected)


@each_backend
@each_cell
@pytest.mark.parametrize("given", ["hx", "no-hx"])
def test_the_bits_of_a_chain_of_calls(cell, backend, given):
    """The gradient is not truncated: it is that of calls of K steps, each with the state of the
    one before."""
    _, ours = twins(cell, backend=backend)
    ours.checkpoint_every = 4
    plain = copy.deepcopy(ours)
    plain.checkpoint_every = None
    x, hx = problem(ours, T, B, hx=given == "hx")

    def chain(module, x, hx):
        outputs, state = [], hx
        if state is None:
            state = tuple(torch.zeros(1, B, 7) for _ in range(CELLS[cell].states))
            state = state if len(state) > 1 else state[0]
        for piece in x.split(4):
            output, state = module(piece, state)
            outputs.append(output)
        return torch.cat(outputs), state

    if backend == "auto":  # which takes PyTorch's operator for calls of few steps
        plain.backend = "torch"
    got, want = everything(ours, x, hx), everything(plain, x, hx, chain)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@each_cell
def test_in_both_directions_the_bits_of_two_chains(cell):
    """float64 has the bits of the whole sequence (see step), and so has each chain."""
    _, ours = twins(cell, bidirectional=True, num_layers=2, dtype=torch.float64)
    x, hx = problem(ours, T, B)
    whole = ours(x, hx)
    ours.checkpoint_every = 4
    for a, b in zip(tensors(ours(x, hx)), tensors(whole), strict=True):
        assert torch.equal(a, b)


def saved_bytes(module, x, hx):
    """What a call leaves for its backward pass: bytes of all tensors that autograd packs, each
    memory once; without those of the parameters."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = module(x, hx)
    mine = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return sum(s.nbytes() for at, s in storages.items() if at not in mine), results


@each_cell
@pytest.mark.parametrize("directions", [1, 2])
def test_memory_of_every_kth_state(cell, directions):
    T, B, H, K = 400, 3, 32, 20
    kind = CELLS[cell]
    module = twins(cell, 5, H, bidirectional=directions == 2, backend="torch")[1]
    x, hx = problem(module, T, B)
    of_input = 4 * (x.numel() + sum(s.numel() for s in tensors(hx)))
    plain, _ = saved_bytes(module, x, hx)
    numbers = T * B * H * directions * 4
    assert numbers * (1 + kind.stored) <= plain <= numbers * (1 + kind.stored) + of_input
    module.checkpoint_every = K
    kept, _ = saved_bytes(module, x, hx)
    states = T // K * kind.states * B * H * directions * 4
    assert states / 2 < kept <= 2 * states + of_input
    assert kept < plain / 5


def test_nothing_is_recomputed_where_no_gradient_is_wanted(monkeypatch):
    calls = []
    run = rnn.recurrent.run
    monkeypatch.setattr(rnn.recurrent, "run", lambda *a: calls.append(a) or run(*a))
    ours = rnn.GRU(5, 7, checkpoint_every=2, backend="torch")
    with torch.no_grad():
        ours(torch.randn(T, B, 5))
    assert len(calls) == 1
    ours(torch.randn(T, B, 5))
    assert len(calls) == 1


def test_dropout_between_layers():
    """Its mask is drawn outside of the pieces, once."""
    ours = rnn.LSTM(5, 7, 2, dropout=0.5, backend="torch")
    x, hx = problem(ours, T, B)
    results = []
    for every in (None, 3):
        ours.checkpoint_every = every
        torch.manual_seed(5)
        results.append(everything(ours, x, hx))
    assert_same(results[1], results[0])


@each_cell
def test_autocast(cell):
    ours = twins(cell)[1]
    x, hx = problem(ours, T, B)
    results = []
    for every in (None, 3):
        ours.checkpoint_every = every
        with torch.autocast("cpu", torch.bfloat16):
            results.append(everything(ours, x, hx))
    assert_same(results[1], results[0], 0.05)


def test_second_derivative():
    ours = rnn.GRU(2, 3, dtype=torch.float64, checkpoint_every=2)
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], (x,))


def test_it_stays_with_the_module():
    ours = rnn.GRU(5, 7, checkpoint_every=8)
    assert repr(ours) == "GRU(5, 7, backend=auto, checkpoint_every=8)"
    assert pickle.loads(pickle.dumps(ours)).checkpoint_every == 8
    assert copy.deepcopy(ours).checkpoint_every == 8
    assert rnn.GRU(5, 7).checkpoint_every is None
    assert ours.state_dict().keys() == torch.nn.GRU(5, 7).state_dict().keys()


@pytest.mark.parametrize(
    ("every", "config", "error", "says"),
    [
        (0, {}, ValueError, "at least 1, got 0"),
        (-3, {}, ValueError, "at least 1, got -3"),
        (2.0, {}, TypeError, "an int or None, got 2.0"),
        (True, {}, TypeError, "got True"),
        (4, {"proj_size": 3}, ValueError, "proj_size=0, got proj_size=3"),
    ],
)
def test_refuses(every, config, error, says):
    with pytest.raises(error, match=says):
        rnn.LSTM(5, 7, checkpoint_every=every, **config)
