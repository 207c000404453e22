"""Derivatives of any order and form: second derivatives, batched gradients, forward mode, and
torch.func. The rule for each: equal to a loop, or to torch.nn in float64."""

import warnings

import pytest
import torch
from torch.autograd import functional as AF
from torch.autograd import gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import BACKENDS, I, assert_same, each_cell, gradients, objective, problem, tensors, twins

LENGTHS = torch.tensor([2, 4, 0])
DOUBLE = {"dtype": torch.float64}
BIDIRECTIONAL = {**DOUBLE, "bidirectional": True}

# Against finite differences.

CALLS = {
    "padded": {},
    "lengths": {"bidirectional": True},
    "packed": {"bidirectional": True},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


def function_of_all(module, call, T=3, B=2):
    """The module as a function of input, states and weights; and what to give it."""
    x, hx = problem(module, T=T, B=B)
    names = [n for n, _ in module.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    batch_sizes, lengths = torch.tensor([2, 1, 1]), torch.tensor([1, 3])
    if call == "packed":
        x = torch.randn(4, module.input_size, dtype=x.dtype).requires_grad_()
    states = len(tensors(hx))

    def f(x, *rest):
        state = rest[0] if states == 1 else rest[:states]
        given = PackedSequence(x, batch_sizes) if call == "packed" else x
        kwargs = {"lengths": lengths} if call == "lengths" else {}
        named = dict(zip(names, rest[states:]))
        return tuple(tensors(functional_call(module, named, (given, state), kwargs)))

    return f, (x, *tensors(hx), *weights)


@each_cell
@pytest.mark.parametrize("call", CALLS)
def test_first_derivatives(cell, call):
    """Batched and in forward mode, too."""
    f, inputs = function_of_all(twins(cell, 2, 3, **DOUBLE, **CALLS[call])[1], call)
    assert gradcheck(f, inputs, fast_mode=True, check_batched_grad=True)
    assert gradcheck(f, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


@each_cell
@pytest.mark.parametrize("call", CALLS)
def test_second_derivatives(cell, call):
    f, inputs = function_of_all(twins(cell, 2, 3, **DOUBLE, **CALLS[call])[1], call)
    assert gradgradcheck(f, inputs, fast_mode=True, check_batched_grad=True)


# Against torch.nn.


@each_cell
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_penalty(cell, backend, dtype):
    """A loss on the gradient of the input, through all parameters."""
    results = []
    for module in twins(cell, backend=backend, dtype=dtype, num_layers=2, bidirectional=True):
        x, hx = problem(module, T=20)
        (d_x,) = torch.autograd.grad(objective(module(x, hx)), x, create_graph=True)
        ((d_x.norm(dim=2) - 1) ** 2).mean().backward()
        results.append(gradients(module, x, hx))
    assert_same(*reversed(results))


@each_cell
def test_third_derivative(cell):
    """Any number of times, with padding that holds NaN."""
    theirs, ours = twins(cell, **BIDIRECTIONAL)
    x, _ = problem(ours, T=4)
    past = (torch.arange(4)[:, None] >= LENGTHS)[:, :, None]
    dirty = x.detach().masked_fill(past, float("nan")).requires_grad_()
    results = []
    for module, leaf in ((theirs, x), (ours, dirty)):
        if module is theirs:
            packed = pack_padded_sequence(x[:, :2], LENGTHS[:2], enforce_sorted=False)
            y = module(packed)[0].data.square().sum()
        else:
            y = module(leaf, lengths=LENGTHS)[0].square().sum()
        for _ in range(2):
            (d,) = torch.autograd.grad(y, leaf, create_graph=True)
            y = d.pow(3).sum()
        y.backward()
        results.append(gradients(module, leaf))
    assert_same(results[1], results[0])


@each_cell
@pytest.mark.parametrize("how", ["padded", "lengths", "packed"])
def test_is_grads_batched(cell, how):
    _, ours = twins(cell, **BIDIRECTIONAL)
    x, hx = problem(ours, T=4)
    if how == "packed":
        output = ours(pack_padded_sequence(x[:, :2], LENGTHS[:2], enforce_sorted=False))[0].data
    else:
        output = ours(x, hx, **({"lengths": LENGTHS} if how == "lengths" else {}))[0]
    leaves = [x, *ours.parameters()]
    many = torch.randn(3, *output.shape, dtype=output.dtype)
    batched = torch.autograd.grad(output, leaves, many, is_grads_batched=True, retain_graph=True)
    for k, d in enumerate(many):
        one = torch.autograd.grad(output, leaves, d, retain_graph=True)
        assert_same([b[k] for b in batched], one)


@each_cell
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [4, 20])
def test_is_grads_batched_whatever_engine_runs(cell, backend, T):
    _, ours = twins(cell, backend=backend)
    x, hx = problem(ours, T=T if backend != "triton" else 4)
    output = ours(x, hx)[0]
    leaves = [x, *tensors(hx), *ours.parameters()]
    many = torch.randn(3, *output.shape)
    batched = torch.autograd.grad(output, leaves, many, is_grads_batched=True, retain_graph=True)
    for k, d in enumerate(many):
        one = torch.autograd.grad(output, leaves, d, retain_graph=True)
        assert_same([b[k] for b in batched], one, 1e-2 if backend == "triton" else None)


def squares(results):
    return sum(y.square().sum() for y in tensors(results))


def last_state(module):
    return lambda x: tensors(module(x))[-1].sum((0, 1))


FORMS = {
    "jacobian": lambda f, x: AF.jacobian(f, x),
    "jacobian, vectorised": lambda f, x: AF.jacobian(f, x, vectorize=True),
    # PyTorch's own GRU and LSTM have no batching rule here.
    "jacobian, forward mode": lambda f, x: AF.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "hessian": lambda f, x: AF.hessian(lambda z: f(z).square().sum(), x),
    "hessian, vectorised": lambda f, x: AF.hessian(lambda z: f(z).square().sum(), x, True, True),
    "hvp": lambda f, x: AF.hvp(lambda z: f(z).square().sum(), x, torch.ones_like(x)),
    "func.grad": lambda f, x: grad(lambda z: f(z).square().sum())(x),
    "func.grad of grad": lambda f, x: grad(lambda y: grad(lambda z: f(z).pow(2).sum())(y).sum())(x),
    "func.vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x))),
    "func.jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    "func.jacrev": lambda f, x: jacrev(f)(x),
    "func.jacfwd": lambda f, x: jacfwd(f)(x),
    "func.jacrev of jacrev": lambda f, x: jacrev(jacrev(f))(x),
    "func.hessian": lambda f, x: hessian(lambda z: f(z).square().sum())(x),
}


@each_cell
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_derivative(cell, form):
    theirs, ours = twins(cell, 2, 3, **BIDIRECTIONAL)
    x = problem(ours, T=3)[0].detach()
    theirs_form = FORMS["jacobian"] if form is FORMS["jacobian, forward mode"] else form
    assert_same(form(last_state(ours), x), theirs_form(last_state(theirs), x))


@each_cell
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_in_float32_whatever_engine_auto_takes(cell, form):
    """oneDNN's LSTM has no second and no forward derivative: auto must not choose it there."""
    exact = twins(cell, 2, 3, **BIDIRECTIONAL)[0]
    _, ours = twins(cell, 2, 3, backend="auto", bidirectional=True)
    exact.load_state_dict({n: p.double() for n, p in ours.state_dict().items()})
    x = problem(ours, T=3)[0].detach()
    theirs_form = FORMS["jacobian"] if form is FORMS["jacobian, forward mode"] else form
    got, expected = form(last_state(ours), x), theirs_form(last_state(exact), x.double())
    for a, b in zip(tensors(got), tensors(expected)):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


# torch.func over batches: equal to a loop.


@each_cell
@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_the_batch(cell, in_dim):
    """Of unbatched calls, and of batched ones."""
    _, ours = twins(cell, **BIDIRECTIONAL)
    x, hx = (t.detach() for t in problem(ours)) if cell != "lstm" else problem(ours)
    alone = vmap(lambda z: ours(z)[0], in_dims=1, out_dims=1)(x.detach())
    assert_same(alone, ours(x)[0])
    many = torch.stack([x.detach(), 2 * x.detach()], in_dim)
    batched = vmap(lambda z: tensors(ours(z, hx)), in_dims=in_dim)(many)
    for k, z in enumerate((x, 2 * x)):
        assert_same([b[k] for b in batched], ours(z, hx))


@each_cell
def test_vmap_over_lengths(cell):
    _, ours = twins(cell, **BIDIRECTIONAL)
    x = problem(ours)[0].detach()
    many = torch.tensor([[6, 2, 0], [1, 1, 5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every operation has a batched form
        batched = vmap(lambda n: tensors(ours(x, lengths=n)))(many)
    for k, lengths in enumerate(many):
        assert_same([b[k] for b in batched], ours(x, lengths=lengths))


@each_cell
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("how", ["padded", "lengths"])
def test_per_sample_gradients(cell, how, backend):
    """vmap(grad) over the rows of a batch."""
    _, ours = twins(cell, backend=backend, num_layers=2, bidirectional=True)
    x = problem(ours)[0].detach()
    lengths = torch.tensor([6, 0, 3])
    weights = {n: p.detach() for n, p in ours.named_parameters()}

    def loss(weights, row, n):
        kwargs = {"lengths": n[None]} if how == "lengths" else {}
        return squares(functional_call(ours, weights, (row[:, None],), kwargs))

    found = vmap(grad(loss), in_dims=(None, 1, 0))(weights, x, lengths)
    for b in range(3):
        row = {"lengths": lengths[b : b + 1]} if how == "lengths" else {}
        ours.zero_grad()
        squares(ours(x[:, b : b + 1], **row)).backward()
        assert_same({n: g[b] for n, g in found.items()}, gradients(ours))


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru"])
def test_per_sample_gradients_by_expanded_weights(cell):
    """torch.nn.utils' other way, which oneDNN's LSTM has no part in."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    results = []
    for module in twins(cell):
        x = problem(module)[0]
        expanded = call_for_per_sample_grads(module, batch_size=3, batch_first=False)
        objective(expanded(x)).backward()
        results.append({n: p.grad_sample for n, p in module.named_parameters()})
    assert_same(*reversed(results))


@each_cell
def test_ensemble_of_stacked_weights(cell):
    _, ours = twins(cell, **BIDIRECTIONAL)
    x = problem(ours)[0].detach()
    members = [{n: p.detach() * k for n, p in ours.named_parameters()} for k in (1.0, 0.5)]
    stacked = {n: torch.stack([m[n] for m in members]) for n in members[0]}
    found = vmap(lambda w: tensors(functional_call(ours, w, (x,))))(stacked)
    for k, member in enumerate(members):
        assert_same([f[k] for f in found], functional_call(ours, member, (x,)))


@each_cell
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_ensemble_of_stacked_modules(cell, backend):
    """As PyTorch's guide builds one: each member on the same input, and each on its own."""
    members = [twins(cell, backend=backend, num_layers=2)[1] for _ in range(3)]
    for k, member in enumerate(members):
        with torch.no_grad():
            for p in member.parameters():
                p.mul_(1 - k / 4)
    weights, buffers = stack_module_state(members)
    inputs = torch.randn(3, 20, 2, I)

    def member(weights, buffers, x):
        return tensors(functional_call(members[0], (weights, buffers), (x,)))

    same = vmap(member, in_dims=(0, 0, None))(weights, buffers, inputs[0])
    own = vmap(member)(weights, buffers, inputs)
    for k, ours in enumerate(members):
        assert_same([y[k] for y in same], ours(inputs[0]))
        assert_same([y[k] for y in own], ours(inputs[k]))


@each_cell
def test_forward_mode_through_the_weights(cell):
    _, ours = twins(cell, **DOUBLE)
    x = problem(ours)[0].detach()
    weights = {n: p.detach() for n, p in ours.named_parameters()}
    direction = {n: torch.randn_like(p) for n, p in weights.items()}

    def output(w):
        return functional_call(ours, w, (x,))[0]

    _, tangent = jvp(output, (weights,), (direction,))
    step = 1e-6
    ahead, behind = (
        output({n: w + s * direction[n] for n, w in weights.items()}) for s in (step, -step)
    )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", [BACKENDS[2]])
def test_triton_says_that_it_cannot_be_transformed(backend):
    _, ours = twins("rnn_tanh", backend=backend)
    x = torch.randn(2, 3, I)
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(lambda z: ours(z)[0], in_dims=1)(x)
