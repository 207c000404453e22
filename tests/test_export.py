"""torch.export and AOTInductor: files that hold a model, for every number of steps and rows."""

import io
import shutil

import pytest
import torch
from torch.export import Dim, export
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import H, I, assert_same, each_cell, objective, problem, tensors, twins

import rnn

CONFIGS = {"plain": {}, "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True}}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
strictly_or_not = pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
X = torch.randn(6, 3, I)
BOTH = {"input": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}


def reloaded(exported):
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    return torch.export.load(file).module()


def results_and_gradients(module, x):
    module.zero_grad()
    x = x.detach().requires_grad_()
    results = module(x)
    objective(results).backward()
    return {
        **{str(k): y.detach() for k, y in enumerate(tensors(results))},
        **{n: p.grad.clone() for n, p in module.named_parameters()},
        "x": x.grad,
    }


def nodes(exported) -> list[str]:
    return [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]


@each_cell
@strictly_or_not
@each_config
def test_every_number_of_steps_and_rows(cell, strict, config):
    """One file, saved and loaded; gradients too."""
    theirs, ours = twins(cell, backend="auto", **config)
    exported = export(ours, (problem(ours)[0].detach(),), dynamic_shapes=BOTH, strict=strict)
    assert nodes(exported).count("fused_rnn.layer.default") == ours.num_layers
    loaded = reloaded(exported)
    for T, B in ((6, 3), (9, 4), (20, 2)):
        x = problem(ours, T=T, B=B)[0].detach()
        assert_same(results_and_gradients(loaded, x), results_and_gradients(theirs, x))


@each_cell
@strictly_or_not
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_fixed_number_of_steps(cell, strict, frozen):
    """The file holds PyTorch's operator alone, and so needs no rnn."""
    theirs, ours = twins(cell)
    ours.requires_grad_(not frozen)
    exported = export(ours, (X,), strict=strict)
    assert not any("fused_rnn" in name for name in nodes(exported))
    loaded = reloaded(exported)
    assert_same(loaded(X), theirs(X))
    if not frozen:
        assert_same(results_and_gradients(loaded, X), results_and_gradients(theirs, X))


@each_cell
@strictly_or_not
def test_a_fixed_number_of_steps_of_any_batch(cell, strict):
    theirs, ours = (m.requires_grad_(False) for m in twins(cell))
    exported = export(ours, (X,), dynamic_shapes={"input": {1: Dim("batch")}}, strict=strict)
    other = torch.randn(6, 4, I)
    assert_same(exported.module()(other), theirs(other))


@each_cell
@strictly_or_not
def test_lengths(cell, strict):
    _, ours = twins(cell, backend="auto")
    shapes = {**BOTH, "lengths": {0: Dim.DYNAMIC}}
    given = {"lengths": torch.tensor([6, 0, 2])}
    loaded = reloaded(export(ours, (X,), given, dynamic_shapes=shapes, strict=strict))
    x, lengths = torch.randn(9, 4, I), torch.tensor([2, 9, 0, 5])
    assert_same(loaded(x, lengths=lengths), ours(x, lengths=lengths))


class Packed(torch.nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.rnn = recurrent

    def forward(self, rows, batch_sizes, order, back):
        output, state = self.rnn(PackedSequence(rows, batch_sizes, order, back))
        return output.data, state


@each_cell
@strictly_or_not
def test_packed_rows(cell, strict):
    ours = Packed(twins(cell, backend="auto")[1])

    def pack(*lengths):
        x = torch.randn(max(lengths), len(lengths), I)
        return tuple(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False))

    names = ("rows", "batch_sizes", "order", "back")
    shapes = {name: {0: Dim.DYNAMIC} for name in names}
    loaded = reloaded(export(ours, pack(3, 5, 4), dynamic_shapes=shapes, strict=strict))
    other = pack(2, 7, 1, 3)
    assert_same(loaded(*other), ours(*other))


@strictly_or_not
def test_a_projection(strict):
    theirs, ours = twins("lstm", backend="auto", proj_size=4)
    loaded = reloaded(export(ours, (X,), dynamic_shapes=BOTH, strict=strict))
    x = torch.randn(9, 4, I)
    assert_same(results_and_gradients(loaded, x), results_and_gradients(theirs, x))


@each_cell
def test_a_second_derivative_of_what_was_loaded(cell):
    _, ours = twins(cell, dtype=torch.float64)
    loaded = reloaded(export(ours, (X.double(),), dynamic_shapes=BOTH))
    found = []
    for module in (loaded, ours):
        x = problem(ours)[0]
        (d_x,) = torch.autograd.grad(objective(module(x)), x, create_graph=True)
        found.append(torch.autograd.grad(d_x.square().sum(), x))
    assert_same(*found)


@each_cell
def test_frozen_in_the_file_and_trained_later(cell):
    """The file's op keeps nothing for a backward pass, which then runs the forward pass again."""
    theirs, ours = twins(cell, backend="auto")
    ours.requires_grad_(False)
    loaded = reloaded(export(ours, (X,), dynamic_shapes=BOTH)).requires_grad_(True)
    x = torch.randn(20, 4, I)
    assert_same(results_and_gradients(loaded, x), results_and_gradients(theirs, x))


@each_cell
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_aot_inductor(cell, dynamic, tmp_path):
    """Compiled ahead of time for the CPU, loaded and run. Of any number of steps the package has
    our op, and so runs in a process that has imported rnn."""
    _, ours = twins(cell, backend="auto")
    with torch.no_grad():
        exported = export(ours.eval(), (X,), dynamic_shapes=BOTH if dynamic else None)
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        for T, B in ((6, 3), (9, 4))[: 1 + dynamic]:
            x = torch.randn(T, B, I)
            assert_same(loaded(x), ours(x))


def test_kernels_alone_are_not_exported():
    ours = rnn.GRU(I, H, backend="triton")
    with pytest.raises(RuntimeError, match=r"cannot run here: torch\.export takes the operator"):
        export(ours, (X,))
