"""The op that a graph holds for each layer, and the op of its backward pass."""

import pytest
import torch
from twins import (
    BACKENDS,
    IEEE,
    I,
    assert_same,
    each_backend,
    each_cell,
    objective,
    problem,
    tensors,
    twins,
)

from rnn import dispatch
from rnn.kernels.limits import KernelUnavailable, NoPlan

pytestmark = [*IEEE, pytest.mark.usefixtures("fresh_compiler")]


def arguments(cell, lengths=False, backend="auto", dtype=torch.float32, projected=False, **config):
    """Of one layer, as a graph calls it; leaves."""
    options = {"proj_size": 3} if projected else {}
    ours = twins(cell, backend=backend, dtype=dtype, **config, **options)[1]
    x, hx = problem(ours)
    said = {
        "cell": cell,
        "directions": ours.directions,
        "reverse": False,
        "batch_first": ours.batch_first,
        "input_product": True,
        "bias": ours.bias,
        "stacked": True,
        "projected": projected,
        "backend": backend,
        "save": True,
    }
    given = torch.tensor([2, 6, 0]) if lengths is True else None
    sizes = None
    if lengths == "packed":
        x, sizes = torch.randn(9, I, dtype=dtype).requires_grad_(), torch.tensor([3, 3, 2, 1])
    return (x, [*tensors(hx), *ours._flat_weights], given, sizes), said


LAYERS = {
    "plain": {},
    "bidirectional": {"bidirectional": True, "batch_first": True},
    "lengths": {"lengths": True, "bidirectional": True},
    "packed": {"lengths": "packed", "bidirectional": True},
    "no bias, our engine": {"bias": False, "backend": "torch"},
    "our engine, batch first": {"batch_first": True, "backend": "torch"},
    "kernels": {"backend": "triton", "batch_first": True, "bidirectional": True},
    "float64": {"dtype": torch.float64},
}


each_way = pytest.mark.parametrize(
    "lengths", [False, True, "packed"], ids=["padded", "lengths", "packed"]
)


@each_cell
@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
def test_opcheck(cell, config):
    """PyTorch's own tests of an op: schema, fake tensors, autograd, dynamic shapes."""
    args, said = arguments(cell, **config)
    torch.library.opcheck(torch.ops.fused_rnn.layer.default, args, said)
    with torch.no_grad():
        output, *state_n, kept = torch.ops.fused_rnn.layer(*args, **said)
    x, weights, lengths, sizes = args
    del said["save"]
    leaves = [t.detach() for t in weights]
    for needs in ([True] * (1 + len(leaves)), [False, *[True] * len(leaves)]):
        d_outputs = [torch.randn_like(output), *([None] * len(state_n))]
        torch.library.opcheck(
            torch.ops.fused_rnn.layer_backward.default,
            (d_outputs, x.detach(), leaves, lengths, sizes, output, kept),
            {**said, "needs": needs},
        )


@each_way
def test_opcheck_of_a_projection(lengths):
    args, said = arguments("lstm", lengths, projected=True, bidirectional=True)
    torch.library.opcheck(torch.ops.fused_rnn.layer.default, args, said)


def of_leaves(args, said):
    """The op as a function of its leaves; and the leaves."""
    x, weights, lengths, sizes = args

    def f(x, *weights):
        return tuple(torch.ops.fused_rnn.layer(x, list(weights), lengths, sizes, **said)[:-1])

    return f, (x.detach().requires_grad_(), *(w.detach().requires_grad_() for w in weights))


@each_cell
@each_way
def test_derivatives_of_the_op(cell, lengths):
    f, leaves = of_leaves(*arguments(cell, lengths, dtype=torch.float64, bidirectional=True))
    check = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(f, leaves, **check)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@each_way
def test_derivatives_of_the_op_with_a_projection(lengths):
    f, leaves = of_leaves(*arguments("lstm", lengths, dtype=torch.float64, projected=True))
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


def gradients_of(args, said):
    f, leaves = of_leaves(args, said)
    results = f(*leaves)
    return [*results, *torch.autograd.grad(objective(results), leaves)]


@each_cell
@each_backend
def test_a_gradient_where_nothing_was_kept_for_one(cell, backend):
    """Exported with frozen weights, trained later: the forward pass runs again."""
    args, said = arguments(cell, lengths=True, backend=backend, bidirectional=True)
    expected = gradients_of(args, said)
    assert torch.ops.fused_rnn.layer(*args, **{**said, "save": False})[-1].numel() == 0
    assert_same(gradients_of(args, {**said, "save": False}), expected)


def fail(*args):
    raise KernelUnavailable("the compiler says no")


@pytest.mark.parametrize("pass_name", ["forward", "backward", "backward of another call"])
@each_cell
def test_a_kernel_that_does_not_compile_is_replaced_in_the_op(cell, pass_name, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_limits", lambda *args: dispatch.INTERPRETER)
    monkeypatch.setattr(dispatch, "_unavailable", {})
    args, said = arguments(cell, lengths=True, bidirectional=True)
    expected = gradients_of(args, {**said, "backend": "torch"})
    f, leaves = of_leaves(args, said)
    earlier = f(*leaves)  # by the kernels
    monkeypatch.setattr(dispatch.kernels, pass_name.split()[0], fail)
    assert_same(gradients_of(args, said), expected)
    (reason,) = dispatch._unavailable.values()
    assert isinstance(reason, NoPlan) and "the compiler says no" in reason.why
    if pass_name == "backward of another call":
        found = torch.autograd.grad(objective(earlier), leaves)
        assert_same(found, expected[len(earlier) :])


@pytest.mark.parametrize("backend", [BACKENDS[2]])
@pytest.mark.parametrize("pass_name", ["forward", "backward"])
def test_kernels_that_were_asked_for_raise_in_the_op(backend, pass_name, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch.kernels, pass_name, fail)
    with pytest.raises(KernelUnavailable, match="the compiler says no"):
        gradients_of(*arguments("gru", backend=backend))
