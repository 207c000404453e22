"""rnn.explain: what runs for an input, and why; it refuses what the call refuses."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from twins import BACKENDS, H, I, each_cell, twins

import rnn

X = torch.randn(20, 3, I)
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@on_a_cpu
@each_cell
def test_says_why_not_the_kernels(cell):
    _, ours = twins(cell, num_layers=2, dtype=torch.float64, backend="auto")
    assert rnn.explain(ours, X.double()).splitlines() == [
        "layer 0: torch: the tensors are on cpu, not on a GPU",
        "layer 1: torch: the tensors are on cpu, not on a GPU",
    ]
    _, ours = twins(cell, backend="torch")
    assert rnn.explain(ours, X) == 'layer 0: torch: backend="torch" was asked for'


@on_a_cpu
@each_cell
def test_names_pytorchs_operator_where_it_runs(cell, monkeypatch):
    """And it does run there, and nowhere else."""
    _, ours = twins(cell, backend="auto", batch_first=True)
    ran = []
    by_operator = rnn.recurrent.RecurrentBase._by_operator
    monkeypatch.setattr(
        rnn.recurrent.RecurrentBase, "_by_operator", lambda m, p: ran.append(m) or by_operator(m, p)
    )
    x, packed = X.transpose(0, 1), pack_sequence([X[:, 0], X[:3, 1]])
    answers = []
    for T, lengths, grad in [
        (20, None, True),
        (15, None, True),
        (20, None, False),
        (20, torch.tensor([3, 0, 20]), True),
    ]:
        with torch.set_grad_enabled(grad):
            text = rnn.explain(ours, x[:, :T], lengths)
            ran.clear()
            ours(x[:, :T], lengths=lengths)
        answers.append(text.startswith("all layers: PyTorch's own operator: "))
        assert answers[-1] == bool(ran)
        assert not answers[-1] or "faster on a CPU" in text
    assert answers == [cell == "lstm", True, True, False]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            text = rnn.explain(ours, packed)
            ran.clear()
            ours(packed)
        assert bool(ran) == text.startswith("all layers") == (cell == "lstm" or not grad)


@on_a_cpu
@each_cell
def test_says_what_runs_the_segments(cell, monkeypatch):
    """That resets cut: packed rows, which other operators are faster on than on a batch."""
    _, ours = twins(cell, backend="auto")
    ran, answers = [], []
    by_operator = rnn.recurrent.RecurrentBase._by_operator
    monkeypatch.setattr(
        rnn.recurrent.RecurrentBase, "_by_operator", lambda m, p: ran.append(m) or by_operator(m, p)
    )
    for grad in (True, False):
        for resets in (torch.zeros(20, 3), torch.arange(60).view(20, 3) == 7):
            with torch.set_grad_enabled(grad):
                ran.clear()
                ours(X, resets=resets.bool())
                text = rnn.explain(ours, X, resets=resets.bool())
            answers.append(text.startswith("all layers: PyTorch's own operator: "))
            assert answers[-1] == bool(ran)
    assert answers == ([True] * 4 if cell == "lstm" else [False, False, True, True])
    nothing = torch.zeros(3, dtype=torch.int64)
    assert rnn.explain(ours, X, nothing, torch.zeros(20, 3, dtype=torch.bool)).startswith("layer 0")


def test_projection():
    ours = rnn.LSTM(I, H, proj_size=3, num_layers=2)
    assert rnn.explain(ours, X) == (
        "all layers: PyTorch's own operator: proj_size: no layer of ours has a projection"
    )


@each_cell
def test_batch_first_is_asked_about_its_batch(cell):
    """Of (B, T, I) and not of (T, B, I): an empty batch is told from an empty sequence."""
    config = {"batch_first": True, "device": "meta", "dtype": torch.bfloat16}
    ours = type(twins(cell)[1])(I, H, **config)
    empty = torch.randn(0, 4, I, device="meta", dtype=torch.bfloat16)
    assert rnn.explain(ours, empty).startswith("layer 0: torch: ")
    ours(empty)
    with pytest.raises(RuntimeError, match="sequence length"):
        rnn.explain(ours, empty.transpose(0, 1))


@each_cell
@pytest.mark.parametrize("backend", [BACKENDS[2]])
def test_shows_the_plan(cell, backend):
    _, ours = twins(cell, I, 40, backend=backend, bidirectional=True)
    text = rnn.explain(ours, X)
    assert text.startswith("layer 0: triton: W_hh stays in the SRAM")
    assert "2 direction(s)" in text


@each_cell
def test_nothing_is_computed(cell):
    _, ours = twins(cell)
    with torch.no_grad():
        for p in ours.parameters():
            p.fill_(float("nan"))
    ours.register_forward_hook(lambda *_: pytest.fail("explain ran the module"))
    before = torch.get_rng_state()
    rnn.explain(ours, X)
    assert torch.equal(before, torch.get_rng_state())


REFUSED = {
    "features": lambda m: (torch.randn(6, 3, I + 1),),
    "dimensions": lambda m: (X[None],),
    "dtype": lambda m: (X.double(),),
    "no sequence": lambda m: (X[:0],),
    "device": lambda m: (X.to("meta"),),
    "no tensor": lambda m: ([1.0],),
    "lengths too long": lambda m: (X, torch.tensor([1, 2, 21])),
    "lengths of another batch": lambda m: (X, torch.tensor([1, 2])),
    "lengths of a packed input": lambda m: (pack_sequence([X[:, 0]]), torch.tensor([20])),
    "resets of another shape": lambda m: (X, None, torch.zeros(3, 20, dtype=torch.bool)),
    "resets of another dtype": lambda m: (X, None, torch.zeros(20, 3)),
    "resets of a packed input": lambda m: (
        pack_sequence([X[:, 0]]),
        None,
        torch.zeros(20, 1, dtype=torch.bool),
    ),
}


@each_cell
@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_refuses_what_forward_refuses(cell, arguments):
    _, ours = twins(cell)
    x, *more = arguments(ours)
    with pytest.raises(Exception) as refused:
        ours(x, **dict(zip(("lengths", "resets"), more)))
    with pytest.raises(refused.type) as got:
        rnn.explain(ours, x, *more)
    assert str(got.value) == str(refused.value)


@on_a_cpu
@each_cell
@pytest.mark.parametrize("backend", [BACKENDS[2]])
def test_triton_where_it_cannot_run_raises(cell, backend):
    _, ours = twins(cell, backend=backend, dtype=torch.float64)
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here'):
        rnn.explain(ours, X.double())
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here'):
        ours(X.double())


@pytest.mark.parametrize(
    "module",
    [
        rnn.ManyToOne(I, H, 2),
        rnn.EncoderDecoder(I, I, H),
        torch.nn.RNN(I, H),
        torch.nn.LSTM(I, H),
        torch.nn.Linear(I, H),
        "rnn",
    ],
    ids=lambda m: type(m).__name__,
)
def test_other_modules_are_told_what_to_pass(module):
    name = type(module).__name__
    with pytest.raises(TypeError, match=rf"takes an rnn.RNN, GRU, LSTM or Recurrent .* got {name}"):
        rnn.explain(module, X)
