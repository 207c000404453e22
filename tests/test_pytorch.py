"""The rest of PyTorch: meta and fake tensors, copies, tracers and compilers take rnn's modules as
they take torch.nn's."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence
from twins import H, I, assert_same, each_cell, tensors, twins

import rnn

ROOT = Path(__file__).parent.parent
DEEP = {"num_layers": 2, "bidirectional": True}
LENGTHS = torch.tensor([6, 0, 2])


class Net(nn.Module):
    """A model that holds a recurrent module."""

    def __init__(self, recurrent):
        super().__init__()
        self.rnn = recurrent
        self.out = nn.Linear(recurrent.hidden_size, 2)

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.out(y)


def nets(cell, **config):
    theirs, ours = (Net(m) for m in twins(cell, **config))
    ours.out.load_state_dict(theirs.out.state_dict())
    return theirs.eval(), ours.eval()


X, OTHER = torch.randn(6, 3, I), torch.randn(9, 4, I)

# Tensors without data.


@each_cell
def test_meta_device(cell):
    _, ours = twins(cell, backend="auto", **DEEP)
    ours.to("meta")
    for kwargs in ({}, {"lengths": LENGTHS}, {"lengths": LENGTHS.to("meta")}):
        output, state = ours(X.to("meta"), **kwargs)
        assert output.is_meta and output.shape == (6, 3, 2 * H)
        assert all(s.is_meta and s.shape == (4, 3, H) for s in tensors(state))
    materialised = ours.to_empty(device="cpu")
    other = twins(cell, **DEEP)[0]
    materialised.load_state_dict(other.state_dict())
    assert_same(materialised(X), other(X))
    assigned = twins(cell, **DEEP)[1].to("meta")
    assigned.load_state_dict(other.state_dict(), assign=True)
    assert_same(assigned(X), other(X))


@each_cell
@pytest.mark.parametrize(("hidden", "batch"), [(7, 3), (512, 8)])
def test_fake_tensors(cell, hidden, batch):
    with FakeTensorMode():
        _, ours = twins(cell, I, hidden, backend="auto")
        x = torch.randn(3, batch, I, requires_grad=True)
        output, _ = ours(x, lengths=torch.full((batch,), 2))
        assert output.shape == ours(x)[0].shape == (3, batch, hidden)
        output.sum().backward()
        assert x.grad.shape == x.shape


def test_import_under_another_device():
    code = """
import torch
with torch.device("meta"):
    import rnn
x, lengths = torch.randn(3, 2, 5), torch.tensor([3, 1])
for ours in (rnn.RNN(5, 7), rnn.GRU(5, 7), rnn.LSTM(5, 7)):
    theirs = getattr(torch.nn, type(ours).__name__)(5, 7)
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-6)
    assert ours(x, lengths=lengths)[0][2, 0].any() and not ours(x, lengths=lengths)[0][1:, 1].any()
print("right")
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.stdout.strip() == "right", process.stderr


@each_cell
def test_use_under_another_default_device(cell):
    _, ours = twins(cell, num_layers=2)
    packed = pack_sequence([X[:, 0], X[:2, 1]])
    expected = tensors((ours(X, lengths=LENGTHS), ours(packed)))
    with torch.device("meta"):
        assert_same(tensors((ours(X, lengths=LENGTHS), ours(packed))), expected)
    if cell == "lstm":
        projected = rnn.LSTM(I, H, proj_size=2)
        expected = projected(X, lengths=LENGTHS)
        with torch.device("meta"):
            assert_same(projected(X, lengths=LENGTHS), expected)


@each_cell
def test_a_default_device_changes_no_choice(cell):
    """It is a mode under which every tensor counts as one with operators of its own."""
    _, ours = twins(cell, backend="auto")
    x = torch.randn(20, 3, I)
    expected = rnn.explain(ours, x)
    with torch.device("cpu"):
        assert rnn.explain(ours, x) == expected


# Tensors of other classes.


class Sub(torch.Tensor):
    pass


class Watched(torch.Tensor):
    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper:
    """No tensor, but has one."""

    def __init__(self, data):
        self.data = data

    def __getattr__(self, name):
        value = getattr(self.data, name)
        if not callable(value) or isinstance(value, torch.device):
            return value
        method = getattr(torch.Tensor, name)
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def unwrapped(x):
            return x.data if isinstance(x, Wrapper) else x

        args, kwargs = torch.utils._pytree.tree_map(unwrapped, (args, kwargs or {}))
        results = func(*args, **kwargs)
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, results)


@each_cell
@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("kind", [Sub, Watched, Wrapper], ids=lambda k: k.__name__)
def test_inputs_of_other_classes(cell, T, kind):
    """Results are of the input's class; its own operators see torch's."""
    theirs, ours = twins(cell, backend="auto", num_layers=2)
    x = torch.randn(T, 3, I)
    Watched.calls.clear()
    results = ours(Wrapper(x) if kind is Wrapper else x.as_subclass(kind))
    results = [results[0], *(results[1] if cell == "lstm" else results[1:])]
    assert all(type(y) is kind for y in results)
    if kind is Watched:
        assert {"rnn_tanh", "rnn_relu", "gru", "lstm"} & set(Watched.calls) == {cell}
    bare = [y.data if kind is Wrapper else y.as_subclass(torch.Tensor) for y in results]
    assert_same(bare, theirs(x))


# Copies.


@each_cell
def test_copies_and_pickles(cell):
    _, ours = twins(cell, backend="torch", **DEEP)
    buffer, weights = io.BytesIO(), io.BytesIO()
    torch.save(ours, buffer)
    torch.save(ours.state_dict(), weights)
    for file in (buffer, weights):
        file.seek(0)
    loaded = twins(cell, **DEEP)[1]
    loaded.load_state_dict(torch.load(weights, weights_only=True))
    for other in (
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
        loaded,
    ):
        assert other.backend == "torch" and repr(other) == repr(ours)
        assert_same(other(X), ours(X))
    deep = copy.deepcopy(ours)
    with torch.no_grad():
        deep.weight_hh_l0.zero_()
    assert not torch.allclose(deep(X)[0], ours(X)[0])


@each_cell
def test_a_pickled_module_of_torch_nn_becomes_ours(cell):
    theirs, ours = twins(cell, **DEEP)
    old = pickle.loads(pickle.dumps(theirs))
    old.__class__ = type(ours)
    assert old.backend == "auto" and "layer 0" in rnn.explain(old, X, LENGTHS)
    assert_same(old(X), theirs(X))
    again = pickle.loads(pickle.dumps(old)).double()
    assert_same(again(X.double()), theirs.double()(X.double()))


# Tracers and compilers.


@each_cell
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_jit_trace(cell, frozen):
    """The loaded file takes other lengths and batches."""
    theirs, ours = nets(cell)
    ours.requires_grad_(not frozen)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, (X,)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert_same((loaded(X), loaded(OTHER)), (theirs(X), theirs(OTHER)))


@each_cell
def test_jit_script_of_a_parent(cell):
    theirs, ours = nets(cell)
    scripted = torch.jit.script(ours)
    assert_same((scripted(X), scripted(OTHER)), (theirs(X), theirs(OTHER)))


@pytest.mark.xfail(strict=True, reason="jit.script puts what it compiles in the parent's place")
def test_jit_script_leaves_the_parent_alone():
    ours = nets("gru")[1]
    torch.jit.script(ours)
    assert isinstance(ours.rnn, rnn.GRU)


@each_cell
def test_fx(cell):
    """A leaf of the graph, as torch.nn's modules."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    _, ours = nets(cell)
    traced = torch.fx.symbolic_trace(ours)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn", "out"]
    assert torch.equal(traced(X), ours(X))
    prepared = prepare_fx(ours, get_default_qconfig_mapping(), (X,))
    assert prepared(X).shape == (6, 3, 2)


@each_cell
def test_onnx(cell):
    onnx = pytest.importorskip("onnx")
    operator = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}[cell]
    file = io.BytesIO()
    torch.onnx.export(nets(cell)[1], (X,), file, dynamo=False)
    graph = onnx.load_from_string(file.getvalue()).graph
    assert operator in [node.op_type for node in graph.node]


# PyTorch's own tests.


def test_pytorchs_own_inputs_and_errors():
    pytest.importorskip("expecttest")  # which torch.testing._internal imports
    process = subprocess.run(
        [sys.executable, ROOT / "tests" / "module_db.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-2000:]
