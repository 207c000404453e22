"""The graph between the passes: saved tensors in other places and forms, activation checkpointing,
retained and freed graphs."""

import gc
import weakref

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from twins import (
    BACKENDS,
    DEEP,
    IEEE,
    LENGTHS,
    assert_same,
    each_backend,
    each_cell,
    everything,
    gradients,
    objective,
    problem,
    tensors,
    twins,
)

pytestmark = IEEE


def strided(x):
    spread = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)
    spread[..., 0] = x
    return spread[..., 0]


def offset(x):
    buffer = torch.full((x.numel() + 3,), float("nan"), dtype=x.dtype)
    buffer[3:] = x.flatten()
    return buffer[3:].view(x.shape)


KEPT = {
    "strided": lambda x: strided(x) if x.is_floating_point() else x,
    "offset": lambda x: offset(x) if x.is_floating_point() else x,
    "permuted": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ),
    "elsewhere": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "cloned": torch.clone,
}


@each_backend
@each_cell
@pytest.mark.parametrize(
    ("kept", "how"),
    [(kept, "lengths") for kept in KEPT]
    + [("strided", how) for how in ("padded", "packed", "batch-first")],
)
def test_saved_tensors_come_back_in_another_form(cell, kept, how, backend):
    if (cell, backend) == ("lstm", "auto") and how in ("padded", "batch-first"):
        pytest.skip("oneDNN's LSTM reads its saved tensors as they lay, in torch.nn.LSTM too")
    _, ours = twins(cell, backend=backend, batch_first=how == "batch-first", **DEEP)
    x, hx = problem(ours)

    def call(module, x, hx):
        if how == "packed":
            return module(pack_padded_sequence(x, torch.tensor([6, 4, 1])), hx)
        return module(x, hx, **({"lengths": LENGTHS} if how == "lengths" else {}))

    def hooked(module, x, hx):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: KEPT[kept](t.detach()), lambda t: t
        ):
            return call(module, x, hx)

    assert_same(everything(ours, x, hx, hooked), everything(ours, x, hx, call))


@each_cell
def test_saved_tensors_on_the_cpu(cell):
    _, ours = twins(cell, **DEEP)
    x, hx = problem(ours)
    expected = everything(ours, x, hx)
    with torch.autograd.graph.save_on_cpu():
        assert_same(everything(ours, x, hx), expected)


@each_backend
@each_cell
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(cell, reentrant, backend):
    """Dropout included: the second forward pass draws the masks of the first."""
    _, ours = twins(cell, backend=backend, dropout=0.5, **DEEP)
    x, hx = problem(ours)

    def call(module, x, hx):
        torch.manual_seed(1)
        return tensors(module(x, hx, lengths=LENGTHS))

    def saving(module, x, hx):
        torch.manual_seed(1)
        return checkpoint(
            lambda x, *hx: tuple(tensors(module(x, hx if len(hx) > 1 else hx[0], lengths=LENGTHS))),
            x,
            *tensors(hx),
            use_reentrant=reentrant,
        )

    expected = everything(ours, x, hx, call)
    assert_same(everything(ours, x, hx, saving), expected)


@each_backend
@each_cell
def test_retain_graph(cell, backend):
    """Twice through one graph gives twice the gradient; a freed one says so."""
    theirs, ours = twins(cell, backend=backend, **DEEP)
    x, hx = problem(ours)
    once = everything(theirs, x, hx)
    ours.zero_grad()
    x.grad = None
    results = ours(x, hx)
    loss = objective(results)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(gradients(ours, x), {n: 2 * y for n, y in once.items() if n in gradients(ours, x)})
    with pytest.raises(RuntimeError, match="second time"):
        objective(results).backward()


class Kept:
    """A saved tensor, in a form that tells when it is freed."""

    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize(
    "backend", ["torch", BACKENDS[2]]
)  # PyTorch's own operators hold on to them
@each_cell
def test_saved_tensors_are_freed_with_the_results(cell, backend):
    """Without the garbage collector: no cycle holds the memory of a pass that never went back."""
    _, ours = twins(cell, backend=backend, **DEEP)
    x, hx = problem(ours)
    alive = []

    def pack(x):
        kept = Kept(x)
        alive.append(weakref.ref(kept))
        return kept

    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.x):
            results = ours(x, hx)
        assert any(ref() for ref in alive)
        del results
        assert not any(ref() for ref in alive)
    finally:
        gc.enable()
