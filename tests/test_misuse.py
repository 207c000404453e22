"""What rnn's modules refuse: what torch.nn refuses, with its exceptions, and what is ours."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from twins import CELLS, H, I, each_cell, twins

import rnn

X = torch.randn(6, 3, I)
LENGTHS = torch.tensor([6, 5, 1])
PACKED = pack_padded_sequence(X, LENGTHS)


def state(module, *shape, dtype=torch.float32, device="cpu"):
    s = torch.zeros(*shape, dtype=dtype, device=device)
    return (s, s) if module.mode == "LSTM" else s


def replace(module, name, change):
    """Call module with a weight that is another."""
    setattr(module, name, nn.Parameter(change(getattr(module, name).detach())))
    return module(X)


MISUSE = {
    "no sequence": lambda m: m(torch.randn(0, 3, I)),
    "no sequence, unbatched": lambda m: m(torch.randn(0, I)),
    "4-D input": lambda m: m(X[None]),
    "1-D input": lambda m: m(torch.randn(I)),
    "0-D input": lambda m: m(torch.tensor(1.0)),
    "features": lambda m: m(torch.randn(6, 3, I + 1)),
    "features, unbatched": lambda m: m(torch.randn(6, I + 1)),
    "float64 input": lambda m: m(X.double()),
    "float64 input and hx": lambda m: m(X.double(), state(m, 1, 3, H, dtype=torch.float64)),
    "float16 input": lambda m: m(X.half()),
    "integer input": lambda m: m(torch.ones(6, 3, I, dtype=torch.long)),
    "bool input": lambda m: m(X > 0),
    "list": lambda m: m([1.0]),
    "tuple": lambda m: m((X,)),
    "array": lambda m: m(X.numpy()),
    "None": lambda m: m(None),
    "no argument": lambda m: m(),
    "input elsewhere": lambda m: m(X.to("meta")),
    "hx batch": lambda m: m(X, state(m, 1, 4, H)),
    "hx layers": lambda m: m(X, state(m, 2, 3, H)),
    "hx features": lambda m: m(X, state(m, 1, 3, H + 1)),
    "hx 2-D": lambda m: m(X, state(m, 3, H)),
    "hx 4-D": lambda m: m(X, state(m, 1, 1, 3, H)),
    "hx 3-D, unbatched": lambda m: m(X[:, 0], state(m, 1, 3, H)),
    "hx features, unbatched": lambda m: m(X[:, 0], state(m, 1, H + 1)),
    "hx float64": lambda m: m(X, state(m, 1, 3, H, dtype=torch.float64)),
    "hx integer": lambda m: m(X, state(m, 1, 3, H, dtype=torch.int64)),
    "hx elsewhere": lambda m: m(X, state(m, 1, 3, H, device="meta")),
    "hx a list of one": lambda m: m(X, [torch.zeros(1, 3, H)]),
    "hx a tuple of one": lambda m: m(X, (torch.zeros(1, 3, H),)),
    "hx a tuple of three": lambda m: m(X, (torch.zeros(1, 3, H),) * 3),
    "hx a tuple of none": lambda m: m(X, ()),
    "hx a pair of None": lambda m: m(X, (None, None)),
    "hx of the other kind": lambda m: (
        m(X, (torch.zeros(1, 3, H),) * 2) if m.mode != "LSTM" else m(X, torch.zeros(1, 3, H))
    ),
    "hx both in one": lambda m: m(X, torch.zeros(2, 1, 3, H)),
    "hx a number": lambda m: m(X, 0),
    "hx a dict": lambda m: m(X, {}),
    "c0 features": lambda m: m(X, (torch.zeros(1, 3, H), torch.zeros(1, 3, H + 1))),
    "c0 2-D": lambda m: m(X, (torch.zeros(1, 3, H), torch.zeros(3, H))),
    "c0 float64": lambda m: m(X, (torch.zeros(1, 3, H), torch.zeros(1, 3, H).double())),
    "packed hx batch": lambda m: m(PACKED, state(m, 1, 2, H)),
    "packed features": lambda m: m(pack_padded_sequence(X[..., 1:], LENGTHS)),
    "packed hx float64": lambda m: m(PACKED, state(m, 1, 3, H, dtype=torch.float64)),
    "packed elsewhere": lambda m: m(PACKED.to("meta")),
    "unknown argument": lambda m: m(X, h0=None),
    "too many arguments": lambda m: m(X, None, None, None),
    "weight of None": lambda m: (setattr(m, "weight_hh_l0", None), m(X)),
    "weight elsewhere": lambda m: replace(m, "weight_hh_l0", lambda w: w.to("meta")),
    "weight of float64": lambda m: replace(m, "weight_hh_l0", torch.Tensor.double),
    "module of float64": lambda m: m.double()(X),
    "nonlinearity": lambda m: type(m)(I, H, nonlinearity="sine"),
    "input size 0": lambda m: type(m)(0, H),
    "input size '5'": lambda m: type(m)("5", H),
    "hidden size 0": lambda m: type(m)(I, 0),
    "hidden size 1.5": lambda m: type(m)(I, 1.5),
    "no sizes": lambda m: type(m)(),
    "no layers": lambda m: type(m)(I, H, num_layers=0),
    "layers twice": lambda m: type(m)(I, H, 1, num_layers=2),
    "bias 1": lambda m: type(m)(I, H, bias=1),
    "batch_first 1": lambda m: type(m)(I, H, batch_first=1),
    "dropout 2": lambda m: type(m)(I, H, dropout=2),
    "dropout -1": lambda m: type(m)(I, H, dropout=-1),
    "dropout True": lambda m: type(m)(I, H, dropout=True),
    "proj_size H": lambda m: type(m)(I, H, proj_size=H),
    "proj_size -1": lambda m: type(m)(I, H, proj_size=-1),
    "unknown option": lambda m: type(m)(I, H, layers=2),
    "integer weights": lambda m: type(m)(I, H, dtype=torch.int32),
}


@pytest.mark.parametrize("backend", ["torch", "auto"])
@each_cell
@pytest.mark.parametrize("misuse", MISUSE.values(), ids=MISUSE)
def test_misuse_raises_what_torch_raises(misuse, cell, backend):
    theirs, ours = twins(cell, backend=backend)
    with pytest.raises(Exception) as expected:
        misuse(theirs)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(expected.type) as got:
        misuse(ours)
    assert got.type is expected.type and str(got.value)
    if len(before) == len(ours.state_dict()):
        assert all(p.shape == before[n].shape for n, p in ours.state_dict().items())


WORDED = [
    *("4-D input", "1-D input", "0-D input", "features", "features, unbatched"),
    *("hx batch", "hx layers", "hx features", "hx 2-D", "hx 4-D", "hx 3-D, unbatched"),
    *("hx features, unbatched", "c0 features", "c0 2-D", "packed hx batch", "packed features"),
]


@each_cell
@pytest.mark.parametrize("misuse", WORDED)
def test_wrong_dimensions_in_the_words_of_torch(misuse, cell):
    if misuse.startswith("c0") and cell != "lstm":
        misuse = misuse.replace("c0", "hx")
    if misuse.startswith("packed") and cell == "lstm":
        pytest.skip("torch.nn.LSTM leaves a packed input to its operator, which names matrices")
    theirs, ours = twins(cell)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        MISUSE[misuse](theirs)
    with pytest.raises(expected.type) as got:
        MISUSE[misuse](ours)
    assert str(got.value) == str(expected.value)


@each_cell
@pytest.mark.parametrize("config", [{}, {"num_layers": 2, "bidirectional": True}])
def test_check_forward_args_of_a_subclass_is_called(cell, config):
    """With the arguments that torch.nn gives it."""
    calls = []

    class Checked:
        def check_forward_args(self, input, hidden, batch_sizes):
            calls[-1].append((input, hidden, batch_sizes))
            super().check_forward_args(input, hidden, batch_sizes)
            if input.dim() == 3 and input.size(1) == 2:
                raise ValueError("not two rows")

    for module in twins(cell, **config):
        module.__class__ = type("Own", (Checked, type(module)), {})
        calls.append([])
        layers = 4 if config else 1
        module(X)
        module(X, state(module, layers, 3, H))
        module(X[:, 0])
        if cell != "lstm":  # torch.nn's does not call it for a packed sequence
            module(PACKED)
        with pytest.raises(ValueError, match="not two rows"):
            module(X[:, :2])
    for expected, got in zip(*calls, strict=True):
        torch.testing.assert_close(got, expected)


@each_cell
def test_check_forward_args_called_alone(cell):
    theirs, ours = twins(cell)
    for size in ((1, 3, H), (1, 2, H), (1, 3, H + 1)):
        hidden = state(ours, *size)
        if size == (1, 3, H):
            ours.check_forward_args(X, hidden, None)
            continue
        with pytest.raises(RuntimeError) as expected:
            theirs.check_forward_args(X, hidden, None)
        with pytest.raises(RuntimeError) as got:
            ours.check_forward_args(X, hidden, None)
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("cell", [c for c in CELLS if c != "lstm"])
@pytest.mark.parametrize("size", [0, 2])
def test_projections_are_for_lstm(cell, size):
    for module in twins(cell):
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            type(module)(I, H, proj_size=size)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ("4-D input", r"\w+: Expected input to be 2D or 3D, got 4D"),
        ("hx 2-D", r"For batched 3-D input, hx( and cx)? should also be 3-D but got \(?2-D"),
        ("hx 3-D, unbatched", r"For unbatched 2-D input, hx( and cx)? should also be 2-D but got"),
        ("features", r"input.size\(-1\) must be equal to input_size. Expected 5, got 6"),
        ("float64 input", r"RNN input dtype \(torch.float64\) does not match weight dtype"),
        ("hx batch", r"Expected hidden(\[0\])? size \(1, 3, 7\), got \[1, 4, 7\]"),
        ("input elsewhere", "Input and parameter tensors are not at the same device"),
        ("hx elsewhere", "Input and hidden tensors are not at the same device"),
    ],
)
@each_cell
def test_messages_are_torchs(cell, misuse, message):
    for module in twins(cell):
        with pytest.raises((ValueError, RuntimeError), match=message):
            MISUSE[misuse](module)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("weight_hh", 1, 1),
        ("weight_hh", -1, 0),
        ("weight_hh", 0, 1),
        ("weight_ih", 0, -1),
        ("bias_ih", 1, None),
        ("bias_hh", -1, None),
    ],
)
@each_cell
def test_a_weight_of_a_wrong_shape_raises(cell, name, rows, columns, layers, backend):
    """In the first layer and in the last, whatever runs it, before anything is read."""
    _, ours = twins(cell, backend=backend, num_layers=layers)
    name = f"{name}_l{layers - 1}"
    shape = [n + more for n, more in zip(getattr(ours, name).shape, (rows, columns))]
    setattr(ours, name, nn.Parameter(torch.zeros(shape)))
    with pytest.raises(RuntimeError, match=rf"{name} must be \(.*\), got \({shape[0]},"):
        ours(X)
    with pytest.raises(RuntimeError, match=name):
        rnn.explain(ours, X)


def test_a_projection_of_a_wrong_shape_raises():
    ours = rnn.LSTM(I, H, proj_size=3, bidirectional=True, num_layers=2)
    ours.weight_hr_l1_reverse = nn.Parameter(torch.zeros(4, H))
    with pytest.raises(RuntimeError, match=r"weight_hr_l1_reverse must be \(3, 7\), got \(4, 7\)"):
        ours(X)


@pytest.mark.parametrize(
    ("lengths", "error"),
    [
        ([6, 6, 6], TypeError),
        (torch.tensor([6.0, 6.0, 6.0]), TypeError),
        (torch.tensor([6, 6, 6], dtype=torch.int16), TypeError),
        (torch.tensor([True, True, True]), TypeError),
        (torch.tensor(6), ValueError),
        (torch.tensor([6, 6]), ValueError),
        (torch.tensor([[6, 6, 6]]), ValueError),
        (torch.tensor([7, 6, 6]), ValueError),
        (torch.tensor([-1, 6, 6]), ValueError),
    ],
    ids=str,
)
@each_cell
def test_lengths_are_checked(cell, lengths, error):
    _, ours = twins(cell)
    for call in (ours, lambda x, lengths: rnn.explain(ours, x, lengths)):
        with pytest.raises(error, match="lengths must"):
            call(X, lengths=lengths)


@each_cell
def test_lengths_need_a_batch(cell):
    _, ours = twins(cell)
    with pytest.raises(ValueError, match="batched"):
        ours(X[:, 0], lengths=torch.tensor([6]))
    with pytest.raises(ValueError, match="its own lengths"):
        ours(PACKED, lengths=LENGTHS)


@each_cell
def test_state_dict_of_another_shape_is_refused(cell):
    ours = twins(cell)[1]
    for config in ({"bias": False}, {"bidirectional": True}, {"num_layers": 2}):
        with pytest.raises(RuntimeError, match="state_dict"):
            ours.load_state_dict(twins(cell, **config)[0].state_dict())
    with pytest.raises(RuntimeError, match="state_dict"):
        ours.load_state_dict(twins(cell, I, H + 1)[0].state_dict())


@each_cell
def test_unknown_backend(cell):
    with pytest.raises(ValueError, match=r"auto.*triton.*torch.*'cuda'"):
        twins(cell, backend="cuda")
