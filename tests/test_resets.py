"""`resets` cuts sequences into segments: each is what it would be alone."""

import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
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
from rnn.segments import Segments

pytestmark = IEEE

T, B = 9, 5
DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}
each_config = pytest.mark.parametrize("config", [{}, DEEP], ids=["plain", "deep"])


def some_resets(T=T, B=B):
    return torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.3


def set_at(*steps):
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[list(steps)] = True
    return resets


RESETS = {
    "some": some_resets(),
    "nowhere": set_at(),
    "everywhere": set_at(*range(T)),
    "first": set_at(0),
    "last": set_at(T - 1),
    "one-row": set_at(2, 3) & (torch.arange(B) == 1),
}
LENGTHS = {"whole": None, "ragged": torch.tensor([4, 9, 0, 1, 7])}


def laid(module, resets):
    return resets.t() if module.batch_first else resets


def segment_by_segment(module, x, hx, resets, lengths=None):
    """What `resets` (T, B) mean: each sequence's segments run alone, one after the other, with hx
    where the sequence is entered, forwards and backwards, and zeros elsewhere."""
    batch = 0 if module.batch_first else 1
    directions = 2 if module.bidirectional else 1
    outputs, states = [], []
    steps, rows = x.size(1 - batch), x.size(batch)
    for b in range(rows):
        n = steps if lengths is None else int(lengths[b])
        given = tuple(s[:, b] for s in tensors(hx))
        starts = [0, *(t for t in range(1, n) if resets[t, b])] if n else []
        parts, last = [], [s.clone() for s in given]
        for first, end in zip(starts, [*starts[1:], n]):
            entered = tuple(torch.zeros_like(s) for s in given)
            for e, s in zip(entered, given):
                if first == 0 and not resets[0, b]:
                    e[::directions] = s[::directions]
                if end == n and directions == 2:
                    e[1::2] = s[1::2]
            hidden = entered if len(entered) > 1 else entered[0]
            y, after = module(x.select(batch, b)[first:end], hidden)
            parts.append(y)
            for k, s in enumerate(tensors(after)):
                if end == n:
                    last[k][::directions] = s[::directions]
                if first == 0 and directions == 2:
                    last[k][1::2] = s[1::2]
        width = directions * (module.proj_size or module.hidden_size)
        parts.append(x.new_zeros(steps - n, width))
        outputs.append(torch.cat(parts))
        states.append(last)
    return torch.stack(outputs, batch), [torch.stack(s, 1) for s in zip(*states)]


# Every case on one engine, and on the others those that differ for them.
EVERY = [(r, n, RUNS[0]) for r in RESETS for n in LENGTHS]
EVERY += [(r, "ragged", run) for r in ("some", "nowhere") for run in RUNS[1:]]


@each_cell
@each_config
@pytest.mark.parametrize(
    ("resets", "lengths", "run"), EVERY, ids=lambda x: x if isinstance(x, str) else x[0]
)
def test_each_segment_is_alone(cell, config, resets, lengths, run):
    resets, lengths, (backend, dtype) = RESETS[resets], LENGTHS[lengths], run
    theirs, ours = twins(cell, backend=backend, dtype=dtype, **config)
    x, hx = problem(ours, T, B)

    def ours_in_segments(m, x, hx):
        return m(x, hx, resets=laid(m, resets), lengths=lengths)

    def alone(m, x, hx):
        return segment_by_segment(m, x, hx, resets, lengths)

    expected = everything(theirs, x, hx, alone)
    assert_same(everything(ours, x, hx, ours_in_segments), expected)
    zeros = [torch.zeros_like(s) for s in tensors(hx)]
    hidden = zeros if len(zeros) > 1 else zeros[0]
    assert_same(ours_in_segments(ours, x, None), ours_in_segments(ours, x, hidden))


@each_backend
@each_cell
@each_config
def test_no_gradient_crosses(cell, config, backend):
    """Exact zeros, and what lies on the other side of a reset changes no bit."""
    _, ours = twins(cell, backend=backend, **config)
    x, hx = problem(ours, T, B)
    resets = laid(ours, set_at(4))
    time = 1 if ours.batch_first else 0
    before, after = torch.arange(4), torch.arange(4, T)
    for inside, outside in ((before, after), (after, before)):
        output, state = ours(x, hx, resets=resets)
        chosen = output.index_select(time, inside)
        (d_x,) = torch.autograd.grad(chosen.sum(), x, retain_graph=True)
        assert not d_x.index_select(time, outside).any()
        assert d_x.index_select(time, inside).all() or cell == "rnn_relu"
        other = x.detach().index_fill(time, outside, 3.0)
        assert torch.equal(
            ours(other, hx, resets=resets)[0].index_select(time, inside),
            chosen,
        )
    if not ours.bidirectional:
        found = torch.autograd.grad(sum(s.sum() for s in tensors(state)), tensors(hx))
        assert not any(d.any() for d in found)


@each_cell
def test_many_segments_of_a_real_batch(cell):
    theirs, ours = twins(cell, dtype=torch.float64, num_layers=2, bidirectional=True)
    x, hx = problem(ours, 60, 7)
    resets = torch.rand(60, 7, generator=torch.Generator().manual_seed(1)) < 0.1
    lengths = torch.tensor([60, 1, 33, 59, 0, 17, 60])
    got = everything(ours, x, hx, lambda m, x, hx: m(x, hx, resets=resets, lengths=lengths))
    assert_same(
        got,
        everything(theirs, x, hx, lambda m, x, hx: segment_by_segment(m, x, hx, resets, lengths)),
    )


@each_backend
@each_cell
@pytest.mark.parametrize("batch_first", [False, True])
def test_without_a_batch(cell, batch_first, backend):
    _, ours = twins(cell, backend=backend, batch_first=batch_first, bidirectional=True)
    x, hx = problem(ours, T, 1)
    resets = RESETS["some"][:, 0]
    state = [s[:, 0] for s in tensors(hx)]
    output, last = ours(
        x.squeeze(0 if batch_first else 1), state if len(state) > 1 else state[0], resets=resets
    )
    want, ends = ours(x, hx, resets=laid(ours, resets[:, None]))
    assert_same(
        [output, last], [want[0] if batch_first else want[:, 0], *(s[:, 0] for s in tensors(ends))]
    )


@each_cell
def test_second_derivative(cell):
    _, ours = twins(cell, dtype=torch.float64)
    x, hx = problem(ours, 4, 2)
    resets = set_at(2)[:4, :2]

    def call(x, *states):
        return tuple(tensors(ours(x, states if len(states) > 1 else states[0], resets=resets)))

    assert torch.autograd.gradgradcheck(call, (x, *tensors(hx)))


@each_backend
def test_dropout_and_eval(backend):
    ours = rnn.GRU(5, 7, 2, dropout=0.5, backend=backend)
    x, hx = problem(ours, T, B)
    resets = RESETS["some"]
    assert not torch.equal(ours(x, hx, resets=resets)[0], ours(x, hx, resets=resets)[0])
    ours.eval()
    ours_alone = segment_by_segment(ours, x, hx, resets)
    assert_same(ours(x, hx, resets=resets), ours_alone)


def test_projection():
    theirs, ours = twins("lstm", proj_size=3, **DEEP)
    x, hx = problem(ours, T, B)
    got = everything(ours, x, hx, lambda m, x, hx: m(x, hx, resets=RESETS["some"].t()))
    alone = everything(theirs, x, hx, lambda m, x, hx: segment_by_segment(m, x, hx, RESETS["some"]))
    assert_same(got, alone)


@each_cell
def test_autocast(cell):
    _, ours = twins(cell)
    x, hx = problem(ours, T, B)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = ours(x, hx, resets=RESETS["some"])
        alone = segment_by_segment(ours, x, hx, RESETS["some"])
    assert output.dtype == tensors(state)[0].dtype == torch.bfloat16
    assert_same([output, state], [t.to(torch.bfloat16) for t in tensors(alone)], 0.02)


def test_padding_may_hold_anything():
    ours = rnn.LSTM(5, 7)
    x, hx = problem(ours, T, B)
    lengths, resets = LENGTHS["ragged"], RESETS["some"]
    want = everything(ours, x, hx, lambda m, x, hx: m(x, hx, resets=resets, lengths=lengths))
    spoilt = x.detach().clone()
    spoilt[torch.arange(T)[:, None] >= lengths] = float("nan")
    got = everything(
        ours, spoilt.requires_grad_(), hx, lambda m, x, hx: m(x, hx, resets=resets, lengths=lengths)
    )
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("lengths", [None, torch.zeros(B, dtype=torch.int64)], ids=["none", "zero"])
def test_nothing_to_cut(lengths):
    ours = rnn.GRU(5, 7)
    rows = B if lengths is not None else 0
    x, hx = problem(ours, T, rows)
    resets = torch.ones(T, rows, dtype=torch.bool)
    output, h_n = ours(x, hx, resets=resets, lengths=lengths)
    assert output.shape == (T, rows, 7) and not output.any() and torch.equal(h_n, hx)


def test_as_many_steps_as_the_longest_segment(monkeypatch):
    seen = []
    run = rnn.recurrent.run
    monkeypatch.setattr(rnn.recurrent, "run", lambda spec, *a: seen.append(spec) or run(spec, *a))
    resets = torch.zeros(100, 1, dtype=torch.bool)
    resets[[10, 11, 40, 50]] = True
    rnn.GRU(5, 7)(torch.randn(100, 1, 5), resets=resets)
    assert [len(spec.sizes) for spec in seen] == [50]
    assert seen[0].sizes[:2] == (5, 4) and sum(seen[0].sizes) == 100


def test_work_does_not_grow_with_longest_times_number():
    """One segment of 2^15 steps beside 2^15 of one: their rectangle would be 2^30 places."""
    n = 1 << 15
    resets = (torch.arange(2 * n) >= n)[:, None]
    segments = Segments.of(resets, None)
    assert segments.total == n + 1 and len(segments.sizes) == n
    rows = segments.gather(torch.arange(2.0 * n)[:, None, None])
    assert rows[0] == 0 and rows[1] == n and rows[n + 1] == 1
    assert torch.equal(segments.scatter(rows).flatten(), torch.arange(2.0 * n))


# The function.


@each_cell
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("D", "reverse", "lengths"),
    [
        (0, False, None),
        (0, True, LENGTHS["ragged"]),
        (1, True, None),
        (2, False, LENGTHS["ragged"]),
    ],
    ids=["not-stacked", "reverse", "stacked", "two"],
)
def test_the_function_is_the_equation_with_resets(cell, backend, reverse, D, lengths):
    """Row by row and segment by segment, by rnn.recurrence itself without resets."""
    H, kind, resets = 7, CELLS[cell], RESETS["some"]
    lead, generator = (D,) * bool(D), torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    x_gates = leaf(T, B, max(D, 1) * kind.gates * H)
    state0 = tuple(leaf(*lead, B, H) for _ in range(kind.states))
    weights = [leaf(*lead, kind.gates * H, H), *(leaf(*lead, H) for _ in kind.params)]
    leaves = [x_gates, *state0, *weights]
    told = {"cell": cell, "reverse": reverse, "backend": backend}

    def call(x, states, **more):
        h0 = states[0] if len(states) == 1 else tuple(states)
        return tensors(rnn.recurrence(x, h0, weights[0], tuple(weights[1:]), **told, **more))

    def alone():
        """Directions apart: each walks through the segments with the state it left before, which
        a reset makes zero."""
        rows = []
        for b in range(B):
            n = T if lengths is None else int(lengths[b])
            starts = [0, *(t for t in range(1, n) if resets[t, b])] if n else []
            spans = list(zip(starts, [*starts[1:], n]))
            output = [x_gates.new_zeros(T - n, 1, max(D, 1) * H)]
            last = [s[..., b : b + 1, :].clone() for s in state0]
            first_state = [s.clone() for s in last]
            for first, end in spans:
                entered = [torch.zeros_like(s) for s in first_state]
                directions = range(D) if D else [None]
                for d in directions:
                    back = reverse != bool(d)
                    at = (d,) if d is not None else ()
                    fits = end == n if back else first == 0 and not resets[0, b]
                    if fits:
                        for e, s in zip(entered, first_state):
                            e[at] = s[at]
                y, *ends = call(x_gates[first:end, b : b + 1], entered)
                output.insert(-1, y)
                for d in directions:
                    at = (d,) if d is not None else ()
                    if (first == 0) if reverse != bool(d) else (end == n):
                        for s, e in zip(last, ends):
                            s[at] = e[at]
            rows.append([torch.cat(output), *last])
        outputs, *states = zip(*rows)
        return [torch.cat(outputs, 1), *(torch.cat(s, -2) for s in states)]

    results = []
    for got in (call(x_gates, state0, resets=resets, lengths=lengths), alone()):
        weighted = [(y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in got]
        results.append([*got, *torch.autograd.grad(sum(weighted), leaves)])
    assert_same(results[0], results[1])


# What is refused.


@pytest.mark.parametrize(
    ("resets", "error", "says"),
    [
        ([True], TypeError, "list"),
        (torch.zeros(T, B), TypeError, r"torch.bool, got torch.float32"),
        (torch.zeros(B, T, dtype=torch.bool), ValueError, r"\(9, 5\), got \(5, 9\)"),
        (torch.zeros(T, dtype=torch.bool), ValueError, r"\(9, 5\), got \(9,\)"),
        (torch.zeros(T, B, dtype=torch.bool, device="meta"), RuntimeError, "without data"),
    ],
    ids=["list", "float", "transposed", "1-D", "meta"],
)
def test_refuses(resets, error, says):
    with pytest.raises(error, match=says):
        rnn.GRU(5, 7)(torch.randn(T, B, 5), resets=resets)
    with pytest.raises(error, match=says):
        h0, weight, b_hn = torch.zeros(B, 7), torch.zeros(21, 7), torch.zeros(7)
        rnn.recurrence(torch.zeros(T, B, 21), h0, weight, (b_hn,), cell="gru", resets=resets)


@pytest.mark.parametrize("batch_first", [False, True])
def test_refuses_the_layout_of_another_call(batch_first):
    ours = rnn.GRU(5, 7, batch_first=batch_first)
    x = torch.randn(*((B, T) if batch_first else (T, B)), 5)
    shape = (T, B) if batch_first else (B, T)
    with pytest.raises(ValueError, match="resets must have shape"):
        ours(x, resets=torch.zeros(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(9,\), got \(9, 1\)"):
        ours(torch.randn(T, 5), resets=torch.zeros(T, 1, dtype=torch.bool))


def test_refuses_packed_input():
    with pytest.raises(ValueError, match="PackedSequence"):
        rnn.GRU(5, 7)(pack_sequence([torch.randn(3, 5)]), resets=torch.zeros(3, 1) > 0)


def test_refuses_to_be_traced():
    ours, resets = rnn.GRU(5, 7), RESETS["some"]
    with pytest.raises(RuntimeError, match="cannot be traced"):
        torch.jit.trace(lambda x: ours(x, resets=resets)[0], torch.randn(T, B, 5))


def test_a_compiled_model_calls_it_between_its_graphs():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = rnn.GRU(5, 7)

        def forward(self, x, resets):
            return self.rnn(2 * x, resets=resets)[0] + 1

    model, x = Model(), torch.randn(T, B, 5)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(compiled(x, RESETS["some"]), model(x, RESETS["some"]))


def test_segments_of_a_pickled_module():
    ours = rnn.GRU(5, 7)
    x = torch.randn(T, B, 5)
    again = pickle.loads(pickle.dumps(ours))
    assert_same(again(x, resets=RESETS["some"]), ours(x, resets=RESETS["some"]))
