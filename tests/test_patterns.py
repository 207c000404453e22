"""The five sequence patterns: what comes out, what is learned from, what is refused."""

import math

import pytest
import torch
from pattern_models import (
    FORMS,
    LENGTHS,
    B,
    H,
    I,
    T,
    V,
    each_form,
    each_one_way,
    inputs,
    make,
    symbols,
)
from twins import CELLS, KINDS

import rnn
from rnn.loss import IGNORED, cross_entropy


def by_torch_nn(module, x):
    """The output of torch.nn's module with the same weights, where it has one direction."""
    network, _, told = KINDS[module.cell]
    twin = network(x.size(-1), H, module.num_layers, dtype=x.dtype, **told)
    twin.load_state_dict(module.state_dict())
    return twin(x)[0]


def mean_nats(logits, labels):
    """Cross-entropy by its definition, over label tuples (index of logits, label)."""
    return -sum(logits[at].log_softmax(-1)[label] for at, label in labels) / len(labels)


# Each pattern is its drawing


@each_one_way
def test_one_to_one_is_a_plain_network(form):
    model, x = make(rnn.OneToOne, form), inputs(form, B)
    want = by_torch_nn(model.rnn, model.embedding(x)[None])[0] @ model.readout.weight.t()
    torch.testing.assert_close(model(x), want)


@each_one_way
def test_many_to_one_reads_out_the_last_state(form):
    model, x = make(rnn.ManyToOne, form), inputs(form, T, B)
    want = by_torch_nn(model.rnn, model.embedding(x))[-1] @ model.readout.weight.t()
    torch.testing.assert_close(model(x), want)


@each_one_way
def test_many_to_many_reads_out_each_state(form):
    model, x = make(rnn.ManyToMany, form), inputs(form, T, B)
    want = by_torch_nn(model.rnn, model.embedding(x)) @ model.readout.weight.t()
    torch.testing.assert_close(model(x), want)


@each_one_way
def test_one_to_many_writes_from_its_condition_and_the_symbol_before(form):
    model, x, targets = make(rnn.OneToMany, form), inputs(form, B), symbols(T, B)
    c = model.condition(model.embedding(x))
    steps = torch.stack([c, *(c + model.symbols(y) for y in targets)])
    want = by_torch_nn(model.rnn, steps) @ model.readout.weight.t()
    assert want.shape == (T + 1, B, V)
    torch.testing.assert_close(model(x, targets), want)


@each_form
def test_encoder_decoder_is_many_to_one_then_one_to_many(form):
    model, x, targets = make(rnn.EncoderDecoder, form), inputs(form, T, B), symbols(3, B)
    last = model.encode(x)
    if not model.encoder.bidirectional:
        torch.testing.assert_close(last, by_torch_nn(model.encoder, model.embedding(x))[-1])
    assert last.shape == (B, model.encoder.directions * H)
    assert torch.equal(model(x, targets), model.decoder(last, targets))
    assert torch.equal(model.loss(x, targets), model.decoder.loss(last, targets))


@pytest.mark.parametrize("pattern", [rnn.ManyToOne, rnn.EncoderDecoder])
def test_both_directions_end_where_they_should(pattern):
    """A bidirectional model reads the last state of each direction, not both at one step."""
    form = FORMS["bidirectional"]
    model, x = make(pattern, form), inputs(form, T, B)
    module = model.rnn if pattern is rnn.ManyToOne else model.encoder
    output, _ = module(x)
    want = torch.cat((output[-1, :, :H], output[0, :, H:]), 1)
    got = model.encode(x) if pattern is rnn.EncoderDecoder else model(x)
    weight = torch.eye(2 * H) if pattern is rnn.EncoderDecoder else model.readout.weight
    torch.testing.assert_close(got, want @ weight.double().t())


# Lengths


@each_form
def test_many_to_one_and_many_to_many_heed_the_lengths(form):
    x = inputs(form, T, B)
    one, many = make(rnn.ManyToOne, form), make(rnn.ManyToMany, form)
    labels, label = symbols(T, B, low=0), symbols(B, low=0)
    got_one, got_many = one(x, LENGTHS), many(x, LENGTHS)
    pairs = []
    for b, n in enumerate(LENGTHS.tolist()):
        alone = x[:n, b : b + 1]
        torch.testing.assert_close(got_one[b], one(alone)[0] if n else torch.zeros(V).double())
        if n:
            torch.testing.assert_close(got_many[:n, b], many(alone)[:, 0])
        assert not got_many[n:, b].any()
        pairs += [((t, b), int(labels[t, b])) for t in range(n)]
    torch.testing.assert_close(many.loss(x, labels, LENGTHS), mean_nats(got_many, pairs))
    want = mean_nats(got_one, [(b, int(label[b])) for b in range(B)])
    torch.testing.assert_close(one.loss(x, label, LENGTHS), want)


@each_one_way
def test_one_to_many_learns_its_targets_and_their_ends_and_nothing_behind(form):
    model, x, targets = make(rnn.OneToMany, form), inputs(form, B), symbols(T, B)
    padded = targets.masked_fill(torch.arange(T)[:, None] >= LENGTHS, IGNORED)
    pairs, rows = [], []
    for b, n in enumerate(LENGTHS.tolist()):
        rows.append(model(x[b : b + 1], targets[:n, b : b + 1])[:, 0])
        torch.testing.assert_close(model(x, padded, LENGTHS)[: n + 1, b], rows[b])
        pairs += [((b, t), int(targets[t, b])) for t in range(n)] + [((b, n), 0)]
    logits = {at: rows[at[0]][at[1]] for at, _ in pairs}
    want = mean_nats(logits, pairs)
    torch.testing.assert_close(model.loss(x, padded, LENGTHS), want)
    grown = model.loss(x, torch.cat((padded, padded)), LENGTHS)  # more padding
    torch.testing.assert_close(grown, want)


@each_form
def test_encoder_decoder_heeds_the_lengths_of_both(form):
    model, x, targets = make(rnn.EncoderDecoder, form), inputs(form, T, B), symbols(3, B)
    ends = torch.tensor([3, 2, 0, 1])
    want = model(x, targets, LENGTHS, ends)
    poisoned = x.clone()
    poisoned[torch.arange(T)[:, None] >= LENGTHS] = 0
    torch.testing.assert_close(model(poisoned, targets, LENGTHS, ends), want)
    for b, (n, m) in enumerate(zip(LENGTHS.tolist(), ends.tolist())):
        if n:
            alone = model(x[:n, b : b + 1], targets[:m, b : b + 1])
            torch.testing.assert_close(want[: m + 1, b], alone[:, 0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("pattern", [rnn.ManyToOne, rnn.ManyToMany, rnn.EncoderDecoder])
def test_every_weight_learns(pattern, cell):
    model = make(pattern, {"cell": cell, "embedding": 3, "num_layers": 2})
    x = inputs({"embedding": 3}, T, B)
    labels = symbols(B) if pattern is rnn.ManyToOne else symbols(T, B)
    model.loss(x, labels, LENGTHS).backward()
    for name, weight in model.named_parameters():
        assert weight.grad.any(), name


def test_a_loss_is_the_mean_over_the_labels_that_count():
    logits, labels = torch.randn(5, 3, V), symbols(5, 3, low=0)
    labels[1:3, 0] = labels[4] = IGNORED
    pairs = [(tuple(at), int(labels[tuple(at)])) for at in (labels != IGNORED).nonzero().tolist()]
    torch.testing.assert_close(cross_entropy(logits, labels), mean_nats(logits, pairs))


NOTHING = {  # where nothing is to be predicted
    "labels": (rnn.ManyToMany, lambda m, x: m.loss(x, torch.full((T, B), IGNORED))),
    "lengths": (rnn.ManyToMany, lambda m, x: m.loss(x, symbols(T, B), torch.zeros(B).long())),
    "label": (rnn.ManyToOne, lambda m, x: m.loss(x, torch.full((B,), IGNORED))),
    "step": (rnn.OneToOne, lambda m, x: m.loss(x[0], torch.full((B,), IGNORED))),
    "no-rows": (rnn.OneToOne, lambda m, x: m.loss(x[0, :0], symbols(0))),
}


@pytest.mark.parametrize("form", [FORMS["symbols"], FORMS["deep"]], ids=["symbols", "deep"])
@pytest.mark.parametrize("pattern, loss_of", NOTHING.values(), ids=NOTHING)
def test_the_loss_of_nothing_is_zero_and_so_are_its_gradients(pattern, loss_of, form):
    model = make(pattern, form)
    loss = loss_of(model, inputs(form, T, B))
    loss.backward()
    assert loss.item() == 0
    for name, weight in model.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name


# Streaming


@pytest.mark.parametrize("pieces", [[1] * T, [2, 4], [6]], ids=str)
@each_one_way
def test_a_stream_in_pieces_is_the_whole(form, pieces):
    model, x = make(rnn.ManyToMany, form), inputs(form, T, B)
    state, logits = None, []
    for piece in x.split(pieces):
        got, state = model.stream(piece, state)
        logits.append(got)
    torch.testing.assert_close(torch.cat(logits), model(x))


def test_a_bidirectional_model_cannot_stream():
    with pytest.raises(ValueError, match="cannot stream"):
        make(rnn.ManyToMany, FORMS["bidirectional"]).stream(inputs({}, T, B))


# On the kernels


@pytest.mark.parametrize("pattern", [rnn.ManyToOne, rnn.ManyToMany, rnn.EncoderDecoder])
def test_the_kernels_give_the_same(pattern):
    """Losses, every gradient and what is written, in Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    form = {"embedding": 3, "bidirectional": True, "cell": "rnn_tanh"}
    labels = symbols(B) if pattern is rnn.ManyToOne else symbols(T, B)
    x, results = inputs(form, T, B), []
    for backend, dtype, where in (("torch", "float64", "cpu"), ("triton", "float32", device)):
        model = make(pattern, {**form, "backend": backend}).to(where, getattr(torch, dtype))
        loss = model.loss(x.to(where), labels.to(where), LENGTHS)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss.detach(), *gradients])
        if pattern is rnn.EncoderDecoder:
            got = model.generate(x.to(where), LENGTHS, max_length=3, beam=2)
            results[-1] += [got.symbols, got.scores]
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got.cpu().double(), want.double(), rtol=1e-3, atol=1e-3)


# What is refused


MANY, WRITER = (rnn.ManyToMany, rnn.OneToMany)


@pytest.mark.parametrize(
    "pattern", [getattr(rnn, name) for name in rnn.__all__ if name[0] in "OME"]
)
@pytest.mark.parametrize(
    "options, says",
    [
        ({"cell": "elman"}, "cell must be one of"),
        ({"batch_first": True}, "batch_first is not supported"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
    ids=["cell", "batch_first", "backend"],
)
def test_constructors_refuse(pattern, options, says):
    with pytest.raises(ValueError, match=says):
        pattern(I, H, V, **options)


@pytest.mark.parametrize("pattern", [rnn.OneToMany, rnn.EncoderDecoder])
def test_an_end_that_is_no_symbol(pattern):
    with pytest.raises(ValueError, match=r"end must lie in \[0, 6\), got 6"):
        pattern(I, H, V, end=V)


def test_a_writer_has_no_second_direction():
    with pytest.raises(ValueError, match="bidirectional"):
        rnn.OneToMany(I, H, V, bidirectional=True)


REFUSED = {
    "labels": (ValueError, "labels must be", lambda m, w: m.loss(inputs({}, T, B), symbols(T, 1))),
    "targets-rows": (RuntimeError, "targets must be", lambda m, w: w(inputs({}, B), symbols(T, 3))),
    "targets-dim": (RuntimeError, "targets must be", lambda m, w: w(inputs({}, B), symbols(B))),
    "lengths-range": (
        ValueError,
        r"lie in \[0, 6\], got values from 0 to 7",
        lambda m, w: w.loss(inputs({}, B), symbols(T, B), torch.tensor([7, 0, 1, 2])),
    ),
    "lengths-shape": (
        ValueError,
        "lengths must have shape",
        lambda m, w: w(inputs({}, B), symbols(T, B), LENGTHS[:2]),
    ),
    "lengths-dtype": (
        TypeError,
        "int32 or int64",
        lambda m, w: m(inputs({}, T, B), LENGTHS.double()),
    ),
    "no-steps": (RuntimeError, "larger than 0", lambda m, w: m(inputs({}, 0, B))),
    "input-size": (RuntimeError, "must be equal", lambda m, w: m(inputs({}, T, B)[..., :3])),
    "dtype": (ValueError, "dtype", lambda m, w: m(inputs({}, T, B).float())),
    **{
        f"{name}-{value}": (
            TypeError,
            f"{name} must be an int, got ",
            lambda m, w, name=name, value=value: w.generate(
                inputs({}, B), **{"max_length": 2, name: value}
            ),
        )
        for name in ("max_length", "beam")
        for value in (2.5, 2.0, math.inf, math.nan, True, "2", None)
    },
    **{
        f"temperature-{value}": (
            TypeError,
            "temperature must be a number, got ",
            lambda m, w, value=value: w.generate(inputs({}, B), max_length=2, temperature=value),
        )
        for value in ("1", None, True, 1j)
    },
    "max-length": (ValueError, "at least 1", lambda m, w: w.generate(inputs({}, B), max_length=0)),
    "beam": (
        ValueError,
        "at least 1",
        lambda m, w: w.generate(inputs({}, B), max_length=2, beam=0),
    ),
    "temperature": (
        ValueError,
        "finite and at least 0",
        lambda m, w: w.generate(inputs({}, B), max_length=2, temperature=-1.0),
    ),
    "temperature-inf": (
        ValueError,
        "finite and at least 0",
        lambda m, w: w.generate(inputs({}, B), max_length=2, temperature=math.inf),
    ),
    "temperature-nan": (
        ValueError,
        "finite and at least 0",
        lambda m, w: w.generate(inputs({}, B), max_length=2, temperature=math.nan),
    ),
    "beam-and-temperature": (
        ValueError,
        "draws nothing",
        lambda m, w: w.generate(inputs({}, B), max_length=2, beam=2, temperature=1.0),
    ),
}


@pytest.mark.parametrize("error, says, call", REFUSED.values(), ids=REFUSED)
def test_calls_refuse(error, says, call):
    with pytest.raises(error, match=says):
        call(make(rnn.ManyToMany, {}), make(rnn.OneToMany, {}))
