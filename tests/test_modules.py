"""rnn.RNN, GRU and LSTM in the place of torch.nn's: what goes in, and what comes out."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from twins import (
    CELLS,
    IEEE,
    KINDS,
    H,
    I,
    assert_same,
    each_backend,
    each_cell,
    each_run,
    everything,
    objective,
    problem,
    row_by_row,
    tensors,
    twins,
)

import rnn

pytestmark = IEEE

CONFIGS = {
    "plain": {},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "bidirectional": {"bidirectional": True},
    "deep": {"num_layers": 3, "bidirectional": True, "batch_first": True},
}
DEEP = CONFIGS["deep"]
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# Results and gradients.


@each_run
@each_config
@each_cell
@pytest.mark.parametrize("given", ["hx", "no-hx"])
def test_results_and_gradients(cell, config, given, run):
    backend, dtype = run
    theirs, ours = twins(cell, backend=backend, dtype=dtype, **config)
    x, hx = problem(ours, hx=given == "hx")
    expected = everything(theirs, x, hx)
    assert_same(everything(ours, x, hx), expected)
    assert len(expected) == sum(len(tensors(t)) for t in (ours(x, hx), x, hx, ours._flat_weights))


@each_run
@each_cell
@pytest.mark.parametrize("given", ["hx", "no-hx"])
def test_without_a_batch(cell, given, run):
    backend, dtype = run
    theirs, ours = twins(cell, backend=backend, dtype=dtype, **DEEP)
    x, hx = problem(ours, B=1, hx=given == "hx")

    def alone(module, x, hx):
        state = tuple(s.squeeze(1) for s in tensors(hx))
        return module(x.squeeze(0), *([state if len(state) > 1 else state[0]] if state else []))

    expected = everything(theirs, x, hx, alone)
    assert expected["result 0"].dim() == expected["result 1"].dim() == 2
    assert_same(everything(ours, x, hx, alone), expected)


@each_backend
@each_cell
@pytest.mark.parametrize("T", [1, 2, 15, 16, 40])
def test_lengths_around_which_the_engine_changes(cell, T, backend):
    theirs, ours = twins(cell, backend=backend, bidirectional=True)
    x, hx = problem(ours, T=T)
    assert_same(everything(ours, x, hx), everything(theirs, x, hx))
    with torch.no_grad():
        assert_same(ours(x, hx), theirs(x, hx))


@each_cell
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_as_near_to_float64_as_torch_is(cell, dtype):
    theirs, ours = twins(cell, dtype=dtype, bidirectional=True)
    exact = twins(cell, dtype=torch.float64, bidirectional=True)[0]
    exact.load_state_dict({n: p.double() for n, p in theirs.state_dict().items()})
    x, hx = problem(ours)
    double = [s.detach().double().requires_grad_() for s in tensors((x, hx))]
    wanted = everything(exact, double[0], tuple(double[1:]) if cell == "lstm" else double[1])
    got, torch_got = everything(ours, x, hx), everything(theirs, x, hx)
    floor = 4 * torch.finfo(dtype).eps
    for name, w in wanted.items():
        error, torch_error = ((r[name].double() - w).abs().max() for r in (got, torch_got))
        assert error <= 2 * torch_error + floor * w.abs().max(), name


@each_backend
@each_cell
@pytest.mark.parametrize("config", [CONFIGS["plain"], DEEP], ids=["plain", "deep"])
def test_empty_batch(cell, config, backend):
    if backend == "triton":
        pytest.skip("there is nothing to launch")
    theirs, ours = twins(cell, backend=backend, **config)
    x, hx = problem(ours, T=4, B=0)
    assert_same(everything(ours, x, hx), everything(theirs, x, hx))
    nobody = torch.zeros(0, dtype=torch.int64)
    by_lengths = everything(ours, x, hx, lambda m, x, hx: m(x, hx, lengths=nobody))
    assert_same(by_lengths, everything(theirs, x, hx))


@each_backend
@each_cell
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_strides(cell, layout, backend):
    """Of the input, the states, the weights and the incoming gradients."""
    theirs, ours = twins(cell, backend=backend, bidirectional=True)

    def lay(t):
        if layout == "transposed":
            return t.mT.contiguous().mT if t.dim() > 1 else t
        spread = torch.full((*t.shape, 3), float("nan"), dtype=t.dtype)
        spread[..., 1] = t
        return spread[..., 1]

    x, *hx = (lay(t.detach()).requires_grad_() for t in tensors(problem(ours)))
    with torch.no_grad():
        for module in (theirs, ours):
            for p in module.parameters():
                p.data = lay(p.data)

    def call(module, x, hx):
        results = tensors(module(x, hx if len(hx) > 1 else hx[0]))
        if layout == "expanded":  # sum hands back one number, expanded
            return [y.sum() for y in results]
        return [lay(y) for y in results]

    assert_same(everything(ours, x, hx, call), everything(theirs, x, hx, call))


# The module itself.


@each_cell
@each_config
def test_same_parameters_of_the_same_seed(cell, config):
    theirs, ours, told = KINDS[cell]
    torch.manual_seed(0)
    theirs = theirs(I, H, **told, **config)
    torch.manual_seed(0)
    ours = ours(I, H, **told, **config)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert ours.all_weights[0][0] is ours.weight_ih_l0
    for name in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first"):
        assert getattr(ours, name) == getattr(theirs, name)


KEYWORDS = {"bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True}
POSITIONS = {
    "rnn_tanh": (I, H, 2, "relu", False, True, 0.5, True),
    "gru": (I, H, 2, False, True, 0.5, True),
    "lstm": (I, H, 2, False, True, 0.5, True, 3),
}


@pytest.mark.parametrize("cell", POSITIONS)
def test_constructor(cell):
    """Positional, by keyword, and mixed: what torch.nn makes of it."""
    theirs, ours, _ = KINDS[cell]
    by_name = {"input_size": I, "hidden_size": H, "num_layers": 2, **KEYWORDS}
    if cell == "rnn_tanh":
        by_name["nonlinearity"] = "relu"
    if cell == "lstm":
        by_name["proj_size"] = 3
    positions = POSITIONS[cell]
    calls = [(positions[:k], {}) for k in range(2, len(positions) + 1)]
    calls += [((), by_name), ((I,), {n: v for n, v in by_name.items() if n != "input_size"})]
    calls += [((I, H), {"device": "meta", "dtype": torch.float64})]
    for args, kwargs in calls:
        a, b = ours(*args, **kwargs), theirs(*args, **kwargs)
        assert repr(a) == repr(b).replace(")", ", backend=auto)")
        assert {n: (p.shape, p.dtype, p.device) for n, p in a.state_dict().items()} == {
            n: (p.shape, p.dtype, p.device) for n, p in b.state_dict().items()
        }
        assert all(getattr(a, n) == getattr(b, n) for n in (*KEYWORDS, "num_layers", "mode"))


@each_cell
@each_config
def test_state_dict_goes_both_ways(cell, config):
    theirs, ours = twins(cell, **config)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.25)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    other = twins(cell, **config)[1]
    other.load_state_dict(theirs.state_dict(), strict=True)
    x, hx = problem(ours)
    assert_same(ours(x, hx), theirs(x, hx))
    assert all(torch.equal(a, b) for a, b in zip(tensors(other(x, hx)), tensors(ours(x, hx))))


@each_backend
@each_cell
def test_states_go_out_and_in_again(cell, backend):
    """A sequence in two parts, and hx as what forward returned (of an LSTM, also as a list)."""
    _, ours = twins(cell, backend=backend, num_layers=2)
    x, hx = problem(ours)
    whole, last = ours(x, hx)
    first, state = ours(x[:2], hx)
    second, after = ours(x[2:], list(state) if cell == "lstm" else state)
    assert isinstance(after, tuple if cell == "lstm" else torch.Tensor)
    assert_same([torch.cat([first, second]), after], [whole, last])


# Dropout.


@each_cell
def test_dropout_of_one_seed_is_torchs(cell):
    theirs, ours = twins(cell, num_layers=3, dropout=0.4, bidirectional=True, dtype=torch.float64)
    x, hx = problem(ours, T=20)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(5)
        results.append(everything(module, x, hx))
    assert_same(results[1], results[0])
    assert not torch.allclose(ours(x, hx)[0], ours(x, hx)[0])
    assert_same(everything(ours.eval(), x, hx), everything(theirs.eval(), x, hx))


@each_backend
def test_dropout_mask(backend):
    """Between the layers alone: each number is dropped with probability p, or is 1 / (1 - p)."""
    ours = rnn.RNN(2, 100, 2, "relu", dropout=0.25, backend=backend)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
        ours.bias_ih_l0.fill_(1.0)  # the first layer says 1, and the second repeats it
        ours.weight_ih_l1.copy_(torch.eye(100))
    output, h_n = ours(torch.randn(30, 4, 2))
    assert torch.equal(h_n[0], torch.ones(4, 100))
    kept = output > 0
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1 / 0.75))
    assert abs(kept.double().mean() - 0.75) < 5 * (0.25 * 0.75 / 12_000) ** 0.5
    assert not torch.equal(kept[0], kept[1])
    ours.dropout = 1.0
    assert not ours(torch.randn(3, 4, 2))[0].any()
    assert ours.eval()(torch.randn(3, 4, 2))[0].all()


# Sequences of different length.

SIX = torch.tensor([6, 4, 1])


@each_run
@each_cell
@pytest.mark.parametrize("order", ["sorted", "unsorted", "equal"])
@pytest.mark.parametrize("config", [{}, DEEP], ids=["plain", "deep"])
def test_packed_sequence(cell, config, order, run):
    backend, dtype = run
    theirs, ours = twins(cell, backend=backend, dtype=dtype, **config)
    x, hx = problem(ours)
    lengths = {"sorted": SIX, "unsorted": SIX[[2, 0, 1]], "equal": SIX[[0, 0, 0]]}[order]

    def packed(module, x, hx):
        p = pack_padded_sequence(x, lengths, module.batch_first, order != "unsorted")
        output, state = module(p, hx)
        assert all(a is b for a, b in zip(output[1:], p[1:]))
        return output, state

    assert_same(everything(ours, x, hx, packed), everything(theirs, x, hx, packed))
    assert_same(packed(ours, x, None), packed(theirs, x, None))


@each_run
@each_cell
@pytest.mark.parametrize(
    "lengths", [[2, 6, 5], [0, 6, 3], [0, 4, 0], [0, 0, 0], [6, 6, 6]], ids=str
)
@pytest.mark.parametrize("config", [{}, DEEP], ids=["plain", "deep"])
def test_lengths_are_each_row_alone(cell, config, lengths, run):
    """As packing does it, zeros included."""
    backend, dtype = run
    theirs, ours = twins(cell, backend=backend, dtype=dtype, **config)
    x, hx = problem(ours)
    lengths = torch.tensor(lengths)
    expected = everything(theirs, x, hx, lambda m, x, hx: row_by_row(m, x, hx, lengths))
    for int_type in (torch.int32, torch.int64):
        given = lengths.to(int_type)
        got = everything(ours, x, hx, lambda m, x, hx, n=given: m(x, hx, lengths=n))
        zeros = {n: torch.zeros_like(g) for n, g in got.items() if n not in expected}
        assert_same(got, expected | zeros)
    if not config and lengths.all():
        p = pack_padded_sequence(x, lengths, enforce_sorted=False)
        padded, state = theirs(p)
        both = pad_packed_sequence(padded, total_length=6)[0], state
        assert_same(ours(x, lengths=lengths), both)


@each_cell
def test_a_batch_of_lengths_beside_its_packing(cell):
    """Whole numbers of a real batch: 1 to 40 steps."""
    theirs, ours = twins(cell, dtype=torch.float64, num_layers=2, bidirectional=True)
    x, hx = problem(ours, T=40, B=17)
    lengths = torch.randint(1, 41, (17,), generator=torch.Generator().manual_seed(2))
    lengths[4] = 40

    def packed(module, x, hx):
        y, state = module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        return pad_packed_sequence(y)[0], state

    got = everything(ours, x, hx, lambda m, x, hx: m(x, hx, lengths=lengths))
    assert_same(got, everything(theirs, x, hx, packed))


@each_cell
def test_more_steps_than_16_bits_count(cell):
    """Forward as torch.nn; the gradient of the last step as that of a call on the last steps."""
    T, near = 70_000, 200
    theirs, ours = twins(cell, dtype=torch.float64)
    x, hx = problem(ours, T, 1)
    output, state = ours(x, hx)
    with torch.no_grad():
        assert_same([output, state], theirs(x, hx))
        _, before = ours(x[:-near], hx)
    x_near = x[-near:].detach().requires_grad_()
    wanted = everything(ours, x_near, before, lambda *call: ours(*call[1:])[0][-1])
    got = everything(ours, x, hx, lambda *call: ours(*call[1:])[0][-1])
    got["leaf 0"] = got["leaf 0"][-near:]
    same = [name for name in wanted if name == "leaf 0" or "leaf" not in name]
    assert_same({n: got[n] for n in same}, {n: wanted[n] for n in same})
    lengths = torch.tensor([T])
    assert_same(ours(x, hx, lengths=lengths), [output, state])


@pytest.mark.gpu
@each_cell
def test_200_000_steps_on_a_gpu(cell):
    _, ours = twins(cell, 5, 32, backend="triton")
    ours.cuda()
    x = torch.randn(200_000, 2, 5, device="cuda", requires_grad=True)
    output, state = ours(x)
    _, before = ours(x[:100_000])
    assert_same([output[100_000:], state], ours(x[100_000:], before), 1e-4)
    output[-1].sum().backward()
    assert x.grad[-1].any() and x.grad.isfinite().all()


# Projections, which run on PyTorch's own operator.


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_projection(backend):
    theirs, ours = twins("lstm", backend=backend, proj_size=3, **DEEP)
    x, hx = problem(ours)
    assert_same(everything(ours, x, hx), everything(theirs, x, hx))
    p = pack_sequence([x[1], x[0, :2]])
    assert_same(ours(p), theirs(p))
    for lengths in ([2, 6, 5], [0, 6, 3], [0, 0, 0]):
        lengths = torch.tensor(lengths)
        got = everything(ours, x, hx, lambda m, x, hx, n=lengths: m(x, hx, lengths=n))
        wanted = everything(theirs, x, hx, lambda m, x, hx, n=lengths: row_by_row(m, x, hx, n))
        zeros = {n: torch.zeros_like(g) for n, g in got.items() if n not in wanted}
        assert_same(got, wanted | zeros)
    ours.zero_grad()
    results = ours(x, lengths=torch.zeros(3, dtype=torch.int64))  # no step, and a graph
    objective(results).backward()
    assert not any(y.any() for y in tensors(results))
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here: proj_size'):
        rnn.LSTM(I, H, proj_size=3, backend="triton")(torch.randn(2, 1, I))


def test_cells_of_the_table_are_those_tested():
    from rnn.cells import CELLS as TABLE

    modules = {name: make(2, 3) for name, make in rnn.modules.MODULES.items()}
    assert set(modules) == set(TABLE)
    found = rnn.convert(torch.nn.ModuleDict(modules), to="torch")
    assert {line.path for line in found if not line.why_not} == set(CELLS)
