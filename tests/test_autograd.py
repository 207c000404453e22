"""Gradients as users take them: accumulated, clipped, scaled, and free of what is padding."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from twins import (
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
