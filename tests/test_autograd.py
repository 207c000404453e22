"""Gradients as users take them: accumulated, clipped, scaled, after the output was changed in
place, and free of what is padding."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from twins import (
    BACKENDS,
    DEEP,
    IEEE,
    LENGTHS,
    H,
    I,
    assert_same,
    each_backend,
    each_cell,
    everything,
    gradients,
    objective,
    problem,
    row_by_row,
    tensors,
    twins,
)

import rnn

pytestmark = IEEE

# Accumulation, clipping, scaling.


def twice(module, x, hx):
    for _ in range(2):
        objective(module(x, hx)).backward()


def clipped(module, x, hx):
    objective(module(x, hx)).backward()
    nn.utils.clip_grad_norm_(module.parameters(), 0.5)


def clipped_one_by_one(module, x, hx):
    objective(module(x, hx)).backward()
    for p in module.parameters():
        p.grad.clamp_(-0.1, 0.1).mul_(3)


def unscaled(module, x, hx):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([*module.parameters(), x, *tensors(hx)], lr=0.0)
    scaler.scale(objective(module(x, hx))).backward()
    scaler.unscale_(optimizer)


def zeroed(module, x, hx):
    for _ in range(2):
        module.zero_grad(set_to_none=False)
        objective(module(x, hx)).backward()


def trained(module, x, hx):
    optimizer = torch.optim.SGD([x, *tensors(hx), *module.parameters()], 0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        clipped(module, x, hx)
        optimizer.step()


@each_backend
@each_cell
@pytest.mark.parametrize(
    "use", [twice, clipped, clipped_one_by_one, unscaled, zeroed, trained], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("config", [{}, DEEP], ids=["plain", "deep"])
def test_gradients_in_use(cell, config, use, backend):
    results = []
    for module in twins(cell, backend=backend, **config):
        x, hx = problem(module)
        use(module, x, hx)
        results.append(gradients(module, x, hx))
    assert_same(*reversed(results), tolerance=5e-5 if use is trained else None)


def assert_memory_of_their_own(found: dict) -> None:
    places = {x.untyped_storage().data_ptr() for x in found.values()}
    assert len(places) == len(found) > 0
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in found.values())


@each_backend
@each_cell
@pytest.mark.parametrize("call", ["padded", "lengths", "packed", "unbatched"])
@pytest.mark.parametrize("config", [{}, DEEP], ids=["plain", "deep"])
def test_no_two_gradients_share_memory(cell, config, call, backend):
    """Nor does one hold more memory than it is large."""
    _, ours = twins(cell, backend=backend, **config)
    x, hx = problem(ours)
    if call == "lengths":
        results = ours(x, hx, lengths=LENGTHS)
    elif call == "packed":
        results = ours(pack_padded_sequence(x, torch.tensor([6, 4, 1])), hx)
    elif call == "unbatched":
        x, hx = x.detach()[:, 0].requires_grad_(), None
        results = ours(x)
    else:
        results = ours(x, hx)
    objective(results).backward()
    found = {n: p.grad for n, p in ours.named_parameters()}
    found |= {str(k): t.grad for k, t in enumerate(tensors((x, hx)))}
    assert_memory_of_their_own(found)


PATTERNS = {
    rnn.OneToOne: ((I, H, 3), (torch.randn(4, I), torch.tensor([0, 1, 2, 0]))),
    rnn.ManyToOne: ((I, H, 3), (torch.randn(6, 4, I), torch.tensor([0, 1, 2, 0]))),
    rnn.ManyToMany: ((I, H, 3), (torch.randn(6, 4, I), torch.zeros(6, 4, dtype=torch.int64))),
    rnn.OneToMany: ((I, H, 9), (torch.randn(4, I), torch.ones(5, 4, dtype=torch.int64))),
    rnn.EncoderDecoder: (
        (9, 9, H),
        (torch.ones(6, 4, dtype=torch.int64), torch.ones(5, 4, dtype=torch.int64)),
    ),
}


@each_backend
@each_cell
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.__name__)
def test_no_two_gradients_of_a_pattern_share_memory(cell, pattern, backend):
    sizes, batch = PATTERNS[pattern]
    options = {"embedding": 4} if pattern is rnn.EncoderDecoder else {}
    if pattern in (rnn.ManyToOne, rnn.ManyToMany, rnn.EncoderDecoder):
        options["bidirectional"] = True
    model = pattern(*sizes, cell=cell, num_layers=2, backend=backend, **options)
    model.loss(*batch).backward()
    assert_memory_of_their_own({n: p.grad for n, p in model.named_parameters()})


@each_cell
def test_tied_weights(cell):
    """One parameter in both directions, and one tensor as both states."""
    results = []
    for module in twins(cell, dtype=torch.float64, bidirectional=True):
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.bias_ih_l0_reverse = module.bias_hh_l0
        x, hx = problem(module)
        state = tensors(hx)[0]
        results.append(
            everything(module, x, state, lambda m, x, s: m(x, (s, s) if cell == "lstm" else s))
        )
    assert_same(*reversed(results))


@each_backend
@each_cell
def test_frozen_parts(cell, backend):
    """Each of the leaves alone is given a gradient, and nothing else is."""
    theirs, ours = twins(cell, backend=backend, **DEEP)
    for wanted in range(len(tensors((*problem(ours), ours._flat_weights)))):
        results = []
        for module in (theirs, ours):
            x, hx = problem(module)
            for k, leaf in enumerate([*tensors((x, hx)), *module.parameters()]):
                leaf.requires_grad_(k == wanted)
            results.append(everything(module, x, hx))
        assert_same(*reversed(results))


@each_backend
@each_cell
def test_from_one_result_alone(cell, backend):
    theirs, ours = twins(cell, backend=backend, **DEEP)
    x, hx = problem(ours)
    for k in range(len(tensors(ours(x, hx)))):
        call = lambda m, x, hx, k=k: tensors(m(x, hx))[k]  # noqa: E731
        assert_same(everything(ours, x, hx, call), everything(theirs, x, hx, call))


# What is past the end of a row.


@each_backend
@each_cell
@pytest.mark.parametrize(  # every pair of the three
    "poison, batch_first, dropout",
    [
        ("nan", False, 0.0),
        ("nan", True, 0.5),
        ("inf", False, 0.5),
        ("inf", True, 0.0),
        ("-inf", False, 0.0),
        ("-inf", True, 0.5),
    ],
)
def test_padding_reaches_nothing(cell, poison, batch_first, dropout, backend):
    """In three layers and both directions: no result and no gradient; that of x is zero there."""
    config = {"num_layers": 3, "bidirectional": True, "batch_first": batch_first}
    theirs, ours = twins(cell, backend=backend, dropout=dropout, **config)
    x, hx = problem(ours)
    past = torch.arange(6)[:, None] >= LENGTHS
    past = past.t() if batch_first else past
    with torch.no_grad():
        dirty = x.masked_fill(past[:, :, None], float(poison)).requires_grad_()
    clean = x.detach().masked_fill(past[:, :, None], 0).requires_grad_()

    def call(module, x, hx):
        torch.manual_seed(3)
        return module(x, hx, lengths=LENGTHS)

    got = everything(ours, dirty, hx, call)
    assert all(torch.equal(y, got[n]) for n, y in everything(ours, clean, hx, call).items())
    assert not got["leaf 0"][past].any() and not got["result 0"][past].any()
    if not dropout:
        by_rows = everything(theirs, clean, hx, lambda m, x, hx: row_by_row(m, x, hx, LENGTHS))
        assert_same(got, by_rows)


@each_backend
@each_cell
def test_an_incoming_gradient_of_padding_is_not_read(cell, backend):
    _, ours = twins(cell, backend=backend, **DEEP)
    x, hx = problem(ours)
    past = (torch.arange(6)[:, None] >= LENGTHS)[:, :, None]
    results = []
    for poison in (0.0, float("nan")):
        ours.zero_grad()
        x.grad = None
        output, _ = ours(x, hx, lengths=LENGTHS)
        output.backward(torch.ones_like(output).masked_fill(past, poison))
        results.append(gradients(ours, x))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@each_backend
@each_cell
@pytest.mark.parametrize("through", ["numpy", "data", "out"])
def test_lengths_changed_between_the_passes(cell, through, backend):
    _, ours = twins(cell, backend=backend, **DEEP)
    x, hx = problem(ours)
    expected = everything(ours, x, hx, lambda m, x, hx: m(x, hx, lengths=LENGTHS))

    def call(module, x, hx):
        lengths = LENGTHS.clone()
        results = module(x, hx, lengths=lengths)
        if through == "numpy":
            lengths.numpy()[:] = 6
        elif through == "data":
            lengths.data.fill_(6)
        else:
            torch.full((3,), 6, out=lengths)
        return results

    got = everything(ours, x, hx, call)
    assert all(torch.equal(got[n], y) for n, y in expected.items())


# Changed in place after the call.


def masked(y):
    y[..., 2:] = 0


IN_PLACE = {
    "mul_": lambda y: y.mul_(2),
    "relu_": torch.relu_,
    "masked_fill_": lambda y: y.masked_fill_(torch.ones_like(y, dtype=torch.bool), 0.5),
    "y += x": lambda y: y.add_(torch.full_like(y, 0.5)),
    "y[mask] = 0": masked,
    "zero_": lambda y: y.zero_(),
    "inplace module": nn.LeakyReLU(0.1, inplace=True),
}


@each_cell
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("T", [6, 20])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
def test_results_changed_in_place(cell, change, T, batch_first, backend):
    """Output and states, before backward: torch.nn's gradients on a CPU."""
    config = {"num_layers": 2, "batch_first": batch_first, "dtype": torch.float32}
    theirs, ours = twins(cell, backend=backend, **config)
    x, hx = problem(ours, T=T)

    def call(module, x, hx):
        results = tensors(module(x, hx))
        for y in results if module is ours or cell != "lstm" else [r.clone() for r in results]:
            change(y)
        return results

    def as_torch_would(module, x, hx):  # oneDNN's LSTM refuses the change: of a copy
        results = [y.clone() for y in tensors(module(x, hx))]
        for y in results:
            change(y)
        return results

    expected = everything(theirs, x, hx, as_torch_would if cell == "lstm" else call)
    assert_same(everything(ours, x, hx, call), expected)


@each_cell
@pytest.mark.parametrize("how", ["lengths", "packed", "unbatched", "bidirectional"])
def test_results_of_other_calls_changed_in_place(cell, how):
    _, ours = twins(cell, bidirectional=how == "bidirectional")
    x, hx = problem(ours)

    def call(module, x, hx, copy=True):
        if how == "packed":
            results = module(pack_padded_sequence(x, torch.tensor([6, 4, 1])), hx)
        elif how == "unbatched":
            results = module(x[:, 0])
        else:
            results = module(x, hx, **({"lengths": LENGTHS} if how == "lengths" else {}))
        results = [y.clone() if copy else y for y in tensors(results)]
        for y in results:
            y.mul_(2).add_(1)
        return results

    in_place = everything(ours, x, hx, lambda *a: call(*a, copy=False))
    assert_same(in_place, everything(ours, x, hx, call))


@each_backend
@each_cell
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-major", "batch-first"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_results_are_detached_in_place(cell, batch_first, grad, backend):
    """Truncated back-propagation through time, as it is often written."""
    if (cell, backend, batch_first, grad) == ("lstm", "auto", True, False):
        pytest.skip("PyTorch's own operator returns a view here, in torch.nn.LSTM too")
    _, ours = twins(cell, backend=backend, batch_first=batch_first)
    x, hx = problem(ours)
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            output, hx = ours(x, hx)
        if grad:
            output.sum().backward()
        for y in (output, *tensors(hx)):
            assert not y.detach_().requires_grad


@pytest.mark.parametrize("backend", [BACKENDS[2]])
@each_cell
def test_the_kernels_say_that_their_output_was_changed(cell, backend):
    _, ours = twins(cell, backend=backend)
    x, hx = problem(ours)
    output, _ = ours(x, hx)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_backend
@each_cell
def test_weights_changed_between_the_passes_raise(cell, backend):
    """As in torch.nn: never a gradient of other weights than those that ran."""
    for module in twins(cell, backend=backend):
        x, hx = problem(module)
        loss = objective(module(x, hx))
        with torch.no_grad():
            module.weight_hh_l0.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_backend
@each_cell
@pytest.mark.parametrize("wanted", ["x", "x and hx", "all but weight_ih"])
def test_input_changed_in_place_where_no_gradient_reads_it(cell, wanted, backend):
    """As in torch.nn: with W_ih frozen only a second derivative needs it, and that one raises."""
    if (cell, backend) == ("lstm", "auto"):
        pytest.skip("oneDNN's LSTM keeps its input, in torch.nn.LSTM too")
    _, ours = twins(cell, backend=backend, bidirectional=True)
    for name, p in ours.named_parameters():
        p.requires_grad_(wanted == "all but weight_ih" and not name.startswith("weight_ih"))
    leaf, hx = problem(ours, T=20 if backend == "auto" else 4)
    if wanted == "x":
        hx = tuple(s.detach() for s in hx) if cell == "lstm" else hx.detach()
    found = []
    for change in (False, True):
        leaf.grad = None
        ours.zero_grad()
        x = leaf * 1
        results = ours(x, hx)
        if change:
            x.add_(1)
        objective(results).backward()
        found.append(gradients(ours, leaf))
    assert_same(*reversed(found))
    x = leaf * 1
    results = ours(x, hx)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(objective(results), leaf, create_graph=True)


@each_backend
@each_cell
def test_input_changed_in_place_where_a_gradient_reads_it(cell, backend):
    for module in twins(cell, backend=backend):
        leaf, hx = problem(module)
        x = leaf * 1
        results = module(x, hx)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            objective(results).backward()
