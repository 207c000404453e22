"""Packed sequences on a CPU: equally long ones are the batch that they are, and oneDNN's LSTM takes
the others padded. The results are those of torch.nn on the packed rows."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from twins import IEEE, assert_same, each_cell, everything, problem, tensors, twins

import rnn
from rnn import by_operator
from rnn.padding import pays

pytestmark = [
    *IEEE,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN"),
]
LENGTHS = torch.tensor([3, 9, 8, 1, 8])
CONFIGS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "deep": {"num_layers": 3, "bias": False},
    "deep-bidirectional": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def packed(module, x, hx):
    return module(pack_padded_sequence(x, LENGTHS, module.batch_first, enforce_sorted=False), hx)


@pytest.fixture
def padded(monkeypatch):
    """The calls that were padded."""
    calls = []

    def noted(*args):
        calls.append(args)
        return run(*args)

    run = by_operator.run_padded_lstm
    monkeypatch.setattr(by_operator, "run_padded_lstm", noted)
    return calls


@each_config
@pytest.mark.parametrize("given", ["hx", "no-hx"])
def test_lstm(config, given, padded):
    theirs, ours = twins("lstm", backend="auto", **config)
    x, hx = problem(ours, 9, 5, hx=given == "hx")
    assert_same(everything(ours, x, hx, packed), everything(theirs, x, hx, packed))
    assert len(padded) == (not (ours.bidirectional and given == "hx"))
    with torch.no_grad():
        assert_same(packed(ours, x, hx), packed(theirs, x, hx))


def test_gates_stay_shut_whatever_the_weights(padded):
    """c past the end is c at the end, against weights and biases of thousands."""
    theirs, ours = twins("lstm", backend="auto", bidirectional=True)
    with torch.no_grad():
        for a, b in zip(theirs.parameters(), ours.parameters()):
            a.mul_(1e4)
            b.copy_(a)
        x, _ = problem(ours, 9, 5, hx=False)
        got, want = packed(ours, x, None)[1], packed(theirs, x, None)[1]
        assert_same(got, want, 1e-3)
    assert len(padded) == 1


def test_gradients_of_one_result_at_a_time(padded):
    theirs, ours = twins("lstm", backend="auto", bidirectional=True, num_layers=2)
    x, _ = problem(ours, 9, 5)
    for k in range(3):
        found = []
        for module in (ours, theirs):
            result = tensors(packed(module, x, None))[k]
            weights = torch.linspace(-1, 1, result.numel()).view_as(result)
            leaves = [x, *module.parameters()]
            grads = torch.autograd.grad((result * weights).sum(), leaves, allow_unused=True)
            found.append([torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads)])
        assert_same(*found)
    assert len(padded) == 3


def test_dropout(padded):
    ours = rnn.LSTM(5, 7, 2, dropout=0.5)
    x, hx = problem(ours, 9, 5)
    assert not torch.equal(packed(ours, x, hx)[0].data, packed(ours, x, hx)[0].data)
    ours.eval()
    theirs = torch.nn.LSTM(5, 7, 2).eval()
    theirs.load_state_dict(ours.state_dict())
    assert_same(everything(ours, x, hx, packed), everything(theirs, x, hx, packed))
    assert len(padded) == 3


def test_the_output_may_be_changed(padded):
    ours = rnn.LSTM(5, 7)
    x, hx = problem(ours, 9, 5)

    def doubled(module, x, hx):
        output, state = packed(module, x, hx)
        output.data.mul_(2)
        return output, state

    def twice(module, x, hx):
        output, state = packed(module, x, hx)
        return output._replace(data=output.data * 2), state

    assert_same(everything(ours, x, hx, doubled), everything(ours, x, hx, twice))


def test_where_it_pays():
    for trained in (False, True):
        assert pays([8] * 9, 64, trained)
        assert not pays([64, *[1] * 99], 64, trained)
    assert pays([8] * 80 + [1] * 20, 256, False) and not pays([8] * 40 + [1] * 60, 256, False)
    assert not pays([8] * 90 + [7] * 10, 256, True)


def test_other_calls_are_not_padded(padded):
    x = torch.randn(9, 5, 5)
    for module in (rnn.GRU(5, 7), rnn.LSTM(5, 7, backend="torch"), rnn.LSTM(5, 7, proj_size=3)):
        packed(module, x, None)
    module = rnn.LSTM(5, 7, dtype=torch.float64)
    packed(module, x.double(), None)
    assert not padded


@each_cell
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("T", [9, 20])
def test_equally_long_sequences_have_the_bits_of_the_batch(cell, backend, T):
    _, ours = twins(cell, backend=backend, bidirectional=True, num_layers=2)
    x, hx = problem(ours, T, 3)

    def equal(module, x, hx):
        output, state = module(pack_padded_sequence(x, torch.tensor([T] * 3)), hx)
        return output.data.view(T, 3, -1), state

    got, want = everything(ours, x, hx, equal), everything(ours, x, hx)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


@each_cell
def test_explain_says_what_runs(cell):
    ours = twins(cell, backend="auto")[1]
    x = torch.randn(20, 5, 5)
    equal = pack_padded_sequence(x, torch.tensor([20] * 5))
    assert rnn.explain(ours, equal) == rnn.explain(ours, x)
    ragged = pack_padded_sequence(x, torch.tensor([20, 19, 18, 9, 9]))
    assert ("oneDNN" in rnn.explain(ours, ragged)) == (cell == "lstm")
