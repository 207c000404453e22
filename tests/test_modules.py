"""rnn.RNN in the place of torch.nn.RNN: what goes in, what comes out, what is refused."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnn

I, H = 5, 7
CONFIGS = {
    "plain": {},
    "relu": {"nonlinearity": "relu"},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "bidirectional": {"bidirectional": True},
    "deep": {"num_layers": 3, "bidirectional": True, "batch_first": True},
    "float64": {"dtype": torch.float64, "num_layers": 2},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def pair(**config):
    """torch.nn.RNN and rnn.RNN of one initialisation."""
    torch.manual_seed(0)
    theirs = torch.nn.RNN(I, H, **config)
    torch.manual_seed(0)
    return theirs, rnn.RNN(I, H, **config)


def results(module, *args, **kwargs):
    """output, h_n and the gradients of every floating argument and parameter."""
    leaves = [x.clone().requires_grad_() for x in args if x is not None]
    output, h_n = module(*leaves, **kwargs)
    generator = torch.Generator().manual_seed(1)

    def randn(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    inputs = [*leaves, *module.parameters()]
    gradients = torch.autograd.grad([output, h_n], inputs, [randn(output), randn(h_n)])
    return output, h_n, *gradients


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def inputs(config, unbatched=False):
    dtype = config.get("dtype", torch.float32)
    LD = config.get("num_layers", 1) * (1 + config.get("bidirectional", False))
    shape = (3, 6, I) if config.get("batch_first") else (6, 3, I)
    x, hx = torch.randn(shape, dtype=dtype), torch.randn(LD, 3, H, dtype=dtype)
    return (x[:, 0], hx[:, 0]) if unbatched else (x, hx)


@each_config
def test_same_parameters_of_the_same_seed(config):
    theirs, ours = pair(**config)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


@each_config
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
def test_same_results_and_gradients(config, unbatched, hx):
    theirs, ours = pair(**config)
    x, state = inputs(config, unbatched)
    args = (x, state) if hx else (x,)
    assert_same(results(ours, *args), results(theirs, *args))


@each_config
def test_state_dict_goes_both_ways(config):
    theirs, ours = pair(**config)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(1.0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    fresh = rnn.RNN(I, H, **config)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    x, hx = inputs(config)
    assert torch.equal(fresh(x, hx)[0], ours(x, hx)[0])


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("config", [CONFIGS["plain"], CONFIGS["deep"]], ids=["plain", "deep"])
def test_packed_sequence(config, enforce_sorted):
    theirs, ours = pair(**config)
    lengths = torch.tensor([6, 4, 1] if enforce_sorted else [1, 6, 4])
    x = torch.randn(6, 3, I)
    _, hx = inputs(config)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    got, want = ours(packed, hx), theirs(packed, hx)
    assert isinstance(got[0], PackedSequence)
    torch.testing.assert_close(got[0].data, want[0].data, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)
    for a, b in zip(got[0][1:], want[0][1:]):
        assert (a is None and b is None) or torch.equal(a, b)
    torch.testing.assert_close(ours(packed)[1], theirs(packed)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_are_packing_without_sorting(dtype):
    theirs, ours = pair(num_layers=2, bidirectional=True, batch_first=True)
    lengths = torch.tensor([2, 6, 5], dtype=dtype)
    x, hx = torch.randn(3, 6, I), torch.randn(4, 3, H)
    packed = pack_padded_sequence(x, lengths.long(), batch_first=True, enforce_sorted=False)
    want, want_h_n = theirs(packed, hx)
    want, _ = pad_packed_sequence(want, batch_first=True)
    output, h_n = ours(x, hx, lengths=lengths)
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h_n, want_h_n, rtol=1e-5, atol=1e-6)


def test_zero_length_row_keeps_its_state():
    _, ours = pair(num_layers=2, bidirectional=True)
    x, hx = torch.randn(6, 3, I), torch.randn(4, 3, H)
    output, h_n = ours(x, hx, lengths=torch.tensor([0, 6, 0]))
    assert torch.equal(h_n[:, [0, 2]], hx[:, [0, 2]])
    assert torch.equal(output[:, [0, 2]], torch.zeros(6, 2, 2 * H))


def test_empty_batch():
    theirs, ours = pair(bidirectional=True, num_layers=2)
    x = torch.randn(4, 0, I)
    got, want = results(ours, x), results(theirs, x)
    assert_same(got, want)


def test_non_contiguous_input():
    theirs, ours = pair(bidirectional=True)
    x = torch.randn(I, 3, 12).permute(2, 1, 0)[::2]
    assert_same(results(ours, x), results(theirs, x))


def test_dropout_lies_between_layers_in_training_alone():
    theirs, ours = pair(num_layers=2, dropout=0.5)
    x, _ = inputs({})
    torch.manual_seed(3)
    output, h_n = ours(x)
    assert not torch.allclose(output, theirs.eval()(x)[0])
    torch.testing.assert_close(h_n[0], theirs(x)[1][0])  # before the dropout
    torch.testing.assert_close(ours.eval()(x)[0], theirs(x)[0])
    dropped = rnn.RNN(I, H, num_layers=2, dropout=1.0)
    dropped.load_state_dict(ours.state_dict())
    zeros = torch.zeros(6, 3, H)
    second = rnn.RNN(H, H)
    second.load_state_dict(
        {n.replace("l1", "l0"): p for n, p in ours.state_dict().items() if "l1" in n}
    )
    torch.testing.assert_close(dropped(x)[0], second(zeros)[0])


def test_backward_in_eval_mode():
    theirs, ours = pair()
    x, hx = inputs({})
    assert_same(results(ours.eval(), x, hx), results(theirs.eval(), x, hx))


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
def test_autocast(hx):
    theirs, ours = pair(num_layers=2)
    x, state = inputs({"num_layers": 2})
    args = (x, state) if hx else (x,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = ours(*args), theirs(*args)
    for a, b in zip(got, want):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    sum(x.float().sum() for x in got).backward()
    assert ours.weight_hh_l0.grad.dtype == torch.float32


def test_copies_and_pickles():
    _, ours = pair(bidirectional=True, num_layers=2)
    x, _ = inputs({})
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x)[0], ours(x)[0])


def test_functional_call():
    _, ours = pair()
    x, _ = inputs({})
    zeros = {n: torch.zeros_like(p) for n, p in ours.named_parameters()}
    assert torch.equal(torch.func.functional_call(ours, zeros, (x,))[0], torch.zeros(6, 3, H))


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares on the CPU")
@pytest.mark.parametrize("tf32", [False], indirect=True, ids=["ieee"])
def test_kernels_train_a_deep_stack(tf32):
    """The module over the kernels, all of it, against torch.nn.RNN."""
    config = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    theirs, _ = pair(**config)
    ours = rnn.RNN(I, H, **config, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    x, hx = inputs(config)
    assert_same(results(ours, x, hx), results(theirs, x, hx))


X, HX = torch.randn(6, 3, I), torch.randn(1, 3, H)
MISUSE = {
    "no sequence": lambda m: m(torch.randn(0, 3, I)),
    "no sequence, unbatched": lambda m: m(torch.randn(0, I)),
    "4-D input": lambda m: m(X[None]),
    "1-D input": lambda m: m(torch.randn(I)),
    "features": lambda m: m(torch.randn(6, 3, I + 1)),
    "float64 input": lambda m: m(X.double()),
    "integer input": lambda m: m(torch.ones(6, 3, I, dtype=torch.long)),
    "no tensor": lambda m: m([1.0]),
    "None": lambda m: m(None),
    "input elsewhere": lambda m: m(X.to("meta")),
    "hx batch": lambda m: m(X, torch.randn(1, 4, H)),
    "hx layers": lambda m: m(X, torch.randn(2, 3, H)),
    "hx features": lambda m: m(X, torch.randn(1, 3, H + 1)),
    "hx 2-D": lambda m: m(X, HX[0]),
    "hx 3-D, unbatched": lambda m: m(X[:, 0], HX),
    "hx float64": lambda m: m(X, HX.double()),
    "hx elsewhere": lambda m: m(X, HX.to("meta")),
    "hx no tensor": lambda m: m(X, [HX]),
    "packed hx": lambda m: m(
        pack_padded_sequence(X, torch.tensor([6, 5, 1])), torch.randn(1, 2, H)
    ),
    "packed features": lambda m: m(pack_padded_sequence(X[..., 1:], torch.tensor([6, 5, 1]))),
    "nonlinearity": lambda m: type(m)(I, H, nonlinearity="sine"),
    "hidden size 0": lambda m: type(m)(I, 0),
    "hidden size 1.5": lambda m: type(m)(I, 1.5),
    "no layers": lambda m: type(m)(I, H, num_layers=0),
    "bias 1": lambda m: type(m)(I, H, bias=1),
    "dropout 2": lambda m: type(m)(I, H, dropout=2),
    "proj_size": lambda m: type(m)(I, H, proj_size=2),
}


@pytest.mark.parametrize("misuse", MISUSE.values(), ids=MISUSE)
def test_misuse_raises_what_torch_raises(misuse):
    theirs, ours = pair()
    with pytest.raises(Exception) as want:
        misuse(theirs)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(want.type) as got:
        misuse(ours)
    assert got.type is want.type and str(got.value)
    assert all(torch.equal(p, before[n]) for n, p in ours.state_dict().items())


@pytest.mark.parametrize(
    ("lengths", "error"),
    [
        ([6, 6, 6], TypeError),
        (torch.tensor([6.0, 6.0, 6.0]), TypeError),
        (torch.tensor([6, 6, 6], dtype=torch.int16), TypeError),
        (torch.tensor([6, 6]), ValueError),
        (torch.tensor([[6, 6, 6]]), ValueError),
        (torch.tensor([7, 6, 6]), ValueError),
        (torch.tensor([-1, 6, 6]), ValueError),
    ],
    ids=str,
)
def test_lengths_are_checked(lengths, error):
    _, ours = pair()
    with pytest.raises(error, match="lengths must"):
        ours(X, lengths=lengths)


def test_lengths_need_a_batch():
    _, ours = pair()
    with pytest.raises(ValueError, match="batched"):
        ours(X[:, 0], lengths=torch.tensor([6]))
    packed = pack_padded_sequence(X, torch.tensor([6, 5, 1]))
    with pytest.raises(ValueError, match="its own lengths"):
        ours(packed, lengths=torch.tensor([6, 5, 1]))


def test_state_dict_of_another_shape_is_refused():
    _, ours = pair()
    for other in (rnn.RNN(I, H, bias=False), rnn.RNN(I, H + 1), rnn.RNN(I, H, bidirectional=True)):
        with pytest.raises(RuntimeError, match="state_dict"):
            ours.load_state_dict(other.state_dict())


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"auto.*triton.*torch.*'cuda'"):
        rnn.RNN(I, H, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_explain_says_why_not():
    ours = rnn.RNN(I, H, num_layers=2)
    assert rnn.explain(ours, X).splitlines() == [
        "layer 0: torch: the tensors are on cpu, not on a GPU",
        "layer 1: torch: the tensors are on cpu, not on a GPU",
    ]
    assert "asked for" in rnn.explain(rnn.RNN(I, H, backend="torch"), X)
    large = rnn.RNN(I, 4096, backend="triton", device="meta")
    with pytest.raises(RuntimeError, match="hidden size 4096"):
        rnn.explain(large, X)


def test_explain_shows_the_plan():
    text = rnn.explain(rnn.RNN(I, 100, backend="triton", bidirectional=True), X)
    assert text.startswith("layer 0: triton: W_hh stays in the SRAM")
    assert "2 direction(s)" in text
